//! Hard links.
//!
//! To link a file that is open as a name only, Linux wants CAP_DAC_READ_SEARCH, before 6.10 even outside of every
//! user namespace (linkat(2), `AT_EMPTY_PATH`), which the jail has not: it would be the right to open any file by its
//! number. So the file is linked through `/proc/self/fd`. The descriptors are our own, of the paths that the kernel
//! tells for the guest's inodes; what has been moved or replaced meanwhile is told by its inode number, and refused.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use fuse_backend_rs::abi::fuse_abi::stat64;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, fstat, linkat, openat};

/// What the guest calls an inode, as the host knows it.
pub struct Known<'a> {
    /// Where it is.
    pub path: &'a Path,
    /// What it is.
    pub attributes: stat64,
}

impl Known<'_> {
    fn open(&self) -> io::Result<OwnedFd> {
        let file = openat(CWD, self.path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let found = fstat(&file)?;
        if (found.st_dev, found.st_ino) != (self.attributes.st_dev, self.attributes.st_ino) {
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        Ok(file)
    }
}

/// Gives `file` a further name in `parent`.
pub fn link(file: &Known, parent: &Known, name: &CStr) -> io::Result<()> {
    let (file, parent) = (file.open()?, parent.open()?);
    // A link of the kernel's, which leads to the very file, also if that is a symbolic link.
    let source = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(CWD, source, &parent, name, AtFlags::SYMLINK_FOLLOW)?)
}
