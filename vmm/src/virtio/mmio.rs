//! The virtio-mmio transport, version 2 (virtio 1.3, section 4.2): registers, negotiation, activation.
//!
//! What always holds: the status register moves along [`TRANSITIONS`] only; queues can be configured between
//! FEATURES_OK and DRIVER_OK and at no other time (CVE-2026-5747), since DRIVER_OK moves them into the
//! running device; and what a driver does wrong is ignored or answered with DEVICE_NEEDS_RESET, never a
//! reason to fail in the VMM.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::interrupt::{Interrupt, Line};
use super::queue::Virtqueue;
use super::{ActivateError, Activation, Device, F_EVENT_IDX, F_VERSION_1, Running};
use crate::memory::GuestMemory;

/// Size of the register window, in bytes.
pub const WINDOW_SIZE: u64 = 0x1000;
/// Offset of the QueueNotify register, for ioeventfds.
pub const QUEUE_NOTIFY: u64 = 0x50;

const MAGIC: u32 = 0x7472_6976; // "virt"
const VERSION: u32 = 2;
const VENDOR: u32 = 0x444b_5453; // "STKD"
const CONFIG_SPACE: u64 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 0x40;
const FAILED: u32 = 0x80;

/// The steps of the status register (virtio 1.3, section 3.1.1). Besides, zero (reset) is allowed from
/// everywhere, FAILED can be added everywhere, and writing the present value again changes nothing.
const TRANSITIONS: [(u32, u32); 4] = [
    (0, ACKNOWLEDGE),
    (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER),
    (ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK),
    (ACKNOWLEDGE | DRIVER | FEATURES_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK),
];

/// Why a transport could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the event descriptors of a virtio device: {0}; look at the limit of open files")]
pub struct TransportError(#[from] std::io::Error);

/// What the driver has written about one queue.
#[derive(Debug, Default, Clone)]
struct QueueRegisters {
    size: u32,
    ready: bool,
    desc: u64,
    avail: u64,
    used: u64,
}

/// One device's register window. Used by vCPU threads, behind a lock of their bus.
pub struct MmioTransport {
    device: Box<dyn Device>,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    events: Vec<EventFd>,
    running: Option<Box<dyn Running>>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

impl MmioTransport {
    /// Puts `device` behind registers, with `line` as its interrupt.
    pub fn new(device: Box<dyn Device>, memory: GuestMemory, line: Line) -> Result<Self, TransportError> {
        let n = device.queue_sizes().len();
        let events =
            (0..n).map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            device,
            memory,
            interrupt: Arc::new(Interrupt::new(line)),
            events,
            running: None,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: vec![QueueRegisters::default(); n],
        })
    }

    /// One event descriptor a queue, to be registered as ioeventfds at [`QUEUE_NOTIFY`] with the queue's
    /// index as 32-bit datamatch.
    pub fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    /// A guest's load of `data.len()` bytes at `offset` in the window.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            return self.device.config().read(offset, data);
        }
        data.fill(0);
        // Section 4.2.2.2: control registers are accessed with aligned 32-bit loads and stores.
        if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    /// A guest's store of `data` at `offset` in the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        // The configuration space of none of the devices has writable fields.
        if offset < CONFIG_SPACE
            && let Ok(word) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.device.device_type(),
            0x00c => VENDOR,
            0x010 => half(self.device.features() | F_VERSION_1, self.device_features_sel),
            0x034 => self.max_size(self.queue_sel).map_or(0, u32::from),
            0x044 => queue.map_or(0, |q| u32::from(q.ready)),
            0x060 => self.interrupt.reasons(),
            0x070 if self.interrupt.is_broken() => self.status | NEEDS_RESET,
            0x070 => self.status,
            // SHMLen and SHMBase: a length of -1 says that the region does not exist (section 4.2.2).
            0x0b0 | 0x0b4 | 0x0b8 | 0x0bc => u32::MAX,
            0x0fc => self.device.config().generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x014 => self.device_features_sel = value,
            0x020 => self.accept_features(value),
            0x024 => self.driver_features_sel = value,
            0x030 => self.queue_sel = value,
            0x038 => self.configure(|q| q.size = value),
            0x044 => {
                // Ready can be taken back before DRIVER_OK; everything else is frozen while it is set.
                let configurable = self.queues_are_configurable();
                if let Some(q) = self.queues.get_mut(self.queue_sel as usize).filter(|_| configurable) {
                    q.ready = value == 1;
                }
            }
            QUEUE_NOTIFY => {
                // Reached when no ioeventfd is registered. Without a running device there is no reader.
                if let Some(event) = self.events.get(value as usize).filter(|_| self.running.is_some())
                    && let Err(error) = event.write(1)
                {
                    tracing::debug!(%error, "cannot pass on a kick");
                }
            }
            0x064 => self.interrupt.acknowledge(value),
            0x070 => self.set_status(value),
            0x080 => self.configure(|q| set_low(&mut q.desc, value)),
            0x084 => self.configure(|q| set_high(&mut q.desc, value)),
            0x090 => self.configure(|q| set_low(&mut q.avail, value)),
            0x094 => self.configure(|q| set_high(&mut q.avail, value)),
            0x0a0 => self.configure(|q| set_low(&mut q.used, value)),
            0x0a4 => self.configure(|q| set_high(&mut q.used, value)),
            _ => tracing::debug!(offset, value, "write to a register that does nothing"),
        }
    }

    fn max_size(&self, queue: u32) -> Option<u16> {
        self.device.queue_sizes().get(queue as usize).copied()
    }

    fn accept_features(&mut self, value: u32) {
        // Features are negotiated between DRIVER and FEATURES_OK.
        if self.status != ACKNOWLEDGE | DRIVER {
            return;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => (),
        }
    }

    fn queues_are_configurable(&self) -> bool {
        self.status == ACKNOWLEDGE | DRIVER | FEATURES_OK
    }

    fn configure(&mut self, change: impl FnOnce(&mut QueueRegisters)) {
        let configurable = self.queues_are_configurable();
        match self.queues.get_mut(self.queue_sel as usize) {
            Some(queue) if configurable && !queue.ready => change(queue),
            _ => tracing::debug!(queue = self.queue_sel, "queue configuration at the wrong moment ignored"),
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        if value & FAILED != 0 {
            self.status |= FAILED;
            return;
        }
        if value == self.status || self.interrupt.is_broken() {
            return;
        }
        if !TRANSITIONS.contains(&(self.status, value)) {
            tracing::debug!(from = self.status, to = value, "status transition ignored");
            return;
        }
        match value ^ self.status {
            FEATURES_OK if !self.features_are_acceptable() => (),
            DRIVER_OK => {
                // Set first: the driver reads it back, and a device that breaks says so besides.
                self.status = value;
                self.activate();
            }
            _ => self.status = value,
        }
    }

    fn features_are_acceptable(&self) -> bool {
        let offered = self.device.features() | F_VERSION_1;
        self.driver_features & !offered == 0 && self.driver_features & F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        let started = self.take_queues().and_then(|queues| {
            self.device.activate(Activation {
                queues,
                memory: self.memory.clone(),
                interrupt: self.interrupt.clone(),
                features: self.driver_features,
            })
        });
        match started {
            Ok(running) => {
                self.running = Some(running);
                // Buffers made available before DRIVER_OK come without a kick.
                for event in &self.events {
                    let _ = event.write(1);
                }
            }
            Err(error) => {
                tracing::warn!(device = self.device.device_type(), %error, "device activation failed");
                self.interrupt.needs_reset();
            }
        }
    }

    fn take_queues(&self) -> Result<Vec<Virtqueue>, ActivateError> {
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, registers) in self.queues.iter().enumerate() {
            let max = self.device.queue_sizes().get(index).copied().unwrap_or_default();
            if !registers.ready {
                return Err(ActivateError::QueueNotReady(index));
            }
            let bad = |why| ActivateError::BadQueue(index, why);
            let queue = build_queue(registers, max, &self.memory, self.driver_features).map_err(bad)?;
            let event = self
                .events
                .get(index)
                .ok_or(ActivateError::QueueNotReady(index))?
                .try_clone()
                .map_err(|error| ActivateError::Host { what: "duplicate a queue event", error })?;
            queues.push(Virtqueue::new(queue, event, self.interrupt.clone()));
        }
        Ok(queues)
    }

    fn reset(&mut self) {
        // Waits until the worker is gone.
        self.running = None;
        for event in &self.events {
            let _ = event.read();
        }
        self.interrupt.reset();
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.queues.fill(QueueRegisters::default());
    }
}

/// A ring that lies in guest memory, or why it is not one.
fn build_queue(
    registers: &QueueRegisters,
    max: u16,
    memory: &GuestMemory,
    features: u64,
) -> Result<Queue, &'static str> {
    let size = u16::try_from(registers.size).map_err(|_| "its size is too big")?;
    let mut queue = Queue::new(max).map_err(|_| "its maximum size is not a power of two")?;
    queue.try_set_size(size).map_err(|_| "its size is zero, not a power of two or too big")?;
    let rings = [
        // Section 2.7: 16 bytes a descriptor; 2 bytes a slot and 6 around them; 8 bytes a slot and 6.
        (registers.desc, 16 * usize::from(size)),
        (registers.avail, 2 * usize::from(size) + 6),
        (registers.used, 8 * usize::from(size) + 6),
    ];
    for (address, len) in rings {
        if !memory.check_range(GuestAddress(address), len) {
            return Err("it is not in guest memory");
        }
    }
    let unaligned = |_| "it is not aligned";
    queue.try_set_desc_table_address(GuestAddress(registers.desc)).map_err(unaligned)?;
    queue.try_set_avail_ring_address(GuestAddress(registers.avail)).map_err(unaligned)?;
    queue.try_set_used_ring_address(GuestAddress(registers.used)).map_err(unaligned)?;
    queue.set_event_idx(features & F_EVENT_IDX != 0);
    queue.set_ready(true);
    Ok(queue)
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(target: &mut u64, value: u32) {
    *target = (*target & !0xffff_ffff) | u64::from(value);
}

fn set_high(target: &mut u64, value: u32) {
    *target = (*target & 0xffff_ffff) | (u64::from(value) << 32);
}

#[cfg(test)]
mod tests;
