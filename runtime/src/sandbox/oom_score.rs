//! How soon the host's OOM killer takes a VMM, whose memory is the guest's.
//!
//! What protects a caller never protects a guest: containerd and its shims have a negative score, which every child
//! inherits, so a VMM begins with 0 at least. Then it has the `oomScoreAdj` of the containers in it, of several the
//! highest, as each of them would have by itself under runc. The supervisor keeps its own: it lives to say what
//! happened.

use std::cell::Cell;
use std::fs;
use std::io;

use oci_spec::runtime::Spec;

/// Has a VMM that has just been started begin without what protects this process (proc(5), `oom_score_adj`).
pub fn begin(vmm: i32) -> io::Result<()> {
    let ours = fs::read_to_string("/proc/self/oom_score_adj")?;
    if ours.starts_with('-') { set(vmm, 0) } else { Ok(()) }
}

fn set(vmm: i32, score: i32) -> io::Result<()> {
    fs::write(format!("/proc/{vmm}/oom_score_adj"), score.to_string())
}

/// The score that the containers of a VM have asked for.
#[derive(Debug, Default)]
pub struct OomScore {
    highest: Cell<Option<i32>>,
}

impl OomScore {
    /// Counts a container in.
    pub fn add(&self, vmm: i32, spec: &Spec) {
        let Some(score) = self.raised(spec) else { return };
        if let Err(e) = set(vmm, score) {
            tracing::warn!("process.oomScoreAdj {score} does not count on the host: {e}");
        }
    }

    /// The new score, if it becomes another one.
    fn raised(&self, spec: &Spec) -> Option<i32> {
        let asked = spec.process().as_ref()?.oom_score_adj()?;
        if self.highest.get().is_some_and(|highest| highest >= asked) {
            return None;
        }
        self.highest.set(Some(asked));
        Some(asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_containers_the_highest_score_counts() {
        let spec = |score: Option<i32>| {
            let mut process = oci_spec::runtime::Process::default();
            process.set_oom_score_adj(score);
            let mut spec = Spec::default();
            spec.set_process(Some(process));
            spec
        };
        let scored = |score| spec(Some(score));
        let all = OomScore::default();
        assert_eq!(all.raised(&spec(None)), None);
        assert_eq!(all.raised(&scored(-500)), Some(-500));
        assert_eq!(all.raised(&scored(-998)), None);
        assert_eq!(all.raised(&scored(1000)), Some(1000));
        assert_eq!(all.raised(&scored(1000)), None);
    }
}
