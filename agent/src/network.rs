//! The guest's network: what the host found in the sandbox's network namespace, made here once more.
//!
//! The VM's first network namespace is the containers'. A request says all there is to be. What the one before said and
//! this one does not is taken away, what it said too is left as it is, so that what a workload has done to its network
//! lasts as long as nobody changes the same thing on the host.

mod slots;

use std::collections::HashMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::Ipv6Addr;
use std::path::Path;

use stockade_agent_protocol::messages::{Address, Link, Neighbour, Route, SetNetworkRequest};
use stockade_netlink::route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use stockade_netlink::route::link::{LinkAttribute, LinkFlags, LinkMessage};
use stockade_netlink::route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use stockade_netlink::route::route::{RouteMessage, RouteProtocol};
use stockade_netlink::route::{AddressFamily, RouteNetlinkMessage};
use stockade_netlink::{Connection, NLM_F_CREATE, NLM_F_REPLACE, address, routes};
use tokio::sync::Mutex;

use crate::error::Error;
use crate::reaper::Reaper;
use slots::Device;

/// IFNAMSIZ without the NUL.
const NAME_MAX: usize = 15;

/// IN6_ADDR_GEN_MODE_NONE (linux/if_link.h): no link-local address but those that are given.
const GENERATE_NONE: &str = "1";

/// What the kernel says of something that is to be removed and is not there, or whose link has gone.
const GONE: [i32; 4] = [libc::ESRCH, libc::ENOENT, libc::ENODEV, libc::EADDRNOTAVAIL];

/// The guest's network as it was made.
#[derive(Default)]
pub struct Network(Mutex<Made>);

#[derive(Default)]
struct Made {
    /// What has been asked for.
    request: SetNetworkRequest,
    /// The devices of its links, by the MAC addresses that they came with.
    devices: HashMap<Vec<u8>, Slotted>,
}

/// A device of the host's, wherever a workload has put it and whatever it calls it.
struct Slotted {
    index: u32,
    slot: Option<String>,
}

/// A link that there is to be.
struct Wanted<'a> {
    link: &'a Link,
    /// What it was to be before.
    before: Option<&'a Link>,
    device: Device,
}

impl Wanted<'_> {
    fn is_changed(&self) -> bool {
        self.before != Some(self.link)
    }
}

impl Network {
    /// Does what the request asks for. The first is done when this has been polled once.
    pub async fn set(&self, reaper: &Reaper, request: SetNetworkRequest) -> Result<(), Error> {
        let mut made = self.0.lock().await;
        let gone = made.leave_out(&request);
        if !gone.is_empty() {
            slots::release(reaper, gone).await?;
        }
        made.apply(&request)?;
        made.request = request;
        Ok(())
    }
}

impl Made {
    /// Forgets the links that are not in the request; returns their slots.
    fn leave_out(&mut self, request: &SetNetworkRequest) -> Vec<String> {
        let is_wanted = |mac: &[u8]| request.links.iter().any(|link| link.mac == mac);
        self.request.links.retain(|link| is_wanted(&link.mac));
        let gone = self.devices.extract_if(|mac, _| !is_wanted(mac));
        gone.filter_map(|(_, device)| device.slot).collect()
    }

    fn apply(&mut self, request: &SetNetworkRequest) -> Result<(), Error> {
        let mut kernel = Connection::open().map_err(|e| Error::os("opening a netlink socket", e))?;
        request.links.iter().try_for_each(|link| check_name(&link.name))?;
        let devices = self.find(&mut kernel, request)?;
        let wanted: Vec<_> = request
            .links
            .iter()
            .filter_map(|link| {
                // One that the workload has moved to a namespace of its own is its own business.
                let device = devices.get(&self.devices.get(&link.mac)?.index)?.clone();
                let before = self.request.links.iter().find(|before| before.mac == link.mac);
                Some(Wanted { link, before, device })
            })
            .collect();
        rename(&mut kernel, &wanted, &devices)?;

        let loopback = devices.values().find(|device| device.name == "lo").map(|device| device.index);
        let index = |name: &str| match name {
            "" => loopback,
            name => wanted.iter().find(|one| one.link.name == name).map(|one| one.device.index),
        };
        let before = &self.request;
        for route in before.routes.iter().filter(|route| !request.routes.contains(route)) {
            remove_route(&mut kernel, route, &index)?;
        }
        for one in wanted.iter().filter(|one| one.is_changed()) {
            set_link(&mut kernel, one)?;
        }
        for neighbour in before.neighbours.iter().filter(|one| !request.neighbours.contains(one)) {
            if let Ok(message) = neighbour_message(neighbour, &index) {
                remove(&mut kernel, "a neighbour", RouteNetlinkMessage::DelNeighbour(message))?;
            }
        }
        let is_changed = |name: &str| wanted.iter().any(|one| one.link.name == name && one.is_changed());
        for neighbour in &request.neighbours {
            if is_changed(&neighbour.link) || !before.neighbours.contains(neighbour) {
                set_neighbour(&mut kernel, neighbour, &index)?;
            }
        }
        let changed = wanted.iter().filter(|one| one.is_changed());
        let names = changed.map(|one| (one.device.index, one.link.name.clone())).collect();
        // What leads over a link that has been changed may have gone with an address of it.
        let is_new = |route: &&Route| {
            !before.routes.contains(route) || route.next_hops.iter().any(|hop| is_changed(&hop.link))
        };
        let new: Vec<_> = request.routes.iter().filter(is_new).collect();
        set_routes(&mut kernel, &new, &names, &index)
    }

    /// Finds the devices of all links. Returns all that there are.
    fn find(
        &mut self,
        kernel: &mut Connection,
        request: &SetNetworkRequest,
    ) -> Result<HashMap<u32, Device>, Error> {
        let mut devices = slots::devices(kernel)?;
        let new: Vec<_> = request.links.iter().filter(|link| !self.devices.contains_key(&link.mac)).collect();
        let find = |link: &Link, devices: &HashMap<u32, Device>| {
            devices.values().find(|device| device.mac == link.mac).cloned()
        };
        if new.iter().any(|link| find(link, &devices).is_none()) {
            slots::probe()?;
            devices = slots::devices(kernel)?;
        }
        for link in new {
            let device = find(link, &devices).ok_or_else(|| {
                Error::Internal(format!("there is no network device with the MAC address of {}", link.name))
            })?;
            let slotted = Slotted { index: device.index, slot: device.slot() };
            self.devices.insert(link.mac.clone(), slotted);
        }
        Ok(devices)
    }
}

/// Names become parts of paths.
fn check_name(name: &str) -> Result<(), Error> {
    let bad = name.is_empty()
        || name.len() > NAME_MAX
        || name == "."
        || name == ".."
        || name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
    if bad { Err(Error::Invalid(format!("no network device can be called {name:?}"))) } else { Ok(()) }
}

/// Gives devices their names. Two may have to change theirs, so a name that is taken is freed first.
fn rename(kernel: &mut Connection, wanted: &[Wanted], devices: &HashMap<u32, Device>) -> Result<(), Error> {
    let mut set_name = |index: u32, name: &str| {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::IfName(name.into()));
        kernel
            .request(RouteNetlinkMessage::SetLink(message), 0)
            .map_err(|e| Error::os(format!("calling a network device {name}"), e))
    };
    let is_new = |one: &&Wanted| one.before.is_none_or(|before| before.name != one.link.name);
    let changed: Vec<_> =
        wanted.iter().filter(is_new).filter(|one| one.link.name != one.device.name).collect();
    for one in &changed {
        if let Some(holder) = devices.values().find(|device| device.name == one.link.name) {
            set_name(holder.index, &format!("virtio{}", holder.index))?;
        }
    }
    for one in &changed {
        set_name(one.device.index, &one.link.name)?;
    }
    Ok(())
}

/// Makes one link what it is to be, up last of its own settings and before its addresses.
fn set_link(kernel: &mut Connection, Wanted { link, before, device }: &Wanted) -> Result<(), Error> {
    // What a workload calls it, unless that has just been changed.
    let same_name = before.is_some_and(|before| before.name == link.name);
    let (name, index) = (if same_name { &device.name } else { &link.name }, device.index);
    let nothing = Link::default();
    let known = before.unwrap_or(&nothing);
    for (setting, value) in
        link.settings.iter().filter(|(name, value)| known.settings.get(*name) != Some(value))
    {
        write_setting(name, setting, &value.to_string())?;
    }
    if has_link_local(link) && !has_link_local(known) {
        // The kernel here is not to make one as well. It would be of another kind than an ipvlan's, which shares its
        // MAC address, and unusable at first: who else has it is asked for a second, which the host has done.
        write_setting(name, "ipv6/addr_gen_mode", GENERATE_NONE)?;
    }
    let state = |link: &Link| (link.up, link.no_arp, link.mtu, link.tx_queue_length);
    if before.is_none_or(|before| state(before) != state(link)) {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.change_mask = LinkFlags::Up | LinkFlags::Noarp;
        message.header.flags.set(LinkFlags::Up, link.up);
        message.header.flags.set(LinkFlags::Noarp, link.no_arp);
        message.attributes =
            vec![LinkAttribute::Mtu(link.mtu), LinkAttribute::TxQueueLen(link.tx_queue_length)];
        kernel
            .request(RouteNetlinkMessage::SetLink(message), 0)
            .map_err(|e| Error::os(format!("setting up the network device {name}"), e))?;
        if link.up {
            settle(kernel, name, index)?;
        }
    }
    for address in known.addresses.iter().filter(|address| !link.addresses.contains(address)) {
        let message = address_message(name, index, address)?;
        remove(kernel, "an address", RouteNetlinkMessage::DelAddress(message))?;
    }
    // All of them: one that is removed takes others with it, and so does a link that has been down.
    for address in &link.addresses {
        set_address(kernel, name, index, address)?;
    }
    Ok(())
}

/// Has the kernel remove something that may have gone by itself.
fn remove(kernel: &mut Connection, what: &str, message: RouteNetlinkMessage) -> Result<(), Error> {
    match kernel.request(message, 0) {
        Err(e) if !e.raw_os_error().is_some_and(|code| GONE.contains(&code)) => {
            Err(Error::os(format!("removing {what}"), e))
        }
        _ => Ok(()),
    }
}

/// Whether the host has given the interface a link-local address. One without carrier has none yet.
fn has_link_local(link: &Link) -> bool {
    link.addresses.iter().any(|address| {
        <[u8; 16]>::try_from(&*address.local).is_ok_and(|local| Ipv6Addr::from(local).is_unicast_link_local())
    })
}

/// Asks for the link, by which the kernel brings its state up to date: of itself it does so once a second, and until
/// then the link looks as if it had no carrier.
fn settle(kernel: &mut Connection, name: &str, index: u32) -> Result<(), Error> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    kernel
        .request(RouteNetlinkMessage::GetLink(message), 0)
        .map_err(|e| Error::os(format!("asking for the network device {name}"), e))
}

/// The file of a setting of a link; only those of its own.
fn setting_path(link: &str, setting: &str) -> Result<String, Error> {
    let known = setting.split_once('/').filter(|(family, name)| {
        matches!(*family, "ipv4" | "ipv6")
            && !name.is_empty()
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    });
    let (family, name) = known
        .ok_or_else(|| Error::Invalid(format!("there is no setting {setting:?} of a network device")))?;
    Ok(format!("/proc/sys/net/{family}/conf/{link}/{name}"))
}

fn write_setting(link: &str, setting: &str, value: &str) -> Result<(), Error> {
    let path = setting_path(link, setting)?;
    match fs::write(&path, value) {
        // A kernel without it has nothing to set.
        Err(e) if e.kind() == ErrorKind::NotFound && !Path::new(&path).exists() => Ok(()),
        other => other.map_err(|e| Error::os(format!("writing {value} to {path}"), e)),
    }
}

fn address_message(link: &str, index: u32, request: &Address) -> Result<AddressMessage, Error> {
    let invalid = |e: address::InvalidAddress| Error::Invalid(format!("an address of {link}: {e}"));
    let local = address::from_bytes(&request.local).map_err(invalid)?;
    let peer = address::optional(&request.peer).map_err(invalid)?;
    let prefix = u8::try_from(request.prefix_length)
        .map_err(|_| Error::Invalid(format!("a prefix of {} bits", request.prefix_length)))?;
    let scope = u8::try_from(request.scope)
        .map_err(|_| Error::Invalid(format!("an address scope of {}", request.scope)))?;
    let mut flags = AddressFlags::from_bits_retain(request.flags) & address::CHOSEN_FLAGS;
    if local.is_ipv6() {
        flags |= AddressFlags::Nodad;
    }
    let mut message = AddressMessage::default();
    message.header.family = address::family(local);
    message.header.prefix_len = prefix;
    message.header.scope = AddressScope::from(scope);
    message.header.flags = AddressHeaderFlags::from_bits_retain(flags.bits() as u8);
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(local),
        AddressAttribute::Address(peer.unwrap_or(local)),
        AddressAttribute::Flags(flags),
    ];
    if let Some(std::net::IpAddr::V4(broadcast)) = address::optional(&request.broadcast).map_err(invalid)? {
        message.attributes.push(AddressAttribute::Broadcast(broadcast));
    }
    if !request.label.is_empty() {
        message.attributes.push(AddressAttribute::Label(request.label.clone()));
    }
    Ok(message)
}

fn set_address(kernel: &mut Connection, link: &str, index: u32, request: &Address) -> Result<(), Error> {
    let message = address_message(link, index, request)?;
    kernel.request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE).map_err(|e| {
        let local = address::from_bytes(&request.local).map(|local| local.to_string()).unwrap_or_default();
        Error::os(format!("giving {link} the address {local}/{}", request.prefix_length), e)
    })
}

fn neighbour_message(
    neighbour: &Neighbour,
    index: &impl Fn(&str) -> Option<u32>,
) -> Result<NeighbourMessage, Error> {
    let invalid = |e: address::InvalidAddress| Error::Invalid(format!("a neighbour: {e}"));
    let address = address::from_bytes(&neighbour.address).map_err(invalid)?;
    let mut message = NeighbourMessage::default();
    message.header.family = address::family(address);
    message.header.ifindex = index(&neighbour.link).ok_or_else(|| no_link(&neighbour.link))?;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(address.into()),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.clone()),
    ];
    Ok(message)
}

fn set_neighbour(
    kernel: &mut Connection,
    neighbour: &Neighbour,
    index: &impl Fn(&str) -> Option<u32>,
) -> Result<(), Error> {
    let message = neighbour_message(neighbour, index)?;
    kernel.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE).map_err(|e| {
        let address = address::from_bytes(&neighbour.address).map(|a| a.to_string()).unwrap_or_default();
        Error::os(format!("setting the neighbour {address}"), e)
    })
}

fn no_link(name: &str) -> Error {
    Error::Invalid(format!("there is no link {name:?} in the request"))
}

/// Removes a route. One over a link that is gone has gone with it.
fn remove_route(
    kernel: &mut Connection,
    route: &Route,
    index: &impl Fn(&str) -> Option<u32>,
) -> Result<(), Error> {
    match routes::to_kernel(route, index) {
        Ok(message) => remove(kernel, "a route", RouteNetlinkMessage::DelRoute(message)),
        Err(routes::Error::Interface) => Ok(()),
        Err(e) => Err(Error::Invalid(format!("a route: {e}"))),
    }
}

/// Makes the routes, and takes away those that this kernel made for addresses of the named links and the host's has
/// not, or not like this: a plug-in may have replaced them by others.
fn set_routes(
    kernel: &mut Connection,
    wanted: &[&Route],
    names: &HashMap<u32, String>,
    index: &impl Fn(&str) -> Option<u32>,
) -> Result<(), Error> {
    let mut there = Vec::new();
    for (message, route) in routes_of_kernel(kernel, names)? {
        if wanted.contains(&&route) {
            there.push(route);
        } else {
            remove(kernel, "a route", RouteNetlinkMessage::DelRoute(message))?;
        }
    }
    let missing = wanted.iter().filter(|route| !there.contains(**route));
    // A gateway must be reachable by the time it is named.
    let (direct, indirect): (Vec<_>, Vec<_>) =
        missing.partition(|route| route.next_hops.iter().all(|hop| hop.gateway.is_empty()));
    for route in direct.into_iter().chain(indirect) {
        let message = match routes::to_kernel(route, index) {
            Ok(message) => message,
            // Its link is in a namespace that the workload made.
            Err(routes::Error::Interface) => continue,
            Err(e) => return Err(Error::Invalid(format!("a route: {e}"))),
        };
        // In IPv6 a route would replace one over another link: each has its own to the same link-local prefix.
        let replace = if message.header.address_family == AddressFamily::Inet6 { 0 } else { NLM_F_REPLACE };
        match kernel.request(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | replace) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::os(format!("setting the route to {}", destination(route)), e)),
        }
    }
    Ok(())
}

/// Routes that this kernel made by itself, over the named links.
fn routes_of_kernel(
    kernel: &mut Connection,
    names: &HashMap<u32, String>,
) -> Result<Vec<(RouteMessage, Route)>, Error> {
    let failed = |e: io::Error| Error::os("listing the routes", e);
    let mut found = Vec::new();
    if names.is_empty() {
        return Ok(found);
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        for object in kernel.dump(RouteNetlinkMessage::GetRoute(message)).map_err(failed)? {
            let RouteNetlinkMessage::NewRoute(message) = object else { continue };
            if message.header.protocol != RouteProtocol::Kernel {
                continue;
            }
            // One over another link is none of the request's business.
            if let Ok(Some(route)) = routes::from_kernel(&message, |index| names.get(&index).cloned()) {
                found.push((message, route));
            }
        }
    }
    Ok(found)
}

fn destination(route: &Route) -> String {
    match address::optional(&route.destination) {
        Ok(Some(to)) => format!("{to}/{}", route.prefix_length),
        _ => "default".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_settings_cannot_leave_their_folder() {
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "sixteen-letters-", "x\n"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_name("eth0.5").is_ok());
        for bad in ["", "ipv4", "ipv4/", "ipv7/forwarding", "ipv4/../../x", "ipv6/A", "ipv4/a/b"] {
            assert!(setting_path("eth0", bad).is_err(), "{bad:?}");
        }
        assert_eq!(
            setting_path("eth0", "ipv6/disable_ipv6").unwrap(),
            "/proc/sys/net/ipv6/conf/eth0/disable_ipv6"
        );
    }
}
