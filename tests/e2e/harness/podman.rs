//! A Podman of one's own: storage and state in a directory that goes with it, the runtime under test as its runtime,
//! and an image from the lab's busybox tree.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;
use tempfile::TempDir;

use super::containerd;
use super::program::{Ended, Program, Stdin};
use super::{HANG, Runtime, host_scratch, tool};

/// The image's name.
pub const IMAGE: &str = "localhost/lab/busybox:latest";
/// Parts of its state that no option moves.
const SHARED_STATE: [&str; 7] = [
    "/run/containers",
    "/run/crun",
    "/run/lock",
    "/run/netavark",
    "/run/runc",
    "/run/podman-init",
    "/dev/shm/libpod_lock",
];
/// Its cgroups.
const CGROUP: &str = "/sys/fs/cgroup/libpod_parent";
/// A cgroup in which it tries what it may do.
const PROBE: &str = "/sys/fs/cgroup/podman_probe";
/// The bridge of its default network.
const BRIDGE: &str = "podman0";

/// Podman's state. Dropping it removes every container of it, and it.
pub struct Podman {
    dir: TempDir,
    runtime: PathBuf,
    /// What of [`SHARED_STATE`] was not there before.
    new: Vec<&'static str>,
}

impl Podman {
    /// Makes one that runs containers with the runtime under test, and gives it the image.
    pub fn new() -> Self {
        Self::with(&Runtime::under_test())
    }

    /// Makes one that runs them with this runtime.
    pub fn with(runtime: &Runtime) -> Self {
        let dir = host_scratch();
        let runtime = runtime.path();
        let new = SHARED_STATE.into_iter().filter(|place| !Path::new(place).exists()).collect();
        let this = Podman { dir, runtime, new };
        // As on a host that uses bridges.
        tool("true");
        let archive = containerd::image(this.dir.path());
        this.podman(&["load", "--quiet", "--input", &archive.display().to_string()]).code(0);
        this
    }

    /// A directory for a case's own files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A call of podman(1).
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("podman");
        let dir = |name: &str| self.dir.path().join(name);
        command
            .args(["--storage-driver", "overlay", "--cgroup-manager", "cgroupfs", "--events-backend", "file"])
            .arg("--root")
            .arg(dir("root"))
            .arg("--runroot")
            .arg(dir("runroot"))
            .arg("--tmpdir")
            .arg(dir("tmp"))
            .arg("--network-config-dir")
            .arg(dir("networks"))
            .arg("--runtime")
            .arg(&self.runtime)
            .args(words);
        command
    }

    /// Its version: the first two numbers.
    #[track_caller]
    pub fn version(&self) -> (u32, u32) {
        let text = self.podman(&["version", "--format", "{{.Client.Version}}"]).ok();
        let mut numbers = text.split(['.', '-', '+', '~', '\n']).map_while(|word| word.parse().ok());
        match (numbers.next(), numbers.next()) {
            (Some(major), Some(minor)) => (major, minor),
            _ => panic!("podman says of its version {text:?}"),
        }
    }

    /// A call of buildah(1), which has the same storage.
    pub fn buildah(&self, words: &[&str]) -> Command {
        let mut command = Command::new("buildah");
        let dir = |name: &str| self.dir.path().join(name);
        command.args(["--storage-driver", "overlay", "--root"]).arg(dir("root"));
        command.arg("--runroot").arg(dir("runroot")).args(words);
        command
    }

    /// Calls podman(1) and waits for its end.
    #[track_caller]
    pub fn podman(&self, words: &[&str]) -> Ended {
        Program::spawn(self.command(words), Stdin::Null).finish()
    }

    /// Runs a shell script in a new container with these options, without a network, from beginning to end.
    #[track_caller]
    pub fn run(&self, options: &[&str], script: &str) -> Ended {
        let words = [&["run", "--rm", "--network", "none"], options, &[IMAGE, "sh", "-c", script]].concat();
        self.podman(&words)
    }

    /// Leaves a container with this name behind that runs a shell script.
    #[track_caller]
    pub fn detached(&self, name: &str, options: &[&str], script: &str) {
        let words = [&["run", "--detach", "--name", name], options, &[IMAGE, "sh", "-c", script]].concat();
        self.podman(&words).code(0);
    }

    /// Runs a shell script in a container that runs.
    #[track_caller]
    pub fn exec(&self, name: &str, script: &str) -> Ended {
        self.podman(&["exec", name, "sh", "-c", script])
    }

    /// One value of what `inspect` tells of a container, by its place.
    #[track_caller]
    pub fn inspect(&self, name: &str, pointer: &str) -> Value {
        let text = self.podman(&["inspect", "--type", "container", name]).ok();
        let all: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        all[0].pointer(pointer).unwrap_or_else(|| panic!("no {pointer} in {text}")).clone()
    }

    /// Waits until a container has written this line.
    #[track_caller]
    pub fn wait_for_line(&self, name: &str, line: &str) {
        let begin = Instant::now();
        loop {
            let logs = self.podman(&["logs", name]).code(0).text();
            if logs.lines().any(|written| written == line) {
                return;
            }
            assert!(begin.elapsed() < HANG, "hung: {name} does not write {line:?}: {logs}");
        }
    }

    /// Removes a container, whatever it does.
    #[track_caller]
    pub fn remove(&self, name: &str) {
        self.podman(&["rm", "--force", "--time", "0", name]).code(0);
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let quiet = |command: &mut Command| {
            let _ = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        };
        quiet(&mut self.command(&["pod", "rm", "--force", "--all", "--time", "0"]));
        quiet(&mut self.command(&["rm", "--force", "--all", "--time", "0"]));
        // Podman keeps its storage mounted on itself.
        quiet(
            Command::new("umount").args(["--recursive", "--lazy"]).arg(self.dir.path().join("root/overlay")),
        );
        for place in &self.new {
            let _ = std::fs::remove_file(place).or_else(|_| std::fs::remove_dir_all(place));
        }
        for cgroup in [&format!("{CGROUP}/conmon"), CGROUP, PROBE] {
            let _ = std::fs::remove_dir(cgroup);
        }
        if Path::new("/sys/class/net").join(BRIDGE).exists() {
            tool(&format!("ip link del {BRIDGE}"));
        }
    }
}
