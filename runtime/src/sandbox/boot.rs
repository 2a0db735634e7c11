//! The start of a sandbox: first the process of its VMM, then, as soon as there is something to share, its VM.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use oci_spec::runtime::Spec;
use stockade_agent_protocol::RPC_PORT;
use stockade_vmm::control::Boot;
use tokio::sync::{Mutex, Notify};

use super::agent::Agent;
use super::cgroup::Membership;
use super::console::Console;
use super::memory::Memory;
use super::oom_score::OomScore;
use super::timeline::Timeline;
use super::vmm::Vmm;
use super::{Error, Sandbox, Share, share};
use crate::bundle;
use crate::guest_files::{self, GuestFiles};
use crate::network::Network;
use crate::process::ProcessId;
use crate::size::{By, VmSize};

/// Guest console output for `--debug`.
const DEBUG_CMDLINE: &str = "loglevel=7";
/// Tells the agent that it may be asked to run programs of the host.
const ENTER_CMDLINE: &str = "stockade.enter";

/// A VMM process that waits for its VM, in the namespaces that this process has entered for it.
pub struct Spawned {
    vmm: Vmm,
    network: Network,
    console: Console,
    console_end: OwnedFd,
    timeline: Timeline,
    outside: Vec<OwnedFd>,
    cgroup: Option<PathBuf>,
}

/// What the host wants of a guest besides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// It shall be talkative.
    pub debug: bool,
    /// It can be entered, outside of its containers.
    pub enter: bool,
}

impl Sandbox {
    /// Moves this process, which must have one thread, to a mount namespace of its own and starts the VMM there.
    /// `hooks` says whether there will be some to run in the namespaces that were left, for this and for `network`.
    pub fn spawn(
        hooks: bool,
        network: Network,
        cgroup: Option<&Membership>,
        timeline: Timeline,
    ) -> Result<Spawned, Error> {
        let mut outside: Vec<OwnedFd> = share::enter_namespace(hooks)?.into_iter().collect();
        if hooks {
            outside.extend(network.outside().map_err(|e| Error::Os("keep the network namespace", e))?);
        }
        let (console, console_end) = Console::new().map_err(|e| Error::Os("make the console pipe", e))?;
        let vmms = cgroup.map(Membership::make_for_vmm).transpose()?;
        let vmm = Vmm::spawn(console_end.as_fd(), vmms.as_ref().map(AsFd::as_fd))?;
        timeline.mark("vmm_spawned");
        let cgroup = cgroup.map(|cgroup| cgroup.path().to_owned());
        Ok(Spawned { vmm, network, console, console_end, timeline, outside, cgroup })
    }
}

impl Spawned {
    /// The VMM's identity, for who cleans up later.
    pub fn vmm_process(&self) -> Result<ProcessId, Error> {
        Ok(self.vmm.process()?)
    }

    /// Lets the VM boot for a container or a pod with this configuration, with a share and what is in it so far. Needs a
    /// runtime around it. The size comes with what its memory was chosen by.
    pub fn boot(
        self,
        spec: &Spec,
        share: Share,
        (size, by): (VmSize, By),
        files: GuestFiles,
        wishes: Wishes,
    ) -> Result<Sandbox, Error> {
        let Spawned { vmm, network, console, console_end, timeline, outside, cgroup } = self;
        let tree = share.tree()?;
        let words = [(wishes.debug, DEBUG_CMDLINE), (wishes.enter, ENTER_CMDLINE)];
        let words: Vec<_> = words.into_iter().filter_map(|(wished, word)| wished.then_some(word)).collect();
        let boot = Boot {
            vcpus: size.vcpus,
            memory_bytes: size.memory,
            cmdline: words.join(" "),
            kernel_name: files.dir.join(guest_files::KERNEL).display().to_string(),
            initrd_name: files.dir.join(guest_files::INITRD).display().to_string(),
            network: network.exists(),
        };
        vmm.boot(boot, files.kernel.as_fd(), files.initrd.as_fd(), tree.as_fd(), console_end.as_fd())?;
        let rpc = vmm.connect(RPC_PORT)?;
        let agent = Agent::new(rpc).map_err(|source| Error::Agent { what: "reach the agent", source })?;
        Ok(Sandbox {
            agent,
            timeline: Rc::new(timeline),
            vmm,
            console,
            share,
            network,
            resolv_conf: RefCell::default(),
            has_resolver: Cell::new(false),
            rewiring: Mutex::default(),
            dialled: Notify::new(),
            outside: outside.into(),
            first_run_ns: Cell::new(0),
            oom_score: OomScore::default(),
            memory: Memory::new(size, by, cgroup),
            enter: wishes.enter,
            names: bundle::names_of_the_host(spec),
            view: RefCell::default(),
        })
    }
}
