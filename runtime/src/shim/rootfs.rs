//! The root filesystem that a snapshotter describes, mounted on the bundle's `rootfs`.
//!
//! It is mounted in the shim's own mount namespace, where the share is, so that it goes with the shim however that
//! ends, and is nothing that anybody else could leave mounted.

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use nix::unistd::fchdir;

/// The kernel takes a page of options, and the last byte ends the text (mount(2)).
const OPTIONS_MAX: usize = 4095;
/// Most mounts that are laid over each other on one target; a snapshotter gives one or two.
const LAYERS_MAX: usize = 64;

/// Errors of a root filesystem.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the directory for it cannot be made
    #[error("cannot make {0}: {1}")]
    Directory(PathBuf, #[source] io::Error),
    /// the kernel refuses it
    #[error("cannot mount the {kind} filesystem {from} as root: {error}")]
    Mount { kind: String, from: String, error: io::Error },
    /// it asks for something else than a mount
    #[error("cannot honour the root filesystem's {what} {value:?}: {remedy}")]
    Unsupported { what: &'static str, value: String, remedy: &'static str },
}

/// Mounts all of it, or nothing.
pub fn mount_all(mounts: &[Mount], target: &Path) -> Result<(), Error> {
    if mounts.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(target).map_err(|e| Error::Directory(target.to_owned(), e))?;
    for (index, layer) in mounts.iter().enumerate() {
        if let Err(e) = mount_one(layer, target) {
            (0..index).for_each(|_| unmount(target));
            return Err(e);
        }
    }
    Ok(())
}

/// Takes away whatever is mounted there.
pub fn unmount_all(target: &Path) {
    for _ in 0..LAYERS_MAX {
        if umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_err() {
            return;
        }
    }
}

fn unmount(target: &Path) {
    let _ = umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
}

fn mount_one(layer: &Mount, target: &Path) -> Result<(), Error> {
    if !layer.target.is_empty() {
        return Err(Error::Unsupported {
            what: "mount target",
            value: layer.target.clone(),
            remedy: "only the root itself can be mounted; use another snapshotter",
        });
    }
    let Options { flags, data } = Options::parse(&layer.options)?;
    let failed =
        |error: io::Error| Error::Mount { kind: layer.type_.clone(), from: layer.source.clone(), error };
    let bind = flags.contains(MsFlags::MS_BIND);
    let (data, base) = match layer.type_ == "overlay" && data.len() > OPTIONS_MAX {
        true => shorten(&data).ok_or_else(|| failed(nix::errno::Errno::E2BIG.into()))?,
        false => (data, None),
    };
    // Paths in the options may be relative to a directory that they have in common.
    let _there = base.map(|base| Excursion::to(&base)).transpose().map_err(failed)?;
    let first = if bind { flags & (MsFlags::MS_BIND | MsFlags::MS_REC) } else { flags };
    let data = CString::new(data).map_err(|e| failed(e.into()))?;
    mount(Some(layer.source.as_str()), target, Some(layer.type_.as_str()), first, Some(data.as_c_str()))
        .map_err(|e| failed(e.into()))?;
    let rest = flags - first;
    if bind && !rest.is_empty() {
        let again = flags | MsFlags::MS_REMOUNT;
        if let Err(e) = mount(None::<&str>, target, None::<&str>, again, None::<&str>) {
            unmount(target);
            return Err(failed(e.into()));
        }
    }
    Ok(())
}

/// Options of mount(8), apart.
struct Options {
    flags: MsFlags,
    /// What the file system itself understands.
    data: String,
}

impl Options {
    fn parse(options: &[String]) -> Result<Self, Error> {
        let mut flags = MsFlags::empty();
        let mut data = Vec::new();
        for option in options {
            let (set, flag) = match option.as_str() {
                "" | "defaults" => continue,
                "loop" => {
                    return Err(Error::Unsupported {
                        what: "mount option",
                        value: "loop".into(),
                        remedy: "image files are not mounted here; use another snapshotter",
                    });
                }
                "ro" => (true, MsFlags::MS_RDONLY),
                "rw" => (false, MsFlags::MS_RDONLY),
                "bind" => (true, MsFlags::MS_BIND),
                "rbind" => (true, MsFlags::MS_BIND | MsFlags::MS_REC),
                "nosuid" => (true, MsFlags::MS_NOSUID),
                "suid" => (false, MsFlags::MS_NOSUID),
                "nodev" => (true, MsFlags::MS_NODEV),
                "dev" => (false, MsFlags::MS_NODEV),
                "noexec" => (true, MsFlags::MS_NOEXEC),
                "exec" => (false, MsFlags::MS_NOEXEC),
                "noatime" => (true, MsFlags::MS_NOATIME),
                "atime" => (false, MsFlags::MS_NOATIME),
                "nodiratime" => (true, MsFlags::MS_NODIRATIME),
                "relatime" => (true, MsFlags::MS_RELATIME),
                "strictatime" => (true, MsFlags::MS_STRICTATIME),
                "sync" => (true, MsFlags::MS_SYNCHRONOUS),
                "dirsync" => (true, MsFlags::MS_DIRSYNC),
                // Of mount(8) alone.
                name if name.starts_with("x-") || name.starts_with("X-") => continue,
                other => {
                    data.push(other);
                    continue;
                }
            };
            flags.set(flag, set);
        }
        Ok(Options { flags, data: data.join(",") })
    }
}

/// Shortens an overlay's options: its lower directories lie below one directory, so they are named relative to it.
fn shorten(data: &str) -> Option<(String, Option<PathBuf>)> {
    let mut options: Vec<String> = data.split(',').map(str::to_owned).collect();
    let lower = options.iter_mut().find(|option| option.starts_with("lowerdir="))?;
    let paths: Vec<PathBuf> = lower["lowerdir=".len()..].split(':').map(PathBuf::from).collect();
    let mut base = paths.first()?.parent()?.to_owned();
    while !paths.iter().all(|path| path.starts_with(&base)) {
        base = base.parent()?.to_owned();
    }
    let relative: Option<Vec<_>> = paths.iter().map(|p| p.strip_prefix(&base).ok()?.to_str()).collect();
    *lower = format!("lowerdir={}", relative?.join(":"));
    let short = options.join(",");
    (short.len() <= OPTIONS_MAX).then_some((short, Some(base)))
}

/// This process in another directory, until it is dropped.
struct Excursion(std::os::fd::OwnedFd);

impl Excursion {
    fn to(directory: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let home = open(".", flags, Mode::empty())?;
        nix::unistd::chdir(directory)?;
        Ok(Excursion(home))
    }
}

impl Drop for Excursion {
    fn drop(&mut self) {
        // The directory is open: there is nothing that could fail.
        let _ = fchdir(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(list: &[&str]) -> Result<Options, Error> {
        Options::parse(&list.iter().map(|s| s.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn flags_and_data_are_told_apart_and_the_last_word_counts() {
        let parsed = options(&["rbind", "ro", "rw", "nosuid", "x-mark"]).unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_NOSUID);
        assert!(parsed.data.is_empty());
        let parsed = options(&["index=off", "lowerdir=/a:/b", "ro"]).unwrap();
        assert_eq!((parsed.data.as_str(), parsed.flags), ("index=off,lowerdir=/a:/b", MsFlags::MS_RDONLY));
        assert!(options(&["loop"]).err().unwrap().to_string().contains("loop"));
    }

    #[test]
    fn many_layers_fit_into_a_page_of_options() {
        let layers: Vec<String> = (0..120)
            .map(|n| format!("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/{n}/fs"))
            .collect();
        let data = format!("workdir=/w,upperdir=/u,lowerdir={}", layers.join(":"));
        assert!(data.len() > OPTIONS_MAX);
        let (short, base) = shorten(&data).unwrap();
        assert!(short.len() <= OPTIONS_MAX);
        assert!(short.starts_with("workdir=/w,upperdir=/u,lowerdir=0/fs:1/fs:"));
        assert_eq!(
            base.unwrap(),
            Path::new("/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots")
        );
        assert!(shorten("upperdir=/u").is_none());
    }
}
