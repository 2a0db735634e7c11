//! An interface and a tap, tied together: what arrives at the one leaves by the other.
//!
//! By redirection at ingress (tc-mirred(8)): no bridge that would learn, filter or take part, and the namespace's own
//! stack sees nothing of what is meant for the guest.

use std::io;
use std::os::fd::OwnedFd;

use stockade_netlink::route::RouteNetlinkMessage;
use stockade_netlink::route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use stockade_netlink::route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption,
};
use stockade_netlink::{Connection, NLM_F_CREATE, NLM_F_EXCL};

use super::scan::Interface;
use super::{Error, Wired, kernel, tap};

/// "ffff:", where an interface's ingress is.
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0 };

/// All protocols (ETH_P_ALL), as a filter has it: in network order, below its priority.
const PRIORITY: u32 = 1;
const ALL_PROTOCOLS: u16 = 0x0003;

/// Makes a tap and ties it to the interface. Returns its index too. Undone by [`unwire`] and the tap's end.
pub fn wire(kernel_: &mut Connection, interface: &Interface) -> Result<(OwnedFd, u32), Error> {
    let (tap, index) = tap::make().map_err(Error::Tap)?;
    set_up(kernel_, index, interface.mtu).map_err(kernel(format!("set up the tap of {}", interface.name)))?;
    tie(kernel_, interface, index)?;
    Ok((tap, index))
}

/// Ties a tap to another interface in the place of the one that it was tied to.
pub fn retie(kernel_: &mut Connection, interface: &Interface, tap: u32) -> Result<(), Error> {
    let name = || format!("the tap of {}", interface.name);
    unwire(kernel_, &Wired { index: tap, name: name() })?;
    let mut message = LinkMessage::default();
    message.header.index = tap;
    message.attributes = vec![LinkAttribute::Mtu(interface.mtu)];
    kernel_
        .request(RouteNetlinkMessage::SetLink(message), 0)
        .map_err(kernel(format!("set the MTU of {}", name())))?;
    tie(kernel_, interface, tap)
}

/// Ends a tap, whoever still has a descriptor of it.
pub fn remove(kernel_: &mut Connection, tap: u32) -> Result<(), Error> {
    let mut message = LinkMessage::default();
    message.header.index = tap;
    match kernel_.request(RouteNetlinkMessage::DelLink(message), 0) {
        Err(e) if e.raw_os_error() != Some(libc::ENODEV) => Err(kernel("remove a tap")(e)),
        _ => Ok(()),
    }
}

fn tie(kernel_: &mut Connection, interface: &Interface, tap: u32) -> Result<(), Error> {
    for (from, to) in [(tap, interface.index), (interface.index, tap)] {
        redirect(kernel_, from, to).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT | libc::EOPNOTSUPP) => Error::Kernel {
                what: format!(
                    "tie {} to its tap: load the modules sch_ingress, cls_matchall and act_mirred",
                    interface.name
                ),
                source: e,
            },
            _ => kernel(format!("tie {} to its tap", interface.name))(e),
        })?;
    }
    Ok(())
}

/// Takes the redirection from the interface. One that is gone, or was never tied, is fine.
pub fn unwire(kernel_: &mut Connection, wired: &Wired) -> Result<(), Error> {
    match kernel_.request(RouteNetlinkMessage::DelQueueDiscipline(ingress(wired.index)), 0) {
        Ok(()) => Ok(()),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)) => Ok(()),
        Err(e) => Err(kernel(format!("untie {}", wired.name))(e)),
    }
}

fn set_up(kernel: &mut Connection, index: u32, mtu: u32) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![LinkAttribute::Mtu(mtu)];
    // It is a wire, not a host: without an address of its own it has nothing to say in IPv6.
    let mute = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
        In6AddrGenMode::None,
    )])]);
    let mut muted = message.clone();
    muted.attributes.push(mute);
    match kernel.request(RouteNetlinkMessage::SetLink(muted), 0) {
        // A kernel without IPv6.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => {
            kernel.request(RouteNetlinkMessage::SetLink(message), 0)?;
        }
        other => other?,
    }
    let mut up = LinkMessage::default();
    up.header.index = index;
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    kernel.request(RouteNetlinkMessage::SetLink(up), 0)
}

fn ingress(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = index as i32;
    message.header.handle = INGRESS;
    message.header.parent = TcHandle::INGRESS;
    message.attributes = vec![TcAttribute::Kind("ingress".into())];
    message
}

fn redirect(kernel: &mut Connection, from: u32, to: u32) -> io::Result<()> {
    let new = NLM_F_CREATE | NLM_F_EXCL;
    kernel.request(RouteNetlinkMessage::NewQueueDiscipline(ingress(from)), new)?;

    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Stolen;
    let mut mirror = TcMirror::default();
    mirror.generic = generic;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    let mut message = TcMessage::default();
    message.header.index = from as i32;
    message.header.parent = INGRESS;
    message.header.info = PRIORITY << 16 | u32::from(ALL_PROTOCOLS.to_be());
    message.attributes = vec![
        TcAttribute::Kind(TcFilterMatchAll::KIND.into()),
        TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![action]))]),
    ];
    kernel.request(RouteNetlinkMessage::NewTrafficFilter(message), new)
}
