//! Bringing an image into the store: its documents, and the layers that are not there yet, several at a time.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::digest::{Digest, Hashing};
use super::layout::{self, Layout};
use super::manifest::{self, Image, Layer};
use super::progress::Progress;
use super::reference::Reference;
use super::registry::{self, Registry};
use super::store::{self, Arrival, Record, Store};
use super::unpack::{self, Unpacked, unpack};

/// Layers that are brought at a time: what other engines do, so that registries are used to it.
const AT_A_TIME: usize = 3;
/// What may follow an archive's end mark: tar fills up its last record, which has up to 1 MiB in practice.
const TRAILER_MAX: u64 = 4 << 20;

/// What can go wrong with a pull.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// of the store
    #[error(transparent)]
    Store(#[from] store::Error),
    /// of an image on the host
    #[error(transparent)]
    Layout(#[from] layout::Error),
    /// of a registry
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// of the documents
    #[error(transparent)]
    Manifest(#[from] manifest::Error),
    /// a layer cannot be unpacked
    #[error("cannot unpack layer {layer} of {image}: {error}{}", remedy(.error))]
    Layer { image: String, layer: String, error: unpack::Error },
    /// a layer is not the one that the configuration names
    #[error(
        "layer {layer} of {image} has not the content that the image's configuration says: it is damaged or forged"
    )]
    Digest { image: String, layer: String },
    /// another layer has failed
    #[error("the pull was ended")]
    Cancelled,
}

fn remedy(error: &unpack::Error) -> &'static str {
    if error.is_full() {
        "; make room in the image store, with `stockade image prune` for example, or name another place with --image-store"
    } else {
        ""
    }
}

impl Error {
    /// Whether what has been downloaded is good to go on from: nothing was wrong with it, and there is room for it.
    fn keeps_partial(&self) -> bool {
        match self {
            Error::Cancelled => true,
            Error::Registry(registry::Error::Write(_) | registry::Error::Digest { .. }) => false,
            Error::Registry(_) => true,
            _ => false,
        }
    }
}

/// Where an image is.
pub enum Source {
    /// On the host.
    Local(Layout),
    /// In a registry.
    Registry(Registry),
}

impl Source {
    /// Looks at nothing in a registry yet.
    pub fn open(reference: &Reference) -> Result<Self, Error> {
        match reference {
            Reference::Registry(name) => Ok(Source::Registry(Registry::new(name)?)),
            local => match Layout::open(local)? {
                Some(layout) => Ok(Source::Local(layout)),
                None => Err(Error::Cancelled),
            },
        }
    }

    /// The image for this machine.
    pub fn resolve(&self) -> Result<Image, Error> {
        match self {
            Source::Local(layout) => Ok(layout.resolve()?),
            Source::Registry(registry) => Ok(registry.resolve()?),
        }
    }
}

/// Pulls what a reference names; the store must be shared. Whatever has been written down is complete.
pub fn pull(store: &Store, reference: &Reference) -> Result<Record, Error> {
    let source = Source::open(reference)?;
    let image = source.resolve()?;
    bring(store, &source, reference, &image)
}

/// Pulls an image that has been looked at.
pub fn bring(store: &Store, source: &Source, reference: &Reference, image: &Image) -> Result<Record, Error> {
    let mut missing: Vec<&Layer> = Vec::new();
    for layer in &image.layers {
        // The same layer may be there several times.
        if !store.has_layer(&layer.diff_id) && missing.iter().all(|m| m.diff_id != layer.diff_id) {
            missing.push(layer);
        }
    }
    let record = Record {
        reference: reference.to_string(),
        manifest: store.add_blob(&image.manifest)?,
        config: store.add_blob(&image.config)?,
        layers: image.layers.iter().map(|layer| layer.diff_id.clone()).collect(),
        pulled: crate::clock::now_rfc3339(),
    };
    let total = missing.iter().fold(0_u64, |sum, layer| sum.saturating_add(layer.size));
    let transfer = Transfer {
        store,
        source,
        image: &record.reference,
        progress: Progress::new(&record.reference, missing.len(), total),
        cancelled: AtomicBool::new(false),
    };
    transfer.layers(&missing)?;
    store.save(&record)?;
    Ok(record)
}

/// A pull while it goes on.
struct Transfer<'a> {
    store: &'a Store,
    source: &'a Source,
    image: &'a str,
    progress: Progress,
    cancelled: AtomicBool,
}

impl Transfer<'_> {
    fn layers(&self, layers: &[&Layer]) -> Result<(), Error> {
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let work = || {
            while let Some(layer) = layers.get(next.fetch_add(1, Ordering::Relaxed)) {
                if self.cancelled.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = self.layer(layer) {
                    let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                    // The first is the reason for the others.
                    if !self.cancelled.swap(true, Ordering::Relaxed) {
                        *failure = Some(error);
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..layers.len().min(AT_A_TIME) {
                // Where there is no thread for it this one brings them all.
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn layer(&self, layer: &Layer) -> Result<(), Error> {
        let arrival = self.store.begin_layer(&layer.diff_id, &layer.digest)?;
        // Somebody else may have brought it meanwhile.
        if self.store.has_layer(&layer.diff_id) {
            arrival.finish();
            self.progress.add(layer.size);
            self.progress.finish_layer();
            return Ok(());
        }
        match self.fill(layer, &arrival) {
            Ok(unpacked) => {
                let implicit = unpacked.implicit.into_iter().collect::<Vec<_>>().join(&0);
                arrival.complete(unpacked.bytes, &implicit)?;
                self.progress.finish_layer();
                Ok(())
            }
            Err(error) => {
                arrival.abandon(error.keeps_partial());
                Err(error)
            }
        }
    }

    /// Unpacks a layer into its room.
    fn fill(&self, layer: &Layer, arrival: &Arrival) -> Result<Unpacked, Error> {
        let room = arrival.room()?;
        let mut packed: Box<dyn Read> = match self.source {
            Source::Local(layout) => Box::new(Counted { inner: layout.layer(layer)?, transfer: self }),
            Source::Registry(registry) => {
                registry.layer(layer, arrival.partial(), &self.progress, &self.cancelled)?;
                let mut file = arrival.partial();
                io::Seek::rewind(&mut file).map_err(registry::Error::Write)?;
                Box::new(Cancellable { inner: file, transfer: self })
            }
        };
        let failed = |error: unpack::Error| match self.cancelled.load(Ordering::Relaxed) {
            true => Error::Cancelled,
            false => {
                Error::Layer { image: self.image.to_owned(), layer: layer.digest.short().to_owned(), error }
            }
        };
        let mut plain = Hashing::new(layer.compression.decode(&mut packed));
        let unpacked = unpack(&mut plain, &room).map_err(failed)?;
        let found = plain.finish(TRAILER_MAX);
        let found: Digest = found.map_err(|e| failed(super::tarball::Error::Read(e).into()))?;
        if found == layer.diff_id {
            return Ok(unpacked);
        }
        Err(Error::Digest { image: self.image.to_owned(), layer: layer.digest.short().to_owned() })
    }
}

/// Ends when the pull does.
struct Cancellable<'a, R> {
    inner: R,
    transfer: &'a Transfer<'a>,
}

impl<R: Read> Read for Cancellable<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.transfer.cancelled.load(Ordering::Relaxed) {
            return Err(io::Error::other("the pull was ended"));
        }
        self.inner.read(buffer)
    }
}

/// The same, where reading is what takes the time.
struct Counted<'a, R> {
    inner: R,
    transfer: &'a Transfer<'a>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut inner = Cancellable { inner: &mut self.inner, transfer: self.transfer };
        let count = inner.read(buffer)?;
        self.transfer.progress.add(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
