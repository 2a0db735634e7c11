//! `stockade create`: everything but the start of the workload. Leaves the container's supervisor behind.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::{Announce, Error, Global, Outcome, refuse_descriptors, warn_of_notify_socket};
use crate::config::Settings;
use crate::sandbox::single::{self, Launch, Mode};
use crate::sandbox::{attach, join, launch, pidfd};
use crate::state;

/// Create a container without starting it
#[derive(Args)]
#[group(skip)]
pub struct Create {
    #[command(flatten)]
    common: liboci_cli::Create,
    /// Unix socket that gets a pidfd of the container's host process
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
}

pub fn create(global: &Global, args: Create, process_start_ns: u64) -> Outcome {
    let Create { common: args, pidfd_socket } = args;
    refuse_descriptors(args.preserve_fds)?;
    warn_of_notify_socket();
    state::check(&args.container_id)?;
    let (bundle, with) = join::load(&global.root, &args.bundle)?;
    attach::check_terminal(bundle.terminal(), true, args.console_socket.as_deref())
        .map_err(|e| Error::Usage(e.into()))?;
    let launch = Launch {
        id: args.container_id,
        root: global.root.clone(),
        bundle,
        with,
        scratch: None,
        settings: Settings::load()?,
        console_socket: args.console_socket,
        systemd_cgroup: global.systemd_cgroup,
        debug: global.debug,
        process_start_ns,
    };
    let announce = Announce { pid_file: args.pid_file, pidfd_socket };
    let pid = launch::leave_behind(move |ready| {
        single::run(launch, Mode::Create, move || {
            // Before the caller is told, and by the process whose pid it is: it is there when `create` returns.
            announce.process(pidfd::Kind::Init)?;
            ready()
        })
    })?;
    tracing::debug!(pid, "created");
    Ok(ExitCode::SUCCESS)
}
