//! The network of a sandbox: what its network namespace on the host holds, wired to the VM.
//!
//! The supervisor enters the namespace once, before it starts anything, and never leaves it: a caller that looks at
//! `/proc/PID/ns/net` of the container's process finds the container's network, as with any runtime, and sockets and
//! taps are in the right place by themselves. Each interface found there gets a tap of its own, and everything that
//! arrives at the one leaves by the other ([`wire`]). Addresses and routes stay where they are, so that plug-ins and
//! people see what they made; the guest gets the same ([`scan`]).
//!
//! It goes on to do so when somebody adds an interface later, or changes or removes one ([`monitor`]): what is there is
//! then compared with what is wired, and of the difference [`News`] are made. Where a new interface has the MAC address
//! of one that has gone, it takes its place at the tap, and the guest notices nothing.
//!
//! What was wired is taken back by whoever ends the sandbox. Taps end with the processes that hold them; what else
//! there is was written into the state before it was made, so that [`clean_up`] finds it when those were killed.

mod changes;
pub mod loopback;
mod monitor;
mod namespace;
pub mod resolver;
mod scan;
mod tap;
mod traffic;
mod wire;

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};
use stockade_agent_protocol::messages::SetNetworkRequest;
use stockade_netlink::Connection;
use stockade_vmm::control::Interface;

use crate::bundle::hooks;
use changes::Changes;
pub use changes::{News, Removal};
pub use monitor::Change;
use monitor::Monitor;
use namespace::Namespace;
pub use traffic::Traffic;

/// Network slots of a VM.
const SLOTS: usize = 4;

/// Errors of the network. Each names what it is about.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the namespace cannot be entered
    #[error("cannot enter the network namespace {}: {source}", path.display())]
    Enter { path: PathBuf, source: io::Error },
    /// it is not the container's
    #[error(
        "linux.namespaces: the network namespace {} is the host's own, which a VM cannot share: give the container one of its own (not --net=host)",
        .0.display()
    )]
    Host(PathBuf),
    /// there is none to be had
    #[error("cannot make a network namespace: {0}")]
    Make(#[source] io::Error),
    /// the kernel says no
    #[error("cannot {what}: {source}")]
    Kernel { what: String, source: io::Error },
    /// an interface that cannot be had in a VM
    #[error("cannot wire the interface {name} ({kind}) to the VM: {reason}")]
    Interface { name: String, kind: String, reason: String },
    /// too many of them
    #[error(
        "the network namespace has {0} interfaces ({1}), and a VM has at most {SLOTS}: remove some",
        found.len(), found.join(", ")
    )]
    TooMany { found: Vec<String> },
    /// a route
    #[error("cannot carry over a route of the network namespace: {0}")]
    Route(#[from] stockade_netlink::routes::Error),
    /// policy routing
    #[error(
        "the network namespace has rules of policy routing (ip rule), which are not carried over: remove them"
    )]
    Rules,
    /// no tap
    #[error("cannot make a tap: {0}; is the tun module loaded (modprobe tun)?")]
    Tap(#[source] io::Error),
}

fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Kernel { what, source }
}

/// What there is to take back, for who cleans up later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Where the namespace can be entered; `None` for one that ends with the supervisor.
    pub path: Option<PathBuf>,
    /// Device and inode: a path may lead to another one by then.
    pub namespace: (u64, u64),
    /// The interfaces that were wired.
    pub interfaces: Vec<Wired>,
}

/// An interface of the namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wired {
    /// Its index.
    pub index: u32,
    /// Its name then.
    pub name: String,
}

/// A sandbox's network.
pub struct Network {
    /// `None` for a sandbox with a loopback interface only.
    inside: Option<Inside>,
    /// Interfaces in their slots.
    slots: RefCell<Slots>,
    /// What the guest has been told; `None` where it may have understood something else.
    told: RefCell<Option<SetNetworkRequest>>,
    /// What it cannot be told, as has been logged.
    complaints: RefCell<Vec<String>>,
}

struct Inside {
    namespace: Namespace,
    monitor: Monitor,
}

type Slots = [Option<Slot>; SLOTS];

struct Slot {
    wired: Wired,
    device: Interface,
    carrier: Cell<bool>,
    /// Index of the tap, once there is one.
    tap: Cell<Option<u32>>,
}

/// What of a namespace that cannot be the same in a guest is an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// All of it, and nothing is done.
    Strict,
    /// None: it is left out, and logged.
    Lenient,
}

impl Network {
    /// Enters the namespace that the bundle names, for good. A bundle with a network namespace of no name gets one if
    /// hooks or the caller, by way of this process's number, are to put something into it; otherwise it has a loopback
    /// interface only.
    ///
    /// This process must have one thread.
    pub fn enter(spec: &Spec, by_number: bool) -> Result<Self, Error> {
        let namespaces = spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
        let entry = namespaces.into_iter().find(|entry| entry.typ() == LinuxNamespaceType::Network);
        let path = entry.map(|entry| entry.path().clone().filter(|path| !path.as_os_str().is_empty()));
        match path {
            Some(Some(path)) => Self::at(path),
            Some(None) if by_number || has_early_hooks(spec) => Self::of(Some(Namespace::make()?)),
            Some(None) | None => Self::of(None),
        }
    }

    /// Enters the namespace at a path, for good.
    pub fn at(path: PathBuf) -> Result<Self, Error> {
        Self::of(Some(Namespace::enter(path)?))
    }

    fn of(namespace: Option<Namespace>) -> Result<Self, Error> {
        let inside = match namespace {
            None => None,
            Some(namespace) => {
                let monitor = Monitor::new().map_err(kernel("watch the interfaces"))?;
                Some(Inside { namespace, monitor })
            }
        };
        Ok(Network {
            inside,
            slots: RefCell::default(),
            told: RefCell::new(Some(SetNetworkRequest::default())),
            complaints: RefCell::default(),
        })
    }

    /// Whether the VM needs network slots.
    pub fn exists(&self) -> bool {
        self.inside.is_some()
    }

    /// The namespace that this process was in before, for what is not the sandbox's.
    pub fn outside(&self) -> io::Result<Option<OwnedFd>> {
        self.inside.as_ref().map(|inside| inside.namespace.outside()).transpose()
    }

    /// Wires what there is in the namespace and is not wired yet, and takes back what is not there any more. `save` is
    /// given what there will be to take back before any of it is made.
    pub fn wire<E: From<Error>>(
        &self,
        demand: Demand,
        save: impl FnOnce(Record) -> Result<(), E>,
    ) -> Result<News, E> {
        let Some(Inside { namespace, monitor }) = &self.inside else { return Ok(News::default()) };
        let mut kernel = Connection::open().map_err(kernel("open a netlink socket"))?;
        monitor.catch_up(&self.slots)?;
        let known: Vec<Wired> = self.wired();
        let taps: Vec<u32> = self.slots.borrow().iter().flatten().filter_map(|slot| slot.tap.get()).collect();
        let mut found = scan::scan(&mut kernel, &known, &taps)?;
        self.complain(demand, std::mem::take(&mut found.refused))?;

        let changes = Changes::of(&self.slots.borrow(), &found);
        if changes.any() {
            save(namespace.record(found.interfaces.iter().map(scan::Interface::wired).collect()))?;
        }
        // What fails from here on may have been done in part.
        let told = self.told.take();
        let mut news = changes.make(&mut self.slots.borrow_mut(), &found, &mut kernel)?;
        let all = found.request;
        let known = news.removal.as_ref().map(|removal| &removal.request).or(told.as_ref());
        news.request = (known != Some(&all)).then(|| all.clone());
        self.told.replace(Some(all));
        Ok(news)
    }

    /// The guest may not have understood the last news: it is told everything next time.
    pub fn doubt(&self) {
        self.told.take();
    }

    fn wired(&self) -> Vec<Wired> {
        self.slots.borrow().iter().flatten().map(|slot| slot.wired.clone()).collect()
    }

    /// Fails with the first, or logs those that are new.
    fn complain(&self, demand: Demand, refused: Vec<Error>) -> Result<(), Error> {
        if demand == Demand::Strict {
            return refused.into_iter().next().map_or(Ok(()), Err);
        }
        let lines: Vec<_> = refused.iter().map(Error::to_string).collect();
        let before = self.complaints.replace(lines.clone());
        for line in lines.iter().filter(|line| !before.contains(line)) {
            tracing::warn!("a change of the network namespace does not reach the VM: {line}");
        }
        Ok(())
    }

    /// What the guest sees in a slot, as it is now.
    pub fn device(&self, slot: u8) -> Option<Interface> {
        let slots = self.slots.borrow();
        let slot = slots.get(usize::from(slot))?.as_ref()?;
        Some(Interface { up: slot.carrier.get(), ..slot.device })
    }

    /// What has gone over the interfaces that are wired.
    pub fn traffic(&self) -> Result<Vec<Traffic>, Error> {
        let wired = self.wired();
        if wired.is_empty() {
            return Ok(Vec::new());
        }
        let mut kernel = Connection::open().map_err(kernel("open a netlink socket"))?;
        traffic::read(&mut kernel, wired.iter()).map_err(self::kernel("count the traffic"))
    }

    /// From now on [`Self::change`] tells of everything, not only of carriers.
    pub fn follow(&self) {
        if let Some(inside) = &self.inside {
            inside.monitor.tell_all();
        }
    }

    /// Waits for a change in the namespace.
    pub async fn change(&self) -> Result<Change, Error> {
        match &self.inside {
            Some(inside) => inside.monitor.next(&self.slots).await,
            None => std::future::pending().await,
        }
    }

    /// Takes back what was wired. If that fails, it is left to [`clean_up`].
    pub fn unwire(&self) -> Result<(), Error> {
        let wired = self.wired();
        self.slots.take();
        if wired.is_empty() {
            return Ok(());
        }
        let mut kernel = Connection::open().map_err(kernel("open a netlink socket"))?;
        wired.iter().try_for_each(|wired| wire::unwire(&mut kernel, wired))
    }
}

/// Whether hooks run before the network is looked at.
fn has_early_hooks(spec: &Spec) -> bool {
    spec.hooks().as_ref().is_some_and(|all| hooks::early(all).iter().any(|(_, list)| !list.is_empty()))
}

/// Takes back what a supervisor that was killed has left. A namespace that is gone has nothing left in it.
pub fn clean_up(record: &Record) -> Result<(), Error> {
    let Some(path) = &record.path else { return Ok(()) };
    namespace::within(path, record.namespace, || {
        let mut kernel = Connection::open().map_err(kernel("open a netlink socket"))?;
        record.interfaces.iter().try_for_each(|wired| wire::unwire(&mut kernel, wired))
    })
}
