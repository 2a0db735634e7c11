//! Memory that a VM is given while it runs: a row of blocks in a window of guest addresses above all that it began
//! with.
//!
//! Always true: only the supervisor decides how many blocks there are; in the rest of the window there is nothing, for
//! the guest's processors and for devices alike, so that a guest gains no memory by naming addresses there. A block is
//! mapped when it is first added and never unmapped: a device that was told of it a moment before it was taken away
//! still finds memory, whose contents mean nothing any more. Nothing is mapped or set aside at a VM's start.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::{Address, GuestAddress, GuestMemory as _, GuestMemoryRegion, GuestRegionMmap};

use super::{Error, GAP_END, GAP_START, GuestMemory, map_region};

/// The smallest block that the guest's kernel takes: a section of its memory model (`SECTION_SIZE_BITS`,
/// `arch/x86/include/asm/sparsemem.h`).
const MIN_BLOCK: u64 = 128 << 20;
/// The largest, and the size of a machine from which on it uses more than the smallest (`probe_memory_block_size`,
/// `arch/x86/mm/init_64.c`).
const MAX_BLOCK: u64 = 2 << 30;
const LARGE_MACHINE: u64 = 64 << 30;

/// Blocks of which the mappings are kept together.
const ROW: u64 = 64;
/// Rows: with the smallest blocks the window is 1 TiB.
const ROWS: usize = 128;

/// The window of a VM that begins with so much memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its first address.
    pub start: u64,
    /// Size of a block in bytes: what the guest's kernel takes and gives at once. Addresses are multiples of it.
    pub block: u64,
}

impl Window {
    /// The window of a VM that began with `bytes` of memory.
    pub fn of(bytes: u64) -> Self {
        let end = if bytes <= GAP_START { bytes } else { GAP_END + (bytes - GAP_START) };
        let block = if end < LARGE_MACHINE {
            MIN_BLOCK
        } else {
            // The largest that the end of memory is a multiple of.
            (end & end.wrapping_neg()).clamp(MIN_BLOCK, MAX_BLOCK)
        };
        // Above 4 GiB, so that it is in one piece whatever lies below.
        Window { start: end.max(GAP_END).next_multiple_of(block), block }
    }

    /// The most that can be added, in bytes.
    pub fn size(self) -> u64 {
        ROWS as u64 * ROW * self.block
    }

    /// How many bytes of blocks hold `bytes`.
    pub fn blocks_for(self, bytes: u64) -> u64 {
        bytes.next_multiple_of(self.block)
    }
}

/// Tells KVM of a slot of guest memory.
pub type Tell<'a> = &'a dyn Fn(kvm_userspace_memory_region) -> io::Result<()>;

type Row = [OnceLock<GuestRegionMmap>; ROW as usize];

/// The blocks of a VM.
#[derive(Debug)]
pub struct Added {
    window: Window,
    /// Bytes that there are, from the start of the window.
    present: AtomicU64,
    /// Rows of mappings, made as they are needed.
    rows: [OnceLock<Box<Row>>; ROWS],
}

impl Added {
    /// None yet, in a VM that begins with `bytes`.
    pub(super) fn none(bytes: u64) -> Self {
        Self {
            window: Window::of(bytes),
            present: AtomicU64::new(0),
            rows: [const { OnceLock::new() }; ROWS],
        }
    }

    /// The block that holds an address, if it is there.
    pub(super) fn find(&self, address: GuestAddress) -> Option<&GuestRegionMmap> {
        let offset = address.raw_value().checked_sub(self.window.start)?;
        let there = offset < self.present.load(Ordering::Acquire);
        there.then(|| self.block(offset / self.window.block))?
    }

    /// All that are there.
    pub(super) fn iter(&self) -> impl Iterator<Item = &GuestRegionMmap> {
        let count = self.present.load(Ordering::Acquire) / self.window.block;
        (0..count).map_while(|index| self.block(index))
    }

    /// A block that has been mapped, present or not.
    fn block(&self, index: u64) -> Option<&GuestRegionMmap> {
        self.rows.get((index / ROW) as usize)?.get()?.get((index % ROW) as usize)?.get()
    }

    /// A block, mapped now if it has not been before.
    fn map(&self, index: u64) -> Result<&GuestRegionMmap, Error> {
        let full = || Error::Size { bytes: (index + 1) * self.window.block };
        let row = self.rows.get((index / ROW) as usize).ok_or_else(full)?;
        let row = row.get_or_init(|| Box::new([const { OnceLock::new() }; ROW as usize]));
        let place = row.get((index % ROW) as usize).ok_or_else(full)?;
        if let Some(block) = place.get() {
            return Ok(block);
        }
        let block = map_region(self.window.start + index * self.window.block, self.window.block)?;
        Ok(place.get_or_init(|| block))
    }
}

impl GuestMemory {
    /// Has as many blocks be there as `bytes` are, which is a multiple of their size. What is taken away is the host's
    /// again, so the guest must have let go of it. After an error as many are there as before.
    ///
    /// Not for two threads at once. What `tell` is told are mappings that live as long as the process.
    pub fn set_added(&self, bytes: u64, tell: Tell) -> Result<(), Error> {
        let Window { block, .. } = self.added.window;
        let most = self.added.window.size();
        if bytes > most || !bytes.is_multiple_of(block) {
            return Err(Error::Added { bytes, block, most });
        }
        let (before, wanted) = (self.added.present.load(Ordering::Acquire) / block, bytes / block);
        for index in before..wanted {
            if let Err(error) = self.add(index, tell) {
                self.remove(before..index, tell)?;
                return Err(error);
            }
        }
        self.remove(wanted..before, tell)
    }

    fn add(&self, index: u64, tell: Tell) -> Result<(), Error> {
        let block = self.added.map(index)?;
        tell(self.slot(index, block, block.len())).map_err(Error::Kvm)?;
        self.added.present.store((index + 1) * self.added.window.block, Ordering::Release);
        Ok(())
    }

    /// Takes these away, the last first.
    fn remove(&self, blocks: Range<u64>, tell: Tell) -> Result<(), Error> {
        for index in blocks.rev() {
            let Some(block) = self.added.block(index) else { continue };
            self.added.present.store(index * self.added.window.block, Ordering::Release);
            tell(self.slot(index, block, 0)).map_err(Error::Kvm)?;
            // SAFETY: a mapping of our own of this length, whose contents nobody counts on any more.
            unsafe { libc::madvise(block.as_ptr().cast(), block.len() as usize, libc::MADV_DONTNEED) };
        }
        Ok(())
    }

    /// What KVM calls a block; without a length it is gone.
    fn slot(&self, index: u64, block: &GuestRegionMmap, length: u64) -> kvm_userspace_memory_region {
        kvm_userspace_memory_region {
            slot: (self.began.num_regions() as u64 + index) as u32,
            flags: 0,
            guest_phys_addr: block.start_addr().raw_value(),
            memory_size: length,
            userspace_addr: block.as_ptr() as u64,
        }
    }
}

#[cfg(test)]
mod tests;
