//! What containerd can do with a container that runs, one function a call.

use std::rc::Rc;

use containerd_shim_protos::api::ExecProcessRequest;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed};
use containerd_shim_protos::topics;
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec};
use stockade_agent_protocol::check_id;
use stockade_agent_protocol::messages::StatsResponse;
use tokio::time::timeout;

use super::{Container, named};
use crate::bundle;
use crate::printable::error_line;
use crate::sandbox::{self, agent};
use crate::shim::error::Error;
use crate::shim::pod::{KILLED, Pod};
use crate::shim::process::{Process, Stage};
use crate::shim::stdio::{self, Owner, Paths};
use crate::shim::{io_error, stats};
use crate::size;

impl Pod {
    /// Notes a further process, which waits for its start.
    pub fn exec(&self, request: ExecProcessRequest) -> Result<(), Error> {
        let container = self.container(&request.id)?;
        let exec_id = &request.exec_id;
        check_id(exec_id).map_err(|e| Error::Invalid(format!("exec id: {e}")))?;
        if container.execs.borrow().contains_key(exec_id) {
            return Err(Error::Exists(format!("exec {exec_id} of container {}", container.id)));
        }
        container.must_run()?;
        let spec: ProcessSpec = serde_json::from_slice(&request.spec.value)
            .map_err(|e| Error::Invalid(format!("the process of exec {exec_id} cannot be read: {e}")))?;
        bundle::check_process(&spec)?;
        let paths = Paths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let process = Process::new(exec_id, paths);
        process.spec.replace(request.spec.value.clone());
        container.execs.borrow_mut().insert(exec_id.clone(), Rc::new(process));
        let event = TaskExecAdded {
            container_id: request.id.clone(),
            exec_id: exec_id.clone(),
            ..Default::default()
        };
        self.publisher.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    pub(super) async fn start_exec(
        self: &Rc<Self>,
        container: &Rc<Container>,
        process: &Rc<Process>,
    ) -> Result<u32, Error> {
        let started = self.run_exec(container, process).await;
        match started {
            Ok(relays) => {
                process.started();
                let event = TaskExecStarted {
                    container_id: container.id.clone(),
                    exec_id: process.exec_id.clone(),
                    pid: self.pid(),
                    ..Default::default()
                };
                self.publisher.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
                tokio::task::spawn_local(self.clone().follow(container.clone(), process.clone(), relays));
                Ok(self.pid())
            }
            Err(e) => {
                // It never ran; who waits for it must not wait for ever.
                process.ended(255);
                process.held.take();
                Err(e)
            }
        }
    }

    async fn run_exec(
        &self,
        container: &Container,
        process: &Process,
    ) -> Result<sandbox::stdio::Relays, Error> {
        container.must_run()?;
        let vm = self.vm()?;
        let owner = Owner { namespace: &self.plan.namespace, container: &container.id };
        let (mut host, held) = stdio::open(&process.paths, owner, vm.outside())?;
        process.held.replace(held);
        let wanted = host.wanted();
        let streams = vm.connect_streams(wanted, &container.id, &process.exec_id)?;
        let relays = host.relay(streams, || ()).map_err(io_error("relay the standard streams"))?;
        let spec = process.spec.take();
        match vm.agent.exec(&container.id, &process.exec_id, spec, wanted).await {
            Ok(_) => Ok(relays),
            Err(e) => Err(self.explain("run the process", e).await),
        }
    }

    /// Signals a process, or all of a container's.
    pub async fn kill(self: &Rc<Self>, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        if process.stage() == Stage::Stopped {
            return Err(Error::NotFound(format!("process {} has ended already", named(id, exec_id))));
        }
        if container.is_pause {
            return self.kill_pause(&container, signal).await;
        }
        if !exec_id.is_empty() && process.stage() == Stage::Created {
            return Err(Error::Precondition(format!("process {} has not been started", named(id, exec_id))));
        }
        match self.vm()?.agent.signal(id, exec_id, signal as i32, all).await {
            Ok(()) => {
                if exec_id.is_empty() && signal == libc::SIGKILL as u32 {
                    self.expect_end(&container);
                }
                Ok(())
            }
            // Ended in the guest, its output is still on its way here.
            Err(agent::Error::Refused(reason)) if reason.contains("has ended") => {
                Err(Error::NotFound(format!("process {} has ended already", named(id, exec_id))))
            }
            Err(source @ agent::Error::Silent) if exec_id.is_empty() => {
                self.end_by_force(id, source);
                Ok(())
            }
            Err(e) => Err(self.explain("signal the process", e).await),
        }
    }

    /// An agent that has a container killed tells of its end: one that does not is not waited for.
    fn expect_end(self: &Rc<Self>, container: &Rc<Container>) {
        if container.is_killed.replace(true) {
            return;
        }
        let (pod, container) = (self.clone(), container.clone());
        tokio::task::spawn_local(async move {
            if timeout(agent::END_TIMEOUT, container.init.wait()).await.is_err() {
                pod.end_by_force(&container.id, agent::Error::Lingers);
            }
        });
    }

    /// A container is to go and its agent does not see to that, so its VM goes.
    fn end_by_force(&self, id: &str, source: agent::Error) {
        let error = sandbox::Error::Agent { what: "have the container killed", source };
        tracing::error!(container = id, "{error}");
        self.end(&error_line(&error));
    }

    /// What a pause process does: it ends when asked to, and the pod with it.
    async fn kill_pause(&self, container: &Container, signal: u32) -> Result<(), Error> {
        let code = match signal as i32 {
            0 => return Ok(()),
            libc::SIGTERM | libc::SIGINT => 0,
            libc::SIGKILL => KILLED,
            _ => return Ok(()),
        };
        let _order = container.init.order.lock().await;
        if container.init.exit().is_none() {
            let exited = container.init.ended(code);
            self.report(&container.id, &container.init, exited);
            self.end("the pod has been stopped");
        }
        Ok(())
    }

    /// Freezes a container or lets it go on.
    pub async fn freeze(&self, id: &str, freeze: bool) -> Result<(), Error> {
        let container = self.container(id)?;
        container.must_run()?;
        let vm = self.vm()?;
        let done = if freeze { vm.agent.pause(id).await } else { vm.agent.resume(id).await };
        if let Err(e) = done {
            return Err(self.explain("freeze or thaw the container", e).await);
        }
        container.paused.set(freeze);
        if freeze {
            let event = TaskPaused { container_id: id.into(), ..Default::default() };
            self.publisher.publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        } else {
            let event = TaskResumed { container_id: id.into(), ..Default::default() };
            self.publisher.publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        }
        Ok(())
    }

    /// Sets the size of a process's terminal.
    pub async fn resize(&self, id: &str, exec_id: &str, rows: u16, columns: u16) -> Result<(), Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        if process.stage() == Stage::Stopped {
            return Err(Error::NotFound(format!("process {} has ended already", named(id, exec_id))));
        }
        match self.vm()?.agent.resize(id, exec_id, rows, columns).await {
            Ok(()) => Ok(()),
            Err(e) => Err(self.explain("resize the terminal", e).await),
        }
    }

    /// Applies new limits, a `linux.resources` object in JSON.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), Error> {
        let container = self.container(id)?;
        if container.is_pause {
            // There is no process for which it could mean anything.
            return Ok(());
        }
        let vm = self.vm()?;
        let limits: LinuxResources = serde_json::from_slice(&resources)
            .map_err(|e| Error::Invalid(format!("the new limits are no linux.resources object: {e}")))?;
        // Nothing, or 0, leaves what there is.
        let named = limits.memory().as_ref().and_then(|memory| memory.limit()).filter(|limit| *limit != 0);
        let before = match named {
            None => None,
            Some(_) => {
                let limit = size::memory_limit(&limits).map_err(sandbox::Error::Size)?;
                match vm.promise(id, limit).await {
                    Ok(before) => Some(before),
                    Err(e) => {
                        self.save_size()?;
                        return Err(e.into());
                    }
                }
            }
        };
        let updated = vm.agent.update(id, resources).await;
        if let (Err(_), Some(before)) = (&updated, before) {
            vm.restore(id, before);
        }
        vm.shrink().await;
        self.save_size()?;
        match updated {
            Ok(()) => self.limit_on_host(id, &limits),
            Err(e) => Err(self.explain("update the container's limits", e).await),
        }
    }

    /// Reads a container's accounts; those of a pod's sandbox are all zero.
    pub async fn stats(&self, id: &str) -> Result<Metrics, Error> {
        let container = self.container(id)?;
        if container.is_pause {
            return Ok(stats::metrics(&StatsResponse::default()));
        }
        if container.init.stage() == Stage::Stopped {
            return Err(Error::NotFound(format!("container {id} has ended, its accounts")));
        }
        match self.vm()?.agent.stats(id).await {
            Ok(answer) => Ok(stats::metrics(&answer)),
            Err(e) => Err(self.explain("read the container's accounts", e).await),
        }
    }

    /// What all containers use together.
    pub async fn use_of_all(&self) -> Result<StatsResponse, Error> {
        let running: Vec<_> = self.containers.borrow().values().cloned().collect();
        let mut sum = StatsResponse::default();
        for container in running.iter().filter(|one| one.must_run().is_ok()) {
            match self.vm()?.agent.stats(&container.id).await {
                Ok(answer) => stats::add(&mut sum, &answer),
                // It has ended meanwhile.
                Err(agent::Error::Refused(_)) => {}
                Err(e) => return Err(self.explain("read the containers' accounts", e).await),
            }
        }
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::boot::Plan;
    use crate::shim::events::{Publisher, Sink};
    use crate::shim::role::Role;
    use oci_spec::runtime::Hooks;
    use std::time::Duration;
    use tokio::task::LocalSet;

    /// A sandbox with a container that runs in it.
    fn pod() -> (Rc<Pod>, Rc<Container>) {
        let plan = Plan {
            id: "p".into(),
            namespace: "default".into(),
            role: Role::Group("p".into()),
            bundle: "/".into(),
            debug: false,
            process_start_ns: 0,
        };
        let pod = Pod::new(plan, Publisher::new("default".into(), Sink::Nowhere));
        let paths =
            Paths { stdin: String::new(), stdout: String::new(), stderr: String::new(), terminal: false };
        let init = Rc::new(Process::new("", paths));
        init.started();
        let container = pod.admit("c", "/".into(), init, Hooks::default(), false);
        (pod, container)
    }

    #[tokio::test(start_paused = true)]
    async fn a_vm_in_which_a_killed_container_does_not_end_is_ended() {
        LocalSet::new()
            .run_until(async {
                let (pod, container) = pod();
                pod.expect_end(&container);
                pod.expect_end(&container);
                assert!(!pod.is_decided());
                let begin = tokio::time::Instant::now();
                pod.life.wait().await;
                assert_eq!(begin.elapsed().as_secs(), agent::END_TIMEOUT.as_secs());
                let reason = pod.vm().err().unwrap().to_string();
                assert!(reason.contains("killed process"), "{reason}");
            })
            .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_container_that_ends_when_it_is_killed_ends_alone() {
        LocalSet::new()
            .run_until(async {
                let (pod, container) = pod();
                pod.expect_end(&container);
                container.init.ended(KILLED);
                let is_over = timeout(agent::END_TIMEOUT + Duration::from_secs(1), pod.life.wait()).await;
                assert!(is_over.is_err() && !pod.is_decided());
            })
            .await;
    }
}
