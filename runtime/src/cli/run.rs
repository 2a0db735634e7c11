//! `stockade run`: create, start, and unless it is detached, wait and delete.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::{Announce, Error, Global, Outcome, refuse_preserved};
use crate::bundle::Bundle;
use crate::config::Settings;
use crate::sandbox::single::{self, Launch, Mode};
use crate::sandbox::{attach, launch, pidfd};
use crate::state;

/// Create and start a container, and unless it is detached wait for its end and remove it
#[derive(Args)]
#[group(skip)]
pub struct Run {
    #[command(flatten)]
    common: liboci_cli::Run,
    /// Unix socket that gets a pidfd of the container's host process
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
}

pub fn run(global: &Global, args: Run, process_start_ns: u64) -> Outcome {
    let Run { common: args, pidfd_socket } = args;
    refuse_preserved(args.preserve_fds)?;
    state::check(&args.container_id)?;
    let bundle = Bundle::load(&args.bundle)?;
    attach::check_terminal(bundle.terminal(), args.detach, args.console_socket.as_deref())
        .map_err(|e| Error::Usage(e.into()))?;
    let launch = Launch {
        id: args.container_id,
        root: global.root.clone(),
        bundle,
        settings: Settings::load()?,
        console_socket: args.console_socket,
        debug: global.debug,
        process_start_ns,
    };
    let announce = Announce { pid_file: args.pid_file, pidfd_socket };
    let announce = move || announce.process(pidfd::Kind::Init);
    if args.detach {
        launch::leave_behind(move |ready| {
            single::run(launch, Mode::RunDetached, move || announce().and_then(|()| ready()))
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    let exit = single::run(launch, Mode::Run { keep: args.keep }, announce)?;
    if exit.oom_killed {
        tracing::warn!("the kernel killed a process of the container: out of memory");
        eprintln!(
            "stockade: the kernel killed a process of the container, which had used up its memory: raise linux.resources.memory.limit"
        );
    }
    Ok(ExitCode::from(exit.code))
}
