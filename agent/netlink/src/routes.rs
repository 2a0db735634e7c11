//! Routes of the contract, to and from rtnetlink's.
//!
//! What a route says and the contract has no word for is an error that names the attribute: a container whose route
//! does something else than the namespace's would be a surprise.

use std::net::IpAddr;

use netlink_packet_core::{DefaultNla, Nla};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
    RouteNextHopFlags, RouteVia,
};
use stockade_agent_protocol::messages::{NextHop, Route};

use crate::address::{self, InvalidAddress};

/// RT_TABLE_LOCAL: the kernel's own, made of the addresses.
const TABLE_LOCAL: u32 = 255;
/// RTPROT_RA: learned from a router, as the guest will.
const PROTOCOL_RA: u32 = 9;
/// What of a route's flags its maker chose (RTNH_F_ONLINK); the rest is the kernel's report.
const CHOSEN_FLAGS: u32 = 4;

/// A route that cannot be carried over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// it says something that the contract cannot
    #[error("it has the attribute {0}, which cannot be carried over")]
    Attribute(String),
    /// it leads over an interface that is not there
    #[error("it leads over an interface that is not wired")]
    Interface,
    /// no address
    #[error(transparent)]
    Address(#[from] InvalidAddress),
    /// a number out of range
    #[error("its {0} is out of range")]
    Range(&'static str),
}

/// A route in the contract's words; `None` for those that a kernel makes by itself. `name` tells what an interface is
/// called.
pub fn from_kernel(
    message: &RouteMessage,
    name: impl Fn(u32) -> Option<String>,
) -> Result<Option<Route>, Error> {
    let header = &message.header;
    let mut route = Route {
        family: u8::from(header.address_family).into(),
        prefix_length: header.destination_prefix_length.into(),
        table: header.table.into(),
        protocol: u8::from(header.protocol).into(),
        scope: u8::from(header.scope).into(),
        type_: u8::from(header.kind).into(),
        tos: header.tos.into(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        if let RouteAttribute::Table(table) = attribute {
            route.table = *table;
        }
    }
    let ours = route.table == TABLE_LOCAL
        || route.protocol == PROTOCOL_RA
        || header.flags.contains(RouteFlags::Cloned);
    if ours {
        return Ok(None);
    }
    let mut next = NextHop { flags: header.flags.bits() & CHOSEN_FLAGS, ..Default::default() };
    let mut single = false;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => route.destination = bytes(to)?,
            RouteAttribute::PrefSource(from) => route.preferred_source = bytes(from)?,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Preference(preference) => route.preference = u8::from(*preference).into(),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    let (kind, value) = metric_value(metric)?;
                    route.metrics.insert(kind, value);
                }
            }
            RouteAttribute::Oif(index) => {
                single = true;
                next.link = name(*index).ok_or(Error::Interface)?;
            }
            RouteAttribute::Gateway(gateway) => next.gateway = bytes(gateway)?,
            RouteAttribute::Via(via) => next.gateway = via_bytes(via)?,
            RouteAttribute::MultiPath(hops) => {
                for hop in hops {
                    route.next_hops.push(next_hop(hop, &name)?);
                }
            }
            RouteAttribute::Table(_) | RouteAttribute::CacheInfo(_) | RouteAttribute::TtlPropagate(_) => {}
            other => return Err(Error::Attribute(format!("{other:?}"))),
        }
    }
    if header.source_prefix_length != 0 {
        return Err(Error::Attribute("source prefix".into()));
    }
    if single {
        route.next_hops.push(next);
    }
    Ok(Some(route))
}

/// The message that makes a route. `index` tells an interface by its name.
pub fn to_kernel(route: &Route, index: impl Fn(&str) -> Option<u32>) -> Result<RouteMessage, Error> {
    let small = |value: u32, what| u8::try_from(value).map_err(|_| Error::Range(what));
    let mut header = RouteHeader {
        address_family: AddressFamily::from(small(route.family, "family")?),
        destination_prefix_length: small(route.prefix_length, "prefix length")?,
        tos: small(route.tos, "type of service")?,
        // The attribute is what counts.
        table: RouteHeader::RT_TABLE_UNSPEC,
        protocol: small(route.protocol, "protocol")?.into(),
        scope: small(route.scope, "scope")?.into(),
        kind: small(route.type_, "type")?.into(),
        ..Default::default()
    };
    let mut attributes = vec![RouteAttribute::Table(route.table)];
    if let Some(to) = address::optional(&route.destination)? {
        attributes.push(RouteAttribute::Destination(to.into()));
    }
    if let Some(from) = address::optional(&route.preferred_source)? {
        attributes.push(RouteAttribute::PrefSource(from.into()));
    }
    if route.metric != 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    if route.preference != 0 {
        attributes.push(RouteAttribute::Preference(small(route.preference, "preference")?.into()));
    }
    if !route.metrics.is_empty() {
        let mut metrics: Vec<_> = route.metrics.iter().collect();
        metrics.sort();
        let metrics = metrics.into_iter().map(|(kind, value)| {
            let kind = u16::try_from(*kind).map_err(|_| Error::Range("metric"))?;
            Ok(RouteMetric::Other(DefaultNla::new(kind, value.to_ne_bytes().into())))
        });
        attributes.push(RouteAttribute::Metrics(metrics.collect::<Result<_, Error>>()?));
    }
    match &route.next_hops[..] {
        [] => {}
        [hop] => {
            header.flags = RouteFlags::from_bits_retain(hop.flags & CHOSEN_FLAGS);
            attributes.push(RouteAttribute::Oif(index(&hop.link).ok_or(Error::Interface)?));
            attributes.extend(gateway(hop, header.address_family)?);
        }
        hops => {
            let hops = hops.iter().map(|hop| {
                let mut next = RouteNextHop::default();
                next.flags = RouteNextHopFlags::from_bits_retain((hop.flags & CHOSEN_FLAGS) as u8);
                next.hops = small(hop.weight, "weight")?;
                next.interface_index = index(&hop.link).ok_or(Error::Interface)?;
                next.attributes.extend(gateway(hop, header.address_family)?);
                Ok(next)
            });
            attributes.push(RouteAttribute::MultiPath(hops.collect::<Result<_, Error>>()?));
        }
    }
    let mut message = RouteMessage::default();
    message.header = header;
    message.attributes = attributes;
    Ok(message)
}

fn gateway(hop: &NextHop, family: AddressFamily) -> Result<Option<RouteAttribute>, Error> {
    Ok(address::optional(&hop.gateway)?.map(|gateway| {
        if address::family(gateway) == family {
            RouteAttribute::Gateway(gateway.into())
        } else {
            RouteAttribute::Via(gateway.into())
        }
    }))
}

fn next_hop(hop: &RouteNextHop, name: impl Fn(u32) -> Option<String>) -> Result<NextHop, Error> {
    let mut next = NextHop {
        link: name(hop.interface_index).ok_or(Error::Interface)?,
        flags: u32::from(hop.flags.bits()) & CHOSEN_FLAGS,
        weight: hop.hops.into(),
        ..Default::default()
    };
    for attribute in &hop.attributes {
        match attribute {
            RouteAttribute::Gateway(gateway) => next.gateway = bytes(gateway)?,
            RouteAttribute::Via(via) => next.gateway = via_bytes(via)?,
            other => return Err(Error::Attribute(format!("{other:?}"))),
        }
    }
    Ok(next)
}

fn bytes(address: &RouteAddress) -> Result<Vec<u8>, Error> {
    match address {
        RouteAddress::Inet(four) => Ok(address::to_bytes(IpAddr::V4(*four))),
        RouteAddress::Inet6(six) => Ok(address::to_bytes(IpAddr::V6(*six))),
        other => Err(Error::Attribute(format!("{other:?}"))),
    }
}

fn via_bytes(via: &RouteVia) -> Result<Vec<u8>, Error> {
    match via {
        RouteVia::Inet(four) => Ok(address::to_bytes(IpAddr::V4(*four))),
        RouteVia::Inet6(six) => Ok(address::to_bytes(IpAddr::V6(*six))),
        other => Err(Error::Attribute(format!("{other:?}"))),
    }
}

/// All of the metrics are 32-bit numbers but the name of a congestion control algorithm, which the kernel tells as
/// a string.
fn metric_value(metric: &RouteMetric) -> Result<(u32, u32), Error> {
    let mut value = vec![0; metric.value_len()];
    metric.emit_value(&mut value);
    let number = <[u8; 4]>::try_from(&value[..]).map_err(|_| Error::Attribute(format!("{metric:?}")))?;
    Ok((metric.kind().into(), u32::from_ne_bytes(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [(u32, &str); 2] = [(7, "eth0"), (9, "net1")];

    fn name(index: u32) -> Option<String> {
        NAMES.iter().find(|(i, _)| *i == index).map(|(_, name)| (*name).to_owned())
    }

    fn index(name: &str) -> Option<u32> {
        NAMES.iter().find(|(_, n)| *n == name).map(|(index, _)| *index)
    }

    fn route(family: u32, destination: &[u8], prefix_length: u32, next_hops: Vec<NextHop>) -> Route {
        Route {
            family,
            destination: destination.into(),
            prefix_length,
            table: 254,
            protocol: 3,
            type_: 1,
            next_hops,
            ..Default::default()
        }
    }

    fn hop(link: &str, gateway: &[u8]) -> NextHop {
        NextHop { link: link.into(), gateway: gateway.into(), ..Default::default() }
    }

    #[test]
    fn what_goes_to_the_kernel_comes_back_the_same() {
        let six = [0x20; 16];
        let mut onlink = hop("eth0", &[169, 254, 1, 1]);
        onlink.flags = CHOSEN_FLAGS;
        let mut heavy = hop("net1", &[10, 1, 0, 1]);
        heavy.weight = 3;
        let mut routes = vec![
            route(2, &[], 0, vec![hop("eth0", &[10, 0, 0, 1])]),
            route(2, &[], 0, vec![onlink]),
            route(2, &[10, 9, 0, 0], 16, vec![hop("eth0", &[])]),
            route(2, &[10, 9, 0, 0], 16, vec![hop("eth0", &six)]),
            route(2, &[10, 8, 0, 0], 16, vec![hop("eth0", &[10, 0, 0, 1]), heavy]),
            route(2, &[10, 7, 0, 0], 16, vec![]),
            route(10, &six, 64, vec![hop("net1", &six)]),
        ];
        routes[2].scope = 253;
        routes[2].preferred_source = vec![10, 0, 0, 2];
        routes[2].metric = 100;
        routes[2].metrics.insert(2, 1400);
        routes[5].type_ = 7;
        routes[6].table = 1000;
        routes[6].preference = 1;
        for route in routes {
            let message = to_kernel(&route, index).unwrap();
            assert_eq!(from_kernel(&message, name).unwrap(), Some(route));
        }
    }

    #[test]
    fn what_a_kernel_makes_by_itself_is_left_out() {
        let mut local = route(2, &[10, 0, 0, 2], 32, vec![hop("eth0", &[])]);
        local.table = TABLE_LOCAL;
        let mut learned = route(10, &[], 0, vec![hop("eth0", &[0xfe; 16])]);
        learned.protocol = PROTOCOL_RA;
        for route in [local, learned] {
            let message = to_kernel(&route, index).unwrap();
            assert_eq!(from_kernel(&message, name).unwrap(), None);
        }
    }

    #[test]
    fn a_route_that_cannot_be_carried_over_says_why() {
        let over_nothing = to_kernel(&route(2, &[], 0, vec![hop("nope", &[])]), index);
        assert!(matches!(over_nothing, Err(Error::Interface)));
        let no_address = to_kernel(&route(2, &[1, 2, 3], 0, vec![]), index);
        assert!(matches!(no_address, Err(Error::Address(InvalidAddress(3)))));
        let mut message = to_kernel(&route(2, &[], 0, vec![hop("eth0", &[])]), index).unwrap();
        message.attributes.push(RouteAttribute::Mark(5));
        assert!(matches!(from_kernel(&message, name), Err(Error::Attribute(_))));
        assert!(matches!(from_kernel(&message, |_| None), Err(Error::Interface)));
    }
}
