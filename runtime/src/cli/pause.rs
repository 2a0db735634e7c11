//! `stockade pause` and `stockade resume`: freezes and thaws all processes of a container.

use std::process::ExitCode;

use super::{Global, Outcome, ask, open, stopped};
use crate::sandbox::control::Request;

pub fn pause(global: &Global, args: liboci_cli::Pause) -> Outcome {
    send(global, &args.container_id, &Request::Pause, "container not running")
}

pub fn resume(global: &Global, args: liboci_cli::Resume) -> Outcome {
    send(global, &args.container_id, &Request::Resume, "container not paused")
}

fn send(global: &Global, id: &str, request: &Request, otherwise: &str) -> Outcome {
    let (dir, state) = open(global, id)?;
    match ask(&dir, request)? {
        Some(_) => Ok(ExitCode::SUCCESS),
        None => Err(stopped(otherwise, &state)),
    }
}
