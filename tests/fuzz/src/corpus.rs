//! Where inputs are: the kept ones beside the targets, those that a search found below the target directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Longest input: some dozens of packets. Longer ones find nothing more and cost time.
pub const LONGEST: usize = 8 << 10;

/// The inputs that are in the repository.
pub fn kept(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target)
}

/// Those that searches on this machine have found.
pub fn found(target: &str) -> PathBuf {
    beside_the_program().join(target)
}

/// A place for files of this program, below the target directory.
pub fn beside_the_program() -> PathBuf {
    let this = std::env::current_exe().expect("path of this program");
    // <target directory>/<target triple>/<profile>/deps/<this>
    this.ancestors().nth(4).expect("a target directory").join("fuzz-inputs")
}

/// The inputs in a directory, in an order that is always the same. None if it is not there.
pub fn read(dir: &Path) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let files: BTreeMap<_, _> =
        entries.map(|e| (e.file_name(), fs::read(e.path()).expect("read an input"))).collect();
    files.into_values().collect()
}

/// Writes an input to a directory, under a name that says what is in it.
pub fn write(dir: &Path, input: &[u8]) -> PathBuf {
    fs::create_dir_all(dir).expect("make a directory for inputs");
    let name: String = Sha256::digest(input).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let path = dir.join(name);
    fs::write(&path, input).expect("write an input");
    path
}
