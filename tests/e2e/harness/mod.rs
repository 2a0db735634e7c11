//! What the cases are written with: bundles to run, a driver for the runtime under test, the programs it
//! starts, terminals, and the check that nothing is left behind.
//!
//! Two rules hold for everything in here. Nothing sleeps: code waits for an event (a line of output, an end of
//! file, the end of a process). And a deadline is a guard against hangs, never a measure: when it strikes, the
//! case fails with everything known about what hung.

mod bundle;
pub mod calls;
mod cases;
mod containerd;
mod cri;
mod docker;
mod hijack;
mod image;
mod leaks;
mod network;
mod parts;
mod podman;
mod program;
mod runtime;
mod steps;
mod stream;
mod systemd;
mod terminal;

pub use bundle::{Bundle, Rootfs, host_scratch};
pub use calls::CallWatch;
pub use cases::{Case, into_trials, leave_nothing};
pub use containerd::{Containerd, RUNTIME as SHIM_TYPE};
pub use cri::{
    BY_SANDBOX_API, HANDLER, Pod, Pods, container, files_in_no_mount, mount, runtime_of, security, state_of,
};
pub use docker::{Docker, IMAGE as DOCKER_IMAGE};
pub use hijack::Hijacked;
pub use image::{Images, Layer, digest};
pub use leaks::Traces;
pub use network::{Cni, Netns, tool, unique};
pub use parts::run_in_labs;
pub use podman::{IMAGE as PODMAN_IMAGE, Podman};
pub use program::{Ended, Exit, Program, Stdin, wait_gone};
pub use runtime::{Container, Id, Runtime, vmm_of};
pub use steps::{SystemCall, kill_before};
pub use systemd::Systemd;
pub use terminal::{ConsoleSocket, Pty};

use std::time::Duration;

/// How long anything may take before it counts as hung. One VM start takes two seconds in the lab and eight at
/// once some twenty; a machine that is busy with other things makes that several times more.
pub const HANG: Duration = Duration::from_secs(240);

/// The size of a case that takes too long to be whole in every run; `STOCKADE_E2E_FULL=1` asks for that.
pub fn sized<T>(usual: T, full: T) -> T {
    if std::env::var_os("STOCKADE_E2E_FULL").is_some() { full } else { usual }
}

/// Registers a case under `file::function`.
macro_rules! case {
    ($function:ident) => {
        $crate::harness::Case::new(concat!(module_path!(), "::", stringify!($function)), $function)
    };
}
pub(crate) use case;
