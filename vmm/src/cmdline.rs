//! The kernel command line, composed in one place.
//!
//! Every word costs the guest time (the kernel compares it with some hundred known ones, twice), so each says
//! here why it is there.

use crate::memory;
use crate::slots::Slot;

/// `COMMAND_LINE_SIZE` of x86 (`arch/x86/include/asm/setup.h`), which counts the final zero byte.
pub const MAX_LENGTH: usize = 2048;

/// What every VM gets. There are no words for ACPI, PCI, i8042, 8250 and modules: our kernel is built without.
const BASE: [&str; 6] = [
    // Only emergencies reach the console: its every character is a VM exit. First, because `earlyprintk`
    // replays what has been logged before it.
    "loglevel=1",
    // The console. `keep`, because no other console follows: the kernel has no 8250 driver.
    "earlyprintk=serial,0x3f8,115200,keep",
    // A reset is a triple fault, which KVM reports; nothing else here could reset anything.
    "reboot=t",
    // A panic resets at once, and the VMM sees the end.
    "panic=-1",
    // Host and guest see the same TSC, synchronised by KVM: no watchdog that checks it against another clock,
    // no check at the start of every further vCPU. Where the host's TSC is not stable, KVM hides that it is
    // invariant, and Linux prefers kvmclock.
    "tsc=reliable",
    // Grace periods in tens of microseconds instead of tens of milliseconds: unmounting, ending a namespace or
    // a cgroup waits for them, and a container's VM has few processors to disturb.
    "rcupdate.rcu_expedited=1",
];

/// A command line that is too long or has bytes in it that no command line can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// it is too long
    #[error("the kernel command line has {length} bytes, more than the {max} that Linux reads; shorten it", max = MAX_LENGTH - 1)]
    TooLong {
        /// What it has.
        length: usize,
    },
    /// it has a control character
    #[error("the kernel command line has a control character in it; remove it")]
    ControlCharacter,
}

/// The command line for a VM with `vcpus` and `memory_bytes` and a device in each of `slots`; `extra` comes
/// last, so that it can override the rest.
pub fn compose(vcpus: u8, memory_bytes: u64, slots: &[Slot], extra: &str) -> Result<String, Error> {
    let mut words: Vec<String> = BASE.map(String::from).into();
    if vcpus == 1 {
        // One processor needs no lock prefixes, and Linux would patch them out all over its text: 8 ms of a boot
        // (virtual clock), more than they will ever cost.
        words.push("noreplace-smp".into());
    }
    if memory_bytes > memory::GAP_START {
        // Memory above 4 GiB makes Linux set 64 MiB of bounce buffers aside, for devices that this VM has not.
        words.push("swiotlb=noforce".into());
    }
    words.extend(slots.iter().map(|slot| slot.kernel_parameter()));
    if !extra.is_empty() {
        words.push(extra.into());
    }
    let line = words.join(" ");
    if line.len() >= MAX_LENGTH {
        return Err(Error::TooLong { length: line.len() });
    }
    if line.bytes().any(|byte| byte.is_ascii_control()) {
        return Err(Error::ControlCharacter);
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_present_devices_are_announced_and_the_callers_words_come_last() {
        let line = compose(2, 256 << 20, &[Slot::VSOCK, Slot::RNG], "loglevel=7 debug").unwrap();
        assert!(line.ends_with(
            "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0002000:7 loglevel=7 debug"
        ));
        assert_eq!(line.matches("virtio_mmio").count(), 2);
        assert!(!line.contains("noreplace-smp"));
    }

    #[test]
    fn a_line_that_linux_would_cut_or_misread_is_an_error() {
        let room = MAX_LENGTH - 2 - compose(1, 256 << 20, &[], "").unwrap().len();
        assert!(compose(1, 256 << 20, &[], &"x".repeat(room)).is_ok());
        assert_eq!(
            compose(1, 256 << 20, &[], &"x".repeat(room + 1)),
            Err(Error::TooLong { length: MAX_LENGTH })
        );
        for bad in ["a\0b", "a\nb"] {
            assert_eq!(compose(1, 256 << 20, &[], bad), Err(Error::ControlCharacter));
        }
    }
}
