//! Volumes of a pod that are in memory: an `emptyDir` with `medium: Memory`.
//!
//! For one kubelet mounts a tmpfs. Shared with the guest it would be the host's memory, reached through the VMM and
//! counted for no container, so each is a tmpfs of the guest's: of that size, or of the VM's memory if that is less, with
//! the mode and owner that kubelet has given it. It is there for all of the pod's containers, and until the VM ends.
//!
//! It stays the host's if there is a file in it before the first container mounts it: somebody has put that there to
//! be seen. Directories do not count, since kubelet makes those that containers mount by subPath. What has been decided
//! of a volume holds for all containers, because all have to find the same in it. Where the pod has users of its own, the
//! volume is made with the owners that its mapping shows: what containers put there has theirs anyway.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::statvfs;
use stockade_agent_protocol::messages::{MakeVolumeRequest, VolumeDirectory, VolumePart};
use stockade_agent_protocol::{POD_PARTS, POD_VOLUMES};

use crate::bundle::guest::unescape;
use crate::bundle::{Error, IdMap};

/// Most directories among which a file is looked for; who has made more is not kubelet.
const DIRECTORIES: usize = 1000;

/// Those of one pod.
#[derive(Debug)]
pub struct InMemory {
    /// Part of the paths of its empty directories, and of their parts' that kubelet binds for containers.
    volumes: String,
    parts: String,
    /// Of the VM, bytes.
    pub memory: u64,
    /// Parts so far.
    lent: u32,
    known: Vec<Known>,
}

/// A tmpfs of the host.
#[derive(Debug)]
struct Known {
    device: u64,
    /// Its number in the guest, unless it stays the host's.
    number: Option<u32>,
    /// How the first container has ids mapped.
    maps: Option<[String; 2]>,
}

impl InMemory {
    /// None yet, of the pod with this uid, whose VM has so many bytes of memory.
    pub fn of(uid: &str, memory: u64) -> Self {
        let volumes = format!("/pods/{uid}/volumes/kubernetes.io~empty-dir/");
        let parts = format!("/pods/{uid}/volume-subpaths/");
        Self { volumes, parts, memory, lent: 0, known: Vec::new() }
    }

    /// Whether a path is in a directory that kubelet makes for this pod and removes with it, in memory or not.
    pub fn is_empty_dir(&self, source: &Path) -> bool {
        source.to_string_lossy().contains(&self.volumes)
    }

    /// If a container mounts something of a volume in memory: where the guest has it, and what to have it make first.
    pub fn place(
        &mut self,
        source: &Path,
        container: &str,
        ids: Option<&IdMap>,
    ) -> Result<Option<(PathBuf, MakeVolumeRequest)>, Error> {
        let Some((device, root)) = self.tmpfs_of(source) else { return Ok(None) };
        let Some(number) = self.number(device, &root, ids)? else { return Ok(None) };
        Ok(self.lend(source, root, number, container, ids))
    }

    /// The volume in memory that a directory is of: its device and its root.
    fn tmpfs_of(&self, source: &Path) -> Option<(u64, PathBuf)> {
        let found = fs::metadata(source).ok().filter(fs::Metadata::is_dir)?;
        let root = self.volume_of(source)?;
        let device = fs::metadata(&root).ok()?.dev();
        // What is mounted elsewhere in the volume is none of it.
        (device == found.dev() && is_root_of_tmpfs(&root)).then_some((device, root))
    }

    fn lend(
        &mut self,
        source: &Path,
        root: PathBuf,
        number: u32,
        container: &str,
        ids: Option<&IdMap>,
    ) -> Option<(PathBuf, MakeVolumeRequest)> {
        let mut request = MakeVolumeRequest {
            number,
            bytes: self.size(&root),
            root: Some(directory(&root, OsStr::new(""), ids)?).into(),
            ..Default::default()
        };
        let Some(below) = path_in_file_system(source, &root) else {
            tracing::warn!(
                "{} is shared from the host: its place in the volume is not known",
                source.display()
            );
            return None;
        };
        if below.as_os_str().is_empty() {
            return Some((Path::new(POD_VOLUMES).join(number.to_string()), request));
        }
        let mut so_far = root;
        let mut path = Vec::new();
        for name in &below {
            so_far.push(name);
            path.push(directory(&so_far, name, ids)?);
        }
        self.lent += 1;
        let place = Path::new(POD_PARTS).join(container).join(self.lent.to_string());
        let part =
            VolumePart { container_id: container.into(), number: self.lent, path, ..Default::default() };
        request.part = Some(part).into();
        Some((place, request))
    }

    /// The root of the empty directory that a path is in or has been bound from.
    fn volume_of(&self, source: &Path) -> Option<PathBuf> {
        let source = source.to_str()?;
        let of = |base: &str| {
            let (before, after) = source.split_once(base)?;
            Some((before, after.split('/').next().filter(|name| !name.is_empty())?))
        };
        let (before, name) = of(&self.volumes).or_else(|| of(&self.parts))?;
        Some(format!("{before}{}{name}", self.volumes).into())
    }

    /// The volume's number, if it is the guest's.
    fn number(&mut self, device: u64, root: &Path, ids: Option<&IdMap>) -> Result<Option<u32>, Error> {
        let maps = ids.map(IdMap::maps);
        if let Some(known) = self.known.iter().find(|known| known.device == device) {
            return match known.number {
                Some(_) if known.maps != maps => Err(Error::Unsupported {
                    field: format!("uidMappings of the mount of {}", root.display()),
                    reason: "another container of the pod mounts this volume in memory with other mappings; give both \
                             the same",
                }),
                number => Ok(number),
            };
        }
        let number = u32::try_from(self.known.len()).ok().filter(|_| !has_file(root));
        self.known.push(Known { device, number, maps });
        Ok(number)
    }

    /// What fits into the volume on the host, but no more than the VM has.
    fn size(&self, root: &Path) -> u64 {
        let of_host = statvfs(root).map_or(0, |of| of.blocks().saturating_mul(of.fragment_size()));
        // A tmpfs without a limit has 0 blocks.
        Some(of_host).filter(|bytes| *bytes > 0).map_or(self.memory, |bytes| bytes.min(self.memory))
    }
}

fn is_root_of_tmpfs(path: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|found| found.dev()).ok();
    matches!(statfs(path), Ok(found) if found.filesystem_type() == TMPFS_MAGIC)
        && device(path) != device(&path.join(".."))
}

/// Whether there is anything but directories below one, or more of these than it is worth to look through.
fn has_file(root: &Path) -> bool {
    let mut open = vec![root.to_owned()];
    let mut seen = 0;
    while let Some(directory) = open.pop() {
        seen += 1;
        let Ok(entries) = fs::read_dir(&directory) else { return true };
        for entry in entries {
            match entry.and_then(|entry| Ok((entry.file_type()?, entry.path()))) {
                Ok((typ, path)) if typ.is_dir() && seen + open.len() < DIRECTORIES => open.push(path),
                _ => return true,
            }
        }
    }
    false
}

/// Where a directory of the tmpfs at `root` is in that: it is below, or has been bound from there.
fn path_in_file_system(source: &Path, root: &Path) -> Option<PathBuf> {
    let below = match source.strip_prefix(root) {
        Ok(below) => below.to_owned(),
        Err(_) => root_of_mount(&fs::read_to_string("/proc/self/mountinfo").ok()?, source)?,
    };
    below.components().all(|part| matches!(part, Component::Normal(_))).then_some(below)
}

/// What of its file system is mounted at a path, relative to the file system's root.
fn root_of_mount(mountinfo: &str, point: &Path) -> Option<PathBuf> {
    // proc_pid_mountinfo(5): the fourth field is the root of the mount in its file system, the fifth the mount point; of
    // several at one place the last lies on top.
    let fields = mountinfo.lines().rev().map(|line| line.split(' ').skip(3));
    let mut at_point = fields.filter_map(|mut fields| {
        let root = unescape(fields.next()?);
        (unescape(fields.next()?) == point).then_some(root)
    });
    Some(at_point.next()?.strip_prefix("/").ok()?.to_owned())
}

fn directory(path: &Path, name: &OsStr, ids: Option<&IdMap>) -> Option<VolumeDirectory> {
    let found = fs::metadata(path).ok()?;
    let of_host = (found.uid(), found.gid());
    let (uid, gid) = ids.map_or(of_host, |ids| ids.shown(of_host.0, of_host.1));
    Some(VolumeDirectory {
        name: name.as_bytes().into(),
        mode: found.mode() & 0o7777,
        uid,
        gid,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::share::tests::in_namespace;
    use nix::mount::{MsFlags, mount};
    use std::os::unix::fs::PermissionsExt;

    const MEMORY: u64 = 1 << 28;

    /// kubelet's directory for a volume of the pod.
    fn made(kubelet: &Path, volume: &str) -> PathBuf {
        let path = kubelet.join("pods/the-pod/volumes").join(volume);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn tmpfs(at: &Path, options: &str) {
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options)).unwrap();
    }

    #[test]
    fn an_empty_tmpfs_of_the_pod_is_the_guests_with_its_size_and_mode() {
        let dir = tempfile::tempdir().unwrap();
        in_namespace(|| {
            let root = made(dir.path(), "kubernetes.io~empty-dir/v");
            tmpfs(&root, "size=1m");
            fs::set_permissions(&root, PermissionsExt::from_mode(0o2777)).unwrap();
            let large = made(dir.path(), "kubernetes.io~empty-dir/large");
            tmpfs(&large, "size=1t");
            let mut all = InMemory::of("the-pod", MEMORY);
            let (path, request) = all.place(&root, "a", None).unwrap().unwrap();
            assert_eq!(path, Path::new("/run/stockade/pod/volumes/0"));
            assert_eq!((request.bytes, request.root.mode, request.part.is_none()), (1 << 20, 0o2777, true));
            let (path, request) = all.place(&large, "a", None).unwrap().unwrap();
            assert_eq!((path, request.bytes), ("/run/stockade/pod/volumes/1".into(), MEMORY));
            // What appears on the host later changes nothing.
            fs::write(root.join("file"), "").unwrap();
            assert_eq!(
                all.place(&root, "b", None).unwrap().unwrap().0,
                Path::new("/run/stockade/pod/volumes/0")
            );
            assert_eq!(all.place(&root.join("file"), "b", None).unwrap(), None);
        });
    }

    #[test]
    fn a_volume_has_the_owners_that_the_pods_mapping_shows() {
        let dir = tempfile::tempdir().unwrap();
        in_namespace(|| {
            let root = made(dir.path(), "kubernetes.io~empty-dir/v");
            tmpfs(&root, "size=1m,gid=2000");
            fs::create_dir(root.join("part")).unwrap();
            let ids = IdMap::of_containerd("0:100000:65536", "0:200000:65536").unwrap();
            let mut all = InMemory::of("the-pod", MEMORY);
            let (_, request) = all.place(&root.join("part"), "a", Some(&ids)).unwrap().unwrap();
            assert_eq!((request.root.uid, request.root.gid), (100_000, 202_000));
            let part = &request.part.path[0];
            assert_eq!((part.uid, part.gid), (100_000, 200_000));
            assert!(all.place(&root, "b", Some(&ids)).unwrap().is_some());
            let error = all.place(&root, "c", None).unwrap_err().to_string();
            assert!(error.contains("other mappings"), "{error}");
        });
    }

    #[test]
    fn a_part_is_found_where_kubelet_has_bound_it() {
        let dir = tempfile::tempdir().unwrap();
        in_namespace(|| {
            let root = made(dir.path(), "kubernetes.io~empty-dir/v");
            tmpfs(&root, "size=1m");
            fs::create_dir_all(root.join("a/b c")).unwrap();
            fs::set_permissions(root.join("a"), PermissionsExt::from_mode(0o711)).unwrap();
            let part = dir.path().join("pods/the-pod/volume-subpaths/v/main/0");
            fs::create_dir_all(&part).unwrap();
            mount(Some(&root.join("a/b c")), &part, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
            let mut all = InMemory::of("the-pod", MEMORY);
            for source in [part, root.join("a/b c")] {
                let (path, request) = all.place(&source, "main", None).unwrap().unwrap();
                let part = request.part.unwrap();
                assert_eq!(path, Path::new("/run/stockade/pod/parts/main").join(part.number.to_string()));
                let path: Vec<_> = part.path.iter().map(|part| (part.name.as_slice(), part.mode)).collect();
                assert_eq!((path[0], path[1].0, path.len()), ((&b"a"[..], 0o711), &b"b c"[..], 2));
            }
        });
    }

    #[test]
    fn all_else_stays_the_hosts() {
        let dir = tempfile::tempdir().unwrap();
        in_namespace(|| {
            let mut all = InMemory::of("the-pod", MEMORY);
            let mut stays = |source: &Path| {
                assert_eq!(all.place(source, "a", None).unwrap(), None, "{}", source.display())
            };
            stays(&made(dir.path(), "kubernetes.io~empty-dir/on-disk"));
            let secret = made(dir.path(), "kubernetes.io~projected/token");
            tmpfs(&secret, "");
            stays(&secret);
            let others = dir.path().join("pods/other/volumes/kubernetes.io~empty-dir/v");
            fs::create_dir_all(&others).unwrap();
            tmpfs(&others, "");
            stays(&others);
            let filled = made(dir.path(), "kubernetes.io~empty-dir/filled");
            tmpfs(&filled, "");
            fs::create_dir(filled.join("sub")).unwrap();
            fs::write(filled.join("sub/file"), "").unwrap();
            stays(&filled);
            fs::remove_file(filled.join("sub/file")).unwrap();
            stays(&filled);
            stays(&filled.join("sub"));
            let below = made(dir.path(), "kubernetes.io~empty-dir/below");
            tmpfs(&below, "");
            fs::create_dir(below.join("mounted")).unwrap();
            tmpfs(&below.join("mounted"), "");
            stays(&below.join("mounted"));
            stays(&dir.path().join("pods/the-pod/volumes/kubernetes.io~empty-dir/none"));
        });
    }

    #[test]
    fn the_mount_on_top_counts() {
        let mountinfo = "1 0 0:5 / /v rw - tmpfs tmpfs rw\n2 1 0:6 /a\\040b /v rw - tmpfs tmpfs rw\n\
                         3 1 0:7 /c /v/c rw - tmpfs tmpfs rw\n";
        assert_eq!(root_of_mount(mountinfo, Path::new("/v")).unwrap(), Path::new("a b"));
        assert_eq!(root_of_mount(mountinfo, Path::new("/w")), None);
    }
}
