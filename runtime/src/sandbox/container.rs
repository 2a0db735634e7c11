//! One container of a command's sandbox: its state, and what other commands ask of it on its control socket.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use nix::sys::signal::Signal;
use oci_spec::runtime::{Hook, LinuxResources};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::control::{self, AsyncConversation, ProcessInfo, Reply, Request};
use super::volumes::Volumes;
use super::{Error, Sandbox, agent, cgroup, enter, run_hooks_in};
use crate::bundle::guest::{self, Bind};
use crate::network::{self, Demand};
use crate::size;
use crate::state::{State, StateDir, Status};

/// How long execs of a container that has ended may take to be told so.
const EXEC_TIMEOUT: Duration = Duration::from_secs(5);

/// A container.
pub(super) struct Container {
    /// The VM it is in.
    pub sandbox: Rc<Sandbox>,
    /// Its state directory.
    pub dir: Rc<StateDir>,
    /// What stands there.
    pub state: RefCell<State>,
    /// Its init, by its number in the guest.
    pub init: Cell<u32>,
    /// Its init has ended.
    pub ended: Cell<bool>,
    /// What it has in common with the others of its VM.
    pub vm: Rc<Common>,
    /// The one that the VM was made for, unless it is this.
    pub first: Option<Rc<Container>>,
    /// The namespaces that its command came from, where its hooks run.
    pub outside: Rc<[OwnedFd]>,
    /// Hooks to run once it has been started.
    pub poststart: RefCell<Vec<Hook>>,
    /// What it is again when it is paused no more.
    thawed: Cell<Status>,
    execs: RefCell<Vec<JoinHandle<()>>>,
    exec_count: Cell<u64>,
    /// The processes of the host that stand for execs.
    exec_pids: RefCell<BTreeSet<i32>>,
}

/// What the containers of a VM have in common.
#[derive(Default)]
pub(super) struct Common {
    /// The agent does not do what it must.
    pub given_up: Notify,
    /// The first container has been killed, though it has ended and the VM is there for others only.
    pub unwanted: Notify,
    /// What they mount.
    pub volumes: RefCell<Volumes>,
    /// Containers that came later, with who waits for their names.
    pub further: RefCell<BTreeMap<String, Rc<Notify>>>,
}

impl Container {
    /// The one that a VM was made for, with what of it is in the share.
    pub fn first(sandbox: Sandbox, dir: &Rc<StateDir>, state: State, binds: &[Bind]) -> Rc<Self> {
        let vm = Rc::<Common>::default();
        binds.iter().for_each(|bind| vm.volumes.borrow_mut().know(bind, &state.id));
        let outside = sandbox.outside.clone();
        Rc::new(Self::new(Rc::new(sandbox), dir.clone(), state, vm, None, outside))
    }

    /// One that has come to this, by a command from these namespaces.
    pub fn further(self: &Rc<Self>, dir: Rc<StateDir>, state: State, outside: Vec<OwnedFd>) -> Rc<Self> {
        let first = self.first.clone().unwrap_or_else(|| self.clone());
        Rc::new(Self::new(self.sandbox.clone(), dir, state, self.vm.clone(), Some(first), outside.into()))
    }

    fn new(
        sandbox: Rc<Sandbox>,
        dir: Rc<StateDir>,
        state: State,
        vm: Rc<Common>,
        first: Option<Rc<Container>>,
        outside: Rc<[OwnedFd]>,
    ) -> Self {
        Container {
            sandbox,
            dir,
            state: RefCell::new(state),
            init: Cell::new(0),
            ended: Cell::new(false),
            vm,
            first,
            outside,
            poststart: RefCell::default(),
            thawed: Cell::new(Status::Running),
            execs: RefCell::default(),
            exec_count: Cell::new(0),
            exec_pids: RefCell::default(),
        }
    }

    /// Its id.
    pub fn id(&self) -> Rc<str> {
        self.state.borrow().id.as_str().into()
    }

    /// Writes down what it is now.
    pub fn set_status(&self, status: Status) -> Result<(), Error> {
        self.state.borrow_mut().status = status;
        Ok(self.dir.save(&self.state.borrow())?)
    }

    /// Writes down what of the network has to be taken back.
    pub fn save_network(&self, record: network::Record) -> Result<(), Error> {
        let keeper = self.first.as_deref().unwrap_or(self);
        keeper.state.borrow_mut().network = Some(record);
        Ok(keeper.dir.save(&keeper.state.borrow())?)
    }

    /// Runs hooks of the container where its command came from.
    pub async fn run_hooks(&self, kind: &'static str, list: &[Hook]) -> Result<(), Error> {
        let state = self.state.borrow().to_oci_json();
        run_hooks_in(&self.outside, kind, list, state).await
    }

    /// Lets the workload run.
    pub async fn start(&self) -> Result<(), Error> {
        self.sandbox.set_resolver().await?;
        self.sandbox
            .agent
            .start(&self.id())
            .await
            .map_err(|source| Error::Agent { what: "start the container", source })?;
        if self.first.is_none() {
            self.sandbox.timeline.mark_started(&self.id(), self.dir.path());
        }
        self.set_status(Status::Running)?;
        let poststart = self.poststart.take();
        if let Err(e) = self.run_hooks("poststart", &poststart).await {
            // The runtime specification, lifecycle: the container is stopped, and who started it is told.
            if let Err(source) = self.kill(Signal::SIGKILL as i32, true).await {
                tracing::warn!("{}", Error::Agent { what: "stop the container", source });
            }
            return Err(e);
        }
        Ok(())
    }

    /// Signals its init, or all its processes.
    async fn kill(&self, signal: i32, all: bool) -> Result<(), agent::Error> {
        match self.sandbox.agent.signal(&self.id(), "", signal, all).await {
            // Then its VM is killed, and with it the container.
            Err(agent::Error::Silent) => {
                self.vm.given_up.notify_one();
                Ok(())
            }
            other => other,
        }
    }

    /// Answers one command.
    pub async fn converse(self: Rc<Self>, talk: AsyncConversation) {
        let (request, fds) = match talk.recv::<Request>().await {
            Ok(Some(packet)) => packet,
            Ok(None) => return,
            Err(e) => return tracing::warn!("a command was not understood: {e}"),
        };
        let result = match request {
            Request::Exec { pid, stdio, ignore_paused, cgroup } => {
                let me = self.clone();
                let exec = async move {
                    let result = me.exec(&talk, fds, pid, stdio, ignore_paused, &cgroup).await;
                    me.exec_pids.borrow_mut().remove(&pid);
                    if let Err(message) = result {
                        let _ = talk.send(&Reply::Failed { message }, &[]);
                    }
                };
                self.execs.borrow_mut().retain(|exec| !exec.is_finished());
                self.execs.borrow_mut().push(tokio::task::spawn_local(exec));
                return;
            }
            Request::Enter { stdio } => {
                let exec_id = self.first.as_deref().unwrap_or(&self).next_exec_id();
                tokio::task::spawn_local(async move {
                    if let Err(message) = enter::enter(&self.sandbox, &talk, fds, stdio, &exec_id).await {
                        let _ = talk.send(&Reply::Failed { message }, &[]);
                    }
                });
                return;
            }
            Request::Create { id, stdio } => {
                tokio::task::spawn_local(async move { self.take_in(talk, fds, &id, stdio).await });
                return;
            }
            Request::Execs => match self.execs() {
                Ok(list) => {
                    let _ = talk.send(&Reply::Execs, &[list.as_fd()]);
                    return;
                }
                Err(e) => Err(e),
            },
            Request::Processes => match self.processes().await {
                Ok(list) => {
                    let _ = talk.send(&Reply::Processes, &[list.as_fd()]);
                    return;
                }
                Err(e) => Err(e),
            },
            Request::Stats => match self.stats().await {
                Ok(stats) => {
                    let _ = talk.send(&Reply::Stats, &[stats.as_fd()]);
                    return;
                }
                Err(e) => Err(e),
            },
            Request::Update => self.update(fds).await,
            Request::Start => self.start_on_request().await,
            Request::Kill { signal, .. } if self.ended.get() => {
                if signal == Signal::SIGKILL as i32 {
                    self.vm.unwanted.notify_one();
                }
                Ok(())
            }
            Request::Kill { signal, all } => self.kill(signal, all).await.map_err(|e| e.to_string()),
            Request::Pause => self.freeze(true).await,
            Request::Resume => self.freeze(false).await,
            Request::Signal { .. } | Request::Resize { .. } => {
                Err("there is no process to do that to".into())
            }
        };
        let reply = match result {
            Ok(()) => Reply::Done,
            Err(message) => Reply::Failed { message },
        };
        let _ = talk.send(&reply, &[]);
    }

    async fn start_on_request(&self) -> Result<(), String> {
        match self.state.borrow().status {
            Status::Created => {}
            Status::Creating => return Err("cannot start a container that is still being created".into()),
            Status::Stopped => return Err("cannot start a container that has stopped".into()),
            Status::Running | Status::Paused => {
                return Err("cannot start an already running container".into());
            }
        }
        // Interfaces that came since `create` are as good as those that were there.
        let rewired = self.sandbox.rewire_network(Demand::Strict, |record| self.save_network(record)).await;
        rewired.map_err(|e| e.to_string())?;
        self.start().await.map_err(|e| e.to_string())
    }

    async fn freeze(&self, freeze: bool) -> Result<(), String> {
        let id = self.id();
        let status = self.state.borrow().status;
        let (result, next) = match (freeze, status) {
            (true, Status::Running | Status::Created) => {
                self.thawed.set(status);
                (self.sandbox.agent.pause(&id).await, Status::Paused)
            }
            (false, Status::Paused) => (self.sandbox.agent.resume(&id).await, self.thawed.get()),
            (true, other) => return Err(format!("container not running: it is {}", other.as_str())),
            (false, other) => return Err(format!("container not paused: it is {}", other.as_str())),
        };
        result.map_err(|e| e.to_string())?;
        self.set_status(next).map_err(|e| e.to_string())
    }

    async fn update(&self, fds: Vec<OwnedFd>) -> Result<(), String> {
        let bytes = control::read_attachment(fds).map_err(|e| e.to_string())?;
        let resources: LinuxResources = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        let limit = size::memory_limit(&resources).map_err(|e| e.to_string())?;
        let guests = serde_json::to_vec(&guest::guests_part(resources.clone())).map_err(|e| e.to_string())?;
        let before = match self.sandbox.promise(&self.id(), limit).await {
            Ok(before) => before,
            Err(e) => {
                self.save_size().map_err(|e| e.to_string())?;
                return Err(e.to_string());
            }
        };
        let updated = self.sandbox.agent.update(&self.id(), guests).await;
        if updated.is_err() {
            self.sandbox.restore(&self.id(), before);
        }
        self.sandbox.shrink().await;
        self.save_size().map_err(|e| e.to_string())?;
        updated.map_err(|e| e.to_string())?;
        let mut state = self.state.borrow_mut();
        if let Some(path) = &state.cgroup {
            cgroup::apply(path, &resources, state.vm).map_err(|e| e.to_string())?;
        }
        state.resources = resources;
        self.dir.save(&state).map_err(|e| e.to_string())
    }

    /// Writes down how big the VM is now.
    pub fn save_size(&self) -> Result<(), Error> {
        let size = self.sandbox.size();
        self.state.borrow_mut().vm = size;
        let keeper = self.first.as_deref().unwrap_or(self);
        if self.first.is_some() && std::mem::replace(&mut keeper.state.borrow_mut().vm, size) == size {
            return Ok(());
        }
        Ok(keeper.dir.save(&keeper.state.borrow())?)
    }

    async fn stats(&self) -> Result<OwnedFd, String> {
        let stats = self.sandbox.agent.stats(&self.id()).await.map_err(|e| e.to_string())?;
        let traffic = self.sandbox.traffic().map_err(|e| e.to_string())?;
        let bytes = super::stats::as_runc_has_it(&stats, &traffic).to_string();
        control::attachment(bytes.as_bytes()).map_err(|e| e.to_string())
    }

    fn execs(&self) -> Result<OwnedFd, String> {
        let bytes = serde_json::to_vec(&*self.exec_pids.borrow()).map_err(|e| e.to_string())?;
        control::attachment(&bytes).map_err(|e| e.to_string())
    }

    async fn processes(&self) -> Result<OwnedFd, String> {
        let list = self.sandbox.agent.processes(&self.id()).await.map_err(|e| e.to_string())?;
        let list: Vec<ProcessInfo> = list
            .into_iter()
            .map(|p| ProcessInfo {
                pid: p.pid,
                ppid: p.ppid,
                uid: p.uid,
                cpu_ns: p.cpu_ns,
                started: p.started,
                tty: p.tty,
                state: p.state,
                command: p.command,
            })
            .collect();
        let bytes = serde_json::to_vec(&list).map_err(|e| e.to_string())?;
        control::attachment(&bytes).map_err(|e| e.to_string())
    }

    /// Runs a further process for the command at the other end of `talk`, and as long as that lives.
    async fn exec(
        &self,
        talk: &AsyncConversation,
        fds: Vec<OwnedFd>,
        pid: i32,
        wanted: [bool; 3],
        ignore_paused: bool,
        cgroup: &str,
    ) -> Result<(), String> {
        match self.state.borrow().status {
            Status::Paused if !ignore_paused => {
                return Err("cannot exec in a paused container (use --ignore-paused to override)".into());
            }
            Status::Creating | Status::Stopped => return Err("cannot exec in a stopped container".into()),
            _ => {}
        }
        let process = control::read_attachment(fds).map_err(|e| e.to_string())?;
        let (id, exec_id) = (self.id(), self.next_exec_id());
        let streams = self.sandbox.connect_streams(wanted, &id, &exec_id).map_err(|e| e.to_string())?;
        let exec = self.sandbox.agent.exec_in(&id, &exec_id, process, wanted, cgroup, ignore_paused);
        exec.await.map_err(|e| e.to_string())?;
        self.exec_pids.borrow_mut().insert(pid);
        enter::follow(&self.sandbox, talk, (&id, &exec_id), streams).await
    }

    fn next_exec_id(&self) -> String {
        let count = self.exec_count.get();
        self.exec_count.set(count + 1);
        format!("exec-{count}")
    }

    /// The container's end is the end of its execs; their commands are told before the VM goes.
    pub async fn finish_execs(&self) {
        let execs = self.execs.take();
        let _ = timeout(EXEC_TIMEOUT, async {
            for exec in execs {
                let _ = exec.await;
            }
        })
        .await;
    }
}
