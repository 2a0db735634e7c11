//! Hooks that run in the guest.
//!
//! Those of kind `createContainer` libcontainer runs, between the mounts and the change of root. Those of kind
//! `startContainer`, programs of the container, are run by the container's init itself, a moment before it becomes
//! the workload, so in all of its namespaces and with its rights. A hook reads the container's state from its standard input. One that fails ends the container.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{Hook, Spec};

use crate::error::Error;

/// How much of a failed hook's stderr an error quotes.
const STDERR_MAX: u64 = 1000;
/// How often a hook with a timeout is looked after. It has one to two orders of magnitude more time.
const TICK: Duration = Duration::from_millis(10);

/// Runs hooks in their order, until one fails. `state` is what they read; `env` is the environment of those that
/// have none of their own, as runc has it.
pub fn run(hooks: &[Hook], state: &[u8], env: &[String]) -> Result<(), String> {
    hooks.iter().try_for_each(|hook| {
        run_one(hook, state, env)
            .map_err(|e| format!("error running hook: startContainer {}: {e}", hook.path().display()))
    })
}

/// libcontainer's error for a createContainer hook has its outcome in the middle of a chain of steps.
pub fn name_failure(error: Error) -> Error {
    const BEGINNING: &str = "failed to run create container hooks err=";
    match &error {
        Error::Internal(text) => match text.strip_prefix(BEGINNING) {
            Some(rest) => {
                let outcome = rest.split(';').next().unwrap_or_default();
                Error::Internal(format!("a createContainer hook failed: {outcome}"))
            }
            None => error,
        },
        _ => error,
    }
}

fn run_one(hook: &Hook, state: &[u8], env: &[String]) -> Result<(), String> {
    let failed = |e: io::Error| e.to_string();
    // Files, not pipes: a hook that does not read its input or leaves a daemon behind cannot block us.
    let mut input = scratch(c"state").map_err(failed)?;
    input.write_all(state).and_then(|()| input.seek(SeekFrom::Start(0))).map_err(failed)?;
    let mut output = scratch(c"stderr").map_err(failed)?;

    let mut command = Command::new(hook.path());
    if let Some((name, rest)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(rest);
    }
    let env = hook.env().as_deref().unwrap_or(env);
    command.env_clear().envs(env.iter().map(|entry| entry.split_once('=').unwrap_or((entry, ""))));
    command.stdin(input).stdout(Stdio::null()).stderr(output.try_clone().map_err(failed)?);
    let mut child = command.spawn().map_err(failed)?;
    let timeout = hook.timeout().map(|seconds| Duration::from_secs(seconds.unsigned_abs()));
    let Some(status) = wait(&mut child, timeout).map_err(failed)? else {
        let seconds = hook.timeout().unwrap_or_default();
        return Err(format!("it did not end within its timeout of {seconds} s and was killed"));
    };
    if status.success() {
        return Ok(());
    }
    let mut stderr = Vec::new();
    output.seek(SeekFrom::Start(0)).map_err(failed)?;
    output.take(STDERR_MAX).read_to_end(&mut stderr).map_err(failed)?;
    let stderr = String::from_utf8_lossy(&stderr).trim().replace('\n', "; ");
    Err(format!("it failed with {}: {stderr}", how(status)))
}

/// As runc says it.
fn how(status: ExitStatus) -> String {
    match status.signal() {
        // SAFETY: strsignal(3) gives a string that stays as it is until the next call; the agent has one thread.
        Some(signal) => match unsafe { libc::strsignal(signal).as_ref() } {
            Some(name) => {
                // SAFETY: as above.
                let name = unsafe { CStr::from_ptr(name) };
                format!("signal: {}", name.to_string_lossy().to_lowercase())
            }
            None => status.to_string(),
        },
        None => status.to_string(),
    }
}

/// `None` when it had to be killed.
fn wait(child: &mut Child, timeout: Option<Duration>) -> io::Result<Option<ExitStatus>> {
    let Some(timeout) = timeout else { return child.wait().map(Some) };
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if begin.elapsed() >= timeout {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        sleep(TICK);
    }
}

fn scratch(name: &CStr) -> io::Result<File> {
    Ok(memfd_create(name, MFdFlags::MFD_CLOEXEC)?.into())
}

/// The state that hooks of the container read. Its init is the first process it sees.
pub fn state(spec: &Spec, id: &str, bundle: &Path) -> Vec<u8> {
    serde_json::json!({
        "ociVersion": spec.version(),
        "id": id,
        "status": "created",
        "pid": std::process::id(),
        "bundle": bundle,
        "annotations": spec.annotations(),
    })
    .to_string()
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let mut hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
        if let Some(timeout) = timeout {
            hook["timeout"] = timeout.into();
        }
        serde_json::from_value(hook).unwrap()
    }

    #[test]
    fn a_hook_reads_the_state_and_inherits_the_workloads_environment() {
        let env = ["PATH=/bin:/usr/bin".to_owned(), "A=b=c".to_owned()];
        let script = "cat >&2; echo $A $CARGO >&2; exit 7";
        let error = run(&[hook(script, Some(60))], b"STATE\n", &env).unwrap_err();
        assert!(error.contains("exit status: 7: STATE; b=c") && error.ends_with("b=c"), "{error}");
        run(&[hook("exit 0", None)], b"", &env).unwrap();
    }

    #[test]
    fn a_failure_in_libcontainer_is_that_of_a_hook() {
        let text = "failed to run create container hooks err=NonZeroExitCode(3); failed to initialize: x";
        let named = name_failure(Error::Internal(text.into())).to_string();
        assert_eq!(named, "a createContainer hook failed: NonZeroExitCode(3)");
        assert_eq!(name_failure(Error::Internal("other".into())).to_string(), "other");
    }

    #[test]
    fn a_hook_that_hangs_is_killed() {
        let error = run(&[hook("exec sleep 600", Some(1))], b"", &["PATH=/bin:/usr/bin".into()]).unwrap_err();
        assert!(error.contains("timeout of 1 s"), "{error}");
    }
}
