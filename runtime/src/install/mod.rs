//! Putting stockade on a host, and taking it away again: binary, guest files, and what each engine that is there must
//! be told.
//!
//! Everything is planned before anything is done, and each step knows whether it is needed: what is there already is left
//! alone, so that both can be repeated. Files are replaced whole. Of a file that is not ours only the lines between two
//! marks are, so that after uninstalling it is what it was.

mod block;
mod step;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::guest_files::{INITRD, KERNEL};
use block::Block;
pub use step::Step;

/// What the shim's name must be for the runtime type `io.containerd.stockade.v2`.
const SHIM: &str = "containerd-shim-stockade-v2";
/// Beside kernel and initrd: what they were made of.
const MANIFEST: &str = "manifest.json";

/// Errors of installing and uninstalling.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// an operation on a file failed
    #[error("cannot {0} {1}: {2}")]
    Io(&'static str, PathBuf, #[source] io::Error),
    /// somebody else's configuration cannot be added to
    #[error("{path} cannot be added to: {reason}; nothing was changed in it")]
    Config { path: PathBuf, reason: String },
    /// something of another kind is in the way
    #[error("{0} is there and not stockade's: move it away, or name another --prefix")]
    InTheWay(PathBuf),
    /// an engine does not come up again
    #[error("cannot restart {0}: {1}; look at `journalctl -u {0}`")]
    Restart(&'static str, String),
}

/// Is there, until the host's next boot, as long as engines have to be restarted for what has been changed: whoever was
/// to do it may have failed, or be gone.
const RESTART_DUE: &str = "/run/stockade-restart-due";

/// Where what goes.
#[derive(Debug)]
pub struct Layout {
    /// The root directory of the host, which is another one than ours in a container that installs.
    pub host: PathBuf,
    /// Below which there are `bin` and `lib`, as the host sees it.
    pub prefix: PathBuf,
}

impl Layout {
    /// Where we find what the host calls by this path.
    pub fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.host.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn binary(&self) -> PathBuf {
        self.prefix.join("bin/stockade")
    }

    fn shim(&self) -> PathBuf {
        self.prefix.join("bin").join(SHIM)
    }

    fn guest_dir(&self) -> PathBuf {
        self.prefix.join("lib/stockade")
    }
}

/// Something that starts containers, and has to know of stockade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Its CRI plug-in, by a block in its configuration.
    Containerd,
    /// By a file of our own.
    CriO,
    /// By a file of our own.
    Podman,
}

impl Engine {
    const ALL: [Engine; 3] = [Engine::Containerd, Engine::CriO, Engine::Podman];

    /// Its unit, where it is a service.
    pub fn unit(self) -> Option<&'static str> {
        match self {
            Engine::Containerd => Some("containerd"),
            Engine::CriO => Some("crio"),
            Engine::Podman => None,
        }
    }

    /// The directory that tells that a host has it.
    fn sign(self) -> &'static str {
        match self {
            Engine::Containerd => "/etc/containerd",
            Engine::CriO => "/etc/crio",
            Engine::Podman => "/etc/containers",
        }
    }

    /// The file in which it is told.
    fn file(self) -> &'static str {
        match self {
            Engine::Containerd => "/etc/containerd/config.toml",
            Engine::CriO => "/etc/crio/crio.conf.d/50-stockade.conf",
            Engine::Podman => "/etc/containers/containers.conf.d/stockade.conf",
        }
    }

    /// The engines of a host.
    pub fn found(layout: &Layout) -> Vec<Engine> {
        Self::ALL.into_iter().filter(|engine| layout.at(engine.sign()).is_dir()).collect()
    }

    fn step(self, layout: &Layout) -> Result<Step, Error> {
        let path = layout.at(self.file());
        let (binary, shim) = (layout.binary(), layout.shim());
        let text = match self {
            Engine::Containerd => {
                let old = read(&path)?;
                // If it cannot be asked, the words are used that every version understands.
                let version = step::on_host(&layout.host, "containerd", &["--version"]).unwrap_or_default();
                let block = Block::containerd(&path, &old, block::major(&version))?;
                return Ok(Step::Write { text: block.put_into(&path, &old)?, path });
            }
            Engine::CriO => format!(
                "[crio.runtime.runtimes.stockade]\nruntime_path = {shim:?}\nruntime_type = \"vm\"\n\
                 runtime_root = \"/run/stockade\"\nprivileged_without_host_devices = true\n"
            ),
            Engine::Podman => format!("[engine.runtimes]\nstockade = [{binary:?}]\n"),
        };
        Ok(Step::Write { path, text: format!("# Written by `stockade install`.\n{text}") })
    }
}

/// Text of a file, empty where there is none.
fn read(path: &Path) -> Result<String, Error> {
    match fs::read_to_string(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        other => other.map_err(|e| Error::Io("read", path.to_owned(), e)),
    }
}

/// What there is to do so that a host has stockade: `binary` and the files in `guest_dir` are copied.
pub fn install(layout: &Layout, binary: &Path, guest_dir: &Path) -> Result<Vec<Step>, Error> {
    let mut steps = Vec::new();
    for name in [KERNEL, INITRD, MANIFEST] {
        let from = guest_dir.join(name);
        if name != MANIFEST || from.exists() {
            steps.push(Step::Copy { from, to: layout.at(layout.guest_dir().join(name)), mode: 0o644 });
        }
    }
    // After them, since from then on it can be called.
    steps.push(Step::Copy { from: binary.to_owned(), to: layout.at(layout.binary()), mode: 0o755 });
    steps.push(Step::Link { at: layout.at(layout.shim()), to: "stockade".into() });
    for engine in Engine::found(layout) {
        steps.push(engine.step(layout)?);
    }
    Ok(steps)
}

/// What there is to do so that a host has none of it any more.
pub fn uninstall(layout: &Layout) -> Result<Vec<Step>, Error> {
    let mut steps = Vec::new();
    for engine in Engine::ALL {
        let path = layout.at(engine.file());
        if engine == Engine::Containerd {
            let old = read(&path)?;
            match Block::taken_from(&old) {
                Some(rest) if rest.is_empty() => steps.push(Step::Remove(path)),
                Some(text) => steps.push(Step::Write { path, text }),
                None => {}
            }
        } else {
            steps.push(Step::Remove(path));
        }
    }
    steps.push(Step::Remove(layout.at(layout.shim())));
    steps.push(Step::Remove(layout.at(layout.binary())));
    for name in [KERNEL, INITRD, MANIFEST] {
        steps.push(Step::Remove(layout.at(layout.guest_dir().join(name))));
    }
    steps.push(Step::RemoveDir(layout.at(layout.guest_dir())));
    Ok(steps)
}

/// Whether engines have to be restarted for what an earlier call has changed.
pub fn is_restart_due(layout: &Layout) -> bool {
    layout.at(RESTART_DUE).exists()
}

/// Notes whether they have to be.
pub fn set_restart_due(layout: &Layout, due: bool) -> Result<(), Error> {
    let note = layout.at(RESTART_DUE);
    if due {
        return Step::Write { path: note, text: String::new() }.perform();
    }
    match fs::remove_file(&note) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::Io("remove", note, e)),
        _ => Ok(()),
    }
}

/// Has an engine's unit begin anew with its configuration, by way of systemd on the host.
pub fn restart(layout: &Layout, unit: &'static str) -> Result<(), Error> {
    step::on_host(&layout.host, "systemctl", &["restart", unit])
        .map(drop)
        .map_err(|reason| Error::Restart(unit, reason))
}

#[cfg(test)]
mod tests;
