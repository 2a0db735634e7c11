//! A running program: its streams, its end, and what is reported when it does not come to one.

use std::fmt;
use std::io::Write;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::stream::{Hung, Stream};
use super::{HANG, leaks};

/// How long a killed process may take to end.
const UNKILLABLE: Duration = Duration::from_secs(30);

/// What a program reads.
pub enum Stdin {
    /// End of file at once.
    Null,
    /// A pipe that the test writes to and closes.
    Pipe,
    /// These bytes and then end of file.
    Bytes(Vec<u8>),
}

/// How a program ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl fmt::Debug for Exit {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(to, "exit code {code}"),
            Self::Signal(signal) => write!(to, "signal {signal}"),
        }
    }
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, signal) => Self::Signal(signal.unwrap_or(0)),
        }
    }
}

/// A program that has ended, and all that it wrote.
pub struct Ended {
    pub exit: Exit,
    pub stdout: Vec<u8>,
    pub stderr: String,
    command: String,
}

impl Ended {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Requires this exit code.
    #[track_caller]
    pub fn code(self, code: i32) -> Self {
        assert_eq!(self.exit, Exit::Code(code), "{self:?}");
        self
    }

    /// Requires success and a silent stderr, and gives standard output as text.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!((self.exit, self.stderr.as_str()), (Exit::Code(0), ""), "{self:?}");
        self.text()
    }

    /// Requires failure, with a reason on stderr, which it gives.
    #[track_caller]
    pub fn refused(self) -> String {
        assert!(matches!(self.exit, Exit::Code(1..=255)), "should have been refused: {self:?}");
        assert!(!self.stderr.trim().is_empty(), "refused without a reason: {self:?}");
        self.stderr
    }
}

impl fmt::Debug for Ended {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stdout = String::from_utf8_lossy(&self.stdout);
        write!(
            to,
            "`{}` ended with {:?}\n--- stdout ({} bytes)\n{}\n--- stderr\n{}",
            self.command,
            self.exit,
            self.stdout.len(),
            tail(&stdout, 4000),
            tail(&self.stderr, 4000)
        )
    }
}

/// The last `limit` bytes of `text` or a little less, at a character's boundary.
fn tail(text: &str, limit: usize) -> &str {
    let from = text.len().saturating_sub(limit);
    let from = (from..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    &text[from..]
}

/// A program that runs. Dropping it kills it.
pub struct Program {
    child: Child,
    stdin: Option<ChildStdin>,
    pub stdout: Stream,
    pub stderr: Stream,
    command: String,
    started: Instant,
    exit: Option<Exit>,
}

impl Program {
    /// Starts `command` with pipes as its output streams. Where the command already has a standard output set
    /// (`held`), that is left alone.
    #[track_caller]
    pub fn spawn(mut command: Command, stdin: Stdin) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self::spawn_as_is(command, stdin)
    }

    /// Starts `command` with the output streams that it has been given; those that are pipes are read.
    #[track_caller]
    pub fn spawn_as_is(mut command: Command, stdin: Stdin) -> Self {
        match stdin {
            Stdin::Null => command.stdin(Stdio::null()),
            Stdin::Pipe | Stdin::Bytes(_) => command.stdin(Stdio::piped()),
        };
        Self::spawn_raw(command, stdin)
    }

    /// Starts `command` with all the streams it has been given.
    #[track_caller]
    pub fn spawn_raw(mut command: Command, stdin: Stdin) -> Self {
        let words: Vec<_> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| word.to_string_lossy().chars().take(200).collect::<String>())
            .collect();
        let words = words.join(" ");
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start `{words}`: {error}"));
        let stdout = child.stdout.take().map_or_else(Stream::closed, Stream::reading);
        let stderr = child.stderr.take().map_or_else(Stream::closed, Stream::reading);
        let mut input = child.stdin.take();
        if let Stdin::Bytes(bytes) = stdin {
            let mut pipe = input.take().expect("asked for a pipe");
            // A program that ends without reading all of it closes the pipe: that is its right.
            std::thread::spawn(move || pipe.write_all(&bytes));
        }
        Self { child, stdin: input, stdout, stderr, command: words, started: Instant::now(), exit: None }
    }

    /// Process id of the program.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("pids are positive and small")
    }

    /// Writes to the program's standard input, which must be a pipe.
    #[track_caller]
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let pipe = self.stdin.as_mut().expect("standard input is an open pipe");
        pipe.write_all(bytes.as_ref()).expect("write to the program's standard input");
    }

    /// Ends the program's standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits for the next line of standard output.
    #[track_caller]
    pub fn line(&self) -> String {
        match self.stdout.line() {
            Ok(Some(line)) => line,
            Ok(None) => panic!("standard output ended where a line should come\n{}", self.report()),
            Err(Hung) => panic!("hung: no line on standard output\n{}", self.report()),
        }
    }

    /// Waits for the next line of standard output, which must be this one.
    #[track_caller]
    pub fn expect_line(&self, line: &str) {
        assert_eq!(self.line(), line, "{}", self.report());
    }

    /// Waits for the next line of standard error.
    #[track_caller]
    pub fn stderr_line(&self) -> String {
        match self.stderr.line() {
            Ok(Some(line)) => line,
            Ok(None) => panic!("standard error ended where a line should come\n{}", self.report()),
            Err(Hung) => panic!("hung: no line on standard error\n{}", self.report()),
        }
    }

    /// Sends a signal to the program itself.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        // It may just have ended by itself; it is not reaped before `exit`, so the pid is still its own.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal);
    }

    /// True when the program ended within `limit`: for cases that do something at a chosen moment of its life.
    pub fn ended_within(&mut self, limit: Duration) -> bool {
        self.exit.is_some() || pidfd_wait(&pidfd(self.pid()), limit)
    }

    /// Waits until the program has ended. Its streams may stay open beyond that, held by what it left running.
    #[track_caller]
    pub fn exit(&mut self) -> Exit {
        if let Some(exit) = self.exit {
            return exit;
        }
        if !pidfd_wait(&pidfd(self.pid()), HANG) {
            panic!("hung\n{}", self.report());
        }
        let exit = Exit::from(self.child.wait().expect("wait for a child of our own"));
        self.exit = Some(exit);
        exit
    }

    /// Waits until the program has ended and its streams with it.
    #[track_caller]
    pub fn finish(&mut self) -> Ended {
        let exit = self.exit();
        if self.stdout.ended().and_then(|()| self.stderr.ended()).is_err() {
            panic!(
                "the program has ended with {exit:?} but its output is still held open\n{}",
                self.report()
            );
        }
        Ended { exit, stdout: self.stdout.bytes(), stderr: self.stderr.text(), command: self.command.clone() }
    }

    /// What is known about the program now, for the message of a failure.
    pub fn report(&self) -> String {
        let stdout = self.stdout.text();
        let stderr = self.stderr.text();
        format!(
            "`{}`, {:.1} s after its start\n--- stdout ({} bytes)\n{}\n--- stderr\n{}\n--- processes\n{}",
            self.command,
            self.started.elapsed().as_secs_f32(),
            stdout.len(),
            tail(&stdout, 2000),
            tail(&stderr, 4000),
            leaks::runtime_threads().join("\n")
        )
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.exit.is_none() {
            let _ = self.child.kill();
            // One that even this does not end is stuck in the kernel: it must not keep the suite.
            if pidfd_wait(&pidfd(self.pid()), UNKILLABLE) {
                let _ = self.child.wait();
            } else {
                println!("killed, but does not end\n{}", self.report());
            }
        }
    }
}

/// A descriptor that becomes readable when the process ends.
#[track_caller]
fn pidfd(pid: i32) -> OwnedFd {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).expect("a descriptor or -1");
    assert!(fd >= 0, "pidfd_open of {pid}: {}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just given us this descriptor, nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Waits for the end of a process, at most `limit`. True when it has ended.
pub fn pidfd_wait(pidfd: &OwnedFd, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return true,
            Err(error) => panic!("poll of a pidfd: {error}"),
        }
    }
}

/// Waits for the end of a process that need not be our child. A pid that is gone has ended.
#[track_caller]
pub fn wait_gone(pid: i32) {
    // SAFETY: as in `pidfd`.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        let error = std::io::Error::last_os_error();
        // EINVAL: the process is being taken from the table just now, so the number stands for no process any more.
        let gone = matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL));
        assert!(gone, "pidfd_open of {pid}: {error}");
        return;
    }
    let fd = i32::try_from(fd).expect("a descriptor");
    // SAFETY: as in `pidfd`.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    assert!(
        pidfd_wait(&fd, HANG),
        "hung: process {pid} does not end\n{}",
        leaks::runtime_threads().join("\n")
    );
}
