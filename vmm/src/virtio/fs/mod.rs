//! The file system device (virtio 1.3, section 5.11): the sandbox's share directory, by FUSE.
//!
//! [`share`] is the policy: what a guest may do to the directory. [`worker`] is the device's own thread, so
//! that waiting for the host's disks never stalls the streams of the I/O thread.

mod caller;
mod limits;
mod link;
mod nodes;
mod share;
mod worker;

#[cfg(test)]
mod tests;

use std::io;

use limits::Limits;
pub use limits::WANTED as DESCRIPTORS;

use super::thread::DeviceThread;
use super::{ActivateError, Activation, ConfigSpace, Device, F_EVENT_IDX, F_INDIRECT_DESC, Running};

const TYPE_FS: u32 = 26;

/// Slots of the hiprio queue (FORGET and INTERRUPT) and of the one request queue. Linux limits a request to
/// as many pages as the request queue has slots, less 4: 512 allows the 1 MiB that FUSE can do at most.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// Length of the tag field, in bytes.
const TAG_SIZE: usize = 36;

/// A file system device that the guest mounts by `tag` (36 bytes of UTF-8 at most, the rest is cut off) and
/// that serves the directory `share`, a path in the jail. Raises the process' limit of open files (see [`limits`]),
/// and starts the thread that will serve, with the capabilities that this one has.
pub fn new(tag: &str, share: &str) -> io::Result<Box<dyn Device>> {
    let mut config = vec![0; TAG_SIZE];
    let n = tag.len().min(TAG_SIZE);
    config[..n].copy_from_slice(&tag.as_bytes()[..n]);
    // num_request_queues
    config.extend(1u32.to_le_bytes());
    let thread = worker::start(share.into(), Limits::of_process())?;
    Ok(Box::new(Fs { thread, config: ConfigSpace::new(config) }))
}

struct Fs {
    thread: DeviceThread<Activation>,
    config: ConfigSpace,
}

impl Device for Fs {
    fn device_type(&self) -> u32 {
        TYPE_FS
    }

    fn features(&self) -> u64 {
        // Indirect: a request of 1 MiB takes 260 descriptors; without it the ring would hold one such.
        F_EVENT_IDX | F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&self, activation: Activation) -> Result<Box<dyn Running>, ActivateError> {
        Ok(Box::new(self.thread.begin(activation)?))
    }
}
