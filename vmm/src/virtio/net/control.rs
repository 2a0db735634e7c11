//! The control queue (section 5.1.6.5): the driver changes its mind about offloads. Everything else that could be
//! asked is not offered, because frames are not filtered here.

use virtio_bindings::bindings::virtio_net as abi;

use super::tap::Tap;
use crate::memory::GuestMemory;
use crate::virtio::chain::Chain;
use crate::virtio::queue::{RingError, Virtqueue};

/// Class and command of the one command that there is.
const SET_OFFLOADS: [u8; 2] =
    [abi::VIRTIO_NET_CTRL_GUEST_OFFLOADS as u8, abi::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET as u8];

/// The control queue.
pub struct ControlQueue<'m> {
    pub queue: Virtqueue,
    pub memory: &'m GuestMemory,
    pub features: u64,
}

impl ControlQueue<'_> {
    /// Obeys what lies there, a ring's worth at most; says whether larger frames may come, if that changed.
    pub fn obey(&mut self, tap: &Tap) -> Result<Option<bool>, RingError> {
        let mut large = None;
        for _ in 0..self.queue.size() {
            let Some(mut chain) = self.queue.pop(self.memory)? else {
                if self.queue.enable_kicks(self.memory)? {
                    continue;
                }
                return Ok(large);
            };
            let result = command(&mut chain, tap, self.features);
            large = result.or(large);
            let ack = if result.is_some() { abi::VIRTIO_NET_OK } else { abi::VIRTIO_NET_ERR };
            let written = chain.writable.write(&[ack as u8]);
            self.queue.push(self.memory, chain.head(), written)?;
            // The driver waits for each.
            self.queue.notify(self.memory)?;
        }
        self.queue.kick_self();
        Ok(large)
    }
}

fn command(chain: &mut Chain, tap: &Tap, features: u64) -> Option<bool> {
    let command: [u8; 2] = chain.readable.read_obj()?;
    let offloads: u64 = chain.readable.read_obj()?;
    if command != SET_OFFLOADS || offloads & !features != 0 {
        return None;
    }
    match tap.apply(offloads) {
        Ok(large) => Some(large),
        Err(error) => {
            tracing::warn!(%error, "the tap does not take the guest's offloads");
            None
        }
    }
}
