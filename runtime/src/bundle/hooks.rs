//! Hooks that run on the host: prestart, createRuntime, poststart, poststop.
//!
//! A hook gets the container's state on its standard input and runs in the mount namespace that the caller lives
//! in, not in the supervisor's. One that fails or takes longer than its timeout is an error that names it; what
//! that means for the container is the caller's business.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::Hook;

use crate::process::ProcessId;

/// How much of a failed hook's stderr an error quotes.
const STDERR_MAX: usize = 1000;

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

/// Runs hooks in their order, until one fails. `state` is what they read; `namespace` is the mount namespace to run
/// them in, if it is not this process's.
pub fn run(
    kind: &'static str,
    hooks: &[Hook],
    state: &[u8],
    namespace: Option<&OwnedFd>,
) -> Result<(), Error> {
    hooks.iter().try_for_each(|hook| run_one(kind, hook, state, namespace))
}

fn run_one(kind: &'static str, hook: &Hook, state: &[u8], namespace: Option<&OwnedFd>) -> Result<(), Error> {
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
    if let Some(namespace) = namespace {
        let namespace = namespace.try_clone().map_err(failed)?;
        // SAFETY: setns(2) is a system call and allocates nothing, as is asked of code between fork and exec.
        unsafe { command.pre_exec(move || Ok(setns(&namespace, CloneFlags::CLONE_NEWNS)?)) };
    }
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

fn scratch() -> io::Result<File> {
    Ok(memfd_create(c"hook", MFdFlags::MFD_CLOEXEC)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
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
        run("prestart", &[hook(&script, Some(30))], b"STATE\n", None).unwrap();
        let text = std::fs::read_to_string(&out).unwrap();
        assert!(text.starts_with("STATE\n"), "{text}");
        assert!(text.contains("WHO=hook") && !text.contains("CARGO"), "{text}");
    }

    #[test]
    fn the_first_hook_that_fails_ends_the_row_and_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("mark");
        let hooks = [hook("echo broken >&2; exit 3", None), hook(&format!("touch {}", mark.display()), None)];
        let error = run("poststart", &hooks, b"", None).unwrap_err().to_string();
        assert!(error.contains("poststart") && error.contains("exit status: 3") && error.contains("broken"));
        assert!(!mark.exists());
    }

    #[test]
    fn a_hook_that_hangs_is_killed() {
        let started = std::time::Instant::now();
        let error = run("poststop", &[hook("exec sleep 600", Some(1))], b"", None).unwrap_err();
        assert!(matches!(error, Error::Timeout { seconds: 1, .. }), "{error}");
        assert!(started.elapsed().as_secs() < 60);
    }
}
