//! The runtimes that are compared, and one run of one of them.

use super::Context;
use super::result::Results;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;
use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

/// What `echo` says in every run.
pub const GREETING: &str = "hello";

/// Seconds of the build machine's time after which a run has stalled. The virtual clock is no measure for that:
/// while the lab waits for its disk, which works in real time, it jumps ahead by as much as it likes.
const LIMIT: u64 = 60;

/// Names of VM-isolated runtimes with runc's command line, beside stockade.
const OTHER_VM_RUNTIMES: [&str; 3] = ["krun", "runv", "kata-runtime"];

/// A runtime with runc's command line.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// Its name, on PATH.
    pub name: String,
    /// Whether its containers run in a VM, so that there are exits to count.
    pub has_vm: bool,
    /// Whether it writes down the phases of a start.
    pub has_timeline: bool,
}

/// What one run took.
pub struct Run {
    /// From before fork to after wait, in seconds of the lab's clock.
    pub seconds: f64,
    /// CLOCK_MONOTONIC before fork and after wait, in nanoseconds.
    pub span_ns: (u64, u64),
}

impl Runtime {
    /// Stockade, runc, crun and every other VM-isolated runtime that is there.
    pub fn all_on_path() -> Vec<Runtime> {
        let known = ["stockade", "runc", "crun"].into_iter().chain(OTHER_VM_RUNTIMES);
        known
            .filter(|name| on_path(name))
            .map(|name| Runtime {
                name: name.into(),
                has_vm: !matches!(name, "runc" | "crun"),
                has_timeline: name == "stockade",
            })
            .collect()
    }

    /// One `run` of a bundle that says [`GREETING`], checked for its output and exit code. One that stalls is
    /// ended and tried once more, with a note.
    pub fn run_echo(
        &self,
        bundle: &Bundle,
        timeline: Option<&Path>,
        results: &mut Results,
    ) -> Result<Run, String> {
        match self.try_echo(bundle, timeline)? {
            Some(run) => return Ok(run),
            None => {
                results.notes.push(format!("{}: a run stalled for {LIMIT} s and was repeated", self.name))
            }
        }
        self.try_echo(bundle, timeline)?.ok_or_else(|| format!("two runs in a row stalled for {LIMIT} s"))
    }

    /// None when it stalled.
    fn try_echo(&self, bundle: &Bundle, timeline: Option<&Path>) -> Result<Option<Run>, String> {
        let id = "bench-echo";
        let (mut output, stdout) = std::io::pipe().or_say("make a pipe")?;
        let (mut errors, stderr) = std::io::pipe().or_say("make a pipe")?;
        let mut command = self.run_command(bundle, id);
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        if let Some(path) = timeline {
            command.env("STOCKADE_TIMELINE", path);
        }
        let before = monotonic_ns();
        let start = Instant::now();
        let mut child = command.spawn().or_say(format!("run {}", self.name))?;
        let status = wait_for(&mut child)?;
        let seconds = start.elapsed().as_secs_f64();
        let after = monotonic_ns();
        drop(command);
        let Some(status) = status else {
            self.remove(child, id);
            return Ok(None);
        };
        let (output, errors) = (read_available(&mut output)?, read_available(&mut errors)?);
        if !status.success() || output != format!("{GREETING}\n") {
            return Err(format!("{} run: {status}, stdout {output:?}, stderr {errors:?}", self.name));
        }
        Ok(Some(Run { seconds, span_ns: (before, after) }))
    }

    /// The command that runs a bundle.
    pub fn run_command(&self, bundle: &Bundle, id: &str) -> Command {
        let mut command = Command::new(&self.name);
        command.args(["run", "--bundle"]).arg(bundle.folder.path()).arg(id);
        command
    }

    /// Ends a run by force. Twice, because one that has stalled may hold its container until it is killed.
    pub fn remove(&self, mut child: Child, id: &str) {
        let delete = || Command::new(&self.name).args(["delete", "--force", id]).output();
        let _ = delete();
        let _ = child.kill();
        let _ = child.wait();
        let _ = delete();
    }
}

/// What is in a pipe now. It holds more than any run here writes, and a process that a runtime left behind
/// with the other end is no reason to wait.
fn read_available(pipe: &mut PipeReader) -> Result<String, String> {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    while readable(pipe, PollTimeout::ZERO)? {
        match pipe.read(&mut buffer).or_say("read a run's output")? {
            0 => break,
            n => text.extend_from_slice(buffer.get(..n).unwrap_or_default()),
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The exit status; none when the limit came first.
fn wait_for(child: &mut Child) -> Result<Option<ExitStatus>, String> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id() as libc::pid_t, 0) };
    if fd < 0 {
        return Err(format!("watch a run: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let process = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    match readable_in_time(&process)? {
        true => child.wait().map(Some).or_say("wait for a run"),
        false => Ok(None),
    }
}

/// Whether a descriptor becomes readable before a run counts as stalled.
pub fn readable_in_time(fd: &impl AsFd) -> Result<bool, String> {
    let start = outer_seconds()?;
    loop {
        if readable(fd, PollTimeout::from(1000u16))? {
            return Ok(true);
        }
        if outer_seconds()? > start + LIMIT {
            return Ok(false);
        }
    }
}

/// The build machine's time in seconds: QEMU's real-time clock follows that one.
fn outer_seconds() -> Result<u64, String> {
    let text =
        std::fs::read_to_string("/sys/class/rtc/rtc0/since_epoch").or_say("read the real-time clock")?;
    text.trim().parse().or_say("read the real-time clock")
}

fn readable(fd: &impl AsFd, limit: PollTimeout) -> Result<bool, String> {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, limit).map(|ready| ready > 0).or_say("wait for a run")
}

fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map(|now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64).unwrap_or_default()
}

fn on_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// A bundle over the lab's busybox root.
pub struct Bundle {
    folder: tempfile::TempDir,
}

impl Bundle {
    /// What `runc spec` writes, with this command and no terminal.
    pub fn new(argv: &[&str]) -> Result<Bundle, String> {
        let folder = tempfile::tempdir().or_say("make a bundle")?;
        let spec = Command::new("runc").args(["spec", "--bundle"]).arg(folder.path()).status();
        if !spec.or_say("run runc spec")?.success() {
            return Err("runc spec failed".into());
        }
        let path = folder.path().join("config.json");
        let text = std::fs::read_to_string(&path).or_say("read config.json")?;
        let mut config: serde_json::Value = serde_json::from_str(&text).or_say("read config.json")?;
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(argv);
        config["root"] = json!({ "path": "/bundles/busybox/rootfs", "readonly": true });
        std::fs::write(&path, config.to_string()).or_say("write config.json")?;
        Ok(Bundle { folder })
    }
}
