//! The ttrpc service: what the contract says, translated into calls of the rest of the agent.
//!
//! Nothing happens before the handshake. Calls that change something run to their end even if the host goes away in
//! the middle: each is a task of its own, because ttrpc drops a handler with its connection.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use stockade_agent_protocol::messages::{
    ContainerRequest, CreateContainerRequest, CreateContainerResponse, DeleteContainerRequest, Empty,
    EnterRequest, Event, ExecRequest, ExecResponse, ForgetRequest, HandshakeRequest, HandshakeResponse,
    MakeVolumeRequest, PidsResponse, ProcessRequest, ResizeRequest, SetMemoryRequest, SetMemoryResponse,
    SetNetworkRequest, SetPodRequest, SetupSandboxRequest, SetupSandboxResponse, ShutdownRequest,
    SignalRequest, StatsResponse, UpdateRequest, WaitResponse,
};
use stockade_agent_protocol::service::Agent;
use stockade_agent_protocol::{FORWARD_PORT, GUEST, PROTOCOL_VERSION, RESOLVER_PORT};
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

use crate::boot::Options;
use crate::container::Containers;
use crate::enter::Entered;
use crate::error::Error;
use crate::network::Network;
use crate::supervise::Process;
use crate::vsock::Listener;
use crate::{boot, console, forward, memory, pod, processes, resolver, sandbox, volumes};

/// Highest signal number, SIGRTMAX.
const SIGNAL_MAX: u32 = 64;
/// Time for the answer to `Shutdown` to leave before the machine is reset. The host sees the reset anyway.
const LAST_ANSWER: Duration = Duration::from_millis(20);

/// The agent as the host sees it.
pub struct Service {
    containers: Arc<Containers>,
    entered: Arc<Entered>,
    greeted: AtomicBool,
    set_up: AtomicBool,
    network: Network,
    /// Whether it takes connections for ports of the guest.
    forwards: AtomicBool,
    /// Whether callers inside the guest are served.
    loopback: bool,
    started_ns: u64,
    listening_ns: u64,
}

impl Service {
    /// A service that has not been greeted.
    pub fn new(containers: Arc<Containers>, options: &Options, started_ns: u64, listening_ns: u64) -> Self {
        Self {
            entered: Entered::new(options.enter, containers.clone()),
            containers,
            greeted: AtomicBool::new(false),
            set_up: AtomicBool::new(false),
            network: Network::default(),
            forwards: AtomicBool::new(false),
            loopback: options.loopback,
            started_ns,
            listening_ns,
        }
    }

    fn containers(&self) -> Result<&Arc<Containers>, Error> {
        if !self.greeted.load(Ordering::Relaxed) {
            return Err(Error::Precondition("the first call must be Handshake".into()));
        }
        Ok(&self.containers)
    }

    /// Begins to take connections for ports of the guest, unless it does.
    fn forward_ports(&self) -> Result<(), Error> {
        if !self.forwards.load(Ordering::Relaxed) {
            tokio::spawn(forward::serve(Listener::bind(FORWARD_PORT, self.loopback)?));
            self.forwards.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// A process of a container, or of the guest itself.
    fn process(&self, container_id: &str, exec_id: &str) -> Result<Arc<Process>, Error> {
        let containers = self.containers()?;
        match container_id {
            GUEST => self.entered.process(exec_id),
            id => containers.get(id)?.process(exec_id),
        }
    }

    /// Runs a call to its end, whatever becomes of the connection.
    async fn to_the_end<T, F, W>(&self, work: W) -> ttrpc::Result<T>
    where
        W: FnOnce(Arc<Containers>) -> F,
        F: Future<Output = Result<T, Error>> + Send + 'static,
        T: Send + 'static,
    {
        let task = tokio::spawn(work(self.containers()?.clone()));
        Ok(task.await.map_err(|e| Error::Internal(format!("the call was abandoned: {e}")))??)
    }
}

#[async_trait]
impl Agent for Service {
    async fn handshake(
        &self,
        _: &TtrpcContext,
        request: HandshakeRequest,
    ) -> ttrpc::Result<HandshakeResponse> {
        if request.protocol_version != PROTOCOL_VERSION {
            return Err(Error::Precondition(format!(
                "the host speaks version {} of the agent protocol, this guest image version {PROTOCOL_VERSION}: \
                 install a guest image that belongs to the host's stockade",
                request.protocol_version
            ))
            .into());
        }
        self.greeted.store(true, Ordering::Relaxed);
        let kernel_release = nix::sys::utsname::uname()
            .map(|name| name.release().to_string_lossy().into_owned())
            .map_err(|e| Error::os("asking for the kernel's release", e))?;
        Ok(HandshakeResponse {
            protocol_version: PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel_release,
            init_started_ns: self.started_ns,
            listening_ns: self.listening_ns,
            ..Default::default()
        })
    }

    async fn setup_sandbox(
        &self,
        _: &TtrpcContext,
        request: SetupSandboxRequest,
    ) -> ttrpc::Result<SetupSandboxResponse> {
        self.containers()?;
        if self.set_up.swap(true, Ordering::Relaxed) {
            return Err(Error::Precondition("the sandbox has been set up already".into()).into());
        }
        if let Err(e) = sandbox::set_up(&request) {
            self.set_up.store(false, Ordering::Relaxed);
            return Err(e.into());
        }
        Ok(SetupSandboxResponse::default())
    }

    async fn set_network(&self, _: &TtrpcContext, request: SetNetworkRequest) -> ttrpc::Result<Empty> {
        let reaper = self.containers()?.reaper();
        if request.forward {
            self.forward_ports()?;
        }
        self.network.set(reaper, request).await?;
        Ok(Empty::default())
    }

    async fn relay_resolver(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.containers()?;
        let listener = Listener::bind(RESOLVER_PORT, self.loopback)?;
        tokio::spawn(resolver::serve(resolver::Sockets::open()?, listener));
        Ok(Empty::default())
    }

    async fn set_pod(&self, _: &TtrpcContext, request: SetPodRequest) -> ttrpc::Result<Empty> {
        self.containers()?;
        pod::set(&request)?;
        self.forward_ports()?;
        Ok(Empty::default())
    }

    async fn make_volume(&self, _: &TtrpcContext, request: MakeVolumeRequest) -> ttrpc::Result<Empty> {
        self.containers()?;
        volumes::make(&request)?;
        Ok(Empty::default())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        self.containers()?;
        if !self.set_up.load(Ordering::Relaxed) {
            return Err(Error::Precondition("containers need SetupSandbox first".into()).into());
        }
        let pid = self.to_the_end(|containers| async move { containers.create(request).await }).await?;
        Ok(CreateContainerResponse { pid: pid.as_raw() as u32, ..Default::default() })
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.containers()?.get(&request.container_id)?;
        self.to_the_end(|_| async move { container.start().await }).await?;
        Ok(Empty::default())
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: DeleteContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.to_the_end(|containers| async move {
            containers.delete(&request.container_id, request.force).await?;
            let write_back = || {
                sandbox::write_back();
                Ok(())
            };
            containers.aside(write_back).await
        })
        .await?;
        Ok(Empty::default())
    }

    async fn forget(&self, _: &TtrpcContext, request: ForgetRequest) -> ttrpc::Result<Empty> {
        self.to_the_end(|containers| async move {
            containers.aside(move || sandbox::forget(&request.paths)).await
        })
        .await?;
        Ok(Empty::default())
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.containers()?.get(&request.container_id)?.freeze(true).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.containers()?.get(&request.container_id)?.freeze(false).await?;
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let container = self.containers()?.get(&request.container_id)?;
        // A lower limit makes the kernel reclaim memory within the write.
        self.to_the_end(|containers| async move {
            containers.aside(move || container.update(&request.resources)).await
        })
        .await?;
        Ok(Empty::default())
    }

    async fn set_memory(
        &self,
        _: &TtrpcContext,
        request: SetMemoryRequest,
    ) -> ttrpc::Result<SetMemoryResponse> {
        self.to_the_end(|containers| async move { memory::set(&containers, &request).await }).await
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        Ok(self.containers()?.get(&request.container_id)?.cgroup().stats()?)
    }

    async fn pids(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.containers()?.get(&request.container_id)?.cgroup().pids()?;
        Ok(PidsResponse { processes: processes::describe(&pids), ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<ExecResponse> {
        let pid = self.to_the_end(|containers| async move { containers.exec(request).await }).await?;
        Ok(ExecResponse { pid: pid.as_raw() as u32, ..Default::default() })
    }

    async fn enter(&self, _: &TtrpcContext, request: EnterRequest) -> ttrpc::Result<ExecResponse> {
        let entered = self.entered.clone();
        let pid = self.to_the_end(|_| async move { entered.enter(request).await }).await?;
        Ok(ExecResponse { pid: pid.as_raw() as u32, ..Default::default() })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        if request.signal > SIGNAL_MAX {
            return Err(Error::Invalid(format!("there is no signal {}", request.signal)).into());
        }
        let signal = request.signal as i32;
        if request.all {
            let container = self.containers()?.get(&request.container_id)?;
            container.signal_all(&request.exec_id, signal)?;
        } else {
            self.process(&request.container_id, &request.exec_id)?.signal(signal)?;
        }
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let ended = process.ended().await?;
        if request.container_id == GUEST {
            self.entered.forget(&request.exec_id);
        }
        Ok(WaitResponse {
            exit_code: ended.exit.code,
            signal: ended.exit.signal,
            oom_killed: ended.oom_killed,
            ..Default::default()
        })
    }

    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> ttrpc::Result<Empty> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let terminal = process
            .terminal
            .as_ref()
            .ok_or_else(|| Error::Precondition("the process has no terminal".into()))?;
        let (Ok(rows), Ok(columns)) = (request.rows.try_into(), request.columns.try_into()) else {
            return Err(Error::Invalid("a terminal has at most 65535 rows and columns".into()).into());
        };
        console::resize(terminal, rows, columns)?;
        Ok(Empty::default())
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: Empty,
        stream: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let containers = self.containers()?;
        let mut events = containers.events.subscribe();
        while let Some(event) = events.recv().await {
            stream.send(&event).await?;
        }
        Ok(())
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.containers()?;
        sandbox::write_back();
        if !request.sync_only {
            tokio::spawn(async {
                tokio::time::sleep(LAST_ANSWER).await;
                boot::reset()
            });
        }
        Ok(Empty::default())
    }
}
