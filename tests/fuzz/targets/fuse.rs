//! FUSE requests against a share, in a sequence: any operation on any node and handle, with names that want to leave
//! the share. Beside it lies what must not be reached.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use arbitrary::{Result, Unstructured};
use stockade_vmm::fuzzing;
use stockade_vmm::virtio::testing::{Buf, TestDriver};
use tempfile::TempDir;

const REQUESTS: usize = 1;
const REPLY: u32 = 32 << 10;
const SECRET: &[u8] = b"SECRET OF THE HOST";

/// A share, and beside it a directory with a secret.
pub struct ShareDir(TempDir);

impl ShareDir {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["share", "share/dir", "outside"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("outside/secret"), SECRET).unwrap();
        // The file server makes its process's umask 0.
        fs::set_permissions(at("outside/secret"), Permissions::from_mode(0o640)).unwrap();
        fs::write(at("share/file"), b"content").unwrap();
        symlink("../outside", at("share/up")).unwrap();
        symlink("../outside/secret", at("share/link")).unwrap();
        symlink(at("outside/secret"), at("share/dir/absolute")).unwrap();
        ShareDir(dir)
    }

    pub fn share(&self) -> String {
        self.0.path().join("share").to_str().unwrap().to_owned()
    }

    /// Nothing outside was touched, and nothing inside is a way out.
    pub fn check(&self) {
        let names = |dir: &Path| {
            let mut names: Vec<_> =
                fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(self.0.path()), ["outside", "share"]);
        assert_eq!(names(&self.0.path().join("outside")), ["secret"]);
        let secret = self.0.path().join("outside/secret");
        assert_eq!(fs::read(&secret).unwrap(), SECRET);
        let meta = fs::symlink_metadata(&secret).unwrap();
        assert_eq!((meta.nlink(), meta.mode() & 0o7777), (1, 0o640), "the secret was linked or changed");
        no_devices(&self.0.path().join("share"));
    }
}

fn no_devices(dir: &Path) {
    // What the guest has made unreadable for its owner cannot be looked into unless by root, who runs this.
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let meta = entry.path().symlink_metadata().unwrap();
        let device = meta.file_type().is_block_device() || meta.file_type().is_char_device();
        assert!(!device, "a device was made: {}", entry.path().display());
        if meta.is_dir() {
            no_devices(&entry.path());
        }
    }
}

pub fn run(input: &[u8]) {
    let dir = ShareDir::new();
    let mut mount = Mount {
        driver: TestDriver::started(fuzzing::fs(&dir.share()).unwrap()),
        nodes: vec![1],
        handles: vec![0],
    };
    mount.send(&init_request());
    let _ = mount.attack(&mut Unstructured::new(input));
    drop(mount);
    dir.check();
}

/// INIT by a client that can do everything.
pub fn init_request() -> Vec<u8> {
    let words = [7u32, 40, 1 << 20, u32::MAX, u32::MAX];
    let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).chain([0; 44]).collect();
    request(26, 0, &body)
}

fn request(op: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let length = 40 + body.len() as u32;
    [&length.to_le_bytes()[..], &op.to_le_bytes(), &[1; 8], &node.to_le_bytes(), &[0; 16], body].concat()
}

struct Mount {
    driver: TestDriver,
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

/// Names as they are and as they must not be.
const NAMES: [&[u8]; 22] = [
    b"file",
    b"dir",
    b"link",
    b"up",
    b"absolute",
    b"new",
    b"other",
    b"new",
    b"",
    b".",
    b"..",
    b"/",
    b"a/b",
    b"../outside/secret",
    b"up/secret",
    b"/etc/passwd",
    b"./file",
    b"..\0",
    b"user.x",
    b"security.capability",
    b"trusted.overlay.opaque",
    b"\xff\xfe",
];

impl Mount {
    fn attack(&mut self, bytes: &mut Unstructured) -> Result<()> {
        while !bytes.is_empty() {
            let op = bytes.int_in_range(0..=52u32)?;
            let node = if bytes.ratio(9, 10)? { *bytes.choose(&self.nodes)? } else { bytes.arbitrary()? };
            let handle =
                if bytes.ratio(9, 10)? { *bytes.choose(&self.handles)? } else { bytes.arbitrary()? };
            let other = *bytes.choose(&self.nodes)?;
            let body = body(op, handle, other, bytes)?;
            let mut request = request(op, node, &body);
            if bytes.ratio(1, 20)? {
                let length: u32 = bytes.arbitrary()?;
                request[..4].copy_from_slice(&length.to_le_bytes());
            }
            let reply = self.send(&request);
            assert!(
                !reply.windows(SECRET.len()).any(|part| part == SECRET),
                "operation {op} gave the secret away"
            );
            let number = |at: usize| reply.get(at..at + 8).map(|b| u64::from_le_bytes(b.try_into().unwrap()));
            let good = reply.get(4..8) == Some(&[0; 4]);
            match (op, number(16)) {
                // LOOKUP, SYMLINK, MKNOD, MKDIR, LINK, CREATE: an entry, and behind CREATE's the handle.
                (1 | 6 | 8 | 9 | 13 | 35, Some(node)) if good && self.nodes.len() < 64 => {
                    self.nodes.push(node);
                    self.handles.extend(number(16 + 128).filter(|_| op == 35));
                }
                // OPEN, OPENDIR.
                (14 | 27, Some(handle)) if good && self.handles.len() < 64 => self.handles.push(handle),
                _ => (),
            }
        }
        Ok(())
    }

    fn send(&mut self, request: &[u8]) -> Vec<u8> {
        self.driver.heap = 1 << 20;
        let at = self.driver.put(request);
        let reply = self.driver.alloc(REPLY.into());
        self.driver.add(REQUESTS, &[Buf::Read(at, request.len() as u32), Buf::Write(reply, REPLY)]);
        self.driver.kick(REQUESTS);
        let (_, written) = self.driver.wait_used(REQUESTS);
        assert!(written <= REPLY);
        self.driver.get(reply, written as usize)
    }
}

/// What an operation wants behind its header (linux/fuse.h), with fields of all kinds.
fn body(op: u32, handle: u64, other: u64, bytes: &mut Unstructured) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    let words = |body: &mut Vec<u8>, n: usize, bytes: &mut Unstructured| -> Result<()> {
        for _ in 0..n {
            let word = match bytes.int_in_range(0..=3u8)? {
                0 => 0,
                1 => bytes.int_in_range(0..=255)?,
                // Modes, flags of open(2), sizes.
                2 => *bytes.choose(&[
                    0o100644,
                    0o040755,
                    0o020666,
                    0o060666,
                    0o010644,
                    0o120777,
                    0o2,
                    0o102,
                    0o1101,
                    1 << 20,
                    7 << 8 | 3,
                ])?,
                _ => bytes.arbitrary::<u32>()?,
            };
            body.extend(word.to_le_bytes());
        }
        Ok(())
    };
    let name = |body: &mut Vec<u8>, bytes: &mut Unstructured| -> Result<()> {
        body.extend(*bytes.choose(&NAMES)?);
        if bytes.ratio(19, 20)? {
            body.push(0);
        }
        Ok(())
    };
    match op {
        1 | 10 | 11 | 22 | 24 => name(&mut body, bytes)?,
        6 => {
            name(&mut body, bytes)?;
            name(&mut body, bytes)?;
        }
        // MKNOD, MKDIR, CREATE, GETXATTR, SETXATTR...: numbers, then a name.
        8 | 35 => {
            words(&mut body, 4, bytes)?;
            name(&mut body, bytes)?;
        }
        9 => {
            words(&mut body, 2, bytes)?;
            name(&mut body, bytes)?;
        }
        21 => {
            words(&mut body, 2, bytes)?;
            name(&mut body, bytes)?;
            words(&mut body, 2, bytes)?;
        }
        // RENAME, LINK, RENAME2: the other node first.
        12 | 13 | 45 => {
            body.extend(other.to_le_bytes());
            if op == 45 {
                words(&mut body, 2, bytes)?;
            }
            name(&mut body, bytes)?;
            name(&mut body, bytes)?;
        }
        // READ, WRITE, RELEASE, FSYNC, FLUSH, READDIR, RELEASEDIR, FALLOCATE, LSEEK, READDIRPLUS: a handle first.
        15 | 16 | 18 | 20 | 25 | 28 | 29 | 30 | 43 | 44 | 46 => {
            body.extend(handle.to_le_bytes());
            let offset = if bytes.ratio(3, 4)? {
                bytes.arbitrary::<u8>()?.into()
            } else {
                bytes.arbitrary::<u64>()?
            };
            body.extend(offset.to_le_bytes());
            let size =
                if bytes.ratio(9, 10)? { bytes.int_in_range(0..=4096)? } else { bytes.arbitrary::<u32>()? };
            body.extend(size.to_le_bytes());
            words(&mut body, 5, bytes)?;
            if op == 16 {
                body.extend(vec![b'w'; size.min(4096) as usize]);
            }
        }
        4 => {
            words(&mut body, 2, bytes)?;
            body.extend(handle.to_le_bytes());
            words(&mut body, 18, bytes)?;
        }
        _ => {
            let n = bytes.int_in_range(0..=24)?;
            words(&mut body, n, bytes)?;
        }
    }
    Ok(body)
}
