//! The command line's sandbox: a VM for one container, from beginning to end.
//!
//! [`run`] is its whole life from top to bottom, in the process that becomes its supervisor. Whatever happens, what
//! was begun is undone in the opposite order, and what is left when this process is killed is what
//! [`crate::state::StateDir::remove`] removes.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use tokio::task::LocalSet;

use super::agent::Exit;
use super::cgroup::{self, Membership};
use super::container::Container;
use super::join::{self, Host};
use super::reservation::Reservation;
use super::signals::Signals;
use super::stdio::{self, HostStdio};
use super::supervisor::{Story, Supervisor};
use super::timeline::Timeline;
use super::{Error, Sandbox, Share, Wishes, control};
use crate::bundle::{Bundle, guest};
use crate::config::Settings;
use crate::guest_files::GuestFiles;
use crate::network::Network;
use crate::process::ProcessId;
use crate::records::{self, Record};
use crate::size::{self, VmSize};
use crate::state::{SHARE, State, StateDir, Status};

/// What is to be run.
pub struct Launch {
    /// The container's id.
    pub id: String,
    /// Where state lies.
    pub root: PathBuf,
    /// What runs.
    pub bundle: Bundle,
    /// In whose VM, if not in one of its own.
    pub with: Option<Host>,
    /// Directory in the image store that goes with the container.
    pub scratch: Option<PathBuf>,
    /// How.
    pub settings: Settings,
    /// Where a terminal's other end goes.
    pub console_socket: Option<PathBuf>,
    /// Whether the cgroup's path has systemd's form.
    pub systemd_cgroup: bool,
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

/// Runs a sandbox with one container from beginning to end. `ready` is called once the container is created (and
/// started, where that is this mode's business).
pub fn run(
    mut launch: Launch,
    mode: Mode,
    ready: impl FnOnce() -> Result<(), Error> + 'static,
) -> Result<Exit, Error> {
    let result = match launch.with.take() {
        None => run_to_its_end(launch, mode, ready),
        Some(host) => join::run(launch, host, mode, ready),
    };
    if let Some(part) = result.as_ref().err().and_then(Error::part) {
        records::append(&Record::Failed(part.into()));
    }
    result
}

fn run_to_its_end(
    launch: Launch,
    mode: Mode,
    ready: impl FnOnce() -> Result<(), Error> + 'static,
) -> Result<Exit, Error> {
    let timeline = Timeline::begin(launch.process_start_ns);
    let Launch { id, root, bundle, scratch, settings, .. } = launch;

    let files = GuestFiles::open(&settings)?;
    let resources = bundle.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let (size, by) = VmSize::of(bundle.spec.annotations().as_ref(), resources, &settings)?;
    let adapted = guest::adapt(&bundle, &id)?;
    let os = |what| move |e: io::Error| Error::Os(what, e);

    let place = cgroup::place(&bundle.spec, &bundle.limits(), &id, launch.systemd_cgroup)?;
    let signals = Signals::block().map_err(os("block signals"))?;
    // The id first, and with it what `delete` is to remove: nobody else of this name gets as far as the cgroup.
    let first = first_state(&id, &bundle, size)?;
    let first = State { scratch, cgroup: place.path().map(Path::to_owned), ..first };
    let reservation = Reservation::new(StateDir::create(&root, &id)?);
    reservation.dir().save(&first)?;
    let cgroup = Membership::enter(place, &bundle.limits(), size, first.supervisor)?;
    let network = Network::enter(&bundle.spec, !matches!(mode, Mode::Run { .. }))?;
    let spawned = Sandbox::spawn(bundle.spec.hooks().is_some(), network, cgroup.as_ref(), timeline)?;

    // Now it says whom `delete` has to wait for. Until it does the VMM has no VM, and goes with this process.
    let state = State { vmm: Some(spawned.vmm_process()?), ..first };
    reservation.dir().save(&state)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(os("set up the event loop"))?;
    let inside = runtime.enter();
    let share = Share::mount(reservation.dir().path().join(SHARE))?;
    share.add(&bundle, &adapted.binds)?;
    let wishes = Wishes { debug: launch.debug, enter: settings.enter };
    let sandbox = spawned.boot(&bundle.spec, share, (size, by), files, wishes)?;
    sandbox.count(&id, size::memory_limit(&bundle.limits())?);
    sandbox.add_oom_score(&bundle.spec);
    sandbox.know_resolv_conf(&bundle.spec);
    sandbox.keep_console(reservation.dir().path());

    let mut stdio = open_stdio(&bundle, launch.console_socket.as_deref())?;
    if !matches!(mode, Mode::Run { .. }) {
        // Whoever reads the workload's output sees its end when the workload closes it.
        stdio::release_inherited().map_err(os("let go of the standard streams"))?;
    }
    let streams = sandbox.connect_streams(stdio.wanted(), &id, "")?;
    let listener = control::Listener::bind(reservation.dir()).map_err(os("make the control socket"))?;
    sandbox.timeline.mark("prepared");
    drop(inside);

    let local = LocalSet::new();
    let outcome = local.block_on(&runtime, async {
        let container = Container::first(sandbox, reservation.dir(), state, &adapted.binds);
        let supervisor = Supervisor::new(container);
        let wanted = stdio.wanted();
        let first_byte = supervisor.first_byte_mark();
        let relays = stdio.relay(streams, first_byte).map_err(os("relay the standard streams"))?;
        let kept = || {
            // From here on the container exists for other commands, and `delete` is how it ends.
            if mode != (Mode::Run { keep: false }) {
                reservation.keep();
            }
        };
        let story = Story {
            hooks: bundle.spec.hooks().clone(),
            spec: adapted.spec,
            wanted,
            start: mode != Mode::Create,
            // Its caller has it in its hand; of the others only the number is known, and what is done with it.
            shown: (!matches!(mode, Mode::Run { .. })).then_some(adapted.shown),
            ready: Box::new(ready),
            kept: &kept,
        };
        let result = supervisor.serve(story, relays, &stdio, &signals, &listener).await;
        Ok::<_, Error>((supervisor, result))
    });
    let (supervisor, result) = outcome?;
    stdio.restore();

    supervisor.end(&reservation, cgroup.as_ref(), result.as_ref().err());
    result
}

/// Where the container's standard streams lead.
fn open_stdio(bundle: &Bundle, console_socket: Option<&Path>) -> Result<HostStdio, Error> {
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

/// What is known of a container of this process before anything is made.
pub(super) fn first_state(id: &str, bundle: &Bundle, size: VmSize) -> Result<State, Error> {
    let supervisor = ProcessId::current().map_err(|e| Error::Os("read /proc/self/stat", e))?;
    let annotations = bundle.spec.annotations().iter().flatten();
    Ok(State {
        oci_version: bundle.spec.version().clone(),
        id: id.into(),
        status: Status::Creating,
        supervisor,
        vmm: None,
        sandbox: None,
        bundle: bundle.path.clone(),
        rootfs: bundle.rootfs.clone(),
        created: crate::clock::now_rfc3339(),
        owner: nix::unistd::getuid().as_raw(),
        annotations: annotations.map(|(k, v)| (k.clone(), v.clone())).collect::<BTreeMap<_, _>>(),
        error: None,
        cgroup: None,
        resources: bundle.limits(),
        vm: size,
        scratch: None,
        network: None,
        poststop: bundle.spec.hooks().as_ref().and_then(|h| h.poststop().clone()).unwrap_or_default(),
    })
}
