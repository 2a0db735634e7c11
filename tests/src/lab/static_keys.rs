//! Keeps the host's kernel from patching its own code while the lab works.
//!
//! A static key (Linux, Documentation/staging/static-keys.rst) rewrites jumps of the running kernel by way of a
//! breakpoint. QEMU 7.2 with a thread for each CPU now and then runs into such a breakpoint after it has gone,
//! and the kernel dies of it: `Fatal exception in interrupt`, one byte into a patched jump; seen in 2 of the
//! first 12 lives. The keys that flip all the time are KVM's, with the first and the last VM and with vCPUs
//! whose local APIC is off, and those of the memory and cpuset controllers, with the first and the last cgroup.
//! So the lab's init has one of each for as long as it lives, and then none of them flips any more.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

// linux/kvm.h: _IO(0xAE, nr).
const KVM_CREATE_VM: libc::c_ulong = 0xae01;
const KVM_CREATE_VCPU: libc::c_ulong = 0xae41;
const KVM_CREATE_IRQCHIP: libc::c_ulong = 0xae60;

/// What holds the keys; they flip again when it is dropped.
pub(super) struct Held {
    _vm: OwnedFd,
    _vcpu: OwnedFd,
}

/// Takes hold of them. Call it with the controllers enabled for the cgroups below the root.
pub(super) fn hold() -> io::Result<Held> {
    fs::create_dir_all("/sys/fs/cgroup/lab")?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let vm = create(&kvm, KVM_CREATE_VM)?;
    // SAFETY: the request takes no argument; the descriptor is open.
    if unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CREATE_IRQCHIP, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let vcpu = create(&vm, KVM_CREATE_VCPU)?;
    Ok(Held { _vm: vm, _vcpu: vcpu })
}

/// A request that makes something and answers with a descriptor of it: of type or number 0.
fn create(on: &impl AsRawFd, request: libc::c_ulong) -> io::Result<OwnedFd> {
    // SAFETY: the requests used here take an integer and touch no memory of ours; the descriptor is open.
    let fd = unsafe { libc::ioctl(on.as_raw_fd(), request, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
