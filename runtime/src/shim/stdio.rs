//! Where containerd wants a process's streams: FIFOs, files, or a logging program.
//!
//! Of a FIFO both ends are held: output that nobody reads now waits for a containerd that comes back, and standard
//! input ends when containerd says so, not when one of its writers goes. With a terminal there is one output.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio as Streams};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::unistd::pipe2;

use crate::sandbox::stdio::HostStdio;

/// How long a logging program may take to say that it is ready.
const LOGGER_TIMEOUT: Duration = Duration::from_secs(10);
/// Descriptors of a logging program: standard output, standard error, and what it closes when it is ready.
const LOGGER_FDS: [i32; 3] = [3, 4, 5];

/// Errors of streams.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// a FIFO or file
    #[error("cannot open {0} for a standard stream: {1}")]
    Open(PathBuf, #[source] io::Error),
    /// a URI that means nothing here
    #[error("cannot use {0:?} as a standard stream: it must be a FIFO, file:// or binary://")]
    Uri(String),
    /// the logging program
    #[error("cannot start the logging program {0}: {1}")]
    Logger(PathBuf, #[source] io::Error),
}

/// Where the streams lead, in containerd's words. An empty word is no stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paths {
    /// Standard input.
    pub stdin: String,
    /// Standard output, and all output of a terminal.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// The process has a terminal.
    pub terminal: bool,
}

/// Whose streams they are, for a logging program.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The container.
    pub container: &'a str,
}

/// What is held as long as the process is known.
#[derive(Debug, Default)]
pub struct Held {
    /// The other end of standard input: while it is open, input does not end.
    stdin: Option<File>,
    /// The other ends of outputs: while they are open, what was written is not lost.
    _outputs: Vec<File>,
    logger: Option<Child>,
}

impl Held {
    /// Ends standard input as soon as all other writers are gone.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(mut logger) = self.logger.take() {
            // It ends with its input, and has all the time it wants for what it has read.
            let waiting = std::thread::Builder::new().spawn(move || logger.wait());
            if let Err(e) = waiting {
                tracing::warn!("a logging program stays a zombie when it ends: {e}");
            }
        }
    }
}

/// Opens the streams. `outside` are the namespaces of the host, for a logging program.
pub fn open(paths: &Paths, owner: Owner, outside: &[OwnedFd]) -> Result<(HostStdio, Held), Error> {
    let mut held = Held::default();
    let stdin = match fifo_path(&paths.stdin)? {
        Some(path) => {
            let ends = fifo(path).map_err(|e| Error::Open(path.to_owned(), e))?;
            held.stdin = Some(ends.write);
            Some(ends.read.into())
        }
        None => None,
    };
    let stderr = if paths.terminal { "" } else { paths.stderr.as_str() };
    let (stdout, stderr) = match paths.stdout.split_once("://") {
        Some(("binary", rest)) => {
            let logger = Logger::start(rest, owner, outside)?;
            held.logger = Some(logger.child);
            (Some(logger.stdout), (!paths.terminal).then_some(logger.stderr))
        }
        _ => {
            let out = output(&paths.stdout, &mut held)?;
            let err = if paths.stderr == paths.stdout && !stderr.is_empty() {
                let same = out.as_ref().map(OwnedFd::try_clone).transpose();
                same.map_err(|e| Error::Open(stderr.into(), e))?
            } else {
                output(stderr, &mut held)?
            };
            (out, err)
        }
    };
    Ok((HostStdio::of([stdin, stdout, stderr]), held))
}

fn output(uri: &str, held: &mut Held) -> Result<Option<OwnedFd>, Error> {
    if let Some(path) = uri.strip_prefix("file://") {
        let failed = |e| Error::Open(path.into(), e);
        if let Some(parent) = Path::new(path).parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        let file = OpenOptions::new().append(true).create(true).mode(0o644).open(path).map_err(failed)?;
        return Ok(Some(file.into()));
    }
    let Some(path) = fifo_path(uri)? else { return Ok(None) };
    let ends = fifo(path).map_err(|e| Error::Open(path.to_owned(), e))?;
    held._outputs.push(ends.read);
    Ok(Some(ends.write.into()))
}

fn fifo_path(uri: &str) -> Result<Option<&Path>, Error> {
    match uri.split_once("://") {
        None if uri.is_empty() => Ok(None),
        None => Ok(Some(Path::new(uri))),
        Some(("fifo", path)) => Ok(Some(Path::new(path))),
        Some(_) => Err(Error::Uri(uri.into())),
    }
}

/// Both ends of a FIFO. Opened in this order neither waits for somebody else.
struct Ends {
    read: File,
    write: File,
}

fn fifo(path: &Path) -> io::Result<Ends> {
    let flags = (OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).bits();
    let read = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !read.metadata()?.file_type().is_fifo() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no FIFO"));
    }
    let write = OpenOptions::new().write(true).custom_flags(flags).open(path)?;
    Ok(Ends { read, write })
}

/// A running logging program (containerd's `binary://`).
struct Logger {
    child: Child,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Logger {
    /// `uri` is a path, and after a question mark its arguments as `name=value&…`. It runs in the namespaces `outside`: it
    /// is the host's, and neither the sandbox's network nor its mounts are its business.
    fn start(uri: &str, owner: Owner, outside: &[OwnedFd]) -> Result<Self, Error> {
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        let failed = |e: io::Error| Error::Logger(path.into(), e);
        let mut command = Command::new(path);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            command.arg(decoded(name));
            if !value.is_empty() {
                command.arg(decoded(value));
            }
        }
        command.env("CONTAINER_ID", owner.container).env("CONTAINER_NAMESPACE", owner.namespace);
        command.stdin(Streams::null()).stdout(Streams::null()).stderr(Streams::null());
        let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(e.into()));
        let (out, err, ready) = (pipe()?, pipe()?, pipe()?);
        // Above all that will be overwritten.
        let theirs = [&out.0, &err.0, &ready.1].map(|fd| {
            nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(10)).map_err(|e| failed(e.into()))
        });
        let [a, b, c] = theirs;
        let theirs = [a?, b?, c?];
        let outside =
            outside.iter().map(OwnedFd::try_clone).collect::<io::Result<Vec<_>>>().map_err(failed)?;
        // SAFETY: setns(2) and dup2(2) are system calls and allocate nothing, as is asked of code between fork and exec;
        // the descriptors are open, because this process made them and the child has its own copies.
        unsafe {
            command.pre_exec(move || {
                // Of whatever kind each is.
                outside.iter().try_for_each(|namespace| setns(namespace, CloneFlags::empty()))?;
                for (from, to) in theirs.into_iter().zip(LOGGER_FDS) {
                    if libc::dup2(from, to) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = command.spawn();
        for fd in theirs {
            let _ = nix::unistd::close(fd);
        }
        drop((out.0, err.0, ready.1));
        let mut child = child.map_err(failed)?;
        if let Err(e) = wait_until_closed(ready.0) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(e));
        }
        Ok(Logger { child, stdout: out.1, stderr: err.1 })
    }
}

fn wait_until_closed(ready: OwnedFd) -> io::Result<()> {
    let timeout = PollTimeout::try_from(LOGGER_TIMEOUT).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&ready), PollFlags::POLLIN)];
    if poll(&mut fds, timeout)? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not say that it is ready"));
    }
    // Closing it is the word, and so is a byte.
    let mut byte = [0];
    File::from(ready).read(&mut byte).map(drop)
}

/// RFC 3986: `%` and two hexadecimal digits are a byte; in a query `+` is a space.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        let hex = |b: &[u8]| u8::from_str_radix(std::str::from_utf8(b).ok()?, 16).ok();
        match (first, tail.get(..2).and_then(hex)) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            (b'+', _) => bytes.push(b' '),
            _ => bytes.push(first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::share::enter_namespace;
    use crate::sandbox::share::tests::in_namespace;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    const OWNER: Owner = Owner { namespace: "n", container: "c" };

    #[test]
    fn output_waits_in_the_fifo_for_a_reader_that_comes_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        let ends = fifo(&path).unwrap();
        (&ends.write).write_all(b"early").unwrap();
        // As a containerd does that has been restarted.
        let mut reader = File::open(&path).unwrap();
        let Ends { read: _held, write } = ends;
        drop(write);
        let mut late = String::new();
        reader.read_to_string(&mut late).unwrap();
        assert_eq!(late, "early");
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(fifo(&file).is_err());
    }

    #[test]
    fn a_file_is_appended_to_and_made_where_it_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/out");
        let uri = format!("file://{}", path.display());
        for text in ["a", "b"] {
            let fd = output(&uri, &mut Held::default()).unwrap().unwrap();
            File::from(fd).write_all(text.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), "ab");
    }

    #[test]
    fn a_logging_program_gets_its_arguments_and_both_outputs() {
        let dir = tempfile::tempdir().unwrap();
        let script = "exec 5>&-; { echo $CONTAINER_NAMESPACE $CONTAINER_ID $0; cat <&3; cat <&4; } > $0";
        let out = dir.path().join("log file");
        let encoded = |text: &str| text.replace('%', "%25").replace('&', "%26").replace(' ', "%20");
        let uri = format!("/bin/sh?-c={}&{}", encoded(script), encoded(&out.display().to_string()));
        let mut logger = Logger::start(&uri, OWNER, &[]).unwrap();
        File::from(logger.stdout).write_all(b"to stdout\n").unwrap();
        File::from(logger.stderr).write_all(b"to stderr\n").unwrap();
        logger.child.wait().unwrap();
        let text = std::fs::read_to_string(&out).unwrap();
        assert_eq!(text, format!("n c {}\nto stdout\nto stderr\n", out.display()));
        assert!(matches!(Logger::start("/no/such/program", OWNER, &[]), Err(Error::Logger(..))));
    }

    #[test]
    fn a_logging_program_runs_where_the_host_is() {
        in_namespace(|| {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("out");
            let outside = enter_namespace(true).unwrap().unwrap();
            let here = File::open("/proc/self/ns/mnt").unwrap().metadata().unwrap().ino();
            let there = File::from(outside.try_clone().unwrap()).metadata().unwrap().ino();
            assert_ne!(here, there);
            let script = "exec 5>&-; readlink /proc/self/ns/mnt > $0".replace('&', "%26");
            let uri = format!("/bin/sh?-c={}&{}", script.replace(' ', "%20"), out.display());
            let mut logger = Logger::start(&uri, OWNER, &[outside]).unwrap();
            logger.child.wait().unwrap();
            assert_eq!(std::fs::read_to_string(out).unwrap(), format!("mnt:[{there}]\n"));
        });
    }

    #[test]
    fn what_is_no_stream_is_named() {
        let paths = Paths { stdout: "http://x".into(), ..Default::default() };
        assert!(open(&paths, OWNER, &[]).unwrap_err().to_string().contains("http://x"));
        let (stdio, _held) = open(&Paths::default(), OWNER, &[]).unwrap();
        assert_eq!(stdio.wanted(), [false; 3]);
    }

    #[test]
    fn escapes_of_a_query_are_undone() {
        assert_eq!(decoded("a%20b+c%2"), "a b c%2");
    }
}
