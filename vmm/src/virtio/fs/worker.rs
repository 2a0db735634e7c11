//! The thread that serves FUSE requests.
//!
//! One thread, because requests of one container start come one after another; it sleeps in epoll on both
//! queue events and a stop event. It is there before the VM runs, for it alone keeps the capabilities that serving
//! files needs, and a thread that a vCPU starts would have none; each activation of the device is a [`Job`] for it.
//! Stopping waits for the request at hand, which owns its host buffers and writes to guest memory; only then is
//! the device gone.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::server::{MetricsHook, Server};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::limits::Limits;
use super::share::Share;
use crate::memory::GuestMemory;
use crate::virtio::chain::Chain;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::{KICK, RingError, Virtqueue};
use crate::virtio::{ActivateError, Activation, Running};

/// Stands for the stop event where queues are told apart by their index.
const STOP: u64 = u64::MAX;

/// The thread, idle between activations. It ends with the last of these.
pub struct FsThread {
    jobs: Sender<Job>,
}

/// An activation of the device.
struct Job {
    activation: Activation,
    stop: EventFd,
    /// Told whether the activation has succeeded.
    begun: Sender<Result<(), ActivateError>>,
    /// Dropped when nothing of it is left.
    _gone: Sender<()>,
}

/// A running file system device. Dropping it waits until the thread is idle again.
struct Serving {
    stop: EventFd,
    gone: Receiver<()>,
}

impl Running for Serving {}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            tracing::error!(%error, "cannot stop the fs thread");
            return;
        }
        // Never sent to: it ends with the sender.
        let _ = self.gone.recv();
    }
}

impl FsThread {
    /// Starts the thread, which will serve the directory `root`.
    pub fn start(root: String, limits: Limits) -> std::io::Result<Self> {
        let (jobs, queue) = channel::<Job>();
        std::thread::Builder::new().name("fs".into()).spawn(move || {
            super::share::keep_capabilities();
            while let Ok(job) = queue.recv() {
                let Job { activation, stop, begun, _gone } = job;
                match FsServer::new(&root, limits, activation, &stop) {
                    Ok((server, epoll)) => {
                        // Fails when who has asked is gone; then the stop is on its way.
                        let _ = begun.send(Ok(()));
                        server.run(epoll);
                    }
                    Err(error) => drop(begun.send(Err(error))),
                }
            }
        })?;
        Ok(Self { jobs })
    }

    /// Has the thread serve the queues of `activation`.
    pub fn serve(&self, activation: Activation) -> Result<Box<dyn Running>, ActivateError> {
        let host = |what| move |error| ActivateError::Host { what, error };
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("make an event descriptor"))?;
        let (begun, answer) = channel();
        let (_gone, gone) = channel();
        let theirs = stop.try_clone().map_err(host("make an event descriptor"))?;
        let lost = || host("use the fs thread")(std::io::ErrorKind::BrokenPipe.into());
        self.jobs.send(Job { activation, stop: theirs, begun, _gone }).map_err(|_| lost())?;
        answer.recv().map_err(|_| lost())??;
        Ok(Box::new(Serving { stop, gone }))
    }
}

struct FsServer {
    server: Server<Share>,
    queues: Vec<Virtqueue>,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
}

impl FsServer {
    fn new(
        root: &str,
        limits: Limits,
        activation: Activation,
        stop: &EventFd,
    ) -> Result<(Self, Epoll), ActivateError> {
        let host = |what| move |error| ActivateError::Host { what, error };
        let share = Share::new(root.to_owned(), limits).map_err(host("open the share directory"))?;
        let Activation { queues, memory, interrupt, .. } = activation;
        let epoll = Epoll::new().map_err(host("make an epoll descriptor"))?;
        let wait = |event: &EventFd, events, data| {
            epoll
                .ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(events, data))
                .map_err(host("wait for a queue event"))
        };
        wait(stop, EventSet::IN, STOP)?;
        for (index, queue) in queues.iter().enumerate() {
            wait(queue.event(), KICK, index as u64)?;
        }
        Ok((FsServer { server: Server::new(share), queues, memory, interrupt }, epoll))
    }

    fn run(mut self, epoll: Epoll) {
        let mut ready = [EpollEvent::default(); 3];
        loop {
            let n = match epoll.wait(-1, &mut ready) {
                Ok(n) => n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "fs thread cannot wait for requests");
                    return self.interrupt.needs_reset();
                }
            };
            for event in ready.iter().take(n) {
                if event.data() == STOP {
                    return;
                }
                if let Err(error) = self.serve(event.data() as usize) {
                    tracing::warn!(%error, "fs device stops until the guest resets it");
                    return self.interrupt.needs_reset();
                }
            }
        }
    }

    /// Serves the requests of one queue: at most a ring's worth, so that a stop is seen.
    fn serve(&mut self, index: usize) -> Result<(), RingError> {
        let Some(queue) = self.queues.get_mut(index) else { return Ok(()) };
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop_unchecked(&self.memory)? else {
                if queue.enable_kicks(&self.memory)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            // Checked as every chain is. The crate below then walks the descriptors a second time, with
            // bounds checks of its own, so a guest that changes them in between gains nothing.
            Chain::check(&self.memory, chain.clone(), queue.size())?;
            let written = request(&self.server, &self.memory, chain);
            queue.push(&self.memory, head, written)?;
            // Every request has somebody waiting: no collecting of interrupts. With event index the driver
            // says how far it wants them.
            queue.notify(&self.memory)?;
        }
        queue.kick_self();
        Ok(())
    }
}

/// Tells the log of every request: what a workload costs in round trips.
struct Trace;

impl MetricsHook for Trace {
    fn collect(&self, header: &InHeader) {
        tracing::trace!(request = ?Opcode::from(header.opcode), node = header.nodeid, "FUSE");
    }

    fn release(&self, _header: Option<&OutHeader>) {}
}

/// Handles one request; returns the length of the reply. What cannot be parsed gets no reply.
fn request(
    server: &Server<Share>,
    memory: &GuestMemory,
    chain: virtio_queue::DescriptorChain<&GuestMemory>,
) -> usize {
    let reader = Reader::from_descriptor_chain(memory, chain.clone());
    let writer = VirtioFsWriter::new(memory, chain);
    match (reader, writer) {
        (Ok(reader), Ok(writer)) => server
            .handle_message(reader, Writer::VirtioFs(writer), None, Some(&Trace))
            .unwrap_or_else(|error| {
                tracing::debug!(%error, "malformed FUSE request");
                0
            }),
        _ => 0,
    }
}
