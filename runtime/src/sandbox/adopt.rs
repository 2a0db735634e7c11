//! Mounts of the host that do not come here by themselves.
//!
//! A sandbox that lives on while containers come has left the host's mount namespace. What is mounted there later is told
//! to it (slave propagation) unless it is below a private mount, as all that container engines mount in their storage
//! is. What a container needs of that is copied here, to the same place, for as long as it takes to share it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::share::{Error, identity, set_attributes};
use crate::thread;

/// Copies of the host's mounts. Dropping it takes them away.
#[derive(Debug, Default)]
pub struct Adopted(Vec<PathBuf>);

impl Drop for Adopted {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
}

/// Looks at each path in the namespace `outside`, and where that shows another file than there is here, brings the mount
/// that has it. A path that leads to nothing outside is left to who uses it.
pub fn adopt(outside: BorrowedFd, paths: &[PathBuf]) -> Result<Adopted, Error> {
    let paths: Vec<(&Path, Option<(u64, u64)>)> =
        paths.iter().map(|path| (path.as_path(), identity(path))).collect();
    let look = || {
        unshare(CloneFlags::CLONE_FS)
            .and_then(|()| setns(outside, CloneFlags::CLONE_NEWNS))
            .map_err(Error::Namespace)?;
        let differs = |(path, here): &&(&Path, _)| identity(path).is_some_and(|there| Some(there) != *here);
        let copied =
            paths.iter().filter(differs).map(|(path, _)| Ok((*path, tree(path).map_err(failed(path))?)));
        copied.collect::<Result<Vec<_>, Error>>()
    };
    let found = thread::aside(look).map_err(Error::Thread)??;
    let mut adopted = Adopted::default();
    for (path, tree) in found {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(tree.as_fd(), c"", rustix::fs::CWD, path, flags).map_err(|e| failed(path)(e.into()))?;
        adopted.0.push(path.to_owned());
    }
    Ok(adopted)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::Bind { source_path: path.to_owned(), error }
}

/// A copy of what is mounted at a path, which gives nothing back.
fn tree(path: &Path) -> io::Result<OwnedFd> {
    // AT_RECURSIVE, which rustix has as a flag of openat2's relatives only.
    let recursive = OpenTreeFlags::from_bits_retain(libc::AT_RECURSIVE as u32);
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | recursive;
    let tree = open_tree(rustix::fs::CWD, path, flags)?;
    let slave =
        libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: MsFlags::MS_SLAVE.bits(), userns_fd: 0 };
    set_attributes(tree.as_raw_fd(), c"", libc::AT_EMPTY_PATH | libc::AT_RECURSIVE, &slave)?;
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::share::enter_namespace;
    use super::super::share::tests::in_namespace;
    use super::*;
    use nix::mount::mount;

    #[test]
    fn what_is_mounted_below_a_private_mount_of_the_host_is_here_while_it_is_needed() {
        in_namespace(|| {
            let dir = tempfile::tempdir().unwrap();
            let tmpfs = |at: &Path| {
                mount(Some("x"), at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
                mount(None::<&str>, at, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            };
            tmpfs(dir.path());
            let (late, same) = (dir.path().join("late"), dir.path().join("same"));
            fs::create_dir(&late).unwrap();
            fs::create_dir(&same).unwrap();
            let outside = enter_namespace(true).unwrap().unwrap();
            let there = |work: &(dyn Fn() + Sync)| {
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        unshare(CloneFlags::CLONE_FS).unwrap();
                        setns(&outside, CloneFlags::CLONE_NEWNS).unwrap();
                        work();
                    });
                });
            };
            there(&|| {
                tmpfs(&late);
                fs::write(late.join("file"), "text").unwrap();
            });
            assert!(!late.join("file").exists());
            let missing = dir.path().join("missing");
            let adopted = adopt(outside.as_fd(), &[late.clone(), same, missing]).unwrap();
            assert_eq!(adopted.0, std::slice::from_ref(&late));
            assert_eq!(fs::read_to_string(late.join("file")).unwrap(), "text");
            drop(adopted);
            assert!(!late.join("file").exists());
            there(&|| assert!(late.join("file").exists()));
        });
    }
}
