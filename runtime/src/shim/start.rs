//! `start`: finds the shim of a container's sandbox, or becomes the one.
//!
//! The socket listens before the answer is given, so nobody can be too early; and the VM boots while the answer is
//! on its way, so that it is up, or nearly, when the first request comes. Only what the sandbox API makes has to wait for
//! that request, which says what it is to be.

use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use nix::unistd::{ForkResult, fork, setsid};
use oci_spec::runtime::Spec;
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio::time::timeout;
use ttrpc::r#async::{Server, Service};

use super::boot::{Plan, boot};
use super::bootstrap::Caller;
use super::events::{Publisher, Sink};
use super::flags::Flags;
use super::pod::Pod;
use super::role::Role;
use super::sandbox_service::SandboxService;
use super::service::{Call, Calls, TaskService};
use super::socket::{Address, Bound};
use super::{Error, os};
use crate::bundle;
use crate::sandbox::stdio;

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
    plan: Plan,
    /// The configuration, unless that comes with a call.
    spec: Option<Spec>,
    sink: Sink,
    address: Address,
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
    let (role, spec) = match bundle::read_spec(&bundle) {
        Ok(spec) => (Role::of(spec.annotations().as_ref()).map_err(Error::Annotation)?, Some(spec)),
        // containerd 2 writes one for a task, and none for what it makes by the sandbox API.
        Err(bundle::Error::NoConfig(_)) => (Role::Announced, None),
        Err(e) => return Err(e.into()),
    };
    let caller = caller.knowing(&role);
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
    let sink = match (ttrpc_address.is_empty(), flags.publish_binary.is_empty() || flags.address.is_empty()) {
        (false, _) => Sink::Socket(ttrpc_address),
        (true, false) => Sink::Program { path: flags.publish_binary.clone(), address: flags.address.clone() },
        // CRI-O names itself as the program, and has no such command.
        (true, true) => Sink::Nowhere,
    };
    let bundle_path = bundle.clone();
    let Flags { namespace, debug, .. } = flags;
    let plan = Plan { id: sandbox, namespace, role, bundle, debug, process_start_ns };
    let serve = Serve { plan, spec, sink, address: address.clone() };
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
    let _ = crate::log::set_up_fifo(&serve.plan.bundle.join(LOG), serve.plan.debug);
    // The bundle goes before this process may.
    std::env::set_current_dir("/").map_err(os("leave the bundle"))?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(os("set up the event loop"))?;
    let inside = runtime.enter();
    let booted = serve.spec.as_ref().map(|spec| boot(&serve.plan, spec, None));
    drop(inside);
    let local = LocalSet::new();
    local.block_on(&runtime, async {
        let publisher = Publisher::new(serve.plan.namespace.clone(), serve.sink);
        let pod = Pod::new(serve.plan, publisher);
        if let Some(booted) = booted {
            // If it failed, the first request is told; until then this is a shim like any other.
            pod.receive(booted);
        }
        let (calls, called) = mpsc::unbounded_channel();
        let mut server = server(listener, calls)?;
        server.start().await.map_err(|e| Error::Os("serve", io::Error::other(e)))?;
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
        Ok(())
    })
}

fn server(listener: UnixListener, calls: mpsc::UnboundedSender<Call>) -> Result<Server, Error> {
    let mut services = std::collections::HashMap::<String, Service>::new();
    let calls = Calls::new(calls);
    for name in TASK_SERVICES {
        let made = create_task(Arc::new(TaskService::new(calls.clone())));
        services.extend(made.into_values().map(|service| (name.to_owned(), service)));
    }
    services.extend(create_sandbox(Arc::new(SandboxService::new(calls))));
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
