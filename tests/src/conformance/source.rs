//! Fetches a suite: a source package of Debian's, and the packages that its cases need.
//!
//! Both are a cache entry outside the checkout; `versions` in it says what Debian served. Only the suite's own folders
//! are unpacked, and nothing of them is built.

use crate::lab::cache;
use crate::lab::steps::Steps;
use crate::lab::{LabError, io_error};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Raise this when the steps below change what they make.
const RECIPE: u32 = 1;
const SUITE: &str = "bookworm";
/// What of these packages must not cover the lab's own files, or only takes room.
const UNWANTED: &str = "usr/share usr/bin/dpkg* usr/bin/lto-dump* usr/sbin";

/// What there is to fetch.
pub struct Source {
    /// The source package.
    pub package: &'static str,
    /// What is unpacked of it.
    pub folders: &'static [&'static str],
    /// Binary packages whose files the lab has not.
    pub tools: &'static str,
    /// The kind of cache entry.
    pub kind: &'static str,
}

impl Source {
    /// A folder with `suite/` and `tools/usr/`, from the cache or made now.
    pub fn ensure(&self) -> Result<PathBuf, LabError> {
        let Source { package, folders, tools, kind } = self;
        let recipe = format!("{RECIPE}\n{SUITE}\n{package}\n{folders:?}\n{tools}\n{UNWANTED}\n");
        let hash: String = Sha256::digest(recipe).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        cache::entry(kind, &hash, |work| build(work, self))
    }
}

fn build(work: &Path, source: &Source) -> Result<(), LabError> {
    let Source { package, folders, tools, .. } = source;
    let mut steps = Steps::new("test suite", work, &[5, 10]);
    steps.run("fetch Debian's source package", |step| {
        let sources = sources()?;
        fs::write(work.join("sources.list"), sources).map_err(io_error("write apt's sources"))?;
        fs::create_dir_all(work.join("lists/partial")).map_err(io_error("make apt's folder"))?;
        let mut apt = |words: &[&str]| step.command(apt_get(work).args(words));
        apt(&["update"])?;
        apt(&["source", "--download-only", package])?;
        fs::create_dir(work.join("suite")).map_err(io_error("make the suite's folder"))?;
        let wanted: Vec<String> = folders.iter().map(|folder| format!("'*/{folder}'")).collect();
        let script = format!(
            "tar -C suite --strip-components=1 --wildcards -xf {package}_*.orig.tar.* {}; ls *.dsc >versions; \
             rm -rf {package}_* lists sources.list",
            wanted.join(" ")
        );
        step.command(Command::new("sh").args(["-ec", &script]).current_dir(work))
    })?;
    steps.run("unpack the tools of its cases", |step| {
        let mut command = Command::new("mmdebstrap");
        command.args(["--variant=extract", &format!("--include={tools}"), SUITE]).arg(work.join("root"));
        step.command(&mut command)?;
        let script = format!("cd root; rm -rf {UNWANTED}; mkdir ../tools; mv usr ../tools/; rm -rf ../root");
        step.command(Command::new("sh").args(["-ec", &script]).current_dir(work))
    })?;
    steps.done();
    Ok(())
}

/// Where this machine gets Debian's packages from, as places of source packages.
fn sources() -> Result<String, LabError> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(ORIGIN) $(REPO_URI) $(RELEASE) $(COMPONENT)"])
        .arg("Created-By: Packages")
        .output()
        .map_err(io_error("run apt-get indextargets"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: String = text
        .lines()
        .filter_map(|line| line.strip_prefix("Debian "))
        .filter(|line| line.ends_with(" main"))
        .map(|place| format!("deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {place}\n"))
        .collect();
    match lines.is_empty() {
        false => Ok(lines),
        true => Err(LabError::Step {
            step: "find Debian's archive".into(),
            log: "apt knows no place of it; run `apt-get update`".into(),
        }),
    }
}

/// apt-get with these sources only; this machine's own are left as they are.
fn apt_get(work: &Path) -> Command {
    let mut command = Command::new("apt-get");
    command.current_dir(work).args(["-q", "-o", "APT::Sandbox::User=root"]);
    for (option, value) in [("Etc::SourceList", "sources.list"), ("State::Lists", "lists")] {
        command.arg("-o").arg(format!("Dir::{option}={}", work.join(value).display()));
    }
    command.args(["-o", "Dir::Etc::SourceParts=/dev/null"]);
    command
}
