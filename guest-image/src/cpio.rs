//! Writes the "newc" cpio archive that Linux unpacks as its first root file system
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! What always holds: the bytes depend on the entries alone. They are sorted by name, owned by root, dated
//! 1970-01-01 and numbered from inode 1, whatever the build machine's files look like.

use std::collections::BTreeMap;

const MAGIC: &str = "070701";
const TRAILER: &str = "TRAILER!!!";
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// What one name in the archive is. Modes are permission bits only.
#[derive(Debug)]
pub enum Entry {
    /// A directory.
    Directory { mode: u32 },
    /// A regular file and its content.
    File { mode: u32, content: Vec<u8> },
    /// A character device node.
    CharacterDevice { mode: u32, major: u32, minor: u32 },
}

/// Why an archive cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The format has 8 hex digits for a size.
    #[error("/{0} is larger than 4 GiB, which a newc archive cannot hold")]
    TooLarge(String),
}

/// The archive of `entries`, which are named by their path without a leading slash. A parent sorts before
/// what it holds, as the kernel needs it.
pub fn archive(entries: &BTreeMap<String, Entry>) -> Result<Vec<u8>, Error> {
    let mut out = Vec::new();
    for (inode, (name, entry)) in (1..).zip(entries) {
        let (mode, links, content, device): (u32, u32, &[u8], (u32, u32)) = match entry {
            Entry::Directory { mode } => (DIRECTORY | mode, 2, &[], (0, 0)),
            Entry::File { mode, content } => (REGULAR | mode, 1, content, (0, 0)),
            Entry::CharacterDevice { mode, major, minor } => {
                (CHARACTER_DEVICE | mode, 1, &[], (*major, *minor))
            }
        };
        let size = u32::try_from(content.len()).map_err(|_| Error::TooLarge(name.clone()))?;
        header(&mut out, [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1], name);
        out.extend_from_slice(content);
        pad(&mut out);
    }
    header(&mut out, [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0], TRAILER);
    Ok(out)
}

/// `fields` are those of the format up to the device numbers; the length of the name and the checksum, which
/// "newc" leaves at zero, follow.
fn header(out: &mut Vec<u8>, fields: [u32; 11], name: &str) {
    out.extend_from_slice(MAGIC.as_bytes());
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(format!("{:08x}{:08x}{name}\0", name.len() + 1, 0).as_bytes());
    pad(out);
}

/// Headers and contents start at multiples of 4 bytes.
fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    fn sample() -> BTreeMap<String, Entry> {
        BTreeMap::from([
            ("init".into(), Entry::File { mode: 0o755, content: b"hello".to_vec() }),
            ("dev".into(), Entry::Directory { mode: 0o755 }),
            ("dev/console".into(), Entry::CharacterDevice { mode: 0o600, major: 5, minor: 1 }),
        ])
    }

    #[test]
    fn writes_the_bytes_of_the_format() {
        let entries =
            BTreeMap::from([("init".to_string(), Entry::File { mode: 0o755, content: b"hello".to_vec() })]);
        let expected = concat!(
            "070701",
            "00000001",
            "000081ed",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000005",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000005",
            "00000000",
            "init\0",
            "\0",
            "hello\0\0\0",
            "070701",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "0000000b",
            "00000000",
            "TRAILER!!!\0",
            "\0\0\0",
        );
        assert_eq!(String::from_utf8(archive(&entries).unwrap()).unwrap(), expected);
    }

    #[test]
    fn puts_a_directory_before_what_is_in_it() {
        let bytes = archive(&sample()).unwrap();
        let at = |name: &[u8]| bytes.windows(name.len()).position(|window| window == name).unwrap();
        assert!(at(b"dev\0") < at(b"dev/console\0"));
        assert!(at(b"dev/console\0") < at(b"init\0"));
    }

    #[test]
    fn keeps_everything_aligned_to_4_bytes() {
        for length in 0..9 {
            let entries =
                BTreeMap::from([("f".to_string(), Entry::File { mode: 0o644, content: vec![b'x'; length] })]);
            let bytes = archive(&entries).unwrap();
            let trailer = bytes.windows(6).rposition(|window| window == MAGIC.as_bytes()).unwrap();
            assert_eq!((bytes.len() % 4, trailer % 4), (0, 0), "content of {length} bytes");
        }
    }

    /// A second opinion from GNU cpio, where the machine has it.
    #[test]
    fn is_read_back_by_cpio() {
        let Ok(mut child) = Command::new("cpio")
            .args(["--list", "--verbose", "--quiet", "--numeric-uid-gid"])
            .env("TZ", "UTC")
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            return;
        };
        child.stdin.take().unwrap().write_all(&archive(&sample()).unwrap()).unwrap();
        let listing = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<&str> = listing.lines().collect();
        assert_eq!(lines.len(), 3, "{listing}");
        assert!(lines[0].starts_with("drwxr-xr-x   2 0        0"), "{listing}");
        assert!(
            lines[1].starts_with("crw-------   1 0        0          5,   1 Jan  1  1970 dev/console"),
            "{listing}"
        );
        assert!(lines[2].ends_with("5 Jan  1  1970 init"), "{listing}");
    }
}
