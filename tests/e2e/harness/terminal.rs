//! The two ways a terminal meets a container: a console socket that receives the master side from the runtime,
//! and a terminal of the caller's own that the runtime takes over.

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::stream::{Hung, Stream};
use super::{HANG, host_scratch};

nix::ioctl_write_ptr_bad!(
    /// Sets the window size of a terminal.
    set_window_size,
    libc::TIOCSWINSZ,
    Winsize
);

/// The master side of a terminal whose output is read as it comes.
pub struct Pty {
    master: File,
    pub output: Stream,
}

impl Pty {
    fn of(master: OwnedFd) -> Self {
        let master = File::from(master);
        let output = Stream::reading(master.try_clone().expect("duplicate the master side"));
        Self { master, output }
    }

    /// A new terminal of this size, and its slave side for a program to use.
    pub fn open(rows: u16, columns: u16) -> (Self, File) {
        let pair = openpty(Some(&size(rows, columns)), None).expect("open a terminal");
        (Self::of(pair.master), File::from(pair.slave))
    }

    /// Types.
    pub fn write(&self, text: &str) {
        (&self.master).write_all(text.as_bytes()).expect("write to the terminal");
    }

    /// Changes the window size.
    pub fn resize(&self, rows: u16, columns: u16) {
        // SAFETY: the descriptor is a terminal of ours and the struct is what the request reads.
        unsafe { set_window_size(self.master.as_raw_fd(), &size(rows, columns)) }
            .expect("set the window size");
    }

    /// Waits for the next line.
    #[track_caller]
    pub fn line(&self) -> String {
        match self.output.line() {
            Ok(Some(line)) => line,
            Ok(None) => panic!("the terminal ended where a line should come: {:?}", self.output.text()),
            Err(Hung) => panic!("hung: no line on the terminal: {:?}", self.output.text()),
        }
    }

    /// Waits for the next line, which must be this one.
    #[track_caller]
    pub fn expect_line(&self, line: &str) {
        assert_eq!(self.line(), line, "all so far: {:?}", self.output.text());
    }

    /// Waits until the other side is closed and gives all that came.
    #[track_caller]
    pub fn ended(&self) -> String {
        assert!(self.output.ended().is_ok(), "hung: the terminal stays open: {:?}", self.output.text());
        self.output.text()
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// The listening end of `--console-socket`.
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl ConsoleSocket {
    /// A socket in a directory of its own.
    pub fn new() -> Self {
        let dir = host_scratch();
        let path = dir.path().join("console.sock");
        let listener = UnixListener::bind(&path).expect("listen on the console socket");
        Self { listener, path, _dir: dir }
    }

    /// Path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for a runtime to connect and hand over the master side of a terminal.
    #[track_caller]
    pub fn terminal(&self) -> Pty {
        wait_readable(&self.listener, "nobody connects to the console socket");
        let (connection, _) = self.listener.accept().expect("accept on the console socket");
        wait_readable(&connection, "nothing comes over the console socket");
        let mut name = [0; 4096];
        let mut control = nix::cmsg_space!([std::os::fd::RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut name)];
        let message =
            recvmsg::<()>(connection.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)
                .expect("receive from the console socket");
        let fds: Vec<OwnedFd> = message
            .cmsgs()
            .expect("control messages")
            .filter_map(|message| match message {
                ControlMessageOwned::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            // SAFETY: the kernel has just installed these for us.
            .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
            .collect();
        let [master] = <[OwnedFd; 1]>::try_from(fds)
            .unwrap_or_else(|fds| panic!("{} descriptors came where one should", fds.len()));
        Pty::of(master)
    }
}

#[track_caller]
fn wait_readable(from: &impl AsFd, otherwise: &str) {
    let timeout = PollTimeout::try_from(HANG).unwrap_or(PollTimeout::MAX);
    let ready = poll(&mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)], timeout).expect("poll");
    assert_eq!(ready, 1, "hung: {otherwise}");
}
