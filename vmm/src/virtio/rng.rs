//! The entropy device (virtio 1.3, section 5.4): the host's random generator, straight into guest buffers.

use std::os::fd::{AsRawFd, RawFd};

use super::queue::{KICK, RingError, Virtqueue};
use super::{ActivateError, Activation, ConfigSpace, Device, F_EVENT_IDX, OnIoThread, Running};
use crate::io_loop::{Control, EventSet, IoHandle, Worker};
use crate::memory::GuestMemory;

const TYPE_ENTROPY: u32 = 4;

/// Slots of the one queue. Linux has one request at a time in flight.
const QUEUE_SIZES: [u16; 1] = [8];

/// Most random bytes for one request. Linux asks for 64 bytes; a bigger buffer is filled in part, which
/// section 5.4.6.1 allows, so that no guest can keep the I/O thread making random numbers.
const MAX_BYTES: usize = 4096;

/// An entropy device whose worker runs on the I/O thread.
pub fn new(io: IoHandle) -> Box<dyn Device> {
    Box::new(Rng { io, config: ConfigSpace::new(Vec::new()) })
}

struct Rng {
    io: IoHandle,
    config: ConfigSpace,
}

impl Device for Rng {
    fn device_type(&self) -> u32 {
        TYPE_ENTROPY
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&self, activation: Activation) -> Result<Box<dyn Running>, ActivateError> {
        let Activation { queues, memory, interrupt, .. } = activation;
        let queue = queues.into_iter().next().ok_or(ActivateError::QueueNotReady(0))?;
        let worker = self.io.add(Box::new(Source { queue, memory, interrupt }));
        Ok(Box::new(OnIoThread::new(self.io.clone(), worker)))
    }
}

struct Source {
    queue: Virtqueue,
    memory: GuestMemory,
    interrupt: std::sync::Arc<super::interrupt::Interrupt>,
}

impl Source {
    /// Serves a ring's worth of requests at most, then lets others have their turn.
    fn serve(&mut self) -> Result<(), RingError> {
        for _ in 0..self.queue.size() {
            let Some(mut chain) = self.queue.pop(&self.memory)? else {
                if self.queue.enable_kicks(&self.memory)? {
                    continue;
                }
                return self.queue.notify(&self.memory);
            };
            let n = chain.writable.fill_with(MAX_BYTES, random).unwrap_or_else(|error| {
                tracing::error!(%error, "cannot get random bytes from the host");
                0
            });
            self.queue.push(&self.memory, chain.head(), n)?;
        }
        self.queue.kick_self();
        self.queue.notify(&self.memory)
    }
}

fn random(buffer: *mut u8, len: usize) -> std::io::Result<usize> {
    loop {
        // SAFETY: `fill_with` passes a pointer to `len` bytes of mapped guest memory.
        let n = unsafe { libc::getrandom(buffer.cast(), len, 0) };
        match usize::try_from(n).map_err(|_| std::io::Error::last_os_error()) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => (),
            result => return result,
        }
    }
}

impl Worker for Source {
    fn fds(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.queue.event().as_raw_fd(), KICK)]
    }

    fn ready(&mut self, fd: RawFd, _events: EventSet, ctl: &mut Control) {
        if let Err(error) = self.serve() {
            tracing::warn!(%error, "rng device stops until the guest resets it");
            ctl.remove(fd);
            self.interrupt.needs_reset();
        }
    }
}

#[cfg(test)]
mod tests;
