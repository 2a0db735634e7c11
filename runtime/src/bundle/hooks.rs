//! Hooks that run on the host: prestart, createRuntime, poststart, poststop.
//!
//! A hook gets the container's state on its standard input and runs in the namespaces that the caller lives in, not
//! in the supervisor's, and with no signal blocked or ignored. One that fails or takes longer than its timeout is an
//! error that names it; what that means for the container is the caller's business.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use oci_spec::runtime::{Hook, Hooks};

use crate::process::ProcessId;

/// How much of a failed hook's stderr an error quotes.
const STDERR_MAX: usize = 1000;

/// Real-time signals reach up to here (signal(7)).
const SIGNAL_MAX: i32 = 64;

/// A hook that did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// it could not be started
    #[error("cannot run the {kind} hook {path}: {source}")]
    Run { kind: &'static str, path: PathBuf, source: io::Error },
    /// it ended with an error
    #[error("the {kind} hook {path} failed with {status}: {stderr}")]
    Failed { kind: &'static str, path: PathBuf, status: std::process::ExitStatus, stderr: String },
    /// it took too long and was killed
    #[error("the {kind} hook {path} did not end within its timeout of {seconds} s and was killed")]
    Timeout { kind: &'static str, path: PathBuf, seconds: i64 },
}

/// The hooks that run before the container is made, by their kinds.
#[allow(deprecated)]
pub fn early(hooks: &Hooks) -> [(&'static str, &[Hook]); 2] {
    [("prestart", hooks.prestart()), ("createRuntime", hooks.create_runtime())]
        .map(|(kind, list)| (kind, list.as_deref().unwrap_or_default()))
}

/// Runs hooks in their order, until one fails. `state` is what they read; `namespaces` are those to run them in that
/// are not this process's.
pub fn run(kind: &'static str, hooks: &[Hook], state: &[u8], namespaces: &[OwnedFd]) -> Result<(), Error> {
    hooks.iter().try_for_each(|hook| run_one(kind, hook, state, namespaces))
}

/// Runs poststop hooks, each whatever becomes of the others: one that fails is logged (runtime specification, lifecycle).
pub fn run_last(hooks: &[Hook], state: &[u8], namespaces: &[OwnedFd]) {
    for hook in hooks {
        if let Err(e) = run_one("poststop", hook, state, namespaces) {
            tracing::warn!("{e}");
        }
    }
}

fn run_one(kind: &'static str, hook: &Hook, state: &[u8], namespaces: &[OwnedFd]) -> Result<(), Error> {
    let path = hook.path();
    let failed = |source| Error::Run { kind, path: path.clone(), source };
    // Files, not pipes: a hook that does not read its input or leaves a daemon behind cannot block us.
    let mut input = scratch().map_err(failed)?;
    input.write_all(state).and_then(|()| input.seek(SeekFrom::Start(0))).map_err(failed)?;
    let mut output = scratch().map_err(failed)?;

    let mut command = Command::new(path);
    let args = hook.args().as_deref().unwrap_or_default();
    if let Some((name, rest)) = args.split_first() {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    for entry in hook.env().iter().flatten() {
        let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
        command.env(name, value);
    }
    command.stdin(input).stdout(Stdio::null()).stderr(output.try_clone().map_err(failed)?);
    let namespaces = namespaces.iter().map(OwnedFd::try_clone).collect::<io::Result<Vec<_>>>();
    let namespaces = namespaces.map_err(failed)?;
    let prepare = move || {
        forget_signals()?;
        // Of whatever kind each is.
        Ok(namespaces.iter().try_for_each(|namespace| setns(namespace, CloneFlags::empty()))?)
    };
    // SAFETY: `prepare` makes system calls and allocates nothing, as is asked of code between fork and exec.
    unsafe { command.pre_exec(prepare) };
    let mut child = command.spawn().map_err(failed)?;
    if let Some(seconds) = hook.timeout() {
        let handle = ProcessId::of(child.id() as i32).ok().and_then(|id| id.open());
        let timeout = Duration::from_secs(seconds.unsigned_abs());
        if handle.is_some_and(|handle| !handle.wait(timeout)) {
            child.kill().and_then(|()| child.wait()).map_err(failed)?;
            return Err(Error::Timeout { kind, path: path.clone(), seconds });
        }
    }
    let status = child.wait().map_err(failed)?;
    if status.success() {
        return Ok(());
    }
    let mut stderr = Vec::new();
    output.seek(SeekFrom::Start(0)).map_err(failed)?;
    output.take(STDERR_MAX as u64).read_to_end(&mut stderr).map_err(failed)?;
    let stderr = String::from_utf8_lossy(&stderr).trim().replace('\n', "; ");
    Err(Error::Failed { kind, path: path.clone(), status, stderr })
}

/// The supervisor blocks the signals that it relays, and who started it may have had others ignored: both would
/// outlive an execve(2).
fn forget_signals() -> io::Result<()> {
    for number in 1..=SIGNAL_MAX {
        // SAFETY: installs the default action, no handler of ours. Those that cannot have another refuse.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
    Ok(sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?)
}

fn scratch() -> io::Result<File> {
    Ok(memfd_create(c"hook", MFdFlags::MFD_CLOEXEC)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{SigHandler, Signal, signal};
    use serde_json::json;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let mut hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["WHO=hook", "PATH=/bin:/usr/bin"]});
        if let Some(timeout) = timeout {
            hook["timeout"] = timeout.into();
        }
        serde_json::from_value(hook).unwrap()
    }

    #[test]
    fn a_hook_reads_the_state_and_has_its_own_environment_only() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out").display().to_string();
        let script = format!("cat > {out}; env >> {out}");
        run("prestart", &[hook(&script, Some(30))], b"STATE\n", &[]).unwrap();
        let text = std::fs::read_to_string(&out).unwrap();
        assert!(text.starts_with("STATE\n"), "{text}");
        assert!(text.contains("WHO=hook") && !text.contains("CARGO"), "{text}");
    }

    #[test]
    fn a_hook_begins_with_no_signal_blocked_or_ignored() {
        let relayed = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
        relayed.thread_block().unwrap();
        // SAFETY: no handler of ours; nothing in this program waits for this signal.
        unsafe { signal(Signal::SIGUSR2, SigHandler::SigIgn) }.unwrap();
        let script = "grep -E '^Sig(Blk|Ign)' /proc/self/status >&2; exit 1";
        let error = run("prestart", &[hook(script, None)], b"", &[]).unwrap_err().to_string();
        relayed.thread_unblock().unwrap();
        // 32 and 33 are the C library's own and cannot be set.
        let (_, masks) = error.split_once("SigBlk:\t").unwrap();
        let (blocked, ignored) = masks.split_once("; SigIgn:\t").unwrap();
        let ignored = u64::from_str_radix(ignored, 16).unwrap() & !(3 << 31);
        assert_eq!((blocked, ignored), ("0000000000000000", 0), "{error}");
    }

    #[test]
    fn the_first_hook_that_fails_ends_the_row_and_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("mark");
        let hooks = [hook("echo broken >&2; exit 3", None), hook(&format!("touch {}", mark.display()), None)];
        let error = run("poststart", &hooks, b"", &[]).unwrap_err().to_string();
        assert!(error.contains("poststart") && error.contains("exit status: 3") && error.contains("broken"));
        assert!(!mark.exists());
    }

    #[test]
    fn a_hook_that_hangs_is_killed() {
        let started = std::time::Instant::now();
        let error = run("poststart", &[hook("exec sleep 600", Some(1))], b"", &[]).unwrap_err();
        assert!(matches!(error, Error::Timeout { seconds: 1, .. }), "{error}");
        assert!(started.elapsed().as_secs() < 60);
    }
}
