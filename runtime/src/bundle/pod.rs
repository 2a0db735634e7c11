//! What the containers of a pod share, by the configuration of its sandbox, and how a container's names it.
//!
//! containerd and CRI-O name a sandbox's namespaces by paths of the host, which mean something in the guest here: the
//! uts and ipc namespaces of a pod are the guest's own, its user and pid namespaces are those that the agent makes, its
//! network is the VM's. A path that leads anywhere else stays, and is refused by who checks the bundle. Nothing of a sandbox's
//! own process is looked at: there is none.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::statvfs;
use oci_spec::runtime::{LinuxDeviceType, LinuxNamespaceType, Mount, Spec};
use serde::{Deserialize, Serialize};

use super::Error;
use super::validate::{check_sysctl, is_bind, unsupported};

/// Where shared memory is in every container.
const SHM: &str = "/dev/shm";
/// Profiles that engines give a container of which nobody asked for one: they keep it from the host's kernel, which is
/// out of its reach here.
const DEFAULT_PROFILES: [&str; 2] = ["cri-containerd.apparmor.d", "crio-default"];
/// Namespaces that make a pod the host's if it has none of its own, with what the user has written.
const OF_THE_HOST: [(LinuxNamespaceType, &str, &str); 3] = [
    (
        LinuxNamespaceType::Network,
        "hostNetwork",
        "the host's network is out of reach of a VM; remove hostNetwork, or run the pod with another runtime class",
    ),
    (
        LinuxNamespaceType::Pid,
        "hostPID",
        "the host's processes are out of reach of a VM; remove hostPID, or run the pod with another runtime class",
    ),
    (
        LinuxNamespaceType::Ipc,
        "hostIPC",
        "the host's shared memory is out of reach of a VM; remove hostIPC, or run the pod with another runtime class",
    ),
];

/// What a pod's containers share.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// The pod's name for itself.
    pub hostname: String,
    /// Empty for none.
    pub domainname: String,
    /// Of its namespaces.
    pub sysctls: HashMap<String, String>,
    /// Bytes of shared memory, 0 for none.
    pub shm_bytes: u64,
    /// Where the host has the shared memory that is the guest's here.
    shm: Option<PathBuf>,
    /// Paths of the sandbox's namespaces, where it has some before it is made.
    namespaces: Vec<(LinuxNamespaceType, PathBuf)>,
    /// Files of the pod that the engine leaves to us, with their places in containers.
    files: Vec<(PathBuf, PathBuf)>,
}

/// What of a pod's, or of another container's, a container takes part in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The pod's pid namespace.
    pub pid_namespace: bool,
    /// The pod's user namespace.
    #[serde(default)]
    pub user_namespace: bool,
    /// The pod's shared memory.
    pub shm: bool,
    /// Namespaces of the other container.
    pub namespaces: Vec<LinuxNamespaceType>,
    /// The process in the guest that has them, by its number there.
    pub with: u32,
}

impl Shared {
    /// Reads the configuration of a sandbox, and refuses what a VM cannot give a pod.
    pub fn of(sandbox: &Spec) -> Result<Self, Error> {
        let mut shared = Self {
            hostname: sandbox.hostname().clone().unwrap_or_default(),
            domainname: sandbox.domainname().clone().unwrap_or_default(),
            ..Self::default()
        };
        let linux = sandbox.linux().as_ref();
        let namespaces: Vec<_> = linux.iter().flat_map(|linux| linux.namespaces().iter().flatten()).collect();
        for (typ, field, reason) in OF_THE_HOST {
            if !namespaces.iter().any(|namespace| namespace.typ() == typ) {
                unsupported(field, reason)?;
            }
        }
        let named = namespaces.iter().filter_map(|n| Some((n.typ(), n.path().clone()?)));
        shared.namespaces = named.filter(|(_, path)| !path.as_os_str().is_empty()).collect();
        let types: Vec<_> = namespaces.iter().map(|namespace| namespace.typ()).collect();
        shared.sysctls = linux.and_then(|linux| linux.sysctl().clone()).unwrap_or_default();
        for name in shared.sysctls.keys() {
            check_sysctl(name, &types)?;
        }
        let mounts = sandbox.mounts().iter().flatten();
        let shm = mounts
            .filter(|m| m.destination() == Path::new(SHM) && is_bind(m))
            .find_map(|m| m.source().clone());
        if let Some(path) = shm.filter(|path| is_tmpfs(path))
            && let Ok(of) = statvfs(&path)
        {
            shared.shm_bytes = of.blocks().saturating_mul(of.fragment_size());
            shared.shm = Some(path);
        }
        Ok(shared)
    }

    /// Has each container get what the engine has not made for the pod: these files, read-only at these places, and
    /// shared memory of that size, for which a directory stands on the host.
    pub fn bring(&mut self, files: Vec<(PathBuf, PathBuf)>, shm: PathBuf, shm_bytes: u64) {
        self.files = files;
        self.shm = Some(shm);
        self.shm_bytes = shm_bytes;
    }

    /// Mounts what was brought, where the container has nothing of its own.
    fn mount_brought(&self, spec: &mut Spec) {
        let Some(shm) = self.shm.as_ref().filter(|_| !self.files.is_empty()) else { return };
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        // As the engine has it in every container that is given nothing else there.
        mounts
            .retain(|mount| mount.destination() != Path::new(SHM) || mount.typ().as_deref() != Some("tmpfs"));
        let files = self.files.iter().map(|(path, place)| (path, place.as_path(), &["bind", "ro"][..]));
        let shm = (shm, Path::new(SHM), &["bind", "rw", "nosuid", "nodev", "noexec"][..]);
        for (path, place, options) in files.chain([shm]) {
            if mounts.iter().any(|mount| mount.destination() == place) {
                continue;
            }
            let mut mount = Mount::default();
            mount.set_destination(place.to_owned()).set_typ(Some("bind".into()));
            mount.set_source(Some(path.clone()));
            mount.set_options(Some(options.iter().map(|option| option.to_string()).collect()));
            mounts.push(mount);
        }
        spec.set_mounts(Some(mounts));
    }

    /// Takes the paths of the host out of a container's configuration that stand for what is the pod's; `sandbox` is
    /// the process that stands for it on the host.
    pub fn adopt(&self, spec: &mut Spec, sandbox: u32) -> Joined {
        let mut joined = Joined::default();
        self.mount_brought(spec);
        let Some(linux) = spec.linux_mut() else { return joined };
        let is_pods = |typ: LinuxNamespaceType, name: &str, path: &Path| {
            path == Path::new(&format!("/proc/{sandbox}/ns/{name}"))
                || self.namespaces.iter().any(|(of, pods)| *of == typ && pods == path)
        };
        let mut own_name = true;
        if let Some(namespaces) = linux.namespaces_mut() {
            namespaces.retain_mut(|namespace| {
                let path = namespace.path().clone().unwrap_or_default();
                let (typ, path) = (namespace.typ(), path.as_path());
                match typ {
                    // It stays one, to which the mappings belong.
                    LinuxNamespaceType::User => {
                        if is_pods(typ, "user", path) {
                            namespace.set_path(None);
                            joined.user_namespace = true;
                        }
                        true
                    }
                    LinuxNamespaceType::Ipc => !is_pods(typ, "ipc", path),
                    LinuxNamespaceType::Uts => {
                        own_name = !is_pods(typ, "uts", path);
                        own_name
                    }
                    LinuxNamespaceType::Pid => {
                        joined.pid_namespace = is_pods(typ, "pid", path);
                        !joined.pid_namespace
                    }
                    _ => true,
                }
            });
        }
        if !own_name {
            spec.set_hostname(None).set_domainname(None);
        }
        let mounts = spec.mounts().iter().flatten();
        let shm =
            mounts.filter(|mount| mount.destination() == Path::new(SHM)).find_map(|m| m.source().clone());
        joined.shm = shm.is_some() && shm == self.shm;
        if let Some(process) = spec.process_mut()
            && process.apparmor_profile().as_deref().is_some_and(|name| DEFAULT_PROFILES.contains(&name))
        {
            process.set_apparmor_profile(None);
        }
        joined
    }
}

/// Whether a mount of a pod's is what a container's shared memory is bound from.
pub fn is_shm(destination: &Path) -> bool {
    destination == Path::new(SHM)
}

/// Refuses devices of the host, as a privileged container is given all of them. Those that every kernel makes are the
/// guest's as well.
pub fn check_devices(spec: &Spec) -> Result<(), Error> {
    let devices = spec.linux().iter().flat_map(|linux| linux.devices().iter().flatten());
    for device in devices {
        let is_char = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
        if device.typ() != LinuxDeviceType::P
            && !(is_char && is_every_kernels(device.major(), device.minor()))
        {
            return unsupported(
                &format!("device {} (or privileged: true)", device.path().display()),
                "devices of the host are out of reach of a VM; remove it, or let privileged containers have their VM \
                 only, with privileged_without_host_devices = true for this runtime in containerd's configuration",
            );
        }
    }
    Ok(())
}

/// `null zero full random urandom kmsg`, `tty console ptmx`, `fuse`, `net/tun`
/// (Documentation/admin-guide/devices.txt).
fn is_every_kernels(major: i64, minor: i64) -> bool {
    matches!((major, minor), (1, 3 | 5 | 7 | 8 | 9 | 11) | (5, 0..=2) | (10, 200 | 229))
}

/// Whether a file is one that a guest can use through the share: not a socket, a pipe or a device of the host.
pub fn leads_across(path: &Path) -> bool {
    let Ok(found) = fs::metadata(path) else { return true };
    let typ = found.file_type();
    let (major, minor) = (libc::major(found.rdev()).into(), libc::minor(found.rdev()).into());
    !(typ.is_socket()
        || typ.is_fifo()
        || typ.is_block_device()
        || typ.is_char_device() && !is_every_kernels(major, minor))
}

fn is_tmpfs(path: &Path) -> bool {
    matches!(statfs(path), Ok(found) if found.filesystem_type() == TMPFS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(namespaces: Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.0.2", "hostname": "h", "process": {"user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/"},
            "linux": {"namespaces": namespaces},
        }))
        .unwrap()
    }

    fn sandbox() -> Spec {
        spec(json!([
            {"type": "mount"}, {"type": "pid"}, {"type": "ipc", "path": "/run/ipcns/1"}, {"type": "uts"},
            {"type": "network", "path": "/run/netns/1"},
        ]))
    }

    #[test]
    fn namespaces_of_the_sandbox_are_the_pods_and_others_stay() {
        let shared = Shared::of(&sandbox()).unwrap();
        let mut container = spec(json!([
            {"type": "mount"}, {"type": "ipc", "path": "/run/ipcns/1"}, {"type": "uts", "path": "/proc/7/ns/uts"},
            {"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "network", "path": "/proc/7/ns/net"},
        ]));
        let joined = shared.adopt(&mut container, 7);
        assert!(joined.pid_namespace && container.hostname().is_none());
        let left: Vec<_> =
            container.linux().as_ref().unwrap().namespaces().iter().flatten().map(|n| n.typ()).collect();
        assert_eq!(left, [LinuxNamespaceType::Mount, LinuxNamespaceType::Network]);

        let mut other = spec(json!([
            {"type": "pid"}, {"type": "ipc", "path": "/proc/8/ns/ipc"}, {"type": "uts", "path": "/proc/1/ns/uts"},
        ]));
        let before = other.clone();
        assert_eq!((shared.adopt(&mut other, 7), other), (Joined::default(), before));
    }

    #[test]
    fn users_of_the_sandbox_are_the_pods() {
        let mut sandbox = serde_json::to_value(sandbox()).unwrap();
        let pinned = json!({"type": "user", "path": "/run/pinned/user"});
        sandbox["linux"]["namespaces"].as_array_mut().unwrap().push(pinned);
        let shared = Shared::of(&serde_json::from_value(sandbox).unwrap()).unwrap();
        for (path, pods) in
            [("/proc/7/ns/user", true), ("/run/pinned/user", true), ("/proc/8/ns/user", false)]
        {
            let mut container = spec(json!([{"type": "user", "path": path}]));
            assert_eq!(shared.adopt(&mut container, 7).user_namespace, pods);
            let left = &container.linux().as_ref().unwrap().namespaces().as_ref().unwrap()[0];
            assert_eq!(left.path().is_none(), pods);
        }
    }

    #[test]
    fn what_is_the_hosts_is_refused_in_the_words_of_a_pod() {
        for (missing, field) in [("network", "hostNetwork"), ("pid", "hostPID"), ("ipc", "hostIPC")] {
            let mut sandbox = serde_json::to_value(sandbox()).unwrap();
            let namespaces = sandbox["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != missing);
            let error = Shared::of(&serde_json::from_value(sandbox).unwrap()).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
        let mut sandbox = serde_json::to_value(sandbox()).unwrap();
        sandbox["linux"]["sysctl"] = json!({"kernel.shm_rmid_forced": "1", "net.core.somaxconn": "9"});
        assert_eq!(Shared::of(&serde_json::from_value(sandbox.clone()).unwrap()).unwrap().sysctls.len(), 2);
        sandbox["linux"]["sysctl"] = json!({"vm.swappiness": "1"});
        let error = Shared::of(&serde_json::from_value(sandbox).unwrap()).unwrap_err().to_string();
        assert!(error.contains("vm.swappiness"), "{error}");
    }

    #[test]
    fn devices_of_the_host_are_refused_and_those_of_every_kernel_are_not() {
        let with = |device: Value| {
            let mut spec = serde_json::to_value(sandbox()).unwrap();
            spec["linux"]["devices"] = json!([device]);
            check_devices(&serde_json::from_value(spec).unwrap())
        };
        with(json!({"path": "/dev/null", "type": "c", "major": 1, "minor": 3})).unwrap();
        with(json!({"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229})).unwrap();
        for device in [
            json!({"path": "/dev/vda", "type": "b", "major": 254, "minor": 0}),
            json!({"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}),
        ] {
            let name = device["path"].as_str().unwrap().to_owned();
            let error = with(device).unwrap_err().to_string();
            assert!(error.contains(&name) && error.contains("privileged"), "{error}");
        }
    }

    #[test]
    fn sockets_and_pipes_lead_nowhere_and_files_and_the_null_device_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        nix::unistd::mkfifo(&path("pipe"), nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        assert!(
            leads_across(dir.path()) && leads_across(&path("file")) && leads_across(Path::new("/dev/null"))
        );
        assert!(!leads_across(&path("socket")) && !leads_across(&path("pipe")));
    }

    #[test]
    fn what_the_engine_leaves_to_us_is_mounted_where_a_container_has_nothing_else() {
        let mut shared = Shared::of(&sandbox()).unwrap();
        let files =
            ["/etc/hosts", "/etc/resolv.conf"].map(|place| (format!("/state{place}").into(), place.into()));
        shared.bring(files.into(), "/state/shm".into(), 1 << 20);
        let adopted = |mounts: Value| {
            let mut container = serde_json::to_value(sandbox()).unwrap();
            container["mounts"] = mounts;
            let mut container: Spec = serde_json::from_value(container).unwrap();
            let joined = shared.adopt(&mut container, 7);
            let mounts = container.mounts().iter().flatten();
            let sources =
                mounts.filter_map(|m| Some(m.source().as_ref()?.display().to_string())).collect::<Vec<_>>();
            (joined.shm, sources)
        };
        let plain = json!([{"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}]);
        assert_eq!(
            adopted(plain),
            (true, vec!["/state/etc/hosts".into(), "/state/etc/resolv.conf".into(), "/state/shm".into()])
        );
        let own = json!([
            {"destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts"},
            {"destination": "/dev/shm", "type": "bind", "source": "/kubelet/memory"},
        ]);
        assert_eq!(
            adopted(own),
            (false, vec!["/kubelet/hosts".into(), "/kubelet/memory".into(), "/state/etc/resolv.conf".into()])
        );
    }

    #[test]
    fn the_default_profile_of_an_engine_is_dropped_and_another_is_not() {
        let shared = Shared::of(&sandbox()).unwrap();
        for (profile, left) in [("cri-containerd.apparmor.d", None), ("mine", Some("mine"))] {
            let mut container = serde_json::to_value(sandbox()).unwrap();
            container["process"]["apparmorProfile"] = json!(profile);
            let mut container = serde_json::from_value(container).unwrap();
            shared.adopt(&mut container, 7);
            assert_eq!(container.process().as_ref().unwrap().apparmor_profile().as_deref(), left);
        }
    }
}
