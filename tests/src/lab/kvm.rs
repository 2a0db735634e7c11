//! Is the KVM of this machine good for running microVMs, or is the lab needed?
//!
//! `/dev/kvm` alone says little: a paravirtual (PVM) host answers every KVM call but emulates a guest's
//! kernel instruction by instruction, so a Linux guest needs minutes. Usable means: it opens, speaks API 12,
//! has the capabilities without which no microVM of ours starts, and the processor has VMX or SVM.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

// linux/kvm.h: _IO(0xAE, nr), and the capability numbers.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_CHECK_EXTENSION: libc::c_ulong = 0xae03;
const KVM_API_VERSION: i32 = 12;
const NEEDED: [(&str, i32); 8] = [
    ("KVM_CAP_IRQCHIP", 0),
    ("KVM_CAP_USER_MEMORY", 3),
    ("KVM_CAP_SET_TSS_ADDR", 4),
    ("KVM_CAP_EXT_CPUID", 7),
    ("KVM_CAP_IRQFD", 32),
    ("KVM_CAP_IOEVENTFD", 36),
    ("KVM_CAP_TSC_DEADLINE_TIMER", 72),
    ("KVM_CAP_IMMEDIATE_EXIT", 136),
];

/// Whether microVMs run directly on this machine; if not, why, in a few words.
pub fn usable_kvm() -> Result<(), String> {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| format!("/dev/kvm does not open: {error}"))?;
    let ask = |request: libc::c_ulong, argument: libc::c_long| {
        // SAFETY: both requests take an integer and touch no memory of ours; the descriptor is open.
        unsafe { libc::ioctl(kvm.as_raw_fd(), request, argument) }
    };
    let version = ask(KVM_GET_API_VERSION, 0);
    if version != KVM_API_VERSION {
        return Err(format!("/dev/kvm speaks KVM API {version} instead of {KVM_API_VERSION}"));
    }
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(_, number)| ask(KVM_CHECK_EXTENSION, (*number).into()) <= 0)
        .map(|(name, _)| *name)
        .collect();
    if !missing.is_empty() {
        return Err(format!("KVM lacks {}", missing.join(", ")));
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").map_err(|error| format!("/proc/cpuinfo: {error}"))?;
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    if !flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
        return Err("the processor offers neither vmx nor svm, so KVM here emulates guests (PVM)".into());
    }
    Ok(())
}
