//! The fixed device slots.
//!
//! Every device a sandbox can have owns a slot from the start, with an address and an interrupt line that
//! never change: nothing is hot-plugged, and one booted VM fits every sandbox. Only slots with a device in them
//! are announced to the guest, on its command line (`Documentation/admin-guide/kernel-parameters.txt`,
//! `virtio_mmio.device`).

use std::ops::RangeInclusive;

use crate::memory::GAP_START;

/// Bytes of register space of each slot. Registers and configuration take less than a page.
pub const SIZE: u64 = 0x1000;

/// Register base of slot 0: the start of the 32-bit gap.
pub const BASE: u64 = GAP_START;

/// Number of slots.
pub const COUNT: usize = 12;

/// Interrupt line of slot 0: above those of the legacy timer, keyboard, cascade and serial lines.
const FIRST_IRQ: u8 = 5;

/// The interrupt lines of all slots.
pub const IRQS: RangeInclusive<u8> = FIRST_IRQ..=FIRST_IRQ + COUNT as u8 - 1;

/// One device's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(u8);

impl Slot {
    /// Streams between host and guest.
    pub const VSOCK: Slot = Slot(0);
    /// The share directory.
    pub const FS: Slot = Slot(1);
    /// Entropy.
    pub const RNG: Slot = Slot(2);
    /// Memory given back to the host.
    pub const BALLOON: Slot = Slot(3);
    /// Disks.
    pub const BLOCK: [Slot; 4] = [Slot(4), Slot(5), Slot(6), Slot(7)];
    /// Network interfaces.
    pub const NET: [Slot; 4] = [Slot(8), Slot(9), Slot(10), Slot(11)];

    /// All slots in order.
    pub const ALL: [Slot; COUNT] = {
        let mut all = [Slot(0); COUNT];
        let mut index = 0;
        while index < COUNT {
            all[index] = Slot(index as u8);
            index += 1;
        }
        all
    };

    /// 0 to `COUNT` - 1.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// Guest-physical address of the registers.
    pub fn base(self) -> u64 {
        BASE + u64::from(self.0) * SIZE
    }

    /// Interrupt line, I/O APIC pin and Linux' interrupt number: all the same.
    pub fn irq(self) -> u8 {
        FIRST_IRQ + self.0
    }

    /// The slot that holds a guest-physical address, and the offset in it.
    pub fn at(address: u64) -> Option<(Slot, u64)> {
        let offset = address.checked_sub(BASE)?;
        let slot = Self::ALL.get(usize::try_from(offset / SIZE).ok()?)?;
        Some((*slot, offset % SIZE))
    }

    /// What tells the kernel of the device.
    pub fn kernel_parameter(self) -> String {
        format!("virtio_mmio.device=4K@{:#x}:{}", self.base(), self.irq())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GAP_END;

    #[test]
    fn addresses_and_slots_translate_both_ways() {
        for slot in Slot::ALL {
            assert_eq!(Slot::at(slot.base()), Some((slot, 0)));
            assert_eq!(Slot::at(slot.base() + SIZE - 1), Some((slot, SIZE - 1)));
            assert!((BASE..GAP_END).contains(&slot.base()));
        }
        for outside in [0, BASE - 1, BASE + COUNT as u64 * SIZE, u64::MAX] {
            assert_eq!(Slot::at(outside), None);
        }
    }

    #[test]
    fn the_first_slot_is_announced_as_the_kernel_wants_it() {
        assert_eq!(Slot::VSOCK.kernel_parameter(), "virtio_mmio.device=4K@0xd0000000:5");
        assert_eq!(Slot::NET[3].kernel_parameter(), "virtio_mmio.device=4K@0xd000b000:16");
    }
}
