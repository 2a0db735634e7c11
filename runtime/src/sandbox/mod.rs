//! A sandbox: one VM and the containers in it. The heart of the host side.
//!
//! [`run`] is the whole life of a sandbox from top to bottom, in the process that becomes its supervisor. The VMM is
//! started as early as possible, and everything else is prepared while it boots; what the agent is to do lies ready
//! for it in the streams before it runs. Whatever happens, what was begun is undone in the opposite order, and
//! what is left when this process is killed is what [`crate::state::StateDir::remove`] removes.

pub mod agent;
pub mod attach;
pub mod console;
pub mod control;
pub mod launch;
mod poll;
mod relay;
mod share;
pub mod signals;
mod stdio;
mod supervisor;
pub mod terminal;
pub mod timeline;
mod vmm;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use stockade_agent_protocol::{RPC_PORT, STDIO_PORT};
use stockade_vmm::control::Boot;
use tokio::task::LocalSet;

use crate::bundle::{self, Bundle, guest, hooks};
use crate::config::Settings;
use crate::guest_files::{self, GuestFiles};
use crate::process::ProcessId;
use crate::size::{self, VmSize};
use crate::state::{self, SHARE, State, StateDir, Status};
use agent::{Agent, Exit};
use console::Console;
use share::Share;
use signals::Signals;
use stdio::HostStdio;
use supervisor::Supervisor;
use timeline::Timeline;
use vmm::Vmm;

/// Fresh random bytes for the guest's generator: 256 bits, which is what its ChaCha20 takes as key.
const ENTROPY: usize = 32;
/// Guest console output for `--debug`.
const DEBUG_CMDLINE: &str = "loglevel=7";

/// What is to be run.
pub struct Launch {
    /// The container's id.
    pub id: String,
    /// Where state lies.
    pub root: PathBuf,
    /// What runs.
    pub bundle: Bundle,
    /// How.
    pub settings: Settings,
    /// Where a terminal's other end goes.
    pub console_socket: Option<PathBuf>,
    /// Whether the guest shall be talkative.
    pub debug: bool,
    /// When this process began, `CLOCK_MONOTONIC`.
    pub process_start_ns: u64,
}

/// How long the container's life is this process's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// From creation to removal (or up to it).
    Run {
        /// Leave the state for `delete`.
        keep: bool,
    },
    /// From creation to its end; another command starts it.
    Create,
    /// From creation to its end.
    RunDetached,
}

/// Errors of a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// of the state directory
    #[error(transparent)]
    State(#[from] state::Error),
    /// of the bundle
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    /// of the guest files
    #[error(transparent)]
    GuestFiles(#[from] guest_files::Error),
    /// of the VM's size
    #[error(transparent)]
    Size(#[from] size::Error),
    /// of the share
    #[error(transparent)]
    Share(#[from] share::Error),
    /// of the VMM process
    #[error(transparent)]
    Vmm(#[from] vmm::Error),
    /// of a hook
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    /// of a terminal
    #[error(transparent)]
    Terminal(#[from] terminal::Error),
    /// the agent said no to something
    #[error("cannot {what}: {source}")]
    Agent { what: &'static str, source: agent::Error },
    /// the VM ended before its container
    #[error("{what}")]
    VmEnded { what: String, console: Vec<String> },
    /// a signal came before there was anything to pass it on to
    #[error("interrupted by {0} before the container was created")]
    Interrupted(nix::sys::signal::Signal),
    /// something of the operating system
    #[error("cannot {0}: {1}")]
    Os(&'static str, #[source] io::Error),
    /// the process that was to say so is gone
    #[error("the supervisor ended without a word: it may have been killed")]
    SupervisorGone,
    /// what the supervisor said
    #[error("{message}")]
    Supervisor { message: String, console: Vec<String> },
}

impl Error {
    /// The last lines of the guest's console, where they explain the error.
    pub fn console(&self) -> &[String] {
        match self {
            Error::VmEnded { console, .. } | Error::Supervisor { console, .. } => console,
            _ => &[],
        }
    }
}

/// Runs a sandbox with one container from beginning to end. `ready` is called once the container is created (and
/// started, where that is this mode's business).
pub fn run(
    launch: Launch,
    mode: Mode,
    ready: impl FnOnce() -> Result<(), Error> + 'static,
) -> Result<Exit, Error> {
    let timeline = Timeline::begin(launch.process_start_ns);
    let Launch { id, root, bundle, settings, .. } = launch;

    let files = GuestFiles::open(&settings)?;
    let resources = bundle.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let size = VmSize::of(bundle.spec.annotations().as_ref(), resources, &settings)?;
    let adapted = guest::adapt(&bundle, &id)?;
    let os = |what| move |e: io::Error| Error::Os(what, e);

    let signals = Signals::block().map_err(os("block signals"))?;
    let outside = share::enter_namespace(has_host_hooks(&bundle))?;
    let (console, console_end) = Console::new().map_err(os("make the console pipe"))?;
    let vmm = Vmm::spawn(console_end.as_fd())?;
    timeline.mark("vmm_spawned");

    // Both at once: from the moment there is a directory, it says whom `delete` has to wait for.
    let state = first_state(&id, &bundle, &vmm)?;
    let reservation = Reservation::new(StateDir::create(&root, &id)?);
    reservation.dir().save(&state)?;
    let share = Share::mount(reservation.dir().path().join(SHARE))?;
    if bundle.readonly_root() {
        share::make_mount_points(&bundle.rootfs, &mount_points(&bundle))?;
    }
    adapted.binds.iter().try_for_each(|bind| share.bind(bind))?;
    let boot = Boot {
        vcpus: size.vcpus,
        memory_bytes: size.memory,
        cmdline: if launch.debug { DEBUG_CMDLINE.into() } else { String::new() },
        kernel_name: files.dir.join(guest_files::KERNEL).display().to_string(),
        initrd_name: files.dir.join(guest_files::INITRD).display().to_string(),
    };
    vmm.boot(boot, files.kernel.as_fd(), files.initrd.as_fd(), share.as_fd(), console_end.as_fd())?;
    drop((files, console_end));

    let rpc = vmm.connect(RPC_PORT)?;
    let mut stdio = open_stdio(&bundle, launch.console_socket.as_deref())?;
    if !matches!(mode, Mode::Run { .. }) {
        // Whoever reads the workload's output sees its end when the workload closes it.
        stdio::release_inherited().map_err(os("let go of the standard streams"))?;
    }
    let streams = connect_streams(&vmm, stdio.wanted(), &id, "")?;
    let listener = control::Listener::bind(reservation.dir()).map_err(os("make the control socket"))?;
    timeline.mark("prepared");

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(os("set up the event loop"))?;
    let local = LocalSet::new();
    let outcome = local.block_on(&runtime, async {
        let agent = Agent::new(rpc).map_err(|source| Error::Agent { what: "reach the agent", source })?;
        let supervisor = Supervisor::new(agent, vmm, console, timeline, reservation.dir(), state, outside);
        let wanted = stdio.wanted();
        let first_byte = supervisor.first_byte_mark();
        let relays = stdio.relay(streams, first_byte).map_err(os("relay the standard streams"))?;
        let kept = || {
            // From here on the container exists for other commands, and `delete` is how it ends.
            if mode != (Mode::Run { keep: false }) {
                reservation.keep();
            }
        };
        let story = supervisor::Story {
            hooks: bundle.spec.hooks().clone(),
            spec: adapted.spec,
            wanted,
            start: mode != Mode::Create,
            ready: Box::new(ready),
            kept: &kept,
        };
        let result = supervisor.serve(story, relays, &stdio, &signals, &listener).await;
        Ok::<_, Error>((supervisor, result))
    });
    let (supervisor, result) = outcome?;
    stdio.restore();

    supervisor.end(share, &reservation, mode, result.as_ref().err());
    result
}

/// Where the container's standard streams lead.
fn open_stdio(bundle: &Bundle, console_socket: Option<&std::path::Path>) -> Result<HostStdio, Error> {
    match (bundle.terminal(), console_socket) {
        (false, _) => HostStdio::inherited().map_err(|e| Error::Os("use the standard streams", e)),
        (true, None) => Ok(HostStdio::own_terminal()?),
        (true, Some(socket)) => {
            let size = bundle.spec.process().as_ref().and_then(|process| process.console_size());
            let size = size.map(|size| (size.height() as u16, size.width() as u16));
            Ok(HostStdio::console_socket(socket, size)?)
        }
    }
}

/// Streams of one process to the guest, their headers in them already.
fn connect_streams(
    vmm: &Vmm,
    wanted: [bool; 3],
    id: &str,
    exec_id: &str,
) -> Result<[Option<OwnedFd>; 3], vmm::Error> {
    let connect = |index: usize| -> Result<Option<OwnedFd>, vmm::Error> {
        if !wanted[index] {
            return Ok(None);
        }
        let stream = vmm.connect(STDIO_PORT)?;
        let header = stdio::header(index, id, exec_id);
        nix::unistd::write(&stream, header.as_bytes()).map_err(|e| vmm::Error::Stream(e.into()))?;
        Ok(Some(stream))
    };
    Ok([connect(0)?, connect(1)?, connect(2)?])
}

fn first_state(id: &str, bundle: &Bundle, vmm: &Vmm) -> Result<State, Error> {
    let supervisor = ProcessId::current().map_err(|e| Error::Os("read /proc/self/stat", e))?;
    let annotations = bundle.spec.annotations().iter().flatten();
    Ok(State {
        oci_version: bundle.spec.version().clone(),
        id: id.into(),
        status: Status::Creating,
        supervisor,
        vmm: Some(vmm.process()?),
        bundle: bundle.path.clone(),
        rootfs: bundle.rootfs.clone(),
        created: crate::clock::now_rfc3339(),
        owner: nix::unistd::getuid().as_raw(),
        annotations: annotations.map(|(k, v)| (k.clone(), v.clone())).collect::<BTreeMap<_, _>>(),
        error: None,
        poststop: bundle.spec.hooks().as_ref().and_then(|h| h.poststop().clone()).unwrap_or_default(),
    })
}

fn has_host_hooks(bundle: &Bundle) -> bool {
    bundle.spec.hooks().is_some()
}

/// Mount points of a bundle, and whether each is a directory.
fn mount_points(bundle: &Bundle) -> Vec<(PathBuf, bool)> {
    let mounts = bundle.spec.mounts().iter().flatten();
    let is_dir = |mount: &oci_spec::runtime::Mount| {
        !bundle::is_bind(mount)
            || mount.source().as_ref().is_none_or(|source| bundle.path.join(source).is_dir())
    };
    mounts.map(|mount| (mount.destination().clone(), is_dir(mount))).collect()
}

fn entropy() -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; ENTROPY];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// An id that is ours: given back when this is dropped, unless somebody else is to do it.
struct Reservation {
    dir: Rc<StateDir>,
    ours: Cell<bool>,
}

impl Reservation {
    fn new(dir: StateDir) -> Self {
        Reservation { dir: Rc::new(dir), ours: Cell::new(true) }
    }

    fn dir(&self) -> &Rc<StateDir> {
        &self.dir
    }

    /// Leaves it to `delete`.
    fn keep(&self) {
        self.ours.set(false);
    }

    fn is_kept(&self) -> bool {
        !self.ours.get()
    }

    /// Gives it back now.
    fn release(&self) {
        if self.ours.replace(false)
            && let Err(e) = self.dir.remove()
        {
            tracing::warn!("{e}");
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release();
    }
}
