//! Guest memory and the guest-physical address map.
//!
//! RAM begins at address 0 and goes up to the 32-bit gap, in which the device registers and the interrupt
//! controllers lie; what does not fit below the gap continues at 4 GiB. Host addresses are congruent to guest
//! addresses modulo 2 MiB, so that KVM can map huge pages. The first 64 KiB hold what the VMM hands to the
//! kernel at boot; Linux reserves them and copies what it wants to keep. What is [`added`] later lies above all that.

mod added;

use std::io;
use std::sync::Arc;

use vm_memory::{
    Address, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    mmap::MmapRegionError,
};

use added::Added;
pub use added::Window;

/// All of the guest's RAM. Clones share it, and what is added to it.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    /// What the VM began with.
    began: GuestMemoryMmap,
    added: Arc<Added>,
}

impl vm_memory::GuestMemory for GuestMemory {
    type R = GuestRegionMmap;

    fn find_region(&self, address: GuestAddress) -> Option<&GuestRegionMmap> {
        self.began.find_region(address).or_else(|| self.added.find(address))
    }

    fn iter(&self) -> impl Iterator<Item = &GuestRegionMmap> {
        self.began.iter().chain(self.added.iter())
    }
}

/// Whether the host is asked for 2 MiB pages (`MADV_HUGEPAGE`) for guest RAM.
pub const HUGE_PAGES: bool = true;

/// Smallest guest memory in bytes: below it, kernel and initrd do not fit.
pub const MIN_BYTES: u64 = 64 << 20;

/// Largest guest memory in bytes. The host's own memory is the true limit; this one keeps the sum of addresses
/// far away from the 46 bits that every processor with KVM can address.
pub const MAX_BYTES: u64 = 16 << 40;

/// First address of the 32-bit gap.
pub const GAP_START: u64 = 0xd000_0000;

/// First address after the 32-bit gap.
pub const GAP_END: u64 = 1 << 32;

/// The Intel MP floating pointer and table: the first place where Linux looks
/// (`arch/x86/kernel/mpparse.c`, `mpparse_find_mptable`).
pub const MP_TABLE: GuestAddress = GuestAddress(0);

/// The descriptor table that the first vCPU starts with, after the first kilobyte, in which the MP table lies.
pub const GDT: GuestAddress = GuestAddress(0x1000);

/// `struct boot_params`, the "zero page".
pub const BOOT_PARAMS: GuestAddress = GuestAddress(0x2000);

/// Identity page tables: three pages.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x3000);

/// The kernel command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x6000);

/// Where the memory a BIOS would keep for itself begins; RAM goes on at [`HIGH_START`].
pub const LOW_END: u64 = 0x9_fc00;

/// 1 MiB: above it lies nothing but RAM.
pub const HIGH_START: u64 = 0x10_0000;

/// Page size in bytes.
pub const PAGE: u64 = 4096;

const HUGE_PAGE: usize = 2 << 20;

/// Errors of guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the size is out of range
    #[error(
        "a VM cannot have {bytes} bytes of memory: it must be a multiple of {PAGE} from {min} MiB to {max} GiB",
        min = MIN_BYTES >> 20,
        max = MAX_BYTES >> 30
    )]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// the host refuses the mapping
    #[error("the host has no room for {bytes} bytes of guest memory: {source}; lower the VM's memory size")]
    Map {
        /// Size of the mapping.
        bytes: u64,
        /// What mmap(2) says.
        source: io::Error,
    },
    /// no such number of blocks
    #[error(
        "a VM cannot be given {bytes} bytes of memory more: it must be a multiple of {block}, at most {most}"
    )]
    Added {
        /// What was asked for.
        bytes: u64,
        /// Size of a block.
        block: u64,
        /// What the window holds.
        most: u64,
    },
    /// KVM refuses
    #[error("KVM refuses to change guest memory: {0}; see the host's kernel log")]
    Kvm(#[source] io::Error),
    /// cannot wrap the mapping
    #[error("cannot set up guest memory: {0}")]
    Region(#[from] MmapRegionError),
    /// cannot join the regions
    #[error("cannot set up guest memory: {0}")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
}

/// Where `bytes` of RAM lie in the guest: start and length of one or two ranges.
pub fn ranges(bytes: u64) -> Result<Vec<(u64, u64)>, Error> {
    if !(MIN_BYTES..=MAX_BYTES).contains(&bytes) || !bytes.is_multiple_of(PAGE) {
        return Err(Error::Size { bytes });
    }
    Ok(if bytes <= GAP_START { vec![(0, bytes)] } else { vec![(0, GAP_START), (GAP_END, bytes - GAP_START)] })
}

/// Maps `bytes` of zeroed, private, unreserved host memory as guest RAM.
///
/// The mapping lives as long as the process: vCPUs and devices hold addresses in it, and no VMM process
/// outlives its VM.
pub fn create(bytes: u64) -> Result<GuestMemory, Error> {
    let regions = ranges(bytes)?.into_iter().map(|(start, length)| map_region(start, length));
    let began = GuestMemoryMmap::from_regions(regions.collect::<Result<Vec<_>, Error>>()?)?;
    Ok(GuestMemory { began, added: Arc::new(Added::none(bytes)) })
}

/// Maps what the guest has at `start`.
fn map_region(start: u64, length: u64) -> Result<GuestRegionMmap, Error> {
    let address = map(length)?;
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, MAP_FLAGS);
    // SAFETY: the mapping has just been made with this length, and it is never unmapped.
    let region = unsafe { MmapRegion::build_raw(address, length as usize, prot, flags) }?;
    GuestRegionMmap::new(region, GuestAddress(start)).ok_or(Error::Size { bytes: length })
}

#[cfg(any(test, feature = "fuzzing"))]
impl GuestMemory {
    /// A few pages at odd places, for tests that need no VM.
    pub fn of_pieces(pieces: &[(GuestAddress, usize)]) -> Self {
        #[allow(clippy::unwrap_used, reason = "a test may fail by panicking")]
        let began = GuestMemoryMmap::from_ranges(pieces).unwrap();
        GuestMemory { began, added: Arc::new(Added::none(0)) }
    }
}

/// First address after RAM below the gap.
pub fn low_end(memory: &GuestMemory) -> GuestAddress {
    memory.find_region(GuestAddress(0)).map_or(GuestAddress(0), |region| region.last_addr().unchecked_add(1))
}

const MAP_FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// An anonymous mapping that begins on a huge page boundary, which mmap(2) alone does not promise before
/// Linux 6.7: map too much and give the ends back.
fn map(length: u64) -> Result<*mut u8, Error> {
    let failed = |source| Error::Map { bytes: length, source };
    let length = length as usize;
    let total = length + HUGE_PAGE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let base = unsafe {
        libc::mmap(std::ptr::null_mut(), total, libc::PROT_READ | libc::PROT_WRITE, MAP_FLAGS, -1, 0)
    };
    if base == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error()));
    }
    let base = base.cast::<u8>();
    let head = base.align_offset(HUGE_PAGE);
    let tail = total - head - length;
    // SAFETY: head and tail are the parts of our own mapping before and after the aligned part, which is not
    // used yet; a failure leaves them mapped, which does no harm.
    unsafe {
        let start = base.add(head);
        if head > 0 {
            libc::munmap(base.cast(), head);
        }
        if tail > 0 {
            libc::munmap(start.add(length).cast(), tail);
        }
        if HUGE_PAGES {
            // Advice only: a host without huge pages says EINVAL, and small ones do as well.
            libc::madvise(start.cast(), length, libc::MADV_HUGEPAGE);
        }
        Ok(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_continues_above_the_gap() {
        const GIB: u64 = 1 << 30;
        assert_eq!(ranges(2 * GIB).unwrap(), [(0, 2 * GIB)]);
        assert_eq!(ranges(GAP_START).unwrap(), [(0, GAP_START)]);
        assert_eq!(ranges(5 * GIB).unwrap(), [(0, GAP_START), (4 * GIB, 5 * GIB - GAP_START)]);
        for bad in [0, MIN_BYTES - PAGE, MIN_BYTES + 1, MAX_BYTES + PAGE, u64::MAX] {
            assert!(matches!(ranges(bad), Err(Error::Size { .. })), "{bad}");
        }
    }

    #[test]
    fn both_sides_of_the_gap_are_writable_and_the_gap_is_not() {
        let memory = create(5 << 30).unwrap();
        memory.write_obj(1u64, GuestAddress(GAP_START - 8)).unwrap();
        memory.write_obj(2u64, GuestAddress(GAP_END)).unwrap();
        assert_eq!(low_end(&memory), GuestAddress(GAP_START));
        assert_eq!(memory.last_addr(), GuestAddress(GAP_END + (5 << 30) - GAP_START - 1));
        assert!(memory.write_obj(1u8, GuestAddress(GAP_START)).is_err());
        assert!(memory.write_obj(1u64, GuestAddress(GAP_START - 4)).is_err());
    }

    #[test]
    fn host_and_guest_addresses_agree_modulo_two_mebibytes() {
        let memory = create(MIN_BYTES).unwrap();
        let host = memory.get_host_address(GuestAddress(HUGE_PAGE as u64)).unwrap();
        assert_eq!(host.addr() % HUGE_PAGE, 0);
    }
}
