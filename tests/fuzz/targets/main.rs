//! Fuzzing: every door through which a guest, or a bundle, gets bytes into a process of the host. One file a door: a
//! function that takes any bytes, does with them what a hostile guest could, and panics if something happens that
//! must not.
//!
//! As a test (`make test`, or `cargo test -p stockade-fuzz`) each target gets its corpus and some inputs made from that,
//! always the same ones. `make fuzz T=60` gives each target 60 seconds; inputs that reach more code are kept below the
//! target directory, and `make fuzz KEEP=1` puts the best of them into the corpus here. An input that fails is written to
//! a file, and `STOCKADE_FUZZ_INPUT=FILE cargo test -p stockade-fuzz -- TARGET` runs it again.
#![allow(clippy::unwrap_used, reason = "a test may fail by panicking")]

mod agent;
mod bundle;
mod control;
mod fuse;
mod mmio;
mod rings;
mod vsock;

use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use stockade_fuzz::{Target, engine};

const ALL: [Target; 10] = [
    Target { name: "mmio", run: mmio::run },
    Target { name: "rings_rng", run: rings::rng },
    Target { name: "rings_vsock", run: rings::vsock },
    Target { name: "rings_fs", run: rings::fs },
    Target { name: "rings_net", run: rings::net },
    Target { name: "vsock", run: vsock::run },
    Target { name: "fuse", run: fuse::run },
    Target { name: "control", run: control::run },
    Target { name: "agent", run: agent::run },
    Target { name: "bundle", run: bundle::run },
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    let filter = arguments.filter.clone().unwrap_or_default();
    let asked = || ALL.into_iter().filter(|target| target.name.contains(&filter));
    engine::watch_for_failures();
    if let Some(file) = std::env::var_os("STOCKADE_FUZZ_INPUT") {
        let input = std::fs::read(file).expect("read STOCKADE_FUZZ_INPUT");
        asked().for_each(|target| engine::run(target, &input));
        return ExitCode::SUCCESS;
    }
    if let Ok(seconds) = std::env::var("STOCKADE_FUZZ_SECONDS") {
        let seconds = seconds.parse().expect("STOCKADE_FUZZ_SECONDS is a number of seconds");
        asked().for_each(|target| engine::search(target, Duration::from_secs(seconds)));
        return ExitCode::SUCCESS;
    }
    if std::env::var_os("STOCKADE_FUZZ_KEEP").is_some() {
        asked().for_each(engine::keep);
        return ExitCode::SUCCESS;
    }
    // One at a time: which input it was that failed is known that way.
    arguments.test_threads = Some(1);
    let trial = |target: Target| {
        Trial::test(target.name, move || {
            engine::replay(target);
            Ok(())
        })
    };
    libtest_mimic::run(&arguments, ALL.into_iter().map(trial).collect()).exit_code()
}
