//! vCPUs: their first state ([`cpuid`], [`registers`]) and the threads that run them.
//!
//! The threads start paused, so that nothing runs before everything is built, and again stop where they are on
//! request. Stopping is prompt: a signal ends `KVM_RUN`, and its handler sets `immediate_exit`, so that a signal
//! just before `KVM_RUN` is not lost. Nothing here ever waits for a vCPU on the I/O thread, because a vCPU that
//! resets a device waits for the I/O thread: [`Handle`] only asks, and an event tells.

pub mod cpuid;
mod exit;
pub mod registers;

#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Bus;
use crate::control::StopReason;
use crate::jail::{self, Kind};

/// Stack of a vCPU thread in bytes: exits are handled a few calls deep.
const STACK: usize = 256 << 10;

/// What the threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    Paused,
    Running,
    Stopped,
}

struct Shared {
    /// A copy of `Gate::phase` that is read before every `KVM_RUN`.
    phase: AtomicU8,
    gate: Mutex<Gate>,
    changed: Condvar,
    event: EventFd,
    bus: Arc<Bus>,
}

struct Gate {
    phase: Phase,
    /// All threads, until they are joined.
    threads: Vec<libc::pthread_t>,
    /// How many of them are not in `KVM_RUN` and will not be without a change of phase.
    still: usize,
    /// Why the VM has ended; the first reason counts.
    ended: Option<StopReason>,
}

/// Steers the vCPUs from any thread, without ever waiting for them.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// Becomes readable when the VM has ended, and when all vCPUs stand still after [`Self::pause`].
    pub fn event(&self) -> &EventFd {
        &self.0.event
    }

    /// Why the VM has ended, if it has.
    pub fn ended(&self) -> Option<StopReason> {
        lock(&self.0.gate).ended.clone()
    }

    /// Whether all vCPUs stand still because of [`Self::pause`].
    pub fn is_paused(&self) -> bool {
        let gate = lock(&self.0.gate);
        gate.phase == Phase::Paused && gate.still == gate.threads.len()
    }

    /// Stops all vCPUs where they are, soon.
    pub fn pause(&self) {
        self.0.set_phase(Phase::Paused);
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        self.0.set_phase(Phase::Running);
    }
}

/// The threads. Dropping this stops and joins them: not on the I/O thread while its loop runs.
pub struct Vcpus {
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

impl Vcpus {
    /// Starts a thread for each vCPU, in order of their ids. All are paused.
    pub fn start(vcpus: Vec<VcpuFd>, bus: Arc<Bus>) -> io::Result<Self> {
        install_signal_handler()?;
        let gate =
            Gate { phase: Phase::Paused, threads: Vec::with_capacity(vcpus.len()), still: 0, ended: None };
        let shared = Arc::new(Shared {
            phase: AtomicU8::new(Phase::Paused as u8),
            gate: Mutex::new(gate),
            changed: Condvar::new(),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            bus,
        });
        // Dropped on an error below, which ends the threads that there are already.
        let mut this = Vcpus { threads: Vec::with_capacity(vcpus.len()), shared };
        for (id, vcpu) in vcpus.into_iter().enumerate() {
            let shared = Arc::clone(&this.shared);
            let thread = std::thread::Builder::new().stack_size(STACK);
            let thread =
                thread.spawn(move || match jail::close_thread(Kind::Vcpu, &format!("vcpu{id}")) {
                    Ok(()) => run(id, vcpu, &shared),
                    Err(error) => shared.leave(Some(StopReason::Error(error.to_string()))),
                })?;
            lock(&this.shared.gate).threads.push(thread.as_pthread_t());
            this.threads.push(thread);
        }
        Ok(this)
    }

    /// A way to steer them.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.shared.set_phase(Phase::Stopped);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        lock(&self.shared.gate).threads.clear();
        self.shared.bus.flush_console();
    }
}

impl Shared {
    fn set_phase(&self, phase: Phase) {
        let mut gate = lock(&self.gate);
        // Once stopped, there are no threads to do anything else.
        if gate.phase == Phase::Stopped {
            return;
        }
        gate.phase = phase;
        self.phase.store(phase as u8, Ordering::SeqCst);
        self.changed.notify_all();
        if phase != Phase::Running {
            for thread in &gate.threads {
                // SAFETY: the list holds threads that have not been joined, so their ids are still their own.
                unsafe { libc::pthread_kill(*thread, kick_signal()) };
            }
            self.tell(&gate);
        }
    }

    /// Whether the vCPU may run, without waiting.
    fn running(&self) -> bool {
        self.phase.load(Ordering::SeqCst) == Phase::Running as u8
    }

    /// Waits until the vCPU may run (`true`) or has to end (`false`).
    fn wait_for_go(&self) -> bool {
        let mut gate = lock(&self.gate);
        gate.still += 1;
        self.tell(&gate);
        while gate.phase == Phase::Paused {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.still -= 1;
        gate.phase == Phase::Running
    }

    /// The thread ends: it stands still for good.
    fn leave(&self, reason: Option<StopReason>) {
        let mut gate = lock(&self.gate);
        gate.still += 1;
        if gate.ended.is_none() {
            gate.ended = reason;
        }
        self.tell(&gate);
    }

    /// Makes the event readable if there is something to tell.
    fn tell(&self, gate: &Gate) {
        if gate.ended.is_some() || gate.still == gate.threads.len() {
            // Fails only when the counter is full, and then the other side has been told.
            let _ = self.event.write(1);
        }
    }
}

/// A vCPU thread.
fn run(id: usize, mut vcpu: VcpuFd, shared: &Shared) {
    RUN_PAGE.set(vcpu.get_kvm_run());
    let mut ran = false;
    let reason = loop {
        // In this order: whoever changes the phase after the check signals, and the handler sets the flag again.
        vcpu.set_kvm_immediate_exit(0);
        if !shared.running() {
            if !shared.wait_for_go() {
                break None;
            }
            if ran {
                // So that the guest's watchdogs forgive the time it stood still. EINVAL: it has no kvmclock.
                let _ = vcpu.kvmclock_ctrl();
            }
            continue;
        }
        ran = true;
        if let Some(reason) = exit::run_once(id, &mut vcpu, &shared.bus) {
            break Some(reason);
        }
    };
    RUN_PAGE.set(ptr::null_mut());
    shared.bus.flush_console();
    shared.leave(reason);
}

thread_local! {
    /// The `kvm_run` page of this thread's vCPU, for the signal handler.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn handle_kick(_: libc::c_int) {
    // The thread local has no destructor and needs no first-time set-up, so it may be used in a handler.
    let page = RUN_PAGE.get();
    if !page.is_null() {
        // SAFETY: set by this very thread to the page of a vCPU that it owns, and cleared before that is
        // dropped. The thread itself only ever writes the byte between two runs.
        unsafe { (&raw mut (*page).immediate_exit).write_volatile(1) };
    }
}

fn install_signal_handler() -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction (no flags: KVM_RUN must not be restarted), and the handler only
    // does what a handler may.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle_kick as *const () as libc::sighandler_t;
        libc::sigaction(kick_signal(), &action, ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
