//! The standard streams of one process of a container, on the host's side.
//!
//! What is /dev/null on the host is not carried at all. Without a terminal there are up to three streams, apart;
//! with one there are two, `stdin` and `stdout`, which are its two directions.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::sys::stat::{SFlag, fstat, major, minor};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, isatty};
use stockade_agent_protocol::{Stream, StreamHeader};
use tokio::task::JoinHandle;

use super::relay::{self, Direction, Endpoint};
use super::terminal::{self, RawMode};

/// Where a process's streams lead on the host.
#[derive(Debug)]
pub struct HostStdio {
    /// stdin, stdout, stderr; `None` is /dev/null.
    fds: [Option<OwnedFd>; 3],
    /// The terminal among them.
    terminal: Option<OwnedFd>,
    /// Its mode to go back to.
    raw: Option<RawMode>,
}

impl HostStdio {
    /// Descriptors that somebody opened: stdin, stdout, stderr.
    pub fn of(fds: [Option<OwnedFd>; 3]) -> Self {
        HostStdio { fds, terminal: None, raw: None }
    }

    /// This process's own, as they are.
    pub fn inherited() -> io::Result<Self> {
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        let fds = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()].map(|fd| match is_null(fd) {
            true => Ok(None),
            false => fd.try_clone_to_owned().map(Some),
        });
        let [stdin, stdout, stderr] = fds;
        Ok(HostStdio { fds: [stdin?, stdout?, stderr?], terminal: None, raw: None })
    }

    /// This process's own streams, and its terminal put into raw mode. As under runc the terminal is that of any
    /// stream, or else the controlling one: streams may be redirected.
    pub fn own_terminal() -> Result<Self, terminal::Error> {
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        let streams = [stderr.as_fd(), stdout.as_fd(), stdin.as_fd()];
        let terminal = match streams.into_iter().find(|fd| isatty(fd).unwrap_or(false)) {
            Some(fd) => fd.try_clone_to_owned(),
            None => File::open("/dev/tty").map(OwnedFd::from),
        };
        let terminal = terminal.map_err(terminal::Error::NoTerminal)?;
        let failed = |e| terminal::Error::Io("use the terminal", e);
        let raw = RawMode::enter(terminal.try_clone().map_err(failed)?)?;
        let HostStdio { fds: [stdin, stdout, _], .. } = Self::inherited().map_err(failed)?;
        Ok(HostStdio { fds: [stdin, stdout, None], terminal: Some(terminal), raw: Some(raw) })
    }

    /// A new terminal whose other end goes to a console socket.
    pub fn console_socket(socket: &Path, size: Option<(u16, u16)>) -> Result<Self, terminal::Error> {
        let failed = |e: io::Error| terminal::Error::Io("use the terminal", e);
        let terminal = terminal::open_for_socket(socket, size)?;
        let fds =
            [Some(terminal.try_clone().map_err(failed)?), Some(terminal.try_clone().map_err(failed)?), None];
        Ok(HostStdio { fds, terminal: Some(terminal), raw: None })
    }

    /// Which streams the guest shall carry.
    pub fn wanted(&self) -> [bool; 3] {
        [0, 1, 2].map(|n| self.fds[n].is_some())
    }

    /// The size of the terminal, if there is one and it says.
    pub fn terminal_size(&self) -> Option<(u16, u16)> {
        self.terminal.as_ref().and_then(terminal::size)
    }

    /// Begins to relay. `streams` are the guest's, for those that are [wanted](Self::wanted). Needs a runtime.
    pub fn relay(
        &mut self,
        streams: [Option<OwnedFd>; 3],
        first_byte: impl Fn() + Clone + 'static,
    ) -> io::Result<Relays> {
        let [stdin, stdout, stderr] = &mut self.fds;
        let [to_stdin, from_stdout, from_stderr] = streams;
        let mut outputs = Vec::new();
        for (sink, stream) in [(stdout, from_stdout), (stderr, from_stderr)] {
            if let (Some(sink), Some(stream)) = (sink.take(), stream) {
                let sink = Endpoint::new(sink, Direction::ToHost)?;
                let first_byte = first_byte.clone();
                outputs.push(tokio::task::spawn_local(async move {
                    if let Err(e) = relay::to_host(stream, sink, first_byte).await {
                        tracing::debug!("output is not carried any more: {e}");
                    }
                }));
            }
        }
        let input = match (stdin.take(), to_stdin) {
            (Some(source), Some(stream)) => {
                let source = Endpoint::new(source, Direction::ToGuest)?;
                Some(tokio::task::spawn_local(async move {
                    if let Err(e) = relay::to_guest(source, stream).await {
                        tracing::debug!("input is not carried any more: {e}");
                    }
                }))
            }
            _ => None,
        };
        Ok(Relays { outputs, input })
    }

    /// Gives the terminal its mode back.
    pub fn restore(&mut self) {
        self.raw = None;
    }
}

/// Running relays of one process.
#[derive(Debug)]
pub struct Relays {
    outputs: Vec<JoinHandle<()>>,
    input: Option<JoinHandle<()>>,
}

impl Relays {
    /// Waits until all output has been delivered; input that nobody will read is let go.
    pub async fn drain(self) {
        if let Some(input) = &self.input {
            input.abort();
        }
        for output in self.outputs {
            let _ = output.await;
        }
    }
}

/// Lets this process's standard streams go, so that nobody waits for their end.
pub fn release_inherited() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}

/// The header that makes a connection the stream of a process. An empty `exec_id` is the container's init.
pub fn header(index: usize, container_id: &str, exec_id: &str) -> String {
    let stream = [Stream::Stdin, Stream::Stdout, Stream::Stderr][index.min(2)];
    StreamHeader { stream, container_id: container_id.into(), exec_id: exec_id.into() }.encode()
}

/// Whether it is /dev/null (character device 1:3, `Documentation/admin-guide/devices.txt`).
fn is_null(fd: BorrowedFd) -> bool {
    fstat(fd).is_ok_and(|stat| {
        SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR
            && (major(stat.st_rdev), minor(stat.st_rdev)) == (1, 3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dev_null_is_null() {
        assert!(is_null(File::open("/dev/null").unwrap().as_fd()));
        assert!(!is_null(File::open("/dev/zero").unwrap().as_fd()));
        assert!(!is_null(File::open("/proc/self/stat").unwrap().as_fd()));
    }

    #[test]
    fn headers_name_stream_container_and_exec() {
        assert_eq!(header(0, "c1", ""), "stdin c1 -\n");
        assert_eq!(header(2, "c1", "exec-7"), "stderr c1 exec-7\n");
    }
}
