//! From the tap to the guest: one read a frame, straight into guest memory.
//!
//! A frame goes over as many of the guest's buffers as it needs (section 5.1.6.4). How long the next one is nobody
//! knows before it is read, so a read is made when there are buffers for the longest; those it did not need are
//! kept for the next. With too few buffers the tap is left alone: its own queue fills, and then the host drops, as
//! a network card without buffers would.

use std::collections::VecDeque;
use std::io;

use super::Counters;
use super::header::{self, SIZE};
use super::tap::Tap;
use crate::memory::GuestMemory;
use crate::virtio::chain::{Buffers, Chain, ChainError, MAX_IOVECS};
use crate::virtio::queue::{RingError, Virtqueue};

/// What became of a turn.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// There may be more to do.
    Unfinished,
    /// The tap has no frame.
    Empty,
    /// The guest will kick when there are more buffers.
    Starved,
}

/// The receive queue.
pub struct Receive<'m> {
    pub queue: Virtqueue,
    pub memory: &'m GuestMemory,
    /// Whether a frame may go over several buffers.
    pub mergeable: bool,
    /// Bytes of the longest frame that can come, without its header.
    pub longest: usize,
    buffers: VecDeque<Chain<'m>>,
    /// Where the next frame's header goes: the front of the first of `buffers`.
    header: Option<Buffers<'m>>,
    /// Bytes in `buffers`.
    room: usize,
    iovecs: Vec<libc::iovec>,
    used: Vec<(u16, usize)>,
}

impl<'m> Receive<'m> {
    /// A queue that has not been looked at.
    pub fn new(queue: Virtqueue, memory: &'m GuestMemory, mergeable: bool, longest: usize) -> Self {
        Receive {
            queue,
            memory,
            mergeable,
            longest,
            buffers: VecDeque::new(),
            header: None,
            room: 0,
            iovecs: Vec::new(),
            used: Vec::new(),
        }
    }

    /// Receives a ring's worth of frames at most.
    pub fn turn(&mut self, tap: &Tap, counters: &Counters) -> Result<Turn, RingError> {
        let mut turn = Turn::Unfinished;
        for _ in 0..self.queue.size() {
            if !self.gather()? {
                turn = Turn::Starved;
                break;
            }
            if !self.receive(tap, counters)? {
                turn = Turn::Empty;
                break;
            }
        }
        self.queue.notify(self.memory)?;
        Ok(turn)
    }

    /// Takes buffers for the longest frame; false if there are too few now.
    fn gather(&mut self) -> Result<bool, RingError> {
        loop {
            // A guest that has given all that it can give gets frames as far as they fit.
            let all = self.buffers.len() >= self.queue.size().into();
            let enough = if self.mergeable { self.room >= self.longest } else { !self.buffers.is_empty() };
            if enough || all {
                return Ok(true);
            }
            let Some(mut chain) = self.queue.pop(self.memory)? else {
                if self.queue.enable_kicks(self.memory)? {
                    continue;
                }
                return Ok(false);
            };
            if self.buffers.is_empty() {
                self.header = Some(take_header(&mut chain)?);
            }
            self.room += chain.writable.remaining();
            self.buffers.push_back(chain);
        }
    }

    /// Receives one frame; false if there is none.
    fn receive(&mut self, tap: &Tap, counters: &Counters) -> Result<bool, RingError> {
        let mut header = [0; SIZE];
        self.iovecs.clear();
        self.iovecs.push(libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: SIZE });
        let mut room = 0;
        for chain in self.buffers.iter().take(if self.mergeable { usize::MAX } else { 1 }) {
            if room >= self.longest {
                break;
            }
            room += chain.writable.push_iovecs(&mut self.iovecs, MAX_IOVECS);
        }
        let read = loop {
            match tap.read(&mut self.iovecs) {
                Ok(n) => break n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => {
                    // The tap is gone with its namespace; nothing will come any more.
                    tracing::debug!("cannot read from the tap: {e}");
                    return Ok(false);
                }
            }
        };
        let length = read.saturating_sub(SIZE);
        // What fills all there is was probably longer.
        if length == 0 || (length == room && room < self.longest) {
            Counters::count(&counters.receive_dropped, "for the guest", &"it is longer than the buffers");
            return Ok(true);
        }
        self.deliver(header, length)?;
        Ok(true)
    }

    /// Gives the buffers that a frame needed back to the guest: all at once, because the driver takes the first for
    /// a sign that the others are there.
    fn deliver(&mut self, mut header: [u8; SIZE], length: usize) -> Result<(), RingError> {
        self.used.clear();
        let mut left = length;
        while left > 0 {
            let Some(chain) = self.buffers.pop_front() else { break };
            let here = chain.writable.remaining().min(left);
            left -= here;
            self.room -= chain.writable.remaining();
            let with_header = if self.used.is_empty() { SIZE } else { 0 };
            self.used.push((chain.head(), here + with_header));
        }
        header::set_buffers(&mut header, self.used.len() as u16);
        if let Some(mut place) = self.header.take() {
            place.write(&header);
        }
        if let Some(next) = self.buffers.front_mut() {
            let before = next.writable.remaining();
            self.header = Some(take_header(next)?);
            self.room -= before - next.writable.remaining();
        }
        self.queue.push_all(self.memory, &self.used)
    }
}

/// Section 5.1.6.3.1: the first buffer of a frame has room for the header at least.
fn take_header<'m>(chain: &mut Chain<'m>) -> Result<Buffers<'m>, RingError> {
    chain.writable.split_front(SIZE).ok_or(RingError::Chain(ChainError::TooShort))
}
