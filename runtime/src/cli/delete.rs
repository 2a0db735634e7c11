//! `stockade delete`: removes what a container that has stopped has left.
//!
//! It works from the state file alone, because there may be nobody to ask: the supervisor and the VMM may have been
//! killed at any moment.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::{Error, Global, Outcome};
use crate::bundle::hooks;
use crate::image::{self, scratch};
use crate::network;
use crate::process::ProcessId;
use crate::sandbox::{cgroup, join};
use crate::state::{self, State, StateDir, Status};

/// How long a killed process may take to be gone. A VMM gives its guest's memory back in that time.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Remove a container
#[derive(Args)]
pub struct Delete {
    /// Container identifier
    container_id: String,
    /// Kill it first if it still runs; it is no error if it does not exist
    #[arg(short, long)]
    force: bool,
}

pub fn delete(global: &Global, args: Delete) -> Outcome {
    let dir = match StateDir::open(&global.root, &args.container_id) {
        Err(state::Error::Missing { .. }) if args.force => return Ok(ExitCode::SUCCESS),
        other => other?,
    };
    if args.force
        && let Ok(state) = dir.load()
        && state.status() != Status::Stopped
    {
        // Who holds the lock may be waiting for this container, and then waits no longer.
        end_supervisor(&state)?;
    }
    let _lock = match dir.lock() {
        Err(state::Error::Missing { .. }) if args.force => return Ok(ExitCode::SUCCESS),
        other => other?,
    };
    let state = match dir.load() {
        Ok(state) => state,
        // Whoever made the directory was killed before it wrote anything; its VMM, without a VM yet, dies with it.
        Err(state::Error::Unfinished(_) | state::Error::Damaged(..)) if args.force => {
            dir.remove()?;
            return Ok(ExitCode::SUCCESS);
        }
        Err(e) => return Err(e.into()),
    };
    match state.status() {
        // Its processes may be about to end.
        Status::Stopped => match end(&state, &dir) {
            Err(_) if args.force => kill(&state, &dir)?,
            other => other?,
        },
        // The specification would have it refused; runc's callers count on it.
        Status::Created => kill(&state, &dir)?,
        _ if args.force => kill(&state, &dir)?,
        other => {
            return Err(Error::Refused(format!(
                "cannot delete container {} that is not stopped: it is {}; stop it, or use --force",
                state.id,
                other.as_str()
            )));
        }
    }
    if let Some(path) = &state.cgroup {
        cgroup::remove(path, state.supervisor).map_err(|e| Error::Refused(e.to_string()))?;
    }
    if let Some(scratch) = &state.scratch {
        scratch::remove(scratch).map_err(image::Error::from)?;
    }
    if let Some(record) = &state.network {
        network::clean_up(record)?;
    }
    dir.remove()?;
    let stopped = State { status: Status::Stopped, ..state };
    hooks::run_last(&stopped.poststop, &stopped.to_oci_json(), &[]);
    Ok(ExitCode::SUCCESS)
}

/// Kills the supervisor, and with it everything.
fn kill(state: &State, dir: &StateDir) -> Result<(), Error> {
    end_supervisor(state)?;
    end(state, dir)
}

fn end_supervisor(state: &State) -> Result<(), Error> {
    match state.supervisor.open() {
        Some(supervisor) => supervisor.signal(libc::SIGKILL).map_err(Error::io("kill the supervisor")),
        None => Ok(()),
    }
}

/// Waits until the container's processes are gone.
fn end(state: &State, dir: &StateDir) -> Result<(), Error> {
    gone("supervisor", Some(state.supervisor), false)?;
    if let Some(sandbox) = &state.sandbox
        && !join::is_cleared(dir, KILL_TIMEOUT)
    {
        return Err(Error::Refused(format!(
            "container {} does not end in the VM of {sandbox}, whose namespaces it shares: try again, or end {sandbox}",
            state.id
        )));
    }
    // It ends with its supervisor by itself; if it does not, it is made to.
    gone("VMM", state.vmm, true)
}

fn gone(name: &str, process: Option<ProcessId>, insist: bool) -> Result<(), Error> {
    let Some((process, handle)) = process.and_then(|process| Some((process, process.open()?))) else {
        return Ok(());
    };
    if insist {
        handle.signal(libc::SIGKILL).map_err(Error::io(format!("kill the {name}")))?;
    }
    if handle.wait(KILL_TIMEOUT) {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "the {name} (pid {}) does not end: try again, and see /proc/{}/stack for what it waits for",
        process.pid, process.pid
    )))
}
