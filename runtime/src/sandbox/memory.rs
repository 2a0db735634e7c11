//! The VM's memory while it runs: it grows with what the containers in it may use, and shrinks again.
//!
//! A VM has what it began with, and besides as many blocks of memory as the sum of limits asks for ([`Demand`]). To grow,
//! the host's cgroup has to have room first, then the VMM adds blocks, then the guest takes them into use; to shrink, it is
//! the other way round. Growing is what a limit needs, so an error is one of who has set it. Shrinking is as far as the
//! guest can move what is in the memory, and no error: what could not be given back is at the next occasion.
//!
//! Always true: how much there is to be is decided here, and the VMM has at least what the guest has been told of, even
//! when a caller gives up in the middle. The guest's word on what it uses counts within these bounds only: one that lies
//! harms itself.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;

use nix::sys::sysinfo::sysinfo;
use stockade_vmm::memory::Window;
use tokio::sync::Mutex;

use super::{Error, Sandbox, agent, cgroup};
use crate::size::{By, Demand, VmSize};

/// What a VM has, and what it is to have.
#[derive(Debug)]
pub struct Memory {
    began: VmSize,
    /// Somebody has said how big the VM is to be, so it does not grow by itself.
    is_named: bool,
    window: Window,
    /// Bytes in the window that the VMM has and the guest may have.
    added: Cell<u64>,
    demand: RefCell<Demand>,
    /// The host's cgroup of all this.
    cgroup: Option<PathBuf>,
    /// One change after the other.
    changing: Mutex<()>,
}

/// How a container was counted, if it was.
#[derive(Debug)]
pub struct Before(Option<Option<u64>>);

impl Memory {
    /// That of a VM that begins with this size.
    pub(super) fn new(size: VmSize, by: By, cgroup: Option<PathBuf>) -> Self {
        Memory {
            began: size,
            is_named: by == By::Name,
            window: Window::of(size.memory),
            added: Cell::new(0),
            demand: RefCell::new(Demand::new(size, by)),
            cgroup,
            changing: Mutex::default(),
        }
    }

    fn size_with(&self, added: u64) -> VmSize {
        VmSize { memory: self.began.memory + added, ..self.began }
    }

    /// Bytes in the window for so much memory in all. More than the host has would be of no use to anybody, and its
    /// administration in the guest a burden.
    fn window_for(&self, memory: u64) -> u64 {
        let host = sysinfo().map_or(u64::MAX, |host| host.ram_total());
        self.window.blocks_for(memory.min(host).saturating_sub(self.began.memory)).min(self.window.size())
    }

    fn follow_in_cgroup(&self, added: u64) -> Result<(), Error> {
        match &self.cgroup {
            Some(path) => Ok(cgroup::follow(path, self.size_with(added))?),
            None => Ok(()),
        }
    }
}

impl Sandbox {
    /// How big the VM is now.
    pub fn size(&self) -> VmSize {
        self.memory.size_with(self.memory.added.get())
    }

    /// Counts a container for which the VM was made.
    pub fn count(&self, container: &str, limit: Option<u64>) {
        self.memory.demand.borrow_mut().count(container, limit);
    }

    /// Counts a container that comes to the VM, which grows for it unless somebody has said how big it is to be.
    pub async fn admit(&self, container: &str, limit: Option<u64>) -> Result<(), Error> {
        if self.memory.is_named {
            self.count(container, limit);
            return Ok(());
        }
        self.promise(container, limit).await.map(drop)
    }

    /// Counts a container with another limit, for which the VM grows. Returns what is to be counted again if nothing comes
    /// of the limit otherwise; after an error that is so already.
    pub async fn promise(&self, container: &str, limit: Option<u64>) -> Result<Before, Error> {
        let (before, wanted) = {
            let mut demand = self.memory.demand.borrow_mut();
            (Before(demand.count(container, limit)), demand.memory())
        };
        let grown = match wanted {
            Ok(wanted) => self.grow(wanted).await,
            Err(e) => Err(e.into()),
        };
        if let Err(e) = grown {
            self.restore(container, before);
            self.shrink().await;
            return Err(e);
        }
        Ok(before)
    }

    /// Counts a container as it was counted before, unless it has gone meanwhile.
    pub fn restore(&self, container: &str, before: Before) {
        self.memory.demand.borrow_mut().restore(container, before.0);
    }

    /// Counts a container no more. What it had is given back when the VM is told to [shrink](Self::shrink).
    pub fn discount(&self, container: &str) {
        self.memory.demand.borrow_mut().forget(container);
    }

    /// Makes the VM have so much memory in all, if it has less.
    async fn grow(&self, memory: u64) -> Result<(), Error> {
        let Memory { window, added, .. } = &self.memory;
        let _one = self.memory.changing.lock().await;
        let (before, wanted) = (added.get(), self.memory.window_for(memory));
        if wanted <= before {
            return Ok(());
        }
        self.memory.follow_in_cgroup(wanted)?;
        if let Err(e) = self.vmm.set_memory(wanted).await {
            self.memory.follow_in_cgroup(before)?;
            return Err(e.into());
        }
        added.set(wanted);
        let reply = match self.agent.set_memory(window.start, window.block, wanted).await {
            Ok(reply) => reply,
            Err(source) => {
                // Who says no has taken none of it. Who says nothing may do so yet.
                if matches!(source, agent::Error::Refused(_)) {
                    self.take_back(before).await?;
                }
                return Err(Error::Agent { what: "have the guest use more memory", source });
            }
        };
        let in_use = window.blocks_for(reply.bytes.clamp(before, wanted));
        if in_use < wanted || !reply.reason.is_empty() {
            self.take_back(in_use).await?;
            return Err(Error::NotUsed { bytes: wanted - before, why: reply.reason });
        }
        tracing::info!(memory = self.size().memory, "the VM has grown");
        Ok(())
    }

    /// Has the guest let go of what nobody asks for any more, as far as it can, and takes that away.
    pub async fn shrink(&self) {
        let Memory { window, added, demand, .. } = &self.memory;
        let _one = self.memory.changing.lock().await;
        let Ok(memory) = demand.borrow().memory() else { return };
        let (before, wanted) = (added.get(), self.memory.window_for(memory));
        if wanted >= before {
            return;
        }
        let result = async {
            let reply = self.agent.set_memory(window.start, window.block, wanted).await;
            let reply =
                reply.map_err(|source| Error::Agent { what: "have the guest use less memory", source })?;
            if !reply.reason.is_empty() {
                tracing::debug!("the guest does not let go of all memory: {}", reply.reason);
            }
            self.take_back(window.blocks_for(reply.bytes.clamp(wanted, before))).await
        };
        match result.await {
            Ok(()) => tracing::info!(memory = self.size().memory, "the VM has shrunk"),
            Err(e) => tracing::warn!("the VM keeps its memory: {e}"),
        }
    }

    /// Takes away what the guest does not use, all but so many bytes.
    async fn take_back(&self, in_use: u64) -> Result<(), Error> {
        // First: whoever comes next may count on no more than that.
        self.memory.added.set(in_use);
        self.vmm.set_memory(in_use).await?;
        self.memory.follow_in_cgroup(in_use)
    }
}
