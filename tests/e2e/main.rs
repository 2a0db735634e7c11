//! Stockade from the outside, as its users meet it: the runtime's command line over real bundles, each container
//! in a real VM. One file a subject; [`harness`] is what they are written with.
//!
//! On a machine without usable KVM the whole program runs itself again inside the lab, with the same arguments,
//! and what is seen is what it writes there. `STOCKADE_E2E_RUNTIME` names the runtime under test: with `runc`
//! the cases that are not about the VM must pass as well, which shows that they ask for what the specification
//! says. `STOCKADE_LAB_SUITE` names the Debian suite whose callers are in the lab, `STOCKADE_E2E_SANDBOX_API=1` has pods made
//! by containerd's sandbox API, which 2.x has. `STOCKADE_E2E_FULL=1` makes some cases as large as they are meant, which takes hours.
#![allow(clippy::unwrap_used, reason = "a test may fail by panicking")]

mod harness;

mod attacks;
mod bad_input;
mod buildah;
mod cgroup;
mod check;
mod commands;
mod containerd;
mod cri;
mod docker;
mod endurance;
mod exec;
mod failure;
mod fields;
mod grow;
mod image;
mod install;
mod isolation;
mod lifecycle;
mod limits;
mod mounts;
mod network;
mod operations;
mod podman;
mod process;
mod shared;
mod stdio;
mod systemd;
mod tty;
mod wall;

use std::path::PathBuf;
use std::process::ExitCode;

use harness::CallWatch;
use stockade_tests::lab::{self, Lab};

fn main() -> ExitCode {
    lab::init_if_booted();
    if let Some(exit) = lifecycle::as_subreaper() {
        return exit;
    }
    let mut arguments = libtest_mimic::Arguments::from_args();
    if !arguments.list && !lab::inside() {
        let stage = stage();
        if let Err(why) = lab::usable_kvm() {
            eprintln!("lab: {why}; running in emulated KVM hosts instead");
            let mut lab = Lab::default();
            lab.payload.add(stage, "");
            lab.env.extend(std::env::vars().filter(|(name, _)| name.starts_with("STOCKADE_E2E_")));
            return harness::run_in_labs(&lab, arguments.filter.as_deref());
        }
    }
    // One VM keeps one CPU of the emulated host busy.
    arguments.test_threads.get_or_insert(2);
    let cases: Vec<_> = [
        attacks::CASES,
        bad_input::CASES,
        buildah::CASES,
        cgroup::CASES,
        check::CASES,
        containerd::CASES,
        commands::CASES,
        cri::CASES,
        cri::streams::CASES,
        cri::users::CASES,
        cri::volumes::CASES,
        docker::CASES,
        endurance::CASES,
        exec::CASES,
        failure::CASES,
        fields::CASES,
        grow::CASES,
        image::CASES,
        install::CASES,
        isolation::CASES,
        lifecycle::CASES,
        shared::CASES,
        limits::CASES,
        mounts::CASES,
        mounts::ids::CASES,
        network::CASES,
        network::changes::CASES,
        network::traffic::CASES,
        operations::CASES,
        podman::CASES,
        process::CASES,
        stdio::CASES,
        systemd::CASES,
        tty::CASES,
        wall::CASES,
    ]
    .concat();
    let watch = (harness::Runtime::under_test().is_stockade() && !arguments.list).then(CallWatch::begin);
    let before = harness::Traces::now();
    let conclusion = libtest_mimic::run(&arguments, harness::into_trials(&cases));
    let mut clean = harness::leave_nothing(&before);
    if let Some(watch) = watch {
        let used = watch.end();
        if lab::inside() {
            harness::calls::tell(&used);
        } else if arguments.filter.is_none() && arguments.skip.is_empty() {
            clean &= harness::calls::compare(used);
        }
    }
    if clean { conclusion.exit_code() } else { ExitCode::from(101) }
}

/// The installation under test, with `bin` and `lib/stockade`: what the stages behind the Makefile name, or what
/// they have left in this target directory.
fn stage() -> PathBuf {
    std::env::var_os("STOCKADE_STAGE").map(PathBuf::from).unwrap_or_else(|| {
        let this = std::env::current_exe().expect("path of this program");
        // <target directory>/<target triple>/<profile>/deps/<this>
        this.ancestors().nth(4).expect("a target directory").join("stage")
    })
}
