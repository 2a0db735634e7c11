//! What has to be done for the VM to have what the namespace has, and no more.
//!
//! First what has gone is taken away, so that its slots are free for what is new. An interface with the MAC address of
//! one that has gone takes its place at the same tap: the guest keeps its device, which is the quickest way, and the only
//! one where both are there at once.

use std::cell::Cell;
use std::os::fd::OwnedFd;

use stockade_agent_protocol::messages::SetNetworkRequest;
use stockade_netlink::Connection;

use super::scan::{self, Found};
use super::{Error, SLOTS, Slot, Slots, wire};

/// What is new in the network, to be done in this order.
#[derive(Default)]
pub struct News {
    /// What is no more.
    pub removal: Option<Removal>,
    /// Carriers that another interface has brought along.
    pub carriers: Vec<(u8, bool)>,
    /// Slots to attach a tap to, each.
    pub taps: Vec<(u8, OwnedFd)>,
    /// What to tell the agent then, if anything.
    pub request: Option<SetNetworkRequest>,
}

/// What is no more in the network.
pub struct Removal {
    /// What to tell the agent, so that the guest lets go of it.
    pub request: SetNetworkRequest,
    /// Slots to empty then.
    pub slots: Vec<u8>,
}

impl Slot {
    /// Whether an interface can be what the guest has here: the driver asks once only for the address and the largest
    /// MTU. The tap must still be there.
    fn fits(&self, interface: &scan::Interface, taps: &[u32]) -> bool {
        let device = interface.device();
        device.mac == self.device.mac
            && device.mtu <= self.device.mtu
            && self.tap.get().is_some_and(|tap| taps.contains(&tap))
    }

    /// Whether it is this interface that is wired here, and still is.
    fn holds(&self, interface: &scan::Interface, taps: &[u32]) -> bool {
        // One that has been to another namespace comes back untied.
        interface.index == self.wired.index && interface.occupied && self.fits(interface, taps)
    }
}

/// The difference between what is wired and what has been found, in numbers of slots and places among the interfaces.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Interfaces that stay where they are.
    kept: Vec<(usize, usize)>,
    /// Interfaces that take the place of another.
    heirs: Vec<(usize, usize)>,
    /// Slots whose interfaces are gone.
    gone: Vec<usize>,
    /// Interfaces that get a slot, empty by then.
    new: Vec<(usize, usize)>,
}

impl Changes {
    /// Compares.
    pub fn of(slots: &Slots, found: &Found) -> Self {
        let mut changes = Changes::default();
        let mut left: Vec<_> = (0..found.interfaces.len()).collect();
        let filled = || slots.iter().enumerate().filter_map(|(number, slot)| Some((number, slot.as_ref()?)));
        for (number, slot) in filled() {
            let held = left.iter().position(|i| slot.holds(&found.interfaces[*i], &found.taps));
            changes.kept.extend(held.map(|place| (number, left.remove(place))));
        }
        let is_kept = |number| changes.kept.iter().any(|(kept, _)| *kept == number);
        for (number, slot) in filled().filter(|(number, _)| !is_kept(*number)) {
            match left.iter().position(|i| slot.fits(&found.interfaces[*i], &found.taps)) {
                Some(place) => changes.heirs.push((number, left.remove(place))),
                None => changes.gone.push(number),
            }
        }
        let is_free = |number: &usize| slots[*number].is_none() || changes.gone.contains(number);
        let free: Vec<_> = (0..SLOTS).filter(is_free).collect();
        // No more are found than there are slots.
        changes.new = free.into_iter().zip(left).collect();
        changes
    }

    /// Whether there are any.
    pub fn any(&self) -> bool {
        !self.heirs.is_empty() || !self.gone.is_empty() || !self.new.is_empty()
    }

    /// Does the host's part of them.
    pub fn make(self, slots: &mut Slots, found: &Found, kernel: &mut Connection) -> Result<News, Error> {
        let mut news = News::default();
        for (number, interface) in &self.kept {
            if let Some(slot) = &mut slots[*number] {
                slot.wired = found.interfaces[*interface].wired();
            }
        }
        for number in &self.gone {
            let Some(slot) = slots[*number].take() else { continue };
            wire::unwire(kernel, &slot.wired)?;
            // The guest may hold on to it.
            slot.tap.get().map_or(Ok(()), |tap| wire::remove(kernel, tap))?;
        }
        if !self.gone.is_empty() {
            let new: Vec<_> = self.new.iter().map(|(_, i)| &*found.interfaces[*i].name).collect();
            let slots = self.gone.iter().map(|number| *number as u8).collect();
            news.removal = Some(Removal { request: without(&found.request, &new), slots });
        }
        for (number, interface) in &self.heirs {
            let (Some(slot), interface) = (&mut slots[*number], &found.interfaces[*interface]) else {
                continue;
            };
            slot.wired = interface.wired();
            if let Some(tap) = slot.tap.get() {
                wire::retie(kernel, interface, tap)?;
            }
            let up = interface.device().up;
            if slot.carrier.replace(up) != up {
                news.carriers.push((*number as u8, up));
            }
        }
        for (number, interface) in &self.new {
            let interface = &found.interfaces[*interface];
            let (device, carrier) = (interface.device(), Cell::new(interface.device().up));
            // There before it is wired, so that what was begun is taken back.
            let slot = slots[*number].insert(Slot {
                wired: interface.wired(),
                device,
                carrier,
                tap: Cell::default(),
            });
            let (tap, index) = wire::wire(kernel, interface)?;
            slot.tap.set(Some(index));
            news.taps.push((*number as u8, tap));
        }
        Ok(news)
    }
}

/// A request without these links.
fn without(request: &SetNetworkRequest, names: &[&str]) -> SetNetworkRequest {
    let mut request = request.clone();
    request.links.retain(|link| !names.contains(&&*link.name));
    request.routes.retain(|route| !route.next_hops.iter().any(|hop| names.contains(&&*hop.link)));
    request.neighbours.retain(|neighbour| !names.contains(&&*neighbour.link));
    request
}

#[cfg(test)]
mod tests {
    use stockade_agent_protocol::messages::{Link, Neighbour, NextHop, Route};

    use super::*;

    const TAPS: [u32; 4] = [100, 101, 102, 103];

    /// An interface whose index and MAC address are of this number.
    fn interface(number: u8) -> scan::Interface {
        scan::Interface {
            index: number.into(),
            name: format!("eth{number}"),
            mtu: 1500,
            occupied: false,
            mac: [2, 0, 0, 0, 0, number],
            carrier: true,
        }
    }

    fn found(interfaces: Vec<scan::Interface>) -> Found {
        Found { interfaces, request: SetNetworkRequest::default(), taps: TAPS.into(), refused: Vec::new() }
    }

    /// Slots with interfaces of these numbers.
    fn slots(numbers: &[u8]) -> Slots {
        let mut slots = Slots::default();
        for ((slot, tap), number) in slots.iter_mut().zip(TAPS).zip(numbers) {
            let interface = interface(*number);
            let (device, tap) = (interface.device(), Cell::new(Some(tap)));
            *slot = Some(Slot { wired: interface.wired(), device, carrier: Cell::new(true), tap });
        }
        slots
    }

    fn wired(number: u8) -> scan::Interface {
        scan::Interface { occupied: true, ..interface(number) }
    }

    #[test]
    fn nothing_is_done_where_all_is_wired() {
        let changes = Changes::of(&slots(&[1, 2]), &found(vec![wired(2), wired(1)]));
        assert_eq!(changes, Changes { kept: vec![(0, 1), (1, 0)], ..Default::default() });
        assert!(!changes.any());
    }

    #[test]
    fn what_is_new_gets_an_empty_slot_or_that_of_what_has_gone() {
        let all = vec![wired(1), interface(7), wired(3), interface(8)];
        let changes = Changes::of(&slots(&[1, 2, 3]), &found(all));
        let expected = Changes {
            kept: vec![(0, 0), (2, 2)],
            gone: vec![1],
            new: vec![(1, 1), (3, 3)],
            ..Default::default()
        };
        assert_eq!(changes, expected);
    }

    #[test]
    fn an_interface_with_the_same_address_takes_over() {
        let heir = scan::Interface { index: 9, ..interface(1) };
        let changes = Changes::of(&slots(&[1, 2]), &found(vec![wired(2), heir]));
        let expected = Changes { kept: vec![(1, 0)], heirs: vec![(0, 1)], ..Default::default() };
        assert_eq!(changes, expected);
    }

    #[test]
    fn one_that_came_back_untied_is_tied_again() {
        let changes = Changes::of(&slots(&[1]), &found(vec![interface(1)]));
        assert_eq!(changes, Changes { heirs: vec![(0, 0)], ..Default::default() });
    }

    #[test]
    fn what_a_driver_asks_for_once_makes_it_another_interface() {
        let larger = scan::Interface { mtu: 9000, ..wired(1) };
        let smaller = scan::Interface { mtu: 1400, ..wired(2) };
        let changes = Changes::of(&slots(&[1, 2]), &found(vec![larger, smaller]));
        let expected = Changes { kept: vec![(1, 1)], gone: vec![0], new: vec![(0, 0)], ..Default::default() };
        assert_eq!(changes, expected);
    }

    #[test]
    fn without_its_tap_an_interface_is_wired_anew() {
        let mut found = found(vec![wired(1)]);
        found.taps.clear();
        let changes = Changes::of(&slots(&[1]), &found);
        assert_eq!(changes, Changes { gone: vec![0], new: vec![(0, 0)], ..Default::default() });
    }

    #[test]
    fn a_request_without_a_link_says_nothing_over_it() {
        let link = |name: &str| Link { name: name.into(), ..Default::default() };
        let route = |names: &[&str]| Route {
            next_hops: names
                .iter()
                .map(|link| NextHop { link: (*link).into(), ..Default::default() })
                .collect(),
            ..Default::default()
        };
        let neighbour = |link: &str| Neighbour { link: link.into(), ..Default::default() };
        let request = SetNetworkRequest {
            links: vec![link("a"), link("b")],
            routes: vec![route(&["a"]), route(&["b"]), route(&["a", "b"]), route(&[""])],
            neighbours: vec![neighbour("b"), neighbour("a")],
            ..Default::default()
        };
        let expected = SetNetworkRequest {
            links: vec![link("a")],
            routes: vec![route(&["a"]), route(&[""])],
            neighbours: vec![neighbour("a")],
            ..Default::default()
        };
        assert_eq!(without(&request, &["b"]), expected);
    }
}
