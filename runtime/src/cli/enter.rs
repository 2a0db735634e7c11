//! `stockade enter`: a shell, or another program of this host, in a sandbox's guest outside of its containers.
//!
//! The guest has no programs, and those of a container's image are the workload's word. So a static program of the host
//! goes with the request, busybox if no other is named. It is for sandboxes only that were started as ones that can be
//! entered, which is the host's decision: no annotation, no image and no configuration of a container brings it about.

use std::env;
use std::fs;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Args;
use protobuf::Message;
use stockade_agent_protocol::messages::EnterRequest;

use super::{Error, Global, Outcome, sandboxes};
use crate::bundle::is_static;
use crate::sandbox::control::Conversation;
use crate::sandbox::{self, NOT_ALLOWED, attach};

/// What is run if nothing is named.
const BUSYBOX: &str = "busybox";
/// Longest program: it goes to the guest in one message, of 4 MiB at most, with its arguments.
const PROGRAM_MAX: u64 = 4 * 1024 * 1024 - 128 * 1024;

/// Run a shell in a sandbox's guest, outside of its containers; only if it was started as one that can be entered
#[derive(Args)]
pub struct Enter {
    /// Give the program a terminal; a shell has one without asking where there is one
    #[arg(long, short)]
    tty: bool,
    /// A static program of this host to run there instead of busybox
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// A container's or pod's id
    sandbox: String,
    /// A command of busybox, or the arguments of the program; without it a shell
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub fn enter(global: &Global, args: Enter) -> Outcome {
    // As of an exec: a code that few programs have.
    enter_or_fail(global, args).map_err(|e| Error::Exec(Box::new(e)))
}

fn enter_or_fail(global: &Global, args: Enter) -> Outcome {
    let dir = sandboxes::find(global, &args.sandbox)?;
    let talk = Conversation::connect(&dir).map_err(|e| match e.kind() {
        // A shim listens only if it may let somebody in; a supervisor always, as long as it lives.
        io::ErrorKind::NotFound => Error::Refused(NOT_ALLOWED.into()),
        io::ErrorKind::ConnectionRefused => Error::Refused(format!("the sandbox {} has ended", args.sandbox)),
        _ => Error::Io("reach the sandbox's supervisor".into(), e),
    })?;
    let file = match args.program {
        Some(file) => file,
        None => in_path(BUSYBOX)?,
    };
    let is_shell = args.command.is_empty() && is_busybox(&file);
    let terminal = args.tty || is_shell && io::stdin().is_terminal() && io::stdout().is_terminal();
    let command = if is_shell { vec!["sh".into()] } else { args.command };
    let request = request(&file, command, terminal)?;
    let message =
        request.write_to_bytes().map_err(|e| Error::Io("encode the request".into(), io::Error::other(e)))?;
    let exit = attach::enter(talk, &message, terminal).map_err(|e| match e {
        sandbox::Error::SupervisorGone => Error::Refused(format!("the sandbox {} has ended", args.sandbox)),
        e => e.into(),
    })?;
    Ok(ExitCode::from(exit.code))
}

/// What the guest is asked for, but for what the supervisor adds.
fn request(file: &Path, command: Vec<String>, terminal: bool) -> Result<EnterRequest, Error> {
    let named = || file.display();
    let failed = |e| Error::Io(format!("read {}", named()), e);
    if !is_static(file).map_err(failed)? {
        return Err(Error::Usage(format!(
            "{} cannot run in the guest, where it would find no libraries: name a static program with --program, or \
             install the package busybox-static",
            named()
        )));
    }
    let size = fs::metadata(file).map_err(failed)?.len();
    if size > PROGRAM_MAX {
        return Err(Error::Usage(format!(
            "{} has {size} bytes, more than the {PROGRAM_MAX} that a program may have to be sent to the guest",
            named()
        )));
    }
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let links = if is_busybox(file) { commands_of_busybox(file)? } else { Vec::new() };
    let args = std::iter::once(name.clone()).chain(command).collect();
    let env = env::var("TERM").map(|term| format!("TERM={term}")).ok().filter(|_| terminal);
    Ok(EnterRequest {
        name,
        program: fs::read(file).map_err(failed)?,
        links,
        args,
        env: env.into_iter().collect(),
        terminal,
        ..Default::default()
    })
}

/// Many programs in one, which goes by the name that it is called by.
fn is_busybox(file: &Path) -> bool {
    file.file_name().is_some_and(|name| name == BUSYBOX)
}

fn commands_of_busybox(file: &Path) -> Result<Vec<String>, Error> {
    let asked = Command::new(file).arg("--list").output();
    let asked = asked.map_err(|e| Error::Io(format!("run {} --list", file.display()), e))?;
    let names = String::from_utf8_lossy(&asked.stdout);
    Ok(names.lines().filter(|name| !name.contains('/') && *name != BUSYBOX).map(String::from).collect())
}

fn in_path(name: &str) -> Result<PathBuf, Error> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file()).ok_or_else(|| {
        Error::Usage(format!(
            "there is no {name} on this host: install the package busybox-static, or name a static program with --program"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_static_program_of_a_size_that_can_be_sent_is_let_in() {
        let error = request(Path::new("/bin/sh"), Vec::new(), false).unwrap_err().to_string();
        assert!(error.contains("/bin/sh") && error.contains("busybox-static"), "{error}");
        // This one is static, and large.
        let this = env::current_exe().unwrap();
        let error = request(&this, Vec::new(), false).unwrap_err().to_string();
        assert!(error.contains("bytes"), "{error}");
        let error = request(Path::new("/no/such/program"), Vec::new(), false).unwrap_err().to_string();
        assert!(error.contains("/no/such/program"), "{error}");
    }
}
