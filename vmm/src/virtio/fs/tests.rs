//! Requests are made by hand, as a guest's kernel would or would not.

mod mount;

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::{Buf, DESC_NEXT, DESC_WRITE, TestDriver};
use mount::*;

const HIPRIO: usize = 0;
const REQUESTS: usize = 1;

fn is_root() -> bool {
    // SAFETY: no arguments.
    unsafe { libc::geteuid() == 0 }
}

#[test]
fn the_configuration_space_holds_the_tag_and_one_request_queue() {
    let mut mount = Mount::unmounted();
    let mut config = [0xff; 40];
    mount.driver.transport.read(0x100, &mut config);
    assert_eq!(&config[..6], b"share\0");
    assert_eq!(config[6..36], [0; 30]);
    assert_eq!(config[36..], 1u32.to_le_bytes());
}

#[test]
fn init_agrees_on_large_requests_and_write_through() {
    let mut mount = Mount::unmounted();
    let reply = u32s(&mount.call(INIT, 0, &init_request()).unwrap());
    let flags = reply[3];
    let max_write = reply[5];
    assert_eq!(max_write, 1 << 20);
    assert_eq!(flags >> 16 & 1, 0, "FUSE_WRITEBACK_CACHE must be off: volumes are shared");
    assert_eq!(flags >> 1 & 1, 0, "FUSE_POSIX_LOCKS must be off: locks stay in the guest");
    assert_eq!(flags >> 10 & 1, 0, "FUSE_FLOCK_LOCKS must be off: locks stay in the guest");
    assert_eq!(flags >> 12 & 1, 1, "FUSE_AUTO_INVAL_DATA must be on: the host changes files too");
    assert_eq!(flags >> 13 & 1, 1, "FUSE_DO_READDIRPLUS");
    assert_eq!(flags >> 28 & 1, 1, "FUSE_HANDLE_KILLPRIV_V2");
    // A reset and a second mount work.
    mount.driver.start();
    mount.init();
}

#[test]
fn a_file_is_found_opened_and_read() {
    let mut mount = Mount::new();
    mount.write("file", b"content");
    let (node, mode) = mount.lookup(ROOT, "file").unwrap();
    assert_eq!(mode & libc::S_IFMT, libc::S_IFREG);
    let handle = mount.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(mount.read(node, handle, 0, 4096).unwrap(), b"content");
    assert_eq!(mount.read(node, handle, 3, 2).unwrap(), b"te");
    assert_eq!(mount.read(node, handle, 7, 10).unwrap(), b"");
    let release = [&handle.to_le_bytes()[..], &words(&[0, 0, 0, 0])].concat();
    mount.call(RELEASE, node, &release).unwrap();
    assert_eq!(mount.read(node, handle, 0, 1), Err(libc::EBADF));
    assert_eq!(mount.lookup(ROOT, "absent"), Err(libc::ENOENT));
}

#[test]
fn only_closing_a_file_that_could_be_written_costs_a_request() {
    let mut mount = Mount::new();
    mount.write("file", b"content");
    let (node, _) = mount.lookup(ROOT, "file").unwrap();
    for (flags, no_flush) in [(libc::O_RDONLY, 1), (libc::O_RDWR, 0), (libc::O_WRONLY, 0)] {
        let reply = mount.call(OPEN, node, &words(&[flags as u32, 0])).unwrap();
        // FOPEN_NOFLUSH
        assert_eq!(u32s(&reply)[2] >> 5 & 1, no_flush);
        let flush = [&reply[..8], &[0; 16]].concat();
        mount.call(FLUSH, node, &flush).unwrap();
    }
}

#[test]
fn a_file_is_created_written_and_synced_with_the_owner_that_the_guest_names() {
    let mut mount = Mount::new();
    std::fs::set_permissions(mount.share(""), PermissionsExt::from_mode(0o755)).unwrap();
    let user = if is_root() { 4711 } else { 0 };
    let body = [words(&[libc::O_RDWR as u32, 0o640, 0o022, 0]), cstr("new")].concat();
    // The guest's kernel has checked that this user may: perhaps by a supplementary group.
    let reply = mount.call_as(user, CREATE, ROOT, &body).unwrap();
    let (node, handle) = (u64_at(&reply, 0), u64_at(&reply, 128));
    mount.write_at(node, handle, 0, b"written").unwrap();
    let sync = [&handle.to_le_bytes()[..], &words(&[0, 0])].concat();
    mount.call(FSYNC, node, &sync).unwrap();
    assert_eq!(std::fs::read(mount.share("new")).unwrap(), b"written");
    let meta = std::fs::metadata(mount.share("new")).unwrap();
    assert_eq!(meta.mode() & 0o7777, 0o640);
    if is_root() {
        assert_eq!((meta.uid(), meta.gid()), (4711, 4711));
    }
}

#[test]
fn a_directory_lists_its_entries_with_and_without_their_attributes() {
    let mut mount = Mount::new();
    for i in 0..100 {
        mount.write(&format!("file-{i:03}"), b"");
    }
    for op in [READDIR, READDIRPLUS] {
        let handle = u64_at(&mount.call(OPENDIR, ROOT, &words(&[0, 0])).unwrap(), 0);
        let mut names = std::collections::BTreeSet::new();
        let mut offset = 0u64;
        loop {
            // The first replies have room for one entry only, the others for some.
            let size = if names.len() < 4 { 160 } else { 4096 };
            let size = words(&[size, 0, 0, 0, 0, 0]);
            let body = [&handle.to_le_bytes()[..], &offset.to_le_bytes(), &size].concat();
            let list = mount.call(op, ROOT, &body).unwrap();
            if list.is_empty() {
                break;
            }
            let mut at = 0;
            while at < list.len() {
                let dirent = at + if op == READDIRPLUS { 128 } else { 0 };
                offset = u64_at(&list, dirent + 8);
                let len = u32s(&list[dirent + 16..dirent + 20])[0] as usize;
                let name = &list[dirent + 24..dirent + 24 + len];
                names.insert(String::from_utf8(name.to_vec()).unwrap());
                at = (dirent + 24 + len).next_multiple_of(8);
            }
        }
        assert_eq!(names.len(), 102, "operation {op}");
        assert!(names.contains("file-042") && names.contains(".") && names.contains(".."));
    }
}

#[test]
fn hard_links_need_no_more_rights_than_the_jail_has() {
    if is_root() {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(rustix::thread::CapabilitySet::DAC_READ_SEARCH);
        sets.permitted.remove(rustix::thread::CapabilitySet::DAC_READ_SEARCH);
        rustix::thread::set_capabilities(None, sets).unwrap();
    }
    let mut mount = Mount::new();
    std::fs::create_dir(mount.share("sub")).unwrap();
    symlink("nowhere", mount.share("symbolic")).unwrap();
    let (sub, _) = mount.lookup(ROOT, "sub").unwrap();
    let body = [words(&[libc::O_RDWR as u32, 0o640, 0o022, 0]), cstr("new")].concat();
    // After this the thread's credentials are no longer those with which it has opened things.
    let user = if is_root() { 4711 } else { 0 };
    std::fs::set_permissions(mount.share(""), PermissionsExt::from_mode(0o777)).unwrap();
    let file = u64_at(&mount.call_as(user, CREATE, ROOT, &body).unwrap(), 0);
    let (symbolic, _) = mount.lookup(ROOT, "symbolic").unwrap();
    for (node, name) in [(file, "hard"), (symbolic, "link")] {
        let reply = mount.call(LINK, sub, &[&node.to_le_bytes()[..], &cstr(name)].concat()).unwrap();
        assert_eq!(u64_at(&reply, 0), node);
    }
    assert_eq!(std::fs::metadata(mount.share("sub/hard")).unwrap().nlink(), 2);
    assert_eq!(std::fs::read_link(mount.share("sub/link")).unwrap(), Path::new("nowhere"));
    std::fs::rename(mount.share("symbolic"), mount.share("elsewhere")).unwrap();
    let again = [&symbolic.to_le_bytes()[..], &cstr("again")].concat();
    mount.call(LINK, sub, &again).unwrap();
    assert_eq!(mount.call(LINK, sub, &again), Err(libc::EEXIST));
}

#[test]
fn names_that_are_not_one_component_are_refused() {
    let mut mount = Mount::new();
    std::fs::create_dir(mount.share("sub")).unwrap();
    std::fs::write(mount.dir.join("secret"), b"outside").unwrap();
    let (sub, _) = mount.lookup(ROOT, "sub").unwrap();
    let absolute = mount.dir.join("secret").display().to_string();
    for name in ["..", ".", "", "../secret", "sub/..", "/", "/etc/passwd", "a/b", &absolute] {
        for parent in [ROOT, sub] {
            assert_eq!(mount.lookup(parent, name), Err(libc::EINVAL), "lookup {name:?}");
            let create = [words(&[libc::O_RDWR as u32, 0o600, 0, 0]), cstr(name)].concat();
            assert_eq!(mount.call(CREATE, parent, &create), Err(libc::EINVAL), "create {name:?}");
            let mkdir = [words(&[0o700, 0]), cstr(name)].concat();
            assert_eq!(mount.call(MKDIR, parent, &mkdir), Err(libc::EINVAL), "mkdir {name:?}");
            let mknod = [words(&[libc::S_IFREG | 0o600, 0, 0, 0]), cstr(name)].concat();
            assert_eq!(mount.call(MKNOD, parent, &mknod), Err(libc::EINVAL), "mknod {name:?}");
            assert_eq!(mount.call(UNLINK, parent, &cstr(name)), Err(libc::EINVAL), "unlink {name:?}");
            let link = [cstr(name), cstr("target")].concat();
            assert_eq!(mount.call(SYMLINK, parent, &link), Err(libc::EINVAL), "symlink {name:?}");
            let rename = [&ROOT.to_le_bytes()[..], &cstr("sub"), &cstr(name)].concat();
            assert_eq!(mount.call(RENAME, parent, &rename), Err(libc::EINVAL), "rename to {name:?}");
            let rename = [&ROOT.to_le_bytes()[..], &cstr(name), &cstr("new")].concat();
            assert_eq!(mount.call(RENAME, parent, &rename), Err(libc::EINVAL), "rename {name:?}");
            let hard = [&sub.to_le_bytes()[..], &cstr(name)].concat();
            assert_eq!(mount.call(LINK, parent, &hard), Err(libc::EINVAL), "link {name:?}");
        }
    }
    assert_eq!(std::fs::read(mount.dir.join("secret")).unwrap(), b"outside");
    assert_eq!(std::fs::read_dir(&mount.dir).unwrap().count(), 2);
}

#[test]
fn symbolic_links_are_never_followed_by_the_host() {
    let mut mount = Mount::new();
    let secret = mount.dir.join("secret");
    std::fs::write(&secret, b"outside").unwrap();
    symlink(&secret, mount.share("link")).unwrap();
    symlink(&mount.dir, mount.share("dir")).unwrap();
    for target in [secret.display().to_string(), "../secret".into(), "..".into()] {
        let _ = std::fs::remove_file(mount.share("own"));
        let body = [cstr("own"), cstr(&target)].concat();
        let entry = mount.call(SYMLINK, ROOT, &body).unwrap();
        // The text is the guest's to follow, in its own name space.
        let node = u64_at(&entry, 0);
        assert_eq!(mount.call(READLINK, node, &[]).unwrap(), target.as_bytes());
        assert_eq!(mount.open(node, libc::O_RDONLY), Err(libc::EBADF));
    }
    for name in ["link", "dir"] {
        let (node, mode) = mount.lookup(ROOT, name).unwrap();
        assert_eq!(mode & libc::S_IFMT, libc::S_IFLNK);
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_DIRECTORY, libc::O_PATH] {
            assert_eq!(mount.open(node, flags), Err(libc::EBADF));
        }
        assert!(mount.lookup(node, "secret").is_err());
        let create = [words(&[libc::O_RDWR as u32, 0o600, 0, 0]), cstr("x")].concat();
        assert!(mount.call(CREATE, node, &create).is_err());
        // Creating over it opens the link itself or nothing.
        let create = [words(&[libc::O_RDWR as u32, 0o600, 0, 0]), cstr(name)].concat();
        assert!(mount.call(CREATE, ROOT, &create).is_err());
        // valid = FATTR_SIZE, size 0
        let truncate = [words(&[8, 0]), vec![0; 80]].concat();
        assert!(mount.call(SETATTR, node, &truncate).is_err());
    }
    assert_eq!(std::fs::read(&secret).unwrap(), b"outside");
    assert!(!mount.dir.join("x").exists());
}

#[test]
fn special_files_of_the_host_are_seen_but_not_opened() {
    let mut mount = Mount::new();
    let path = std::ffi::CString::new(mount.share("fifo").display().to_string()).unwrap();
    // SAFETY: a valid string.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
    let (node, mode) = mount.lookup(ROOT, "fifo").unwrap();
    assert_eq!(mode & libc::S_IFMT, libc::S_IFIFO);
    // It would block the thread for ever.
    assert_eq!(mount.open(node, libc::O_RDONLY), Err(libc::EBADF));
}

#[test]
fn device_nodes_and_whiteouts_cannot_be_made_but_sockets_and_pipes_can() {
    let mut mount = Mount::new();
    let mut mknod = |mode: u32, rdev: u32, name: &str| {
        let body = [words(&[mode | 0o600, rdev, 0, 0]), cstr(name)].concat();
        mount.call(MKNOD, ROOT, &body).map(|_| ())
    };
    for mode in [libc::S_IFBLK, libc::S_IFCHR] {
        assert_eq!(mknod(mode, 0x0103, "device"), Err(libc::EPERM));
    }
    assert_eq!(mknod(libc::S_IFBLK, 0, "device"), Err(libc::EPERM));
    assert_eq!(mknod(libc::S_IFCHR, 0, "device"), Err(libc::EPERM));
    assert_eq!(mknod(libc::S_IFDIR, 0, "device"), Err(libc::EPERM));
    mknod(libc::S_IFIFO, 0, "pipe").unwrap();
    mknod(libc::S_IFSOCK, 0, "socket").unwrap();
    mknod(libc::S_IFREG, 0, "file").unwrap();
    assert!(std::fs::metadata(mount.share("socket")).unwrap().file_type().is_socket());
    assert!(!mount.share("device").exists());
}

#[test]
fn attributes_outside_of_the_allow_list_are_neither_read_nor_written_nor_listed() {
    let mut mount = Mount::new();
    mount.write("file", b"");
    let (node, _) = mount.lookup(ROOT, "file").unwrap();
    let mut set = |name: &str| {
        let body = [words(&[5, 0]), cstr(name), b"value".to_vec()].concat();
        mount.call(SETXATTR, node, &body).map(|_| ())
    };
    for name in ["trusted.overlay.opaque", "security.selinux", "system.nfs4_acl", "os2.x", ""] {
        assert_eq!(set(name), Err(libc::EOPNOTSUPP), "{name}");
    }
    let supported = set("user.colour").is_ok();
    let get = [words(&[64, 0]), cstr("security.selinux")].concat();
    assert_eq!(mount.call(GETXATTR, node, &get), Err(libc::EOPNOTSUPP));
    if supported {
        let get = [words(&[64, 0]), cstr("user.colour")].concat();
        assert_eq!(mount.call(GETXATTR, node, &get).unwrap(), b"value");
        let path = mount.share("file");
        set_host_xattr(&path, "trusted.secret");
        assert_eq!(mount.call(LISTXATTR, node, &words(&[1024, 0])).unwrap(), cstr("user.colour"));
        // A size that would be 4 GiB on the host.
        let get = [words(&[u32::MAX, 0]), cstr("user.colour")].concat();
        let _ = mount.call(GETXATTR, node, &get);
    }
}

fn set_host_xattr(path: &Path, name: &str) {
    let path = std::ffi::CString::new(path.display().to_string()).unwrap();
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: valid strings and an empty value. It may fail where the caller is not root.
    unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), std::ptr::null(), 0, 0) };
}

#[test]
fn unknown_nodes_and_handles_are_errors() {
    let mut mount = Mount::new();
    mount.write("file", b"content");
    let (node, _) = mount.lookup(ROOT, "file").unwrap();
    let handle = mount.open(node, libc::O_RDONLY).unwrap();
    for other in [0, 2, 999, u64::MAX - 1000] {
        assert_eq!(mount.lookup(other + 1000, "file"), Err(libc::EBADF));
        assert_eq!(mount.open(other + 1000, 0), Err(libc::EBADF));
        assert_eq!(mount.call(GETATTR, other + 1000, &[0; 16]), Err(libc::EBADF));
    }
    for other in [0, handle + 1, u64::MAX] {
        assert_eq!(mount.read(node, other, 0, 16), Err(libc::EBADF));
    }
    // A handle of one file with the node of another.
    assert_eq!(mount.read(ROOT, handle, 0, 16), Err(libc::EBADF));
}

#[test]
fn forgotten_nodes_are_gone_and_forgetting_too_much_does_no_harm() {
    let mut mount = Mount::new();
    mount.write("file", b"content");
    let (node, _) = mount.lookup(ROOT, "file").unwrap();
    let forget = |mount: &mut Mount, op: u32, node: u64, body: &[u8]| {
        let len = 40 + body.len() as u32;
        let header = [&words(&[len, op])[..], &[0; 8], &node.to_le_bytes(), &[0; 16]].concat();
        let at = mount.driver.put(&[&header, body].concat());
        mount.driver.add(HIPRIO, &[Buf::Read(at, len)]);
        mount.driver.kick(HIPRIO);
        assert_eq!(mount.driver.wait_used(HIPRIO).1, 0);
    };
    forget(&mut mount, FORGET, node, &u64::MAX.to_le_bytes());
    assert_eq!(mount.call(GETATTR, node, &[0; 16]), Err(libc::EBADF));
    forget(&mut mount, FORGET, ROOT, &u64::MAX.to_le_bytes());
    let (node, _) = mount.lookup(ROOT, "file").unwrap();
    let batch = [&words(&[2, 0])[..], &node.to_le_bytes(), &1u64.to_le_bytes(), &[0xff; 16]].concat();
    forget(&mut mount, BATCH_FORGET, 0, &batch);
    assert_eq!(mount.call(GETATTR, node, &[0; 16]), Err(libc::EBADF));
    // More than there is.
    forget(&mut mount, BATCH_FORGET, 0, &words(&[u32::MAX, 0]));
    mount.lookup(ROOT, "file").unwrap();
}

#[test]
fn headers_that_lie_about_their_length_are_answered_or_ignored_but_never_believed() {
    let mut mount = Mount::new();
    mount.write("file", b"content");
    for op in (0..60).chain([4096, u32::MAX]) {
        for len in [0, 1, 39, 40, 41, 56, 4096, 1 << 20, 1 << 21, u32::MAX] {
            let header = [&words(&[len, op])[..], &[1; 8], &ROOT.to_le_bytes(), &[0; 16]].concat();
            let request = mount.driver.put(&[&header[..], b"fi\0le"].concat());
            let reply = mount.driver.alloc(256);
            let n = mount.exchange(&[Buf::Read(request, 45), Buf::Write(reply, 256)]);
            assert!(n <= 256, "operation {op}, length {len}: {n} bytes");
        }
        // The fake memory is small.
        mount.driver.heap = 0x1000;
        mount.driver.start();
        mount.init();
    }
}

#[test]
fn requests_without_a_header_or_without_room_for_a_reply_do_no_harm() {
    let mut mount = Mount::new();
    let at = mount.driver.alloc(4096);
    for bufs in [
        vec![Buf::Read(at, 0)],
        vec![Buf::Read(at, 39), Buf::Write(at, 4096)],
        vec![Buf::Write(at, 4096)],
        vec![Buf::Write(at, 0)],
        vec![Buf::Read(at, 1), Buf::Read(at, 1)],
    ] {
        mount.exchange(&bufs);
    }
    // A lookup with too little room.
    mount.write("file", b"");
    let header = [&words(&[45, LOOKUP])[..], &[1; 8], &ROOT.to_le_bytes(), &[0; 16], b"file\0"].concat();
    let request = mount.driver.put(&header);
    for room in [0, 1, 15, 16, 100, 143] {
        mount.exchange(&[Buf::Read(request, 45), Buf::Write(at, room)]);
    }
    mount.lookup(ROOT, "file").unwrap();
}

#[test]
fn a_read_or_listing_of_four_gigabytes_costs_no_memory() {
    let mut mount = Mount::new();
    mount.write("file", b"content");
    let (node, _) = mount.lookup(ROOT, "file").unwrap();
    let handle = mount.open(node, libc::O_RDONLY).unwrap();
    let _ = mount.read(node, handle, 0, u32::MAX);
    let _ = mount.read(node, handle, u64::MAX, u32::MAX);
    let dir = u64_at(&mount.call(OPENDIR, ROOT, &words(&[0, 0])).unwrap(), 0);
    for op in [READDIR, READDIRPLUS] {
        let size = words(&[u32::MAX, 0, 0, 0, 0, 0]);
        let body = [&dir.to_le_bytes()[..], &0u64.to_le_bytes(), &size].concat();
        let _ = mount.call(op, ROOT, &body);
    }
    assert_eq!(mount.read(node, handle, 0, 16).unwrap(), b"content");
}

#[test]
fn a_directory_that_is_swapped_for_a_symbolic_link_meanwhile_is_no_way_out() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut mount = Mount::new();
    let outside = mount.dir.join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("file"), b"secret").unwrap();
    std::fs::create_dir(mount.share("d")).unwrap();
    mount.write("d/file", b"public");
    symlink("../outside", mount.share("link")).unwrap();
    let stop = AtomicBool::new(false);
    let names = [mount.share("d"), mount.share("link")].map(|p| cstr(p.to_str().unwrap()));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let [one, other] = names.each_ref().map(|name| name.as_ptr().cast());
                // SAFETY: two paths that end with a zero.
                let swapped = unsafe {
                    libc::renameat2(libc::AT_FDCWD, one, libc::AT_FDCWD, other, libc::RENAME_EXCHANGE)
                };
                assert_eq!(swapped, 0);
            }
        });
        let (mut public, mut links) = (0, 0);
        // Until both have been met, and some more.
        while public < 200 || links < 200 {
            let (node, mode) = mount.lookup(ROOT, "d").unwrap();
            if mode & libc::S_IFMT == libc::S_IFLNK {
                links += 1;
                assert!(mount.lookup(node, "file").is_err());
                assert!(mount.open(node, libc::O_RDONLY).is_err());
                assert!(mount.call(OPENDIR, node, &words(&[0, 0])).is_err());
                continue;
            }
            public += 1;
            let (file, _) = mount.lookup(node, "file").unwrap();
            let handle = mount.open(file, libc::O_RDONLY).unwrap();
            assert_eq!(mount.read(file, handle, 0, 100).unwrap(), b"public");
            let body = [&handle.to_le_bytes()[..], &[0; 16]].concat();
            mount.call(RELEASE, file, &body).unwrap();
            // What is made is made inside, wherever the name leads by now.
            let _ = mount.call(MKDIR, node, &[&words(&[0o755, 0])[..], &cstr("made")].concat());
        }
        stop.store(true, Ordering::Relaxed);
    });
    let left: Vec<_> = std::fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["file"]);
    assert_eq!(std::fs::read(outside.join("file")).unwrap(), b"secret");
}

#[test]
fn a_device_that_lies_in_the_share_is_seen_but_never_opened() {
    if !is_root() {
        return;
    }
    let mut mount = Mount::new();
    let path = cstr(mount.share("null").to_str().unwrap());
    // SAFETY: a path that ends with a zero.
    let made = unsafe { libc::mknod(path.as_ptr().cast(), libc::S_IFCHR | 0o666, libc::makedev(1, 3)) };
    assert_eq!(made, 0);
    let (node, mode) = mount.lookup(ROOT, "null").unwrap();
    assert_eq!(mode & libc::S_IFMT, libc::S_IFCHR);
    for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_NONBLOCK, libc::O_PATH] {
        assert!(mount.open(node, flags).is_err(), "flags {flags:#x}");
    }
    // CREATE opens what is there.
    let body = [&words(&[libc::O_RDWR as u32, 0o644, 0, 0])[..], &cstr("null")].concat();
    assert!(mount.call(CREATE, ROOT, &body).is_err());
}

/// fuse-backend-rs sets the flags of each read and write on its own descriptor, and closes that where the host's
/// kernel refuses them: a guest could have whatever is opened next under the number.
#[test]
fn flags_of_a_read_or_write_do_not_close_the_hosts_descriptor() {
    let mut mount = Mount::new();
    mount.write("file", b"content");
    let (node, _) = mount.lookup(ROOT, "file").unwrap();
    let file = mount.open(node, libc::O_RDWR).unwrap();
    // A directory knows no O_DIRECT.
    let dir = u64_at(&mount.call(OPENDIR, ROOT, &words(&[0, 0])).unwrap(), 0);
    for bit in 0..32 {
        for (node, handle) in [(node, file), (ROOT, dir)] {
            for op in [READ, WRITE] {
                let fields = words(&[1, 0, 0, 0, 1 << bit, 0]);
                let body = [&handle.to_le_bytes()[..], &0u64.to_le_bytes(), &fields, b"C"].concat();
                let _ = mount.call(op, node, &body);
            }
        }
        assert_eq!(mount.read(node, file, 0, 7).unwrap(), b"Content", "flag {bit}");
        let body = [&dir.to_le_bytes()[..], &0u64.to_le_bytes(), &words(&[4096, 0, 0, 0, 0, 0])].concat();
        assert!(mount.call(READDIR, ROOT, &body).is_ok(), "flag {bit}");
    }
}

#[test]
fn a_file_opened_to_append_is_appended_to_or_the_write_is_refused() {
    let mut mount = Mount::new();
    mount.write("file", b"content");
    let (node, _) = mount.lookup(ROOT, "file").unwrap();
    let handle = mount.open(node, libc::O_WRONLY | libc::O_APPEND).unwrap();
    let mut write = |flags: i32| {
        let fields = words(&[1, 0, 0, 0, flags as u32, 0]);
        let body = [&handle.to_le_bytes()[..], &0u64.to_le_bytes(), &fields, b"!"].concat();
        mount.call(WRITE, node, &body).map(|_| ())
    };
    assert_eq!(write(libc::O_WRONLY | libc::O_APPEND), Ok(()));
    // The guest took O_APPEND back, and means the offset that it gives.
    assert_eq!(write(libc::O_WRONLY), Err(libc::EINVAL));
    assert_eq!(std::fs::read(mount.share("file")).unwrap(), b"content!");
}

#[test]
fn the_number_of_open_handles_is_bounded() {
    let mut mount = Mount::new();
    mount.write("file", b"content");
    let (node, _) = mount.lookup(ROOT, "file").unwrap();
    mount.driver.start();
    let share =
        share::Share::new(mount.share("").display().to_string(), Limits { handles: 10, inodes: 20 }).unwrap();
    use fuse_backend_rs::api::filesystem::{Context, FileSystem, FsOptions};
    share.init(FsOptions::empty()).unwrap();
    let ctx = Context::new();
    let node = share.lookup(&ctx, ROOT, c"file").unwrap().inode.max(node);
    let handles: Vec<_> = (0..10).map(|_| share.open(&ctx, node, 0, 0).unwrap().0.unwrap()).collect();
    let refused = |result: std::io::Result<()>| result.unwrap_err().raw_os_error() == Some(libc::ENFILE);
    assert!(refused(share.open(&ctx, node, 0, 0).map(|_| ())));
    assert!(refused(share.opendir(&ctx, ROOT, 0).map(|_| ())));
    share.release(&ctx, node, 0, handles[0], false, false, None).unwrap();
    // Once, not twice.
    assert!(share.release(&ctx, node, 0, handles[0], false, false, None).is_err());
    share.opendir(&ctx, ROOT, 0).unwrap();
    assert!(refused(share.open(&ctx, node, 0, 0).map(|_| ())));
    // A second INIT closes nothing, so it makes no room.
    share.init(FsOptions::empty()).unwrap();
    assert!(refused(share.open(&ctx, node, 0, 0).map(|_| ())));
}

#[test]
fn the_number_of_known_inodes_is_bounded_and_forgetting_makes_room() {
    let mount = Mount::new();
    for i in 0..30 {
        mount.write(&i.to_string(), b"");
    }
    use fuse_backend_rs::api::filesystem::{Context, FileSystem, FsOptions};
    let share =
        share::Share::new(mount.share("").display().to_string(), Limits { handles: 10, inodes: 20 }).unwrap();
    share.init(FsOptions::empty()).unwrap();
    let ctx = Context::new();
    let name = |i: u32| std::ffi::CString::new(i.to_string()).unwrap();
    let nodes: Vec<_> = (0..20).map(|i| share.lookup(&ctx, ROOT, &name(i)).unwrap().inode).collect();
    let full = share.lookup(&ctx, ROOT, &name(20)).err().unwrap();
    assert_eq!(full.raw_os_error(), Some(libc::ENFILE));
    // A listing with attributes leaves out what would not fit, for the guest to look up later.
    let dir = share.opendir(&ctx, ROOT, 0).unwrap().0.unwrap();
    let mut listed = 0;
    let _ = share.readdirplus(&ctx, ROOT, dir, 1 << 16, 0, &mut |_, _| {
        listed += 1;
        Ok(1)
    });
    assert!(share.known_inodes() <= 20);
    share.forget(&ctx, nodes[3], u64::MAX);
    share.lookup(&ctx, ROOT, &name(20)).unwrap();
}

/// Descriptors of this process whose place is this path.
fn descriptors_of(path: &Path) -> usize {
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    // One that was listed may be gone.
    all.flatten().filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|place| place == path)).count()
}

/// fuse-backend-rs counts what it cannot open as known, for ever.
#[test]
fn creating_what_is_there_opens_it_or_holds_nothing_of_it() {
    use fuse_backend_rs::abi::fuse_abi::CreateIn;
    use fuse_backend_rs::api::filesystem::{Context, FileSystem, FsOptions};
    let mount = Mount::new();
    let root = std::fs::canonicalize(mount.share("")).unwrap();
    let fifo = cstr(root.join("fifo").to_str().unwrap());
    // SAFETY: a path that ends with a zero.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr().cast(), 0o600) }, 0);
    std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    symlink("nowhere", root.join("link")).unwrap();
    std::fs::create_dir(root.join("dir")).unwrap();
    mount.write("file", b"content");
    let share = share::Share::new(root.display().to_string(), Limits { handles: 10, inodes: 20 }).unwrap();
    share.init(FsOptions::empty()).unwrap();
    let ctx = Context::new();
    let create = |name: &str, flags: i32| {
        let args = CreateIn { flags: flags as u32, mode: 0o600, ..CreateIn::default() };
        share.create(&ctx, ROOT, &std::ffi::CString::new(name).unwrap(), args)
    };
    for name in ["fifo", "socket", "link", "dir"] {
        for _ in 0..3 {
            assert!(create(name, libc::O_RDWR).is_err(), "{name}");
        }
        assert_eq!((share.known_inodes(), descriptors_of(&root.join(name))), (0, 0), "{name}");
    }
    let (entry, handle, ..) = create("file", libc::O_RDWR | libc::O_CREAT).unwrap();
    let exists = create("file", libc::O_RDWR | libc::O_EXCL).err().unwrap();
    assert_eq!(exists.raw_os_error(), Some(libc::EEXIST));
    // One as known, one as open.
    assert_eq!((share.known_inodes(), descriptors_of(&root.join("file"))), (1, 2));
    share.release(&ctx, entry.inode, 0, handle.unwrap(), false, false, None).unwrap();
    share.forget(&ctx, entry.inode, 1);
    assert_eq!((share.known_inodes(), descriptors_of(&root.join("file"))), (0, 0));
    assert_eq!(std::fs::read(root.join("file")).unwrap(), b"content");
    create("file", libc::O_WRONLY | libc::O_TRUNC).unwrap();
    assert_eq!(std::fs::read(root.join("file")).unwrap(), b"");
}

#[test]
fn a_malformed_chain_makes_the_device_ask_for_a_reset_and_it_serves_again_after_one() {
    let mut mount = Mount::new();
    let table = mount.driver.queues[REQUESTS].desc;
    mount.driver.set_desc(table, 0, 0x1000, 8, DESC_NEXT, 1);
    mount.driver.set_desc(table, 1, 0x1000, 8, DESC_NEXT | DESC_WRITE, 0);
    mount.driver.expose(REQUESTS, 0);
    mount.driver.kick(REQUESTS);
    mount.driver.wait_needs_reset();
    mount.driver.start();
    mount.init();
    mount.call(STATFS, ROOT, &[]).unwrap();
}

#[test]
fn a_reset_in_the_middle_of_requests_ends_them_before_it_returns() {
    let mut mount = Mount::new();
    mount.write("file", &vec![7; 1 << 20]);
    for _ in 0..20 {
        let (node, _) = mount.lookup(ROOT, "file").unwrap();
        let handle = mount.open(node, libc::O_RDONLY).unwrap();
        let fields = words(&[1 << 20, 0, 0, 0, 0, 0]);
        let body = [&handle.to_le_bytes()[..], &0u64.to_le_bytes(), &fields].concat();
        let header = [&words(&[80, READ])[..], &[1; 8], &node.to_le_bytes(), &[0; 16], &body].concat();
        let request = mount.driver.put(&header);
        let reply = mount.driver.alloc(1 << 20);
        for _ in 0..10 {
            mount.driver.add(REQUESTS, &[Buf::Read(request, 80), Buf::Write(reply, 1 << 20)]);
        }
        mount.driver.kick(REQUESTS);
        mount.driver.write(0x70, 0);
        mount.driver.memory.write_slice(&[0; 4096], GuestAddress(reply)).unwrap();
        mount.driver.heap = 0x1000;
        mount.driver.start();
        assert_eq!(mount.driver.get(reply, 4096), vec![0; 4096]);
        mount.init();
    }
}
