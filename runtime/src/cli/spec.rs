//! `stockade spec`: a configuration to begin with, the same that runc writes.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;

use super::{Error, Outcome};
use crate::bundle::CONFIG;

/// The configuration.
pub const DEFAULT: &str = include_str!("config.json");

pub fn spec(args: liboci_cli::Spec) -> Outcome {
    if args.rootless {
        return Err(Error::Usage("--rootless cannot be honoured: stockade must run as root".into()));
    }
    let path = args.bundle.unwrap_or_else(|| ".".into()).join(CONFIG);
    let mut options = OpenOptions::new();
    match options.write(true).create_new(true).mode(0o666).open(&path) {
        Ok(mut file) => file
            .write_all(DEFAULT.as_bytes())
            .map(|()| ExitCode::SUCCESS)
            .map_err(Error::io(format!("write {}", path.display()))),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            Err(Error::Usage(format!("{} exists already: remove it first", path.display())))
        }
        Err(e) => Err(Error::Io(format!("write {}", path.display()), e)),
    }
}
