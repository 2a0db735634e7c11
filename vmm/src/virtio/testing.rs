//! A small virtio driver for tests: fake guest memory, registers and hand-built rings, well-formed or not.
//!
//! It waits for interrupts, never for time to pass; [`TestLoop::barrier`] is for what must *not* happen.
#![allow(missing_docs, reason = "the names are those of the specification")]
#![allow(clippy::unwrap_used, clippy::new_without_default, reason = "a test may fail by panicking")]

use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vm_memory::{ByteValued, Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::mmio::MmioTransport;
use super::queue::Virtqueue;
use super::{ActivateError, Activation, ConfigSpace, Device, F_INDIRECT_DESC, F_VERSION_1, Running};
use crate::io_loop::{Control, EventSet, IoHandle, IoLoop, Worker};
use crate::memory::GuestMemory;

/// Fake RAM below the 32-bit gap, in bytes.
pub const LOW_MEMORY: usize = 16 << 20;
/// Where the second piece of fake RAM begins.
pub const HIGH_MEMORY: u64 = 1 << 32;

pub const DESC_NEXT: u16 = 1;
pub const DESC_WRITE: u16 = 2;
pub const DESC_INDIRECT: u16 = 4;

/// How long to wait for something that must happen, in milliseconds.
const PATIENCE: i32 = 20_000;

pub fn memory() -> GuestMemory {
    GuestMemory::of_pieces(&[(GuestAddress(0), LOW_MEMORY), (GuestAddress(HIGH_MEMORY), 1 << 20)])
}

/// A buffer in a chain.
#[derive(Debug, Clone, Copy)]
pub enum Buf {
    /// The device reads `len` bytes at an address.
    Read(u64, u32),
    /// The device writes.
    Write(u64, u32),
}

pub struct DriverQueue {
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    avail_idx: u16,
    used_idx: u16,
    free: Vec<u16>,
    chains: std::collections::HashMap<u16, Vec<u16>>,
}

pub struct TestDriver {
    pub transport: MmioTransport,
    pub memory: GuestMemory,
    pub irq: EventFd,
    pub queues: Vec<DriverQueue>,
    queue_sizes: Vec<u16>,
    /// Where the next allocation goes; a test may set it back.
    pub heap: u64,
}

impl TestDriver {
    pub fn new(device: Box<dyn Device>) -> Self {
        let memory = memory();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let queue_sizes = device.queue_sizes().to_vec();
        let line = irq.try_clone().unwrap();
        let line = Box::new(move || line.write(1).unwrap());
        let transport = MmioTransport::new(device, memory.clone(), line).unwrap();
        Self { transport, memory, irq, queues: Vec::new(), queue_sizes, heap: 0x1000 }
    }

    /// A driver that has brought the device up with all its features and the largest queues.
    pub fn started(device: Box<dyn Device>) -> Self {
        let mut driver = Self::new(device);
        driver.start();
        driver
    }

    pub fn start(&mut self) {
        self.negotiate(u64::MAX);
        for (index, size) in self.queue_sizes.clone().into_iter().enumerate() {
            self.set_up_queue(index, size);
        }
        self.write(0x70, 15);
        assert_eq!(self.status(), 15);
    }

    pub fn read(&mut self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    pub fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub fn status(&mut self) -> u32 {
        self.read(0x70)
    }

    pub fn offered_features(&mut self) -> u64 {
        self.write(0x14, 1);
        let high = self.read(0x10);
        self.write(0x14, 0);
        u64::from(high) << 32 | u64::from(self.read(0x10))
    }

    pub fn accept_features(&mut self, features: u64) {
        for half in [0, 1] {
            self.write(0x24, half);
            self.write(0x20, (features >> (32 * half)) as u32);
        }
    }

    /// From reset to FEATURES_OK, with the offered features that are in `wanted`.
    pub fn negotiate(&mut self, wanted: u64) {
        for status in [0, 1, 3] {
            self.write(0x70, status);
            assert_eq!(self.status(), status);
        }
        let features = self.offered_features() & (wanted | F_VERSION_1);
        self.accept_features(features);
        self.write(0x70, 11);
        assert_eq!(self.status(), 11);
        self.queues.clear();
    }

    pub fn place_queue(&mut self, size: u16) -> DriverQueue {
        let n = u64::from(size);
        DriverQueue {
            size,
            desc: self.alloc(16 * n),
            avail: self.alloc(2 * n + 6),
            used: self.alloc(8 * n + 6),
            avail_idx: 0,
            used_idx: 0,
            free: (0..size).rev().collect(),
            chains: std::collections::HashMap::new(),
        }
    }

    pub fn set_up_queue(&mut self, index: usize, size: u16) {
        assert_eq!(self.queues.len(), index);
        let queue = self.place_queue(size);
        self.configure_queue(index, u32::from(size), queue.desc, queue.avail, queue.used);
        self.queues.push(queue);
    }

    pub fn configure_queue(&mut self, index: usize, size: u32, desc: u64, avail: u64, used: u64) {
        self.write(0x30, index as u32);
        self.write(0x38, size);
        for (offset, address) in [(0x80, desc), (0x90, avail), (0xa0, used)] {
            self.write(offset, address as u32);
            self.write(offset + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    /// Zeroed fake guest memory.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let address = self.heap.next_multiple_of(16);
        self.heap = address + len;
        assert!(self.heap <= LOW_MEMORY as u64, "the test uses too much guest memory");
        self.memory.write_slice(&vec![0; len as usize], GuestAddress(address)).unwrap();
        address
    }

    pub fn put(&mut self, data: &[u8]) -> u64 {
        let address = self.alloc(data.len() as u64);
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
        address
    }

    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    pub fn store<T: ByteValued>(&self, value: T, address: u64) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub fn set_desc(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        self.store(addr, at);
        self.store(len, at + 8);
        self.store(flags, at + 12);
        self.store(next, at + 14);
    }

    /// Puts `head` into the available ring, whatever it is.
    pub fn expose(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let slot = q.avail + 4 + 2 * u64::from(q.avail_idx % q.size);
        q.avail_idx = q.avail_idx.wrapping_add(1);
        let (idx, at) = (q.avail_idx, q.avail + 2);
        self.store(head, slot);
        self.store(idx, at);
    }

    /// Makes a chain of these buffers available; `None` if the ring is full.
    pub fn try_add(&mut self, queue: usize, bufs: &[Buf]) -> Option<u16> {
        let q = &mut self.queues[queue];
        if q.free.len() < bufs.len() {
            return None;
        }
        let at = q.free.len() - bufs.len();
        let chain = q.free.split_off(at);
        let (table, head) = (q.desc, chain[0]);
        for (i, buf) in bufs.iter().enumerate() {
            let (addr, len, write) = match *buf {
                Buf::Read(addr, len) => (addr, len, 0),
                Buf::Write(addr, len) => (addr, len, DESC_WRITE),
            };
            let next = chain.get(i + 1).copied();
            let flags = write | if next.is_some() { DESC_NEXT } else { 0 };
            self.set_desc(table, chain[i], addr, len, flags, next.unwrap_or(0));
        }
        self.queues[queue].chains.insert(head, chain);
        self.expose(queue, head);
        Some(head)
    }

    pub fn add(&mut self, queue: usize, bufs: &[Buf]) -> u16 {
        self.try_add(queue, bufs).expect("the test's ring is full")
    }

    pub fn kick(&mut self, queue: usize) {
        self.write(0x50, queue as u32);
    }

    /// The next used chain, if there is one: its head, and the bytes written.
    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let q = &mut self.queues[queue];
        // What was asked for, in used_event, comes before what is read: the device writes the index and then looks what
        // was asked for.
        fence(Ordering::SeqCst);
        let idx: u16 = self.memory.read_obj(GuestAddress(q.used + 2)).unwrap();
        if idx == q.used_idx {
            return None;
        }
        let slot = q.used + 4 + 8 * u64::from(q.used_idx % q.size);
        let id: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        q.used_idx = q.used_idx.wrapping_add(1);
        // used_event: interrupt at the next one.
        let (used_idx, at) = (q.used_idx, q.avail + 4 + 2 * u64::from(q.size));
        q.free.extend(q.chains.remove(&(id as u16)).unwrap_or_default());
        self.store(used_idx, at);
        Some((id as u16, len))
    }

    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        loop {
            if let Some(used) = self.used(queue) {
                return used;
            }
            self.wait_interrupt();
        }
    }

    /// Waits for an interrupt, acknowledges it, and returns its reasons.
    pub fn wait_interrupt(&mut self) -> u32 {
        assert!(wait_readable(self.irq.as_raw_fd()), "the device raised no interrupt");
        self.irq.read().unwrap();
        let reasons = self.read(0x60);
        self.write(0x64, reasons);
        reasons
    }

    pub fn wait_needs_reset(&mut self) {
        while self.status() & 0x40 == 0 {
            self.wait_interrupt();
        }
    }
}

/// A device that does nothing but hand its one queue to the test.
pub struct QueueTap {
    queue: Arc<Mutex<Option<Virtqueue>>>,
    sizes: [u16; 1],
    config: ConfigSpace,
}

struct Nothing;

impl Running for Nothing {}

impl QueueTap {
    /// A driver of the device, and the device's queue.
    pub fn started(size: u16) -> (TestDriver, Virtqueue) {
        let queue = Arc::new(Mutex::new(None));
        let device = QueueTap { queue: queue.clone(), sizes: [size], config: ConfigSpace::new(Vec::new()) };
        let driver = TestDriver::started(Box::new(device));
        let queue = queue.lock().unwrap().take().unwrap();
        (driver, queue)
    }
}

impl Device for QueueTap {
    fn device_type(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&self, activation: Activation) -> Result<Box<dyn Running>, ActivateError> {
        *self.queue.lock().unwrap() = activation.queues.into_iter().next();
        Ok(Box::new(Nothing))
    }
}

pub fn wait_readable(fd: i32) -> bool {
    let mut fds = [libc::pollfd { fd, events: libc::POLLIN, revents: 0 }];
    // SAFETY: the pointer and length are those of an array.
    unsafe { libc::poll(fds.as_mut_ptr(), 1, PATIENCE) == 1 }
}

/// An I/O loop on a thread of its own.
pub struct TestLoop {
    pub handle: IoHandle,
    thread: Option<JoinHandle<()>>,
    ping: EventFd,
    pong: Receiver<()>,
}

/// Answers on the loop's thread; ends the loop when nobody listens to the answers.
struct Ping(EventFd, Sender<()>);

impl Worker for Ping {
    fn fds(&self) -> Vec<(i32, EventSet)> {
        vec![(self.0.as_raw_fd(), EventSet::IN)]
    }

    fn ready(&mut self, _fd: i32, _events: EventSet, ctl: &mut Control) {
        self.0.read().unwrap();
        if self.1.send(()).is_err() {
            ctl.stop_loop();
        }
    }
}

impl TestLoop {
    pub fn new() -> Self {
        let io = IoLoop::new().unwrap();
        let handle = io.handle();
        let ping = EventFd::new(EFD_NONBLOCK).unwrap();
        let (sender, pong) = channel();
        handle.add(Box::new(Ping(ping.try_clone().unwrap(), sender)));
        Self { handle, thread: Some(std::thread::spawn(move || io.run().unwrap())), ping, pong }
    }

    /// Returns when everything that was signalled before has been handled.
    pub fn barrier(&self) {
        // epoll hands out descriptors in the order in which they became ready, except that one which it has
        // handed out just before keeps its place: hence twice.
        for _ in 0..2 {
            self.ping.write(1).unwrap();
            self.pong.recv().unwrap();
        }
    }
}

impl Drop for TestLoop {
    fn drop(&mut self) {
        self.pong = channel().1;
        self.ping.write(1).unwrap();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
