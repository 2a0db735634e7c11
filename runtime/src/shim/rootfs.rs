//! The root filesystem that a snapshotter describes, mounted on the bundle's `rootfs`.
//!
//! It is mounted in the shim's own mount namespace, where the share is, so that it goes with the shim however that
//! ends, and is nothing that anybody else could leave mounted.
//!
//! For a pod with users of its own containerd has the snapshotter add `uidmap=` and `gidmap=`: the layers of the image
//! are then to be shown as theirs. An overlay takes no mapping, but its lower directories do: they are copied with one
//! for as long as it takes to mount it. Its upper directory is that pod's alone and has its owners already.

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use nix::unistd::fchdir;

use crate::bundle::IdMap;
use crate::sandbox::idmap;

/// The kernel takes a page of options, and the last byte ends the text (mount(2)).
const OPTIONS_MAX: usize = 4095;
/// Most mounts that are laid over each other on one target; a snapshotter gives one or two.
const LAYERS_MAX: usize = 64;
/// Where lower directories are mounted for a moment, beside the target.
const LOWER: &str = "lower";

/// Errors of a root filesystem.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the directory for it cannot be made
    #[error("cannot make {0}: {1}")]
    Directory(PathBuf, #[source] io::Error),
    /// the kernel refuses it
    #[error("cannot mount the {kind} filesystem {from} as root: {error}")]
    Mount { kind: String, from: String, error: io::Error },
    /// its files cannot be shown as others'
    #[error("cannot map the ids of the root filesystem's {from}: {error}")]
    IdMap { from: PathBuf, error: idmap::Error },
    /// it asks for something else than a mount
    #[error("cannot honour the root filesystem's {what} {value:?}: {remedy}")]
    Unsupported { what: &'static str, value: String, remedy: &'static str },
}

/// Mounts all of it, or nothing.
pub fn mount_all(mounts: &[Mount], target: &Path) -> Result<(), Error> {
    if mounts.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(target).map_err(|e| Error::Directory(target.to_owned(), e))?;
    for (index, layer) in mounts.iter().enumerate() {
        if let Err(e) = mount_one(layer, target) {
            (0..index).for_each(|_| unmount(target));
            return Err(e);
        }
    }
    Ok(())
}

/// Takes away whatever is mounted there.
pub fn unmount_all(target: &Path) {
    for _ in 0..LAYERS_MAX {
        if umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_err() {
            return;
        }
    }
}

fn unmount(target: &Path) {
    let _ = umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
}

fn mount_one(layer: &Mount, target: &Path) -> Result<(), Error> {
    if !layer.target.is_empty() {
        return Err(Error::Unsupported {
            what: "mount target",
            value: layer.target.clone(),
            remedy: "only the root itself can be mounted; use another snapshotter",
        });
    }
    let Options { flags, data, ids } = Options::parse(&layer.options)?;
    let failed =
        |error: io::Error| Error::Mount { kind: layer.type_.clone(), from: layer.source.clone(), error };
    let bind = flags.contains(MsFlags::MS_BIND);
    let first = if bind { flags & (MsFlags::MS_BIND | MsFlags::MS_REC) } else { flags };
    match &ids {
        Some(ids) if bind => {
            attach_copy(Path::new(&layer.source), flags.contains(MsFlags::MS_REC), ids, target)?;
        }
        _ => {
            let overlay = layer.type_ == "overlay";
            let (data, base) = match overlay && (ids.is_some() || data.len() > OPTIONS_MAX) {
                true => relative(&data).ok_or_else(|| failed(nix::errno::Errno::E2BIG.into()))?,
                false => (data, None),
            };
            let lower = ids.as_ref().filter(|_| overlay).zip(base.as_ref());
            let lower = lower.map(|(ids, base)| Lower::mount(base, ids, target)).transpose()?;
            // Paths in the options may be relative to a directory that they have in common.
            let there = lower.as_ref().map(|lower| &lower.0).or(base.as_ref());
            let _there = there.map(|there| Excursion::to(there)).transpose().map_err(failed)?;
            let data = CString::new(data).map_err(|e| failed(e.into()))?;
            let (from, kind) = (Some(layer.source.as_str()), Some(layer.type_.as_str()));
            mount(from, target, kind, first, Some(data.as_c_str())).map_err(|e| failed(e.into()))?;
            if let Some(ids) = ids.as_ref().filter(|_| !overlay) {
                attach_instead(ids, target)?;
            }
        }
    }
    let rest = flags - first;
    if bind && !rest.is_empty() {
        let again = flags | MsFlags::MS_REMOUNT;
        if let Err(e) = mount(None::<&str>, target, None::<&str>, again, None::<&str>) {
            unmount(target);
            return Err(failed(e.into()));
        }
    }
    Ok(())
}

/// Attaches a copy of what is mounted at `from` to the target, with a mapping.
fn attach_copy(from: &Path, recursive: bool, ids: &IdMap, target: &Path) -> Result<(), Error> {
    let failed = |error| Error::IdMap { from: from.to_owned(), error };
    let tree = idmap::copy(from, recursive, ids).map_err(failed)?;
    idmap::attach(&tree, target).map_err(|e| failed(idmap::Error::Other(e)))
}

/// Puts a copy with a mapping in the place of what is mounted on the target.
fn attach_instead(ids: &IdMap, target: &Path) -> Result<(), Error> {
    let failed = |error| Error::IdMap { from: target.to_owned(), error };
    let tree = idmap::copy(target, true, ids);
    unmount(target);
    idmap::attach(&tree.map_err(failed)?, target).map_err(|e| failed(idmap::Error::Other(e)))
}

/// A directory with an overlay's lower directories in it, shown as others'. It goes when it is dropped: the overlay
/// has mounts of its own by then.
struct Lower(PathBuf);

impl Lower {
    fn mount(base: &Path, ids: &IdMap, target: &Path) -> Result<Self, Error> {
        let place = target.with_file_name(LOWER);
        fs::create_dir_all(&place).map_err(|e| Error::Directory(place.clone(), e))?;
        attach_copy(base, true, ids, &place).inspect_err(|_| drop(fs::remove_dir(&place)))?;
        Ok(Lower(place))
    }
}

impl Drop for Lower {
    fn drop(&mut self) {
        unmount(&self.0);
        let _ = fs::remove_dir(&self.0);
    }
}

/// Options of mount(8), apart.
#[derive(Debug)]
struct Options {
    flags: MsFlags,
    /// Whose the files are to be, where that is not as they are stored.
    ids: Option<IdMap>,
    /// What the file system itself understands.
    data: String,
}

impl Options {
    fn parse(options: &[String]) -> Result<Self, Error> {
        let mut flags = MsFlags::empty();
        let mut data = Vec::new();
        let (mut uids, mut gids) = (None, None);
        for option in options {
            let (set, flag) = match option.as_str() {
                "" | "defaults" => continue,
                "loop" => {
                    return Err(Error::Unsupported {
                        what: "mount option",
                        value: "loop".into(),
                        remedy: "image files are not mounted here; use another snapshotter",
                    });
                }
                "ro" => (true, MsFlags::MS_RDONLY),
                "rw" => (false, MsFlags::MS_RDONLY),
                "bind" => (true, MsFlags::MS_BIND),
                "rbind" => (true, MsFlags::MS_BIND | MsFlags::MS_REC),
                "nosuid" => (true, MsFlags::MS_NOSUID),
                "suid" => (false, MsFlags::MS_NOSUID),
                "nodev" => (true, MsFlags::MS_NODEV),
                "dev" => (false, MsFlags::MS_NODEV),
                "noexec" => (true, MsFlags::MS_NOEXEC),
                "exec" => (false, MsFlags::MS_NOEXEC),
                "noatime" => (true, MsFlags::MS_NOATIME),
                "atime" => (false, MsFlags::MS_NOATIME),
                "nodiratime" => (true, MsFlags::MS_NODIRATIME),
                "relatime" => (true, MsFlags::MS_RELATIME),
                "strictatime" => (true, MsFlags::MS_STRICTATIME),
                "sync" => (true, MsFlags::MS_SYNCHRONOUS),
                "dirsync" => (true, MsFlags::MS_DIRSYNC),
                // Of mount(8) alone.
                name if name.starts_with("x-") || name.starts_with("X-") => continue,
                other => {
                    match other.split_once('=') {
                        Some(("uidmap", map)) => uids = Some(map),
                        Some(("gidmap", map)) => gids = Some(map),
                        _ => data.push(other),
                    }
                    continue;
                }
            };
            flags.set(flag, set);
        }
        let ids = match (uids, gids) {
            (None, None) => None,
            (uids, gids) => {
                let (uids, gids) = (uids.unwrap_or_default(), gids.unwrap_or_default());
                let refused = || Error::Unsupported {
                    what: "mount options",
                    value: format!("uidmap={uids} gidmap={gids}"),
                    remedy: "both must be STORED:SHOWN:COUNT, or several of that with commas between them",
                };
                Some(IdMap::of_containerd(uids, gids).ok_or_else(refused)?)
            }
        };
        Ok(Options { flags, ids, data: data.join(",") })
    }
}

/// An overlay's options with its lower directories named relative to one that they have in common, if there is one and
/// they are short enough then.
fn relative(data: &str) -> Option<(String, Option<PathBuf>)> {
    let mut options: Vec<String> = data.split(',').map(str::to_owned).collect();
    let lower = options.iter_mut().find(|option| option.starts_with("lowerdir="))?;
    let paths: Vec<PathBuf> = lower["lowerdir=".len()..].split(':').map(PathBuf::from).collect();
    let mut base = paths.first()?.parent()?.to_owned();
    while !paths.iter().all(|path| path.starts_with(&base)) {
        base = base.parent()?.to_owned();
    }
    let relative: Option<Vec<_>> = paths.iter().map(|p| p.strip_prefix(&base).ok()?.to_str()).collect();
    *lower = format!("lowerdir={}", relative?.join(":"));
    let short = options.join(",");
    (short.len() <= OPTIONS_MAX).then_some((short, Some(base)))
}

/// This process in another directory, until it is dropped.
struct Excursion(std::os::fd::OwnedFd);

impl Excursion {
    fn to(directory: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let home = open(".", flags, Mode::empty())?;
        nix::unistd::chdir(directory)?;
        Ok(Excursion(home))
    }
}

impl Drop for Excursion {
    fn drop(&mut self) {
        // The directory is open: there is nothing that could fail.
        let _ = fchdir(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::sandbox::share::tests::in_namespace;

    fn options(list: &[&str]) -> Result<Options, Error> {
        Options::parse(&list.iter().map(|s| s.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn flags_and_data_are_told_apart_and_the_last_word_counts() {
        let parsed = options(&["rbind", "ro", "rw", "nosuid", "x-mark"]).unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_NOSUID);
        assert!(parsed.data.is_empty());
        let parsed = options(&["index=off", "lowerdir=/a:/b", "ro"]).unwrap();
        assert_eq!((parsed.data.as_str(), parsed.flags), ("index=off,lowerdir=/a:/b", MsFlags::MS_RDONLY));
        assert!(options(&["loop"]).err().unwrap().to_string().contains("loop"));
    }

    #[test]
    fn many_layers_fit_into_a_page_of_options() {
        let layers: Vec<String> = (0..120)
            .map(|n| format!("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/{n}/fs"))
            .collect();
        let data = format!("workdir=/w,upperdir=/u,lowerdir={}", layers.join(":"));
        assert!(data.len() > OPTIONS_MAX);
        let (short, base) = relative(&data).unwrap();
        assert!(short.len() <= OPTIONS_MAX);
        assert!(short.starts_with("workdir=/w,upperdir=/u,lowerdir=0/fs:1/fs:"));
        assert_eq!(
            base.unwrap(),
            Path::new("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots")
        );
        assert!(relative("upperdir=/u").is_none());
    }

    fn layer(kind: &str, source: &Path, options: &[&str]) -> Mount {
        Mount {
            type_: kind.into(),
            source: source.display().to_string(),
            options: options.iter().map(|option| option.to_string()).collect(),
            ..Default::default()
        }
    }

    const IDS: [&str; 2] = ["uidmap=0:100000:65536", "gidmap=0:200000:65536"];

    #[test]
    fn mappings_are_of_users_and_groups() {
        let ids = options(&IDS).unwrap().ids.unwrap();
        assert_eq!(ids.maps(), ["0 100000 65536\n", "0 200000 65536\n"]);
        for wrong in [&IDS[..1], &["uidmap=0:1", "gidmap=0:1:1"]] {
            let error = options(wrong).unwrap_err().to_string();
            assert!(error.contains("uidmap=") && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn layers_are_shown_as_the_pods_own() {
        in_namespace(|| {
            let dir = tempfile::tempdir().unwrap();
            let path = |name: &str| dir.path().join(name);
            fs::create_dir(path("snapshots")).unwrap();
            // Of a file system that can be mapped, whatever the directory is on.
            mount(Some("x"), &path("snapshots"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            for name in ["1/fs", "2/fs", "3/fs", "3/work"] {
                fs::create_dir_all(path("snapshots").join(name)).unwrap();
            }
            fs::write(path("snapshots/1/fs/file"), "text").unwrap();
            fs::write(path("snapshots/2/fs/other"), "").unwrap();
            std::os::unix::fs::chown(path("snapshots/2/fs/other"), Some(7), Some(8)).unwrap();
            let owner = |path: &Path| fs::metadata(path).map(|found| (found.uid(), found.gid())).unwrap();
            let root = path("bundle/rootfs");
            let [at_1, at_2, upper, work] = ["1/fs", "2/fs", "3/fs", "3/work"]
                .map(|name| path("snapshots").join(name).display().to_string());
            std::os::unix::fs::chown(&upper, Some(100_000), Some(200_000)).unwrap();
            let lower = format!("lowerdir={at_2}:{at_1}");
            let writable = [format!("upperdir={upper}"), format!("workdir={work}")];
            let overlay: Vec<_> =
                IDS.into_iter().chain([lower.as_str(), &writable[0], &writable[1], "index=off"]).collect();
            let bind: Vec<_> = IDS.into_iter().chain(["rbind", "ro"]).collect();
            let snapshot = path("snapshots/1/fs");
            for layers in [layer("overlay", Path::new("overlay"), &overlay), layer("bind", &snapshot, &bind)]
            {
                match mount_all(std::slice::from_ref(&layers), &root) {
                    Err(Error::IdMap { error: idmap::Error::FileSystem(kind), .. }) => {
                        return eprintln!("skipped: this kernel's {kind} has no id-mapped mounts");
                    }
                    done => done.unwrap(),
                }
                assert_eq!((owner(&root.join("file")), owner(&snapshot)), ((100_000, 200_000), (0, 0)));
                if layers.type_ == "overlay" {
                    assert_eq!(owner(&root.join("other")), (100_007, 200_008));
                    assert_eq!(owner(&root), (100_000, 200_000));
                } else {
                    assert!(fs::write(root.join("new"), "").is_err());
                }
                unmount_all(&root);
                assert_eq!(fs::read_dir(path("bundle")).unwrap().count(), 1, "only the mount point is left");
            }
            let fresh = layer("tmpfs", Path::new("x"), &IDS);
            mount_all(&[fresh], &root).unwrap();
            assert_eq!(owner(&root), (100_000, 200_000));
            unmount_all(&root);
            assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
        });
    }
}
