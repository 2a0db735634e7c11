//! From the guest to the tap: one write a frame, straight from guest memory.

use std::io;

use super::Counters;
use super::header::{self, Lie, SIZE};
use super::tap::Tap;
use crate::memory::GuestMemory;
use crate::virtio::chain::{Chain, MAX_IOVECS};
use crate::virtio::queue::{RingError, Virtqueue};

/// What became of a turn.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// There is more to do.
    Unfinished,
    /// The guest will kick when it has more.
    Empty,
    /// The tap takes no more for now.
    Full,
}

/// The transmit queue.
pub struct Transmit<'m> {
    pub queue: Virtqueue,
    pub memory: &'m GuestMemory,
    pub features: u64,
    pub iovecs: Vec<libc::iovec>,
}

enum Sent {
    Gone,
    Dropped,
    /// Not now.
    Later,
}

impl<'m> Transmit<'m> {
    /// Sends a ring's worth of frames at most.
    pub fn turn(&mut self, tap: &Tap, counters: &Counters) -> Result<Turn, RingError> {
        let mut turn = Turn::Unfinished;
        self.queue.disable_kicks(self.memory)?;
        for _ in 0..self.queue.size() {
            let Some(chain) = self.queue.pop(self.memory)? else {
                if self.queue.enable_kicks(self.memory)? {
                    continue;
                }
                turn = Turn::Empty;
                break;
            };
            let head = chain.head();
            if let Sent::Later = self.send(chain, tap, counters) {
                self.queue.undo_pop();
                turn = Turn::Full;
                break;
            }
            self.queue.push(self.memory, head, 0)?;
        }
        self.queue.notify(self.memory)?;
        Ok(turn)
    }

    fn send(&mut self, mut chain: Chain, tap: &Tap, counters: &Counters) -> Sent {
        let drop = |why: &dyn std::fmt::Display| {
            Counters::count(&counters.transmit_dropped, "of the guest", why);
            Sent::Dropped
        };
        let mut header = [0; SIZE];
        let got = chain.readable.read(&mut header);
        if got < SIZE {
            return drop(&Lie::Short(0));
        }
        let mut header = match header::check(header, chain.readable.remaining(), self.features) {
            Ok(header) => header,
            Err(lie) => return drop(&lie),
        };
        self.iovecs.clear();
        // The header is our copy: what was checked cannot change any more.
        self.iovecs.push(libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: SIZE });
        let length = chain.readable.remaining();
        if chain.readable.push_iovecs(&mut self.iovecs, MAX_IOVECS) < length {
            return drop(&"it is in too many pieces");
        }
        loop {
            match tap.write(&self.iovecs) {
                Ok(_) => return Sent::Gone,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Sent::Later,
                Err(e) => return drop(&e),
            }
        }
    }
}
