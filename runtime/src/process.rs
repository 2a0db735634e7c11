//! Host processes by identity, not by number.
//!
//! A pid alone may have been given to somebody else since it was written down. So a process is remembered by pid
//! and start time, and touched only through a pidfd that was opened before both were compared again.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

/// A host process, told from every other one that had or will have the same pid since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id in the host's pid namespace.
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`: start time after boot, in clock ticks.
    pub start: u64,
}

impl ProcessId {
    /// This process.
    pub fn current() -> io::Result<Self> {
        Self::of(std::process::id() as i32)
    }

    /// The process that has this pid now.
    pub fn of(pid: i32) -> io::Result<Self> {
        let (_, start) = stat(pid)?;
        Ok(ProcessId { pid, start })
    }

    /// Whether it runs; a zombie does not.
    pub fn is_alive(&self) -> bool {
        stat(self.pid).is_ok_and(|(state, start)| start == self.start && !matches!(state, 'Z' | 'X'))
    }

    /// A handle to it, `None` when it is gone or a zombie.
    pub fn open(&self) -> Option<PidFd> {
        let handle = PidFd::open(self.pid).ok()?;
        self.is_alive().then_some(handle)
    }
}

/// A descriptor that refers to one process for as long as it is open.
pub struct PidFd(OwnedFd);

impl PidFd {
    fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: pidfd_open(2) takes two integers and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
        Ok(PidFd(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Sends a signal. A process that has ended meanwhile is no error.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let null = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: pidfd_send_signal(2) with a descriptor that we own; a null siginfo means as kill(2) does it.
        let result =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal, null, 0) };
        match io::Error::last_os_error() {
            _ if result == 0 => Ok(()),
            e if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            e => Err(e),
        }
    }

    /// Waits until the process has ended, at most for `timeout`; whether it has.
    pub fn wait(&self, timeout: Duration) -> bool {
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, timeout) {
                Err(nix::errno::Errno::EINTR) => {}
                Ok(n) => return n > 0,
                Err(_) => return false,
            }
        }
    }
}

impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// State letter and start time of a process.
fn stat(pid: i32) -> io::Result<(char, u64)> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&line).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unexpected /proc/PID/stat"))
}

/// The second field is the name in parentheses and may itself hold spaces and parentheses, so fields are counted
/// from the last one.
fn parse_stat(line: &str) -> Option<(char, u64)> {
    let mut fields = line[line.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses_do_not_shift_the_fields() {
        let line = "42 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20";
        assert_eq!(parse_stat(line), Some(('S', 777)));
        assert_eq!(parse_stat("42 (x) S 1"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn a_process_is_alive_until_it_is_a_zombie() {
        assert!(ProcessId::current().unwrap().is_alive());
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id() as i32).unwrap();
        let handle = id.open().unwrap();
        assert!(!handle.wait(Duration::ZERO));
        handle.signal(libc::SIGKILL).unwrap();
        assert!(handle.wait(Duration::from_secs(10)));
        assert!(!id.is_alive(), "a zombie counts as ended");
        child.wait().unwrap();
        assert!(id.open().is_none());
        handle.signal(libc::SIGKILL).unwrap();
    }

    #[test]
    fn the_same_pid_with_another_start_time_is_another_process() {
        let mut id = ProcessId::current().unwrap();
        id.start += 1;
        assert!(!id.is_alive());
        assert!(id.open().is_none());
    }
}
