//! The inodes that a guest knows: how many, how often each was told, what each looked like when the guest opened it
//! last, and on which of the host's file systems it is.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuse_backend_rs::abi::fuse_abi::{ATTR_SUBMOUNT, stat64};
use fuse_backend_rs::api::filesystem::Entry;

/// The root is known for ever and not counted.
const ROOT: u64 = fuse_backend_rs::abi::fuse_abi::ROOT_ID;

/// A change within the host's clock tick (4 ms or so) of the last one cannot be told from it by the time. A
/// file that has changed this recently may be just changing, so nothing is concluded from equal times.
const SETTLED_AFTER: Duration = Duration::from_secs(1);

/// See the module.
pub struct Nodes {
    max: usize,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    nodes: HashMap<u64, Node>,
    /// The file system of the root.
    root_device: Option<u64>,
}

#[derive(Default)]
struct Node {
    /// As many FORGETs will come.
    lookups: u64,
    opened_as: Option<Version>,
    /// The file system that it is on.
    device: u64,
    /// It is a file in a directory of another file system.
    is_apart: bool,
}

impl Known {
    fn device(&self, inode: u64) -> Option<u64> {
        if inode == ROOT { self.root_device } else { self.nodes.get(&inode).map(|node| node.device) }
    }
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
        Self { max, known: Mutex::default() }
    }

    /// The root is on this file system.
    pub fn set_root(&self, attributes: &stat64) {
        self.lock().root_device = Some(attributes.st_dev);
    }

    /// Counts that the guest is told of an entry of `parent`. False if it knows too many others.
    ///
    /// Where another file system of the host begins, the guest has to have another one too, since files are told apart
    /// by device and inode number: diff(1) takes two of the same for one, and cp(1) refuses to copy. For a directory the
    /// guest's kernel makes one (FUSE_ATTR_SUBMOUNT, `fuse_dentry_automount` in Linux); a file that is mounted for
    /// itself gets another number.
    pub fn learn(&self, parent: u64, entry: &mut Entry) -> bool {
        let mut known = self.lock();
        let begins = known.device(parent).is_some_and(|device| device != entry.attr.st_dev);
        let is_dir = entry.attr.st_mode & libc::S_IFMT == libc::S_IFDIR;
        if entry.inode != ROOT {
            if known.nodes.len() >= self.max && !known.nodes.contains_key(&entry.inode) {
                return false;
            }
            let node = known.nodes.entry(entry.inode).or_default();
            node.lookups = node.lookups.saturating_add(1);
            node.device = entry.attr.st_dev;
            node.is_apart = begins && !is_dir;
        }
        if begins && is_dir {
            entry.attr_flags |= ATTR_SUBMOUNT;
        } else if begins {
            set_apart(&mut entry.attr);
        }
        true
    }

    /// The attributes of an inode as the guest is to see them.
    pub fn shown(&self, inode: u64, mut attributes: stat64) -> stat64 {
        if self.lock().nodes.get(&inode).is_some_and(|node| node.is_apart) {
            set_apart(&mut attributes);
        }
        attributes
    }

    /// Takes back `count` times of telling.
    pub fn forget(&self, inode: u64, count: u64) {
        let nodes = &mut self.lock().nodes;
        if let Some(node) = nodes.get_mut(&inode) {
            node.lookups = node.lookups.saturating_sub(count);
            if node.lookups == 0 {
                nodes.remove(&inode);
            }
        }
    }

    /// Whether no further inode can be learnt.
    pub fn is_full(&self) -> bool {
        self.lock().nodes.len() >= self.max
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.lock().nodes.clear();
    }

    /// Whether a file is as it was when this was asked last, for sure.
    pub fn is_unchanged(&self, inode: u64, attributes: &stat64) -> bool {
        let version = Version {
            size: attributes.st_size,
            mtime: (attributes.st_mtime, attributes.st_mtime_nsec),
            ctime: (attributes.st_ctime, attributes.st_ctime_nsec),
        };
        match self.lock().nodes.get_mut(&inode) {
            Some(node) => node.opened_as.replace(version) == Some(version) && is_settled(version.ctime),
            None => false,
        }
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.lock().nodes.len()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives a file a number that follows from its file system and its number there, in as many bits as it takes for no two
/// to meet.
fn set_apart(attributes: &mut stat64) {
    let mut hasher = DefaultHasher::new();
    (attributes.st_dev, attributes.st_ino).hash(&mut hasher);
    attributes.st_ino = hasher.finish() >> 17;
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

    fn entry(inode: u64, mode: u32, device: u64, number: u64) -> Entry {
        let mut attr = file(0, 0);
        (attr.st_mode, attr.st_dev, attr.st_ino) = (mode, device, number);
        Entry { inode, attr, ..Entry::default() }
    }

    /// The guest is told of a file that it does not know yet.
    fn learn(nodes: &Nodes, inode: u64) {
        assert!(nodes.learn(ROOT, &mut entry(inode, libc::S_IFREG, 0, inode)));
    }

    #[test]
    fn a_directory_of_another_file_system_is_the_root_of_another_one_in_the_guest_too() {
        let nodes = Nodes::new(10);
        nodes.set_root(&entry(ROOT, libc::S_IFDIR, 7, 1).attr);
        let flags = |parent, inode, device| {
            let mut entry = entry(inode, libc::S_IFDIR, device, 3);
            assert!(nodes.learn(parent, &mut entry));
            assert_eq!(entry.attr.st_ino, 3);
            entry.attr_flags
        };
        assert_eq!(flags(ROOT, 2, 7), 0);
        assert_eq!(flags(2, 3, 8), ATTR_SUBMOUNT);
        assert_eq!(flags(3, 4, 8), 0);
        assert_eq!(flags(4, 5, 7), ATTR_SUBMOUNT);
        // Asked again, the same.
        assert_eq!(flags(2, 3, 8), ATTR_SUBMOUNT);
    }

    #[test]
    fn files_of_the_same_number_that_are_mounted_for_themselves_have_different_ones_in_the_guest() {
        let nodes = Nodes::new(10);
        nodes.set_root(&entry(ROOT, libc::S_IFDIR, 7, 1).attr);
        let told = |inode, device| {
            let mut entry = entry(inode, libc::S_IFREG, device, 3);
            assert!(nodes.learn(ROOT, &mut entry));
            assert_eq!(entry.attr_flags, 0);
            let shown = nodes.shown(inode, self::entry(inode, libc::S_IFREG, device, 3).attr);
            assert_eq!(shown.st_ino, entry.attr.st_ino, "whichever way it is asked");
            shown.st_ino
        };
        assert_eq!(told(2, 7), 3, "it lies where it is");
        let numbers = [told(2, 7), told(3, 8), told(4, 9)];
        assert!(numbers[0] != numbers[1] && numbers[1] != numbers[2] && numbers[0] != numbers[2]);
        nodes.forget(3, u64::MAX);
        assert_eq!(told(5, 8), numbers[1], "known anew");
    }

    #[test]
    fn a_file_is_unchanged_only_if_it_was_seen_before_in_the_same_version() {
        let nodes = Nodes::new(10);
        assert!(!nodes.is_unchanged(5, &file(1, 100)), "unknown to the guest");
        learn(&nodes, 5);
        assert!(!nodes.is_unchanged(5, &file(1, 100)), "never opened");
        assert!(nodes.is_unchanged(5, &file(1, 100)));
        assert!(!nodes.is_unchanged(5, &file(1, 101)));
        assert!(!nodes.is_unchanged(5, &file(2, 101)));
        assert!(nodes.is_unchanged(5, &file(2, 101)));
        nodes.forget(5, 1);
        learn(&nodes, 5);
        assert!(!nodes.is_unchanged(5, &file(2, 101)), "forgotten in between");
    }

    #[test]
    fn a_file_that_has_changed_just_now_may_be_changing_still() {
        let nodes = Nodes::new(10);
        learn(&nodes, 5);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
        for ctime in [now, now + 3600] {
            nodes.is_unchanged(5, &file(1, ctime));
            assert!(!nodes.is_unchanged(5, &file(1, ctime)));
        }
    }
}
