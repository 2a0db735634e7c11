//! What the guest's kernel says on its console.
//!
//! It says nothing unless it is in trouble. The last [`KEEP`] bytes are kept, so that a VM that stops unexpectedly
//! can be explained. The pipe's write end is also the VMM's stderr: what that process says before it dies is as
//! interesting. All of it comes from the guest and is made printable before it is shown.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::io::Interest;

use super::poll::register;

/// How much is kept, in bytes: a kernel's panic with its registers and call trace is 4 to 6 KiB.
const KEEP: usize = 16 * 1024;
/// Longest line shown; the rest of a longer one is cut.
const LINE_MAX: usize = 240;

/// The reading side.
#[derive(Debug)]
pub struct Console {
    pipe: File,
    tail: RefCell<VecDeque<u8>>,
}

impl Console {
    /// A console and the end that VMM and guest write to.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok((Console { pipe: read.into(), tail: RefCell::default() }, write))
    }

    /// Reads what is there now; whether there can be more.
    pub fn read(&self) -> bool {
        let mut buffer = [0; 4096];
        loop {
            match (&self.pipe).read(&mut buffer) {
                Ok(0) => return false,
                Ok(n) => {
                    tracing::debug!(console = %printable(&buffer[..n]).join(" | "));
                    self.keep(&buffer[..n]);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
            }
        }
    }

    /// Reads until the other side is closed everywhere, which is when the VM is gone.
    pub async fn read_all(&self) {
        let Ok(pipe) = register(self.pipe.as_fd(), Interest::READABLE) else { return };
        while let Ok(mut ready) = pipe.readable().await {
            if !self.read() {
                return;
            }
            ready.clear_ready();
        }
    }

    fn keep(&self, bytes: &[u8]) {
        let mut tail = self.tail.borrow_mut();
        tail.extend(bytes);
        let surplus = tail.len().saturating_sub(KEEP);
        tail.drain(..surplus);
    }

    /// The last lines, printable, none of them empty.
    pub fn lines(&self) -> Vec<String> {
        let tail = self.tail.borrow();
        let (a, b) = tail.as_slices();
        printable(&[a, b].concat())
    }

    /// The line with which a kernel begins to die.
    pub fn panic(&self) -> Option<String> {
        let lines = self.lines();
        let message = lines.iter().find_map(|line| line.split_once("Kernel panic - ")).map(|(_, m)| m)?;
        Some(message.to_owned())
    }
}

/// Lines without control characters: no escape sequence of a guest reaches a terminal or a log.
fn printable(bytes: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(bytes)
        .lines()
        .map(|line| {
            let clean = line.chars().map(|c| if c.is_control() { ' ' } else { c });
            clean.take(LINE_MAX).collect::<String>().trim_end().to_owned()
        })
        .filter(|line| !line.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_tail_is_kept_and_made_printable() {
        let (console, write) = Console::new().unwrap();
        let mut write = File::from(write);
        for n in 0..3000 {
            writeln!(write, "line {n}").unwrap();
            console.read();
        }
        write.write_all(b"\r\n\x1b[31mKernel panic - not syncing: \xffboo\x07\r\n").unwrap();
        assert!(console.read(), "the other end is open");
        drop(write);
        assert!(!console.read(), "and now it is closed");
        assert!(console.tail.borrow().len() <= KEEP);
        let lines = console.lines();
        assert!(lines.iter().any(|line| line == "line 2999"));
        assert!(!lines.iter().any(|line| line == "line 0"));
        assert!(lines.iter().all(|line| !line.contains(char::is_control)));
        assert_eq!(console.panic().unwrap(), "not syncing: \u{fffd}boo");
    }
}
