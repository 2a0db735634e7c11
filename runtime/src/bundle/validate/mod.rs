//! What is checked of a configuration before a VM is started.
//!
//! Three kinds of refusal: a value that the runtime specification does not allow, a path on the host that is not
//! there, and a field whose meaning a VM cannot give it. The last is an error, because a caller that asks for
//! protection must not get a container without it.

mod linux;
mod mounts;
mod process;

use std::path::Component;

use oci_spec::runtime::Spec;

use super::Error;
use super::program::is_static;
use linux::check_linux;
pub(super) use linux::check_sysctl;
use mounts::check_mount;

pub use mounts::{check_kernel_mount_points, check_mount_sources, is_bind, is_overlay};
pub use process::check_process;

/// Checks everything that needs no look at the host.
pub fn check(spec: &Spec) -> Result<(), Error> {
    check_version(spec.version())?;
    check_root(spec)?;
    let process = spec.process().as_ref().ok_or(Error::Missing("process", "a container runs a program"))?;
    check_process(process)?;
    let can_mount = mounts::can_mount(spec);
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        check_mount(index, mount, spec.linux().as_ref(), can_mount)?;
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

fn check_hooks(spec: &Spec) -> Result<(), Error> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    #[allow(deprecated)]
    let kinds = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (name, list) in kinds {
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

/// A createContainer hook runs in the guest, to which its program is lent, and nothing else of the host's.
pub fn check_hook_programs(spec: &Spec) -> Result<(), Error> {
    let hooks = spec.hooks().as_ref().and_then(|hooks| hooks.create_container().as_ref());
    for (index, hook) in hooks.into_iter().flatten().enumerate() {
        let field = format!("hooks.createContainer[{index}].path");
        match is_static(hook.path()) {
            Ok(true) => {}
            Ok(false) => {
                return unsupported(
                    &field,
                    "it runs in the guest, where loader and interpreter of the host are not; make it a static program",
                );
            }
            Err(source) => return Err(Error::Path { field, path: hook.path().clone(), source }),
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
            (json!({"mounts": [{"destination": "", "type": "tmpfs"}]}), "mounts[0].destination"),
            (json!({"mounts": [{"destination": "/a", "type": "hugetlbfs"}]}), "mounts[0].type"),
            (
                json!({"mounts": [{"destination": "/a", "type": "tmpfs", "options": ["remount"]}]}),
                "mounts[0].options",
            ),
            (
                json!({
                    "mounts": [{"destination": "/a", "source": "/", "options": ["rbind", "rshared"]}],
                    "process": {"capabilities": {"bounding": ["CAP_SYS_ADMIN"]}},
                }),
                "mounts[0].options",
            ),
            (
                json!({"mounts": [{"destination": "/a", "source": "/", "options": ["bind", "noexce"]}]}),
                "mounts[0].options is \"noexce\"",
            ),
            (json!({"process": {"user": {"umask": 4096}}}), "process.user.umask"),
            (json!({"process": {"oomScoreAdj": 2000}}), "process.oomScoreAdj"),
            (
                json!({"process": {"ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 8}}}),
                "process.ioPriority.priority",
            ),
            (
                json!({"process": {"rlimits": [{"type": "RLIMIT_CORE", "soft": 2, "hard": 1}]}}),
                "process.rlimits[0].soft",
            ),
            (
                json!({"process": {"rlimits": [
                    {"type": "RLIMIT_CORE", "soft": 1, "hard": 1}, {"type": "RLIMIT_CORE", "soft": 1, "hard": 1}
                ]}}),
                "process.rlimits[1].type",
            ),
            (json!({"process": {"scheduler": {"policy": "SCHED_ISO"}}}), "process.scheduler.policy"),
            (json!({"process": {"scheduler": {"policy": "SCHED_FIFO"}}}), "process.scheduler.priority"),
            (
                json!({"process": {"scheduler": {"policy": "SCHED_OTHER", "nice": 20}}}),
                "process.scheduler.nice",
            ),
            (
                json!({"process": {"scheduler": {"policy": "SCHED_BATCH", "runtime": 5}}}),
                "process.scheduler.runtime",
            ),
            (json!({"linux": {"namespaces": [{"type": "uts"}]}}), "linux.namespaces"),
            (json!({"linux": {"rootfsPropagation": "rshared"}}), "linux.rootfsPropagation"),
            (json!({"linux": {"rootfsPropagation": "sideways"}}), "linux.rootfsPropagation"),
            (json!({"linux": {"memoryPolicy": {"mode": "MPOL_LOCAL"}}}), "linux.memoryPolicy"),
            (
                json!({"linux": {"uidMappings": [{"containerID": 0, "hostID": 0, "size": 1}]}}),
                "linux.uidMappings",
            ),
            (
                json!({"linux": {"namespaces": [{"type": "mount"}, {"type": "uts"}, {"type": "user"}]}}),
                "linux.uidMappings",
            ),
            (json!({"linux": {"timeOffsets": {"monotonic": {"secs": 1}}}}), "linux.timeOffsets"),
            (
                json!({"linux": {"personality": {"domain": "LINUX", "flags": ["X"]}}}),
                "linux.personality.flags",
            ),
            (
                json!({"linux": {"resources": {"memory": {"disableOOMKiller": true}}}}),
                "linux.resources.memory.disableOOMKiller",
            ),
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
                "mounts[0].options idmap",
            ),
            (
                json!({"mounts": [{"destination": "/a", "type": "tmpfs", "source": "tmpfs", "options": ["idmap"]}]}),
                "mounts[0].uidMappings",
            ),
            (
                json!({"linux": {"namespaces": [{"type": "ipc", "path": "/run/ipcns/x"}]}}),
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
            (json!({"linux": {"namespaces": [{"type": "mount"}]}}), "hostname"),
            (json!({"linux": {"intelRdt": {"closID": "x"}}}), "linux.intelRdt"),
            (json!({"linux": {"mountLabel": "x"}}), "linux.mountLabel"),
            (json!({"hooks": {"createContainer": [{"path": "/bin/sh"}]}}), "hooks.createContainer[0].path"),
            (json!({"hooks": {"createContainer": [{"path": "/no/where"}]}}), "hooks.createContainer[0].path"),
            (json!({"hooks": {"startContainer": [{"path": "true"}]}}), "hooks.startContainer[0].path"),
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
                {"destination": "relative", "type": "none", "source": "rootfs", "options": ["bind"]},
            ],
            "linux": {"sysctl": {"net.ipv4.ip_unprivileged_port_start": "0", "kernel/msgmax": "9", "fs.mqueue.x": "1"}},
            "hooks": {"createContainer": [], "startContainer": [{"path": "/bin/true"}], "prestart": [{"path": "/bin/true", "args": ["true"]}]},
        }))
        .1
        .unwrap();
    }
}
