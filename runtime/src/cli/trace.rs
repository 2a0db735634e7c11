//! `stockade trace`: a sandbox's start in time, in the format that Perfetto, chrome://tracing and speedscope open (Trace
//! Event Format, JSON object form).

use std::fs;
use std::io;

use clap::Args;
use serde_json::{Value, json};

use super::{Error, Global, Outcome, print, sandboxes};
use crate::sandbox::timeline::Written;
use crate::state::TIMELINE;

/// Show how a sandbox came up, as JSON for a trace viewer (ui.perfetto.dev)
#[derive(Args)]
pub struct Trace {
    /// A container's or pod's id
    sandbox: String,
}

/// Who does what a mark is the end of; whatever is not here the supervisor does.
const TRACKS: [(&str, &[&str]); 3] = [
    ("supervisor", &[]),
    ("VMM", &["vmm_entered", "vm_created", "kernel_loaded", "first_guest_instruction"]),
    ("guest", &["guest_init_started", "agent_listening"]),
];

pub fn trace(global: &Global, args: Trace) -> Outcome {
    let dir = sandboxes::find(global, &args.sandbox)?;
    let text = match fs::read(dir.path().join(TIMELINE)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(Error::Refused(format!("no container of the sandbox {} has run yet", args.sandbox)));
        }
        other => other.map_err(Error::io("read the timeline"))?,
    };
    let timeline: Written =
        serde_json::from_slice(&text).map_err(|e| Error::Io("read the timeline".into(), e.into()))?;
    print(&format!("{}\n", events(&timeline)))
}

/// Each mark ends a span of its track, which began with the track's mark before; the first of a track's begins with what
/// came before it anywhere.
fn events(timeline: &Written) -> Value {
    let track = |name: &str| TRACKS.iter().position(|(_, marks)| marks.contains(&name)).unwrap_or(0);
    let begin = timeline.marks.first().map_or(0, |mark| mark.ns);
    let us = |ns: u64| (ns - begin) as f64 / 1000.0;
    let mut events: Vec<_> = TRACKS
        .iter()
        .enumerate()
        .map(|(tid, (name, _))| json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": name}}))
        .collect();
    for (index, mark) in timeline.marks.iter().enumerate().skip(1) {
        let own =
            timeline.marks[..index].iter().rev().find(|before| track(&before.name) == track(&mark.name));
        let from = own.unwrap_or(&timeline.marks[index - 1]).ns;
        events.push(json!({
            "name": mark.name, "cat": "start", "ph": "X", "pid": 1, "tid": track(&mark.name),
            "ts": us(from), "dur": us(mark.ns) - us(from),
        }));
    }
    json!({"displayTimeUnit": "ms", "otherData": {"sandbox": timeline.id}, "traceEvents": events})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_of_a_track_follow_each_other() {
        let timeline = serde_json::from_value(json!({"id": "c1", "marks": [
            {"name": "process_start", "ns": 1_000_000},
            {"name": "vmm_spawned", "ns": 3_000_000},
            {"name": "vmm_entered", "ns": 4_000_000},
            {"name": "prepared", "ns": 5_000_000},
            {"name": "vm_created", "ns": 6_000_000},
            {"name": "guest_init_started", "ns": 9_000_000},
        ]}))
        .unwrap();
        let events = events(&timeline);
        let spans: Vec<_> = events["traceEvents"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|event| event["ph"] == "X")
            .map(|event| {
                (
                    event["name"].as_str().unwrap(),
                    event["tid"].as_u64().unwrap(),
                    event["ts"].as_f64().unwrap(),
                    event["dur"].as_f64().unwrap(),
                )
            })
            .collect();
        assert_eq!(
            spans,
            [
                ("vmm_spawned", 0, 0.0, 2000.0),
                ("vmm_entered", 1, 2000.0, 1000.0),
                ("prepared", 0, 2000.0, 2000.0),
                ("vm_created", 1, 3000.0, 2000.0),
                ("guest_init_started", 2, 5000.0, 3000.0),
            ]
        );
    }
}
