//! `stockade kill`: a signal for the workload.

use std::process::ExitCode;

use clap::Args;
use nix::sys::signal::Signal;

use super::{Error, Global, Outcome, ask, open, stopped};
use crate::sandbox::control::Request;

/// Real-time signals reach up to here (signal(7)).
const SIGNAL_MAX: i32 = 64;

/// Send a signal to the container's workload
#[derive(Args)]
pub struct Kill {
    /// Send it to all processes of the container
    #[arg(short, long)]
    all: bool,
    /// Container identifier
    container_id: String,
    /// Name or number of the signal
    #[arg(default_value = "SIGTERM")]
    signal: String,
}

pub fn kill(global: &Global, args: Kill) -> Outcome {
    let signal = parse(&args.signal).ok_or_else(|| {
        Error::Usage(format!(
            "unknown signal {:?}: give a name such as TERM, or 0 to {SIGNAL_MAX}",
            args.signal
        ))
    })?;
    let (dir, state) = open(global, &args.container_id)?;
    match ask(&dir, &Request::Kill { signal, all: args.all })? {
        Some(_) => Ok(ExitCode::SUCCESS),
        // All of no processes have been signalled.
        None if args.all => Ok(ExitCode::SUCCESS),
        None => Err(stopped("container not running", &state)),
    }
}

fn parse(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        // As for kill(2), 0 only asks whether there is somebody.
        return (0..=SIGNAL_MAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    name.parse::<Signal>().ok().map(|signal| signal as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_signals() {
        for (text, number) in
            [("KILL", 9), ("SIGTERM", 15), ("term", 15), ("sighup", 1), ("9", 9), ("64", 64), ("0", 0)]
        {
            assert_eq!(parse(text), Some(number), "{text}");
        }
        for text in ["", "65", "-9", "NOPE", "SIG", "9x"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
