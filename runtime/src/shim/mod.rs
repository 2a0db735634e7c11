//! `containerd-shim-stockade-v2`: containerd's door to the same sandboxes that the command line has.
//!
//! It is this binary under another name. containerd calls it to start a sandbox's shim ([`start`]), which then serves
//! the task service on a socket ([`service`]) until its last task is deleted, and beside it the sandbox service
//! ([`sandbox_service`]) for pods that are made by that; and to clean up after one that is gone ([`cleanup`]). One
//! process a sandbox: a pod with all of its containers, or a single container.
//!
//! What always holds: every change of a process's state is published once and in order; a process that ended because
//! its VM did is reported as killed; nothing outside this process's mount namespace is mounted.

mod boot;
mod bootstrap;
mod cleanup;
mod entrance;
mod error;
mod events;
mod flags;
mod hints;
mod pod;
mod pod_config;
mod process;
mod role;
mod rootfs;
mod sandbox_service;
mod service;
mod socket;
mod start;
mod stats;
mod stdio;
mod task;

use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};

use crate::cli::features;
use crate::sandbox::cgroup;
use crate::{bundle, network, sandbox, state};
use flags::Action;

/// containerd makes it of the runtime's type, `io.containerd.stockade.v2`.
const NAME: &str = "containerd-shim-stockade-v2";
/// The type.
const RUNTIME: &str = "io.containerd.stockade.v2";
/// What containerd calls the features structure of the runtime specification, which it has as JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
/// State of sandboxes lies below it, in a directory for each namespace: `stockade --root DIR list` shows them.
pub const STATE: &str = "/run/containerd/stockade";

/// What a call can fail with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Annotation(String),
    #[error("the pod {0} of this container has no shim any more: remove the pod")]
    NoPod(String),
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    #[error(transparent)]
    State(#[from] state::Error),
    #[error(transparent)]
    Network(#[from] network::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error("cannot {0}: {1}")]
    Os(&'static str, #[source] io::Error),
}

/// Whether the program's name says that it is the shim.
pub fn is_named(program: Option<&OsStr>) -> bool {
    program.and_then(|program| Path::new(program).file_name()).is_some_and(|name| name == NAME)
}

/// Does what containerd asks for.
pub fn main(process_start_ns: u64) -> ExitCode {
    let arguments = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned());
    let done = flags::parse(arguments).map_err(|e| e.to_string()).and_then(|flags| {
        match flags.action {
            Action::Start => start::start(flags, process_start_ns),
            Action::Delete => cleanup::delete(&flags),
            Action::Info => info(),
            Action::Version => version(),
        }
        .map_err(|e| e.to_string())
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            let _ = writeln!(io::stderr(), "{NAME}: {}", message.replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

/// What containerd asks before it gives a container id-mapped mounts, and kubelet before it gives a pod users of its own.
fn info() -> Result<(), Error> {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() };
    let features = features::structure().to_string();
    let features = Any { type_url: FEATURES.into(), value: features.into(), ..Default::default() };
    let info = RuntimeInfo {
        name: RUNTIME.into(),
        version: MessageField::some(version),
        features: MessageField::some(features),
        ..Default::default()
    };
    let bytes = info.write_to_bytes().map_err(|e| Error::Os("encode the answer", e.into()))?;
    io::stdout().write_all(&bytes).map_err(os("answer"))
}

fn version() -> Result<(), Error> {
    writeln!(io::stdout(), "{NAME}:\n  Version:  {}", env!("CARGO_PKG_VERSION")).map_err(os("answer"))
}

/// Where the state of a namespace's sandboxes is.
fn state_root(namespace: &str) -> PathBuf {
    Path::new(STATE).join(namespace)
}

fn os(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |e| Error::Os(what, e)
}

/// An error of the operating system in a call.
fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> error::Error {
    move |e| error::Error::Sandbox(sandbox::Error::Os(what, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_decides_the_role() {
        assert!(is_named(Some(OsStr::new("/usr/local/bin/containerd-shim-stockade-v2"))));
        assert!(is_named(Some(OsStr::new(NAME))));
        assert!(!is_named(Some(OsStr::new("stockade"))));
        assert!(!is_named(None));
    }
}
