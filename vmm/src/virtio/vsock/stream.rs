//! One stream: its phase, its flow control in both directions, and what it owes the guest.
//!
//! No I/O on rings happens here. What always holds: `forwarded <= received <= forwarded + limit` on the way
//! to the host, so that the backlog never exceeds what was promised to the guest; and a stream never sends
//! the guest more than the guest's credit.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use super::packet::{MAX_PAYLOAD, Op, SHUTDOWN_RCV, SHUTDOWN_SEND};
use crate::virtio::chain::Buffers;

/// Bytes from the guest that may wait here for a slow host reader: four of Linux' largest packets, so that
/// the guest goes on sending while an update of its credit is on the way.
const LARGE_BUFFER: u32 = 256 << 10;
/// The same once there are many streams. It bounds what a guest can make us hold: 64 MiB for the first 256
/// streams and 60 MiB for all others together.
const SMALL_BUFFER: u32 = 16 << 10;
const LARGE_BUFFER_STREAMS: usize = 256;

/// Bytes that the guest may have under way on a stream opened while there are `streams` others.
pub fn buffer_limit(streams: usize) -> u32 {
    if streams < LARGE_BUFFER_STREAMS { LARGE_BUFFER } else { SMALL_BUFFER }
}

/// Where a stream stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not yet asked for: nobody listens in the guest so far.
    Waiting,
    /// REQUEST is sent.
    Requested,
    /// RESPONSE has come.
    Open,
    /// Gone for the guest; the host still has to get what the guest sent before.
    Draining,
}

/// What a stream has for the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// A packet without payload, and its flags.
    Control(Op, u32),
    /// Up to so many bytes from the host's socket.
    Data(usize),
}

/// The guest has broken the protocol; the stream is to be reset.
#[derive(Debug)]
pub struct Violation;

/// See the module.
pub struct Stream {
    pub id: u64,
    pub guest_port: u32,
    pub phase: Phase,
    /// In the queue of streams that have something for the guest.
    pub queued: bool,
    socket: UnixStream,

    // Guest to host.
    limit: u32,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    announced: Wrapping<u32>,
    backlog: VecDeque<u8>,
    update_wanted: bool,
    /// The host reads no more.
    host_deaf: bool,

    // Host to guest.
    sent: Wrapping<u32>,
    guest_limit: u32,
    guest_forwarded: Wrapping<u32>,
    readable: bool,
    /// The host has closed its end altogether.
    hung_up: bool,

    /// SHUTDOWN flags of the guest.
    guest_shutdown: u32,
    /// SHUTDOWN flags that the guest is to get, and those that it has got.
    shutdown: u32,
    shutdown_sent: u32,
    reset_wanted: bool,
}

impl Stream {
    pub fn new(id: u64, guest_port: u32, socket: UnixStream, limit: u32) -> Self {
        Self {
            id,
            guest_port,
            phase: Phase::Waiting,
            queued: false,
            socket,
            limit,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            backlog: VecDeque::new(),
            update_wanted: false,
            host_deaf: false,
            sent: Wrapping(0),
            guest_limit: 0,
            guest_forwarded: Wrapping(0),
            readable: false,
            hung_up: false,
            guest_shutdown: 0,
            shutdown: 0,
            shutdown_sent: 0,
            reset_wanted: false,
        }
    }

    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// `buf_alloc` and `fwd_cnt` for a packet that is about to be sent.
    pub fn credit_fields(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        self.update_wanted = false;
        (self.limit, self.forwarded.0)
    }

    /// The guest's credit fields, which every packet of it carries.
    pub fn take_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_limit = buf_alloc;
        self.guest_forwarded = Wrapping(fwd_cnt);
    }

    /// Bytes that the guest has room for. A guest that claims to have forwarded more than it got has none.
    fn credit(&self) -> u32 {
        self.guest_limit.saturating_sub((self.sent - self.guest_forwarded).0)
    }

    /// The next packet for the guest, if any.
    pub fn next(&self) -> Option<Next> {
        if self.reset_wanted {
            return Some(Next::Control(Op::Rst, 0));
        }
        match self.phase {
            Phase::Waiting => Some(Next::Control(Op::Request, 0)),
            Phase::Requested | Phase::Draining => None,
            Phase::Open if self.shutdown != self.shutdown_sent => {
                Some(Next::Control(Op::Shutdown, self.shutdown))
            }
            Phase::Open if self.readable && self.credit() > 0 => {
                Some(Next::Data(MAX_PAYLOAD.min(self.credit() as usize)))
            }
            Phase::Open if self.update_wanted => Some(Next::Control(Op::CreditUpdate, 0)),
            Phase::Open => None,
        }
    }

    /// The packet of [`Self::next`] is on its way.
    pub fn control_sent(&mut self, op: Op, flags: u32) {
        match op {
            Op::Request => self.phase = Phase::Requested,
            Op::Shutdown => self.shutdown_sent = flags,
            Op::Rst => {
                self.reset_wanted = false;
                self.phase = Phase::Draining;
            }
            _ => (),
        }
    }

    /// Events of the host's socket.
    pub fn host_is_readable(&mut self, hung_up: bool) {
        self.hung_up |= hung_up;
        let guest_deaf = self.guest_shutdown & SHUTDOWN_RCV != 0;
        self.readable = self.shutdown & SHUTDOWN_SEND == 0 && !guest_deaf;
        if self.hung_up && !self.readable {
            self.host_gone();
        }
    }

    /// Moves up to `max` bytes from the host's socket into the guest's buffers. 0 if there are none now; the
    /// end of the stream shows in [`Self::next`].
    pub fn read_host(&mut self, buffers: &mut Buffers, max: usize) -> usize {
        let want = max.min(buffers.remaining());
        loop {
            match buffers.receive_from(self.socket.as_fd(), want) {
                Ok(0) => {
                    self.readable = false;
                    self.shutdown |= SHUTDOWN_SEND;
                    if self.hung_up {
                        self.host_gone();
                    }
                    return 0;
                }
                Ok(n) => {
                    self.sent += n as u32;
                    return n;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return 0;
                }
                Err(_) => {
                    self.readable = false;
                    self.host_gone();
                    return 0;
                }
            }
        }
    }

    /// Bytes of the guest's that the host's socket has not taken yet.
    #[cfg(test)]
    pub fn held(&self) -> u32 {
        (self.received - self.forwarded).0
    }

    /// The guest sends `len` bytes, the rest of `buffers`.
    pub fn data_from_guest(&mut self, buffers: &mut Buffers, len: usize) -> Result<(), Violation> {
        let held = (self.received - self.forwarded).0 as usize;
        let allowed = (self.limit as usize).saturating_sub(held);
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || len > allowed {
            return Err(Violation);
        }
        self.received += len as u32;
        let mut left = len;
        while left > 0 && self.backlog.is_empty() && !self.host_deaf {
            match buffers.send_to(self.socket.as_fd(), left) {
                Ok(n) => {
                    left -= n;
                    self.count_forwarded(n);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.stop_forwarding(),
            }
        }
        if self.host_deaf {
            self.count_forwarded(left);
        } else if left > 0 {
            let mut piece = [0; 4096];
            self.backlog.reserve(left);
            while left > 0 {
                let want = left.min(piece.len());
                let n = buffers.read(&mut piece[..want]);
                self.backlog.extend(&piece[..n]);
                left -= n;
                if n == 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    /// The host's socket takes data again.
    pub fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let (piece, _) = self.backlog.as_slices();
            match send(&self.socket, piece) {
                Ok(n) => {
                    self.backlog.drain(..n);
                    self.count_forwarded(n);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.stop_forwarding(),
            }
        }
        // Give the memory back: most streams stall seldom.
        self.backlog = VecDeque::new();
        if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// The guest asks for its credit.
    pub fn want_update(&mut self) {
        self.update_wanted = true;
    }

    /// Whether data waits for the host's socket to take it.
    pub fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// The guest shuts down one direction or both.
    pub fn shutdown_from_guest(&mut self, flags: u32) {
        let flags = flags & (SHUTDOWN_RCV | SHUTDOWN_SEND);
        self.guest_shutdown |= flags;
        if self.guest_shutdown & SHUTDOWN_RCV != 0 {
            self.readable = false;
            let _ = self.socket.shutdown(Shutdown::Read);
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && self.backlog.is_empty() {
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        if self.guest_shutdown == SHUTDOWN_RCV | SHUTDOWN_SEND {
            // Confirms to the guest that the stream is gone; without it Linux waits for 8 seconds.
            self.reset();
        }
    }

    /// Ends the stream with a RST for the guest.
    pub fn reset(&mut self) {
        self.reset_wanted = true;
        self.readable = false;
    }

    /// The guest has reset the stream: nothing more goes to it.
    pub fn reset_from_guest(&mut self) {
        self.reset_wanted = false;
        self.readable = false;
        self.phase = Phase::Draining;
    }

    /// Whether nothing is left to do for either side. A guest that learnt that both directions are shut
    /// down needs no more from us: what it still sends is answered with RST, as for any unknown stream.
    pub fn is_finished(&self) -> bool {
        match self.phase {
            Phase::Draining => !self.reset_wanted && self.backlog.is_empty(),
            Phase::Open => self.shutdown_sent == SHUTDOWN_RCV | SHUTDOWN_SEND && !self.reset_wanted,
            _ => false,
        }
    }

    fn host_gone(&mut self) {
        self.shutdown |= SHUTDOWN_SEND;
        self.stop_forwarding();
    }

    /// The host reads no more: what the guest sent and sends is dropped.
    fn stop_forwarding(&mut self) {
        self.host_deaf = true;
        self.shutdown |= SHUTDOWN_RCV;
        self.forwarded = self.received;
        self.backlog = VecDeque::new();
    }

    fn count_forwarded(&mut self, n: usize) {
        self.forwarded += n as u32;
        // Half of the buffer: often enough that the guest need not stop, seldom enough to be cheap.
        self.update_wanted |= (self.forwarded - self.announced).0 >= self.limit / 2;
    }
}

fn send(socket: &UnixStream, data: &[u8]) -> std::io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the pointer and length are those of a slice.
    let n = unsafe { libc::send(socket.as_raw_fd(), data.as_ptr().cast(), data.len(), flags) };
    usize::try_from(n).map_err(|_| std::io::Error::last_os_error())
}
