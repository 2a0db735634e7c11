//! `stockade events`: what a container uses and when its memory runs out, as runc's callers parse it: one JSON object
//! a line.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::{Error, Global, Outcome, ask, open, print, stopped};
use crate::sandbox::control::{Request, read_attachment};
use crate::state::StateDir;

/// Show what a container uses, again and again until it ends
#[derive(Args)]
pub struct Events {
    /// Time between two events: seconds, or with a unit such as 500ms
    #[arg(long, default_value = "5s", value_name = "TIME")]
    interval: String,
    /// Once, now
    #[arg(long)]
    stats: bool,
    /// Container identifier
    container_id: String,
}

type Data = BTreeMap<String, Value>;

/// In runc's order.
#[derive(Serialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Data>,
}

pub fn events(global: &Global, args: Events) -> Outcome {
    let interval = parse(&args.interval).filter(|interval| !interval.is_zero()).ok_or_else(|| {
        Error::Usage(format!("--interval {:?}: write a time above zero, such as 5s", args.interval))
    })?;
    let (dir, state) = open(global, &args.container_id)?;
    let Some((mut oom_kills, stats)) = read(&dir)? else {
        return Err(stopped("container not running", &state));
    };
    let show = |kind, data| {
        let event = Event { kind, id: &state.id, data };
        let text = serde_json::to_string(&event).map_err(|e| Error::Io("show an event".into(), e.into()))?;
        print(&(text + "\n"))
    };
    show("stats", Some(stats))?;
    if args.stats {
        return Ok(ExitCode::SUCCESS);
    }
    loop {
        sleep(interval);
        let Some((kills, stats)) = read(&dir)? else { break };
        // Once, however many: how many there were is the guest's claim.
        if kills > oom_kills {
            show("oom", None)?;
        }
        oom_kills = kills;
        show("stats", Some(stats))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// How often its processes were killed for memory so far, and what it uses; `None` when it has ended.
fn read(dir: &StateDir) -> Result<Option<(u64, Data)>, Error> {
    let Some((_, fds)) = ask(dir, &Request::Stats)? else { return Ok(None) };
    let bytes = read_attachment(fds).map_err(Error::io("read the statistics"))?;
    let mut stats: Data =
        serde_json::from_slice(&bytes).map_err(|e| Error::Io("read the statistics".into(), e.into()))?;
    let kills = stats.remove("oomKills").and_then(|kills| kills.as_u64()).unwrap_or(0);
    Ok(Some((kills, stats)))
}

/// Go's durations, as far as anybody writes them here; a bare number is seconds.
fn parse(text: &str) -> Option<Duration> {
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let number: f64 = text[..text.len() - unit.len()].parse().ok()?;
    let seconds = match unit {
        "ms" => number / 1000.0,
        "" | "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_gos_or_seconds() {
        for (text, ms) in [("5s", 5000), ("100ms", 100), ("2", 2000), ("1.5s", 1500), ("1m", 60_000)] {
            assert_eq!(parse(text), Some(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "5x", "-1s", "1e99s", "NaN"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
