//! Pods through CRI, with stockade's shim and with runc's: how long kubelet waits for one, and what pods take that idle.

use super::containerd::{Containerd, IMAGE, SANDBOXES, kind};
use super::runtimes::Runtime;
use super::{Context, Plan, memory, program, result::Results};
use crate::cri::host::{self, Bridge, Plugin};
use crate::cri::{Client, messages};
use protobuf::MessageField;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

/// containerd's namespace for what its CRI plug-in has.
const NAMESPACE: &str = "k8s.io";
const BRIDGE: &str = "bench-pods";
const NO_SHIM: &str = "containerd has no name for this runtime";

/// From the call for a sandbox to its first container's start, with a network; and a second container's start.
pub fn pod(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let pods = Pods::start(runtime)?;
    let (mut first, mut second) = (Vec::new(), Vec::new());
    // The first warms up.
    for run in 0..=plan.runs {
        let begin = Instant::now();
        let pod = pods.run("measured")?;
        pods.start_container(&pod, "first")?;
        let between = Instant::now();
        pods.start_container(&pod, "second")?;
        if run > 0 {
            first.push((between - begin).as_secs_f64());
            second.push(between.elapsed().as_secs_f64());
        }
        pods.remove(&pod)?;
    }
    results.add("cri-pod", &runtime.name, "time", "virtual_s", &first);
    results.add("cri-pod", &runtime.name, "second", "virtual_s", &second);
    Ok(())
}

/// The memory of pods with one container each, per pod.
pub fn idle(_: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let pods = Pods::start(runtime)?;
    let mut started = Vec::new();
    for number in SANDBOXES {
        while started.len() < number {
            let pod = pods.run(&format!("idle-{}", started.len()))?;
            pods.start_container(&pod, "idle")?;
            started.push(pod);
        }
        let each = pods.containerd.shims()?.scaled(1.0 / number as f64);
        memory::add(&format!("cri-idle-{number}"), &runtime.name, runtime.has_vm, &[each], results);
    }
    started.iter().try_for_each(|pod| pods.remove(pod))
}

struct Pods {
    containerd: Containerd,
    client: Client,
    handler: String,
    logs: PathBuf,
}

struct Pod {
    id: String,
    config: messages::PodSandboxConfig,
}

impl Pods {
    fn start(runtime: &Runtime) -> Result<Self, String> {
        let kind = kind(runtime).ok_or(NO_SHIM)?;
        program::succeed(Command::new("modprobe").args(["-a", "veth", "bridge", "overlay", "tun"]))?;
        let handlers = [(runtime.name.as_str(), kind)];
        let plugin = Plugin { pause: IMAGE, handlers: &handlers, settings: "" };
        let bridge = Bridge { name: BRIDGE.into(), number: 1 };
        let configure = |at: &std::path::Path| plugin.configure(at, &bridge).or_say("configure containerd");
        let containerd = Containerd::configured(configure)?;
        containerd.import(NAMESPACE)?;
        let client = Client::new(&containerd.folder().join("socket"));
        let is_ready = || client.is_ready() && client.has_image(IMAGE).unwrap_or(false);
        while !is_ready() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let logs = containerd.folder().join("logs");
        fs::create_dir(&logs).or_say("make a folder")?;
        Ok(Self { containerd, client, handler: runtime.name.clone(), logs })
    }

    fn run(&self, name: &str) -> Result<Pod, String> {
        let config = host::pod(name, name, &self.logs, &format!("/{BRIDGE}"));
        let request = messages::RunPodSandboxRequest {
            config: MessageField::some(config.clone()),
            runtime_handler: self.handler.clone(),
            ..Default::default()
        };
        let answer: messages::PodSandboxId =
            self.client.call("RunPodSandbox", &request).or_say("RunPodSandbox")?;
        Ok(Pod { id: answer.pod_sandbox_id, config })
    }

    fn start_container(&self, pod: &Pod, name: &str) -> Result<(), String> {
        let request = messages::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: MessageField::some(host::container(name, IMAGE, &["sleep", "100000"])),
            sandbox_config: MessageField::some(pod.config.clone()),
            ..Default::default()
        };
        let container: messages::ContainerId =
            self.client.call("CreateContainer", &request).or_say("CreateContainer")?;
        let started = self.client.call::<messages::Empty>("StartContainer", &container);
        started.or_say("StartContainer").map(drop)
    }

    fn remove(&self, pod: &Pod) -> Result<(), String> {
        let request = messages::PodSandboxId { pod_sandbox_id: pod.id.clone(), ..Default::default() };
        for method in ["StopPodSandbox", "RemovePodSandbox"] {
            self.client.call::<messages::Empty>(method, &request).or_say(method)?;
        }
        Ok(())
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        let _ = program::run(Command::new("ip").args(["link", "delete", BRIDGE]));
    }
}
