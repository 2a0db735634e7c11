//! Copying a directory's contents into a tmpfs, for the option `tmpcopyup`.
//!
//! The tree is an image's, so hostile: it is walked by descriptors, links are copied and never followed, and depth is
//! bounded by [`DEPTH_MAX`]. The target is a file system that was mounted a moment ago, in which nobody works yet.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{
    FileStat, Mode, SFlag, UtimensatFlags, fchmod, fstat, fstatat, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat, symlinkat};

/// Each level holds two descriptors and a stack frame.
const DEPTH_MAX: usize = 256;

/// Copies everything below `source` to what is mounted at `target`, and gives that the owner and mode of `source`.
pub fn tree(source: &OwnedFd, target: &Path) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let target = nix::fcntl::open(target, flags, Mode::empty())?;
    directory(source, &target, 0)
}

fn directory(source: &OwnedFd, target: &OwnedFd, depth: usize) -> io::Result<()> {
    if depth > DEPTH_MAX {
        return Err(Errno::ELOOP.into());
    }
    let stat = fstat(source)?;
    // A descriptor of its own: reading moves its position.
    let mut entries = Dir::from_fd(openat(source, ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?)?;
    for entry in entries.iter() {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            copy(source, target, Path::new(name), depth)?;
        }
    }
    nix::unistd::fchown(target, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    fchmod(target, mode(&stat))?;
    copy_attributes(source, target)?;
    Ok(())
}

fn copy(source: &OwnedFd, target: &OwnedFd, name: &Path, depth: usize) -> io::Result<()> {
    let stat = fstatat(source, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFDIR => {
            mkdirat(target, name, Mode::S_IRWXU)?;
            let open = |at: &OwnedFd| openat(at, name, flags | OFlag::O_DIRECTORY, Mode::empty());
            directory(&open(source)?, &open(target)?, depth + 1)?;
        }
        SFlag::S_IFREG => {
            let from = openat(source, name, flags, Mode::empty())?;
            let to = openat(
                target,
                name,
                flags | OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL,
                Mode::S_IRUSR,
            )?;
            let (mut from, mut to) = (File::from(from), File::from(to));
            io::copy(&mut from, &mut to)?;
            nix::unistd::fchown(&to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
            fchmod(&to, mode(&stat))?;
            copy_attributes(&from, &to)?;
        }
        SFlag::S_IFLNK => {
            let link = PathBuf::from(readlinkat(source, name)?);
            symlinkat(&link, target, name)?;
            own(target, name, &stat)?;
        }
        kind => {
            mknodat(target, name, kind, mode(&stat), stat.st_rdev)?;
            own(target, name, &stat)?;
        }
    }
    let (accessed, modified) =
        (TimeSpec::new(stat.st_atime, stat.st_atime_nsec), TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec));
    Ok(utimensat(target, name, &accessed, &modified, UtimensatFlags::NoFollowSymlink)?)
}

fn mode(stat: &FileStat) -> Mode {
    Mode::from_bits_truncate(stat.st_mode & 0o7777)
}

fn own(at: &OwnedFd, name: &Path, stat: &FileStat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    Ok(fchownat(at, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?)
}

/// Longest list of names, and longest value, that the kernel gives (XATTR_LIST_MAX, XATTR_SIZE_MAX).
const ATTRIBUTES_MAX: usize = 65_536;

/// Extended attributes, as far as a tmpfs has them: file capabilities above all.
fn copy_attributes(source: impl AsFd, target: impl AsFd) -> io::Result<()> {
    let (source, target) = (source.as_fd().as_raw_fd(), target.as_fd().as_raw_fd());
    let mut names = vec![0u8; ATTRIBUTES_MAX];
    // SAFETY: flistxattr(2) writes at most the length given into a buffer of that length.
    let length = unsafe { libc::flistxattr(source, names.as_mut_ptr().cast(), names.len()) };
    let Ok(length) = usize::try_from(length) else {
        return match Errno::last() {
            Errno::EOPNOTSUPP => Ok(()),
            e => Err(e.into()),
        };
    };
    let mut value = vec![0u8; ATTRIBUTES_MAX];
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let name = CString::new(name)?;
        // SAFETY: fgetxattr(2) reads a NUL-terminated name and writes at most the length given into the buffer.
        let size = unsafe { libc::fgetxattr(source, name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        let Ok(size) = usize::try_from(size) else { continue };
        // SAFETY: fsetxattr(2) reads a NUL-terminated name and a value of the length given, which the buffer has.
        let set = unsafe { libc::fsetxattr(target, name.as_ptr(), value.as_ptr().cast(), size, 0) };
        match Errno::result(set) {
            Ok(_) | Err(Errno::EOPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn a_tree_arrives_with_its_modes_times_and_links() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::create_dir_all(from.join("sub")).unwrap();
        std::fs::create_dir_all(&to).unwrap();
        std::fs::write(from.join("sub/file"), "text").unwrap();
        std::fs::set_permissions(from.join("sub/file"), PermissionsExt::from_mode(0o4751)).unwrap();
        std::fs::set_permissions(&from, PermissionsExt::from_mode(0o1770)).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        mknodat(File::open(&from).unwrap(), "fifo", SFlag::S_IFIFO, Mode::S_IRUSR, 0).unwrap();
        tree(&File::open(&from).unwrap().into(), &to).unwrap();
        let (old, new) = (from.join("sub/file").metadata().unwrap(), to.join("sub/file").metadata().unwrap());
        assert_eq!(std::fs::read_to_string(to.join("sub/file")).unwrap(), "text");
        assert_eq!((new.mode() & 0o7777, new.mtime_nsec()), (0o4751, old.mtime_nsec()));
        assert_eq!(to.metadata().unwrap().mode() & 0o7777, 0o1770);
        assert_eq!(std::fs::read_link(to.join("link")).unwrap(), Path::new("/nowhere"));
        assert_eq!(to.join("fifo").metadata().unwrap().mode() & libc::S_IFMT, libc::S_IFIFO);
    }
}
