//! Tests of the agent in a real guest, without a VMM of ours.
//!
//! `cargo test` starts this program on the host. It packs itself, the agent and a busybox into an initrd and boots it
//! under QEMU's emulator. There the kernel starts it again, now as PID 1: it forks, turns PID 1 into the agent, and
//! the child talks to the agent over vsock's loopback and reports through the kernel's log.
//!
//! It needs the guest kernel as a bzImage, named by STOCKADE_TEST_BZIMAGE, which nothing else here does: so it is
//! for work on the agent alone, and `make test` leaves it out. The end-to-end suite has the same cases in real VMs.

mod cases;
mod guest;
mod host;

fn main() {
    if std::process::id() == 1 {
        guest::main();
    } else {
        host::main();
    }
}
