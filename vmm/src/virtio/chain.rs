//! Descriptor chains, checked: the only way to touch guest buffers.
//!
//! A [`Chain`] is made from one entry of the available ring. Making it walks all descriptors once and fails
//! on anything that virtio 1.3, section 2.7.5 forbids: a loop or more descriptors than the queue has slots,
//! an address outside of guest memory, a device-readable descriptor behind a device-writable one, a bad
//! indirect table, more bytes than [`MAX_CHAIN_BYTES`]. Zero-length descriptors are tolerated
//! (CVE-2023-5158), and buffers may overlap each other and the rings: all access is volatile, through raw
//! pointers that stay inside guest memory, so a guest that does that garbles its own data only. Nothing here
//! allocates by a length that the guest names.

use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use vm_memory::{ByteValued, GuestMemory as _, VolatileSlice};

use crate::memory::GuestMemory;

/// Longest chain in bytes. Linux sends 1 MiB and a page at most (FUSE); the cap bounds how long one chain
/// can keep a worker, and lets lengths be `u32` as the used ring wants them.
pub const MAX_CHAIN_BYTES: usize = 16 << 20;

/// Most pieces handed to the kernel in one readv or writev (UIO_MAXIOV).
pub const MAX_IOVECS: usize = 1024;

/// What a driver did wrong in a chain.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChainError {
    /// The walk ended before the last descriptor.
    #[error("descriptor chain loops, leaves its table or has a bad indirect table")]
    Broken,
    /// More descriptors than the queue has slots.
    #[error("descriptor chain has more descriptors than the queue")]
    TooManyDescriptors,
    /// A buffer is not in guest memory.
    #[error("descriptor points outside of guest memory: {0:#x}")]
    OutOfRange(u64),
    /// Readable after writable.
    #[error("device-readable descriptor behind a device-writable one")]
    Order,
    /// Shorter than the device's header.
    #[error("descriptor chain is too short for the header that begins it")]
    TooShort,
    /// Longer than [`MAX_CHAIN_BYTES`].
    #[error("descriptor chain is longer than {MAX_CHAIN_BYTES} bytes")]
    TooLong,
}

/// One request of the driver: buffers to read from, then buffers to write to.
#[derive(Debug)]
pub struct Chain<'m> {
    head: u16,
    descriptors: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers<'m>,
    /// Where the device may answer.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Walks and checks a chain of a queue with `queue_size` slots.
    pub fn check(
        memory: &'m GuestMemory,
        chain: DescriptorChain<&'m GuestMemory>,
        queue_size: u16,
    ) -> Result<Self, ChainError> {
        let mut checked = Self {
            head: chain.head_index(),
            descriptors: 0,
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        let mut last = false;
        let mut bytes = 0;
        for descriptor in chain {
            checked.descriptors += 1;
            if checked.descriptors > queue_size {
                return Err(ChainError::TooManyDescriptors);
            }
            last = !descriptor.has_next();
            let len = descriptor.len() as usize;
            bytes += len;
            if bytes > MAX_CHAIN_BYTES {
                return Err(ChainError::TooLong);
            }
            let buffers = if descriptor.is_write_only() {
                &mut checked.writable
            } else if checked.writable.started {
                return Err(ChainError::Order);
            } else {
                &mut checked.readable
            };
            buffers.started = true;
            if len == 0 {
                continue;
            }
            for slice in memory.get_slices(descriptor.addr(), len) {
                buffers.push(slice.map_err(|_| ChainError::OutOfRange(descriptor.addr().0))?);
            }
        }
        // The crate's iterator ends silently on every error: then the last descriptor names a next one, or
        // there was none at all.
        if last { Ok(checked) } else { Err(ChainError::Broken) }
    }

    /// The index that goes into the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// How many descriptors it has.
    pub fn descriptors(&self) -> u16 {
        self.descriptors
    }
}

/// A run of guest buffers with a position.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: std::collections::VecDeque<VolatileSlice<'m>>,
    remaining: usize,
    consumed: usize,
    started: bool,
}

impl<'m> Buffers<'m> {
    fn push(&mut self, slice: VolatileSlice<'m>) {
        self.remaining += slice.len();
        self.slices.push_back(slice);
    }

    /// Bytes from the position to the end.
    pub fn remaining(&self) -> usize {
        self.remaining
    }

    /// Bytes before the position.
    pub fn consumed(&self) -> usize {
        self.consumed
    }

    /// Splits off the first `n` bytes; `None` if there are fewer. The position of `self` moves behind them.
    pub fn split_front(&mut self, n: usize) -> Option<Buffers<'m>> {
        if n > self.remaining {
            return None;
        }
        let mut front = Buffers { started: true, ..Buffers::default() };
        while front.remaining < n {
            let slice = self.slices.pop_front()?;
            let want = n - front.remaining;
            if slice.len() > want {
                let (head, tail) = slice.split_at(want).ok()?;
                self.slices.push_front(tail);
                front.push(head);
            } else {
                front.push(slice);
            }
        }
        self.remaining -= n;
        self.consumed += n;
        Some(front)
    }

    /// Copies out of guest memory into `out` and moves the position; returns how much there was.
    pub fn read(&mut self, out: &mut [u8]) -> usize {
        let mut done = 0;
        self.advance_with(out.len(), |slice| {
            let n = slice.copy_to(&mut out[done..done + slice.len()]);
            done += n;
        });
        done
    }

    /// Reads a structure; `None` if fewer bytes are left than it has.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Option<T> {
        let mut object = T::default();
        if self.remaining < size_of::<T>() {
            return None;
        }
        self.read(object.as_mut_slice());
        Some(object)
    }

    /// Copies `data` into guest memory and moves the position; returns how much fitted.
    pub fn write(&mut self, data: &[u8]) -> usize {
        let mut done = 0;
        self.advance_with(data.len(), |slice| {
            slice.copy_from(&data[done..done + slice.len()]);
            done += slice.len();
        });
        done
    }

    /// Fills up to `max` bytes with what `fill` puts at a pointer and length; stops early when it puts less.
    ///
    /// `fill` returns the number of bytes it wrote, at most the length.
    pub fn fill_with(
        &mut self,
        max: usize,
        mut fill: impl FnMut(*mut u8, usize) -> std::io::Result<usize>,
    ) -> std::io::Result<usize> {
        let mut done = 0;
        while done < max {
            let Some(slice) = self.slices.front() else { break };
            let want = slice.len().min(max - done);
            let guard = slice.ptr_guard_mut();
            let n = fill(guard.as_ptr(), want)?.min(want);
            done += n;
            self.skip(n);
            if n < want {
                break;
            }
        }
        Ok(done)
    }

    /// Receives up to `max` bytes from a socket straight into guest memory, without blocking.
    pub fn receive_from(&mut self, socket: BorrowedFd, max: usize) -> std::io::Result<usize> {
        let mut iovecs = self.iovecs(max);
        let mut message = message(&mut iovecs);
        // SAFETY: the iovecs point into guest memory, which stays mapped for as long as the slices in
        // `self` live; the kernel writes there as the guest itself may, and no Rust reference covers it.
        let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
        let n = usize::try_from(n).map_err(|_| std::io::Error::last_os_error())?;
        self.skip(n);
        Ok(n)
    }

    /// Sends up to `max` bytes to a socket straight from guest memory, without blocking.
    pub fn send_to(&mut self, socket: BorrowedFd, max: usize) -> std::io::Result<usize> {
        let mut iovecs = self.iovecs(max);
        let message = message(&mut iovecs);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: as in `receive_from`, and the kernel only reads.
        let n = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) };
        let n = usize::try_from(n).map_err(|_| std::io::Error::last_os_error())?;
        self.skip(n);
        Ok(n)
    }

    /// Appends what the kernel needs to reach the bytes from the position on, as far as `iovecs` may grow to `most`
    /// entries; returns how many bytes that is. They stay valid as long as the slices in `self` may live.
    pub fn push_iovecs(&self, iovecs: &mut Vec<libc::iovec>, most: usize) -> usize {
        let before = iovecs.len();
        let room = most.saturating_sub(before);
        iovecs.extend(self.slices.iter().take(room).map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        }));
        iovecs[before..].iter().map(|iovec| iovec.iov_len).sum()
    }

    fn iovecs(&self, max: usize) -> Vec<libc::iovec> {
        let mut left = max;
        let mut iovecs = Vec::with_capacity(self.slices.len().min(MAX_IOVECS));
        for slice in self.slices.iter().take(MAX_IOVECS) {
            if left == 0 {
                break;
            }
            let len = slice.len().min(left);
            iovecs.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: len });
            left -= len;
        }
        iovecs
    }

    /// Moves the position by up to `n` bytes.
    fn skip(&mut self, n: usize) {
        self.advance_with(n, |_| ());
    }

    fn advance_with(&mut self, n: usize, mut each: impl FnMut(VolatileSlice<'m>)) {
        let n = n.min(self.remaining);
        let mut left = n;
        while left > 0 {
            let Some(slice) = self.slices.pop_front() else { break };
            // The split is within the slice, so it cannot fail.
            let take = slice.len().min(left);
            let Ok((head, tail)) = slice.split_at(take) else { break };
            each(head);
            if !tail.is_empty() {
                self.slices.push_front(tail);
            }
            left -= take;
        }
        self.remaining -= n;
        self.consumed += n;
    }
}

fn message(iovecs: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data, for which zero means "absent".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len() as _;
    message
}

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
