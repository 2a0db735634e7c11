//! Logs of the agent go to the kernel's log: /dev/kmsg, one record an event.
//!
//! By default only warnings, which cost nothing when there are none. What stops the agent is written with the
//! emergency level, because that is all a guest booted with `quiet loglevel=1` shows the host.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, OnceLock};

use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use crate::helper::{Record, Reporter};

/// Longest record the kernel takes is 1024 bytes with its own prefix; longer ones are refused whole.
const RECORD_MAX: usize = 976;
/// How many logged errors explain a failure.
const ERRORS_TOLD: u8 = 2;
/// LOG_ERR of syslog(2).
const PRIORITY_ERROR: u8 = 3;

static KMSG: OnceLock<File> = OnceLock::new();
/// Whom to tell errors, and how many more.
static ERRORS_TO: Mutex<Option<(Reporter, u8)>> = Mutex::new(None);

fn kmsg() -> Option<&'static File> {
    if let Some(file) = KMSG.get() {
        return Some(file);
    }
    let file = File::options().write(true).open("/dev/kmsg").ok()?;
    Some(KMSG.get_or_init(|| file))
}

/// Logs events of `level` and above from now on.
pub fn start(level: LevelFilter) {
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .without_time() // The kernel stamps each record, and its priority is the level.
        .with_level(false)
        .with_target(false)
        .with_writer(Kmsg)
        .init();
}

/// Writes a message that the host will see whatever the console's log level is.
pub fn fatal(message: &str) {
    record(0, message.as_bytes());
}

/// In a helper process: the first errors that are logged also go to the agent. libcontainer's error values say less
/// than what it logs on the way: the first record has the object, the second the kernel's answer.
pub fn first_errors_to(reporter: Reporter) {
    if let Ok(mut slot) = ERRORS_TO.lock() {
        *slot = Some((reporter, ERRORS_TOLD));
    }
}

/// A panic ends PID 1 and with it the VM: the kernel's log is the only place to say why.
pub fn panics_to_kmsg() {
    std::panic::set_hook(Box::new(|info| fatal(&format!("panic: {info}"))));
}

fn record(priority: u8, message: &[u8]) {
    let Some(mut file) = kmsg() else { return };
    let mut line = format!("<{priority}>stockade-agent: ").into_bytes();
    line.extend_from_slice(message.trim_ascii_end());
    line.truncate(RECORD_MAX);
    let _ = file.write_all(&line);
}

fn tell_error(text: &[u8]) {
    let Ok(mut slot) = ERRORS_TO.lock() else { return };
    if let Some((reporter, left @ 1..)) = &mut *slot {
        *left -= 1;
        reporter.send(&Record::Detail(String::from_utf8_lossy(text.trim_ascii()).into_owned()));
    }
}

/// Makes writers for tracing's formatter, which hands each event over in one write.
struct Kmsg;

/// Writes records of one priority, in syslog(2)'s numbers.
struct Line(u8);

impl<'a> MakeWriter<'a> for Kmsg {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(6)
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Line {
        Line(match *metadata.level() {
            Level::ERROR => PRIORITY_ERROR,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        })
    }
}

impl Write for Line {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.0 == PRIORITY_ERROR {
            tell_error(buf);
        }
        record(self.0, buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
