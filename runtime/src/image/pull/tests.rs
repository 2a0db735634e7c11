//! Images on the host, brought into a store in a temporary directory.

use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::tarball::tests::Writer;
use super::*;

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A layout with images in it, and a store.
struct Place {
    dir: TempDir,
    index: Vec<Value>,
    store: Store,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("layout/blobs/sha256")).unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        Place { dir, index: Vec::new(), store }
    }

    fn blob_path(&self, digest: &Digest) -> std::path::PathBuf {
        self.dir.path().join("layout/blobs/sha256").join(digest.hex())
    }

    fn blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        fs::write(self.blob_path(&digest), bytes).unwrap();
        digest
    }

    /// An image of these archives, with the digests of its layers.
    fn image(&mut self, tag: &str, archives: &[Vec<u8>]) -> Vec<Digest> {
        let (mut layers, mut ids, mut digests) = (Vec::new(), Vec::new(), Vec::new());
        for archive in archives {
            let packed = gzip(archive);
            let digest = self.blob(&packed);
            layers.push(json!({ "mediaType": GZIP, "size": packed.len(), "digest": digest }));
            ids.push(Digest::of(archive));
            digests.push(digest);
        }
        let config = json!({ "os": "linux", "architecture": "amd64", "config": { "Cmd": ["x"] },
                             "rootfs": { "type": "layers", "diff_ids": ids } });
        self.manifest(tag, &config.to_string(), layers);
        digests
    }

    fn manifest(&mut self, tag: &str, config: &str, layers: Vec<Value>) {
        let descriptor = |kind: &str, bytes: &str| json!({ "mediaType": kind, "size": bytes.len(), "digest": self.blob(bytes.as_bytes()) });
        let config = descriptor("application/vnd.oci.image.config.v1+json", config);
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers }).to_string();
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        self.index.push(entry);
        let index = json!({ "schemaVersion": 2, "manifests": self.index });
        fs::write(self.dir.path().join("layout/index.json"), index.to_string()).unwrap();
    }

    fn pull(&self, tag: &str) -> Result<Record, Error> {
        let reference = format!("oci:{}:{tag}", self.dir.path().join("layout").display());
        pull(&self.store, &reference.parse().unwrap())
    }

    /// That nothing is in the store that is not complete.
    fn nothing_half_made(&self) {
        for dir in ["layers", "partial"] {
            let dir = self.dir.path().join("store").join(dir);
            let names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert!(
                names.iter().all(|name| name.len() == 64 && !name.to_string_lossy().contains('.')),
                "{names:?}"
            );
        }
        assert_eq!(fs::read_dir(self.dir.path().join("store/partial")).unwrap().count(), 0);
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn archive(path: &str, content: &[u8]) -> Vec<u8> {
    Writer::default().file(path, content).end()
}

fn read(store: &Store, layer: &Digest, path: &str) -> String {
    fs::read_to_string(store.layer(layer).join(path)).unwrap()
}

#[test]
fn a_layout_is_brought_with_its_layers_and_shares_them() {
    let mut place = Place::new();
    let (base, one, two) = (archive("base", b"b"), archive("one", b"1"), archive("two", b"2"));
    place.image("a", &[base.clone(), one.clone()]);
    place.image("b", &[base.clone(), two, base.clone()]);
    let a = place.pull("a").unwrap();
    assert_eq!(a.layers, [Digest::of(&base), Digest::of(&one)]);
    assert_eq!(read(&place.store, &a.layers[1], "one"), "1");
    // The base is there: what lies in the layout is not looked at again.
    fs::write(place.blob_path(&Digest::of(&gzip(&base))), "damaged").unwrap();
    let b = place.pull("b").unwrap();
    assert_eq!(b.layers.len(), 3);
    assert_eq!(read(&place.store, &b.layers[0], "base"), "b");
    assert_eq!(place.store.records().unwrap().len(), 2);
    assert_eq!(place.store.find(&a.reference).unwrap(), Some(a));
    place.nothing_half_made();
}

#[test]
fn archives_of_both_kinds_are_brought() {
    let mut place = Place::new();
    let layer = archive("f", b"x");
    place.image("t", std::slice::from_ref(&layer));
    let tar = |files: &[(&str, Vec<u8>)]| {
        files.iter().fold(Writer::default(), |writer, (name, bytes)| {
            writer.pax(&[("path", name.as_bytes())]).file("x", bytes)
        })
    };
    let mut files =
        vec![("index.json".to_owned(), fs::read(place.dir.path().join("layout/index.json")).unwrap())];
    for entry in fs::read_dir(place.dir.path().join("layout/blobs/sha256")).unwrap().flatten() {
        let name = format!("blobs/sha256/{}", entry.file_name().to_string_lossy());
        files.push((name, fs::read(entry.path()).unwrap()));
    }
    let files: Vec<_> = files.iter().map(|(name, bytes)| (&**name, bytes.clone())).collect();
    fs::write(place.dir.path().join("oci.tar"), tar(&files).end()).unwrap();
    let config = json!({ "os": "linux", "architecture": "amd64", "config": {},
                         "rootfs": { "type": "layers", "diff_ids": [Digest::of(&layer)] } });
    let manifest =
        json!([{ "Config": "c.json", "RepoTags": ["docker.io/library/x:1"], "Layers": ["l/layer.tar"] }]);
    for (name, content) in [("plain.tar", layer.clone()), ("packed.tar", gzip(&layer))] {
        let files = [
            ("manifest.json", manifest.to_string().into_bytes()),
            ("c.json", config.to_string().into_bytes()),
            ("l/layer.tar", content),
        ];
        fs::write(place.dir.path().join(name), tar(&files).end()).unwrap();
    }
    for (kind, file) in [
        ("oci-archive", "oci.tar:t"),
        ("oci-archive", "oci.tar"),
        ("docker-archive", "plain.tar"),
        ("docker-archive", "packed.tar:x:1"),
    ] {
        let store = Store::open(&place.dir.path().join(format!("store-{}", file.replace(':', "-")))).unwrap();
        let reference = format!("{kind}:{}/{file}", place.dir.path().display());
        let record = pull(&store, &reference.parse().unwrap()).unwrap_or_else(|e| panic!("{reference}: {e}"));
        assert_eq!(read(&store, &record.layers[0], "f"), "x");
    }
    for wrong in ["oci-archive:plain.tar", "docker-archive:oci.tar", "docker-archive:plain.tar:other:1"] {
        let (kind, rest) = wrong.split_once(':').unwrap();
        let reference = format!("{kind}:{}/{rest}", place.dir.path().display());
        let error = pull(&place.store, &reference.parse().unwrap()).unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn a_layout_with_several_images_needs_a_tag() {
    let mut place = Place::new();
    place.image("a", &[]);
    place.pull("").unwrap();
    place.image("b", &[]);
    let error = place.pull("").unwrap_err().to_string();
    assert!(error.contains("a, b"), "{error}");
    let error = place.pull("c").unwrap_err().to_string();
    assert!(error.contains("tag c") && error.contains("a, b"), "{error}");
}

#[test]
fn content_that_is_not_what_its_digest_says_is_not_used() {
    let mut place = Place::new();
    let good = archive("f", b"good");
    let digest = place.image("t", std::slice::from_ref(&good)).remove(0);
    // Another valid archive, a broken one, a cut one, nothing.
    let whole = fs::read(place.blob_path(&digest)).unwrap();
    for bad in [gzip(&archive("f", b"evil")), b"no gzip".to_vec(), whole[..whole.len() / 2].to_vec(), vec![]]
    {
        fs::write(place.blob_path(&digest), bad).unwrap();
        let error = place.pull("t").unwrap_err();
        assert!(matches!(error, Error::Digest { .. } | Error::Layer { .. }), "{error}");
        assert!(!place.store.has_layer(&Digest::of(&good)));
        assert!(place.store.records().unwrap().is_empty());
        place.nothing_half_made();
    }
    fs::write(place.blob_path(&digest), whole).unwrap();
    place.pull("t").unwrap();
    // The manifest.
    let manifest: Digest = place.index[0]["digest"].as_str().unwrap().parse().unwrap();
    let text = fs::read_to_string(place.blob_path(&manifest)).unwrap();
    fs::write(place.blob_path(&manifest), text + " ").unwrap();
    assert!(matches!(place.pull("t").unwrap_err(), Error::Layout(layout::Error::Digest { .. })));
}

#[test]
fn what_goes_on_without_end_after_its_end_is_refused() {
    let mut place = Place::new();
    let mut bomb = archive("f", b"x");
    bomb.resize(bomb.len() + (TRAILER_MAX as usize) + 1024, 0);
    place.image("t", &[bomb]);
    let error = place.pull("t").unwrap_err().to_string();
    assert!(error.contains("after its end"), "{error}");
    place.nothing_half_made();
}

#[test]
fn a_layer_that_cannot_be_unpacked_names_the_image_the_layer_and_the_entry() {
    let mut place = Place::new();
    let digest = place.image("t", &[archive("good", b"x"), archive("../evil", b"x")]).remove(1);
    let error = place.pull("t").unwrap_err().to_string();
    assert!(error.contains(digest.short()) && error.contains("../evil") && error.contains("oci:"), "{error}");
    place.nothing_half_made();
    // The good one may stay: it is complete.
    assert!(place.store.records().unwrap().is_empty());
}

#[test]
fn several_at_once_bring_one_image_once() {
    let mut place = Place::new();
    let archives: Vec<_> = (0..6).map(|n| archive("f", format!("content {n}").as_bytes())).collect();
    place.image("t", &archives);
    let place = &place;
    std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..4).map(|_| scope.spawn(|| place.pull("t"))).collect();
        for pull in pulls {
            assert_eq!(pull.join().unwrap().unwrap().layers.len(), 6);
        }
    });
    place.nothing_half_made();
}

#[test]
fn documents_that_make_no_sense_are_errors_of_one_line() {
    let mut place = Place::new();
    let config = |ids: Value| json!({ "os": "linux", "architecture": "amd64", "rootfs": { "type": "layers", "diff_ids": ids } });
    let layer = |digest: &str, size: u64| json!({ "mediaType": GZIP, "size": size, "digest": digest });
    let id = Digest::of(b"").to_string();
    for (number, (config, layers)) in [
        ("no json".to_owned(), vec![]),
        (config(json!(["../../etc/passwd"])).to_string(), vec![layer(&id, 1)]),
        (config(json!([id])).to_string(), vec![layer("sha256:../../../../etc/shadow", 1)]),
        (config(json!([id])).to_string(), vec![layer(&id, u64::MAX)]),
        (config(json!([])).to_string(), vec![layer(&id, 1)]),
    ]
    .into_iter()
    .enumerate()
    {
        let tag = format!("t{number}");
        place.manifest(&tag, &config, layers);
        let error = place.pull(&tag).unwrap_err().to_string();
        assert!(!error.contains('\n') && error.len() < 600, "{error}");
    }
    fs::write(place.dir.path().join("layout/index.json"), vec![b' '; 5 << 20]).unwrap();
    assert!(place.pull("t").unwrap_err().to_string().contains("at most"));
    assert!(!Path::new("/etc/shadow.partial").exists());
}
