//! `stockade run`: create, start, and unless it is detached, wait and delete.

use std::process::ExitCode;

use super::{Error, Global, Outcome, refuse_preserved};
use crate::bundle::Bundle;
use crate::config::Settings;
use crate::sandbox::single::{self, Launch, Mode};
use crate::sandbox::{attach, launch};
use crate::state;

pub fn run(global: &Global, args: liboci_cli::Run, process_start_ns: u64) -> Outcome {
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
    let pid_file = args.pid_file;
    let write_pid = move || match &pid_file {
        Some(path) => Ok(state::write_pid_file(path, std::process::id() as i32)?),
        None => Ok(()),
    };
    if args.detach {
        launch::leave_behind(move |ready| {
            single::run(launch, Mode::RunDetached, move || write_pid().and_then(|()| ready()))
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    let exit = single::run(launch, Mode::Run { keep: args.keep }, write_pid)?;
    if exit.oom_killed {
        tracing::warn!("the kernel killed a process of the container: out of memory");
        eprintln!(
            "stockade: the kernel killed a process of the container, which had used up its memory: raise linux.resources.memory.limit"
        );
    }
    Ok(ExitCode::from(exit.code))
}
