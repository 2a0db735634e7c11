//! Opening what lies below a directory, from which nothing may lead out.

use std::os::fd::{AsFd, OwnedFd};

use nix::NixPath;
use nix::errno::Errno;
use nix::fcntl::OpenHow;

/// How often the kernel is asked. Each time something has been renamed just then, anywhere on the host.
const TRIES: usize = 1000;

/// openat2(2), once more where the kernel could not tell whether a `..` led out, because something was renamed or
/// mounted meanwhile (EAGAIN with RESOLVE_BENEATH and RESOLVE_IN_ROOT).
pub fn openat2<P: ?Sized + NixPath>(directory: impl AsFd, path: &P, how: OpenHow) -> nix::Result<OwnedFd> {
    for _ in 1..TRIES {
        match nix::fcntl::openat2(directory.as_fd(), path, how) {
            Err(Errno::EAGAIN) => std::thread::yield_now(),
            opened => return opened,
        }
    }
    nix::fcntl::openat2(directory, path, how)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{OFlag, ResolveFlag};
    use std::fs::{self, File};
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn what_lies_below_is_opened_whatever_is_renamed_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let [root, one, other] = ["root", "one", "other"].map(|name| dir.path().join(name));
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::create_dir(&one).unwrap();
        let root = File::open(root).unwrap();
        let how = OpenHow::new().flags(OFlag::O_PATH).resolve(ResolveFlag::RESOLVE_IN_ROOT);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    fs::rename(&one, &other).unwrap();
                    fs::rename(&other, &one).unwrap();
                }
            });
            let opened = (0..200_000).try_for_each(|_| openat2(&root, "a/b/../b/../../a", how).map(drop));
            done.store(true, Ordering::Relaxed);
            assert_eq!(opened, Ok(()));
        });
    }
}
