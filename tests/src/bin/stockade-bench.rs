//! `stockade-bench`: the benchmarks, on the lab's virtual clock.
//!
//! Started outside, it runs itself in the lab and brings the results back; the table appears as it is made.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use stockade_tests::bench::{self, CASES, Plan, probe};
use stockade_tests::lab::{self, Clock, Lab};

const USAGE: &str = "\
stockade-bench [--runs N] [--runtime NAME] [--stage DIR] [--out DIR] [CASE...]

  --runs N        measured runs for each figure, after one that warms up (default 5, at least 1)
  --runtime NAME  only this one of stockade, runc, crun and whatever else is found
  --stage DIR     bin/stockade and lib/stockade to measure (default $STOCKADE_STAGE, <target directory>/stage)
  --out DIR       for results.json and bench.svg (default <target directory>/bench)
  CASE            only these cases:";

/// Wall-clock limit for all of it.
const LIMIT: Duration = Duration::from_secs(1800);

struct Arguments {
    plan: Plan,
    stage: PathBuf,
    out: PathBuf,
}

fn main() -> ExitCode {
    lab::init_if_booted();
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [role, address, count] = &words[..]
        && role == probe::ROLE
    {
        return round_trips(address, count);
    }
    let result = parse(words.into_iter()).and_then(|arguments| match lab::inside() {
        true => bench::measure(&arguments.plan, Path::new("/out")),
        false => in_the_lab(&arguments),
    });
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("bench: {why}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let exe = std::env::current_exe().map_err(|error| format!("find this executable: {error}"))?;
    // <target directory>/<target triple>/<profile>/stockade-bench
    let target = exe.ancestors().nth(3).unwrap_or(Path::new("target")).to_path_buf();
    let stage = std::env::var_os("STOCKADE_STAGE").map_or_else(|| target.join("stage"), PathBuf::from);
    let plan = Plan { runs: 5, runtime: None, cases: Vec::new() };
    let mut parsed = Arguments { plan, stage, out: target.join("bench") };
    while let Some(argument) = arguments.next() {
        if argument == "--help" {
            return Err(usage());
        }
        if !argument.starts_with("--") {
            if CASES.iter().all(|case| case.name != argument) {
                return Err(format!("there is no case {argument}\n{}", usage()));
            }
            parsed.plan.cases.push(argument);
            continue;
        }
        let value = arguments.next().ok_or_else(|| format!("{argument} needs a value\n{}", usage()))?;
        match argument.as_str() {
            "--runs" => {
                let runs = value.parse().ok().filter(|runs| *runs > 0);
                parsed.plan.runs =
                    runs.ok_or_else(|| format!("--runs {value}: not a number of at least 1"))?;
            }
            "--runtime" => parsed.plan.runtime = Some(value),
            "--stage" => parsed.stage = value.into(),
            "--out" => parsed.out = value.into(),
            _ => return Err(format!("unknown argument {argument}\n{}", usage())),
        }
    }
    Ok(parsed)
}

fn usage() -> String {
    let cases: String = CASES.iter().map(|case| format!("\n    {:<18}{}", case.name, case.about)).collect();
    format!("usage:\n{USAGE}{cases}")
}

/// In a container: what a case there asks for.
fn round_trips(address: &str, count: &str) -> ExitCode {
    let count = count.parse().unwrap_or_default();
    match probe::round_trips(address, count) {
        Ok(nanoseconds) => {
            println!("{nanoseconds}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("round trips to {address}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Boots the lab, on its virtual clock if times are asked for, and measures there; once more when the lab itself fails.
fn in_the_lab(arguments: &Arguments) -> Result<bool, String> {
    let clock = if arguments.plan.times() { Clock::Virtual } else { Clock::Fast };
    let mut lab = Lab { clock, limit: LIMIT, out: Some(arguments.out.clone()), ..Lab::default() };
    if arguments.stage.is_dir() {
        lab.payload.add(&arguments.stage, "");
    } else {
        eprintln!("bench: no {}, so stockade itself is not measured", arguments.stage.display());
    }
    let result = lab.run_self(std::env::args().skip(1)).or_else(|error| {
        eprintln!("{error}\nbench: the lab failed, trying once more");
        lab.run_self(std::env::args().skip(1))
    });
    let code = result.map_err(|error| error.to_string())?;
    eprintln!("bench: results.json and bench.svg are in {}", arguments.out.display());
    Ok(code == 0)
}
