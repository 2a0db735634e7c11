//! What a network namespace holds, and what of it the guest is told.
//!
//! Whatever is found and cannot be made the same in the guest is left out, with an error that names it. Left alone are
//! the loopback interface, of which the guest has its own, ports of a bridge or bond, whose traffic goes through that,
//! and the tunnels that kernel modules put into every namespace, as long as nobody uses them.

use std::collections::HashMap;
use std::net::IpAddr;

use stockade_agent_protocol::messages::{Address, Link, Neighbour, SetNetworkRequest};
use stockade_netlink::route::address::{AddressAttribute, AddressFlags, AddressMessage};
use stockade_netlink::route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, Inet6DevConf, InetDevConf, InfoKind, LinkAttribute, LinkFlags,
    LinkInfo, LinkLayerType, LinkMessage,
};
use stockade_netlink::route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use stockade_netlink::route::route::RouteMessage;
use stockade_netlink::route::rule::{RuleAttribute, RuleMessage};
use stockade_netlink::route::tc::{TcAttribute, TcHandle, TcMessage};
use stockade_netlink::route::{AddressFamily, RouteNetlinkMessage};
use stockade_netlink::{Connection, address, routes};
use stockade_vmm::control;

use super::{Error, SLOTS, Wired, kernel, monitor};

/// Priorities of the rules that every namespace has: of the tables local, main and, for IPv4, default.
const RULES: [u32; 3] = [0, 32_766, 32_767];

/// A namespace at one moment.
pub struct Found {
    /// What there is to wire, or is wired already.
    pub interfaces: Vec<Interface>,
    /// What to tell the agent of it.
    pub request: SetNetworkRequest,
    /// The taps that are there.
    pub taps: Vec<u32>,
    /// Why the guest's network cannot be the same.
    pub refused: Vec<Error>,
}

/// An interface that can be wired.
#[derive(Debug)]
pub struct Interface {
    /// Its index in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Bytes.
    pub mtu: u32,
    /// Something is at its ingress.
    pub occupied: bool,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Whether it carries frames.
    pub carrier: bool,
}

impl Interface {
    /// For the record.
    pub fn wired(&self) -> Wired {
        Wired { index: self.index, name: self.name.clone() }
    }

    /// As the VMM has it.
    pub fn device(&self) -> control::Interface {
        control::Interface { mac: self.mac, mtu: self.mtu as u16, up: self.carrier }
    }
}

/// Looks at the namespace of this thread. `known` are wired already, to `taps`.
pub fn scan(kernel_: &mut Connection, known: &[Wired], taps: &[u32]) -> Result<Found, Error> {
    let mut links = links(kernel_)?;
    let is_there = |tap: &u32| links.iter().any(|link| link.index == *tap);
    let taps: Vec<u32> = taps.iter().copied().filter(is_there).collect();
    links.retain(|link| !taps.contains(&link.index));
    let addresses = addresses(kernel_)?;
    let occupied = occupied(kernel_)?;
    let mut refused = Vec::new();
    let chosen = choose(&links, known, &addresses, &occupied, &mut refused);
    let mut interfaces: Vec<Interface> = Vec::new();
    let mut messages = Vec::new();
    let forward = chosen.iter().any(|link| link.is_in_user_space());
    for link in chosen {
        match link.interface(&interfaces, &occupied) {
            Ok(interface) => {
                let own = addresses.iter().filter(|(index, _)| *index == link.index);
                messages.push(link.message(&interface, own.map(|(_, address)| address.clone()).collect()));
                interfaces.push(interface);
            }
            Err(e) => refused.push(e),
        }
    }
    let request = SetNetworkRequest {
        links: messages,
        routes: route_list(kernel_, &links, &interfaces, &mut refused)?,
        neighbours: neighbours(kernel_, &interfaces)?,
        forward,
        ..Default::default()
    };
    if !interfaces.is_empty() && has_rules(kernel_)? {
        refused.push(Error::Rules);
    }
    Ok(Found { interfaces, request, taps, refused })
}

/// What of it is to be wired: what is wired already, and what else there is room for.
fn choose<'a>(
    links: &'a [Seen],
    known: &[Wired],
    addresses: &[(u32, Address)],
    occupied: &[u32],
    refused: &mut Vec<Error>,
) -> Vec<&'a Seen> {
    let is_known = |link: &Seen| known.iter().any(|wired| wired.index == link.index);
    let mut chosen = Vec::new();
    for link in links {
        let addressed = addresses.iter().any(|(index, _)| *index == link.index);
        if is_known(link) {
            chosen.push(link);
            continue;
        }
        match link.is_wanted(links, addressed, occupied) {
            Ok(true) => chosen.push(link),
            Ok(false) => {}
            Err(e) => refused.push(e),
        }
    }
    if chosen.len() > SLOTS {
        refused.push(Error::TooMany { found: chosen.iter().map(|link| link.name.clone()).collect() });
        let mut room = SLOTS.saturating_sub(chosen.iter().filter(|link| is_known(link)).count());
        chosen.retain(|link| {
            let taken = is_known(link) || room > 0;
            if taken && !is_known(link) {
                room -= 1;
            }
            taken
        });
    }
    chosen
}

/// An interface as the kernel tells of it.
#[derive(Debug, Default)]
struct Seen {
    index: u32,
    name: String,
    flags: LinkFlags,
    ethernet: bool,
    mac: Vec<u8>,
    mtu: u32,
    queue: u32,
    kind: Option<InfoKind>,
    /// Of a bridge or bond.
    port: bool,
    /// Another interface below it, or at its other end, in this same namespace.
    lower: Option<u32>,
    settings: HashMap<String, i32>,
}

impl Seen {
    fn of(message: LinkMessage) -> Self {
        let mut seen = Seen {
            index: message.header.index,
            flags: message.header.flags,
            ethernet: message.header.link_layer_type == LinkLayerType::Ether,
            ..Seen::default()
        };
        let mut elsewhere = false;
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => seen.name = name,
                LinkAttribute::Address(mac) => seen.mac = mac,
                LinkAttribute::Mtu(mtu) => seen.mtu = mtu,
                LinkAttribute::TxQueueLen(length) => seen.queue = length,
                LinkAttribute::Controller(_) => seen.port = true,
                LinkAttribute::Link(index) => seen.lower = Some(index).filter(|index| *index != 0),
                LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                LinkAttribute::LinkInfo(infos) => {
                    seen.kind = infos.into_iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind),
                        _ => None,
                    });
                }
                LinkAttribute::AfSpecUnspec(families) => seen.settings = settings(&families),
                _ => {}
            }
        }
        if elsewhere {
            seen.lower = None;
        }
        seen
    }

    fn kind(&self) -> String {
        match &self.kind {
            Some(kind) => kind.to_string(),
            None if self.ethernet => "network card".into(),
            None => "no Ethernet".into(),
        }
    }

    /// Whether a program, such as slirp4netns, is its other end. Nobody can dial it from outside of the namespace, so who
    /// forwards its ports does so inside.
    fn is_in_user_space(&self) -> bool {
        self.kind == Some(InfoKind::Tun)
    }

    fn refused(&self, reason: impl Into<String>) -> Error {
        Error::Interface { name: self.name.clone(), kind: self.kind(), reason: reason.into() }
    }

    /// Whether it is to be wired.
    fn is_wanted(&self, all: &[Seen], addressed: bool, occupied: &[u32]) -> Result<bool, Error> {
        if self.flags.contains(LinkFlags::Loopback) || self.port {
            return Ok(false);
        }
        if !self.ethernet {
            let used = self.flags.contains(LinkFlags::Up) || addressed;
            let reason =
                "a VM has Ethernet only; put the tunnel outside of the container's network namespace";
            return if used { Err(self.refused(reason)) } else { Ok(false) };
        }
        if matches!(self.kind, Some(InfoKind::MacVtap | InfoKind::IpVtap)) {
            return Err(self.refused("its frames go to a character device; use macvlan in its place"));
        }
        let lower = all.iter().find(|other| Some(other.index) == self.lower && other.ethernet);
        if let Some(lower) = lower.filter(|_| self.kind != Some(InfoKind::Veth)) {
            let reason = format!(
                "it lies upon {} in the same network namespace, and both cannot have the frames: make it in the container",
                lower.name
            );
            return Err(self.refused(reason));
        }
        if occupied.contains(&self.index) {
            return Err(self.refused(
                "it has an ingress qdisc already: delete the container that uses this network namespace, or `tc qdisc del` it",
            ));
        }
        Ok(true)
    }

    fn interface(&self, others: &[Interface], occupied: &[u32]) -> Result<Interface, Error> {
        let mac: Option<[u8; 6]> = self.mac.as_slice().try_into().ok();
        let mac = mac.filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6]);
        let mac = mac.ok_or_else(|| self.refused("it has no Ethernet address"))?;
        if let Some(other) = others.iter().find(|other| other.mac == mac) {
            let reason = format!(
                "{} has the same Ethernet address, and the guest could not tell them apart",
                other.name
            );
            return Err(self.refused(reason));
        }
        if !(68..=65_535).contains(&self.mtu) {
            return Err(self.refused(format!("an MTU of {} is out of range (68 to 65535)", self.mtu)));
        }
        Ok(Interface {
            index: self.index,
            name: self.name.clone(),
            mtu: self.mtu,
            occupied: occupied.contains(&self.index),
            mac,
            carrier: monitor::carries(self.flags),
        })
    }

    fn message(&self, interface: &Interface, addresses: Vec<Address>) -> Link {
        Link {
            mac: interface.mac.into(),
            name: self.name.clone(),
            mtu: self.mtu,
            tx_queue_length: self.queue,
            up: self.flags.contains(LinkFlags::Up),
            no_arp: self.flags.contains(LinkFlags::Noarp),
            addresses,
            settings: self.settings.clone(),
            ..Default::default()
        }
    }
}

/// Settings of an interface that are not what a new one has, so that few have to be written.
fn settings(families: &[AfSpecUnspec]) -> HashMap<String, i32> {
    let mut settings = HashMap::new();
    let mut all = |family: &str, values: &[(&str, i32, i32)]| {
        for (name, value, fresh) in values.iter().filter(|(_, value, fresh)| value != fresh) {
            debug_assert_ne!(value, fresh);
            settings.insert(format!("{family}/{name}"), *value);
        }
    };
    for family in families {
        match family {
            AfSpecUnspec::Inet(specs) => {
                for spec in specs {
                    if let AfSpecInet::DevConf(conf) = spec {
                        all("ipv4", &ipv4_settings(conf));
                    }
                }
            }
            AfSpecUnspec::Inet6(specs) => {
                for spec in specs {
                    if let AfSpecInet6::DevConf(conf) = spec {
                        all("ipv6", &ipv6_settings(conf));
                    }
                }
            }
            _ => {}
        }
    }
    settings
}

/// Name, value, and what Linux begins with (`net/ipv4/devinet.c`).
fn ipv4_settings(conf: &InetDevConf) -> [(&'static str, i32, i32); 12] {
    [
        ("forwarding", conf.forwarding, 0),
        ("proxy_arp", conf.proxy_arp, 0),
        ("accept_redirects", conf.accept_redirects, 1),
        ("send_redirects", conf.send_redirects, 1),
        ("rp_filter", conf.rp_filter, 0),
        ("arp_filter", conf.arpfilter, 0),
        ("arp_announce", conf.arp_announce, 0),
        ("arp_ignore", conf.arp_ignore, 0),
        ("arp_accept", conf.arp_accept, 0),
        ("accept_local", conf.accept_local, 0),
        ("route_localnet", conf.route_localnet, 0),
        ("promote_secondaries", conf.promote_secondaries, 0),
    ]
}

/// The same (`net/ipv6/addrconf.c`).
fn ipv6_settings(conf: &Inet6DevConf) -> [(&'static str, i32, i32); 7] {
    [
        ("disable_ipv6", conf.disable_ipv6, 0),
        ("forwarding", conf.forwarding, 0),
        ("accept_ra", conf.accept_ra, 1),
        ("accept_redirects", conf.accept_redirects, 1),
        ("autoconf", conf.autoconf, 1),
        ("proxy_ndp", conf.proxy_ndp, 0),
        ("use_tempaddr", conf.use_tempaddr, 0),
    ]
}

fn links(kernel_: &mut Connection) -> Result<Vec<Seen>, Error> {
    let list = kernel_.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()));
    let list = list.map_err(kernel("list the interfaces of the network namespace"))?;
    Ok(list
        .into_iter()
        .filter_map(|object| match object {
            RouteNetlinkMessage::NewLink(link) => Some(Seen::of(link)),
            _ => None,
        })
        .collect())
}

/// Interfaces at whose ingress something is.
fn occupied(kernel_: &mut Connection) -> Result<Vec<u32>, Error> {
    let list = kernel_.dump(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()));
    let list = list.map_err(kernel("list the qdiscs of the network namespace"))?;
    let at_ingress = |qdisc: &TcMessage| {
        qdisc.header.parent == TcHandle::INGRESS
            || qdisc.attributes.iter().any(|a| matches!(a, TcAttribute::Kind(kind) if kind == "clsact"))
    };
    Ok(list
        .into_iter()
        .filter_map(|object| match object {
            RouteNetlinkMessage::NewQueueDiscipline(qdisc) if at_ingress(&qdisc) => {
                u32::try_from(qdisc.header.index).ok()
            }
            _ => None,
        })
        .collect())
}

/// All addresses, with the interface of each.
fn addresses(kernel_: &mut Connection) -> Result<Vec<(u32, Address)>, Error> {
    let list = kernel_.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()));
    let list = list.map_err(kernel("list the addresses of the network namespace"))?;
    Ok(list
        .into_iter()
        .filter_map(|object| match object {
            RouteNetlinkMessage::NewAddress(message) => {
                address_of(&message).map(|address| (message.header.index, address))
            }
            _ => None,
        })
        .collect())
}

/// `None` for one that the guest will learn from a router by itself, as the namespace did.
fn address_of(message: &AddressMessage) -> Option<Address> {
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let (mut local, mut other) = (None, None);
    let mut address = Address {
        prefix_length: message.header.prefix_len.into(),
        scope: u8::from(message.header.scope).into(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => other = Some(*ip),
            AddressAttribute::Broadcast(ip) => address.broadcast = ip.octets().into(),
            AddressAttribute::Label(label) => address.label = label.clone(),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    // IPv6 tells of the other end first and of its own only if there is another.
    let own = local.or(other)?;
    if own.is_ipv6() && !flags.contains(AddressFlags::Permanent) {
        return None;
    }
    address.local = address::to_bytes(own);
    address.peer = other.filter(|other| *other != own).map(address::to_bytes).unwrap_or_default();
    address.flags = (flags & address::CHOSEN_FLAGS).bits();
    Some(address)
}

fn route_list(
    kernel_: &mut Connection,
    links: &[Seen],
    interfaces: &[Interface],
    refused: &mut Vec<Error>,
) -> Result<Vec<stockade_agent_protocol::messages::Route>, Error> {
    let mut list = Vec::new();
    // The guest's own loopback has what it needs.
    let elsewhere = |index: u32| {
        links.iter().any(|link| link.index == index) && !interfaces.iter().any(|i| i.index == index)
    };
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        let objects = kernel_.dump(RouteNetlinkMessage::GetRoute(message));
        for object in objects.map_err(kernel("list the routes of the network namespace"))? {
            let RouteNetlinkMessage::NewRoute(message) = object else { continue };
            let over = over(&message);
            let leads_nowhere = over.is_some_and(|index| {
                links.iter().any(|link| link.index == index && link.flags.contains(LinkFlags::Loopback))
            }) && message.header.kind
                != stockade_netlink::route::route::RouteType::Unicast;
            if over.is_some_and(elsewhere) && !leads_nowhere {
                continue;
            }
            let name = |index: u32| match interfaces.iter().find(|i| i.index == index) {
                Some(interface) => Some(interface.name.clone()),
                None if elsewhere(index) => Some(String::new()),
                None => None,
            };
            match routes::from_kernel(&message, name) {
                Ok(route) => list.extend(route),
                Err(e) => refused.push(e.into()),
            }
        }
    }
    Ok(list)
}

/// The one interface that a route leads over.
pub fn over(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        stockade_netlink::route::route::RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

/// Those that somebody has set; what was learned will be learned again.
fn neighbours(kernel_: &mut Connection, interfaces: &[Interface]) -> Result<Vec<Neighbour>, Error> {
    let list = kernel_.dump(RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()));
    let list = list.map_err(kernel("list the neighbours of the network namespace"))?;
    let neighbour = |object: RouteNetlinkMessage| {
        let RouteNetlinkMessage::NewNeighbour(message) = object else { return None };
        if message.header.state != NeighbourState::Permanent {
            return None;
        }
        let link = interfaces.iter().find(|i| i.index == message.header.ifindex)?.name.clone();
        let (mut ip, mut mac) = (None, None);
        for attribute in message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(four)) => ip = Some(IpAddr::V4(four)),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(six)) => ip = Some(IpAddr::V6(six)),
                NeighbourAttribute::LinkLayerAddress(bytes) => mac = Some(bytes),
                _ => {}
            }
        }
        Some(Neighbour { link, address: address::to_bytes(ip?), mac: mac?, ..Default::default() })
    };
    Ok(list.into_iter().filter_map(neighbour).collect())
}

fn has_rules(kernel_: &mut Connection) -> Result<bool, Error> {
    let list = kernel_.dump(RouteNetlinkMessage::GetRule(RuleMessage::default()));
    let list = list.map_err(kernel("list the routing rules of the network namespace"))?;
    let is_special = |object: &RouteNetlinkMessage| match object {
        RouteNetlinkMessage::NewRule(rule) => {
            let priority = rule.attributes.iter().find_map(|attribute| match attribute {
                RuleAttribute::Priority(priority) => Some(*priority),
                _ => None,
            });
            let ip = matches!(rule.header.family, AddressFamily::Inet | AddressFamily::Inet6);
            ip && !RULES.contains(&priority.unwrap_or(0))
        }
        _ => false,
    };
    Ok(list.iter().any(is_special))
}
