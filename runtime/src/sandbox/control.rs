//! How other commands talk to a supervisor: `control.sock` in the container's state directory.
//!
//! A conversation is one connection: a request, its answer, and for an exec what follows until the process ends.
//! Packets are JSON of at most [`MAX_MESSAGE`] bytes; what can be longer (a process object, a list of processes)
//! comes beside it as a file in memory. The directory is root's alone, so both sides trust each other.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, listen, recvmsg, sendmsg, socket,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::poll::register;
use crate::state::{CONTROL_SOCKET, StateDir};

/// Longest packet in bytes; the longest message is an error.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// Most descriptors with one packet: three streams.
const MAX_FDS: usize = 3;
/// Most bytes of a file in memory that are read: what the agent's contract carries at most in one message.
const MAX_ATTACHMENT: u64 = 4 << 20;

/// How soon it is looked again for room for a conversation.
const FULL_WAIT: Duration = Duration::from_millis(100);

/// From a command to the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Let the workload run.
    Start,
    /// Signal the workload's init, or all of the container's processes.
    Kill { signal: i32, all: bool },
    /// Freeze the container.
    Pause,
    /// Thaw it.
    Resume,
    /// List its processes.
    Processes,
    /// Apply limits; all of them come as an attachment, a `linux.resources` object.
    Update,
    /// Tell what it uses.
    Stats,
    /// Run a further process for that of the host with this number; its process object comes as an attachment.
    Exec { pid: i32, stdio: [bool; 3], ignore_paused: bool, cgroup: String },
    /// Run a program in the guest, outside of its container, where that is allowed; an `EnterRequest` of the agent's
    /// contract comes as an attachment.
    Enter { stdio: [bool; 3] },
    /// List the processes of the host that stand for execs.
    Execs,
    /// Create a further container in the VM, of which there is a state directory already. What comes with it: its
    /// bundle as an attachment, the mount and the network namespace of the command.
    Create { id: String, stdio: [bool; 3] },
    /// In the conversation of an exec, of a further container or of who has entered: a signal for its process.
    Signal { signal: i32 },
    /// In such a conversation: the size of its terminal.
    Resize { rows: u16, columns: u16 },
}

/// From the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is done.
    Done,
    /// It is not, and why.
    Failed { message: String },
    /// A list of [`ProcessInfo`] comes as an attachment.
    Processes,
    /// A list of the numbers of processes of the host comes as an attachment.
    Execs,
    /// What it uses comes as an attachment, in the shape of runc's `events`.
    Stats,
    /// The exec's process runs, or the container is created; the streams that were asked for come with it.
    Started,
    /// It has ended.
    Exited { code: u8, signal: i32 },
}

/// A process of a container, in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// In the guest's initial pid namespace.
    pub pid: u32,
    /// Its parent there.
    pub ppid: u32,
    /// Whose it is.
    pub uid: u32,
    /// CPU time used, nanoseconds.
    pub cpu_ns: u64,
    /// Start time, seconds since the epoch.
    pub started: u64,
    /// Controlling terminal.
    pub tty: String,
    /// A letter, as S for asleep, and flags.
    pub state: String,
    /// Command line.
    pub command: String,
}

/// A packet and what came with it.
pub type Packet<T> = (T, Vec<OwnedFd>);

/// One connection.
#[derive(Debug)]
pub struct Conversation(OwnedFd);

impl Conversation {
    /// Connects to a container's supervisor.
    pub fn connect(dir: &StateDir) -> io::Result<Self> {
        let socket = new_socket(SockFlag::empty())?;
        connect(socket.as_raw_fd(), &UnixAddr::new(&dir.short_path(CONTROL_SOCKET))?)?;
        Ok(Conversation(socket))
    }

    /// Sends a message with descriptors.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(Errno::EMSGSIZE.into());
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let bytes = [io::IoSlice::new(&bytes)];
        sendmsg::<()>(self.0.as_raw_fd(), &bytes, control, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// The next message, `None` when the other side is gone.
    pub fn recv<T: DeserializeOwned>(&self) -> io::Result<Option<Packet<T>>> {
        receive(self.0.as_fd(), MsgFlags::empty())
    }

    /// Waits until the other side is gone, at most for `timeout`; whether it is.
    pub fn ended_within(&self, timeout: Duration) -> bool {
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, timeout) {
                Err(Errno::EINTR) => {}
                Ok(n) => return n > 0,
                Err(_) => return false,
            }
        }
    }

    /// This for a task. Needs a runtime around it.
    pub fn into_async(self) -> io::Result<AsyncConversation> {
        Ok(AsyncConversation(register(self, Interest::READABLE)?))
    }
}

impl AsFd for Conversation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Conversation {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A connection under a runtime.
#[derive(Debug)]
pub struct AsyncConversation(AsyncFd<Conversation>);

impl AsyncConversation {
    /// Sends; an answer always has room, because each request gets one.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd]) -> io::Result<()> {
        self.0.get_ref().send(message, fds)
    }

    /// The next message, `None` when the other side is gone.
    pub async fn recv<T: DeserializeOwned>(&self) -> io::Result<Option<Packet<T>>> {
        loop {
            let mut ready = self.0.readable().await?;
            match receive(self.0.get_ref().0.as_fd(), MsgFlags::MSG_DONTWAIT) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                other => return other,
            }
        }
    }
}

/// The supervisor's side.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Makes the socket in a state directory. Who connects from now on waits until it is answered.
    pub fn bind(dir: &StateDir) -> io::Result<Self> {
        let socket = new_socket(SockFlag::SOCK_NONBLOCK)?;
        bind(socket.as_raw_fd(), &UnixAddr::new(&dir.short_path(CONTROL_SOCKET))?)?;
        listen(&socket, Backlog::new(64)?)?;
        Ok(Listener(socket))
    }

    /// Calls `answer` for each new conversation, until the future is dropped. Where the process or the host has no room
    /// for one, who connects waits until there is.
    pub async fn each(&self, mut answer: impl FnMut(AsyncConversation)) -> io::Result<()> {
        let listener = register(self.0.as_fd(), Interest::READABLE)?;
        let mut is_full = false;
        loop {
            let mut ready = listener.readable().await?;
            match accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                Ok(fd) => {
                    is_full = false;
                    // SAFETY: accept4 has just made this descriptor for us; nobody else knows it.
                    match Conversation(unsafe { OwnedFd::from_raw_fd(fd) }).into_async() {
                        Ok(talk) => answer(talk),
                        Err(e) => tracing::warn!("a command gets no answer: {e}"),
                    }
                }
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::ECONNABORTED | Errno::EINTR) => {}
                Err(e @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)) => {
                    if !std::mem::replace(&mut is_full, true) {
                        tracing::warn!("commands wait until there is room for them: {e}");
                    }
                    // What makes room does not say so.
                    tokio::time::sleep(FULL_WAIT).await;
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// A file in memory with these bytes.
pub fn attachment(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(c"stockade", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file.into())
}

/// What is in the only file that came with a packet.
pub fn read_attachment(fds: Vec<OwnedFd>) -> io::Result<Vec<u8>> {
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "a message without its attachment");
    let mut file = File::from(fds.into_iter().next().ok_or_else(missing)?);
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(MAX_ATTACHMENT).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn new_socket(flags: SockFlag) -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | flags, None)?)
}

fn receive<T: DeserializeOwned>(socket: BorrowedFd, flags: MsgFlags) -> io::Result<Option<Packet<T>>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut buffers = [io::IoSliceMut::new(&mut bytes)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let packet = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut space), flags) {
            Err(Errno::EINTR) => {}
            Err(Errno::ECONNRESET) => return Ok(None),
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in packet.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just made these descriptors for us; nobody else knows them.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if packet.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(Errno::EMSGSIZE.into());
    }
    match packet.bytes {
        0 => Ok(None),
        length => Ok(Some((serde_json::from_slice(&bytes[..length])?, fds))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> (tempfile::TempDir, StateDir) {
        let root = tempfile::tempdir().unwrap();
        // Longer than a socket address: the short path makes up for it.
        let dir = StateDir::create(root.path(), &"x".repeat(200)).unwrap();
        (root, dir)
    }

    fn exec() -> Request {
        Request::Exec { pid: 7, stdio: [true; 3], ignore_paused: false, cgroup: String::new() }
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn a_conversation_carries_messages_and_descriptors_both_ways() {
        let (_root, dir) = dir();
        let listener = Listener::bind(&dir).unwrap();
        let client = std::thread::spawn(move || {
            let talk = Conversation::connect(&dir).unwrap();
            let process = attachment(&vec![b'x'; 1 << 20]).unwrap();
            talk.send(&exec(), &[process.as_fd()]).unwrap();
            let (reply, fds) = talk.recv::<Reply>().unwrap().unwrap();
            assert_eq!((reply, fds.len()), (Reply::Started, 3));
            talk.send(&Request::Resize { rows: 1, columns: 2 }, &[]).unwrap();
            assert!(talk.recv::<Reply>().unwrap().is_none());
        });
        runtime().block_on(async {
            let (send, mut conversations) = tokio::sync::mpsc::unbounded_channel();
            let talk = tokio::select! {
                _ = listener.each(|talk| send.send(talk).unwrap()) => panic!("ended"),
                talk = conversations.recv() => talk.unwrap(),
            };
            let (request, fds) = talk.recv::<Request>().await.unwrap().unwrap();
            assert_eq!(request, exec());
            assert_eq!(read_attachment(fds).unwrap().len(), 1 << 20);
            let null = File::open("/dev/null").unwrap();
            talk.send(&Reply::Started, &[null.as_fd(), null.as_fd(), null.as_fd()]).unwrap();
            let (request, _) = talk.recv::<Request>().await.unwrap().unwrap();
            assert_eq!(request, Request::Resize { rows: 1, columns: 2 });
        });
        client.join().unwrap();
    }

    #[test]
    fn without_a_supervisor_nobody_answers() {
        let (_root, dir) = dir();
        assert_eq!(Conversation::connect(&dir).unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(Listener::bind(&dir).unwrap());
        assert_eq!(Conversation::connect(&dir).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn what_is_too_long_or_no_message_is_an_error() {
        let (_root, dir) = dir();
        let listener = Listener::bind(&dir).unwrap();
        let talk = Conversation::connect(&dir).unwrap();
        let long = Reply::Failed { message: "x".repeat(MAX_MESSAGE) };
        assert!(talk.send(&long, &[]).is_err());
        talk.send(&"nonsense", &[]).unwrap();
        talk.send(&Request::Start, &[io::stdin().as_fd(); 8]).unwrap();
        runtime().block_on(async {
            let (send, mut conversations) = tokio::sync::mpsc::unbounded_channel();
            let talk = tokio::select! {
                _ = listener.each(|talk| send.send(talk).unwrap()) => panic!("ended"),
                talk = conversations.recv() => talk.unwrap(),
            };
            assert!(talk.recv::<Request>().await.is_err());
            assert!(talk.recv::<Request>().await.is_err());
        });
        assert!(read_attachment(Vec::new()).is_err());
    }
}
