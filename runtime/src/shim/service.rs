//! The task service: containerd's calls, handed to the sandbox.
//!
//! ttrpc drops a handler with its connection, and containerd may be restarted in the middle of a call. So a call is
//! a task of the sandbox, which runs to its end, and the handler only waits for it.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim_async::Task;
use tokio::sync::{mpsc, oneshot};
use ttrpc::r#async::TtrpcContext;

use super::error::Error;
use super::events::timestamp;
use super::pod::Pod;
use super::process::Stage;
use super::role::Role;
use super::stats;

/// A call on its way to the sandbox's thread.
pub type Call = Box<dyn FnOnce(Rc<Pod>) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// The way there.
#[derive(Clone)]
pub struct Calls(mpsc::UnboundedSender<Call>);

impl Calls {
    /// Sends calls there.
    pub fn new(calls: mpsc::UnboundedSender<Call>) -> Self {
        Calls(calls)
    }

    /// Has this done with the sandbox, and waits for the answer.
    pub async fn on_pod<T, F, W>(&self, work: W) -> ttrpc::Result<T>
    where
        W: FnOnce(Rc<Pod>) -> F + Send + 'static,
        F: Future<Output = Result<T, Error>> + 'static,
        T: Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let call: Call = Box::new(move |pod| {
            let work = work(pod);
            Box::pin(async move {
                // A caller that is gone needs no answer.
                let _ = answer.send(work.await);
            })
        });
        let ended = || ttrpc::Error::from(Error::Gone("the shim is about to end".into()));
        self.0.send(call).map_err(|_| ended())?;
        Ok(answered.await.map_err(|_| ended())??)
    }
}

/// The service.
pub struct TaskService {
    calls: Calls,
}

impl TaskService {
    /// Its calls go that way.
    pub fn new(calls: Calls) -> Self {
        TaskService { calls }
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        self.calls
            .on_pod(move |pod| async move {
                let container = pod.container(&request.id)?;
                let process = container.process(&request.exec_id)?;
                let status = match process.stage() {
                    Stage::Created => Status::CREATED,
                    Stage::Running if container.paused.get() => Status::PAUSED,
                    Stage::Running => Status::RUNNING,
                    Stage::Stopped => Status::STOPPED,
                };
                let exit = process.exit();
                Ok(StateResponse {
                    id: container.id.clone(),
                    exec_id: process.exec_id.clone(),
                    bundle: container.bundle.display().to_string(),
                    pid: process.pid(),
                    status: status.into(),
                    stdin: process.paths.stdin.clone(),
                    stdout: process.paths.stdout.clone(),
                    stderr: process.paths.stderr.clone(),
                    terminal: process.paths.terminal,
                    exit_status: exit.map_or(0, |exit| exit.code),
                    exited_at: exit.map(|exit| timestamp(exit.at)).into(),
                    ..Default::default()
                })
            })
            .await
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        self.calls
            .on_pod(move |pod| async move {
                let pid = pod.create(request).await?;
                Ok(CreateTaskResponse { pid, ..Default::default() })
            })
            .await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        self.calls
            .on_pod(move |pod| async move {
                let pid = pod.start(&request.id, &request.exec_id).await?;
                Ok(StartResponse { pid, ..Default::default() })
            })
            .await
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        self.calls
            .on_pod(move |pod| async move {
                let (pid, exited) = pod.delete(&request.id, &request.exec_id).await?;
                Ok(DeleteResponse {
                    pid,
                    exit_status: exited.code,
                    exited_at: MessageField::some(timestamp(exited.at)),
                    ..Default::default()
                })
            })
            .await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        self.calls
            .on_pod(move |pod| async move {
                pod.container(&request.id)?;
                // Who asks looks for these numbers on the host, where those of the guest are others'. And never none:
                // containerd from 1.7 on takes a task without a process for one that was never made, and when it begins anew
                // removes it, with an exit of which nobody has been told.
                let own = ProcessInfo { pid: pod.pid(), ..Default::default() };
                Ok(PidsResponse { processes: vec![own], ..Default::default() })
            })
            .await
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.calls.on_pod(move |pod| async move { pod.freeze(&request.id, true).await.map(empty) }).await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.calls.on_pod(move |pod| async move { pod.freeze(&request.id, false).await.map(empty) }).await
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(Error::Unimplemented("processes in a VM cannot be checkpointed").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.calls
            .on_pod(move |pod| async move {
                pod.kill(&request.id, &request.exec_id, request.signal, request.all).await.map(empty)
            })
            .await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.calls.on_pod(move |pod| async move { pod.exec(request).map(empty) }).await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.calls
            .on_pod(move |pod| async move {
                let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
                let (rows, columns) = (size(request.height), size(request.width));
                pod.resize(&request.id, &request.exec_id, rows, columns).await.map(empty)
            })
            .await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        self.calls
            .on_pod(move |pod| async move {
                if request.stdin {
                    let process = pod.container(&request.id)?.process(&request.exec_id)?;
                    process.held.borrow_mut().close_stdin();
                }
                Ok(Empty::default())
            })
            .await
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.calls
            .on_pod(move |pod| async move {
                let resources = request.resources.into_option().map(|any| any.value).unwrap_or_default();
                pod.update(&request.id, resources).await.map(empty)
            })
            .await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        self.calls
            .on_pod(move |pod| async move {
                let process = pod.container(&request.id)?.process(&request.exec_id)?;
                let exited = process.wait().await;
                Ok(WaitResponse {
                    exit_status: exited.code,
                    exited_at: MessageField::some(timestamp(exited.at)),
                    ..Default::default()
                })
            })
            .await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        self.calls
            .on_pod(move |pod| async move {
                let metrics = pod.stats(&request.id).await?;
                Ok(StatsResponse { stats: MessageField::some(stats::to_any(&metrics)), ..Default::default() })
            })
            .await
    }

    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        self.calls
            .on_pod(move |pod| async move {
                Ok(ConnectResponse {
                    shim_pid: std::process::id(),
                    task_pid: pod.pid(),
                    version: env!("CARGO_PKG_VERSION").into(),
                    ..Default::default()
                })
            })
            .await
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.calls
            .on_pod(move |pod| async move {
                // One shim serves all of its sandbox: it ends with the last task. What the sandbox API has made goes on when
                // it has no container any more, as a pod does, and ends by a call of its own.
                let is_its = pod.plan.role != Role::Announced || request.id == pod.plan.id;
                if is_its && (request.now || pod.containers.borrow().is_empty()) {
                    pod.finished.notify_one();
                }
                Ok(Empty::default())
            })
            .await
    }
}

fn empty((): ()) -> Empty {
    Empty::default()
}
