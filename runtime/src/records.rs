//! What happened on this host, one line each: VMs that came up and how long it took, sandboxes that failed and at what.
//!
//! Every supervisor and shim appends to one file, in one write(2) each, so that none sees half a line of another's;
//! `stockade metrics` counts. The file is bounded: a full one takes the place of the one before it. A record that cannot
//! be written is lost, and never a reason to fail.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The directory, for all of the host: no state of a container's is in it.
pub const DIR: &str = "/run/stockade-records";
/// What came last, and what came before that.
const FILES: [&str; 2] = ["records", "records.1"];
/// A file of this size is full: some 10,000 records.
const FULL: u64 = 256 << 10;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// Nanoseconds from the start of its first process to the agent's first answer.
    Booted(u64),
    /// At what a sandbox failed.
    Failed(String),
}

/// Appends a record.
pub fn append(record: &Record) {
    if let Err(e) = append_to(Path::new(DIR), record) {
        tracing::debug!("a record is lost: {e}");
    }
}

fn append_to(dir: &Path, record: &Record) -> io::Result<()> {
    let [file, before] = FILES.map(|name| dir.join(name));
    let open = || File::options().append(true).create(true).mode(0o600).open(&file);
    let mut out = match open() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(dir)?;
            open()?
        }
        other => other?,
    };
    if out.metadata()?.len() >= FULL {
        // Of two that do it at once, the second would lose what the first has begun: a few records.
        fs::rename(&file, before)?;
        out = open()?;
    }
    out.write_all(format!("{}\n", serde_json::to_string(record)?).as_bytes())
}

/// Reads records as they come, each once.
#[derive(Debug)]
pub struct Reader {
    dir: PathBuf,
    /// Inode of the file that was read last, and how far.
    at: Option<(u64, usize)>,
}

impl Reader {
    /// Begins with what there is.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), at: None }
    }

    /// All that came since the last call. What is no record is passed over.
    pub fn read(&mut self) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        // The older file first: of it, what had not been read when it was the current one.
        for name in FILES.iter().rev() {
            let path = self.dir.join(name);
            let (inode, text) = match File::open(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                file => {
                    let file = file?;
                    (file.metadata()?.ino(), io::read_to_string(file)?)
                }
            };
            let is_older = *name == FILES[1];
            let from = match self.at {
                Some((last, offset)) if last == inode => offset.min(text.len()),
                // Read before the current one was begun.
                Some(_) if is_older => continue,
                _ => 0,
            };
            let whole = text.rfind('\n').map_or(from, |end| (end + 1).max(from));
            records.extend(text[from..whole].lines().filter_map(|line| serde_json::from_str(line).ok()));
            self.at = Some((inode, whole));
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_record_is_read_once_though_files_change_places() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("made");
        let mut reader = Reader::new(&dir);
        assert_eq!(reader.read().unwrap(), []);
        let mut read = Vec::new();
        for n in 0..20_000 {
            append_to(&dir, &Record::Booted(n)).unwrap();
            if n % 700 == 0 {
                read.extend(reader.read().unwrap());
            }
        }
        read.extend(reader.read().unwrap());
        assert!(read.iter().cloned().eq((0..20_000).map(Record::Booted)), "{} of 20000", read.len());
        let size: u64 = FILES.map(|name| fs::metadata(dir.join(name)).unwrap().len()).iter().sum();
        assert!(size < 3 * FULL, "{size}");
    }

    #[test]
    fn what_is_no_record_or_not_whole_yet_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let mut reader = Reader::new(dir.path());
        append_to(dir.path(), &Record::Failed("vmm".into())).unwrap();
        let mut file = File::options().append(true).open(dir.path().join(FILES[0])).unwrap();
        file.write_all(b"garbage\n{\"booted\":").unwrap();
        assert_eq!(reader.read().unwrap(), [Record::Failed("vmm".into())]);
        file.write_all(b"5}\n").unwrap();
        assert_eq!(reader.read().unwrap(), [Record::Booted(5)]);
    }
}
