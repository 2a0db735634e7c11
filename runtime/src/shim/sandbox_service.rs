//! The sandbox service, by which containerd 2 makes pods without a pause container where a runtime handler says
//! `sandboxer = "shim"`.
//!
//! A sandbox is made once, and lives until it is stopped or its VM ends: then it can have no containers any more, but
//! answers until it is shut down. It is started when its VM can take containers, and not before.

use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use ttrpc::r#async::TtrpcContext;

use super::boot::boot;
use super::error::Error;
use super::events::timestamp;
use super::pod::Pod;
use super::pod_config::PodConfig;
use super::process::Stage;
use super::role::Role;
use super::service::Calls;
use super::stats;

/// The service.
pub struct SandboxService {
    calls: Calls,
}

impl SandboxService {
    /// Its calls go that way.
    pub fn new(calls: Calls) -> Self {
        SandboxService { calls }
    }
}

impl Pod {
    /// A call is about this sandbox, which was made by this service.
    fn must_be(&self, id: &str) -> Result<(), Error> {
        match self.plan.role == Role::Announced && id == self.plan.id {
            true => Ok(()),
            false => Err(Error::NotFound(format!("sandbox {id}"))),
        }
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        self.calls
            .on_pod(move |pod| async move {
                pod.must_be(&request.sandbox_id)?;
                if pod.is_decided() {
                    return Err(Error::Exists(format!("sandbox {}", request.sandbox_id)));
                }
                let config = PodConfig::read(request.options.as_ref(), &request.netns_path)?;
                let spec = config.spec(&pod.plan.id)?;
                pod.receive(boot(&pod.plan, &spec, Some(&config)));
                pod.vm()?;
                Ok(CreateSandboxResponse::default())
            })
            .await
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        self.calls
            .on_pod(move |pod| async move {
                pod.must_be(&request.sandbox_id)?;
                pod.ready().await?;
                pod.life.started();
                Ok(StartSandboxResponse {
                    pid: pod.pid(),
                    created_at: MessageField::some(timestamp(pod.life.made)),
                    ..Default::default()
                })
            })
            .await
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        let mut response = PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".into();
        platform.architecture = "amd64".into();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        // There is nobody in it whom the time that the request gives would help: containers were asked before.
        self.calls
            .on_pod(move |pod| async move {
                pod.must_be(&request.sandbox_id)?;
                pod.life.ended(0);
                pod.end("the pod has been stopped");
                Ok(StopSandboxResponse::default())
            })
            .await
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        self.calls
            .on_pod(move |pod| async move {
                pod.must_be(&request.sandbox_id)?;
                let exited = pod.life.wait().await;
                Ok(WaitSandboxResponse {
                    exit_status: exited.code,
                    exited_at: MessageField::some(timestamp(exited.at)),
                    ..Default::default()
                })
            })
            .await
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        self.calls
            .on_pod(move |pod| async move {
                pod.must_be(&request.sandbox_id)?;
                // CRI's words.
                let state = match pod.life.stage() {
                    Stage::Running => "SANDBOX_READY",
                    Stage::Created | Stage::Stopped => "SANDBOX_NOTREADY",
                };
                let mut response = SandboxStatusResponse {
                    sandbox_id: request.sandbox_id,
                    pid: pod.pid(),
                    state: state.into(),
                    created_at: MessageField::some(timestamp(pod.life.made)),
                    exited_at: pod.life.exit().map(|exited| timestamp(exited.at)).into(),
                    ..Default::default()
                };
                if let Some(size) = pod.size().filter(|_| request.verbose) {
                    let info = serde_json::json!({
                        "pid": pod.pid(), "bundle": pod.plan.bundle, "vcpus": size.vcpus, "memoryBytes": size.memory,
                    });
                    response.info.insert("info".into(), info.to_string());
                }
                Ok(response)
            })
            .await
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        self.calls
            .on_pod(move |pod| async move {
                pod.must_be(&request.sandbox_id)?;
                pod.vm()?;
                Ok(PingResponse::default())
            })
            .await
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        self.calls
            .on_pod(move |pod| async move {
                pod.must_be(&request.sandbox_id)?;
                pod.end("the pod has been shut down");
                pod.finished.notify_one();
                Ok(ShutdownSandboxResponse::default())
            })
            .await
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        self.calls
            .on_pod(move |pod| async move {
                pod.must_be(&request.sandbox_id)?;
                let used = pod.use_of_all().await?;
                let mut response = SandboxMetricsResponse::default();
                let metric = response.metrics.mut_or_insert_default();
                metric.timestamp = MessageField::some(timestamp(SystemTime::now()));
                metric.id = request.sandbox_id;
                metric.data = MessageField::some(stats::to_any(&stats::metrics(&used)));
                Ok(response)
            })
            .await
    }
}
