//! `--pidfd-socket`: a descriptor of the container's (or exec's) host process for the caller, as runc sends it.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::process::ProcessId;

/// The socket does not take it.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot send the process's descriptor to the pidfd socket {path}: {source}; a unix socket must listen there"
)]
pub struct Error {
    path: PathBuf,
    source: io::Error,
}

/// What runc calls the process, sent along as data.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// The container's init.
    Init,
    /// An exec.
    Exec,
}

/// Sends a descriptor of this process to a listening socket.
pub fn send(socket: &Path, kind: Kind) -> Result<(), Error> {
    let name = match kind {
        Kind::Init => "standard",
        Kind::Exec => "setns",
    };
    let sent = || -> io::Result<()> {
        let pidfd = ProcessId::current()?.open().ok_or(io::ErrorKind::NotFound)?;
        let stream = UnixStream::connect(socket)?;
        let fds = [pidfd.as_raw_fd()];
        let data = [io::IoSlice::new(name.as_bytes())];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(stream.as_raw_fd(), &data, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    };
    sent().map_err(|source| Error { path: socket.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_caller_gets_a_descriptor_of_this_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        send(&path, Kind::Init).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let mut bytes = [0; 16];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut buffers = [io::IoSliceMut::new(&mut bytes)];
        let packet = nix::sys::socket::recvmsg::<()>(
            stream.as_raw_fd(),
            &mut buffers,
            Some(&mut space),
            MsgFlags::empty(),
        )
        .unwrap();
        let fds = packet.cmsgs().unwrap().find_map(|message| match message {
            nix::sys::socket::ControlMessageOwned::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fds.unwrap()[0])).unwrap();
        assert!(info.contains(&format!("Pid:\t{}\n", std::process::id())), "{info}");
        assert!(send(&dir.path().join("none"), Kind::Exec).unwrap_err().to_string().contains("none"));
    }
}
