//! What is checked of a configuration before a VM is started.
//!
//! Three kinds of refusal: a value that the runtime specification does not allow, a path on the host that is not
//! there, and a field whose meaning a VM cannot give it. The last is an error, because a caller that asks for
//! protection must not get a container without it.

use std::fs;
use std::path::{Component, Path};

use oci_spec::runtime::{LinuxNamespaceType, LinuxSeccompAction, Mount, Process, Spec};

use super::{Error, resources};

/// File systems that the guest's kernel mounts by itself. Of others the source would be looked for in the guest.
const FILE_SYSTEMS: [&str; 14] = [
    "proc",
    "sysfs",
    "tmpfs",
    "ramfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "securityfs",
    "debugfs",
    "tracefs",
    "bpf",
    "hugetlbfs",
    "devtmpfs",
];

/// Checks everything that needs no look at the host.
pub fn check(spec: &Spec) -> Result<(), Error> {
    check_version(spec.version())?;
    check_root(spec)?;
    let process = spec.process().as_ref().ok_or(Error::Missing("process", "a container runs a program"))?;
    check_process(process)?;
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        check_mount(index, mount)?;
    }
    check_linux(spec)?;
    check_hooks(spec)?;
    if spec.vm().is_some() {
        return unsupported("vm", "stockade brings its own hypervisor and kernel; remove it");
    }
    Ok(())
}

fn check_version(version: &str) -> Result<(), Error> {
    let unknown = || Error::Version(version.chars().take(100).collect());
    let core = version.split(['-', '+']).next().unwrap_or_default();
    let numbers: Vec<Option<u32>> = core.split('.').map(|part| part.parse().ok()).collect();
    match numbers[..] {
        [Some(1), Some(_), Some(_)] => Ok(()),
        _ => Err(unknown()),
    }
}

fn check_root(spec: &Spec) -> Result<(), Error> {
    let root = spec.root().as_ref().ok_or(Error::Missing("root", "it names the root filesystem"))?;
    let path = root.path();
    let leaves = path.components().any(|c| c == Component::ParentDir);
    if path.as_os_str().is_empty() || (path.is_relative() && leaves) {
        return value(
            "root.path",
            &path.to_string_lossy(),
            "name a directory in the bundle, or one by its absolute path",
        );
    }
    Ok(())
}

/// Checks a process, of a container or of an exec.
pub fn check_process(process: &Process) -> Result<(), Error> {
    match process.args().as_deref() {
        None | Some([]) => return Err(Error::Missing("process.args", "it names the program to run")),
        Some([program, ..]) if program.is_empty() => {
            return value("process.args[0]", "", "name the program to run");
        }
        _ => {}
    }
    if !process.cwd().is_absolute() {
        return value("process.cwd", &process.cwd().to_string_lossy(), "give an absolute path");
    }
    for (index, entry) in process.env().iter().flatten().enumerate() {
        if !entry.contains('=') || entry.contains('\0') {
            return value(&format!("process.env[{index}]"), entry, "write NAME=value");
        }
    }
    if process.apparmor_profile().as_deref().is_some_and(|p| !p.is_empty() && p != "unconfined") {
        return unsupported("process.apparmorProfile", "the guest kernel has no AppArmor; remove it");
    }
    if process.selinux_label().as_deref().is_some_and(|l| !l.is_empty()) {
        return unsupported("process.selinuxLabel", "the guest kernel has no SELinux; remove it");
    }
    Ok(())
}

/// Whether a mount makes something of the host visible, and not a file system of its own.
pub fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

fn check_mount(index: usize, mount: &Mount) -> Result<(), Error> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    if !mount.destination().is_absolute() {
        return value(
            &field("destination"),
            &mount.destination().to_string_lossy(),
            "give an absolute path in the container",
        );
    }
    if mount.uid_mappings().as_ref().is_some_and(|m| !m.is_empty())
        || mount.gid_mappings().as_ref().is_some_and(|m| !m.is_empty())
        || mount.options().iter().flatten().any(|o| o == "idmap" || o == "ridmap")
    {
        return unsupported(
            &field("uidMappings"),
            "the shared file system has no id-mapped mounts; remove it",
        );
    }
    if is_bind(mount) {
        if mount.source().as_ref().is_none_or(|source| source.as_os_str().is_empty()) {
            return value(&field("source"), "", "a bind mount needs a source");
        }
        return Ok(());
    }
    match mount.typ().as_deref() {
        Some(typ) if FILE_SYSTEMS.contains(&typ) => Ok(()),
        Some(typ) => value(
            &field("type"),
            typ,
            "the guest cannot mount it: mount it on the host and name it as a bind mount",
        ),
        None => value(&field("type"), "", "name a file system, or \"bind\""),
    }
}

/// Checks that what is to be bound exists.
pub fn check_mount_sources(spec: &Spec, bundle: &Path) -> Result<(), Error> {
    for (index, mount) in spec.mounts().iter().flatten().enumerate().filter(|(_, m)| is_bind(m)) {
        let path = bundle.join(mount.source().as_deref().unwrap_or(Path::new("")));
        fs::metadata(&path).map_err(|source| Error::Path {
            field: format!("mounts[{index}].source"),
            path,
            source,
        })?;
    }
    Ok(())
}

fn check_linux(spec: &Spec) -> Result<(), Error> {
    let Some(linux) = spec.linux() else { return Ok(()) };
    let mut seen = Vec::new();
    for (index, namespace) in linux.namespaces().iter().flatten().enumerate() {
        if seen.contains(&namespace.typ()) {
            let name = format!("{:?}", namespace.typ()).to_lowercase();
            return value(&format!("linux.namespaces[{index}].type"), &name, "name each type once");
        }
        seen.push(namespace.typ());
        if namespace.path().as_ref().is_some_and(|path| !path.as_os_str().is_empty()) {
            let reason = match namespace.typ() {
                LinuxNamespaceType::Network => {
                    "stockade has no network yet; remove the path to get one with loopback only"
                }
                _ => "a namespace of the host cannot be entered from inside a VM; remove the path",
            };
            let name = format!("{:?}", namespace.typ()).to_lowercase();
            return unsupported(&format!("linux.namespaces[{index}].path ({name})"), reason);
        }
    }
    for name in linux.sysctl().iter().flat_map(|sysctls| sysctls.keys()) {
        check_sysctl(name, &seen)?;
    }
    for (field, set) in [("hostname", spec.hostname().is_some()), ("domainname", spec.domainname().is_some())]
    {
        if set && !seen.contains(&LinuxNamespaceType::Uts) {
            return unsupported(field, "it needs a uts namespace: add one to linux.namespaces");
        }
    }
    if let Some(seccomp) = linux.seccomp() {
        let notifies = seccomp.default_action() == LinuxSeccompAction::ScmpActNotify
            || seccomp
                .syscalls()
                .iter()
                .flatten()
                .any(|call| call.action() == LinuxSeccompAction::ScmpActNotify);
        if notifies || seccomp.listener_path().is_some() {
            return unsupported(
                "linux.seccomp.listenerPath",
                "a process on the host cannot supervise system calls in a VM; remove SCMP_ACT_NOTIFY",
            );
        }
    }
    if linux.intel_rdt().is_some() {
        return unsupported("linux.intelRdt", "the guest has no control of the host's caches; remove it");
    }
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return unsupported("linux.netDevices", "devices of the host cannot be moved into a VM; remove it");
    }
    if linux.mount_label().as_deref().is_some_and(|label| !label.is_empty()) {
        return unsupported("linux.mountLabel", "the guest kernel has no SELinux; remove it");
    }
    if let Some(limits) = linux.resources() {
        resources::check(limits)?;
    }
    Ok(())
}

/// Only what belongs to a namespace of the container can be set for the container, as other runtimes have it.
fn check_sysctl(name: &str, namespaces: &[LinuxNamespaceType]) -> Result<(), Error> {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    // The kernel takes both ways to write a name.
    let dotted = name.replace('/', ".");
    let namespace = match dotted.as_str() {
        // The VM's own network is the container's.
        name if name.starts_with("net.") => return Ok(()),
        name if IPC.contains(&name) || name.starts_with("fs.mqueue.") => LinuxNamespaceType::Ipc,
        "kernel.domainname" => LinuxNamespaceType::Uts,
        name if name.starts_with("user.") => LinuxNamespaceType::User,
        _ => {
            return unsupported(
                &format!("linux.sysctl {name}"),
                "it is no property of a container's namespaces; remove it",
            );
        }
    };
    match namespaces.contains(&namespace) {
        true => Ok(()),
        false => unsupported(
            &format!("linux.sysctl {name}"),
            "its namespace is not in linux.namespaces; add it there",
        ),
    }
}

fn check_hooks(spec: &Spec) -> Result<(), Error> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    for (name, list) in
        [("createContainer", hooks.create_container()), ("startContainer", hooks.start_container())]
    {
        if list.as_ref().is_some_and(|list| !list.is_empty()) {
            return unsupported(
                &format!("hooks.{name}"),
                "it would run in the guest, where the host's programs are not; use createRuntime",
            );
        }
    }
    #[allow(deprecated)]
    let on_host = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (name, list) in on_host {
        for (index, hook) in list.iter().flatten().enumerate() {
            if !hook.path().is_absolute() {
                let field = format!("hooks.{name}[{index}].path");
                return value(&field, &hook.path().to_string_lossy(), "give an absolute path");
            }
            if hook.timeout().is_some_and(|timeout| timeout <= 0) {
                let field = format!("hooks.{name}[{index}].timeout");
                return value(&field, &hook.timeout().unwrap_or(0).to_string(), "give seconds above zero");
            }
        }
    }
    Ok(())
}

pub(super) fn value(field: &str, value: &str, remedy: &'static str) -> Result<(), Error> {
    Err(Error::Value { field: field.into(), value: value.chars().take(200).collect(), remedy })
}

pub(super) fn unsupported(field: &str, reason: &'static str) -> Result<(), Error> {
    Err(Error::Unsupported { field: field.into(), reason })
}

#[cfg(test)]
mod tests {
    use crate::bundle::tests::bundle;
    use serde_json::json;

    #[test]
    fn a_field_that_cannot_be_honoured_is_named() {
        for (changes, field) in [
            (json!({"process": {"args": []}}), "process.args"),
            (json!({"process": {"args": [""]}}), "process.args[0]"),
            (json!({"process": {"cwd": "tmp"}}), "process.cwd"),
            (json!({"process": {"env": ["A=b", "PATH"]}}), "process.env[1]"),
            (json!({"process": {"apparmorProfile": "docker-default"}}), "process.apparmorProfile"),
            (json!({"process": {"selinuxLabel": "system_u"}}), "process.selinuxLabel"),
            (json!({"process": null}), "process"),
            (json!({"mounts": [{"destination": "rel", "type": "tmpfs"}]}), "mounts[0].destination"),
            (
                json!({"mounts": [{"destination": "/a", "type": "ext4", "source": "/dev/sda"}]}),
                "mounts[0].type",
            ),
            (json!({"mounts": [{"destination": "/a"}]}), "mounts[0].type"),
            (json!({"mounts": [{"destination": "/a", "type": "bind"}]}), "mounts[0].source"),
            (
                json!({"mounts": [{"destination": "/a", "type": "bind", "source": "/no/where"}]}),
                "mounts[0].source",
            ),
            (
                json!({"mounts": [{"destination": "/a", "type": "bind", "source": "/", "options": ["idmap"]}]}),
                "mounts[0].uidMappings",
            ),
            (
                json!({"linux": {"namespaces": [{"type": "network", "path": "/run/netns/x"}]}}),
                "linux.namespaces[0].path",
            ),
            (
                json!({"linux": {"namespaces": [{"type": "pid"}, {"type": "pid"}]}}),
                "linux.namespaces[1].type",
            ),
            (json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_NOTIFY"}}}), "linux.seccomp"),
            (json!({"linux": {"sysctl": {"kernel.panic": "1"}}}), "linux.sysctl kernel.panic"),
            (json!({"linux": {"sysctl": {"kernel.no_such_knob": "1"}}}), "linux.sysctl kernel.no_such_knob"),
            (json!({"linux": {"sysctl": {"user.max_user_namespaces": "1"}}}), "linux.sysctl user.max"),
            (json!({"linux": {"namespaces": []}}), "hostname"),
            (json!({"linux": {"intelRdt": {"closID": "x"}}}), "linux.intelRdt"),
            (json!({"linux": {"mountLabel": "x"}}), "linux.mountLabel"),
            (json!({"hooks": {"createContainer": [{"path": "/bin/true"}]}}), "hooks.createContainer"),
            (json!({"hooks": {"prestart": [{"path": "true"}]}}), "hooks.prestart[0].path"),
            (
                json!({"hooks": {"poststop": [{"path": "/bin/true", "timeout": 0}]}}),
                "hooks.poststop[0].timeout",
            ),
            (json!({"vm": {"kernel": {"path": "/vmlinux"}}}), "vm"),
        ] {
            let error = bundle(changes.clone()).1.map(|_| changes).unwrap_err().to_string();
            assert!(error.starts_with(field), "{field}: {error}");
        }
    }

    #[test]
    fn what_callers_usually_send_passes() {
        bundle(json!({
            "process": {"apparmorProfile": "unconfined", "env": ["A=", "B=c=d"]},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/host", "source": "/etc", "options": ["rbind", "ro"]},
                {"destination": "/relative", "type": "none", "source": "rootfs", "options": ["bind"]},
            ],
            "linux": {"sysctl": {"net.ipv4.ip_unprivileged_port_start": "0", "kernel/msgmax": "9", "fs.mqueue.x": "1"}},
            "hooks": {"createContainer": [], "prestart": [{"path": "/bin/true", "args": ["true"]}]},
        }))
        .1
        .unwrap();
    }
}
