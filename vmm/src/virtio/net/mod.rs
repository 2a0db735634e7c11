//! The network device (virtio 1.3, section 5.1): Ethernet frames between the guest and a tap of the host.
//!
//! A device without a tap is a **placeholder**: it says device type 0, for which section 4.2.3.1.1 has drivers look
//! away, so a slot that nobody uses costs the guest three register reads and shows nowhere. [`Plug::attach`] makes
//! it a network device; the guest is told to look again. Hot-plug is thereby a change of a register, and so is its
//! reverse, [`Plug::detach`], before which the guest is told to let go of the device.
//!
//! The worker is a thread of its own ([`worker`]): whatever a guest or its peers do with frames, the streams of the
//! I/O thread go on. Frames go straight between guest memory and the tap; of each one only its 12-byte header is
//! ever in memory of ours. What a guest sends is checked ([`header`]), and what is wrong is dropped and counted, as
//! on a wire.

mod control;
mod header;
mod receive;
mod tap;
mod transmit;
mod worker;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_net as abi;

use super::interrupt::Interrupt;
use super::thread::{DeviceThread, Working};
use super::{ActivateError, Activation, ConfigSpace, Device, F_EVENT_IDX, F_INDIRECT_DESC, Running};
use tap::Tap;

const TYPE_PLACEHOLDER: u32 = 0;
const TYPE_NET: u32 = 1;

/// Slots of the receive, transmit and control queue. Linux fills the receive queue with buffers of 1.5 KiB: 256 of
/// them hold six of the largest frames, and touch a hundred pages when the interface goes up. A transmitted frame
/// takes one slot, whatever it is made of (indirect descriptors). The control queue has one command at a time.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// An MTU that a link of the guest can have: from the least of IPv4 (RFC 791) to the largest in an IPv4 header.
const MTU: std::ops::RangeInclusive<u16> = 68..=65_535;

const fn bit(number: u32) -> u64 {
    1 << number
}

/// What every tap can do. The other way, from guest to host, the kernel takes every frame it can name.
const F_ALWAYS: u64 = bit(abi::VIRTIO_NET_F_MAC)
    | bit(abi::VIRTIO_NET_F_MTU)
    | bit(abi::VIRTIO_NET_F_STATUS)
    | bit(abi::VIRTIO_NET_F_MRG_RXBUF)
    | bit(abi::VIRTIO_NET_F_CTRL_VQ)
    | bit(abi::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
    | bit(abi::VIRTIO_NET_F_CSUM)
    | bit(abi::VIRTIO_NET_F_HOST_TSO4)
    | bit(abi::VIRTIO_NET_F_HOST_TSO6)
    | bit(abi::VIRTIO_NET_F_HOST_ECN);

/// What a network interface is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its MAC address; not a multicast one.
    pub mac: [u8; 6],
    /// Its MTU in bytes, 68 to 65535: the largest that the guest can set.
    pub mtu: u16,
    /// Whether there is a carrier.
    pub up: bool,
}

/// Why a slot got no interface.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// it has one
    #[error("the network slot is taken")]
    Taken,
    /// no such interface can be
    #[error("a network interface cannot have the MAC address {0:02x?}: it is a multicast address or zero")]
    Mac([u8; 6]),
    /// no such interface can be
    #[error("a network interface cannot have an MTU of {0}: it must be 68 to 65535")]
    Mtu(u16),
    /// the descriptor is no tap
    #[error("the descriptor is not a tap with packet headers (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR): {0}")]
    Tap(#[source] io::Error),
}

/// A placeholder, and the way to make an interface of it. `name` is that of its thread, which is started.
pub fn new(name: String) -> io::Result<(Box<dyn Device>, Plug)> {
    let port = Arc::new(Port {
        config: ConfigSpace::new(Vec::new()),
        state: Mutex::new(State { attached: None, interrupt: None }),
        counters: Arc::default(),
    });
    Ok((Box::new(Net { thread: worker::start(name)?, port: port.clone() }), Plug(port)))
}

/// An interface on a socket in place of a tap.
#[cfg(feature = "fuzzing")]
pub fn on_a_socket(wire: std::os::unix::net::UnixDatagram) -> Result<Box<dyn Device>, AttachError> {
    let (device, plug) = new("net-fuzz".into()).map_err(AttachError::Tap)?;
    let interface = Interface { mac: [2, 0, 0, 0, 0, 1], mtu: 1500, up: true };
    wire.set_nonblocking(true).map_err(AttachError::Tap)?;
    plug.0.attach(interface, || Ok(Tap::fake(wire.into(), |_, _| Ok(()))))?;
    Ok(device)
}

/// The host's side of one network slot. May be used from any thread.
#[derive(Clone)]
pub struct Plug(Arc<Port>);

impl Plug {
    /// Makes the placeholder a network device that talks to `tap`.
    pub fn attach(&self, tap: OwnedFd, interface: Interface) -> Result<(), AttachError> {
        self.0.attach(interface, || Tap::new(tap))
    }

    /// Makes it a placeholder again. A driver that still runs the device keeps the tap until it resets that.
    pub fn detach(&self) {
        self.0.lock().attached = None;
    }

    /// Sets the carrier. Nothing happens without an interface.
    pub fn set_link(&self, up: bool) {
        self.0.set_link(up);
    }
}

/// What the registers and the host's side share.
struct Port {
    config: ConfigSpace,
    state: Mutex<State>,
    counters: Arc<Counters>,
}

struct State {
    attached: Option<(Arc<Tap>, Interface)>,
    /// While a driver runs the device.
    interrupt: Option<Arc<Interrupt>>,
}

impl Port {
    fn attach(&self, interface: Interface, tap: impl FnOnce() -> io::Result<Tap>) -> Result<(), AttachError> {
        if interface.mac[0] & 1 != 0 || interface.mac == [0; 6] {
            return Err(AttachError::Mac(interface.mac));
        }
        if !MTU.contains(&interface.mtu) {
            return Err(AttachError::Mtu(interface.mtu));
        }
        let mut state = self.lock();
        if state.attached.is_some() {
            return Err(AttachError::Taken);
        }
        let tap = tap().map_err(AttachError::Tap)?;
        self.config.replace(config_space(&interface));
        state.attached = Some((Arc::new(tap), interface));
        Ok(())
    }

    fn set_link(&self, up: bool) {
        let mut state = self.lock();
        let Some((_, interface)) = state.attached.as_mut().filter(|(_, interface)| interface.up != up) else {
            return;
        };
        interface.up = up;
        self.config.replace(config_space(interface));
        if let Some(interrupt) = &state.interrupt {
            interrupt.config_changed();
        }
    }

    fn tap(&self) -> Option<(Arc<Tap>, Interface)> {
        self.lock().attached.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The fields in their order (section 5.1.4), up to the last one that our features make valid.
fn config_space(interface: &Interface) -> Vec<u8> {
    let status = if interface.up { abi::VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
    let queue_pairs = 1u16;
    let mut bytes = interface.mac.to_vec();
    for field in [status, queue_pairs, interface.mtu] {
        bytes.extend(field.to_le_bytes());
    }
    bytes
}

/// Frames that went nowhere.
#[derive(Debug, Default)]
struct Counters {
    /// From the guest: malformed, or refused by the host's kernel.
    transmit_dropped: AtomicU64,
    /// To the guest: longer than its buffers.
    receive_dropped: AtomicU64,
}

impl Counters {
    /// Counts one, and tells the log of some: a guest that sends nothing else must not fill it.
    fn count(counter: &AtomicU64, direction: &str, why: &dyn std::fmt::Display) {
        let count = counter.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            tracing::warn!(count, "dropped a frame {direction}: {why}");
        }
    }
}

struct Net {
    thread: DeviceThread<worker::Job>,
    port: Arc<Port>,
}

impl Device for Net {
    fn device_type(&self) -> u32 {
        if self.port.lock().attached.is_some() { TYPE_NET } else { TYPE_PLACEHOLDER }
    }

    fn features(&self) -> u64 {
        match &self.port.lock().attached {
            Some((tap, _)) => F_EVENT_IDX | F_INDIRECT_DESC | F_ALWAYS | tap.features(),
            None => 0,
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &ConfigSpace {
        &self.port.config
    }

    fn activate(&self, activation: Activation) -> Result<Box<dyn Running>, ActivateError> {
        let nothing = || io::Error::new(io::ErrorKind::NotFound, "no tap is attached");
        let (tap, interface) = self
            .port
            .tap()
            .ok_or_else(|| ActivateError::Host { what: "use a placeholder", error: nothing() })?;
        let interrupt = activation.interrupt.clone();
        let (mtu, counters) = (interface.mtu, self.port.counters.clone());
        let working = self.thread.begin(worker::Job { tap, mtu, counters, activation })?;
        self.port.lock().interrupt = Some(interrupt);
        Ok(Box::new(Active { _working: working, port: self.port.clone() }))
    }
}

/// A device with a driver.
struct Active {
    _working: Working,
    port: Arc<Port>,
}

impl Running for Active {}

impl Drop for Active {
    fn drop(&mut self) {
        self.port.lock().interrupt = None;
    }
}
