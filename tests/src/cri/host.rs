//! What a containerd needs to serve CRI, and what kubelet says to it of a pod and a container.

use std::fs;
use std::io;
use std::path::Path;

use protobuf::MessageField;
use serde_json::json;

use super::messages as cri;

/// Where Debian has the CNI plug-ins.
const PLUGINS: &str = "/usr/lib/cni";

/// A network for containerd's pods, as most clusters have one: a bridge on the host.
#[derive(Debug, Clone)]
pub struct Bridge {
    /// Its interface's name.
    pub name: String,
    /// The pods have addresses in 10.67.N.0/24.
    pub number: u32,
}

/// Parts of containerd's configuration.
pub struct Plugin<'a> {
    /// The image of the process that stands for a pod, under runtimes that need one.
    pub pause: &'a str,
    /// Runtime handlers: their names and runtimes' types.
    pub handlers: &'a [(&'a str, &'a str)],
    /// Further settings of the last of them.
    pub settings: &'a str,
}

impl Plugin<'_> {
    /// Writes the network's configuration below `at`, and returns what containerd's configuration says of the plug-in.
    pub fn configure(&self, at: &Path, bridge: &Bridge) -> io::Result<String> {
        let subnet = format!("10.67.{}.0/24", bridge.number);
        let network = json!({
            "cniVersion": "0.4.0", "name": bridge.name,
            "plugins": [{
                "type": "bridge", "bridge": bridge.name, "isGateway": true,
                "ipam": {
                    "type": "host-local", "dataDir": at.join("ipam"),
                    "ranges": [[{ "subnet": subnet }]], "routes": [{ "dst": "0.0.0.0/0" }],
                },
            }],
        });
        fs::create_dir(at.join("cni"))?;
        fs::write(at.join("cni/10-lab.conflist"), network.to_string())?;
        let plugin = "[plugins.\"io.containerd.grpc.v1.cri\"";
        let mut text = format!(
            "{plugin}]\nsandbox_image = {:?}\nstream_server_address = \"127.0.0.1\"\n\
             {plugin}.cni]\nbin_dir = {PLUGINS:?}\nconf_dir = {:?}\n\
             {plugin}.containerd]\ndefault_runtime_name = {:?}\n",
            self.pause,
            at.join("cni"),
            self.handlers.first().map_or("", |(name, _)| name),
        );
        for (name, kind) in self.handlers {
            text += &format!("{plugin}.containerd.runtimes.{name}]\nruntime_type = {kind:?}\n");
        }
        Ok(text + self.settings + "\n")
    }
}

/// A pod, whose containers' logs are in a directory and whose cgroup is below another.
pub fn pod(name: &str, uid: &str, logs: &Path, cgroup_parent: &str) -> cri::PodSandboxConfig {
    let metadata = cri::PodSandboxMetadata {
        name: name.into(),
        uid: uid.into(),
        namespace: "lab".into(),
        ..Default::default()
    };
    let linux = cri::LinuxPodSandboxConfig {
        cgroup_parent: format!("{cgroup_parent}/{uid}"),
        security_context: MessageField::some(Default::default()),
        ..Default::default()
    };
    cri::PodSandboxConfig {
        metadata: MessageField::some(metadata),
        hostname: name.into(),
        log_directory: logs.display().to_string(),
        linux: MessageField::some(linux),
        ..Default::default()
    }
}

/// A container with processes of its own.
pub fn container(name: &str, image: &str, command: &[&str]) -> cri::ContainerConfig {
    let namespaces = cri::NamespaceOption { pid: cri::NamespaceMode::CONTAINER.into(), ..Default::default() };
    let security_context = cri::LinuxContainerSecurityContext {
        namespace_options: MessageField::some(namespaces),
        ..Default::default()
    };
    let linux = cri::LinuxContainerConfig {
        resources: MessageField::some(Default::default()),
        security_context: MessageField::some(security_context),
        ..Default::default()
    };
    cri::ContainerConfig {
        metadata: MessageField::some(cri::ContainerMetadata { name: name.into(), ..Default::default() }),
        image: MessageField::some(cri::ImageSpec { image: image.into(), ..Default::default() }),
        command: command.iter().map(|&word| word.into()).collect(),
        log_path: format!("{name}.log"),
        linux: MessageField::some(linux),
        ..Default::default()
    }
}
