//! The benchmarks: what a start costs, what it takes, and how that compares.
//!
//! They run in the lab on its virtual clock, where a time is a count of instructions: the same to about 1%
//! from run to run, whatever else the machine does. What that clock cannot show is the price of a VM exit, so
//! exits are counted beside it. Each figure is the minimum, median and maximum of several runs after one that
//! warms the caches up. A run that stalls is ended at its limit and tried once more, and the report says so.

mod exits;
mod memory;
mod plot;
mod result;
mod runtimes;
mod table;
mod timeline;

use result::Results;
use runtimes::{Bundle, Runtime};
use std::fmt::Display;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Measured runs for each figure.
    pub runs: usize,
    /// Only this runtime, by its name.
    pub runtime: Option<String>,
    /// Only this case.
    pub case: Option<String>,
}

/// The cases, in the order in which they run.
pub const CASES: [&str; 3] = ["run-echo", "run-echo-exits", "idle"];

trait Context<T> {
    /// Puts what was to be done before the reason why it could not be.
    fn or_say(self, what: impl Display) -> Result<T, String>;
}

impl<T, E: Display> Context<T> for Result<T, E> {
    fn or_say(self, what: impl Display) -> Result<T, String> {
        self.map_err(|error| format!("{what}: {error}"))
    }
}

/// Measures, in the lab. Prints the table and leaves `results.json` and `bench.svg` in `out`. False when a
/// runtime could not be measured.
pub fn measure(plan: &Plan, out: &Path) -> Result<bool, String> {
    let found = Runtime::all_on_path();
    let chosen: Vec<Runtime> = found
        .into_iter()
        .filter(|found| plan.runtime.as_ref().is_none_or(|name| *name == found.name))
        .collect();
    if chosen.is_empty() {
        return Err(format!("no runtime {} on PATH", plan.runtime.as_deref().unwrap_or("at all")));
    }
    settle()?;
    let mut results = Results::default();
    let mut complete = true;
    for runtime in &chosen {
        for case in CASES.into_iter().filter(|case| plan.case.as_deref().is_none_or(|only| only == *case)) {
            eprintln!("bench: {case}, {}", runtime.name);
            let measured = match case {
                "run-echo" => run_echo(plan, runtime, &mut results),
                "run-echo-exits" if runtime.has_vm => exits::measure(plan, runtime, &mut results),
                "idle" => memory::measure(plan, runtime, &mut results),
                _ => Ok(()),
            };
            if let Err(why) = measured {
                eprintln!("bench: {case}, {}: {why}", runtime.name);
                complete = false;
            }
        }
    }
    print!("{}", table::render(&results));
    fs::write(out.join("results.json"), results.to_json()).or_say("write results.json")?;
    fs::write(out.join("bench.svg"), plot::render(&results)).or_say("write bench.svg")?;
    Ok(complete)
}

/// Waits until the host is a while past its boot: for its first second or so it is slower by much (runc takes
/// 0.16 s instead of 0.09 s, however often). Costs nothing: an idle virtual clock jumps.
fn settle() -> Result<(), String> {
    const SETTLED: Duration = Duration::from_secs(15);
    let clock = nix::time::ClockId::CLOCK_BOOTTIME;
    let uptime = nix::time::clock_gettime(clock).or_say("read the host's uptime")?;
    std::thread::sleep(SETTLED.saturating_sub(uptime.into()));
    Ok(())
}

/// Process start to process exit of `run` with `echo` in busybox, and for stockade the phases between.
fn run_echo(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let bundle = Bundle::new(&["echo", runtimes::GREETING])?;
    runtime.run_echo(&bundle, None, results)?;
    let mut times = Vec::new();
    for _ in 0..plan.runs {
        times.push(runtime.run_echo(&bundle, None, results)?.seconds);
    }
    results.add("run-echo", &runtime.name, "time", "virtual_s", &times);
    if runtime.has_timeline {
        timeline::measure(plan, runtime, &bundle, results)?;
    }
    Ok(())
}
