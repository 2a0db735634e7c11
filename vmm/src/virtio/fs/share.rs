//! What a guest may do to the share directory: `fuse-backend-rs`' passthrough file system, with the guest's
//! requests checked first.
//!
//! The guest's kernel checks permissions (virtiofs always mounts with `default_permissions`), so the host
//! side does as it is told, within the directory. Refused are: names that are not one plain path component
//! (CVE-2026-47243), device nodes (CVE-2026-24834), extended attributes outside of an allow-list, more
//! open handles or known inodes than [`Limits`] (CVE-2020-10717). Symbolic links are never followed here:
//! inodes are opened with `O_PATH|O_NOFOLLOW` component by component, and only directories and regular files
//! are ever opened for more.
//!
//! Each file system of the host in the directory is one of its own in the guest ([`Nodes::learn`]).
//!
//! Caching: data is written through, at once. What the guest has cached of names, attributes and data is
//! taken as valid for [`VALID_FOR`]; then it is asked for again, and data is dropped if size or modification
//! time differ. So a change on the host shows in the guest within that time, as with NFS.
//!
//! Locks stay in the guest: a blocked lock would block the one thread here. ACLs can be read and set, but only
//! the mode bits are enforced (FUSE_POSIX_ACL would cost a request an inode). O_DIRECT is passed on.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::caller::{also_as, as_caller};
use super::limits::Limits;
use super::link::{Known, link};
use super::nodes::Nodes;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, ROOT_ID, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};

/// How long the guest may use names and attributes without asking. One second is what virtiofsd has in its
/// default mode: long enough that a container's start asks once for everything, short enough for volumes
/// that others change too.
const VALID_FOR: Duration = Duration::from_secs(1);

/// Largest directory reply, in bytes; also bounds the buffer that is allocated for it.
const MAX_DIRECTORY_REPLY: u32 = 1 << 20;

/// Largest value or list of extended attributes, in bytes (XATTR_SIZE_MAX, XATTR_LIST_MAX in Linux).
const MAX_XATTR: u32 = 64 << 10;

/// The two entries that every directory begins with, which the passthrough leaves out, and the offsets at which
/// the guest goes on behind each of them: values that no file system uses for its own.
const DOTS: [(&[u8], u64); 2] = [(b".", 1 << 62 | 0x5d07), (b"..", 1 << 62 | 0x5d08)];

/// What FUSE says for the inode number of an entry that it does not know (FUSE_UNKNOWN_INO in libfuse).
const UNKNOWN_INODE_NUMBER: u64 = 0xffff_ffff;

type Inode = u64;
type Handle = u64;
/// What the answer to a CREATE is made of.
type Created = (Entry, Option<Handle>, OpenOptions, Option<u32>);

/// What a handle is of.
#[derive(Clone, Copy)]
enum Opened {
    /// A file, with the flags that it was opened with.
    File(u32),
    Directory,
}

/// See the module.
pub struct Share {
    inner: PassthroughFs,
    opened: Mutex<HashMap<Handle, Opened>>,
    max_handles: usize,
    nodes: Nodes,
}

impl Share {
    /// Serves the directory `root`.
    pub fn new(root: String, limits: Limits) -> io::Result<Self> {
        let config = Config {
            root_dir: root,
            entry_timeout: VALID_FOR,
            attr_timeout: VALID_FOR,
            cache_policy: CachePolicy::Auto,
            // File capabilities and ACLs of images and volumes are theirs to have.
            xattr: true,
            // A guest that writes to a set-uid file loses the bit, in the same request.
            killpriv_v2: true,
            writeback: false,
            ..Config::default()
        };
        let inner = PassthroughFs::new(config)?;
        let opened = Mutex::new(HashMap::new());
        Ok(Self { inner, opened, max_handles: limits.handles, nodes: Nodes::new(limits.inodes) })
    }

    /// Inodes that the guest holds, without the root.
    #[cfg(test)]
    pub fn known_inodes(&self) -> usize {
        self.nodes.len()
    }

    /// Counts an entry of `parent` that the guest gets to know, or takes it back if it knows too many.
    fn known(&self, ctx: &Context, parent: Inode, mut entry: Entry) -> io::Result<Entry> {
        if self.nodes.learn(parent, &mut entry) {
            Ok(entry)
        } else {
            self.inner.forget(ctx, entry.inode, 1);
            fail(libc::ENFILE)
        }
    }

    /// Before something is made that the guest would then know.
    fn may_know_more(&self) -> io::Result<()> {
        if self.nodes.is_full() { fail(libc::ENFILE) } else { Ok(()) }
    }

    /// Whether the guest may keep what it has cached of a file that it opens: if nothing has changed since it
    /// was opened last.
    fn cache_options(&self, ctx: &Context, inode: Inode, handle: Option<Handle>) -> OpenOptions {
        match self.inner.getattr(ctx, inode, handle) {
            Ok((attributes, _)) if self.nodes.is_unchanged(inode, &attributes) => OpenOptions::KEEP_CACHE,
            _ => OpenOptions::empty(),
        }
    }

    /// Opens a file that is there as who asks, since the guest's kernel need not know it.
    fn open_by_name(&self, ctx: &Context, parent: Inode, name: &CStr, args: CreateIn) -> io::Result<Created> {
        let entry = self.inner.lookup(ctx, parent, name)?;
        let opened = as_caller(ctx, || self.inner.open(ctx, entry.inode, args.flags, args.fuse_flags));
        match opened {
            Ok((handle, options, backing)) => Ok((entry, handle, options, backing)),
            Err(e) => {
                self.inner.forget(ctx, entry.inode, 1);
                Err(e)
            }
        }
    }

    fn may_open(&self) -> io::Result<()> {
        if self.lock().len() < self.max_handles { Ok(()) } else { fail(libc::ENFILE) }
    }

    fn opened(&self, handle: Option<Handle>, opened: Opened) {
        if let Some(handle) = handle {
            self.lock().insert(handle, opened);
        }
    }

    fn closed(&self, handle: Handle) {
        self.lock().remove(&handle);
    }

    /// The flags with which a file is read and written: always those that it was opened with.
    ///
    /// The passthrough sets the flags of every request on its own descriptor, and where the host's kernel refuses
    /// them (O_DIRECT on a directory) it closes that descriptor, whose number the next file or socket to be opened
    /// then has, in reach of the guest. So no request ever comes with other flags. What a guest changes later is its
    /// own affair: O_APPEND it adds to the offset itself, and O_DIRECT past its cache is past it on this side too.
    fn flags(&self, handle: Handle) -> io::Result<u32> {
        match self.lock().get(&handle) {
            Some(Opened::File(flags)) => Ok(*flags),
            Some(Opened::Directory) | None => fail(libc::EBADF),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Handle, Opened>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// FOPEN_NOFLUSH: no FLUSH request when the file is closed. Nothing of a file that is only read could be
/// flushed, and every request saved is two thread switches and half a dozen VM exits.
fn no_flush() -> OpenOptions {
    const FOPEN_NOFLUSH: u32 = 1 << 5;
    // SAFETY: the crate does not know the flag; it only copies the bits into the reply.
    unsafe { OpenOptions::from_bits_unchecked(FOPEN_NOFLUSH) }
}

fn fail<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

/// One plain path component, as FUSE clients send it.
fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => fail(libc::EINVAL),
        name if name.contains(&b'/') => fail(libc::EINVAL),
        _ => Ok(()),
    }
}

/// Attributes that make sense to both sides. Labels of the host's security modules and `trusted.*`, which
/// steers overlayfs on the host, are none of the guest's business.
fn check_xattr(name: &CStr) -> io::Result<()> {
    let name = name.to_bytes();
    if name.starts_with(b"user.")
        || name == b"security.capability"
        || name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
    {
        Ok(())
    } else {
        fail(libc::EOPNOTSUPP)
    }
}

impl FileSystem for Share {
    type Inode = Inode;
    type Handle = Handle;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let ours = FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::ASYNC_DIO
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::CACHE_SYMLINKS
            | FsOptions::SUBMOUNTS
            | FsOptions::INIT_EXT;
        let options = (self.inner.init(capable)? | ours) & capable;
        self.nodes.set_root(&self.inner.getattr(&Context::new(), ROOT_ID, None)?.0);
        Ok(options)
    }

    fn destroy(&self) {
        self.inner.destroy();
        self.lock().clear();
        self.nodes.clear();
    }

    fn lookup(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        self.known(ctx, parent, self.inner.lookup(ctx, parent, name)?)
    }

    fn forget(&self, ctx: &Context, inode: Inode, count: u64) {
        self.nodes.forget(inode, count);
        self.inner.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: &Context, requests: Vec<(Inode, u64)>) {
        for (inode, count) in &requests {
            self.nodes.forget(*inode, *count);
        }
        self.inner.batch_forget(ctx, requests);
    }

    fn getattr(&self, ctx: &Context, inode: Inode, handle: Option<Handle>) -> io::Result<(stat64, Duration)> {
        let (attributes, valid_for) = self.inner.getattr(ctx, inode, handle)?;
        Ok((self.nodes.shown(inode, attributes), valid_for))
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: Inode,
        attr: stat64,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let (attributes, valid_for) = self.inner.setattr(ctx, inode, attr, handle, valid)?;
        Ok((self.nodes.shown(inode, attributes), valid_for))
    }

    fn readlink(&self, ctx: &Context, inode: Inode) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inode)
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: Inode, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        self.may_know_more()?;
        self.known(ctx, parent, self.inner.symlink(ctx, target, parent, name)?)
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        check_name(name)?;
        match mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => (),
            // Not even 0:0, with which overlayfs marks deleted files: the jail's filter has the type's bit end the
            // process, and an overlay that keeps its changes here needs attributes that a guest may not set either.
            _ => return fail(libc::EPERM),
        }
        self.may_know_more()?;
        self.known(ctx, parent, self.inner.mknod(ctx, parent, name, mode, rdev, umask)?)
    }

    fn mkdir(&self, ctx: &Context, parent: Inode, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        check_name(name)?;
        self.may_know_more()?;
        self.known(ctx, parent, self.inner.mkdir(ctx, parent, name, mode, umask)?)
    }

    fn unlink(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        self.inner.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        self.inner.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: &Context,
        from: Inode,
        from_name: &CStr,
        to: Inode,
        to_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        check_name(from_name)?;
        check_name(to_name)?;
        // RENAME_WHITEOUT makes a device node, if a harmless one; the guest's overlayfs does without.
        if flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
            return fail(libc::EINVAL);
        }
        also_as(ctx, || self.inner.rename(ctx, from, from_name, to, to_name, flags))
    }

    fn link(&self, ctx: &Context, inode: Inode, parent: Inode, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        self.may_know_more()?;
        let known = |inode| {
            let path = self.inner.readlinkat_proc_file(inode)?;
            io::Result::Ok(Known { path, attributes: self.inner.getattr(ctx, inode, None)?.0 })
        };
        let (file, parent_of_it) = (known(inode)?, known(parent)?);
        also_as(ctx, || link(&file, &parent_of_it, name))?;
        self.known(ctx, parent, self.inner.lookup(ctx, parent, name)?)
    }

    fn open(
        &self,
        ctx: &Context,
        inode: Inode,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions, Option<u32>)> {
        self.may_open()?;
        let (handle, mut options, backing) = self.inner.open(ctx, inode, flags, fuse_flags)?;
        self.opened(handle, Opened::File(flags));
        options |= self.cache_options(ctx, inode, handle);
        if flags as i32 & libc::O_ACCMODE == libc::O_RDONLY {
            options |= no_flush();
        }
        Ok((handle, options, backing))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: Inode,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions, Option<u32>)> {
        check_name(name)?;
        self.may_open()?;
        self.may_know_more()?;
        // The passthrough counts what is there already as known before it opens that, and where it cannot be opened (a
        // pipe, a symbolic link) never takes it back. So it makes new files only, and what is there is opened here.
        let exclusive = args.flags | libc::O_EXCL as u32;
        let made = self.inner.create(ctx, parent, name, CreateIn { flags: exclusive, ..args });
        let is_there = matches!(&made, Err(e) if e.raw_os_error() == Some(libc::EEXIST));
        let (flags, (entry, handle, options, backing)) = if is_there && args.flags != exclusive {
            (args.flags, self.open_by_name(ctx, parent, name, args)?)
        } else {
            (exclusive, made?)
        };
        self.opened(handle, Opened::File(flags));
        Ok((self.known(ctx, parent, entry)?, handle, options, backing))
    }

    fn read(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let flags = self.flags(handle)?;
        self.inner.read(ctx, inode, handle, writer, size, offset, lock_owner, flags)
    }

    fn write(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let opened_with = self.flags(handle)?;
        // What was opened to append is appended to, wherever the guest means to write.
        if opened_with & !flags & libc::O_APPEND as u32 != 0 {
            return fail(libc::EINVAL);
        }
        let flags = opened_with;
        self.inner.write(ctx, inode, handle, reader, size, offset, lock_owner, delayed, flags, fuse_flags)
    }

    fn flush(&self, ctx: &Context, inode: Inode, handle: Handle, lock_owner: u64) -> io::Result<()> {
        self.inner.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        self.inner.fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.inner.fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: &Context,
        inode: Inode,
        flags: u32,
        handle: Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.inner
            .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
            .inspect(|()| self.closed(handle))
    }

    fn statfs(&self, ctx: &Context, inode: Inode) -> io::Result<statvfs64> {
        self.inner.statfs(ctx, inode)
    }

    fn setxattr(&self, ctx: &Context, inode: Inode, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        check_xattr(name)?;
        self.inner.setxattr(ctx, inode, name, value, flags)
    }

    fn getxattr(&self, ctx: &Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        check_xattr(name)?;
        self.inner.getxattr(ctx, inode, name, size.min(MAX_XATTR))
    }

    fn listxattr(&self, ctx: &Context, inode: Inode, size: u32) -> io::Result<ListxattrReply> {
        Ok(match self.inner.listxattr(ctx, inode, size.min(MAX_XATTR))? {
            ListxattrReply::Names(names) => ListxattrReply::Names(visible_names(&names)),
            count => count,
        })
    }

    fn removexattr(&self, ctx: &Context, inode: Inode, name: &CStr) -> io::Result<()> {
        check_xattr(name)?;
        self.inner.removexattr(ctx, inode, name)
    }

    fn opendir(&self, ctx: &Context, inode: Inode, flags: u32) -> io::Result<(Option<Handle>, OpenOptions)> {
        self.may_open()?;
        self.inner.opendir(ctx, inode, flags).inspect(|(handle, _)| self.opened(*handle, Opened::Directory))
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        match add_dots(offset, add_entry)? {
            None => Ok(()),
            Some(offset) => {
                self.inner.readdir(ctx, inode, handle, size.min(MAX_DIRECTORY_REPLY), offset, add_entry)
            }
        }
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let Some(offset) = add_dots(offset, &mut |dot| add_entry(dot, Entry::default()))? else {
            return Ok(());
        };
        let mut add = |name: DirEntry, mut entry: Entry| {
            let node = entry.inode;
            if self.nodes.learn(inode, &mut entry) {
                let added = add_entry(name, entry);
                if !matches!(added, Ok(n) if n > 0) {
                    self.nodes.forget(node, 1);
                }
                return added;
            }
            // Node 0: the name only, to be looked up when it is needed (`fuse_direntplus_link` in Linux).
            let added = add_entry(name, Entry { inode: 0, ..entry });
            if matches!(added, Ok(n) if n > 0) {
                self.inner.forget(ctx, node, 1);
            }
            added
        };
        self.inner.readdirplus(ctx, inode, handle, size.min(MAX_DIRECTORY_REPLY), offset, &mut add)
    }

    fn fsyncdir(&self, ctx: &Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: &Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()> {
        self.inner.releasedir(ctx, inode, flags, handle).inspect(|()| self.closed(handle))
    }

    fn access(&self, ctx: &Context, inode: Inode, mask: u32) -> io::Result<()> {
        self.inner.access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }
}

/// Begins a listing with the entries for the directory itself and its parent, if `offset` is there. Returns
/// the offset at which the host's entries go on, or nothing if the reply is full.
fn add_dots(
    offset: u64,
    add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
) -> io::Result<Option<u64>> {
    let start = match DOTS.iter().position(|(_, behind)| *behind == offset) {
        Some(index) => index + 1,
        None if offset == 0 => 0,
        None => return Ok(Some(offset)),
    };
    for (name, behind) in DOTS.into_iter().skip(start) {
        let type_ = u32::from(libc::DT_DIR);
        if add_entry(DirEntry { ino: UNKNOWN_INODE_NUMBER, offset: behind, type_, name })? == 0 {
            return Ok(None);
        }
    }
    Ok(Some(0))
}

/// The names of a list that [`check_xattr`] lets through.
fn visible_names(names: &[u8]) -> Vec<u8> {
    names
        .split_inclusive(|byte| *byte == 0)
        .filter(|name| CStr::from_bytes_with_nul(name).is_ok_and(|name| check_xattr(name).is_ok()))
        .flatten()
        .copied()
        .collect()
}
