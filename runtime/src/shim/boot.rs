//! The start of a shim's VM.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use oci_spec::runtime::{LinuxResources, Spec};

use super::hints;
use super::pod_config::PodConfig;
use super::role::Role;
use crate::bundle::{self, pod::Shared};
use crate::config::Settings;
use crate::guest_files::GuestFiles;
use crate::network::Network;
use crate::process::ProcessId;
use crate::sandbox::cgroup::{self, Membership};
use crate::sandbox::reservation::Reservation;
use crate::sandbox::timeline::Timeline;
use crate::sandbox::{self, Sandbox, Share, Wishes};
use crate::size::{By, VmSize};
use crate::state::{SHARE, State, StateDir, Status};

/// What is known of a sandbox before it has a VM.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its id: that of its first container, or the name of its group.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// What kind of sandbox.
    pub role: Role,
    /// The bundle with which it was started.
    pub bundle: PathBuf,
    /// Log more.
    pub debug: bool,
    /// When this process began, on the monotonic clock.
    pub process_start_ns: u64,
}

/// A VM on its way, and what of it is on the host.
pub struct Booted {
    /// The VM.
    pub sandbox: Sandbox,
    /// What its containers share, if it is a pod.
    pub shared: Option<Shared>,
    /// What others are told of it.
    pub state: RefCell<State>,
    dir: Rc<StateDir>,
    held: RefCell<Option<(Option<Membership>, Reservation)>>,
}

impl Booted {
    /// Where its state is kept.
    pub fn dir(&self) -> &StateDir {
        &self.dir
    }

    /// Gives its places on the host back. The VM must be gone.
    pub fn release(&self) {
        self.held.take();
    }
}

/// Starts the VM. Everything in it comes later, so only what it is as a whole is looked at here. With `pod`, the
/// configuration was made of that, and the pod's files are this runtime's to make.
///
/// This process must have one thread.
pub fn boot(plan: &Plan, spec: &Spec, pod: Option<&PodConfig>) -> Result<Booted, sandbox::Error> {
    let settings = Settings::load()?;
    let files = GuestFiles::open(&settings)?;
    let mut shared = plan.role.is_pod().then(|| Shared::of(spec)).transpose()?;
    let (size, by) = size(plan, spec, &settings)?;
    // The limits of a pod are its parent cgroup's, which is kubelet's to set.
    let limits = if plan.role.is_pod() { LinuxResources::default() } else { bundle::limits(spec) };
    let systemd = cgroup::is_systemd_path(spec);
    let place = cgroup::place(spec, &limits, &plan.id, systemd)?;
    let annotations = spec.annotations().iter().flatten();
    let first = State {
        oci_version: spec.version().clone(),
        id: plan.id.clone(),
        status: Status::Running,
        supervisor: ProcessId::current().map_err(|e| sandbox::Error::Os("read /proc/self/stat", e))?,
        vmm: None,
        sandbox: None,
        bundle: plan.bundle.clone(),
        rootfs: plan.bundle.join(super::task::ROOTFS),
        created: crate::clock::now_rfc3339(),
        owner: nix::unistd::getuid().as_raw(),
        annotations: annotations.map(|(k, v)| (k.clone(), v.clone())).collect(),
        error: None,
        resources: limits.clone(),
        vm: size,
        poststop: Vec::new(),
        cgroup: place.path().map(Path::to_owned),
        network: None,
        scratch: None,
    };
    // The id first, and with it what is to be removed: nobody else of this name gets as far as the cgroup.
    let root = super::state_root(&plan.namespace);
    let reservation = Reservation::new(StateDir::create(&root, &plan.id)?);
    let dir = reservation.dir().clone();
    dir.save(&first)?;
    let cgroup = Membership::enter(place, &limits, size, first.supervisor)?;
    let network = Network::enter(spec, true)?;
    let spawned = Sandbox::spawn(true, network, cgroup.as_ref(), Timeline::begin(plan.process_start_ns))?;
    if let (Some(pod), Some(shared)) = (pod, &mut shared) {
        pod.make_files(dir.path(), shared).map_err(|e| sandbox::Error::Os("write the pod's files", e))?;
    }
    let state = State { vmm: Some(spawned.vmm_process()?), ..first };
    dir.save(&state)?;
    let share = Share::mount(dir.path().join(SHARE))?;
    let wishes = Wishes { debug: plan.debug, enter: settings.enter };
    let sandbox = spawned.boot(spec, share, (size, by), files, wishes)?;
    sandbox.keep_console(dir.path());
    Ok(Booted {
        sandbox,
        shared,
        state: RefCell::new(state),
        dir,
        held: RefCell::new(Some((cgroup, reservation))),
    })
}

fn size(plan: &Plan, spec: &Spec, settings: &Settings) -> Result<(VmSize, By), sandbox::Error> {
    if plan.role.is_pod() {
        return Ok(hints::size(spec.annotations().as_ref(), settings)?);
    }
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    Ok(VmSize::of(spec.annotations().as_ref(), resources, settings)?)
}
