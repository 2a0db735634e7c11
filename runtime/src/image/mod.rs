//! From an image to a container without any daemon.
//!
//! An image is named ([`reference`]), looked up where it is ([`layout`], [`registry`]), brought into the store that
//! all runs share ([`pull`], [`unpack`], [`store`]), stacked into a root filesystem ([`scratch`]), and its
//! configuration made into a bundle's ([`spec`]). From there on it is a bundle like any other.
//!
//! Everything about an image comes from strangers: names, numbers and paths in it are checked where they are read,
//! and content is used under its digest only. What pulls is a process of its own, so that a supervisor has none of
//! the memory and none of the threads that took.

mod compression;
mod credentials;
mod digest;
mod dns;
mod files;
pub mod flags;
mod layout;
mod manifest;
pub mod progress;
mod pull;
pub mod reference;
mod registry;
pub mod scratch;
mod seccomp;
mod spec;
pub mod store;
mod tarball;
mod tree;
mod trust;
mod unpack;
mod users;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, pipe2};

use crate::bundle::{self, Bundle};
use crate::sandbox;
use flags::{Flags, Pull};
use pull::Source;
use reference::Reference;
use scratch::{Root, Scratch};
use store::{Record, Store};

/// Longest host name (gethostname(2), HOST_NAME_MAX), without the NUL.
const HOST_NAME_MAX: usize = 63;

/// Errors of images.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// of a pull
    #[error(transparent)]
    Pull(#[from] pull::Error),
    /// of the store
    #[error(transparent)]
    Store(#[from] store::Error),
    /// of the container's root filesystem
    #[error(transparent)]
    Scratch(#[from] scratch::Error),
    /// of the image's documents
    #[error(transparent)]
    Manifest(#[from] manifest::Error),
    /// of the user it wants
    #[error(transparent)]
    User(#[from] users::Error),
    /// of the configuration
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// of the bundle that was made of it
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    /// no mount namespace
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// it may not be pulled
    #[error("{0} is not in the image store: pull it with `stockade image pull`, or run without --pull never")]
    NotThere(String),
    /// the process that pulls says so
    #[error("{0}")]
    Puller(String),
    /// something of the operating system
    #[error("cannot {0}: {1}")]
    Os(&'static str, #[source] io::Error),
}

/// A container's bundle, made from an image.
pub struct Prepared {
    /// The bundle.
    pub bundle: Bundle,
    /// Its directory; whoever ends the container removes it.
    pub scratch: Scratch,
}

/// Makes a bundle of an image, for a container whose state will be in `state`. This process must have one thread; it
/// is in a mount namespace of its own afterwards.
pub fn prepare(
    reference: &Reference,
    flags: &Flags,
    args: &[String],
    id: &str,
    state: &Path,
) -> Result<Prepared, Error> {
    let store = Store::open(&flags.store.path())?;
    let using = store.share()?;
    let record = find_or_pull(&store, reference, flags.pull)?;
    scratch::clear(&store)?;
    let scratch = Scratch::create(&store, &record.layers, state)?;
    drop(using);
    match furnish(&store, &record, &scratch, flags, args, id) {
        Ok(bundle) => Ok(Prepared { bundle, scratch }),
        Err(e) => {
            scratch.remove();
            Err(e)
        }
    }
}

fn furnish(
    store: &Store,
    record: &Record,
    scratch: &Scratch,
    flags: &Flags,
    args: &[String],
    id: &str,
) -> Result<Bundle, Error> {
    let config = manifest::config(&store.blob(&record.config)?)?;
    sandbox::share::enter_namespace(false).map_err(sandbox::Error::from)?;
    let root = scratch.mount(store)?;

    let image = config.config().clone().unwrap_or_default();
    let wanted = flags.user.clone().or_else(|| image.user().clone()).unwrap_or_default();
    let user = users::find(&wanted, &root.read("/etc/passwd"), &root.read("/etc/group"))?;
    let hostname = flags.hostname.clone().unwrap_or_else(|| id.chars().take(HOST_NAME_MAX).collect());
    let volumes = volumes(&root, image.volumes().as_deref().unwrap_or_default(), flags)?;
    let parts =
        spec::Parts { config: &config, flags, args, user: &user, hostname: &hostname, volumes: &volumes };
    let (spec, cwd) = spec::convert(&parts)?;
    root.make_dir(&cwd).map_err(|e| Error::Os("make the working directory in the image", e))?;
    root.write("/etc", "hostname", &format!("{hostname}\n"))?;
    root.write("/etc", "hosts", &format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost {hostname}\n"))?;

    let path = scratch.path().join(bundle::CONFIG);
    let written = fs::write(&path, spec.to_string());
    written.map_err(|source| scratch::Error::Io { what: "write", path, source })?;
    Ok(Bundle::load(scratch.path())?)
}

/// Sees to it that the image's volumes are there. With a read-only root they are mounts of their own, of the same
/// directories.
fn volumes(root: &Root, volumes: &[String], flags: &Flags) -> Result<Vec<(String, String)>, Error> {
    let mut mounts = Vec::new();
    for volume in volumes {
        let path = format!("/{}", volume.trim_matches('/'));
        if path == "/" || flags.volume.iter().any(|own| own.destination.trim_end_matches('/') == path) {
            continue;
        }
        let source = root.resolve(&path).map_err(|e| Error::Os("make a volume of the image", e))?;
        if flags.read_only {
            mounts.push((path, source.to_string_lossy().into_owned()));
        }
    }
    mounts.sort();
    Ok(mounts)
}

/// What a reference means now.
fn find_or_pull(store: &Store, reference: &Reference, pull: Pull) -> Result<Record, Error> {
    let name = reference.to_string();
    let complete = |record: &Record| {
        record.layers.iter().all(|layer| store.has_layer(layer)) && store.blob(&record.config).is_ok()
    };
    let known = store.find(&name)?.filter(complete);
    // What lies on the host is looked at each time: its documents cost little.
    let known = match (known, reference) {
        (Some(record), Reference::Registry(_)) => (pull != Pull::Always).then_some(record),
        (Some(record), _) => {
            let image = Source::open(reference)?.resolve()?;
            (digest::Digest::of(&image.manifest) == record.manifest
                && digest::Digest::of(&image.config) == record.config)
                .then_some(record)
        }
        (None, _) => None,
    };
    match known {
        Some(record) => Ok(record),
        None if pull == Pull::Never => Err(Error::NotThere(name)),
        None => {
            apart(|| Ok(pull::pull(store, reference).map(drop)?))?;
            store.find(&name)?.ok_or(Error::NotThere(name))
        }
    }
}

/// Pulls an image, whether it is there or not.
pub fn pull(store: &Store, reference: &Reference) -> Result<Record, Error> {
    let _using = store.share()?;
    Ok(pull::pull(store, reference)?)
}

/// Does something in a process of its own, which dies with this one.
fn apart(work: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
    let os = |what| move |e: nix::Error| Error::Os(what, e.into());
    let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(os("make a pipe"))?;
    let parent = nix::unistd::getpid();
    // SAFETY: this process has one thread, so the child may do all that the parent may.
    match unsafe { fork() }.map_err(os("start a process to pull the image"))? {
        ForkResult::Child => {
            drop(read);
            // SAFETY: prctl(2) with integers only.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            if nix::unistd::getppid() != parent {
                std::process::exit(1);
            }
            let code = match work() {
                Ok(()) => 0,
                Err(e) => {
                    let _ = File::from(write).write_all(e.to_string().as_bytes());
                    1
                }
            };
            std::process::exit(code)
        }
        ForkResult::Parent { child } => {
            drop(write);
            let mut message = String::new();
            let read = File::from(read).read_to_string(&mut message);
            let ended = loop {
                match waitpid(child, None) {
                    Err(nix::Error::EINTR) => {}
                    other => break other.map_err(os("wait for the process that pulls the image"))?,
                }
            };
            match ended {
                WaitStatus::Exited(_, 0) => Ok(()),
                _ if read.is_ok() && !message.is_empty() => Err(Error::Puller(message)),
                other => Err(Error::Puller(format!(
                    "the process that pulls the image ended without a word ({other:?}): try again"
                ))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_process_that_pulls_is_this_ones() {
        apart(|| Ok(())).unwrap();
        let error = apart(|| Err(Error::NotThere("x".into()))).unwrap_err();
        assert_eq!(error.to_string(), Error::NotThere("x".into()).to_string());
        let error = apart(|| {
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
            Ok(())
        });
        assert!(error.unwrap_err().to_string().contains("SIGKILL"));
    }
}
