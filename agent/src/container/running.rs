//! What is done with a container that has been made.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use libcontainer::container::{Container as State, ContainerStatus};
use oci_spec::runtime::LinuxResources;
use stockade_agent_protocol::check_id;

use super::{Container, STATE_DIR, lock};
use crate::cgroup::Cgroup;
use crate::error::Error;
use crate::supervise::Process;

impl Container {
    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Its user namespace, if it has one.
    pub(super) fn users(&self) -> std::io::Result<Option<OwnedFd>> {
        let open = || File::open(format!("/proc/{}/ns/user", self.init.pid));
        self.ids.are_mapped().then(|| open().map(OwnedFd::from)).transpose()
    }

    /// Its init, or the exec of that name.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        check_id(exec_id).map_err(|e| Error::Invalid(format!("exec_id: {e}")))?;
        match lock(&self.execs).get(exec_id) {
            Some(Some(process)) => Ok(process.clone()),
            _ => Err(Error::Precondition(format!(
                "exec {exec_id:?} does not exist in container {:?}",
                self.id
            ))),
        }
    }

    /// Lets the workload run, and waits until its execve has succeeded or failed.
    pub async fn start(&self) -> Result<(), Error> {
        let Some(mut reports) = lock(&self.unstarted).take() else {
            return Err(Error::Precondition(format!("container {:?} has been started already", self.id)));
        };
        if let Err(e) = self.notify() {
            return Err(if self.init.is_alive() {
                Error::os(format!("starting container {:?}", self.id), e)
            } else {
                Error::Precondition(format!("container {:?} ended before it was started", self.id))
            });
        }
        match reports.next().await {
            Ok(None) => Ok(()),
            Ok(Some(record)) => record.into_result().map(drop),
            Err(e) => Err(Error::os("waiting for the workload to run", e)),
        }
    }

    /// libcontainer's init waits for a connection to this socket. Done here rather than by libcontainer, which would
    /// read and write its state and need a process of its own for it. The path goes through a descriptor because a
    /// socket's path has only 108 bytes.
    pub(super) fn notify(&self) -> std::io::Result<()> {
        let dir = File::open(Path::new(STATE_DIR).join(&self.id))?;
        UnixStream::connect(format!("/proc/self/fd/{}/notify.sock", dir.as_raw_fd())).map(drop)
    }

    /// libcontainer lets a process join only a container that its state calls running. Said once, before the first
    /// exec's helper is there: libcontainer's way to write its state leaves a moment in which another reads half.
    pub(super) fn make_joinable(&self) -> Result<(), Error> {
        let mut joinable = lock(&self.joinable);
        if !*joinable {
            State::load(Path::new(STATE_DIR).join(&self.id))
                .and_then(|mut state| state.set_status(ContainerStatus::Running).save())
                .map_err(|e| Error::Internal(format!("marking container {:?} as running: {e}", self.id)))?;
            *joinable = true;
        }
        Ok(())
    }

    /// Its init, started or not, has not ended.
    pub(super) fn must_live(&self, even_paused: bool) -> Result<(), Error> {
        if !self.init.is_alive() {
            return Err(Error::Precondition(format!("container {:?} has stopped", self.id)));
        }
        if !even_paused && self.cgroup.is_frozen() {
            return Err(Error::Precondition(format!("container {:?} is paused", self.id)));
        }
        Ok(())
    }

    /// Freezes or thaws it.
    pub async fn freeze(&self, frozen: bool) -> Result<(), Error> {
        if !self.init.is_alive() {
            return Err(Error::Precondition(format!("container {:?} has stopped", self.id)));
        }
        if self.cgroup.is_frozen() == frozen {
            let state = if frozen { "is paused already" } else { "is not paused" };
            return Err(Error::Precondition(format!("container {:?} {state}", self.id)));
        }
        self.cgroup.freeze(frozen).await
    }

    /// Applies new limits.
    pub fn update(&self, resources: &[u8]) -> Result<(), Error> {
        let limits: LinuxResources = serde_json::from_slice(resources)
            .map_err(|e| Error::Invalid(format!("the resources cannot be read: {e}")))?;
        self.cgroup.limit(&limits)
    }

    /// Sends a signal to all processes.
    pub fn signal_all(&self, exec_id: &str, signal: i32) -> Result<(), Error> {
        if !exec_id.is_empty() {
            return Err(Error::Invalid("a signal goes to all processes or to one exec, not both".into()));
        }
        if signal == libc::SIGKILL {
            return self.cgroup.kill();
        }
        for pid in self.cgroup.pids()? {
            // SAFETY: plain system call. A process that ended since the list was read is ESRCH or, in theory,
            // another; the kernel has no signal for a whole cgroup but SIGKILL.
            unsafe { libc::kill(pid.as_raw(), signal) };
        }
        Ok(())
    }
}
