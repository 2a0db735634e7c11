//! The supervisor of a single container: what happens between the start of its VMM and the end of its container.
//!
//! One thread, one event loop. The container's story is one function from handshake to exit; beside it run the
//! relays, the signals, the console, and a task for each conversation of another command. The first that ends the
//! sandbox wins: the story, the VM, or a signal before there is a container.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::pending;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use nix::sys::signal::Signal;
use oci_spec::runtime::{Hook, Hooks, LinuxResources};
use stockade_agent_protocol::messages::SetNetworkRequest;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::agent::{self, Exit};
use super::cgroup::{self, Membership};
use super::control::{self, AsyncConversation, Listener, ProcessInfo, Reply, Request};
use super::reservation::Reservation;
use super::signals::Signals;
use super::single::Mode;
use super::stdio::{HostStdio, Relays};
use super::{Error, Sandbox, enter};
use crate::bundle::guest::Shown;
use crate::bundle::{guest, hooks};
use crate::state::{State, StateDir, Status};

/// How long the VMM may take to report what the broken connection to the agent means.
const ENDING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long execs of a container that has ended may take to be told so.
const EXEC_TIMEOUT: Duration = Duration::from_secs(5);

/// A running sandbox, shared by the tasks of its event loop.
pub(super) struct Supervisor {
    sandbox: Sandbox,
    dir: Rc<StateDir>,
    state: RefCell<State>,
    poststart: RefCell<Vec<Hook>>,
    interrupted: Notify,
    interrupt: Cell<Option<Signal>>,
    /// The agent does not do what it must.
    given_up: Notify,
    execs: RefCell<Vec<JoinHandle<()>>>,
    exec_count: Cell<u64>,
    /// The processes of the host that stand for execs.
    exec_pids: RefCell<BTreeSet<i32>>,
}

/// What is to happen with the container.
pub(super) struct Story<'a> {
    pub hooks: Option<Hooks>,
    pub spec: Vec<u8>,
    pub wanted: [bool; 3],
    pub start: bool,
    /// What this process's mount namespace is to show, if not what it is.
    pub shown: Option<Shown>,
    pub ready: Box<dyn FnOnce() -> Result<(), Error>>,
    pub kept: &'a dyn Fn(),
}

impl Supervisor {
    pub(super) fn new(sandbox: Sandbox, dir: &Rc<StateDir>, state: State) -> Rc<Self> {
        Rc::new(Supervisor {
            sandbox,
            dir: dir.clone(),
            state: RefCell::new(state),
            poststart: RefCell::default(),
            interrupted: Notify::new(),
            interrupt: Cell::new(None),
            given_up: Notify::new(),
            execs: RefCell::default(),
            exec_count: Cell::new(0),
            exec_pids: RefCell::default(),
        })
    }

    /// What marks the first byte of output.
    pub(super) fn first_byte_mark(&self) -> impl Fn() + Clone + 'static {
        let timeline = self.sandbox.timeline.clone();
        move || timeline.mark_once("first_byte")
    }

    /// Runs everything until the sandbox ends.
    pub(super) async fn serve(
        self: &Rc<Self>,
        story: Story<'_>,
        relays: Relays,
        stdio: &HostStdio,
        signals: &Signals,
        listener: &Listener,
    ) -> Result<Exit, Error> {
        let ending = self.sandbox.watch();
        let mut ending = std::pin::pin!(ending);
        let beside = async {
            let conversations = listener.each(|talk| {
                let me = self.clone();
                tokio::task::spawn_local(async move { me.converse(talk).await });
            });
            let signals = signals.each(async |signal| self.on_signal(signal, stdio).await);
            let _ = tokio::join!(conversations, signals, self.sandbox.read_console());
            pending::<()>().await
        };
        let result = tokio::select! {
            biased;
            result = self.container(story, relays, stdio) => result,
            ending = &mut ending => return Err(ending),
            () = self.interrupted.notified() => {
                Err(Error::Interrupted(self.interrupt.get().unwrap_or(Signal::SIGTERM)))
            }
            () = self.given_up.notified() => {
                let what = "have the container killed";
                Err(self.sandbox.vm_ended(Error::Agent { what, source: agent::Error::Silent }.to_string()))
            }
            () = beside => Err(Error::SupervisorGone),
        };
        match result {
            // The connection broke because the VM did: the VMM knows why.
            Err(Error::Agent { source: agent::Error::Closed(reason), .. }) => {
                match timeout(ENDING_TIMEOUT, ending).await {
                    Ok(ending) => Err(ending),
                    Err(_) => Err(self.sandbox.vm_ended(format!(
                        "the agent in the guest broke off its connection ({reason}), but the VM still runs"
                    ))),
                }
            }
            other => other,
        }
    }

    /// The container's life.
    async fn container(&self, story: Story<'_>, relays: Relays, stdio: &HostStdio) -> Result<Exit, Error> {
        let id = &*self.id();
        let hooks = story.hooks.unwrap_or_default();
        #[allow(deprecated)]
        let early = [("prestart", hooks.prestart()), ("createRuntime", hooks.create_runtime())];
        for (kind, list) in early {
            self.run_hooks(kind, list.as_deref().unwrap_or_default()).await?;
        }
        *self.poststart.borrow_mut() = hooks.poststart().clone().unwrap_or_default();

        let network = self.wire_network().await?;
        // All of it lies in the stream before the guest is up, and is answered in order.
        let (set_up, network_set, created) = tokio::join!(
            biased;
            self.sandbox.set_up(),
            self.sandbox.set_network(network),
            self.sandbox.agent.create(id, story.spec, story.wanted),
        );
        set_up?;
        network_set?;
        created.map_err(|source| Error::Agent { what: "create the container", source })?;
        self.sandbox.timeline.mark("container_created");
        if let Some((rows, columns)) = stdio.terminal_size() {
            // A size that cannot be set is no reason not to run.
            let _ = self.sandbox.agent.resize(id, "", rows, columns).await;
        }

        if let Some(shown) = &story.shown {
            self.sandbox.show(shown)?;
        }

        let exit = self.sandbox.agent.wait(id, "");
        let mut exit = std::pin::pin!(exit);
        self.set_status(Status::Created)?;
        if story.start {
            self.start().await?;
        }
        (story.ready)()?;
        (story.kept)();

        let exit =
            (&mut exit).await.map_err(|source| Error::Agent { what: "wait for the container", source })?;
        self.sandbox.timeline.mark("container_exited");
        relays.drain().await;
        self.sandbox.timeline.mark("output_drained");
        self.finish_execs().await;
        self.sandbox.write_back().await?;
        self.sandbox.timeline.mark("synced");
        Ok(exit)
    }

    /// Lets the workload run.
    async fn start(&self) -> Result<(), Error> {
        self.sandbox
            .agent
            .start(&self.id())
            .await
            .map_err(|source| Error::Agent { what: "start the container", source })?;
        self.sandbox.timeline.mark_started(&self.id(), self.dir.path());
        self.set_status(Status::Running)?;
        let poststart = self.poststart.take();
        // A poststart hook that fails is reported; the container runs on (runtime specification, lifecycle).
        if let Err(e) = self.run_hooks("poststart", &poststart).await {
            tracing::error!("{e}");
        }
        Ok(())
    }

    /// Wires what is in the network namespace now. What has to be taken back is in the state before it is made.
    async fn wire_network(&self) -> Result<Option<SetNetworkRequest>, Error> {
        self.sandbox
            .wire_network(|record| {
                self.state.borrow_mut().network = Some(record);
                Ok(self.dir.save(&self.state.borrow())?)
            })
            .await
    }

    async fn run_hooks(&self, kind: &'static str, list: &[Hook]) -> Result<(), Error> {
        let state = self.state.borrow().to_oci_json();
        self.sandbox.run_hooks(kind, list, state).await
    }

    async fn on_signal(&self, signal: Signal, stdio: &HostStdio) {
        let status = self.state.borrow().status;
        let result = match (signal, status) {
            (Signal::SIGWINCH, _) => match stdio.terminal_size() {
                Some((rows, columns)) => self.sandbox.agent.resize(&self.id(), "", rows, columns).await,
                None => Ok(()),
            },
            (_, Status::Creating) => {
                self.interrupt.set(Some(signal));
                self.interrupted.notify_one();
                Ok(())
            }
            _ => self.sandbox.agent.signal(&self.id(), "", signal as i32, false).await,
        };
        if let Err(e) = result {
            tracing::debug!("{signal} was not passed on: {e}");
        }
    }

    fn id(&self) -> Rc<str> {
        self.state.borrow().id.as_str().into()
    }

    fn set_status(&self, status: Status) -> Result<(), Error> {
        self.state.borrow_mut().status = status;
        Ok(self.dir.save(&self.state.borrow())?)
    }

    /// Answers one command.
    async fn converse(self: Rc<Self>, talk: AsyncConversation) {
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
                let (me, exec_id) = (self.clone(), self.next_exec_id());
                tokio::task::spawn_local(async move {
                    if let Err(message) = enter::enter(&me.sandbox, &talk, fds, stdio, &exec_id).await {
                        let _ = talk.send(&Reply::Failed { message }, &[]);
                    }
                });
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
            Request::Kill { signal, all } => {
                match self.sandbox.agent.signal(&self.id(), "", signal, all).await {
                    // Then its VM is killed, and with it the container.
                    Err(agent::Error::Silent) => {
                        self.given_up.notify_one();
                        Ok(())
                    }
                    other => other.map_err(|e| e.to_string()),
                }
            }
            Request::Pause => self.freeze(true).await,
            Request::Resume => self.freeze(false).await,
            Request::Signal { .. } | Request::Resize { .. } => Err("there is no exec to do that to".into()),
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
        let network = self.wire_network().await.map_err(|e| e.to_string())?;
        self.sandbox.set_network(network).await.map_err(|e| e.to_string())?;
        self.start().await.map_err(|e| e.to_string())
    }

    async fn freeze(&self, freeze: bool) -> Result<(), String> {
        let id = self.id();
        let status = self.state.borrow().status;
        let (result, next) = match (freeze, status) {
            (true, Status::Running | Status::Created) => {
                (self.sandbox.agent.pause(&id).await, Status::Paused)
            }
            (false, Status::Paused) => (self.sandbox.agent.resume(&id).await, Status::Running),
            (true, other) => return Err(format!("container not running: it is {}", other.as_str())),
            (false, other) => return Err(format!("container not paused: it is {}", other.as_str())),
        };
        result.map_err(|e| e.to_string())?;
        self.set_status(next).map_err(|e| e.to_string())
    }

    async fn update(&self, fds: Vec<OwnedFd>) -> Result<(), String> {
        let bytes = control::read_attachment(fds).map_err(|e| e.to_string())?;
        let resources: LinuxResources = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        let guests = serde_json::to_vec(&guest::guests_part(resources.clone())).map_err(|e| e.to_string())?;
        self.sandbox.agent.update(&self.id(), guests).await.map_err(|e| e.to_string())?;
        let mut state = self.state.borrow_mut();
        if let Some(path) = &state.cgroup {
            cgroup::apply(path, &resources, state.vm).map_err(|e| e.to_string())?;
        }
        state.resources = resources;
        self.dir.save(&state).map_err(|e| e.to_string())
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
    async fn finish_execs(&self) {
        let execs = self.execs.take();
        let _ = timeout(EXEC_TIMEOUT, async {
            for exec in execs {
                let _ = exec.await;
            }
        })
        .await;
    }

    /// Ends the VM and leaves what this mode leaves. The exit is known by now: whatever fails here is logged.
    pub(super) fn end(
        &self,
        reservation: &Reservation,
        cgroup: Option<&Membership>,
        mode: Mode,
        error: Option<&Error>,
    ) {
        self.sandbox.kill();
        if self.sandbox.unwire_network() {
            self.state.borrow_mut().network = None;
        }
        self.state.borrow_mut().error = error.map(Error::to_string);
        if reservation.is_kept() {
            if let Err(e) = self.set_status(Status::Stopped) {
                tracing::warn!("{e}");
            }
        } else if matches!(mode, Mode::Run { .. }) && self.state.borrow().status != Status::Creating {
            self.state.borrow_mut().status = Status::Stopped;
            let state = self.state.borrow();
            let outside = self.sandbox.outside();
            if let Err(e) = hooks::run("poststop", &state.poststop, &state.to_oci_json(), outside) {
                tracing::warn!("{e}");
            }
        }
        if let Some(cgroup) = cgroup {
            if reservation.is_kept() {
                cgroup.keep();
            } else {
                // Before the state goes, from which `delete` would know of it.
                self.sandbox.reap();
                cgroup.leave();
            }
        }
        reservation.release();
        self.sandbox.reap();
        self.sandbox.timeline.mark("cleaned_up");
        self.sandbox.timeline.write(&self.id());
    }
}
