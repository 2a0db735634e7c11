//! The image store: what has been pulled and unpacked, shared by all runs on the host.
//!
//! ```text
//! <store>/blobs/sha256/<hex>    manifests and image configurations
//! <store>/layers/<hex>/         unpacked layers by diff id: fs/, and size, implicit
//! <store>/partial/<hex>-<hex>   a layer on its way, by its diff id and its digest: what has been downloaded, and the
//!                               lock of who does it
//! <store>/images/<hex>.json     which image a reference meant when it was pulled
//! <store>/containers/<name>/    root filesystems of containers, see `scratch`
//! ```
//!
//! What has its final name is complete and verified: everything is written under another name, flushed, and renamed.
//! So whatever is killed, and whenever, nothing half-made is ever used. Who uses images holds the store's lock
//! shared until a container's directory names the layers it needs; who removes things holds it alone.

use std::ffi::CString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::tree;

/// Where the store is unless `--image-store` or [`ENV`] say otherwise.
pub const DEFAULT: &str = "/var/lib/stockade";
/// Environment variable that names another place.
pub const ENV: &str = "STOCKADE_IMAGE_STORE";
/// Manifests, indexes and configurations: what registries take at most (distribution specification, pushing
/// manifests).
pub const DOCUMENT_MAX: u64 = 4 << 20;

const BLOBS: &str = "blobs/sha256";
const LAYERS: &str = "layers";
const PARTIAL: &str = "partial";
const IMAGES: &str = "images";
const CONTAINERS: &str = "containers";
const LOCK: &str = "lock";

/// What can go wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// an operation failed
    #[error("cannot {what} {path}: {source}{}", remedy(.source))]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    /// a file is not what we wrote
    #[error("{0} is damaged: remove it, and pull the image again")]
    Damaged(PathBuf),
}

fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => {
            "; make room there, with `stockade image prune` for example, or name another place with --image-store"
        }
        _ => "",
    }
}

/// The store.
#[derive(Clone, Debug)]
pub struct Store {
    path: PathBuf,
}

/// Which image a reference meant when it was pulled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// As it is shown.
    pub reference: String,
    /// Of the image's manifest.
    pub manifest: Digest,
    /// Of its configuration.
    pub config: Digest,
    /// Diff ids of its layers, the lowest first.
    pub layers: Vec<Digest>,
    /// When it was pulled, RFC 3339.
    pub pulled: String,
}

impl Store {
    /// Opens a store, and makes it where there is none.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |what| move |source| Error::Io { what, path: path.to_owned(), source };
        let path = std::path::absolute(path).map_err(failed("use"))?;
        let store = Store { path };
        if !store.path.join(LOCK).exists() {
            // Images can hold secrets of those who may pull them, and set-uid programs.
            for name in [BLOBS, LAYERS, PARTIAL, IMAGES, CONTAINERS] {
                let dir = store.path.join(name);
                DirBuilder::new().mode(0o700).recursive(true).create(&dir).map_err(failed("make"))?;
            }
            let mut options = OpenOptions::new();
            options
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(store.path.join(LOCK))
                .map_err(failed("make"))?;
        }
        Ok(store)
    }

    /// Keeps others from removing anything until the result is dropped.
    pub fn share(&self) -> Result<Flock<File>, Error> {
        self.lock(FlockArg::LockShared)
    }

    /// Waits until nobody is about to use anything, and keeps others out until the result is dropped.
    pub fn claim(&self) -> Result<Flock<File>, Error> {
        self.lock(FlockArg::LockExclusive)
    }

    fn lock(&self, how: FlockArg) -> Result<Flock<File>, Error> {
        let path = self.path.join(LOCK);
        let failed = |source| Error::Io { what: "lock", path: path.clone(), source };
        let file = File::open(&path).map_err(failed)?;
        flock(file, how).map_err(failed)
    }

    /// Where containers' root filesystems are.
    pub fn containers(&self) -> PathBuf {
        self.path.join(CONTAINERS)
    }

    /// The tree of a layer.
    pub fn layer(&self, diff_id: &Digest) -> PathBuf {
        self.path.join(LAYERS).join(diff_id.hex()).join("fs")
    }

    /// Whether a layer is there.
    pub fn has_layer(&self, diff_id: &Digest) -> bool {
        self.path.join(LAYERS).join(diff_id.hex()).is_dir()
    }

    /// Directories of a layer whose metadata is a lower layer's; see [`super::unpack::Unpacked`].
    pub fn implicit(&self, diff_id: &Digest) -> Result<Vec<Vec<u8>>, Error> {
        let path = self.path.join(LAYERS).join(diff_id.hex()).join("implicit");
        match fs::read(&path) {
            Ok(text) => Ok(text.split(|b| *b == 0).filter(|p| !p.is_empty()).map(<[u8]>::to_vec).collect()),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(Error::Io { what: "read", path, source }),
        }
    }

    /// Bytes of a layer's files, 0 if it is not there.
    pub fn layer_size(&self, diff_id: &Digest) -> u64 {
        let path = self.path.join(LAYERS).join(diff_id.hex()).join("size");
        fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    /// Waits until nobody else brings this layer from an archive of this digest, and keeps others from doing so until the
    /// result is dropped. A diff id is what an image says of itself: who brings something else for it is in nobody's way.
    pub fn begin_layer(&self, diff_id: &Digest, digest: &Digest) -> Result<Arrival, Error> {
        let name = format!("{}-{}", diff_id.hex(), digest.hex());
        let path = self.path.join(PARTIAL).join(&name);
        let failed = |source| Error::Io { what: "open", path: path.clone(), source };
        loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let file = options.custom_flags(libc::O_NOFOLLOW).open(&path).map_err(failed)?;
            let file = flock(file, FlockArg::LockExclusive).map_err(failed)?;
            // Who had it before may have finished and removed it.
            let (ours, there) = (file.metadata().map_err(failed)?, fs::symlink_metadata(&path));
            if there.is_ok_and(|there| there.ino() == ours.ino()) {
                return Ok(Arrival { store: self.clone(), diff_id: diff_id.clone(), name, file, path });
            }
        }
    }

    /// A blob, checked against its digest.
    pub fn blob(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        let path = self.path.join(BLOBS).join(digest.hex());
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(DOCUMENT_MAX).read_to_end(&mut bytes))
            .map_err(|source| Error::Io { what: "read", path: path.clone(), source })?;
        if Digest::of(&bytes) == *digest { Ok(bytes) } else { Err(Error::Damaged(path)) }
    }

    /// Adds a blob.
    pub fn add_blob(&self, bytes: &[u8]) -> Result<Digest, Error> {
        let digest = Digest::of(bytes);
        self.write(&self.path.join(BLOBS).join(digest.hex()), bytes)?;
        Ok(digest)
    }

    /// What a reference meant when it was last pulled.
    pub fn find(&self, reference: &str) -> Result<Option<Record>, Error> {
        let path = self.record_path(reference);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|_| Error::Damaged(path)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::Io { what: "read", path, source }),
        }
    }

    /// Notes what a reference means.
    pub fn save(&self, record: &Record) -> Result<(), Error> {
        let path = self.record_path(&record.reference);
        let text = serde_json::to_vec(record).map_err(|e| Error::Io {
            what: "write",
            path: path.clone(),
            source: e.into(),
        })?;
        self.write(&path, &text)
    }

    /// All records, by their references. What cannot be read is passed over: it is of no use to anybody.
    pub fn records(&self) -> Result<Vec<Record>, Error> {
        let mut records: Vec<Record> = self
            .names(IMAGES)?
            .iter()
            .filter_map(|name| fs::read(self.path.join(IMAGES).join(name)).ok())
            .filter_map(|text| serde_json::from_slice(&text).ok())
            .collect();
        records.sort_by(|a, b| a.reference.cmp(&b.reference));
        Ok(records)
    }

    /// Forgets a reference. Its content stays until [`Store::sweep`].
    pub fn forget(&self, reference: &str) -> Result<(), Error> {
        let path = self.record_path(reference);
        fs::remove_file(&path).map_err(|source| Error::Io { what: "remove", path, source })
    }

    fn record_path(&self, reference: &str) -> PathBuf {
        self.path.join(IMAGES).join(format!("{}.json", Digest::of(reference.as_bytes()).hex()))
    }

    /// Removes what neither a record nor one of `pinned` layers needs; the store must be claimed. The number of
    /// bytes that layers had.
    pub fn sweep(&self, pinned: &[Digest]) -> Result<u64, Error> {
        let records = self.records()?;
        let layers: Vec<_> = records.iter().flat_map(|r| &r.layers).chain(pinned).map(Digest::hex).collect();
        let blobs: Vec<_> = records.iter().flat_map(|r| [r.manifest.hex(), r.config.hex()]).collect();
        let mut freed = 0;
        for name in self.names(LAYERS)?.into_iter().filter(|name| !layers.contains(&name.as_str())) {
            if let Ok(diff_id) = format!("sha256:{name}").parse() {
                freed += self.layer_size(&diff_id);
            }
            self.remove(LAYERS, &name)?;
        }
        for name in self.names(BLOBS)?.into_iter().filter(|name| !blobs.contains(&name.as_str())) {
            self.remove(BLOBS, &name)?;
        }
        // Nobody is bringing anything now.
        for name in self.names(PARTIAL)? {
            self.remove(PARTIAL, &name)?;
        }
        Ok(freed)
    }

    fn names(&self, dir: &str) -> Result<Vec<String>, Error> {
        let path = self.path.join(dir);
        let failed = |source| Error::Io { what: "list", path: path.clone(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&path).map_err(failed)? {
            if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn remove(&self, dir: &str, name: &str) -> Result<(), Error> {
        let path = self.path.join(dir);
        let name = CString::new(name).map_err(io::Error::from);
        name.and_then(|name| tree::remove(File::open(&path)?, &name)).map_err(|source| Error::Io {
            what: "remove from",
            path,
            source,
        })
    }

    /// A file with this content, or none.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        let failed = |source| Error::Io { what: "write", path: path.to_owned(), source };
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let new = path.with_extension(format!("new-{}-{number}", std::process::id()));
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&new, path));
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        written.map_err(failed)
    }
}

/// A layer that this process, and no other, brings into the store from an archive.
pub struct Arrival {
    store: Store,
    diff_id: Digest,
    name: String,
    file: Flock<File>,
    path: PathBuf,
}

impl Arrival {
    /// What has been downloaded of it so far, by whomever.
    pub fn partial(&self) -> &File {
        &self.file
    }

    /// An empty directory for its tree, in the file system that it shall be in.
    pub fn room(&self) -> Result<PathBuf, Error> {
        let name = self.room_name();
        // Of one who was killed.
        self.store.remove(LAYERS, &name)?;
        let path = self.store.path.join(LAYERS).join(name).join("fs");
        let made = DirBuilder::new().mode(0o755).recursive(true).create(&path);
        made.map_err(|source| Error::Io { what: "make", path: path.clone(), source })?;
        Ok(path)
    }

    fn room_name(&self) -> String {
        format!("{}.new", self.name)
    }

    /// The tree in [`Arrival::room`] is complete: the layer is in the store from now on. Somebody who had it from another
    /// archive may have been faster.
    pub fn complete(self, size: u64, implicit: &[u8]) -> Result<(), Error> {
        let layers = self.store.path.join(LAYERS);
        let (new, path) = (layers.join(self.room_name()), layers.join(self.diff_id.hex()));
        let settle = || {
            fs::write(new.join("size"), size.to_string())?;
            if !implicit.is_empty() {
                fs::write(new.join("implicit"), implicit)?;
            }
            // After a power failure a name must not stand for files whose content was never written.
            let dir = File::open(&new)?;
            // SAFETY: syncfs(2) takes a descriptor, which is open.
            if unsafe { libc::syncfs(dir.as_raw_fd()) } != 0 {
                return Err(io::Error::last_os_error());
            }
            fs::rename(&new, &path)?;
            File::open(&layers)?.sync_all()
        };
        match settle() {
            Ok(()) => self.finish(),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EEXIST | libc::ENOTEMPTY)) => self.abandon(false),
            Err(source) => {
                self.abandon(false);
                return Err(Error::Io { what: "complete", path, source });
            }
        }
        Ok(())
    }

    /// The layer is there, or will not come: what was downloaded is of no use any more.
    pub fn finish(self) {
        let _ = fs::remove_file(&self.path);
    }

    /// Removes the tree, and what was downloaded unless it can be gone on with.
    pub fn abandon(self, keep_partial: bool) {
        if let Err(e) = self.store.remove(LAYERS, &self.room_name()) {
            tracing::warn!("{e}");
        }
        if !keep_partial || self.file.metadata().map_or(0, |m| m.len()) == 0 {
            self.finish();
        }
    }
}

/// flock(2), however often it is interrupted.
pub fn flock(mut file: File, how: FlockArg) -> io::Result<Flock<File>> {
    loop {
        match Flock::lock(file, how) {
            Ok(lock) => return Ok(lock),
            Err((again, Errno::EINTR)) => file = again,
            Err((_, e)) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("not/yet")).unwrap();
        (dir, store)
    }

    fn record(reference: &str, layers: &[&Digest], store: &Store) -> Record {
        let record = Record {
            reference: reference.into(),
            manifest: store.add_blob(b"{}").unwrap(),
            config: store.add_blob(reference.as_bytes()).unwrap(),
            layers: layers.iter().map(|l| (*l).clone()).collect(),
            pulled: "2026-01-01T00:00:00Z".into(),
        };
        store.save(&record).unwrap();
        record
    }

    fn add_layer(store: &Store, content: &str) -> Digest {
        let diff_id = Digest::of(content.as_bytes());
        let arrival = store.begin_layer(&diff_id, &diff_id).unwrap();
        fs::write(arrival.room().unwrap().join("file"), content).unwrap();
        arrival.complete(content.len() as u64, b"a\0b/c").unwrap();
        diff_id
    }

    #[test]
    fn a_layer_is_there_when_it_is_complete_and_not_before() {
        let (_dir, store) = store();
        let diff_id = Digest::of(b"x");
        let arrival = store.begin_layer(&diff_id, &diff_id).unwrap();
        let room = arrival.room().unwrap();
        fs::write(room.join("half"), "").unwrap();
        assert!(!store.has_layer(&diff_id));
        // Whoever made that was killed.
        drop(arrival);
        let arrival = store.begin_layer(&diff_id, &diff_id).unwrap();
        assert_eq!(fs::read_dir(arrival.room().unwrap()).unwrap().count(), 0);
        arrival.complete(5, b"").unwrap();
        assert!(store.has_layer(&diff_id));
        assert!(store.layer(&diff_id).is_dir());
        assert_eq!(store.layer_size(&diff_id), 5);
        assert!(store.names(PARTIAL).unwrap().is_empty());
    }

    #[test]
    fn a_layer_that_cannot_be_completed_leaves_nothing() {
        let (_dir, store) = store();
        let diff_id = Digest::of(b"layer");
        let arrival = store.begin_layer(&diff_id, &diff_id).unwrap();
        arrival.room().unwrap();
        arrival.partial().write_all(b"downloaded").unwrap();
        // Where its tree is to be.
        fs::write(store.layer(&diff_id).parent().unwrap(), "in the way").unwrap();
        arrival.complete(10, &[]).unwrap_err();
        assert_eq!(store.names(PARTIAL).unwrap(), [""; 0]);
        assert_eq!(store.names(LAYERS).unwrap(), [diff_id.hex()]);
    }

    #[test]
    fn one_brings_a_layer_and_the_others_find_it_there() {
        let (_dir, store) = store();
        let made = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let diff_id = Digest::of(b"shared");
                    let arrival = store.begin_layer(&diff_id, &diff_id).unwrap();
                    if store.has_layer(&diff_id) {
                        return arrival.finish();
                    }
                    made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    arrival.room().unwrap();
                    arrival.complete(0, b"").unwrap();
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
        assert!(store.names(PARTIAL).unwrap().is_empty());
    }

    #[test]
    fn who_brings_a_layer_from_another_archive_is_in_nobodys_way() {
        let (_dir, store) = store();
        let diff_id = Digest::of(b"layer");
        let slow = store.begin_layer(&diff_id, &Digest::of(b"one")).unwrap();
        slow.partial().write_all(b"garbage").unwrap();
        fs::write(slow.room().unwrap().join("file"), "slow").unwrap();
        let fast = store.begin_layer(&diff_id, &Digest::of(b"other")).unwrap();
        assert_eq!(fast.partial().metadata().unwrap().len(), 0);
        fs::write(fast.room().unwrap().join("file"), "fast").unwrap();
        fast.complete(4, b"").unwrap();
        slow.complete(4, b"").unwrap();
        assert_eq!(fs::read_to_string(store.layer(&diff_id).join("file")).unwrap(), "fast");
        assert_eq!(store.names(LAYERS).unwrap(), [diff_id.hex()]);
        assert_eq!(store.names(PARTIAL).unwrap(), [""; 0]);
    }

    #[test]
    fn a_partial_download_is_found_again_unless_it_is_of_no_use() {
        let (_dir, store) = store();
        let diff_id = Digest::of(b"x");
        let arrival = store.begin_layer(&diff_id, &diff_id).unwrap();
        arrival.partial().write_all(b"half").unwrap();
        arrival.room().unwrap();
        arrival.abandon(true);
        assert!(store.names(LAYERS).unwrap().is_empty());
        let arrival = store.begin_layer(&diff_id, &diff_id).unwrap();
        assert_eq!(arrival.partial().metadata().unwrap().len(), 4);
        arrival.abandon(false);
        assert!(store.names(PARTIAL).unwrap().is_empty());
    }

    #[test]
    fn a_blob_that_has_changed_is_not_used() {
        let (_dir, store) = store();
        let digest = store.add_blob(b"content").unwrap();
        assert_eq!(store.blob(&digest).unwrap(), b"content");
        fs::write(store.path.join(BLOBS).join(digest.hex()), "changed").unwrap();
        assert!(matches!(store.blob(&digest), Err(Error::Damaged(_))));
    }

    #[test]
    fn records_are_found_by_reference() {
        let (_dir, store) = store();
        assert_eq!(store.find("r.example/x:1").unwrap(), None);
        let written = record("r.example/x:1", &[], &store);
        record("r.example/a:1", &[], &store);
        assert_eq!(store.find("r.example/x:1").unwrap(), Some(written));
        let all = store.records().unwrap();
        assert_eq!(all.iter().map(|r| &*r.reference).collect::<Vec<_>>(), ["r.example/a:1", "r.example/x:1"]);
        store.forget("r.example/x:1").unwrap();
        assert_eq!(store.find("r.example/x:1").unwrap(), None);
    }

    #[test]
    fn a_sweep_removes_what_nobody_needs_and_nothing_else() {
        let (_dir, store) = store();
        let [recorded, pinned, unused] = ["recorded", "pinned", "unused"].map(|c| add_layer(&store, c));
        let kept = record("kept", &[&recorded], &store);
        let gone = record("gone", &[&unused], &store);
        store.forget("gone").unwrap();
        store.begin_layer(&Digest::of(b"partial"), &Digest::of(b"archive")).unwrap();
        assert_eq!(store.implicit(&recorded).unwrap(), [b"a".to_vec(), b"b/c".to_vec()]);
        let _claim = store.claim().unwrap();
        assert_eq!(store.sweep(std::slice::from_ref(&pinned)).unwrap(), "unused".len() as u64);
        assert!(store.has_layer(&recorded) && store.has_layer(&pinned) && !store.has_layer(&unused));
        store.blob(&kept.config).unwrap();
        store.blob(&gone.config).unwrap_err();
        assert!(store.names(PARTIAL).unwrap().is_empty());
    }

    #[test]
    fn who_removes_waits_for_who_uses() {
        let (_dir, store) = store();
        let (one, two) = (store.share().unwrap(), store.share().unwrap());
        let file = File::open(store.path.join(LOCK)).unwrap();
        let Err((file, _)) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { panic!() };
        drop((one, two));
        assert!(Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok());
    }
}
