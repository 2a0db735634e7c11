//! vsock: the only way in. Streams come from the host; nothing is dialled out.
//!
//! Every accepted connection is checked for its peer: containers share the VM's vsock, and one that connects to the
//! guest's own address must not be able to command the agent.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_core::Stream as Incoming;
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, VsockAddr, accept4, bind, connect, getpeername,
    listen, shutdown, socket,
};
use stockade_agent_protocol::RPC_PORT;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::descriptor::{Descriptor, watch};
use crate::error::Error;

/// Address of the host, of this guest seen from itself, and the wildcard: linux/vm_sockets.h.
const CID_HOST: u32 = 2;
const CID_LOCAL: u32 = 1;
const CID_ANY: u32 = u32::MAX;
/// The supervisor opens a few streams for each process at once.
const BACKLOG: i32 = 128;

fn stream_socket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
}

/// A port that accepts streams of the host.
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
    loopback: bool,
}

impl Listener {
    /// Listens on `port`. With `loopback`, connections from inside the guest are accepted too.
    pub fn bind(port: u32, loopback: bool) -> Result<Self, Error> {
        let failed = |e: io::Error| Error::os(format!("listening on vsock port {port}"), e);
        let socket = stream_socket().map_err(|e| failed(e.into()))?;
        bind(socket.as_raw_fd(), &VsockAddr::new(CID_ANY, port)).map_err(|e| failed(e.into()))?;
        let backlog = Backlog::new(BACKLOG).map_err(|e| failed(e.into()))?;
        listen(&socket, backlog).map_err(|e| failed(e.into()))?;
        Ok(Self { socket: watch(socket, Interest::READABLE).map_err(failed)?, loopback })
    }

    /// The next stream of a permitted peer. Errors are of the moment (a peer that is gone already, no descriptor
    /// free): the caller goes on accepting.
    pub async fn accept(&mut self) -> io::Result<Stream> {
        std::future::poll_fn(|cx| self.poll_accept(cx)).await
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        loop {
            let mut ready = ready!(self.socket.poll_read_ready(cx))?;
            let accepted = ready.try_io(|socket| {
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                Ok(accept4(socket.as_raw_fd(), flags)?)
            });
            let fd = match accepted {
                // SAFETY: accept4 just returned this descriptor; nothing else owns it.
                Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd?) },
                Err(_would_block) => continue,
            };
            let Ok(peer) = getpeername::<VsockAddr>(fd.as_raw_fd()) else { continue };
            if peer.cid() == CID_HOST || (self.loopback && peer.cid() == CID_LOCAL) {
                return Poll::Ready(Ok(Stream(Descriptor::new(fd)?)));
            }
            tracing::warn!(peer = peer.cid(), "refused a connection that does not come from the host");
        }
    }
}

/// For the ttrpc server.
impl Incoming for Listener {
    type Item = io::Result<Stream>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_accept(cx).map(Some)
    }
}

/// Tells the VMM that the guest listens now. It refuses every stream that a guest dials, but takes the attempt as the
/// sign to send again the connects that came too early; nobody has to poll.
pub fn hint_that_we_listen() {
    if let Ok(socket) = stream_socket() {
        let _ = connect(socket.as_raw_fd(), &VsockAddr::new(CID_HOST, RPC_PORT));
    }
}

/// A stream of the host.
pub struct Stream(Descriptor);

impl Stream {
    /// The descriptor, for reads and writes.
    pub fn descriptor(&self) -> &Descriptor {
        &self.0
    }

    /// Half-closes: the host reads end of file after everything that was written.
    pub fn end_of_output(&self) {
        let _ = shutdown(self.0.inner().as_raw_fd(), Shutdown::Write);
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.inner().poll_read_ready(cx))?;
            let space = buf.initialize_unfilled();
            if let Ok(read) = ready.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), space)?)) {
                return Poll::Ready(read.map(|n| buf.advance(n)));
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.inner().poll_write_ready(cx))?;
            if let Ok(written) = ready.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), buf)?)) {
                return Poll::Ready(written);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end_of_output();
        Poll::Ready(Ok(()))
    }
}
