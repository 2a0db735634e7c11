//! The lab: a KVM host inside an emulator, for machines without usable KVM.
//!
//! QEMU's TCG emulates an x86-64 computer with AMD SVM and nested paging; a stock Debian kernel boots in it
//! as the *host*, loads `kvm_amd`, and stockade runs there exactly as on hardware. One life of the lab boots,
//! runs one command with its output streamed out, and ends. It never hangs: boot and command have limits,
//! a dead host kernel is seen on its console, and QEMU dies with the process that started it.
//!
//! ```no_run
//! use stockade_tests::lab::{self, Lab, Payload};
//! fn main() -> std::process::ExitCode {
//!     lab::init_if_booted(); // first: this executable is also PID 1 of the lab
//!     let mut payload = Payload::new();
//!     payload.add("target/lab/stockade", "bin/stockade").add("guest/vmlinux", "lib/stockade/vmlinux");
//!     if !lab::inside() && lab::usable_kvm().is_err() {
//!         return lab::reexec_inside(payload, std::env::args().skip(1)); // this executable, in the lab
//!     }
//!     // here stockade runs, on this machine or in the lab
//!     std::process::ExitCode::SUCCESS
//! }
//! ```
//!
//! In the lab: `/payload` (read-only), `/out` (comes back to [`Lab::out`]), `/bundles/{debian,busybox}/rootfs`,
//! cgroup2 on /sys/fs/cgroup, tracefs and debugfs, `lo` up, no other network, PATH begins with
//! /payload/bin, `STOCKADE_LAB=1`.
//!
//! Its root file system is Debian's bookworm; `STOCKADE_LAB_SUITE=trixie` or `sid` takes that suite's, with newer
//! callers (containerd, Podman, Docker, …) under the same kernel.
//!
//! The CPU model is EPYC and not `max`: with `max` guests of guests stall, the host's kernel was once seen
//! to die, and every VM start costs 60% more.

pub(crate) mod cache;
mod image;
mod init;
mod initrd;
mod kvm;
mod link;
mod machine;
mod mend;
mod payload;
mod session;
mod static_keys;
pub(crate) mod steps;
mod systemd;
mod terminal;

pub use image::{Image, ensure as ensure_image};
pub use kvm::usable_kvm;
pub use machine::Clock;
pub use payload::Payload;
pub use session::Lab;

use std::io;
use std::process::ExitCode;

/// Set in the environment of every command that runs in the lab.
pub const INSIDE: &str = "STOCKADE_LAB";

/// Variables that [`reexec_inside`] takes along: those with these beginnings.
const PASSED: [&str; 3] = ["RUST_", "STOCKADE_TEST", "STOCKADE_BENCH"];

/// Why the lab cannot do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A call to the build machine's system failed.
    #[error("lab: cannot {what}: {source}")]
    Io {
        /// What was to be done.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A step of a build failed.
    #[error("lab: the step \"{step}\" failed:\n{log}")]
    Step {
        /// The step's name.
        step: String,
        /// The end of its log.
        log: String,
    },
    /// A suite that no lab is made of.
    #[error("lab: cannot be of the suite {asked:?} that STOCKADE_LAB_SUITE names: it is one of {known}")]
    Suite {
        /// The suite.
        asked: String,
        /// Those that there are.
        known: String,
    },
    /// The kernel of the lab's host crashed.
    #[error("lab: {why}; the end of its console:\n{console}")]
    HostDied {
        /// The line that says so.
        why: String,
        /// The last lines of the host's console.
        console: String,
    },
    /// The lab did not come up, or ended before its command did.
    #[error("lab: {why}; the end of its console:\n{console}")]
    Died {
        /// What happened.
        why: String,
        /// The last lines of the host's console.
        console: String,
    },
}

pub(crate) fn io_error(what: &str) -> impl FnOnce(io::Error) -> LabError + use<'_> {
    move |source| LabError::Io { what: what.into(), source }
}

/// Call this first in `main` of every executable that starts the lab: the lab's kernel runs the same
/// executable as its init, and there this never returns. Elsewhere it does nothing.
pub fn init_if_booted() {
    if init::is_init() {
        init::run()
    }
}

/// Whether this process runs in the lab.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs this executable again in the lab with these arguments, as `/payload/bin/<its name>`, and returns its
/// exit code; its output appears as it comes. Says in one line why the lab is used.
pub fn reexec_inside(payload: Payload, arguments: impl IntoIterator<Item = String>) -> ExitCode {
    let lab = Lab { payload, ..Lab::default() };
    lab.reexec(arguments)
}

impl Lab {
    /// As [`reexec_inside`], with a lab of the caller's making.
    pub fn reexec(self, arguments: impl IntoIterator<Item = String>) -> ExitCode {
        if let Err(why) = usable_kvm() {
            eprintln!("lab: {why}; running in an emulated KVM host instead");
        }
        match self.run_self(arguments) {
            Ok(code) => ExitCode::from(code as u8),
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        }
    }

    /// Runs this executable in the lab with these arguments, as `/payload/bin/<its name>`; its exit code.
    pub fn run_self(&self, arguments: impl IntoIterator<Item = String>) -> Result<i32, LabError> {
        let mut lab = self.clone();
        let exe = std::env::current_exe().map_err(io_error("find this executable"))?;
        let inside = format!("bin/{}", exe.file_name().unwrap_or_default().to_string_lossy());
        lab.payload.add(&exe, &inside);
        let passed = std::env::vars().filter(|(name, _)| PASSED.iter().any(|start| name.starts_with(start)));
        lab.env.extend(passed);
        let argv: Vec<String> = std::iter::once(format!("/payload/{inside}")).chain(arguments).collect();
        lab.run(&argv)
    }
}
