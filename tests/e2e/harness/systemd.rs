//! A systemd that runs a host within the lab: in namespaces of its own, over the lab's files, with its bus.
//!
//! The lab itself has none: its init is the suite's. What is to meet systemd runs in these namespaces, in a cgroup below
//! systemd's root, because the kernel lets nobody be moved into a namespace of cgroups from outside.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::HANG;
use super::program::{Ended, Exit, Program, Stdin};
use super::runtime::Id;

/// Mounts what systemd finds mounted on a host, once it has been told that this process is alone in its cgroup. /tmp is the
/// lab's, for bundles, and so nothing that is to be tidied up at boot.
const BOOT: &str = "read go; mount -t proc proc /proc && umount /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup \
                    && for place in /run /var/log /dev/shm; do mount -t tmpfs tmpfs $place || exit; done \
                    && mkdir -p /run/systemd/system \
                    && ln -s /dev/null /run/systemd/system/systemd-tmpfiles-setup.service \
                    && exec env container=lab /lib/systemd/systemd --system --unit=basic.target";

/// A host that systemd runs. Dropping it ends all that is on it.
pub struct Systemd {
    unshare: Program,
    pid: i32,
    root: PathBuf,
}

impl Systemd {
    /// Boots one.
    #[track_caller]
    pub fn boot() -> Self {
        let cgroups = Path::new("/sys/fs/cgroup");
        let root = cgroups.join(Id::new().as_str());
        let join = |cgroup: &Path, pid: i32| fs::write(cgroup.join("cgroup.procs"), pid.to_string()).unwrap();
        fs::write(cgroups.join("cgroup.subtree_control"), "+memory +cpu +cpuset +io +pids").unwrap();
        fs::create_dir(&root).unwrap();
        let mut command = Command::new("unshare");
        command.args(["--fork", "--kill-child", "--pid", "--mount", "--cgroup", "--propagation", "private"]);
        command.args(["sh", "-c", BOOT]);
        let enter = root.join("cgroup.procs");
        // SAFETY: writes to a file, which a forked process may.
        unsafe { command.pre_exec(move || fs::write(&enter, "0")) };
        let mut unshare = Program::spawn(command, Stdin::Pipe);
        let children = format!("/proc/{0}/task/{0}/children", unshare.pid());
        let begin = Instant::now();
        let pid = loop {
            let found = fs::read_to_string(&children).unwrap_or_default();
            if let Some(pid) = found.split_whitespace().next() {
                break pid.parse().unwrap();
            }
            assert!(begin.elapsed() < HANG, "hung: {}", unshare.report());
        };
        join(cgroups, unshare.pid());
        fs::create_dir(root.join("callers")).unwrap();
        unshare.write("go\n");
        let mut systemd = Self { unshare, pid, root };
        loop {
            // The bus is there when systemd is.
            let state = systemd.call(&["systemctl", "is-system-running", "--wait"]).text();
            if matches!(state.trim(), "running" | "degraded") {
                return systemd;
            }
            let ended = systemd.unshare.ended_within(Duration::from_millis(1));
            assert!(!ended && begin.elapsed() < HANG, "{state}\n{}", systemd.unshare.report());
        }
    }

    /// A command on that host.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid.to_string(), "--mount", "--pid", "--cgroup", "--"]).args(words);
        let enter = self.root.join("callers/cgroup.procs");
        // SAFETY: writes to a file, which a forked process may.
        unsafe { command.pre_exec(move || fs::write(&enter, "0")) };
        command
    }

    /// Runs a command on that host.
    #[track_caller]
    pub fn call(&self, words: &[&str]) -> Ended {
        Program::spawn(self.command(words), Stdin::Null).finish()
    }

    /// Runs a command that leaves something running on that host, which has its streams.
    #[track_caller]
    pub fn detach(&self, words: &[&str]) -> Exit {
        let mut command = self.command(words);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Program::spawn_as_is(command, Stdin::Null).exit()
    }

    /// Where the lab sees a cgroup of that host.
    pub fn cgroup(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// A property of a unit.
    #[track_caller]
    pub fn property(&self, unit: &str, name: &str) -> String {
        self.call(&["systemctl", "show", "--value", "--property", name, unit])
            .code(0)
            .text()
            .trim()
            .to_owned()
    }

    /// Waits until there is no such unit: systemd forgets one that has ended when it next has nothing else to do.
    #[track_caller]
    pub fn wait_gone(&self, unit: &str) {
        let begin = Instant::now();
        loop {
            let found = self
                .call(&["systemctl", "list-units", "--all", "--plain", "--no-legend", unit])
                .code(0)
                .text();
            if found.is_empty() {
                return;
            }
            assert!(begin.elapsed() < HANG, "hung: {found}");
        }
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = fs::write(self.root.join("cgroup.kill"), "1");
        self.unshare.signal(nix::sys::signal::Signal::SIGKILL);
        self.unshare.exit();
        let begin = Instant::now();
        let is_empty = || {
            let events = fs::read_to_string(self.root.join("cgroup.events")).unwrap_or_default();
            events.contains("populated 0")
        };
        while !is_empty() && begin.elapsed() < HANG {}
        remove_tree(&self.root);
    }
}

/// Removes a cgroup and those below it.
fn remove_tree(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}
