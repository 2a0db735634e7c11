//! How many of the host's descriptors a guest can occupy.
//!
//! Every inode that the guest's kernel has in its caches holds a descriptor here (`O_PATH`), and so does every
//! file that is open in the guest. Guests with large trees need many: the process' own limit is raised as far
//! as it goes, and the guest gets what is left after everything else, so that a guest that uses up its share
//! sees ENFILE while its streams go on.
//!
//! Not bounded is what fuse-backend-rs keeps of a file that the guest has forgotten: by which number it was known, 66 bytes
//! for each that there ever was, until the VM ends. Most file systems give the number of a removed file to the next; on
//! one that never does (tmpfs, btrfs) a guest that makes and removes files without end has the VMM grow, within its cgroup.

use crate::virtio::vsock::MAX_STREAMS;

/// Descriptors that the process asks to be allowed: the default of `fs.nr_open` in Linux. In a jail it may not raise
/// its hard limit: who starts it does.
pub const WANTED: u64 = 1 << 20;

/// Descriptors that are not the guest's files: the streams, once as socket and once on their way in, and
/// some hundred for KVM, events and files.
const RESERVED: u64 = 2 * MAX_STREAMS as u64 + 512;

/// Most files open at a time: as many as a Linux machine of some gigabytes allows in all (`fs.file-max`).
const MAX_HANDLES: u64 = 1 << 16;

/// What one guest may have at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Open files and directories.
    pub handles: usize,
    /// Inodes that the guest remembers.
    pub inodes: usize,
}

impl Limits {
    /// Raises the process' limit of open files and shares it out.
    pub fn of_process() -> Self {
        Self::share_out(raise_descriptor_limit())
    }

    fn share_out(descriptors: u64) -> Self {
        // With a tiny limit there is not enough for all; then streams and files compete for a while.
        let ours = descriptors.saturating_sub(RESERVED).max(descriptors / 2);
        let handles = MAX_HANDLES.min(ours / 4);
        Self { handles: handles as usize, inodes: (ours - handles) as usize }
    }
}

fn raise_descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel fills a structure of ours, and reads the ones below.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return 1024;
    }
    // The hard limit can be raised by root only; the soft one by everybody.
    for rlim_max in [WANTED.max(limit.rlim_max), limit.rlim_max] {
        let wanted = libc::rlimit { rlim_cur: rlim_max, rlim_max };
        // SAFETY: see above.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &wanted) } == 0 {
            return rlim_max;
        }
    }
    limit.rlim_cur
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_shared_out_without_remainder_and_never_to_nothing() {
        for descriptors in [64, 1024, 4096, 20_000, 1 << 20, u64::MAX >> 1] {
            let limits = Limits::share_out(descriptors);
            assert!(limits.handles > 0 && limits.inodes > limits.handles, "{descriptors}: {limits:?}");
            assert!(((limits.handles + limits.inodes) as u64) < descriptors);
        }
        let many = Limits::share_out(1 << 20);
        assert_eq!(many.handles, 1 << 16);
        assert!(many.inodes > 900_000);
    }
}
