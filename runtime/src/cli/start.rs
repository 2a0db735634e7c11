//! `stockade start`: lets the workload of a created container run.

use std::process::ExitCode;

use super::{Global, Outcome, ask, open, stopped};
use crate::sandbox::control::Request;

pub fn start(global: &Global, args: liboci_cli::Start) -> Outcome {
    let (dir, state) = open(global, &args.container_id)?;
    match ask(&dir, &Request::Start)? {
        Some(_) => Ok(ExitCode::SUCCESS),
        None => Err(stopped("cannot start a container that has stopped", &state)),
    }
}
