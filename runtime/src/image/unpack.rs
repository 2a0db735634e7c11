//! From a layer's archive to a directory that overlayfs can stack.
//!
//! The archive is hostile input. Every path is taken apart here and resolved by openat2(2) below the layer's
//! directory, links included, so that no entry can reach anything else; `..` is refused. Whiteouts become those of
//! overlayfs (image-spec, layer.md; Linux, Documentation/filesystems/overlayfs.rst); device nodes are left out, since
//! a container gets its own and the guest's are not the host's; extended attributes that would speak to overlayfs or
//! to the host's security modules are left out as well.

use std::collections::BTreeSet;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat};
use nix::sys::stat::{
    FileStat, Mode, SFlag, UtimensatFlags, fchmod, fstatat, futimens, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat};
use stockade_sys::inside::openat2;

use super::tarball::{self, Entry, Kind, Tarball, show};
use super::tree;

/// What one layer may unpack to. The largest images in use, those for GPUs, are some 30 GiB in all.
const BYTES_MAX: u64 = 64 << 30;
/// Entries of one layer: a whole distribution has some 200,000 files.
const ENTRIES_MAX: u64 = 4_000_000;
/// Names of directories that are remembered until the end, all together.
const NAMES_MAX: usize = 64 << 20;
/// Begins the name of a whiteout.
const WHITEOUT: &[u8] = b".wh.";
/// The whiteout of all that lies below a directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What overlayfs calls the same.
const OPAQUE_XATTR: &std::ffi::CStr = c"trusted.overlay.opaque";

/// What can go wrong with a layer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// with its archive
    #[error("its archive {0}")]
    Archive(#[from] tarball::Error),
    /// with one entry
    #[error("its entry {path} cannot be unpacked: {error}")]
    Entry { path: String, error: io::Error },
    /// with an entry that wants out
    #[error("its entry {0} leads out of the image")]
    Outside(String),
    /// with the size of it all
    #[error("it unpacks to more than {0}")]
    TooLarge(&'static str),
}

impl Error {
    /// Whether it is the host's disk that is full.
    pub fn is_full(&self) -> bool {
        let error = match self {
            Error::Entry { error, .. } | Error::Archive(tarball::Error::Write(error)) => error,
            _ => return false,
        };
        matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
    }
}

/// What a layer came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Bytes of files' contents.
    pub bytes: u64,
    /// Directories that the archive only mentions as others' parents: their metadata is that of a lower layer, if
    /// one has them.
    pub implicit: BTreeSet<Vec<u8>>,
}

/// Unpacks an archive into `root`, an empty directory. The input is read up to the end mark.
pub fn unpack(archive: impl Read, root: &Path) -> Result<Unpacked, Error> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let root = open(root, flags, Mode::empty())
        .map_err(|e| Error::Entry { path: show(root.as_os_str().as_bytes()), error: e.into() })?;
    let mut layer =
        Layer { root, parent: None, times: Vec::new(), names: 0, result: Unpacked::default(), entries: 0 };
    let mut archive = Tarball::new(archive);
    while let Some(entry) = archive.next()? {
        layer.entries += 1;
        if layer.entries > ENTRIES_MAX {
            return Err(Error::TooLarge("4,000,000 entries"));
        }
        layer.add(&entry, &mut archive)?;
    }
    layer.finish();
    Ok(layer.result)
}

struct Layer {
    root: OwnedFd,
    /// The directory of the last entry: the next is often in the same.
    parent: Option<(Vec<u8>, OwnedFd)>,
    /// Directories' times, to be set when nothing is made in them any more.
    times: Vec<(Vec<u8>, i64)>,
    names: usize,
    result: Unpacked,
    entries: u64,
}

impl Layer {
    fn add<R: Read>(&mut self, entry: &Entry, archive: &mut Tarball<R>) -> Result<(), Error> {
        let path = normal(&entry.path).ok_or_else(|| Error::Outside(show(&entry.path)))?;
        let failed = |error: io::Error| Error::Entry { path: show(&entry.path), error };
        let Some((dir, name)) = split(&path) else {
            // The root itself.
            if entry.kind == Kind::Directory {
                self.result.implicit.remove(&path);
                self.dress_directory(&path, entry).map_err(failed)?;
            }
            return Ok(());
        };
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.hide(dir, name, hidden).map_err(failed);
        }
        let name = CString::new(name).map_err(|e| failed(e.into()))?;
        match entry.kind {
            Kind::Directory => self.directory(&path, dir, &name, entry).map_err(failed),
            Kind::File => self.file(dir, &name, entry, archive),
            Kind::HardLink => self.hard_link(&path, dir, &name, entry),
            Kind::SymLink => self.sym_link(dir, &name, entry).map_err(failed),
            Kind::Fifo => self.fifo(dir, &name, entry).map_err(failed),
            Kind::Device => {
                tracing::debug!(path = show(&entry.path), "a device node of the image is left out");
                Ok(())
            }
        }
    }

    fn directory(&mut self, path: &[u8], dir: &[u8], name: &CString, entry: &Entry) -> io::Result<()> {
        let mode = Mode::S_IRWXU;
        let parent = self.dir(dir)?;
        match mkdirat(parent, &**name, mode) {
            Ok(()) => {}
            Err(Errno::EEXIST) => {
                let was = stat(parent, name)?;
                if !is_dir(&was) {
                    unlinkat(parent, &**name, UnlinkatFlags::NoRemoveDir)?;
                    mkdirat(parent, &**name, mode)?;
                }
                if is_whiteout(&was) {
                    make_opaque(&open_dir(parent, name)?)?;
                }
            }
            Err(e) => return Err(e.into()),
        }
        self.result.implicit.remove(path);
        self.dress_directory(path, entry)
    }

    /// Gives a directory its metadata.
    fn dress_directory(&mut self, path: &[u8], entry: &Entry) -> io::Result<()> {
        let dir = match split(path) {
            None => self.root.try_clone()?,
            Some((parent, name)) => open_dir(self.dir(parent)?, &CString::new(name)?)?,
        };
        dress(&dir, entry)?;
        self.remember(path.len())?;
        self.times.push((path.into(), entry.mtime));
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        dir: &[u8],
        name: &CString,
        entry: &Entry,
        archive: &mut Tarball<R>,
    ) -> Result<(), Error> {
        let failed = |error: io::Error| Error::Entry { path: show(&entry.path), error };
        self.result.bytes += entry.size;
        if self.result.bytes > BYTES_MAX {
            return Err(Error::TooLarge("64 GiB"));
        }
        let make = |parent: &OwnedFd| {
            let flags =
                OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            openat(parent, &**name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
        };
        let file = File::from(self.make(dir, name, make).map_err(failed)?);
        let mut end = 0;
        archive
            .content(entry, |offset, bytes| {
                end = offset + bytes.len() as u64;
                file.write_all_at(bytes, offset)
            })
            .map_err(|e| match e {
                tarball::Error::Write(error) => failed(error),
                other => Error::Archive(other),
            })?;
        let size = if end < entry.size { file.set_len(entry.size) } else { Ok(()) };
        size.and_then(|()| dress(&file, entry)).and_then(|()| set_time(&file, entry.mtime)).map_err(failed)
    }

    fn hard_link(&mut self, path: &[u8], dir: &[u8], name: &CString, entry: &Entry) -> Result<(), Error> {
        let failed = |error: io::Error| Error::Entry { path: show(&entry.path), error };
        let target = normal(&entry.link).ok_or_else(|| Error::Outside(show(&entry.path)))?;
        if target == path {
            return Ok(());
        }
        let missing = || {
            failed(io::Error::new(
                io::ErrorKind::NotFound,
                format!("there is no file {} in the layer to link it to", show(&entry.link)),
            ))
        };
        let (target_dir, target_name) = split(&target).ok_or_else(missing)?;
        let target_name = CString::new(target_name).map_err(|e| failed(e.into()))?;
        let target_dir = self.dir(target_dir).and_then(|dir| dir.try_clone()).map_err(failed)?;
        // Not a whiteout, and nothing that is left out.
        let was = stat(&target_dir, &target_name).map_err(|_| missing())?;
        let kind = SFlag::from_bits_truncate(was.st_mode & libc::S_IFMT);
        if !matches!(kind, SFlag::S_IFREG | SFlag::S_IFLNK | SFlag::S_IFIFO) {
            return Err(missing());
        }
        let make =
            |parent: &OwnedFd| linkat(&target_dir, &*target_name, parent, &**name, LinkatFlags::empty());
        self.make(dir, name, make).map_err(failed)
    }

    fn sym_link(&mut self, dir: &[u8], name: &CString, entry: &Entry) -> io::Result<()> {
        let target = OsStr::from_bytes(&entry.link);
        self.make(dir, name, |parent| symlinkat(target, parent, &**name))?;
        let parent = self.dir(dir)?;
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        fchownat(parent, &**name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let time = TimeSpec::new(entry.mtime, 0);
        Ok(utimensat(parent, &**name, &time, &time, UtimensatFlags::NoFollowSymlink)?)
    }

    fn fifo(&mut self, dir: &[u8], name: &CString, entry: &Entry) -> io::Result<()> {
        let mode = Mode::from_bits_truncate(entry.mode);
        self.make(dir, name, |parent| mknodat(parent, &**name, SFlag::S_IFIFO, mode, 0))?;
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        Ok(fchownat(self.dir(dir)?, &**name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?)
    }

    /// A whiteout: hides what lower layers have, and nothing of this one.
    fn hide(&mut self, dir: &[u8], name: &[u8], hidden: &[u8]) -> io::Result<()> {
        if name == OPAQUE {
            return make_opaque(&open_dir(self.dir(dir)?, c".")?);
        }
        if name.starts_with(b".wh..wh.") {
            // Of AUFS, and of no meaning to anything else.
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it hides nothing that could be"));
        }
        let hidden = CString::new(hidden)?;
        let parent = self.dir(dir)?;
        match mknodat(parent, &*hidden, SFlag::S_IFCHR, Mode::empty(), 0) {
            Ok(()) => Ok(()),
            Err(Errno::EEXIST) if is_dir(&stat(parent, &hidden)?) => make_opaque(&open_dir(parent, &hidden)?),
            Err(Errno::EEXIST) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Makes something that is no directory, in place of what has its name.
    fn make<T>(
        &mut self,
        dir: &[u8],
        name: &CString,
        make: impl Fn(&OwnedFd) -> nix::Result<T>,
    ) -> io::Result<T> {
        match make(self.dir(dir)?) {
            Err(Errno::EEXIST) => {
                tree::remove(self.dir(dir)?, name)?;
                // What was removed may have been, or have held, the directory that is kept open.
                self.parent = None;
                Ok(make(self.dir(dir)?)?)
            }
            other => Ok(other?),
        }
    }

    /// Opens a directory of the layer, and makes what is missing of it.
    fn dir(&mut self, path: &[u8]) -> io::Result<&OwnedFd> {
        if path.is_empty() {
            return Ok(&self.root);
        }
        if self.parent.as_ref().is_none_or(|(open, _)| open != path) {
            let dir = match self.resolve(path) {
                Ok(dir) => dir,
                Err(Errno::ENOENT | Errno::ENOTDIR) => self.make_dirs(path)?,
                Err(e) => return Err(e.into()),
            };
            self.parent = Some((path.into(), dir));
        }
        Ok(self.parent.as_ref().map_or(&self.root, |(_, dir)| dir))
    }

    /// As a process would whose root is the layer's directory.
    fn resolve(&self, path: &[u8]) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.root, OsStr::from_bytes(path), how)
    }

    fn make_dirs(&mut self, path: &[u8]) -> io::Result<OwnedFd> {
        let mut at = self.root.try_clone()?;
        let ends = path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(i, _)| i).chain([path.len()]);
        let mut begin = 0;
        for end in ends {
            let so_far = &path[..end];
            match self.resolve(so_far) {
                Ok(dir) => at = dir,
                Err(Errno::ENOENT | Errno::ENOTDIR) => {
                    let name = CString::new(&path[begin..end])?;
                    let hidden = stat(&at, &name).is_ok_and(|was| is_whiteout(&was));
                    if hidden {
                        unlinkat(&at, &*name, UnlinkatFlags::NoRemoveDir)?;
                    }
                    mkdirat(&at, &*name, Mode::S_IRWXU)?;
                    at = open_dir(&at, &name)?;
                    // Whatever the umask is.
                    fchmod(&at, Mode::from_bits_truncate(0o755))?;
                    if hidden {
                        make_opaque(&at)?;
                    }
                    self.remember(so_far.len())?;
                    self.result.implicit.insert(so_far.into());
                }
                Err(e) => return Err(e.into()),
            }
            begin = end + 1;
        }
        Ok(at)
    }

    fn remember(&mut self, name: usize) -> io::Result<()> {
        self.names += name;
        if self.names > NAMES_MAX {
            return Err(io::Error::other("the names of the layer's directories have more than 64 MiB"));
        }
        Ok(())
    }

    /// Sets the directories' times. One that has gone, or is a link now, has none.
    fn finish(&mut self) {
        for (path, mtime) in self.times.drain(..).rev() {
            let how = OpenHow::new()
                .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
                .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
            let path = if path.is_empty() { b"." } else { path.as_slice() };
            if let Ok(dir) = openat2(&self.root, OsStr::from_bytes(path), how) {
                let _ = set_time(&dir, mtime);
            }
        }
    }
}

/// A path as its components joined by single slashes, without `.`; `None` with a `..` in it. A slash in front means
/// the image's own root.
fn normal(path: &[u8]) -> Option<Vec<u8>> {
    let mut joined = Vec::with_capacity(path.len());
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return None,
            name => {
                if !joined.is_empty() {
                    joined.push(b'/');
                }
                joined.extend_from_slice(name);
            }
        }
    }
    Some(joined)
}

/// Directory and name; `None` for the root.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => Some((&path[..slash], &path[slash + 1..])),
        None if path.is_empty() => None,
        None => Some((b"", path)),
    }
}

fn open_dir(parent: impl AsFd, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(parent, name, flags, Mode::empty())?)
}

fn stat(parent: impl AsFd, name: &std::ffi::CStr) -> io::Result<FileStat> {
    Ok(fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?)
}

fn is_dir(stat: &FileStat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFDIR
}

fn is_whiteout(stat: &FileStat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFCHR && stat.st_rdev == 0
}

fn make_opaque(dir: &OwnedFd) -> io::Result<()> {
    set_xattr(dir, OPAQUE_XATTR, b"y")
}

/// Owner, permissions and attributes, in this order: a change of owner clears what the others set.
fn dress(file: &impl AsFd, entry: &Entry) -> io::Result<()> {
    fchown(file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))?;
    fchmod(file, Mode::from_bits_truncate(entry.mode))?;
    for (name, value) in &entry.xattrs {
        let user = name.starts_with(b"user.") && !name.starts_with(b"user.overlay.");
        let wanted = user
            || matches!(
                &**name,
                b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default"
            );
        if !wanted {
            continue;
        }
        match set_xattr(file, &CString::new(&**name)?, value) {
            // A file system without them cannot have a program that needs them.
            Err(e) if user && e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            other => other?,
        }
    }
    Ok(())
}

fn set_xattr(file: &impl AsFd, name: &std::ffi::CStr, value: &[u8]) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: fsetxattr(2) reads a string that ends with NUL and `value.len()` bytes, which live until it returns.
    match unsafe { libc::fsetxattr(fd, name.as_ptr(), value.as_ptr().cast(), value.len(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set_time(file: &impl AsFd, mtime: i64) -> io::Result<()> {
    let time = TimeSpec::new(mtime, 0);
    Ok(futimens(file, &time, &time)?)
}

#[cfg(test)]
mod tests;
