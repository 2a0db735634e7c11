//! Root filesystems of containers from images: the image's layers below, a directory of the container's own on top.
//!
//! The overlay is mounted in a mount namespace of the command's own, which its supervisor and VMM inherit: with the
//! last of them it is gone, however they ended. What remains is a directory in the image store, which belongs to who
//! holds its lock. After that it belongs to the container's state, which names it, and `delete` removes it; without
//! such a state it is nobody's, and the next run removes it.

use std::ffi::{CString, OsStr};
use std::fmt::Write as _;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, OpenHow, ResolveFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use serde::{Deserialize, Serialize};
use stockade_sys::inside::openat2;

use super::digest::Digest;
use super::store::{self, Store, flock};
use super::tree;
use crate::state::State;

/// Where the overlay is mounted: the container's root filesystem.
const ROOTFS: &str = "rootfs";
/// What the container changes.
const UPPER: &str = "upper";
/// overlayfs's own.
const WORK: &str = "work";
/// Stands for layers where an image has none.
const EMPTY: &str = "empty";
/// Whose it is.
const OWNER: &str = "owner.json";
/// What is read of a file of the image at most, such as /etc/passwd.
const FILE_MAX: u64 = 4 << 20;
/// A page, which is all that mount(2) takes.
const OPTIONS_MAX: usize = 4095;

/// What can go wrong with a container's root filesystem.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// an operation failed
    #[error("cannot {what} {path}: {source}{}", remedy(.source))]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    /// the overlay cannot be mounted
    #[error(
        "cannot stack the image's layers on {0}: {1}; the image store must be on a file system that can be an overlay's upper layer, with extended attributes: name another place with --image-store"
    )]
    Overlay(PathBuf, #[source] io::Error),
    /// of the store
    #[error(transparent)]
    Store(#[from] store::Error),
    /// it is no such directory
    #[error("{0} is in no image store, so it is not removed: remove it yourself if it is of no use")]
    Foreign(PathBuf),
}

fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "; make room there, or name another place with --image-store",
        _ => "",
    }
}

/// What is written down about a container's directory.
#[derive(Serialize, Deserialize)]
struct Owner {
    /// The container's state directory.
    state: PathBuf,
    /// Layers that must stay as long as it is there.
    layers: Vec<Digest>,
}

/// A container's directory, which is also its bundle. It is this process's for as long as this lives.
pub struct Scratch {
    path: PathBuf,
    layers: Vec<Digest>,
    _lock: Flock<File>,
}

impl Scratch {
    /// Makes a directory for a container whose state will be in `state`; the store must be shared.
    pub fn create(store: &Store, layers: &[Digest], state: &Path) -> Result<Self, Error> {
        loop {
            let path = store.containers().join(random_name().map_err(failed("name", &store.containers()))?);
            DirBuilder::new().mode(0o700).create(&path).map_err(failed("make", &path))?;
            // Somebody who clears up may have been faster, with the directory or with its lock.
            let made = match File::open(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(failed("open", &path))?,
            };
            let lock = flock(made, FlockArg::LockExclusive).map_err(failed("lock", &path))?;
            if fs::metadata(&path).is_ok_and(|there| lock.metadata().is_ok_and(|m| m.ino() == there.ino())) {
                let scratch = Scratch { path, layers: stacked(layers), _lock: lock };
                return match scratch.furnish(state) {
                    Ok(()) => Ok(scratch),
                    Err(e) => {
                        scratch.remove();
                        Err(e)
                    }
                };
            }
        }
    }

    fn furnish(&self, state: &Path) -> Result<(), Error> {
        for (name, mode) in [(ROOTFS, 0o755), (UPPER, 0o755), (WORK, 0o700)] {
            let dir = self.path.join(name);
            // The upper directory's own mode becomes that of the root.
            DirBuilder::new().mode(mode).create(&dir).map_err(failed("make", &dir))?;
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
            fs::set_permissions(&dir, permissions).map_err(failed("make", &dir))?;
        }
        let owner = Owner { state: state.to_owned(), layers: self.layers.clone() };
        let path = self.path.join(OWNER);
        let text = serde_json::to_vec(&owner).map_err(|e| failed("write", &path)(e.into()))?;
        fs::write(&path, text).map_err(failed("write", &path))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stacks the layers. This process must be in a mount namespace of its own.
    pub fn mount(&self, store: &Store) -> Result<Root, Error> {
        let empty = self.path.join(EMPTY);
        let lower: Vec<PathBuf> = match self.layers.is_empty() {
            true => {
                fs::create_dir(&empty).map_err(failed("make", &empty))?;
                vec![empty]
            }
            // overlayfs wants the topmost first.
            false => self.layers.iter().rev().map(|layer| store.layer(layer)).collect(),
        };
        let open = |path: &Path| {
            let mut options = OpenOptions::new();
            let dir = options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(path);
            dir.map_err(failed("open", path))
        };
        let lower = lower.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
        let (upper, work) = (open(&self.path.join(UPPER))?, open(&self.path.join(WORK))?);
        // By descriptors: short, so that all layers fit into one page, and without characters that mean something
        // in mount options.
        let name = |file: &File| format!("/proc/self/fd/{}", file.as_raw_fd());
        let lower: Vec<_> = lower.iter().map(name).collect();
        let mut options = format!("lowerdir={}", lower.join(":"));
        // What a container writes is gone with it, so it need not be flushed; a directory of a layer can be renamed.
        let _ = write!(
            options,
            ",upperdir={},workdir={},volatile,redirect_dir=on,metacopy=off,index=off",
            name(&upper),
            name(&work)
        );
        let rootfs = self.path.join(ROOTFS);
        let refused = |e: io::Error| Error::Overlay(self.path.clone(), e);
        if options.len() > OPTIONS_MAX {
            return Err(refused(Errno::E2BIG.into()));
        }
        mount(Some("overlay"), &rootfs, Some("overlay"), MsFlags::MS_NODEV, Some(options.as_str()))
            .map_err(|e| refused(e.into()))?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir = nix::fcntl::open(&rootfs, flags, Mode::empty()).map_err(|e| refused(e.into()))?;
        let root = Root { path: rootfs, dir };
        self.settle_implicit(store, &root)?;
        Ok(root)
    }

    /// Gives directories that a layer only mentions in passing the metadata that they have in a lower one.
    fn settle_implicit(&self, store: &Store, root: &Root) -> Result<(), Error> {
        let implicit =
            self.layers.iter().map(|layer| store.implicit(layer)).collect::<Result<Vec<_>, _>>()?;
        if implicit.iter().all(Vec::is_empty) {
            return Ok(());
        }
        let trees =
            self.layers.iter().map(|layer| Tree::open(store.layer(layer))).collect::<Result<Vec<_>, _>>()?;
        for (index, paths) in implicit.iter().enumerate().skip(1) {
            for path in paths {
                // A higher layer that has it in full decides.
                let settled = (index + 1..trees.len())
                    .any(|above| !implicit[above].contains(path) && trees[above].find(path).is_some());
                if settled {
                    continue;
                }
                let lower = (0..index).rev().find_map(|below| {
                    let there = trees[below].find(path)?;
                    (!implicit[below].contains(path)).then_some(there)
                });
                if let Some(lower) = lower.filter(fs::Metadata::is_dir) {
                    root.dress(path, &lower).map_err(failed("set the metadata in", &self.path))?;
                }
            }
        }
        Ok(())
    }

    /// Removes all of it; what cannot be removed is logged, and tried again by the next run.
    pub fn remove(self) {
        // In this process's own namespace; the VM is gone. The kernel may still be giving it back.
        let _ = umount2(&self.path.join(ROOTFS), MntFlags::MNT_DETACH);
        if let Err(e) = remove(&self.path) {
            tracing::warn!("{e}");
        }
    }
}

/// Removes a container's directory. That it is gone already is no error.
pub fn remove(path: &Path) -> Result<(), Error> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::Foreign(path.to_owned()));
    };
    // Whatever a state file says, nothing but this is ever removed.
    let is_store = parent.file_name().is_some_and(|name| name == "containers")
        && ["../lock", "../layers", "../blobs/sha256"].iter().all(|name| parent.join(name).exists());
    if !is_store {
        return if path.exists() { Err(Error::Foreign(path.to_owned())) } else { Ok(()) };
    }
    let name = CString::new(name.as_bytes()).map_err(|e| failed("remove", path)(e.into()))?;
    File::open(parent).and_then(|parent| tree::remove(parent, &name)).map_err(failed("remove", path))
}

/// Removes directories that no container has any more.
pub fn clear(store: &Store) -> Result<usize, Error> {
    let mut removed = 0;
    for found in all(store)? {
        if found.owner.is_none() && remove(&found.path).is_ok() {
            removed += 1;
        }
    }
    Ok(removed)
}

/// Layers that containers need.
pub fn pinned(store: &Store) -> Result<Vec<Digest>, Error> {
    Ok(all(store)?.into_iter().filter_map(|found| found.owner).flat_map(|owner| owner.layers).collect())
}

/// A container's directory as somebody else finds it.
struct Found {
    path: PathBuf,
    /// None if it is nobody's.
    owner: Option<Owner>,
    /// Keeps it so.
    _lock: Option<Flock<File>>,
}

fn all(store: &Store) -> Result<Vec<Found>, Error> {
    let containers = store.containers();
    let mut list = Vec::new();
    for entry in fs::read_dir(&containers).map_err(failed("list", &containers))? {
        let path = entry.map_err(failed("list", &containers))?.path();
        // One that has gone meanwhile is nothing to care about.
        let Ok(dir) = File::open(&path) else { continue };
        let written = fs::read(path.join(OWNER)).ok();
        let owner = written.and_then(|text| serde_json::from_slice::<Owner>(&text).ok());
        list.push(match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => {
                let named = |owner: &Owner| {
                    let text = fs::read(owner.state.join(crate::state::FILE)).unwrap_or_default();
                    serde_json::from_slice::<State>(&text).is_ok_and(|s| s.scratch.as_deref() == Some(&path))
                };
                Found { owner: owner.filter(named), path, _lock: Some(lock) }
            }
            Err(_) => {
                // Who has not yet written what it needs holds the store's lock until it has.
                let owner = owner.unwrap_or_else(|| Owner { state: PathBuf::new(), layers: Vec::new() });
                Found { owner: Some(owner), path, _lock: None }
            }
        });
    }
    Ok(list)
}

/// A layer. Links in it are strangers' too, and mean nothing before the layers are stacked: none is followed.
struct Tree(File);

impl Tree {
    fn open(path: PathBuf) -> Result<Self, Error> {
        let mut options = OpenOptions::new();
        let dir = options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(&path);
        dir.map(Tree).map_err(failed("open", &path))
    }

    /// What it has at a path, if there are only directories on the way.
    fn find(&self, path: &[u8]) -> Option<fs::Metadata> {
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let found = openat2(&self.0, OsStr::from_bytes(path), OpenHow::new().flags(flags).resolve(resolve));
        File::from(found.ok()?).metadata().ok()
    }
}

/// A mounted root filesystem. What is in it was made by strangers: everything is looked up as if it were `/`.
pub struct Root {
    path: PathBuf,
    dir: OwnedFd,
}

impl Root {
    fn open(&self, path: impl AsRef<OsStr>, flags: OFlag) -> nix::Result<OwnedFd> {
        let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve);
        openat2(&self.dir, path.as_ref(), how)
    }

    /// A small text file; empty if there is none, or it is something else.
    pub fn read(&self, path: &str) -> String {
        // Not to wait for the other end of a pipe.
        let Ok(file) = self.open(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK) else { return String::new() };
        let file = File::from(file);
        let mut bytes = Vec::new();
        if file.metadata().is_ok_and(|m| m.is_file()) {
            let _ = file.take(FILE_MAX).read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Puts a file of ours into a directory, in place of what the image has there.
    pub fn write(&self, dir: &str, name: &str, text: &str) -> Result<(), Error> {
        let path = self.path.join(dir.trim_start_matches('/')).join(name);
        let write = || {
            self.make_dir(dir)?;
            let dir = self.open(dir, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
            match unlinkat(&dir, name, UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(e) => return Err(e.into()),
            }
            let flags =
                OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let file = openat(&dir, name, flags, Mode::from_bits_truncate(0o644))?;
            nix::sys::stat::fchmod(&file, Mode::from_bits_truncate(0o644))?;
            File::from(file).write_all(text.as_bytes())
        };
        write().map_err(failed("write", &path))
    }

    /// Makes a directory and those above it where they are missing.
    pub fn make_dir(&self, path: &str) -> io::Result<()> {
        match self.open(path, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Ok(_) => Ok(()),
            Err(Errno::ENOENT) => {
                let wanted = [(Path::new("/").join(path), true)];
                crate::sandbox::share::make_mount_points(&self.path, &wanted, None).map_err(io::Error::other)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Where a path of the container is on the host; it must be a directory.
    pub fn resolve(&self, path: &str) -> io::Result<PathBuf> {
        self.make_dir(path)?;
        let dir = self.open(path, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd()))
    }

    /// Gives a directory this owner and these permissions.
    fn dress(&self, path: &[u8], like: &fs::Metadata) -> io::Result<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
        let dir = match self.open(OsStr::from_bytes(path), flags) {
            Ok(dir) => dir,
            // Hidden, or something else by now.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let now = fstat(dir.as_fd())?;
        if (now.st_mode, now.st_uid, now.st_gid) == (like.mode(), like.uid(), like.gid()) {
            return Ok(());
        }
        std::os::unix::fs::fchown(&dir, Some(like.uid()), Some(like.gid()))?;
        nix::sys::stat::fchmod(&dir, Mode::from_bits_truncate(like.mode() & 0o7777))?;
        Ok(())
    }
}

/// overlayfs refuses a layer that is there twice; the topmost hides all of the others.
fn stacked(layers: &[Digest]) -> Vec<Digest> {
    let mut stack: Vec<Digest> = Vec::new();
    for layer in layers.iter().rev() {
        if !stack.contains(layer) {
            stack.push(layer.clone());
        }
    }
    stack.reverse();
    stack
}

/// 64 random bits.
pub fn random_name() -> io::Result<String> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(text: &str) -> Digest {
        Digest::of(text.as_bytes())
    }

    #[test]
    fn a_layer_that_is_there_twice_is_stacked_once_at_the_top() {
        let [a, b, c] = ["a", "b", "c"].map(digest);
        let stack = stacked(&[a.clone(), b.clone(), a.clone(), c.clone(), b.clone()]);
        assert_eq!(stack, [a, c, b]);
        assert!(stacked(&[]).is_empty());
    }

    #[test]
    fn a_directory_is_its_processs_then_its_states_then_nobodys() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let state = dir.path().join("state");
        fs::create_dir(&state).unwrap();
        let layer = digest("layer");
        let scratch = Scratch::create(&store, std::slice::from_ref(&layer), &state).unwrap();
        let path = scratch.path().to_owned();
        assert_eq!(clear(&store).unwrap(), 0);
        assert_eq!(pinned(&store).unwrap(), std::slice::from_ref(&layer));
        drop(scratch);
        let mut kept = crate::state::tests::state("c");
        kept.scratch = Some(path.clone());
        fs::write(state.join(crate::state::FILE), serde_json::to_vec(&kept).unwrap()).unwrap();
        assert_eq!(clear(&store).unwrap(), 0);
        assert_eq!(pinned(&store).unwrap(), [layer]);
        kept.scratch = Some("/elsewhere".into());
        fs::write(state.join(crate::state::FILE), serde_json::to_vec(&kept).unwrap()).unwrap();
        assert!(pinned(&store).unwrap().is_empty());
        assert_eq!(clear(&store).unwrap(), 1);
        assert!(!path.exists());
    }

    #[test]
    fn who_clears_up_does_not_take_a_directory_from_who_makes_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let store = Store::open(dir.path()).unwrap();
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    clear(&store).unwrap();
                }
            });
            let made: Result<Vec<_>, _> = (0..1000)
                .map(|_| Scratch::create(&store, &[], Path::new("/none")).map(Scratch::remove))
                .collect();
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            made.unwrap();
        });
    }

    #[test]
    fn nothing_outside_of_a_store_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("containers/x")).unwrap();
        for path in [dir.path().join("containers/x"), dir.path().to_owned(), "/".into()] {
            assert!(matches!(remove(&path), Err(Error::Foreign(_))), "{}", path.display());
        }
        remove(&dir.path().join("containers/gone")).unwrap();
        assert!(dir.path().join("containers/x").exists());
    }

    #[test]
    fn a_layers_links_lead_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer");
        fs::create_dir_all(dir.path().join("outside/dir")).unwrap();
        fs::create_dir_all(path.join("real/dir")).unwrap();
        for (target, name) in [("/", "root"), ("..", "up"), ("real", "inside")] {
            std::os::unix::fs::symlink(target, path.join(name)).unwrap();
        }
        let tree = Tree::open(path).unwrap();
        let outside = format!("root{}/outside/dir", dir.path().display());
        for hidden in [outside.as_str(), "up/outside/dir", "../outside/dir", "/etc", "inside/dir", "gone"] {
            assert!(tree.find(hidden.as_bytes()).is_none(), "{hidden}");
        }
        assert!(tree.find(b"real/dir").unwrap().is_dir());
        assert!(tree.find(b"root").unwrap().is_symlink(), "it is there, and not what it leads to");
    }

    #[test]
    fn what_a_layer_mentions_in_passing_is_not_looked_up_on_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let secret = dir.path().join("secret");
        fs::create_dir(&secret).unwrap();
        fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
        let below = secret.strip_prefix("/").unwrap();
        let bring = |name: &str, make: &dyn Fn(&Path), implicit: &[u8]| {
            let arrival = store.begin_layer(&digest(name), &digest("archive")).unwrap();
            make(&arrival.room().unwrap());
            arrival.complete(0, implicit).unwrap();
            digest(name)
        };
        let link = bring("link", &|room| std::os::unix::fs::symlink("/", room.join("a")).unwrap(), b"");
        let passing = Path::new("a").join(below);
        let make = |room: &Path| fs::create_dir_all(room.join(&passing)).unwrap();
        let passes = bring("passes", &make, passing.as_os_str().as_bytes());
        let scratch = Scratch::create(&store, &[link, passes.clone()], Path::new("/none")).unwrap();
        // The topmost layer stands for all of them: no overlay is needed to see what it is given.
        let path = store.layer(&passes);
        let root = Root { dir: File::open(&path).unwrap().into(), path: path.clone() };
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        let before = mode(&path.join(&passing));
        assert_ne!(before, mode(&secret));
        scratch.settle_implicit(&store, &root).unwrap();
        assert_eq!(mode(&path.join(&passing)), before);
    }

    #[test]
    fn files_of_the_root_are_looked_up_inside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root");
        fs::create_dir_all(path.join("etc")).unwrap();
        fs::write(dir.path().join("secret"), "secret").unwrap();
        fs::write(path.join("etc/real"), "real").unwrap();
        let link = |target: &str, name: &str| std::os::unix::fs::symlink(target, path.join(name)).unwrap();
        link("../../secret", "etc/passwd");
        link("/etc/real", "etc/group");
        link("../secret", "etc/hosts");
        link("/../../../../", "up");
        nix::unistd::mkfifo(&path.join("etc/pipe"), Mode::S_IRWXU).unwrap();
        let root = Root { dir: File::open(&path).unwrap().into(), path: path.clone() };
        assert_eq!(root.read("/etc/passwd"), "");
        assert_eq!(root.read("/etc/group"), "real");
        assert_eq!(root.read("/etc/pipe"), "");
        root.write("/etc", "hosts", "ours").unwrap();
        assert_eq!(fs::read_to_string(path.join("etc/hosts")).unwrap(), "ours");
        assert_eq!(fs::read_to_string(dir.path().join("secret")).unwrap(), "secret");
        assert_eq!(root.resolve("/up/new/dir").unwrap(), fs::canonicalize(&path).unwrap().join("new/dir"));
        assert_eq!(root.resolve("/").unwrap(), fs::canonicalize(&path).unwrap());
    }
}
