//! Signals that a process on the host passes on to the workload it stands for.
//!
//! They are blocked from the beginning and read from a descriptor, so that none is lost or acts on us.

use std::io;
use std::os::fd::AsFd;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::Interest;

use super::poll::register;

/// What a workload may be told by its host process. SIGWINCH becomes a resize instead.
const RELAYED: [Signal; 8] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGWINCH,
];

/// The blocked signals of this process.
#[derive(Debug)]
pub struct Signals {
    fd: SignalFd,
}

impl Signals {
    /// Blocks them. Before any thread is made, which would not inherit it.
    pub fn block() -> io::Result<Self> {
        let set = SigSet::from_iter(RELAYED);
        set.thread_block()?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Signals { fd })
    }

    /// Calls `act` for each signal that comes, until the future is dropped.
    pub async fn each(&self, mut act: impl AsyncFnMut(Signal)) -> io::Result<()> {
        let fd = register(self.fd.as_fd(), Interest::READABLE)?;
        loop {
            let mut ready = fd.readable().await?;
            match self.fd.read_signal()? {
                None => ready.clear_ready(),
                Some(info) => {
                    if let Ok(signal) = Signal::try_from(info.ssi_signo as i32) {
                        act(signal).await;
                    }
                }
            }
        }
    }
}

/// Ends this process as the workload ended: by the same signal if it can be, otherwise with its code.
pub fn end_like(code: u8, signal: i32) -> ! {
    if let Ok(signal) = Signal::try_from(signal) {
        let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
        // SAFETY: the default action replaces whatever handler there is; nothing runs in signal context.
        let _ = unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigDfl) };
        let _ = SigSet::from(signal).thread_unblock();
        let _ = nix::sys::signal::raise(signal);
    }
    std::process::exit(code.into())
}
