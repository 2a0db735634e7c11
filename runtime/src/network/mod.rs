//! The network of a sandbox: what its network namespace on the host holds, wired to the VM.
//!
//! The supervisor enters the namespace once, before it starts anything, and never leaves it: a caller that looks at
//! `/proc/PID/ns/net` of the container's process finds the container's network, as with any runtime, and sockets and
//! taps are in the right place by themselves. Each interface found there gets a tap of its own, and everything that
//! arrives at the one leaves by the other ([`wire`]). Addresses and routes stay where they are, so that plug-ins and
//! people see what they made; the guest gets the same ([`scan`]).
//!
//! What was wired is taken back by whoever ends the sandbox. Taps end with the processes that hold them; what else
//! there is was written into the state before it was made, so that [`clean_up`] finds it when those were killed.

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
    slots: RefCell<Vec<Slot>>,
    /// What the guest has been told.
    told: RefCell<SetNetworkRequest>,
}

struct Inside {
    namespace: Namespace,
    monitor: Monitor,
}

struct Slot {
    wired: Wired,
    device: Interface,
    carrier: Cell<bool>,
    /// Index of the tap, once there is one.
    tap: Cell<Option<u32>>,
}

/// What is new in the network.
pub struct News {
    /// Slots to attach a tap to, each.
    pub taps: Vec<(u8, OwnedFd)>,
    /// What to tell the agent then, if anything.
    pub request: Option<SetNetworkRequest>,
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
        Ok(Network { inside, slots: RefCell::default(), told: RefCell::default() })
    }

    /// Whether the VM needs network slots.
    pub fn exists(&self) -> bool {
        self.inside.is_some()
    }

    /// The namespace that this process was in before, for what is not the sandbox's.
    pub fn outside(&self) -> io::Result<Option<OwnedFd>> {
        self.inside.as_ref().map(|inside| inside.namespace.outside()).transpose()
    }

    /// Wires what there is in the namespace and is not wired yet. `save` is given what there will be to take back
    /// before any of it is made.
    pub fn wire<E: From<Error>>(&self, save: impl FnOnce(Record) -> Result<(), E>) -> Result<News, E> {
        let Some(Inside { namespace, .. }) = &self.inside else {
            return Ok(News { taps: Vec::new(), request: None });
        };
        let mut kernel = Connection::open().map_err(kernel("open a netlink socket"))?;
        let known: Vec<Wired> = self.slots.borrow().iter().map(|slot| slot.wired.clone()).collect();
        let taps: Vec<u32> = self.slots.borrow().iter().filter_map(|slot| slot.tap.get()).collect();
        let found = scan::scan(&mut kernel, &known, &taps)?;
        let is_new = |found: &&scan::Interface| !known.iter().any(|wired| wired.index == found.index);
        let new: Vec<_> = found.interfaces.iter().filter(is_new).collect();
        if !new.is_empty() {
            let all = known.iter().cloned().chain(new.iter().map(|interface| interface.wired()));
            save(namespace.record(all.collect()))?;
        }
        let mut taps = Vec::new();
        for interface in new {
            let mut slots = self.slots.borrow_mut();
            let number = slots.len() as u8;
            let (device, carrier) = (interface.device(), Cell::new(interface.device().up));
            // There before it is wired, so that what was begun is taken back.
            slots.push(Slot { wired: interface.wired(), device, carrier, tap: Cell::default() });
            let (tap, index) = wire::wire(&mut kernel, interface)?;
            if let Some(slot) = slots.last() {
                slot.tap.set(Some(index));
            }
            taps.push((number, tap));
        }
        let news = *self.told.borrow() != found.request;
        let request = news.then(|| found.request.clone());
        self.told.replace(found.request);
        Ok(News { taps, request })
    }

    /// What the guest sees in a slot, as it is now.
    pub fn device(&self, slot: u8) -> Option<Interface> {
        let slots = self.slots.borrow();
        slots.get(usize::from(slot)).map(|slot| Interface { up: slot.carrier.get(), ..slot.device })
    }

    /// What has gone over the interfaces that are wired.
    pub fn traffic(&self) -> Result<Vec<Traffic>, Error> {
        let slots = self.slots.borrow();
        if slots.is_empty() {
            return Ok(Vec::new());
        }
        let mut kernel = Connection::open().map_err(kernel("open a netlink socket"))?;
        let counted = traffic::read(&mut kernel, slots.iter().map(|slot| &slot.wired));
        counted.map_err(self::kernel("count the traffic"))
    }

    /// Waits until an interface loses or gets its carrier; says in which slot, and whether it has one now.
    pub async fn carrier_change(&self) -> Result<(u8, bool), Error> {
        match &self.inside {
            Some(inside) => inside.monitor.next(&self.slots).await,
            None => std::future::pending().await,
        }
    }

    /// Takes back what was wired. If that fails, it is left to [`clean_up`].
    pub fn unwire(&self) -> Result<(), Error> {
        let slots = self.slots.take();
        if slots.is_empty() {
            return Ok(());
        }
        let mut kernel = Connection::open().map_err(kernel("open a netlink socket"))?;
        slots.iter().try_for_each(|slot| wire::unwire(&mut kernel, &slot.wired))
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
