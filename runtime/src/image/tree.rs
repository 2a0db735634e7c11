//! Removing directory trees that strangers have made.
//!
//! A guest can nest directories as deep as it likes, and an archive nearly so. So nothing here recurses, holds more
//! than a few descriptors, or builds paths: a directory inside a directory is first moved up to the top. No link is
//! ever followed, and nothing outside the tree is touched.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

const DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Removes `name` in `parent`, whatever it is, with all that is in it. That it is gone already is no error.
pub fn remove(parent: impl AsFd, name: &CStr) -> io::Result<()> {
    let parent = parent.as_fd();
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EISDIR | Errno::EPERM) => {}
        Err(e) => return Err(e.into()),
    }
    let top = openat(parent, name, DIRECTORY, Mode::empty())?;
    let mut next = 0_u64;
    loop {
        // What lies at the top is a directory that was there or has been moved here, or a file.
        let children = names(&top)?;
        if children.is_empty() {
            break;
        }
        for (child, _) in children {
            match unlinkat(&top, &*child, UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => continue,
                Err(Errno::EISDIR | Errno::EPERM) => {}
                Err(e) => return Err(e.into()),
            }
            let dir = openat(&top, &*child, DIRECTORY, Mode::empty())?;
            empty(dir.as_fd(), top.as_fd(), &mut next)?;
            unlinkat(&top, &*child, UnlinkatFlags::RemoveDir)?;
        }
    }
    unlinkat(parent, name, UnlinkatFlags::RemoveDir)?;
    Ok(())
}

/// Removes the files of `dir` and moves its directories to `top`.
fn empty(dir: BorrowedFd, top: BorrowedFd, next: &mut u64) -> io::Result<()> {
    let owned = dir.try_clone_to_owned()?;
    for (name, is_dir) in names(&owned)? {
        if !is_dir {
            match unlinkat(dir, &*name, UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => continue,
                Err(Errno::EISDIR | Errno::EPERM) => {}
                Err(e) => return Err(e.into()),
            }
        }
        match unlinkat(dir, &*name, UnlinkatFlags::RemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => continue,
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => {}
            Err(e) => return Err(e.into()),
        }
        loop {
            // No name that a tree has by itself is likely to be like this; one that is stands in nobody's way,
            // because rename(2) replaces no directory that has something in it.
            let fresh = CString::new(format!(".stockade-removed-{next}"))?;
            *next += 1;
            match renameat(dir, &*name, top, &*fresh) {
                Ok(()) => break,
                Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::ENOTDIR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

/// What is in a directory, and whether each is known to be a directory itself.
fn names(dir: &OwnedFd) -> io::Result<Vec<(CString, bool)>> {
    // Its own open file, so that reading begins at the beginning.
    let own = openat(dir, c".", DIRECTORY, Mode::empty())?;
    let mut list = Vec::new();
    for entry in Dir::from_fd(own)?.iter() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            list.push((entry.file_name().to_owned(), entry.file_type() == Some(Type::Directory)));
        }
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    #[test]
    fn a_tree_goes_with_all_that_is_in_it_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        fs::create_dir_all(path.join("keep")).unwrap();
        fs::write(path.join("keep/file"), "x").unwrap();
        fs::create_dir_all(path.join("tree/a/b/c")).unwrap();
        fs::create_dir_all(path.join("tree/d/.stockade-removed-0/e")).unwrap();
        fs::create_dir_all(path.join("tree/.stockade-removed-0/f")).unwrap();
        fs::write(path.join("tree/a/b/file"), "x").unwrap();
        std::os::unix::fs::symlink("../keep", path.join("tree/link")).unwrap();
        std::os::unix::fs::symlink("../../../keep", path.join("tree/a/b/link")).unwrap();
        let parent = File::open(path).unwrap();
        remove(&parent, c"tree").unwrap();
        remove(&parent, c"tree").unwrap();
        assert!(!path.join("tree").exists());
        assert!(path.join("keep/file").exists());
        remove(&parent, c"keep/file").unwrap();
    }

    #[test]
    fn no_tree_is_too_deep() {
        let dir = tempfile::tempdir().unwrap();
        let top = File::open(dir.path()).unwrap();
        let mut at = top.as_fd().try_clone_to_owned().unwrap();
        for _ in 0..1500 {
            nix::sys::stat::mkdirat(&at, c"d", Mode::S_IRWXU).unwrap();
            at = openat(&at, c"d", DIRECTORY, Mode::empty()).unwrap();
        }
        drop(at);
        remove(&top, c"d").unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
