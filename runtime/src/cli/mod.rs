//! The command line: what callers of runc know, one file a command.
//!
//! Commands read their arguments, do one thing, and print its result on standard output. An error is one line on
//! standard error, and a record in the log if there is one; the exit code is then 1, or 255 from exec, except where it
//! is that of a workload.

mod check;
mod create;
mod delete;
mod enter;
mod events;
mod exec;
pub mod features;
mod image;
mod install;
mod kill;
mod list;
mod logs;
mod metrics;
mod pause;
mod ps;
mod run;
mod sandboxes;
pub mod spec;
mod start;
mod state;
mod trace;
mod update;

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::printable::error_line;
use crate::sandbox::control::{Conversation, Reply, Request};
use crate::sandbox::pidfd;
use crate::state::{DEFAULT_ROOT, State, StateDir};
use crate::{
    bundle, config, guest_files, image as images, install as installation, log, network, sandbox,
    state as container,
};

/// As runc says it: the program's own version, then that of the runtime specification.
const VERSION: &str = concat!("version ", env!("CARGO_PKG_VERSION"), "\nspec: 1.3.0");

/// Runs OCI containers, each in a microVM of its own
#[derive(Parser)]
#[command(name = "stockade", version = VERSION, disable_version_flag = true)]
struct Arguments {
    /// Print version
    #[arg(short = 'v', short_alias = 'V', long, action = ArgAction::Version)]
    version: Option<bool>,
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of all commands.
#[derive(Args)]
struct Global {
    /// Directory of the containers' state
    #[arg(long, global = true, default_value = DEFAULT_ROOT, value_name = "DIR")]
    root: PathBuf,
    /// Append log records to this file
    #[arg(long, global = true, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Format of log records
    #[arg(long, global = true, value_enum, default_value = "text")]
    log_format: log::Format,
    /// Log more, and the guest's console too
    #[arg(long, global = true)]
    debug: bool,
    /// The paths of cgroups have systemd's form, slice:prefix:name
    #[arg(long, global = true)]
    systemd_cgroup: bool,
    /// Accepted and without effect: stockade must run as root
    #[arg(long, hide = true, value_name = "BOOL", value_parser = ["true", "false", "auto"])]
    rootless: Option<String>,
    /// Accepted and without effect, as runc has it
    #[arg(long, global = true, hide = true, value_name = "PATH")]
    criu: Option<PathBuf>,
}

/// Refused: a VM's state cannot be saved by CRIU
#[derive(Args)]
struct Refused {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _words: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Run),
    Create(create::Create),
    Start(liboci_cli::Start),
    State(liboci_cli::State),
    Kill(kill::Kill),
    Delete(delete::Delete),
    List(liboci_cli::List),
    Exec(exec::Exec),
    Ps(liboci_cli::Ps),
    Pause(liboci_cli::Pause),
    Resume(liboci_cli::Resume),
    Update(update::Update),
    Events(events::Events),
    Checkpoint(Refused),
    Restore(Refused),
    Spec(liboci_cli::Spec),
    Features(liboci_cli::Features),
    Check(check::Check),
    Image(image::Image),
    Sandboxes(sandboxes::Sandboxes),
    Logs(logs::Logs),
    Trace(trace::Trace),
    Enter(enter::Enter),
    Metrics(metrics::Metrics),
    Install(install::Install),
    Uninstall(install::Uninstall),
}

/// What commands can fail with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    #[error(transparent)]
    Image(#[from] images::Error),
    #[error(transparent)]
    State(#[from] container::Error),
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    GuestFiles(#[from] guest_files::Error),
    #[error(transparent)]
    Install(#[from] installation::Error),
    #[error(transparent)]
    Network(#[from] network::Error),
    #[error("cannot {0}: {1}")]
    Io(String, #[source] io::Error),
    #[error("{0}")]
    Usage(String),
    /// The supervisor said so.
    #[error("{0}")]
    Refused(String),
    /// An exec did not come to run.
    #[error(transparent)]
    Exec(Box<Error>),
}

impl Error {
    /// As runc has them: 255 for an exec, whose workload may well end with 1.
    fn exit_code(&self) -> u8 {
        match self {
            Error::Exec(_) => 255,
            _ => 1,
        }
    }

    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |e| Error::Io(what.into(), e)
    }
}

/// A command's exit code.
pub type Outcome = Result<ExitCode, Error>;

impl Arguments {
    /// Short forms that runc has, and whose commands are described elsewhere.
    fn described() -> clap::Command {
        Arguments::command()
            .mut_subcommand("list", |list| list.mut_arg("format", |format| format.short('f')))
            .mut_subcommand("exec", |exec| exec.mut_arg("cap", |cap| cap.short('c')))
    }

    fn read(words: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        Arguments::from_arg_matches(&Arguments::described().try_get_matches_from(words)?)
    }
}

/// Parses the arguments and runs the command.
pub fn main(process_start_ns: u64) -> ExitCode {
    let Arguments { global, command, .. } = match Arguments::read(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(e) => {
            // Help and version are no errors; a usage error is 1, as everything that fails here.
            let _ = e.print();
            return if e.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match dispatch(global, command, process_start_ns) {
        Ok(code) => code,
        Err(e) => {
            let message = error_line(&e);
            tracing::error!("{message}");
            let mut stderr = io::stderr().lock();
            let _ = writeln!(stderr, "stockade: {message}");
            let code = e.exit_code();
            let e = if let Error::Exec(e) = e { *e } else { e };
            if let Error::Sandbox(e) = &e
                && !e.console().is_empty()
            {
                let _ = writeln!(stderr, "The last lines of the guest's console:");
                for line in e.console() {
                    let _ = writeln!(stderr, "  {line}");
                }
            }
            ExitCode::from(code)
        }
    }
}

fn dispatch(global: Global, command: Command, process_start_ns: u64) -> Outcome {
    log::set_up(global.log.as_deref(), global.log_format, global.debug)
        .map_err(|e| Error::Io(format!("open the log {}", show(global.log.as_deref())), e))?;
    let root = std::path::absolute(&global.root)
        .map_err(Error::io(format!("find the absolute path of --root {}", global.root.display())))?;
    let global = &Global { root, ..global };
    match command {
        Command::Run(args) => run::run(global, args, process_start_ns),
        Command::Create(args) => create::create(global, args, process_start_ns),
        Command::Start(args) => start::start(global, args),
        Command::State(args) => state::state(global, args),
        Command::Kill(args) => kill::kill(global, args),
        Command::Delete(args) => delete::delete(global, args),
        Command::List(args) => list::list(global, args),
        Command::Exec(args) => exec::exec(global, args),
        Command::Ps(args) => ps::ps(global, args),
        Command::Pause(args) => pause::pause(global, args),
        Command::Resume(args) => pause::resume(global, args),
        Command::Update(args) => update::update(global, args),
        Command::Events(args) => events::events(global, args),
        Command::Checkpoint(_) => Err(no_criu("checkpoint")),
        Command::Restore(_) => Err(no_criu("restore")),
        Command::Spec(args) => spec::spec(args),
        Command::Features(_) => features::features(),
        Command::Check(_) => check::check(),
        Command::Image(args) => image::image(args),
        Command::Sandboxes(args) => sandboxes::sandboxes(global, args),
        Command::Logs(args) => logs::logs(global, args),
        Command::Trace(args) => trace::trace(global, args),
        Command::Enter(args) => enter::enter(global, args),
        Command::Metrics(args) => metrics::metrics(global, args),
        Command::Install(args) => install::install(args),
        Command::Uninstall(args) => install::uninstall(args),
    }
}

fn no_criu(command: &str) -> Error {
    Error::Usage(format!(
        "{command} cannot be honoured: the container's processes are in a VM, where CRIU does not reach; use pause"
    ))
}

/// A container that exists.
fn open(global: &Global, id: &str) -> Result<(StateDir, State), Error> {
    let dir = StateDir::open(&global.root, id)?;
    let state = dir.load()?;
    Ok((dir, state))
}

/// An operation that needs a container that lives, and why this one does not.
fn stopped(what: &str, state: &State) -> Error {
    Error::Refused(match &state.error {
        Some(error) => format!("{what}: {error}"),
        None => what.into(),
    })
}

/// Asks a container's supervisor; `None` when it has none.
fn ask(dir: &StateDir, request: &Request) -> Result<Option<(Reply, Vec<OwnedFd>)>, Error> {
    ask_with(dir, request, &[])
}

/// The same with descriptors.
fn ask_with(
    dir: &StateDir,
    request: &Request,
    fds: &[BorrowedFd],
) -> Result<Option<(Reply, Vec<OwnedFd>)>, Error> {
    let talk = match Conversation::connect(dir) {
        Ok(talk) => talk,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(e) => return Err(Error::Io("reach the container's supervisor".into(), e)),
    };
    // A supervisor that ends while it is asked is one that is not there.
    match talk.send(request, fds).and_then(|()| talk.recv()) {
        Ok(Some((Reply::Failed { message }, _))) => Err(Error::Refused(message)),
        Ok(reply) => Ok(reply),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(None),
        Err(e) => Err(Error::Io("talk to the container's supervisor".into(), e)),
    }
}

/// How a caller learns of a process on the host.
struct Announce {
    pid_file: Option<PathBuf>,
    pidfd_socket: Option<PathBuf>,
}

impl Announce {
    /// Tells of this process.
    fn process(&self, kind: pidfd::Kind) -> Result<(), sandbox::Error> {
        if let Some(path) = &self.pid_file {
            container::write_pid_file(path, std::process::id() as i32)?;
        }
        match &self.pidfd_socket {
            Some(socket) => Ok(pidfd::send(socket, kind)?),
            None => Ok(()),
        }
    }
}

/// Descriptors that a caller hands on: by a flag, or as systemd does it for a unit's sockets.
fn refuse_descriptors(preserve_fds: i32) -> Result<(), Error> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let sockets = activated(&variable("LISTEN_FDS"), &variable("LISTEN_PID"), std::process::id());
    let what = match (preserve_fds, sockets) {
        (0, 0) => return Ok(()),
        (0, sockets) => format!("LISTEN_FDS={sockets}"),
        (fds, _) => format!("--preserve-fds {fds}"),
    };
    Err(Error::Usage(format!("{what} cannot be honoured: descriptors of the host have no meaning in a VM")))
}

/// How many sockets are meant for this process (sd_listen_fds(3)).
fn activated(fds: &str, pid: &str, me: u32) -> u32 {
    if pid.parse() == Ok(me) { fds.parse().unwrap_or(0) } else { 0 }
}

/// Says what is not done for a unit that waits until its container is ready.
fn warn_of_notify_socket() {
    if std::env::var_os("NOTIFY_SOCKET").is_some() {
        tracing::warn!("NOTIFY_SOCKET is left out: a container in a VM cannot reach a socket of the host");
    }
}

/// Prints a result; a reader that went away is no error.
fn print(text: &str) -> Outcome {
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Error::Io("write the result".into(), e)),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn show(path: Option<&Path>) -> String {
    path.map(|path| path.display().to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_is_a_command_too() {
        for (line, about) in [("stockade help", "metrics"), ("stockade help kill", "--all")] {
            let Err(help) = Arguments::read(line.split(' ').map(OsString::from)) else { panic!("{line}") };
            assert_eq!(help.kind(), clap::error::ErrorKind::DisplayHelp);
            assert!(help.to_string().contains(about), "{help}");
        }
    }

    #[test]
    fn sockets_are_somebodys() {
        assert_eq!(activated("2", "7", 7), 2);
        assert_eq!(activated("2", "8", 7), 0);
        assert_eq!(activated("", "", 7), 0);
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::described().debug_assert();
    }

    #[test]
    fn callers_of_runc_are_understood() {
        for line in [
            "stockade --root /r --log /l --log-format json create --bundle /b --pid-file /p ID",
            "stockade create --bundle /b --console-socket /s --no-pivot --no-new-keyring ID",
            "stockade --root /r exec --process /p --detach --pid-file /f ID",
            "stockade exec -t -u 1000:1000 -e A=b --cwd /tmp --cap CAP_KILL ID sh -c true",
            "stockade kill ID 15",
            "stockade kill ID",
            "stockade kill --all ID KILL",
            "stockade delete --force ID",
            "stockade ps --format json ID",
            "stockade list -q",
            "stockade list --format json",
            "stockade list -f json",
            "stockade exec -c CAP_KILL ID true",
            "stockade run -d -b /b --keep ID",
            "stockade --systemd-cgroup state ID",
            "stockade --debug features",
            "stockade spec --bundle /b",
            "stockade --rootless=false --criu /c list",
            "stockade update --resources - ID",
            "stockade update --resources=/f ID",
            "stockade update --memory -1 --memory-swap=-1 --cpu-quota -1 ID",
            "stockade events --stats ID",
            "stockade events --interval 100ms ID",
            "stockade ps ID -o pid,args",
            "stockade create --pidfd-socket /s ID",
            "stockade run --pidfd-socket /s ID",
            "stockade exec --pidfd-socket /s ID true",
            "stockade checkpoint --image-path /i --leave-running ID",
            "stockade restore -d --bundle /b ID",
            "stockade enter ID",
            "stockade enter -t ID ps -o pid",
            "stockade enter --program /p ID -- -x",
        ] {
            if let Err(e) = Arguments::read(line.split(' ').map(OsString::from)) {
                panic!("{line}: {e}");
            }
        }
    }
}
