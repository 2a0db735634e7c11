//! What the guest's CPUID instruction says.
//!
//! Made from what KVM supports on this host (`KVM_GET_SUPPORTED_CPUID`), with a topology of its own: one
//! package, one core a vCPU, one thread a core, APIC id = vCPU index, told in every leaf in which a kernel might
//! look, for Intel and AMD alike. Nested virtualization and performance counters are never offered.

use std::arch::x86_64::{__cpuid, CpuidResult};

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1 ECX.
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 1 EBX bits 15:8: cache line size in units of 8 bytes.
const CLFLUSH_LINE: u32 = 8 << 8;
/// Leaf 6 EAX: the APIC timer always runs. With it and TSC deadline, Linux needs no PIT.
const ARAT: u32 = 1 << 2;
/// Leaf 0x80000001 ECX.
const CMP_LEGACY: u32 = 1 << 1;
const SVM: u32 = 1 << 2;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
const PERFCTR_CORE: u32 = 1 << 23;
const PERFCTR_NB: u32 = 1 << 24;
const PERFCTR_LLC: u32 = 1 << 28;

/// Frequency of the APIC timer under KVM in kHz: a cycle is 1 ns (`APIC_BUS_CYCLE_NS`).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Leaf that tells TSC and APIC frequency; VMware's invention, which other hypervisors took up.
const FREQUENCIES: u32 = 0x4000_0010;

/// Leaf of the hypervisor's name and largest leaf.
const HYPERVISOR_LEAF: u32 = 0x4000_0000;

/// Leaves that must not reach the guest as the host has them: its topology (0xb is made anew, 0x1f and
/// 0x80000026 say the same), performance counters (0xa, 0x80000022), SVM (0x8000000a), and memory encryption
/// (0x8000001f).
const DROPPED: [u32; 7] = [0xa, 0xb, 0x1f, 0x8000_000a, 0x8000_001f, 0x8000_0022, 0x8000_0026];

/// First of the three leaves with the processor's name, which KVM does not hand through.
const BRAND: u32 = 0x8000_0002;

/// What differs from VM to VM.
#[derive(Clone, Copy, Debug)]
pub struct Processor {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// TSC frequency in kHz, if KVM knows it.
    pub tsc_khz: Option<u32>,
    /// The processor's name: registers EAX to EDX of the three leaves from [`BRAND`] on.
    pub brand: [[u32; 4]; 3],
}

/// What CPUID says on this host.
#[allow(unused_unsafe)] // The intrinsic is safe in newer Rust than the oldest that we build with.
fn host(leaf: u32) -> CpuidResult {
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { __cpuid(leaf) }
}

/// Whether this host's processor is Intel's.
pub fn host_is_intel() -> bool {
    let leaf = host(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
}

/// The name of this host's processor.
pub fn host_brand() -> [[u32; 4]; 3] {
    if host(0x8000_0000).eax < BRAND + 2 {
        return Default::default();
    }
    [0, 1, 2].map(|i| {
        let leaf = host(BRAND + i);
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    })
}

/// The entries of the first vCPU; [`set_id`] turns them into those of another.
pub fn prepare(supported: &[kvm_cpuid_entry2], processor: Processor) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| !DROPPED.contains(&entry.function) && !(BRAND..BRAND + 3).contains(&entry.function))
        .copied()
        .collect();
    let amd = supported.iter().any(|entry| entry.function == 0 && is_amd(entry));
    let vcpus = u32::from(processor.vcpus);
    for entry in &mut entries {
        match entry.function {
            0 => entry.eax = entry.eax.max(0xb),
            1 => {
                entry.ebx = (entry.ebx & 0xff) | CLFLUSH_LINE | vcpus << 16;
                entry.ecx = (entry.ecx & !VMX) | TSC_DEADLINE | HYPERVISOR;
                entry.edx = if vcpus > 1 { entry.edx | HTT } else { entry.edx & !HTT };
            }
            4 if !amd && entry.eax & 0x1f != 0 => {
                let cores = vcpus.next_power_of_two() - 1;
                entry.eax = (entry.eax & 0x3fff) | shared_by(entry.eax, vcpus) << 14 | cores << 26;
            }
            6 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (ARAT, 0, 0, 0),
            HYPERVISOR_LEAF if processor.tsc_khz.is_some() => entry.eax = entry.eax.max(FREQUENCIES),
            0x8000_0000 => entry.eax = entry.eax.max(if amd { 0x8000_001e } else { BRAND + 2 }),
            0x8000_0001 => {
                entry.ecx &= !(SVM | PERFCTR_CORE | PERFCTR_NB | PERFCTR_LLC);
                if amd {
                    entry.ecx |= TOPOLOGY_EXTENSIONS;
                    entry.ecx = if vcpus > 1 { entry.ecx | CMP_LEGACY } else { entry.ecx & !CMP_LEGACY };
                }
            }
            0x8000_0008 if amd => entry.ecx = id_bits(vcpus) << 12 | (vcpus - 1),
            0x8000_001d if entry.eax & 0x1f != 0 => {
                entry.eax = (entry.eax & 0x3fff) | shared_by(entry.eax, vcpus) << 14;
            }
            // One node, one thread a core; the ids are set for each vCPU.
            0x8000_001e => (entry.ebx, entry.ecx) = (0, 0),
            _ => {}
        }
    }
    if !entries.iter().any(|entry| entry.function == 6) {
        entries.push(kvm_cpuid_entry2 { function: 6, eax: ARAT, ..Default::default() });
    }
    if amd && !entries.iter().any(|entry| entry.function == 0x8000_001e) {
        entries.push(kvm_cpuid_entry2 { function: 0x8000_001e, ..Default::default() });
    }
    // Extended topology (Intel SDM, CPUID leaf 0xb): threads of a core, cores of the package, end of list.
    for (index, (shift, count, kind)) in
        [(0, 1, 1), (id_bits(vcpus), vcpus, 2), (0, 0, 0)].into_iter().enumerate()
    {
        entries.push(kvm_cpuid_entry2 {
            function: 0xb,
            index: index as u32,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | index as u32,
            ..Default::default()
        });
    }
    for (function, [eax, ebx, ecx, edx]) in (BRAND..).zip(processor.brand) {
        entries.push(kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() });
    }
    if let Some(khz) = processor.tsc_khz {
        entries.push(kvm_cpuid_entry2 {
            function: FREQUENCIES,
            eax: khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        });
    }
    entries
}

/// Makes the entries those of the vCPU with this index.
pub fn set_id(entries: &mut [kvm_cpuid_entry2], id: u8) {
    let id = u32::from(id);
    for entry in entries {
        match entry.function {
            1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | id << 24,
            0xb => entry.edx = id,
            0x8000_001e => (entry.eax, entry.ebx) = (id, id),
            _ => {}
        }
    }
}

/// The form in which KVM takes them.
pub fn to_kvm(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, vmm_sys_util::fam::Error> {
    CpuId::from_entries(entries)
}

fn is_amd(leaf_0: &kvm_cpuid_entry2) -> bool {
    let name = [leaf_0.ebx, leaf_0.edx, leaf_0.ecx].map(u32::to_le_bytes).concat();
    matches!(name.as_slice(), b"AuthenticAMD" | b"HygonGenuine")
}

/// How many processors beside itself share a cache, given EAX of its cache leaf: none for the first and second
/// level, all for the third. Both vendors have the level in bits 7:5 and the answer from bit 14 on.
fn shared_by(eax: u32, vcpus: u32) -> u32 {
    if eax >> 5 & 7 >= 3 { vcpus.next_power_of_two() - 1 } else { 0 }
}

/// How many bits of an APIC id tell one vCPU from another.
fn id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn name(text: &[u8; 12]) -> [u32; 4] {
        let word = |at: usize| u32::from_le_bytes(text[at..at + 4].try_into().unwrap());
        [0xd, word(0), word(8), word(4)]
    }

    fn host(vendor: &[u8; 12]) -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, 0, name(vendor)),
            entry(1, 0, [0x800f12, 0x6320_0800, VMX | 1, HTT | 1]),
            entry(4, 0, [0x1c00_4121, 0, 0, 0]),
            entry(4, 1, [0x1c03_c163, 0, 0, 0]),
            entry(4, 2, [0, 0, 0, 0]),
            entry(0xa, 0, [0x0730_0404, 0, 0, 0x603]),
            entry(0xb, 0, [1, 2, 0x100, 0x33]),
            entry(0x1f, 0, [1, 2, 0x100, 0x33]),
            entry(HYPERVISOR_LEAF, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
            entry(0x8000_0000, 0, [0x8000_001f, 0, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, SVM | PERFCTR_CORE | 1, 0]),
            entry(0x8000_0008, 0, [0x3030, 0, 0x703f, 0]),
            entry(0x8000_000a, 0, [1, 8, 0, 1]),
            entry(0x8000_001d, 0, [0x0000_4121, 0, 0, 0]),
            entry(0x8000_001d, 3, [0x0001_c163, 0, 0, 0]),
            entry(0x8000_001e, 0, [5, 0x101, 0x305, 0]),
            entry(0x8000_001f, 0, [3, 0, 0, 0]),
        ]
    }

    const INTEL: &[u8; 12] = b"GenuineIntel";
    const AMD: &[u8; 12] = b"AuthenticAMD";

    fn guest(vendor: &[u8; 12], vcpus: u8, id: u8) -> Vec<kvm_cpuid_entry2> {
        let mut entries = prepare(
            &host(vendor),
            Processor { vcpus, tsc_khz: Some(2_500_000), brand: [[1; 4], [2; 4], [3; 4]] },
        );
        set_id(&mut entries, id);
        entries
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| e.function == function && e.index == index).expect("leaf")
    }

    #[test]
    fn every_vcpu_count_gives_ids_that_fit_and_differ() {
        for vendor in [INTEL, AMD] {
            for vcpus in 1..=32 {
                let mut ids = std::collections::HashSet::new();
                for id in 0..vcpus {
                    let entries = guest(vendor, vcpus, id);
                    let apic_id = leaf(&entries, 1, 0).ebx >> 24;
                    assert_eq!(apic_id, leaf(&entries, 0xb, 0).edx);
                    assert_eq!(apic_id, leaf(&entries, 0xb, 1).edx);
                    // Core id: what is left of the APIC id below the package bits.
                    let bits = leaf(&entries, 0xb, 1).eax;
                    assert_eq!(apic_id >> bits, 0, "{vcpus} vCPUs in one package");
                    assert!(ids.insert(apic_id));
                    assert_eq!(leaf(&entries, 0xb, 1).ebx, u32::from(vcpus));
                    assert_eq!(leaf(&entries, 1, 0).ebx >> 16 & 0xff, u32::from(vcpus));
                    assert_eq!(leaf(&entries, 1, 0).edx & HTT != 0, vcpus > 1);
                    if vendor == AMD {
                        assert_eq!(leaf(&entries, 0x8000_001e, 0).eax, apic_id);
                        assert_eq!(leaf(&entries, 0x8000_001e, 0).ebx >> 8 & 0xff, 0, "one thread a core");
                        let ecx = leaf(&entries, 0x8000_0008, 0).ecx;
                        assert_eq!((ecx & 0xff) + 1, u32::from(vcpus));
                        assert_eq!(ecx >> 12 & 0xf, bits);
                    } else {
                        assert_eq!(leaf(&entries, 4, 0).eax >> 26, (1 << bits) - 1);
                    }
                }
            }
        }
    }

    #[test]
    fn only_the_last_level_cache_is_shared() {
        let intel = guest(INTEL, 6, 0);
        assert_eq!(leaf(&intel, 4, 0).eax >> 14 & 0xfff, 0);
        assert_eq!(leaf(&intel, 4, 1).eax >> 14 & 0xfff, 7);
        assert_eq!(leaf(&intel, 4, 2).eax, 0, "the end of the list stays one");
        let amd = guest(AMD, 6, 0);
        assert_eq!(leaf(&amd, 0x8000_001d, 0).eax >> 14 & 0xfff, 0);
        assert_eq!(leaf(&amd, 0x8000_001d, 3).eax >> 14 & 0xfff, 7);
    }

    #[test]
    fn nested_virtualization_and_performance_counters_are_not_offered() {
        for vendor in [INTEL, AMD] {
            let entries = guest(vendor, 2, 1);
            assert_eq!(leaf(&entries, 1, 0).ecx & VMX, 0);
            assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx & (SVM | PERFCTR_CORE), 0);
            assert!(entries.iter().all(|e| ![0xa, 0x1f, 0x8000_000a, 0x8000_001f].contains(&e.function)));
        }
    }

    #[test]
    fn the_guest_can_do_without_a_pit() {
        let entries = guest(INTEL, 1, 0);
        assert_ne!(leaf(&entries, 1, 0).ecx & TSC_DEADLINE, 0);
        assert_ne!(leaf(&entries, 6, 0).eax & ARAT, 0);
        assert_eq!(leaf(&entries, FREQUENCIES, 0).eax, 2_500_000);
        assert!(leaf(&entries, HYPERVISOR_LEAF, 0).eax >= FREQUENCIES);
        assert!(leaf(&entries, 0, 0).eax >= 0xb);
    }

    #[test]
    fn a_frequency_that_kvm_does_not_know_is_not_invented() {
        let entries = prepare(&host(AMD), Processor { vcpus: 1, tsc_khz: None, brand: Default::default() });
        assert!(entries.iter().all(|e| e.function != FREQUENCIES));
        assert_eq!(leaf(&entries, HYPERVISOR_LEAF, 0).eax, 0x4000_0001);
    }

    #[test]
    fn the_processor_has_the_hosts_name() {
        let entries = guest(AMD, 1, 0);
        for i in 0..3 {
            assert_eq!(leaf(&entries, BRAND + i, 0).edx, i + 1);
        }
    }
}
