//! A virtqueue in the hands of a worker: the ring, the event that says "look at it", and the interrupt.
//!
//! Wraps `virtio_queue::Queue`, which knows the split ring's layout and memory ordering, and adds checked
//! chains and an error for everything that makes the ring unusable. After an error the queue must not be
//! used any more; the worker reports it with [`Interrupt::needs_reset`].

use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
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
}

impl From<virtio_queue::Error> for RingError {
    fn from(error: virtio_queue::Error) -> Self {
        RingError::Ring(error)
    }
}

/// See the module.
pub struct Virtqueue {
    queue: Queue,
    event: EventFd,
    interrupt: Arc<Interrupt>,
}

impl Virtqueue {
    pub(super) fn new(queue: Queue, event: EventFd, interrupt: Arc<Interrupt>) -> Self {
        Self { queue, event, interrupt }
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
        Ok(self.queue.add_used(memory, head, u32::try_from(len).unwrap_or(u32::MAX))?)
    }

    /// Raises the interrupt if the driver wants one for the chains returned since the last call.
    pub fn notify(&mut self, memory: &GuestMemory) -> Result<(), RingError> {
        if self.wants_interrupt(memory)? {
            self.interrupt.used();
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for the chains returned since the last call.
    pub fn wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        Ok(self.queue.needs_notification(memory)?)
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
