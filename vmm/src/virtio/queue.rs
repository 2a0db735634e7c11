//! A virtqueue in the hands of a worker: the ring, the event that says "look at it", and the interrupt.
//!
//! Wraps `virtio_queue::Queue`, which knows the available ring's layout and memory ordering, and adds checked
//! chains, chains that are returned together, and an error for everything that makes the ring unusable. After an
//! error the queue must not be used any more; the worker reports it with [`Interrupt::needs_reset`].

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, ChainError};
use super::interrupt::Interrupt;
use crate::memory::GuestMemory;

/// How a worker waits for [`Virtqueue::event`]. Edge-triggered: every kick is an event of its own, and the
/// counter in the descriptor needs not be read.
pub const KICK: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

/// Why a ring cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The ring itself is inconsistent, such as an available index that jumped.
    #[error("virtqueue is broken: {0}")]
    Ring(virtio_queue::Error),
    /// A chain in it is malformed.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// Ring memory cannot be accessed. It was checked at activation, and guest memory does not go away.
    #[error("virtqueue is not in guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

impl From<virtio_queue::Error> for RingError {
    fn from(error: virtio_queue::Error) -> Self {
        RingError::Ring(error)
    }
}

/// See the module.
pub struct Virtqueue {
    queue: Queue,
    /// How far the driver has been asked whether it wants an interrupt.
    asked: Wrapping<u16>,
    event: EventFd,
    interrupt: Arc<Interrupt>,
}

impl Virtqueue {
    pub(super) fn new(queue: Queue, event: EventFd, interrupt: Arc<Interrupt>) -> Self {
        Self { queue, asked: Wrapping(0), event, interrupt }
    }

    /// Written when the driver kicks the queue; to be waited for with [`KICK`].
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Number of slots.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next chain that the driver made available.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, RingError> {
        match self.pop_unchecked(memory)? {
            Some(chain) => Ok(Some(Chain::check(memory, chain, self.queue.size())?)),
            None => Ok(None),
        }
    }

    /// As [`Self::pop`], for a consumer that walks the chain itself with checks of its own.
    pub(super) fn pop_unchecked<'m>(
        &mut self,
        memory: &'m GuestMemory,
    ) -> Result<Option<virtio_queue::DescriptorChain<&'m GuestMemory>>, RingError> {
        Ok(self.queue.iter(memory)?.next())
    }

    /// Gives the last chain of [`Self::pop`] back, as if it had not been taken.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns the chain with this head to the driver, with `len` bytes written. Tell the driver with
    /// [`Self::notify`], once for as many chains as possible.
    pub fn push(&mut self, memory: &GuestMemory, head: u16, len: usize) -> Result<(), RingError> {
        self.push_all(memory, &[(head, len)])
    }

    /// Returns several chains, each with the bytes written to it, of which the driver sees all or none.
    pub fn push_all(&mut self, memory: &GuestMemory, chains: &[(u16, usize)]) -> Result<(), RingError> {
        // Section 2.7.8: flags, the index, and 8 bytes a slot.
        let ring = self.queue.used_ring();
        let mut next = Wrapping(self.queue.next_used());
        for (head, len) in chains {
            let element = u64::from(*head) | u64::from(u32::try_from(*len).unwrap_or(u32::MAX)) << 32;
            let slot = u64::from(next.0 % self.queue.size());
            memory.write_obj(element.to_le(), GuestAddress(ring + 4 + 8 * slot))?;
            next += 1;
        }
        self.queue.set_next_used(next.0);
        Ok(memory.store(next.0.to_le(), GuestAddress(ring + 2), Ordering::Release)?)
    }

    /// Raises the interrupt if the driver wants one for the chains returned since the last call.
    pub fn notify(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        if self.wants_interrupt(memory)? {
            self.interrupt.used();
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for the chains returned since the last call (section 2.7.10).
    pub fn wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        // What was pushed comes before what is read: the driver writes what it wants and then looks at the ring.
        fence(Ordering::SeqCst);
        let ring = self.queue.avail_ring();
        let load = |offset: u64| {
            let value: u16 = memory.load(GuestAddress(ring + offset), Ordering::Relaxed)?;
            Ok::<_, GuestMemoryError>(u16::from_le(value))
        };
        let (old, new) = (self.asked, Wrapping(self.queue.next_used()));
        self.asked = new;
        if old == new {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            // used_event comes after the flags, the index and 2 bytes a slot.
            let event = Wrapping(load(4 + 2 * u64::from(self.queue.size()))?);
            return Ok(new - event - Wrapping(1) < new - old);
        }
        Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks for a kick when the next chain becomes available. True if there is one already, for which no
    /// kick may come.
    pub fn enable_kicks(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        Ok(self.queue.enable_notification(memory)?)
    }

    /// Hints that no kicks are wanted until [`Self::enable_kicks`].
    pub fn disable_kicks(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        Ok(self.queue.disable_notification(memory)?)
    }

    /// Wakes the worker itself once more, to go on after it has let others have their turn.
    pub fn kick_self(&self) {
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "cannot write a queue event");
        }
    }
}
