//! The VMM process: from the control socket to the end of the VM.
//!
//! The thread that calls [`run`] becomes the I/O thread. The process ends when the VM does, when the supervisor
//! asks for it, and when the supervisor is gone, whichever comes first.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use nix::sys::signal::{SigHandler, Signal, signal};
use nix::time::{ClockId, clock_gettime};

use crate::control::{self, Event, Received, Server, StopReason, Timeline};
use crate::io_loop::{Control, EventSet, IoLoop, IoLoopError, Worker};
use crate::jail::{self, Kind};
use crate::machine::{self, Files, Ram, Shell};
use crate::vcpu::Handle;
use crate::virtio::net::{Interface, Plug};
use crate::virtio::vsock::{Dialer, Refusal};

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Control(#[from] control::Error),
    #[error(
        "the first message on the VMM control socket is not Boot; supervisor and VMM do not fit together"
    )]
    NotBoot,
    #[error(transparent)]
    Jail(#[from] jail::Error),
    #[error(transparent)]
    Machine(#[from] machine::Error),
    #[error(transparent)]
    IoLoop(#[from] IoLoopError),
}

/// Runs a VM as the supervisor at the other end of `control` asks, until it ends. Success means that the VM was
/// ended by the guest or by the supervisor; what happened otherwise has been told on `control`.
///
/// The calling thread's parent must outlive it: the process is killed when the thread that spawned it ends.
pub fn run(control: OwnedFd) -> ExitCode {
    run_confined(control, jail::enter)
}

/// The same, confined in another way: for tests, which have no process to give away.
pub(crate) fn run_confined(
    control: OwnedFd,
    confine: impl FnOnce(OwnedFd) -> Result<(), jail::Error>,
) -> ExitCode {
    let entered_ns = now();
    let _ = rustix::thread::set_name(c"stockade-vmm-up");
    // Both fail only for arguments that do not exist. A console without a reader must not kill the VM.
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    // SAFETY: ignoring a signal runs no handler.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) };
    // SAFETY: sets a number. One heap for all threads: an arena for each, as is the default, would cost every
    // thread four system calls and memory, and hardly anything is allocated after the start.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let outbox = Arc::new(Outbox { server: Server::new(control), waiting: Mutex::new(VecDeque::new()) });
    match serve(&outbox, entered_ns, confine) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If this cannot be told, there is nobody left to be told.
            let _ = outbox.server.send(&Event::Failed { message: error.to_string() }, true);
            ExitCode::FAILURE
        }
    }
}

fn serve(
    outbox: &Arc<Outbox>,
    entered_ns: u64,
    confine: impl FnOnce(OwnedFd) -> Result<(), jail::Error>,
) -> Result<(), Error> {
    // Before the first message, which the supervisor may need some time to prepare.
    let shell = Shell::create()?;
    let mut timeline = Timeline { entered_ns, vm_created_ns: now(), ..Timeline::default() };
    let (boot, files) = match outbox.server.recv(true)? {
        Poll::Ready(Some(Received::Boot { boot, kernel, initrd, share, console })) => {
            confine(share)?;
            (boot, Files { kernel, initrd, console })
        }
        Poll::Ready(Some(_)) => return Err(Error::NotBoot),
        Poll::Ready(None) | Poll::Pending => return Ok(()),
    };
    let io_loop = IoLoop::new()?;
    let replies = {
        let outbox = Arc::clone(outbox);
        move |id, result: Result<(), Refusal>| {
            outbox.send(match result {
                Ok(()) => Event::Connected { id },
                Err(refusal) => Event::Refused { id, reason: refusal.to_string() },
            });
        }
    };
    let machine = shell.furnish(&boot, files, &io_loop.handle(), Box::new(replies), || {
        timeline.kernel_loaded_ns = now();
    })?;
    let vcpus = machine.vcpus.handle();
    io_loop.handle().add(Box::new(Supervision {
        outbox: Arc::clone(outbox),
        vcpus: vcpus.clone(),
        dialer: machine.dialer.clone(),
        plugs: machine.plugs.clone(),
        ram: machine.ram.clone(),
        pausing: false,
    }));
    timeline.first_run_ns = now();
    outbox.send(Event::Started(timeline));
    jail::close_thread(Kind::Io, "stockade-vmm")?;
    vcpus.resume();
    // The machine is dropped after the loop: a vCPU that waits for the loop is let go by the loop's end.
    Ok(io_loop.run()?)
}

/// Events on their way to the supervisor. Sending never waits: what finds no room is sent when there is some.
/// The queue holds no more than the supervisor has asked for, an answer to each request.
struct Outbox {
    server: Server,
    waiting: Mutex<VecDeque<Event>>,
}

impl Outbox {
    fn send(&self, event: Event) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(event);
        self.flush();
    }

    fn flush(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(event) = waiting.front() {
            match self.server.send(event, false) {
                Err(e) if e.would_block() => break,
                // A supervisor that is gone shows as end of file.
                Ok(()) | Err(_) => waiting.pop_front(),
            };
        }
    }
}

/// The part of the I/O loop that listens to the supervisor and watches the vCPUs.
struct Supervision {
    outbox: Arc<Outbox>,
    vcpus: Handle,
    dialer: Dialer,
    plugs: Vec<Plug>,
    ram: Ram,
    /// `Pause` has not been answered yet.
    pausing: bool,
}

impl Supervision {
    /// Obeys all requests that are there; `false` when the VM is to end.
    fn obey(&mut self) -> Result<bool, control::Error> {
        loop {
            match self.outbox.server.recv(false)? {
                Poll::Pending => return Ok(true),
                Poll::Ready(None | Some(Received::Stop)) => return Ok(false),
                Poll::Ready(Some(Received::Connect { id, port, stream })) => {
                    self.dialer.connect(id, port, stream);
                }
                Poll::Ready(Some(Received::AttachNetwork { slot, interface, tap })) => {
                    self.outbox.send(match self.attach(slot, interface, tap) {
                        Ok(()) => Event::NetworkAttached { slot },
                        Err(reason) => Event::NetworkRefused { slot, reason },
                    });
                }
                Poll::Ready(Some(Received::SetLink { slot, up })) => {
                    if let Some(plug) = self.plugs.get(usize::from(slot)) {
                        plug.set_link(up);
                    }
                }
                Poll::Ready(Some(Received::DetachNetwork { slot })) => {
                    if let Some(plug) = self.plugs.get(usize::from(slot)) {
                        plug.detach();
                    }
                }
                Poll::Ready(Some(Received::SetMemory { added_bytes })) => {
                    self.outbox.send(match self.ram.set_added(added_bytes) {
                        Ok(()) => Event::MemorySet { added_bytes },
                        Err(error) => Event::MemoryRefused { reason: error.to_string() },
                    });
                }
                Poll::Ready(Some(Received::Pause)) => {
                    self.pausing = true;
                    self.vcpus.pause();
                }
                Poll::Ready(Some(Received::Resume)) => {
                    self.vcpus.resume();
                    self.outbox.send(Event::Resumed);
                }
                Poll::Ready(Some(Received::Boot { .. })) => {
                    let reason = "a second Boot on the VMM control socket".into();
                    self.outbox.send(Event::Stopped(StopReason::Error(reason)));
                    return Ok(false);
                }
            }
        }
    }

    fn attach(&self, slot: u8, interface: Interface, tap: OwnedFd) -> Result<(), String> {
        match self.plugs.get(usize::from(slot)) {
            Some(plug) => plug.attach(tap, interface).map_err(|e| e.to_string()),
            None => Err(format!("the VM has no network slot {slot}")),
        }
    }

    /// Tells the supervisor what the vCPUs have come to; `false` when the VM is to end.
    fn look_at_vcpus(&mut self) -> bool {
        let _ = self.vcpus.event().read();
        if let Some(reason) = self.vcpus.ended() {
            self.outbox.send(Event::Stopped(reason));
            return false;
        }
        if self.pausing && self.vcpus.is_paused() {
            self.pausing = false;
            self.outbox.send(Event::Paused);
        }
        true
    }
}

impl Worker for Supervision {
    fn fds(&self) -> Vec<(RawFd, EventSet)> {
        // Edge-triggered, so that OUT is no busy loop: it comes when there is room again.
        let socket = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        vec![(self.outbox.server.as_raw_fd(), socket), (self.vcpus.event().as_raw_fd(), EventSet::IN)]
    }

    fn ready(&mut self, fd: RawFd, _events: EventSet, ctl: &mut Control) {
        let go_on = if fd == self.outbox.server.as_raw_fd() {
            self.outbox.flush();
            self.obey().unwrap_or_else(|error| {
                self.outbox.send(Event::Stopped(StopReason::Error(error.to_string())));
                false
            })
        } else {
            self.look_at_vcpus()
        };
        if !go_on {
            ctl.stop_loop();
        }
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}
