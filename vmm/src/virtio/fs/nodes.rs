//! The inodes that a guest knows: how many, how often each was told, and what each looked like when the guest
//! opened it last.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuse_backend_rs::abi::fuse_abi::stat64;

/// The root is known for ever and not counted.
const ROOT: u64 = fuse_backend_rs::abi::fuse_abi::ROOT_ID;

/// A change within the host's clock tick (4 ms or so) of the last one cannot be told from it by the time. A
/// file that has changed this recently may be just changing, so nothing is concluded from equal times.
const SETTLED_AFTER: Duration = Duration::from_secs(1);

/// See the module.
pub struct Nodes {
    max: usize,
    known: Mutex<HashMap<u64, Node>>,
}

#[derive(Default)]
struct Node {
    /// As many FORGETs will come.
    lookups: u64,
    opened_as: Option<Version>,
}

/// What changes with every change of a file's data.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version {
    size: i64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Nodes {
    /// None known so far, and never more than `max`.
    pub fn new(max: usize) -> Self {
        Self { max, known: Mutex::new(HashMap::new()) }
    }

    /// Counts that the guest is told of `inode`. False if it knows too many others.
    pub fn learn(&self, inode: u64) -> bool {
        let mut known = self.lock();
        if inode == ROOT || known.len() < self.max || known.contains_key(&inode) {
            if inode != ROOT {
                let node = known.entry(inode).or_default();
                node.lookups = node.lookups.saturating_add(1);
            }
            true
        } else {
            false
        }
    }

    /// Takes back `count` times of telling.
    pub fn forget(&self, inode: u64, count: u64) {
        let mut known = self.lock();
        if let Some(node) = known.get_mut(&inode) {
            node.lookups = node.lookups.saturating_sub(count);
            if node.lookups == 0 {
                known.remove(&inode);
            }
        }
    }

    /// Whether no further inode can be learnt.
    pub fn is_full(&self) -> bool {
        self.lock().len() >= self.max
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// Whether a file is as it was when this was asked last, for sure.
    pub fn is_unchanged(&self, inode: u64, attributes: &stat64) -> bool {
        let version = Version {
            size: attributes.st_size,
            mtime: (attributes.st_mtime, attributes.st_mtime_nsec),
            ctime: (attributes.st_ctime, attributes.st_ctime_nsec),
        };
        match self.lock().get_mut(&inode) {
            Some(node) => node.opened_as.replace(version) == Some(version) && is_settled(version.ctime),
            None => false,
        }
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Node>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_settled((seconds, nanoseconds): (i64, i64)) -> bool {
    let since_epoch = Duration::new(seconds.max(0) as u64, nanoseconds.clamp(0, 999_999_999) as u32);
    SystemTime::now().duration_since(UNIX_EPOCH + since_epoch).is_ok_and(|age| age >= SETTLED_AFTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(size: i64, ctime: i64) -> stat64 {
        // SAFETY: plain data, for which zero is valid.
        let mut attributes: stat64 = unsafe { std::mem::zeroed() };
        attributes.st_size = size;
        attributes.st_ctime = ctime;
        attributes
    }

    #[test]
    fn a_file_is_unchanged_only_if_it_was_seen_before_in_the_same_version() {
        let nodes = Nodes::new(10);
        assert!(!nodes.is_unchanged(5, &file(1, 100)), "unknown to the guest");
        nodes.learn(5);
        assert!(!nodes.is_unchanged(5, &file(1, 100)), "never opened");
        assert!(nodes.is_unchanged(5, &file(1, 100)));
        assert!(!nodes.is_unchanged(5, &file(1, 101)));
        assert!(!nodes.is_unchanged(5, &file(2, 101)));
        assert!(nodes.is_unchanged(5, &file(2, 101)));
        nodes.forget(5, 1);
        nodes.learn(5);
        assert!(!nodes.is_unchanged(5, &file(2, 101)), "forgotten in between");
    }

    #[test]
    fn a_file_that_has_changed_just_now_may_be_changing_still() {
        let nodes = Nodes::new(10);
        nodes.learn(5);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
        for ctime in [now, now + 3600] {
            nodes.is_unchanged(5, &file(1, ctime));
            assert!(!nodes.is_unchanged(5, &file(1, ctime)));
        }
    }
}
