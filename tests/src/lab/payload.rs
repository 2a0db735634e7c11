//! The payload: what a run brings into the lab, seen there read-only under `/payload`.
//!
//! It travels as an ext4 image that `mke2fs -d` makes without root or loop device. By convention `bin/` is
//! on the lab's PATH and `lib/stockade/` holds the guest files, where `bin/stockade` finds them.

use super::LabError;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Files and folders of the build machine with their places under `/payload`.
#[derive(Debug, Clone, Default)]
pub struct Payload {
    entries: Vec<(PathBuf, PathBuf)>,
}

impl Payload {
    /// An empty payload.
    pub fn new() -> Payload {
        Payload::default()
    }

    /// Puts the file or folder `host` at `/payload/<inside>`. Symbolic links inside a folder stay links.
    pub fn add(&mut self, host: impl Into<PathBuf>, inside: impl Into<PathBuf>) -> &mut Payload {
        self.entries.push((host.into(), inside.into()));
        self
    }

    /// Writes the image to `image`; `scratch` is an empty folder to lay the tree out in.
    pub(super) fn write_image(&self, image: &Path, scratch: &Path) -> Result<(), LabError> {
        let mut bytes = 0;
        for (host, inside) in &self.entries {
            bytes += lay_out(host, &scratch.join(inside))?;
        }
        // ext4 without a journal needs a few per cent for its tables; the file is sparse, so room costs nothing.
        let mib = bytes / (1 << 20) * 5 / 4 + 16;
        let output = Command::new("/sbin/mke2fs")
            .args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"])
            .args([scratch, image])
            .arg(format!("{mib}M"))
            .output()
            .map_err(|source| LabError::Io { what: "run mke2fs".into(), source })?;
        if output.status.success() {
            return Ok(());
        }
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(LabError::Step { step: "make the payload image (mke2fs)".into(), log })
    }
}

/// Copies (by hard link where that is possible) `from` to `to` and returns the bytes of its files.
fn lay_out(from: &Path, to: &Path) -> Result<u64, LabError> {
    let fail = |source| LabError::Io { what: format!("put {} into the payload", from.display()), source };
    // What is named by the caller may be a link (target/debug); what lies inside a folder is kept as it is.
    let from = &fs::canonicalize(from).map_err(fail)?;
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(fail)?;
    }
    copy_tree(from, to).map_err(fail)
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<u64> {
    let metadata = fs::symlink_metadata(from)?;
    if metadata.is_symlink() {
        std::os::unix::fs::symlink(fs::read_link(from)?, to)?;
        return Ok(0);
    }
    if !metadata.is_dir() {
        if fs::hard_link(from, to).is_err() {
            fs::copy(from, to)?;
        }
        return Ok(metadata.len());
    }
    fs::create_dir_all(to)?;
    fs::set_permissions(to, metadata.permissions())?;
    let mut bytes = 4096;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        bytes += copy_tree(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(bytes)
}
