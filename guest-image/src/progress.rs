//! Tells a person how far a step of minutes is: on a terminal as one line that is updated every second, and
//! elsewhere as a line every half minute.
//!
//! The remaining time is what the counted work so far took, carried on; while there is too little of it to
//! know, no time is named.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const TERMINAL_INTERVAL: Duration = Duration::from_secs(1);
const LOG_INTERVAL: Duration = Duration::from_secs(30);
/// Before this much is done, its speed says nothing about the rest.
const ENOUGH_PERCENT: usize = 2;

/// A step that is under way. Dropping it ends the display.
pub struct Progress {
    done: Arc<AtomicUsize>,
    ticker: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Begins to show `label`, with a share and a remaining time if `expected` tells how many units there are.
    pub fn start(label: &'static str, expected: Option<usize>) -> Progress {
        let done = Arc::new(AtomicUsize::new(0));
        let (stop, stopped) = mpsc::channel();
        let count = Arc::clone(&done);
        let thread = thread::spawn(move || {
            let terminal = io::stderr().is_terminal();
            let interval = if terminal { TERMINAL_INTERVAL } else { LOG_INTERVAL };
            let start = Instant::now();
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                let text = describe(label, count.load(Ordering::Relaxed), expected, start.elapsed());
                // Nobody to tell is no reason to stop the work.
                let _ = if terminal {
                    write!(io::stderr(), "\r\x1b[K{text}")
                } else {
                    writeln!(io::stderr(), "{text}")
                };
            }
            if terminal {
                let _ = write!(io::stderr(), "\r\x1b[K");
            }
        });
        Progress { done, ticker: Some((stop, thread)) }
    }

    /// Counts one more unit as done.
    pub fn advance(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// How many units were counted.
    pub fn done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.ticker.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

fn describe(label: &str, done: usize, expected: Option<usize>, elapsed: Duration) -> String {
    let elapsed_text = minutes(elapsed);
    let Some(expected) = expected.filter(|&expected| expected > 0) else {
        return format!("{label}: {elapsed_text} elapsed");
    };
    if done >= expected {
        return format!("{label}: {done} done, more than expected; {elapsed_text} elapsed, nearly there");
    }
    let percent = done * 100 / expected;
    if percent < ENOUGH_PERCENT {
        return format!("{label}: {done} of about {expected}; {elapsed_text} elapsed");
    }
    let remaining = elapsed.mul_f64((expected - done) as f64 / done as f64);
    format!(
        "{label}: {done} of about {expected} ({percent}%); {elapsed_text} elapsed, about {} to go",
        minutes(remaining)
    )
}

/// `75 s` as `1:15 min`.
pub fn minutes(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 { format!("{seconds} s") } else { format!("{}:{:02} min", seconds / 60, seconds % 60) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carries_the_speed_so_far_on_to_the_rest() {
        let text = describe("compiling", 300, Some(1200), Duration::from_secs(150));
        assert_eq!(text, "compiling: 300 of about 1200 (25%); 2:30 min elapsed, about 7:30 min to go");
    }

    #[test]
    fn names_no_time_before_it_can_know() {
        assert!(!describe("compiling", 3, Some(1200), Duration::from_secs(5)).contains("to go"));
        assert_eq!(describe("unpacking", 0, None, Duration::from_secs(5)), "unpacking: 5 s elapsed");
    }

    #[test]
    fn more_work_than_expected_is_said() {
        let text = describe("compiling", 1201, Some(1200), Duration::from_secs(600));
        assert!(text.contains("more than expected"), "{text}");
        assert!(describe("compiling", 1, Some(0), Duration::ZERO).ends_with("elapsed"));
    }

    #[test]
    fn ends_at_once_when_dropped() {
        let start = Instant::now();
        let progress = Progress::start("test", None);
        progress.advance();
        assert_eq!(progress.done(), 1);
        drop(progress);
        assert!(start.elapsed() < TERMINAL_INTERVAL);
    }
}
