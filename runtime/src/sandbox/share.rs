//! The share directory: everything of the host that a guest can see.
//!
//! The supervisor lives in a mount namespace of its own, which gets the host's later mounts (slave propagation) and
//! gives none back; the VMM gets a copy of the share in the same way ([`Share::tree`]). In it the share is a small tmpfs
//! on the container's state directory, and container roots and volumes are bind mounts in that tmpfs. So nothing of it
//! exists for the rest of the host, and the kernel removes all of it when supervisor and VMM are gone, however they
//! ended.

use std::ffi::{CStr, CString};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Uid, fchownat, setfsgid, setfsuid};

use rustix::mount::{OpenTreeFlags, open_tree};
use stockade_sys::inside::openat2;

use super::idmap;
use crate::bundle::guest::{Bind, ReadOnly};
use crate::bundle::{self, Bundle, Owner};

/// Mount points only: a guest that fills it hurts nobody but itself.
const TMPFS_OPTIONS: &str = "mode=755,size=1m,nr_inodes=65536";

/// Errors of the share.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// no mount namespace of our own
    #[error("cannot make a mount namespace: {0}; stockade must run as root with CAP_SYS_ADMIN")]
    Namespace(#[source] Errno),
    /// no thread to look at the host's mounts from
    #[error("cannot start a thread for the host's mounts: {0}")]
    Thread(#[source] io::Error),
    /// the share itself cannot be made
    #[error("cannot make the share directory {0}: {1}")]
    Share(PathBuf, #[source] io::Error),
    /// a root or a volume cannot be put into it
    #[error("cannot bind {source_path} into the share: {error}")]
    Bind { source_path: PathBuf, error: io::Error },
    /// the ids of a volume's files cannot be mapped
    #[error("cannot map the ids of {source_path}: {error}")]
    IdMap { source_path: PathBuf, error: idmap::Error },
    /// an overlay cannot be mounted in it
    #[error("cannot mount an overlay with the options {options:?}: {error}")]
    Overlay { options: String, error: io::Error },
    /// a mount point that the read-only root needs cannot be made
    #[error("cannot make the mount point {0} in the read-only root filesystem: {1}")]
    MountPoint(PathBuf, #[source] io::Error),
    /// the working directory cannot be made
    #[error("process.cwd: cannot make {0} in the root filesystem: {1}")]
    WorkingDirectory(PathBuf, #[source] io::Error),
}

/// Moves this process, which must have one thread, to a mount namespace of its own. `keep` says whether a way back
/// is wanted, for hooks.
pub fn enter_namespace(keep: bool) -> Result<Option<OwnedFd>, Error> {
    let outside = keep.then(|| File::open("/proc/self/ns/mnt")).transpose();
    let outside = outside.map_err(|e| Error::Namespace(Errno::from_raw(e.raw_os_error().unwrap_or(0))))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(Error::Namespace)?;
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).map_err(Error::Namespace)?;
    Ok(outside.map(OwnedFd::from))
}

/// A mounted share. It ends with the namespace, or when it is dropped.
#[derive(Debug)]
pub struct Share {
    path: PathBuf,
}

impl Share {
    /// Mounts an empty share at `path`, a directory that is made.
    pub fn mount(path: PathBuf) -> Result<Self, Error> {
        let failed = |e: io::Error| Error::Share(path.clone(), e);
        DirBuilder::new().mode(0o700).create(&path).map_err(failed)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("stockade"), &path, Some("tmpfs"), flags, Some(TMPFS_OPTIONS))
            .map_err(|e| failed(e.into()))?;
        mount(None::<&str>, &path, None::<&str>, MsFlags::MS_SHARED, None::<&str>)
            .map_err(|e| failed(e.into()))?;
        Ok(Share { path })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the files of a container into the share.
    pub fn add(&self, bundle: &Bundle, binds: &[Bind]) -> Result<(), Error> {
        if bundle.readonly_root() {
            make_mount_points(&bundle.rootfs, &mount_points(bundle), bundle.root_user())?;
        }
        make_working_directory(bundle)?;
        binds.iter().try_for_each(|bind| self.bind(bind))
    }

    /// A mount of the share as it is now, attached nowhere: for the VMM's jail. Once that has attached it, it gets what
    /// is mounted in the share later, and gives nothing back.
    pub fn tree(&self) -> Result<OwnedFd, Error> {
        let failed = |e: io::Error| Error::Share(self.path.clone(), e);
        // AT_RECURSIVE, which rustix has as a flag of openat2's relatives only.
        let recursive = OpenTreeFlags::from_bits_retain(libc::AT_RECURSIVE as u32);
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | recursive;
        let tree = open_tree(rustix::fs::CWD, &self.path, flags).map_err(|e| failed(e.into()))?;
        let slave = libc::mount_attr {
            attr_set: 0,
            attr_clr: 0,
            propagation: MsFlags::MS_SLAVE.bits(),
            userns_fd: 0,
        };
        set_attributes(tree.as_raw_fd(), c"", libc::AT_EMPTY_PATH | libc::AT_RECURSIVE, &slave)
            .map_err(failed)?;
        // The directories that hold the mounts are the supervisor's: it makes and removes them by path, and a guest
        // that put a symbolic link in the way would lead it anywhere on the host. What is mounted there stays as it is.
        let readonly = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, propagation: 0, ..slave };
        set_attributes(tree.as_raw_fd(), c"", libc::AT_EMPTY_PATH, &readonly).map_err(failed)?;
        Ok(tree)
    }

    /// Puts a directory or file of the host into the share.
    pub fn bind(&self, bind: &Bind) -> Result<(), Error> {
        let failed = |error: io::Error| Error::Bind { source_path: bind.source.clone(), error };
        let target = self.path.join(&bind.target);
        let recursive = if bind.recursive { MsFlags::MS_REC } else { MsFlags::empty() };
        match (&bind.overlay, &bind.ids) {
            (Some(options), _) => mount_overlay(&bind.source, &target, options)
                .map_err(|error| Error::Overlay { options: options.clone(), error })?,
            (None, Some(ids)) => {
                self.make_mount_point(&bind.source, &target).map_err(failed)?;
                let tree = idmap::copy(&bind.source, bind.recursive, ids)
                    .map_err(|error| Error::IdMap { source_path: bind.source.clone(), error })?;
                idmap::attach(&tree, &target).map_err(failed)?;
            }
            (None, None) => {
                self.make_mount_point(&bind.source, &target).map_err(failed)?;
                let flags = MsFlags::MS_BIND | recursive;
                mount(Some(&bind.source), &target, None::<&str>, flags, None::<&str>)
                    .map_err(|e| failed(e.into()))?;
            }
        }
        if !bind.follows {
            let flags = MsFlags::MS_PRIVATE | recursive;
            mount(None::<&str>, &target, None::<&str>, flags, None::<&str>).map_err(|e| failed(e.into()))?;
        }
        restrict(&target, bind.readonly, bind.recursive).map_err(failed)
    }

    /// Takes away what was bound below one of its directories. Detached, because the guest may still know files of it.
    pub fn remove(&self, below: &Path) {
        remove_tree(&self.path.join(below));
    }

    /// Takes it away with all that is in it. Detached, because the VMM may still have files open in it.
    pub fn unmount(&self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }

    fn make_mount_point(&self, source: &Path, target: &Path) -> io::Result<()> {
        let is_dir = fs::metadata(source)?.is_dir();
        let dir = if is_dir { Some(target) } else { target.parent() };
        if let Some(dir) = dir {
            DirBuilder::new().mode(0o755).recursive(true).create(dir)?;
        }
        if !is_dir {
            File::create_new(target)?;
        }
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.unmount();
    }
}

fn mount_overlay(name: &Path, target: &Path, options: &str) -> io::Result<()> {
    DirBuilder::new().mode(0o755).recursive(true).create(target)?;
    Ok(mount(Some(name), target, Some("overlay"), MsFlags::empty(), Some(options))?)
}

/// Unmounts what is mounted in a tree of mount points and removes them. It never goes down into a mount.
fn remove_tree(path: &Path) {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // No mount point, or none any more.
            Err(Errno::EINVAL) => break,
            // What is still mounted there is the host's, and not ours to remove.
            Err(_) => return,
        }
    }
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            remove_tree(&entry.path());
        }
        let _ = fs::remove_dir(path);
    } else {
        let _ = fs::remove_file(path);
    }
}

/// Adds to the attributes of a bind mount (a remount would clear its other flags). Always that it serves for data
/// only: what a VMM that has been taken over reaches through it, it can neither execute nor use as a device.
fn restrict(target: &Path, readonly: ReadOnly, recursive: bool) -> io::Result<()> {
    let path = CString::new(target.as_os_str().as_encoded_bytes())?;
    let attributes = |attr_set| libc::mount_attr { attr_set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let data = attributes(libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC);
    let all = if recursive { libc::AT_RECURSIVE } else { 0 };
    if readonly == ReadOnly::Top {
        let readonly = attributes(libc::MOUNT_ATTR_RDONLY);
        set_attributes(libc::AT_FDCWD, &path, 0, &readonly)?;
    }
    match readonly {
        ReadOnly::All => {
            let attributes = attributes(data.attr_set | libc::MOUNT_ATTR_RDONLY);
            set_attributes(libc::AT_FDCWD, &path, libc::AT_RECURSIVE, &attributes)
        }
        _ => set_attributes(libc::AT_FDCWD, &path, all, &data),
    }
}

/// Which file a path leads to: device and inode.
pub(super) fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// mount_setattr(2).
pub(super) fn set_attributes(
    dir: RawFd,
    path: &CStr,
    flags: i32,
    attributes: &libc::mount_attr,
) -> io::Result<()> {
    // SAFETY: mount_setattr(2) reads the path and the struct of the size given, both of which live until it returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            dir,
            path.as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Mount points of a bundle, and whether each is a directory.
fn mount_points(bundle: &Bundle) -> Vec<(PathBuf, bool)> {
    let mounts = bundle.spec.mounts().iter().flatten();
    let is_dir = |mount: &oci_spec::runtime::Mount| {
        !bundle::is_bind(mount)
            || mount.source().as_ref().is_none_or(|source| bundle.path.join(source).is_dir())
    };
    mounts.map(|mount| (mount.destination().clone(), is_dir(mount))).collect()
}

/// Makes the mount points that a read-only root lacks, as other runtimes do before they make it read-only. The guest
/// could not. `wanted` are paths in the container with whether each is a directory, in the order of the mounts; one
/// below another is left to the guest, because it lies in what is mounted there. They belong to `owner`, or to root.
pub fn make_mount_points(
    rootfs: &Path,
    wanted: &[(PathBuf, bool)],
    owner: Option<Owner>,
) -> Result<(), Error> {
    let failed = |path: &Path, e: io::Error| Error::MountPoint(path.to_owned(), e);
    let mut root = None;
    for (index, (path, is_dir)) in wanted.iter().enumerate() {
        let inside_other = wanted[..index].iter().any(|(other, _)| path != other && path.starts_with(other));
        if inside_other {
            continue;
        }
        let root = match &root {
            Some(root) => root,
            None => root.insert(File::open(rootfs).map_err(|e| failed(rootfs, e))?),
        };
        match make_inside(root.as_fd(), path, *is_dir, owner) {
            // A file system that is itself read-only: what is there must do, and the guest tells if it does not.
            Ok(()) | Err(Errno::EROFS) => {}
            Err(e) => return Err(failed(path, e.into())),
        }
    }
    Ok(())
}

/// Makes the working directory where the root file system lacks it, as runc does. One below a mount is left to what is
/// mounted there.
pub fn make_working_directory(bundle: &Bundle) -> Result<(), Error> {
    let Some(cwd) = bundle.spec.process().as_ref().map(|process| process.cwd()) else { return Ok(()) };
    let mounts = bundle.spec.mounts().iter().flatten();
    if cwd == Path::new("/") || mounts.into_iter().any(|mount| cwd.starts_with(mount.destination())) {
        return Ok(());
    }
    let made = File::open(&bundle.rootfs).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)));
    match made.and_then(|root| make_inside(root.as_fd(), cwd, true, bundle.root_user())) {
        // What is in the way, the guest tells when it goes there.
        Ok(()) | Err(Errno::EROFS | Errno::ENOTDIR) => Ok(()),
        Err(e) => Err(Error::WorkingDirectory(cwd.clone(), e.into())),
    }
}

/// Walks down from `root`, making what is missing. Links are followed as if `root` were `/`. What is made belongs to
/// `owner`, or to root.
pub(super) fn make_inside(
    root: BorrowedFd,
    path: &Path,
    is_dir: bool,
    owner: Option<Owner>,
) -> nix::Result<()> {
    let how =
        |flags: OFlag| OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    match openat2(root, path, how(OFlag::O_PATH)) {
        Ok(_) => return Ok(()),
        Err(Errno::ENOENT) => {}
        Err(e) => return Err(e),
    }
    let names: Vec<_> = path.components().filter(|c| matches!(c, Component::Normal(_))).collect();
    let mut so_far = PathBuf::from("/");
    for (index, name) in names.iter().enumerate() {
        let parent = openat2(root, &so_far, how(OFlag::O_PATH | OFlag::O_DIRECTORY))?;
        so_far.push(name);
        let last = index + 1 == names.len();
        let name = Path::new(name);
        let make = || match last && !is_dir {
            true => {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                nix::fcntl::openat(&parent, name, flags, Mode::from_bits_truncate(0o644)).map(drop)
            }
            false => mkdirat(&parent, name, Mode::from_bits_truncate(0o755)),
        };
        match (make(), owner) {
            (Ok(()), Some((uid, gid))) => {
                let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
                fchownat(&parent, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
            }
            (Ok(()) | Err(Errno::EEXIST), _) => {}
            // A root whose mapping does not know the host's root, who so can make nothing there.
            (Err(Errno::EOVERFLOW), Some(owner)) => match as_owner(owner, make) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(e) => return Err(e),
            },
            (Err(e), _) => return Err(e),
        }
    }
    Ok(())
}

/// Does something with files as this user, which only concerns the calling thread.
fn as_owner<T>((uid, gid): Owner, work: impl FnOnce() -> T) -> T {
    let group = setfsgid(Gid::from_raw(gid));
    let user = setfsuid(Uid::from_raw(uid));
    let done = work();
    setfsuid(user);
    setfsgid(group);
    done
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[test]
    fn missing_mount_points_are_made_and_links_stay_inside() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        std::os::unix::fs::symlink("../../outside", root.join("up")).unwrap();
        std::os::unix::fs::symlink("/etc", root.join("abs")).unwrap();
        let wanted = [
            ("/dev", true),
            ("/dev/pts", true),
            ("/a/b/c", true),
            ("/etc/resolv.conf", false),
            ("/abs/hosts", false),
        ]
        .map(|(path, is_dir)| (PathBuf::from(path), is_dir));
        make_mount_points(&root, &wanted, None).unwrap();
        make_mount_points(&root, &wanted, None).unwrap();
        assert!(root.join("a/b/c").is_dir());
        assert!(root.join("etc/resolv.conf").is_file());
        assert!(root.join("etc/hosts").is_file());
        assert!(!root.join("dev/pts").exists(), "it lies in what is mounted on /dev");
        // The link leads to /outside in the container, which does not exist: an error, and nothing outside.
        assert!(make_mount_points(&root, &[("/up/x".into(), true)], None).is_err());
        assert_eq!(fs::read_dir(dir.path().join("outside")).unwrap().count(), 0);
    }

    #[test]
    fn what_is_made_in_a_root_is_its_owners() {
        in_namespace(|| {
            let dir = tempfile::tempdir().unwrap();
            let [plain, mapped] = ["plain", "mapped"].map(|name| dir.path().join(name));
            fs::create_dir(&plain).unwrap();
            fs::create_dir(&mapped).unwrap();
            mount(Some("x"), &plain, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            let ids = bundle::IdMap::of_containerd("0:100000:10", "0:200000:10").unwrap();
            match idmap::copy(&plain, false, &ids) {
                Err(idmap::Error::FileSystem(kind)) => {
                    return eprintln!("skipped: this kernel's {kind} has no id-mapped mounts");
                }
                tree => idmap::attach(&tree.unwrap(), &mapped).unwrap(),
            }
            let wanted = [("/a/b".into(), true), ("/a/c".into(), false)];
            let owner = Some((100_003, 200_004));
            for (root, ids) in [(&mapped, [3, 4]), (&plain, [100_003, 200_004])] {
                make_mount_points(root, &wanted, owner).unwrap();
                for made in ["a", "a/b", "a/c"] {
                    let found = fs::metadata(plain.join(made)).unwrap();
                    assert_eq!([found.uid(), found.gid()], ids, "{made}");
                }
                fs::remove_dir_all(plain.join("a")).unwrap();
            }
            assert!(nix::unistd::geteuid().is_root() && fs::write(plain.join("roots"), "").is_ok());
            assert_eq!(fs::metadata(plain.join("roots")).unwrap().uid(), 0);
        });
    }

    /// Runs a closure in a child, because a mount namespace is for life. Skips where that is not allowed.
    pub(crate) fn in_namespace(test: impl FnOnce()) {
        // SAFETY: the child calls nothing that needs another thread of the test harness, and ends with _exit.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let code = match enter_namespace(false) {
                    Err(Error::Namespace(Errno::EPERM)) => 77,
                    Err(_) => 1,
                    Ok(_) => match std::panic::catch_unwind(std::panic::AssertUnwindSafe(test)) {
                        Ok(()) => 0,
                        Err(_) => 1,
                    },
                };
                // SAFETY: ends the child without running the harness's exit handlers.
                unsafe { libc::_exit(code) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                match nix::sys::wait::waitpid(child, None).unwrap() {
                    nix::sys::wait::WaitStatus::Exited(_, 77) => eprintln!("skipped: no CAP_SYS_ADMIN"),
                    nix::sys::wait::WaitStatus::Exited(_, 0) => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    #[test]
    fn a_share_shows_what_is_bound_and_leaves_nothing_outside() {
        let dir = tempfile::tempdir().unwrap();
        let host = dir.path().join("host");
        fs::create_dir(&host).unwrap();
        fs::write(host.join("file"), "text").unwrap();
        let path = dir.path().join("share");
        let inside = path.clone();
        in_namespace(move || {
            let share = Share::mount(inside.clone()).unwrap();
            let bind = |source: PathBuf, target: &str, readonly| {
                share
                    .bind(&Bind {
                        source,
                        overlay: None,
                        ids: None,
                        target: target.into(),
                        recursive: true,
                        readonly,
                        follows: true,
                    })
                    .unwrap();
            };
            bind(host.clone(), "c/rootfs", ReadOnly::Top);
            bind(host.join("file"), "c/mounts/0", ReadOnly::No);
            assert_eq!(fs::read_to_string(inside.join("c/rootfs/file")).unwrap(), "text");
            let error = fs::write(inside.join("c/rootfs/file"), "x").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS));
            fs::write(inside.join("c/mounts/0"), "new").unwrap();
            assert_eq!(fs::read_to_string(host.join("file")).unwrap(), "new");
            share.remove(Path::new("c"));
            assert_eq!(fs::read_dir(&inside).unwrap().count(), 0);
            assert_eq!(fs::read_to_string(host.join("file")).unwrap(), "new", "only the mount went");
            drop(share);
            assert_eq!(fs::read_dir(&inside).unwrap().count(), 0);
            fs::remove_dir(&inside).unwrap();
        });
        assert!(!path.exists() || fs::read_dir(&path).unwrap().count() == 0);
    }
}
