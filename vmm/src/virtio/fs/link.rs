//! Hard links.
//!
//! To link a file that is open as a name only, Linux wants CAP_DAC_READ_SEARCH, before 6.10 even outside of every
//! user namespace (linkat(2), `AT_EMPTY_PATH`), which the jail has not: it would be the right to open any file by its
//! number. So the file is linked through `/proc/self/fd`.
//!
//! The passthrough keeps its descriptors to itself; these are opened anew, by the paths that the kernel tells for the
//! guest's inodes. That is the one place where a path of several components is opened. Whatever has been moved, replaced
//! or put in the way meanwhile is told by its device and inode number, which nothing else can have as long as the
//! passthrough has the inode open, and refused.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use fuse_backend_rs::abi::fuse_abi::stat64;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, fstat, linkat, openat};

/// What the guest calls an inode, as the host knows it.
pub struct Known {
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub attributes: stat64,
}

impl Known {
    fn open(&self) -> io::Result<OwnedFd> {
        let file = openat(CWD, &self.path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
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
