//! Helpers: forks of the agent that call libcontainer and report back through a pipe.
//!
//! A fork of its own keeps what libcontainer does to its process (oom score, dumpable flag, working directory) and
//! how long it takes away from the agent, and costs no exec. It is allowed to run arbitrary code because the agent
//! has only one thread. In the helper nothing of the agent is ever dropped: its descriptors are in the epoll set
//! that both share.
//!
//! The write end of the pipe is inherited by the process that libcontainer makes and closed by its execve(2). So
//! the reader sees, in this order: the helper's records, a record if the command cannot be run, end of file.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::fcntl::OFlag;
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use crate::descriptor::Descriptor;
use crate::error::Error;
use crate::reaper::{HelperAtWork, Reaper};

/// Pipe writes up to this size are atomic (PIPE_BUF), so that records of two writers do not mix.
const RECORD_MAX: usize = 4096;
/// One byte for the kind, two for the length of the text.
const HEADER: usize = 3;

/// What a helper, or the process it makes, tells the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// Done. The process that was made, if any.
    Done(Option<Pid>),
    /// The command was not found.
    CommandNotFound(String),
    /// The command cannot be executed.
    CommandNotExecutable(String),
    /// What is behind a failure that will be reported.
    Detail(String),
    /// Something else failed.
    Failed(String),
}

impl Record {
    fn encode(&self) -> Vec<u8> {
        let (kind, text) = match self {
            Record::Done(pid) => (b'D', pid.map(|p| p.to_string()).unwrap_or_default()),
            Record::CommandNotFound(text) => (b'N', text.clone()),
            Record::CommandNotExecutable(text) => (b'X', text.clone()),
            Record::Detail(text) => (b'd', text.clone()),
            Record::Failed(text) => (b'F', text.clone()),
        };
        let mut text = text.into_bytes();
        text.truncate(RECORD_MAX - HEADER);
        let mut record = vec![kind];
        record.extend_from_slice(&(text.len() as u16).to_le_bytes());
        record.extend_from_slice(&text);
        record
    }

    /// Takes the first record out of `buf`, if it is whole.
    fn decode(buf: &mut Vec<u8>) -> Option<Self> {
        let &[kind, low, high, ..] = buf.as_slice() else { return None };
        let end = HEADER + usize::from(u16::from_le_bytes([low, high]));
        let text = String::from_utf8_lossy(buf.get(HEADER..end)?).into_owned();
        buf.drain(..end);
        Some(match kind {
            b'D' => Record::Done(text.parse().ok().map(Pid::from_raw)),
            b'N' => Record::CommandNotFound(text),
            b'X' => Record::CommandNotExecutable(text),
            b'd' => Record::Detail(text),
            _ => Record::Failed(text),
        })
    }

    /// The process that was made, or the error that the record stands for.
    pub fn into_result(self) -> Result<Option<Pid>, Error> {
        match self {
            Record::Done(pid) => Ok(pid),
            Record::CommandNotFound(text) => Err(Error::CommandNotFound(text)),
            Record::CommandNotExecutable(text) => Err(Error::CommandNotExecutable(text)),
            Record::Detail(text) | Record::Failed(text) => Err(Error::Internal(text)),
        }
    }
}

/// The helper's end of the pipe, also used by the process it makes.
#[derive(Debug, Clone, Copy)]
pub struct Reporter(RawFd);

impl Reporter {
    /// Sends a record. Failing to do so has no one to be told to; the agent then sees end of file.
    pub fn send(self, record: &Record) {
        let record = record.encode();
        // SAFETY: writes an owned buffer to a descriptor that is open as long as the helper or its child runs.
        unsafe { libc::write(self.0, record.as_ptr().cast(), record.len()) };
    }
}

/// The agent's end of the pipe.
pub struct Reports {
    pipe: Descriptor,
    buf: Vec<u8>,
    detail: Option<String>,
}

impl Reports {
    /// The next record, `None` at end of file. A detail is not returned but takes the place of the failure's text,
    /// which only says which step it was that failed.
    pub async fn next(&mut self) -> io::Result<Option<Record>> {
        loop {
            match (Record::decode(&mut self.buf), self.detail.take()) {
                (Some(Record::Detail(text)), earlier) => {
                    self.detail = Some(earlier.map(|e| format!("{e}; {text}")).unwrap_or(text));
                    continue;
                }
                (Some(Record::Failed(_)), Some(text)) => return Ok(Some(Record::Failed(text))),
                (Some(record), _) => return Ok(Some(record)),
                (None, detail) => self.detail = detail,
            }
            let mut chunk = [0; 512];
            match self.pipe.read(&mut chunk).await? {
                0 => return Ok(None),
                n => self.buf.extend_from_slice(&chunk[..n]),
            }
        }
    }
}

/// A helper at work. Keep it until the process it names is registered with the reaper.
pub struct Helper {
    reports: Reports,
    _at_work: HelperAtWork,
}

impl Helper {
    /// Forks a helper that does `work` and ends. `work` owns what it captured: its copies in the agent are dropped.
    pub fn fork<W>(reaper: &Reaper, work: W) -> Result<Self, Error>
    where
        W: FnOnce(Reporter) -> Record,
    {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| Error::os("making a pipe", e))?;
        let at_work = reaper.helper_at_work();
        // SAFETY: the agent has one thread (see the crate's invariant), so the child may do anything.
        match unsafe { fork() }.map_err(|e| Error::os("forking a helper", e))? {
            ForkResult::Child => run(write, work),
            ForkResult::Parent { .. } => {}
        }
        let pipe = Descriptor::from_blocking(read).map_err(|e| Error::os("watching a pipe", e))?;
        Ok(Self { reports: Reports { pipe, buf: Vec::new(), detail: None }, _at_work: at_work })
    }

    /// The process it named is registered: goes on with only the pipe.
    pub fn into_reports(self) -> Reports {
        self.reports
    }

    /// Waits for the first record: what the helper made, or why it could not. A failure is returned only when the
    /// helper and what it made have ended: libcontainer is still clearing up when the first word of it comes.
    pub async fn outcome(&mut self) -> Result<Option<Pid>, Error> {
        let outcome = match self.reports.next().await {
            Ok(Some(record)) => record.into_result(),
            Ok(None) => Err(Error::Internal("the helper process ended without a word".into())),
            Err(e) => Err(Error::os("reading a helper's report", e)),
        };
        if outcome.is_err() {
            while let Ok(Some(_)) = self.reports.next().await {}
        }
        outcome
    }
}

/// The helper's life. It ends without destructors: what they would close or deregister is shared with the agent.
fn run<W: FnOnce(Reporter) -> Record>(write: OwnedFd, work: W) -> ! {
    let reporter = Reporter(write.as_raw_fd());
    crate::log::first_errors_to(reporter);
    let record = catch_unwind(AssertUnwindSafe(|| work(reporter)))
        .unwrap_or_else(|_| Record::Failed("the helper process panicked; the guest's log says where".into()));
    reporter.send(&record);
    // SAFETY: ends this process at once.
    unsafe { libc::_exit(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_the_pipe_in_any_pieces() {
        let sent = [
            Record::Done(Some(Pid::from_raw(4711))),
            Record::CommandNotFound("exec: \"nope\": not found".into()),
            Record::CommandNotExecutable(String::new()),
            Record::Detail("mount: permission denied".into()),
            Record::Failed("preparing the root".into()),
            Record::Done(None),
        ];
        let bytes: Vec<u8> = sent.iter().flat_map(Record::encode).collect();
        let (mut buf, mut got) = (Vec::new(), Vec::new());
        for byte in bytes {
            buf.push(byte);
            got.extend(Record::decode(&mut buf));
        }
        assert_eq!(got, sent);
        assert!(buf.is_empty());
    }

    #[test]
    fn a_record_is_never_longer_than_an_atomic_write() {
        assert_eq!(Record::Failed("x".repeat(100_000)).encode().len(), RECORD_MAX);
    }
}
