//! The phases of stockade's start, from the timeline it writes when `STOCKADE_TIMELINE` names a file.
//!
//! A phase lies between two marks and bears the name of the later one. The measuring process adds the first
//! mark (before fork) and the last (after wait), so that the phases add up to the whole time.

use super::runtimes::{Bundle, Runtime};
use super::{Context, Plan, result::Results};
use serde::Deserialize;
use std::path::Path;

#[derive(Deserialize)]
struct Timeline {
    marks: Vec<Mark>,
}

#[derive(Deserialize)]
struct Mark {
    name: String,
    ns: u64,
}

/// Measures the phases of `plan.runs` runs and adds a row for each.
pub fn measure(
    case: &str,
    plan: &Plan,
    runtime: &Runtime,
    bundle: &Bundle,
    results: &mut Results,
) -> Result<(), String> {
    let folder = tempfile::tempdir().or_say("make a temporary folder")?;
    let file = folder.path().join("timeline.json");
    let mut all: Vec<Vec<(String, f64)>> = Vec::new();
    for _ in 0..plan.runs {
        let run = runtime.run_echo(bundle, Some(&file))?;
        all.push(phases(&file, run.span_ns)?);
    }
    let names: Vec<String> = all.first().into_iter().flatten().map(|(name, _)| name.clone()).collect();
    for name in names {
        let samples: Vec<f64> =
            all.iter().flatten().filter(|(other, _)| *other == name).map(|(_, time)| *time).collect();
        results.add(case, &runtime.name, &format!("phase.{name}"), "virtual_s", &samples);
    }
    Ok(())
}

fn phases(file: &Path, (before, after): (u64, u64)) -> Result<Vec<(String, f64)>, String> {
    let text = std::fs::read_to_string(file).or_say(format!("read the timeline {}", file.display()))?;
    let timeline: Timeline = serde_json::from_str(&text).or_say("read the timeline")?;
    Ok(between(timeline.marks, before, after))
}

fn between(mut marks: Vec<Mark>, before: u64, after: u64) -> Vec<(String, f64)> {
    marks.sort_by_key(|mark| mark.ns);
    marks.push(Mark { name: "process_end".into(), ns: after });
    let mut last = before;
    marks
        .into_iter()
        .map(|mark| {
            let seconds = mark.ns.saturating_sub(last) as f64 / 1e9;
            last = mark.ns.max(last);
            (mark.name, seconds)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_to_the_whole_run() {
        let marks = [("agent", 3_000_000_000), ("vmm", 1_500_000_000)];
        let marks = marks.map(|(name, ns)| Mark { name: name.into(), ns }).into();
        let phases = between(marks, 1_000_000_000, 5_000_000_000);
        let expected = [("vmm", 0.5), ("agent", 1.5), ("process_end", 2.0)];
        assert_eq!(phases, expected.map(|(name, seconds)| (name.to_string(), seconds)));
    }
}
