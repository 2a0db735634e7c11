//! What of a bundle the host does, and the configuration that is left for the guest.
//!
//! The guest sees the host's files only below the share: the root filesystem at `<share>/<id>/rootfs` and the
//! source of each bind mount at `<share>/<id>/mounts/<n>`, and a createContainer hook's program at
//! `<share>/<id>/hooks/<n>`. In the guest's configuration these paths take the place of the host's, and what belongs
//! to the host (its hooks, cgroup path, network namespace, the limits that only it can set) is gone. What a bundle
//! makes read-only the host binds read-only, so that the guest cannot change its mind.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Hooks, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount, Spec};
use stockade_agent_protocol::{POD_PID_NAMESPACE, POD_SHM, POD_USER_NAMESPACE, SHARE_MOUNT_POINT};

use super::idmap::{self, IdMap};
use super::pod::is_shm;
use super::validate::{is_bind, is_overlay};
use super::{Bundle, Error, MOUNT_OPTIONS};

/// One bind mount into the share, or an overlay of the host's directories that is mounted there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Absolute path on the host; of an overlay its name.
    pub source: PathBuf,
    /// The options of an overlay; nothing for a bind mount.
    pub overlay: Option<String>,
    /// Below the share directory.
    pub target: PathBuf,
    /// Whose its files are, where that is not as on the host.
    pub ids: Option<IdMap>,
    /// With what is mounted below the source.
    pub recursive: bool,
    /// How much of it is read-only.
    pub readonly: ReadOnly,
    /// Whether what the host mounts below it later appears.
    pub follows: bool,
}

/// How much of a bind mount is read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOnly {
    /// Nothing.
    No,
    /// The mount itself.
    Top,
    /// And all that is mounted below it.
    All,
}

/// A bundle taken apart.
#[derive(Debug)]
pub struct Adapted {
    /// The host's part, in this order; the root filesystem is the first.
    pub binds: Vec<Bind>,
    /// The guest's part: a config.json.
    pub spec: Vec<u8>,
    /// What is where in the container.
    pub shown: Shown,
}

/// A container's files by their place in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// The root filesystem, below the share directory.
    pub root: PathBuf,
    /// In the order of the bundle.
    pub mounts: Vec<ShownMount>,
}

/// A mount of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownMount {
    /// Absolute path in the container.
    pub destination: PathBuf,
    /// Below the share directory; nothing for what only the guest has.
    pub target: Option<PathBuf>,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Whether it is a proc file system.
    pub is_proc: bool,
}

/// Where a bind mount leads to in the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Placed {
    /// To the host's file or directory.
    Shared {
        /// Below the share directory.
        target: PathBuf,
        /// What is to be bound there, unless it is there already.
        bind: Option<Bind>,
    },
    /// To a directory that only the guest has, at this path.
    InGuest(PathBuf),
}

/// Takes a bundle apart for the container `id`, which must have passed the check of ids.
pub fn adapt(bundle: &Bundle, id: &str) -> Result<Adapted, Error> {
    adapt_with(bundle, id, |bind| Ok(Placed::Shared { target: bind.target.clone(), bind: Some(bind) }))
}

/// The same, with each bind mount where `place` says; it is given what would be made at a place of the container's own.
pub fn adapt_with(
    bundle: &Bundle,
    id: &str,
    mut place: impl FnMut(Bind) -> Result<Placed, Error>,
) -> Result<Adapted, Error> {
    let mut spec = bundle.spec.clone();
    let base = Path::new(id);
    let in_guest = |target: &Path| Path::new(SHARE_MOUNT_POINT).join(target);

    let rootfs = base.join("rootfs");
    let mut binds = vec![Bind {
        source: bundle.rootfs.clone(),
        overlay: None,
        ids: None,
        target: rootfs.clone(),
        recursive: true,
        readonly: if bundle.readonly_root() { ReadOnly::Top } else { ReadOnly::No },
        follows: root_follows(&spec),
    }];
    if let Some(root) = spec.root_mut() {
        root.set_path(in_guest(&rootfs));
    }
    let root_follows = root_follows(&spec);
    let mut mounts = Vec::new();
    let mut number = 0;
    for (index, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        let mut shown = ShownMount {
            destination: mount.destination().clone(),
            target: None,
            is_dir: true,
            is_proc: mount.typ().as_deref() == Some("proc"),
        };
        let overlay = is_overlay(mount).then(|| overlay_options(mount));
        if !is_bind(mount) && overlay.is_none() {
            mounts.push(shown);
            continue;
        }
        let ids = match &overlay {
            Some(_) => None,
            None => IdMap::of(index, mount, bundle.spec.linux().as_ref())?,
        };
        idmap::take_out(mount);
        if bundle.joined.shm && is_shm(mount.destination()) {
            mount.set_source(Some(POD_SHM.into()));
            mounts.push(shown);
            continue;
        }
        let source = match overlay {
            Some(_) => "overlay".into(),
            None => bundle.path.join(mount.source().as_deref().unwrap_or(Path::new(""))),
        };
        shown.is_dir = overlay.is_some() || source.is_dir();
        if overlay.is_some() {
            bind_instead(mount);
        }
        let placed = place(Bind {
            source,
            overlay,
            ids,
            target: base.join("mounts").join(number.to_string()),
            recursive: is_recursive(mount),
            readonly: readonly(mount),
            follows: follows(mount).unwrap_or(root_follows),
        })?;
        number += 1;
        let (source, bind) = match placed {
            Placed::Shared { target, bind } => {
                let source = in_guest(&target);
                shown.target = Some(target);
                (source, bind)
            }
            Placed::InGuest(path) => (path, None),
        };
        // In the guest it is one mount with all that is below, where `ro` says nothing of that. One that the host has
        // not bound for this container alone may be writable there.
        if bind.as_ref().is_some_and(|bind| {
            (bind.recursive, bind.readonly) == (true, ReadOnly::Top) && has_mounts_below(&bind.source)
        }) {
            mount.options_mut().iter_mut().flatten().for_each(|option| {
                if option == "ro" {
                    *option = "rw".into();
                }
            });
        }
        binds.extend(bind);
        mounts.push(shown);
        mount.set_source(Some(source));
        // Where the container mounts nothing, there is nothing to share but what the host mounts.
        for option in mount.options_mut().iter_mut().flatten() {
            match option.as_str() {
                "shared" => *option = "slave".into(),
                "rshared" => *option = "rslave".into(),
                _ => {}
            }
        }
    }
    if let Some(linux) = spec.linux_mut() {
        // The guest's cgroups are its own; this one is the container's alone.
        linux.set_cgroups_path(Some(Path::new("/").join(base)));
        if let Some(namespaces) = linux.namespaces_mut() {
            namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
            if bundle.joined.pid_namespace {
                let mut pods = LinuxNamespace::default();
                pods.set_typ(LinuxNamespaceType::Pid).set_path(Some(POD_PID_NAMESPACE.into()));
                namespaces.push(pods);
            }
            for namespace in namespaces.iter_mut() {
                let typ = namespace.typ();
                if typ == LinuxNamespaceType::User && bundle.joined.user_namespace {
                    namespace.set_path(Some(POD_USER_NAMESPACE.into()));
                }
                if bundle.joined.namespaces.contains(&typ) {
                    let of = Path::new("/proc").join(bundle.joined.with.to_string());
                    namespace.set_path(Some(of.join("ns").join(file_name(typ))));
                }
            }
        }
        if let Some(resources) = linux.resources_mut() {
            *resources = guests_part(resources.clone());
        }
    }
    let hooks = adapt_hooks(&spec, base, &mut binds);
    spec.set_hooks(hooks);
    if let Some(process) = spec.process_mut() {
        process.set_apparmor_profile(None);
        process.set_selinux_label(None);
    }
    let spec = serde_json::to_vec(&spec).map_err(Error::Encode)?;
    Ok(Adapted { binds, spec, shown: Shown { root: rootfs, mounts } })
}

/// What a process's namespace of this type is called in /proc/PID/ns (namespaces(7)).
pub fn file_name(typ: LinuxNamespaceType) -> &'static str {
    match typ {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Time => "time",
    }
}

/// The limits that stand in the guest. CPUs and memory nodes are the host's, so are block devices: what the
/// container reads and writes the VMM does for it.
pub fn guests_part(mut limits: LinuxResources) -> LinuxResources {
    limits.set_block_io(None);
    if let Some(cpu) = limits.cpu_mut() {
        cpu.set_cpus(None).set_mems(None);
    }
    limits
}

/// Hooks that run in the guest: the container's own programs, and the host's that are lent to it.
fn adapt_hooks(spec: &Spec, base: &Path, binds: &mut Vec<Bind>) -> Option<Hooks> {
    let hooks = spec.hooks().as_ref()?;
    let mut in_guest = Hooks::default();
    let mut create = hooks.create_container().clone().unwrap_or_default();
    for (index, hook) in create.iter_mut().enumerate() {
        let target = base.join("hooks").join(index.to_string());
        binds.push(Bind {
            source: hook.path().clone(),
            overlay: None,
            ids: None,
            target: target.clone(),
            recursive: false,
            readonly: ReadOnly::Top,
            follows: false,
        });
        // It keeps the name that it was to be called by.
        if hook.args().as_ref().is_none_or(Vec::is_empty) {
            hook.set_args(Some(vec![hook.path().display().to_string()]));
        }
        hook.set_path(Path::new(SHARE_MOUNT_POINT).join(target));
    }
    in_guest.set_create_container(Some(create).filter(|list| !list.is_empty()));
    in_guest.set_start_container(hooks.start_container().clone().filter(|list| !list.is_empty()));
    (in_guest != Hooks::default()).then_some(in_guest)
}

/// Unless it is to be private, a root gets the host's later mounts, as under runc.
fn root_follows(spec: &Spec) -> bool {
    let propagation = spec.linux().as_ref().and_then(|linux| linux.rootfs_propagation().as_deref());
    !matches!(propagation, Some("private" | "rprivate" | "unbindable" | "runbindable"))
}

/// What the mount says itself about that; the last word counts.
fn follows(mount: &Mount) -> Option<bool> {
    mount.options().iter().flatten().fold(None, |so_far, option| match option.as_str() {
        "slave" | "rslave" | "shared" | "rshared" => Some(true),
        "private" | "rprivate" | "unbindable" | "runbindable" => Some(false),
        _ => so_far,
    })
}

/// Whether something else is mounted somewhere below a directory of the host.
fn has_mounts_below(source: &Path) -> bool {
    let Ok(source) = source.canonicalize() else { return false };
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    // proc_pid_mountinfo(5): the fifth field is the mount point, with odd characters as octal numbers.
    mounts.lines().filter_map(|line| line.split(' ').nth(4)).any(|point| {
        let point = unescape(point);
        point.starts_with(&source) && point != source
    })
}

pub(crate) fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = field.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok();
        match tail.get(..3).filter(|_| *first == b'\\').and_then(octal) {
            Some(byte) => {
                bytes.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// What the file system itself is told of an overlay mount: all that is no flag, attribute or propagation.
fn overlay_options(mount: &Mount) -> String {
    let options = mount.options().iter().flatten().map(String::as_str);
    options.filter(|option| !of_any_mount(option)).collect::<Vec<_>>().join(",")
}

/// Makes of an overlay mount what the guest has to do: bind what the host has mounted.
fn bind_instead(mount: &mut Mount) {
    let options = mount.options().iter().flatten().filter(|option| of_any_mount(option)).cloned();
    let options = options.chain(["rbind".into()]).collect();
    mount.set_typ(Some("bind".into())).set_options(Some(options));
}

fn of_any_mount(option: &str) -> bool {
    MOUNT_OPTIONS.contains(&option) || option == "shared" || option == "rshared"
}

fn is_recursive(mount: &Mount) -> bool {
    mount.options().iter().flatten().any(|option| option == "rbind")
}

/// As with mount(8), the last word counts.
fn readonly(mount: &Mount) -> ReadOnly {
    mount.options().iter().flatten().fold(ReadOnly::No, |so_far, option| match option.as_str() {
        "ro" if so_far == ReadOnly::All => so_far,
        "ro" => ReadOnly::Top,
        "rro" => ReadOnly::All,
        "rw" | "rrw" => ReadOnly::No,
        _ => so_far,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::tests::bundle;
    use serde_json::{Value, json};

    fn adapted(changes: Value) -> (Adapted, Value) {
        let (_dir, bundle) = bundle(changes);
        let adapted = adapt(&bundle.unwrap(), "c1").unwrap();
        let spec = serde_json::from_slice(&adapted.spec).unwrap();
        (adapted, spec)
    }

    #[test]
    fn the_guest_sees_its_root_in_the_share() {
        let (adapted, spec) = adapted(json!({}));
        assert_eq!(spec["root"]["path"], "/run/stockade/share/c1/rootfs");
        assert_eq!(spec["root"]["readonly"], true);
        assert_eq!(adapted.binds.len(), 1);
        assert_eq!(adapted.binds[0].target, Path::new("c1/rootfs"));
        assert_eq!(adapted.binds[0].readonly, ReadOnly::Top);
    }

    #[test]
    fn bind_mounts_are_numbered_and_relative_sources_belong_to_the_bundle() {
        let (adapted, spec) = adapted(json!({"mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/a", "type": "bind", "source": "rootfs", "options": ["rbind", "ro"]},
            {"destination": "/b", "type": "none", "source": "/etc", "options": ["bind", "ro", "rw"]},
            {"destination": "/c", "source": "/usr", "options": ["rbind", "rro", "rshared"]},
        ]}));
        assert_eq!(spec["mounts"][0]["source"], "proc");
        for (n, recursive, readonly) in
            [(0, true, ReadOnly::Top), (1, false, ReadOnly::No), (2, true, ReadOnly::All)]
        {
            let source = format!("/run/stockade/share/c1/mounts/{n}");
            assert_eq!(spec["mounts"][n + 1]["source"], source.as_str());
            let bind = &adapted.binds[n + 1];
            assert_eq!(bind.target, Path::new("c1/mounts").join(n.to_string()));
            assert_eq!((bind.recursive, bind.readonly), (recursive, readonly));
        }
        assert!(adapted.binds[1].source.is_absolute() && adapted.binds[1].source.ends_with("rootfs"));
        assert_eq!(spec["mounts"][3]["options"], json!(["rbind", "rro", "rslave"]));
    }

    #[test]
    fn an_overlay_is_mounted_on_the_host_and_bound_in_the_guest() {
        let (adapted, spec) = adapted(json!({"mounts": [{
            "destination": "/a", "type": "overlay", "source": "overlay",
            "options": ["lowerdir=/etc:/usr,index=off", "ro", "nosuid", "private", "userxattr"],
        }]}));
        let bind = &adapted.binds[1];
        assert_eq!(bind.overlay.as_deref(), Some("lowerdir=/etc:/usr,index=off,userxattr"));
        assert_eq!((bind.readonly, bind.follows), (ReadOnly::Top, false));
        assert_eq!(
            spec["mounts"][0],
            json!({
                "destination": "/a", "type": "bind", "source": "/run/stockade/share/c1/mounts/0",
                "options": ["ro", "nosuid", "private", "rbind"],
            })
        );
    }

    #[test]
    fn ids_are_mapped_on_the_host_and_not_once_more_in_the_guest() {
        let mappings = json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
        let (adapted, spec) = adapted(json!({"mounts": [
            {
                "destination": "/a", "type": "bind", "source": "/etc", "options": ["rbind", "ridmap", "ro"],
                "uidMappings": mappings, "gidMappings": mappings,
            },
            {"destination": "/b", "source": "/etc", "options": ["bind", "idmap=uids=0-5-1;gids=0-6-1"]},
        ]}));
        let ids = |n: usize| adapted.binds[n].ids.as_ref().map(|ids| (ids.maps(), ids.recursive));
        assert_eq!(ids(0), None);
        assert_eq!(ids(1), Some((["0 1000 10\n".to_owned(), "0 1000 10\n".into()], true)));
        assert_eq!(ids(2), Some((["0 5 1\n".to_owned(), "0 6 1\n".into()], false)));
        let source = "/run/stockade/share/c1/mounts/0";
        assert_eq!(
            spec["mounts"][0],
            json!({"destination": "/a", "type": "bind", "source": source, "options": ["rbind", "ro"]})
        );
        assert_eq!(spec["mounts"][1]["options"], json!(["bind"]));
    }

    #[test]
    fn the_hosts_later_mounts_appear_unless_a_mount_is_private() {
        let (adapted, spec) = adapted(json!({"mounts": [
            {"destination": "a", "type": "bind", "source": "/etc", "options": ["rbind"]},
            {"destination": "b/c", "type": "bind", "source": "/etc", "options": ["rbind", "rprivate"]},
        ]}));
        assert_eq!(adapted.binds.iter().map(|bind| bind.follows).collect::<Vec<_>>(), [true, true, false]);
        assert_eq!(
            (&spec["mounts"][0]["destination"], &spec["mounts"][1]["destination"]),
            (&json!("/a"), &json!("/b/c"))
        );
        let (adapted, _) = super::tests::adapted(json!({
            "linux": {"rootfsPropagation": "rprivate"},
            "mounts": [{"destination": "/a", "type": "bind", "source": "/etc", "options": ["rslave"]}],
        }));
        assert_eq!(adapted.binds.iter().map(|bind| bind.follows).collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn a_hook_of_the_guest_is_lent_its_program() {
        let program = std::env::current_exe().unwrap();
        let (adapted, spec) = adapted(json!({"hooks": {
            "createContainer": [{"path": program, "timeout": 3}],
            "startContainer": [{"path": "/bin/true", "args": ["true"]}],
            "poststop": [{"path": "/bin/true"}],
        }}));
        let bind = adapted.binds.last().unwrap();
        assert_eq!((&bind.source, bind.target.as_path()), (&program, Path::new("c1/hooks/0")));
        assert_eq!(
            spec["hooks"],
            json!({
                "createContainer": [{"path": "/run/stockade/share/c1/hooks/0", "args": [program], "timeout": 3}],
                "startContainer": [{"path": "/bin/true", "args": ["true"]}],
            })
        );
    }

    #[test]
    fn only_mounts_below_count_as_such() {
        assert!(has_mounts_below(Path::new("/")));
        assert!(!has_mounts_below(Path::new("/proc/self/fd")));
        assert_eq!(unescape("/a\\040b\\134c"), Path::new("/a b\\c"));
        assert_eq!(unescape("/a\\9"), Path::new("/a\\9"));
    }

    #[test]
    fn limits_that_only_the_host_can_set_stay_there() {
        let (_, spec) = adapted(json!({"linux": {"resources": {
            "cpu": {"cpus": "0", "mems": "0", "shares": 7}, "blockIO": {"weight": 0}, "pids": {"limit": 5},
        }}}));
        assert_eq!(spec["linux"]["resources"]["cpu"], json!({"shares": 7}));
        assert_eq!(spec["linux"]["resources"].get("blockIO"), None);
        assert_eq!(spec["linux"]["resources"]["pids"]["limit"], 5);
    }

    #[test]
    fn what_belongs_to_the_host_does_not_reach_the_guest() {
        let (_, spec) = adapted(json!({
            "hooks": {"poststop": [{"path": "/bin/true"}]},
            "linux": {
                "cgroupsPath": "system.slice:docker:abc",
                "namespaces": [{"type": "mount"}, {"type": "network"}, {"type": "uts"}],
            },
        }));
        assert_eq!(spec.get("hooks"), None);
        assert_eq!(spec["linux"]["cgroupsPath"], "/c1");
        assert_eq!(spec["linux"]["namespaces"], json!([{"type": "mount"}, {"type": "uts"}]));
    }
}
