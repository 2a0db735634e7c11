//! The life of one process, from the moment it exists to the moment its exit may be told.

use std::sync::Arc;

use nix::unistd::Pid;
use stockade_agent_protocol::messages::{Event, ExitEvent, event};
use tokio::sync::{oneshot, watch};

use crate::cgroup::Cgroup;
use crate::descriptor::Descriptor;
use crate::error::Error;
use crate::events::Events;
use crate::reaper::Exit;
use crate::stdio::{Drain, Relays};

/// How a process ended, and whether memory was the reason.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// Exit code and signal.
    pub exit: Exit,
    /// The kernel's OOM killer ended a process of its container.
    pub oom_killed: bool,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy)]
enum Life {
    /// Not reaped: the pid is its own.
    Alive,
    /// Reaped; its output may still be under way.
    Reaped,
    /// Its output has been handed on too.
    Over(Ended),
}

/// What [`Process::follow`] needs to know.
pub struct Made {
    /// The container.
    pub container_id: String,
    /// Empty for the init.
    pub exec_id: String,
    /// The pid.
    pub pid: Pid,
    /// The reaper's word on it.
    pub exit: oneshot::Receiver<Exit>,
    /// Its terminal, if it has one.
    pub terminal: Option<Arc<Descriptor>>,
    /// Its streams.
    pub relays: Relays,
    /// When its output is complete.
    pub drain: Drain,
    /// Its container's cgroup.
    pub cgroup: Cgroup,
}

/// A container's init or an exec.
pub struct Process {
    /// The container.
    pub container_id: String,
    /// Empty for the init.
    pub exec_id: String,
    /// Its pid, for replies. Signals go through [`Process::signal`].
    pub pid: Pid,
    /// Its terminal, if it has one.
    pub terminal: Option<Arc<Descriptor>>,
    life: watch::Sender<Life>,
}

impl Process {
    /// Follows a process from now until it has ended and its output is handed on.
    pub fn follow(made: Made, events: Arc<Events>) -> Arc<Self> {
        let Made { container_id, exec_id, pid, exit, terminal, relays, drain, cgroup } = made;
        let life = watch::Sender::new(Life::Alive);
        let process = Arc::new(Self { container_id, exec_id, pid, terminal, life });
        let this = process.clone();
        tokio::spawn(async move {
            // The reaper drops a sender only with the agent.
            let Ok(exit) = exit.await else { return };
            this.life.send_replace(Life::Reaped);
            tracing::debug!(container = this.container_id, exec = this.exec_id, ?exit, "a process ended");
            let oom_killed = cgroup.oom_kills() > 0;
            relays.finish(drain).await;
            this.life.send_replace(Life::Over(Ended { exit, oom_killed }));
            events.publish(&Event {
                container_id: this.container_id.clone(),
                event: Some(event::Event::Exit(ExitEvent {
                    exec_id: this.exec_id.clone(),
                    exit_code: exit.code,
                    signal: exit.signal,
                    ..Default::default()
                })),
                ..Default::default()
            });
        });
        process
    }

    /// It has not been reaped.
    pub fn is_alive(&self) -> bool {
        matches!(*self.life.borrow(), Life::Alive)
    }

    /// Waits until it has been reaped.
    pub async fn reaped(&self) {
        // Fails only when the sender is gone, which `self` holds.
        let _ = self.life.subscribe().wait_for(|life| !matches!(life, Life::Alive)).await;
    }

    /// Waits for its end and for its output to be handed on.
    pub async fn ended(&self) -> Result<Ended, Error> {
        let mut life = self.life.subscribe();
        match life.wait_for(|life| matches!(life, Life::Over(_))).await.as_deref() {
            Ok(Life::Over(ended)) => Ok(*ended),
            _ => Err(Error::Internal("the process is no longer followed".into())),
        }
    }

    /// Sends a signal, unless the process has ended. Any number the kernel knows, real-time ones too.
    pub fn signal(&self, signal: i32) -> Result<(), Error> {
        if !self.is_alive() {
            return Err(Error::Precondition("the process has ended".into()));
        }
        let pid = self.pid;
        // SAFETY: plain system call; the process has not been reaped, and nothing reaps
        // while this runs, so the pid is not another's.
        if unsafe { libc::kill(pid.as_raw(), signal) } < 0 {
            return Err(Error::os(format!("sending signal {signal}"), std::io::Error::last_os_error()));
        }
        Ok(())
    }
}
