//! Id-mapped mounts: copies of mounts that show files as others' (mount_setattr(2), `MOUNT_ATTR_IDMAP`).
//!
//! The kernel takes the mapping from a user namespace, and lasts longer than that: a process in one is there for as long
//! as it takes to open it. Only a copy that is attached nowhere yet can be given a mapping, and only once.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::share::set_attributes;
use super::spawn::{Child, clone_into};
use crate::bundle::IdMap;

/// Why a mount cannot be given a mapping.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the kernel does not take the mappings
    #[error(
        "no user namespace with its mappings can be made: {0}; see user.max_user_namespaces and the mappings"
    )]
    Namespace(#[source] io::Error),
    /// it cannot be looked at
    #[error("{0}")]
    Source(#[source] io::Error),
    /// the file system is none of those
    #[error(
        "the file system {0} that it is on, or one mounted below, has no id-mapped mounts in this kernel; remove the \
         mapping, or use files on another file system"
    )]
    FileSystem(String),
    /// it has one, or its file system is of another user namespace
    #[error("it is id-mapped already, or the file system is not this host's own: {0}; remove the mapping")]
    Denied(#[source] io::Error),
    /// none of these
    #[error("the kernel refuses the mapping: {0}")]
    Other(#[source] io::Error),
}

/// A copy of what is mounted at a path, attached nowhere, that shows ids as the map says. `recursive` has mounts below
/// copied too.
pub fn copy(source: &Path, recursive: bool, ids: &IdMap) -> Result<OwnedFd, Error> {
    let namespace = user_namespace(ids).map_err(Error::Namespace)?;
    // AT_RECURSIVE, which rustix has as a flag of openat2's relatives only.
    let below = if recursive {
        OpenTreeFlags::from_bits_retain(libc::AT_RECURSIVE as u32)
    } else {
        OpenTreeFlags::empty()
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | below;
    let tree = open_tree(rustix::fs::CWD, source, flags).map_err(|e| Error::Source(e.into()))?;
    let mapped = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: namespace.as_raw_fd() as u64,
    };
    let all = if ids.recursive { libc::AT_RECURSIVE } else { 0 };
    match set_attributes(tree.as_raw_fd(), c"", libc::AT_EMPTY_PATH | all, &mapped) {
        Ok(()) => Ok(tree),
        Err(e) => Err(match e.raw_os_error() {
            Some(libc::EINVAL) => Error::FileSystem(type_of(source)),
            Some(libc::EPERM) => Error::Denied(e),
            _ => Error::Other(e),
        }),
    }
}

/// Attaches a copy to a mount point.
pub fn attach(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(tree.as_fd(), c"", rustix::fs::CWD, target, flags)?)
}

/// A user namespace that nobody is in, with these maps.
fn user_namespace(ids: &IdMap) -> io::Result<OwnedFd> {
    let (gate_end, gate) = pipe2(OFlag::O_CLOEXEC)?;
    let Some(pid) = clone_into(libc::CLONE_NEWUSER, None)? else {
        // SAFETY: this is the child, with a copy of the parent's descriptors. It makes async-signal-safe calls only, and
        // ends with the parent, or when that has what it wants.
        unsafe {
            libc::close(gate.as_raw_fd());
            let mut byte = 0u8;
            libc::read(gate_end.as_raw_fd(), (&raw mut byte).cast(), 1);
            libc::_exit(0)
        }
    };
    let mut child = Child::of(pid);
    let [uids, gids] = ids.maps();
    let path = |name: &str| format!("/proc/{pid}/{name}");
    let opened = fs::write(path("uid_map"), uids)
        .and_then(|()| fs::write(path("gid_map"), gids))
        .and_then(|()| File::open(path("ns/user")));
    drop(gate);
    child.wait()?;
    Ok(opened?.into())
}

/// What the kernel calls the file system that a path is on.
fn type_of(path: &Path) -> String {
    let find = || {
        let found = statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).ok()?;
        let id = found.stx_mnt_id.to_string();
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").ok()?;
        // proc_pid_mountinfo(5): the number is the first field, and the type comes after a hyphen by itself.
        let line = mounts.lines().find(|line| line.split(' ').next() == Some(&id))?;
        line.split_once(" - ")?.1.split(' ').next().map(str::to_owned)
    };
    find().unwrap_or_else(|| "of an unknown type".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::share::tests::in_namespace;
    use nix::mount::{MsFlags, mount};
    use std::os::unix::fs::MetadataExt;

    fn owner(path: &Path) -> (u32, u32) {
        let found = fs::metadata(path).unwrap();
        (found.uid(), found.gid())
    }

    #[test]
    fn a_copy_shows_files_as_others_and_stores_them_as_theirs() {
        in_namespace(|| {
            let dir = tempfile::tempdir().unwrap();
            let (host, shown) = (dir.path().join("host"), dir.path().join("shown"));
            for path in [&host, &shown] {
                fs::create_dir(path).unwrap();
            }
            mount(Some("x"), &host, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            let below = host.join("below");
            fs::create_dir(&below).unwrap();
            mount(Some("x"), &below, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            for (name, id) in [("a", 0), ("b", 9), ("c", 10), ("below/d", 3)] {
                fs::write(host.join(name), "").unwrap();
                std::os::unix::fs::chown(host.join(name), Some(id), Some(id)).unwrap();
            }
            let ids = IdMap::of_containerd("0:100000:10", "0:200000:10").unwrap();
            for (recursive, owner_below) in [(true, (100_003, 200_003)), (false, (3, 3))] {
                let mut ids = ids.clone();
                ids.recursive = recursive;
                let tree = match copy(&host, true, &ids) {
                    Err(Error::FileSystem(kind)) => {
                        return eprintln!("skipped: this kernel's {kind} has no id-mapped mounts");
                    }
                    other => other.unwrap(),
                };
                attach(&tree, &shown).unwrap();
                assert_eq!(owner(&shown.join("a")), (100_000, 200_000));
                assert_eq!(owner(&shown.join("b")), (100_009, 200_009));
                assert_eq!(owner(&shown.join("c")), (65_534, 65_534));
                assert_eq!(owner(&shown.join("below/d")), owner_below);
                std::os::unix::fs::chown(shown.join("b"), Some(100_004), Some(200_005)).unwrap();
                assert_eq!(owner(&host.join("b")), (4, 5));
                std::os::unix::fs::chown(host.join("b"), Some(9), Some(9)).unwrap();
                // Nobody who is not mapped can own what is made here.
                assert!(fs::write(shown.join("new"), "").is_err());
                assert!(std::os::unix::fs::chown(shown.join("b"), Some(7), None).is_err());
                nix::mount::umount2(&shown, nix::mount::MntFlags::MNT_DETACH).unwrap();
            }
        });
    }

    #[test]
    fn what_has_no_mapped_mounts_is_named() {
        in_namespace(|| {
            let ids = IdMap::of_containerd("0:100000:10", "0:200000:10").unwrap();
            let error = copy(Path::new("/proc"), false, &ids).unwrap_err();
            assert!(matches!(&error, Error::FileSystem(kind) if kind == "proc"), "{error:?}");
            assert!(!error.to_string().contains('\n'));
        });
    }
}
