//! A pod as kubelet describes it, which containerd passes on by the sandbox API: made into the configuration that the
//! pause container would have had, and into the files that containerd makes for pods with one.
//!
//! What is said here is the user's: nothing in it names a path or a program on the host, but the cgroup and the network
//! namespace, which are kubelet's and containerd's.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::json;

use super::error::Error;
use crate::bundle::pod::Shared;
use crate::state::{POD_FILES, POD_SHM};
use generated::pod_config::{NamespaceMode, PodSandboxConfig};

// Generated: what the fields mean is in pod_config.proto, the style is the generator's.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/shim/generated.rs"));
}

/// How containerd calls the message.
const TYPE: &str = "runtime.v1.PodSandboxConfig";
/// What containerd gives a pod for shared memory.
const SHM_BYTES: u64 = 64 << 20;
/// What containerd 2 sets for pods that it makes itself, unless they say otherwise: every user may ping and listen on all
/// ports.
const SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];
/// Annotations that tell this runtime something.
const OURS: &str = "io.stockade.";

/// The description.
#[derive(Debug)]
pub struct PodConfig {
    config: PodSandboxConfig,
    netns: PathBuf,
}

impl PodConfig {
    /// Reads what CreateSandbox brings.
    pub fn read(options: Option<&Any>, netns: &str) -> Result<Self, Error> {
        let invalid = |reason: String| Error::Invalid(format!("the sandbox's options {reason}"));
        let options = options.filter(|options| !options.value.is_empty()).ok_or_else(|| {
            invalid(format!("are missing: they must be a {TYPE}, as containerd's CRI plug-in sends it"))
        })?;
        // containerd leaves out what others have before the slash.
        let name = options.type_url.rsplit('/').next().unwrap_or_default();
        if name != TYPE {
            return Err(invalid(format!("are a {name:?}: they must be a {TYPE}")));
        }
        let config = PodSandboxConfig::parse_from_bytes(&options.value)
            .map_err(|e| invalid(format!("cannot be read: {e}")))?;
        Ok(PodConfig { config, netns: netns.into() })
    }

    /// The configuration of the sandbox `id`, as containerd would have written it for a pause container.
    pub fn spec(&self, id: &str) -> Result<Spec, Error> {
        let config = &self.config;
        let of_host = config.linux.security_context.namespace_options.get_or_default();
        let is_hosts = |mode: &protobuf::EnumOrUnknown<NamespaceMode>| *mode == NamespaceMode::NODE.into();
        let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "uts"})];
        for (typ, mode) in [("pid", &of_host.pid), ("ipc", &of_host.ipc)] {
            if !is_hosts(mode) {
                namespaces.push(json!({"type": typ}));
            }
        }
        if !is_hosts(&of_host.network) {
            namespaces.push(json!({"type": "network", "path": self.netns}));
        }
        let mut sysctls: HashMap<_, _> =
            SYSCTLS.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        sysctls.extend(config.linux.sysctls.clone());
        let spec = json!({
            "ociVersion": "1.0.2",
            "hostname": config.hostname,
            "annotations": self.annotations(id),
            "linux": {
                "namespaces": namespaces, "sysctl": sysctls,
                "cgroupsPath": cgroups_path(&config.linux.cgroup_parent, id),
            },
        });
        serde_json::from_value(spec).map_err(|e| Error::Invalid(format!("the sandbox's options: {e}")))
    }

    /// As containerd's CRI plug-in writes them.
    fn annotations(&self, id: &str) -> HashMap<String, String> {
        let config = &self.config;
        // Which annotations of its users a node honours, containerd is told for each runtime handler, and it does not
        // say here.
        for key in config.annotations.keys().filter(|key| key.starts_with(OURS)) {
            tracing::warn!(
                "the pod's annotation {key} is left out: the sandbox API does not say whether it may have it"
            );
        }
        let metadata = config.metadata.get_or_default();
        let resources = config.linux.resources.get_or_default();
        let has = [
            ("container-type", "sandbox".into()),
            ("sandbox-id", id.into()),
            ("sandbox-name", metadata.name.clone()),
            ("sandbox-namespace", metadata.namespace.clone()),
            ("sandbox-uid", metadata.uid.clone()),
            ("sandbox-cpu-period", resources.cpu_period.to_string()),
            ("sandbox-cpu-quota", resources.cpu_quota.to_string()),
            ("sandbox-cpu-shares", resources.cpu_shares.to_string()),
            ("sandbox-memory", resources.memory_limit_in_bytes.to_string()),
        ];
        has.map(|(key, value)| (format!("io.kubernetes.cri.{key}"), value)).into()
    }

    /// Makes the pod's files in the sandbox's state directory and has its containers get them. They are read-only there:
    /// they lie in the host's memory, of which a guest shall not have more.
    pub fn make_files(&self, state: &Path, shared: &mut Shared) -> io::Result<()> {
        let shm = state.join(POD_SHM);
        fs::create_dir(&shm)?;
        let name = &self.config.hostname;
        let texts = [
            format!("{name}\n"),
            format!("127.0.0.1 localhost {name}\n::1 localhost {name}\n"),
            self.resolv_conf()?,
        ];
        let mut files = Vec::new();
        for (name, text) in POD_FILES.into_iter().zip(texts) {
            fs::write(state.join(name), text)?;
            fs::set_permissions(state.join(name), fs::Permissions::from_mode(0o644))?;
            files.push((state.join(name), Path::new("/etc").join(name)));
        }
        shared.bring(files, shm, SHM_BYTES);
        Ok(())
    }

    /// resolv.conf(5); a pod that says nothing of names has the host's.
    fn resolv_conf(&self) -> io::Result<String> {
        let Some(dns) = self.config.dns_config.as_ref() else {
            return match fs::read_to_string("/etc/resolv.conf") {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
                other => other,
            };
        };
        let mut text = String::new();
        if !dns.searches.is_empty() {
            text += &format!("search {}\n", dns.searches.join(" "));
        }
        for server in &dns.servers {
            text += &format!("nameserver {server}\n");
        }
        if !dns.options.is_empty() {
            text += &format!("options {}\n", dns.options.join(" "));
        }
        Ok(text)
    }
}

/// The cgroup of a container below a pod's, as containerd names it; below a slice in systemd's form.
fn cgroups_path(parent: &str, id: &str) -> Option<String> {
    let base = parent.rsplit('/').next().unwrap_or_default();
    match base {
        "" => None,
        slice if slice.ends_with(".slice") => Some(format!("{slice}:cri-containerd:{id}")),
        _ => Some(format!("{parent}/{id}")),
    }
}

#[cfg(test)]
mod tests {
    use super::generated::pod_config::*;
    use super::*;
    use protobuf::MessageField;

    fn config() -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: MessageField::some(PodSandboxMetadata {
                name: "web".into(),
                namespace: "prod".into(),
                uid: "u".into(),
                ..Default::default()
            }),
            hostname: "web-0".into(),
            linux: MessageField::some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/pod1".into(),
                resources: MessageField::some(LinuxContainerResources {
                    cpu_period: 100_000,
                    cpu_quota: 200_000,
                    memory_limit_in_bytes: 1 << 30,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn read(config: &PodSandboxConfig) -> PodConfig {
        let value = config.write_to_bytes().unwrap();
        let options = Any { type_url: TYPE.into(), value, ..Default::default() };
        PodConfig::read(Some(&options), "/run/netns/1").unwrap()
    }

    #[test]
    fn the_configuration_is_that_of_a_pause_container() {
        let spec = read(&config()).spec("p").unwrap();
        let annotations = spec.annotations().clone().unwrap();
        let get = |key: &str| annotations[&format!("io.kubernetes.cri.{key}")].as_str();
        assert_eq!(
            (get("container-type"), get("sandbox-id"), get("sandbox-name"), get("sandbox-namespace")),
            ("sandbox", "p", "web", "prod")
        );
        assert_eq!((get("sandbox-cpu-quota"), get("sandbox-memory")), ("200000", "1073741824"));
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/kubepods/pod1/p")));
        let shared = Shared::of(&spec).unwrap();
        assert_eq!(shared.hostname, "web-0");
        assert_eq!(shared.sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
        assert_eq!(
            cgroups_path("/kubepods.slice/kubepods-pod1.slice", "p").unwrap(),
            "kubepods-pod1.slice:cri-containerd:p"
        );
        assert_eq!(cgroups_path("", "p"), None);
    }

    #[test]
    fn what_is_the_hosts_is_refused_in_the_words_of_a_pod() {
        for (field, change) in [
            ("hostNetwork", (|of| of.network = NamespaceMode::NODE.into()) as fn(&mut NamespaceOption)),
            ("hostPID", |of| of.pid = NamespaceMode::NODE.into()),
            ("hostIPC", |of| of.ipc = NamespaceMode::NODE.into()),
        ] {
            let mut config = config();
            let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            change(security.namespace_options.mut_or_insert_default());
            let error = Shared::of(&read(&config).spec("p").unwrap()).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn annotations_of_the_user_do_not_count() {
        let mut config = config();
        config.annotations.insert("io.stockade.vcpus".into(), "32".into());
        config.annotations.insert("io.kubernetes.cri.sandbox-memory".into(), "1".into());
        let annotations = read(&config).annotations("p");
        assert_eq!(annotations["io.kubernetes.cri.sandbox-memory"], "1073741824");
        assert!(!annotations.contains_key("io.stockade.vcpus"));
    }

    #[test]
    fn options_of_another_kind_or_of_none_are_named() {
        let other =
            Any { type_url: "x/runtimeoptions.v1.Options".into(), value: vec![1], ..Default::default() };
        for (options, word) in [(None, "missing"), (Some(&other), "runtimeoptions.v1.Options")] {
            let error = PodConfig::read(options, "").unwrap_err().to_string();
            assert!(error.contains(word) && error.contains(TYPE), "{error}");
        }
        let broken = Any { type_url: TYPE.into(), value: vec![0xff], ..Default::default() };
        assert!(PodConfig::read(Some(&broken), "").unwrap_err().to_string().contains("cannot be read"));
    }

    #[test]
    fn the_pods_files_say_what_its_description_does() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config();
        config.dns_config = MessageField::some(DNSConfig {
            servers: vec!["10.0.0.1".into(), "10.0.0.2".into()],
            searches: vec!["a.example".into(), "b.example".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        });
        let mut shared = Shared::default();
        read(&config).make_files(dir.path(), &mut shared).unwrap();
        let text = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(
            text("resolv.conf"),
            "search a.example b.example\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
        assert_eq!(text("hostname"), "web-0\n");
        assert!(text("hosts").contains("localhost web-0"));
        assert_eq!(shared.shm_bytes, SHM_BYTES);
    }
}
