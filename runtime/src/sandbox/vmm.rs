//! The VMM process, as its supervisor sees it.
//!
//! It is this binary again, in its `vmm` role, and gets nothing but descriptors: its control socket as standard
//! input, the console as standard error. It is in a process group and in namespaces of its own ([`spawn`]), so that
//! a terminal's signals do not reach it, and it ends with the supervisor. Dropping it kills it and waits until it is
//! gone.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::task::Poll;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use stockade_vmm::control::{self, Boot, Client, Event, Interface, StopReason};
use tokio::io::Interest;
use tokio::sync::oneshot;

use super::poll::register;
use super::spawn::{self, Child};
use super::timeline::Timeline;
use crate::printable::printable;
use crate::process::ProcessId;

/// More events than a VMM sends that nobody has read meanwhile.
const MAX_LAST_WORDS: usize = 64;
/// Longest reason of a VMM that is shown, in characters: it may be the guest's.
const REASON_MAX: usize = 1000;
/// How long a VMM may take to end that has closed its socket.
const DEATH_TIMEOUT: Duration = Duration::from_secs(1);

/// Errors of the VMM process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// it cannot be started
    #[error("cannot start the VMM process in namespaces of its own: {0}; see `stockade check`")]
    Spawn(#[source] io::Error),
    /// it cannot be talked to
    #[error(transparent)]
    Control(control::Error),
    /// it could not build the VM
    #[error("{0}")]
    Failed(String),
    /// a stream cannot be made
    #[error("cannot make a stream to the guest: {0}")]
    Stream(#[source] io::Error),
    /// memory is not given or taken
    #[error("the VM does not get other memory: {0}")]
    Memory(String),
    /// an interface is not taken
    #[error("the VM does not take a network interface: {0}")]
    Network(String),
}

/// How a VM ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// It never began.
    Failed(String),
    /// The guest ended it.
    Stopped(StopReason),
    /// The process died or broke off.
    Died(String),
}

/// Who waits for the VMM to do something, or not and why.
type Answer = oneshot::Sender<Result<(), String>>;

/// A running VMM process.
#[derive(Debug)]
pub struct Vmm {
    client: Client,
    child: RefCell<Child>,
    /// The process's network namespace, which so outlives it. The last to leave one waits for the host's kernel to
    /// remove it, as long as everything else that a VMM's end takes (two or three RCU grace periods).
    _namespace: Option<File>,
    next_connect: Cell<u64>,
    /// Streams that were asked for and not answered.
    connecting: RefCell<HashSet<u64>>,
    /// Who waits for a network slot.
    attaching: RefCell<HashMap<u8, Answer>>,
    /// Who waits for memory, and how much. Answers come in the order of questions.
    resizing: RefCell<VecDeque<(u64, Answer)>>,
}

impl Vmm {
    /// Starts the process, in a cgroup if there is one for it; it then waits for [`Vmm::boot`].
    pub fn spawn(console: BorrowedFd, cgroup: Option<BorrowedFd>) -> Result<Self, Error> {
        let (client, theirs) = Client::pair().map_err(Error::Spawn)?;
        let console = console.try_clone_to_owned().map_err(Error::Spawn)?;
        let arguments = [c"stockade", c"vmm", c"--control-fd", c"0"];
        let child = spawn::spawn(&arguments, theirs, console, cgroup).map_err(Error::Spawn)?;
        let namespace = File::open(format!("/proc/{}/ns/net", child.id())).ok();
        Ok(Vmm {
            client,
            child: RefCell::new(child),
            _namespace: namespace,
            next_connect: Cell::new(1),
            connecting: RefCell::default(),
            attaching: RefCell::default(),
            resizing: RefCell::default(),
        })
    }

    /// Its process id, for as long as this lives.
    pub fn id(&self) -> i32 {
        self.child.borrow().id()
    }

    /// Its identity, for who cleans up later.
    pub fn process(&self) -> Result<ProcessId, Error> {
        ProcessId::of(self.id()).map_err(Error::Spawn)
    }

    /// Lets it build and boot the VM.
    pub fn boot(
        &self,
        boot: Boot,
        kernel: BorrowedFd,
        initrd: BorrowedFd,
        share: BorrowedFd,
        console: BorrowedFd,
    ) -> Result<(), Error> {
        self.client.boot(boot, kernel, initrd, share, console).map_err(|e| self.reason(e))
    }

    /// Opens a stream to a port of the guest. What is written to it waits until the guest listens. The result is
    /// a non-blocking unix socket; it is closed when the guest refuses.
    pub fn connect(&self, port: u32) -> Result<OwnedFd, Error> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)
            .map_err(|e| Error::Stream(e.into()))?;
        let id = self.next_connect.get();
        self.next_connect.set(id + 1);
        self.connecting.borrow_mut().insert(id);
        self.client.connect(id, port, theirs.as_fd()).map_err(|e| self.reason(e))?;
        Ok(ours)
    }

    /// Makes an interface of an empty network slot. Answered while [`Vmm::watch`] runs.
    pub async fn attach_network(&self, slot: u8, interface: Interface, tap: OwnedFd) -> Result<(), Error> {
        let (tell, told) = oneshot::channel();
        self.attaching.borrow_mut().insert(slot, tell);
        self.client.attach_network(slot, interface, tap.as_fd()).map_err(|e| self.reason(e))?;
        drop(tap);
        match told.await {
            Ok(result) => result.map_err(Error::Network),
            Err(_) => Err(Error::Network("it has ended".into())),
        }
    }

    /// Empties a network slot, which the guest has let go of.
    pub fn detach_network(&self, slot: u8) -> Result<(), Error> {
        self.client.detach_network(slot).map_err(|e| self.reason(e))
    }

    /// Sets the carrier of a network interface.
    pub fn set_link(&self, slot: u8, up: bool) -> Result<(), Error> {
        self.client.set_link(slot, up).map_err(|e| self.reason(e))
    }

    /// Has so many bytes of memory be in the VM besides what it began with. Answered while [`Vmm::watch`] runs.
    pub async fn set_memory(&self, added_bytes: u64) -> Result<(), Error> {
        let (tell, told) = oneshot::channel();
        self.resizing.borrow_mut().push_back((added_bytes, tell));
        self.client.set_memory(added_bytes).map_err(|e| self.reason(e))?;
        match told.await {
            Ok(result) => result.map_err(Error::Memory),
            Err(_) => Err(Error::Memory("it has ended".into())),
        }
    }

    /// Passes an answer on; whether it is one to what was asked, if it says what that was.
    fn resized(&self, added_bytes: Option<u64>, result: Result<(), String>) -> bool {
        match self.resizing.borrow_mut().pop_front() {
            Some((asked, waiting)) if added_bytes.is_none_or(|added| added == asked) => {
                // Who has asked may not wait any more.
                let _ = waiting.send(result);
                true
            }
            _ => false,
        }
    }

    /// Passes an answer on; whether somebody has asked.
    fn attached(&self, slot: u8, result: Result<(), String>) -> bool {
        let waiting = self.attaching.borrow_mut().remove(&slot);
        waiting.map(|waiting| waiting.send(result)).is_some()
    }

    /// A VMM that takes no more requests may have said why.
    fn reason(&self, error: control::Error) -> Error {
        if matches!(error, control::Error::Unread) {
            // Nor does it end by itself, and everybody would wait for it again.
            self.kill();
        }
        match self.last_words() {
            Some(Event::Failed { message }) => Error::Failed(printable(&message, REASON_MAX)),
            _ => Error::Control(error),
        }
    }

    /// What lies in the socket when the VMM is gone. The first read may only tell that requests were left unread
    /// (ECONNRESET), and hide events that came before.
    fn last_words(&self) -> Option<Event> {
        for _ in 0..MAX_LAST_WORDS {
            match self.client.try_recv() {
                Ok(Poll::Ready(Some(event @ (Event::Failed { .. } | Event::Stopped(_))))) => {
                    return Some(event);
                }
                Ok(_) => {}
                Err(_) => return None,
            }
        }
        None
    }

    /// Follows the VM to its end. A VMM is obeyed in nothing and believed little: what it says is made printable, and
    /// one that answers what it was not asked is ended, so that it cannot keep its supervisor busy.
    pub async fn watch(&self, timeline: &Timeline, started: &Cell<u64>) -> Ending {
        let socket = match register(self.client.as_fd(), Interest::READABLE) {
            Ok(socket) => socket,
            Err(e) => return Ending::Died(io::Error::from(e).to_string()),
        };
        loop {
            let Ok(mut ready) = socket.readable().await else { return self.died() };
            match self.client.try_recv() {
                Ok(Poll::Pending) => ready.clear_ready(),
                Ok(Poll::Ready(Some(event))) => {
                    let asked_for = match event {
                        Event::Started(times) => has_started(&times, timeline, started),
                        Event::Connected { id } => self.connecting.borrow_mut().remove(&id),
                        Event::Refused { id, reason } => {
                            let reason = printable(&reason, REASON_MAX);
                            tracing::warn!(id, reason, "the guest refused a stream");
                            self.connecting.borrow_mut().remove(&id)
                        }
                        Event::NetworkAttached { slot } => self.attached(slot, Ok(())),
                        Event::NetworkRefused { slot, reason } => {
                            self.attached(slot, Err(printable(&reason, REASON_MAX)))
                        }
                        Event::MemorySet { added_bytes } => self.resized(Some(added_bytes), Ok(())),
                        Event::MemoryRefused { reason } => {
                            self.resized(None, Err(printable(&reason, REASON_MAX)))
                        }
                        // Nobody here asks for that.
                        Event::Paused | Event::Resumed => false,
                        last @ (Event::Stopped(_) | Event::Failed { .. }) => return ending(last),
                    };
                    if !asked_for {
                        self.kill();
                        return Ending::Died(
                            "it was killed, because it answered what it was not asked".into(),
                        );
                    }
                }
                Ok(Poll::Ready(None)) => match self.last_words() {
                    Some(last) => return ending(last),
                    None => return self.died(),
                },
                Err(e) => {
                    self.kill();
                    let why = printable(&e.to_string(), REASON_MAX);
                    return Ending::Died(format!("it was killed, because: {why}"));
                }
            }
        }
    }

    fn died(&self) -> Ending {
        // It has closed its socket and is about to end; how, is worth waiting for.
        if let Some(handle) = self.process().ok().and_then(|process| process.open()) {
            handle.wait(DEATH_TIMEOUT);
        }
        self.kill();
        Ending::Died(match self.wait() {
            Ok(status) => describe(status),
            Err(e) => e.to_string(),
        })
    }

    /// Ends it at once; what the guest has not written back is lost.
    pub fn kill(&self) {
        self.child.borrow().kill();
    }

    /// Waits until the process is gone with all that it holds.
    pub fn wait(&self) -> io::Result<ExitStatus> {
        self.child.borrow_mut().wait()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
        let _ = self.wait();
    }
}

/// Notes that the VM has started; whether that is news. It is said once, and the clock has long been running.
fn has_started(times: &control::Timeline, timeline: &Timeline, started: &Cell<u64>) -> bool {
    if started.get() != 0 || times.first_run_ns == 0 {
        return false;
    }
    started.set(times.first_run_ns);
    timeline.mark_at("vmm_entered", times.entered_ns);
    timeline.mark_at("vm_created", times.vm_created_ns);
    timeline.mark_at("kernel_loaded", times.kernel_loaded_ns);
    timeline.mark_at("first_guest_instruction", times.first_run_ns);
    true
}

/// What the last event of a VMM says, made printable.
fn ending(last: Event) -> Ending {
    match last {
        Event::Failed { message } => Ending::Failed(printable(&message, REASON_MAX)),
        Event::Stopped(StopReason::Error(why)) => {
            Ending::Stopped(StopReason::Error(printable(&why, REASON_MAX)))
        }
        Event::Stopped(reason) => Ending::Stopped(reason),
        other => Ending::Died(format!("its last word was {}", printable(&format!("{other:?}"), REASON_MAX))),
    }
}

/// Its filters' answer (seccomp(2)); the kernel tells nobody else which call it was.
const FORBIDDEN_CALL: &str = "it was killed by SIGSYS: it made a system call that its jail forbids, which the host's \
                              kernel log names";

fn describe(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(libc::SIGSYS), _) => FORBIDDEN_CALL.into(),
        (Some(signal), _) => {
            let name = nix::sys::signal::Signal::try_from(signal).map_or("an unknown signal", |s| s.as_str());
            format!("it was killed by {name}")
        }
        (None, Some(code)) => format!("it exited with code {code}"),
        (None, None) => "it ended".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_starts_once_and_not_before_the_clock_does() {
        let (timeline, started) = (Timeline::begin(1), Cell::new(0));
        let at = |first_run_ns| control::Timeline { first_run_ns, ..Default::default() };
        assert!(!has_started(&at(0), &timeline, &started));
        assert!(has_started(&at(7), &timeline, &started));
        for again in [0, 7, 8] {
            assert!(!has_started(&at(again), &timeline, &started));
        }
        assert_eq!(started.get(), 7);
    }

    #[test]
    fn a_death_is_described_by_its_signal_or_code() {
        assert_eq!(describe(ExitStatus::from_raw(9)), "it was killed by SIGKILL");
        assert!(describe(ExitStatus::from_raw(31)).contains("a system call that its jail forbids"));
        assert_eq!(describe(ExitStatus::from_raw(3 << 8)), "it exited with code 3");
    }
}
