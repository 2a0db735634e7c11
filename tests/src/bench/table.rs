//! The report on the terminal.

use super::result::{Results, Row};
use std::fmt::Write;

/// What stockade is to reach: case, metric, at most. Firecracker 1.17 needs 0.27 s on this clock and 2,282
/// exits merely to boot an untuned kernel to an init that reboots at once; Kata Containers 4.1 takes 112 MiB.
pub const GOALS: [(&str, &str, f64); 3] =
    [("run-echo", "time", 0.27), ("run-echo-exits", "exits", 2282.0), ("idle", "pss", 50.0)];

/// The goal for a row, if it has one.
pub fn goal(row: &Row) -> Option<f64> {
    let same =
        |goal: &&(&str, &str, f64)| row.runtime == "stockade" && (goal.0, goal.1) == (&row.case, &row.metric);
    GOALS.iter().find(same).map(|goal| goal.2)
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
            verdict(row),
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

fn verdict(row: &Row) -> String {
    match goal(row) {
        Some(goal) if row.median <= goal => format!("≤ {} reached", figure(goal, &row.unit)),
        Some(goal) => format!("≤ {} MISSED", figure(goal, &row.unit)),
        None => String::new(),
    }
}

/// A value with the digits that mean something in its unit.
pub fn figure(value: f64, unit: &str) -> String {
    match unit {
        "virtual_s" => format!("{value:.4}"),
        "MiB" => format!("{value:.1}"),
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
}
