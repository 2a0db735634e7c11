//! Reading a tar archive as a stream: ustar, GNU and pax headers, long names, extended attributes, sparse files.
//!
//! The archive comes from strangers. Header fields are decoded by the `tar` crate; the walk over the archive is our
//! own, because every number in it is checked here before anything is sized by it: extended headers and sparse maps
//! have caps, and nothing of a file's content is ever held in memory. Paths are given out as they are written: whoever
//! uses them must see to it that they stay where they belong.

use std::io::{self, ErrorKind, Read, Seek};

use tar::{EntryType, GnuExtSparseHeader, Header};

const BLOCK: usize = 512;
/// Longest extended header. A path has at most 4 KiB (PATH_MAX), an extended attribute 64 KiB (XATTR_SIZE_MAX), and
/// an entry few of both.
const EXTENDED_MAX: u64 = 1 << 20;
/// Most pieces of one sparse file: 16 MiB of map, which is that of a very torn 100 GB disk image.
const SPARSE_MAX: usize = 1 << 20;
/// Buffer for content.
const CHUNK: usize = 128 << 10;

/// What is wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// it cannot be read
    #[error("cannot be read: {0}")]
    Read(#[source] io::Error),
    /// it ends too early
    #[error("ends in the middle of an entry")]
    Truncated,
    /// it is no tar archive, or a broken one
    #[error("is not a valid tar archive: {0}")]
    Broken(String),
    /// a part of it is larger than it may be
    #[error("has {what} of more than {limit} bytes")]
    TooLarge { what: &'static str, limit: u64 },
    /// what takes the content does not
    #[error(transparent)]
    Write(io::Error),
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Regular file, perhaps a sparse one.
    File,
    /// Another name of a file.
    HardLink,
    /// Symbolic link.
    SymLink,
    /// Directory.
    Directory,
    /// Named pipe.
    Fifo,
    /// Character or block device.
    Device,
}

/// An entry's metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name as written.
    pub path: Vec<u8>,
    /// Target of a link as written.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permissions, 12 bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Bytes of the file, holes included.
    pub size: u64,
    /// Names and values of extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the pieces of content belong: offset and length, in order. A file that is not sparse has one.
    pieces: Vec<(u64, u64)>,
}

/// Records of an extended header.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<i64>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: Sparse,
}

/// What pax headers say of a sparse file (GNU tar manual, Sparse Formats).
#[derive(Default)]
struct Sparse {
    major: u64,
    name: Option<Vec<u8>>,
    real_size: Option<u64>,
    map: Vec<u64>,
}

/// An archive that is read.
pub struct Tarball<R> {
    input: R,
    /// Passes over bytes; how many there were.
    pass: fn(&mut R, u64) -> io::Result<u64>,
    /// Content of the entry last given out that has not been read.
    content: u64,
    /// What fills up the last block.
    padding: u64,
    offset: u64,
    /// For content on its way.
    buffer: Vec<u8>,
}

impl<R: Read> Tarball<R> {
    /// From the beginning.
    pub fn new(input: R) -> Self {
        let pass = |input: &mut R, count| io::copy(&mut input.take(count), &mut io::sink());
        Tarball { input, pass, content: 0, padding: 0, offset: 0, buffer: vec![0; CHUNK] }
    }

    /// The same where content can be passed over without reading it. That there is as much is not checked then.
    pub fn seeking(input: R) -> Self
    where
        R: Seek,
    {
        let pass = |input: &mut R, count: u64| input.seek_relative(count as i64).map(|()| count);
        Tarball { pass, ..Self::new(input) }
    }

    /// Bytes from the beginning of the archive to the content of the entry last given out.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next entry, `None` at the end. Content of the one before that has not been read is skipped.
    pub fn next(&mut self) -> Result<Option<Entry>, Error> {
        let mut extended = Extended::default();
        loop {
            self.skip(self.content + self.padding)?;
            (self.content, self.padding) = (0, 0);
            let Some(header) = self.header()? else { return Ok(None) };
            let size = header.entry_size().map_err(|e| Error::Broken(e.to_string()))?;
            match header.entry_type() {
                EntryType::XHeader => {
                    self.expect(size)?;
                    let text = self.extended(size)?;
                    extended.read(&text)?;
                }
                EntryType::GNULongName => {
                    self.expect(size)?;
                    extended.path = Some(until_nul(self.extended(size)?));
                }
                EntryType::GNULongLink => {
                    self.expect(size)?;
                    extended.link = Some(until_nul(self.extended(size)?));
                }
                // For all that follows; nobody uses it for anything but comments.
                EntryType::XGlobalHeader => self.expect(size)?,
                _ => return self.entry(&header, extended).map(Some),
            }
        }
    }

    /// Passes an entry's content on, each piece with its offset in the file.
    pub fn content(
        &mut self,
        entry: &Entry,
        mut write: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> Result<(), Error> {
        let mut buffer = std::mem::take(&mut self.buffer);
        for (mut offset, mut length) in entry.pieces.iter().copied() {
            while length > 0 {
                let want = length.min(CHUNK as u64) as usize;
                let chunk = &mut buffer[..want];
                self.fill(chunk)?;
                self.content -= want as u64;
                write(offset, chunk).map_err(Error::Write)?;
                offset += want as u64;
                length -= want as u64;
            }
        }
        self.buffer = buffer;
        Ok(())
    }

    fn header(&mut self) -> Result<Option<Header>, Error> {
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        let mut have = 0;
        while have < BLOCK {
            match self.input.read(&mut block[have..]) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err(Error::Truncated),
                Ok(n) => have += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::Read(e)),
            }
        }
        self.offset += BLOCK as u64;
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        // The checksum is that of the header with blanks in the checksum's own place.
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        let own: u32 = block[148..156].iter().map(|byte| u32::from(*byte)).sum();
        match header.cksum() {
            Ok(written) if written == sum - own + 8 * u32::from(b' ') => Ok(Some(header)),
            _ => Err(Error::Broken("a header has the wrong checksum".into())),
        }
    }

    fn entry(&mut self, header: &Header, extended: Extended) -> Result<Entry, Error> {
        let path = extended.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extended.link.or_else(|| header.link_name_bytes().map(|l| l.into_owned()));
        let kind = match header.entry_type() {
            // As before POSIX had a type for them.
            EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
            EntryType::Link => Kind::HardLink,
            EntryType::Symlink => Kind::SymLink,
            EntryType::Directory => Kind::Directory,
            EntryType::Fifo => Kind::Fifo,
            EntryType::Char | EntryType::Block => Kind::Device,
            other => {
                let kind = char::from(other.as_byte());
                return Err(Error::Broken(format!("{} is of the unknown type {kind:?}", show(&path))));
            }
        };
        let stored = match extended.size {
            Some(size) => size,
            None => header.entry_size().map_err(|e| Error::Broken(e.to_string()))?,
        };
        // Whatever the header of another kind says, there is no content.
        let stored = if kind == Kind::File { stored } else { 0 };
        let old = header.as_old();
        let mut entry = Entry {
            link: link.unwrap_or_default(),
            kind,
            mode: field(&old.mode, || header.mode().map(u64::from))? as u32 & 0o7777,
            uid: id(extended.uid.map_or_else(|| field(&old.uid, || header.uid()), Ok)?, &path)?,
            gid: id(extended.gid.map_or_else(|| field(&old.gid, || header.gid()), Ok)?, &path)?,
            mtime: match extended.mtime {
                Some(mtime) => mtime,
                None => i64::try_from(field(&old.mtime, || header.mtime())?).unwrap_or(0),
            },
            size: stored,
            xattrs: extended.xattrs,
            pieces: vec![(0, stored)],
            path,
        };
        let sparse = extended.sparse;
        if header.entry_type().is_gnu_sparse() {
            // The rest of the map lies between the header and the content, and is not counted.
            let (size, map) = self.old_sparse(header)?;
            self.expect(stored)?;
            entry.set_sparse(size, &map, stored)?;
        } else if let (Kind::File, Some(size)) = (kind, sparse.real_size) {
            self.expect(stored)?;
            let (map, content) = match sparse.major {
                0 => (sparse.map, stored),
                1 => {
                    let map = self.new_sparse()?;
                    (map, self.content)
                }
                n => return Err(Error::Broken(format!("sparse format {n} is unknown"))),
            };
            entry.path = sparse.name.unwrap_or(entry.path);
            entry.set_sparse(size, &map, content)?;
        } else {
            self.expect(stored)?;
        }
        Ok(entry)
    }

    /// Pieces from an old GNU header and the blocks after it.
    fn old_sparse(&mut self, header: &Header) -> Result<(u64, Vec<u64>), Error> {
        let broken = |e: io::Error| Error::Broken(e.to_string());
        let gnu = header.as_gnu().ok_or_else(|| Error::Broken("a sparse file without a map".into()))?;
        let mut map = Vec::new();
        let mut add = |piece: &tar::GnuSparseHeader| {
            if !piece.is_empty() {
                map.push(piece.offset().map_err(broken)?);
                map.push(piece.length().map_err(broken)?);
            }
            if map.len() > 2 * SPARSE_MAX { Err(too_many_pieces()) } else { Ok(()) }
        };
        gnu.sparse.iter().try_for_each(&mut add)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = GnuExtSparseHeader::new();
            self.fill(block.as_mut_bytes())?;
            block.sparse().iter().try_for_each(&mut add)?;
            more = block.is_extended();
        }
        Ok((gnu.real_size().map_err(broken)?, map))
    }

    /// Pieces from the beginning of the content: decimal numbers, one a line, filled up to a block.
    fn new_sparse(&mut self) -> Result<Vec<u64>, Error> {
        let mut block = [0; BLOCK];
        let mut at = BLOCK;
        let mut number = || -> Result<u64, Error> {
            let mut digits = String::new();
            loop {
                if at == BLOCK {
                    if self.content < BLOCK as u64 {
                        return Err(Error::Truncated);
                    }
                    self.fill(&mut block)?;
                    self.content -= BLOCK as u64;
                    at = 0;
                }
                let byte = block[at];
                at += 1;
                match byte {
                    b'0'..=b'9' if digits.len() < 20 => digits.push(byte.into()),
                    b'\n' => {
                        return digits
                            .parse()
                            .map_err(|_| Error::Broken("a bad number in a sparse map".into()));
                    }
                    _ => return Err(Error::Broken("a bad number in a sparse map".into())),
                }
            }
        };
        let count = number()?;
        if count > SPARSE_MAX as u64 {
            return Err(too_many_pieces());
        }
        (0..2 * count).map(|_| number()).collect()
    }

    /// Content follows.
    fn expect(&mut self, size: u64) -> Result<(), Error> {
        if size > i64::MAX as u64 {
            return Err(Error::Broken(format!("an entry of {size} bytes")));
        }
        self.content = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    fn extended(&mut self, size: u64) -> Result<Vec<u8>, Error> {
        if size > EXTENDED_MAX {
            return Err(Error::TooLarge { what: "an extended header", limit: EXTENDED_MAX });
        }
        let mut text = vec![0; size as usize];
        self.fill(&mut text)?;
        self.content = 0;
        Ok(text)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        self.input.read_exact(buffer).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => Error::Truncated,
            _ => Error::Read(e),
        })?;
        self.offset += buffer.len() as u64;
        Ok(())
    }

    fn skip(&mut self, count: u64) -> Result<(), Error> {
        let skipped = (self.pass)(&mut self.input, count).map_err(Error::Read)?;
        self.offset += skipped;
        if skipped == count { Ok(()) } else { Err(Error::Truncated) }
    }
}

impl Entry {
    fn set_sparse(&mut self, size: u64, map: &[u64], content: u64) -> Result<(), Error> {
        let broken = || Error::Broken(format!("the sparse map of {} makes no sense", show(&self.path)));
        let mut end = 0;
        let mut sum = 0_u64;
        let mut pieces = Vec::with_capacity(map.len() / 2);
        for pair in map.chunks(2) {
            let &[offset, length] = pair else { return Err(broken()) };
            if offset < end {
                return Err(broken());
            }
            end = offset.checked_add(length).filter(|end| *end <= size).ok_or_else(broken)?;
            sum += length;
            pieces.push((offset, length));
        }
        if sum != content || size > i64::MAX as u64 {
            return Err(broken());
        }
        (self.size, self.pieces) = (size, pieces);
        Ok(())
    }
}

impl Extended {
    /// `LENGTH KEY=VALUE\n`, where LENGTH counts all of it (POSIX, pax, pax Header Block).
    fn read(&mut self, mut text: &[u8]) -> Result<(), Error> {
        let broken = || Error::Broken("a pax header makes no sense".into());
        while !text.is_empty() {
            let space = text.iter().take(20).position(|b| *b == b' ').ok_or_else(broken)?;
            let length: usize = number(&text[..space]).ok_or_else(broken)?;
            let record =
                text.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or_else(broken)?;
            let equals = record.iter().position(|b| *b == b'=').ok_or_else(broken)?;
            self.set(&record[..equals], &record[equals + 1..]).ok_or_else(broken)?;
            text = &text[length..];
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            b"path" => self.path = Some(value.into()),
            b"linkpath" => self.link = Some(value.into()),
            b"size" => self.size = Some(number(value)?),
            b"uid" => self.uid = Some(number(value)?),
            b"gid" => self.gid = Some(number(value)?),
            b"mtime" => {
                let seconds = value.split(|b| *b == b'.').next()?;
                self.mtime = Some(number(seconds)?);
            }
            b"GNU.sparse.major" => self.sparse.major = number(value)?,
            b"GNU.sparse.name" => self.sparse.name = Some(value.into()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.real_size = Some(number(value)?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse.map.push(number(value)?),
            b"GNU.sparse.map" => {
                self.sparse.map = value.split(|b| *b == b',').map(number).collect::<Option<_>>()?;
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.push((name.into(), value.into()));
                }
            }
        }
        Some(())
    }
}

/// A number of a header. One that is left out, as some tools do, is 0.
fn field(bytes: &[u8], parse: impl Fn() -> io::Result<u64>) -> Result<u64, Error> {
    if bytes.iter().all(|byte| matches!(byte, 0 | b' ')) {
        return Ok(0);
    }
    parse().map_err(|e| Error::Broken(e.to_string()))
}

fn too_many_pieces() -> Error {
    Error::TooLarge { what: "a sparse map", limit: (SPARSE_MAX * 16) as u64 }
}

fn number<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The highest number means "leave it" to chown(2), so it is nobody's.
fn id(value: u64, path: &[u8]) -> Result<u32, Error> {
    u32::try_from(value)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or_else(|| Error::Broken(format!("{} belongs to {value}, which is no user or group", show(path))))
}

fn until_nul(mut text: Vec<u8>) -> Vec<u8> {
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    text.truncate(end);
    text
}

/// A path as a message shows it.
pub fn show(path: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(&path[..path.len().min(300)]))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// An archive in the making, good or bad.
    #[derive(Default)]
    pub struct Writer(Vec<u8>);

    impl Writer {
        /// One entry with all its header says.
        pub fn entry(
            mut self,
            kind: EntryType,
            path: &str,
            content: &[u8],
            set: impl FnOnce(&mut Header),
        ) -> Self {
            let mut header = Header::new_gnu();
            let name = &mut header.as_old_mut().name;
            name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_entry_type(kind);
            header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
            header.set_uid(nix::unistd::geteuid().as_raw().into());
            header.set_gid(nix::unistd::getegid().as_raw().into());
            header.set_mtime(1_000_000_000);
            header.set_size(content.len() as u64);
            set(&mut header);
            header.set_cksum();
            self.0.extend_from_slice(header.as_bytes());
            self.0.extend_from_slice(content);
            self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
            self
        }

        pub fn file(self, path: &str, content: &[u8]) -> Self {
            self.entry(EntryType::Regular, path, content, |_| ())
        }

        pub fn dir(self, path: &str) -> Self {
            self.entry(EntryType::Directory, path, b"", |_| ())
        }

        pub fn link(self, kind: EntryType, path: &str, target: &str) -> Self {
            self.entry(kind, path, b"", |header| header.set_link_name_literal(target).unwrap())
        }

        /// An extended header for the next entry.
        pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
            let mut text = Vec::new();
            for (key, value) in records {
                let rest = key.len() + value.len() + 3;
                let mut length = rest + rest.to_string().len();
                length = rest + length.to_string().len();
                text.extend_from_slice(format!("{length} {key}=").as_bytes());
                text.extend_from_slice(value);
                text.push(b'\n');
            }
            self.entry(EntryType::XHeader, "pax", &text, |_| ())
        }

        pub fn raw(mut self, bytes: &[u8]) -> Self {
            self.0.extend_from_slice(bytes);
            self
        }

        pub fn end(mut self) -> Vec<u8> {
            self.0.resize(self.0.len() + 2 * BLOCK, 0);
            self.0
        }
    }

    fn all(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, Error> {
        let mut tarball = Tarball::new(bytes);
        let mut entries = Vec::new();
        while let Some(entry) = tarball.next()? {
            let mut content = Vec::new();
            tarball.content(&entry, |offset, bytes| {
                content.resize(offset as usize, 0);
                content.extend_from_slice(bytes);
                Ok(())
            })?;
            if entry.kind == Kind::File {
                content.resize(entry.size as usize, 0);
            }
            entries.push((entry, content));
        }
        Ok(entries)
    }

    #[test]
    fn entries_come_with_names_content_and_metadata() {
        let bytes = Writer::default()
            .dir("etc/")
            .file("etc/f", &[7; 700])
            .link(EntryType::Symlink, "l", "etc/f")
            .entry(EntryType::Regular, "old/", b"", |_| ())
            .end();
        let entries = all(&bytes).unwrap();
        assert_eq!(entries.len(), 4);
        assert_eq!((entries[0].0.kind, entries[0].0.mode), (Kind::Directory, 0o755));
        assert_eq!(entries[1].1, [7; 700]);
        assert_eq!(entries[1].0.mtime, 1_000_000_000);
        assert_eq!((entries[2].0.kind, &*entries[2].0.link), (Kind::SymLink, &b"etc/f"[..]));
        assert_eq!(entries[3].0.kind, Kind::Directory);
    }

    #[test]
    fn pax_records_go_before_the_header() {
        let long = "d/".repeat(300) + "f";
        let bytes = Writer::default()
            .pax(&[
                ("path", long.as_bytes()),
                ("mtime", b"123.456"),
                ("uid", b"3000000"),
                ("SCHILY.xattr.user.a", b"with\nnew\0line"),
                ("comment", b"ignored"),
            ])
            .file("short", b"x")
            .file("next", b"y")
            .end();
        let entries = all(&bytes).unwrap();
        assert_eq!(entries[0].0.path, long.as_bytes());
        assert_eq!((entries[0].0.mtime, entries[0].0.uid), (123, 3_000_000));
        assert_eq!(entries[0].0.xattrs, [(b"user.a".to_vec(), b"with\nnew\0line".to_vec())]);
        assert_eq!(entries[1].0.path, b"next");
        assert!(entries[1].0.xattrs.is_empty());
    }

    #[test]
    fn gnu_long_names_are_joined() {
        let long = "x".repeat(200);
        let name = format!("{long}\0");
        let bytes = Writer::default()
            .entry(EntryType::GNULongName, "././@LongLink", name.as_bytes(), |_| ())
            .entry(EntryType::GNULongLink, "././@LongLink", name.as_bytes(), |_| ())
            .link(EntryType::Symlink, "cut", "cut")
            .end();
        let entries = all(&bytes).unwrap();
        assert_eq!((&*entries[0].0.path, &*entries[0].0.link), (long.as_bytes(), long.as_bytes()));
    }

    #[test]
    fn sparse_files_of_all_formats_have_their_holes() {
        let expected = [vec![0; 1000], vec![1; 100], vec![0; 900], vec![2; 50], vec![0; 50]].concat();
        let content = [vec![1; 100], vec![2; 50]].concat();
        let old = Writer::default().entry(EntryType::GNUSparse, "f", &content, |header| {
            let gnu = header.as_gnu_mut().unwrap();
            for (piece, (offset, length)) in gnu.sparse.iter_mut().zip([(1000, 100), (2000, 50)]) {
                piece.set_offset(offset);
                piece.set_length(length);
            }
            gnu.set_real_size(2100);
        });
        let map: (&str, &[u8]) = ("GNU.sparse.map", b"1000,100,2000,50");
        let pax0 = Writer::default()
            .pax(&[("GNU.sparse.major", b"0"), ("GNU.sparse.size", b"2100"), map, ("GNU.sparse.name", b"f")])
            .file("GNUSparseFile.0/f", &content);
        let mut text = b"2\n1000\n100\n2000\n50\n".to_vec();
        text.resize(BLOCK, 0);
        let pax1 = Writer::default()
            .pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"2100"), ("GNU.sparse.name", b"f")])
            .file("GNUSparseFile.0/f", &[text, content].concat());
        for archive in [old, pax0, pax1] {
            let entries = all(&archive.file("after", b"!").end()).unwrap();
            assert_eq!(entries[0].0.path, b"f");
            assert!(entries[0].1 == expected);
            assert_eq!(entries[1].1, b"!");
        }
    }

    #[test]
    fn an_old_sparse_map_may_go_on_in_further_blocks() {
        let mut block = GnuExtSparseHeader::new();
        block.sparse_mut()[0].set_offset(5000);
        block.sparse_mut()[0].set_length(10);
        let bytes = Writer::default()
            .entry(EntryType::GNUSparse, "f", b"", |header| {
                header.set_size(10);
                let gnu = header.as_gnu_mut().unwrap();
                gnu.set_is_extended(true);
                gnu.set_real_size(6000);
            })
            .raw(block.as_bytes())
            .raw(&[&[9; 10][..], &[0; 502]].concat())
            .file("after", b"!")
            .end();
        let entries = all(&bytes).unwrap();
        assert_eq!(entries[0].1.len(), 6000);
        assert_eq!(entries[0].1[5000..5010], [9; 10]);
        assert_eq!(entries[1].0.path, b"after");
    }

    #[test]
    fn hostile_numbers_are_refused_before_anything_is_sized_by_them() {
        let huge = |kind| Writer::default().entry(kind, "x", b"", |header| header.set_size(1 << 40)).end();
        for kind in [EntryType::XHeader, EntryType::GNULongName, EntryType::GNULongLink] {
            assert!(matches!(all(&huge(kind)), Err(Error::TooLarge { .. })));
        }
        let sparse = |map: &[u8], size: &[u8], content: &[u8]| {
            let records: [(&str, &[u8]); 3] =
                [("GNU.sparse.major", b"0"), ("GNU.sparse.size", size), ("GNU.sparse.map", map)];
            all(&Writer::default().pax(&records).file("f", content).end())
        };
        sparse(b"0,5", b"5", b"12345").unwrap();
        for (map, size) in [
            ("0,6", "5"),
            ("0,5,3,1", "9"),
            ("9,5", "9"),
            ("18446744073709551615,5", "9"),
            ("0", "5"),
            ("0,4", "5"),
        ] {
            assert!(sparse(map.as_bytes(), size.as_bytes(), b"12345").is_err(), "{map}");
        }
        let mut text = b"99999999\n".to_vec();
        text.resize(BLOCK, 0);
        let records: [(&str, &[u8]); 2] = [("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"9")];
        let bytes = Writer::default().pax(&records).file("f", &text).end();
        assert!(matches!(all(&bytes), Err(Error::TooLarge { .. })));
        let owner = Writer::default().pax(&[("uid", b"4294967295")]).file("f", b"").end();
        assert!(matches!(all(&owner), Err(Error::Broken(_))));
    }

    #[test]
    fn what_is_cut_off_or_no_archive_is_an_error() {
        let bytes = Writer::default().file("a", &[1; 600]).end();
        for length in [1, 511, 513, 1000, 1111] {
            assert!(matches!(all(&bytes[..length]), Err(Error::Truncated)), "{length}");
        }
        assert!(all(&bytes[..1536]).is_ok(), "the end mark may be missing");
        assert!(matches!(all(&[b'x'; 1024]), Err(Error::Broken(_))));
        let unknown = Writer::default().entry(EntryType::new(b'Q'), "a", b"", |_| ()).end();
        assert!(matches!(all(&unknown), Err(Error::Broken(_))));
        for text in ["9", "9 a=b\n", "99 a=b\n", "6 path\n", "0 a=b\n", "-6 a=b\n"] {
            let bytes = Writer::default().entry(EntryType::XHeader, "x", text.as_bytes(), |_| ()).end();
            assert!(all(&bytes).is_err(), "{text:?}");
        }
    }
}
