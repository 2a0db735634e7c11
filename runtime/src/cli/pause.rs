//! `stockade pause` and `stockade resume`: freezes and thaws all processes of a container.

use std::process::ExitCode;

use super::{Error, Global, Outcome, ask, open};
use crate::sandbox::control::Request;

pub fn pause(global: &Global, args: liboci_cli::Pause) -> Outcome {
    send(global, &args.container_id, &Request::Pause, "container not running")
}

pub fn resume(global: &Global, args: liboci_cli::Resume) -> Outcome {
    send(global, &args.container_id, &Request::Resume, "container not paused")
}

fn send(global: &Global, id: &str, request: &Request, stopped: &str) -> Outcome {
    let (dir, _) = open(global, id)?;
    match ask(&dir, request)? {
        Some(_) => Ok(ExitCode::SUCCESS),
        None => Err(Error::Refused(stopped.into())),
    }
}
