//! What a containerd needs to serve CRI, and what kubelet says to it of a pod and a container.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use protobuf::MessageField;
use serde_json::json;

use super::messages as cri;

/// Where Debian has the CNI plug-ins.
const PLUGINS: &str = "/usr/lib/cni";

/// The version of the containerd that this host has: its first two numbers.
pub fn containerd_version() -> io::Result<(u32, u32)> {
    let output = Command::new("containerd").arg("--version").output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // containerd github.com/containerd/containerd/v2 v2.1.9 …
    version_of(&text).ok_or_else(|| io::Error::other(format!("containerd says of its version {text:?}")))
}

fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_whitespace().nth(2)?.trim_start_matches('v').split('.');
    let mut next = || numbers.next()?.parse().ok();
    Some((next()?, next()?))
}

/// The version of the configuration file that it has its own words in.
pub fn config_version() -> io::Result<u32> {
    Ok(if containerd_version()?.0 < 2 { 2 } else { 3 })
}

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
        // Until version 3 one plug-in held all of CRI's configuration.
        let serves = "[plugins.\"io.containerd.grpc.v1.cri\"";
        let (runtime, image) = match config_version()? {
            2 => (serves, format!("{serves}]\nsandbox_image = {:?}\n", self.pause)),
            _ => (
                "[plugins.\"io.containerd.cri.v1.runtime\"",
                format!(
                    "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = {:?}\n{serves}]\n",
                    self.pause
                ),
            ),
        };
        let plugins = match containerd_version()? < (2, 1) {
            true => format!("bin_dir = {PLUGINS:?}"),
            false => format!("bin_dirs = [{PLUGINS:?}]"),
        };
        let mut text = format!(
            "{image}stream_server_address = \"127.0.0.1\"\n\
             {runtime}.cni]\n{plugins}\nconf_dir = {:?}\n\
             {runtime}.containerd]\ndefault_runtime_name = {:?}\n",
            at.join("cni"),
            self.handlers.first().map_or("", |(name, _)| name),
        );
        for (name, kind) in self.handlers {
            text += &format!("{runtime}.containerd.runtimes.{name}]\nruntime_type = {kind:?}\n");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_debian_and_others_write_them() {
        let debian = "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u2\n";
        assert_eq!(version_of(debian), Some((1, 6)));
        let upstream = "containerd github.com/containerd/containerd/v2 v2.1.9 1234abcd\n";
        assert_eq!(version_of(upstream), Some((2, 1)));
        assert_eq!(version_of("containerd: not found"), None);
    }
}
