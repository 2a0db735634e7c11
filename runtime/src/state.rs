//! What is known of a container between commands: one directory a container below the state root.
//!
//! `<root>/<id>/` holds `state.json`, the supervisor's `control.sock` and the mount point `share`, nothing else.
//! Making the directory is what reserves an id. `state.json` is replaced by rename, so a reader sees the old or
//! the new one, never half of it; it holds enough to clean up after a supervisor that was killed at any moment.
//! Only known names are ever removed, never a tree: no mistake here can reach a bundle's files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, Flock, FlockArg, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fstat, stat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};
use stockade_agent_protocol::check_id;

use crate::bundle::Hook;
use crate::network;
use crate::process::ProcessId;
use crate::size::VmSize;

/// Where state lies unless `--root` says otherwise.
pub const DEFAULT_ROOT: &str = "/run/stockade";
/// How the sandbox came up, once a container of it has run.
pub const TIMELINE: &str = "timeline.json";
/// What the guest has said on its console, if anything: the last of it, and what came before.
pub const CONSOLE: [&str; 2] = ["console", "console.1"];
/// Name of the control socket in a container's directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Name of the share's mount point there.
pub const SHARE: &str = "share";
/// Files of a pod there that its containers are shown in /etc, where the engine makes none.
pub const POD_FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];
/// The directory there that stands for such a pod's shared memory.
pub const POD_SHM: &str = "shm";

/// Name of the state in a container's directory.
pub const FILE: &str = "state.json";
const NEW_FILE: &str = "state.json.new";
/// An id becomes the name of a directory, and Linux allows 255 bytes for one (NAME_MAX).
const ID_MAX: usize = 255;
/// How much of a bad id an error shows, in characters.
const ID_SHOWN: usize = 80;

/// Where a container is in its life, in the words of the runtime specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The VM is being set up.
    Creating,
    /// The workload waits for `start`.
    Created,
    /// The workload runs.
    Running,
    /// The workload is frozen.
    Paused,
    /// The workload has ended.
    Stopped,
}

impl Status {
    /// The word of the runtime specification.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}

/// The contents of `state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Version of the runtime specification that the bundle names.
    pub oci_version: String,
    /// The container's id.
    pub id: String,
    /// As the supervisor last wrote it; see [`State::status`].
    pub status: Status,
    /// The container's host process.
    pub supervisor: ProcessId,
    /// The VMM, once it has been started; that of another container's VM is not named.
    pub vmm: Option<ProcessId>,
    /// The container whose VM it lives in, if that was not made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Absolute path of the root filesystem.
    pub rootfs: PathBuf,
    /// When the container was created, RFC 3339.
    pub created: String,
    /// uid of who created it.
    pub owner: u32,
    /// The bundle's annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Why its sandbox ended before the workload did, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The sandbox's cgroup on the host, if it has one, by its absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<PathBuf>,
    /// The limits in force: the bundle's, with what `update` changed.
    #[serde(default)]
    pub resources: LinuxResources,
    /// The VM, as large as it is now.
    pub vm: VmSize,
    /// Directory in the image store that goes with the container, if it was made from an image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<PathBuf>,
    /// What of the network is to be taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<network::Record>,
    /// Hooks that `delete` runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub poststop: Vec<Hook>,
}

impl State {
    /// The status as it is now: whatever the file says, without a supervisor there is no container.
    pub fn status(&self) -> Status {
        if self.supervisor.is_alive() { self.status } else { Status::Stopped }
    }

    /// The state as the runtime specification has it, for hooks.
    pub fn to_oci_json(&self) -> Vec<u8> {
        serde_json::json!({
            "ociVersion": self.oci_version,
            "id": self.id,
            "status": self.status,
            "pid": self.supervisor.pid,
            "bundle": self.bundle,
            "annotations": self.annotations,
        })
        .to_string()
        .into_bytes()
    }
}

/// Errors of the state directory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the id cannot be one
    #[error("invalid container ID format: {id:?}, choose another: {reason}")]
    Id { id: String, reason: String },
    /// the id is taken
    #[error(
        "container with given ID already exists: {id} in {root}; choose another, or remove it with `stockade delete {id}`"
    )]
    Exists { id: String, root: String },
    /// there is no such container
    #[error("container {id} does not exist in {root}: `stockade list` shows those that do")]
    Missing { id: String, root: String },
    /// the directory exists but holds no state
    #[error(
        "container {0} has no state, its creation was cut short: remove it with `stockade delete --force {0}`"
    )]
    Unfinished(String),
    /// the file is not what we wrote
    #[error("{0} is damaged: {1}")]
    Damaged(PathBuf, #[source] serde_json::Error),
    /// an operation on the directory failed
    #[error("cannot {0} {1}: {2}")]
    Io(&'static str, PathBuf, #[source] io::Error),
}

/// One container's directory.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    dir: OwnedFd,
}

impl StateDir {
    /// Reserves an id: makes its directory, which must not exist.
    pub fn create(root: &Path, id: &str) -> Result<Self, Error> {
        check(id)?;
        let path = root.join(id);
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700);
        let made = match builder.create(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => builder
                .recursive(true)
                .create(root)
                .and_then(|()| fs::DirBuilder::new().mode(0o700).create(&path)),
            other => other,
        };
        match made {
            Ok(()) => Self::open_at(path),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                Err(Error::Exists { id: id.into(), root: root.display().to_string() })
            }
            Err(e) => Err(Error::Io("create", path, e)),
        }
    }

    /// The directory of a container that exists.
    pub fn open(root: &Path, id: &str) -> Result<Self, Error> {
        check(id)?;
        Self::open_at(root.join(id)).map_err(|e| match e {
            Error::Io(_, _, e) if e.kind() == io::ErrorKind::NotFound => {
                Error::Missing { id: id.into(), root: root.display().to_string() }
            }
            other => other,
        })
    }

    fn open_at(path: PathBuf) -> Result<Self, Error> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        match openat(AT_FDCWD, &path, flags, Mode::empty()) {
            Ok(dir) => Ok(StateDir { path, dir }),
            Err(e) => Err(Error::Io("open", path, e.into())),
        }
    }

    /// All ids below a root, sorted. A root that does not exist has none.
    pub fn list(root: &Path) -> Result<Vec<String>, Error> {
        let failed = |e| Error::Io("list", root.to_owned(), e);
        let entries = match fs::read_dir(root) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed)?,
        };
        let mut ids = Vec::new();
        for entry in entries {
            if let Ok(name) = entry.map_err(failed)?.file_name().into_string()
                && check(&name).is_ok()
            {
                ids.push(name);
            }
        }
        ids.sort();
        Ok(ids)
    }

    /// The directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path to an entry that is short enough for a socket address, whatever the root and the id are.
    pub fn short_path(&self, name: &str) -> PathBuf {
        use std::os::fd::AsRawFd;
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.dir.as_raw_fd()))
    }

    /// Waits until no other command changes this container, and keeps others out until the result is dropped. Who had it
    /// before may have removed it: then it does not exist, whatever bears its id by now.
    pub fn lock(&self) -> Result<Flock<OwnedFd>, Error> {
        let failed = |e: io::Error| Error::Io("lock", self.path.clone(), e);
        let mut dir = self.dir.try_clone().map_err(failed)?;
        loop {
            // A lock belongs to the open file, which a clone shares: open the directory once more.
            dir = openat(&dir, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
                .map_err(|e| failed(e.into()))?;
            match Flock::lock(dir, FlockArg::LockExclusive) {
                Ok(lock) if self.is_there() => return Ok(lock),
                Ok(_) => return Err(self.missing()),
                Err((again, nix::errno::Errno::EINTR)) => dir = again,
                Err((_, e)) => return Err(failed(e.into())),
            }
        }
    }

    /// Whether its path still leads to this directory.
    fn is_there(&self) -> bool {
        match (fstat(&self.dir), stat(&self.path)) {
            (Ok(ours), Ok(there)) => (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino),
            _ => false,
        }
    }

    fn missing(&self) -> Error {
        let shown = |part: Option<&Path>| part.unwrap_or(Path::new("")).display().to_string();
        Error::Missing { id: shown(self.path.file_name().map(Path::new)), root: shown(self.path.parent()) }
    }

    /// Replaces the state.
    pub fn save(&self, state: &State) -> Result<(), Error> {
        let failed = |e: io::Error| Error::Io("write", self.path.join(FILE), e);
        let bytes = serde_json::to_vec(state).map_err(|e| failed(e.into()))?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_CLOEXEC;
        let file = openat(&self.dir, NEW_FILE, flags, Mode::from_bits_truncate(0o600))
            .map_err(|e| failed(e.into()))?;
        File::from(file).write_all(&bytes).map_err(failed)?;
        renameat(&self.dir, NEW_FILE, &self.dir, FILE).map_err(|e| failed(e.into()))
    }

    /// Reads the state.
    pub fn load(&self) -> Result<State, Error> {
        let path = self.path.join(FILE);
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let bytes = match openat(&self.dir, FILE, flags, Mode::empty()) {
            Ok(file) => io::read_to_string(File::from(file)),
            Err(nix::errno::Errno::ENOENT) => {
                let id = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                return Err(Error::Unfinished(id));
            }
            Err(e) => Err(e.into()),
        };
        let text = bytes.map_err(|e| Error::Io("read", path.clone(), e))?;
        serde_json::from_str(&text).map_err(|e| Error::Damaged(path, e))
    }

    /// Removes the directory and what a supervisor puts in it. Gone already is fine.
    pub fn remove(&self) -> Result<(), Error> {
        let failed = |e: nix::errno::Errno| Error::Io("remove", self.path.clone(), e.into());
        let gone = |result| match result {
            Err(nix::errno::Errno::ENOENT) => Ok(()),
            other => other,
        };
        for name in [NEW_FILE, CONTROL_SOCKET, TIMELINE].into_iter().chain(CONSOLE).chain(POD_FILES) {
            gone(unlinkat(&self.dir, name, UnlinkatFlags::NoRemoveDir)).map_err(failed)?;
        }
        for name in [SHARE, POD_SHM] {
            gone(unlinkat(&self.dir, name, UnlinkatFlags::RemoveDir)).map_err(failed)?;
        }
        // Last of the files: as long as the rest is there, so is what `delete` needs to try again.
        gone(unlinkat(&self.dir, FILE, UnlinkatFlags::NoRemoveDir)).map_err(failed)?;
        gone(unlinkat(AT_FDCWD, &self.path, UnlinkatFlags::RemoveDir)).map_err(failed)
    }
}

impl AsFd for StateDir {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

/// Checks an id before it becomes part of a path.
pub fn check(id: &str) -> Result<(), Error> {
    let reason = match check_id(id) {
        Err(e) => e.to_string(),
        Ok(()) if id.len() > ID_MAX => format!("an id has at most {ID_MAX} bytes, this one has {}", id.len()),
        Ok(()) => return Ok(()),
    };
    Err(Error::Id { id: id.chars().take(ID_SHOWN).collect(), reason })
}

/// Writes a pid file: complete under its name, or not there.
pub fn write_pid_file(path: &Path, pid: i32) -> Result<(), Error> {
    let failed = |e| Error::Io("write the pid file", path.to_owned(), e);
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    let temporary = path.with_file_name(name);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .open(&temporary)
        .map_err(failed)?;
    file.write_all(pid.to_string().as_bytes()).and_then(|()| fs::rename(&temporary, path)).map_err(failed)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn state(id: &str) -> State {
        State {
            oci_version: "1.0.2".into(),
            id: id.into(),
            status: Status::Running,
            supervisor: ProcessId::current().unwrap(),
            vmm: None,
            sandbox: None,
            bundle: "/bundle".into(),
            rootfs: "/bundle/rootfs".into(),
            created: "2026-01-01T00:00:00Z".into(),
            owner: 0,
            annotations: BTreeMap::from([("k".into(), "v".into())]),
            error: None,
            cgroup: None,
            network: None,
            resources: LinuxResources::default(),
            vm: VmSize { vcpus: 1, memory: 256 << 20 },
            scratch: None,
            poststop: Vec::new(),
        }
    }

    #[test]
    fn a_state_is_read_as_it_was_written_and_nothing_else_lies_beside_it() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::create(root.path(), "c1").unwrap();
        for status in [Status::Created, Status::Running] {
            let written = State { status, ..state("c1") };
            dir.save(&written).unwrap();
            assert_eq!(StateDir::open(root.path(), "c1").unwrap().load().unwrap(), written);
        }
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["state.json"]);
        assert_eq!(StateDir::list(root.path()).unwrap(), ["c1"]);
        dir.remove().unwrap();
        assert!(StateDir::list(root.path()).unwrap().is_empty());
        dir.remove().unwrap();
    }

    #[test]
    fn readers_never_see_half_a_state() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::create(root.path(), "c").unwrap();
        dir.save(&state("c")).unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for n in 0..2000 {
                    let mut next = state("c");
                    next.annotations.insert("pad".into(), "x".repeat(n * 7 % 9000));
                    dir.save(&next).unwrap();
                }
            });
            while !writer.is_finished() {
                StateDir::open(root.path(), "c").unwrap().load().unwrap();
            }
        });
    }

    #[test]
    fn an_id_can_be_reserved_once() {
        let root = tempfile::tempdir().unwrap();
        let nested = root.path().join("not/yet");
        StateDir::create(&nested, "c").unwrap();
        assert!(matches!(StateDir::create(&nested, "c"), Err(Error::Exists { .. })));
        assert!(matches!(StateDir::open(&nested, "d"), Err(Error::Missing { .. })));
        assert!(matches!(StateDir::open(&nested, "c").unwrap().load(), Err(Error::Unfinished(_))));
    }

    #[test]
    fn ids_that_are_no_directory_names_are_refused() {
        let root = tempfile::tempdir().unwrap();
        for id in ["", ".", "..", "a/b", "../x", "a b", &"x".repeat(256), &"x".repeat(2048)] {
            assert!(matches!(StateDir::create(root.path(), id), Err(Error::Id { .. })), "{id}");
            assert!(matches!(StateDir::open(root.path(), id), Err(Error::Id { .. })), "{id}");
        }
        StateDir::create(root.path(), &"x".repeat(255)).unwrap();
    }

    #[test]
    fn a_lock_keeps_others_out() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::create(root.path(), "c").unwrap();
        let held = dir.lock().unwrap();
        let other = StateDir::open(root.path(), "c").unwrap();
        let again = File::open(other.path()).unwrap();
        assert!(Flock::lock(again, FlockArg::LockExclusiveNonblock).is_err());
        drop(held);
        other.lock().unwrap();
    }

    #[test]
    fn who_waited_for_the_lock_of_one_that_was_removed_finds_none() {
        let root = tempfile::tempdir().unwrap();
        let removed = StateDir::create(root.path(), "c").unwrap();
        removed.remove().unwrap();
        assert!(matches!(removed.lock(), Err(Error::Missing { id, .. }) if id == "c"));
        let next = StateDir::create(root.path(), "c").unwrap();
        assert!(matches!(removed.lock(), Err(Error::Missing { .. })));
        next.lock().unwrap();
    }

    #[test]
    fn without_its_supervisor_a_container_is_stopped() {
        let mut state = state("c");
        assert_eq!(state.status(), Status::Running);
        state.supervisor.start += 1;
        assert_eq!(state.status(), Status::Stopped);
    }

    #[test]
    fn a_pid_file_holds_the_pid_and_no_newline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        write_pid_file(&path, 4711).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "4711");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
