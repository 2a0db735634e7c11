//! The benchmarks: what a start costs, what it takes, and how that compares.
//!
//! They run in the lab on its virtual clock, where a time is a count of instructions: the same to about 1%
//! from run to run, whatever else the machine does. What that clock cannot show is the price of a VM exit, so
//! exits are counted beside it. Where only memory is asked for, that clock is left out. Each figure is the
//! minimum, median and maximum of several runs after one that warms the caches up. A case that fails, as when a run
//! stalls, is tried once more, and the report says so.

mod containerd;
mod cri;
mod exits;
mod image;
mod lifecycle;
mod memory;
mod network;
mod plot;
pub mod probe;
mod program;
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
    /// Only these cases; all if there are none.
    pub cases: Vec<String>,
}

/// A question that is put to each runtime that it makes sense for.
pub struct Case {
    /// Its name; the figures' cases begin with it, or say what it is about in more than one of them.
    pub name: &'static str,
    /// What it finds out.
    pub about: &'static str,
    asks: Asks,
    measure: Measure,
    /// Whether what it finds is a time.
    times: bool,
}

impl Case {
    /// Finds no times.
    const fn of_memory(self) -> Self {
        Self { times: false, ..self }
    }
}

/// The cases, in the order in which they run.
pub const CASES: &[Case] = &[
    case("run-echo", "run of echo, and its phases", all, run_busybox_echo),
    case("run-echo-exits", "VM exits of that", in_vms, exits::measure),
    case("create-start", "create and start", all, lifecycle::create_and_start),
    case("exec-true", "exec of true", all, lifecycle::exec),
    case("delete", "delete of what has ended", all, lifecycle::delete),
    case("idle", "memory of a container", all, memory::container).of_memory(),
    case("idle-exec", "memory of an exec", all, memory::exec).of_memory(),
    case("run-image", "run of echo from an image", no_other_vms, image::measure),
    case("create-start-net", "create and start with an interface", all, network::start),
    case("run-echo-net", "run of echo with an interface", all, network::run),
    case("net-tcp", "TCP throughput", not_crun, network::throughput),
    case("net-latency", "round trips", not_crun, network::latency),
    case("net-packets", "64-byte datagrams", not_crun, network::packets),
    case("ctr-run-echo", "ctr run of echo", has_shim, containerd::run),
    case("ctr-second", "a sandbox's next container", has_shim, containerd::second),
    case("ctr-idle", "memory of many sandboxes", has_shim, containerd::idle).of_memory(),
    case("cri-pod", "a pod with its first and second container", has_shim, cri::pod),
    case("cri-idle", "memory of many pods", has_shim, cri::idle).of_memory(),
];

impl Plan {
    /// Whether some of it is times, for which there is the virtual clock. Memory alone is the same without, and many
    /// sandboxes come up sooner.
    pub fn times(&self) -> bool {
        CASES.iter().any(|case| self.wants(case) && case.times)
    }

    fn wants(&self, case: &Case) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|name| name == case.name)
    }
}

type Asks = fn(&Runtime) -> bool;
type Measure = fn(&Plan, &Runtime, &mut Results) -> Result<(), String>;

const fn case(name: &'static str, about: &'static str, asks: Asks, measure: Measure) -> Case {
    Case { name, about, asks, measure, times: true }
}

fn all(_: &Runtime) -> bool {
    true
}

fn in_vms(runtime: &Runtime) -> bool {
    runtime.has_vm
}

fn no_other_vms(runtime: &Runtime) -> bool {
    !runtime.has_vm || runtime.name == "stockade"
}

/// With a network crun's containers are runc's: the kernel's.
fn not_crun(runtime: &Runtime) -> bool {
    runtime.name != "crun"
}

fn has_shim(runtime: &Runtime) -> bool {
    containerd::kind(runtime).is_some()
}

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
    for case in CASES.iter().filter(|case| plan.wants(case)) {
        for runtime in chosen.iter().filter(|runtime| (case.asks)(runtime)) {
            eprintln!("bench: {}, {}: {}", case.name, runtime.name, case.about);
            complete &= try_twice(case, plan, runtime, &mut results);
        }
    }
    print!("{}", table::render(&results));
    fs::write(out.join("results.json"), results.to_json()).or_say("write results.json")?;
    fs::write(out.join("bench.svg"), plot::render(&results)).or_say("write bench.svg")?;
    Ok(complete)
}

/// Measures a case, and if it fails once more from its beginning; the report says so. False when it failed twice.
fn try_twice(case: &Case, plan: &Plan, runtime: &Runtime, results: &mut Results) -> bool {
    let rows = results.rows.len();
    for last in [false, true] {
        let Err(why) = (case.measure)(plan, runtime, results) else { return true };
        results.rows.truncate(rows);
        let what = if last { "not measured" } else { "repeated" };
        let note = format!("{}, {}: {what}: {why}", case.name, runtime.name);
        eprintln!("bench: {note}");
        results.notes.push(note);
    }
    false
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
fn run_busybox_echo(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    run_echo("run-echo", plan, runtime, &Bundle::new(&["echo", runtimes::GREETING])?, results)
}

fn run_echo(
    case: &str,
    plan: &Plan,
    runtime: &Runtime,
    bundle: &Bundle,
    results: &mut Results,
) -> Result<(), String> {
    runtime.run_echo(bundle, None)?;
    let mut times = Vec::new();
    for _ in 0..plan.runs {
        times.push(runtime.run_echo(bundle, None)?.seconds());
    }
    results.add(case, &runtime.name, "time", "virtual_s", &times);
    if runtime.has_timeline {
        timeline::measure(case, plan, runtime, bundle, results)?;
    }
    Ok(())
}
