//! The log: one record a fact, appended to the file that `--log` names, in the two formats that callers of runc read.
//!
//! Without `--log` (and without `--debug`) nothing is set up, and a log statement costs one comparison. Podman and
//! CRI-O show their user the last JSON record, so an error is always the last one written.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::clock::now_rfc3339;
use crate::printable::printable;

/// Longest text in a record, in characters.
const RECORD_MAX: usize = 16 << 10;

/// How records look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// `time="…" level=error msg="…"`
    Text,
    /// `{"level":"error","msg":"…","time":"…"}`
    Json,
}

/// Sets logging up: to a file, or with `debug` alone to standard error.
pub fn set_up(file: Option<&Path>, format: Format, debug: bool) -> io::Result<()> {
    let sink = match file {
        Some(path) => Sink::File(OpenOptions::new().append(true).create(true).open(path)?),
        None if debug => Sink::Stderr,
        None => return Ok(()),
    };
    let level = if debug { Level::DEBUG } else { Level::INFO };
    // An error means that somebody was faster, which only a test can be.
    let _ = tracing::subscriber::set_global_default(Log { sink, format, level });
    Ok(())
}

/// Sets logging up to a FIFO that another process reads now and then: records wait for it, and what finds no room is
/// dropped.
pub fn set_up_fifo(path: &Path, debug: bool) -> io::Result<()> {
    let flags = libc::O_NONBLOCK;
    let fifo = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
    let level = if debug { Level::DEBUG } else { Level::INFO };
    let log = Log { sink: Sink::File(fifo), format: Format::Text, level };
    let _ = tracing::subscriber::set_global_default(log);
    Ok(())
}

enum Sink {
    File(File),
    Stderr,
}

struct Log {
    sink: Sink,
    format: Format,
    level: Level,
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Not what libraries have to say about their insides.
        *metadata.level() <= self.level && metadata.target().starts_with("stockade")
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level.into())
    }

    // There are no spans: a process serves one container.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let line = render(self.format, *event.metadata().level(), &now_rfc3339(), fields);
        // One write a record, so that records of several processes do not mix. There is nobody to tell of an error.
        let _ = match &self.sink {
            Sink::File(file) => (&*file).write_all(line.as_bytes()),
            Sink::Stderr => io::stderr().write_all(line.as_bytes()),
        };
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn set(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = printable(&text, RECORD_MAX),
            ("message", other) => self.message = other.to_string(),
            (name, Value::String(text)) => {
                self.others.insert(name.to_owned(), printable(&text, RECORD_MAX).into());
            }
            (name, value) => {
                self.others.insert(name.to_owned(), value);
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.set(field, format!("{value:?}").into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value.into());
    }
}

fn render(format: Format, level: Level, time: &str, fields: Fields) -> String {
    let level = match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    };
    match format {
        Format::Json => {
            let mut record = fields.others;
            record.insert("level".into(), level.into());
            record.insert("msg".into(), fields.message.into());
            record.insert("time".into(), time.into());
            Value::Object(record).to_string() + "\n"
        }
        Format::Text => {
            let mut line = format!("time={time:?} level={level} msg={:?}", fields.message);
            for (name, value) in fields.others {
                let _ = write!(line, " {name}={value}");
            }
            line + "\n"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields() -> Fields {
        let mut others = Map::new();
        others.insert("id".into(), "c1".into());
        Fields { message: "it \"broke\"".into(), others }
    }

    #[test]
    fn json_records_are_those_of_runc() {
        let line = render(Format::Json, Level::ERROR, "2026-01-01T00:00:00Z", fields());
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["level"], "error");
        assert_eq!(value["msg"], "it \"broke\"");
        assert_eq!(value["time"], "2026-01-01T00:00:00Z");
        assert_eq!(value["id"], "c1");
        assert!(line.ends_with("}\n"));
    }

    #[test]
    fn text_records_are_those_of_runc() {
        let line = render(Format::Text, Level::WARN, "T", fields());
        assert_eq!(line, "time=\"T\" level=warning msg=\"it \\\"broke\\\"\" id=\"c1\"\n");
    }
}
