//! OCI bundles: the configuration that `runc spec` writes, over one of the lab's real root file systems, with
//! the changes a case asks for.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::mount::{MntFlags, MsFlags};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Netns;

/// A root file system that set-up has made.
#[derive(Clone, Copy)]
pub enum Rootfs {
    /// Static busybox and its applets.
    Busybox,
    /// Debian minbase: bash, perl, coreutils.
    Debian,
}

impl Rootfs {
    /// Path of the tree on the host.
    pub fn path(self) -> PathBuf {
        let name = match self {
            Self::Busybox => "busybox",
            Self::Debian => "debian",
        };
        let all = std::env::var_os("STOCKADE_E2E_BUNDLES").unwrap_or_else(|| "/bundles".into());
        Path::new(&all).join(name).join("rootfs")
    }

    /// Path on the host of a program in its /bin.
    pub fn program(self, name: &str) -> PathBuf {
        self.path().join("bin").join(name)
    }
}

/// A bundle directory and what its config.json is to say.
pub struct Bundle {
    place: Arc<Place>,
    config: Value,
}

/// The directory of a bundle. It goes with the last of those who use it: the case, and the container made from it.
pub struct Place {
    dir: TempDir,
    /// The root is an overlay of our own, mounted on `rootfs` in it.
    mounted: AtomicBool,
}

impl Bundle {
    /// Runs `args` in a read-only `rootfs`, without a terminal.
    pub fn new(rootfs: Rootfs, args: &[&str]) -> Self {
        let dir = host_scratch();
        let mut config = base();
        config["root"]["path"] = json!(rootfs.path());
        config["process"]["args"] = json!(args);
        Self { place: Arc::new(Place { dir, mounted: AtomicBool::new(false) }), config }
    }

    /// Runs a shell script in busybox.
    pub fn sh(script: &str) -> Self {
        Self::new(Rootfs::Busybox, &["sh", "-c", script])
    }

    /// Runs a shell script in Debian, whose /bin/sh is dash.
    pub fn debian(script: &str) -> Self {
        Self::new(Rootfs::Debian, &["sh", "-c", script])
    }

    /// Runs a perl script in Debian: for what takes system calls that no small program makes.
    pub fn perl(script: &str) -> Self {
        Self::new(Rootfs::Debian, &["perl", "-e", script])
    }

    /// Waits, as PID 1, until it is killed.
    pub fn idle() -> Self {
        Self::sh("echo ready; exec sleep 100000")
    }

    /// Runs another shell script.
    pub fn script(self, script: &str) -> Self {
        self.set("/process/args", json!(["sh", "-c", script]))
    }

    /// Sets the value at a JSON pointer, making the objects on the way.
    pub fn set(mut self, pointer: &str, value: impl Into<Value>) -> Self {
        *self.at(pointer) = value.into();
        self
    }

    /// Removes the member at a JSON pointer.
    pub fn remove(mut self, pointer: &str) -> Self {
        let (parent, member) = pointer.rsplit_once('/').expect("a pointer begins with a slash");
        if let Value::Object(members) = self.at(parent) {
            members.remove(member);
        }
        self
    }

    /// Appends to the array at a JSON pointer, making it when it is not there.
    pub fn push(mut self, pointer: &str, value: impl Into<Value>) -> Self {
        let array = self.at(pointer);
        if array.is_null() {
            *array = json!([]);
        }
        array.as_array_mut().expect("an array").push(value.into());
        self
    }

    /// Adds a mount.
    pub fn mount(self, destination: &str, kind: &str, source: impl AsRef<Path>, options: &[&str]) -> Self {
        let mount = json!({
            "destination": destination, "type": kind, "source": source.as_ref(), "options": options
        });
        self.push("/mounts", mount)
    }

    /// Adds a recursive bind mount of a file or directory of the host.
    pub fn bind(self, source: impl AsRef<Path>, destination: &str, options: &[&str]) -> Self {
        let options: Vec<_> = std::iter::once("rbind").chain(options.iter().copied()).collect();
        self.mount(destination, "bind", source, &options)
    }

    /// Does without the namespace of this type.
    pub fn without_namespace(mut self, kind: &str) -> Self {
        let namespaces = self.at("/linux/namespaces").as_array_mut().expect("an array");
        namespaces.retain(|namespace| namespace["type"] != kind);
        self
    }

    /// Adds a capability to every set that the base has.
    pub fn capability(mut self, name: &str) -> Self {
        for set in ["bounding", "effective", "permitted"] {
            self = self.push(&format!("/process/capabilities/{set}"), name);
        }
        self
    }

    /// Runs with a terminal.
    pub fn terminal(self) -> Self {
        self.set("/process/terminal", true)
    }

    /// Puts a writable overlay over the root file system, as container engines do. What the container writes is
    /// then found below [`Bundle::written`].
    pub fn writable(self) -> Self {
        let lower = self.config["root"]["path"].as_str().expect("a path").to_owned();
        let [upper, work, merged] = ["upper", "work", "rootfs"].map(|name| self.place.dir.path().join(name));
        for dir in [&upper, &work, &merged] {
            std::fs::create_dir(dir).expect("a directory in the bundle");
        }
        let options = format!("lowerdir={lower},upperdir={},workdir={}", upper.display(), work.display());
        nix::mount::mount(
            Some("overlay"),
            &merged,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .expect("mount an overlay");
        self.place.mounted.store(true, Ordering::Relaxed);
        self.set("/root", json!({ "path": "rootfs", "readonly": false }))
    }

    /// Has the host's own root file system as its root, read-only and without what is mounted in it, and a /tmp: for
    /// what takes programs that no other root has.
    pub fn host_programs(self) -> Self {
        let root = self.place.dir.path().join("rootfs");
        std::fs::create_dir(&root).expect("a directory in the bundle");
        nix::mount::mount(Some("/"), &root, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .expect("bind the host's root");
        self.place.mounted.store(true, Ordering::Relaxed);
        self.set("/root", json!({ "path": "rootfs", "readonly": true })).mount("/tmp", "tmpfs", "tmpfs", &[])
    }

    /// Lives in this network namespace, with the right to use raw sockets.
    pub fn network(mut self, netns: &Netns) -> Self {
        let namespaces = self.at("/linux/namespaces").as_array_mut().expect("an array");
        for namespace in namespaces.iter_mut().filter(|namespace| namespace["type"] == "network") {
            namespace["path"] = json!(netns.path());
        }
        self.capability("CAP_NET_RAW")
    }

    /// Where changes to a writable root end up on the host.
    pub fn written(&self) -> PathBuf {
        self.place.dir.path().join("upper")
    }

    /// The bundle directory, for files that a case adds.
    pub fn dir(&self) -> &Path {
        self.place.dir.path()
    }

    /// A share in the directory, for who needs it longer than the bundle lives.
    pub fn place(&self) -> Arc<Place> {
        Arc::clone(&self.place)
    }

    /// Writes config.json and gives the bundle directory.
    pub fn save(&self) -> &Path {
        std::fs::write(self.place.dir.path().join("config.json"), self.config.to_string())
            .expect("write config.json");
        self.place.dir.path()
    }

    fn at(&mut self, pointer: &str) -> &mut Value {
        pointer.split('/').skip(1).fold(&mut self.config, |value, member| match value {
            Value::Array(items) => &mut items[member.parse::<usize>().expect("an index of an array")],
            object => &mut object[member],
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.mounted.load(Ordering::Relaxed) {
            // A container that a failed case has left behind may still use it.
            let _ = nix::mount::umount2(&self.dir.path().join("rootfs"), MntFlags::MNT_DETACH);
        }
    }
}

/// A directory of the host that goes with its owner. On a file system that can be an overlay's upper layer.
pub fn host_scratch() -> TempDir {
    tempfile::Builder::new().prefix("e2e-").tempdir().expect("a temporary directory")
}

/// What `runc spec` writes on a host with cgroup v2, without the terminal.
fn base() -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": ["true"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "e2e",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
              "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
              "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs",
              "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
              "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] }
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" },
                { "type": "mount" }, { "type": "cgroup" }
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}
