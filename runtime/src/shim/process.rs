//! One process that containerd knows: a container's init, or an exec.

use std::cell::{Cell, RefCell};
use std::time::SystemTime;

use tokio::sync::{Mutex, watch};

use super::stdio::{Held, Paths};

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It waits for its start.
    Created,
    /// It runs.
    Running,
    /// It has ended.
    Stopped,
}

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exited {
    /// 0 to 255, as a shell shows it.
    pub code: u32,
    /// When this shim knew.
    pub at: SystemTime,
}

/// A process.
pub struct Process {
    /// Empty for a container's init.
    pub exec_id: String,
    /// Where its streams lead.
    pub paths: Paths,
    /// What an exec is to run, in JSON; taken by its start.
    pub spec: RefCell<Vec<u8>>,
    /// Since when there is one.
    pub made: SystemTime,
    /// What keeps its streams open.
    pub held: RefCell<Held>,
    /// Held by who changes the stage, so that events come in the order of what happened.
    pub order: Mutex<()>,
    stage: Cell<Stage>,
    exited: watch::Sender<Option<Exited>>,
}

impl Process {
    /// A process that waits for its start.
    pub fn new(exec_id: &str, paths: Paths) -> Self {
        Process {
            exec_id: exec_id.into(),
            paths,
            spec: RefCell::default(),
            made: SystemTime::now(),
            held: RefCell::default(),
            order: Mutex::new(()),
            stage: Cell::new(Stage::Created),
            exited: watch::Sender::new(None),
        }
    }

    /// The process of the host that stands for it: see [`Pod::pid`](super::pod::Pod::pid). 0 for an exec before its start.
    pub fn pid(&self) -> u32 {
        if self.exec_id.is_empty() || self.stage() != Stage::Created { std::process::id() } else { 0 }
    }

    /// Where it is.
    pub fn stage(&self) -> Stage {
        self.stage.get()
    }

    /// From now on it runs.
    pub fn started(&self) {
        if self.stage.get() == Stage::Created {
            self.stage.set(Stage::Running);
        }
    }

    /// From now on it has ended; whoever waits is told. The first end counts.
    pub fn ended(&self, code: u32) -> Exited {
        self.stage.set(Stage::Stopped);
        let exited = Exited { code, at: SystemTime::now() };
        self.exited.send_if_modified(|known| {
            let first = known.is_none();
            known.get_or_insert(exited);
            first
        });
        self.exit().unwrap_or(exited)
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exited> {
        *self.exited.borrow()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exited {
        let mut exited = self.exited.subscribe();
        match exited.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(exited)) => *exited,
            // The sender is in `self`.
            _ => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_of_a_process_counts_and_everybody_is_told() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let process = Process::new("", Paths::default());
            let (waited, ()) = tokio::join!(process.wait(), async {
                process.started();
                assert_eq!((process.stage(), process.exit()), (Stage::Running, None));
                process.ended(7);
                process.ended(0);
                process.started();
            });
            assert_eq!((waited.code, process.stage()), (7, Stage::Stopped));
            assert_eq!(process.wait().await, waited);
        });
    }
}
