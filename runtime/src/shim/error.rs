//! What a call to the shim can fail with, and the code that containerd makes its own error of.

use ttrpc::{Code, get_status};

use super::{rootfs, stdio};
use crate::printable::error_line;
use crate::{bundle, sandbox, state};

/// Errors of a call.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the container or the exec is not there (any more)
    #[error("{0}: not found")]
    NotFound(String),
    /// the id is taken
    #[error("{0} exists already")]
    Exists(String),
    /// it is in the wrong state for this
    #[error("{0}")]
    Precondition(String),
    /// the request makes no sense
    #[error("{0}")]
    Invalid(String),
    /// this runtime does not do it
    #[error("{0}")]
    Unimplemented(&'static str),
    /// the sandbox's VM could not be started or has ended
    #[error("{0}")]
    Gone(String),
    /// of the bundle
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    /// of the root filesystem
    #[error(transparent)]
    Rootfs(#[from] rootfs::Error),
    /// of the streams
    #[error(transparent)]
    Stdio(#[from] stdio::Error),
    /// of the sandbox
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// of the state directory
    #[error(transparent)]
    State(#[from] state::Error),
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::Exists(_) => Code::ALREADY_EXISTS,
            Error::Precondition(_) => Code::FAILED_PRECONDITION,
            Error::Invalid(_) | Error::Bundle(_) | Error::Stdio(_) => Code::INVALID_ARGUMENT,
            Error::Unimplemented(_) => Code::UNIMPLEMENTED,
            Error::Gone(_) | Error::Rootfs(_) | Error::Sandbox(_) | Error::State(_) => Code::UNKNOWN,
        };
        ttrpc::Error::RpcStatus(get_status(code, error_line(&error)))
    }
}
