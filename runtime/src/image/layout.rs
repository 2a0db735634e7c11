//! Images on the host: the OCI image layout, as a directory or an archive, and what `docker save` writes.

use std::io;

use oci_spec::image::{Descriptor, ImageIndex};
use serde::Deserialize;

use super::compression::Compression;
use super::digest::Digest;
use super::files::{Files, Piece};
use super::manifest::{self, DEPTH_MAX, Document, Image, Layer};
use super::reference::{Local, Reference};
use super::store::DOCUMENT_MAX;
use super::tarball;

/// Where the layout names its images' tags (image-spec, annotations.md).
const TAG: &str = "org.opencontainers.image.ref.name";

/// What can be wrong with an image on the host.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// a file of it cannot be read
    #[error("cannot read {name} of {place}: {error}")]
    Read { place: String, name: String, error: io::Error },
    /// the archive is none
    #[error("{place} {error}; give an archive that is not compressed")]
    Archive { place: String, error: tarball::Error },
    /// the tag is not there, or is needed
    #[error("{place} {problem}; its tags: {tags}")]
    Tag { place: String, problem: String, tags: String },
    /// of its documents
    #[error(transparent)]
    Manifest(#[from] manifest::Error),
    /// content is not what its digest says
    #[error("{place}: {name} has not the content that its digest says, so it is damaged or forged")]
    Digest { place: String, name: String },
}

/// An image on the host.
pub struct Layout {
    files: Files,
    /// For messages.
    place: String,
    tag: Option<String>,
    docker: bool,
}

impl Layout {
    /// Opens what a reference names; `None` if that is in a registry.
    pub fn open(reference: &Reference) -> Result<Option<Self>, Error> {
        let place = reference.to_string();
        let archive = |local: &Local| {
            Files::archive(&local.path).map_err(|error| Error::Archive { place: place.clone(), error })
        };
        let (files, local, docker) = match reference {
            Reference::Registry(_) => return Ok(None),
            Reference::Layout(local) => {
                let files = Files::directory(&local.path).map_err(|error| Error::Read {
                    place: place.clone(),
                    name: "the directory".into(),
                    error,
                })?;
                (files, local, false)
            }
            Reference::Archive(local) => (archive(local)?, local, false),
            Reference::DockerArchive(local) => (archive(local)?, local, true),
        };
        Ok(Some(Layout { files, place, tag: local.tag.clone(), docker }))
    }

    /// The image for this machine.
    pub fn resolve(&self) -> Result<Image, Error> {
        if self.docker {
            return self.resolve_docker();
        }
        let index: ImageIndex = self.json("index.json")?;
        let mut bytes = self.document(self.choose(&index)?)?;
        for _ in 0..DEPTH_MAX {
            match manifest::parse(&bytes)? {
                Document::Index(index) => bytes = self.document(manifest::choose(&index)?)?,
                Document::Manifest(manifest) => {
                    let config = self.document(manifest.config())?;
                    let layers = manifest::layers(&manifest, &manifest::config(&config)?)?;
                    return Ok(Image { manifest: bytes, config, layers });
                }
            }
        }
        Err(manifest::Error::Broken(format!("index has further ones in it, more than {DEPTH_MAX} deep"))
            .into())
    }

    /// A layer as it is stored. Whoever reads it checks its digest.
    pub fn layer(&self, layer: &Layer) -> Result<Piece, Error> {
        let name = match self.docker {
            true => {
                let (image, _) = self.docker_image()?;
                let config = manifest::config(&self.read(&image.config)?)?;
                let index = manifest::diff_ids(&config)?.iter().position(|id| *id == layer.diff_id);
                index.and_then(|index| image.layers.get(index).cloned()).unwrap_or_default()
            }
            false => blob_name(&layer.digest),
        };
        self.files.open(&name).map_err(|error| self.unreadable(&name, error))
    }

    /// The entry of the tag, or the only one.
    fn choose<'a>(&self, index: &'a ImageIndex) -> Result<&'a Descriptor, Error> {
        let tag_of = |entry: &'a Descriptor| entry.annotations().as_ref().and_then(|a| a.get(TAG));
        let entries = index.manifests();
        let fitting: Vec<_> = match &self.tag {
            Some(tag) => entries.iter().filter(|entry| tag_of(entry) == Some(tag)).collect(),
            None => entries.iter().collect(),
        };
        let problem = match (fitting.as_slice(), &self.tag) {
            ([only], _) => return Ok(only),
            ([], Some(tag)) => format!("has no image with the tag {tag}"),
            ([], None) => "has no image".into(),
            (_, Some(tag)) => format!("has several images with the tag {tag}"),
            (_, None) => "has several images, name one of them by its tag".into(),
        };
        let tags: Vec<_> = entries.iter().filter_map(tag_of).take(20).map(String::as_str).collect();
        Err(Error::Tag { place: self.place.clone(), problem, tags: tags.join(", ") })
    }

    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        let digest: Digest = descriptor.digest().to_string().parse().map_err(manifest::Error::from)?;
        let name = blob_name(&digest);
        let bytes = self.read(&name)?;
        if Digest::of(&bytes) == digest {
            Ok(bytes)
        } else {
            Err(Error::Digest { place: self.place.clone(), name })
        }
    }

    /// An image of `docker save`: manifest.json names the parts, none of them by digest.
    fn resolve_docker(&self) -> Result<Image, Error> {
        let (image, text) = self.docker_image()?;
        let config = self.read(&image.config)?;
        let ids = manifest::diff_ids(&manifest::config(&config)?)?;
        if ids.len() != image.layers.len() {
            return Err(manifest::Error::Broken(format!(
                "manifest has {} layers, but its configuration {}",
                image.layers.len(),
                ids.len()
            ))
            .into());
        }
        let mut layers = Vec::new();
        for (diff_id, name) in ids.into_iter().zip(&image.layers) {
            let mut piece = self.files.open(name).map_err(|error| self.unreadable(name, error))?;
            let size = piece.len();
            let mut first = [0; 4];
            io::Read::read(&mut piece, &mut first).map_err(|error| self.unreadable(name, error))?;
            // Its own digest is nowhere; the diff id verifies what is in it.
            let digest = diff_id.clone();
            layers.push(Layer { diff_id, digest, size, compression: Compression::of_content(&first) });
        }
        Ok(Image { manifest: text, config, layers })
    }

    fn docker_image(&self) -> Result<(DockerImage, Vec<u8>), Error> {
        let text = self.read("manifest.json")?;
        let images: Vec<DockerImage> = serde_json::from_slice(&text)
            .map_err(|error| manifest::Error::Json { what: "manifest", error })?;
        let tags: Vec<_> =
            images.iter().flat_map(|image| image.repo_tags.iter().flatten().cloned()).collect();
        let wanted = |image: &DockerImage| match &self.tag {
            None => true,
            Some(wanted) => image.repo_tags.iter().flatten().any(|tag| same_name(tag, wanted)),
        };
        let mut fitting = images.into_iter().filter(wanted);
        match (fitting.next(), fitting.next()) {
            (Some(only), None) => Ok((only, text)),
            (first, _) => {
                let problem = match (first, &self.tag) {
                    (None, Some(tag)) => format!("has no image named {tag}"),
                    (None, None) => "has no image".into(),
                    (Some(_), _) => "has several images, name one of them".into(),
                };
                Err(Error::Tag { place: self.place.clone(), problem, tags: tags.join(", ") })
            }
        }
    }

    fn json<T: serde::de::DeserializeOwned>(&self, name: &'static str) -> Result<T, Error> {
        let bytes = self.read(name)?;
        Ok(serde_json::from_slice(&bytes).map_err(|error| manifest::Error::Json { what: name, error })?)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        self.files.read(name, DOCUMENT_MAX).map_err(|error| self.unreadable(name, error))
    }

    fn unreadable(&self, name: &str, error: io::Error) -> Error {
        Error::Read { place: self.place.clone(), name: name.chars().take(200).collect(), error }
    }
}

/// An entry of manifest.json.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Whether two names mean the same image, written out or not.
fn same_name(a: &str, b: &str) -> bool {
    a == b || matches!((a.parse::<Reference>(), b.parse::<Reference>()), (Ok(a), Ok(b)) if a == b)
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}
