//! The report on the terminal.

use super::result::{Results, Row};
use std::fmt::Write;

/// What stockade is to reach: a case and a metric, and how they are judged. Firecracker 1.17 needs 0.27 s on this
/// clock and 2,282 exits merely to boot an untuned kernel to an init that reboots at once; Kata Containers 4.1 takes
/// 112 MiB, and 1.34 s from `ctr run` to its end.
const GOALS: [(&str, &str, Goal); 12] = [
    ("run-echo", "time", Goal::AtMost(0.27)),
    ("run-echo-exits", "exits", Goal::AtMost(2282.0)),
    ("idle", "pss", Goal::AtMost(50.0)),
    ("exec-true", "time", Goal::TimesRuncs(2.0)),
    ("create-start-net", "added", Goal::AtMost(0.015)),
    ("net-tcp-out", "throughput", Goal::ShareOfRuncs(0.5)),
    ("net-tcp-in", "throughput", Goal::ShareOfRuncs(0.5)),
    ("ctr-run-echo", "time", Goal::AtMost(0.6)),
    ("ctr-second", "time", Goal::TimesRuncs(2.0)),
    ("ctr-idle-1", "pss", Goal::AtMost(50.0)),
    ("ctr-idle-5", "pss", Goal::AtMost(50.0)),
    ("ctr-idle-20", "pss", Goal::AtMost(50.0)),
];

#[derive(Clone, Copy)]
enum Goal {
    AtMost(f64),
    /// At most so many times runc's figure, if that was measured.
    TimesRuncs(f64),
    /// At least this share of it.
    ShareOfRuncs(f64),
}

/// The goal for a row, if it has one: a limit, and whether the row is to be at or below it.
pub fn goal(results: &Results, row: &Row) -> Option<(f64, bool)> {
    let same = |goal: &&(&str, &str, Goal)| {
        row.runtime == "stockade" && (goal.0, goal.1) == (&row.case, &row.metric)
    };
    let runcs = || results.median(&row.case, "runc", &row.metric);
    match GOALS.iter().find(same)?.2 {
        Goal::AtMost(limit) => Some((limit, true)),
        Goal::TimesRuncs(times) => Some((runcs()? * times, true)),
        Goal::ShareOfRuncs(times) => Some((runcs()? * times, false)),
    }
}

/// The table of all rows, then the notes.
pub fn render(results: &Results) -> String {
    let mut lines =
        vec![["case", "runtime", "metric", "unit", "runs", "min", "median", "max", "goal"].map(String::from)];
    for row in &results.rows {
        lines.push([
            row.case.clone(),
            row.runtime.clone(),
            row.metric.clone(),
            row.unit.clone(),
            row.runs.to_string(),
            figure(row.min, &row.unit),
            figure(row.median, &row.unit),
            figure(row.max, &row.unit),
            verdict(results, row),
        ]);
    }
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max()
    };
    let mut text = String::new();
    for line in &lines {
        for (column, cell) in line.iter().enumerate() {
            let width = width(column).unwrap_or(0);
            // Words to the left, figures to the right.
            let _ = match column {
                0..4 => write!(text, "{cell:<width$}  "),
                4..8 => write!(text, "{cell:>width$}  "),
                _ => write!(text, "{cell}"),
            };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    for note in &results.notes {
        let _ = writeln!(text, "note: {note}");
    }
    text
}

fn verdict(results: &Results, row: &Row) -> String {
    let Some((goal, at_most)) = goal(results, row) else { return String::new() };
    let (sign, reached) = match at_most {
        true => ("≤", row.median <= goal),
        false => ("≥", row.median >= goal),
    };
    format!("{sign} {} {}", figure(goal, &row.unit), if reached { "reached" } else { "MISSED" })
}

/// A value with the digits that mean something in its unit.
pub fn figure(value: f64, unit: &str) -> String {
    match unit {
        "virtual_s" => format!("{value:.4}"),
        "MiB" => format!("{value:.1}"),
        "virtual_us" | "per_MiB" => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_told_as_reached_or_missed_for_stockade_alone() {
        let mut results = Results::default();
        results.add("run-echo", "stockade", "time", "virtual_s", &[0.25]);
        results.add("run-echo", "runc", "time", "virtual_s", &[0.25]);
        results.add("idle", "stockade", "pss", "MiB", &[60.0]);
        let text = render(&results);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].ends_with("≤ 0.2700 reached"), "{text}");
        assert!(lines[2].ends_with("0.2500"), "{text}");
        assert!(lines[3].ends_with("≤ 50.0 MISSED"), "{text}");
    }

    #[test]
    fn a_goal_may_depend_on_what_runc_does() {
        let mut results = Results::default();
        results.add("exec-true", "stockade", "time", "virtual_s", &[0.1]);
        assert!(!render(&results).contains('≤'));
        results.add("exec-true", "runc", "time", "virtual_s", &[0.06]);
        results.add("net-tcp-in", "stockade", "throughput", "MiB_per_virtual_s", &[499.0]);
        results.add("net-tcp-in", "runc", "throughput", "MiB_per_virtual_s", &[1000.0]);
        let text = render(&results);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].ends_with("≤ 0.1200 reached"), "{text}");
        assert!(lines[3].ends_with("≥ 500 MISSED"), "{text}");
    }
}
