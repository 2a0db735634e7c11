//! An OCI bundle: a directory with a config.json and a root filesystem.
//!
//! [`Bundle::load`] reads it and refuses, before any VM is started, what is wrong or cannot be honoured;
//! [`guest::adapt`] splits it into what the host does (bind mounts) and the configuration that the guest gets.
//! Nothing here changes anything on the host.

pub mod guest;
pub mod hooks;
mod idmap;
mod options;
pub mod pod;
mod program;
mod resources;
mod validate;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Capability, LinuxIdMapping, LinuxNamespaceType, LinuxResources, Process, Spec};
use serde::{Deserialize, Serialize};
use stockade_agent_protocol::resources::Refused;

pub use idmap::IdMap;
pub use oci_spec::runtime::Hook;
pub use options::MOUNT_OPTIONS;
use pod::{Joined, Shared};
pub use program::is_static;
pub use resources::{check as check_resources, merge as merge_resources};
pub use validate::{check_process, is_bind};

/// Name of the configuration in a bundle.
pub const CONFIG: &str = "config.json";

/// All capabilities that the guest's kernel has, in its order (capability.h).
pub const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// A bundle that can be run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Bundle {
    /// The bundle's directory, absolute and without symbolic links.
    pub path: PathBuf,
    /// Its config.json.
    pub spec: Spec,
    /// The root filesystem, absolute and without symbolic links.
    pub rootfs: PathBuf,
    /// What it takes part in of a pod's.
    pub joined: Joined,
}

/// A user and a group of the host.
pub type Owner = (u32, u32);

/// Errors of a bundle. Each names the field.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the bundle's directory is not there
    #[error("cannot open the bundle {0}: {1}; name a directory that holds a {CONFIG} with --bundle")]
    Directory(PathBuf, #[source] io::Error),
    /// there is no config.json
    #[error(
        "there is no {CONFIG} in the bundle {0}: make one with `stockade spec`, or name another directory with --bundle"
    )]
    NoConfig(PathBuf),
    /// config.json cannot be read
    #[error("cannot read {0}: {1}; it must be a file with the runtime configuration")]
    Read(PathBuf, #[source] io::Error),
    /// config.json is not a configuration
    #[error("{path} is not a valid runtime configuration, correct it: {field}{error}")]
    Parse { path: PathBuf, field: String, error: serde_json::Error },
    /// the version of the specification is not ours
    #[error("ociVersion {0:?} in {CONFIG} is not known: it must be a version 1 of the runtime specification")]
    Version(String),
    /// a field is missing
    #[error("{0} is missing in {CONFIG}, add it: {1}")]
    Missing(&'static str, &'static str),
    /// a field has a value that cannot be
    #[error("{field} is {value:?}: {remedy}")]
    Value { field: String, value: String, remedy: &'static str },
    /// a path on the host is not there
    #[error("{field}: cannot use {path}: {source}")]
    Path { field: String, path: PathBuf, source: io::Error },
    /// a field has a meaning that a VM cannot give it
    #[error("{field} cannot be honoured: {reason}")]
    Unsupported { field: String, reason: &'static str },
    /// a limit that cgroup v2 does not have
    #[error("{0}; remove it")]
    Resources(#[from] Refused),
    /// the adapted configuration cannot be written
    #[error("cannot encode the guest's configuration: {0}")]
    Encode(#[source] serde_json::Error),
}

impl Bundle {
    /// Loads and checks the bundle in a directory.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        Self::load_with(dir, |_| Ok(Joined::default()))
    }

    /// The same for a container of a pod, for which `sandbox` stands on the host. `reach` is told what of the host it
    /// uses before that is looked at: its root file system first.
    pub fn load_in_pod(
        dir: &Path,
        shared: &Shared,
        sandbox: u32,
        reach: impl FnOnce(&[PathBuf]),
    ) -> Result<Self, Error> {
        Self::load_with(dir, |spec| {
            pod::check_devices(spec)?;
            let joined = shared.adopt(spec, sandbox);
            let root = spec.root().as_ref().map_or(Path::new(""), |root| root.path());
            let mounts = spec.mounts().iter().flatten().filter(|mount| is_bind(mount));
            let used = std::iter::once(root).chain(mounts.filter_map(|mount| mount.source().as_deref()));
            reach(&used.map(|path| dir.join(path)).collect::<Vec<_>>());
            Ok(joined)
        })
    }

    /// The same for a container that shares namespaces with another: `take` takes those out of the configuration.
    pub fn load_joining(dir: &Path, take: impl FnOnce(&mut Spec) -> Joined) -> Result<Self, Error> {
        Self::load_with(dir, |spec| Ok(take(spec)))
    }

    fn load_with(dir: &Path, adopt: impl FnOnce(&mut Spec) -> Result<Joined, Error>) -> Result<Self, Error> {
        let path = fs::canonicalize(dir).map_err(|e| Error::Directory(dir.to_owned(), e))?;
        let mut spec = read_spec(&path)?;
        let joined = adopt(&mut spec)?;
        validate::check(&spec)?;
        let rootfs = find_rootfs(&path, &spec)?;
        validate::check_mount_sources(&spec, &path)?;
        validate::check_kernel_mount_points(&spec, &rootfs)?;
        validate::check_hook_programs(&spec)?;
        for mount in spec.mounts_mut().iter_mut().flatten().filter(|m| m.destination().is_relative()) {
            // A relative destination counts from the root (config.md, mounts).
            mount.set_destination(Path::new("/").join(mount.destination()));
        }
        Ok(Bundle { path, spec, rootfs, joined })
    }

    /// Everything of the host that it uses.
    pub fn paths(&self) -> Vec<PathBuf> {
        let mounts = self.spec.mounts().iter().flatten().filter(|mount| is_bind(mount));
        let sources =
            mounts.filter_map(|mount| mount.source().as_deref()).map(|source| self.path.join(source));
        std::iter::once(self.rootfs.clone()).chain(sources).collect()
    }

    /// The limits that can be changed later: `linux.resources` without the rules for devices.
    pub fn limits(&self) -> LinuxResources {
        limits(&self.spec)
    }

    /// Whether the workload has a terminal.
    pub fn terminal(&self) -> bool {
        self.spec.process().as_ref().and_then(|p| p.terminal()).unwrap_or(false)
    }

    /// Whom the container's root is outside of its user namespace, if it has one.
    pub fn root_user(&self) -> Option<Owner> {
        let linux = self.spec.linux().as_ref()?;
        let root = |mappings: &Option<Vec<LinuxIdMapping>>| {
            let mapping = mappings.iter().flatten().find(|mapping| mapping.container_id() == 0)?;
            Some(mapping.host_id())
        };
        root(linux.uid_mappings()).zip(root(linux.gid_mappings()))
    }

    /// Whether the root filesystem is read-only.
    pub fn readonly_root(&self) -> bool {
        self.spec.root().as_ref().and_then(|r| r.readonly()).unwrap_or(false)
    }
}

/// The limits of a configuration, without its rules for devices.
pub fn limits(spec: &Spec) -> LinuxResources {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone());
    let mut limits = resources.unwrap_or_default();
    limits.set_devices(None);
    limits
}

/// Host name and domain name of the host, as far as a container with this configuration has them: where it has none of
/// its own, as under runc. Another's guest is told nothing of them.
pub fn names_of_the_host(spec: &Spec) -> [String; 2] {
    let namespaces = spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
    let is_apart = namespaces.into_iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Uts);
    [("hostname", spec.hostname()), ("domainname", spec.domainname())].map(|(file, own)| {
        if is_apart && own.as_ref().is_some_and(|name| !name.is_empty()) {
            return String::new();
        }
        let name = fs::read_to_string(Path::new("/proc/sys/kernel").join(file)).unwrap_or_default();
        match name.trim_end() {
            // A kernel that nobody has named, as the guest's is.
            "(none)" => String::new(),
            name => name.to_owned(),
        }
    })
}

/// Reads a bundle's config.json without looking at what it says.
pub fn read_spec(bundle: &Path) -> Result<Spec, Error> {
    let path = bundle.join(CONFIG);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(Error::NoConfig(bundle.to_owned())),
        Err(e) => return Err(Error::Read(path, e)),
    };
    parse(&text).map_err(|error| Error::Parse { path, field: failing_field(&text), error })
}

/// oci-spec 0.10 spells two of the scheduler's flags other than the specification does.
const SPELLINGS: [(&str, &str); 2] = [
    ("SCHED_FLAG_RESET_ON_FORK", "SCHED_RESET_ON_FORK"),
    ("SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_D_L_OVERRUN"),
];

fn parse(text: &[u8]) -> Result<Spec, serde_json::Error> {
    serde_json::from_slice(text).or_else(|error| {
        let mut config: serde_json::Value = serde_json::from_slice(text)?;
        if let Some(process) = config.get_mut("process") {
            as_other_runtimes_read(process);
        }
        serde_json::from_value(config).map_err(|_| error)
    })
}

/// Reads a process object, of an exec.
pub fn parse_process(text: &[u8]) -> Result<Process, serde_json::Error> {
    serde_json::from_slice(text).or_else(|error| {
        let mut process: serde_json::Value = serde_json::from_slice(text)?;
        as_other_runtimes_read(&mut process);
        serde_json::from_value(process).map_err(|_| error)
    })
}

/// A user that is not given is root: callers of runc count on it. A capability that nobody here knows cannot be granted,
/// and is no reason to fail (runtime specification, "Linux Process"): a newer host may name one.
fn as_other_runtimes_read(process: &mut serde_json::Value) {
    let sets = process.pointer_mut("/capabilities").and_then(|sets| sets.as_object_mut());
    for names in sets.into_iter().flatten().filter_map(|(_, names)| names.as_array_mut()) {
        names.retain(|name| {
            let unknown = name.is_string() && serde_json::from_value::<Capability>(name.clone()).is_err();
            if unknown {
                tracing::warn!("process.capabilities: {name} is not known here and is left out");
            }
            !unknown
        });
    }
    if let Some(process) = process.as_object_mut() {
        let user = process.entry("user").or_insert_with(|| serde_json::json!({}));
        for id in ["uid", "gid"] {
            if let Some(user) = user.as_object_mut() {
                user.entry(id).or_insert_with(|| 0.into());
            }
        }
    }
    let flags = process.pointer_mut("/scheduler/flags").and_then(|flags| flags.as_array_mut());
    for flag in flags.into_iter().flatten() {
        if let Some((_, theirs)) = SPELLINGS.iter().find(|(ours, _)| flag == ours) {
            *flag = (*theirs).into();
        }
    }
}

/// What serde says names the value and the place in the file, but not the field: that is found by reading once
/// more.
fn failing_field(text: &[u8]) -> String {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let Err(error) = serde_path_to_error::deserialize::<_, Spec>(&mut deserializer) else {
        return String::new();
    };
    let path = error.path().to_string();
    if path == "." {
        return String::new();
    }
    // Devices are known by their path, not by their place in the list.
    let config: serde_json::Value = serde_json::from_slice(text).unwrap_or_default();
    let index = path.strip_prefix("linux.devices[").and_then(|rest| rest.split(']').next()?.parse().ok());
    let device = index.and_then(|index: usize| config["linux"]["devices"][index]["path"].as_str());
    device.map_or(format!("{path}: "), |device| format!("{path} ({device}): "))
}

/// `root.path` is absolute or relative to the bundle.
fn find_rootfs(bundle: &Path, spec: &Spec) -> Result<PathBuf, Error> {
    let named = spec.root().as_ref().map(|root| root.path().as_path()).unwrap_or(Path::new(""));
    let path = bundle.join(named);
    let failed = |source| Error::Path { field: "root.path".into(), path: path.clone(), source };
    let found = fs::canonicalize(&path).map_err(failed)?;
    if !found.is_dir() {
        return Err(failed(io::ErrorKind::NotADirectory.into()));
    }
    Ok(found)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// A bundle in a temporary directory, from the default configuration with changes merged into it.
    pub(crate) fn bundle(changes: Value) -> (tempfile::TempDir, Result<Bundle, Error>) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        let mut config: Value = serde_json::from_str(crate::cli::spec::DEFAULT).unwrap();
        merge(&mut config, changes);
        fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
        let loaded = Bundle::load(dir.path());
        (dir, loaded)
    }

    #[test]
    fn only_a_container_without_names_of_its_own_is_told_the_hosts() {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim_end().to_owned();
        let names = |changes| names_of_the_host(&bundle(changes).1.unwrap().spec);
        let own = json!({"hostname": "own", "domainname": "own.example"});
        assert_eq!(names(own), ["", ""]);
        assert_eq!(names(json!({"hostname": null}))[0], host);
        let namespaces = json!([{"type": "pid"}, {"type": "mount"}, {"type": "network"}]);
        assert_eq!(names(json!({"hostname": null, "linux": {"namespaces": namespaces}}))[0], host);
    }

    /// RFC 7396, JSON merge patch.
    fn merge(target: &mut Value, patch: Value) {
        match (target, patch) {
            (Value::Object(target), Value::Object(patch)) => {
                for (key, value) in patch {
                    if value.is_null() {
                        target.remove(&key);
                    } else {
                        merge(target.entry(key).or_insert(json!({})), value);
                    }
                }
            }
            (target, patch) => *target = patch,
        }
    }

    fn refused(changes: Value) -> String {
        let error = bundle(changes.clone()).1.map(|_| changes).unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
        error
    }

    #[test]
    fn the_default_configuration_is_a_valid_bundle() {
        let (dir, loaded) = bundle(json!({}));
        let loaded = loaded.unwrap();
        assert_eq!(loaded.rootfs, fs::canonicalize(dir.path()).unwrap().join("rootfs"));
        assert!(loaded.terminal());
        assert!(loaded.readonly_root());
    }

    #[test]
    fn a_bundle_without_configuration_says_how_to_make_one() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Bundle::load(dir.path()).unwrap_err().to_string().contains("stockade spec"));
        let missing = Bundle::load(&dir.path().join("nowhere")).unwrap_err();
        assert!(matches!(missing, Error::Directory(..)));
    }

    #[test]
    fn broken_json_is_named_with_line_and_column() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["{\n\"ociVersion\": \"1.0.2\",\n", "{\n \"process\": 3\n}", ""] {
            fs::write(dir.path().join(CONFIG), text).unwrap();
            let error = Bundle::load(dir.path()).unwrap_err().to_string();
            assert!(error.contains("line") && error.contains("column"), "{error}");
        }
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_named_with_its_field() {
        for (changes, parts) in [
            (json!({"process": {"args": "no list"}}), ["process.args", "line"]),
            (json!({"process": {"capabilities": {"bounding": [7]}}}), ["7", "bounding"]),
            (json!({"linux": {"devices": [{"path": "/dev/x", "type": "q"}]}}), ["/dev/x", "devices[0]"]),
            (
                json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_SMILE"}}}),
                ["SCMP_ACT_SMILE", "seccomp"],
            ),
        ] {
            let error = refused(changes);
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }

    #[test]
    fn a_capability_that_is_not_known_is_left_out() {
        let named = json!({"process": {"capabilities": {"bounding": ["CAP_FLYING", "CAP_KILL"]}}});
        let spec = bundle(named).1.unwrap().spec;
        let sets = spec.process().as_ref().unwrap().capabilities().clone().unwrap();
        assert_eq!(sets.bounding(), &Some([Capability::Kill].into()));
    }

    #[test]
    fn flags_of_the_scheduler_are_spelled_as_the_specification_has_them() {
        let flags = json!(["SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_KEEP_POLICY"]);
        bundle(json!({"process": {"scheduler": {"policy": "SCHED_OTHER", "flags": flags}}})).1.unwrap();
        let unknown = json!({"process": {"scheduler": {"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_X"]}}});
        assert!(refused(unknown).contains("process.scheduler.flags[0]"));
    }

    #[test]
    fn versions_other_than_1_are_unknown() {
        for version in ["", "2.0.0", "0.9", "one", "1", "1.0", "1.x.0"] {
            assert!(refused(json!({"ociVersion": version})).contains("ociVersion"), "{version}");
        }
        for version in ["1.0.0", "1.0.2-dev", "1.1.0+build", "1.2.1", "1.3.0"] {
            bundle(json!({"ociVersion": version})).1.unwrap();
        }
    }

    #[test]
    fn a_root_must_be_there_and_inside_the_bundle_when_it_is_relative() {
        assert!(refused(json!({"root": null})).contains("root"));
        assert!(refused(json!({"root": {"path": ""}})).contains("root.path"));
        assert!(refused(json!({"root": {"path": "nowhere"}})).contains("nowhere"));
        assert!(refused(json!({"root": {"path": "config.json"}})).contains("root.path"));
        assert!(refused(json!({"root": {"path": "../../etc"}})).contains("root.path"));
        bundle(json!({"root": {"path": "/"}})).1.unwrap();
    }
}
