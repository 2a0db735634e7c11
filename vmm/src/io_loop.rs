//! The I/O thread: one epoll loop that every worker of the VMM shares (device queues, vsock streams, the
//! control socket).
//!
//! What always holds: a worker's code runs on the loop's thread only, so workers need no locks; a worker
//! that was removed is dropped before [`IoHandle::remove`] returns, so nothing of it touches guest memory
//! afterwards; and no worker may block, because stdio of all containers waits behind it (slow disks belong
//! to a thread of their own, see `virtio::fs`).

use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::ThreadId;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use event_manager::EventSet;

/// Why the loop could not be set up or has ended.
#[derive(Debug, thiserror::Error)]
pub enum IoLoopError {
    /// Making the epoll or event descriptor failed.
    #[error("cannot set up the I/O loop: {0}; look at the limit of open files (ulimit -n)")]
    SetUp(String),
    /// Waiting for events failed.
    #[error("the I/O loop cannot wait for events: {0}")]
    Wait(String),
}

/// Something that waits for descriptors on the I/O thread.
pub trait Worker: Send {
    /// The descriptors to wait for from the start, with the events of interest.
    fn fds(&self) -> Vec<(RawFd, EventSet)>;

    /// `fd` has `events`. Must not block. Level-triggered unless it was added with
    /// [`EventSet::EDGE_TRIGGERED`].
    fn ready(&mut self, fd: RawFd, events: EventSet, ctl: &mut Control);
}

/// What a worker may ask of the loop while it handles an event.
pub struct Control<'a, 'b> {
    ops: &'a mut EventOps<'b>,
    stop: &'a AtomicBool,
}

impl Control<'_, '_> {
    /// Waits for `events` on `fd` too. Remove it before closing it.
    pub fn add(&mut self, fd: RawFd, events: EventSet) -> Result<(), event_manager::Error> {
        self.ops.add(Events::new_raw(fd, events))
    }

    /// Replaces the events of interest of `fd`.
    pub fn modify(&mut self, fd: RawFd, events: EventSet) -> Result<(), event_manager::Error> {
        self.ops.modify(Events::new_raw(fd, events))
    }

    /// Waits for `fd` no longer; events of it that are already collected are discarded.
    pub fn remove(&mut self, fd: RawFd) {
        if let Err(error) = self.ops.remove(Events::empty_raw(fd)) {
            tracing::debug!(fd, %error, "descriptor was not in the I/O loop");
        }
    }

    /// Ends [`IoLoop::run`] after the events at hand.
    pub fn stop_loop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Names a worker of the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WorkerId(u64);

enum Command {
    Add(WorkerId, Box<dyn Worker>),
    /// The sender is dropped when the worker is gone.
    Remove(WorkerId, Sender<()>),
}

/// A way into the loop from any thread.
#[derive(Clone)]
pub struct IoHandle {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    next_id: Arc<AtomicU64>,
    thread: Arc<std::sync::OnceLock<ThreadId>>,
}

impl IoHandle {
    /// Gives `worker` to the loop. It takes effect when the loop runs next.
    pub fn add(&self, worker: Box<dyn Worker>) -> WorkerId {
        let id = WorkerId(self.next_id.fetch_add(1, Ordering::Relaxed));
        self.send(Command::Add(id, worker));
        id
    }

    /// Takes a worker out of the loop and drops it. Returns when it is gone, at once if the loop has ended.
    /// Called on the loop's own thread it cannot wait: the worker is then dropped after the events at hand.
    pub fn remove(&self, id: WorkerId) {
        let (done, gone) = channel();
        self.send(Command::Remove(id, done));
        if self.thread.get() != Some(&std::thread::current().id()) {
            // Never sent to: it ends with the sender, which lives as long as the command.
            let _ = gone.recv();
        }
    }

    fn send(&self, command: Command) {
        // Fails when the loop has ended; the worker is then dropped with the command, as it should be.
        if self.commands.send(command).is_ok()
            && let Err(error) = self.wake.write(1)
        {
            tracing::error!(%error, "cannot wake the I/O loop");
        }
    }
}

/// The loop itself; [`IoLoop::run`] it on the thread that is to be the I/O thread.
pub struct IoLoop {
    manager: EventManager<Member>,
    commands: Receiver<Command>,
    members: HashMap<WorkerId, SubscriberId>,
    handle: IoHandle,
    stop: Arc<AtomicBool>,
}

impl IoLoop {
    /// Makes a loop with no workers.
    pub fn new() -> Result<Self, IoLoopError> {
        let mut manager =
            EventManager::new_with_capacity(64).map_err(|e| IoLoopError::SetUp(e.to_string()))?;
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| IoLoopError::SetUp(e.to_string()))?;
        let wake = Arc::new(wake);
        let (sender, commands) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        manager.add_subscriber(Member { worker: Box::new(Wake(wake.clone())), stop: stop.clone() });
        let handle = IoHandle {
            commands: sender,
            wake,
            next_id: Arc::new(AtomicU64::new(0)),
            thread: Arc::new(std::sync::OnceLock::new()),
        };
        Ok(Self { manager, commands, members: HashMap::new(), handle, stop })
    }

    /// A handle for other threads and for workers.
    pub fn handle(&self) -> IoHandle {
        self.handle.clone()
    }

    /// Runs until a worker calls [`Control::stop_loop`]. All workers are dropped then.
    pub fn run(mut self) -> Result<(), IoLoopError> {
        let _ = self.handle.thread.set(std::thread::current().id());
        self.obey();
        while !self.stop.load(Ordering::Relaxed) {
            self.manager.run().map_err(|e| IoLoopError::Wait(e.to_string()))?;
            self.obey();
        }
        Ok(())
    }

    fn obey(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Add(id, worker) => {
                    let member = Member { worker, stop: self.stop.clone() };
                    self.members.insert(id, self.manager.add_subscriber(member));
                }
                Command::Remove(id, done) => {
                    if let Some(member) = self.members.remove(&id) {
                        drop(self.manager.remove_subscriber(member));
                    }
                    drop(done);
                }
            }
        }
    }
}

struct Member {
    worker: Box<dyn Worker>,
    stop: Arc<AtomicBool>,
}

impl MutEventSubscriber for Member {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.worker.ready(events.fd(), events.event_set(), &mut Control { ops, stop: &self.stop });
    }

    fn init(&mut self, ops: &mut EventOps) {
        for (fd, events) in self.worker.fds() {
            if let Err(error) = ops.add(Events::new_raw(fd, events)) {
                tracing::error!(fd, %error, "cannot wait for a descriptor in the I/O loop");
            }
        }
    }
}

/// Ends the wait for events, so that commands are looked at.
struct Wake(Arc<EventFd>);

impl Worker for Wake {
    fn fds(&self) -> Vec<(RawFd, EventSet)> {
        // Edge-triggered, so that there is nothing to do: the wait has ended.
        vec![(self.0.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED)]
    }

    fn ready(&mut self, _fd: RawFd, _events: EventSet, _ctl: &mut Control) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    struct Echo {
        event: EventFd,
        seen: Sender<u64>,
        stop_at: u64,
        dropped: Sender<&'static str>,
    }

    impl Worker for Echo {
        fn fds(&self) -> Vec<(RawFd, EventSet)> {
            vec![(self.event.as_raw_fd(), EventSet::IN)]
        }

        fn ready(&mut self, _fd: RawFd, _events: EventSet, ctl: &mut Control) {
            let value = self.event.read().unwrap();
            self.seen.send(value).unwrap();
            if value == self.stop_at {
                ctl.stop_loop();
            }
        }
    }

    impl Drop for Echo {
        fn drop(&mut self) {
            let _ = self.dropped.send("dropped");
        }
    }

    fn echo() -> (Echo, EventFd, Receiver<u64>, Receiver<&'static str>) {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let (seen, seen_by) = channel();
        let (dropped, drops) = channel();
        (Echo { event: event.try_clone().unwrap(), seen, stop_at: 99, dropped }, event, seen_by, drops)
    }

    #[test]
    fn a_worker_added_from_another_thread_gets_its_events_and_can_stop_the_loop() {
        let io = IoLoop::new().unwrap();
        let handle = io.handle();
        let thread = std::thread::spawn(move || io.run());
        let (worker, event, seen, drops) = echo();
        handle.add(Box::new(worker));
        event.write(7).unwrap();
        assert_eq!(seen.recv_timeout(Duration::from_secs(5)), Ok(7));
        event.write(99).unwrap();
        thread.join().unwrap().unwrap();
        assert_eq!(drops.try_recv(), Ok("dropped"));
    }

    #[test]
    fn a_removed_worker_is_dropped_before_remove_returns() {
        let io = IoLoop::new().unwrap();
        let handle = io.handle();
        std::thread::spawn(move || io.run());
        let (worker, event, _seen, drops) = echo();
        let id = handle.add(Box::new(worker));
        handle.remove(id);
        assert_eq!(drops.try_recv(), Ok("dropped"));
        event.write(1).unwrap();
    }

    #[test]
    fn removing_from_a_loop_that_has_ended_does_not_hang() {
        let io = IoLoop::new().unwrap();
        let handle = io.handle();
        let (worker, _event, _seen, drops) = echo();
        let id = handle.add(Box::new(worker));
        drop(io);
        handle.remove(id);
        assert_eq!(drops.try_recv(), Ok("dropped"));
    }
}
