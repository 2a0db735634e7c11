//! What is changed in a container's `config.json` before libcontainer sees it, and why.
//!
//! libcontainer 0.7 leaves some fields aside or handles them other than a host without a VM would. Each is either
//! taken over by the agent, translated, or refused by name: a field is never silently dropped.

use std::collections::HashMap;
use std::path::PathBuf;

use oci_spec::runtime::{
    Capability, Hook, LinuxCapabilities, LinuxNamespaceType, LinuxResources, LinuxSeccomp,
    LinuxSeccompAction, Process, Spec,
};

use crate::error::Error;

/// A container's configuration, split into what libcontainer does and what the agent does itself.
pub struct Adapted {
    /// For libcontainer.
    pub spec: Spec,
    /// `linux.resources`, which the agent applies: see [`crate::cgroup`].
    pub resources: Option<LinuxResources>,
    /// `linux.sysctl` of the network. The container lives in the VM's own network namespace, where libcontainer
    /// refuses them.
    pub network_sysctls: HashMap<String, String>,
    /// What the agent needs to know of the process.
    pub process: ProcessFacts,
    /// The container has a pid namespace of its own: all its processes end with its init.
    pub own_pid_namespace: bool,
}

/// What the agent needs to know of a process.
#[derive(Debug, Clone, Copy)]
pub struct ProcessFacts {
    /// It gets a terminal.
    pub terminal: bool,
    /// Owner of its pipes or terminal.
    pub uid: u32,
    /// Group of its pipes.
    pub gid: u32,
    /// The environment has no HOME.
    pub wants_home: bool,
}

fn invalid(message: impl Into<String>) -> Error {
    Error::Invalid(message.into())
}

/// Adapts the `config.json` of a container whose cgroup is `cgroup_path`, relative to the cgroup file system.
pub fn adapt(config: &[u8], cgroup_path: &str) -> Result<Adapted, Error> {
    let mut spec: Spec =
        serde_json::from_slice(config).map_err(|e| invalid(format!("config.json cannot be read: {e}")))?;
    if !spec.version().starts_with("1.") {
        return Err(invalid(format!("ociVersion {:?} is not supported, only 1.x is", spec.version())));
    }
    if !spec.root().as_ref().is_some_and(|root| root.path().is_absolute()) {
        return Err(invalid("root.path must be an absolute path in the guest"));
    }
    refuse_host_hooks(&spec)?;
    refuse_shared_mounts(&spec)?;

    let process = spec.process_mut().as_mut().ok_or_else(|| invalid("config.json has no process"))?;
    let facts = adapt_process(process)?;

    let linux = spec.linux_mut().as_mut().ok_or_else(|| invalid("config.json has no linux section"))?;
    if linux.mount_label().as_ref().is_some_and(|label| !label.is_empty()) {
        return Err(invalid("linux.mountLabel cannot be honoured: the guest has no SELinux"));
    }
    if linux.intel_rdt().is_some() {
        return Err(invalid("linux.intelRdt cannot be honoured inside a VM"));
    }
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(invalid("linux.netDevices cannot be honoured: the devices are the host's"));
    }
    if let Some(seccomp) = linux.seccomp() {
        refuse_notify(seccomp)?;
    }
    let own_pid_namespace =
        linux.namespaces().iter().flatten().any(|n| n.typ() == LinuxNamespaceType::Pid && n.path().is_none());
    let has_network = linux.namespaces().iter().flatten().any(|n| n.typ() == LinuxNamespaceType::Network);
    let mut network_sysctls = HashMap::new();
    if let Some(sysctls) = linux.sysctl_mut().as_mut().filter(|_| !has_network) {
        sysctls.retain(|name, value| {
            let network = name.starts_with("net.") || name.starts_with("net/");
            if network {
                network_sysctls.insert(name.clone(), value.clone());
            }
            !network
        });
    }
    let resources = linux.resources().clone();
    linux.set_resources(None).set_cgroups_path(Some(PathBuf::from(cgroup_path)));
    Ok(Adapted { spec, resources, network_sysctls, process: facts, own_pid_namespace })
}

/// Adapts a process, of a container or of an exec.
pub fn adapt_process(process: &mut Process) -> Result<ProcessFacts, Error> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(invalid("process.args must name a command"));
    }
    if !process.cwd().is_absolute() {
        return Err(invalid("process.cwd must be an absolute path"));
    }
    if process.selinux_label().as_ref().is_some_and(|label| !label.is_empty()) {
        return Err(invalid("process.selinuxLabel cannot be honoured: the guest has no SELinux"));
    }
    if process.apparmor_profile().as_ref().is_some_and(|profile| !profile.is_empty()) {
        return Err(invalid("process.apparmorProfile cannot be honoured: the guest has no AppArmor"));
    }
    process.set_apparmor_profile(None).set_selinux_label(None);
    // libcontainer takes a present `false` for the privilege being there, and then loads seccomp too late.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    // The agent is protected from the OOM killer; what it creates must not inherit that.
    if process.oom_score_adj().is_none() {
        process.set_oom_score_adj(Some(0));
    }
    // libcontainer looks HOME up through the C library, which would load the image's name service modules. With a
    // HOME present it does not; the executor puts the right one in.
    let env = process.env_mut().get_or_insert_default();
    let wants_home = !env.iter().any(|e| e.starts_with("HOME="));
    if wants_home {
        env.push("HOME=/".into());
    }
    Ok(ProcessFacts {
        terminal: process.terminal().unwrap_or(false),
        uid: process.user().uid(),
        gid: process.user().gid(),
        wants_home,
    })
}

/// Gives an exec that gets a seccomp filter without no_new_privs the right to load it; returns what it must be left
/// with once the filter is loaded.
pub fn lend_sys_admin(process: &mut Process) -> Option<LinuxCapabilities> {
    if process.no_new_privileges() == Some(true) {
        return None;
    }
    let wanted = process.capabilities().clone()?;
    let mut lent = wanted.clone();
    let mut effective = wanted.effective().clone().unwrap_or_default();
    effective.insert(Capability::SysAdmin);
    let mut permitted = wanted.permitted().clone().unwrap_or_default();
    permitted.insert(Capability::SysAdmin);
    lent.set_effective(Some(effective)).set_permitted(Some(permitted));
    process.set_capabilities(Some(lent));
    Some(wanted)
}

fn refuse_host_hooks(spec: &Spec) -> Result<(), Error> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    #[allow(deprecated)] // prestart is deprecated, but Docker uses it.
    let on_host: [(&str, &Option<Vec<Hook>>); 4] = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    match on_host.iter().find(|(_, hooks)| hooks.as_ref().is_some_and(|h| !h.is_empty())) {
        Some((name, _)) => Err(invalid(format!("hooks.{name} runs on the host, not in the guest"))),
        None => Ok(()),
    }
}

/// Mounts made in the guest cannot appear on the host.
fn refuse_shared_mounts(spec: &Spec) -> Result<(), Error> {
    for mount in spec.mounts().iter().flatten() {
        if mount.options().iter().flatten().any(|o| o == "shared" || o == "rshared") {
            return Err(invalid(format!(
                "mount {:?}: shared propagation cannot be honoured across the VM",
                mount.destination()
            )));
        }
    }
    Ok(())
}

fn refuse_notify(seccomp: &LinuxSeccomp) -> Result<(), Error> {
    let notifies = seccomp.default_action() == LinuxSeccompAction::ScmpActNotify
        || seccomp.syscalls().iter().flatten().any(|s| s.action() == LinuxSeccompAction::ScmpActNotify);
    if notifies {
        return Err(invalid(
            "linux.seccomp: SCMP_ACT_NOTIFY cannot be honoured: its listener is on the host",
        ));
    }
    Ok(())
}
