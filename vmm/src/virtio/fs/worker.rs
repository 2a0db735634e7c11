//! What the thread that serves FUSE requests does.
//!
//! One thread, because requests of one container start come one after another; it sleeps in epoll on both
//! queue events and a stop event. It alone keeps the capabilities that serving files needs. A request at hand, which
//! owns its host buffers and writes to guest memory, is finished before it stops.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::server::{MetricsHook, Server};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::limits::Limits;
use super::share::Share;
use crate::jail::Kind;
use crate::memory::GuestMemory;
use crate::virtio::chain::Chain;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::{KICK, RingError, Virtqueue};
use crate::virtio::thread::DeviceThread;
use crate::virtio::{ActivateError, Activation};

/// Stands for the stop event where queues are told apart by their index.
const STOP: u64 = u64::MAX;

/// Starts the thread, which will serve the directory `root`.
pub fn start(root: String, limits: Limits) -> std::io::Result<DeviceThread<Activation>> {
    DeviceThread::start(Kind::Files, "fs".into(), move |activation, stop| {
        let (server, epoll) = FsServer::new(&root, limits, activation, stop)?;
        Ok(move || server.run(epoll))
    })
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
