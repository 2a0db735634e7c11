//! When what happened during a start, for people and for `make bench`.
//!
//! Every mark is a name and a time of `CLOCK_MONOTONIC`. With STOCKADE_TIMELINE=FILE they are written there as JSON:
//! `{"clock":"CLOCK_MONOTONIC","unit":"ns","id":…,"marks":[{"name":…,"ns":…},…]}`. Without it nothing is recorded.

use std::cell::RefCell;
use std::path::PathBuf;

use serde::Serialize;

use crate::clock::monotonic_ns;

/// Environment variable that names the file.
pub const ENV: &str = "STOCKADE_TIMELINE";

/// The marks of one start, in the order in which they were set.
#[derive(Debug)]
pub struct Timeline {
    file: Option<PathBuf>,
    marks: RefCell<Vec<Mark>>,
}

#[derive(Clone, Debug, Serialize)]
struct Mark {
    name: &'static str,
    ns: u64,
}

impl Timeline {
    /// Begins with the mark `process_start` at the given time.
    pub fn begin(process_start_ns: u64) -> Self {
        let file = std::env::var_os(ENV).filter(|name| !name.is_empty()).map(PathBuf::from);
        let timeline = Timeline { file, marks: RefCell::default() };
        timeline.mark_at("process_start", process_start_ns);
        timeline
    }

    /// Marks this moment.
    pub fn mark(&self, name: &'static str) {
        if self.is_on() {
            self.mark_at(name, monotonic_ns());
        }
    }

    /// Marks another moment.
    pub fn mark_at(&self, name: &'static str, ns: u64) {
        if self.is_on() {
            tracing::debug!(mark = name, ns, "timeline");
            self.marks.borrow_mut().push(Mark { name, ns });
        }
    }

    /// Marks this moment unless one of the same name was marked before.
    pub fn mark_once(&self, name: &'static str) {
        if self.is_on() && self.marks.borrow().iter().all(|mark| mark.name != name) {
            self.mark(name);
        }
    }

    /// Whether anybody will look at the marks.
    pub fn is_on(&self) -> bool {
        self.file.is_some() || tracing::enabled!(tracing::Level::DEBUG)
    }

    /// Writes the file, in the order of time. A timeline that cannot be written is no reason to fail a container.
    pub fn write(&self, id: &str) {
        let Some(file) = &self.file else { return };
        let mut marks = self.marks.borrow().clone();
        marks.sort_by_key(|mark| mark.ns);
        let text = serde_json::json!({"clock": "CLOCK_MONOTONIC", "unit": "ns", "id": id, "marks": marks})
            .to_string();
        if let Err(e) = std::fs::write(file, text + "\n") {
            tracing::warn!("cannot write the timeline to {}: {e}", file.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_written_in_the_order_of_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("timeline.json");
        let timeline = Timeline { file: Some(path.clone()), marks: RefCell::default() };
        timeline.mark_at("second", 20);
        timeline.mark_at("first", 10);
        timeline.mark_once("first");
        timeline.write("c1");
        let value: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(value["id"], "c1");
        assert_eq!(value["marks"][0], serde_json::json!({"name": "first", "ns": 10}));
        assert_eq!(value["marks"].as_array().unwrap().len(), 2);
    }
}
