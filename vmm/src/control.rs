//! The control protocol between a supervisor and its VMM process.
//!
//! One `SOCK_SEQPACKET` socket pair, one JSON message a packet, file descriptors beside it (`SCM_RIGHTS`).
//! The supervisor sends [`Request`]s, the VMM answers with [`Event`]s. The first request is [`Request::Boot`];
//! everything the VM will ever touch on the host comes with it as a descriptor, because the VMM never opens a
//! path. End of file in either direction means that the other process is gone, and ends this side's work.
//!
//! Always true: a packet larger than [`MAX_MESSAGE`], more than [`MAX_FDS`] descriptors, or descriptors with a
//! message that carries none are errors; the VMM, which a guest may have taken over, can never make the
//! supervisor hold a descriptor, or wait for it for more than a moment.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::task::Poll;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use crate::virtio::net::Interface;

/// Largest packet in bytes. The largest message is `Boot`, whose command line the kernel cuts at 2 KiB anyway.
pub const MAX_MESSAGE: usize = 16 * 1024;

/// Most descriptors in one packet: `Boot` carries four.
pub const MAX_FDS: usize = 4;

/// How long a VMM may take to make room for a request, of which the socket holds more than two hundred. It reads them at
/// once.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// Longest part of an error that repeats a message, in characters.
const QUOTED_MAX: usize = 300;

/// What a VM is made of. Sent with four descriptors, in this order: the kernel (an uncompressed ELF
/// `vmlinux`), the initrd, the share directory, and the console (written to and never waited for: make it a
/// non-blocking pipe; what does not fit is dropped).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u8,
    /// Guest memory in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// Words for the end of the kernel command line; the VMM adds what its own devices need.
    pub cmdline: String,
    /// What to call the kernel file in an error.
    pub kernel_name: String,
    /// What to call the initrd file in an error.
    pub initrd_name: String,
    /// Whether the guest is told of the network slots, all of which are empty until [`Request::AttachNetwork`].
    pub network: bool,
}

/// From the supervisor to the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Build the VM and let it run. Comes once, first. Answered by `Started` or `Failed`.
    Boot(Boot),
    /// Connect the stream socket that comes with it to a vsock port of the guest. Answered by `Connected` or
    /// `Refused` with the same id. May be sent as soon as `Boot` is: it waits for the guest to listen.
    Connect {
        /// Chosen by the supervisor; unique among unanswered connects.
        id: u64,
        /// The guest's port.
        port: u32,
    },
    /// Make a network interface of an empty slot. The tap comes with it, opened with
    /// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`. Answered by `NetworkAttached` or `NetworkRefused`. A guest that booted
    /// before does not notice by itself: have it probe its virtio-mmio devices again.
    AttachNetwork {
        /// Which, 0 to 3.
        slot: u8,
        /// What the guest sees.
        interface: Interface,
    },
    /// Set or take away the carrier of an attached interface. Not answered.
    SetLink {
        /// Which, 0 to 3.
        slot: u8,
        /// Whether there is a carrier.
        up: bool,
    },
    /// Empty a slot. Not answered. The tap is closed when no driver of the guest runs the device, so who asks has had
    /// the guest let go of it, and does not count on that: a tap that is deleted carries nothing for anybody.
    DetachNetwork {
        /// Which, 0 to 3.
        slot: u8,
    },
    /// Have so many bytes of memory be there besides those of `Boot`, from the start of its
    /// [`Window`](crate::memory::Window): a multiple of the window's blocks. Answered by `MemorySet` or `MemoryRefused`.
    /// The guest does not notice: who gives memory tells it afterwards, who takes some has had it let go before.
    SetMemory {
        /// In all, more or fewer than there are.
        added_bytes: u64,
    },
    /// Stop all vCPUs where they are. Answered by `Paused`.
    Pause,
    /// Let them go on. Answered by `Resumed`.
    Resume,
    /// End the VM and the process, without asking the guest. Answered by end of file.
    Stop,
}

/// From the VMM to the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The first vCPU is about to run its first instruction.
    Started(Timeline),
    /// A stream is connected; bytes flow from now on.
    Connected {
        /// The id of the `Connect`.
        id: u64,
    },
    /// A stream was not connected; its socket has been closed.
    Refused {
        /// The id of the `Connect`.
        id: u64,
        /// Why, as one clause.
        reason: String,
    },
    /// The slot holds an interface now.
    NetworkAttached {
        /// Of the `AttachNetwork`.
        slot: u8,
    },
    /// The slot was left as it was; the tap has been closed.
    NetworkRefused {
        /// Of the `AttachNetwork`.
        slot: u8,
        /// Why, as one clause.
        reason: String,
    },
    /// So much memory is there now besides that of `Boot`.
    MemorySet {
        /// Of the `SetMemory`.
        added_bytes: u64,
    },
    /// As much memory is there as was before.
    MemoryRefused {
        /// Why, as one clause.
        reason: String,
    },
    /// All vCPUs stand still.
    Paused,
    /// All vCPUs run again.
    Resumed,
    /// The VM has ended, and the process ends now.
    Stopped(StopReason),
    /// The VM could not be built; the process ends now. One line: what failed, why, what to do.
    Failed {
        /// That line.
        message: String,
    },
}

/// Why a VM that ran does not run any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The guest reset itself: `reboot`, or a panic with `panic=-1` (the console tells which).
    Reset,
    /// The guest powered itself off.
    Shutdown,
    /// Every vCPU halted for good.
    Halted,
    /// KVM could not go on. One line with the exit reason and where the guest stood.
    Error(String),
}

/// When what happened, in nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// The VMM's entry function was called.
    pub entered_ns: u64,
    /// The VM and its interrupt controllers exist; `Boot` is waited for.
    pub vm_created_ns: u64,
    /// Kernel and initrd are in guest memory.
    pub kernel_loaded_ns: u64,
    /// Devices and vCPUs are ready; the first `KVM_RUN` is next.
    pub first_run_ns: u64,
}

/// Errors of the control socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// cannot send on the control socket
    #[error("cannot send on the VMM control socket: {0}")]
    Send(#[source] io::Error),
    /// the socket is full
    #[error("the VMM reads its control socket no more")]
    Unread,
    /// cannot receive from the control socket
    #[error("cannot receive from the VMM control socket: {0}")]
    Receive(#[source] io::Error),
    /// a packet is too large
    #[error("a message on the VMM control socket is larger than {MAX_MESSAGE} bytes")]
    TooLong,
    /// more or fewer descriptors than the message carries
    #[error("a message on the VMM control socket came with {found} descriptors instead of {expected}")]
    Descriptors {
        /// How many the message carries.
        expected: usize,
        /// How many came.
        found: usize,
    },
    /// a packet that is not a message
    #[error("a message on the VMM control socket is not understood: {0}")]
    Malformed(String),
}

/// The supervisor's end.
///
/// `Client` may be shared by threads: every call is one system call on the socket.
#[derive(Debug)]
pub struct Client(Channel);

impl Client {
    /// A client and the VMM's end of the socket pair, for the child to inherit. Both are close-on-exec: the
    /// spawner clears the flag (or duplicates the descriptor) in the child.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Client(Channel(ours)), theirs))
    }

    /// Sends `Boot` and its four descriptors.
    pub fn boot(
        &self,
        boot: Boot,
        kernel: BorrowedFd,
        initrd: BorrowedFd,
        share: BorrowedFd,
        console: BorrowedFd,
    ) -> Result<(), Error> {
        self.send(&Request::Boot(boot), &[kernel, initrd, share, console])
    }

    /// Asks for a stream to a port of the guest; `stream` is one end of a stream socket pair, whose other end
    /// the caller keeps.
    pub fn connect(&self, id: u64, port: u32, stream: BorrowedFd) -> Result<(), Error> {
        self.send(&Request::Connect { id, port }, &[stream])
    }

    /// Makes an interface of an empty network slot.
    pub fn attach_network(&self, slot: u8, interface: Interface, tap: BorrowedFd) -> Result<(), Error> {
        self.send(&Request::AttachNetwork { slot, interface }, &[tap])
    }

    /// Sets the carrier of an interface.
    pub fn set_link(&self, slot: u8, up: bool) -> Result<(), Error> {
        self.send(&Request::SetLink { slot, up }, &[])
    }

    /// Empties a network slot.
    pub fn detach_network(&self, slot: u8) -> Result<(), Error> {
        self.send(&Request::DetachNetwork { slot }, &[])
    }

    /// Gives the VM memory besides what it began with, or takes some of that away.
    pub fn set_memory(&self, added_bytes: u64) -> Result<(), Error> {
        self.send(&Request::SetMemory { added_bytes }, &[])
    }

    /// Stops the vCPUs where they are.
    pub fn pause(&self) -> Result<(), Error> {
        self.send(&Request::Pause, &[])
    }

    /// Lets the vCPUs go on.
    pub fn resume(&self) -> Result<(), Error> {
        self.send(&Request::Resume, &[])
    }

    /// Ends the VM.
    pub fn stop(&self) -> Result<(), Error> {
        self.send(&Request::Stop, &[])
    }

    /// Who reads nothing is not waited for, beyond [`SEND_TIMEOUT`]: the supervisor has one thread for all that it does.
    fn send(&self, request: &Request, fds: &[BorrowedFd]) -> Result<(), Error> {
        let sent = || self.0.send(request, fds, MsgFlags::MSG_DONTWAIT);
        let unread = |e: Error| if e.would_block() { Error::Unread } else { e };
        match sent() {
            Err(e) if e.would_block() && self.has_room_within(SEND_TIMEOUT) => sent().map_err(unread),
            other => other.map_err(unread),
        }
    }

    /// Whether the socket takes requests again, of which it takes many then.
    fn has_room_within(&self, time: Duration) -> bool {
        let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
        poll(&mut [PollFd::new(self.as_fd(), PollFlags::POLLOUT)], time).is_ok_and(|ready| ready > 0)
    }

    /// Waits for the next event; `None` when the VMM is gone.
    pub fn recv(&self) -> Result<Option<Event>, Error> {
        match self.receive(MsgFlags::empty())? {
            Poll::Ready(event) => Ok(event),
            // Only when the caller has made the socket non-blocking.
            Poll::Pending => Err(Error::Receive(io::ErrorKind::WouldBlock.into())),
        }
    }

    /// The next event if there is one now, without waiting (whatever the socket's mode is); `None` when the
    /// VMM is gone. For use under epoll: the client's descriptor is readable when an event is there.
    pub fn try_recv(&self) -> Result<Poll<Option<Event>>, Error> {
        self.receive(MsgFlags::MSG_DONTWAIT)
    }

    fn receive(&self, flags: MsgFlags) -> Result<Poll<Option<Event>>, Error> {
        let Poll::Ready(packet) = self.0.recv(flags)? else { return Ok(Poll::Pending) };
        let Some((event, fds)) = packet else { return Ok(Poll::Ready(None)) };
        expect_fds(&fds, 0)?;
        Ok(Poll::Ready(Some(event)))
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

/// A request with the descriptors it carries.
#[derive(Debug)]
pub(crate) enum Received {
    Boot { boot: Boot, kernel: OwnedFd, initrd: OwnedFd, share: OwnedFd, console: OwnedFd },
    Connect { id: u64, port: u32, stream: OwnedFd },
    AttachNetwork { slot: u8, interface: Interface, tap: OwnedFd },
    SetLink { slot: u8, up: bool },
    DetachNetwork { slot: u8 },
    SetMemory { added_bytes: u64 },
    Pause,
    Resume,
    Stop,
}

/// The VMM's end.
#[derive(Debug)]
pub(crate) struct Server(Channel);

impl Server {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Server(Channel(socket))
    }

    /// The next request; `None` when the supervisor is gone. `wait` or return `Pending`.
    pub(crate) fn recv(&self, wait: bool) -> Result<Poll<Option<Received>>, Error> {
        let flags = if wait { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
        let Poll::Ready(packet) = self.0.recv(flags)? else { return Ok(Poll::Pending) };
        let Some((request, fds)) = packet else { return Ok(Poll::Ready(None)) };
        Ok(Poll::Ready(Some(match request {
            Request::Boot(boot) => {
                let [kernel, initrd, share, console] = take_fds(fds)?;
                Received::Boot { boot, kernel, initrd, share, console }
            }
            Request::Connect { id, port } => {
                let [stream] = take_fds(fds)?;
                Received::Connect { id, port, stream }
            }
            Request::AttachNetwork { slot, interface } => {
                let [tap] = take_fds(fds)?;
                Received::AttachNetwork { slot, interface, tap }
            }
            Request::SetLink { slot, up } => expect_fds(&fds, 0).map(|()| Received::SetLink { slot, up })?,
            Request::DetachNetwork { slot } => {
                expect_fds(&fds, 0).map(|()| Received::DetachNetwork { slot })?
            }
            Request::SetMemory { added_bytes } => {
                expect_fds(&fds, 0).map(|()| Received::SetMemory { added_bytes })?
            }
            Request::Pause => expect_fds(&fds, 0).map(|()| Received::Pause)?,
            Request::Resume => expect_fds(&fds, 0).map(|()| Received::Resume)?,
            Request::Stop => expect_fds(&fds, 0).map(|()| Received::Stop)?,
        })))
    }

    /// Sends an event; `wait` for room in the socket or fail with `WouldBlock`.
    pub(crate) fn send(&self, event: &Event, wait: bool) -> Result<(), Error> {
        let flags = if wait { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
        self.0.send(event, &[], flags)
    }
}

impl AsRawFd for Server {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

impl Error {
    /// Whether the socket had no room (and nothing is wrong).
    pub(crate) fn would_block(&self) -> bool {
        matches!(self, Error::Send(e) if e.kind() == io::ErrorKind::WouldBlock)
    }
}

/// What serde says repeats a piece of the message, which is a stranger's: no control characters, no more than
/// [`QUOTED_MAX`].
fn malformed(error: serde_json::Error) -> Error {
    let text = error.to_string();
    Error::Malformed(text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(QUOTED_MAX).collect())
}

fn expect_fds(fds: &[OwnedFd], expected: usize) -> Result<(), Error> {
    if fds.len() == expected { Ok(()) } else { Err(Error::Descriptors { expected, found: fds.len() }) }
}

fn take_fds<const N: usize>(fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], Error> {
    let found = fds.len();
    fds.try_into().map_err(|_| Error::Descriptors { expected: N, found })
}

/// What both ends share: framing, limits and descriptor passing.
#[derive(Debug)]
struct Channel(OwnedFd);

impl Channel {
    fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd], flags: MsgFlags) -> Result<(), Error> {
        let bytes = serde_json::to_vec(message).map_err(malformed)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(Error::TooLong);
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[] } else { &rights[..] };
        let iov = [io::IoSlice::new(&bytes)];
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), &iov, control, flags | MsgFlags::MSG_NOSIGNAL, None) {
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(Error::Send(e.into())),
            }
        }
    }

    /// One packet, `None` at end of file, `Pending` when the call would wait.
    #[allow(clippy::type_complexity)]
    fn recv<T: DeserializeOwned>(&self, flags: MsgFlags) -> Result<Poll<Option<(T, Vec<OwnedFd>)>>, Error> {
        let mut bytes = vec![0u8; MAX_MESSAGE];
        // Room for as many as the kernel passes at once (SCM_MAX_FD), so that no surplus one is ever cut off
        // unseen: what came is owned below and closed there when it is too much.
        let mut space = nix::cmsg_space!([RawFd; 253]);
        let mut iov = [io::IoSliceMut::new(&mut bytes)];
        let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = loop {
            match recvmsg::<()>(self.0.as_raw_fd(), &mut iov, Some(&mut space), flags) {
                Ok(message) => break message,
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => return Ok(Poll::Pending),
                // The other end died with our packets unread: for us that is its end.
                Err(nix::errno::Errno::ECONNRESET) => return Ok(Poll::Ready(None)),
                Err(e) => return Err(Error::Receive(e.into())),
            }
        };
        // Own what came first of all, so that no error leaks a descriptor.
        let mut fds = Vec::new();
        for control in message.cmsgs().map_err(|e| Error::Receive(e.into()))? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just made these descriptors for us; nobody else knows them.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        if fds.len() > MAX_FDS {
            return Err(Error::Descriptors { expected: MAX_FDS, found: fds.len() });
        }
        if message.flags.contains(MsgFlags::MSG_TRUNC) {
            return Err(Error::TooLong);
        }
        let length = message.bytes;
        // A message is never empty, so a read of nothing is end of file.
        if length == 0 {
            return Ok(Poll::Ready(None));
        }
        let message = serde_json::from_slice(&bytes[..length]).map_err(malformed)?;
        Ok(Poll::Ready(Some((message, fds))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot() -> Boot {
        Boot {
            vcpus: 2,
            memory_bytes: 256 << 20,
            cmdline: "debug".into(),
            kernel_name: "vmlinux".into(),
            initrd_name: "initrd.img".into(),
            network: true,
        }
    }

    fn pair() -> (Client, Server) {
        let (client, server) = Client::pair().unwrap();
        (client, Server::new(server))
    }

    #[test]
    fn boot_arrives_with_its_descriptors_in_order() {
        let (client, server) = pair();
        let files: Vec<OwnedFd> = ["/dev/null", "/dev/zero", "/", "/dev/full"]
            .map(|p| std::fs::File::open(p).unwrap().into())
            .into();
        let [a, b, c, d] = [0, 1, 2, 3].map(|i: usize| files[i].as_fd());
        client.boot(boot(), a, b, c, d).unwrap();
        let Poll::Ready(Some(Received::Boot { boot: got, kernel, initrd, share, console })) =
            server.recv(false).unwrap()
        else {
            panic!("no Boot")
        };
        assert_eq!(got, boot());
        for (fd, path) in [(kernel, "/dev/null"), (initrd, "/dev/zero"), (share, "/"), (console, "/dev/full")]
        {
            let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
            assert_eq!(link.to_str().unwrap(), path);
        }
    }

    #[test]
    fn an_interface_arrives_with_its_tap() {
        let (client, server) = pair();
        let interface = Interface { mac: [2, 0, 0, 0, 0, 1], mtu: 1500, up: true };
        let file = std::fs::File::open("/dev/null").unwrap();
        client.attach_network(2, interface, file.as_fd()).unwrap();
        client.set_link(2, false).unwrap();
        let Poll::Ready(Some(Received::AttachNetwork { slot: 2, interface: got, .. })) =
            server.recv(false).unwrap()
        else {
            panic!("no interface")
        };
        assert_eq!(got, interface);
        let next = server.recv(false).unwrap();
        assert!(matches!(next, Poll::Ready(Some(Received::SetLink { slot: 2, up: false }))));
        client.detach_network(2).unwrap();
        let next = server.recv(false).unwrap();
        assert!(matches!(next, Poll::Ready(Some(Received::DetachNetwork { slot: 2 }))));
        client.send(&Request::AttachNetwork { slot: 0, interface }, &[]).unwrap();
        assert!(matches!(server.recv(true), Err(Error::Descriptors { expected: 1, found: 0 })));
    }

    #[test]
    fn memory_is_asked_for_in_all() {
        let (client, server) = pair();
        client.set_memory(128 << 20).unwrap();
        let next = server.recv(false).unwrap();
        assert!(matches!(next, Poll::Ready(Some(Received::SetMemory { added_bytes: 0x800_0000 }))));
    }

    #[test]
    fn every_event_arrives_as_it_was_sent() {
        let (client, server) = pair();
        let events = [
            Event::Started(Timeline {
                entered_ns: 1,
                vm_created_ns: 2,
                kernel_loaded_ns: 3,
                first_run_ns: 4,
            }),
            Event::Connected { id: u64::MAX },
            Event::Refused { id: 7, reason: "nobody listens".into() },
            Event::NetworkAttached { slot: 3 },
            Event::NetworkRefused { slot: 0, reason: "the network slot is taken".into() },
            Event::MemorySet { added_bytes: 1 << 40 },
            Event::MemoryRefused { reason: "the host has no room".into() },
            Event::Stopped(StopReason::Reset),
            Event::Stopped(StopReason::Error("KVM_EXIT_FAIL_ENTRY".into())),
            Event::Failed { message: "no".into() },
        ];
        for event in &events {
            server.send(event, true).unwrap();
            assert_eq!(client.recv().unwrap().as_ref(), Some(event));
        }
        assert!(client.try_recv().unwrap().is_pending());
    }

    #[test]
    fn a_closed_socket_is_end_of_file_on_both_sides() {
        let (client, server) = pair();
        drop(client);
        assert!(matches!(server.recv(true).unwrap(), Poll::Ready(None)));
        let (client, server) = pair();
        client.pause().unwrap();
        drop(server);
        assert_eq!(client.recv().unwrap(), None);
        assert!(matches!(client.pause(), Err(Error::Send(_))));
    }

    #[test]
    fn missing_and_surplus_descriptors_are_errors() {
        let (client, server) = pair();
        let file = std::fs::File::open("/dev/null").unwrap();
        client.send(&Request::Connect { id: 1, port: 2 }, &[]).unwrap();
        assert!(matches!(server.recv(true), Err(Error::Descriptors { expected: 1, found: 0 })));
        client.send(&Request::Stop, &[file.as_fd()]).unwrap();
        assert!(matches!(server.recv(true), Err(Error::Descriptors { expected: 0, found: 1 })));
        client.send(&Request::Stop, &[file.as_fd(); 40]).unwrap();
        assert!(matches!(server.recv(true), Err(Error::Descriptors { .. })));
        server.0.send(&Event::Paused, &[file.as_fd()], MsgFlags::empty()).unwrap();
        assert!(matches!(client.recv(), Err(Error::Descriptors { expected: 0, found: 1 })));
    }

    #[test]
    fn a_packet_that_is_too_long_or_no_message_is_an_error() {
        let (client, server) = pair();
        let long = Boot { cmdline: "x".repeat(MAX_MESSAGE), ..boot() };
        assert!(matches!(client.send(&Request::Boot(long), &[]), Err(Error::TooLong)));
        let raw =
            |bytes: &[u8]| nix::sys::socket::send(client.as_raw_fd(), bytes, MsgFlags::empty()).unwrap();
        raw(&vec![b' '; MAX_MESSAGE + 1]);
        assert!(matches!(server.recv(true), Err(Error::TooLong)));
        let shown = |error: Error| (error.to_string().len(), error.to_string().contains(char::is_control));
        raw(format!("\"{}\"", "\u{7f}".repeat(5000)).as_bytes());
        assert!(matches!(server.recv(true).map_err(shown), Err((..1000, false))));
        for bad in [&b"{"[..], b"\"reboot\"", b"{\"connect\":{\"id\":-1,\"port\":0}}", b"\xff"] {
            raw(bad);
            assert!(matches!(server.recv(true), Err(Error::Malformed(_))));
        }
    }

    #[test]
    fn a_vmm_that_reads_nothing_is_an_error_and_not_a_hang() {
        let (client, server) = pair();
        let mut sent = 0;
        let error = loop {
            match client.pause() {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::Unread), "{error}");
        assert!(sent >= 200, "{sent} requests");
        // One that was only late has lost nothing.
        for _ in 0..sent {
            assert!(matches!(server.recv(false).unwrap(), Poll::Ready(Some(Received::Pause))));
        }
        client.resume().unwrap();
        assert!(matches!(server.recv(false).unwrap(), Poll::Ready(Some(Received::Resume))));
    }

    #[test]
    fn a_full_socket_is_would_block_and_not_a_hang() {
        let (_client, server) = pair();
        let error = loop {
            if let Err(error) = server.send(&Event::Connected { id: 1 }, false) {
                break error;
            }
        };
        assert!(error.would_block(), "{error}");
    }
}
