//! Acting as who asks.
//!
//! The file server may do anything to files of any owner without being that owner, but for one thing: where a mount
//! shows files as others', nobody gives a file a name there whom the mount does not know (EOVERFLOW), and such a mount
//! need not know root. So a link or a new name that fails for that is tried once more as the user and group that ask, as
//! files are made anyway. The capabilities stay meanwhile, which the jail's secure bits see to.

use std::io;

use fuse_backend_rs::api::filesystem::Context;
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_res_gid, set_thread_res_uid};

/// What no user and no group is: to the kernel it says that nothing is to change.
const NOBODY_AT_ALL: u32 = u32::MAX;

/// Does `work`, and again as who asks, if root is not known where it is done.
pub fn also_as<T>(ctx: &Context, work: impl Fn() -> io::Result<T>) -> io::Result<T> {
    match work() {
        Err(e) if e.raw_os_error() == Some(libc::EOVERFLOW) => as_caller(ctx, work),
        done => done,
    }
}

/// Does `work` as who asks.
pub fn as_caller<T>(ctx: &Context, work: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let _caller = Caller::become_who_asks(ctx)?;
    work()
}

/// This thread as another user, until it is dropped.
struct Caller;

impl Caller {
    fn become_who_asks(ctx: &Context) -> io::Result<Self> {
        if [ctx.uid, ctx.gid].contains(&NOBODY_AT_ALL) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let caller = Caller;
        set_thread_res_gid(None, Gid::from_raw(ctx.gid), None)?;
        set_thread_res_uid(None, Uid::from_raw(ctx.uid), None)?;
        Ok(caller)
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let root = set_thread_res_uid(None, Uid::ROOT, None)
            .and_then(|()| set_thread_res_gid(None, Gid::ROOT, None));
        // Whatever came next would be done in another's name.
        if root.is_err() {
            std::process::abort();
        }
    }
}
