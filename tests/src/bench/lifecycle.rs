//! The commands of a container's life one by one, as callers of a runtime use them.

use super::program;
use super::runtimes::{Bundle, Idle, Runtime};
use super::{Plan, result::Results};

/// `exec` of `true` in a container that runs, process start to process exit.
pub fn exec(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let bundle = Bundle::idle()?;
    let idle = Idle::start(runtime, &bundle, "bench-exec")?;
    program::succeed(&mut idle.exec(&["true"]))?;
    let mut times = Vec::new();
    for _ in 0..plan.runs {
        times.push(program::succeed(&mut idle.exec(&["true"]))?.seconds());
    }
    results.add("exec-true", &runtime.name, "time", "virtual_s", &times);
    Ok(())
}

/// `create` and `start`, apart and together.
pub fn create_and_start(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let samples = starts(plan, runtime, &Bundle::idle()?)?;
    let mut add = |metric: &str, value: fn(&Start) -> f64| {
        let values: Vec<f64> = samples.iter().map(value).collect();
        results.add("create-start", &runtime.name, metric, "virtual_s", &values);
    };
    add("time", |start| start.create + start.start);
    add("time.create", |start| start.create);
    add("time.start", |start| start.start);
    Ok(())
}

/// Seconds that both commands took.
pub struct Start {
    /// `create`.
    pub create: f64,
    /// `start`.
    pub start: f64,
}

/// Creates and starts a container `plan.runs` times, after once to warm up.
pub fn starts(plan: &Plan, runtime: &Runtime, bundle: &Bundle) -> Result<Vec<Start>, String> {
    let id = "bench-create";
    let once = || {
        let result = runtime.create(bundle, id).and_then(|(_, created)| {
            let started = program::succeed(&mut runtime.command(&["start", id]))?;
            Ok(Start { create: created.seconds(), start: started.seconds() })
        });
        runtime.delete_by_force(id);
        result
    };
    once()?;
    (0..plan.runs).map(|_| once()).collect()
}

/// `delete` of a container that has ended by itself.
pub fn delete(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let bundle = Bundle::new(&["true"])?;
    let id = "bench-delete";
    let once = || {
        let result = runtime.create(&bundle, id).and_then(|(pid, _)| {
            program::succeed(&mut runtime.command(&["start", id]))?;
            program::wait_until_gone(pid)?;
            Ok(program::succeed(&mut runtime.command(&["delete", id]))?.seconds())
        });
        if result.is_err() {
            runtime.delete_by_force(id);
        }
        result
    };
    once()?;
    let times = (0..plan.runs).map(|_| once()).collect::<Result<Vec<_>, String>>()?;
    results.add("delete", &runtime.name, "time", "virtual_s", &times);
    Ok(())
}
