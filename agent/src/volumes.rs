//! Volumes of a pod that are in the guest's memory: a tmpfs each, which the pod's containers mount.
//!
//! A container may mount a part of one (a subPath), and others of the pod write to the volume meanwhile. So a part is
//! looked for with the volume's root as root, where no link leads out, and what was found is bound to a place of the
//! agent's own: the container's mount is made from there, whatever has become of the path.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, mkdirat};
use nix::unistd::{Gid, Uid, fchown};
use stockade_agent_protocol::messages::{MakeVolumeRequest, VolumeDirectory, VolumePart};
use stockade_agent_protocol::{POD_PARTS, POD_VOLUMES, check_id};
use stockade_sys::inside::openat2;

use crate::error::Error;

/// Of a mode, what can be set: the permissions, and the three bits above them.
const MODE: u32 = 0o7777;

/// Does what the request asks for.
pub fn make(request: &MakeVolumeRequest) -> Result<(), Error> {
    let place = Path::new(POD_VOLUMES).join(request.number.to_string());
    let failed = |e: std::io::Error| Error::os(format!("making a tmpfs on {}", place.display()), e);
    if !is_mounted(&place).map_err(failed)? {
        fs::create_dir_all(&place).map_err(failed)?;
        let VolumeDirectory { mode, uid, gid, .. } = request.root.clone().unwrap_or_default();
        // A size of 0 would be none.
        let options = format!("size={},mode={:o},uid={uid},gid={gid}", request.bytes.max(1), mode & MODE);
        mount(Some("tmpfs"), &place, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
            .map_err(|e| failed(e.into()))?;
    }
    match request.part.as_ref() {
        None => Ok(()),
        Some(part) => lend(&place, part),
    }
}

/// Whether a directory is there and the root of a file system.
fn is_mounted(place: &Path) -> std::io::Result<bool> {
    let parent = place.parent().unwrap_or(place);
    match (fs::metadata(place), fs::metadata(parent)) {
        (Ok(it), Ok(parent)) => Ok(it.dev() != parent.dev()),
        (Err(e), _) | (_, Err(e)) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        (Err(e), _) | (_, Err(e)) => Err(e),
    }
}

/// Binds a part of a volume to its place.
fn lend(volume: &Path, part: &VolumePart) -> Result<(), Error> {
    check_id(&part.container_id).map_err(|e| Error::Invalid(format!("container_id: {e}")))?;
    let root = File::open(volume).map_err(|e| Error::os(format!("opening {}", volume.display()), e))?;
    let found = walk(root.as_fd(), &part.path)?;
    let place = Path::new(POD_PARTS).join(&part.container_id).join(part.number.to_string());
    let failed = |e: std::io::Error| Error::os(format!("preparing {}", place.display()), e);
    // Of a container that was not made in the end.
    remove(&place);
    fs::create_dir_all(place.parent().unwrap_or(&place)).map_err(failed)?;
    let stat = fstat(&found).map_err(|e| failed(e.into()))?;
    match kind(&stat) {
        SFlag::S_IFDIR => fs::create_dir(&place).map_err(failed)?,
        SFlag::S_IFREG => drop(File::create_new(&place).map_err(failed)?),
        _ => {
            return Err(Error::Invalid(format!(
                "{} of a volume in memory is neither a directory nor a file",
                shown(&part.path)
            )));
        }
    }
    let source = format!("/proc/self/fd/{}", found.as_raw_fd());
    mount(Some(source.as_str()), &place, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|e| failed(e.into()))
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// Goes down from the root of a volume, making what is missing, and returns what is there, opened for its path only.
/// Links are followed as if that root were `/`.
fn walk(root: std::os::fd::BorrowedFd, path: &[VolumeDirectory]) -> Result<OwnedFd, Error> {
    let how = |flags| {
        let flags = flags | OFlag::O_PATH | OFlag::O_CLOEXEC;
        OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS)
    };
    let failed = |e: Errno| Error::os(format!("finding {} in a volume in memory", shown(path)), e);
    let mut so_far = PathBuf::from("/");
    for directory in path {
        let name = Path::new(OsStr::from_bytes(&directory.name));
        let mut parts = name.components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(only)), None) if only == name.as_os_str())
        {
            return Err(Error::Invalid(format!("{name:?} is no name of a directory")));
        }
        let parent = openat2(root, &so_far, how(OFlag::O_DIRECTORY)).map_err(failed)?;
        so_far.push(name);
        match openat2(root, &so_far, how(OFlag::empty())) {
            Ok(_) => {}
            Err(Errno::ENOENT) => make_directory(&parent, name, directory).map_err(failed)?,
            Err(e) => return Err(failed(e)),
        }
    }
    openat2(root, &so_far, how(OFlag::empty())).map_err(failed)
}

/// What else comes in its place meanwhile stays as it is: only a directory is changed, and never through a link.
fn make_directory(parent: &OwnedFd, name: &Path, wanted: &VolumeDirectory) -> nix::Result<()> {
    mkdirat(parent, name, Mode::S_IRWXU)?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let made = openat(parent, name, flags, Mode::empty())?;
    fchown(&made, Some(Uid::from_raw(wanted.uid)), Some(Gid::from_raw(wanted.gid)))?;
    fchmod(&made, Mode::from_bits_truncate(wanted.mode & MODE))
}

fn shown(path: &[VolumeDirectory]) -> String {
    path.iter().map(|directory| format!("/{}", String::from_utf8_lossy(&directory.name))).collect()
}

/// Takes away the parts that were prepared for a container.
pub fn remove_parts(container: &str) {
    let dir = Path::new(POD_PARTS).join(container);
    for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
        remove(&entry.path());
    }
    let _ = fs::remove_dir(dir);
}

fn remove(place: &Path) {
    while umount2(place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
    let _ = fs::remove_dir(place).or_else(|_| fs::remove_file(place));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn directory(name: &str, mode: u32) -> VolumeDirectory {
        let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        VolumeDirectory { name: name.into(), mode, uid, gid, ..Default::default() }
    }

    fn found(root: &Path, path: &[VolumeDirectory]) -> Result<PathBuf, Error> {
        let found = walk(File::open(root).unwrap().as_fd(), path)?;
        Ok(fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).unwrap())
    }

    #[test]
    fn missing_directories_are_made_as_they_are_on_the_host_and_others_stay() {
        let volume = tempfile::tempdir().unwrap();
        let root = volume.path().canonicalize().unwrap();
        let path = [directory("a", 0o2775), directory("b", 0o700)];
        assert_eq!(found(&root, &path).unwrap(), root.join("a/b"));
        let mode = |name: &str| fs::metadata(root.join(name)).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode("a"), mode("a/b")), (0o2775, 0o700));
        fs::set_permissions(root.join("a"), PermissionsExt::from_mode(0o711)).unwrap();
        found(&root, &path).unwrap();
        assert_eq!(mode("a"), 0o711);
        fs::write(root.join("file"), "").unwrap();
        assert_eq!(found(&root, &[directory("file", 0o755)]).unwrap(), root.join("file"));
        assert_eq!(found(&root, &[]).unwrap(), root);
    }

    #[test]
    fn no_link_and_no_name_leads_out_of_a_volume() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap().join("volume");
        let outside = root.with_file_name("outside");
        fs::create_dir_all(root.join("outside")).unwrap();
        fs::create_dir(&outside).unwrap();
        symlink("../outside", root.join("up")).unwrap();
        symlink(&outside, root.join("absolute")).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        assert_eq!(found(&root, &[directory("up", 0o755)]).unwrap(), root.join("outside"));
        assert_eq!(
            found(&root, &[directory("up", 0o755), directory("new", 0o755)]).unwrap(),
            root.join("outside/new")
        );
        for path in [
            ["absolute", "x"],
            ["dangling", "x"],
            ["..", "outside"],
            ["a/b", "c"],
            [".", "c"],
            ["", "c"],
            ["a/", "c"],
        ] {
            let error = found(&root, &path.map(|name| directory(name, 0o755))).unwrap_err();
            assert!(!error.to_string().is_empty(), "{path:?}");
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }
}
