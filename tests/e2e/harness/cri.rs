//! Pods as kubelet makes them: a containerd with its CRI plug-in and CNI, and a client that speaks to it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use protobuf::{Message, MessageField};
use stockade_tests::cri::host::{self, Bridge, Plugin};
use stockade_tests::cri::messages as cri;
use stockade_tests::cri::stream::Stream;
use stockade_tests::cri::{Client, Failure};

use super::containerd::{Env, IMAGE, PAUSE_IMAGE, RUNTIME};
use super::network::{tool, unique};
use super::{Containerd, HANG};

/// The runtime class's handler for stockade.
pub const HANDLER: &str = "stockade";
/// What has containerd make pods by its sandbox API, without a pause container.
pub const BY_SANDBOX_API: &str = "\nsandboxer = \"shim\"";
/// Has all cases of pods run that way.
const SANDBOX_API: &str = "STOCKADE_E2E_SANDBOX_API";
/// containerd's namespace for what its CRI plug-in has.
const NAMESPACE: &str = "k8s.io";

/// A containerd that serves CRI. Dropping it removes its pods and what it has made.
pub struct Pods {
    pub containerd: Containerd,
    pub client: Client,
    bridge: Bridge,
    next: AtomicU32,
    /// Those of [`HANDLER`] are made by the sandbox API.
    pub by_sandbox_api: bool,
}

impl Pods {
    /// Starts one with stockade and runc as runtime handlers, a network, and the images.
    pub fn start() -> Self {
        Self::configured("")
    }

    /// Starts one whose handler for stockade has further settings.
    pub fn configured(settings: &str) -> Self {
        Self::configured_with(settings, &[])
    }

    /// The same, with variables in the environment of containerd and its shims.
    pub fn configured_with(settings: &str, env: Env) -> Self {
        let number = unique();
        let bridge = Bridge { name: format!("cri-{number}"), number };
        tool("modprobe -a veth bridge overlay");
        let handlers = [("runc", "io.containerd.runc.v2"), (HANDLER, RUNTIME)];
        let mut settings = format!("pod_annotations = [\"io.stockade.*\"]\n{settings}");
        if !settings.contains("sandboxer") && std::env::var_os(SANDBOX_API).is_some() {
            settings += BY_SANDBOX_API;
        }
        let plugin = Plugin { pause: PAUSE_IMAGE, handlers: &handlers, settings: &settings };
        let containerd = Containerd::configured(env, |at| plugin.configure(at, &bridge).unwrap());
        containerd.import(NAMESPACE, &[(IMAGE, &["sh"]), (PAUSE_IMAGE, &["sleep", "1000000"])]);
        let client = Client::new(&containerd.socket());
        let by_sandbox_api = settings.contains(BY_SANDBOX_API);
        let this = Self { containerd, client, bridge, next: AtomicU32::new(1), by_sandbox_api };
        this.wait_until_ready();
        this
    }

    fn wait_until_ready(&self) {
        for image in [IMAGE, PAUSE_IMAGE] {
            self.wait("an image", || self.client.has_image(image).unwrap_or(false));
        }
        self.wait("the network", || self.client.is_ready());
    }

    /// Kills containerd and starts it again over the same state.
    pub fn kill_and_restart(&mut self) {
        self.containerd.kill_and_restart();
        self.wait_until_ready();
    }

    /// A call that must go well.
    #[track_caller]
    pub fn ask<A: Message>(&self, method: &str, request: &impl Message) -> A {
        self.client.call(method, request).unwrap_or_else(|e| panic!("{method}: {e}"))
    }

    /// Waits until something is so.
    #[track_caller]
    pub fn wait(&self, what: &str, done: impl Fn() -> bool) {
        let begin = Instant::now();
        while !done() {
            assert!(begin.elapsed() < HANG, "hung: {what}\n{}", self.containerd.log());
        }
    }

    /// A pod's configuration as kubelet writes it.
    pub fn config(&self, name: &str) -> cri::PodSandboxConfig {
        let uid = format!("{name}-{}", self.next.fetch_add(1, Ordering::Relaxed));
        let logs = self.containerd.dir().join("logs").join(&uid);
        fs::create_dir_all(&logs).unwrap();
        host::pod(name, &uid, &logs, &format!("/{}", self.bridge.name))
    }

    /// Tries to bring a pod up under a runtime handler.
    pub fn try_run(&self, config: cri::PodSandboxConfig, handler: &str) -> Result<Pod<'_>, Failure> {
        let request = cri::RunPodSandboxRequest {
            config: MessageField::some(config.clone()),
            runtime_handler: handler.into(),
            ..Default::default()
        };
        let answer: cri::PodSandboxId = self.client.call("RunPodSandbox", &request)?;
        Ok(Pod { pods: self, id: answer.pod_sandbox_id, config })
    }

    /// Brings a pod up in a VM.
    #[track_caller]
    pub fn run(&self, name: &str, change: impl FnOnce(&mut cri::PodSandboxConfig)) -> Pod<'_> {
        let mut config = self.config(name);
        change(&mut config);
        self.try_run(config, HANDLER)
            .unwrap_or_else(|e| panic!("RunPodSandbox: {e}\n{}", self.containerd.log()))
    }

    /// A pod that is known by its id.
    pub fn pod(&self, id: String, config: cri::PodSandboxConfig) -> Pod<'_> {
        Pod { pods: self, id, config }
    }

    /// The pods that there are, by a filter.
    #[track_caller]
    pub fn list(&self, filter: cri::PodSandboxFilter) -> Vec<cri::PodSandbox> {
        let request = cri::ListPodSandboxRequest { filter: MessageField::some(filter), ..Default::default() };
        self.ask::<cri::ListPodSandboxResponse>("ListPodSandbox", &request).items
    }

    /// What shims keep of pods.
    pub fn state_of_shims(&self) -> Vec<String> {
        self.containerd.state_of_shims(NAMESPACE)
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        let all = self
            .client
            .call::<cri::ListPodSandboxResponse>("ListPodSandbox", &cri::ListPodSandboxRequest::default());
        for pod in all.map(|all| all.items).unwrap_or_default() {
            for method in ["StopPodSandbox", "RemovePodSandbox"] {
                let request = cri::PodSandboxId { pod_sandbox_id: pod.id.clone(), ..Default::default() };
                let _ = self.client.call::<cri::Empty>(method, &request);
            }
        }
        let _ = std::process::Command::new("ip")
            .args(["link", "delete", &self.bridge.name])
            .stderr(std::process::Stdio::null())
            .status();
        let cgroup = Path::new("/sys/fs/cgroup").join(&self.bridge.name);
        for pod in fs::read_dir(&cgroup).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(pod.path());
        }
        let _ = fs::remove_dir(cgroup);
    }
}

/// A pod.
pub struct Pod<'a> {
    pods: &'a Pods,
    pub id: String,
    pub config: cri::PodSandboxConfig,
}

impl Pod<'_> {
    /// A directory on the host for a volume, as kubelet has one for each volume of a pod: `kind` is the kind of volume.
    pub fn volume(&self, kind: &str, name: &str) -> PathBuf {
        let uid = &self.config.metadata.uid;
        let path = self.pods.containerd.dir().join(format!("pods/{uid}/volumes/kubernetes.io~{kind}/{name}"));
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn named(&self) -> cri::PodSandboxId {
        cri::PodSandboxId { pod_sandbox_id: self.id.clone(), ..Default::default() }
    }

    /// What is known of it.
    #[track_caller]
    pub fn status(&self) -> cri::PodSandboxStatus {
        self.pods.ask::<cri::PodSandboxStatusResponse>("PodSandboxStatus", &self.named()).status.unwrap()
    }

    /// Whether it can have containers.
    #[track_caller]
    pub fn is_ready(&self) -> bool {
        self.status().state == cri::PodSandboxState::SANDBOX_READY.into()
    }

    /// Its address in the pods' network.
    #[track_caller]
    pub fn address(&self) -> String {
        self.status().network.ip.clone()
    }

    /// Tries to create a container that runs a shell script.
    pub fn try_create(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut cri::ContainerConfig),
    ) -> Result<String, Failure> {
        let mut config = host::container(name, IMAGE, &["sh", "-c", script]);
        change(&mut config);
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: MessageField::some(config),
            sandbox_config: MessageField::some(self.config.clone()),
            ..Default::default()
        };
        let answer: cri::ContainerId = self.pods.client.call("CreateContainer", &request)?;
        Ok(answer.container_id)
    }

    /// Tries to start a container.
    pub fn try_start(&self, id: &str) -> Result<(), Failure> {
        self.pods.client.call::<cri::Empty>("StartContainer", &container(id)).map(drop)
    }

    /// Creates and starts a container that runs a shell script. Returns its id.
    #[track_caller]
    pub fn start(&self, name: &str, script: &str, change: impl FnOnce(&mut cri::ContainerConfig)) -> String {
        let log = || self.pods.containerd.log();
        let id = self
            .try_create(name, script, change)
            .unwrap_or_else(|e| panic!("CreateContainer: {e}\n{}", log()));
        self.try_start(&id).unwrap_or_else(|e| panic!("StartContainer: {e}\n{}", log()));
        id
    }

    /// What is known of a container.
    #[track_caller]
    pub fn container(&self, id: &str) -> cri::ContainerStatus {
        self.pods.ask::<cri::ContainerStatusResponse>("ContainerStatus", &container(id)).status.unwrap()
    }

    /// The pod's containers, by a further filter.
    #[track_caller]
    pub fn list(&self, filter: cri::ContainerFilter) -> Vec<cri::Container> {
        let filter = cri::ContainerFilter { pod_sandbox_id: self.id.clone(), ..filter };
        let request = cri::ListContainersRequest { filter: MessageField::some(filter), ..Default::default() };
        self.pods.ask::<cri::ListContainersResponse>("ListContainers", &request).containers
    }

    /// Waits for a container's end. Returns how it ended.
    #[track_caller]
    pub fn ended(&self, id: &str) -> cri::ContainerStatus {
        let is_running = || self.container(id).state != cri::ContainerState::CONTAINER_EXITED.into();
        self.pods.wait("the end of a container", || !is_running());
        self.container(id)
    }

    /// Runs a container to its end, which must be this one. Returns the lines that it wrote to standard output.
    #[track_caller]
    pub fn done(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut cri::ContainerConfig),
    ) -> Vec<String> {
        let id = self.start(name, script, change);
        let ended = self.ended(&id);
        let said = self.log(name);
        assert_eq!(ended.exit_code, 0, "{ended}: {said:?}");
        said.into_iter().filter(|line| line.stream == "stdout").map(|line| line.text).collect()
    }

    /// Runs a shell script beside a container's workload: its exit code and what it wrote to both outputs.
    #[track_caller]
    pub fn exec(&self, id: &str, script: &str) -> (i32, String, String) {
        let request = cri::ExecSyncRequest {
            container_id: id.into(),
            cmd: ["sh", "-c", script].map(String::from).into(),
            timeout: HANG.as_secs() as i64 / 2,
            ..Default::default()
        };
        let answer: cri::ExecSyncResponse = self.pods.ask("ExecSync", &request);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (answer.exit_code, text(&answer.stdout), text(&answer.stderr))
    }

    /// The same, for what must go well: what it wrote.
    #[track_caller]
    pub fn output(&self, id: &str, script: &str) -> String {
        let (code, out, errors) = self.exec(id, script);
        assert_eq!(code, 0, "{script}: {out}{errors}");
        out.trim_end().to_owned()
    }

    /// Stops a container.
    #[track_caller]
    pub fn stop_container(&self, id: &str, timeout: i64) {
        let request = cri::StopContainerRequest { container_id: id.into(), timeout, ..Default::default() };
        let _: cri::Empty = self.pods.ask("StopContainer", &request);
    }

    /// Removes a container.
    #[track_caller]
    pub fn remove_container(&self, id: &str) {
        let _: cri::Empty = self.pods.ask("RemoveContainer", &container(id));
    }

    /// Stops the pod.
    #[track_caller]
    pub fn stop(&self) {
        let _: cri::Empty = self.pods.ask("StopPodSandbox", &self.named());
    }

    /// Removes the pod.
    #[track_caller]
    pub fn remove(&self) {
        let _: cri::Empty = self.pods.ask("RemovePodSandbox", &self.named());
    }

    /// Follows a shell script that runs beside a container's workload.
    #[track_caller]
    pub fn exec_stream(&self, id: &str, script: &str, tty: bool) -> Stream {
        let request = cri::ExecRequest {
            container_id: id.into(),
            cmd: ["sh", "-c", script].map(String::from).into(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
            ..Default::default()
        };
        self.stream("Exec", &request)
    }

    /// Joins a container's own streams.
    #[track_caller]
    pub fn attach(&self, id: &str) -> Stream {
        let request = cri::AttachRequest {
            container_id: id.into(),
            stdin: true,
            stdout: true,
            stderr: true,
            ..Default::default()
        };
        self.stream("Attach", &request)
    }

    /// Forwards a port of the pod.
    #[track_caller]
    pub fn forward(&self, port: u16) -> Stream {
        let request = cri::PortForwardRequest {
            pod_sandbox_id: self.id.clone(),
            port: vec![port.into()],
            ..Default::default()
        };
        self.stream("PortForward", &request)
    }

    #[track_caller]
    fn stream(&self, method: &str, request: &impl Message) -> Stream {
        let url = self.pods.ask::<cri::StreamingUrl>(method, request).url;
        Stream::connect(&url, HANG / 8).unwrap_or_else(|e| panic!("{method}: {e}"))
    }

    /// Where a container's log is.
    pub fn log_path(&self, name: &str) -> PathBuf {
        Path::new(&self.config.log_directory).join(format!("{name}.log"))
    }

    /// A container's log so far.
    #[track_caller]
    pub fn log(&self, name: &str) -> Vec<LogLine> {
        LogLine::all(&fs::read_to_string(self.log_path(name)).unwrap_or_default())
    }

    /// Waits until a container has written this line.
    #[track_caller]
    pub fn wait_for_line(&self, name: &str, line: &str) {
        self.pods.wait(&format!("the line {line:?} of {name}"), || {
            self.log(name).iter().any(|written| written.text == line)
        });
    }
}

/// A line of a log in CRI's format.
#[derive(Debug)]
pub struct LogLine {
    pub stream: String,
    pub text: String,
}

impl LogLine {
    /// Parses a log: each line has a time, the stream, a tag (`F` for the end of a line, `P` for a part), and the text.
    #[track_caller]
    pub fn all(log: &str) -> Vec<Self> {
        let mut lines: Vec<Self> = Vec::new();
        let mut goes_on = false;
        for line in log.lines() {
            let words: Vec<&str> = line.splitn(4, ' ').collect();
            let [time, stream, tag, text] = words[..] else { panic!("{line:?} is no line of a CRI log") };
            assert!(time.len() > 20 && time.contains('T'), "no time: {line:?}");
            match lines.last_mut().filter(|_| goes_on) {
                Some(last) => last.text.push_str(text),
                None => lines.push(Self { stream: stream.into(), text: text.into() }),
            }
            goes_on = tag == "P";
        }
        lines
    }
}

/// What a pod's shim has written of it.
pub fn state_of(pod: &str) -> serde_json::Value {
    let path = format!("/run/containerd/stockade/{NAMESPACE}/{pod}/state.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The processes of a pod's VMM and shim.
pub fn runtime_of(pod: &str) -> (i32, i32) {
    let state = state_of(pod);
    let pid = |name: &str| state[name]["pid"].as_i64().unwrap_or_else(|| panic!("{name} in {state}")) as i32;
    (pid("vmm"), pid("supervisor"))
}

/// How many files and directories a process has open that are in no mount of its own, since that has been taken away.
pub fn files_in_no_mount(pid: i32) -> usize {
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let mounts: BTreeSet<&str> = mounts.lines().filter_map(|line| line.split(' ').next()).collect();
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    fds.filter(|fd| {
        fs::read_link(fd.path()).is_ok_and(|path| path.is_absolute() && !path.starts_with("/dev"))
    })
    .filter(|fd| {
        let info = format!("/proc/{pid}/fdinfo/{}", fd.file_name().display());
        let info = fs::read_to_string(info).unwrap_or_default();
        let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        mount.is_some_and(|mount| !mounts.contains(mount.trim()))
    })
    .count()
}

/// The request of calls about one container.
pub fn container(id: &str) -> cri::ContainerId {
    cri::ContainerId { container_id: id.into(), ..Default::default() }
}

/// A volume of a container.
pub fn mount(host: &Path, container: &str, readonly: bool) -> cri::Mount {
    cri::Mount {
        host_path: host.display().to_string(),
        container_path: container.into(),
        readonly,
        ..Default::default()
    }
}

/// The part of a container's configuration that says what it may do.
pub fn security(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerSecurityContext {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default()
}
