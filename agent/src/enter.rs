//! Programs that whoever runs the host has run in the guest, outside of its containers, to look around in it.
//!
//! Refused unless the kernel's command line allows it, which only the host writes, before the first instruction. The
//! program comes from the host with the call: the guest has none but this one, and to run one of a container's image
//! here would be to let the workload out. It runs where the agent does, as root with every capability and in the guest's
//! own namespaces. Its cgroup is beside the containers', whose limits do not hold it up, and all that is left in that goes
//! with it.

use std::collections::HashMap;
use std::ffi::{CString, NulError};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::mount::MsFlags;
use nix::unistd::{ForkResult, Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, execve, fork, setsid};
use stockade_agent_protocol::messages::{EnterRequest, Stdio as Wanted};
use stockade_agent_protocol::{GUEST, check_id};

use crate::boot;
use crate::cgroup::Cgroup;
use crate::console;
use crate::container::Containers;
use crate::descriptor::Descriptor;
use crate::error::Error;
use crate::executor::restore_signals;
use crate::helper::{Helper, Record};
use crate::spec::ProcessFacts;
use crate::stdio::{self, ChildEnds, Drain, Ends, Relays};
use crate::supervise::{Made, Process};

/// Where the programs are.
const PROGRAMS: &str = "/run/stockade/enter";
/// Terminals of the guest itself; those of containers are in file systems of their own.
const TERMINALS: &str = "/dev/pts";

/// All that have been let in.
pub struct Entered {
    allowed: bool,
    containers: Arc<Containers>,
    /// `None` while one is being made.
    all: Mutex<HashMap<String, Option<Arc<Process>>>>,
}

impl Entered {
    /// None yet, and none ever unless it is `allowed`.
    pub fn new(allowed: bool, containers: Arc<Containers>) -> Arc<Self> {
        Arc::new(Self { allowed, containers, all: Mutex::default() })
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Process>>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets one in.
    pub async fn enter(&self, request: EnterRequest) -> Result<Pid, Error> {
        if !self.allowed {
            return Err(Error::Precondition("this guest was not started as one that can be entered".into()));
        }
        let id = request.exec_id.clone();
        check_id(&id).map_err(|e| Error::Invalid(format!("exec_id: {e}")))?;
        if self.all().contains_key(&id) {
            return Err(Error::Exists(format!("exec {id:?} exists already in the guest")));
        }
        let cgroup = Cgroup::of_guest(&id);
        cgroup.create(None)?;
        self.all().insert(id.clone(), None);
        match self.run(&id, &request, &cgroup).await {
            Ok(process) => {
                let pid = process.pid;
                self.all().insert(id, Some(process.clone()));
                tokio::spawn(async move {
                    process.reaped().await;
                    clear(&cgroup).await;
                });
                Ok(pid)
            }
            Err(e) => {
                clear(&cgroup).await;
                self.forget(&id);
                Err(e)
            }
        }
    }

    /// One of them.
    pub fn process(&self, id: &str) -> Result<Arc<Process>, Error> {
        let process = self.all().get(id).cloned().flatten();
        process.ok_or_else(|| Error::Precondition(format!("exec {id:?} does not exist in the guest")))
    }

    /// Its end has been told.
    pub fn forget(&self, id: &str) {
        self.all().remove(id);
        self.containers.rendezvous.forget(GUEST, Some(id));
    }

    async fn run(&self, id: &str, request: &EnterRequest, cgroup: &Cgroup) -> Result<Arc<Process>, Error> {
        let program = install(request)?;
        let nul = |_: NulError| Error::Invalid("arguments and environment must not contain NUL".into());
        let strings =
            |of: &[String]| of.iter().map(|s| CString::new(s.as_bytes())).collect::<Result<Vec<_>, _>>();
        let args = strings(&request.args).map_err(nul)?;
        let mut env = vec![format!("PATH={PROGRAMS}"), "HOME=/".into()];
        env.extend(request.env.iter().cloned());
        let env = strings(&env).map_err(nul)?;

        let wanted: &Wanted = &request.stdio;
        let facts = ProcessFacts { terminal: request.terminal, uid: 0, gid: 0, wants_home: false };
        let (child, ends, terminal) = if request.terminal {
            let (master, own) = terminal()?;
            (ChildEnds { stdin: Some(own), ..Default::default() }, None, Some(master))
        } else {
            let (child, ends) = stdio::pipes(wanted, &facts)?;
            (child, Some(ends), None)
        };
        let is_terminal = request.terminal;
        let name = request.args.first().cloned().unwrap_or_default();
        let reaper = self.containers.reaper();
        // The process that the helper makes is the agent's own child once the helper has ended.
        let mut helper = Helper::fork(reaper, move |reporter| {
            // SAFETY: this process has one thread.
            match unsafe { fork() } {
                Ok(ForkResult::Parent { child }) => Record::Done(Some(child)),
                Err(e) => Record::Failed(format!("forking: {}", e.desc())),
                Ok(ForkResult::Child) => {
                    let Err(e) =
                        prepare(&child, is_terminal, cgroup).and_then(|()| execve(&program, &args, &env));
                    reporter.send(&Record::CommandNotExecutable(format!("exec {name:?}: {}", e.desc())));
                    // SAFETY: ends this process at once.
                    unsafe { libc::_exit(127) }
                }
            }
        })?;
        let no_pid = || Error::Internal("a helper made a process without a pid".into());
        let pid = helper.outcome().await?.ok_or_else(no_pid)?;
        let exit = reaper.watch(pid);
        let ends = match &terminal {
            Some(terminal) => Ends::Terminal(terminal.clone()),
            None => Ends::Pipes(ends.unwrap_or_default()),
        };
        let relays = Relays::start(&self.containers.rendezvous, GUEST, id, wanted, ends)
            .map_err(|e| Error::os("watching the pipes of a process", e))?;
        let made = Made {
            container_id: GUEST.into(),
            exec_id: id.into(),
            pid,
            exit,
            terminal,
            relays,
            drain: Drain::WhatIsThere,
            cgroup: cgroup.clone(),
        };
        let process = Process::follow(made, self.containers.events.clone());
        match helper.into_reports().next().await {
            Ok(None) => Ok(process),
            Ok(Some(record)) => record.into_result().map(|_| process),
            Err(e) => Err(Error::os("waiting for the program to run", e)),
        }
    }
}

/// Ends what a process has left running, and takes its cgroup away.
async fn clear(cgroup: &Cgroup) {
    let killed = cgroup.kill();
    if let Err(e) = killed.and(cgroup.remove().await) {
        tracing::warn!("after a process of the guest: {e}");
    }
}

/// Puts the program where it is run from, with further names that it goes by.
fn install(request: &EnterRequest) -> Result<CString, Error> {
    let dir = Path::new(PROGRAMS);
    let failed = |e: std::io::Error| Error::os(format!("writing {:?} to {PROGRAMS}", request.name), e);
    let program = dir.join(name(&request.name)?);
    fs::create_dir_all(dir).map_err(failed)?;
    // The one of the same name may be running: that one keeps its file.
    let new = dir.join(".new");
    fs::write(&new, &request.program)
        .and_then(|()| fs::set_permissions(&new, fs::Permissions::from_mode(0o755)))
        .and_then(|()| fs::rename(&new, &program))
        .map_err(failed)?;
    for link in &request.links {
        match symlink(name(&request.name)?, dir.join(name(link)?)) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed(e)),
            _ => {}
        }
    }
    CString::new(program.into_os_string().into_encoded_bytes()).map_err(|e| failed(e.into()))
}

/// A name that leads nowhere else.
fn name(text: &str) -> Result<PathBuf, Error> {
    let path = Path::new(text);
    let mut parts = path.components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(only)), None) if only == path.as_os_str() => Ok(path.into()),
        _ => Err(Error::Invalid(format!("{text:?} is no name of a program"))),
    }
}

/// Both ends of a terminal: the agent's, and the program's.
fn terminal() -> Result<(Arc<Descriptor>, OwnedFd), Error> {
    if !Path::new(TERMINALS).join("ptmx").exists() {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        boot::mount_new("devpts", TERMINALS, flags, "mode=0620,ptmxmode=0666")?;
    }
    let (master, own) = console::pair().map_err(|e| Error::os("making a terminal", e))?;
    let master = Descriptor::from_blocking(master).map_err(|e| Error::os("watching a terminal", e))?;
    Ok((Arc::new(master), own))
}

/// Makes this process, a copy of the agent, one that has nothing of the agent's but its rights.
fn prepare(ends: &ChildEnds, terminal: bool, cgroup: &Cgroup) -> nix::Result<()> {
    let os = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(0));
    cgroup.join().map_err(os)?;
    // Unlike the agent, it may be killed when memory runs out.
    fs::write("/proc/self/oom_score_adj", "0").map_err(os)?;
    setsid()?;
    chdir("/")?;
    // What is not asked for stays /dev/null.
    let (out, error) = if terminal { (&ends.stdin, &ends.stdin) } else { (&ends.stdout, &ends.stderr) };
    ends.stdin.as_ref().map_or(Ok(()), dup2_stdin)?;
    out.as_ref().map_or(Ok(()), dup2_stdout)?;
    error.as_ref().map_or(Ok(()), dup2_stderr)?;
    if terminal {
        // SAFETY: TIOCSCTTY takes a number and changes no memory.
        Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })?;
    }
    restore_signals();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_programs_lead_nowhere_else() {
        for good in ["busybox", "[", "sh", "a b"] {
            assert_eq!(name(good).unwrap(), Path::new(good));
        }
        for bad in ["", ".", "..", "/sh", "a/b", "a/", "../x"] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }
}
