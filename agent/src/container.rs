//! Containers: made by libcontainer in a forked helper, started, joined by execs, deleted.
//!
//! What always holds: a container is in the map as soon as its id is taken, and what a step of its making left behind
//! is removed if a later one fails. No lock is held across an await but the one of what a pod's containers share, so
//! nothing else that one container does delays another.

mod namespaces;
mod running;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxSeccomp, Mount, Process as ProcessSpec};
use stockade_agent_protocol::messages::{CreateContainerRequest, ExecRequest, Stdio as Wanted};
use stockade_agent_protocol::{SHARE_MOUNT_POINT, check_id};

use crate::cgroup::Cgroup;
use crate::console::Console;
use crate::error::Error;
use crate::events::Events;
use crate::executor::{Seccomp, StartHooks, Workload};
use crate::helper::{Helper, Record, Reports};
use crate::hooks;
use crate::mounts;
use crate::oom::OomWatch;
use crate::reaper::Reaper;
use crate::sandbox;
use crate::spec::{self, Ids, ProcessFacts};
use crate::stdio::{self, ChildEnds, Drain, Ends, Relays, Rendezvous};
use crate::supervise::{Made, Process};
use crate::volumes;
use namespaces::PodNamespaces;

/// libcontainer's state of each container.
pub const STATE_DIR: &str = "/run/stockade/state";
/// The `config.json` of each container as libcontainer gets it.
pub const BUNDLE_DIR: &str = "/run/stockade/bundles";
/// Sockets on which terminals arrive.
pub const CONSOLE_DIR: &str = "/run/stockade/consoles";

/// All containers of the sandbox.
pub struct Containers {
    /// Where stdio streams and processes find each other.
    pub rendezvous: Arc<Rendezvous>,
    /// What is pushed to the host.
    pub events: Arc<Events>,
    reaper: Reaper,
    oom: Mutex<Option<Arc<OomWatch>>>,
    /// Which namespaces there are that a pod's containers share.
    pod_namespaces: tokio::sync::Mutex<PodNamespaces>,
    /// `None` while a container is being made.
    all: Mutex<HashMap<String, Option<Arc<Container>>>>,
}

/// One container, created and perhaps started.
pub struct Container {
    id: String,
    cgroup: Cgroup,
    init: Arc<Process>,
    /// `None` while an exec is being made.
    execs: Mutex<HashMap<String, Option<Arc<Process>>>>,
    /// What the init has to say when it is started; taken by the start.
    unstarted: Mutex<Option<Reports>>,
    /// libcontainer's state calls it running, so that processes may join it.
    joinable: Mutex<bool>,
    seccomp: Option<LinuxSeccomp>,
    ids: Ids,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Containers {
    /// None yet.
    pub fn new(reaper: Reaper) -> Arc<Self> {
        Arc::new(Self {
            rendezvous: Arc::default(),
            events: Arc::default(),
            reaper,
            oom: Mutex::new(None),
            pod_namespaces: tokio::sync::Mutex::default(),
            all: Mutex::default(),
        })
    }

    /// The container of that name.
    pub fn get(&self, id: &str) -> Result<Arc<Container>, Error> {
        check_id(id).map_err(|e| Error::Invalid(format!("container_id: {e}")))?;
        match lock(&self.all).get(id) {
            Some(Some(container)) => Ok(container.clone()),
            Some(None) => Err(Error::Precondition(format!("container {id:?} is being created"))),
            None => Err(Error::Precondition(format!("container {id:?} does not exist"))),
        }
    }

    /// Who knows when a process has ended.
    pub fn reaper(&self) -> &Reaper {
        &self.reaper
    }

    /// The watch of containers' memory, which begins with the first of them.
    fn memory(&self) -> Result<Arc<OomWatch>, Error> {
        let mut oom = lock(&self.oom);
        if let Some(watch) = &*oom {
            return Ok(watch.clone());
        }
        let watch = OomWatch::start(self.events.clone(), self.reaper.clone())?;
        Ok(oom.insert(watch).clone())
    }

    /// Creates a container; its workload waits for [`Container::start`]. Returns the pid of its init.
    pub async fn create(&self, request: CreateContainerRequest) -> Result<Pid, Error> {
        let id = request.container_id;
        check_id(&id).map_err(|e| Error::Invalid(format!("container_id: {e}")))?;
        if lock(&self.all).contains_key(&id) {
            return Err(Error::Exists(format!("container {id:?} exists already")));
        }
        lock(&self.all).insert(id.clone(), None);
        let cgroup = Cgroup::of(&id);
        match self.make(&id, &cgroup, &request.spec, &request.stdio).await {
            Ok(container) => {
                let pid = container.init.pid;
                match self.memory() {
                    Ok(watch) => watch.add(&id, &cgroup),
                    Err(e) => tracing::warn!(container = id, "{e}"),
                }
                lock(&self.all).insert(id, Some(Arc::new(container)));
                Ok(pid)
            }
            Err(e) => {
                if let Err(e) = self.remove_traces(&id, &cgroup).await {
                    tracing::warn!(container = id, "after a failed create: {e}");
                }
                lock(&self.all).remove(&id);
                Err(e)
            }
        }
    }

    async fn make(
        &self,
        id: &str,
        cgroup: &Cgroup,
        config: &[u8],
        wanted: &Wanted,
    ) -> Result<Container, Error> {
        let mut adapted = spec::adapt(config, &cgroup.name)?;
        let filter = adapted.seccomp.take();
        let lent = adapted.spec.process_mut().as_mut().filter(|_| filter.is_some());
        let capabilities = lent.and_then(spec::lend_sys_admin);
        let seccomp = filter.clone().map(|filter| Seccomp { filter, capabilities });
        for (name, value) in &adapted.network_sysctls {
            set_sysctl(name, value)?;
        }
        if adapted.in_pod_user_namespace || adapted.in_pod_pid_namespace {
            self.pod_namespaces(&adapted).await?;
        }
        for lent in spec::lent_by_capability(&adapted.spec) {
            // What has been set is meant.
            if !adapted.network_sysctls.contains_key(lent.name) && sysctl_is(lent.name, lent.default) {
                set_sysctl(lent.name, lent.value)?;
            }
        }
        mounts::prepare(&adapted.spec)?;
        let users = match spec::own_user_namespace(&mut adapted.spec) {
            Some(namespace) => Some(self.user_namespace(id, namespace, &adapted.ids).await?),
            None => None,
        };
        cgroup.create(adapted.resources.as_ref())?;
        if adapted.owns_cgroup && adapted.process.uid != 0 {
            cgroup.give_to(adapted.process.uid)?;
        }
        let bundle = PathBuf::from(BUNDLE_DIR).join(id);
        let config = serde_json::to_vec(&adapted.spec)
            .map_err(|e| Error::Internal(format!("writing config.json for libcontainer: {e}")))?;
        fs::create_dir(&bundle)
            .and_then(|()| fs::write(bundle.join("config.json"), config))
            .map_err(|e| Error::os(format!("writing {}", bundle.display()), e))?;

        let Streams { child, ends, console, console_path } = Streams::open(wanted, &adapted.process)?;
        let facts = adapted.process;
        let name = id.to_owned();
        let start_hooks = (!adapted.start_hooks.is_empty()).then(|| StartHooks {
            hooks: adapted.start_hooks,
            container_id: id.to_owned(),
            bundle: bundle.clone(),
        });
        let mounts = adapted.spec.mounts().iter().flatten();
        let (of_the_host, mut sources): (_, Vec<_>) = mounts
            .filter(|mount| is_of_the_host(mount))
            .map(|mount| (mount.destination().clone(), mount.source().clone().unwrap_or_default()))
            .unzip();
        sources.extend(adapted.spec.root().as_ref().map(|root| root.path().clone()));
        let mut helper = Helper::fork(&self.reaper, move |reporter| {
            mounts::enter(&sources);
            let workload = Workload::new(reporter, facts.wants_home, seccomp, None, start_hooks, of_the_host);
            let mut builder = match builder(&name, workload, child) {
                Ok(builder) => builder,
                Err(e) => return failed(&e),
            };
            builder = builder.with_console_socket(console_path);
            match builder.as_init(bundle).with_systemd(false).build() {
                Ok(container) => Record::Done(container.pid().map(|pid| Pid::from_raw(pid.as_raw()))),
                Err(e) => failed(&e),
            }
        })?;
        let drain = if adapted.own_pid_namespace { Drain::ToTheEnd } else { Drain::WhatIsThere };
        let streams = (wanted, ends, console);
        let init = self.follow(&mut helper, (id, ""), &facts, streams, drain, cgroup).await;
        drop(users);
        let init = init.map_err(hooks::name_failure)?;
        if !adapted.finish.is_empty() {
            let (pid, finish) = (init.pid, adapted.finish);
            let rootfs = adapted.spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
            self.aside(move || mounts::finish(pid, &rootfs, &finish)).await?;
        }
        if let Some(names) = adapted.names {
            let pid = init.pid;
            self.aside(move || sandbox::set_names_of(pid, &names)).await?;
        }
        Ok(Container {
            id: id.to_owned(),
            cgroup: cgroup.clone(),
            init,
            execs: Mutex::default(),
            unstarted: Mutex::new(Some(helper.into_reports())),
            joinable: Mutex::new(false),
            ids: adapted.ids,
            seccomp: filter,
        })
    }

    /// Runs a further process in a container.
    pub async fn exec(&self, request: ExecRequest) -> Result<Pid, Error> {
        let container = self.get(&request.container_id)?;
        let exec_id = request.exec_id.clone();
        check_id(&exec_id).map_err(|e| Error::Invalid(format!("exec_id: {e}")))?;
        if exec_id == "-" {
            return Err(Error::Invalid("exec_id: \"-\" stands for the container's init".into()));
        }
        container.must_live(request.ignore_paused)?;
        {
            let mut execs = lock(&container.execs);
            if execs.contains_key(&exec_id) {
                return Err(Error::Exists(format!("exec {exec_id:?} exists already in {:?}", container.id)));
            }
            execs.insert(exec_id.clone(), None);
        }
        match self.join(&container, &exec_id, &request).await {
            Ok(process) => {
                let pid = process.pid;
                lock(&container.execs).insert(exec_id, Some(process));
                Ok(pid)
            }
            Err(e) => {
                lock(&container.execs).remove(&exec_id);
                self.rendezvous.forget(&container.id, Some(&exec_id));
                Err(e)
            }
        }
    }

    async fn join(
        &self,
        container: &Container,
        exec_id: &str,
        request: &ExecRequest,
    ) -> Result<Arc<Process>, Error> {
        let wanted: &Wanted = &request.stdio;
        let mut process: ProcessSpec = serde_json::from_slice(&request.process)
            .map_err(|e| Error::Invalid(format!("the process of the exec cannot be read: {e}")))?;
        let facts = spec::adapt_process(&mut process, &container.ids)?;
        let users = container.users().map_err(|e| Error::os("opening the container's user namespace", e))?;
        let users = users.map(|namespace| spec::take_user(&mut process, namespace));
        let seccomp = container.seccomp.clone().map(|filter| {
            let capabilities = match &users {
                Some(users) => Some(users.capabilities.clone()),
                None => spec::lend_sys_admin(&mut process),
            };
            Seccomp { filter, capabilities }
        });
        container.make_joinable()?;
        // The name has a character that no exec id has, so it is not another exec's.
        let file = PathBuf::from(BUNDLE_DIR).join(&container.id).join(format!("process={exec_id}"));
        let json = serde_json::to_vec(&process)
            .map_err(|e| Error::Internal(format!("writing the process for libcontainer: {e}")))?;
        fs::write(&file, json).map_err(|e| Error::os(format!("writing {}", file.display()), e))?;

        let Streams { child, ends, console, console_path } = Streams::open(wanted, &facts)?;
        let name = container.id.clone();
        let path = file.clone();
        let (cgroup, asked) = (container.cgroup.clone(), request.cgroup.clone());
        let below = match asked.as_str() {
            "" => container.cgroup.place_beside(container.init.pid),
            asked => Some(asked.trim_matches('/').to_owned()).filter(|below| !below.is_empty()),
        };
        let mut helper = Helper::fork(&self.reaper, move |reporter| {
            // libcontainer would make one that is not there, and says less of one that takes no processes.
            if !asked.is_empty()
                && let Err(e) = cgroup.try_to_join(below.as_deref())
            {
                return Record::Failed(e);
            }
            let workload = Workload::new(reporter, facts.wants_home, seccomp, users, None, Vec::new());
            let made = builder(&name, workload, child).and_then(|builder| {
                builder
                    .with_console_socket(console_path)
                    .as_tenant()
                    .with_sub_cgroup(below)
                    .with_detach(true)
                    .with_process(Some(path))
                    .build()
            });
            match made {
                Ok(pid) => Record::Done(Some(Pid::from_raw(pid.as_raw()))),
                Err(e) => failed(&e),
            }
        })?;
        let ids = (container.id.as_str(), exec_id);
        let made = self
            .follow(&mut helper, ids, &facts, (wanted, ends, console), Drain::WhatIsThere, &container.cgroup)
            .await;
        let _ = fs::remove_file(&file);
        made
    }

    /// Waits for a helper's word, and follows the process it made.
    async fn follow(
        &self,
        helper: &mut Helper,
        (container_id, exec_id): (&str, &str),
        facts: &ProcessFacts,
        (wanted, ends, console): (&Wanted, Option<stdio::AgentEnds>, Option<Console>),
        drain: Drain,
        cgroup: &Cgroup,
    ) -> Result<Arc<Process>, Error> {
        let no_pid = || Error::Internal("libcontainer made a process without a pid".into());
        // The terminal comes while the helper works, and must be its user's before the workload runs.
        let (pid, terminal) = match console {
            None => (helper.outcome().await?.ok_or_else(no_pid)?, None),
            Some(console) => {
                let receive = console.receive(facts.uid);
                tokio::pin!(receive);
                tokio::select! {
                    biased;
                    terminal = &mut receive => {
                        // Where it does not come, the helper has ended, and knows why.
                        let pid = helper.outcome().await?;
                        (pid.ok_or_else(no_pid)?, Some(terminal?))
                    }
                    outcome = helper.outcome() => (outcome?.ok_or_else(no_pid)?, Some(receive.await?)),
                }
            }
        };
        let exit = self.reaper.watch(pid);
        let ends = match (&terminal, ends) {
            (Some(terminal), _) => Ends::Terminal(terminal.clone()),
            (None, ends) => Ends::Pipes(ends.unwrap_or_default()),
        };
        let relays = Relays::start(&self.rendezvous, container_id, exec_id, wanted, ends)
            .map_err(|e| Error::os("watching the pipes of a process", e))?;
        let made = Made {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            pid,
            exit,
            terminal,
            relays,
            drain,
            cgroup: cgroup.clone(),
        };
        Ok(Process::follow(made, self.events.clone()))
    }

    /// Removes a container that has ended, or with `force` ends it first.
    pub async fn delete(&self, id: &str, force: bool) -> Result<(), Error> {
        let container = self.get(id)?;
        if container.init.is_alive() && !force {
            return Err(Error::Precondition(format!("container {id:?} has not stopped")));
        }
        container.cgroup.kill()?;
        container.init.reaped().await;
        let execs: Vec<_> = lock(&container.execs).values().flatten().cloned().collect();
        for exec in execs {
            exec.reaped().await;
        }
        self.remove_traces(id, &container.cgroup).await?;
        lock(&self.all).remove(id);
        Ok(())
    }

    /// What a container leaves in the guest. Its mounts went with its mount namespace.
    async fn remove_traces(&self, id: &str, cgroup: &Cgroup) -> Result<(), Error> {
        self.rendezvous.forget(id, None);
        let killed = cgroup.kill();
        let removed = cgroup.remove().await;
        volumes::remove_parts(id);
        for dir in [STATE_DIR, BUNDLE_DIR] {
            remove_dir(&Path::new(dir).join(id))?;
        }
        killed.and(removed)
    }

    /// Does something that may wait for long in a process of its own.
    pub async fn aside(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        let mut helper = Helper::fork(&self.reaper, move |_| match work() {
            Ok(()) => Record::Done(None),
            Err(e) => Record::Failed(e.to_string()),
        })?;
        helper.outcome().await.map(drop)
    }
}

/// A process's streams before it exists.
struct Streams {
    child: ChildEnds,
    ends: Option<stdio::AgentEnds>,
    console: Option<Console>,
    console_path: Option<PathBuf>,
}

impl Streams {
    fn open(wanted: &Wanted, facts: &ProcessFacts) -> Result<Self, Error> {
        if facts.terminal {
            let console = Console::listen()?;
            let console_path = Some(console.path().to_owned());
            return Ok(Self {
                child: ChildEnds::default(),
                ends: None,
                console: Some(console),
                console_path,
            });
        }
        let (child, ends) = stdio::pipes(wanted, facts)?;
        Ok(Self { child, ends: Some(ends), console: None, console_path: None })
    }
}

/// Whether what is mounted lies in the share.
fn is_of_the_host(mount: &Mount) -> bool {
    mount.source().as_ref().is_some_and(|source| source.starts_with(SHARE_MOUNT_POINT))
}

fn builder(id: &str, workload: Workload, child: ChildEnds) -> Result<ContainerBuilder, LibcontainerError> {
    let mut builder = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_executor(workload)
        .with_root_path(STATE_DIR)?;
    (builder.stdin, builder.stdout, builder.stderr) = (child.stdin, child.stdout, child.stderr);
    Ok(builder)
}

/// A libcontainer error with what caused it, in one line.
fn failed(error: &LibcontainerError) -> Record {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let reason = error.to_string();
        if !text.contains(&reason) {
            text = format!("{text}: {reason}");
        }
        cause = error.source();
    }
    Record::Failed(text)
}

/// Sets a property of the namespaces that this process is in.
pub fn set_sysctl(name: &str, value: &str) -> Result<(), Error> {
    if name.split(['.', '/']).any(|part| part.is_empty()) {
        return Err(Error::Invalid(format!("linux.sysctl {name:?} is not a name")));
    }
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    fs::write(path, value)
        .map_err(|e| Error::Invalid(format!("linux.sysctl {name} = {value:?} cannot be set: {e}")))
}

/// Whether a sysctl has a value, whatever space is between its words.
fn sysctl_is(name: &str, value: &str) -> bool {
    let now = fs::read_to_string(Path::new("/proc/sys").join(name.replace('.', "/"))).unwrap_or_default();
    now.split_whitespace().eq(value.split(' '))
}

fn remove_dir(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::os(format!("removing {}", path.display()), e))
        }
        _ => Ok(()),
    }
}
