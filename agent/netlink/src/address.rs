//! Addresses as the contract has them, 4 or 16 bytes, and as the rest of the world does.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressFlags;

/// What of an address's flags its maker chose; the rest is the kernel's report. DAD is over: the address is in use.
pub const CHOSEN_FLAGS: AddressFlags = AddressFlags::Nodad
    .union(AddressFlags::Homeaddress)
    .union(AddressFlags::Managetempaddr)
    .union(AddressFlags::Noprefixroute)
    .union(AddressFlags::Mcautojoin);

/// Bytes that are no address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("an IP address has 4 or 16 bytes, not {0}")]
pub struct InvalidAddress(pub usize);

/// The address that these bytes are.
pub fn from_bytes(bytes: &[u8]) -> Result<IpAddr, InvalidAddress> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(four).into());
    }
    let sixteen: [u8; 16] = bytes.try_into().map_err(|_| InvalidAddress(bytes.len()))?;
    Ok(Ipv6Addr::from(sixteen).into())
}

/// The same where no bytes are no address.
pub fn optional(bytes: &[u8]) -> Result<Option<IpAddr>, InvalidAddress> {
    if bytes.is_empty() { Ok(None) } else { from_bytes(bytes).map(Some) }
}

/// The bytes of an address.
pub fn to_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(four) => four.octets().into(),
        IpAddr::V6(six) => six.octets().into(),
    }
}

/// Its family.
pub fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}
