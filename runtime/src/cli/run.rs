//! `stockade run`: create, start, and unless it is detached, wait and delete.
//!
//! With a bundle it is runc's `run`; with `--image` the bundle is made here, and the identifier may be left out.

use std::cell::Cell;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;

use clap::Args;

use super::{Announce, Error, Global, Outcome, print, refuse_descriptors, warn_of_notify_socket};
use crate::bundle::Bundle;
use crate::config::Settings;
use crate::image::flags::Flags;
use crate::image::scratch::{self, Scratch};
use crate::image::{self, Prepared};
use crate::sandbox::agent::Exit;
use crate::sandbox::join::{self, Host};
use crate::sandbox::single::{self, Launch, Mode};
use crate::sandbox::{self, attach, launch, pidfd};
use crate::state;

/// How long an identifier is that nobody chose.
const ID_LENGTH: usize = 12;

/// Create and start a container, and unless it is detached wait for its end and remove it
#[derive(Args)]
#[group(skip)]
pub struct Run {
    /// Directory of the bundle
    #[arg(short, long, default_value = ".", value_name = "DIR", conflicts_with = "image")]
    bundle: PathBuf,
    /// Unix socket that gets the terminal's other end
    #[arg(short, long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// File that gets the pid of the container's host process
    #[arg(short, long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Accepted and without effect
    #[arg(long, hide = true)]
    no_subreaper: bool,
    /// Accepted and without effect
    #[arg(long, hide = true)]
    no_pivot: bool,
    /// Accepted and without effect
    #[arg(long, hide = true)]
    no_new_keyring: bool,
    /// Refused unless it is 0: descriptors of the host have no meaning in a VM
    #[arg(long, default_value = "0", value_name = "NUMBER")]
    preserve_fds: i32,
    /// Do not remove the container when it has ended
    #[arg(long)]
    keep: bool,
    /// Do not wait for the container's end
    #[arg(short, long)]
    detach: bool,
    /// Unix socket that gets a pidfd of the container's host process
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    #[command(flatten)]
    from_image: Flags,
    /// Container identifier
    #[arg(required_unless_present = "image", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    container_id: Option<String>,
    /// What to run in place of the image's command
    #[arg(last = true, requires = "image", value_name = "ARGUMENT")]
    args: Vec<String>,
}

pub fn run(global: &Global, args: Run, process_start_ns: u64) -> Outcome {
    refuse_descriptors(args.preserve_fds)?;
    warn_of_notify_socket();
    let id = id(&args)?;
    state::check(&id)?;
    let (bundle, with, scratch) = match &args.from_image.image {
        None => {
            let (bundle, with) = join::load(&global.root, &args.bundle)?;
            (bundle, with, None)
        }
        Some(_) => {
            let Prepared { bundle, scratch } = prepare(global, &args, &id)?;
            (bundle, None, Some(scratch))
        }
    };
    let shown = id.clone();
    let settled = Container { args: &args, id, bundle, with, scratch }.run(global, process_start_ns)?;
    match settled {
        None if args.from_image.image.is_some()
            && args.from_image.name.is_none()
            && args.container_id.is_none() =>
        {
            // Otherwise nobody knew what to delete.
            print(&format!("{shown}\n"))
        }
        None => Ok(ExitCode::SUCCESS),
        Some(exit) => {
            if exit.oom_killed {
                tracing::warn!("the kernel killed a process of the container: out of memory");
                let raise = match args.from_image.image {
                    Some(_) => "--memory",
                    None => "linux.resources.memory.limit",
                };
                eprintln!(
                    "stockade: the kernel killed a process of the container, which had used up its memory: raise {raise}"
                );
            }
            Ok(ExitCode::from(exit.code))
        }
    }
}

/// The identifier that the caller chose, or one for a container from an image.
fn id(args: &Run) -> Result<String, Error> {
    match args.container_id.as_ref().or(args.from_image.name.as_ref()) {
        Some(id) => Ok(id.clone()),
        None => {
            let name = scratch::random_name().map_err(Error::io("read /dev/urandom"))?;
            Ok(name.chars().take(ID_LENGTH).collect())
        }
    }
}

/// Makes a bundle of an image.
fn prepare(global: &Global, args: &Run, id: &str) -> Result<Prepared, Error> {
    let flags = &args.from_image;
    attach::check_terminal(flags.tty, args.detach, args.console_socket.as_deref())
        .map_err(|e| Error::Usage(e.into()))?;
    for volume in &flags.volume {
        if !Path::new(&volume.source).exists() {
            return Err(Error::Usage(format!(
                "--volume {} is not there: make it, or name another file or directory",
                volume.source
            )));
        }
    }
    let state = global.root.join(id);
    if state.exists() {
        return Err(state::Error::Exists { id: id.into(), root: global.root.display().to_string() }.into());
    }
    let Some(reference) = &flags.image else { return Err(Error::Usage("--image is missing".into())) };
    let prepared = image::prepare(reference, flags, &args.args, id, &state)?;
    if !flags.interactive && !flags.tty {
        let null = File::open("/dev/null").map_err(Error::io("open /dev/null"))?;
        nix::unistd::dup2_stdin(&null).map_err(|e| Error::Io("let go of standard input".into(), e.into()))?;
    }
    Ok(prepared)
}

/// A container that is about to run.
struct Container<'a> {
    args: &'a Run,
    id: String,
    bundle: Bundle,
    with: Option<Host>,
    scratch: Option<Scratch>,
}

impl Container<'_> {
    /// How it ended; nothing if that is left to another process.
    fn run(self, global: &Global, process_start_ns: u64) -> Result<Option<Exit>, Error> {
        let args = self.args;
        attach::check_terminal(self.bundle.terminal(), args.detach, args.console_socket.as_deref())
            .map_err(|e| Error::Usage(e.into()))?;
        let launch = Launch {
            id: self.id,
            root: global.root.clone(),
            bundle: self.bundle,
            with: self.with,
            scratch: self.scratch.as_ref().map(|scratch| scratch.path().to_owned()),
            settings: Settings::load()?,
            console_socket: args.console_socket.clone(),
            systemd_cgroup: global.systemd_cgroup,
            debug: global.debug,
            process_start_ns,
        };
        let announce = Announce { pid_file: args.pid_file.clone(), pidfd_socket: args.pidfd_socket.clone() };
        let announce = move || announce.process(pidfd::Kind::Init);
        let scratch = self.scratch;
        if args.detach {
            launch::leave_behind(move |ready| {
                with_scratch(scratch, Mode::RunDetached, |done| {
                    single::run(launch, Mode::RunDetached, move || {
                        announce().and_then(|()| ready())?;
                        done.set(true);
                        Ok(())
                    })
                })
            })?;
            return Ok(None);
        }
        let mode = Mode::Run { keep: args.keep };
        let exit = with_scratch(scratch, mode, |done| {
            single::run(launch, mode, move || {
                announce()?;
                done.set(true);
                Ok(())
            })
        })?;
        Ok(Some(exit))
    }
}

/// Runs a container and removes the directory that was made for it, unless the container stays for `delete`.
fn with_scratch(
    scratch: Option<Scratch>,
    mode: Mode,
    run: impl FnOnce(Rc<Cell<bool>>) -> Result<Exit, sandbox::Error>,
) -> Result<Exit, sandbox::Error> {
    let ready = Rc::new(Cell::new(false));
    let result = run(ready.clone());
    let stays = ready.get() && mode != (Mode::Run { keep: false });
    if let Some(scratch) = scratch.filter(|_| !stays) {
        scratch.remove();
    }
    result
}
