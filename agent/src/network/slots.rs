//! The guest's network devices and the slots that they are in.
//!
//! A slot is a virtio-mmio device that may be a placeholder: the kernel finds nothing in it until it is told to look
//! again, and forgets what it has found when it is told to let go.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use stockade_netlink::Connection;
use stockade_netlink::route::RouteNetlinkMessage;
use stockade_netlink::route::link::{LinkAttribute, LinkMessage};

use crate::error::Error;
use crate::helper::{Helper, Record};
use crate::reaper::Reaper;

/// Where the kernel lists the slots, and the file that makes it look at one again.
const SLOTS: &str = "/sys/bus/platform/devices";
const PROBE: &str = "/sys/bus/platform/drivers_probe";
/// The file that makes it let go of one.
const UNBIND: &str = "/sys/bus/platform/drivers/virtio-mmio/unbind";
/// Where it lists the network devices of a namespace.
const NET: &str = "/sys/class/net";
/// How slots are called there.
const SLOT_PREFIX: &str = "virtio-mmio.";

/// A network device of the guest.
#[derive(Clone, Debug)]
pub struct Device {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MAC address. The loopback's is all zeroes.
    pub mac: Vec<u8>,
}

impl Device {
    /// The slot that it is in; `None` for what is no virtio device.
    pub fn slot(&self) -> Option<String> {
        let device = fs::canonicalize(Path::new(NET).join(&self.name).join("device")).ok()?;
        let slot = device.parent()?.file_name()?.to_str()?;
        slot.starts_with(SLOT_PREFIX).then(|| slot.to_owned())
    }
}

/// All devices by their indices.
pub fn devices(kernel: &mut Connection) -> Result<HashMap<u32, Device>, Error> {
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
        let index = link.header.index;
        Some((index, Device { index, name: name?, mac: mac? }))
    };
    Ok(links.into_iter().filter_map(device).collect())
}

/// Has the kernel look again at the slots in which it has no device.
pub fn probe() -> Result<(), Error> {
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

/// Has the kernel let go of what is in these slots, whose network devices are gone then, wherever the workload has put
/// them. In a helper, because that waits until nobody uses them any more.
pub async fn release(reaper: &Reaper, slots: Vec<String>) -> Result<(), Error> {
    let mut helper = Helper::fork(reaper, move |_| {
        for slot in slots {
            if let Err(e) = fs::write(UNBIND, &slot) {
                return Record::Failed(format!("writing {slot} to {UNBIND}: {e}"));
            }
        }
        Record::Done(None)
    })?;
    helper.outcome().await.map(drop)
}
