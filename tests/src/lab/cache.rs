//! Entries that are expensive to make, kept outside the checkout under a name that is a hash of their inputs.
//!
//! An entry is made in a temporary folder beside its place, under a lock, and renamed when it is whole:
//! what is there under its name is complete. Two processes that want the same entry make it once.

use super::LabError;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Entries of a kind that stay when a new one is made: the new one and one for the branch worked on before.
const KEEP: usize = 2;

/// The folder of all entries: `$STOCKADE_CACHE`, or `/var/cache/stockade`.
pub fn root() -> PathBuf {
    std::env::var_os("STOCKADE_CACHE").map_or_else(|| "/var/cache/stockade".into(), PathBuf::from)
}

/// The entry `<kind>-<hash>`; `make` fills the folder it is given when there is none yet.
pub fn entry(
    kind: &str,
    hash: &str,
    make: impl FnOnce(&Path) -> Result<(), LabError>,
) -> Result<PathBuf, LabError> {
    let root = root();
    let place = root.join(format!("{kind}-{hash}"));
    if place.is_dir() {
        return Ok(place);
    }
    let fail = |source| LabError::Io { what: format!("use the cache {}", root.display()), source };
    fs::create_dir_all(&root).map_err(fail)?;
    let _lock = lock(&root.join(format!("{kind}.lock")), kind).map_err(fail)?;
    if place.is_dir() {
        return Ok(place);
    }
    let unfinished = format!(".{kind}-unfinished-");
    // The lock is held, so whatever is unfinished was left by a process that died.
    for left in names(&root, &unfinished) {
        let _ = fs::remove_dir_all(root.join(left));
    }
    let work = root.join(format!("{unfinished}{}", std::process::id()));
    fs::create_dir(&work).map_err(fail)?;
    if let Err(error) = make(&work) {
        let _ = fs::remove_dir_all(&work);
        return Err(error);
    }
    fs::rename(&work, &place).map_err(fail)?;
    prune(&root, kind);
    Ok(place)
}

fn lock(path: &Path, kind: &str) -> std::io::Result<Flock<File>> {
    let file = match Flock::lock(File::create(path)?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((file, nix::Error::EWOULDBLOCK)) => file,
        Err((_, error)) => return Err(error.into()),
    };
    eprintln!("{kind}: another process is making it, waiting for that");
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
}

fn names(root: &Path, prefix: &str) -> Vec<String> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect()
}

/// Removes the oldest entries of a kind. A running lab has its files open and does not mind.
fn prune(root: &Path, kind: &str) {
    let mut entries: Vec<_> = names(root, &format!("{kind}-"))
        .into_iter()
        .map(|name| root.join(name))
        .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
        .collect();
    entries.sort();
    entries.reverse();
    for (_, path) in entries.into_iter().skip(KEEP) {
        let _ = fs::remove_dir_all(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_made_once_and_a_failure_leaves_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        // SAFETY: the only test of this crate that reads or writes this variable.
        unsafe { std::env::set_var("STOCKADE_CACHE", scratch.path()) };
        let failed = entry("thing", "1", |work| {
            fs::write(work.join("half"), "half").unwrap();
            Err(LabError::Step { step: "fail".into(), log: String::new() })
        });
        assert!(failed.is_err());
        assert!(names(scratch.path(), "thing-").is_empty() && names(scratch.path(), ".thing").is_empty());

        let made = entry("thing", "1", |work| {
            fs::write(work.join("whole"), "x").unwrap();
            Ok(())
        })
        .unwrap();
        assert!(made.join("whole").is_file());
        let again = entry("thing", "1", |_| unreachable!()).unwrap();
        assert_eq!(made, again);

        for hash in ["2", "3", "4"] {
            entry("thing", hash, |_| Ok(())).unwrap();
        }
        assert_eq!(names(scratch.path(), "thing-").len(), KEEP);
    }
}
