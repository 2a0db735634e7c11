//! What has gone over a sandbox's interfaces, as the host's kernel counts it: no claim of the guest's.

use std::io;

use serde::Serialize;
use stockade_netlink::Connection;
use stockade_netlink::route::RouteNetlinkMessage;
use stockade_netlink::route::link::{LinkAttribute, LinkMessage};

use super::Wired;

/// Counters of an interface since it was made, seen from the container, in the shape that runc gives them.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Traffic {
    name: String,
    rx_bytes: u64,
    rx_packets: u64,
    rx_errors: u64,
    rx_dropped: u64,
    tx_bytes: u64,
    tx_packets: u64,
    tx_errors: u64,
    tx_dropped: u64,
}

/// Reads the counters of these interfaces; one that is gone has none.
pub fn read<'a>(
    kernel: &mut Connection,
    wired: impl Iterator<Item = &'a Wired> + Clone,
) -> io::Result<Vec<Traffic>> {
    let links = kernel.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let links = links.into_iter().filter_map(|object| match object {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    });
    Ok(links
        .filter_map(|link| {
            let wired = wired.clone().find(|wired| wired.index == link.header.index)?;
            let counted = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::Stats64(counted) => Some(*counted),
                _ => None,
            })?;
            Some(Traffic {
                name: wired.name.clone(),
                rx_bytes: counted.rx_bytes,
                rx_packets: counted.rx_packets,
                rx_errors: counted.rx_errors,
                rx_dropped: counted.rx_dropped,
                tx_bytes: counted.tx_bytes,
                tx_packets: counted.tx_packets,
                tx_errors: counted.tx_errors,
                tx_dropped: counted.tx_dropped,
            })
        })
        .collect())
}
