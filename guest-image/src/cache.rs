//! The cache of artefacts that take minutes to make, outside any checkout.
//!
//! What always holds: an entry's name contains a hash of all its inputs, so an entry is never stale; it comes
//! to its name by one rename after it is complete, so an entry that is there can be used; and it is made under
//! a lock, so that two processes never make the same one at once. What an interrupted process left is removed
//! by the next that makes the entry.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Where the cache is when `$STOCKADE_CACHE` does not say otherwise.
const DEFAULT_ROOT: &str = "/var/cache/stockade";

/// Why an entry can be neither found nor made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {path} in the cache; set STOCKADE_CACHE to a directory that can be written", path = path.display())]
pub struct Error {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// How an entry was come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It was there, or another process made it while this one waited.
    Reused,
    /// It was made now.
    Built,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::Reused => "reused from the cache",
            Origin::Built => "built",
        })
    }
}

/// The cache directory: `$STOCKADE_CACHE`, or [`DEFAULT_ROOT`].
pub fn root() -> PathBuf {
    std::env::var_os("STOCKADE_CACHE")
        .filter(|value| !value.is_empty())
        .map_or(DEFAULT_ROOT.into(), PathBuf::from)
}

/// Returns the directory `root`/`name`. If it does not exist, `build` fills an empty directory beside it, which
/// then takes its name.
pub fn ensure<E: From<Error>>(
    root: &Path,
    name: &str,
    build: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(PathBuf, Origin), E> {
    let entry = root.join(name);
    if entry.is_dir() {
        return Ok((entry, Origin::Reused));
    }
    fs::create_dir_all(root).map_err(failed("create", root))?;
    let _lock = lock(&root.join(format!("{name}.lock")))?;
    if entry.is_dir() {
        return Ok((entry, Origin::Reused));
    }
    let partial = beside(&entry, ".partial");
    remove(&partial)?;
    fs::create_dir(&partial).map_err(failed("create", &partial))?;
    if let Err(error) = build(&partial) {
        // The first error is the one to tell; what stays is removed by the next attempt.
        let _ = fs::remove_dir_all(&partial);
        return Err(error);
    }
    fs::rename(&partial, &entry).map_err(failed("rename into place", &entry))?;
    Ok((entry, Origin::Built))
}

/// `path` with `suffix` behind its last component.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Takes the lock of one entry and says so when that means to wait. It is released when the value is dropped,
/// and by the kernel when the process dies. The file stays: removing it would let two processes hold "the" lock.
fn lock(path: &Path) -> Result<Flock<File>, Error> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(failed("open", path))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, Errno::EWOULDBLOCK)) => {
            eprintln!("another process is making {}; waiting for it", path.with_extension("").display());
            Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, errno)| failed("lock", path)(errno.into()))
        }
        Err((_, errno)) => Err(failed("lock", path)(errno.into())),
    }
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    fn write(directory: &Path) -> Result<(), Error> {
        fs::write(directory.join("file"), "content").map_err(failed("write", directory))
    }

    #[test]
    fn makes_an_entry_once() {
        let root = tempfile::tempdir().unwrap();
        let (entry, origin) = ensure(root.path(), "kernel-1", write).unwrap();
        assert_eq!(origin, Origin::Built);
        assert_eq!(fs::read_to_string(entry.join("file")).unwrap(), "content");
        let again = ensure::<Error>(root.path(), "kernel-1", |_| panic!("made twice")).unwrap();
        assert_eq!(again, (entry, Origin::Reused));
    }

    #[test]
    fn a_failed_build_leaves_no_entry() {
        let root = tempfile::tempdir().unwrap();
        let refused = ensure(root.path(), "kernel-1", |directory| {
            write(directory)?;
            Err(failed("test", directory)(io::Error::other("refused")))
        });
        assert!(refused.is_err());
        assert!(!root.path().join("kernel-1").exists());
        assert!(!root.path().join("kernel-1.partial").exists());
        assert_eq!(ensure(root.path(), "kernel-1", write).unwrap().1, Origin::Built);
    }

    #[test]
    fn what_an_interrupted_build_left_is_not_used() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("kernel-1.partial")).unwrap();
        fs::write(root.path().join("kernel-1.partial/half"), "").unwrap();
        let (entry, _) = ensure(root.path(), "kernel-1", write).unwrap();
        assert!(!entry.join("half").exists());
    }

    #[test]
    fn of_two_at_once_the_second_gets_what_the_first_made() {
        let root = tempfile::tempdir().unwrap();
        let (builds, start) = (AtomicUsize::new(0), Barrier::new(4));
        let entries: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        ensure(root.path(), "kernel-1", |directory| {
                            builds.fetch_add(1, Ordering::SeqCst);
                            write(directory)
                        })
                        .unwrap()
                        .0
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(builds.load(Ordering::SeqCst), 1);
        assert!(entries.iter().all(|entry| entry.join("file").exists()));
    }

    #[test]
    fn a_root_that_cannot_be_written_is_named_with_the_remedy() {
        let error = ensure(Path::new("/proc/stockade"), "kernel-1", write).unwrap_err();
        assert!(error.to_string().contains("create /proc/stockade"), "{error}");
        assert!(error.to_string().contains("STOCKADE_CACHE"), "{error}");
    }
}
