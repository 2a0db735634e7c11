//! Descriptors in the event loop.

use std::os::fd::{AsFd, AsRawFd};

use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdRegisterError};

/// Registers a descriptor with the runtime that is running.
pub fn register<T: AsFd + AsRawFd>(
    inner: T,
    interest: Interest,
) -> Result<AsyncFd<T>, AsyncFdRegisterError<T>> {
    // SAFETY: what implements AsFd keeps its descriptor open as long as it lives, and AsyncFd owns it from here on.
    unsafe { AsyncFd::register_with_interest(inner, interest) }
}
