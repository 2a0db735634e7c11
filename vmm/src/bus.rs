//! Where port and memory accesses of the guest go that KVM does not handle itself: the console, the I/O APIC and
//! the slots.
//!
//! Used by all vCPU threads at once; each device has a lock of its own. What nobody owns reads as all ones and
//! swallows writes, as a PC's bus does.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::io_apic::{self, IoApic};
use crate::serial::{self, Console};
use crate::slots::{self, Slot};
use crate::virtio::mmio::MmioTransport;

/// All devices that are reached by exits.
pub struct Bus {
    console: Mutex<Console>,
    io_apic: Arc<IoApic>,
    slots: [Option<Mutex<MmioTransport>>; slots::COUNT],
}

impl Bus {
    /// A bus with these devices on it.
    pub fn new(console: Console, io_apic: Arc<IoApic>, devices: Vec<(Slot, MmioTransport)>) -> Self {
        let mut slots = [const { None }; slots::COUNT];
        for (slot, transport) in devices {
            slots[slot.index()] = Some(Mutex::new(transport));
        }
        Bus { console: Mutex::new(console), io_apic, slots }
    }

    /// `in`: fills `data`.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        match console_register(port) {
            Some(register) => {
                let mut console = lock(&self.console);
                data.fill_with(|| console.read(register));
            }
            None => data.fill(0xff),
        }
    }

    /// `out`: takes `data`.
    pub fn write_port(&self, port: u16, data: &[u8]) {
        if let Some(register) = console_register(port) {
            let mut console = lock(&self.console);
            data.iter().for_each(|byte| console.write(register, *byte));
        }
    }

    /// A load from guest-physical address space outside of RAM.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        if let Some((transport, offset)) = self.slot_at(address) {
            lock(transport).read(offset, data);
        } else if let Some(offset) = io_apic_offset(address) {
            self.io_apic.read(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    /// A store to guest-physical address space outside of RAM.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.slot_at(address) {
            lock(transport).write(offset, data);
        } else if let Some(offset) = io_apic_offset(address) {
            self.io_apic.write(offset, data);
        }
    }

    /// Writes out what the console still holds.
    pub fn flush_console(&self) {
        lock(&self.console).flush();
    }

    fn slot_at(&self, address: u64) -> Option<(&Mutex<MmioTransport>, u64)> {
        let (slot, offset) = Slot::at(address)?;
        Some((self.slots[slot.index()].as_ref()?, offset))
    }
}

fn io_apic_offset(address: u64) -> Option<u64> {
    address.checked_sub(io_apic::ADDRESS).filter(|offset| *offset < io_apic::SIZE)
}

fn console_register(port: u16) -> Option<u8> {
    port.checked_sub(serial::PORT).filter(|register| *register < serial::PORTS).map(|register| register as u8)
}

/// A device whose thread panicked (the process aborts then, except in tests) is as it is.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn bus() -> (std::io::PipeReader, Bus) {
        let (reader, writer) = std::io::pipe().unwrap();
        let io_apic = Arc::new(IoApic::new(Box::new(|_| {})));
        (reader, Bus::new(Console::new(writer.into()).unwrap(), io_apic, vec![]))
    }

    #[test]
    fn what_nobody_owns_reads_as_ones_and_swallows_writes() {
        let (_reader, bus) = bus();
        for address in [0, slots::BASE - 1, slots::BASE, Slot::NET[3].base() + 0xfff, u64::MAX] {
            let mut data = [0; 8];
            bus.read_memory(address, &mut data);
            assert_eq!(data, [0xff; 8]);
            bus.write_memory(address, &data);
        }
        for port in [0, 0x64, 0x3f7, 0x400, 0xffff] {
            let mut data = [0; 4];
            bus.read_port(port, &mut data);
            assert_eq!(data, [0xff; 4]);
            bus.write_port(port, &data);
        }
    }

    #[test]
    fn a_string_of_bytes_to_the_console_port_arrives_whole() {
        let (mut reader, bus) = bus();
        bus.write_port(serial::PORT, b"abc");
        bus.flush_console();
        let mut text = [0; 3];
        reader.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"abc");
    }

    #[test]
    fn the_io_apic_answers_at_its_address() {
        let (_reader, bus) = bus();
        bus.write_memory(io_apic::ADDRESS, &[1, 0, 0, 0]);
        let mut version = [0; 4];
        bus.read_memory(io_apic::ADDRESS + 0x10, &mut version);
        assert_eq!(version[0], 0x11);
    }
}
