//! The suites that there are: where each comes from, what it needs, and how it is told which runtime to use.

use super::source::Source;
use super::{podman, runc};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A test suite in bats.
pub struct Suite {
    /// Whose it is, for the command line and folders of results.
    pub name: &'static str,
    /// What is fetched.
    pub source: Source,
    /// The page with the kept list, and where it is.
    pub kept: (&'static str, &'static str),
    /// The program that cases wait for when they hang; none: the runtime.
    pub waits_for: Option<&'static str>,
    /// A case that says nothing for longer hangs. (The limit that bats has is a child of the case's shell, and cases
    /// that wait for all of their children would wait for it.)
    pub stalled: Duration,
    /// Limit for one runtime's life of the lab.
    pub limit: Duration,
    /// What its cases find in their environment, whatever the runtime.
    pub environment: &'static [(&'static str, &'static str)],
    /// In the lab: lays everything out for this runtime.
    pub lay_out: fn(&Path) -> Result<LaidOut, String>,
}

/// A suite that can run.
pub struct LaidOut {
    /// Where its files are.
    pub folder: PathBuf,
    /// What its cases find in their environment besides.
    pub environment: Vec<(&'static str, PathBuf)>,
}

/// All.
pub const SUITES: [&Suite; 3] = [&runc::SUITE, &runc::WITH_SYSTEMD, &podman::SUITE];

impl Suite {
    /// By its name.
    pub fn by_name(name: &str) -> Option<&'static Suite> {
        SUITES.into_iter().find(|suite| suite.name == name)
    }
}

impl fmt::Debug for Suite {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name)
    }
}
