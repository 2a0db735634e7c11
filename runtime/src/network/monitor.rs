//! Carriers: when an interface of the namespace loses or gets its carrier, so does the guest's.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;

use stockade_netlink::Connection;
use stockade_netlink::route::RouteNetlinkMessage;
use stockade_netlink::route::link::{LinkFlags, LinkMessage};
use tokio::io::Interest;

use super::{Error, Slot, kernel};
use crate::sandbox::poll::register;

/// Whether an interface in this state carries frames.
pub fn carries(flags: LinkFlags) -> bool {
    flags.contains(LinkFlags::Up | LinkFlags::LowerUp)
}

/// Hears of every change in the network namespace in which it was made, from then on.
pub struct Monitor {
    socket: stockade_netlink::Monitor,
    /// Interfaces with their carriers, not looked at yet.
    heard: RefCell<VecDeque<(u32, bool)>>,
}

impl Monitor {
    /// Begins to listen.
    pub fn new() -> io::Result<Self> {
        Ok(Monitor { socket: stockade_netlink::Monitor::of_links()?, heard: RefCell::default() })
    }

    /// Waits for the next change of one of these slots, and notes it there.
    pub async fn next(&self, slots: &RefCell<Vec<Slot>>) -> Result<(u8, bool), Error> {
        let what = || kernel("watch the interfaces");
        let socket = register(self.socket.as_fd(), Interest::READABLE).map_err(|e| what()(e.into()))?;
        loop {
            while let Some((index, up)) = self.heard.borrow_mut().pop_front() {
                let slots = slots.borrow();
                let slot = slots.iter().position(|slot| slot.wired.index == index);
                if let Some(slot) = slot.filter(|slot| slots[*slot].carrier.replace(up) != up) {
                    return Ok((slot as u8, up));
                }
            }
            let mut ready = socket.readable().await.map_err(what())?;
            match self.socket.read() {
                Ok(changes) => self.heard.borrow_mut().extend(changes.iter().filter_map(carrier)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                // Some got lost.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {
                    let links = Connection::open()
                        .and_then(|mut kernel| {
                            kernel.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))
                        })
                        .map_err(what())?;
                    self.heard.borrow_mut().extend(links.iter().filter_map(carrier));
                }
                Err(e) => return Err(what()(e)),
            }
        }
    }
}

fn carrier(change: &RouteNetlinkMessage) -> Option<(u32, bool)> {
    match change {
        RouteNetlinkMessage::NewLink(link) => Some((link.header.index, carries(link.header.flags))),
        RouteNetlinkMessage::DelLink(link) => Some((link.header.index, false)),
        _ => None,
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
}
