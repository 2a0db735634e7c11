//! The suite in the lab: in parts, each in a lab of its own.
//!
//! The emulator's SVM is not perfect: about once in a hundred VM starts the lab's *host* kernel dies of a stack
//! or a register that QEMU left wrong. Nothing that is tested can do that from user space, and nothing after it
//! counts, so a part whose host died is run again, which is said each time, and after [`TRIES`] counts as failed.
//! The same faults can hit a process instead of the kernel, so a part with failed cases runs once more, which is
//! said too: what fails twice has failed. With usable KVM none of this is in use.

use std::process::ExitCode;

use stockade_tests::lab::{Lab, LabError};

/// How often a part may run. Three deaths in a row are no accident of the emulator's.
const TRIES: usize = 4;

/// Names the part to a run inside; without it all cases run.
const PART: &str = "STOCKADE_E2E_PART";

/// The parts, each a list of how its cases' names begin; what begins with a longer one belongs there. The smaller
/// a part, the less is lost with its host; each costs a boot of the lab, some five seconds.
const PARTS: [&[&str]; 10] = [
    &["bad_input::", "check::", "isolation::", "tty::"],
    &["exec::"],
    &["lifecycle::"],
    &["limits::"],
    &["mounts::"],
    &["process::"],
    &["stdio::"],
    &["endurance::fifty_runs"],
    &["endurance::", "failure::"],
    &["failure::fifty_kills"],
];

/// Whether a case belongs to the part that this run was asked for.
pub fn is_asked_for(name: &str) -> bool {
    let Some(asked) = std::env::var(PART).ok().and_then(|part| part.parse::<usize>().ok()) else {
        return true;
    };
    let begins = |part: &[&str]| part.iter().filter(|start| name.starts_with(**start)).map(|s| s.len()).max();
    let part = PARTS.iter().enumerate().max_by_key(|(_, part)| begins(part));
    assert!(part.is_some_and(|(_, part)| begins(part).is_some()), "no part of the suite has {name}");
    part.is_some_and(|(index, _)| index == asked)
}

/// Runs the suite, or with a `filter` the cases that it names, in labs like this one.
pub fn run_in_labs(lab: &Lab, filter: Option<&str>) -> ExitCode {
    let whole = [None];
    let parts: Vec<_> = (0..PARTS.len()).map(Some).collect();
    let mut success = true;
    for part in if filter.is_some() { &whole[..] } else { &parts } {
        let mut lab = lab.clone();
        lab.env.extend(part.map(|part| (PART.to_string(), part.to_string())));
        success &= run_part(&lab);
    }
    if success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_part(lab: &Lab) -> bool {
    let mut failed_before = false;
    for attempt in 1..=TRIES {
        match lab.run_self(std::env::args().skip(1)) {
            Ok(0) => return true,
            Ok(_) if failed_before => return false,
            Ok(_) => {
                failed_before = true;
                eprintln!("lab: cases of this part failed; it runs once more, in a new lab");
            }
            Err(LabError::HostDied { why, .. }) if attempt < TRIES => {
                eprintln!("lab: {why}; this part of the suite runs again (try {} of {TRIES})", attempt + 1);
            }
            Err(error) => {
                eprintln!("{error}");
                return false;
            }
        }
    }
    false
}
