//! The sandbox's cgroup on the host (cgroup v2): the supervisor lives in it and the VMM in one of its own below, and the
//! guest's memory is accounted there. The VMM's has no controller, so that the limits are those of both, but the VMM can
//! be told from the supervisor, and be killed or frozen with all that it might have become.
//!
//! It is the one that `linux.cgroupsPath` names. Where a bundle names none there is none, unless it asks for limits:
//! then it is where runc would make it. Limits are those of the workload and what the VM needs besides, so that the
//! guest's own OOM killer and scheduler act first. `delete` removes it, from the state alone; the parents that had to be
//! made stay, as under runc. Where systemd runs the host and the path has its form, it is systemd that makes it.
//!
//! A path does not say whose the directory there is: it may have been left by one sandbox and taken by the next. So it
//! bears a mark of the sandbox that lives in it, and only what bears a sandbox's mark is killed for it.

mod limits;
mod systemd;

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use oci_spec::runtime::{LinuxResources, Spec};
use rustix::fs::{XattrFlags, getxattr, setxattr};

use crate::process::ProcessId;
use crate::size::VmSize;
use limits::{Setting, block_io, memory_max, settings};

/// Where the file system is mounted, on every host.
const ROOT: &str = "/sys/fs/cgroup";
/// Where systemd has what names no slice.
const DEFAULT_SLICE: &str = "system.slice";
/// The VMM's, below it.
const VMM: &str = "vmm";
/// Extended attribute of a sandbox's: which process is its supervisor. Of the kind that only root can set and see.
const MARK: &str = "trusted.stockade";
/// Longer than any mark.
const MARK_MAX: usize = 64;
/// How long the kernel may take to see that a cgroup whose processes have ended is empty.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(5);

/// Errors of the host's cgroup.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the path is none
    #[error("linux.cgroupsPath is {0:?}: with --systemd-cgroup write slice:prefix:name")]
    Path(String),
    /// the host cannot do it
    #[error("linux.resources.{field} cannot be honoured: {why}; remove it")]
    NoCgroup { field: &'static str, why: &'static str },
    /// somebody else's
    #[error(
        "container's cgroup is not empty: name another in linux.cgroupsPath than {0}, or end what is in it"
    )]
    NotEmpty(PathBuf),
    /// nothing would run in it
    #[error("container's cgroup unexpectedly frozen: thaw {0}, or name another in linux.cgroupsPath")]
    Frozen(PathBuf),
    /// a limit cannot be applied
    #[error("{field} cannot be applied on the host ({file} = {value:?}): {source}")]
    Limit { field: &'static str, file: String, value: String, source: io::Error },
    /// systemd does not do as asked
    #[error("systemd cannot {what} {unit}, which linux.cgroupsPath names: {why}")]
    Systemd { what: &'static str, unit: String, why: String },
    /// an operation failed
    #[error("cannot {0} the cgroup {1}: {2}")]
    Io(&'static str, PathBuf, #[source] io::Error),
}

/// Where a sandbox is to live.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// Where its caller does.
    Callers,
    /// In a cgroup of its own, by its absolute path.
    Own(PathBuf),
    /// In a scope of systemd's, by its cgroup's absolute path and the slice.
    Scope(PathBuf, String),
}

impl Place {
    /// Its cgroup, if it is to have one of its own.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Place::Callers => None,
            Place::Own(path) | Place::Scope(path, _) => Some(path),
        }
    }
}

/// Finds the place for a sandbox with this configuration and these limits. `systemd` says that its path has systemd's
/// form.
pub fn place(spec: &Spec, limits: &LinuxResources, id: &str, systemd: bool) -> Result<Place, Error> {
    let named = named(spec);
    let wanted = only_on_host(limits);
    if named.as_os_str().is_empty() && !any(limits) {
        return Ok(Place::Callers);
    }
    let why = if !matches!(statfs(ROOT), Ok(found) if found.filesystem_type() == CGROUP2_SUPER_MAGIC) {
        "the host has no cgroup v2 at /sys/fs/cgroup"
    } else if systemd && systemd::runs_the_host() {
        let path = path(named, id, systemd)?;
        if path.extension().is_some_and(|kind| kind == "scope") {
            return Ok(Place::Scope(path, slice(named)));
        }
        "systemd has no processes in a slice itself; name a scope in linux.cgroupsPath"
    } else {
        return path(named, id, systemd).map(Place::Own);
    };
    if let Some(field) = wanted.filter(|field| *field != "cpu.cpus") {
        return Err(Error::NoCgroup { field, why });
    }
    tracing::warn!("the sandbox stays in its caller's cgroup: {why}");
    Ok(Place::Callers)
}

fn named(spec: &Spec) -> &Path {
    let linux = spec.linux().as_ref();
    linux.and_then(|linux| linux.cgroups_path().as_deref()).unwrap_or(Path::new(""))
}

/// Whether a configuration names a cgroup in systemd's form, for callers that do not say which it is.
pub fn is_systemd_path(spec: &Spec) -> bool {
    let named = named(spec).to_string_lossy();
    !named.contains('/') && named.split(':').count() == 3
}

/// Whether there are limits at all.
fn any(limits: &LinuxResources) -> bool {
    let vm = VmSize { vcpus: 1, memory: 0 };
    let is_some = |map: Option<usize>| map.is_some_and(|len| len > 0);
    !settings(limits, vm).is_empty()
        || limits.pids().is_some()
        || is_some(limits.unified().as_ref().map(|unified| unified.len()))
}

/// The first limit that only the host can set.
pub fn only_on_host(limits: &LinuxResources) -> Option<&'static str> {
    let cpu = limits.cpu().as_ref();
    let is_list = |list: Option<&String>| list.is_some_and(|list| !list.trim().is_empty());
    if limits.block_io().as_ref().is_some_and(|io| !block_io(io).is_empty()) {
        Some("blockIO")
    } else if is_list(cpu.and_then(|cpu| cpu.mems().as_ref())) {
        Some("cpu.mems")
    } else if is_list(cpu.and_then(|cpu| cpu.cpus().as_ref())) {
        Some("cpu.cpus")
    } else {
        None
    }
}

fn path(named: &Path, id: &str, systemd: bool) -> Result<PathBuf, Error> {
    if systemd {
        let relative = systemd_path(&named.to_string_lossy(), id);
        return Ok(Path::new(ROOT).join(relative.ok_or_else(|| Error::Path(named.display().to_string()))?));
    }
    let named = if named.as_os_str().is_empty() { Path::new(id) } else { named };
    if named.is_absolute() {
        return Ok(below(Path::new(ROOT), named));
    }
    Ok(below(beside(&own()?), named))
}

/// Where runc puts a cgroup whose path is relative: beside that of the caller, which has processes and so no children.
/// The root, which may have both, has nothing beside it.
fn beside(own: &Path) -> &Path {
    let root = Path::new(ROOT);
    own.parent().filter(|parent| parent.starts_with(root)).unwrap_or(root)
}

/// Joins, without ever leaving `root`.
fn below(root: &Path, path: &Path) -> PathBuf {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name),
            Component::ParentDir => drop(names.pop()),
            _ => {}
        }
    }
    names.into_iter().fold(root.to_owned(), |path, name| path.join(name))
}

/// The slice of a path in systemd's form.
fn slice(named: &Path) -> String {
    let named = named.to_string_lossy();
    let slice = named.split(':').next().unwrap_or_default();
    if slice.is_empty() { DEFAULT_SLICE.into() } else { slice.into() }
}

/// `slice:prefix:name` as systemd lays it out: `a-b.slice` lies in `a.slice`, and the unit is `prefix-name.scope`.
fn systemd_path(named: &str, id: &str) -> Option<PathBuf> {
    let parts: Vec<&str> =
        if named.is_empty() { vec!["", "stockade", id] } else { named.split(':').collect() };
    let [slice, prefix, name] = parts[..] else { return None };
    let slice = if slice.is_empty() { DEFAULT_SLICE } else { slice };
    let stem = slice.strip_suffix(".slice")?;
    let valid = |part: &str| !part.contains('/') && !part.starts_with('.');
    if ![slice, prefix, name].into_iter().all(valid) || name.is_empty() {
        return None;
    }
    let mut path = PathBuf::new();
    // The root slice is called "-".
    if stem != "-" {
        let mut so_far = String::new();
        for word in stem.split('-') {
            if word.is_empty() {
                return None;
            }
            so_far = if so_far.is_empty() { word.into() } else { format!("{so_far}-{word}") };
            path.push(format!("{so_far}.slice"));
        }
    }
    path.push(match (prefix, name) {
        (_, name) if name.ends_with(".slice") => name.to_owned(),
        ("", name) => format!("{name}.scope"),
        (prefix, name) => format!("{prefix}-{name}.scope"),
    });
    Some(path)
}

/// This process's cgroup, by its absolute path.
fn own() -> Result<PathBuf, Error> {
    let failed = |e| Error::Io("find", PathBuf::from("/proc/self/cgroup"), e);
    let text = fs::read_to_string("/proc/self/cgroup").map_err(failed)?;
    let line = text.lines().find_map(|line| line.strip_prefix("0::"));
    let line = line.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    Ok(below(Path::new(ROOT), Path::new(line)))
}

/// A sandbox's cgroup with this process in it. Dropping it leaves and removes it, unless that is left to `delete`.
#[derive(Debug)]
pub struct Membership {
    path: PathBuf,
    came_from: PathBuf,
    owner: ProcessId,
    ours: Cell<bool>,
}

impl Membership {
    /// Makes the cgroup of a place, if it has one, with its limits, and moves this process there. What it starts from
    /// then on is there too. `owner` is this process.
    pub fn enter(
        place: Place,
        limits: &LinuxResources,
        vm: VmSize,
        owner: ProcessId,
    ) -> Result<Option<Self>, Error> {
        let came_from = own()?;
        let in_it = |path: PathBuf| {
            mark(&path, owner);
            Membership { path, came_from, owner, ours: Cell::new(true) }
        };
        match place {
            Place::Callers => Ok(None),
            Place::Own(path) => {
                make(&path)?;
                let membership = in_it(path);
                write(&membership.path, &settings(limits, vm))?;
                join(&membership.path)?;
                Ok(Some(membership))
            }
            Place::Scope(path, slice) => {
                let settings = settings(limits, vm);
                let unit = scope(&path).unwrap_or_default();
                // One with processes in it is a unit, or somebody's whom systemd does not know; it says so itself.
                if is_populated(&path).is_ok_and(|populated| !populated) {
                    refuse_frozen(&path)?;
                }
                systemd::start(&slice, &unit, &settings)?;
                let here = own()?;
                let membership = in_it(path);
                if here != membership.path {
                    let why = format!(
                        "this process is in {}, not in {}",
                        here.display(),
                        membership.path.display()
                    );
                    return Err(Error::Systemd { what: "start", unit, why });
                }
                pass_controllers_to(&membership.path);
                write(&membership.path, &settings)?;
                Ok(Some(membership))
            }
        }
    }

    /// The cgroup.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the cgroup in which the VMM is to begin.
    pub fn make_for_vmm(&self) -> Result<OwnedFd, Error> {
        let path = self.path.join(VMM);
        let failed = |e| Error::Io("make", path.clone(), e);
        match fs::create_dir(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(e)),
            _ => {}
        }
        Ok(File::open(&path).map_err(failed)?.into())
    }

    /// Leaves its removal to `delete`.
    pub fn keep(&self) {
        self.ours.set(false);
    }

    /// Goes back to where this process came from and removes the cgroup, whose other processes have ended.
    pub fn leave(&self) {
        if !self.ours.replace(false) {
            return;
        }
        // Where it came from may be gone, as a session is whose user has left. The root is always there.
        let left = join(&self.came_from).or_else(|_| join(Path::new(ROOT)));
        if let Err(e) = left.and_then(|()| remove(&self.path, self.owner)) {
            tracing::warn!("{e}");
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A host on which it cannot be set misses it only where a hook leaves something behind.
fn mark(path: &Path, owner: ProcessId) {
    if let Err(e) = setxattr(path, MARK, mark_of(owner).as_bytes(), XattrFlags::empty()) {
        tracing::debug!("cannot mark the cgroup {}: {e}", path.display());
    }
}

fn mark_of(owner: ProcessId) -> String {
    format!("{} {}", owner.pid, owner.start)
}

/// Whose a cgroup is.
#[derive(Debug, PartialEq, Eq)]
enum Whose {
    /// That sandbox's, or it is gone.
    Its,
    /// Another sandbox's.
    Anothers,
    /// No sandbox's that has left a mark.
    Nobodys,
}

fn whose(path: &Path, owner: ProcessId) -> Whose {
    let mut found = [0; MARK_MAX];
    match getxattr(path, MARK, &mut found[..]) {
        Ok(len) if found[..len] == *mark_of(owner).as_bytes() => Whose::Its,
        Ok(_) => Whose::Anothers,
        Err(rustix::io::Errno::NOENT) => Whose::Its,
        Err(_) => Whose::Nobodys,
    }
}

fn join(path: &Path) -> Result<(), Error> {
    fs::write(path.join("cgroup.procs"), "0").map_err(|e| Error::Io("enter", path.to_owned(), e))
}

fn make(path: &Path) -> Result<(), Error> {
    let failed = |e| Error::Io("make", path.to_owned(), e);
    let parent = path.parent().unwrap_or(Path::new(ROOT));
    fs::create_dir_all(parent).map_err(failed)?;
    pass_controllers_to(path);
    match fs::create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => match is_populated(path).map_err(failed)? {
            true => Err(Error::NotEmpty(path.to_owned())),
            false => refuse_frozen(path),
        },
        made => made.map_err(failed),
    }
}

fn is_populated(path: &Path) -> io::Result<bool> {
    let events = fs::read_to_string(path.join("cgroup.events"))?;
    Ok(!events.lines().any(|line| line == "populated 0"))
}

/// Who entered a frozen one would stand still.
fn refuse_frozen(path: &Path) -> Result<(), Error> {
    let frozen = fs::read(path.join("cgroup.freeze")).is_ok_and(|text| text.trim_ascii() == b"1");
    if frozen { Err(Error::Frozen(path.to_owned())) } else { Ok(()) }
}

/// Lets a cgroup have every controller there is, as runc does.
fn pass_controllers_to(path: &Path) {
    let mut ancestors: Vec<&Path> =
        path.ancestors().skip(1).take_while(|dir| dir.starts_with(ROOT)).collect();
    ancestors.reverse();
    for dir in ancestors {
        pass_controllers_on(dir);
    }
}

fn pass_controllers_on(dir: &Path) {
    let controllers = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    let words: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    let file = dir.join("cgroup.subtree_control");
    if fs::write(&file, words.join(" ")).is_err() {
        for word in words {
            // One that cannot be had is missed only by the limit that needs it, which then says so.
            let _ = fs::write(&file, word);
        }
    }
}

/// Applies the host's part of new limits, with what the VM needs on top.
pub fn apply(path: &Path, limits: &LinuxResources, vm: VmSize) -> Result<(), Error> {
    let settings = settings(limits, vm);
    if let Some(scope) = scope(path) {
        systemd::set(&scope, &in_hierarchy(path), &settings)?;
    }
    write(path, &settings)
}

/// Has the host's limit of memory, where there is one, be right for a VM of this size.
pub fn follow(path: &Path, vm: VmSize) -> Result<(), Error> {
    let now = fs::read_to_string(path.join("memory.max")).unwrap_or_default();
    if now.trim().parse::<u64>().is_err() {
        return Ok(());
    }
    let settings = [memory_max(vm)];
    if let Some(scope) = scope(path) {
        systemd::set(&scope, &in_hierarchy(path), &settings)?;
    }
    write(path, &settings)
}

/// The name of the scope that a cgroup may be of.
fn scope(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    (name.ends_with(".scope") && systemd::runs_the_host()).then(|| name.to_owned())
}

/// A cgroup as the kernel and systemd call it: from the root of the hierarchy.
fn in_hierarchy(path: &Path) -> String {
    Path::new("/").join(path.strip_prefix(ROOT).unwrap_or(path)).display().to_string()
}

fn write(path: &Path, settings: &[Setting]) -> Result<(), Error> {
    for Setting { field, file, value, bfq } in settings {
        // Schedulers of block devices have a file each; which of them a host uses is not the bundle's business.
        let (file, value) = match bfq {
            Some(value) if path.join("io.bfq.weight").exists() => ("io.bfq.weight", value),
            _ => (*file, value),
        };
        let failed = |source| Error::Limit { field, file: file.into(), value: value.clone(), source };
        fs::write(path.join(file), value).map_err(failed)?;
    }
    Ok(())
}

/// Removes the cgroup of a sandbox whose processes have ended, of which `owner` was the supervisor. One that is gone is
/// fine; what a hook has left in it is ended. What somebody else lives in by now is left alone.
pub fn remove(path: &Path, owner: ProcessId) -> Result<(), Error> {
    match whose(path, owner) {
        Whose::Its => {}
        Whose::Anothers => return Ok(()),
        // The sandbox did not come to live in it, or is one of an earlier version.
        Whose::Nobodys => return remove_one(&path.join(VMM), false).and_then(|()| remove_one(path, false)),
    }
    remove_one(&path.join(VMM), true)?;
    if let Some(scope) = scope(path) {
        systemd::stop(&scope, &in_hierarchy(path))?;
    }
    remove_one(path, true)
}

fn remove_one(path: &Path, kill: bool) -> Result<(), Error> {
    let begin = Instant::now();
    loop {
        match fs::remove_dir(path).map_err(|e| (e.raw_os_error().map(Errno::from_raw), e)) {
            Ok(()) | Err((Some(Errno::ENOENT), _)) => return Ok(()),
            Err((Some(Errno::EBUSY), _)) if begin.elapsed() < EMPTY_TIMEOUT => {
                if kill {
                    // Without it (before Linux 5.14) only the wait is left.
                    let _ = fs::write(path.join("cgroup.kill"), "1");
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            Err((Some(Errno::EBUSY), _)) if !kill => {
                tracing::warn!("the cgroup {} stays: others live in it", path.display());
                return Ok(());
            }
            Err((_, e)) => return Err(Error::Io("remove", path.to_owned(), e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::tests::bundle;
    use serde_json::json;

    #[test]
    fn a_relative_path_is_beside_the_callers_cgroup_and_never_outside_of_the_hierarchy() {
        for (own, parent) in [
            ("/sys/fs/cgroup", "/sys/fs/cgroup"),
            ("/sys/fs/cgroup/user", "/sys/fs/cgroup"),
            ("/sys/fs/cgroup/system.slice/ssh", "/sys/fs/cgroup/system.slice"),
        ] {
            assert_eq!(beside(Path::new(own)), Path::new(parent), "{own}");
        }
    }

    #[test]
    fn paths_are_those_of_runc_and_never_leave_the_file_system() {
        let at =
            |named: &str, systemd| path(Path::new(named), "c1", systemd).map(|p| p.display().to_string());
        assert_eq!(at("/libpod_parent/libpod-1", false).unwrap(), "/sys/fs/cgroup/libpod_parent/libpod-1");
        assert_eq!(at("/../../etc/./x", false).unwrap(), "/sys/fs/cgroup/etc/x");
        assert_eq!(
            at("system.slice:docker:1f", true).unwrap(),
            "/sys/fs/cgroup/system.slice/docker-1f.scope"
        );
        assert_eq!(
            at("kubepods-burstable-pod1.slice:cri:2", true).unwrap(),
            "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-2.scope"
        );
        assert_eq!(at("-.slice::x", true).unwrap(), "/sys/fs/cgroup/x.scope");
        assert_eq!(at("", true).unwrap(), "/sys/fs/cgroup/system.slice/stockade-c1.scope");
        for bad in
            ["/a/b", "a:b", "a:b:c", "a.slice:b:../c", "a.slice:b:", "a--b.slice:b:c", "../x.slice:a:b"]
        {
            assert!(matches!(at(bad, true), Err(Error::Path(_))), "{bad}");
        }
    }

    #[test]
    fn only_who_needs_a_cgroup_of_the_host_gets_one() {
        let place_of = |changes| {
            let bundle = bundle(changes).1.unwrap();
            place(&bundle.spec, &bundle.limits(), "c1", false)
        };
        assert_eq!(place_of(json!({})).unwrap(), Place::Callers);
        let none = json!({"memory": {}, "cpu": {"cpus": ""}, "blockIO": {"weight": 0}, "devices": [{"allow": false}]});
        assert_eq!(place_of(json!({"linux": {"resources": none}})).unwrap(), Place::Callers);
        for limits in [
            json!({"memory": {"limit": 99 << 20}}),
            json!({"cpu": {"quota": 5000}}),
            json!({"pids": {"limit": 5}}),
            json!({"unified": {"pids.max": "5"}}),
        ] {
            assert!(any(&serde_json::from_value(limits.clone()).unwrap()), "{limits}");
        }
        for (limits, field) in [
            (json!({"blockIO": {"weight": 10}}), "blockIO"),
            (json!({"cpu": {"mems": "0"}}), "cpu.mems"),
            (json!({"cpu": {"cpus": "0"}}), "cpu.cpus"),
        ] {
            assert_eq!(only_on_host(&serde_json::from_value(limits).unwrap()), Some(field));
        }
    }
}
