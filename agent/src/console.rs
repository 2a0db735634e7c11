//! A process's terminal: libcontainer makes the pair inside the container and hands the master side over through a
//! unix socket that it wants to know by path.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::cmsg_space;
use nix::fcntl::OFlag;
use nix::pty::{posix_openpt, unlockpt};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::{Uid, fchown};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

use crate::container::CONSOLE_DIR;
use crate::descriptor::Descriptor;
use crate::error::Error;

/// Socket paths have numbers for names: ids may be longer than a socket's path may.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// The socket on which a terminal will arrive.
pub struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    /// Listens on a socket of its own.
    pub fn listen() -> Result<Self, Error> {
        let path = PathBuf::from(format!("{CONSOLE_DIR}/{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let listener =
            UnixListener::bind(&path).map_err(|e| Error::os("making a socket for the terminal", e))?;
        Ok(Self { listener, path })
    }

    /// For libcontainer.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the master side, and gives the terminal to the process's user, who may open it again.
    pub async fn receive(self, uid: u32) -> Result<Arc<Descriptor>, Error> {
        let failed = |e| Error::os("receiving the terminal", e);
        let (stream, _) = self.listener.accept().await.map_err(failed)?;
        let master = receive_descriptor(&stream).await.map_err(failed)?;
        if uid != 0 {
            give_to(&master, uid).map_err(|e| Error::os("giving the terminal to the process's user", e))?;
        }
        Ok(Arc::new(Descriptor::from_blocking(master).map_err(failed)?))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn receive_descriptor(stream: &UnixStream) -> io::Result<OwnedFd> {
    loop {
        stream.readable().await?;
        let received = stream.try_io(Interest::READABLE, || {
            let mut name = [0; 64];
            let mut control = cmsg_space!(RawFd);
            let mut data = [IoSliceMut::new(&mut name)];
            let message =
                recvmsg::<()>(stream.as_raw_fd(), &mut data, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
            let descriptor = message.cmsgs()?.find_map(|c| match c {
                ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                _ => None,
            });
            descriptor.ok_or_else(|| io::Error::other("no descriptor came"))
        });
        match received {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            // SAFETY: the kernel just made this descriptor for this process; nothing else owns it.
            received => return received.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
        }
    }
}

/// A terminal of the guest's own: the master side and the other.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
    unlockpt(&master)?;
    // SAFETY: what this descriptor belonged to no longer does.
    let master = unsafe { OwnedFd::from_raw_fd(master.into_raw_fd()) };
    let other = other_side(&master)?;
    Ok((master, other))
}

fn other_side(master: &OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor of the other side, or -1.
    let slave = unsafe {
        libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC)
    };
    if slave < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(slave) })
}

fn give_to(master: &OwnedFd, uid: u32) -> io::Result<()> {
    Ok(fchown(other_side(master)?, Some(Uid::from_raw(uid)), None)?)
}

/// Sets the size of a terminal's window, which tells its foreground processes.
pub fn resize(terminal: &Descriptor, rows: u16, columns: u16) -> Result<(), Error> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize, which lives until the call returns.
    if unsafe { libc::ioctl(terminal.inner().as_raw_fd(), libc::TIOCSWINSZ, &size) } < 0 {
        return Err(Error::os("setting the window size", io::Error::last_os_error()));
    }
    Ok(())
}
