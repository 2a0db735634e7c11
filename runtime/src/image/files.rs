//! Files of an image that lies on the host: in a directory, or in a tar archive that is read where it lies.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::tarball::{self, Kind, Tarball};

/// How many links in an archive lead on to another one.
const LINKS_MAX: usize = 8;
/// Entries of an archive: an image's blobs, and a few documents.
const ENTRIES_MAX: usize = 10_000;

/// A directory or an archive.
pub enum Files {
    /// Files below a directory.
    Directory(PathBuf),
    /// Entries of an archive, by name.
    Archive { file: Arc<File>, entries: HashMap<String, Place> },
}

/// Where an entry of an archive is.
pub enum Place {
    /// Offset and length.
    Content(u64, u64),
    /// Another entry.
    Link(String),
}

/// A file or a part of one, to be read from its beginning.
pub struct Piece {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Piece {
    /// Bytes that have not been read.
    pub fn len(&self) -> u64 {
        self.left
    }
}

impl Read for Piece {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = self.left.min(buffer.len() as u64) as usize;
        let count = self.file.read_at(&mut buffer[..want], self.at)?;
        self.at += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

impl Seek for Piece {
    /// From where it is; nobody needs more.
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let SeekFrom::Current(by) = to else { return Err(io::ErrorKind::Unsupported.into()) };
        self.at = self.at.checked_add_signed(by).ok_or(io::ErrorKind::InvalidInput)?;
        self.left = self.left.saturating_add_signed(by.saturating_neg());
        Ok(self.at)
    }
}

impl Files {
    /// A directory.
    pub fn directory(path: &Path) -> io::Result<Self> {
        match path.metadata()?.is_dir() {
            true => Ok(Files::Directory(path.to_owned())),
            false => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    /// An archive, which is read once for its list of entries.
    pub fn archive(path: &Path) -> Result<Self, tarball::Error> {
        let file = Arc::new(open_regular(path).map_err(tarball::Error::Read)?);
        let size = file.metadata().map_err(tarball::Error::Read)?.len();
        let whole = Piece { file: file.clone(), at: 0, left: size };
        let mut archive = Tarball::seeking(BufReader::new(whole));
        let mut entries = HashMap::new();
        while let Some(entry) = archive.next()? {
            if entries.len() > ENTRIES_MAX {
                return Err(tarball::Error::Broken("it has more files than an image can have".into()));
            }
            let name = |bytes: &[u8]| {
                String::from_utf8_lossy(bytes).trim_start_matches("./").trim_end_matches('/').to_owned()
            };
            let path = name(&entry.path);
            let place = match entry.kind {
                Kind::File if archive.offset().saturating_add(entry.size) > size => {
                    return Err(tarball::Error::Truncated);
                }
                Kind::File => Place::Content(archive.offset(), entry.size),
                // From the archive's root.
                Kind::HardLink => Place::Link(name(&entry.link)),
                Kind::SymLink => Place::Link(beside(&path, &String::from_utf8_lossy(&entry.link))),
                _ => continue,
            };
            entries.insert(path, place);
        }
        Ok(Files::Archive { file, entries })
    }

    /// Opens one by its name, with `/` between its parts.
    pub fn open(&self, name: &str) -> io::Result<Piece> {
        match self {
            Files::Directory(path) => {
                let file = open_regular(&path.join(name))?;
                let left = file.metadata()?.len();
                Ok(Piece { file: Arc::new(file), at: 0, left })
            }
            Files::Archive { file, entries } => {
                let mut name = name;
                for _ in 0..LINKS_MAX {
                    match entries.get(name) {
                        Some(Place::Content(at, left)) => {
                            return Ok(Piece { file: file.clone(), at: *at, left: *left });
                        }
                        Some(Place::Link(next)) => name = next,
                        None => break,
                    }
                }
                Err(io::ErrorKind::NotFound.into())
            }
        }
    }

    /// Reads one that is no longer than `max` bytes.
    pub fn read(&self, name: &str, max: u64) -> io::Result<Vec<u8>> {
        let piece = self.open(name)?;
        if piece.len() > max {
            let size = piece.len();
            return Err(io::Error::other(format!("it has {size} bytes, of {max} at most")));
        }
        let mut bytes = Vec::new();
        piece.take(max).read_to_end(&mut bytes).map(|_| bytes)
    }
}

/// Never waits, as it would for the other end of a pipe.
fn open_regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is not a regular file")),
    }
}

/// A link's target, from the directory that the link is in.
fn beside(link: &str, target: &str) -> String {
    let mut parts: Vec<_> = link.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::super::tarball::tests::Writer;
    use super::*;
    use tar::EntryType;

    #[test]
    fn an_archive_is_read_where_it_lies() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        let bytes = Writer::default()
            .dir("blobs/")
            .file("./blobs/one", b"first")
            .file("two/layer.tar", b"second")
            .link(EntryType::Symlink, "three/layer.tar", "../two/layer.tar")
            .link(EntryType::Symlink, "loop", "loop")
            .end();
        std::fs::write(&path, bytes).unwrap();
        let files = Files::archive(&path).unwrap();
        assert_eq!(files.read("blobs/one", 100).unwrap(), b"first");
        assert_eq!(files.read("three/layer.tar", 100).unwrap(), b"second");
        assert!(files.read("blobs/one", 4).is_err());
        for name in ["blobs", "none", "loop"] {
            assert!(files.open(name).is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::write(dir.path().join("file"), "x").unwrap();
        let files = Files::directory(dir.path()).unwrap();
        assert!(files.open("pipe").is_err());
        assert_eq!(files.read("file", 1).unwrap(), b"x");
        assert!(Files::archive(dir.path()).is_err());
        assert!(Files::directory(&dir.path().join("file")).is_err());
    }
}
