//! One direction of bytes that a program produces, read by a thread of its own so that the program never waits
//! for the test, and looked at by the test as it arrives.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::HANG;

/// What has arrived so far. Clones are views of the same bytes.
#[derive(Clone, Default)]
pub struct Stream {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
    /// How much of `bytes` the test has already been given by `line`.
    taken: usize,
}

impl Stream {
    /// Reads `from` to its end in the background. A pty master whose other side is gone ends with EIO: that is
    /// an end like any other.
    pub fn reading(mut from: impl Read + Send + 'static) -> Self {
        let stream = Self::default();
        let shared = Arc::clone(&stream.shared);
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            loop {
                match from.read(&mut buffer) {
                    Ok(n @ 1..) => shared.lock().bytes.extend_from_slice(&buffer[..n]),
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Ok(0) | Err(_) => break,
                }
                shared.arrived.notify_all();
            }
            shared.lock().ended = true;
            shared.arrived.notify_all();
        });
        stream
    }

    /// A stream that nobody writes to.
    pub fn closed() -> Self {
        let stream = Self::default();
        stream.shared.lock().ended = true;
        stream
    }

    /// Waits until `look` finds something in all that has arrived, at the latest at the end of the stream.
    /// `None` when the stream ended without it; an error with what had arrived when it takes too long.
    pub fn wait_for<T>(&self, mut look: impl FnMut(&[u8]) -> Option<T>) -> Result<Option<T>, Hung> {
        let deadline = Instant::now() + HANG;
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = look(&state.bytes) {
                return Ok(Some(found));
            }
            if state.ended {
                return Ok(None);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Hung);
            }
            state = self
                .shared
                .arrived
                .wait_timeout(state, left)
                .map(|(state, _)| state)
                .unwrap_or_else(|poison| poison.into_inner().0);
        }
    }

    /// The next line that no earlier call was given, without its end. `None` at the end of the stream.
    pub fn line(&self) -> Result<Option<String>, Hung> {
        let from = self.shared.lock().taken;
        let line = self.wait_for(|bytes| {
            let rest = &bytes[from..];
            let end = rest.iter().position(|byte| *byte == b'\n')?;
            Some((String::from_utf8_lossy(&rest[..end]).trim_end_matches('\r').to_owned(), from + end + 1))
        })?;
        Ok(line.map(|(line, next)| {
            self.shared.lock().taken = next;
            line
        }))
    }

    /// Waits for the end of the stream.
    pub fn ended(&self) -> Result<(), Hung> {
        let mut state = self.shared.lock();
        let deadline = Instant::now() + HANG;
        while !state.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Hung);
            }
            state = self
                .shared
                .arrived
                .wait_timeout(state, left)
                .map(|(state, _)| state)
                .unwrap_or_else(|poison| poison.into_inner().0);
        }
        Ok(())
    }

    /// Everything that has arrived.
    pub fn bytes(&self) -> Vec<u8> {
        self.shared.lock().bytes.clone()
    }

    /// Everything that has arrived, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().bytes).into_owned()
    }

    /// How many bytes have arrived.
    pub fn len(&self) -> usize {
        self.shared.lock().bytes.len()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something did not happen within [`HANG`].
#[derive(Debug, Clone, Copy)]
pub struct Hung;
