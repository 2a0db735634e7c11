//! A device's interrupt: the reasons in the InterruptStatus register and the line that is raised.
//!
//! Shared between the transport, which the guest reads and acknowledges through, and the worker.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// InterruptStatus bit 0: a used buffer.
const USED_BUFFER: u32 = 1;
/// InterruptStatus bit 1: the configuration or the device's status has changed.
const CONFIG_CHANGE: u32 = 2;

/// A device's interrupt line: each call is an edge. Must not block.
pub type Line = Box<dyn Fn() + Send + Sync>;

/// See the module.
pub struct Interrupt {
    line: Line,
    reasons: AtomicU32,
    broken: AtomicBool,
}

impl Interrupt {
    /// An interrupt on this line.
    pub fn new(line: Line) -> Self {
        Self { line, reasons: AtomicU32::new(0), broken: AtomicBool::new(false) }
    }

    /// Says that there are used buffers.
    pub fn used(&self) {
        self.raise(USED_BUFFER);
    }

    /// Says that the configuration space has changed.
    pub fn config_changed(&self) {
        self.raise(CONFIG_CHANGE);
    }

    /// Says that the device cannot go on until it is reset (DEVICE_NEEDS_RESET, virtio 1.3, section 2.1.2).
    pub fn needs_reset(&self) {
        self.broken.store(true, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }

    /// Whether the device waits for a reset.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    pub(super) fn reasons(&self) -> u32 {
        self.reasons.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, reasons: u32) {
        self.reasons.fetch_and(!reasons, Ordering::SeqCst);
    }

    /// To the state after power-on. The worker must be gone.
    pub(super) fn reset(&self) {
        self.reasons.store(0, Ordering::SeqCst);
        self.broken.store(false, Ordering::SeqCst);
    }

    fn raise(&self, reason: u32) {
        // Always raised, also when the reason was pending: the line is an edge, and the driver may have
        // read the register just before.
        self.reasons.fetch_or(reason, Ordering::SeqCst);
        (self.line)();
    }
}
