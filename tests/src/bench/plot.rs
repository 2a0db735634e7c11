//! The report as a picture: one SVG with a panel a question, horizontal bars, and the goals as lines.

use super::result::{Results, Row};
use super::table::{figure, goal};
use std::fmt::Write;

// In SVG user units, which browsers show as pixels.
const WIDTH: f64 = 960.0;
const LEFT: f64 = 190.0;
const RIGHT: f64 = 120.0;
const BAR: f64 = 22.0;
const PITCH: f64 = 34.0;

/// Told apart by people with any kind of colour vision (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442"];

/// Title, case and beginning of the metric of each panel; below the first come the phases.
const PANELS: [(&str, &str, &str); 22] = [
    ("run of echo, process start to exit", "run-echo", "time"),
    ("VM exits of that run", "run-echo-exits", "exits"),
    ("VM exits of that run, by reason", "run-echo-exits", "reason."),
    ("create and start", "create-start", "time"),
    ("exec of true in a container that runs", "exec-true", "time"),
    ("delete of a container that has ended", "delete", "time"),
    ("host memory of an idle container (PSS)", "idle", "pss"),
    ("what it grows by with an idle exec (PSS)", "idle-exec", "growth"),
    ("run of echo from an image in a warm store", "run-image", "time"),
    ("create and start with a network interface", "create-start-net", "time"),
    ("run of echo with a network interface", "run-echo-net", "time"),
    ("TCP from the container to the host", "net-tcp-out", "throughput"),
    ("TCP from the host to the container", "net-tcp-in", "throughput"),
    ("one byte to the host and back", "net-latency", "round_trip"),
    ("64-byte datagrams from the container", "net-packets", "rate"),
    ("ctr run --rm of echo", "ctr-run-echo", "time"),
    ("the same in a sandbox that runs", "ctr-second", "time"),
    ("what a sandbox grows by with a second container (PSS)", "ctr-second", "pss"),
    ("host memory of an idle sandbox under containerd (PSS)", "ctr-idle-1", "pss"),
    ("each of 5", "ctr-idle-5", "pss"),
    ("each of 20", "ctr-idle-20", "pss"),
    ("VM exits of a MiB from the container to the host", "net-tcp-out", "exits"),
];

/// The whole picture.
pub fn render(results: &Results) -> String {
    let mut body = String::new();
    let mut y = 20.0;
    for (title, case, metric) in PANELS {
        let rows: Vec<&Row> = results.of(case, metric).collect();
        y = panel(&mut body, y, title, results, &rows);
        if (case, metric) == ("run-echo", "time") {
            y = phases(&mut body, y, results);
        }
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" width=\"{WIDTH}\" height=\"{y}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"{WIDTH}\" height=\"{y}\" fill=\"white\"/>\n\
         {body}</svg>\n"
    )
}

/// One bar a row from zero to its median, a whisker from minimum to maximum. Returns where the next begins.
fn panel(body: &mut String, top: f64, title: &str, results: &Results, rows: &[&Row]) -> f64 {
    let goal = |row: &Row| goal(results, row).map(|(goal, _)| goal);
    let most = rows.iter().map(|row| row.max.max(goal(row).unwrap_or(0.0))).fold(0.0, f64::max);
    let Some(unit) = rows.first().map(|row| row.unit.clone()).filter(|_| most > 0.0) else { return top };
    let x = |value: f64| LEFT + value / most * (WIDTH - LEFT - RIGHT);
    let mut y = heading(body, top, title, &unit);
    for row in rows {
        let colour = if row.runtime == "stockade" { COLOURS[0] } else { "#999999" };
        let name = match row.metric.split_once('.') {
            Some((_, part)) => format!("{} {part}", row.runtime),
            None => row.runtime.clone(),
        };
        label(body, LEFT - 8.0, y, "end", &name);
        rectangle(body, (LEFT, y), x(row.median) - LEFT, colour, &name);
        let middle = y + BAR / 2.0;
        let (low, high) = (x(row.min), x(row.max));
        let _ = writeln!(body, "<path d=\"M{low:.1} {middle}H{high:.1}\" stroke=\"black\"/>");
        let mut value = figure(row.median, &row.unit);
        if let Some(goal) = goal(row) {
            let at = x(goal);
            let _ = writeln!(
                body,
                "<path d=\"M{at:.1} {}V{}\" stroke=\"#d55e00\" stroke-width=\"2\"/>",
                y - 4.0,
                y + BAR + 4.0
            );
            let _ = write!(value, " (goal {})", figure(goal, &row.unit));
        }
        let after = high.max(goal(row).map_or(0.0, x));
        label(body, after + 6.0, y, "start", &value);
        y += PITCH;
    }
    y + 16.0
}

/// The phases of stockade's start in one bar, with a legend below it.
fn phases(body: &mut String, top: f64, results: &Results) -> f64 {
    let rows: Vec<&Row> = results.of("run-echo", "phase.").collect();
    let whole: f64 = rows.iter().map(|row| row.median).sum();
    if whole <= 0.0 {
        return top;
    }
    let mut y = heading(body, top, "phases of stockade's run, each named by how it ends", "virtual_s");
    let scale = (WIDTH - LEFT - RIGHT) / whole;
    let mut x = LEFT;
    for (row, colour) in rows.iter().zip(COLOURS.iter().cycle()) {
        rectangle(body, (x, y), row.median * scale, colour, &row.metric);
        x += row.median * scale;
    }
    y += PITCH;
    for (row, colour) in rows.iter().zip(COLOURS.iter().cycle()) {
        let name = row.metric.trim_start_matches("phase.").replace('_', " ");
        rectangle(body, (LEFT, y), BAR, colour, &name);
        label(body, LEFT + BAR + 8.0, y, "start", &format!("{} s  {name}", figure(row.median, &row.unit)));
        y += BAR + 4.0;
    }
    y + 28.0
}

fn heading(body: &mut String, top: f64, title: &str, unit: &str) -> f64 {
    let unit = match unit {
        "virtual_s" => "s of the virtual clock, 2 ns an instruction",
        "virtual_us" => "µs of the virtual clock",
        "MiB_per_virtual_s" => "MiB in a second of the virtual clock",
        "per_virtual_s" => "in a second of the virtual clock",
        "per_MiB" => "count",
        other => other,
    };
    let _ = writeln!(
        body,
        "<text x=\"20\" y=\"{}\" font-size=\"15\" font-weight=\"bold\">{} <tspan fill=\"#666666\" \
         font-weight=\"normal\">({})</tspan></text>",
        top + 14.0,
        escaped(title),
        escaped(unit)
    );
    top + 30.0
}

fn label(body: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let y = y + BAR / 2.0 + 4.5;
    let _ =
        writeln!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escaped(text));
}

fn rectangle(body: &mut String, (x, y): (f64, f64), width: f64, colour: &str, title: &str) {
    let _ = writeln!(
        body,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"><title>{}</title></rect>",
        width.max(0.5),
        escaped(title)
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_a_bar_for_each_figure_and_is_well_formed() {
        let mut results = Results::default();
        results.add("run-echo", "stockade", "time", "virtual_s", &[0.25]);
        results.add("run-echo", "runc", "time", "virtual_s", &[0.1]);
        results.add("run-echo", "stockade", "phase.a<b", "virtual_s", &[0.2]);
        let svg = render(&results);
        assert_eq!(svg.matches("<rect").count(), svg.matches("</rect>").count() + 1);
        assert_eq!(svg.matches("</rect>").count(), 2 + 2);
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b"));
    }

    #[test]
    fn a_picture_without_figures_is_still_one() {
        assert!(render(&Results::default()).ends_with("</svg>\n"));
    }
}
