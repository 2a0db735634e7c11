//! The volumes of a VM's containers: what they mount, once each in the share.
//!
//! The guest takes two bind mounts of one directory for two file systems: what one container maps or binds a socket
//! to, another would not find there. So containers that mount the same directory in the same way get the same one.
//! A volume that some mount read-only and others do not is two, unless it is the pod's own: what the pod may not
//! write to is read-only on the host, where the guest cannot change that. One in memory is not in the share at all:
//! see [`memory`].

mod memory;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use stockade_agent_protocol::messages::MakeVolumeRequest;

use super::share::identity;
use crate::bundle::Error;
use crate::bundle::guest::{Bind, Placed, ReadOnly};
use memory::InMemory;

/// Where they are in the share. No container's id has the character.
const DIRECTORY: &str = "=volumes";
/// Where containerd says which pod a sandbox is: its uid.
const CRI_UID: &str = "io.kubernetes.cri.sandbox-uid";
/// Where CRI-O does: the labels that kubelet gave it, as an object in JSON,
const CRI_O_LABELS: &str = "io.kubernetes.cri-o.Labels";
/// and which of them has the uid.
const UID_LABEL: &str = "io.kubernetes.pod.uid";

/// All of a pod's.
#[derive(Debug, Default)]
pub struct Volumes {
    /// Those in memory, if it is known which pod it is.
    in_memory: Option<InMemory>,
    made: usize,
    all: Vec<Volume>,
}

#[derive(Debug)]
struct Volume {
    bind: Bind,
    /// Device and inode of the source: a path may lead to something new.
    file: Option<(u64, u64)>,
    /// Containers that mount it.
    users: BTreeSet<String>,
}

impl Volumes {
    /// None yet, of the pod that a sandbox with these annotations is; its VM has so many bytes of memory.
    pub fn of(annotations: &BTreeMap<String, String>, memory: u64) -> Self {
        let label = || {
            let labels: BTreeMap<String, String> =
                serde_json::from_str(annotations.get(CRI_O_LABELS)?).ok()?;
            labels.get(UID_LABEL).cloned()
        };
        let uid = annotations.get(CRI_UID).cloned().or_else(label).filter(|uid| !uid.is_empty());
        let in_memory = uid.map(|uid| InMemory::of(&uid, memory));
        Self { in_memory, ..Self::default() }
    }

    /// Learns how much memory the VM has now.
    pub fn have_memory(&mut self, bytes: u64) {
        if let Some(in_memory) = &mut self.in_memory {
            in_memory.memory = bytes;
        }
    }

    /// Learns of what has a place in the share already.
    pub fn know(&mut self, bind: &Bind, container: &str) {
        let file = identity(&bind.source);
        self.all.push(Volume { bind: bind.clone(), file, users: [container.into()].into() });
    }

    /// Finds the place of what a container mounts. What the guest is to make for that is added to `wanted`.
    pub fn place(
        &mut self,
        bind: Bind,
        container: &str,
        wanted: &mut Vec<MakeVolumeRequest>,
    ) -> Result<Placed, Error> {
        if let Some(all) = &mut self.in_memory
            && let Some((path, request)) = all.place(&bind.source, container, bind.ids.as_ref())?
        {
            wanted.push(request);
            return Ok(Placed::InGuest(path));
        }
        let file = identity(&bind.source);
        let is_pods_own = self.in_memory.as_ref().is_some_and(|pod| pod.is_empty_dir(&bind.source));
        let readonly = if is_pods_own { ReadOnly::No } else { bind.readonly };
        let bind = Bind { readonly, ..bind };
        let same = |known: &&mut Volume| {
            let target = known.bind.target.clone();
            file.is_some() && known.file == file && known.bind == Bind { target, ..bind.clone() }
        };
        if let Some(known) = self.all.iter_mut().find(same) {
            known.users.insert(container.into());
            return Ok(Placed::Shared { target: known.bind.target.clone(), bind: None });
        }
        let target = Path::new(DIRECTORY).join(self.made.to_string());
        self.made += 1;
        let bind = Bind { target: target.clone(), ..bind };
        self.all.push(Volume { bind: bind.clone(), file, users: [container.into()].into() });
        Ok(Placed::Shared { target, bind: Some(bind) })
    }

    /// A container is gone. Returns where in the share there is what nobody mounts any more.
    pub fn leave(&mut self, container: &str) -> Vec<PathBuf> {
        let mut unused = Vec::new();
        self.all.retain_mut(|volume| {
            let left = volume.users.remove(container) && volume.users.is_empty();
            if left {
                unused.push(volume.bind.target.clone());
            }
            !left
        });
        unused
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn bind(source: &Path, readonly: ReadOnly) -> Bind {
        Bind {
            source: source.into(),
            overlay: None,
            ids: None,
            target: "c/mounts/0".into(),
            recursive: true,
            readonly,
            follows: false,
        }
    }

    fn place(volumes: &mut Volumes, bind: Bind, container: &str) -> (PathBuf, Option<Bind>) {
        match volumes.place(bind, container, &mut Vec::new()).unwrap() {
            Placed::Shared { target, bind } => (target, bind),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn containers_share_a_volume_until_the_last_of_them_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let mut volumes = Volumes::default();
        let (first, made) = place(&mut volumes, bind(dir.path(), ReadOnly::No), "a");
        let made = made.unwrap();
        assert_eq!((&made.target, made.source.as_path()), (&first, dir.path()));
        assert_eq!(place(&mut volumes, bind(dir.path(), ReadOnly::No), "b"), (first.clone(), None));
        let (readonly, made) = place(&mut volumes, bind(dir.path(), ReadOnly::Top), "b");
        assert!(made.is_some_and(|bind| bind.readonly == ReadOnly::Top));
        assert!(volumes.leave("a").is_empty());
        assert_eq!(volumes.leave("b"), [first.clone(), readonly]);
        assert_ne!(place(&mut volumes, bind(dir.path(), ReadOnly::No), "c").0, first);
    }

    #[test]
    fn a_path_that_leads_to_something_new_is_another_volume() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hosts");
        fs::write(&path, "1").unwrap();
        let mut volumes = Volumes::default();
        let (first, _) = place(&mut volumes, bind(&path, ReadOnly::No), "a");
        fs::write(dir.path().join("new"), "2").unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        assert_ne!(place(&mut volumes, bind(&path, ReadOnly::No), "b").0, first);
    }

    #[test]
    fn an_empty_directory_of_the_pod_is_one_for_readers_and_writers() {
        let dir = tempfile::tempdir().unwrap();
        let path = |uid: &str| {
            let path = dir.path().join(format!("pods/{uid}/volumes/kubernetes.io~empty-dir/v"));
            fs::create_dir_all(&path).unwrap();
            path
        };
        for (key, value) in
            [(CRI_UID, "the-pod"), (CRI_O_LABELS, r#"{"io.kubernetes.pod.uid":"the-pod","a":"b"}"#)]
        {
            let mut volumes = Volumes::of(&[(key.into(), value.into())].into(), 1 << 28);
            let (reader, made) = place(&mut volumes, bind(&path("the-pod"), ReadOnly::All), "a");
            assert_eq!(made.unwrap().readonly, ReadOnly::No);
            assert_eq!(place(&mut volumes, bind(&path("the-pod"), ReadOnly::No), "b").0, reader);
            // Another's is what this one has been given of it.
            let (_, others) = place(&mut volumes, bind(&path("another"), ReadOnly::All), "a");
            assert_eq!(others.unwrap().readonly, ReadOnly::All);
        }
        for unknown in [
            BTreeMap::new(),
            [(CRI_UID.into(), String::new())].into(),
            [(CRI_O_LABELS.into(), "no".into())].into(),
        ] {
            let mut volumes = Volumes::of(&unknown, 1 << 28);
            let (_, reader) = place(&mut volumes, bind(&path("the-pod"), ReadOnly::All), "a");
            assert_eq!(reader.unwrap().readonly, ReadOnly::All);
        }
    }
}
