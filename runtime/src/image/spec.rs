//! From an image's configuration to a runtime configuration (image-spec, conversion.md), with the user's flags on top.
//!
//! What neither says is as container engines have it: capabilities, seccomp, masked paths, mounts, limits. Labels
//! become annotations, but none of stockade's own: an image does not size its VM.

use std::collections::BTreeMap;

use oci_spec::image::ImageConfiguration;
use serde_json::{Value, json};

use super::flags::Flags;
use super::seccomp;
use super::users::User;

/// Of a process that nobody gave another one.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What a container may do by default.
const CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
/// Of files that say more than a container should know.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/dev/block",
    "/sys/firmware",
];
/// Of files that would change more than a container.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
/// Writable even where the root is not, as Podman has it.
const WRITABLE: [&str; 3] = ["/run", "/tmp", "/var/tmp"];
/// Processes and threads, as Podman has it.
const PIDS: i64 = 2048;
/// Open files: what programs count on, and what they may ask for.
const OPEN_FILES: (u64, u64) = (1024, 524_288);
/// Microseconds in which a CPU quota counts; the kernel's own default.
const PERIOD: f64 = 100_000.0;
/// Begins annotations that mean something to stockade.
const OURS: &str = "io.stockade.";

/// A configuration that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// nothing to run
    #[error(
        "the image names no program to run: give one after --, as in `stockade run --image IMAGE -- PROGRAM`"
    )]
    NoProgram,
}

/// What a container is made from.
pub struct Parts<'a> {
    /// The image's.
    pub config: &'a ImageConfiguration,
    /// The user's.
    pub flags: &'a Flags,
    /// What is to run in place of the image's command.
    pub args: &'a [String],
    /// Who it is to be.
    pub user: &'a User,
    /// The container's host name.
    pub hostname: &'a str,
    /// Volumes of the image and where they are on the host, if they need to be mounted.
    pub volumes: &'a [(String, String)],
}

/// The config.json, and the working directory, which must be there.
pub fn convert(parts: &Parts) -> Result<(Value, String), Error> {
    let flags = parts.flags;
    let args = args(parts)?;
    let cwd = cwd(parts);
    let capabilities = flags.capabilities(&CAPABILITIES);
    let mut process = json!({
        "terminal": flags.tty,
        "user": { "uid": parts.user.uid, "gid": parts.user.gid, "additionalGids": parts.user.additional },
        "args": args,
        "env": env(parts),
        "cwd": cwd,
        "capabilities": sets(&capabilities, parts.user.uid, flags),
        "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": OPEN_FILES.0, "hard": OPEN_FILES.1 }],
        "noNewPrivileges": false,
    });
    if parts.user.additional.is_empty()
        && let Some(user) = process["user"].as_object_mut()
    {
        user.remove("additionalGids");
    }
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"].map(|name| json!({ "type": name }));
    let spec = json!({
        "ociVersion": "1.2.0",
        "process": process,
        "root": { "path": "rootfs", "readonly": flags.read_only },
        "hostname": parts.hostname,
        "mounts": mounts(parts),
        "annotations": annotations(parts.config),
        "linux": {
            "resources": resources(flags),
            "namespaces": namespaces,
            "seccomp": seccomp::profile(&capabilities),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    });
    Ok((spec, cwd))
}

/// Entrypoint and command; another entrypoint makes the image's command meaningless.
fn args(parts: &Parts) -> Result<Vec<String>, Error> {
    let config = parts.config.config().clone().unwrap_or_default();
    let image = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let (mut args, own) = match parts.flags.entrypoint() {
        Some(entrypoint) => (entrypoint, Vec::new()),
        None => (image(config.entrypoint()), image(config.cmd())),
    };
    args.extend(if parts.args.is_empty() { own } else { parts.args.to_vec() });
    match args.first() {
        Some(program) if !program.is_empty() => Ok(args),
        _ => Err(Error::NoProgram),
    }
}

fn cwd(parts: &Parts) -> String {
    let image = || parts.config.config().as_ref().and_then(|c| c.working_dir().clone());
    let dir = parts.flags.workdir.clone().or_else(image).unwrap_or_default();
    match dir.strip_prefix('/') {
        Some(_) => dir,
        // As a shell in `/` would take it.
        None => format!("/{dir}"),
    }
}

/// The image's environment, what programs count on, and the user's. The last of a name counts.
fn env(parts: &Parts) -> Vec<String> {
    let mut env: Vec<String> = Vec::new();
    let mut set = |entry: String| {
        let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
        let wanted = name(&entry);
        match env.iter_mut().find(|there| name(there) == wanted) {
            Some(there) => *there = entry,
            None => env.push(entry),
        }
    };
    set(PATH.into());
    set(format!("HOSTNAME={}", parts.hostname));
    set(format!("HOME={}", parts.user.home.as_deref().unwrap_or("/")));
    if parts.flags.tty {
        set("TERM=xterm".into());
    }
    let image = parts.config.config().as_ref().and_then(|config| config.env().clone());
    // One without a value is no variable.
    image.into_iter().flatten().filter(|e| e.contains('=') && !e.contains('\0')).for_each(&mut set);
    parts.flags.environment().into_iter().for_each(&mut set);
    env
}

/// Another user than root has the capabilities that it was given by name, and may get the others from a file.
fn sets(capabilities: &[String], uid: u32, flags: &Flags) -> Value {
    let added: Vec<_> = capabilities.iter().filter(|c| flags.adds(c)).collect();
    if uid == 0 {
        json!({ "bounding": capabilities, "permitted": capabilities, "effective": capabilities })
    } else {
        json!({ "bounding": capabilities, "permitted": added, "effective": added, "inheritable": added,
                "ambient": added })
    }
}

fn resources(flags: &Flags) -> Value {
    let mut resources = json!({
        "devices": [{ "allow": false, "access": "rwm" }],
        "pids": { "limit": flags.pids_limit.unwrap_or(PIDS) },
    });
    if let Some(limit) = flags.memory {
        resources["memory"] = json!({ "limit": limit, "swap": limit });
    }
    if let Some(cpus) = flags.cpus {
        resources["cpu"] = json!({ "period": PERIOD as u64, "quota": (cpus * PERIOD).round() as i64 });
    }
    resources
}

fn mounts(parts: &Parts) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": source, "options": options });
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=64000k"]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ];
    if parts.flags.read_only {
        for path in WRITABLE {
            mounts.push(mount(path, "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=1777"]));
        }
    }
    for (destination, source) in parts.volumes {
        mounts.push(mount(destination, "bind", source, &["rbind", "rw"]));
    }
    for volume in &parts.flags.volume {
        let options = if volume.read_only { ["rbind", "ro"] } else { ["rbind", "rw"] };
        mounts.push(mount(&volume.destination, "bind", &volume.source, &options));
    }
    mounts
}

/// What conversion.md makes of the image's properties, and the labels, which go before them.
fn annotations(image: &ImageConfiguration) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut set = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            all.insert(format!("org.opencontainers.image.{name}"), value);
        }
    };
    set("os", Some(image.os().to_string()));
    set("architecture", Some(image.architecture().to_string()));
    set("variant", image.variant().clone());
    set("os.version", image.os_version().clone());
    set("os.features", image.os_features().as_ref().map(|features| features.join(",")));
    set("author", image.author().clone());
    set("created", image.created().clone());
    let config = image.config().as_ref();
    set("stopSignal", config.and_then(|c| c.stop_signal().clone()));
    let sorted = |list: &Vec<String>| {
        let mut list = list.clone();
        list.sort();
        list.join(",")
    };
    set("exposedPorts", config.and_then(|c| c.exposed_ports().as_ref()).map(sorted));
    for (key, value) in config.and_then(|c| c.labels().as_ref()).into_iter().flatten() {
        if key.starts_with(OURS) || key.is_empty() {
            tracing::warn!("the image's label {key:?} is left out: it is for whoever runs it to say that");
        } else {
            all.insert(key.clone(), value.clone());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::flags::tests::flags;
    use super::*;

    fn image(config: Value) -> ImageConfiguration {
        let text = json!({ "os": "linux", "architecture": "amd64", "created": "2026-01-01T00:00:00Z",
                           "config": config, "rootfs": { "type": "layers", "diff_ids": [] } });
        super::super::manifest::config(text.to_string().as_bytes()).unwrap()
    }

    fn root() -> User {
        User { uid: 0, gid: 0, additional: vec![], home: Some("/root".into()) }
    }

    fn converted(config: Value, words: &[&str], args: &[&str]) -> Result<Value, Error> {
        let (config, flags) = (image(config), flags(words));
        let args: Vec<_> = args.iter().map(|a| (*a).to_owned()).collect();
        let volumes = [("/data".to_owned(), "/store/rootfs/data".to_owned())];
        let volumes = if flags.read_only { &volumes[..] } else { &[] };
        convert(&Parts { config: &config, flags: &flags, args: &args, user: &root(), hostname: "h", volumes })
            .map(|(spec, _)| spec)
    }

    fn args_of(config: Value, words: &[&str], args: &[&str]) -> Value {
        converted(config, words, args).unwrap()["process"]["args"].clone()
    }

    #[test]
    fn entrypoint_and_command_go_together_as_everywhere() {
        let both = json!({ "Entrypoint": ["/e", "x"], "Cmd": ["c", "d"] });
        assert_eq!(args_of(both.clone(), &[], &[]), json!(["/e", "x", "c", "d"]));
        assert_eq!(args_of(both.clone(), &[], &["a"]), json!(["/e", "x", "a"]));
        assert_eq!(args_of(both.clone(), &["--entrypoint", "/n"], &[]), json!(["/n"]));
        assert_eq!(
            args_of(both.clone(), &["--entrypoint", "[\"/n\",\"m\"]"], &["a"]),
            json!(["/n", "m", "a"])
        );
        assert_eq!(args_of(both.clone(), &["--entrypoint", ""], &["a"]), json!(["a"]));
        assert_eq!(args_of(json!({ "Cmd": ["sh"] }), &[], &[]), json!(["sh"]));
        for config in
            [json!({}), json!(null), json!({ "Cmd": [], "Entrypoint": null }), json!({ "Cmd": [""] })]
        {
            assert!(matches!(converted(config, &[], &[]), Err(Error::NoProgram)));
        }
        assert!(matches!(converted(both, &["--entrypoint", ""], &[]), Err(Error::NoProgram)));
    }

    #[test]
    fn the_last_of_a_variable_counts() {
        let config = json!({ "Cmd": ["x"], "Env": ["A=1", "PATH=/p", "BROKEN", "E=a=b", "A=2"] });
        let spec = converted(config, &["-e", "E=mine", "--env", "NEW="], &[]).unwrap();
        assert_eq!(
            spec["process"]["env"],
            json!(["PATH=/p", "HOSTNAME=h", "HOME=/root", "A=2", "E=mine", "NEW="])
        );
        let spec = converted(json!({ "Cmd": ["x"] }), &["-t"], &[]).unwrap();
        assert!(spec["process"]["env"].as_array().unwrap().contains(&json!("TERM=xterm")));
        assert_eq!(spec["process"]["terminal"], true);
    }

    #[test]
    fn a_working_directory_is_absolute() {
        let cwd = |config: Value, words: &[&str]| {
            converted(config, words, &["x"]).unwrap()["process"]["cwd"].clone()
        };
        assert_eq!(cwd(json!({}), &[]), "/");
        assert_eq!(cwd(json!({ "WorkingDir": "" }), &[]), "/");
        assert_eq!(cwd(json!({ "WorkingDir": "srv" }), &[]), "/srv");
        assert_eq!(cwd(json!({ "WorkingDir": "/srv" }), &["-w", "/w"]), "/w");
    }

    #[test]
    fn properties_become_annotations_and_labels_go_before_them() {
        let config = json!({ "Cmd": ["x"], "StopSignal": "SIGQUIT",
            "ExposedPorts": { "8080/tcp": {}, "53/udp": {} },
            "Labels": { "a": "b", "org.opencontainers.image.created": "then",
                        "io.stockade.memory": "1T", "io.stockade.vcpus": "32" } });
        let annotations = converted(config, &[], &[]).unwrap()["annotations"].clone();
        assert_eq!(
            annotations,
            json!({ "a": "b", "org.opencontainers.image.created": "then",
                    "org.opencontainers.image.os": "linux", "org.opencontainers.image.architecture": "amd64",
                    "org.opencontainers.image.stopSignal": "SIGQUIT",
                    "org.opencontainers.image.exposedPorts": "53/udp,8080/tcp" })
        );
    }

    #[test]
    fn limits_and_volumes_are_the_users() {
        let words = ["-m", "64m", "--cpus", "1.5", "--pids-limit", "9", "-v", "/tmp:/t:ro", "--read-only"];
        let spec = converted(json!({ "Cmd": ["x"], "Volumes": { "/data": {} } }), &words, &[]).unwrap();
        let resources = &spec["linux"]["resources"];
        assert_eq!(resources["memory"], json!({ "limit": 67_108_864, "swap": 67_108_864 }));
        assert_eq!(resources["cpu"], json!({ "period": 100_000, "quota": 150_000 }));
        assert_eq!(resources["pids"]["limit"], 9);
        assert_eq!(spec["root"]["readonly"], true);
        let mounts = spec["mounts"].as_array().unwrap();
        let at = |path: &str| mounts.iter().find(|m| m["destination"] == path).unwrap();
        assert_eq!(at("/t")["options"], json!(["rbind", "ro"]));
        assert_eq!(at("/data")["source"], "/store/rootfs/data");
        assert_eq!(at("/tmp")["type"], "tmpfs");
    }

    #[test]
    fn capabilities_are_the_usual_ones_with_the_users_changes() {
        let sets = |words: &[&str], uid| {
            let (config, flags) = (image(json!({ "Cmd": ["x"] })), flags(words));
            let user = User { uid, ..root() };
            let parts =
                Parts { config: &config, flags: &flags, args: &[], user: &user, hostname: "h", volumes: &[] };
            convert(&parts).unwrap().0["process"]["capabilities"].clone()
        };
        assert_eq!(sets(&[], 0)["effective"], json!(CAPABILITIES));
        assert_eq!(sets(&[], 7)["effective"], json!([]));
        assert_eq!(sets(&[], 7)["bounding"], json!(CAPABILITIES));
        let words = ["--cap-drop", "ALL", "--cap-add", "net_raw", "--cap-add", "CAP_KILL"];
        assert_eq!(sets(&words, 0)["bounding"], json!(["CAP_KILL", "CAP_NET_RAW"]));
        assert_eq!(sets(&words, 7)["ambient"], json!(["CAP_KILL", "CAP_NET_RAW"]));
        assert_eq!(sets(&["--cap-drop=kill"], 0)["effective"].as_array().unwrap().len(), 10);
    }

    #[test]
    fn the_result_is_a_configuration() {
        let config = json!({ "Cmd": ["x"], "Labels": { "a": "b" } });
        let spec = converted(config, &["-m", "64m", "--cpus", "2", "--cap-add", "ALL"], &[]).unwrap();
        let spec: oci_spec::runtime::Spec = serde_json::from_value(spec).unwrap();
        assert_eq!(spec.process().as_ref().unwrap().args().as_ref().unwrap(), &["x"]);
        assert!(spec.linux().as_ref().unwrap().seccomp().is_some());
    }
}
