//! What containerd can do with a container of the sandbox, one function a call: here from its making to its removal.

mod running;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskIO, TaskStart};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::topics;
use oci_spec::runtime::{Hook, Hooks};
use stockade_agent_protocol::check_id;
use stockade_agent_protocol::messages::MakeVolumeRequest;

use super::error::Error;
use super::events::timestamp;
use super::pod::{KILLED, Pod};
use super::process::{Exited, Process, Stage};
use super::role::Role;
use super::rootfs;
use super::stdio::{self, Owner, Paths};
use crate::bundle::guest::{self, Adapted};
use crate::bundle::{self, Bundle, hooks};
use crate::sandbox::{self, Adopted, Sandbox};
use crate::size;

/// Where the root filesystem is in a bundle.
pub const ROOTFS: &str = "rootfs";

/// One task.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its first process.
    pub init: Rc<Process>,
    /// Its other processes.
    pub execs: RefCell<BTreeMap<String, Rc<Process>>>,
    /// It is frozen.
    pub paused: Cell<bool>,
    /// It is what kubelet calls the pause container: nothing of it is in the guest.
    pub is_pause: bool,
    /// Its init has been killed.
    is_killed: Cell<bool>,
    hooks: Hooks,
}

impl Container {
    /// Its init, or the exec of that name.
    pub fn process(&self, exec_id: &str) -> Result<Rc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let exec = self.execs.borrow().get(exec_id).cloned();
        exec.ok_or_else(|| Error::NotFound(format!("exec {exec_id} of container {}", self.id)))
    }

    /// It runs in the guest now.
    pub fn must_run(&self) -> Result<(), Error> {
        match (self.init.stage(), self.is_pause) {
            (Stage::Running, false) => Ok(()),
            (Stage::Running, true) => Err(Error::Precondition(format!(
                "container {} is its pod's sandbox: no process runs in it",
                self.id
            ))),
            _ => Err(Error::Precondition(format!("container {} is not running", self.id))),
        }
    }
}

impl Pod {
    /// Creates a container. Returns the pid that stands for it.
    pub async fn create(self: &Rc<Self>, request: CreateTaskRequest) -> Result<u32, Error> {
        let id = request.id.clone();
        check_id(&id).map_err(|e| Error::Invalid(format!("container id: {e}")))?;
        if self.containers.borrow().contains_key(&id) {
            return Err(Error::Exists(format!("container {id}")));
        }
        if !request.checkpoint.is_empty() {
            return Err(Error::Unimplemented("a VM cannot be restored from a checkpoint of processes"));
        }
        // Why there is no VM is the best answer to everything.
        self.vm()?;
        let bundle = PathBuf::from(&request.bundle);
        let paths = Paths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let init = Rc::new(Process::new("", paths));
        let is_pause = self.plan.role == Role::Pod && id == self.plan.id;
        if is_pause {
            let container = self.admit(&id, bundle, init, Hooks::default(), true);
            self.created(&container, &request);
            return Ok(self.pid());
        }

        let root = bundle.join(ROOTFS);
        rootfs::mount_all(&request.rootfs, &root)?;
        let made = self.make(&id, &bundle, request.rootfs.is_empty(), init).await;
        match made {
            Ok(container) => {
                self.created(&container, &request);
                Ok(self.pid())
            }
            Err(e) => {
                self.unshare(&id).await;
                self.discount(&id);
                rootfs::unmount_all(&root);
                Err(e)
            }
        }
    }

    /// `theirs` says that whoever calls has mounted the root file system.
    async fn make(
        self: &Rc<Self>,
        id: &str,
        path: &Path,
        theirs: bool,
        init: Rc<Process>,
    ) -> Result<Rc<Container>, Error> {
        let vm = self.ready().await?;
        let mut in_memory = Vec::new();
        let (bundle, adapted, here_for_it) = self.load(vm, id, path, theirs, &mut in_memory)?;
        vm.share(&bundle, &adapted.binds)?;
        drop(here_for_it);
        vm.admit(id, size::memory_limit(&bundle.limits()).map_err(sandbox::Error::Size)?).await?;
        self.save_size()?;
        for volume in &in_memory {
            if let Err(e) = vm.agent.make_volume(volume).await {
                return Err(self.explain("make a volume in memory", e).await);
            }
        }
        vm.add_oom_score(&bundle.spec);
        vm.know_resolv_conf(&bundle.spec);
        let owner = Owner { namespace: &self.plan.namespace, container: id };
        let (mut host, held) = stdio::open(&init.paths, owner, vm.outside())?;
        init.held.replace(held);
        let wanted = host.wanted();
        let streams = vm.connect_streams(wanted, id, "")?;
        let relays = host.relay(streams, || ()).map_err(super::io_error("relay the standard streams"))?;

        let hooks = bundle.spec.hooks().clone().unwrap_or_default();
        let made = async {
            for (kind, list) in hooks::early(&hooks) {
                self.run_hooks(kind, list, id, path, "creating").await?;
            }
            match vm.agent.create(id, adapted.spec, wanted).await {
                Ok(_) => Ok(()),
                Err(e) => Err(self.explain("create the container", e).await),
            }
        };
        if let Err(e) = made.await {
            self.run_last_hooks(&hooks, id, path).await;
            return Err(e);
        }
        let container = self.admit(id, path.to_owned(), init.clone(), hooks, false);
        tokio::task::spawn_local(self.clone().follow(container.clone(), init, relays));
        Ok(container)
    }

    /// What a container is, in the guest too, and what of the host is here only for it: until that is shared. Volumes
    /// that the guest has to make first are added to `in_memory`.
    fn load(
        &self,
        vm: &Sandbox,
        id: &str,
        path: &Path,
        theirs: bool,
        in_memory: &mut Vec<MakeVolumeRequest>,
    ) -> Result<(Bundle, Adapted, Adopted), Error> {
        let Some(shared) = self.shared() else {
            let bundle = Bundle::load(path)?;
            let adapted = guest::adapt(&bundle, id)?;
            return Ok((bundle, adapted, Adopted::default()));
        };
        let mut adopted = Ok(Adopted::default());
        let reach = |paths: &[PathBuf]| adopted = vm.adopt(&paths[usize::from(!theirs)..]);
        let bundle = Bundle::load_in_pod(path, shared, self.pid(), reach);
        let adopted = adopted?;
        let bundle = bundle?;
        let mut volumes = self.volumes.borrow_mut();
        let adapted = guest::adapt_with(&bundle, id, |bind| volumes.place(bind, id, in_memory))?;
        Ok((bundle, adapted, adopted))
    }

    fn admit(
        &self,
        id: &str,
        bundle: PathBuf,
        init: Rc<Process>,
        hooks: Hooks,
        is_pause: bool,
    ) -> Rc<Container> {
        let container = Rc::new(Container {
            id: id.into(),
            bundle,
            init,
            execs: RefCell::default(),
            paused: Cell::new(false),
            is_pause,
            is_killed: Cell::new(false),
            hooks,
        });
        self.containers.borrow_mut().insert(id.into(), container.clone());
        container
    }

    fn created(&self, container: &Container, request: &CreateTaskRequest) {
        let io = TaskIO {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            ..Default::default()
        };
        let event = TaskCreate {
            container_id: container.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: MessageField::some(io),
            pid: self.pid(),
            ..Default::default()
        };
        self.publisher.publish(topics::TASK_CREATE_EVENT_TOPIC, &event);
    }

    async fn run_hooks(
        &self,
        kind: &'static str,
        list: &[Hook],
        id: &str,
        bundle: &Path,
        status: &str,
    ) -> Result<(), Error> {
        if list.is_empty() {
            return Ok(());
        }
        let state = hook_state(id, bundle, status);
        Ok(self.vm()?.run_hooks(kind, list, state).await?)
    }

    /// Lets a container's workload or an exec run.
    pub async fn start(self: &Rc<Self>, id: &str, exec_id: &str) -> Result<u32, Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let _order = process.order.lock().await;
        if exec_id.is_empty() {
            // Why there is no VM is the best answer to everything.
            self.vm()?;
        }
        if process.stage() != Stage::Created {
            return Err(Error::Precondition(format!(
                "process {} has been started already",
                named(id, exec_id)
            )));
        }
        if !exec_id.is_empty() {
            return self.start_exec(&container, &process).await;
        }
        if !container.is_pause {
            let vm = self.vm()?;
            self.catch_up_network().await?;
            if let Err(e) = vm.agent.start(id).await {
                return Err(self.explain("start the container", e).await);
            }
            self.mark_started();
        }
        process.started();
        let event = TaskStart { container_id: id.into(), pid: self.pid(), ..Default::default() };
        self.publisher.publish(topics::TASK_START_EVENT_TOPIC, &event);
        let poststart = container.hooks.poststart().as_deref().unwrap_or_default();
        if let Err(e) = self.run_hooks("poststart", poststart, id, &container.bundle, "running").await {
            // The runtime specification, lifecycle: the container is stopped, and who started it is told.
            if let Err(e) = self.kill(id, "", libc::SIGKILL as u32, true).await {
                tracing::warn!(container = id, "{e}");
            }
            return Err(e);
        }
        Ok(self.pid())
    }

    /// Removes a process that has ended; with an init, its container.
    pub async fn delete(self: &Rc<Self>, id: &str, exec_id: &str) -> Result<(u32, Exited), Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        if process.stage() == Stage::Running {
            return Err(Error::Precondition(format!("process {} has not ended", named(id, exec_id))));
        }
        if !exec_id.is_empty() {
            let exited = process.ended(KILLED);
            container.execs.borrow_mut().remove(exec_id);
            return Ok((process.pid(), exited));
        }
        if process.stage() == Stage::Created && !container.is_pause {
            // Made, but never started: it goes as if it had been killed.
            self.kill(id, "", libc::SIGKILL as u32, true).await?;
            process.wait().await;
        }
        let exited = process.ended(KILLED);
        if !container.is_pause {
            self.forget(&container).await;
        }
        self.containers.borrow_mut().remove(id);
        process.held.take();
        let event = TaskDelete {
            container_id: id.into(),
            pid: process.pid(),
            exit_status: exited.code,
            exited_at: MessageField::some(timestamp(exited.at)),
            ..Default::default()
        };
        self.publisher.publish(topics::TASK_DELETE_EVENT_TOPIC, &event);
        Ok((process.pid(), exited))
    }

    /// What a container leaves in the guest and in the share. The VM may be gone, and all of it with it.
    async fn forget(self: &Rc<Self>, container: &Container) {
        if let Ok(vm) = self.vm()
            && let Err(e) = vm.agent.delete(&container.id).await
        {
            tracing::warn!(container = container.id, "the guest did not remove the container: {e}");
        }
        self.discount(&container.id);
        self.unshare(&container.id).await;
        rootfs::unmount_all(&container.bundle.join(ROOTFS));
        self.run_last_hooks(&container.hooks, &container.id, &container.bundle).await;
    }

    /// Runs poststop hooks, for which there need not be a VM any more. Each whatever becomes of the others: one that fails
    /// is logged (runtime specification, lifecycle).
    async fn run_last_hooks(&self, hooks: &Hooks, id: &str, bundle: &Path) {
        for hook in hooks.poststop().iter().flatten() {
            let state = hook_state(id, bundle, "stopped");
            if let Err(e) = self.run_poststop_hook(hook, state).await {
                tracing::warn!(container = id, "{e}");
            }
        }
    }
}

/// A container's state as the runtime specification has it, for hooks.
fn hook_state(id: &str, bundle: &Path, status: &str) -> Vec<u8> {
    let spec = bundle::read_spec(bundle).ok();
    let annotations = spec.as_ref().and_then(|spec| spec.annotations().clone()).unwrap_or_default();
    let version = spec.as_ref().map_or("1.0.2", |spec| spec.version().as_str());
    serde_json::json!({
        "ociVersion": version,
        "id": id,
        "status": status,
        "pid": std::process::id(),
        "bundle": bundle,
        "annotations": annotations,
    })
    .to_string()
    .into_bytes()
}

fn named(id: &str, exec_id: &str) -> String {
    if exec_id.is_empty() { id.into() } else { format!("{exec_id} of {id}") }
}
