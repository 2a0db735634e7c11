//! The I/O APIC: turns the devices' interrupt lines into messages for the local APICs.
//!
//! KVM could emulate it, but only together with two 8259s, and a Linux that finds those spends 1,000 VM exits on
//! looking through all pins for theirs. With the local APICs in KVM and this one here ("split irqchip"), it
//! writes to the pins in use and to no other, and an interrupt is one ioctl that KVM delivers at once, without a
//! detour through a work queue.
//!
//! Lines are edges, whatever the guest programs. An edge on a masked pin is kept and delivered when the pin is
//! unmasked. Register layout: Intel 82093AA data sheet, section 3.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_msi;

use crate::slots::IRQS;

/// Guest-physical address of the registers, the one that every PC has.
pub const ADDRESS: u64 = 0xfec0_0000;

/// Bytes of register space.
pub const SIZE: u64 = 0x1000;

/// What the version register says: an 82093AA without an EOI register.
const VERSION: u32 = 0x11;

/// Number of pins: up to that of the last slot.
const PINS: usize = *IRQS.end() as usize + 1;

/// Offsets of the two registers through which all others are reached.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

/// Registers behind them.
const ID: u8 = 0;
const VERSION_AND_PINS: u8 = 1;
const ARBITRATION: u8 = 2;
const FIRST_ENTRY: u8 = 0x10;

/// Bits of a redirection entry.
const MASKED: u64 = 1 << 16;
/// Those that the guest may write: destination, mask, trigger mode, polarity, destination mode, delivery mode,
/// vector; not delivery status and remote IRR.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// Sends a message to the local APICs.
pub type Deliver = Box<dyn Fn(kvm_msi) + Send + Sync>;

/// See the module.
pub struct IoApic {
    registers: Mutex<Registers>,
    deliver: Deliver,
}

struct Registers {
    select: u8,
    id: u32,
    entries: [u64; PINS],
    /// Edges on masked pins, a bit each.
    pending: u32,
}

impl IoApic {
    /// An I/O APIC after power-on: all pins masked.
    pub fn new(deliver: Deliver) -> Self {
        let registers = Registers { select: 0, id: 0, entries: [MASKED; PINS], pending: 0 };
        IoApic { registers: Mutex::new(registers), deliver }
    }

    /// A device's end of the line that arrives at `pin`; calling it is an edge.
    pub fn line(self: &Arc<Self>, pin: u8) -> impl Fn() + Send + Sync + 'static {
        let this = Arc::clone(self);
        move || this.raise(pin)
    }

    fn raise(&self, pin: u8) {
        let mut registers = self.lock();
        let Some(entry) = registers.entries.get(usize::from(pin)).copied() else { return };
        if entry & MASKED == 0 {
            (self.deliver)(message(entry));
        } else {
            registers.pending |= 1 << pin;
        }
    }

    /// A load at an offset in the registers.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.lock();
        let value = match offset {
            SELECT => registers.select.into(),
            WINDOW => registers.read(),
            _ => 0,
        };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    }

    /// A store at an offset in the registers.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        value.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let mut registers = self.lock();
        match offset {
            SELECT => registers.select = value[0],
            WINDOW => {
                if let Some(entry) = registers.write(u32::from_le_bytes(value)) {
                    (self.deliver)(message(entry));
                }
            }
            _ => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    /// The redirection entry that is selected, and whether it is its upper half.
    fn selected(&self) -> Option<(usize, bool)> {
        let index = self.select.checked_sub(FIRST_ENTRY)?;
        let pin = usize::from(index / 2);
        (pin < PINS).then_some((pin, index % 2 == 1))
    }

    fn read(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => self.id,
            VERSION_AND_PINS => VERSION | (PINS as u32 - 1) << 16,
            _ => match self.selected() {
                Some((pin, true)) => (self.entries[pin] >> 32) as u32,
                Some((pin, false)) => self.entries[pin] as u32,
                None => 0,
            },
        }
    }

    /// Returns the entry whose kept edge is to be delivered now.
    fn write(&mut self, value: u32) -> Option<u64> {
        if self.select == ID {
            self.id = value & 0x0f00_0000;
        }
        let (pin, upper) = self.selected()?;
        let shift = if upper { 32 } else { 0 };
        let written = 0xffff_ffff << shift & WRITABLE;
        let entry = self.entries[pin] & !written | u64::from(value) << shift & written;
        self.entries[pin] = entry;
        let bit = 1 << pin;
        let due = self.pending & bit != 0 && entry & MASKED == 0;
        if due {
            self.pending &= !bit;
        }
        due.then_some(entry)
    }
}

/// The message that an entry asks for (Intel SDM, volume 3, "Message Signalled Interrupts").
fn message(entry: u64) -> kvm_msi {
    let (vector, delivery_mode) = (entry as u32 & 0xff, entry as u32 >> 8 & 7);
    let (logical, destination) = (entry as u32 >> 11 & 1, (entry >> 56) as u32);
    // The redirection hint goes with lowest-priority delivery.
    let hint = u32::from(delivery_mode == 1);
    kvm_msi {
        address_lo: 0xfee0_0000 | destination << 12 | hint << 3 | logical << 2,
        data: delivery_mode << 8 | vector,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    fn io_apic() -> (Arc<IoApic>, Receiver<(u32, u32)>) {
        let (sender, messages) = channel();
        let deliver = move |msi: kvm_msi| sender.send((msi.address_lo, msi.data)).unwrap();
        (Arc::new(IoApic::new(Box::new(deliver))), messages)
    }

    fn write(io_apic: &IoApic, register: u8, value: u32) {
        io_apic.write(SELECT, &u32::from(register).to_le_bytes());
        io_apic.write(WINDOW, &value.to_le_bytes());
    }

    fn read(io_apic: &IoApic, register: u8) -> u32 {
        io_apic.write(SELECT, &u32::from(register).to_le_bytes());
        let mut data = [0; 4];
        io_apic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    const PIN: u8 = *IRQS.start();
    const LOW: u8 = FIRST_ENTRY + 2 * PIN;

    #[test]
    fn an_edge_becomes_the_message_that_the_entry_asks_for() {
        let (io_apic, messages) = io_apic();
        let line = io_apic.line(PIN);
        write(&io_apic, LOW + 1, 3 << 24);
        write(&io_apic, LOW, 0x0931); // lowest priority, logical, vector 0x31
        line();
        assert_eq!(messages.try_recv(), Ok((0xfee0_300c, 0x0131)));
        write(&io_apic, LOW, 0x0042);
        line();
        assert_eq!(messages.try_recv(), Ok((0xfee0_3000, 0x0042)));
        assert!(messages.try_recv().is_err());
    }

    #[test]
    fn an_edge_on_a_masked_pin_is_delivered_once_when_it_is_unmasked() {
        let (io_apic, messages) = io_apic();
        let line = io_apic.line(PIN);
        line();
        line();
        write(&io_apic, LOW, MASKED as u32 | 0x55);
        assert!(messages.try_recv().is_err());
        write(&io_apic, LOW, 0x55);
        assert_eq!(messages.try_recv(), Ok((0xfee0_0000, 0x55)));
        write(&io_apic, LOW, 0x55);
        assert!(messages.try_recv().is_err());
    }

    #[test]
    fn every_slot_has_a_pin_and_the_version_register_counts_them() {
        let (io_apic, messages) = io_apic();
        let last = read(&io_apic, VERSION_AND_PINS) >> 16 & 0xff;
        assert_eq!(last, u32::from(*IRQS.end()));
        for pin in IRQS {
            write(&io_apic, FIRST_ENTRY + 2 * pin, u32::from(pin) + 0x20);
            io_apic.line(pin)();
            assert_eq!(messages.try_recv(), Ok((0xfee0_0000, u32::from(pin) + 0x20)));
        }
    }

    #[test]
    fn read_only_bits_stay_zero_and_the_rest_reads_back() {
        let (io_apic, _messages) = io_apic();
        assert_eq!(read(&io_apic, LOW), MASKED as u32);
        write(&io_apic, LOW, u32::MAX);
        write(&io_apic, LOW + 1, u32::MAX);
        assert_eq!(read(&io_apic, LOW), 0x0001_afff);
        assert_eq!(read(&io_apic, LOW + 1), 0xff00_0000);
        write(&io_apic, ID, u32::MAX);
        assert_eq!(read(&io_apic, ID), 0x0f00_0000);
    }

    #[test]
    fn accesses_of_any_size_to_any_place_do_no_harm() {
        let (io_apic, _messages) = io_apic();
        for select in 0..=255u8 {
            for offset in [0, 1, 4, 0x10, 0x14, 0x40, 0xfff, u64::MAX] {
                for size in [0, 1, 2, 4, 8, 16] {
                    io_apic.write(SELECT, &[select]);
                    io_apic.write(offset, &vec![0xff; size]);
                    io_apic.read(offset, &mut vec![0; size]);
                }
            }
        }
        io_apic.line(200)();
    }
}
