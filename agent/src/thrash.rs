//! Containers that have run out of memory without the kernel's noticing.
//!
//! A cgroup at its limit whose processes fill it with anonymous memory keeps a few pages of their own code, which the
//! kernel takes away and reads again for every other step. Each of these reads counts as progress, so the OOM killer
//! may not come for minutes; on a host the pages belong to whoever read them first, but here that is the container
//! itself. So a cgroup that meets its limit is looked at every [`INTERVAL`], and one that does nothing but read its
//! code again is lowered for a moment below what it uses, which calls the kernel's own OOM killer: it chooses, by the
//! rules that users know, and counts, and everybody is told as ever.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::cgroup::{Cgroup, Pressure};
use crate::error::Error;
use crate::helper::{Helper, Record};
use crate::reaper::Reaper;

const INTERVAL: Duration = Duration::from_secs(1);

/// How many intervals one after another show nothing else.
const PATIENCE: u32 = 3;

/// Major faults in an interval, at least: fewer may be the beginning or the end of something else.
const FAULTS: u64 = 16;

/// How often each page of files was read again in an interval, at least.
const ROUNDS: u64 = 4;

/// Looks at cgroups that meet their limits.
pub struct ThrashWatch {
    reaper: Reaper,
    looking: Mutex<HashSet<String>>,
}

impl ThrashWatch {
    /// Looks at none yet.
    pub fn new(reaper: Reaper) -> Arc<Self> {
        Arc::new(Self { reaper, looking: Mutex::default() })
    }

    /// A cgroup has met its limit: looks at it as long as it goes on to do so.
    pub fn look_at(self: &Arc<Self>, cgroup: &Cgroup) {
        let mut looking = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        if !looking.insert(cgroup.name.clone()) {
            return;
        }
        let (this, cgroup) = (self.clone(), cgroup.clone());
        tokio::spawn(async move {
            if let Err(e) = this.follow(&cgroup).await {
                // The cgroup has gone, for example.
                tracing::debug!("{e}");
            }
            this.looking.lock().unwrap_or_else(PoisonError::into_inner).remove(&cgroup.name);
        });
    }

    async fn follow(&self, cgroup: &Cgroup) -> Result<(), Error> {
        let mut before = cgroup.pressure()?;
        let mut patience = PATIENCE;
        loop {
            tokio::time::sleep(INTERVAL).await;
            let now = cgroup.pressure()?;
            if now.limit_met == before.limit_met {
                return Ok(());
            }
            patience = if thrashes(&before, &now) { patience - 1 } else { PATIENCE };
            if patience == 0 {
                tracing::warn!(cgroup = cgroup.name, "out of memory: all it does is to read its code again");
                let doomed = cgroup.clone();
                // Writing the limit waits for the OOM killer.
                let mut helper = Helper::fork(&self.reaper, move |_| match doomed.kill_one_for_memory() {
                    Ok(()) => Record::Done(None),
                    Err(e) => Record::Failed(e.to_string()),
                })?;
                helper.outcome().await?;
                patience = PATIENCE;
            }
            before = now;
        }
    }
}

/// Whether a cgroup did nothing but read pages again that it had to give away: hardly any are left to it, and those
/// it has were read several times, by programs that could not go on without.
fn thrashes(before: &Pressure, now: &Pressure) -> bool {
    let refaults = now.refaults.saturating_sub(before.refaults);
    let faults = now.major_faults.saturating_sub(before.major_faults);
    now.file_pages < now.limit_pages / 64 && faults >= FAULTS && refaults >= ROUNDS * now.file_pages.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As seen of a program that filled 64 MiB, three seconds apart.
    const BEFORE: Pressure =
        Pressure { limit_met: 1, limit_pages: 16384, file_pages: 19, refaults: 84_607, major_faults: 4500 };
    const NOW: Pressure =
        Pressure { limit_met: 2, limit_pages: 16384, file_pages: 19, refaults: 100_434, major_faults: 5332 };

    #[test]
    fn reading_the_same_few_pages_again_is_told_from_work() {
        assert!(thrashes(&BEFORE, &NOW));
        // A cache that is small but of use, a stream through a small cache, and one that has only begun.
        assert!(!thrashes(&BEFORE, &Pressure { file_pages: 1000, ..NOW }));
        assert!(!thrashes(&BEFORE, &Pressure { major_faults: 4501, ..NOW }));
        assert!(!thrashes(&BEFORE, &Pressure { refaults: 84_650, ..NOW }));
        // Counters that went back are another cgroup's.
        assert!(!thrashes(&NOW, &BEFORE));
    }
}
