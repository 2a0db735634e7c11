//! Puts the guest files where the runtime finds them. Each is written under another name and renamed, so that
//! a virtual machine that is starting sees the old file or the new one, whole.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::cache::beside;
use crate::digest::sha256;
use crate::initrd as archive;
use crate::kernel::{RECORD, VMLINUX};
use crate::manifest::{self, Manifest};

const INITRD: &str = "initrd.img";
const MANIFEST: &str = "manifest.json";

/// Kernel and initrd together; what they cost in download and in guest memory is one of the project's promises.
const SIZE_LIMIT: u64 = 30 << 20;

/// Why the files are not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or written.
    #[error("cannot {what} {path}", path = path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
    /// The agent does not do.
    #[error("cannot make an initrd of {path}", path = path.display())]
    Initrd { path: PathBuf, source: archive::Error },
    /// The cache was tampered with.
    #[error("{path} is damaged; remove its directory and it is built again", path = path.display())]
    Cache { path: PathBuf },
}

/// Writes the initrd with the agent at `agent` to `out`.
pub fn initrd(agent: &Path, out: &Path) -> Result<manifest::File, Error> {
    let bytes = initrd_of(agent, read(agent)?)?;
    write(out, &bytes)?;
    Ok(manifest::File::of(INITRD, &bytes))
}

/// Fills `out` with the kernel of the cache entry `kernel`, an initrd with the agent at `agent`, and the
/// manifest.
pub fn all(kernel: &Path, agent: &Path, out: &Path) -> Result<Manifest, Error> {
    let record = kernel.join(RECORD);
    let record: manifest::Kernel =
        serde_json::from_slice(&read(&record)?).map_err(|_| Error::Cache { path: record.clone() })?;
    let vmlinux = kernel.join(VMLINUX);
    let vmlinux_bytes = read(&vmlinux)?;
    if sha256(&vmlinux_bytes) != record.file.sha256 {
        return Err(Error::Cache { path: vmlinux });
    }
    let agent_bytes = read(agent)?;
    let agent_sha256 = sha256(&agent_bytes);
    let initrd_bytes = initrd_of(agent, agent_bytes)?;
    let manifest = Manifest {
        stockade: env!("CARGO_PKG_VERSION").to_string(),
        kernel: record,
        initrd: manifest::Initrd { file: manifest::File::of(INITRD, &initrd_bytes), agent_sha256 },
    };

    fs::create_dir_all(out).map_err(failed("create", out))?;
    write(&out.join(VMLINUX), &vmlinux_bytes)?;
    write(&out.join(INITRD), &initrd_bytes)?;
    write(&out.join(MANIFEST), manifest::json(&manifest).as_bytes())?;
    Ok(manifest)
}

/// What to tell about files that are larger than promised; a debug build of the agent makes them so.
pub fn size_warning(manifest: &Manifest) -> Option<String> {
    let size = manifest.kernel.file.size + manifest.initrd.file.size;
    (size > SIZE_LIMIT).then(|| {
        format!("the guest files are {:.1} MiB, more than {} MiB", mebibytes(size), mebibytes(SIZE_LIMIT))
    })
}

/// `bytes` in MiB, for display.
pub fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn initrd_of(path: &Path, agent: Vec<u8>) -> Result<Vec<u8>, Error> {
    archive::build(agent).map_err(|source| Error::Initrd { path: path.to_owned(), source })
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(failed("read", path))
}

/// Leaves a file alone that already is as it should be, so that what was made from it stays up to date.
fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let new = beside(path, &format!(".{}", std::process::id()));
    fs::write(&new, bytes).map_err(failed("write", &new))?;
    fs::rename(&new, path).map_err(failed("rename into place", path))
}

fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::File { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::tests::program;

    fn cached_kernel(directory: &Path) -> PathBuf {
        let kernel = directory.join("kernel-1");
        fs::create_dir(&kernel).unwrap();
        fs::write(kernel.join(VMLINUX), "kernel").unwrap();
        let record = manifest::Kernel {
            file: manifest::File::of(VMLINUX, b"kernel"),
            release: "6.12.1".into(),
            source_package: "linux-source-6.12".into(),
            source_version: "6.12.1-1".into(),
            compiler: "gcc".into(),
            linker: "ld".into(),
            fragment_sha256: sha256(b"fragment"),
            config_sha256: sha256(b"config"),
        };
        fs::write(kernel.join(RECORD), manifest::json(&record)).unwrap();
        fs::write(directory.join("agent"), program(1)).unwrap();
        kernel
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_manifest_tells_size_and_digest_of_what_lies_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let (kernel, out) = (cached_kernel(directory.path()), directory.path().join("out"));
        all(&kernel, &directory.path().join("agent"), &out).unwrap();
        assert_eq!(names(&out), [INITRD, MANIFEST, VMLINUX]);
        let manifest: serde_json::Value =
            serde_json::from_slice(&fs::read(out.join(MANIFEST)).unwrap()).unwrap();
        for part in ["kernel", "initrd"] {
            let bytes = fs::read(out.join(manifest[part]["file"].as_str().unwrap())).unwrap();
            assert_eq!(manifest[part]["sha256"], sha256(&bytes));
            assert_eq!(manifest[part]["size"], bytes.len());
        }
        assert_eq!(manifest["initrd"]["agent_sha256"], sha256(&program(1)));
    }

    #[test]
    fn a_damaged_kernel_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = cached_kernel(directory.path());
        fs::write(kernel.join(VMLINUX), "kernex").unwrap();
        let out = directory.path().join("out");
        let error = all(&kernel, &directory.path().join("agent"), &out).unwrap_err();
        assert!(matches!(error, Error::Cache { .. }), "{error}");
        assert!(!out.exists());
    }

    #[test]
    fn files_that_did_not_change_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let (kernel, agent, out) =
            (cached_kernel(directory.path()), directory.path().join("agent"), directory.path().join("out"));
        all(&kernel, &agent, &out).unwrap();
        let modified = |name| fs::metadata(out.join(name)).unwrap().modified().unwrap();
        let before = (modified(VMLINUX), modified(INITRD));
        let mut changed = program(1);
        changed.push(0);
        fs::write(&agent, changed).unwrap();
        all(&kernel, &agent, &out).unwrap();
        assert_eq!(modified(VMLINUX), before.0);
        assert_ne!(modified(INITRD), before.1);
    }

    #[test]
    fn files_over_the_promised_size_are_warned_about() {
        let directory = tempfile::tempdir().unwrap();
        let (kernel, out) = (cached_kernel(directory.path()), directory.path().join("out"));
        let mut manifest = all(&kernel, &directory.path().join("agent"), &out).unwrap();
        assert_eq!(size_warning(&manifest), None);
        manifest.kernel.file.size = SIZE_LIMIT;
        assert!(size_warning(&manifest).unwrap().contains("30 MiB"));
    }
}
