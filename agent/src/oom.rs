//! OOM events: `memory.events` of each container's cgroup, watched with inotify from the first on.
//! What meets its limit is looked at further ([`crate::thrash`]), the memory of all containers together as well.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use stockade_agent_protocol::messages::{Event, OomEvent, event};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::cgroup::Cgroup;
use crate::descriptor::watch;
use crate::error::Error;
use crate::events::Events;
use crate::reaper::Reaper;
use crate::thrash::ThrashWatch;

/// Watches the memory of containers.
pub struct OomWatch {
    inotify: Inotify,
    /// The same open file, for the runtime to watch.
    readiness: AsyncFd<OwnedFd>,
    watched: Mutex<HashMap<WatchDescriptor, Watched>>,
    events: Arc<Events>,
    thrash: Arc<ThrashWatch>,
}

struct Watched {
    container_id: String,
    cgroup: Cgroup,
    /// Kills that have been told.
    told: u64,
}

impl OomWatch {
    /// Starts with no container.
    pub fn start(events: Arc<Events>, reaper: Reaper) -> Result<Arc<Self>, Error> {
        let failed = |e: io::Error| Error::os("watching containers' memory", e);
        let inotify =
            Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(|e| failed(e.into()))?;
        let readiness = inotify
            .as_fd()
            .try_clone_to_owned()
            .and_then(|fd| watch(fd, Interest::READABLE))
            .map_err(failed)?;
        let thrash = ThrashWatch::new(reaper);
        let watch = Arc::new(Self { inotify, readiness, watched: Mutex::default(), events, thrash });
        watch.add("", &Cgroup::of_all());
        let this = watch.clone();
        tokio::spawn(async move {
            if let Err(e) = this.run().await {
                tracing::error!("OOM events end here: {e}");
            }
        });
        Ok(watch)
    }

    /// Watches a container, or the one of no name, all of them; a cgroup's removal ends that.
    pub fn add(&self, container_id: &str, cgroup: &Cgroup) {
        let flags = AddWatchFlags::IN_MODIFY;
        match self.inotify.add_watch(&cgroup.events_file(), flags) {
            Ok(descriptor) => {
                let watched =
                    Watched { container_id: container_id.to_owned(), cgroup: cgroup.clone(), told: 0 };
                self.tell(self.watched().entry(descriptor).or_insert(watched));
            }
            Err(e) => tracing::warn!(container = container_id, "OOM events cannot be watched: {e}"),
        }
    }

    async fn run(&self) -> io::Result<()> {
        loop {
            let mut ready = self.readiness.readable().await?;
            let Ok(changes) = ready.try_io(|_| Ok(self.inotify.read_events()?)) else { continue };
            for change in changes? {
                let mut watched = self.watched();
                if change.mask.contains(AddWatchFlags::IN_IGNORED) {
                    watched.remove(&change.wd);
                } else if let Some(watched) = watched.get_mut(&change.wd) {
                    self.tell(watched);
                    self.thrash.look_at(&watched.cgroup);
                }
            }
        }
    }

    fn tell(&self, watched: &mut Watched) {
        let oom_kills = watched.cgroup.oom_kills();
        if oom_kills > watched.told && !watched.container_id.is_empty() {
            watched.told = oom_kills;
            self.events.publish(&Event {
                container_id: watched.container_id.clone(),
                event: Some(event::Event::Oom(OomEvent { oom_kills, ..Default::default() })),
                ..Default::default()
            });
        }
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
