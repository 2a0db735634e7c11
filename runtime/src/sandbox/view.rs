//! What is found by who enters the mount namespace of a container's host process: the container's files.
//!
//! Under other runtimes that namespace is the container's, and callers rely on it: Podman copies files from inside of
//! it. The container's own is in the guest, so the process moves to one that looks alike: its root is the container's
//! root filesystem, with the volumes in their places and nothing else of the host. What only the guest has (a tmpfs,
//! /dev) is an empty directory that cannot be written to; in /proc everybody finds himself and nobody else.
//!
//! For the process itself nothing changes: its root directory stays where it was, and paths mean what they did. It
//! only cannot mount or unmount in the namespace that it has left until it goes back.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{chdir, chroot, fchdir, pivot_root, symlinkat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use stockade_sys::inside::openat2;

use super::share::{make_inside, set_attributes};
use crate::bundle::guest::Shown;

/// A place in the cover of /proc for the host's, which is what "oneself" leads to.
const OUTSIDE: &str = ".outside";
/// Names and mount points only.
const COVER_SIZE: &str = "64k";

/// The view cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a mount namespace that shows the container's files: {what}: {source}")]
pub struct Error {
    what: String,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
    move |source| Error { what: what.into(), source: source.into() }
}

/// The namespace that this process has left for the view.
#[derive(Debug)]
pub struct View {
    before: File,
}

impl View {
    /// Moves this thread, which must be the process's first, to a view of what is in `share`.
    pub fn enter(share: &Path, shown: &Shown) -> Result<Self, Error> {
        let here =
            |path: &str| open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
        let before = File::open("/proc/thread-self/ns/mnt").map_err(failed("keep the one that there is"))?;
        let view = View { before };
        let (root, cwd) = (here("/").map_err(failed("open /"))?, here(".").map_err(failed("open ."))?);
        let proc = tree(Path::new("/proc"), false).map_err(failed("copy /proc"))?;
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).map_err(failed("make it"))?;
        let made = Self::make(share, shown, &proc);
        let back = fchdir(&root).and_then(|()| chroot(".")).and_then(|()| fchdir(&cwd));
        match made.and(back.map_err(failed("go back to the root directory"))) {
            Ok(()) => Ok(view),
            Err(e) => {
                view.leave();
                Err(e)
            }
        }
    }

    /// Turns the new namespace, a copy of the one before, into the view. The root directory is then in it.
    fn make(share: &Path, shown: &Shown, proc: &OwnedFd) -> Result<(), Error> {
        let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).map_err(failed("keep to it"))?;
        let volumes = shown.mounts.iter().map(|mount| match &mount.target {
            Some(target) => {
                let source = share.join(target);
                tree(&source, true).map(Some).map_err(failed(format!("copy {}", source.display())))
            }
            None => Ok(None),
        });
        let volumes = volumes.collect::<Result<Vec<_>, _>>()?;
        chdir(&share.join(&shown.root)).map_err(failed("enter the root filesystem"))?;
        pivot_root(".", ".").map_err(failed("change the root"))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(failed("leave the old root"))?;
        let root = open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(failed("open the root filesystem"))?;

        let mut covers: Vec<(&Path, OwnedFd)> = Vec::new();
        for (shown, volume) in shown.mounts.iter().zip(volumes) {
            let at = shown.destination.as_path();
            let covered = covers.iter().any(|(cover, _)| at.starts_with(cover));
            let name = || at.display().to_string();
            match volume {
                Some(volume) => {
                    if covered {
                        make_inside(root.as_fd(), at, shown.is_dir, None).map_err(failed(name()))?;
                    }
                    attach(&volume, root.as_fd(), at).map_err(failed(name()))?;
                }
                // What lies in a cover is covered, unless somebody else has put a volume there.
                None if covered => {}
                None => {
                    let cover = cover().map_err(failed("make an empty directory"))?;
                    if !attach(&cover, root.as_fd(), at).map_err(failed(name()))? {
                        continue;
                    }
                    if shown.is_proc {
                        mkdirat(&cover, OUTSIDE, Mode::from_bits_truncate(0o555))
                            .and_then(|()| symlinkat(".outside/self", &cover, "self"))
                            .and_then(|()| symlinkat(".outside/thread-self", &cover, "thread-self"))
                            .map_err(failed(name()))?;
                        attach(proc, root.as_fd(), &at.join(OUTSIDE)).map_err(failed(name()))?;
                    }
                    covers.push((at, cover));
                }
            }
        }
        let readonly =
            libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
        covers.iter().try_for_each(|(at, cover)| {
            set_attributes(cover.as_raw_fd(), c"", libc::AT_EMPTY_PATH, &readonly)
                .map_err(failed(format!("make {} read-only", at.display())))
        })
    }

    /// Takes this thread to where the process was before.
    pub fn before(&self) -> Result<(), Error> {
        // Only a thread that shares its root directory with no other may go.
        let gone = unshare(CloneFlags::CLONE_FS).and_then(|()| setns(&self.before, CloneFlags::CLONE_NEWNS));
        gone.map_err(failed("go back to the one before"))
    }

    /// Goes back, so that nothing of the container's files is held any longer.
    pub fn leave(self) {
        if let Err(e) = self.before() {
            tracing::warn!("{e}");
        }
    }
}

/// A copy of the mount at a path, attached nowhere, that is told of what happens to the original.
fn tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let all = if recursive { libc::AT_RECURSIVE } else { 0 };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    // AT_RECURSIVE, which rustix has as a flag of openat2's relatives only.
    Ok(open_tree(rustix::fs::CWD, path, flags | OpenTreeFlags::from_bits_retain(all as u32))?)
}

/// An empty file system.
fn cover() -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "size", COVER_SIZE)?;
    fsconfig_set_string(context.as_fd(), "mode", "755")?;
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Attaches a mount in the view; false if there is no such place. The guest makes what its root filesystem lacks, so
/// that is one out of sight: nobody could look for anything below it.
fn attach(mount: &OwnedFd, root: BorrowedFd, at: &Path) -> io::Result<bool> {
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let place = match openat2(root, at, how) {
        Ok(place) => place,
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(false),
        Err(e) => return Err(e.into()),
    };
    let empty: &CStr = c"";
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount.as_fd(), empty, place.as_fd(), empty, flags)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::super::Share;
    use super::super::share::tests::in_namespace;
    use super::*;
    use crate::bundle::guest::{Bind, ReadOnly, ShownMount};
    use std::fs;

    /// What somebody else finds in the namespace of this process.
    fn seen_from_inside(look: impl FnOnce() -> bool) -> bool {
        let namespace = File::open("/proc/self/ns/mnt").unwrap();
        // SAFETY: as in `in_namespace`.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let good = setns(namespace, CloneFlags::CLONE_NEWNS).is_ok() && look();
                // SAFETY: ends the child without running the harness's exit handlers.
                unsafe { libc::_exit(i32::from(!good)) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                let ended = nix::sys::wait::waitpid(child, None).unwrap();
                ended == nix::sys::wait::WaitStatus::Exited(child, 0)
            }
        }
    }

    fn shown_mount(destination: &str, target: Option<&str>) -> ShownMount {
        let is_proc = destination == "/proc";
        ShownMount { destination: destination.into(), target: target.map(Into::into), is_dir: true, is_proc }
    }

    #[test]
    fn who_enters_finds_the_containers_files_and_this_process_its_own() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["root/proc", "root/dev", "root/vol", "root/tmp", "volume", "shm"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("root/file"), "root's").unwrap();
        fs::write(dir.path().join("volume/file"), "volume's").unwrap();
        fs::write(dir.path().join("root/tmp/hidden"), "").unwrap();
        let place = dir.path().to_owned();
        in_namespace(move || {
            let share = Share::mount(place.join("share")).unwrap();
            for (source, target) in [("root", "c/rootfs"), ("volume", "c/mounts/0"), ("shm", "c/mounts/1")] {
                let (source, target) = (place.join(source), target.into());
                let readonly = ReadOnly::No;
                let (overlay, ids) = (None, None);
                let bind = Bind { source, overlay, ids, target, recursive: true, readonly, follows: true };
                share.bind(&bind).unwrap();
            }
            let shown = Shown {
                root: "c/rootfs".into(),
                mounts: vec![
                    shown_mount("/proc", None),
                    shown_mount("/dev", None),
                    shown_mount("/dev/shm", Some("c/mounts/1")),
                    shown_mount("/dev/pts", None),
                    shown_mount("/vol", Some("c/mounts/0")),
                    shown_mount("/tmp", None),
                    shown_mount("/not/there", None),
                ],
            };
            let view = View::enter(&place.join("share"), &shown).unwrap();
            let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
            assert!(seen_from_inside(|| read("/file") == "root's" && read("/vol/file") == "volume's"));
            assert!(seen_from_inside(|| !place.exists() && !Path::new("/etc").exists()));
            assert!(seen_from_inside(
                || fs::write("/vol/new", "new").is_ok() && fs::write("/new", "").is_ok()
            ));
            assert!(seen_from_inside(|| fs::write("/dev/shm/new", "").is_ok()));
            assert!(seen_from_inside(|| !Path::new("/tmp/hidden").exists()));
            for path in ["/tmp/new", "/dev/new", "/proc/new"] {
                assert!(seen_from_inside(|| fs::write(path, "").is_err()), "{path} can be written");
            }
            assert!(seen_from_inside(|| {
                let me = fs::read_link("/proc/self").is_ok() && fs::read_link("/proc/self/exe").is_ok();
                me && !Path::new("/proc/1").exists()
            }));
            assert_eq!(fs::read_to_string(place.join("volume/new")).unwrap(), "new");
            assert!(place.join("root/new").exists() && place.join("shm/new").exists());
            view.leave();
            share.unmount();
            assert_eq!(fs::read_dir(place.join("share")).unwrap().count(), 0, "it can unmount again");
        });
    }

    #[test]
    fn a_view_that_cannot_be_made_is_an_error_and_left() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().to_owned();
        in_namespace(move || {
            let share = Share::mount(place.join("share")).unwrap();
            let shown = Shown { root: "c/rootfs".into(), mounts: Vec::new() };
            let error = View::enter(&place.join("share"), &shown).unwrap_err();
            assert!(error.to_string().contains("root filesystem"), "{error}");
            drop(share);
            assert!(place.join("share").exists());
        });
    }
}
