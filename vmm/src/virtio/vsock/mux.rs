//! The worker of the socket device: moves packets between the rings and the host's sockets.
//!
//! What always holds: a stream with something for the guest is in `waiting` at most once, and streams take
//! turns by the packet; answers to packets that belong to no stream are in `resets`, which is bounded,
//! because a full one stops the transmit queue from being read. So the memory used does not depend on what
//! the guest does, and no stream can starve another.
//!
//! An interrupt costs a guest on MMIO three exits or more, so there are as few as possible: one for all packets
//! received in one go, and none of their own for packets sent, which are returned with the next packet
//! received ([`Sent`]).

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::packet::{HEADER_SIZE, HOST_CID, Header, Op, TYPE_STREAM};
use super::stream::{Next, Phase, Stream, buffer_limit};
use super::{Connect, Inbox, MAX_STREAMS, Refusal};
use crate::io_loop::{Control, EventSet, Worker};
use crate::memory::GuestMemory;
use crate::virtio::chain::Chain;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::{KICK, RingError, Virtqueue};
use crate::virtio::{ActivateError, Activation};

/// Most answers to packets that belong to no stream.
const MAX_RESETS: usize = 64;

/// Packets handled in one go in each direction, before other workers of the I/O thread get their turn.
const TURN: usize = 256;

/// Transmit buffers that may be kept from the guest for a while: descriptors and bytes. Linux has packets of
/// 18 descriptors at most, so with these kept back a queue of 64 always has room for another one.
const MAX_SENT_DESCRIPTORS: usize = 16;
const MAX_SENT_BYTES: usize = 64 << 10;

/// Ports of the host's ends: above everything that anybody gives a meaning.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// See the module.
pub struct Mux {
    cid: u64,
    inbox: Arc<Inbox>,
    memory: Arc<GuestMemory>,
    interrupt: Arc<Interrupt>,
    rx: Virtqueue,
    tx: Virtqueue,
    /// Holds the guest's buffers for events, of which there is none to tell yet.
    _events: Virtqueue,
    /// By the host's port.
    streams: HashMap<u32, Stream>,
    by_fd: HashMap<RawFd, u32>,
    waiting: VecDeque<u32>,
    resets: VecDeque<Header>,
    next_port: u32,
    /// The guest has told that its agent listens.
    guest_listens: bool,
    tx_paused: bool,
    sent: Sent,
    /// The rings cannot be used any more.
    broken: bool,
}

/// Packets that are through but not yet returned to the guest.
#[derive(Default)]
struct Sent {
    heads: Vec<u16>,
    descriptors: usize,
    bytes: usize,
}

impl Sent {
    fn is_enough(&self) -> bool {
        self.descriptors > MAX_SENT_DESCRIPTORS || self.bytes > MAX_SENT_BYTES
    }
}

impl Mux {
    pub fn new(cid: u64, inbox: Arc<Inbox>, activation: Activation) -> Result<Self, ActivateError> {
        let Activation { queues, memory, interrupt, .. } = activation;
        let [rx, tx, events] = <[Virtqueue; 3]>::try_from(queues)
            .map_err(|queues| ActivateError::QueueNotReady(queues.len()))?;
        Ok(Self {
            cid,
            inbox,
            memory: Arc::new(memory),
            interrupt,
            rx,
            tx,
            _events: events,
            streams: HashMap::new(),
            by_fd: HashMap::new(),
            waiting: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_HOST_PORT,
            guest_listens: false,
            tx_paused: false,
            sent: Sent::default(),
            broken: false,
        })
    }

    fn work(&mut self, fd: RawFd, events: EventSet, ctl: &mut Control) -> Result<(), RingError> {
        if fd == self.tx.event().as_raw_fd() {
            self.transmit(ctl)?;
        } else if fd == self.rx.event().as_raw_fd() {
            self.rx.disable_kicks(&self.memory)?;
        } else if fd == self.inbox.wake.as_raw_fd() {
            self.take_connects();
        } else if let Some(&port) = self.by_fd.get(&fd) {
            self.host_event(port, events, ctl);
        }
        self.receive(ctl)
    }

    fn take_connects(&mut self) {
        for Connect { id, port, stream } in self.inbox.take() {
            if self.streams.len() >= MAX_STREAMS {
                self.inbox.reply(id, Err(Refusal::TooManyStreams));
                continue;
            }
            let host_port = self.free_port();
            let limit = buffer_limit(self.streams.len());
            self.streams.insert(host_port, Stream::new(id, port, UnixStream::from(stream), limit));
            if self.guest_listens {
                self.enqueue(host_port);
            }
        }
    }

    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.streams.contains_key(&port) {
                return port;
            }
        }
    }

    /// Has a stream looked at by [`Self::receive`], if it has something for the guest.
    fn enqueue(&mut self, port: u32) {
        if let Some(stream) = self.streams.get_mut(&port)
            && !stream.queued
            && stream.next().is_some()
        {
            stream.queued = true;
            self.waiting.push_back(port);
        }
    }

    fn host_event(&mut self, port: u32, events: EventSet, ctl: &mut Control) {
        let Some(stream) = self.streams.get_mut(&port) else { return };
        if events.intersects(EventSet::OUT | EventSet::HANG_UP | EventSet::ERROR) && stream.has_backlog() {
            stream.flush();
            if !stream.has_backlog() {
                let _ = ctl.modify(stream.fd(), INTEREST);
            }
        }
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
            stream.host_is_readable(events.intersects(EventSet::HANG_UP | EventSet::ERROR));
        }
        self.settle(port, ctl);
    }

    /// After anything happened to a stream: forget it, or see what it has for the guest.
    fn settle(&mut self, port: u32, ctl: &mut Control) {
        if self.streams.get(&port).is_some_and(Stream::is_finished) {
            self.forget(port, ctl);
        } else {
            self.enqueue(port);
        }
    }

    fn forget(&mut self, port: u32, ctl: &mut Control) {
        if let Some(stream) = self.streams.remove(&port)
            && self.by_fd.remove(&stream.fd()).is_some()
        {
            ctl.remove(stream.fd());
        }
    }

    /// Host to guest: fills receive buffers for as long as there are some and streams have something.
    fn receive(&mut self, ctl: &mut Control) -> Result<(), RingError> {
        let memory = Arc::clone(&self.memory);
        let mut sent = 0;
        while !self.resets.is_empty() || !self.waiting.is_empty() {
            if sent == TURN {
                self.rx.kick_self();
                break;
            }
            let Some(chain) = self.rx.pop(&memory)? else {
                if self.rx.enable_kicks(&memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head();
            match self.fill(chain, ctl) {
                0 => self.rx.undo_pop(),
                n => {
                    self.rx.push(&memory, head, n)?;
                    sent += 1;
                }
            }
        }
        if sent > 0 {
            self.return_sent()?;
            // Both are asked, because asking also resets what "since the last time" means.
            if self.rx.wants_interrupt(&memory)? | self.tx.wants_interrupt(&memory)? {
                self.interrupt.used();
            }
        }
        if self.tx_paused && self.resets.len() < MAX_RESETS {
            self.tx_paused = false;
            self.tx.kick_self();
        }
        Ok(())
    }

    /// Puts the next packet into a receive buffer; returns its length, 0 if there turned out to be none.
    fn fill(&mut self, chain: Chain, ctl: &mut Control) -> usize {
        let mut payload = chain.writable;
        let Some(mut front) = payload.split_front(HEADER_SIZE) else {
            // Useless to anybody: give it back with one byte "used" rather than break the device over it.
            return 1;
        };
        if let Some(header) = self.resets.pop_front() {
            return front.write(vm_memory::ByteValued::as_slice(&header));
        }
        let Some(port) = self.waiting.pop_front() else { return 0 };
        let Some(stream) = self.streams.get_mut(&port) else { return 0 };
        stream.queued = false;
        let (op, flags, len) = match stream.next() {
            None => return 0,
            Some(Next::Control(op, flags)) => {
                stream.control_sent(op, flags);
                (op, flags, 0)
            }
            // A receive buffer for a header only, which nothing forbids.
            Some(Next::Data(_)) if payload.remaining() == 0 => (Op::CreditUpdate, 0, 0),
            Some(Next::Data(max)) => match stream.read_host(&mut payload, max) {
                0 => {
                    self.settle(port, ctl);
                    return 0;
                }
                n => (Op::Rw, 0, n),
            },
        };
        let (buf_alloc, fwd_cnt) = stream.credit_fields();
        let header = Header {
            src_cid: HOST_CID.into(),
            dst_cid: self.cid.into(),
            src_port: port.into(),
            dst_port: stream.guest_port.into(),
            len: (len as u32).into(),
            kind: TYPE_STREAM.into(),
            op: (op as u16).into(),
            flags: flags.into(),
            buf_alloc: buf_alloc.into(),
            fwd_cnt: fwd_cnt.into(),
        };
        front.write(vm_memory::ByteValued::as_slice(&header));
        self.settle(port, ctl);
        HEADER_SIZE + len
    }

    /// Guest to host: takes packets off the transmit queue.
    fn transmit(&mut self, ctl: &mut Control) -> Result<(), RingError> {
        let memory = Arc::clone(&self.memory);
        let mut taken = 0;
        loop {
            if self.resets.len() >= MAX_RESETS {
                self.tx_paused = true;
                break;
            }
            if taken == TURN {
                self.tx.kick_self();
                break;
            }
            let Some(chain) = self.tx.pop(&memory)? else {
                if self.tx.enable_kicks(&memory)? {
                    continue;
                }
                break;
            };
            taken += 1;
            self.sent.heads.push(chain.head());
            self.sent.descriptors += usize::from(chain.descriptors());
            self.sent.bytes += chain.readable.remaining();
            self.packet(chain, ctl);
        }
        if self.sent.is_enough() {
            self.return_sent()?;
            self.tx.notify(&memory)?;
        }
        Ok(())
    }

    /// Gives the guest its transmit buffers back.
    fn return_sent(&mut self) -> Result<(), RingError> {
        self.sent.descriptors = 0;
        self.sent.bytes = 0;
        for head in self.sent.heads.drain(..) {
            self.tx.push(&self.memory, head, 0)?;
        }
        Ok(())
    }

    fn packet(&mut self, mut chain: Chain, ctl: &mut Control) {
        let Some(header) = chain.readable.read_obj::<Header>() else {
            tracing::debug!("vsock packet without a whole header dropped");
            return;
        };
        if u64::from(header.src_cid) != self.cid {
            tracing::debug!("vsock packet with a foreign source dropped");
            return;
        }
        let op = Op::from_wire(header.op.into());
        let port = u32::from(header.dst_port);
        let known = u64::from(header.dst_cid) == HOST_CID
            && u16::from(header.kind) == TYPE_STREAM
            && self
                .streams
                .get(&port)
                .is_some_and(|s| s.guest_port == u32::from(header.src_port) && s.phase != Phase::Draining);
        if !known {
            return self.stranger(&header, op);
        }
        let Some(stream) = self.streams.get_mut(&port) else { return };
        stream.take_credit(header.buf_alloc.into(), header.fwd_cnt.into());
        match (op, stream.phase) {
            (Some(Op::Response), Phase::Requested) => self.established(port, ctl),
            (Some(Op::Rst), Phase::Requested) => {
                self.inbox.reply(stream.id, Err(Refusal::NotListening));
                self.forget(port, ctl);
                return;
            }
            (Some(Op::Rst), Phase::Open) => stream.reset_from_guest(),
            (Some(Op::Rw), Phase::Open) => {
                let len = u32::from(header.len) as usize;
                let stalled = stream.has_backlog();
                if len > chain.readable.remaining()
                    || stream.data_from_guest(&mut chain.readable, len).is_err()
                {
                    tracing::debug!(port, len, "guest broke the vsock protocol: stream reset");
                    stream.reset();
                }
                if stream.has_backlog() && !stalled {
                    let _ = ctl.modify(stream.fd(), INTEREST | EventSet::OUT);
                }
            }
            (Some(Op::Shutdown), Phase::Open) => stream.shutdown_from_guest(header.flags.into()),
            (Some(Op::CreditUpdate), Phase::Open) => (),
            (Some(Op::CreditRequest), Phase::Open) => stream.want_update(),
            (_, Phase::Open) => stream.reset(),
            // The guest cannot know of a stream that it was not asked for.
            _ => return,
        }
        self.settle(port, ctl);
    }

    /// A packet that belongs to no stream.
    fn stranger(&mut self, header: &Header, op: Option<Op>) {
        if op == Some(Op::Request) && !self.guest_listens {
            self.guest_listens = true;
            let mut ports: Vec<u32> = self.streams.keys().copied().collect();
            ports.sort_unstable();
            for port in ports {
                self.enqueue(port);
            }
        }
        if op != Some(Op::Rst) {
            self.resets.push_back(Header {
                src_cid: header.dst_cid,
                dst_cid: header.src_cid,
                src_port: header.dst_port,
                dst_port: header.src_port,
                kind: header.kind,
                op: (Op::Rst as u16).into(),
                ..Header::default()
            });
        }
    }

    fn established(&mut self, port: u32, ctl: &mut Control) {
        let Some(stream) = self.streams.get_mut(&port) else { return };
        let fd = stream.fd();
        // Edge-triggered: one registration for the life of a stream, whether it is read at the moment or
        // not. An edge comes at once if there is data already.
        if let Err(error) = ctl.add(fd, INTEREST) {
            tracing::warn!(%error, "stream's descriptor cannot be waited for");
            self.inbox.reply(stream.id, Err(Refusal::BadDescriptor));
            stream.reset();
            return;
        }
        stream.phase = Phase::Open;
        self.inbox.reply(stream.id, Ok(()));
        self.by_fd.insert(fd, port);
    }
}

/// Output is waited for only while data piles up: else every read of the host would wake us.
const INTEREST: EventSet = EventSet::IN.union(EventSet::READ_HANG_UP).union(EventSet::EDGE_TRIGGERED);

impl Worker for Mux {
    fn fds(&self) -> Vec<(RawFd, EventSet)> {
        [self.rx.event(), self.tx.event(), &self.inbox.wake].map(|event| (event.as_raw_fd(), KICK)).to_vec()
    }

    fn ready(&mut self, fd: RawFd, events: EventSet, ctl: &mut Control) {
        if self.broken {
            return self.refuse_connects();
        }
        if let Err(error) = self.work(fd, events, ctl) {
            tracing::warn!(%error, "vsock device stops until the guest resets it");
            self.broken = true;
            ctl.remove(self.rx.event().as_raw_fd());
            ctl.remove(self.tx.event().as_raw_fd());
            for fd in self.by_fd.drain().map(|(fd, _)| fd) {
                ctl.remove(fd);
            }
            self.close_all();
            self.refuse_connects();
            self.interrupt.needs_reset();
        }
    }
}

impl Mux {
    fn close_all(&mut self) {
        for (_, stream) in self.streams.drain() {
            if matches!(stream.phase, Phase::Waiting | Phase::Requested) {
                self.inbox.reply(stream.id, Err(Refusal::DeviceStopped));
            }
        }
    }

    fn refuse_connects(&self) {
        for connect in self.inbox.take() {
            self.inbox.reply(connect.id, Err(Refusal::DeviceStopped));
        }
    }
}

impl Drop for Mux {
    fn drop(&mut self) {
        self.close_all();
    }
}
