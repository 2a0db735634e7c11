//! Threads of their own for work in another namespace, which a thread enters for good.
//!
//! A host that has no thread to give is an error of that work, and never the end of the process: others live by it.

use std::io;
use std::thread::{Builder, scope};

/// Does `work` in a thread of its own and waits for it.
pub fn aside<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    scope(|scope| match Builder::new().spawn_scoped(scope, work)?.join() {
        Ok(done) => Ok(done),
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
