//! Network namespaces: the one that a sandbox lives in, and how to work in one for a moment.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};
use stockade_netlink::Connection;
use stockade_netlink::route::RouteNetlinkMessage;
use stockade_netlink::route::link::{LinkFlags, LinkMessage};

use super::{Error, Record, Wired, kernel};
use crate::thread;

const OWN: &str = "/proc/self/ns/net";
/// Whoever calls may itself be in a namespace; this is where the host is.
const INIT: &str = "/proc/1/ns/net";

/// The namespace that this process has entered.
pub struct Namespace {
    path: Option<PathBuf>,
    id: (u64, u64),
    outside: File,
}

impl Namespace {
    /// Enters the one at `path`.
    pub fn enter(path: PathBuf) -> Result<Self, Error> {
        let failed = |source| Error::Enter { path: path.clone(), source };
        let outside = File::open(OWN).map_err(failed)?;
        let there = File::open(&path).map_err(failed)?;
        let id = id(&there.metadata().map_err(failed)?);
        let hosts = [std::fs::metadata(OWN), std::fs::metadata(INIT)];
        if hosts.iter().flatten().any(|host| self::id(host) == id) {
            return Err(Error::Host(path));
        }
        setns(&there, CloneFlags::CLONE_NEWNET).map_err(|e| failed(e.into()))?;
        Ok(Namespace { path: Some(path), id, outside })
    }

    /// Makes one and enters it, with its loopback interface up.
    pub fn make() -> Result<Self, Error> {
        let outside = File::open(OWN).map_err(Error::Make)?;
        unshare(CloneFlags::CLONE_NEWNET).map_err(|e| Error::Make(e.into()))?;
        let id = id(&std::fs::metadata(OWN).map_err(Error::Make)?);
        let mut loopback = LinkMessage::default();
        // The first interface of every namespace.
        loopback.header.index = 1;
        loopback.header.flags = LinkFlags::Up;
        loopback.header.change_mask = LinkFlags::Up;
        Connection::open()
            .and_then(|mut kernel| kernel.request(RouteNetlinkMessage::SetLink(loopback), 0))
            .map_err(kernel("set the loopback interface up"))?;
        Ok(Namespace { path: None, id, outside })
    }

    /// Where this process was before.
    pub fn outside(&self) -> io::Result<OwnedFd> {
        Ok(self.outside.try_clone()?.into())
    }

    /// What to remember of it.
    pub fn record(&self, interfaces: Vec<Wired>) -> Record {
        Record { path: self.path.clone(), namespace: self.id, interfaces }
    }
}

/// Does something in the namespace at `path`, if it is still the one with this id. In a thread, because a namespace
/// belongs to one; it ends with the work, so nothing else ever runs in the wrong one.
pub fn within(
    path: &Path,
    wanted: (u64, u64),
    work: impl FnOnce() -> Result<(), Error> + Send,
) -> Result<(), Error> {
    let failed = |source| Error::Enter { path: path.to_owned(), source };
    let there = match File::open(path) {
        Ok(there) => there,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
    };
    if id(&there.metadata().map_err(failed)?) != wanted {
        return Ok(());
    }
    let enter_and_work = || {
        setns(&there, CloneFlags::CLONE_NEWNET).map_err(|e| failed(e.into()))?;
        work()
    };
    thread::aside(enter_and_work).map_err(failed)?
}

fn id(of: &Metadata) -> (u64, u64) {
    (of.dev(), of.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_namespace_is_refused() {
        // Who may not look at the first process's cannot enter it either.
        for path in [OWN, INIT].into_iter().filter(|path| File::open(path).is_ok()) {
            let Err(error) = Namespace::enter(path.into()) else { panic!("{path} was entered") };
            assert!(matches!(error, Error::Host(_)), "{error}");
        }
    }

    #[test]
    fn a_namespace_that_is_gone_or_another_one_is_left_alone() {
        within(Path::new("/no/where"), (0, 0), || panic!("nowhere to work")).unwrap();
        within(Path::new(OWN), (0, 0), || panic!("the wrong place to work")).unwrap();
    }

    #[test]
    fn what_is_no_namespace_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("net");
        let error = Namespace::enter(path.clone()).err().unwrap();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        std::fs::write(&path, "").unwrap();
        assert!(matches!(Namespace::enter(path), Err(Error::Enter { .. })));
    }
}
