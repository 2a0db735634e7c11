//! Virtio devices (virtio 1.3) on the MMIO transport.
//!
//! One shape for every device: [`mmio::MmioTransport`] owns registers and negotiation; the [`Device`] in it
//! is an immutable description. When the driver sets DRIVER_OK, [`Device::activate`] *moves* the queues, the
//! memory and the interrupt into a running worker, so that changing a queue after activation cannot be
//! expressed. A reset drops the worker, which waits until nothing of it runs any more; the next activation
//! makes a fresh one. Guest buffers are reached through [`chain::Chain`] only.

pub mod chain;
pub mod fs;
pub mod interrupt;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
mod thread;
pub mod vsock;

#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod testing;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::io_loop::{IoHandle, WorkerId};
use crate::memory::GuestMemory;
use interrupt::Interrupt;
use queue::Virtqueue;

/// Feature bit 32: the device follows virtio 1.0 and later. We require it.
pub const F_VERSION_1: u64 = 1 << virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
/// Feature bit 29: `used_event` and `avail_event` say when to notify, which saves most kicks and interrupts.
pub const F_EVENT_IDX: u64 = 1 << virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
/// Feature bit 28: one ring slot can stand for a table of descriptors.
pub const F_INDIRECT_DESC: u64 = 1 << virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// Why a device could not start to work.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver set DRIVER_OK without having set up a queue that the device cannot do without.
    #[error("queue {0} was not set up by the driver")]
    QueueNotReady(usize),
    /// A ring lies outside of guest memory, or is not aligned, or has an impossible size.
    #[error("queue {0} is not usable: {1}")]
    BadQueue(usize, &'static str),
    /// The host side of the device failed.
    #[error("cannot {what}: {error}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        error: std::io::Error,
    },
}

/// What a device is, apart from what it does: the part that the transport asks.
pub trait Device: Send {
    /// The virtio device type (virtio 1.3, section 5).
    fn device_type(&self) -> u32;
    /// The feature bits offered.
    fn features(&self) -> u64;
    /// The largest size of each queue; a power of two. Its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// The configuration space.
    fn config(&self) -> &ConfigSpace;
    /// Starts a worker that owns everything in `activation`.
    fn activate(&self, activation: Activation) -> Result<Box<dyn Running>, ActivateError>;
}

/// An active device. Dropping it stops it: when `drop` returns, nothing of it touches guest memory, queues
/// or the interrupt any more, and I/O that was in flight has ended with its own buffers.
pub trait Running: Send {}

/// A running device all of which is one worker of the I/O loop.
struct OnIoThread {
    io: IoHandle,
    worker: WorkerId,
}

impl OnIoThread {
    fn new(io: IoHandle, worker: WorkerId) -> Self {
        Self { io, worker }
    }
}

impl Running for OnIoThread {}

impl Drop for OnIoThread {
    fn drop(&mut self) {
        self.io.remove(self.worker);
    }
}

/// Everything that a worker needs, given away by the transport at activation.
pub struct Activation {
    /// All queues of the device, in order, checked to lie in guest memory.
    pub queues: Vec<Virtqueue>,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The device's interrupt.
    pub interrupt: Arc<Interrupt>,
    /// The feature bits that driver and device agreed on.
    pub features: u64,
}

/// The device configuration space (virtio 1.3, section 2.5) and its generation.
pub struct ConfigSpace {
    inner: Mutex<(Vec<u8>, u32)>,
}

impl ConfigSpace {
    /// A configuration space that holds `bytes` (little-endian fields).
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { inner: Mutex::new((bytes, 0)) }
    }

    /// Fills `data` from `offset` on; what lies beyond the space reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let inner = self.lock();
        let Ok(offset) = usize::try_from(offset) else { return };
        if let Some(rest) = inner.0.get(offset..) {
            let n = rest.len().min(data.len());
            data[..n].copy_from_slice(&rest[..n]);
        }
    }

    /// Counts changes, so that a driver can tell that two reads belong together.
    pub fn generation(&self) -> u32 {
        self.lock().1
    }

    /// Changes the contents. The caller tells the driver with [`Interrupt::config_changed`].
    pub fn replace(&self, bytes: Vec<u8>) {
        let mut inner = self.lock();
        inner.0 = bytes;
        inner.1 = inner.1.wrapping_add(1);
    }

    fn lock(&self) -> MutexGuard<'_, (Vec<u8>, u32)> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
