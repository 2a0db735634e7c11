//! `stockade-conformance`: test suites of runc and Podman, run in the lab against stockade, runc and crun.
//!
//! Started outside, it fetches a suite, runs itself in the lab once for each runtime, and prints the table. Called
//! `recvtty`, it is the receiver of terminals that runc's suite asks for.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use stockade_tests::conformance::{self, Plan, RUNTIMES, SUITES, Suite, recvtty};
use stockade_tests::lab;

const USAGE: &str = "\
stockade-conformance [--suite NAME] [--runtime NAME] [--filter REGEX] [--stage DIR] [--out DIR] [--report]
    [FILE.bats...]

  --suite NAME    whose: runc (the default), runc-systemd (its, with cgroups of systemd's), podman
  --runtime NAME  only this one of stockade, runc and crun; more than once: only these
  --filter REGEX  only cases whose name matches
  --stage DIR     bin/stockade and lib/stockade to test (default $STOCKADE_STAGE, <target directory>/stage)
  --out DIR       for what each file of the suite said (default <target directory>/conformance)
  --report        runs nothing: the table is of what the last runs left
  FILE.bats       only these files of the suite";

fn main() -> ExitCode {
    lab::init_if_booted();
    let mut words = std::env::args();
    let name = words.next().unwrap_or_default();
    let result = match Path::new(&name).file_name() {
        Some(name) if name == recvtty::NAME => recvtty::main(words).map(|()| true),
        _ => parse(words).and_then(|plan| match lab::inside() {
            true => conformance::run_suite(&plan).map(|()| true),
            false => conformance::compare(&plan),
        }),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("conformance: {why}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Plan, String> {
    let exe = std::env::current_exe().map_err(|error| format!("find this executable: {error}"))?;
    // <target directory>/<target triple>/<profile>/stockade-conformance
    let target = exe.ancestors().nth(3).unwrap_or(Path::new("target")).to_path_buf();
    let stage = std::env::var_os("STOCKADE_STAGE").map_or_else(|| target.join("stage"), PathBuf::from);
    let mut plan = Plan {
        suite: SUITES[0],
        runtimes: Vec::new(),
        files: Vec::new(),
        filter: None,
        stage,
        out: target.join("conformance"),
        report_only: false,
    };
    while let Some(word) = words.next() {
        if word == "--help" {
            return Err(USAGE.into());
        }
        if !word.starts_with("--") {
            plan.files.push(word);
            continue;
        }
        if word == "--report" {
            plan.report_only = true;
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{word} needs a value\n{USAGE}"))?;
        match word.as_str() {
            "--runtime" if RUNTIMES.contains(&value.as_str()) => plan.runtimes.push(value),
            "--runtime" => return Err(format!("--runtime {value}: not one of {}", RUNTIMES.join(", "))),
            "--suite" => {
                let names = SUITES.map(|suite| suite.name).join(", ");
                let suite = Suite::by_name(&value).ok_or(format!("--suite {value}: not one of {names}"))?;
                plan.suite = suite;
            }
            "--filter" => plan.filter = Some(value),
            "--stage" => plan.stage = value.into(),
            "--out" => plan.out = value.into(),
            _ => return Err(format!("unknown argument {word}\n{USAGE}")),
        }
    }
    if plan.runtimes.is_empty() {
        plan.runtimes = RUNTIMES.map(String::from).to_vec();
    }
    Ok(plan)
}
