//! `stockade`: an OCI runtime that runs each container in a microVM of its own.
//!
//! The one binary has three roles. As a command line ([`cli`]) it is what callers of runc know; called
//! `containerd-shim-stockade-v2` it is containerd's shim ([`shim`]); as `stockade vmm` it is the microVM monitor that
//! a supervisor starts. The role is decided before anything else, so that neither
//! initialises what only the other needs.

mod bundle;
mod cli;
mod clock;
mod config;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod guest_files;
mod image;
mod install;
mod log;
mod network;
mod printable;
mod process;
mod records;
mod sandbox;
mod shim;
mod size;
mod state;
mod thread;

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

/// The program, in the role that its arguments say.
pub fn main() -> ExitCode {
    let process_start_ns = clock::monotonic_ns();
    let mut arguments = std::env::args_os();
    let program = arguments.next();
    if arguments.next().is_some_and(|role| role == "vmm") {
        return vmm();
    }
    if shim::is_named(program.as_deref()) {
        return shim::main(process_start_ns);
    }
    cli::main(process_start_ns)
}

/// The VMM gets its control socket as standard input, and nothing that its supervisor happened to have open.
fn vmm() -> ExitCode {
    // SAFETY: nothing in this process owns a descriptor from 3 on: it has just been started.
    unsafe { libc::close_range(3, u32::MAX, 0) };
    // SAFETY: the supervisor made this the control socket, and nothing in this role reads standard input.
    stockade_vmm::run(unsafe { OwnedFd::from_raw_fd(0) })
}
