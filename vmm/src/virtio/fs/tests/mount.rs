//! A guest's driver of the device: it has mounted the share and asks in FUSE's own words (linux/fuse.h).

use super::*;

pub(super) const LOOKUP: u32 = 1;
pub(super) const FORGET: u32 = 2;
pub(super) const GETATTR: u32 = 3;
pub(super) const SETATTR: u32 = 4;
pub(super) const READLINK: u32 = 5;
pub(super) const SYMLINK: u32 = 6;
pub(super) const MKNOD: u32 = 8;
pub(super) const MKDIR: u32 = 9;
pub(super) const UNLINK: u32 = 10;
pub(super) const RENAME: u32 = 12;
pub(super) const LINK: u32 = 13;
pub(super) const OPEN: u32 = 14;
pub(super) const READ: u32 = 15;
pub(super) const WRITE: u32 = 16;
pub(super) const STATFS: u32 = 17;
pub(super) const RELEASE: u32 = 18;
pub(super) const FSYNC: u32 = 20;
pub(super) const SETXATTR: u32 = 21;
pub(super) const GETXATTR: u32 = 22;
pub(super) const LISTXATTR: u32 = 23;
pub(super) const FLUSH: u32 = 25;
pub(super) const INIT: u32 = 26;
pub(super) const OPENDIR: u32 = 27;
pub(super) const READDIR: u32 = 28;
pub(super) const CREATE: u32 = 35;
pub(super) const BATCH_FORGET: u32 = 42;
pub(super) const READDIRPLUS: u32 = 44;

pub(super) const ROOT: u64 = 1;
pub(super) const HEADER: usize = 16;

/// A directory that is removed in the end, and a guest that has mounted it.
pub(super) struct Mount {
    pub(super) dir: PathBuf,
    pub(super) driver: TestDriver,
    pub(super) unique: u64,
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A reply: an error number, or the payload.
pub(super) type Reply = Result<Vec<u8>, i32>;

impl Mount {
    pub(super) fn unmounted() -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("stockade-fs-test-{}-{n}", std::process::id()));
        std::fs::create_dir_all(dir.join("share")).unwrap();
        // As the jail has it, for the threads that are started here: without root, it is refused and not needed.
        let bits = rustix::thread::CapabilitiesSecureBits::NO_SETUID_FIXUP;
        let _ = rustix::thread::set_capabilities_secure_bits(bits);
        let device = new("share", dir.join("share").to_str().unwrap()).unwrap();
        let mut mount = Self { dir, driver: TestDriver::new(device), unique: 0 };
        mount.driver.start();
        mount
    }

    pub(super) fn new() -> Self {
        let mut mount = Self::unmounted();
        mount.init();
        mount
    }

    pub(super) fn init(&mut self) {
        let reply = self.call(INIT, 0, &init_request()).unwrap();
        assert_eq!(u32s(&reply)[0], 7);
    }

    pub(super) fn share(&self, path: &str) -> PathBuf {
        self.dir.join("share").join(path)
    }

    pub(super) fn write(&self, path: &str, text: &[u8]) {
        std::fs::write(self.share(path), text).unwrap();
    }

    pub(super) fn call(&mut self, op: u32, node: u64, body: &[u8]) -> Reply {
        self.call_as(0, op, node, body)
    }

    pub(super) fn call_as(&mut self, user: u32, op: u32, node: u64, body: &[u8]) -> Reply {
        let mark = self.driver.heap;
        self.unique += 1;
        let len = 40 + body.len() as u32;
        let header = [
            &words(&[len, op])[..],
            &self.unique.to_le_bytes(),
            &node.to_le_bytes(),
            &words(&[user, user, 1, 0]),
        ]
        .concat();
        let (header, body) = (self.driver.put(&header), (self.driver.put(body), body.len() as u32));
        let reply = self.driver.alloc(64 << 10);
        let n =
            self.exchange(&[Buf::Read(header, 40), Buf::Read(body.0, body.1), Buf::Write(reply, 64 << 10)]);
        let reply = self.driver.get(reply, n as usize);
        self.driver.heap = mark;
        assert!(reply.len() >= HEADER, "no reply to operation {op}");
        assert_eq!(u32s(&reply)[0], n, "the reply does not know its length");
        assert_eq!(reply[8..16], self.unique.to_le_bytes());
        match u32s(&reply)[1] as i32 {
            0 => Ok(reply[HEADER..].to_vec()),
            error => Err(-error),
        }
    }

    pub(super) fn exchange(&mut self, bufs: &[Buf]) -> u32 {
        self.driver.add(REQUESTS, bufs);
        self.driver.kick(REQUESTS);
        self.driver.wait_used(REQUESTS).1
    }

    /// The node and the mode.
    pub(super) fn lookup(&mut self, parent: u64, name: &str) -> Result<(u64, u32), i32> {
        self.call(LOOKUP, parent, &cstr(name)).map(|entry| (u64_at(&entry, 0), u32s(&entry)[10 + 15]))
    }

    pub(super) fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.call(OPEN, node, &words(&[flags as u32, 0])).map(|open| u64_at(&open, 0))
    }

    pub(super) fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Reply {
        let body =
            [&handle.to_le_bytes()[..], &offset.to_le_bytes(), &words(&[size, 0, 0, 0, 0, 0])].concat();
        self.call(READ, node, &body)
    }

    pub(super) fn write_at(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Reply {
        let fields = words(&[data.len() as u32, 0, 0, 0, 1, 0]);
        let body = [&handle.to_le_bytes()[..], &offset.to_le_bytes(), &fields, data].concat();
        self.call(WRITE, node, &body)
    }
}

/// A client that is able to do everything.
pub(super) fn init_request() -> Vec<u8> {
    [words(&[7, 40, 1 << 20, u32::MAX, u32::MAX]), vec![0; 44]].concat()
}

pub(super) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(super) fn cstr(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

pub(super) fn u32s(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
