//! Reaping. PID 1 is the parent of every helper, of every container's init, of every exec and of every orphan.
//!
//! What always holds: a process is reaped here and nowhere else, and a pid that someone has registered or is about
//! to register stays a zombie, hence unique, until its exit has been handed to that someone. The second is why
//! unknown children are not reaped while a helper is at work: one of them may be the very process that the helper
//! is going to name.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::error::Error;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// As a shell shows it: the exit code, or 128 plus the signal's number.
    pub code: u32,
    /// The signal that ended it, 0 if none.
    pub signal: u32,
}

/// The one place that calls wait.
#[derive(Clone)]
pub struct Reaper(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    watched: HashMap<Pid, oneshot::Sender<Exit>>,
    helpers: usize,
}

/// While one exists, unknown children are left alone.
pub struct HelperAtWork(Reaper);

impl Reaper {
    /// Starts to reap whenever a child has ended.
    pub fn start() -> Result<Self, Error> {
        let mut ended = signal(SignalKind::child()).map_err(|e| Error::os("handling SIGCHLD", e))?;
        let reaper = Self(Arc::default());
        let this = reaper.clone();
        tokio::spawn(async move {
            while ended.recv().await.is_some() {
                this.reap();
            }
        });
        Ok(reaper)
    }

    /// To be taken before a fork whose descendants will be registered, and kept until they are.
    pub fn helper_at_work(&self) -> HelperAtWork {
        self.state().helpers += 1;
        HelperAtWork(self.clone())
    }

    /// Registers a child that has not been reaped yet: a helper, or a process that a helper at work named.
    pub fn watch(&self, pid: Pid) -> oneshot::Receiver<Exit> {
        let (exited, exit) = oneshot::channel();
        self.state().watched.insert(pid, exited);
        // It may have ended already, and its SIGCHLD with it.
        self.reap();
        exit
    }

    fn reap(&self) {
        let mut state = self.state();
        if state.helpers == 0 {
            while let Some((pid, exit)) = wait_for(Child::Any) {
                if let Some(exited) = state.watched.remove(&pid) {
                    let _ = exited.send(exit);
                }
            }
        } else {
            let ended: Vec<_> = state.watched.keys().filter_map(|pid| wait_for(Child::This(*pid))).collect();
            for (pid, exit) in ended {
                if let Some(exited) = state.watched.remove(&pid) {
                    let _ = exited.send(exit);
                }
            }
        }
    }

    /// Nothing can panic while the lock is held, and there is no second thread.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which children to ask for.
#[derive(Clone, Copy)]
enum Child {
    Any,
    This(Pid),
}

impl Drop for HelperAtWork {
    fn drop(&mut self) {
        self.0.state().helpers -= 1;
        self.0.reap();
    }
}

/// Reaps one ended child, without waiting. Straight to the system call, because nix's wrapper has no real-time
/// signals and would lose the status of a process that one of them ended.
fn wait_for(child: Child) -> Option<(Pid, Exit)> {
    let (kind, id) = match child {
        Child::Any => (libc::P_ALL, 0),
        Child::This(pid) => (libc::P_PID, pid.as_raw() as libc::id_t),
    };
    loop {
        // SAFETY: siginfo_t is a plain structure for which all zeroes is valid; waitid fills it in.
        let (result, info) = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            (libc::waitid(kind, id, &mut info, libc::WEXITED | libc::WNOHANG), info)
        };
        if result < 0 {
            if Errno::last() == Errno::EINTR {
                continue;
            }
            return None;
        }
        // SAFETY: after waitid these fields of the union are the valid ones; si_pid 0 means that none has ended.
        let (pid, status) = unsafe { (info.si_pid(), info.si_status() as u32) };
        if pid == 0 {
            return None;
        }
        let exit = if info.si_code == libc::CLD_EXITED {
            Exit { code: status & 0xff, signal: 0 }
        } else {
            Exit { code: 128 + status, signal: status }
        };
        return Some((Pid::from_raw(pid), exit));
    }
}
