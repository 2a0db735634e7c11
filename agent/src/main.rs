//! `stockade-agent`, PID 1 of the guest.
//!
//! It boots the VM's own side (mounts, loopback), listens on two vsock ports, and then does what the supervisor on
//! the host asks: it creates containers with libcontainer, relays their stdio, reaps, reports. It knows neither KVM
//! nor the host's file system.
//!
//! What always holds: **there is never a second thread.** Containers are created by a fork of this very process
//! ([`helper`]), and only a single-threaded process may run arbitrary code after fork(2). So the runtime is tokio's
//! current-thread one, nothing calls `spawn_blocking`, and what may block for long (libcontainer, writing back file
//! systems) is done in a forked child.

mod boot;
mod bpf;
mod cgroup;
mod console;
mod container;
mod descriptor;
mod enter;
mod error;
mod events;
mod executor;
mod forward;
mod helper;
mod hooks;
mod log;
mod memory;
mod mounts;
mod network;
mod oom;
mod pod;
mod processes;
mod reaper;
mod resolver;
mod sandbox;
mod seccomp;
mod service;
mod spec;
mod stdio;
mod supervise;
mod thrash;
mod volumes;
mod vsock;

use std::sync::Arc;

use stockade_agent_protocol::service::create_agent;
use stockade_agent_protocol::{RPC_PORT, STDIO_PORT};

use crate::error::Error;

fn main() {
    let started_ns = boot::monotonic_ns();
    if pod::is_pause() {
        pod::pause();
    }
    if std::process::id() != 1 {
        eprintln!(
            "stockade-agent is the init process of a stockade guest; it cannot run as anything but PID 1"
        );
        std::process::exit(1);
    }
    log::panics_to_kmsg();
    if let Err(e) = run(started_ns) {
        log::fatal(&format!("cannot go on: {e}"));
    }
    // PID 1 must not return: the kernel would panic and hide the message above.
    boot::reset();
}

/// Boots the guest and serves the host for as long as the VM lives.
fn run(started_ns: u64) -> Result<(), Error> {
    boot::mount_file_systems()?;
    let options = boot::Options::from_kernel_command_line()?;
    log::start(options.log_level);
    boot::raise_limits();
    boot::allow_overcommit();

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::os("starting the async runtime", e))?;
    runtime.block_on(async {
        let rpc = vsock::Listener::bind(RPC_PORT, options.loopback)?;
        let stdio = vsock::Listener::bind(STDIO_PORT, options.loopback)?;
        vsock::hint_that_we_listen();
        let listening_ns = boot::monotonic_ns();

        let reaper = reaper::Reaper::start()?;
        let containers = container::Containers::new(reaper);
        tokio::spawn(stdio::serve(stdio, containers.rendezvous.clone()));
        let agent = Arc::new(service::Service::new(containers, &options, started_ns, listening_ns));
        let mut server = ttrpc::r#async::Server::new()
            .add_listener(ttrpc::r#async::transport::Listener::new(rpc))
            .register_service(create_agent(agent));
        server.start().await.map_err(|e| Error::Internal(format!("starting the ttrpc server: {e}")))?;
        boot::bring_loopback_up();
        std::future::pending::<()>().await;
        Ok(())
    })
}
