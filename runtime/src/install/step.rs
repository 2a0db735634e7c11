//! The steps of a plan: what each does, and how it tells of it.

use std::fmt;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Error;

/// One change of the host's files.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// A file is to be the same as another.
    Copy { from: PathBuf, to: PathBuf, mode: u32 },
    /// A symbolic link is to lead there.
    Link { at: PathBuf, to: PathBuf },
    /// A file is to have this text.
    Write { path: PathBuf, text: String },
    /// There is to be no such file.
    Remove(PathBuf),
    /// There is to be no such directory, once it is empty.
    RemoveDir(PathBuf),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Step::Copy { from, to, .. } => write!(f, "copy {} to {}", from.display(), to.display()),
            Step::Link { at, to } => write!(f, "link {} to {}", at.display(), to.display()),
            Step::Write { path, .. } => write!(f, "write {}", path.display()),
            Step::Remove(path) => write!(f, "remove {}", path.display()),
            Step::RemoveDir(path) => write!(f, "remove the directory {}", path.display()),
        }
    }
}

impl Step {
    /// Whether there is nothing to do.
    pub fn is_done(&self) -> bool {
        match self {
            Step::Copy { from, to, mode } => {
                let is = |mode: &u32| {
                    fs::metadata(to).is_ok_and(|meta| meta.permissions().mode() & 0o7777 == *mode)
                };
                is(mode) && same_content(from, to).unwrap_or(false)
            }
            Step::Link { at, to } => fs::read_link(at).is_ok_and(|target| target == *to),
            Step::Write { path, text } => fs::read(path).is_ok_and(|old| old == text.as_bytes()),
            Step::Remove(path) | Step::RemoveDir(path) => path.symlink_metadata().is_err(),
        }
    }

    /// Does it.
    pub fn perform(&self) -> Result<(), Error> {
        match self {
            Step::Copy { from, to, mode } => {
                let mut file = File::open(from).map_err(|e| Error::Io("read", from.clone(), e))?;
                replace(to, *mode, |new| io::copy(&mut file, new).map(drop))
            }
            Step::Link { at, to } => {
                match at.symlink_metadata() {
                    Ok(meta) if meta.is_symlink() => fs::remove_file(at).map_err(failed("replace", at))?,
                    Ok(_) => return Err(Error::InTheWay(at.clone())),
                    Err(_) => make_parent(at)?,
                }
                symlink(to, at).map_err(failed("make", at))
            }
            Step::Write { path, text } => {
                let mode = fs::metadata(path).map_or(0o644, |meta| meta.permissions().mode() & 0o7777);
                replace(path, mode, |new| new.write_all(text.as_bytes()))
            }
            Step::Remove(path) => fs::remove_file(path).map_err(failed("remove", path)),
            Step::RemoveDir(path) => match fs::remove_dir(path) {
                // Somebody has put something else there.
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
                other => other.map_err(failed("remove", path)),
            },
        }
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |e| Error::Io(what, path, e)
}

fn make_parent(path: &Path) -> Result<(), Error> {
    path.parent().map_or(Ok(()), |dir| fs::create_dir_all(dir).map_err(failed("make the directory of", path)))
}

/// Writes a file beside it and puts that in its place, so that there is never half a file, nor one that is in use.
fn replace(path: &Path, mode: u32, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), Error> {
    make_parent(path)?;
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    let result = File::create(&new).and_then(|mut file| {
        fill(&mut file)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&new, path)
    });
    result.map_err(|e| {
        let _ = fs::remove_file(&new);
        Error::Io("write", path.to_owned(), e)
    })
}

fn same_content(one: &Path, other: &Path) -> io::Result<bool> {
    if fs::metadata(one)?.len() != fs::metadata(other)?.len() {
        return Ok(false);
    }
    Ok(fs::read(one)? == fs::read(other)?)
}

/// Runs a program of the host's there: what it writes, or if it fails, what it says.
pub fn on_host(host: &Path, program: &str, words: &[&str]) -> Result<String, String> {
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null());
    if host != Path::new("/") {
        let host = host.to_owned();
        // SAFETY: chroot(2) and chdir(2) are system calls, with a path that was made before the fork.
        unsafe {
            command.pre_exec(move || {
                nix::unistd::chroot(&host)?;
                Ok(nix::unistd::chdir("/")?)
            });
        }
        // Its own search path may be none that the host has.
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    }
    match command.output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(said.lines().next().map_or(format!("{program} failed"), str::to_owned))
        }
        Err(e) => Err(format!("{program}: {e}")),
    }
}
