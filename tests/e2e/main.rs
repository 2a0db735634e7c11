//! Stockade from the outside, as its users meet it: the runtime's command line over real bundles, each container
//! in a real VM. One file a subject; [`harness`] is what they are written with.
//!
//! On a machine without usable KVM the whole program runs itself again inside the lab, with the same arguments,
//! and what is seen is what it writes there. `STOCKADE_E2E_RUNTIME` names the runtime under test: with `runc`
//! the cases that are not about the VM must pass as well, which shows that they ask for what the specification
//! says.
#![allow(clippy::unwrap_used, reason = "a test may fail by panicking")]

mod harness;

mod bad_input;
mod check;
mod endurance;
mod exec;
mod failure;
mod isolation;
mod lifecycle;
mod limits;
mod mounts;
mod process;
mod stdio;
mod tty;

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(exit) = lifecycle::as_subreaper() {
        return exit;
    }
    let mut arguments = libtest_mimic::Arguments::from_args();
    if !arguments.list && !stockade_tests::lab::kvm_is_usable() {
        return stockade_tests::lab::reexec_inside();
    }
    // One VM keeps one CPU of the emulated host busy.
    arguments.test_threads.get_or_insert(2);
    let cases: Vec<_> = [
        bad_input::CASES,
        check::CASES,
        endurance::CASES,
        exec::CASES,
        failure::CASES,
        isolation::CASES,
        lifecycle::CASES,
        limits::CASES,
        mounts::CASES,
        process::CASES,
        stdio::CASES,
        tty::CASES,
    ]
    .concat();
    libtest_mimic::run(&arguments, harness::into_trials(&cases)).exit_code()
}
