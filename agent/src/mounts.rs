//! What a container's mounts are to be that libcontainer does not make them.
//!
//! libcontainer 0.7 leaves some options of a mount aside without a word, takes others for data that the kernel
//! refuses, and gives read-only paths more flags than were asked for. These are taken out of what it gets, and done
//! in the container's mount namespace once that is made and before its workload may run. Paths are resolved there,
//! with the container's root as root, so that no link leads out.

mod copy;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use stockade_sys::inside::openat2;

use crate::error::Error;

/// Something that is left to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// Copy what the root file system has at a mount point into what is mounted there.
    CopyUp(PathBuf),
    /// Give a mount attributes, in mount_setattr(2)'s numbers.
    Attributes(PathBuf, u64),
    /// Give a mount a propagation, and those below it too.
    Propagation(PathBuf, MsFlags),
    /// Make a path read-only, if it is there.
    ReadOnly(PathBuf),
}

/// Where the guest's message queues are mounted.
pub const GUESTS_QUEUES: &str = "/run/stockade/mqueue";

/// Mounts the guest's message queues, where a container is to have them.
pub fn prepare(spec: &Spec) -> Result<(), Error> {
    let queues = Path::new(GUESTS_QUEUES);
    let mut mounts = spec.mounts().iter().flatten();
    if queues.exists() || !mounts.any(|mount| mount.source().as_deref() == Some(queues)) {
        return Ok(());
    }
    let failed = |e| Error::os(format!("mounting message queues on {GUESTS_QUEUES}"), e);
    std::fs::create_dir_all(queues).map_err(failed)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("mqueue"), queues, Some("mqueue"), flags, None::<&str>).map_err(|e| failed(e.into()))
}

/// Options that say nothing about the file systems of a guest: they are about inode versions, lazy times, mandatory
/// locks (gone from Linux 5.15 on) and what the kernel logs, or are the state that a mount is in anyway.
const WITHOUT_EFFECT: [&str; 18] = [
    "acl",
    "noacl",
    "iversion",
    "noiversion",
    "lazytime",
    "nolazytime",
    "loud",
    "silent",
    "mand",
    "nomand",
    "sync",
    "async",
    "dirsync",
    "symfollow",
    "private",
    "rprivate",
    "slave",
    "rslave",
];

/// Takes out of a container's configuration what libcontainer would do otherwise, and says what is to be done.
pub fn take_over(spec: &mut Spec) -> Vec<Finish> {
    let mut finish = Vec::new();
    let own_users = namespaces(spec).any(|typ| typ == LinuxNamespaceType::User);
    let own_ipc = namespaces(spec).any(|typ| typ == LinuxNamespaceType::Ipc);
    for mount in spec.mounts_mut().iter_mut().flatten() {
        match mount.typ().as_deref() {
            Some("sysfs") if own_users => bind_guests(mount, "/sys"),
            Some("mqueue") if own_users && !own_ipc => bind_guests(mount, GUESTS_QUEUES),
            _ => {}
        }
        take_over_mount(mount, &mut finish);
    }
    let Some(linux) = spec.linux_mut() else { return finish };
    // libcontainer knows four words only; the others are Docker's and Podman's.
    let propagation = linux.rootfs_propagation().as_deref().map(|word| match word {
        "rprivate" => "private".into(),
        "rslave" | "" => "slave".into(),
        "runbindable" => "unbindable".into(),
        other => other.to_owned(),
    });
    linux.set_rootfs_propagation(propagation);
    // Below /proc and /sys the flags that libcontainer adds are those which these are mounted with anyway.
    let kernels = |path: &String| ["/proc/", "/sys/"].iter().any(|start| path.starts_with(start));
    if let Some(paths) = linux.readonly_paths_mut() {
        finish.extend(paths.iter().filter(|path| !kernels(path)).map(|path| Finish::ReadOnly(path.into())));
        paths.retain(kernels);
    }
    finish
}

fn take_over_mount(mount: &mut Mount, finish: &mut Vec<Finish>) {
    if mount.source().is_none() {
        // It is only a name for file systems without a device, but libcontainer wants one.
        let kind = mount.typ().clone().unwrap_or_else(|| "none".into());
        mount.set_source(Some(kind.into()));
    }
    let destination = mount.destination().clone();
    let Some(options) = mount.options_mut() else { return };
    let mut attributes = 0;
    let mut copy_up = false;
    let mut propagation = None;
    options.retain(|option| match option.as_str() {
        "nosymfollow" => {
            attributes |= libc::MOUNT_ATTR_NOSYMFOLLOW;
            false
        }
        "tmpcopyup" => {
            copy_up = true;
            false
        }
        "unbindable" | "runbindable" => {
            propagation = Some(MsFlags::MS_UNBINDABLE);
            false
        }
        // Among the containers of the VM: the host refuses it for what is bound from there.
        "shared" | "rshared" => {
            propagation = Some(MsFlags::MS_SHARED);
            false
        }
        other => !WITHOUT_EFFECT.contains(&other),
    });
    // libcontainer never makes /dev read-only, because devices come into it later; nor could it be filled.
    let is_dev = destination == Path::new("/dev");
    if is_dev || copy_up {
        let readonly = options.iter().rev().find(|option| matches!(option.as_str(), "ro" | "rw"));
        if readonly.is_some_and(|option| option == "ro") {
            attributes |= libc::MOUNT_ATTR_RDONLY;
        }
        options.retain(|option| option != "ro" && option != "rw");
    }
    if copy_up {
        finish.push(Finish::CopyUp(destination.clone()));
    }
    if attributes != 0 {
        finish.push(Finish::Attributes(destination.clone(), attributes));
    }
    if let Some(flags) = propagation {
        finish.push(Finish::Propagation(destination, flags | MsFlags::MS_REC));
    }
}

/// Whether a container has a mount namespace of its own, which it needs: without one its mounts would be the guest's.
pub fn has_namespace(spec: &Spec) -> bool {
    namespaces(spec).any(|typ| typ == LinuxNamespaceType::Mount)
}

/// Whether a container has the cgroup file system at its usual place, not read-only.
pub fn has_writable_cgroups(spec: &Spec) -> bool {
    spec.mounts().iter().flatten().any(|mount| {
        matches!(mount.typ().as_deref(), Some("cgroup" | "cgroup2"))
            && mount.destination() == Path::new("/sys/fs/cgroup")
            && !mount.options().iter().flatten().any(|option| option == "ro" || option == "rro")
    })
}

fn namespaces(spec: &Spec) -> impl Iterator<Item = LinuxNamespaceType> {
    let all = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    all.into_iter().flatten().map(|namespace| namespace.typ())
}

/// The kernel lets nobody mount a sysfs but who owns the network namespace, which in a VM is the guest's, and no message
/// queues but who owns the ipc namespace, which in a pod is the guest's too. So a container with users of its own gets
/// the guest's, as it does of any host whose network and whose ipc namespace it shares.
fn bind_guests(mount: &mut Mount, source: &str) {
    mount.set_typ(Some("bind".into())).set_source(Some(source.into()));
    mount.options_mut().get_or_insert_default().push("rbind".into());
}

/// Enters directories of the share, so that the kernel mounts those that are file systems of their own here and not in
/// the mount namespace of each container that has them: one of its own would know no sockets and locks of the others'.
pub fn enter(sources: &[PathBuf]) {
    for source in sources {
        // A file has nothing to be entered, and what is missing is told by who mounts it.
        let _ = std::fs::metadata(source.join("."));
    }
}

/// Does what is left, in the mount namespace of a container's init. To be called in a process that ends with it.
/// `rootfs` is the container's root file system as the agent sees it.
pub fn finish(init: Pid, rootfs: &Path, all: &[Finish]) -> Result<(), Error> {
    let failed = |what: &str, e| Error::os(format!("{what} the container's mounts"), e);
    // Before the namespace is left in which the root file system lies bare.
    let mut sources = Vec::new();
    for each in all {
        if let Finish::CopyUp(path) = each {
            sources.push(open_inside(rootfs, path).map_err(|e| failed("reading what is below", e))?);
        }
    }
    let namespace = File::open(format!("/proc/{init}/ns/mnt")).map_err(|e| failed("reaching", e))?;
    setns(namespace, CloneFlags::CLONE_NEWNS).map_err(|e| failed("entering", e.into()))?;
    let mut sources = sources.into_iter();
    for each in all {
        let result = match each {
            Finish::CopyUp(path) => match sources.next().flatten() {
                Some(source) => copy::tree(&source, path),
                None => Ok(()),
            },
            Finish::Attributes(path, attributes) => set_attributes(path, *attributes),
            Finish::Propagation(path, flags) => {
                mount(None::<&str>, path, None::<&str>, *flags, None::<&str>).map_err(Into::into)
            }
            Finish::ReadOnly(path) => make_readonly(path),
        };
        result.map_err(|e| Error::os(each.describe(), e))?;
    }
    Ok(())
}

impl Finish {
    fn describe(&self) -> String {
        match self {
            Finish::CopyUp(path) => format!("mount {path:?}: copying up what the root file system has there"),
            Finish::Attributes(path, _) => format!("mount {path:?}: setting its attributes"),
            Finish::Propagation(path, _) => format!("mount {path:?}: setting its propagation"),
            Finish::ReadOnly(path) => format!("linux.readonlyPaths {path:?}"),
        }
    }
}

/// A directory in the root file system; `None` where there is none to copy.
fn open_inside(rootfs: &Path, path: &Path) -> io::Result<Option<OwnedFd>> {
    let root = File::open(rootfs)?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    match openat2(&root, path, OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT)) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn make_readonly(path: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    match mount(Some(path), path, None::<&str>, flags, None::<&str>) {
        Err(Errno::ENOENT) => Ok(()),
        Err(e) => Err(e.into()),
        Ok(()) => set_attributes(path, libc::MOUNT_ATTR_RDONLY),
    }
}

fn set_attributes(path: &Path, attributes: u64) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: mount_setattr(2) reads the path and the struct of the size given, both of which live until it returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            0,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Ok(Errno::result(result).map(drop)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn taken(config: Value) -> (Vec<Finish>, Value) {
        let mut spec: Spec = serde_json::from_value(config).unwrap();
        let finish = take_over(&mut spec);
        (finish, serde_json::to_value(&spec).unwrap())
    }

    fn mounted(mount: Value) -> (Vec<Finish>, Value) {
        let (finish, spec) = taken(json!({"ociVersion": "1.0.0", "mounts": [mount]}));
        (finish, spec["mounts"][0].clone())
    }

    #[test]
    fn options_that_libcontainer_drops_are_done_here() {
        let (finish, mount) = mounted(json!({
            "destination": "/v", "type": "bind", "source": "/s",
            "options": ["rbind", "ro", "nosymfollow", "runbindable", "nosuid", "rprivate", "lazytime"],
        }));
        assert_eq!(mount["options"], json!(["rbind", "ro", "nosuid"]));
        let flags = MsFlags::MS_UNBINDABLE | MsFlags::MS_REC;
        assert_eq!(
            finish,
            [
                Finish::Attributes("/v".into(), libc::MOUNT_ATTR_NOSYMFOLLOW),
                Finish::Propagation("/v".into(), flags)
            ]
        );
    }

    #[test]
    fn a_tmpfs_is_filled_before_it_is_read_only() {
        let (finish, mount) = mounted(json!({
            "destination": "/run", "type": "tmpfs", "options": ["rprivate", "nosuid", "ro", "tmpcopyup", "size=1m"],
        }));
        assert_eq!((&mount["source"], &mount["options"]), (&json!("tmpfs"), &json!(["nosuid", "size=1m"])));
        assert_eq!(
            finish,
            [Finish::CopyUp("/run".into()), Finish::Attributes("/run".into(), libc::MOUNT_ATTR_RDONLY)]
        );
    }

    #[test]
    fn a_container_with_users_of_its_own_gets_the_guests_sysfs() {
        let mut config = json!({
            "ociVersion": "1.0.0",
            "mounts": [{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}],
            "linux": {"namespaces": [{"type": "mount"}]},
        });
        assert_eq!(taken(config.clone()).1["mounts"][0]["type"], "sysfs");
        config["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "user"}]);
        let mount = &taken(config).1["mounts"][0];
        assert_eq!((&mount["type"], &mount["source"]), (&json!("bind"), &json!("/sys")));
        assert_eq!(mount["options"], json!(["ro", "rbind"]));
    }

    #[test]
    fn message_queues_are_the_guests_where_its_ipc_namespace_is_the_containers() {
        let with = |namespaces: Value| {
            let taken = taken(json!({
                "ociVersion": "1.0.2",
                "mounts": [{"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid"]}],
                "linux": {"namespaces": namespaces},
            }));
            taken.1["mounts"][0]["source"].clone()
        };
        assert_eq!(with(json!([{"type": "mount"}])), "mqueue");
        assert_eq!(with(json!([{"type": "mount"}, {"type": "user"}, {"type": "ipc"}])), "mqueue");
        assert_eq!(with(json!([{"type": "mount"}, {"type": "user"}])), GUESTS_QUEUES);
    }

    #[test]
    fn usual_mounts_leave_nothing_to_do() {
        let (finish, spec) = taken(json!({
            "ociVersion": "1.0.0",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755", "ro", "rw"]},
                {"destination": "/v", "type": "bind", "source": "/s", "options": ["rbind", "rslave", "rro"]},
            ],
            "linux": {"rootfsPropagation": "rslave", "readonlyPaths": ["/proc/sys", "/sys/firmware"]},
        }));
        assert_eq!(finish, []);
        assert_eq!(spec["linux"]["rootfsPropagation"], "slave");
        assert_eq!(spec["linux"]["readonlyPaths"], json!(["/proc/sys", "/sys/firmware"]));
        let (finish, spec) = taken(
            json!({"ociVersion": "1.0.0", "linux": {"readonlyPaths": ["/proc/bus", "/opt", "/system"]}}),
        );
        assert_eq!(finish, [Finish::ReadOnly("/opt".into()), Finish::ReadOnly("/system".into())]);
        assert_eq!(spec["linux"]["readonlyPaths"], json!(["/proc/bus"]));
    }
}
