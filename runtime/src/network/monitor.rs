//! What changes in the namespace while the sandbox lives: carriers at once, everything else once it has settled.
//!
//! Who adds an interface does so in many steps, each of which the kernel tells of. They are looked into when there has
//! been none for a moment, and not more often than that, however many come. Of what the supervisor does to its own taps
//! it hears nothing here, so that it does not answer itself.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use stockade_netlink::Connection;
use stockade_netlink::route::RouteNetlinkMessage;
use stockade_netlink::route::link::{LinkFlags, LinkMessage};
use stockade_netlink::route::neighbour::NeighbourState;
use tokio::io::Interest;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::{Error, Slots, kernel, scan};
use crate::sandbox::poll::register;

/// Changes are looked into when none has come for so long,
const QUIET: Duration = Duration::from_millis(50);
/// or, where they do not end, so long after the first.
const PATIENCE: Duration = Duration::from_secs(1);
/// Packets of the kernel that are read at once before a look; with more, another one will follow.
const PACKETS_MAX: usize = 1000;
/// The loopback interface of every namespace, of which the guest has its own.
const LOOPBACK: u32 = 1;

/// What has changed.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    /// An interface has lost or got its carrier.
    Carrier {
        /// Whose.
        slot: u8,
        /// Whether it has one now.
        up: bool,
    },
    /// Something else, and it is over for now.
    Settled,
}

/// Whether an interface in this state carries frames.
pub fn carries(flags: LinkFlags) -> bool {
    flags.contains(LinkFlags::Up | LinkFlags::LowerUp)
}

/// Hears of every change in the network namespace in which it was made, from then on.
pub struct Monitor {
    socket: stockade_netlink::Monitor,
    /// Interfaces with their carriers, not looked at yet.
    heard: RefCell<VecDeque<(u32, bool)>>,
    /// When the first and the last change came that nobody has looked into.
    unsettled: Cell<Option<(Instant, Instant)>>,
    /// Somebody wants to know of more than carriers.
    wanted: Cell<bool>,
    woken: Notify,
}

impl Monitor {
    /// Begins to listen.
    pub fn new() -> io::Result<Self> {
        Ok(Monitor {
            socket: stockade_netlink::Monitor::new()?,
            heard: RefCell::default(),
            unsettled: Cell::default(),
            wanted: Cell::default(),
            woken: Notify::new(),
        })
    }

    /// From now on not only carriers are told of.
    pub fn tell_all(&self) {
        self.wanted.set(true);
        self.woken.notify_one();
    }

    /// Waits for the next change. A carrier is noted in its slot.
    pub async fn next(&self, slots: &RefCell<Slots>) -> Result<Change, Error> {
        let what = || kernel("watch the interfaces");
        let socket = register(self.socket.as_fd(), Interest::READABLE).map_err(|e| what()(e.into()))?;
        loop {
            while let Some((index, up)) = self.heard.borrow_mut().pop_front() {
                let slots = slots.borrow();
                let mut slots =
                    slots.iter().zip(0..).filter_map(|(slot, number)| Some((slot.as_ref()?, number)));
                let slot = slots.find(|(slot, _)| slot.wired.index == index);
                if let Some((_, slot)) = slot.filter(|(slot, _)| slot.carrier.replace(up) != up) {
                    return Ok(Change::Carrier { slot, up });
                }
            }
            let due = self.unsettled.get().filter(|_| self.wanted.get());
            let due = due.map(|(first, last)| (last + QUIET).min(first + PATIENCE));
            if due.is_some_and(|due| due <= Instant::now()) {
                self.unsettled.set(None);
                return Ok(Change::Settled);
            }
            let settled = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            let ready = tokio::select! {
                ready = socket.readable() => ready,
                () = settled => continue,
                () = self.woken.notified() => continue,
            };
            if !self.read(slots).map_err(what())? {
                ready.map_err(what())?.clear_ready();
            }
        }
    }

    /// What has been told so far is about to be seen.
    pub fn catch_up(&self, slots: &RefCell<Slots>) -> Result<(), Error> {
        for _ in 0..PACKETS_MAX {
            if !self.read(slots).map_err(kernel("watch the interfaces"))? {
                self.unsettled.set(None);
                break;
            }
        }
        Ok(())
    }

    /// Reads a packet of the kernel; false if there is none.
    fn read(&self, slots: &RefCell<Slots>) -> io::Result<bool> {
        let lost = match self.socket.read() {
            Ok(changes) => {
                self.heard.borrow_mut().extend(changes.iter().filter_map(carrier));
                if !changes.iter().any(|change| concerns(change, &slots.borrow())) {
                    return Ok(true);
                }
                false
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            // Some got lost, or make no sense.
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) || e.kind() == io::ErrorKind::InvalidData => {
                true
            }
            Err(e) => return Err(e),
        };
        if lost {
            let links = Connection::open()?.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
            self.heard.borrow_mut().extend(links.iter().filter_map(carrier));
        }
        let now = Instant::now();
        let first = self.unsettled.get().map_or(now, |(first, _)| first);
        self.unsettled.set(Some((first, now)));
        Ok(true)
    }
}

fn carrier(change: &RouteNetlinkMessage) -> Option<(u32, bool)> {
    match change {
        RouteNetlinkMessage::NewLink(link) => Some((link.header.index, carries(link.header.flags))),
        RouteNetlinkMessage::DelLink(link) => Some((link.header.index, false)),
        _ => None,
    }
}

/// Whether it may be about what the guest is told of.
fn concerns(change: &RouteNetlinkMessage, slots: &Slots) -> bool {
    use RouteNetlinkMessage::{
        DelAddress, DelLink, DelNeighbour, DelRoute, NewAddress, NewLink, NewNeighbour, NewRoute,
    };
    let is_tap = |index| slots.iter().flatten().any(|slot| slot.tap.get() == Some(index));
    match change {
        NewLink(link) | DelLink(link) => link.header.index != LOOPBACK && !is_tap(link.header.index),
        NewAddress(message) | DelAddress(message) => {
            message.header.index != LOOPBACK && !is_tap(message.header.index)
        }
        NewRoute(route) | DelRoute(route) => !scan::over(route).is_some_and(is_tap),
        // What the kernel learns of others is not carried over.
        NewNeighbour(message) if message.header.state != NeighbourState::Permanent => false,
        NewNeighbour(message) | DelNeighbour(message) => !is_tap(message.header.ifindex),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_carries_when_it_is_up_and_so_is_what_is_below_it() {
        assert!(carries(LinkFlags::Up | LinkFlags::LowerUp | LinkFlags::Running));
        assert!(!carries(LinkFlags::Up));
        assert!(!carries(LinkFlags::LowerUp));
    }

    #[test]
    fn what_happens_to_a_tap_of_ours_or_the_loopback_interface_is_no_news() {
        let device = stockade_vmm::control::Interface { mac: [2; 6], mtu: 1500, up: true };
        let wired = super::super::Wired { index: 2, name: "eth0".into() };
        let slot = super::super::Slot { wired, device, carrier: Cell::new(true), tap: Cell::new(Some(3)) };
        let slots = [Some(slot), None, None, None];
        let link = |index| {
            let mut link = LinkMessage::default();
            link.header.index = index;
            RouteNetlinkMessage::NewLink(link)
        };
        let heard = [1, 2, 3, 4].map(|index| concerns(&link(index), &slots));
        assert_eq!(heard, [false, true, false, true]);
    }
}
