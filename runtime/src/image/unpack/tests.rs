//! Layers good and hostile, unpacked into a temporary directory.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};

use tar::EntryType;
use tempfile::TempDir;

use super::super::tarball::tests::Writer;
use super::*;

/// A layer's directory in a directory with a file that nothing may touch.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("layer")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/file"), "untouched").unwrap();
        Place(dir)
    }

    fn layer(&self) -> std::path::PathBuf {
        self.0.path().join("layer")
    }

    fn unpack(&self, archive: Writer) -> Result<Unpacked, Error> {
        let result = unpack(&archive.end()[..], &self.layer());
        let outside: Vec<_> = fs::read_dir(self.0.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(outside.len(), 2, "{outside:?}");
        assert_eq!(fs::read_dir(self.0.path().join("outside")).unwrap().count(), 1);
        assert_eq!(fs::read_to_string(self.0.path().join("outside/file")).unwrap(), "untouched");
        result
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.layer().join(path)).unwrap()
    }

    fn meta(&self, path: &str) -> fs::Metadata {
        fs::symlink_metadata(self.layer().join(path)).unwrap()
    }

    fn is_opaque(&self, path: &str) -> bool {
        xattr(&self.layer().join(path), OPAQUE_XATTR).as_deref() == Some(b"y")
    }
}

fn xattr(path: &Path, name: &std::ffi::CStr) -> Option<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut value = vec![0; 256];
    // SAFETY: lgetxattr(2) reads two strings that end with NUL and writes as many bytes as `value` has.
    let count =
        unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(count).ok()?);
    Some(value)
}

/// Whether this process may make what overlayfs needs: as root on a host it may.
fn may_hide() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let probe = dir.path().join("probe");
    let made = mknodat(nix::fcntl::AT_FDCWD, &probe, SFlag::S_IFCHR, Mode::empty(), 0).is_ok();
    let may = made && set_xattr(&File::open(dir.path()).unwrap(), c"trusted.overlay.probe", b"y").is_ok();
    if !may {
        eprintln!("skipped: no CAP_SYS_ADMIN, or no trusted attributes here; the lab has this in tests/e2e");
    }
    may
}

#[test]
fn files_directories_and_links_are_there_with_their_metadata() {
    let place = Place::new();
    let with = |kind, mode: u32, path: &str, content: &[u8]| (kind, mode, path.to_owned(), content.to_vec());
    let mut archive = Writer::default();
    for (kind, mode, path, content) in [
        with(EntryType::Directory, 0o1777, "./tmp/", b""),
        with(EntryType::Regular, 0o4755, "/usr/bin/su", b"program"),
        with(EntryType::Fifo, 0o600, "tmp/pipe", b""),
    ] {
        archive = archive.entry(kind, &path, &content, |header| {
            header.set_mode(mode);
            header.set_uid(0);
            header.set_gid(0);
        });
    }
    let archive = archive.link(EntryType::Symlink, "usr/bin/sudo", "su").link(
        EntryType::Link,
        "usr/bin/hard",
        "usr/bin/su",
    );
    let unpacked = place.unpack(archive).unwrap();
    assert_eq!(place.read("usr/bin/sudo"), "program");
    assert_eq!(place.meta("usr/bin/su").mode() & 0o7777, 0o4755);
    assert_eq!(place.meta("tmp").mode() & 0o7777, 0o1777);
    assert_eq!(place.meta("tmp").mtime(), 1_000_000_000, "not when the pipe was made");
    assert_eq!(place.meta("usr/bin/su").mtime(), 1_000_000_000);
    assert_eq!(place.meta("usr/bin/hard").ino(), place.meta("usr/bin/su").ino());
    assert!(place.meta("tmp/pipe").file_type().is_fifo());
    assert_eq!(unpacked.bytes, 7);
    assert_eq!(unpacked.implicit, BTreeSet::from([b"usr".to_vec(), b"usr/bin".to_vec()]));
    assert_eq!(place.meta("usr").mode() & 0o7777, 0o755);
}

#[test]
fn a_directory_that_comes_later_is_not_implicit_and_keeps_its_content() {
    let place = Place::new();
    let unpacked = place.unpack(Writer::default().file("a/b/f", b"x").dir("a/b/").dir("a")).unwrap();
    assert!(unpacked.implicit.is_empty());
    assert_eq!(place.read("a/b/f"), "x");
}

#[test]
fn paths_that_lead_out_are_refused_and_nothing_outside_is_touched() {
    for archive in [
        Writer::default().file("../outside/file", b"x"),
        Writer::default().file("a/../../outside/file", b"x"),
        Writer::default().file("..", b"x"),
        Writer::default().dir("../new"),
        Writer::default().link(EntryType::Link, "a", "../outside/file"),
        Writer::default().link(EntryType::Link, "a", "/../outside/file"),
        Writer::default().file("../outside/.wh.file", b""),
        Writer::default().pax(&[("path", b"../outside/file")]).file("fine", b"x"),
        Writer::default().pax(&[("linkpath", b"../outside/file")]).link(EntryType::Link, "a", "b"),
    ] {
        let error = Place::new().unpack(archive).unwrap_err();
        assert!(matches!(error, Error::Outside(_)), "{error}");
    }
}

#[test]
fn links_are_followed_as_if_the_layer_were_the_root() {
    let place = Place::new();
    let outside = place.0.path().join("outside").display().to_string();
    let archive = Writer::default()
        .dir("etc")
        .link(EntryType::Symlink, "abs", "/etc")
        .link(EntryType::Symlink, "up", "../../../../etc")
        .file("abs/one", b"1")
        .file("up/two", b"2")
        .link(EntryType::Link, "abs/three", "up/two");
    place.unpack(archive).unwrap();
    assert_eq!([place.read("etc/one"), place.read("etc/two"), place.read("etc/three")], ["1", "2", "2"]);

    // To places that are on the host and not in the layer.
    for target in [&*outside, "../outside", "../../../../../../../../etc", "/proc/self/root"] {
        let archive = Writer::default().link(EntryType::Symlink, "l", target);
        let place = Place::new();
        let result = place.unpack(archive.file("l/file", b"x").file("l/.wh.file", b"").dir("l/new"));
        assert!(matches!(result, Err(Error::Entry { .. })), "{target}");
        assert!(place.meta("l").is_symlink());
    }
}

#[test]
fn a_file_replaces_a_link_and_is_not_written_through_it() {
    let place = Place::new();
    let target = place.0.path().join("outside/file").display().to_string();
    let archive = Writer::default()
        .link(EntryType::Symlink, "a", &target)
        .link(EntryType::Symlink, "b", "../outside/file")
        .link(EntryType::Symlink, "d", "../outside")
        .file("a", b"mine")
        .file("b", b"mine")
        .dir("d")
        .entry(EntryType::Directory, "d", b"", |header| header.set_mode(0o700));
    place.unpack(archive).unwrap();
    assert_eq!([place.read("a"), place.read("b")], ["mine", "mine"]);
    assert!(place.meta("d").is_dir());
    let outside = fs::metadata(place.0.path().join("outside")).unwrap();
    assert_ne!(outside.mtime(), 1_000_000_000);
}

#[test]
fn the_last_entry_of_a_name_counts_whatever_was_there() {
    let place = Place::new();
    let archive = Writer::default()
        .file("f", b"old")
        .file("f", b"new")
        .file("d/deep/er", b"x")
        .file("d", b"file now")
        .file("x", b"file")
        .dir("x")
        .file("x/y", b"in a directory now")
        .file("p/q", b"1")
        .file("p", b"2")
        .dir("p")
        .file("p/r", b"3");
    place.unpack(archive).unwrap();
    assert_eq!(
        [place.read("f"), place.read("d"), place.read("x/y")],
        ["new", "file now", "in a directory now"]
    );
    assert_eq!(place.read("p/r"), "3");
    assert!(!place.layer().join("p/q").exists());
}

#[test]
fn a_hard_link_to_what_is_not_in_the_layer_is_refused() {
    for archive in [
        Writer::default().link(EntryType::Link, "a", "b"),
        Writer::default().dir("d").link(EntryType::Link, "a", "d"),
        Writer::default().link(EntryType::Link, "a", "/"),
        Writer::default().link(EntryType::Symlink, "l", "/../outside").link(EntryType::Link, "a", "l/file"),
    ] {
        let error = Place::new().unpack(archive).unwrap_err();
        assert!(matches!(error, Error::Entry { .. }), "{error}");
    }
    Place::new().unpack(Writer::default().file("a", b"x").link(EntryType::Link, "./a", "a")).unwrap();
}

#[test]
fn device_nodes_are_left_out() {
    let place = Place::new();
    let device = |archive: Writer, kind, path: &str, major, minor| {
        archive.entry(kind, path, b"", |header| {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        })
    };
    let archive = device(Writer::default(), EntryType::Char, "dev/kmsg", 1, 11);
    let archive = device(archive, EntryType::Block, "dev/sda", 8, 0);
    let archive = device(archive, EntryType::Char, "hides", 0, 0);
    place.unpack(archive.file("after", b"x")).unwrap();
    assert!(!place.layer().join("dev").exists());
    assert!(fs::symlink_metadata(place.layer().join("hides")).is_err());
    assert_eq!(place.read("after"), "x");
}

#[test]
fn whiteouts_become_those_of_overlayfs() {
    if !may_hide() {
        return;
    }
    let place = Place::new();
    let archive = Writer::default()
        .file("etc/.wh.gone", b"")
        .dir("opt")
        .file("opt/.wh..wh..opq", b"")
        .file("opt/new", b"x")
        // Both hide only what lies below, in whichever order they come.
        .file(".wh.first", b"")
        .dir("first")
        .file("first/f", b"1")
        .dir("second")
        .file("second/f", b"2")
        .file(".wh.second", b"")
        .file("third", b"3")
        .file(".wh.third", b"")
        .file(".wh.fourth", b"")
        .file("fourth/deep/f", b"4")
        .file(".wh..wh.plnk", b"");
    place.unpack(archive).unwrap();
    assert!(place.meta("etc/gone").file_type().is_char_device() && place.meta("etc/gone").rdev() == 0);
    for dir in ["opt", "first", "second", "fourth"] {
        assert!(place.is_opaque(dir), "{dir}");
    }
    assert!(!place.is_opaque("etc") && !place.is_opaque("fourth/deep"));
    assert_eq!(
        ["first/f", "second/f", "third", "fourth/deep/f"].map(|f| place.read(f)),
        ["1", "2", "3", "4"]
    );
    assert_eq!(fs::read_dir(place.layer()).unwrap().count(), 6);
    // A whiteout is no file to link to.
    let archive = Writer::default().file(".wh.a", b"").link(EntryType::Link, "b", "a");
    Place::new().unpack(archive).unwrap_err();
}

#[test]
fn a_whiteout_of_nothing_is_refused() {
    for name in [".wh.", "a/.wh..", ".wh..."] {
        assert!(Place::new().unpack(Writer::default().file(name, b"")).is_err(), "{name}");
    }
}

#[test]
fn attributes_that_would_speak_to_the_host_are_left_out() {
    let place = Place::new();
    let records: [(&str, &[u8]); 6] = [
        ("SCHILY.xattr.user.mine", b"va\nlue"),
        ("SCHILY.xattr.trusted.overlay.redirect", b"/../../outside"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.user.overlay.opaque", b"y"),
        ("SCHILY.xattr.security.selinux", b"x"),
        ("SCHILY.xattr.security.ima", b"x"),
    ];
    place.unpack(Writer::default().pax(&records).dir("d").pax(&records).file("f", b"")).unwrap();
    for path in ["d", "f"] {
        let path = place.layer().join(path);
        for name in [
            c"trusted.overlay.redirect",
            OPAQUE_XATTR,
            c"user.overlay.opaque",
            c"security.selinux",
            c"security.ima",
        ] {
            assert_eq!(xattr(&path, name), None, "{name:?}");
        }
        // Where this file system has any.
        let probe = File::open(&path).unwrap();
        if set_xattr(&probe, c"user.probe", b"").is_ok() {
            assert_eq!(xattr(&path, c"user.mine").unwrap(), b"va\nlue");
        }
    }
}

#[test]
fn holes_stay_holes() {
    let place = Place::new();
    let records: [(&str, &[u8]); 3] = [
        ("GNU.sparse.major", b"0"),
        ("GNU.sparse.size", b"1073741824"),
        ("GNU.sparse.map", b"1048576,3,536870912,3"),
    ];
    place.unpack(Writer::default().pax(&records).file("f", b"onetwo")).unwrap();
    let meta = place.meta("f");
    assert_eq!(meta.len(), 1 << 30);
    assert!(meta.blocks() * 512 < 16 << 20);
    let file = File::open(place.layer().join("f")).unwrap();
    let mut bytes = [0; 3];
    file.read_exact_at(&mut bytes, 536_870_912).unwrap();
    assert_eq!(&bytes, b"two");
}

#[test]
fn what_is_too_large_is_refused() {
    let size = (65_u64 << 30).to_string();
    let records: [(&str, &[u8]); 3] =
        [("GNU.sparse.major", b"0"), ("GNU.sparse.size", size.as_bytes()), ("GNU.sparse.map", b"0,1")];
    let error = Place::new().unpack(Writer::default().pax(&records).file("f", b"x")).unwrap_err();
    assert!(matches!(error, Error::TooLarge(_)), "{error}");
    let long = "n".repeat(256);
    let error =
        Place::new().unpack(Writer::default().pax(&[("path", long.as_bytes())]).file("f", b"")).unwrap_err();
    assert!(error.to_string().contains("too long"), "{error}");
}

#[test]
fn the_root_of_a_layer_is_no_link_that_is_followed() {
    let place = Place::new();
    fs::remove_dir(place.layer()).unwrap();
    symlink("outside", place.layer()).unwrap();
    assert!(unpack(&Writer::default().file("x", b"").end()[..], &place.layer()).is_err());
    assert_eq!(fs::read_dir(place.0.path().join("outside")).unwrap().count(), 1);
}
