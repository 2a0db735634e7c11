//! A Docker daemon of one's own: its state in a directory that goes with it, the runtime under test among its runtimes
//! and its shim on the daemon's path, and an image from the lab's busybox tree.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::Value;
use tempfile::TempDir;

use super::program::{Ended, Program, Stdin};
use super::{HANG, Runtime, containerd, host_scratch, tool};

/// The image's name.
pub const IMAGE: &str = "lab/busybox:latest";
/// Parts of its state that no option moves.
const SHARED_STATE: [&str; 2] = ["/run/containerd", "/run/docker"];
/// Its cgroups.
const CGROUP: &str = "/sys/fs/cgroup/docker";
/// The bridge of its default network.
const BRIDGE: &str = "docker0";
/// The name of the runtime in its configuration.
const RUNTIME: &str = "under-test";

/// A running daemon. Dropping it ends it and removes what it has made.
pub struct Docker {
    dir: TempDir,
    daemon: Child,
    /// What of [`SHARED_STATE`] was not there before.
    new: Vec<&'static str>,
}

impl Docker {
    /// Starts one and gives it the image.
    pub fn start() -> Self {
        let new = SHARED_STATE.into_iter().filter(|place| !Path::new(place).exists()).collect();
        // As on a host that uses bridges and port mappings.
        tool(
            "modprobe -a br_netfilter overlay iptable_nat iptable_filter xt_conntrack xt_MASQUERADE xt_addrtype",
        );
        let dir = host_scratch();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let config = serde_json::json!({
            "runtimes": { RUNTIME: { "path": Runtime::under_test().path() } }, "default-runtime": RUNTIME,
            "data-root": path("data"), "exec-root": path("exec"), "pidfile": path("pid"),
            "hosts": [format!("unix://{}", path("socket"))], "storage-driver": "overlay2",
        });
        fs::write(dir.path().join("daemon.json"), config.to_string()).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir(&bin).unwrap();
        symlink(Runtime::under_test().path(), bin.join("containerd-shim-stockade-v2")).unwrap();
        let path = std::env::var("PATH").expect("a PATH");
        let daemon = Command::new("dockerd")
            .env("PATH", format!("{}:{path}", bin.display()))
            .arg("--config-file")
            .arg(dir.path().join("daemon.json"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("start dockerd");
        let this = Docker { dir, daemon, new };
        this.wait_until_it_answers();
        let archive = containerd::image(this.dir.path());
        this.docker(&["load", "--quiet", "--input", &archive.display().to_string()]).code(0);
        this
    }

    fn wait_until_it_answers(&self) {
        let begin = Instant::now();
        while !self.command(&["version"]).output().expect("run docker").status.success() {
            let log = || fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(begin.elapsed() < HANG, "dockerd does not answer:\n{}", log());
        }
    }

    /// A directory for a case's own files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A call of docker(1).
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("docker");
        let config = self.dir.path().join("client");
        command.arg("--config").arg(config).arg("--host");
        command.arg(format!("unix://{}", self.dir.path().join("socket").display())).args(words);
        command
    }

    /// Calls docker(1) and waits for its end.
    #[track_caller]
    pub fn docker(&self, words: &[&str]) -> Ended {
        Program::spawn(self.command(words), Stdin::Null).finish()
    }

    /// Runs a shell script in a new container with these options from beginning to end.
    #[track_caller]
    pub fn run(&self, options: &[&str], script: &str) -> Ended {
        self.docker(&[&["run", "--rm"], options, &[IMAGE, "sh", "-c", script]].concat())
    }

    /// Leaves a container with this name behind that runs a shell script.
    #[track_caller]
    pub fn detached(&self, name: &str, options: &[&str], script: &str) {
        let words = [&["run", "--detach", "--name", name], options, &[IMAGE, "sh", "-c", script]].concat();
        self.docker(&words).code(0);
    }

    /// One value of what `inspect` tells of a container, by its place.
    #[track_caller]
    pub fn inspect(&self, name: &str, pointer: &str) -> Value {
        let text = self.docker(&["inspect", "--type", "container", name]).ok();
        let all: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        all[0].pointer(pointer).unwrap_or_else(|| panic!("no {pointer} in {text}")).clone()
    }

    /// Waits until `inspect` has this value there.
    #[track_caller]
    pub fn wait_for(&self, name: &str, pointer: &str, value: impl Into<Value>) {
        let (begin, value) = (Instant::now(), value.into());
        while self.inspect(name, pointer) != value {
            assert!(
                begin.elapsed() < HANG,
                "hung: {pointer} is {}, not {value}",
                self.inspect(name, pointer)
            );
        }
    }

    /// Waits until a container has written this line.
    #[track_caller]
    pub fn wait_for_line(&self, name: &str, line: &str) {
        let begin = Instant::now();
        loop {
            let logs = self.docker(&["logs", name]).code(0).text();
            if logs.lines().any(|written| written == line) {
                return;
            }
            assert!(begin.elapsed() < HANG, "hung: {name} does not write {line:?}: {logs}");
        }
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if let Ok(containers) = self.command(&["ps", "--all", "--quiet"]).output() {
            let ids = String::from_utf8_lossy(&containers.stdout).into_owned();
            let ids: Vec<_> = ids.split_whitespace().collect();
            if !ids.is_empty() {
                let _ = self.command(&[&["rm", "--force"], &ids[..]].concat()).output();
            }
        }
        let pid = nix::unistd::Pid::from_raw(self.daemon.id().cast_signed());
        // It ends its containerd with itself, and takes its mounts away.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.daemon.wait();
        // Once it has been asked for the host's network, it leaves that one's name mounted.
        let _ = nix::mount::umount(&self.dir.path().join("exec/netns/default"));
        for place in &self.new {
            let _ = fs::remove_dir_all(place);
        }
        let _ = fs::remove_dir(CGROUP);
        if Path::new("/sys/class/net").join(BRIDGE).exists() {
            tool(&format!("ip link del {BRIDGE}"));
        }
    }
}
