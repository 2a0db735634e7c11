//! When what happened during a start, for people (`stockade trace`) and for `make bench`.
//!
//! Every mark is a name and a time of `CLOCK_MONOTONIC`. Once the first container runs they are written into the sandbox's
//! state directory, and with STOCKADE_TIMELINE=FILE all of them there at the end, as JSON:
//! `{"clock":"CLOCK_MONOTONIC","unit":"ns","id":…,"marks":[{"name":…,"ns":…},…]}`.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::clock::monotonic_ns;
use crate::state::TIMELINE;

/// Environment variable that names another file.
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

/// A timeline as it was written.
#[derive(Debug, Deserialize)]
pub struct Written {
    /// The sandbox.
    pub id: String,
    /// Names and times in nanoseconds, in the order of time.
    pub marks: Vec<WrittenMark>,
}

/// A mark as it was written.
#[derive(Debug, Deserialize)]
pub struct WrittenMark {
    /// What happened.
    pub name: String,
    /// When.
    pub ns: u64,
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
        self.mark_at(name, monotonic_ns());
    }

    /// Marks another moment.
    pub fn mark_at(&self, name: &'static str, ns: u64) {
        tracing::debug!(mark = name, ns, "timeline");
        self.marks.borrow_mut().push(Mark { name, ns });
    }

    /// Marks this moment unless one of the same name was marked before.
    pub fn mark_once(&self, name: &'static str) {
        if !self.has(name) {
            self.mark(name);
        }
    }

    fn has(&self, name: &str) -> bool {
        self.marks.borrow().iter().any(|mark| mark.name == name)
    }

    /// Nanoseconds since the first mark.
    pub fn since_begin(&self) -> Option<u64> {
        let begin = self.marks.borrow().first()?.ns;
        Some(monotonic_ns().saturating_sub(begin))
    }

    /// Marks that a container runs. The first time what there is so far is written into the sandbox's state directory.
    pub fn mark_started(&self, id: &str, dir: &Path) {
        if !self.has(STARTED) {
            self.mark(STARTED);
            self.write_to(&dir.join(TIMELINE), id);
        }
    }

    /// Writes the file that the environment asks for, if it does.
    pub fn write(&self, id: &str) {
        if let Some(file) = &self.file {
            self.write_to(file, id);
        }
    }

    /// In the order of time. A timeline that cannot be written is no reason to fail a container.
    fn write_to(&self, file: &Path, id: &str) {
        let mut marks = self.marks.borrow().clone();
        marks.sort_by_key(|mark| mark.ns);
        let text = serde_json::json!({"clock": "CLOCK_MONOTONIC", "unit": "ns", "id": id, "marks": marks})
            .to_string();
        if let Err(e) = std::fs::write(file, text + "\n") {
            tracing::warn!("cannot write the timeline to {}: {e}", file.display());
        }
    }
}

/// The workload runs.
const STARTED: &str = "container_started";

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
        timeline.mark_started("c1", dir.path());
        timeline.mark_started("c1", dir.path());
        timeline.write("c1");
        let written: Written =
            serde_json::from_str(&std::fs::read_to_string(dir.path().join(TIMELINE)).unwrap()).unwrap();
        assert_eq!((&*written.id, &*written.marks[2].name), ("c1", STARTED));
        let value: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(value["id"], "c1");
        assert_eq!(value["marks"][0], serde_json::json!({"name": "first", "ns": 10}));
        assert_eq!(value["marks"].as_array().unwrap().len(), 3);
    }
}
