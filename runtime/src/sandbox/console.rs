//! What the guest's kernel says on its console.
//!
//! It says nothing unless it is in trouble. The last [`KEEP`] bytes are kept, so that a VM that stops unexpectedly
//! can be explained. The pipe's write end is also the VMM's stderr: what that process says before it dies is as
//! interesting. All of it comes from the guest and is made printable before it is shown.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::io::Interest;

use super::poll::register;
use crate::printable::printable;

/// How much is kept, in bytes: a kernel's panic with its registers and call trace is 4 to 6 KiB.
const KEEP: usize = 16 * 1024;
/// Longest line shown; the rest of a longer one is cut.
const LINE_MAX: usize = 240;
/// Most that is read at a time, so that a guest that writes without end does not keep the event loop: what a pipe holds.
const TURN: usize = 64 * 1024;
/// Most that is logged of one VM's console, in bytes: a thousand times what a healthy guest says. The log is a file of
/// the host's.
const LOGGED_MAX: usize = 1 << 20;

/// What a read leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing now; more can come.
    Nothing,
    /// The turn was over before the bytes were.
    Perhaps,
    /// The other side is closed everywhere.
    End,
}

/// The reading side.
#[derive(Debug)]
pub struct Console {
    pipe: File,
    tail: RefCell<VecDeque<u8>>,
    /// Bytes that went to the log.
    logged: Cell<usize>,
}

impl Console {
    /// A console and the end that VMM and guest write to.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok((Console { pipe: read.into(), tail: RefCell::default(), logged: Cell::new(0) }, write))
    }

    /// Reads what is there now, as far as a turn goes.
    pub fn read(&self) -> Left {
        let mut buffer = [0; 4096];
        let mut taken = 0;
        while taken < TURN {
            match (&self.pipe).read(&mut buffer) {
                Ok(0) => return Left::End,
                Ok(n) => {
                    self.log(&buffer[..n]);
                    self.keep(&buffer[..n]);
                    taken += n;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Left::Nothing,
                Err(_) => return Left::End,
            }
        }
        Left::Perhaps
    }

    fn log(&self, bytes: &[u8]) {
        let before = self.logged.get();
        if before > LOGGED_MAX {
            return;
        }
        self.logged.set(before + bytes.len());
        tracing::debug!(console = %lines_of(bytes).join(" | "));
        if self.logged.get() > LOGGED_MAX {
            tracing::debug!(
                "the guest's console has said more than {LOGGED_MAX} bytes: the rest is not logged"
            );
        }
    }

    /// Reads until the other side is closed everywhere, which is when the VM is gone.
    pub async fn read_all(&self) {
        let Ok(pipe) = register(self.pipe.as_fd(), Interest::READABLE) else { return };
        while let Ok(mut ready) = pipe.readable().await {
            match self.read() {
                Left::End => return,
                Left::Nothing => ready.clear_ready(),
                Left::Perhaps => tokio::task::yield_now().await,
            }
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
        lines_of(&[a, b].concat())
    }

    /// The line with which a kernel begins to die.
    pub fn panic(&self) -> Option<String> {
        let lines = self.lines();
        let message = lines.iter().find_map(|line| line.split_once("Kernel panic - ")).map(|(_, m)| m)?;
        Some(message.to_owned())
    }
}

/// Lines fit to be shown: no escape sequence of a guest reaches a terminal or a log.
fn lines_of(bytes: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(bytes)
        .lines()
        .map(|line| printable(line, LINE_MAX).trim_end().to_owned())
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
        assert_eq!(console.read(), Left::Nothing, "the other end is open");
        drop(write);
        assert_eq!(console.read(), Left::End, "and now it is closed");
        assert!(console.tail.borrow().len() <= KEEP);
        let lines = console.lines();
        assert!(lines.iter().any(|line| line == "line 2999"));
        assert!(!lines.iter().any(|line| line == "line 0"));
        assert!(lines.iter().all(|line| !line.contains(char::is_control)));
        assert_eq!(console.panic().unwrap(), "not syncing: \u{fffd}boo");
    }

    #[test]
    fn a_console_that_is_written_to_without_end_does_not_keep_the_event_loop() {
        let (console, write) = Console::new().unwrap();
        let mut write = File::from(write);
        nix::fcntl::fcntl(&write, nix::fcntl::FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        // Ends when the console is dropped.
        let flood = std::thread::spawn(move || while write.write_all(&[b'x'; 1 << 16]).is_ok() {});
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let others = async {
                for _ in 0..1000 {
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! {
                () = console.read_all() => panic!("the console has ended"),
                () = others => {}
            }
        });
        assert!(console.tail.borrow().len() <= KEEP && console.tail.borrow().capacity() <= 4 * KEEP);
        drop(console);
        flood.join().unwrap();
    }
}
