//! The guest's network: what the host found in the sandbox's network namespace, made here once more.
//!
//! The VM's first network namespace is the containers'. A request says all there is to be; applying it again, or one
//! that says more, leaves what is there already. The interfaces are virtio devices in slots that were empty when the
//! kernel first looked, so the ones that are missing are probed for.

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

use crate::error::Error;

/// Where the kernel lists the slots, and the file that makes it look at one again.
const SLOTS: &str = "/sys/bus/platform/devices";
const PROBE: &str = "/sys/bus/platform/drivers_probe";
/// How slots are called there.
const SLOT_PREFIX: &str = "virtio-mmio.";

/// IFNAMSIZ without the NUL.
const NAME_MAX: usize = 15;

/// What of an address's flags its maker chose; the rest is the kernel's report. DAD is over: the address is in use.
const CHOSEN_FLAGS: AddressFlags = AddressFlags::Nodad
    .union(AddressFlags::Homeaddress)
    .union(AddressFlags::Managetempaddr)
    .union(AddressFlags::Noprefixroute)
    .union(AddressFlags::Mcautojoin);

/// IN6_ADDR_GEN_MODE_NONE (linux/if_link.h): no link-local address but those that are given.
const GENERATE_NONE: &str = "1";

/// A network device of the guest.
#[derive(Clone, Debug)]
struct Device {
    index: u32,
    name: String,
}

/// Does what the request asks for.
pub fn set(request: &SetNetworkRequest) -> Result<(), Error> {
    let mut kernel = Connection::open().map_err(|e| Error::os("opening a netlink socket", e))?;
    let mut devices = devices(&mut kernel)?;
    let missing = |devices: &HashMap<Vec<u8>, Device>| {
        request.links.iter().any(|link| !devices.contains_key(&link.mac))
    };
    if missing(&devices) {
        probe()?;
        devices = self::devices(&mut kernel)?;
    }
    let mut wanted = Vec::new();
    for link in &request.links {
        check_name(&link.name)?;
        let device = devices.get(&link.mac).ok_or_else(|| {
            Error::Internal(format!("there is no network device with the MAC address of {}", link.name))
        })?;
        wanted.push((link, device.clone()));
    }
    rename(&mut kernel, &wanted, &devices)?;
    for (link, device) in &wanted {
        set_link(&mut kernel, link, device.index)?;
    }
    let loopback = devices.values().find(|device| device.name == "lo").map(|device| device.index);
    let index = |name: &str| match name {
        "" => loopback,
        name => wanted.iter().find(|(link, _)| link.name == name).map(|(_, device)| device.index),
    };
    for neighbour in &request.neighbours {
        set_neighbour(&mut kernel, neighbour, &index)?;
    }
    let names = wanted.iter().map(|(link, device)| (device.index, link.name.clone())).collect();
    set_routes(&mut kernel, &request.routes, &names, &index)
}

/// All devices by their MAC addresses. The loopback's is all zeroes.
fn devices(kernel: &mut Connection) -> Result<HashMap<Vec<u8>, Device>, Error> {
    let links = kernel
        .dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))
        .map_err(|e| Error::os("listing the network devices", e))?;
    let device = |link: RouteNetlinkMessage| {
        let RouteNetlinkMessage::NewLink(link) = link else { return None };
        let (mut mac, mut name) = (None, None);
        for attribute in link.attributes {
            match attribute {
                LinkAttribute::Address(bytes) => mac = Some(bytes),
                LinkAttribute::IfName(text) => name = Some(text),
                _ => {}
            }
        }
        Some((mac?, Device { index: link.header.index, name: name? }))
    };
    Ok(links.into_iter().filter_map(device).collect())
}

/// Has the kernel look again at the slots in which it found no device at boot.
fn probe() -> Result<(), Error> {
    let slots = fs::read_dir(SLOTS).map_err(|e| Error::os(format!("listing {SLOTS}"), e))?;
    for slot in slots.flatten() {
        let name = slot.file_name();
        let empty = name.to_string_lossy().starts_with(SLOT_PREFIX) && !slot.path().join("driver").exists();
        if empty {
            // A slot that is still empty is an error like any other here: the device is missed later, by its name.
            let _ = fs::write(PROBE, name.as_encoded_bytes());
        }
    }
    Ok(())
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
fn rename(
    kernel: &mut Connection,
    wanted: &[(&Link, Device)],
    devices: &HashMap<Vec<u8>, Device>,
) -> Result<(), Error> {
    let mut set_name = |index: u32, name: &str| {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::IfName(name.into()));
        kernel
            .request(RouteNetlinkMessage::SetLink(message), 0)
            .map_err(|e| Error::os(format!("calling a network device {name}"), e))
    };
    let changed: Vec<_> = wanted.iter().filter(|(link, device)| link.name != device.name).collect();
    for (link, _) in &changed {
        if let Some(holder) = devices.values().find(|device| device.name == link.name) {
            set_name(holder.index, &format!("virtio{}", holder.index))?;
        }
    }
    for (link, device) in &changed {
        set_name(device.index, &link.name)?;
    }
    Ok(())
}

/// Makes one link what it is to be, up last of its own settings and before its addresses.
fn set_link(kernel: &mut Connection, link: &Link, index: u32) -> Result<(), Error> {
    let name = &link.name;
    for (setting, value) in &link.settings {
        write_setting(name, setting, &value.to_string())?;
    }
    if has_link_local(link) {
        // The kernel here is not to make one as well. It would be of another kind than an ipvlan's, which shares its
        // MAC address, and unusable at first: who else has it is asked for a second, which the host has done.
        write_setting(name, "ipv6/addr_gen_mode", GENERATE_NONE)?;
    }
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.change_mask = LinkFlags::Up | LinkFlags::Noarp;
    message.header.flags.set(LinkFlags::Up, link.up);
    message.header.flags.set(LinkFlags::Noarp, link.no_arp);
    message.attributes = vec![LinkAttribute::Mtu(link.mtu), LinkAttribute::TxQueueLen(link.tx_queue_length)];
    kernel
        .request(RouteNetlinkMessage::SetLink(message), 0)
        .map_err(|e| Error::os(format!("setting up the network device {name}"), e))?;
    if link.up {
        settle(kernel, name, index)?;
    }
    for address in &link.addresses {
        set_address(kernel, name, index, address)?;
    }
    Ok(())
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

fn set_address(kernel: &mut Connection, link: &str, index: u32, request: &Address) -> Result<(), Error> {
    let invalid = |e: address::InvalidAddress| Error::Invalid(format!("an address of {link}: {e}"));
    let local = address::from_bytes(&request.local).map_err(invalid)?;
    let peer = address::optional(&request.peer).map_err(invalid)?;
    let prefix = u8::try_from(request.prefix_length)
        .map_err(|_| Error::Invalid(format!("a prefix of {} bits", request.prefix_length)))?;
    let scope = u8::try_from(request.scope)
        .map_err(|_| Error::Invalid(format!("an address scope of {}", request.scope)))?;
    let mut flags = AddressFlags::from_bits_retain(request.flags) & CHOSEN_FLAGS;
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
    kernel
        .request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
        .map_err(|e| Error::os(format!("giving {link} the address {local}/{prefix}"), e))
}

fn set_neighbour(
    kernel: &mut Connection,
    neighbour: &Neighbour,
    index: &impl Fn(&str) -> Option<u32>,
) -> Result<(), Error> {
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
    kernel
        .request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
        .map_err(|e| Error::os(format!("setting the neighbour {address}"), e))
}

fn no_link(name: &str) -> Error {
    Error::Invalid(format!("there is no link {name:?} in the request"))
}

/// Makes the routes, and takes away those that this kernel made for addresses and the host's has not, or not like this:
/// a plug-in may have replaced them by others.
fn set_routes(
    kernel: &mut Connection,
    wanted: &[Route],
    names: &HashMap<u32, String>,
    index: &impl Fn(&str) -> Option<u32>,
) -> Result<(), Error> {
    let mut there = Vec::new();
    for (message, route) in routes_of_kernel(kernel, names)? {
        if wanted.contains(&route) {
            there.push(route);
        } else {
            kernel
                .request(RouteNetlinkMessage::DelRoute(message), 0)
                .map_err(|e| Error::os("removing a route", e))?;
        }
    }
    let missing = wanted.iter().filter(|route| !there.contains(route));
    // A gateway must be reachable by the time it is named.
    let (direct, indirect): (Vec<_>, Vec<_>) =
        missing.partition(|route| route.next_hops.iter().all(|hop| hop.gateway.is_empty()));
    for route in direct.into_iter().chain(indirect) {
        let message = routes::to_kernel(route, index).map_err(|e| Error::Invalid(format!("a route: {e}")))?;
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
