//! Carries bytes between a standard stream of the host and a stream to the guest.
//!
//! Nothing here ever blocks the thread for another stream's sake, and the flags of an inherited descriptor are never
//! changed, because its open file belongs to others too: pipes are spliced with SPLICE_F_NONBLOCK, sockets used with
//! MSG_DONTWAIT, terminals opened anew. Regular files and /dev/null are always ready. A relay ends at end of file;
//! bytes are neither lost nor reordered.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags, open, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{isatty, read, write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::poll::register;

/// Most that one splice moves: a pipe's usual capacity is 64 KiB, its largest for users 1 MiB.
const SPLICE_MAX: usize = 1 << 20;
/// Buffer for what cannot be spliced.
const BUFFER: usize = 16 * 1024;

/// Pieces that are moved before others get their turn of the event loop.
const TURN: u32 = 32;

/// How a descriptor of the host is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pipe,
    Socket,
    /// Terminals, files, devices.
    Other,
}

/// A standard stream of the host.
#[derive(Debug)]
pub struct Endpoint {
    fd: AsyncOrFile,
    kind: Kind,
}

#[derive(Debug)]
enum AsyncOrFile {
    Polled(AsyncFd<OwnedFd>),
    AlwaysReady(OwnedFd),
}

/// Which way an endpoint is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the host to the guest.
    ToGuest,
    /// From the guest to the host.
    ToHost,
}

impl Endpoint {
    /// Makes an endpoint of a descriptor that this process owns a copy of. Needs a runtime around it.
    pub fn new(fd: OwnedFd, direction: Direction) -> io::Result<Self> {
        let kind = match SFlag::from_bits_truncate(fstat(&fd)?.st_mode) & SFlag::S_IFMT {
            SFlag::S_IFIFO => Kind::Pipe,
            SFlag::S_IFSOCK => Kind::Socket,
            _ => Kind::Other,
        };
        let fd = if isatty(&fd).unwrap_or(false) { reopen(&fd, direction).unwrap_or(fd) } else { fd };
        let interest = match direction {
            Direction::ToGuest => Interest::READABLE,
            Direction::ToHost => Interest::WRITABLE,
        };
        // epoll(7) refuses what is always ready with EPERM.
        let fd = match register(fd, interest) {
            Ok(fd) => AsyncOrFile::Polled(fd),
            Err(e) => {
                let (fd, error) = e.into_parts();
                if error.raw_os_error() != Some(libc::EPERM) {
                    return Err(error);
                }
                AsyncOrFile::AlwaysReady(fd)
            }
        };
        Ok(Endpoint { fd, kind })
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.fd {
            AsyncOrFile::Polled(fd) => fd.get_ref().as_fd(),
            AsyncOrFile::AlwaysReady(fd) => fd.as_fd(),
        }
    }

    /// Waits until an operation that found the endpoint not ready can be tried again.
    async fn wait(&self, direction: Direction) -> io::Result<()> {
        let AsyncOrFile::Polled(fd) = &self.fd else { return Ok(()) };
        loop {
            let mut ready = match direction {
                Direction::ToGuest => fd.readable().await?,
                Direction::ToHost => fd.writable().await?,
            };
            let wanted = match direction {
                Direction::ToGuest => PollFlags::POLLIN,
                Direction::ToHost => PollFlags::POLLOUT,
            };
            if is_ready(self.as_fd(), wanted) {
                return Ok(());
            }
            ready.clear_ready();
        }
    }

    fn read(&self, buffer: &mut [u8]) -> nix::Result<usize> {
        match self.kind {
            Kind::Socket => recv(self.as_fd().as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT),
            _ => read(self.as_fd(), buffer),
        }
    }

    fn write(&self, bytes: &[u8]) -> nix::Result<usize> {
        match self.kind {
            Kind::Socket => {
                send(self.as_fd().as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)
            }
            _ => write(self.as_fd(), bytes),
        }
    }
}

/// A terminal's own non-blocking open file.
fn reopen(fd: &OwnedFd, direction: Direction) -> nix::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let access = match direction {
        Direction::ToGuest => OFlag::O_RDONLY,
        Direction::ToHost => OFlag::O_WRONLY,
    };
    open(path.as_str(), access | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC, Mode::empty())
}

fn is_ready(fd: BorrowedFd, wanted: PollFlags) -> bool {
    let mut fds = [PollFd::new(fd, wanted)];
    // Anything is something to act on: data, room, hang-up or an error.
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
}

/// Carries the guest's output to the host until the guest ends it. `first` is called before the first byte.
///
/// When the host's side does not take more (its reader is gone), the stream is closed, and the guest's process meets
/// a broken pipe as it would without a VM.
pub async fn to_host(stream: OwnedFd, sink: Endpoint, first: impl FnOnce()) -> io::Result<()> {
    let stream = register(stream, Interest::READABLE)?;
    let mut first = Some(first);
    let mut splices = sink.kind == Kind::Pipe;
    let mut buffer = Vec::new();
    let mut pieces = 0u32;
    loop {
        // A guest that writes without end to where there is always room would keep signals and other streams waiting.
        pieces = pieces.wrapping_add(1);
        if pieces.is_multiple_of(TURN) {
            tokio::task::yield_now().await;
        }
        let mut readable = stream.readable().await?;
        let moved = if splices {
            let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
            splice(stream.get_ref(), None, sink.as_fd(), None, SPLICE_MAX, flags)
        } else {
            buffer.resize(BUFFER, 0);
            recv(stream.as_raw_fd(), &mut buffer, MsgFlags::empty())
        };
        match moved {
            Ok(0) | Err(Errno::ECONNRESET) => return Ok(()),
            Ok(n) => {
                if let Some(first) = first.take() {
                    first();
                }
                if !splices {
                    write_all(&sink, &buffer[..n]).await?;
                }
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if !is_ready(stream.get_ref().as_fd(), PollFlags::POLLIN) => {
                readable.clear_ready();
            }
            Err(Errno::EAGAIN) if splices && !is_ready(sink.as_fd(), PollFlags::POLLOUT) => {
                sink.wait(Direction::ToHost).await?;
            }
            // Not what splice can do here.
            Err(Errno::EAGAIN | Errno::EINVAL) if splices => splices = false,
            Err(Errno::EAGAIN) => readable.clear_ready(),
            Err(e) => return Err(e.into()),
        }
    }
}

async fn write_all(sink: &Endpoint, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        // A pipe that could not be spliced to blocks, so ask first.
        if sink.kind == Kind::Pipe {
            sink.wait(Direction::ToHost).await?;
            // A pipe that is ready has room for this much (pipe(7), PIPE_BUF).
            let n = sink.write(&bytes[..bytes.len().min(4096)])?;
            bytes = &bytes[n..];
            continue;
        }
        match sink.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => sink.wait(Direction::ToHost).await?,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Carries the host's input to the guest until end of file, which becomes a half-close, or until the guest takes
/// no more.
pub async fn to_guest(source: Endpoint, stream: OwnedFd) -> io::Result<()> {
    let stream = register(stream, Interest::READABLE | Interest::WRITABLE)?;
    let mut splices = source.kind == Kind::Pipe;
    let mut buffer = Vec::new();
    loop {
        source.wait(Direction::ToGuest).await?;
        let moved = if splices {
            let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
            splice(source.as_fd(), None, stream.get_ref(), None, SPLICE_MAX, flags)
        } else {
            buffer.resize(BUFFER, 0);
            source.read(&mut buffer)
        };
        match moved {
            Ok(0) => break,
            Ok(n) if !splices => {
                if !send_all(&stream, &buffer[..n]).await? {
                    return Ok(());
                }
            }
            Ok(_) => {}
            Err(Errno::EINTR) => {}
            Err(Errno::EPIPE | Errno::ECONNRESET) if splices => return Ok(()),
            Err(Errno::EAGAIN) if !is_ready(source.as_fd(), PollFlags::POLLIN) => {}
            Err(Errno::EAGAIN) if splices && !is_ready(stream.get_ref().as_fd(), PollFlags::POLLOUT) => {
                wait_writable(&stream).await?;
            }
            Err(Errno::EAGAIN | Errno::EINVAL) if splices => splices = false,
            Err(Errno::EAGAIN) => {}
            // A terminal that was hung up.
            Err(Errno::EIO) => break,
            Err(e) => return Err(e.into()),
        }
    }
    match shutdown(stream.as_raw_fd(), Shutdown::Write) {
        Ok(()) => {}
        Err(Errno::ENOTCONN | Errno::EPIPE) => return Ok(()),
        Err(e) => return Err(e.into()),
    }
    // Only the guest's answer to the half-close ends the stream.
    loop {
        let mut readable = stream.readable().await?;
        match recv(stream.as_raw_fd(), &mut [0], MsgFlags::empty()) {
            Err(Errno::EAGAIN) => readable.clear_ready(),
            Err(Errno::EINTR) => {}
            Ok(n) if n > 0 => {}
            _ => return Ok(()),
        }
    }
}

/// Whether the guest took it all.
async fn send_all(stream: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<bool> {
    while !bytes.is_empty() {
        match send(stream.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait_writable(stream).await?,
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(true)
}

async fn wait_writable(stream: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut ready = stream.writable().await?;
        if is_ready(stream.get_ref().as_fd(), PollFlags::POLLOUT) {
            return Ok(());
        }
        ready.clear_ready();
    }
}

#[cfg(test)]
mod tests;
