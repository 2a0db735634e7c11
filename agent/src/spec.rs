//! What is changed in a container's `config.json` before libcontainer sees it, and why.
//!
//! libcontainer 0.7 leaves some fields aside or handles them other than a host without a VM would. Each is either
//! taken over by the agent, translated, or refused by name: a field is never silently dropped.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Capabilities, Capability, Hook, Linux, LinuxCapabilities, LinuxIdMapping, LinuxNamespace,
    LinuxNamespaceType, LinuxResources, LinuxSeccomp, LinuxSeccompAction, Process, Spec,
};

use stockade_agent_protocol::{POD_PID_NAMESPACE, POD_USER_NAMESPACE};

use crate::error::Error;
use crate::executor::Users;
use crate::mounts::{self, Finish};

/// A container's configuration, split into what libcontainer does and what the agent does itself.
pub struct Adapted {
    /// For libcontainer.
    pub spec: Spec,
    /// `linux.seccomp`, which the executor applies: see [`crate::seccomp`].
    pub seccomp: Option<LinuxSeccomp>,
    /// `linux.resources`, which the agent applies: see [`crate::cgroup`].
    pub resources: Option<LinuxResources>,
    /// `linux.sysctl` of the network. The container lives in the VM's own network namespace, where libcontainer
    /// refuses them.
    pub network_sysctls: HashMap<String, String>,
    /// What the agent needs to know of the process.
    pub process: ProcessFacts,
    /// Whom the container's users are outside its user namespace.
    pub ids: Ids,
    /// What is left to do with the mounts once libcontainer has made them.
    pub finish: Vec<Finish>,
    /// Hooks that run in the container before its workload.
    pub start_hooks: Vec<Hook>,
    /// The container has a pid namespace of its own: all its processes end with its init.
    pub own_pid_namespace: bool,
    /// It shares the pod's.
    pub in_pod_pid_namespace: bool,
    /// It shares the pod's user namespace.
    pub in_pod_user_namespace: bool,
    /// Host name and domain name for a uts namespace that is another container's: libcontainer names only those that it
    /// makes, where other runtimes name one that is shared as well.
    pub names: Option<[String; 2]>,
    /// Its cgroup is its own to change.
    pub owns_cgroup: bool,
}

/// Whom a container's users are in the guest: the mappings of its user namespace, if it has one.
#[derive(Debug, Clone, Default)]
pub struct Ids {
    uids: Vec<LinuxIdMapping>,
    gids: Vec<LinuxIdMapping>,
}

impl Ids {
    /// Whether there is such a namespace.
    pub fn are_mapped(&self) -> bool {
        !self.uids.is_empty()
    }

    /// The maps of the namespace, of users and of groups, as user_namespaces(7) has them.
    pub fn maps(&self) -> [String; 2] {
        [&self.uids, &self.gids].map(|mappings| {
            let line =
                |of: &LinuxIdMapping| format!("{} {} {}\n", of.container_id(), of.host_id(), of.size());
            mappings.iter().map(line).collect()
        })
    }

    fn of(linux: &Linux) -> Self {
        Ids {
            uids: linux.uid_mappings().clone().unwrap_or_default(),
            gids: linux.gid_mappings().clone().unwrap_or_default(),
        }
    }
}

/// An id that is not mapped stays as it is: libcontainer refuses it.
fn outside(mappings: &[LinuxIdMapping], id: u32) -> u32 {
    let mapped = mappings.iter().find_map(|mapping| {
        let distance = id.checked_sub(mapping.container_id())?;
        (distance < mapping.size()).then(|| mapping.host_id().saturating_add(distance))
    });
    mapped.unwrap_or(id)
}

/// What the agent needs to know of a process.
#[derive(Debug, Clone, Copy)]
pub struct ProcessFacts {
    /// It gets a terminal.
    pub terminal: bool,
    /// Owner of its pipes or terminal, in the guest.
    pub uid: u32,
    /// Group of its pipes, in the guest.
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
    if !mounts::has_namespace(&spec) {
        return Err(invalid(
            "linux.namespaces must have a mount namespace: the guest's own is not to be shared",
        ));
    }
    let start_hooks = take_start_hooks(&mut spec);
    let finish = mounts::take_over(&mut spec);
    let ids = spec.linux().as_ref().map(Ids::of).unwrap_or_default();
    let process = spec.process_mut().as_mut().ok_or_else(|| invalid("config.json has no process"))?;
    let facts = adapt_process(process, &ids)?;

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
    let seccomp = linux.seccomp().clone();
    if let Some(seccomp) = &seccomp {
        refuse_notify(seccomp)?;
    }
    linux.set_seccomp(None);
    let owns = |typ: LinuxNamespaceType| {
        linux.namespaces().iter().flatten().any(|n| n.typ() == typ && n.path().is_none())
    };
    let own_pid_namespace = owns(LinuxNamespaceType::Pid);
    let own_cgroup_namespace = owns(LinuxNamespaceType::Cgroup);
    let shares = |typ: LinuxNamespaceType, path: &str| {
        let mut all = linux.namespaces().iter().flatten();
        all.any(|namespace| namespace.typ() == typ && namespace.path().as_deref() == Some(Path::new(path)))
    };
    let in_pod_pid_namespace = shares(LinuxNamespaceType::Pid, POD_PID_NAMESPACE);
    let in_pod_user_namespace = shares(LinuxNamespaceType::User, POD_USER_NAMESPACE);
    let shares_uts =
        linux.namespaces().iter().flatten().any(|n| n.typ() == LinuxNamespaceType::Uts && n.path().is_some());
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
    let names = [spec.hostname(), spec.domainname()].map(|name| name.clone().unwrap_or_default());
    let names = Some(names).filter(|names| shares_uts && names.iter().any(|name| !name.is_empty()));
    let owns_cgroup = own_cgroup_namespace && mounts::has_writable_cgroups(&spec);
    Ok(Adapted {
        spec,
        seccomp,
        resources,
        network_sysctls,
        process: facts,
        ids,
        finish,
        start_hooks,
        own_pid_namespace,
        in_pod_pid_namespace,
        in_pod_user_namespace,
        names,
        owns_cgroup,
    })
}

/// What everybody in the guest may do with its network, once a container with users of its own has the capability: that
/// would be worth nothing there, because the network is not of its user namespace.
pub struct Lent {
    capability: Capability,
    /// Of the sysctl.
    pub name: &'static str,
    /// The kernel's, as it shows it, with one space between words.
    pub default: &'static str,
    pub value: &'static str,
}

const LENT: [Lent; 2] = [
    Lent {
        capability: Capability::NetBindService,
        name: "net.ipv4.ip_unprivileged_port_start",
        default: "1024",
        value: "0",
    },
    Lent {
        capability: Capability::NetRaw,
        name: "net.ipv4.ping_group_range",
        default: "1 0",
        value: "0 2147483647",
    },
];

/// What a container has lent to it.
pub fn lent_by_capability(spec: &Spec) -> impl Iterator<Item = &'static Lent> {
    let namespaces = spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
    let own_users = namespaces.into_iter().any(|one| one.typ() == LinuxNamespaceType::User);
    let process = spec.process().as_ref().filter(|_| own_users);
    let sets = process.and_then(|process| process.capabilities().as_ref());
    let bounding = sets.and_then(|sets| sets.bounding().clone()).unwrap_or_default();
    LENT.iter().filter(move |lent| bounding.contains(&lent.capability))
}

/// The user namespace that is to be made for a container alone.
pub fn own_user_namespace(spec: &mut Spec) -> Option<&mut LinuxNamespace> {
    let namespaces = spec.linux_mut().as_mut()?.namespaces_mut().as_mut()?;
    namespaces.iter_mut().find(|one| one.typ() == LinuxNamespaceType::User && one.path().is_none())
}

/// Adapts a process, of a container or of an exec.
pub fn adapt_process(process: &mut Process, ids: &Ids) -> Result<ProcessFacts, Error> {
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
    keep_no_unnamed_capability(process);
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
        uid: outside(&ids.uids, process.user().uid()),
        gid: outside(&ids.gids, process.user().gid()),
        wants_home,
    })
}

/// libcontainer leaves a set that is not there as the agent has it, which is full; for runc it is empty.
fn keep_no_unnamed_capability(process: &mut Process) {
    let mut sets = process.capabilities().clone().unwrap_or_default();
    let named = process.capabilities().as_ref();
    let set = |of: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
        Some(named.and_then(|sets| of(sets).clone()).unwrap_or_default())
    };
    sets.set_bounding(set(LinuxCapabilities::bounding))
        .set_effective(set(LinuxCapabilities::effective))
        .set_inheritable(set(LinuxCapabilities::inheritable))
        .set_permitted(set(LinuxCapabilities::permitted))
        .set_ambient(set(LinuxCapabilities::ambient));
    process.set_capabilities(Some(sets));
}

/// Takes out of a process who it is to be in a user namespace, and leaves it the guest's root: libcontainer does not enter
/// that of a container for an exec, so the executor does, and makes it that then.
pub fn take_user(process: &mut Process, namespace: OwnedFd) -> Users {
    let user = process.user().clone();
    let taken = Users {
        namespace,
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        capabilities: process.capabilities().clone().unwrap_or_default(),
        no_new_privileges: process.no_new_privileges() == Some(true),
    };
    let mut root = user;
    root.set_uid(0).set_gid(0).set_additional_gids(None);
    // To enter, and to find a command where only another may look.
    let to_enter: Capabilities = [Capability::SysAdmin, Capability::DacOverride].into();
    let mut capabilities = LinuxCapabilities::default();
    capabilities
        .set_bounding(Some(to_enter.clone()))
        .set_effective(Some(to_enter.clone()))
        .set_permitted(Some(to_enter))
        .set_inheritable(Some(Capabilities::new()))
        .set_ambient(Some(Capabilities::new()));
    process.set_user(root).set_capabilities(Some(capabilities)).set_no_new_privileges(None);
    taken
}

/// Gives a process that gets a seccomp filter without no_new_privs the right to load it; returns what it must be left
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

/// The executor runs them: libcontainer would lose what became of them. Those of createContainer it runs itself.
fn take_start_hooks(spec: &mut Spec) -> Vec<Hook> {
    let Some(hooks) = spec.hooks_mut() else { return Vec::new() };
    let taken = hooks.start_container().clone().unwrap_or_default();
    hooks.set_start_container(None);
    if hooks.create_container().as_ref().is_none_or(Vec::is_empty) {
        spec.set_hooks(None);
    }
    taken
}

/// Mounts made in the guest cannot appear on the host.
fn refuse_shared_mounts(spec: &Spec) -> Result<(), Error> {
    for mount in spec.mounts().iter().flatten() {
        let has = |names: [&str; 2]| mount.options().iter().flatten().any(|o| names.contains(&o.as_str()));
        let bind = mount.typ().as_deref() == Some("bind") || has(["bind", "rbind"]);
        if bind && has(["shared", "rshared"]) {
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "root": {"path": "/run/stockade/share/c/rootfs"},
            "process": {"cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]}
        })
    }

    fn adapted(config: &Value) -> Result<Adapted, String> {
        adapt(config.to_string().as_bytes(), "/stockade/c").map_err(|e| e.to_string())
    }

    #[test]
    fn what_the_agent_does_itself_is_kept_from_libcontainer() {
        let mut config = config();
        config["linux"]["resources"] = json!({"pids": {"limit": 5}});
        config["linux"]["sysctl"] =
            json!({"net.ipv4.ip_unprivileged_port_start": "0", "kernel.msgmax": "65536"});
        let adapted = adapted(&config).unwrap();
        let linux = adapted.spec.linux().as_ref().unwrap();
        assert!(linux.resources().is_none());
        assert_eq!(linux.cgroups_path().as_deref(), Some(std::path::Path::new("/stockade/c")));
        assert_eq!(linux.sysctl().as_ref().unwrap().keys().collect::<Vec<_>>(), ["kernel.msgmax"]);
        assert_eq!(adapted.network_sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
        assert_eq!(adapted.resources.unwrap().pids().unwrap().limit(), 5);
        assert!(adapted.own_pid_namespace);
    }

    #[test]
    fn a_shared_pid_namespace_is_not_its_own() {
        let mut config = config();
        config["linux"]["namespaces"] = json!([{"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "mount"}]);
        let other = adapted(&config).unwrap();
        assert!(!other.own_pid_namespace && !other.in_pod_pid_namespace);
        config["linux"]["namespaces"][0]["path"] = json!(POD_PID_NAMESPACE);
        let pods = adapted(&config).unwrap();
        assert!(!pods.own_pid_namespace && pods.in_pod_pid_namespace && !pods.in_pod_user_namespace);
        config["linux"]["namespaces"][0] = json!({"type": "user", "path": POD_USER_NAMESPACE});
        config["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 9, "size": 1}]);
        config["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 8, "size": 7}]);
        let users = adapted(&config).unwrap();
        assert!(users.in_pod_user_namespace && !users.in_pod_pid_namespace);
        assert_eq!(users.ids.maps(), ["0 9 1\n", "0 8 7\n"]);
        config["linux"]["namespaces"] = json!([{"type": "mount"}]);
        assert!(!adapted(&config).unwrap().own_pid_namespace);
    }

    #[test]
    fn an_exec_is_root_until_it_is_in_its_user_namespace() {
        let mut process: Process = serde_json::from_value(json!({
            "cwd": "/", "args": ["sh"], "noNewPrivileges": true,
            "user": {"uid": 5, "gid": 6, "additionalGids": [7], "umask": 63},
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
        }))
        .unwrap();
        let before = process.clone();
        let namespace = std::fs::File::open("/proc/self/ns/user").unwrap().into();
        let taken = take_user(&mut process, namespace);
        assert_eq!((taken.uid, taken.gid, taken.groups.as_slice()), (5, 6, &[7][..]));
        assert_eq!(Some(&taken.capabilities), before.capabilities().as_ref());
        assert!(taken.no_new_privileges && process.no_new_privileges().is_none());
        let user = process.user();
        assert_eq!((user.uid(), user.gid(), user.umask()), (0, 0, Some(63)));
        assert!(user.additional_gids().is_none());
    }

    #[test]
    fn capabilities_over_the_network_are_lent_to_who_has_users_of_its_own() {
        let lent = |namespaces: Value| {
            let mut config = config();
            config["linux"]["namespaces"] = namespaces;
            config["process"]["capabilities"] = json!({"bounding": ["CAP_NET_RAW", "CAP_CHOWN"]});
            let adapted = adapted(&config).unwrap();
            lent_by_capability(&adapted.spec).map(|lent| lent.name).collect::<Vec<_>>()
        };
        assert_eq!(lent(json!([{"type": "mount"}])), [""; 0]);
        assert_eq!(lent(json!([{"type": "mount"}, {"type": "user"}])), ["net.ipv4.ping_group_range"]);
    }

    #[test]
    fn streams_belong_to_whom_the_user_is_outside_its_namespace() {
        let mut config = config();
        config["process"]["user"] = json!({"uid": 5, "gid": 70});
        config["linux"]["uidMappings"] = json!([
            {"containerID": 0, "hostID": 1000, "size": 1}, {"containerID": 1, "hostID": 100_000, "size": 10}
        ]);
        config["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
        let facts = adapted(&config).unwrap().process;
        assert_eq!((facts.uid, facts.gid), (100_004, 70));
    }

    #[test]
    fn hooks_of_the_guest_are_taken_apart() {
        let mut config = config();
        config["hooks"] = json!({"startContainer": [{"path": "/bin/a"}]});
        let taken = adapted(&config).unwrap();
        assert!(taken.spec.hooks().is_none());
        assert_eq!(taken.start_hooks[0].path(), std::path::Path::new("/bin/a"));
        config["hooks"]["createContainer"] = json!([{"path": "/bin/b"}]);
        let taken = adapted(&config).unwrap();
        assert!(taken.spec.hooks().as_ref().unwrap().start_container().is_none());
        assert!(taken.spec.hooks().as_ref().unwrap().create_container().is_some());
    }

    #[test]
    fn a_process_does_not_inherit_from_the_agent() {
        let adapted = adapted(&config()).unwrap();
        let process = adapted.spec.process().as_ref().unwrap();
        assert_eq!(process.oom_score_adj(), Some(0));
        assert_eq!(process.env().as_ref().unwrap(), &["PATH=/bin", "HOME=/"]);
        assert!(adapted.process.wants_home);
        let mut config = config();
        config["process"]["oomScoreAdj"] = json!(500);
        config["process"]["noNewPrivileges"] = json!(false);
        config["process"]["env"] = json!(["HOME=/here"]);
        let adapted = super::tests::adapted(&config).unwrap();
        let process = adapted.spec.process().as_ref().unwrap();
        assert_eq!((process.oom_score_adj(), process.no_new_privileges()), (Some(500), None));
        assert_eq!(process.env().as_ref().unwrap(), &["HOME=/here"]);
    }

    #[test]
    fn capabilities_that_are_not_named_are_none() {
        let mut config = config();
        for (named, bounding) in
            [(json!(null), json!([])), (json!({"bounding": ["CAP_KILL"]}), json!(["CAP_KILL"]))]
        {
            config["process"]["capabilities"] = named;
            let spec = serde_json::to_value(adapted(&config).unwrap().spec).unwrap();
            let sets = &spec["process"]["capabilities"];
            assert_eq!(sets["bounding"], bounding);
            for set in ["effective", "inheritable", "permitted", "ambient"] {
                assert_eq!(sets[set], json!([]), "{set}");
            }
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        for (pointer, value, named) in [
            ("/ociVersion", json!("2.0.0"), "ociVersion"),
            ("/root/path", json!("rootfs"), "root.path"),
            ("/process/args", json!([]), "process.args"),
            ("/process/cwd", json!("tmp"), "process.cwd"),
            ("/process/selinuxLabel", json!("a:b"), "process.selinuxLabel"),
            ("/process/apparmorProfile", json!("docker-default"), "process.apparmorProfile"),
            ("/linux/namespaces", json!([{"type": "pid"}]), "linux.namespaces"),
            ("/linux/mountLabel", json!("a:b"), "linux.mountLabel"),
            ("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt"),
            ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "linux.seccomp"),
            ("/hooks", json!({"prestart": [{"path": "/bin/true"}]}), "hooks.prestart"),
            (
                "/mounts",
                json!([{"destination": "/v", "type": "bind", "source": "/s", "options": ["rbind", "rshared"]}]),
                "mount \"/v\"",
            ),
        ] {
            let mut config = config();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            config.pointer_mut(parent).unwrap()[key] = value;
            let error = adapted(&config).err().unwrap_or_default();
            assert!(error.contains(named), "{pointer}: {error:?}");
        }
        assert!(adapt(b"{", "/stockade/c").is_err());
    }

    #[test]
    fn a_process_is_lent_what_seccomp_needs_and_no_more() {
        let process = |no_new_privileges: bool| -> Process {
            serde_json::from_value(json!({
                "cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0}, "noNewPrivileges": no_new_privileges,
                "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]}
            }))
            .unwrap()
        };
        let mut lent = process(false);
        let wanted = lend_sys_admin(&mut lent).unwrap();
        assert_eq!(Some(&wanted), process(false).capabilities().as_ref());
        let capabilities = lent.capabilities().as_ref().unwrap();
        assert!(capabilities.effective().as_ref().unwrap().contains(&Capability::SysAdmin));
        assert!(!capabilities.bounding().as_ref().unwrap().contains(&Capability::SysAdmin));
        let mut alone = process(true);
        assert!(lend_sys_admin(&mut alone).is_none());
        assert_eq!(alone, process(true));
    }
}
