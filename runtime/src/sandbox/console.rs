//! What the guest's kernel says on its console.
//!
//! It says nothing unless it is in trouble. The last [`KEEP`] bytes are kept, so that a VM that stops unexpectedly
//! can be explained, and some more in the sandbox's state directory, for `stockade logs`. The pipe's write end is also the VMM's stderr: what that process says before it dies is as
//! interesting. All of it comes from the guest and is made printable before it is shown.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::io::Interest;

use super::poll::register;
use crate::printable::printable;
use crate::state::CONSOLE;

/// How much is kept, in bytes: a kernel's panic with its registers and call trace is 4 to 6 KiB.
const KEEP: usize = 16 * 1024;
/// Longest line shown; the rest of a longer one is cut.
const LINE_MAX: usize = 240;
/// Most that is read at a time, so that a guest that writes without end does not keep the event loop: what a pipe holds.
const TURN: usize = 64 * 1024;
/// Most that is logged of one VM's console, in bytes: a thousand times what a healthy guest says. The log is a file of
/// the host's.
const LOGGED_MAX: usize = 1 << 20;

/// A file of the state directory is full then, and takes the place of the one before.
const FILE_MAX: usize = 64 * 1024;

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
    file: RefCell<Option<Kept>>,
}

/// The files of a state directory.
#[derive(Debug)]
struct Kept {
    dir: PathBuf,
    /// Made with the first byte, and how many it has.
    open: Option<(File, usize)>,
}

impl Console {
    /// A console and the end that VMM and guest write to.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok((
            Console {
                pipe: read.into(),
                tail: RefCell::default(),
                logged: Cell::new(0),
                file: RefCell::default(),
            },
            write,
        ))
    }

    /// Has what is read from now on in files of this directory too.
    pub fn keep_in(&self, dir: &Path) {
        self.file.replace(Some(Kept { dir: dir.to_owned(), open: None }));
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
        drop(tail);
        let mut file = self.file.borrow_mut();
        if let Some(Err(e)) = file.as_mut().map(|kept| kept.append(bytes)) {
            tracing::warn!("the guest's console is not kept any more: {e}");
            file.take();
        }
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

impl Kept {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let [current, before] = CONSOLE.map(|name| self.dir.join(name));
        if self.open.as_ref().is_some_and(|(_, size)| size + bytes.len() > FILE_MAX) {
            self.open = None;
            fs::rename(&current, before)?;
        }
        let (file, size) = match &mut self.open {
            Some(open) => open,
            none => {
                let new =
                    File::options().write(true).create(true).truncate(true).mode(0o600).open(current)?;
                none.insert((new, 0))
            }
        };
        *size += bytes.len();
        file.write_all(bytes)
    }
}

/// What a sandbox's directory has of its guest's console, printable.
pub fn kept_lines(dir: &Path) -> io::Result<Vec<String>> {
    let mut bytes = Vec::new();
    for name in CONSOLE.iter().rev() {
        match fs::read(dir.join(name)) {
            Ok(more) => bytes.extend(more),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(lines_of(&bytes))
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
    fn files_have_the_end_of_what_was_said_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let (console, write) = Console::new().unwrap();
        console.keep_in(dir.path());
        assert_eq!(kept_lines(dir.path()).unwrap(), [""; 0]);
        let mut write = File::from(write);
        for n in 0..30_000 {
            writeln!(write, "line {n}\x1b[2J").unwrap();
            console.read();
        }
        let lines = kept_lines(dir.path()).unwrap();
        assert_eq!(lines.last().unwrap(), "line 29999 [2J");
        assert!(lines.windows(2).all(|two| two[0] != two[1]) && !lines.contains(&"line 0 [2J".into()));
        let size: u64 = CONSOLE.map(|name| fs::metadata(dir.path().join(name)).unwrap().len()).iter().sum();
        assert!((FILE_MAX as u64..=2 * FILE_MAX as u64).contains(&size), "{size}");
    }

    #[test]
    fn a_gigabyte_costs_no_more_than_what_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (console, write) = Console::new().unwrap();
        console.keep_in(dir.path());
        nix::fcntl::fcntl(&write, nix::fcntl::FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        let flood = std::thread::spawn(move || {
            let mut write = File::from(write);
            (0..1 << 14).for_each(|_| write.write_all(&[b'x'; 1 << 16]).unwrap());
        });
        while console.read() != Left::End {
            std::thread::yield_now();
        }
        flood.join().unwrap();
        assert!(console.tail.borrow().capacity() <= 4 * KEEP);
        let size: u64 = CONSOLE.map(|name| fs::metadata(dir.path().join(name)).unwrap().len()).iter().sum();
        assert!(size <= 2 * FILE_MAX as u64, "{size}");
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
