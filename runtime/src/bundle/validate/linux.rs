//! Checks of `linux`, and of what needs its namespaces.

use oci_spec::runtime::{Linux, LinuxNamespaceType, LinuxSeccompAction, Spec};

use super::{unsupported, value};
use crate::bundle::{Error, resources};

pub(super) fn check_linux(spec: &Spec) -> Result<(), Error> {
    let linux =
        spec.linux().as_ref().ok_or(Error::Missing("linux", "it names the container's namespaces"))?;
    let mut seen = Vec::new();
    for (index, namespace) in linux.namespaces().iter().flatten().enumerate() {
        if seen.contains(&namespace.typ()) {
            let name = format!("{:?}", namespace.typ()).to_lowercase();
            return value(&format!("linux.namespaces[{index}].type"), &name, "name each type once");
        }
        seen.push(namespace.typ());
        let named = namespace.path().as_ref().is_some_and(|path| !path.as_os_str().is_empty());
        // What a network namespace holds is wired to the VM.
        if named && namespace.typ() != LinuxNamespaceType::Network {
            let reason = "a namespace of the host cannot be entered from inside a VM; remove the path";
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
    check_users(linux)?;
    check_time(linux)?;
    if !seen.contains(&LinuxNamespaceType::Mount) {
        return unsupported(
            "linux.namespaces",
            "without a mount namespace the guest's own would be shared; add one",
        );
    }
    if !seen.contains(&LinuxNamespaceType::Network) {
        return unsupported(
            "linux.namespaces",
            "without a network namespace the host's network would be shared, which a VM has no part in; add one \
             (under an engine: choose another network than host)",
        );
    }
    if let Some(word) = linux.rootfs_propagation().as_deref() {
        match word {
            "shared" | "rshared" => {
                return unsupported(
                    "linux.rootfsPropagation",
                    "mounts made in the guest cannot appear on the host; use rslave instead of shared",
                );
            }
            "" | "slave" | "rslave" | "private" | "rprivate" | "unbindable" | "runbindable" => {}
            other => return value("linux.rootfsPropagation", other, "give slave, private or unbindable"),
        }
    }
    if linux.memory_policy().is_some() {
        return unsupported(
            "linux.memoryPolicy",
            "the guest has one memory node; set cpu.mems of linux.resources",
        );
    }
    if linux.personality().as_ref().is_some_and(|p| p.flags().as_ref().is_some_and(|f| !f.is_empty())) {
        return unsupported("linux.personality.flags", "the specification has none yet; remove them");
    }
    if let Some(seccomp) = linux.seccomp() {
        let notifies = seccomp.default_action() == LinuxSeccompAction::ScmpActNotify
            || seccomp
                .syscalls()
                .iter()
                .flatten()
                .any(|call| call.action() == LinuxSeccompAction::ScmpActNotify);
        if notifies {
            return unsupported(
                "linux.seccomp SCMP_ACT_NOTIFY",
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

fn check_users(linux: &Linux) -> Result<(), Error> {
    let own = linux.namespaces().iter().flatten().any(|n| n.typ() == LinuxNamespaceType::User);
    for (field, mappings) in
        [("linux.uidMappings", linux.uid_mappings()), ("linux.gidMappings", linux.gid_mappings())]
    {
        let mappings = mappings.as_deref().unwrap_or_default();
        match (own, mappings.is_empty()) {
            (true, true) => return value(field, "", "a user namespace needs mappings, give some"),
            (false, false) => {
                return unsupported(field, "there is no user namespace to map; add one to linux.namespaces");
            }
            _ => {}
        }
        if let Some(empty) = mappings.iter().position(|mapping| mapping.size() == 0) {
            return value(&format!("{field}[{empty}].size"), "0", "give a number of ids above zero");
        }
    }
    Ok(())
}

fn check_time(linux: &Linux) -> Result<(), Error> {
    let Some(offsets) = linux.time_offsets().as_ref().filter(|offsets| !offsets.is_empty()) else {
        return Ok(());
    };
    if !linux.namespaces().iter().flatten().any(|n| n.typ() == LinuxNamespaceType::Time) {
        return unsupported("linux.timeOffsets", "there is no time namespace; add one to linux.namespaces");
    }
    match offsets.keys().find(|clock| !matches!(clock.as_str(), "monotonic" | "boottime")) {
        Some(clock) => value("linux.timeOffsets", clock, "give the clocks monotonic and boottime"),
        None => Ok(()),
    }
}

/// Only what belongs to a namespace of the container can be set for the container, as other runtimes have it.
pub(crate) fn check_sysctl(name: &str, namespaces: &[LinuxNamespaceType]) -> Result<(), Error> {
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
