//! The suite in the lab: in parts, each in a lab of its own, two at a time because a lab keeps one CPU busy.
//!
//! The emulator's SVM is not perfect: about once in a hundred VM starts the lab's *host* kernel dies of a stack
//! or a register that QEMU left wrong. Nothing that is tested can do that from user space, and nothing after it
//! counts, so a part whose host died is run again, which is said each time, and after [`TRIES`] counts as failed.
//! A case that fails has failed. With usable KVM none of this is in use.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use stockade_tests::lab::{Lab, LabError};

use super::calls;

/// How often a part may run. Three deaths in a row are no accident of the emulator's.
const TRIES: usize = 4;

/// Names the part to run; without it all cases run.
const PART: &str = "STOCKADE_E2E_PART";

/// The parts, each a list of how its cases' names begin; what begins with a longer one belongs there. The smaller
/// a part, the less is lost with its host; each costs a boot of the lab, some five seconds. Long ones come first,
/// so that no CPU waits for them in the end.
const PARTS: &[&[&str]] = &[
    &["failure::fifty_kills"],
    &["network::thirty", "network::kills"],
    &["network::"],
    &["endurance::fifty_runs"],
    &["endurance::"],
    &["attacks::"],
    &["image::"],
    &["podman::"],
    &["docker::"],
    &["buildah::"],
    &["cri::"],
    &["cri::volumes::", "cri::streams::", "cri::users::"],
    &["containerd::"],
    &["stdio::"],
    &["failure::"],
    &["lifecycle::", "shared::"],
    &["mounts::"],
    &["fields::"],
    &["commands::"],
    &["cgroup::"],
    &["process::"],
    &["bad_input::", "check::", "install::", "isolation::", "operations::", "tty::", "wall::"],
    &["systemd::"],
    &["limits::", "grow::"],
    &["exec::"],
];

fn asked() -> Option<usize> {
    std::env::var(PART).ok().and_then(|part| part.parse().ok())
}

/// Whether a case belongs to the part that this run was asked for.
pub fn is_asked_for(name: &str) -> bool {
    let Some(asked) = asked() else { return true };
    let begins = |part: &[&str]| part.iter().filter(|start| name.starts_with(**start)).map(|s| s.len()).max();
    let part = PARTS.iter().enumerate().max_by_key(|(_, part)| begins(part));
    assert!(part.is_some_and(|(_, part)| begins(part).is_some()), "no part of the suite has {name}");
    part.is_some_and(|(index, _)| index == asked)
}

/// Runs the suite, or with a `filter` the cases that it names, in labs like this one.
pub fn run_in_labs(lab: &Lab, filter: Option<&str>) -> ExitCode {
    let success = match (filter, asked()) {
        (None, None) => run_all(),
        _ => run_part(lab),
    };
    if success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs this program again for each part, and shows what each said when it has ended.
fn run_all() -> bool {
    let next = AtomicUsize::new(0);
    let failed = AtomicUsize::new(0);
    let output = Mutex::new((io::stdout(), BTreeSet::new()));
    let work = || {
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            let Some(names) = PARTS.get(part) else { return };
            let begin = Instant::now();
            let ended = Command::new(std::env::current_exe().expect("path of this program"))
                .args(std::env::args().skip(1))
                .env(PART, part.to_string())
                .stdin(Stdio::null())
                .output()
                .expect("run this program");
            let (output, used) = &mut *output.lock().expect("nothing panics while it is held");
            used.extend(calls::told(&String::from_utf8_lossy(&ended.stdout)));
            // A reader that has gone does not stop the suite.
            let _ = output.write_all(&ended.stdout).and_then(|()| output.flush());
            let _ = io::stderr().write_all(&ended.stderr);
            let how = if ended.status.success() { "ok" } else { "FAILED" };
            eprintln!("lab: part {} took {} s: {how}", names.join(" "), begin.elapsed().as_secs());
            if !ended.status.success() {
                failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
    });
    let (_, used) = output.into_inner().expect("nothing panics while it is held");
    // Where cases were left out or failed, this says nothing new.
    failed.into_inner() == 0 && (std::env::args().len() > 1 || calls::compare(used))
}

fn run_part(lab: &Lab) -> bool {
    for attempt in 1..=TRIES {
        match lab.run_self(std::env::args().skip(1)) {
            Ok(code) => return code == 0,
            Err(LabError::HostDied { why, console }) if attempt < TRIES => {
                eprintln!("lab: {why}; this part of the suite runs again (try {} of {TRIES})", attempt + 1);
                eprintln!("{console}");
            }
            Err(error) => {
                eprintln!("{error}");
                return false;
            }
        }
    }
    false
}
