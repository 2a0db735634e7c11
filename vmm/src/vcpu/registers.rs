//! The state in which vCPUs begin.
//!
//! The first vCPU starts as the 64-bit Linux boot protocol wants it (`Documentation/arch/x86/boot.rst`): long
//! mode, flat segments, the first GiB mapped to itself, RSI = zero page, interrupts off. The others wait for the
//! start-up interrupt that Linux sends them, and KVM resets them then: they need nothing but MSRs. Local APICs stay
//! as KVM resets them: there is no 8259 whose interrupts LINT0 could take, and nothing that could raise an NMI.

use kvm_bindings::{Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

use crate::memory::{BOOT_PARAMS, GDT, GuestMemory, PAGE, PAGE_TABLES};

/// Selectors that the boot protocol fixes: `__BOOT_CS` and `__BOOT_DS`.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Null, null, 64-bit code, data, 64-bit task state segment (busy).
const GDT_ENTRIES: [u64; 6] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_ffff, 0];

const PRESENT_WRITABLE: u64 = 0x3;
/// A page directory entry that maps 2 MiB.
const LARGE: u64 = 0x80;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// Writes descriptor table and page tables.
pub fn write_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    memory.write_obj(GDT_ENTRIES, GDT)?;
    let directory_pointers = PAGE_TABLES.unchecked_add(PAGE);
    let directory = directory_pointers.unchecked_add(PAGE);
    memory.write_obj(directory_pointers.raw_value() | PRESENT_WRITABLE, PAGE_TABLES)?;
    memory.write_obj(directory.raw_value() | PRESENT_WRITABLE, directory_pointers)?;
    let entries: [u64; 512] = std::array::from_fn(|i| (i as u64) << 21 | LARGE | PRESENT_WRITABLE);
    memory.write_slice(entries.map(u64::to_le_bytes).as_flattened(), directory)
}

/// Puts the first vCPU at the kernel's entry point.
pub fn set_boot(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    boot_sregs(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: entry.raw_value(),
        rsi: BOOT_PARAMS.raw_value(),
        rflags: 2, // the bit that is always 1
        ..Default::default()
    })
}

/// What no reset value is right for. All other MSRs that a kernel may expect to be 0 are 0.
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
        entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    ];
    let Ok(msrs) = Msrs::from_entries(&entries) else { return Err(kvm_ioctls::Error::new(libc::E2BIG)) };
    let count = vcpu.set_msrs(&msrs)?;
    if count == entries.len() { Ok(()) } else { Err(kvm_ioctls::Error::new(libc::EINVAL)) }
}

/// Enables all extended state that the CPUID table offers, as Linux does with its first `XSETBV`.
///
/// Hardware would not need it, but QEMU's emulation of SVM (seen in 7.2) does not report `XSETBV` to KVM, which
/// then goes on restoring the reset value under the guest's feet: AVX dies at the next exit.
pub fn set_xcr0(vcpu: &VcpuFd, cpuid: &[kvm_cpuid_entry2]) -> Result<(), kvm_ioctls::Error> {
    let Some(leaf) = cpuid.iter().find(|entry| entry.function == 0xd && entry.index == 0) else {
        return Ok(());
    };
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
    vcpu.set_xcrs(&xcrs)
}

fn boot_sregs(sregs: &mut kvm_sregs) {
    let flat = kvm_segment { base: 0, limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
    let data = kvm_segment { selector: DATA, type_: 3, db: 1, ..flat };
    sregs.cs = kvm_segment { selector: CODE, type_: 0xb, l: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr =
        kvm_segment { selector: TASK, limit: 0xffff, type_: 0xb, present: 1, ..kvm_segment::default() };
    sregs.gdt.base = GDT.raw_value();
    sregs.gdt.limit = (size_of_val(&GDT_ENTRIES) - 1) as u16;
    // No descriptors: an exception before the kernel has its own table is a triple fault, which is reported.
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr3 = PAGE_TABLES.raw_value();
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    /// Walks the tables as the processor does.
    fn translate(memory: &GuestMemory, address: u64) -> Option<u64> {
        let mut table = PAGE_TABLES.raw_value();
        for level in [39, 30, 21] {
            let entry: u64 = memory.read_obj(GuestAddress(table + (address >> level & 511) * 8)).unwrap();
            if entry & 1 == 0 {
                return None;
            }
            table = entry & 0x000f_ffff_ffff_f000;
            if entry & LARGE != 0 {
                return Some(table + address % (1 << level));
            }
        }
        None
    }

    #[test]
    fn the_first_gibibyte_is_mapped_to_itself_and_nothing_else_is() {
        let memory = memory::create(memory::MIN_BYTES).unwrap();
        write_tables(&memory).unwrap();
        for address in [0, 0x1000, 0x100_0000, 0x1fff_ffff, 0x3fff_ffff] {
            assert_eq!(translate(&memory, address), Some(address));
        }
        for address in [0x4000_0000, 1 << 39, 0xffff_ffff] {
            assert_eq!(translate(&memory, address), None);
        }
    }

    #[test]
    fn the_tables_do_not_overlap_with_what_lies_beside_them() {
        let memory = memory::create(memory::MIN_BYTES).unwrap();
        write_tables(&memory).unwrap();
        let mut bytes = [0u8; 64];
        memory.read_slice(&mut bytes, BOOT_PARAMS).unwrap();
        assert_eq!(bytes, [0; 64]);
        memory.read_slice(&mut bytes, memory::CMDLINE).unwrap();
        assert_eq!(bytes, [0; 64]);
    }

    #[test]
    fn segment_registers_say_what_the_descriptor_table_says() {
        let mut sregs = kvm_sregs::default();
        boot_sregs(&mut sregs);
        for segment in [sregs.cs, sregs.ds, sregs.ss] {
            let entry = GDT_ENTRIES[usize::from(segment.selector) / 8];
            assert_eq!((entry >> 40 & 0xf) as u8, segment.type_);
            assert_eq!((entry >> 47 & 1) as u8, segment.present);
            assert_eq!((entry >> 53 & 1) as u8, segment.l);
            assert_eq!((entry >> 54 & 1) as u8, segment.db);
            assert_eq!((entry >> 55 & 1) as u8, segment.g);
        }
    }
}
