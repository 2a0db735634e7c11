//! `stockade create`: everything but the start of the workload. Leaves the container's supervisor behind.

use std::process::ExitCode;

use super::{Error, Global, Outcome, refuse_preserved};
use crate::bundle::Bundle;
use crate::config::Settings;
use crate::sandbox::single::{self, Launch, Mode};
use crate::sandbox::{attach, launch};
use crate::state;

pub fn create(global: &Global, args: liboci_cli::Create, process_start_ns: u64) -> Outcome {
    refuse_preserved(args.preserve_fds)?;
    state::check(&args.container_id)?;
    let bundle = Bundle::load(&args.bundle)?;
    attach::check_terminal(bundle.terminal(), true, args.console_socket.as_deref())
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
    let pid_file = args.pid_file.clone();
    let pid = launch::leave_behind(move |ready| {
        single::run(launch, Mode::Create, move || {
            // Before the caller is told, and by the process whose pid it is: it is there when `create` returns.
            if let Some(path) = &pid_file {
                state::write_pid_file(path, std::process::id() as i32)?;
            }
            ready()
        })
    })?;
    tracing::debug!(pid, "created");
    Ok(ExitCode::SUCCESS)
}
