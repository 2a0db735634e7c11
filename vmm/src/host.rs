//! Whether this machine can run microVMs, and if not, why.
//!
//! [`open_kvm`] is the short check of every start; [`check`] looks at everything and explains, for
//! `stockade check`. Both name all missing capabilities at once. What only weakens the wall between guests is a
//! warning ([`side_channels`]).

mod side_channels;

use std::fmt;
use std::io;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

/// What booting needs of KVM, with the name in `include/uapi/linux/kvm.h`. What only snapshots would need is
/// not asked for here.
const REQUIRED: [(Cap, &str); 11] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::Clocksource, "KVM_CAP_CLOCKSOURCE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

const DEVICE: &str = "/dev/kvm";

/// The only API version there has been since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// Why KVM cannot be used. Each message is one line with its remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// there is no device node
    #[error(
        "there is no {DEVICE}: load the kvm_intel or kvm_amd module, and enable virtualization in the firmware \
         (on a virtual machine: nested virtualization)"
    )]
    NoDevice,
    /// the device node cannot be opened by this user
    #[error("no permission to open {DEVICE}: run as root or as a member of the group that owns it (kvm)")]
    NoPermission,
    /// the device node cannot be opened for another reason
    #[error("cannot open {DEVICE}: {0}; see the kernel log for what the kvm module says")]
    Open(#[source] io::Error),
    /// not the KVM that everybody knows
    #[error("{DEVICE} speaks KVM API version {0} instead of {API_VERSION}: this is not a usable KVM")]
    Version(i32),
    /// capabilities are missing
    #[error("the host's KVM lacks {}: use a newer host kernel", .0.join(", "))]
    Capabilities(Vec<&'static str>),
}

/// Opens /dev/kvm and makes sure that it has all that a VM needs.
pub fn open_kvm() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => Error::NoDevice,
        libc::EACCES | libc::EPERM => Error::NoPermission,
        errno => Error::Open(io::Error::from_raw_os_error(errno)),
    })?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(Error::Version(version));
    }
    let missing: Vec<_> =
        REQUIRED.into_iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| name).collect();
    if missing.is_empty() { Ok(kvm) } else { Err(Error::Capabilities(missing)) }
}

/// What a finding means for microVMs on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They can run, as far as this goes.
    Ok,
    /// They can run, but guests are less well kept apart than they could be.
    Warning,
    /// They cannot.
    No,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub subject: &'static str,
    /// What was found: one clause when all is well, cause and remedy when not.
    pub detail: String,
    /// What it means.
    pub verdict: Verdict,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::No => "no",
        };
        write!(f, "{verdict}: {}: {}", self.subject, self.detail)
    }
}

/// Looks at everything a microVM needs of this machine. It can run them unless a finding's verdict is `No`.
pub fn check() -> Vec<Finding> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut findings = vec![check_kvm(), check_processor(&cpuinfo)];
    findings.extend(side_channels::check(Path::new("/sys")));
    findings
}

fn check_kvm() -> Finding {
    let subject = "KVM";
    match open_kvm() {
        Ok(_) => Finding {
            subject,
            detail: format!("{DEVICE} opens, API version {API_VERSION}, all {} capabilities", REQUIRED.len()),
            verdict: Verdict::Ok,
        },
        Err(e) => Finding { subject, detail: e.to_string(), verdict: Verdict::No },
    }
}

/// A host that offers /dev/kvm without hardware support is a "pagetable virtual machine" (PVM): it emulates
/// the guest's kernel mode instruction by instruction, and a Linux guest takes minutes or dies.
fn check_processor(cpuinfo: &str) -> Finding {
    let subject = "processor";
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    match flags.split_whitespace().find(|flag| matches!(*flag, "vmx" | "svm")) {
        Some(flag) => {
            Finding { subject, detail: format!("hardware virtualization ({flag})"), verdict: Verdict::Ok }
        }
        None => Finding {
            subject,
            detail:
                "neither vmx nor svm in /proc/cpuinfo: a /dev/kvm here is emulation (PVM), too slow for a \
                     Linux guest; use a machine with hardware virtualization, or enable nested virtualization"
                    .into(),
            verdict: Verdict::No,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_without_vmx_and_svm_is_named_as_pvm() {
        let found = check_processor("processor\t: 0\nflags\t\t: fpu sse2 hypervisor\n");
        assert_eq!(found.verdict, Verdict::No);
        assert!(found.detail.contains("PVM"));
        assert_eq!(check_processor("").verdict, Verdict::No);
    }

    #[test]
    fn vmx_and_svm_are_recognised_as_words() {
        assert_eq!(check_processor("flags\t\t: fpu vmx sse\n").verdict, Verdict::Ok);
        assert_eq!(check_processor("flags\t\t: fpu svm\n").verdict, Verdict::Ok);
        assert_eq!(check_processor("flags\t\t: fpu vmxish svm_lock\n").verdict, Verdict::No);
    }

    #[test]
    fn a_finding_is_one_line() {
        for finding in check() {
            assert!(!finding.to_string().contains('\n'));
        }
        let missing = Error::Capabilities(vec!["KVM_CAP_SIGNAL_MSI", "KVM_CAP_IOEVENTFD"]);
        assert!(missing.to_string().contains("KVM_CAP_SIGNAL_MSI, KVM_CAP_IOEVENTFD"));
    }
}
