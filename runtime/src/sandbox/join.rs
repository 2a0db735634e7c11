//! A container that shares namespaces with another one: it lives in the other's VM.
//!
//! Callers name what is shared by paths of the other container's process on the host: Podman its pods' infra container,
//! and Podman and Docker what `--network container:NAME` and its like name. The VM is the other's and ends with it. This
//! side is the process that the command leaves behind, which stands for the container on the host: it carries streams
//! and signals, shows the container's files, and is all of the sandbox that there is in it.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use super::Error as SandboxError;
use super::agent::Exit;
use super::attach::{Ends, stand_for};
use super::cgroup::{self, Membership};
use super::control::{self, Conversation, Reply, Request};
use super::reservation::Reservation;
use super::share::{self, Share, identity};
use super::single::{Launch, Mode, first_state};
use super::view::View;
use crate::bundle::guest::{Adapted, file_name};
use crate::bundle::pod::Joined;
use crate::bundle::{Bundle, guest, hooks};
use crate::state::{SHARE, State, StateDir, Status};

/// What can be shared, besides the network.
const SHARED: [LinuxNamespaceType; 3] =
    [LinuxNamespaceType::Ipc, LinuxNamespaceType::Uts, LinuxNamespaceType::Pid];

/// How a container ends with its VM.
const KILLED: Exit = Exit { code: 128 + libc::SIGKILL as u8, signal: libc::SIGKILL, oom_killed: false };
/// How long what the VM has of a container may take to be cleared away.
const CLEAR_TIMEOUT: Duration = Duration::from_secs(10);

/// What cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// its VM has one network
    #[error(
        "linux.namespaces: to share a namespace with container {0} is to live in its VM, which has one network: share that \
         too (--network container:{0})"
    )]
    Network(String),
    /// it is not there any more
    #[error("container {0} does not run, so there are no namespaces to share with it: start it first")]
    Ended(String),
}

/// The container whose namespaces are shared.
pub struct Host {
    dir: StateDir,
    state: State,
}

/// Loads a bundle, and finds the container with which it shares namespaces, if it does.
pub fn load(root: &Path, bundle: &Path) -> Result<(Bundle, Option<Host>), SandboxError> {
    let mut host = Ok(None);
    let bundle = Bundle::load_joining(bundle, |spec| {
        host = find(root, spec);
        match &host {
            Ok(Some(host)) => take(spec, host.state.supervisor.pid),
            _ => Joined::default(),
        }
    });
    let host = host?;
    let bundle = bundle?;
    if let Some(host) = &host {
        check_network(&bundle.spec, &host.state)?;
    }
    Ok((bundle, host))
}

/// The number in `/proc/PID/ns/TYPE`.
fn owner(namespace: &LinuxNamespace) -> Option<i32> {
    let rest = namespace.path().as_deref()?.to_str()?.strip_prefix("/proc/")?;
    let (pid, rest) = rest.split_once('/')?;
    let is_it = rest.strip_prefix("ns/") == Some(file_name(namespace.typ()));
    pid.parse().ok().filter(|_| is_it)
}

fn namespaces(spec: &Spec) -> impl Iterator<Item = &LinuxNamespace> {
    spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten())
}

/// The first container that a path leads to. A path that leads to none is left to who checks the bundle.
fn find(root: &Path, spec: &Spec) -> Result<Option<Host>, SandboxError> {
    let pids: Vec<i32> = namespaces(spec).filter_map(owner).collect();
    if pids.is_empty() {
        return Ok(None);
    }
    for id in StateDir::list(root)? {
        // One that is being made or removed shares nothing.
        let Ok(dir) = StateDir::open(root, &id) else { continue };
        let Ok(state) = dir.load() else { continue };
        if pids.contains(&state.supervisor.pid) && state.supervisor.is_alive() {
            return Ok(Some(Host { dir, state }));
        }
    }
    Ok(None)
}

/// Takes out of a configuration the paths of what it shares with the container whose process on the host this is: in the
/// guest they are others.
fn take(spec: &mut Spec, process: i32) -> Joined {
    let mut joined = Joined::default();
    let linux = spec.linux_mut().as_mut();
    for namespace in linux.into_iter().flat_map(|linux| linux.namespaces_mut().iter_mut().flatten()) {
        if SHARED.contains(&namespace.typ()) && owner(namespace) == Some(process) {
            namespace.set_path(None);
            joined.namespaces.push(namespace.typ());
        }
    }
    joined
}

/// The network is the other container's as well.
fn check_network(spec: &Spec, host: &State) -> Result<(), Error> {
    let named = namespaces(spec).find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    let wanted = named.and_then(|namespace| identity(namespace.path().as_deref()?));
    if wanted.is_some() && wanted == identity(&network_of(host)) {
        return Ok(());
    }
    Err(Error::Network(host.id.clone()))
}

fn network_of(host: &State) -> PathBuf {
    format!("/proc/{}/ns/net", host.supervisor.pid).into()
}

/// Has the container made in the other's VM, and stands for it until it ends. `ready` as for [`single::run`].
///
/// [`single::run`]: super::single::run
pub fn run(
    launch: Launch,
    host: Host,
    mode: Mode,
    ready: impl FnOnce() -> Result<(), SandboxError>,
) -> Result<Exit, SandboxError> {
    let os = |what| move |e: io::Error| SandboxError::Os(what, e);
    let Launch { id, root, bundle, scratch, console_socket, systemd_cgroup, .. } = launch;
    let Host { dir: others, state: host } = host;
    let mut adapted = guest::adapt(&bundle, &id)?;
    leave_overlays(&mut adapted);
    let talk = Conversation::connect(&others).map_err(|_| Error::Ended(host.id.clone()))?;
    let open = |name: &str| File::open(Path::new("/proc/self/ns").join(name)).map(OwnedFd::from);
    let outside = ["mnt", "net"].map(open).into_iter().collect::<io::Result<Vec<_>>>();
    let outside = outside.map_err(os("keep the namespaces for hooks"))?;

    let place = cgroup::place(&bundle.spec, &bundle.limits(), &id, systemd_cgroup)?;
    let state = State {
        sandbox: Some(host.sandbox.clone().unwrap_or(host.id.clone())),
        scratch,
        cgroup: place.path().map(Path::to_owned),
        ..first_state(&id, &bundle, host.vm)?
    };
    let reservation = Reservation::new(StateDir::create(&root, &id)?);
    let dir = reservation.dir().clone();
    dir.save(&state)?;
    let cgroup = Membership::enter(place, &bundle.limits(), host.vm, state.supervisor)?;
    let network = File::open(network_of(&host)).map_err(|_| Error::Ended(host.id.clone()))?;
    setns(network, CloneFlags::CLONE_NEWNET)
        .map_err(|e| SandboxError::Os("enter the network namespace of the VM", e.into()))?;
    share::enter_namespace(false)?;

    let share = Share::mount(dir.path().join(SHARE))?;
    share.add(&bundle, &adapted.binds)?;
    let foreground = matches!(mode, Mode::Run { .. });
    let view = (!foreground).then(|| View::enter(share.path(), &adapted.shown)).transpose()?;

    let bytes = serde_json::to_vec(&bundle).map_err(|e| SandboxError::Os("send the bundle", e.into()))?;
    let mut fds = vec![control::attachment(&bytes).map_err(os("send the bundle"))?];
    for namespace in &outside {
        fds.push(namespace.try_clone().map_err(os("send the bundle"))?);
    }
    let process = bundle.spec.process().as_ref();
    let size = process.and_then(|process| process.console_size());
    let ends = Ends {
        terminal: bundle.terminal(),
        console_socket: console_socket.as_deref(),
        size: size.map(|size| (size.height() as u16, size.width() as u16)),
        detach: !foreground,
    };
    let is_created = Cell::new(false);
    let created = || {
        is_created.set(true);
        if mode != Mode::Create {
            start(&dir)?;
        }
        ready()?;
        if mode != (Mode::Run { keep: false }) {
            // From here on the container exists for other commands, and `delete` is how it ends.
            reservation.keep();
        }
        Ok(())
    };
    // This process may wait for days.
    drop((bundle, adapted, bytes));
    let request = |stdio| Request::Create { id: id.clone(), stdio };
    let result = match stand_for(talk, ends, request, fds, created) {
        Err(SandboxError::SupervisorGone) if is_created.get() => {
            tracing::error!("the VM ended, and the container with it");
            Ok(KILLED)
        }
        other => other,
    };

    if let Some(view) = view {
        view.leave();
    }
    share.unmount();
    if reservation.is_kept() {
        cgroup.iter().for_each(Membership::keep);
    } else {
        is_cleared(&dir, CLEAR_TIMEOUT);
        let stopped = State { status: Status::Stopped, ..state };
        hooks::run_last(&stopped.poststop, &stopped.to_oci_json(), &outside);
        cgroup.iter().for_each(Membership::leave);
    }
    reservation.release();
    result
}

/// An overlay cannot be mounted twice, and it is the guest that needs it.
fn leave_overlays(adapted: &mut Adapted) {
    let mut overlays = Vec::new();
    adapted.binds.retain(|bind| {
        let is_overlay = bind.overlay.is_some();
        overlays.extend(is_overlay.then(|| bind.target.clone()));
        !is_overlay
    });
    for mount in &mut adapted.shown.mounts {
        mount.target.take_if(|target| overlays.contains(target));
    }
}

fn start(dir: &StateDir) -> Result<(), SandboxError> {
    let talk = Conversation::connect(dir).map_err(|_| SandboxError::SupervisorGone)?;
    let answer = talk.send(&Request::Start, &[]).and_then(|()| talk.recv::<Reply>());
    match answer.map_err(|e| SandboxError::Os("talk to the supervisor", e))? {
        Some((Reply::Done, _)) => Ok(()),
        Some((Reply::Failed { message }, _)) => {
            Err(SandboxError::Supervisor { message, console: Vec::new() })
        }
        _ => Err(SandboxError::SupervisorGone),
    }
}

/// Waits until the VM has nothing more of a container whose process on the host is gone; whether it has come to that.
pub fn is_cleared(dir: &StateDir, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    // The supervisor lets the socket go last. One that still followed the container may have begun to answer.
    while let Ok(talk) = Conversation::connect(dir) {
        if !talk.ended_within(deadline.saturating_duration_since(Instant::now())) {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::ProcessId;
    use crate::state::tests::state;
    use serde_json::json;

    fn spec(namespaces: serde_json::Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.0.2", "hostname": "h", "linux": {"namespaces": namespaces},
        }))
        .unwrap()
    }

    #[test]
    fn the_container_is_found_whose_process_a_namespace_is_named_by() {
        let root = tempfile::tempdir().unwrap();
        let me = std::process::id();
        let dir = StateDir::create(root.path(), "infra").unwrap();
        dir.save(&state("infra")).unwrap();
        let found = |spec: &Spec| find(root.path(), spec).unwrap().map(|host| host.state.id);
        let ipc = |pid: u32| {
            spec(json!([{"type": "mount"}, {"type": "ipc", "path": format!("/proc/{pid}/ns/ipc")}]))
        };
        assert_eq!(found(&ipc(me)).as_deref(), Some("infra"));
        assert_eq!(found(&ipc(1)), None);
        let wrong = spec(json!([{"type": "uts", "path": format!("/proc/{me}/ns/ipc")}]));
        assert_eq!(found(&wrong), None);
        let dead = ProcessId { start: 1, ..ProcessId::current().unwrap() };
        dir.save(&State { supervisor: dead, ..state("infra") }).unwrap();
        assert_eq!(found(&ipc(me)), None);
    }

    #[test]
    fn paths_of_what_is_shared_are_taken_out_and_the_rest_stays() {
        let mut spec = spec(json!([
            {"type": "mount"}, {"type": "pid"},
            {"type": "ipc", "path": "/proc/7/ns/ipc"}, {"type": "uts", "path": "/proc/7/ns/uts"},
            {"type": "network", "path": "/proc/7/ns/net"}, {"type": "user", "path": "/proc/7/ns/user"},
        ]));
        let joined = take(&mut spec, 7);
        assert_eq!(joined.namespaces, [LinuxNamespaceType::Ipc, LinuxNamespaceType::Uts]);
        let left: Vec<_> = super::namespaces(&spec).filter_map(owner).collect();
        assert_eq!(left, [7, 7], "those of the network and of users");
    }

    #[test]
    fn who_shares_a_vm_shares_its_network() {
        let host = state("infra");
        let network = |path: String| spec(json!([{"type": "network", "path": path}]));
        check_network(&network(format!("/proc/{}/ns/net", std::process::id())), &host).unwrap();
        for other in ["/proc/self/ns/mnt", "/no/such/file", ""] {
            let error = check_network(&network(other.into()), &host).unwrap_err();
            assert!(error.to_string().contains("--network container:infra"), "{error}");
        }
        check_network(&spec(json!([{"type": "network"}])), &host).unwrap_err();
    }
}
