//! One run of a program, from before fork to after wait, with a limit.

use super::Context;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};

/// Seconds of the build machine's time after which a run has stalled. The virtual clock is no measure for that:
/// while the lab waits for its disk, which works in real time, it jumps ahead by as much as it likes.
pub const LIMIT: u64 = 60;

/// A program that has ended, and what it left in its output.
#[derive(Debug)]
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// What is in its standard output at its end.
    pub stdout: String,
    /// What is in its standard error at its end.
    pub stderr: String,
    /// CLOCK_MONOTONIC before fork and after wait, in nanoseconds.
    pub span_ns: (u64, u64),
}

impl Ended {
    /// From before fork to after wait, in seconds of the lab's clock.
    pub fn seconds(&self) -> f64 {
        self.span_ns.1.saturating_sub(self.span_ns.0) as f64 / 1e9
    }
}

/// Runs a program with nothing to read. The child is handed back when it stalls.
pub fn run(command: &mut Command) -> Result<Result<Ended, Child>, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let (mut output, stdout) = std::io::pipe().or_say("make a pipe")?;
    let (mut errors, stderr) = std::io::pipe().or_say("make a pipe")?;
    command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    let before = monotonic_ns();
    let mut child = command.spawn().or_say(format!("run {name}"))?;
    let status = wait_for(&mut child)?;
    let after = monotonic_ns();
    // The command holds the writing ends of the pipes.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let Some(status) = status else { return Ok(Err(child)) };
    let (stdout, stderr) = (read_available(&mut output)?, read_available(&mut errors)?);
    Ok(Ok(Ended { status, stdout, stderr, span_ns: (before, after) }))
}

/// Runs a program that must succeed.
pub fn succeed(command: &mut Command) -> Result<Ended, String> {
    match run(command)? {
        Ok(ended) if ended.status.success() => Ok(ended),
        Ok(ended) => Err(format!("`{}`: {}: {}", line(command), ended.status, ended.stderr.trim())),
        Err(mut child) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(format!("`{}` stalled for {LIMIT} s", line(command)))
        }
    }
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
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
    match readable_in_time(&process(child.id() as i32)?)? {
        true => child.wait().map(Some).or_say("wait for a run"),
        false => Ok(None),
    }
}

/// Waits until a process has ended, whoever's child it is.
pub fn wait_until_gone(pid: i32) -> Result<(), String> {
    // It may be gone and reaped already.
    let Ok(process) = process(pid) else { return Ok(()) };
    match readable_in_time(&process)? {
        true => Ok(()),
        false => Err(format!("process {pid} did not end within {LIMIT} s")),
    }
}

fn process(pid: i32) -> Result<OwnedFd, String> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(format!("watch process {pid}: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
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

/// CLOCK_MONOTONIC.
pub fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map(|now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64).unwrap_or_default()
}
