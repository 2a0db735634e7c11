//! A non-blocking file descriptor in the async runtime: pipe, terminal or vsock stream.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Lets the runtime watch a descriptor.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for as long as it exists, and nothing closes it before.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Reads and writes wait in the runtime, never in the kernel.
pub struct Descriptor(AsyncFd<OwnedFd>);

impl Descriptor {
    /// Takes a descriptor that was opened non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self(watch(fd, Interest::READABLE | Interest::WRITABLE)?))
    }

    /// Takes a blocking descriptor. The flag belongs to the open file, so no one else may hold it who counts on
    /// waiting in the kernel.
    pub fn from_blocking(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Self::new(fd)
    }

    /// Reads what there is, 0 at end of file.
    pub async fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), buf)?)) {
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// Reads what there is now; `WouldBlock` if there is nothing.
    pub fn read_now(&self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(nix::unistd::read(self.0.get_ref(), buf)?)
    }

    /// Writes all of `buf`.
    pub async fn write_all(&self, mut buf: &[u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), buf)?)) {
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(written) => buf = &buf[written?..],
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    /// The runtime's handle, for poll-style users.
    pub fn inner(&self) -> &AsyncFd<OwnedFd> {
        &self.0
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}
