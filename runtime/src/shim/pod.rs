//! A shim's sandbox and the tasks in it: a pod, a group, or a single container.
//!
//! The VM boots while containerd prepares its first request. It ends with what is its reason: the pause container of a
//! pod or the call that stops it, a single container's init. However it ends, every process in it is reported with an exit,
//! and never as one that went well.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::topics;
use oci_spec::runtime::{Hook, LinuxResources};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::boot::{Booted, Plan};
use super::entrance;
use super::error::Error;
use super::events::{Publisher, timestamp};
use super::process::{Exited, Process, Stage};
use super::role::Role;
use super::stdio::Paths;
use super::task::Container;
use crate::bundle::pod::Shared;
use crate::network::{self, Demand};
use crate::printable::error_line;
use crate::records::{self, Record};
use crate::sandbox::agent::{self, Exit};
use crate::sandbox::stdio::Relays;
use crate::sandbox::volumes::Volumes;
use crate::sandbox::{self, Sandbox, cgroup, forward};
use crate::size::VmSize;

/// How long the end of a VM may take to be known after the connection to its agent broke.
const ENDING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an exit waits for output that nobody takes. What is not taken by then is still delivered, but later.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long execs may take to be reported when their container has ended.
const EXEC_TIMEOUT: Duration = Duration::from_secs(5);
/// What killed processes are reported with: 128 and SIGKILL.
pub const KILLED: u32 = 128 + libc::SIGKILL as u32;

/// The sandbox.
pub struct Pod {
    /// What it was to be.
    pub plan: Plan,
    /// Where events go.
    pub publisher: Publisher,
    /// All tasks that have not been deleted.
    pub containers: RefCell<BTreeMap<String, Rc<Container>>>,
    /// What the sandbox API knows as its life.
    pub life: Process,
    /// Somebody asked this shim to end, and there is no task left.
    pub finished: Notify,
    /// What its containers mount.
    pub volumes: RefCell<Volumes>,
    /// The VM and what of it is on the host, once it has been started.
    machine: OnceCell<Booted>,
    /// The guest is ready for containers.
    up: Cell<bool>,
    /// Why there is no VM (any more), in one line.
    gone: RefCell<Option<String>>,
    /// Either has changed.
    went: Notify,
}

impl Pod {
    /// A sandbox without a VM.
    pub fn new(plan: Plan, publisher: Publisher) -> Rc<Self> {
        Rc::new(Pod {
            plan,
            publisher,
            containers: RefCell::default(),
            life: Process::new("", Paths::default()),
            finished: Notify::new(),
            volumes: RefCell::default(),
            machine: OnceCell::new(),
            up: Cell::new(false),
            gone: RefCell::default(),
            went: Notify::new(),
        })
    }

    /// Gives it the VM that boots, or the reason why there is none.
    pub fn receive(self: &Rc<Self>, booted: Result<Booted, sandbox::Error>) {
        match booted {
            Ok(machine) => {
                let volumes = {
                    let state = machine.state.borrow();
                    Volumes::of(&state.annotations, state.vm.memory)
                };
                self.volumes.replace(volumes);
                if machine.sandbox.can_be_entered() {
                    entrance::open(self, machine.dir());
                }
                // Nobody gives it a second one: that is checked where it could be asked for.
                let _ = self.machine.set(machine);
                tokio::task::spawn_local(self.clone().attend());
            }
            Err(e) => {
                if let Some(part) = e.part() {
                    records::append(&Record::Failed(part.into()));
                }
                self.end(&error_line(&e));
            }
        }
    }

    /// Whether it has been given a VM, or the reason why there is none.
    pub fn is_decided(&self) -> bool {
        self.machine.get().is_some() || self.gone.borrow().is_some()
    }

    /// The process of the host that stands for all in the guest: this one. It is in the containers' network namespace,
    /// which the VMM is not, and Docker and whoever calls nsenter(1) look for that by the number of a task.
    pub fn pid(&self) -> u32 {
        std::process::id()
    }

    /// How big the VM is.
    pub fn size(&self) -> Option<VmSize> {
        self.machine.get().map(|machine| machine.state.borrow().vm)
    }

    /// What its containers share, if it is one of Kubernetes.
    pub fn shared(&self) -> Option<&Shared> {
        self.machine.get().and_then(|machine| machine.shared.as_ref())
    }

    /// The VM, unless it has ended.
    pub fn vm(&self) -> Result<&Sandbox, Error> {
        match (self.machine.get(), &*self.gone.borrow()) {
            (Some(machine), None) => Ok(&machine.sandbox),
            (_, Some(reason)) => Err(Error::Gone(reason.clone())),
            (None, None) => Err(Error::Precondition(format!(
                "sandbox {} has not been created: CreateSandbox comes before everything else",
                self.plan.id
            ))),
        }
    }

    /// The VM, once the guest is ready for containers.
    pub async fn ready(&self) -> Result<&Sandbox, Error> {
        loop {
            let changed = self.went.notified();
            let vm = self.vm()?;
            if self.up.get() {
                return Ok(vm);
            }
            changed.await;
        }
    }

    /// Marks that a container runs.
    pub fn mark_started(&self) {
        if let Some(machine) = self.machine.get() {
            machine.sandbox.timeline.mark_started(&self.plan.id, machine.dir().path());
        }
    }

    /// Prepares the guest for containers, with the network of its namespace as it is now.
    async fn set_up(&self, machine: &Booted) -> Result<(), sandbox::Error> {
        let vm = &machine.sandbox;
        vm.set_up().await?;
        let request = vm.wire_network(|record| save_network(machine, record)).await?;
        vm.set_network(request).await?;
        vm.follow_network();
        if let Some(shared) = &machine.shared {
            vm.set_pod(shared).await?;
        }
        self.up.set(true);
        self.went.notify_waiters();
        Ok(())
    }

    /// Wires what hooks or the engine have put into the network namespace of a single container since it was created. That
    /// of a pod is whole before the pod is made.
    pub async fn catch_up_network(&self) -> Result<(), sandbox::Error> {
        let Some(machine) = self.machine.get().filter(|machine| machine.shared.is_none()) else {
            return Ok(());
        };
        machine.sandbox.rewire_network(Demand::Strict, |record| save_network(machine, record)).await?;
        machine.sandbox.set_resolver().await
    }

    /// Follows the VM: prepares it, tells of memory that ran out, and knows when it ends.
    async fn attend(self: Rc<Self>) {
        let Some(machine) = self.machine.get() else { return };
        let vm = &machine.sandbox;
        // The VM's end is known by the other branch; this one never comes to an end of its own.
        let up = async {
            if let Err(e) = self.set_up(machine).await {
                self.lost(&e).await;
                std::future::pending::<()>().await;
            }
            if machine.shared.is_some() {
                let pod = self.clone();
                tokio::task::spawn_local(forward::serve(move |to| {
                    let vm = pod.vm().map_err(|e| e.to_string())?;
                    vm.connect_port(to).map_err(|e| e.to_string())
                }));
            }
            if let Err(e) = vm.agent.out_of_memory(|id| self.out_of_memory(id)).await {
                tracing::debug!("events of the guest end: {e}");
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            error = vm.watch(|record| save_network(machine, record)) => {
                self.has_ended(&error_line(&error), error.console());
            }
            () = async { tokio::join!(up, vm.read_console()); } => {}
        }
    }

    fn out_of_memory(&self, id: &str) {
        // The guest's word on which: one of ours, or none.
        if self.containers.borrow().contains_key(id) {
            let event = TaskOOM { container_id: id.into(), ..Default::default() };
            self.publisher.publish(topics::TASK_OOM_EVENT_TOPIC, &event);
        }
    }

    /// The agent cannot be talked to: that is the VM's end, unless it says itself why.
    async fn lost(&self, error: &sandbox::Error) {
        let _ = timeout(ENDING_TIMEOUT, self.went.notified()).await;
        if self.gone.borrow().is_none() {
            self.end(&error_line(error));
        }
    }

    fn has_ended(&self, reason: &str, console: &[String]) {
        if self.gone.borrow().is_some() {
            return;
        }
        records::append(&Record::Failed("vm_ended".into()));
        tracing::error!("{reason}");
        for line in console {
            tracing::error!("guest console: {line}");
        }
        self.end(reason);
    }

    /// Ends the VM; `reason` is what later calls are told.
    pub fn end(&self, reason: &str) {
        self.gone.borrow_mut().get_or_insert_with(|| reason.into());
        if let Some(machine) = self.machine.get() {
            machine.sandbox.kill();
        }
        self.life.ended(KILLED);
        let containers: Vec<_> = self.containers.borrow().values().cloned().collect();
        for pause in containers.iter().filter(|one| one.is_pause && one.init.stage() == Stage::Running) {
            // Nobody else follows it: there is no such process in the guest.
            let exited = pause.init.ended(KILLED);
            self.report(&pause.id, &pause.init, exited);
        }
        self.went.notify_waiters();
    }

    /// Runs a poststop hook, for which there need not be a VM any more.
    pub async fn run_poststop_hook(&self, hook: &Hook, state: Vec<u8>) -> Result<(), sandbox::Error> {
        match self.machine.get() {
            Some(machine) => machine.sandbox.run_hooks("poststop", std::slice::from_ref(hook), state).await,
            None => Ok(()),
        }
    }

    /// Takes the files of a container out of the share.
    pub async fn unshare(&self, container: &str) {
        let mut parts = self.volumes.borrow_mut().leave(container);
        parts.push(container.into());
        if let Ok(vm) = self.vm()
            && let Err(e) = vm.unshare(&parts).await
        {
            tracing::warn!(container, "{e}");
        }
    }

    /// Has a container's limit count no more for how big the VM is. Nobody waits until that has become smaller.
    pub fn discount(self: &Rc<Self>, container: &str) {
        let Ok(vm) = self.vm() else { return };
        vm.discount(container);
        let pod = self.clone();
        tokio::task::spawn_local(async move {
            let Ok(vm) = pod.vm() else { return };
            vm.shrink().await;
            if let Err(e) = pod.save_size() {
                tracing::debug!("{e}");
            }
        });
    }

    /// Writes down how big the VM is now.
    pub fn save_size(&self) -> Result<(), sandbox::Error> {
        let Some(machine) = self.machine.get() else { return Ok(()) };
        let size = machine.sandbox.size();
        self.volumes.borrow_mut().have_memory(size.memory);
        if std::mem::replace(&mut machine.state.borrow_mut().vm, size) == size {
            return Ok(());
        }
        Ok(machine.dir().save(&machine.state.borrow())?)
    }

    /// Applies the host's part of new limits of a container, if it is what the VM is for. The cgroup of a pod is kubelet's.
    pub fn limit_on_host(&self, container: &str, limits: &LinuxResources) -> Result<(), Error> {
        let Some(machine) = self.machine.get().filter(|_| self.plan.role == Role::Single) else {
            return Ok(());
        };
        let state = machine.state.borrow();
        match &state.cgroup {
            Some(path) if self.plan.id == container => {
                cgroup::apply(path, limits, state.vm).map_err(|e| sandbox::Error::from(e).into())
            }
            _ => Ok(()),
        }
    }

    /// Waits until the VM is gone with all that it holds.
    pub fn reap(&self) {
        if let Some(machine) = self.machine.get() {
            machine.sandbox.unwire_network();
            machine.sandbox.reap();
            machine.release();
        }
    }

    /// What an answer of the agent means: where the connection broke, the VM's end is the reason.
    pub async fn explain(&self, what: &'static str, error: agent::Error) -> Error {
        if let agent::Error::Closed(_) = error {
            if self.gone.borrow().is_none() {
                let _ = timeout(ENDING_TIMEOUT, self.went.notified()).await;
            }
            if let Some(reason) = &*self.gone.borrow() {
                return Error::Gone(reason.clone());
            }
        }
        Error::Sandbox(sandbox::Error::Agent { what, source: error })
    }

    /// A container of that name.
    pub fn container(&self, id: &str) -> Result<Rc<Container>, Error> {
        let container = self.containers.borrow().get(id).cloned();
        container.ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    /// Follows a process of the guest to its end, and reports it once its output is delivered.
    pub async fn follow(self: Rc<Self>, container: Rc<Container>, process: Rc<Process>, relays: Relays) {
        let code = match self.vm() {
            Err(_) => KILLED,
            Ok(vm) => match vm.agent.wait(&container.id, &process.exec_id).await {
                Ok(Exit { code, .. }) => code.into(),
                Err(e) => {
                    tracing::debug!(container = container.id, "the end of a process is not known: {e}");
                    if matches!(e, agent::Error::Closed(_)) {
                        self.lost(&sandbox::Error::Agent { what: "wait for a process", source: e }).await;
                    }
                    KILLED
                }
            },
        };
        if timeout(DRAIN_TIMEOUT, relays.drain()).await.is_err() {
            tracing::warn!(container = container.id, "output of a process that has ended is not taken");
        }
        if process.exec_id.is_empty() {
            self.end_of_init(&container).await;
        }
        let _order = process.order.lock().await;
        let exited = process.ended(code);
        self.report(&container.id, &process, exited);
        drop(_order);
        if process.exec_id.is_empty() && self.plan.role == Role::Single {
            // There is nothing left to run, so its memory can go before anybody asks.
            self.end("the container has ended");
        }
    }

    /// Before an init's end is reported, its execs' are, and what was written is in the host's files.
    async fn end_of_init(&self, container: &Container) {
        let execs: Vec<_> = container.execs.borrow().values().cloned().collect();
        let running = execs.iter().filter(|exec| exec.stage() == Stage::Running);
        let _ = timeout(EXEC_TIMEOUT, async {
            for exec in running {
                exec.wait().await;
            }
        })
        .await;
        if let Ok(vm) = self.vm()
            && let Err(e) = vm.write_back().await
        {
            tracing::warn!(container = container.id, "{e}");
        }
    }

    /// Publishes an exit.
    pub fn report(&self, container: &str, process: &Process, exited: Exited) {
        let event = TaskExit {
            container_id: container.into(),
            id: if process.exec_id.is_empty() { container.into() } else { process.exec_id.clone() },
            pid: process.pid(),
            exit_status: exited.code,
            exited_at: MessageField::some(timestamp(exited.at)),
            ..Default::default()
        };
        self.publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, &event);
    }
}

/// Writes down what of the network has to be taken back.
fn save_network(machine: &Booted, record: network::Record) -> Result<(), sandbox::Error> {
    machine.state.borrow_mut().network = Some(record);
    Ok(machine.dir().save(&machine.state.borrow())?)
}
