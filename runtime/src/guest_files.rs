//! The two files beside the binary: guest kernel and initrd.
//!
//! They are opened here and travel as descriptors from then on, so what was checked is what is booted.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::config::{ENV_GUEST_DIR, Settings};

/// Name of the guest kernel, an uncompressed ELF file.
pub const KERNEL: &str = "vmlinux";
/// Name of the initrd.
pub const INITRD: &str = "initrd.img";

/// Where packages put them, after the places beside the binary.
const SYSTEM: [&str; 2] = ["/usr/lib/stockade", "/usr/local/lib/stockade"];

/// Kernel and initrd, open.
#[derive(Debug)]
pub struct GuestFiles {
    /// Where both were found.
    pub dir: PathBuf,
    /// The kernel.
    pub kernel: File,
    /// The initrd.
    pub initrd: File,
}

/// Errors of the guest files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// they are nowhere
    #[error(
        "no guest kernel found: looked for {KERNEL} in {0}; build it with `make image` or name its directory in {ENV_GUEST_DIR}"
    )]
    Missing(String),
    /// one cannot be opened
    #[error(
        "cannot open {0}: {1}; build the guest files with `make image` or name their directory in {ENV_GUEST_DIR}"
    )]
    Open(PathBuf, #[source] io::Error),
    /// the kernel is something else
    #[error("{0} is no kernel: it must be an uncompressed 64-bit x86 ELF file (vmlinux, not bzImage)")]
    NotElf(PathBuf),
    /// the initrd is something else
    #[error("{0} is no initrd: it must be a cpio archive (newc), not compressed")]
    NotCpio(PathBuf),
}

impl GuestFiles {
    /// Finds and opens both.
    pub fn open(settings: &Settings) -> Result<Self, Error> {
        match &settings.guest_dir {
            Some(dir) => Self::open_in(dir.clone()),
            None => {
                let dirs = usual_dirs();
                match dirs.iter().find(|dir| dir.join(KERNEL).exists()) {
                    Some(dir) => Self::open_in(dir.clone()),
                    None => {
                        let dirs: Vec<_> = dirs.iter().map(|d| d.display().to_string()).collect();
                        Err(Error::Missing(dirs.join(", ")))
                    }
                }
            }
        }
    }

    fn open_in(dir: PathBuf) -> Result<Self, Error> {
        let open = |name: &str| {
            let path = dir.join(name);
            File::open(&path).map_err(|e| Error::Open(path.clone(), e))
        };
        let kernel = open(KERNEL)?;
        // ELF magic, 64 bit, little endian (ELF specification, e_ident); e_machine 62 at offset 18 is x86-64.
        let head: [u8; 20] = read_head(&kernel);
        if head[..6] != *b"\x7fELF\x02\x01" || head[18..] != [62, 0] {
            return Err(Error::NotElf(dir.join(KERNEL)));
        }
        let initrd = open(INITRD)?;
        if read_head(&initrd) != *b"070701" {
            return Err(Error::NotCpio(dir.join(INITRD)));
        }
        Ok(GuestFiles { dir, kernel, initrd })
    }
}

/// The first bytes of a file, zeros where it is shorter or cannot be read.
fn read_head<const N: usize>(file: &File) -> [u8; N] {
    let mut head = [0; N];
    match file.read_exact_at(&mut head, 0) {
        Ok(()) => head,
        Err(_) => [0; N],
    }
}

/// `../lib/stockade` and the binary's own directory, then the system's.
fn usual_dirs() -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    if let Ok(binary) = std::env::current_exe()
        && let Some(dir) = binary.parent()
    {
        dirs.extend(dir.parent().map(|up| up.join("lib/stockade")));
        dirs.push(dir.to_owned());
    }
    dirs.extend(SYSTEM.map(PathBuf::from));
    dirs.dedup_by(|a, b| Path::eq(a, b));
    dirs
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn settings(dir: &Path) -> Settings {
        Settings { guest_dir: Some(dir.to_owned()), ..Settings::default() }
    }

    fn elf() -> Vec<u8> {
        let mut head = b"\x7fELF\x02\x01\x01".to_vec();
        head.resize(64, 0);
        head[18] = 62;
        head
    }

    #[test]
    fn what_is_not_a_kernel_is_refused_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let open = || GuestFiles::open(&settings(dir.path()));
        assert!(matches!(open(), Err(Error::Open(path, _)) if path.ends_with(KERNEL)));
        fs::write(dir.path().join(KERNEL), "no kernel").unwrap();
        assert!(matches!(open(), Err(Error::NotElf(_))));
        fs::write(dir.path().join(KERNEL), elf()).unwrap();
        assert!(matches!(open(), Err(Error::Open(path, _)) if path.ends_with(INITRD)));
        fs::write(dir.path().join(INITRD), b"070701rest").unwrap();
        open().unwrap();
        for bad in [&b""[..], b"MZ", b"\x7fELF\x01\x01", b"#!/bin/sh\n and more text here"] {
            fs::write(dir.path().join(KERNEL), bad).unwrap();
            assert!(matches!(open(), Err(Error::NotElf(_))));
        }
        fs::write(dir.path().join(KERNEL), elf()).unwrap();
        fs::write(dir.path().join(INITRD), b"\x1f\x8b\x08 gzip").unwrap();
        assert!(matches!(open(), Err(Error::NotCpio(_))));
    }
}
