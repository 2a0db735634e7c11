//! This process's terminal, lent to a command in the lab: raw while it is lent, and watched for its size.

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::io;
use std::os::fd::AsRawFd;

/// A terminal in raw mode; dropping it restores the mode it had.
pub(super) struct Terminal {
    before: Termios,
    /// Rows and columns as the lab knows them.
    pub size: (u16, u16),
}

impl Terminal {
    /// Makes standard input's terminal raw. Fails when it is none.
    pub fn take() -> io::Result<Terminal> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Terminal { before, size: size().unwrap_or((24, 80)) })
    }

    /// The new size as the body of a resize frame, when it has changed since the last call.
    pub fn changed_size(&mut self) -> Option<[u8; 4]> {
        let now = size().filter(|now| *now != self.size)?;
        self.size = now;
        let ([a, b], [c, d]) = (now.0.to_le_bytes(), now.1.to_le_bytes());
        Some([a, b, c, d])
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

fn size() -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ fills a winsize, which `size` is.
    let result = unsafe { libc::ioctl(io::stdin().as_raw_fd(), libc::TIOCGWINSZ, &mut size) };
    (result == 0 && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}
