//! How far a pull is, for a person at a terminal: one line that is written over, and gone at the end. Where standard
//! error is no terminal, nothing is written.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the line changes.
const INTERVAL: Duration = Duration::from_millis(100);
/// Columns of the bar.
const WIDTH: u64 = 24;

/// Progress of one pull, shared by the threads that do it.
pub struct Progress {
    what: String,
    shown: bool,
    total: u64,
    done: AtomicU64,
    layers: usize,
    finished: AtomicUsize,
    last: Mutex<Option<Instant>>,
}

impl Progress {
    /// A pull of `layers` layers with `total` bytes.
    pub fn new(what: &str, layers: usize, total: u64) -> Self {
        Progress {
            what: what.into(),
            shown: io::stderr().is_terminal(),
            total,
            done: AtomicU64::new(0),
            layers,
            finished: AtomicUsize::new(0),
            last: Mutex::new(None),
        }
    }

    /// More bytes are there.
    pub fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.show(false);
    }

    /// Fewer are: something begins again.
    pub fn remove(&self, bytes: u64) {
        self.done.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// A layer is done.
    pub fn finish_layer(&self) {
        self.finished.fetch_add(1, Ordering::Relaxed);
        self.show(true);
    }

    fn show(&self, always: bool) {
        if !self.shown {
            return;
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if always || last.is_none_or(|last| last.elapsed() >= INTERVAL) {
            *last = Some(Instant::now());
            let line = self.line();
            let _ = write!(io::stderr(), "\r\x1b[K{line}");
        }
    }

    fn line(&self) -> String {
        let done = self.done.load(Ordering::Relaxed).min(self.total);
        let full = (done * WIDTH).checked_div(self.total).unwrap_or(WIDTH);
        let bar = "=".repeat(full as usize) + &" ".repeat((WIDTH - full) as usize);
        let finished = self.finished.load(Ordering::Relaxed);
        format!(
            "{} [{bar}] {} of {}, {finished} of {} layers",
            self.what,
            size(done),
            size(self.total),
            self.layers
        )
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown && self.last.get_mut().is_ok_and(|last| last.is_some()) {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

/// Bytes as people read them, in powers of 1000 as other tools show images' sizes.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_it_is() {
        let progress = Progress::new("r.example/x:1", 2, 4_000_000);
        progress.add(1_000_000);
        progress.finish_layer();
        let bar = "=".repeat(6) + &" ".repeat(18);
        assert_eq!(progress.line(), format!("r.example/x:1 [{bar}] 1.0 MB of 4.0 MB, 1 of 2 layers"));
        progress.add(9_000_000);
        assert!(progress.line().contains("4.0 MB of 4.0 MB"));
        assert!(Progress::new("x", 0, 0).line().contains("0 B of 0 B"));
    }
}
