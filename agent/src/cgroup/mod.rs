//! The container's cgroup (cgroup v2): made and limited by the agent before libcontainer puts the process in.
//!
//! All containers live below `/stockade`, which leaves a reserve of memory and pids to the agent: whatever a
//! container without limits of its own does, the agent can still fork, allocate and answer. The agent itself stays
//! in the root cgroup, where the rule that inner cgroups hold no processes does not apply.

mod devices;
mod stats;

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::Pid;
use oci_spec::runtime::LinuxResources;
use stockade_agent_protocol::messages::StatsResponse;
use stockade_agent_protocol::resources;
use tokio::io::Interest;

use crate::descriptor::watch;
use crate::error::Error;

/// Where the file system is mounted. libcontainer looks nowhere else.
pub const ROOT: &str = "/sys/fs/cgroup";
/// Parent of all containers, relative to [`ROOT`].
const PARENT: &str = "/stockade";
/// Memory that containers together cannot take: the agent with thousands of streams needs a few MiB, the kernel
/// keeps its own reserves besides.
const MEMORY_RESERVE: u64 = 16 << 20;
/// The same for pids.
const PIDS_RESERVE: u64 = 256;

/// Makes the parent of all containers.
pub fn prepare() -> Result<(), Error> {
    let controllers = read(Path::new(ROOT), "cgroup.controllers")?;
    let enable: String = controllers.split_ascii_whitespace().map(|c| format!("+{c} ")).collect::<String>();
    let parent = PathBuf::from(format!("{ROOT}{PARENT}"));
    write(Path::new(ROOT), "cgroup.subtree_control", &enable)?;
    fs::create_dir(&parent).map_err(|e| Error::os(format!("making the cgroup {PARENT}"), e))?;
    write(&parent, "cgroup.subtree_control", &enable)?;

    share_memory()?;
    let threads = fs::read_to_string("/proc/sys/kernel/threads-max").ok().and_then(|t| t.trim().parse().ok());
    let pids = fs::read_to_string("/proc/sys/kernel/pid_max").ok().and_then(|t| t.trim().parse().ok());
    let most: u64 = threads.unwrap_or(u64::MAX).min(pids.unwrap_or(u64::MAX));
    if most != u64::MAX && most > 2 * PIDS_RESERVE {
        write(&parent, "pids.max", &(most - PIDS_RESERVE).to_string())?;
    }
    Ok(())
}

/// Lets containers together have the memory that there is now, but for the reserve.
pub fn share_memory() -> Result<(), Error> {
    let memory = nix::sys::sysinfo::sysinfo().map(|s| s.ram_total()).unwrap_or(0);
    if memory > 2 * MEMORY_RESERVE {
        let limit = (memory - MEMORY_RESERVE).to_string();
        write(Path::new(&format!("{ROOT}{PARENT}")), "memory.max", &limit)?;
    }
    Ok(())
}

/// How a cgroup fares at its limit of memory.
#[derive(Debug, Clone, Copy)]
pub struct Pressure {
    /// How often it has met the limit.
    pub limit_met: u64,
    /// The limit in pages.
    pub limit_pages: u64,
    /// Pages of files that are in memory.
    pub file_pages: u64,
    /// How many of them had been there before, and were read again.
    pub refaults: u64,
    /// How often a program had to wait until a page was read.
    pub major_faults: u64,
}

/// One container's cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup {
    /// Relative to [`ROOT`], for the spec.
    pub name: String,
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup of a container; it need not exist.
    pub fn of(container_id: &str) -> Self {
        let name = format!("{PARENT}/{container_id}");
        let path = PathBuf::from(format!("{ROOT}{name}"));
        Self { name, path }
    }

    /// The parent of all containers, whose limit is the memory of the VM.
    pub fn of_all() -> Self {
        Self { name: PARENT.into(), path: PathBuf::from(format!("{ROOT}{PARENT}")) }
    }

    /// One beside the containers', for a process of the guest's own, which nothing holds up; it need not exist.
    pub fn of_guest(exec_id: &str) -> Self {
        let name = format!("/enter-{exec_id}");
        let path = PathBuf::from(format!("{ROOT}{name}"));
        Self { name, path }
    }

    /// Moves this process into it.
    pub fn join(&self) -> io::Result<()> {
        self.write("cgroup.procs", "0")
    }

    /// Makes it, with limits.
    pub fn create(&self, limits: Option<&LinuxResources>) -> Result<(), Error> {
        fs::create_dir(&self.path).map_err(|e| Error::os(format!("making the cgroup {}", self.name), e))?;
        if let Some(limits) = limits {
            self.limit(limits)?;
        }
        // Without a word about devices only those are there that every container has.
        match limits.and_then(|limits| limits.devices().as_ref()) {
            Some(rules) if !rules.is_empty() => Ok(()),
            _ => devices::restrict(&self.path, &[]),
        }
    }

    /// Gives it to a user, as far as it is for others to have (cgroups(7), "Delegating a cgroup").
    pub fn give_to(&self, uid: u32) -> Result<(), Error> {
        let names = fs::read_to_string("/sys/kernel/cgroup/delegate").unwrap_or_default();
        for name in std::iter::once("").chain(names.lines()) {
            match chown(self.path.join(name), Some(uid), None) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::os(
                        format!("giving the cgroup {}/{name} to user {uid}", self.name),
                        e,
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Applies limits.
    pub fn limit(&self, limits: &LinuxResources) -> Result<(), Error> {
        let settings = resources::settings(limits).map_err(|refused| Error::Invalid(refused.to_string()))?;
        self.check_before_update(limits)?;
        for setting in settings {
            if setting.only_if_present && !self.path.join(&setting.file).exists() {
                continue;
            }
            self.write(&setting.file, &setting.value).map_err(|e| {
                Error::Invalid(format!(
                    "{} cannot be applied ({} = {:?}): {e}",
                    setting.field, setting.file, setting.value
                ))
            })?;
        }
        match limits.devices() {
            Some(rules) if !rules.is_empty() => devices::restrict(&self.path, rules),
            _ => Ok(()),
        }
    }

    /// A limit below what is in use makes the kernel kill; who asked to be told instead is told.
    fn check_before_update(&self, limits: &LinuxResources) -> Result<(), Error> {
        let Some(memory) = limits.memory().as_ref().filter(|m| m.check_before_update() == Some(true)) else {
            return Ok(());
        };
        let used: i64 = read(&self.path, "memory.current")?.trim().parse().unwrap_or(0);
        match memory.limit() {
            Some(limit) if limit > 0 && limit < used => Err(Error::Invalid(format!(
                "linux.resources.memory.limit cannot be set to {limit}: {used} bytes are in use, and checkBeforeUpdate asks"
            ))),
            _ => Ok(()),
        }
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        write_file(&self.path.join(file), value)
    }

    /// Where below it a further process has to be put: nowhere while it can have processes itself. One that passes
    /// controllers on to cgroups below cannot, as under an init such as systemd; then it is where that init is.
    pub fn place_beside(&self, init: Pid) -> Option<String> {
        let passed_on = fs::read(self.path.join("cgroup.subtree_control")).ok()?;
        if passed_on.trim_ascii().is_empty() {
            return None;
        }
        let of_init = fs::read_to_string(format!("/proc/{init}/cgroup")).ok()?;
        below(&of_init, &self.name)
    }

    /// Whether this process could join it or a cgroup below it, and why not. Afterwards it is where the agent is.
    pub fn try_to_join(&self, below: Option<&str>) -> Result<(), String> {
        let procs = self.path.join(below.unwrap_or("")).join("cgroup.procs");
        let here = Path::new(ROOT).join("cgroup.procs");
        write_file(&procs, "0").and_then(|()| write_file(&here, "0")).map_err(|e| {
            let why = e.raw_os_error().map_or(e.to_string(), |e| Errno::from_raw(e).desc().to_lowercase());
            format!("adding pid {} to cgroups {}: {why}", Pid::this(), procs.display())
        })
    }

    /// Ends every process in it and below.
    pub fn kill(&self) -> Result<(), Error> {
        match self.write("cgroup.kill", "1") {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(|e| Error::os("killing all processes of the container", e)),
        }
    }

    /// Freezes or thaws every process in it, and waits until that is so.
    pub async fn freeze(&self, frozen: bool) -> Result<(), Error> {
        let failed =
            |e| Error::os(if frozen { "freezing the container" } else { "thawing the container" }, e);
        self.write("cgroup.freeze", if frozen { "1" } else { "0" }).map_err(failed)?;
        self.wait_for_event(if frozen { "frozen 1" } else { "frozen 0" }).await.map_err(failed)
    }

    /// It was frozen by [`freeze`](Self::freeze).
    pub fn is_frozen(&self) -> bool {
        fs::read(self.path.join("cgroup.freeze")).is_ok_and(|text| text.trim_ascii() == b"1")
    }

    /// Waits until `cgroup.events` has the line `wanted`. The kernel flags changes as priority data.
    async fn wait_for_event(&self, wanted: &str) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let file = fs::File::open(self.path.join("cgroup.events"))?;
        let read = |file: &fs::File| -> io::Result<bool> {
            let mut buf = [0; 128];
            let n = file.read_at(&mut buf, 0)?;
            Ok(buf[..n].split(|&b| b == b'\n').any(|line| line == wanted.as_bytes()))
        };
        if read(&file)? {
            return Ok(());
        }
        let watched = watch(OwnedFd::from(file.try_clone()?), Interest::PRIORITY)?;
        loop {
            // The file must be read through the watched open file for the next change to be flagged.
            if read(&file)? {
                return Ok(());
            }
            watched.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }

    /// Removes it with what is below, once the processes in it are gone.
    pub async fn remove(&self) -> Result<(), Error> {
        let failed = |e| Error::os(format!("removing the cgroup {}", self.name), e);
        loop {
            match remove_tree(&self.path) {
                Err(e) if e.raw_os_error() == Some(Errno::EBUSY as i32) => {
                    self.wait_for_event("populated 0").await.map_err(failed)?;
                }
                result => return result.map_err(failed),
            }
        }
    }

    /// Pids of every process in it and below, in the agent's pid namespace.
    pub fn pids(&self) -> Result<Vec<Pid>, Error> {
        let mut pids = Vec::new();
        collect_pids(&self.path, &mut pids).map_err(|e| Error::os("listing the container's processes", e))?;
        Ok(pids)
    }

    /// How many of its processes the OOM killer has ended; 0 if it cannot be told.
    pub fn oom_kills(&self) -> u64 {
        fs::read_to_string(self.events_file()).map(|text| stats::field(&text, "oom_kill")).unwrap_or(0)
    }

    /// What tells whether it can do anything but make room.
    pub fn pressure(&self) -> Result<Pressure, Error> {
        let text = |file| read(&self.path, file);
        let stat = text("memory.stat")?;
        let page = 4096;
        Ok(Pressure {
            // Its own limit, not that of a cgroup below.
            limit_met: stats::field(&text("memory.events.local")?, "max"),
            limit_pages: text("memory.max")?.trim().parse().map_or(u64::MAX, |bytes: u64| bytes / page),
            file_pages: (stats::field(&stat, "active_file") + stats::field(&stat, "inactive_file")) / page,
            refaults: stats::field(&stat, "workingset_refault_file"),
            major_faults: stats::field(&stat, "pgmajfault"),
        })
    }

    /// Has the kernel's OOM killer choose one of its processes: by a limit, for a moment, that cannot be kept. Takes
    /// as long as that.
    pub fn kill_one_for_memory(&self) -> Result<(), Error> {
        const BELOW: u64 = 1 << 20;
        let limit = read(&self.path, "memory.max")?;
        let used: u64 = read(&self.path, "memory.current")?.trim().parse().unwrap_or(0);
        let stat = read(&self.path, "memory.stat")?;
        let files = stats::field(&stat, "active_file") + stats::field(&stat, "inactive_file");
        let lower = used.saturating_sub(files).saturating_sub(BELOW).to_string();
        write(&self.path, "memory.max", &lower)?;
        // Unless somebody has set another one meanwhile.
        if read(&self.path, "memory.max")?.trim() == rounded(&lower) {
            write(&self.path, "memory.max", limit.trim())?;
        }
        Ok(())
    }

    /// The file that changes when memory runs out.
    pub fn events_file(&self) -> PathBuf {
        self.path.join("memory.events")
    }

    /// What its processes use.
    pub fn stats(&self) -> Result<StatsResponse, Error> {
        stats::read(|file| read(&self.path, file))
    }
}

/// A limit as the kernel shows it: in whole pages.
fn rounded(bytes: &str) -> String {
    let bytes: u64 = bytes.parse().unwrap_or(0);
    (bytes / 4096 * 4096).to_string()
}

fn write_file(path: &Path, value: &str) -> io::Result<()> {
    // One write call: the kernel takes each as a whole setting.
    fs::File::options().write(true).open(path)?.write_all(value.as_bytes())
}

fn write(dir: &Path, file: &str, value: &str) -> Result<(), Error> {
    let path = dir.join(file);
    write_file(&path, value).map_err(|e| Error::os(format!("writing {value:?} to {}", path.display()), e))
}

fn read(dir: &Path, file: &str) -> Result<String, Error> {
    let path = dir.join(file);
    fs::read_to_string(&path).map_err(|e| Error::os(format!("reading {}", path.display()), e))
}

/// A cgroup directory's files go with it; only its child cgroups must go first.
fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e)
            if e.raw_os_error() != Some(Errno::EBUSY as i32)
                && e.raw_os_error() != Some(Errno::ENOTEMPTY as i32) =>
        {
            return Err(e);
        }
        Err(_) => {}
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

fn collect_pids(path: &Path, pids: &mut Vec<Pid>) -> io::Result<()> {
    // A threaded cgroup below refuses to list processes; they are listed at the root of its domain.
    if let Ok(text) = fs::read_to_string(path.join("cgroup.procs")) {
        // 0 stands for a process that is not in our pid namespace; there is none above the agent's.
        pids.extend(text.lines().filter_map(|l| l.parse().ok()).filter(|&p| p > 0).map(Pid::from_raw));
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect_pids(&entry.path(), pids)?;
        }
    }
    Ok(())
}

/// From /proc/PID/cgroup the cgroup's path relative to `name`; none if that is it, or it is not below.
fn below(of_process: &str, name: &str) -> Option<String> {
    let path = of_process.lines().find_map(|line| line.strip_prefix("0::"))?;
    let below = path.strip_prefix(name)?.strip_prefix('/')?;
    (!below.is_empty()).then(|| below.to_owned())
}

#[cfg(test)]
mod tests {
    use super::below;

    #[test]
    fn a_cgroup_below_is_one_with_more_to_its_path() {
        assert_eq!(below("0::/stockade/c1/init.scope\n", "/stockade/c1"), Some("init.scope".into()));
        assert_eq!(below("0::/stockade/c1/a/b\n", "/stockade/c1"), Some("a/b".into()));
        for other in ["0::/stockade/c1\n", "0::/stockade/c10/x\n", "0::/\n", "1:cpu:/stockade/c1/x\n", ""] {
            assert_eq!(below(other, "/stockade/c1"), None, "{other}");
        }
    }
}
