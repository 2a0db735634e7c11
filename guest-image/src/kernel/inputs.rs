//! Everything that decides the bytes of the guest kernel: the source package, the fragment, the compiler, the
//! binutils, and this recipe. Their hash names the kernel in the cache.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::digest::sha256;
use crate::progress::Progress;
use crate::step;

/// Debian's package of the kernel source, and the file in it.
pub const SOURCE_PACKAGE: &str = "linux-source-6.12";
pub const SOURCE_TARBALL: &str = "/usr/src/linux-source-6.12.tar.xz";

/// Raised with each change of the recipe that changes the kernel's bytes or what lies in a cache entry.
const RECIPE: u32 = 1;

/// Why the inputs are not all there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tool the build needs.
    #[error("cannot run `{program}`; install the package {package}")]
    Tool { program: &'static str, package: &'static str, source: io::Error },
    /// A tool that is there and fails.
    #[error("`{0} --version` prints no version")]
    Version(&'static str),
    /// Only root can install the source.
    #[error("{SOURCE_TARBALL} is missing; run `apt-get install {SOURCE_PACKAGE}` as root")]
    NotRoot,
    /// The log of the installation cannot be placed.
    #[error("cannot create {path}", path = path.display())]
    Directory { path: PathBuf, source: io::Error },
    /// apt failed.
    #[error("installing {SOURCE_PACKAGE}")]
    Install(#[from] step::Error),
    /// The file is there but not from the package, so its version is not known.
    #[error("{SOURCE_PACKAGE} is not installed as a Debian package; run `apt-get install {SOURCE_PACKAGE}`")]
    NotInstalled,
}

/// What a kernel is made from.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Version of [`SOURCE_PACKAGE`].
    pub source_version: String,
    /// First line of `gcc --version`.
    pub compiler: String,
    /// First line of `ld --version`.
    pub linker: String,
    /// Text of the configuration fragment.
    pub fragment: String,
}

impl Inputs {
    /// What this machine would build from; installs the source package if it is missing, with its log in
    /// `log_directory`.
    pub fn of_this_machine(log_directory: &Path, fragment: &str) -> Result<Inputs, Error> {
        if !Path::new(SOURCE_TARBALL).exists() {
            install_source(log_directory)?;
        }
        Ok(Inputs {
            source_version: source_version()?,
            compiler: version("gcc", "gcc")?,
            linker: version("ld", "binutils")?,
            fragment: fragment.to_string(),
        })
    }

    /// 16 hex digits that differ when any input does.
    pub fn key(&self) -> String {
        let Inputs { source_version, compiler, linker, fragment } = self;
        let text = format!("{RECIPE}\n{source_version}\n{compiler}\n{linker}\n{fragment}");
        sha256(text.as_bytes()).chars().take(16).collect()
    }
}

fn install_source(log_directory: &Path) -> Result<(), Error> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    fs::create_dir_all(log_directory)
        .map_err(|source| Error::Directory { path: log_directory.to_owned(), source })?;
    let log = log_directory.join("apt.log");
    let _progress = Progress::start("installing the kernel source (140 MB)", None);
    for arguments in [&["update"][..], &["install", "--yes", "--no-install-recommends", SOURCE_PACKAGE]] {
        let mut command = Command::new("apt-get");
        command.arg("-q").args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        step::run("apt-get", command, &log, |_| ())?;
    }
    Ok(())
}

fn source_version() -> Result<String, Error> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Version}", SOURCE_PACKAGE])
        .output()
        .map_err(|source| Error::Tool { program: "dpkg-query", package: "dpkg", source })?;
    let version = String::from_utf8_lossy(&output.stdout).trim().to_string();
    if output.status.success() && !version.is_empty() { Ok(version) } else { Err(Error::NotInstalled) }
}

fn version(program: &'static str, package: &'static str) -> Result<String, Error> {
    let output = Command::new(program)
        .arg("--version")
        .env("LC_ALL", "C")
        .output()
        .map_err(|source| Error::Tool { program, package, source })?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .next()
        .map(|line| line.trim().to_string())
        .filter(|line| !line.is_empty())
        .ok_or(Error::Version(program))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs() -> Inputs {
        Inputs {
            source_version: "6.12.1-1".into(),
            compiler: "gcc 12".into(),
            linker: "ld 2.40".into(),
            fragment: "CONFIG_A=y\n".into(),
        }
    }

    #[test]
    fn the_key_is_the_same_for_the_same_inputs() {
        assert_eq!(inputs().key(), inputs().key());
        assert_eq!(inputs().key().len(), 16);
    }

    #[test]
    fn the_key_differs_with_each_input() {
        let others = [
            Inputs { source_version: "6.12.1-2".into(), ..inputs() },
            Inputs { compiler: "gcc 13".into(), ..inputs() },
            Inputs { linker: "ld 2.41".into(), ..inputs() },
            Inputs { fragment: "CONFIG_A=n\n".into(), ..inputs() },
        ];
        for other in others {
            assert_ne!(other.key(), inputs().key(), "{other:?}");
        }
    }

    #[test]
    fn a_missing_tool_is_named_with_its_package() {
        let error = version("stockade-no-such-tool", "some-package").unwrap_err();
        assert_eq!(error.to_string(), "cannot run `stockade-no-such-tool`; install the package some-package");
    }
}
