//! A conversation with the kernel about its network: rtnetlink, one request at a time.
//!
//! For the supervisor, which reads and wires a network namespace of the host, and for the agent, which makes the
//! guest's look the same. The kernel answers a request before sending it returns, so nothing here ever waits and a
//! single thread needs no async. A socket belongs to the network namespace in which it was opened, wherever its owner
//! goes later.

pub mod address;
pub mod routes;

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
pub use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
pub use netlink_packet_route as route;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// How often a dump is repeated that was disturbed by changes, before it is taken for one that cannot end.
const DUMP_ATTEMPTS: usize = 20;

/// A socket to the kernel's routing subsystem.
pub struct Connection {
    socket: Socket,
    sequence: u32,
}

impl Connection {
    /// A conversation about the network namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // Dumps then honour what they are asked for, as the index of an interface.
        socket.set_netlink_get_strict_chk(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Has the kernel do something; `flags` beside those of every request.
    pub fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            for message in self.messages(&bytes) {
                if let NetlinkPayload::Error(error) = message?.payload {
                    return match error.code {
                        None => Ok(()),
                        Some(code) => Err(io::Error::from_raw_os_error(-code.get())),
                    };
                }
            }
        }
    }

    /// All objects that the kernel lists for a request. They are of one moment.
    pub fn dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(objects) = self.try_dump(message.clone())? {
                return Ok(objects);
            }
        }
        Err(io::Error::other("the list changes faster than it can be read"))
    }

    /// `None` if something changed in the middle.
    fn try_dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Option<Vec<RouteNetlinkMessage>>> {
        self.send(message, NLM_F_REQUEST | NLM_F_DUMP)?;
        let (mut objects, mut whole) = (Vec::new(), true);
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            for message in self.messages(&bytes) {
                let message = message?;
                whole &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(object) => objects.push(object),
                    NetlinkPayload::Done(_) => return Ok(whole.then_some(objects)),
                    NetlinkPayload::Error(error) => {
                        return Err(match error.code {
                            Some(code) => io::Error::from_raw_os_error(-code.get()),
                            None => io::Error::other("an acknowledgement in place of a list"),
                        });
                    }
                    _ => {}
                }
            }
        }
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut packet = NetlinkMessage::from(message);
        packet.header.flags = flags;
        packet.header.sequence_number = self.sequence;
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        Ok(())
    }

    /// The answers to the last request among these bytes.
    fn messages<'a>(
        &self,
        bytes: &'a [u8],
    ) -> impl Iterator<Item = io::Result<NetlinkMessage<RouteNetlinkMessage>>> + use<'a> {
        let sequence = self.sequence;
        messages(bytes).filter(move |message| match message {
            Ok(message) => message.header.sequence_number == sequence,
            Err(_) => true,
        })
    }
}

/// The messages in a packet of the kernel.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = io::Result<NetlinkMessage<RouteNetlinkMessage>>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()));
        // Each begins on a multiple of four bytes (NLMSG_ALIGN).
        let length = message.as_ref().map_or(bytes.len(), |m| (m.header.length as usize).next_multiple_of(4));
        bytes = bytes.get(length.max(4)..).unwrap_or_default();
        Some(message)
    })
}

/// Told of changes by the kernel. Reads never wait.
pub struct Monitor(Socket);

impl Monitor {
    /// Hears of the interfaces of the calling thread's network namespace, their addresses, routes and neighbours
    /// from now on.
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.set_non_blocking(true)?;
        socket.bind(&SocketAddr::new(0, GROUPS))?;
        Ok(Monitor(socket))
    }

    /// What has changed since the last call, or an error of kind `WouldBlock`. More may have changed than is told
    /// (`ENOBUFS`): then everything has to be looked at anew.
    pub fn read(&self) -> io::Result<Vec<RouteNetlinkMessage>> {
        let (bytes, _) = self.0.recv_from_full()?;
        messages(&bytes)
            .filter_map(|message| match message.map(|m| m.payload) {
                Ok(NetlinkPayload::InnerMessage(object)) => Some(Ok(object)),
                Ok(_) => None,
                Err(e) => Some(Err(e)),
            })
            .collect()
    }
}

impl std::os::fd::AsFd for Monitor {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // SAFETY: the socket is open as long as `self` is.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// `RTMGRP_{LINK,NEIGH,IPV4_IFADDR,IPV4_ROUTE,IPV6_IFADDR,IPV6_ROUTE}` (`include/uapi/linux/rtnetlink.h`)
const GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400;

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};

    #[test]
    fn the_loopback_interface_is_listed() {
        let mut kernel = Connection::open().unwrap();
        let links = kernel.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).unwrap();
        let is_lo = |link: &RouteNetlinkMessage| match link {
            RouteNetlinkMessage::NewLink(link) => {
                link.attributes.contains(&LinkAttribute::IfName("lo".into()))
            }
            _ => false,
        };
        assert!(links.iter().any(is_lo));
    }

    #[test]
    fn a_refusal_is_the_kernels_error_and_the_conversation_goes_on() {
        let mut kernel = Connection::open().unwrap();
        for _ in 0..2 {
            let mut link = LinkMessage::default();
            link.header.index = 0x7fff_fff0;
            let error = kernel.request(RouteNetlinkMessage::DelLink(link), 0).unwrap_err();
            let code = error.raw_os_error();
            // ENODEV, or EPERM for who may not even ask.
            assert!(code == Some(19) || code == Some(1), "{error}");
        }
    }

    #[test]
    fn garbage_from_the_kernel_is_an_error() {
        for bad in [&[1u8][..], &[0; 16], &[255; 40]] {
            assert!(messages(bad).take(5).any(|message| message.is_err()), "{bad:?}");
        }
    }
}
