//! Images from nothing: layers as tar archives, and OCI layouts of them, good or bad.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};
use tempfile::TempDir;

use super::program::{Ended, Program, Stdin};
use super::{Rootfs, Runtime};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// `sha256:` and the digits.
pub fn digest(bytes: &[u8]) -> String {
    let digits: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digits}")
}

/// An archive in the making. What it is told is what it says, however wrong.
#[derive(Default)]
pub struct Layer(Vec<u8>);

impl Layer {
    /// The busybox root file system.
    pub fn busybox() -> Vec<u8> {
        let tar = Command::new("tar").arg("-C").arg(Rootfs::Busybox.path()).args(["-cf", "-", "."]).output();
        let tar = tar.expect("run tar");
        assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
        tar.stdout
    }

    /// One entry.
    pub fn entry(mut self, kind: EntryType, path: &str, mode: u32, link: &str, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_link_name_literal(link).expect("a short link");
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// A file.
    pub fn file(self, path: &str, content: impl AsRef<[u8]>) -> Self {
        self.entry(EntryType::Regular, path, 0o644, "", content.as_ref())
    }

    /// A directory.
    pub fn dir(self, path: &str, mode: u32) -> Self {
        self.entry(EntryType::Directory, path, mode, "", b"")
    }

    /// A symbolic link.
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path, 0o777, target, b"")
    }

    /// The finished archive.
    pub fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// A place for images on the host's disk, and the runtime with an image store there. All of it goes with it.
pub struct Images {
    dir: TempDir,
    runtime: Runtime,
}

impl Images {
    /// An empty one.
    pub fn new() -> Self {
        // Not in /tmp, which is memory: images lie on disks.
        let dir = tempfile::Builder::new().prefix("e2e-").tempdir_in("/var/tmp").expect("a directory");
        let runtime = Runtime::under_test().env("STOCKADE_IMAGE_STORE", dir.path().join("store"));
        Self { dir, runtime }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The runtime.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Adds an image of these layers, none of them compressed, to the layout, and gives its reference.
    pub fn add(&self, tag: &str, config: Value, layers: &[Vec<u8>]) -> String {
        let layout = self.dir.path().join("layout");
        std::fs::create_dir_all(layout.join("blobs/sha256")).expect("a layout");
        let blob = |kind: &str, bytes: &[u8]| {
            let digest = digest(bytes);
            std::fs::write(layout.join("blobs").join(digest.replace(':', "/")), bytes).expect("write a blob");
            json!({ "mediaType": kind, "size": bytes.len(), "digest": digest })
        };
        let ids: Vec<_> = layers.iter().map(|layer| digest(layer)).collect();
        let config = json!({ "os": "linux", "architecture": "amd64", "config": config,
                             "rootfs": { "type": "layers", "diff_ids": ids } });
        let layers: Vec<_> = layers.iter().map(|layer| blob(LAYER, layer)).collect();
        let config = blob(CONFIG, config.to_string().as_bytes());
        let manifest =
            json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers });
        let mut entry = blob(MANIFEST, manifest.to_string().as_bytes());
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        let index = layout.join("index.json");
        let text = std::fs::read(&index).unwrap_or_default();
        let mut value: Value =
            serde_json::from_slice(&text).unwrap_or(json!({ "schemaVersion": 2, "manifests": [] }));
        value["manifests"].as_array_mut().expect("an array").push(entry);
        std::fs::write(index, value.to_string()).expect("write the index");
        std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
            .expect("write the layout");
        format!("oci:{}:{tag}", layout.display())
    }

    /// Adds busybox with a shell script as its command.
    pub fn busybox(&self, tag: &str, script: &str) -> String {
        self.add(tag, json!({ "Cmd": ["sh", "-c", script] }), &[Layer::busybox()])
    }

    /// `run --image`, to its end.
    #[track_caller]
    pub fn run(&self, image: &str, words: &[&str]) -> Ended {
        self.start(image, words, Stdin::Null).finish()
    }

    /// `run --image`, with something to read.
    #[track_caller]
    pub fn start(&self, image: &str, words: &[&str], stdin: Stdin) -> Program {
        let mut command = self.runtime.command(["run", "--image", image]);
        command.args(words);
        Program::spawn(command, stdin)
    }

    /// What is in one of the store's directories.
    pub fn stored(&self, name: &str) -> Vec<String> {
        let dir: PathBuf = self.dir.path().join("store").join(name);
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Nothing of a container, and nothing that is not complete, is in the store.
    #[track_caller]
    pub fn nothing_left(&self) {
        assert_eq!(self.stored("containers"), [""; 0], "containers' directories");
        assert_eq!(self.stored("partial"), [""; 0], "downloads");
        let layers = self.stored("layers");
        assert!(layers.iter().all(|name| name.len() == 64), "half a layer: {layers:?}");
    }
}
