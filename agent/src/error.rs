//! Errors of the agent: what the host is told, each one sentence with a ttrpc code.

use std::io;

use ttrpc::{Code, get_status};

/// The codes' meanings are part of the contract: see the top of `agent.proto`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request or a field of the spec is malformed or cannot be honoured.
    #[error("{0}")]
    Invalid(String),
    /// No such container or process, or it is in the wrong state for this call.
    #[error("{0}")]
    Precondition(String),
    /// The id is taken.
    #[error("{0}")]
    Exists(String),
    /// The command of a container or exec was not found.
    #[error("{0}")]
    CommandNotFound(String),
    /// The command of a container or exec cannot be executed.
    #[error("{0}")]
    CommandNotExecutable(String),
    /// The kernel refused something.
    #[error("{what}: {source}")]
    Os {
        /// What was being done, with its object.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else that went wrong inside the guest.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// An error of the kernel while doing `what`.
    pub fn os(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error::Os { what: what.into(), source: source.into() }
    }

    fn code(&self) -> Code {
        match self {
            Error::Invalid(_) => Code::INVALID_ARGUMENT,
            Error::Precondition(_) => Code::FAILED_PRECONDITION,
            Error::Exists(_) => Code::ALREADY_EXISTS,
            Error::CommandNotFound(_) => Code::NOT_FOUND,
            Error::CommandNotExecutable(_) => Code::PERMISSION_DENIED,
            Error::Os { .. } | Error::Internal(_) => Code::INTERNAL,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(e: Error) -> Self {
        ttrpc::Error::RpcStatus(get_status(e.code(), e.to_string()))
    }
}
