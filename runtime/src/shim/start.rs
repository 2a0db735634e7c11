//! `start`: finds the shim of a container's sandbox, or becomes the one.
//!
//! The socket listens before the answer is given, so nobody can be too early; and the VM boots while the answer is
//! on its way, so that it is up, or nearly, when the first request comes.

use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use containerd_shim_protos::shim_async::create_task;
use nix::unistd::{ForkResult, fork, setsid};
use oci_spec::runtime::{LinuxResources, Spec};
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio::time::timeout;
use ttrpc::r#async::{Server, Service};

use super::bootstrap::Caller;
use super::events::{Publisher, Sink};
use super::flags::Flags;
use super::pod::Pod;
use super::role::Role;
use super::service::{Call, TaskService};
use super::socket::{Address, Bound};
use super::{Error, hints, os};
use crate::bundle::{self, pod::Shared};
use crate::config::Settings;
use crate::guest_files::GuestFiles;
use crate::network::Network;
use crate::process::ProcessId;
use crate::sandbox::cgroup::{self, Membership};
use crate::sandbox::reservation::Reservation;
use crate::sandbox::timeline::Timeline;
use crate::sandbox::{self, Sandbox, Share, stdio};
use crate::size::VmSize;
use crate::state::{SHARE, State, StateDir, Status};

/// Versions of the task service. They differ in their name only.
const TASK_SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];
/// How long the last events may take to be delivered: containerd waits 3 s for a shutdown.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the last answers may take to leave.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);
/// containerd reads a shim's log from this FIFO of the bundle.
const LOG: &str = "log";

/// What the serving process needs to know.
struct Serve {
    flags: Flags,
    sink: Sink,
    role: Role,
    sandbox: String,
    bundle: PathBuf,
    spec: Spec,
    address: Address,
    process_start_ns: u64,
}

/// Answers on standard output where the shim listens.
pub fn start(mut flags: Flags, process_start_ns: u64) -> Result<(), Error> {
    let caller = Caller::read().map_err(os("read standard input"))?;
    let mut ttrpc_address = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let mut directory = None;
    if let Caller::Bootstrap(params) = &caller {
        directory = params.socket_dir.clone();
        for (flag, param) in [
            (&mut flags.id, &params.instance_id),
            (&mut flags.namespace, &params.namespace),
            (&mut flags.address, &params.containerd_grpc_address),
            (&mut flags.publish_binary, &params.containerd_binary),
            (&mut ttrpc_address, &params.containerd_ttrpc_address),
        ] {
            if flag.is_empty() {
                flag.clone_from(param);
            }
        }
    }
    let bundle = std::env::current_dir().map_err(os("find the bundle"))?;
    let spec = bundle::read_spec(&bundle)?;
    let role = Role::of(spec.annotations().as_ref()).map_err(Error::Annotation)?;
    let sandbox = role.sandbox(&flags.id).to_owned();
    let address = Address::of(directory.as_deref(), &flags.address, &flags.namespace, &sandbox);
    let found = || -> Result<(), Error> {
        address.write(&bundle).map_err(os("write the address into the bundle"))?;
        caller.answer(&address.url(), io::stdout().lock()).map_err(os("answer"))
    };
    if let Role::InPod(pod) = &role {
        return if address.is_served() { found() } else { Err(Error::NoPod(pod.clone())) };
    }
    let listener = match address.bind().map_err(os("make the socket"))? {
        Bound::Theirs => return found(),
        Bound::Ours(listener) => listener,
    };
    let sink = match (ttrpc_address.is_empty(), flags.publish_binary.is_empty()) {
        (false, _) => Sink::Socket(ttrpc_address),
        (true, false) => Sink::Program { path: flags.publish_binary.clone(), address: flags.address.clone() },
        (true, true) => Sink::Nowhere,
    };
    let bundle_path = bundle.clone();
    let serve =
        Serve { flags, sink, role, sandbox, bundle, spec, address: address.clone(), process_start_ns };
    // SAFETY: this process has one thread, so the child may do all that the parent may.
    match unsafe { fork() } {
        Err(e) => {
            address.remove();
            Err(Error::Os("fork the shim", e.into()))
        }
        Ok(ForkResult::Parent { .. }) => {
            address.write(&bundle_path).map_err(os("write the address into the bundle"))?;
            caller.answer(&address.url(), io::stdout().lock()).map_err(os("answer"))
        }
        Ok(ForkResult::Child) => {
            let code = match run(serve, listener) {
                Ok(()) => 0,
                Err(e) => {
                    tracing::error!("{e}");
                    1
                }
            };
            address.remove();
            std::process::exit(code)
        }
    }
}

/// The life of a shim.
fn run(serve: Serve, listener: UnixListener) -> Result<(), Error> {
    let _ = setsid();
    stdio::release_inherited().map_err(os("let go of the standard streams"))?;
    // A caller that reads no log has made no FIFO for it.
    let _ = crate::log::set_up_fifo(&serve.bundle.join(LOG), serve.flags.debug);
    // The bundle goes before this process may.
    std::env::set_current_dir("/").map_err(os("leave the bundle"))?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(os("set up the event loop"))?;
    let inside = runtime.enter();
    let booted = boot(&serve);
    drop(inside);
    let (vm, held) = match booted {
        Ok(Booted { sandbox, shared, state, reservation, cgroup }) => {
            (Ok((sandbox, shared, reservation.dir().clone(), state)), Some((cgroup, reservation)))
        }
        // The first request is told; until then this is a shim like any other.
        Err(e) => (Err(e), None),
    };
    let local = LocalSet::new();
    local.block_on(&runtime, async {
        let publisher = Publisher::new(serve.flags.namespace.clone(), serve.sink);
        let pod = Pod::new((serve.sandbox, serve.flags.namespace, serve.role), vm, publisher);
        let (calls, called) = mpsc::unbounded_channel();
        let mut server = server(listener, calls)?;
        server.start().await.map_err(|e| Error::Os("serve", io::Error::other(e)))?;
        tokio::task::spawn_local(pod.clone().attend());
        tokio::select! {
            () = answer_calls(called, &pod) => {}
            () = pod.finished.notified() => {}
        }
        // From here on a new sandbox of this name is another shim's.
        serve.address.remove();
        pod.end("the shim is about to end");
        if timeout(FLUSH_TIMEOUT, pod.publisher.flush()).await.is_err() {
            tracing::warn!("containerd did not take the last events");
        }
        let _ = timeout(GOODBYE_TIMEOUT, server.shutdown()).await;
        pod.reap();
        Ok::<_, Error>(())
    })?;
    drop(held);
    Ok(())
}

/// Starts the VM. Everything in it comes later, so only what it is as a whole is looked at here.
fn boot(serve: &Serve) -> Result<Booted, sandbox::Error> {
    let settings = Settings::load()?;
    let files = GuestFiles::open(&settings)?;
    let is_pod = serve.role == Role::Pod;
    let shared = is_pod.then(|| Shared::of(&serve.spec)).transpose()?;
    let size = size(serve, &settings)?;
    // The limits of a pod are its parent cgroup's, which is kubelet's to set.
    let limits = if is_pod { LinuxResources::default() } else { bundle::limits(&serve.spec) };
    let systemd = cgroup::is_systemd_path(&serve.spec);
    let place = cgroup::place(&serve.spec, &limits, &serve.sandbox, systemd)?;
    let cgroup = Membership::enter(place, &limits, size)?;
    let network = Network::enter(&serve.spec, false)?;
    let spawned = Sandbox::spawn(true, network, cgroup.as_ref(), Timeline::begin(serve.process_start_ns))?;
    let vmm = spawned.vmm_process()?;
    let root = super::state_root(&serve.flags.namespace);
    let reservation = Reservation::new(StateDir::create(&root, &serve.sandbox)?);
    let annotations = serve.spec.annotations().iter().flatten();
    let state = State {
        oci_version: serve.spec.version().clone(),
        id: serve.sandbox.clone(),
        status: Status::Running,
        supervisor: ProcessId::current().map_err(|e| sandbox::Error::Os("read /proc/self/stat", e))?,
        vmm: Some(vmm),
        bundle: serve.bundle.clone(),
        rootfs: serve.bundle.join(super::task::ROOTFS),
        created: crate::clock::now_rfc3339(),
        owner: nix::unistd::getuid().as_raw(),
        annotations: annotations.map(|(k, v)| (k.clone(), v.clone())).collect(),
        error: None,
        resources: limits,
        vm: size,
        poststop: Vec::new(),
        cgroup: cgroup.as_ref().map(|cgroup| cgroup.path().to_owned()),
        network: None,
        scratch: None,
    };
    reservation.dir().save(&state)?;
    let share = Share::mount(reservation.dir().path().join(SHARE))?;
    let sandbox = spawned.boot(&serve.spec, share, size, files, serve.flags.debug)?;
    sandbox.keep_console(reservation.dir().path());
    Ok(Booted { sandbox, shared, state, reservation, cgroup })
}

/// A VM on its way, and what of it is on the host.
struct Booted {
    sandbox: Sandbox,
    /// What its containers share, if it is a pod.
    shared: Option<Shared>,
    state: State,
    reservation: Reservation,
    cgroup: Option<Membership>,
}

fn size(serve: &Serve, settings: &Settings) -> Result<VmSize, sandbox::Error> {
    if serve.role == Role::Pod {
        return Ok(hints::size(serve.spec.annotations().as_ref(), settings)?);
    }
    let resources = serve.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    Ok(VmSize::of(serve.spec.annotations().as_ref(), resources, settings)?)
}

fn server(listener: UnixListener, calls: mpsc::UnboundedSender<Call>) -> Result<Server, Error> {
    let mut services = std::collections::HashMap::<String, Service>::new();
    for name in TASK_SERVICES {
        let made = create_task(std::sync::Arc::new(TaskService::new(calls.clone())));
        services.extend(made.into_values().map(|service| (name.to_owned(), service)));
    }
    listener.set_nonblocking(true).map_err(os("use the socket"))?;
    // SAFETY: the descriptor is a listening unix socket, and from here on the server's alone.
    let server = unsafe { Server::new().add_unix_listener(listener.into_raw_fd()) };
    let server = server.map_err(|e| Error::Os("use the socket", io::Error::other(e)))?;
    Ok(server.register_service(services))
}

/// Runs each call as a task of its own.
async fn answer_calls(mut calls: mpsc::UnboundedReceiver<Call>, pod: &Rc<Pod>) {
    while let Some(call) = calls.recv().await {
        tokio::task::spawn_local(call(pod.clone()));
    }
}

/// Where a bundle of the container is: for `delete`, which may be called elsewhere.
pub fn bundle_of(flags: &Flags) -> io::Result<PathBuf> {
    match flags.bundle.as_os_str().is_empty() {
        true => std::env::current_dir(),
        false => Ok(Path::new(&flags.bundle).to_owned()),
    }
}
