//! The socket device (virtio 1.3, section 5.10), in user space and host-initiated only.
//!
//! [`Dialer::connect`] hands over one end of a socket pair, which becomes a stream to a port in the guest.
//! There is no socket file, and the guest cannot dial out: its REQUEST is answered with RST. Such a REQUEST
//! also is the hint that the agent in the guest listens now; connects made earlier wait for it, so that
//! nobody has to poll a booting guest.
//!
//! Flow control is end to end: a host reader that stops lets at most [`stream::buffer_limit`] bytes of its
//! one stream pile up here, then the guest's writer blocks; when the guest has no receive buffers or no
//! credit left, host sockets are simply not read.

mod mux;
mod packet;
mod stream;

#[cfg(test)]
mod credit;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{ActivateError, Activation, ConfigSpace, Device, F_EVENT_IDX, OnIoThread, Running};
use crate::io_loop::IoHandle;

const TYPE_SOCKET: u32 = 19;

/// Slots of the receive, transmit and event queue. Linux fills the whole receive queue with 4 KiB buffers at
/// boot, and every page of them costs a page fault: 64 hold as much as one stream's credit, more would only
/// make the boot slower. A transmit packet of Linux is up to 64 KiB in two descriptors or more. Linux posts 8
/// event buffers.
const QUEUE_SIZES: [u16; 3] = [64, 64, 8];

/// Most streams at a time. A sandbox has three a process and one for RPCs; each costs a descriptor.
pub const MAX_STREAMS: usize = 4096;

/// Why the guest did not take a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nobody listens on the port.
    #[error("nothing in the guest listens on the port")]
    NotListening,
    /// The guest closed the stream before it was established, or broke the protocol.
    #[error("the guest's vsock device stopped or was reset")]
    DeviceStopped,
    /// [`MAX_STREAMS`] is reached.
    #[error("there are {MAX_STREAMS} streams to the guest already")]
    TooManyStreams,
    /// The descriptor cannot be waited for.
    #[error("the stream's descriptor is not a socket that can be polled")]
    BadDescriptor,
}

/// Told the outcome of a connect, with its id.
pub type Replies = Box<dyn Fn(u64, Result<(), Refusal>) + Send>;

/// Makes the device for a guest with this context id, and the way to open streams to it. `replies` is called
/// once for every connect, on the I/O thread as a rule.
pub fn new(cid: u64, io: IoHandle, replies: Replies) -> std::io::Result<(Box<dyn Device>, Dialer)> {
    let inbox = Arc::new(Inbox {
        connects: Mutex::new(Vec::new()),
        wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        replies: Mutex::new(replies),
    });
    let config = ConfigSpace::new(cid.to_le_bytes().to_vec());
    let device = Vsock { cid, io, inbox: inbox.clone(), config };
    Ok((Box::new(device), Dialer { inbox }))
}

/// Opens streams to the guest. May be used from any thread.
#[derive(Clone)]
pub struct Dialer {
    inbox: Arc<Inbox>,
}

impl Dialer {
    /// Connects `stream`, one end of a stream socket pair, to `port` in the guest. The outcome comes as a
    /// reply with `id`; before the guest's agent listens that takes until it does.
    pub fn connect(&self, id: u64, port: u32, stream: OwnedFd) {
        {
            let mut connects = self.inbox.connects.lock().unwrap_or_else(PoisonError::into_inner);
            if connects.len() < MAX_STREAMS {
                connects.push(Connect { id, port, stream });
                let _ = self.inbox.wake.write(1);
                return;
            }
        }
        self.inbox.reply(id, Err(Refusal::TooManyStreams));
    }
}

/// A stream that was asked for.
struct Connect {
    id: u64,
    port: u32,
    stream: OwnedFd,
}

/// Connects that no worker has taken yet: they outlive the device's activations.
struct Inbox {
    connects: Mutex<Vec<Connect>>,
    wake: EventFd,
    replies: Mutex<Replies>,
}

impl Inbox {
    fn take(&self) -> Vec<Connect> {
        std::mem::take(&mut *self.connects.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn reply(&self, id: u64, result: Result<(), Refusal>) {
        (self.replies.lock().unwrap_or_else(PoisonError::into_inner))(id, result);
    }
}

struct Vsock {
    cid: u64,
    io: IoHandle,
    inbox: Arc<Inbox>,
    config: ConfigSpace,
}

impl Device for Vsock {
    fn device_type(&self) -> u32 {
        TYPE_SOCKET
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&self, activation: Activation) -> Result<Box<dyn Running>, ActivateError> {
        let mux = mux::Mux::new(self.cid, self.inbox.clone(), activation)?;
        // Connects made while no worker ran have to be looked at.
        let _ = self.inbox.wake.write(1);
        let worker = self.io.add(Box::new(mux));
        Ok(Box::new(OnIoThread::new(self.io.clone(), worker)))
    }
}
