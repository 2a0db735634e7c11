//! The thread that serves FUSE requests.
//!
//! One thread, because requests of one container start come one after another; it sleeps in epoll on both
//! queue events and a stop event. Stopping waits for the request at hand, which owns its host buffers and
//! writes to guest memory; only then is the device gone.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::server::{MetricsHook, Server};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::share::Share;
use crate::memory::GuestMemory;
use crate::virtio::chain::Chain;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::{KICK, RingError, Virtqueue};
use crate::virtio::{ActivateError, Activation, Running};

/// Stands for the stop event where queues are told apart by their index.
const STOP: u64 = u64::MAX;

/// A running file system device. Dropping it ends the thread.
pub struct FsThread {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Running for FsThread {}

impl Drop for FsThread {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            tracing::error!(%error, "cannot stop the fs thread");
            return;
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Starts to serve `share` on the queues of `activation`.
pub fn start(share: Share, activation: Activation) -> Result<FsThread, ActivateError> {
    let host = |what| move |error| ActivateError::Host { what, error };
    let Activation { queues, memory, interrupt, .. } = activation;
    let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("make an event descriptor"))?;
    let epoll = Epoll::new().map_err(host("make an epoll descriptor"))?;
    let wait = |event: &EventFd, events, data| {
        epoll
            .ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(events, data))
            .map_err(host("wait for a queue event"))
    };
    wait(&stop, EventSet::IN, STOP)?;
    for (index, queue) in queues.iter().enumerate() {
        wait(queue.event(), KICK, index as u64)?;
    }
    let server = FsServer { server: Server::new(share), queues, memory, interrupt };
    let thread = std::thread::Builder::new()
        .name("fs".into())
        .spawn(move || server.run(epoll))
        .map_err(host("start the fs thread"))?;
    Ok(FsThread { stop, thread: Some(thread) })
}

struct FsServer {
    server: Server<Share>,
    queues: Vec<Virtqueue>,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
}

impl FsServer {
    fn run(mut self, epoll: Epoll) {
        super::share::keep_capabilities();
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
