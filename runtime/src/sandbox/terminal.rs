//! Terminals on the host.
//!
//! The container's terminal is in the guest and does all that a terminal does. What the host has, be it the user's
//! own or a pty made for a console socket, is a raw wire to it: no echo, no line editing, no signals from keys. Its
//! window size is followed by SIGWINCH, for which the relaying process must have it as controlling terminal.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Errors of terminals.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the caller has none
    #[error(
        "the process wants a terminal, but there is none ({0}): run it from a terminal, give --console-socket, or set process.terminal to false"
    )]
    NoTerminal(#[source] io::Error),
    /// an operation failed
    #[error("cannot {0}: {1}")]
    Io(&'static str, #[source] io::Error),
    /// the console socket does not take the terminal
    #[error("cannot send the terminal to the console socket {0}: {1}")]
    Socket(PathBuf, #[source] io::Error),
}

nix::ioctl_read_bad!(
    /// tty_ioctl(4).
    tiocgwinsz, libc::TIOCGWINSZ, Winsize);
nix::ioctl_write_ptr_bad!(
    /// tty_ioctl(4).
    tiocswinsz, libc::TIOCSWINSZ, Winsize);
nix::ioctl_write_int_bad!(
    /// tty_ioctl(4).
    tiocsctty, libc::TIOCSCTTY);

/// Rows and columns, `None` where the terminal does not say.
pub fn size(terminal: impl AsFd) -> Option<(u16, u16)> {
    let mut size = Winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one struct winsize, which lives on our stack.
    unsafe { tiocgwinsz(terminal.as_fd().as_raw_fd(), &mut size) }.ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// A terminal in raw mode; it gets its own mode back when this is dropped.
#[derive(Debug)]
pub struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// Puts a terminal into raw mode.
    pub fn enter(terminal: OwnedFd) -> Result<Self, Error> {
        let failed = |e: nix::Error| Error::Io("put the terminal into raw mode", e.into());
        let before = tcgetattr(&terminal).map_err(failed)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&terminal, SetArg::TCSANOW, &raw).map_err(failed)?;
        Ok(RawMode { terminal, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.terminal, SetArg::TCSANOW, &self.before);
    }
}

/// Makes a pty, sends its master to a console socket, and makes its slave this process's controlling terminal. This
/// process must lead a session without one. Returns the slave, in raw mode.
pub fn open_for_socket(socket: &Path, initial: Option<(u16, u16)>) -> Result<OwnedFd, Error> {
    let OpenptyResult { master, slave } =
        openpty(None, None).map_err(|e| Error::Io("make a pty", e.into()))?;
    for fd in [&master, &slave] {
        let flag = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC);
        nix::fcntl::fcntl(fd, flag).map_err(|e| Error::Io("make a pty", e.into()))?;
    }
    let mut mode = tcgetattr(&slave).map_err(|e| Error::Io("set up the pty", e.into()))?;
    cfmakeraw(&mut mode);
    tcsetattr(&slave, SetArg::TCSANOW, &mode).map_err(|e| Error::Io("set up the pty", e.into()))?;
    if let Some((ws_row, ws_col)) = initial {
        let size = Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCSWINSZ reads one struct winsize, which lives on our stack.
        unsafe { tiocswinsz(slave.as_raw_fd(), &size) }
            .map_err(|e| Error::Io("set the pty's size", e.into()))?;
    }
    // SAFETY: TIOCSCTTY takes an integer; 0 means not to steal the terminal from another session.
    unsafe { tiocsctty(slave.as_raw_fd(), 0) }
        .map_err(|e| Error::Io("make the pty the controlling terminal", e.into()))?;
    send_master(socket, &master, &slave).map_err(|e| Error::Socket(socket.to_owned(), e))?;
    Ok(slave)
}

/// As runc does it: one descriptor, and the slave's name as data.
fn send_master(socket: &Path, master: &OwnedFd, slave: &OwnedFd) -> io::Result<()> {
    let stream = UnixStream::connect(socket)?;
    let name = fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd()))?;
    let name = [io::IoSlice::new(name.as_os_str().as_encoded_bytes())];
    let fds: [RawFd; 1] = [master.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(stream.as_raw_fd(), &name, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::termios::LocalFlags;

    #[test]
    fn raw_mode_ends_with_its_guard() {
        let pty = openpty(None, None).unwrap();
        let echoes = || tcgetattr(&pty.slave).unwrap().local_flags.contains(LocalFlags::ECHO);
        assert!(echoes());
        let raw = RawMode::enter(pty.slave.try_clone().unwrap()).unwrap();
        assert!(!echoes());
        drop(raw);
        assert!(echoes());
    }

    #[test]
    fn a_size_is_known_when_it_was_set() {
        let pty = openpty(None, None).unwrap();
        assert_eq!(size(&pty.slave), None);
        let wanted = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&wanted), None).unwrap();
        assert_eq!(size(&pty.slave), Some((24, 80)));
        assert_eq!(size(fs::File::open("/dev/null").unwrap()), None);
    }
}
