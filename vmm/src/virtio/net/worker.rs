//! What the thread of one network device does: frames in both directions, turn by turn.
//!
//! It sleeps in epoll on the tap, the queues' kicks and a stop event. All are edge-triggered, and what they say is
//! kept in flags: a direction that is blocked costs nothing until its event comes, so a guest that takes no frames
//! does not keep the thread busy, nor the other direction waiting.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_bindings::bindings::virtio_net as abi;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::control::ControlQueue;
use super::header::{MAX_FRAME, MIN_FRAME};
use super::receive::{self, Receive};
use super::tap::Tap;
use super::transmit::{self, Transmit};
use super::{Counters, bit};
use crate::jail::Kind;
use crate::memory::GuestMemory;
use crate::virtio::queue::{KICK, RingError, Virtqueue};
use crate::virtio::thread::DeviceThread;
use crate::virtio::{ActivateError, Activation};

/// What an event is about.
const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const CONTROL: u64 = 2;
const TAP: u64 = 3;
const STOP: u64 = 4;

/// Two VLAN tags, which do not count as part of the MTU.
const TAGS: usize = 8;

/// An activation of the device.
pub struct Job {
    pub tap: Arc<Tap>,
    pub mtu: u16,
    pub counters: Arc<Counters>,
    pub activation: Activation,
}

/// Starts the thread, which will carry frames.
pub fn start(name: String) -> io::Result<DeviceThread<Job>> {
    DeviceThread::start(Kind::Network, name, |job: Job, stop| {
        let interrupt = job.activation.interrupt.clone();
        let (worker, epoll) = Worker::new(job, stop)?;
        Ok(move || {
            if let Err(error) = worker.run(&epoll) {
                tracing::warn!(%error, "network device stops until the guest resets it");
                interrupt.needs_reset();
            }
        })
    })
}

/// Why the thread ends before it is stopped.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("cannot wait for frames: {0}")]
    Wait(std::io::Error),
}

struct Worker {
    tap: Arc<Tap>,
    mtu: u16,
    counters: Arc<Counters>,
    queues: [Virtqueue; 3],
    memory: GuestMemory,
    features: u64,
    /// Whether the tap may have frames that stand for several.
    large: bool,
}

impl Worker {
    fn new(job: Job, stop: &EventFd) -> Result<(Self, Epoll), ActivateError> {
        let host = |what| move |error| ActivateError::Host { what, error };
        let Job { tap, mtu, counters, activation } = job;
        let Activation { queues, memory, features, .. } = activation;
        let queues: [Virtqueue; 3] = queues.try_into().map_err(|_| ActivateError::QueueNotReady(0))?;
        let large = tap.apply(features).map_err(host("set the offloads of the tap"))?;

        let epoll = Epoll::new().map_err(host("make an epoll descriptor"))?;
        let wait = |fd: RawFd, events, data| {
            epoll
                .ctl(ControlOperation::Add, fd, EpollEvent::new(events, data))
                .map_err(host("wait for a queue event"))
        };
        for (queue, data) in queues.iter().zip([RECEIVE, TRANSMIT, CONTROL]) {
            wait(queue.event().as_raw_fd(), KICK, data)?;
        }
        wait(tap.as_raw_fd(), EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED, TAP)?;
        wait(stop.as_raw_fd(), EventSet::IN, STOP)?;
        Ok((Worker { tap, mtu, counters, queues, memory, features, large }, epoll))
    }

    fn run(self, epoll: &Epoll) -> Result<(), Error> {
        let Worker { tap, mtu, counters, queues: [rx, tx, control], memory, features, large } = self;
        let longest = |large| if large { MAX_FRAME } else { usize::from(mtu) + MIN_FRAME + TAGS };
        let mergeable = features & bit(abi::VIRTIO_NET_F_MRG_RXBUF) != 0;
        let mut receive = Receive::new(rx, &memory, mergeable, longest(large));
        let mut transmit = Transmit { queue: tx, memory: &memory, features, iovecs: Vec::new() };
        let mut control = ControlQueue { queue: control, memory: &memory, features };

        // What each direction waits for; nothing is known of before the first look.
        let (mut frames, mut buffers) = (true, true);
        let (mut kicked, mut room) = (true, true);
        let mut ready = [EpollEvent::default(); 5];
        loop {
            if frames && buffers {
                match receive.turn(&tap, &counters)? {
                    receive::Turn::Unfinished => {}
                    receive::Turn::Empty => frames = false,
                    receive::Turn::Starved => buffers = false,
                }
            }
            if kicked && room {
                match transmit.turn(&tap, &counters)? {
                    transmit::Turn::Unfinished => {}
                    transmit::Turn::Empty => kicked = false,
                    transmit::Turn::Full => room = false,
                }
            }
            let busy = (frames && buffers) || (kicked && room);
            let n = match epoll.wait(if busy { 0 } else { -1 }, &mut ready) {
                Ok(n) => n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::Wait(error)),
            };
            for event in ready.iter().take(n) {
                match event.data() {
                    STOP => return Ok(()),
                    RECEIVE => buffers = true,
                    TRANSMIT => kicked = true,
                    CONTROL => {
                        if let Some(large) = control.obey(&tap)? {
                            receive.longest = longest(large);
                        }
                    }
                    _ => {
                        let events = event.event_set();
                        frames |= events.contains(EventSet::IN);
                        room |= events.contains(EventSet::OUT);
                    }
                }
            }
        }
    }
}
