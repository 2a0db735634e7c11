//! The Intel MultiProcessor table (specification 1.4): how a kernel without ACPI learns of processors and
//! interrupts.
//!
//! One floating pointer at address 0 and the configuration table right behind it: one processor entry for
//! each vCPU with APIC id = index, one ISA bus, one I/O APIC, the interrupt line of each device wired to the pin
//! of the same number, and the NMI. Lines without a device are left out, because Linux sets up each that is in.

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

use crate::io_apic;
use crate::memory::{GuestMemory, MP_TABLE};
use crate::slots::Slot;

/// Where every local APIC is.
const LOCAL_APIC_ADDRESS: u32 = 0xfee0_0000;

/// Integrated APIC; KVM's version register reads 0x14 (`APIC_VERSION` in `arch/x86/kvm/lapic.c`).
const APIC_VERSION: u8 = 0x14;

/// "1.4", as both structures say it.
const SPECIFICATION: u8 = 4;

const POINTER_LENGTH: usize = 16;
const HEADER_LENGTH: usize = 44;

const BUS_ISA: u8 = 0;

/// Interrupt type (MP specification, table 4-10).
const TYPE_INT: u8 = 0;
const TYPE_NMI: u8 = 1;

/// Writes the table for `vcpus` processors and a device in each of `slots` to guest memory.
pub fn write(memory: &GuestMemory, vcpus: u8, slots: &[Slot]) -> Result<(), GuestMemoryError> {
    let table = build(vcpus, slots);
    let pointer = floating_pointer(MP_TABLE.unchecked_add(POINTER_LENGTH as u64));
    memory.write_slice(&[&pointer[..], &table].concat(), MP_TABLE)
}

/// The floating pointer structure (section 4.1).
fn floating_pointer(table: GuestAddress) -> [u8; POINTER_LENGTH] {
    let mut bytes = [0u8; POINTER_LENGTH];
    bytes[..4].copy_from_slice(b"_MP_");
    bytes[4..8].copy_from_slice(&(table.raw_value() as u32).to_le_bytes());
    bytes[8] = 1; // length in units of 16 bytes
    bytes[9] = SPECIFICATION;
    bytes[10] = checksum(&bytes);
    bytes
}

/// The configuration table (sections 4.2 and 4.3).
fn build(vcpus: u8, slots: &[Slot]) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries: Vec<u8> = Vec::with_capacity(1024);
    let mut count = 0u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        // Enabled; the first one is the bootstrap processor. Signature and feature flags are left to CPUID.
        let flags = 1 | if id == 0 { 2 } else { 0 };
        add(&[&[0, id, APIC_VERSION, flags][..], &[0; 16]].concat());
    }
    add(&[&[1, BUS_ISA][..], b"ISA   "].concat());
    add(&[&[2, io_apic_id, APIC_VERSION, 1][..], &(io_apic::ADDRESS as u32).to_le_bytes()].concat());
    // Flags 0: polarity and trigger as usual for ISA, that is active high and edge.
    for irq in slots.iter().map(|slot| slot.irq()) {
        add(&[3, TYPE_INT, 0, 0, BUS_ISA, irq, io_apic_id, irq]);
    }
    add(&[4, TYPE_NMI, 0, 0, BUS_ISA, 0, 0xff, 1]); // LINT1 of all processors

    let mut table = vec![0u8; HEADER_LENGTH];
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&((HEADER_LENGTH + entries.len()) as u16).to_le_bytes());
    table[6] = SPECIFICATION;
    table[8..16].copy_from_slice(b"STOCKADE");
    table[16..28].copy_from_slice(b"MICROVM     ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&LOCAL_APIC_ADDRESS.to_le_bytes());
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    table
}

/// The byte that makes all bytes add up to 0 when it takes the place of a 0 among them.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{self, GDT};

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Entry lengths: processors have 20 bytes, all others 8 (table 4-3).
    fn entries(table: &[u8]) -> Vec<&[u8]> {
        let mut rest = &table[HEADER_LENGTH..];
        let mut entries = vec![];
        while let Some(kind) = rest.first() {
            let (entry, tail) = rest.split_at(if *kind == 0 { 20 } else { 8 });
            entries.push(entry);
            rest = tail;
        }
        entries
    }

    #[test]
    fn both_structures_add_up_to_zero_and_lie_where_linux_looks_first() {
        for vcpus in [1, 2, 31, 32] {
            let memory = memory::create(memory::MIN_BYTES).unwrap();
            write(&memory, vcpus, &Slot::ALL).unwrap();
            let mut bytes = [0u8; 0x1000];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            assert_eq!(&bytes[..4], b"_MP_");
            assert_eq!(sum(&bytes[..16]), 0);
            let table = &bytes[u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize..];
            assert_eq!(&table[..4], b"PCMP");
            let length = u16::from_le_bytes(table[4..6].try_into().unwrap()) as usize;
            assert_eq!(sum(&table[..length]), 0);
            assert!(16 + length < GDT.raw_value() as usize);
        }
    }

    #[test]
    fn every_vcpu_has_an_entry_and_one_is_the_bootstrap_processor() {
        let table = build(32, &Slot::ALL);
        let entries = entries(&table);
        assert_eq!(usize::from(u16::from_le_bytes([table[34], table[35]])), entries.len());
        let processors: Vec<_> = entries.iter().filter(|entry| entry[0] == 0).collect();
        assert_eq!(processors.iter().map(|entry| entry[1]).collect::<Vec<_>>(), (0..32).collect::<Vec<_>>());
        assert!(processors.iter().all(|entry| entry[3] & 1 == 1));
        assert_eq!(processors.iter().filter(|entry| entry[3] & 2 != 0).count(), 1);
        let io_apic = entries.iter().find(|entry| entry[0] == 2).unwrap();
        assert!(processors.iter().all(|processor| processor[1] != io_apic[1]));
    }

    #[test]
    fn every_device_has_an_interrupt_pin_and_empty_slots_have_none() {
        let table = build(1, &[Slot::VSOCK, Slot::NET[3]]);
        let interrupts: Vec<_> = entries(&table).into_iter().filter(|entry| entry[0] == 3).collect();
        let lines: Vec<_> = interrupts.iter().map(|entry| (entry[5], entry[7])).collect();
        assert_eq!(lines, [Slot::VSOCK, Slot::NET[3]].map(|slot| (slot.irq(), slot.irq())));
    }
}
