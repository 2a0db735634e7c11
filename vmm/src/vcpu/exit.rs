//! One `KVM_RUN` and what becomes of its exit (KVM API documentation, section 5, `exit_reason`).

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Bus;
use crate::control::StopReason;

/// Runs the vCPU until it needs something; `Some` when it cannot go on.
pub fn run_once(id: usize, vcpu: &mut VcpuFd, bus: &Bus) -> Option<StopReason> {
    let problem = match vcpu.run() {
        Ok(VcpuExit::MmioRead(address, data)) => {
            bus.read_memory(address, data);
            return None;
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            bus.write_memory(address, data);
            return None;
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            bus.read_port(port, data);
            return None;
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            bus.write_port(port, data);
            return None;
        }
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return None,
        // A triple fault: how a kernel without ACPI, PCI and keyboard controller resets (`reboot=t`).
        Ok(VcpuExit::Shutdown) => return Some(StopReason::Reset),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => return Some(StopReason::Shutdown),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return Some(StopReason::Reset),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => "the guest says that it crashed".into(),
        Ok(VcpuExit::SystemEvent(event, _)) => format!("unknown system event {event}"),
        // Only without KVM's own interrupt controllers; with them a halted vCPU waits inside KVM_RUN.
        Ok(VcpuExit::Hlt) => return Some(StopReason::Halted),
        Ok(VcpuExit::InternalError) => internal_error(vcpu),
        Ok(VcpuExit::FailEntry(reason, cpu)) => format!(
            "the processor refuses to enter the guest (KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x}, host \
             CPU {cpu})"
        ),
        Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
            format!("the host cannot provide guest memory at {gpa:#x} ({size:#x} bytes)")
        }
        Ok(other) => format!("unexpected exit {other:?}"),
        Err(e) => match e.errno() {
            libc::EINTR | libc::EAGAIN => return None,
            libc::EFAULT => "KVM_RUN: the host cannot provide guest memory; is it out of memory?".into(),
            _ => format!("KVM_RUN: {e}"),
        },
    };
    let place = vcpu.get_regs().map_or_else(|_| String::new(), |regs| format!(" at RIP {:#x}", regs.rip));
    Some(StopReason::Error(format!("vCPU {id} stopped{place}: {problem}")))
}

/// What KVM says about its own failure.
fn internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason says that this member of the union is valid.
    let (suberror, data) =
        unsafe { (run.__bindgen_anon_1.internal.suberror, run.__bindgen_anon_1.internal.data) };
    match suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            // SAFETY: as above; for this suberror the data are laid out so.
            let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
            // SAFETY: the inner union has a single form, all bytes of which are integers.
            let known = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let size = usize::from(known.insn_size).min(known.insn_bytes.len());
            let bytes: Vec<String> =
                known.insn_bytes[..size].iter().map(|byte| format!("{byte:02x}")).collect();
            format!(
                "KVM cannot emulate an instruction (KVM internal error, suberror 1, bytes [{}]); on a host \
                 without hardware virtualization (see `stockade check`) that is to be expected",
                bytes.join(" ")
            )
        }
        KVM_INTERNAL_ERROR_SIMUL_EX => {
            "KVM met two exceptions at once (KVM internal error, suberror 2)".into()
        }
        KVM_INTERNAL_ERROR_DELIVERY_EV => {
            format!("KVM could not deliver an event (KVM internal error, suberror 3, exit {:#x})", data[1])
        }
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            format!("the processor gave KVM an exit reason that it does not know ({:#x})", data[0])
        }
        other => format!("KVM internal error, suberror {other}"),
    }
}
