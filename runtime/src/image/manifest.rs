//! Manifests, indexes and configurations: what an image consists of (OCI image-spec; Docker image manifest version
//! 2, schema 2, which differs in media types only).

use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, Os};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::compression::Compression;
use super::digest::{self, Digest};

/// Most layers of an image: engines have built no more since there is overlayfs, and its mount options take as many.
pub const LAYERS_MAX: usize = 127;
/// How deep indexes may lie in indexes.
pub const DEPTH_MAX: usize = 4;

/// Media types that are asked for, the index first.
pub const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// What is wrong with an image's documents.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// one is no such document
    #[error("the image's {what} is not valid: {error}")]
    Json { what: &'static str, error: serde_json::Error },
    /// it contradicts itself
    #[error("the image's {0}")]
    Broken(String),
    /// it names content that cannot be verified
    #[error("in the image's manifest {0}")]
    Digest(#[from] digest::Error),
    /// it is not for this machine
    #[error("the image is for {0}, and stockade runs linux/amd64 only: choose another image")]
    Platform(String),
}

/// What a reference leads to.
pub enum Document {
    /// Several images, one a platform.
    Index(Box<ImageIndex>),
    /// One.
    Manifest(Box<ImageManifest>),
}

/// One layer of an image.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Digest of its archive when it is not compressed; its name in the store.
    pub diff_id: Digest,
    /// Digest of its archive as it is stored.
    pub digest: Digest,
    /// Bytes of that.
    pub size: u64,
    /// How it is compressed.
    pub compression: Compression,
}

/// An image that can be brought into the store.
#[derive(Clone, Debug)]
pub struct Image {
    /// The manifest, as it is stored.
    pub manifest: Vec<u8>,
    /// The configuration, as it is stored.
    pub config: Vec<u8>,
    /// The lowest first.
    pub layers: Vec<Layer>,
}

/// Reads a manifest or an index. What a document is must be clear from its content alone: one that could be read as
/// either has been made to fool somebody (CVE-2021-41190).
pub fn parse(bytes: &[u8]) -> Result<Document, Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Probe {
        schema_version: u32,
        media_type: Option<String>,
        manifests: Option<IgnoredAny>,
        layers: Option<IgnoredAny>,
        config: Option<IgnoredAny>,
    }
    let json = |what| move |error| Error::Json { what, error };
    let probe: Probe = serde_json::from_slice(bytes).map_err(json("manifest"))?;
    if probe.schema_version != 2 {
        return Err(Error::Broken(format!(
            "manifest has the old schema {}: push the image again with a current tool",
            probe.schema_version
        )));
    }
    let says_index = probe.media_type.as_deref().map(|t| t.contains("index") || t.contains("manifest.list"));
    let is_index = probe.manifests.is_some();
    let is_manifest = probe.layers.is_some() || probe.config.is_some();
    if is_index == is_manifest || says_index.is_some_and(|says| says != is_index) {
        return Err(Error::Broken("manifest is neither clearly a manifest nor clearly an index".into()));
    }
    if is_index {
        serde_json::from_slice(bytes).map(|index| Document::Index(Box::new(index))).map_err(json("index"))
    } else {
        serde_json::from_slice(bytes)
            .map(|manifest| Document::Manifest(Box::new(manifest)))
            .map_err(json("manifest"))
    }
}

/// The image for this machine: one without a variant if there is one, since any x86-64 processor can run it.
pub fn choose(index: &ImageIndex) -> Result<&Descriptor, Error> {
    let fits = |entry: &&Descriptor| {
        entry.platform().as_ref().is_some_and(|p| *p.os() == Os::Linux && *p.architecture() == Arch::Amd64)
    };
    let plain = |entry: &&Descriptor| {
        entry.platform().as_ref().is_some_and(|p| matches!(p.variant().as_deref(), None | Some("" | "v1")))
    };
    let fitting: Vec<_> = index.manifests().iter().filter(fits).collect();
    if let Some(chosen) = fitting.iter().find(|entry| plain(entry)).or(fitting.first()) {
        return Ok(chosen);
    }
    // An index of one image need not say what it is for: its configuration does.
    match &index.manifests()[..] {
        [only] if only.platform().is_none() => Ok(only),
        all => {
            let mut names: Vec<_> = all
                .iter()
                .filter_map(|entry| entry.platform().as_ref())
                .map(|p| format!("{}/{}", p.os(), p.architecture()))
                .filter(|name| name != "unknown/unknown")
                .collect();
            names.sort();
            names.dedup();
            names.truncate(10);
            let names = if names.is_empty() { "no platform".into() } else { names.join(", ") };
            Err(Error::Platform(names))
        }
    }
}

/// An image's configuration.
pub fn config(bytes: &[u8]) -> Result<ImageConfiguration, Error> {
    serde_json::from_slice(bytes).map_err(|error| Error::Json { what: "configuration", error })
}

/// Diff ids of an image for this machine.
pub fn diff_ids(config: &ImageConfiguration) -> Result<Vec<Digest>, Error> {
    if *config.os() != Os::Linux || *config.architecture() != Arch::Amd64 {
        return Err(Error::Platform(format!("{}/{}", config.os(), config.architecture())));
    }
    let ids = config.rootfs().diff_ids();
    if ids.len() > LAYERS_MAX {
        return Err(Error::Broken(format!("configuration has {} layers of {LAYERS_MAX} at most", ids.len())));
    }
    ids.iter().map(|id| Ok(id.parse()?)).collect()
}

/// Brings manifest and configuration together.
pub fn layers(manifest: &ImageManifest, config: &ImageConfiguration) -> Result<Vec<Layer>, Error> {
    let ids = diff_ids(config)?;
    if manifest.layers().len() != ids.len() {
        return Err(Error::Broken(format!(
            "manifest has {} layers, but its configuration {}",
            manifest.layers().len(),
            ids.len()
        )));
    }
    let layer = |(descriptor, diff_id): (&Descriptor, Digest)| {
        let media_type = descriptor.media_type().to_string();
        let compression = Compression::of_media_type(&media_type).ok_or_else(|| {
            Error::Broken(format!(
                "manifest has a layer of type {:?}, which cannot be unpacked",
                cut(&media_type)
            ))
        })?;
        let digest = descriptor.digest().to_string().parse()?;
        Ok(Layer { diff_id, digest, size: descriptor.size(), compression })
    };
    manifest.layers().iter().zip(ids).map(layer).collect()
}

fn cut(text: &str) -> String {
    text.chars().take(100).collect()
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use serde_json::{Value, json};

    pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

    fn document(value: Value) -> Result<Document, Error> {
        parse(value.to_string().as_bytes())
    }

    fn descriptor(platform: Value) -> Value {
        json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 2,
                "digest": Digest::of(platform.to_string().as_bytes()), "platform": platform })
    }

    fn chosen(platforms: &[Value]) -> Result<usize, String> {
        let entries: Vec<_> = platforms.iter().cloned().map(descriptor).collect();
        let Ok(Document::Index(index)) = document(json!({ "schemaVersion": 2, "manifests": entries })) else {
            panic!("no index")
        };
        let digest = choose(&index).map_err(|e| e.to_string())?.digest().to_string();
        Ok(entries.iter().position(|entry| entry["digest"] == digest).unwrap())
    }

    #[test]
    fn the_image_of_this_platform_is_chosen() {
        let platform = |os: &str, arch: &str| json!({ "os": os, "architecture": arch });
        let variant = json!({ "os": "linux", "architecture": "amd64", "variant": "v3" });
        let amd64 = platform("linux", "amd64");
        assert_eq!(chosen(&[platform("linux", "arm64"), amd64.clone()]), Ok(1));
        assert_eq!(chosen(&[variant.clone(), amd64]), Ok(1));
        assert_eq!(chosen(&[platform("unknown", "unknown"), variant]), Ok(1));
        let error = chosen(&[platform("windows", "amd64"), platform("linux", "s390x")]).unwrap_err();
        assert!(error.contains("linux/s390x, windows/amd64"), "{error}");
        chosen(&[]).unwrap_err();
    }

    #[test]
    fn a_document_that_could_be_either_is_refused() {
        let both = json!({ "schemaVersion": 2, "manifests": [], "layers": [] });
        assert!(matches!(document(both), Err(Error::Broken(_))));
        let index = json!({ "schemaVersion": 2, "manifests": [],
                            "mediaType": "application/vnd.oci.image.manifest.v1+json" });
        assert!(matches!(document(index), Err(Error::Broken(_))));
        for broken in [json!({}), json!([]), json!({ "schemaVersion": 1 }), json!({ "schemaVersion": 2 })] {
            assert!(document(broken.clone()).is_err(), "{broken}");
        }
    }

    #[test]
    fn layers_are_those_that_manifest_and_configuration_agree_on() {
        let make = |descriptors: Value, ids: Value, architecture: &str| {
            let manifest = json!({ "schemaVersion": 2, "layers": descriptors,
                "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "size": 2,
                            "digest": Digest::of(b"") } });
            let Ok(Document::Manifest(manifest)) = document(manifest) else { panic!("no manifest") };
            let config = json!({ "os": "linux", "architecture": architecture,
                                 "rootfs": { "type": "layers", "diff_ids": ids } });
            layers(&manifest, &config_of(config)).map_err(|e| e.to_string())
        };
        let layer = |kind: &str| json!({ "mediaType": kind, "size": 5, "digest": Digest::of(b"packed") });
        let id = Digest::of(b"plain");
        let gzip = "application/vnd.docker.image.rootfs.diff.tar.gzip";
        let one = make(json!([layer(gzip)]), json!([id]), "amd64").unwrap();
        assert_eq!((&one[0].diff_id, one[0].size, one[0].compression), (&id, 5, Compression::Gzip));
        assert!(make(json!([]), json!([]), "amd64").unwrap().is_empty());
        make(json!([layer(gzip)]), json!([]), "amd64").unwrap_err();
        make(json!([layer("application/x")]), json!([id]), "amd64").unwrap_err();
        make(json!([layer(gzip)]), json!(["sha512:00"]), "amd64").unwrap_err();
        let many = vec![layer(LAYER); 128];
        make(json!(many), json!(vec![&id; 128]), "amd64").unwrap_err();
        assert!(make(json!([]), json!([]), "arm64").unwrap_err().contains("linux/arm64"));
    }

    fn config_of(value: Value) -> ImageConfiguration {
        config(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn nulls_of_old_tools_are_nothing() {
        let config = config_of(json!({ "os": "linux", "architecture": "amd64", "created": null,
            "config": { "User": "", "ExposedPorts": null, "Env": null, "Entrypoint": null, "Cmd": null,
                        "Volumes": null, "WorkingDir": "", "Labels": null, "OnBuild": null, "Image": "" },
            "container_config": { "Hostname": "x" }, "docker_version": "1",
            "rootfs": { "type": "layers", "diff_ids": [] } }));
        let inner = config.config().as_ref().unwrap();
        assert!(inner.env().is_none() && inner.volumes().is_none() && inner.labels().is_none());
    }
}
