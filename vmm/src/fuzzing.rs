//! What the fuzz targets in `tests/fuzz` reach of this crate that is nobody else's business: behind the feature
//! `fuzzing`, which no program that ships is built with.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use crate::control::{Error, Server};
use crate::io_loop::IoHandle;
use crate::virtio::{Device, fs, net, rng, vsock};

/// An entropy device.
pub fn rng(io: IoHandle) -> Box<dyn Device> {
    rng::new(io)
}

/// A socket device, and the way to open streams. Nobody is told of their outcome.
pub fn vsock(cid: u64, io: IoHandle) -> std::io::Result<(Box<dyn Device>, vsock::Dialer)> {
    vsock::new(cid, io, Box::new(|_, _| ()))
}

/// A file system device for a directory.
pub fn fs(share: &str) -> std::io::Result<Box<dyn Device>> {
    fs::new("share", share)
}

/// A network device on a datagram socket, which stands for the wire.
pub fn net(wire: UnixDatagram) -> Result<Box<dyn Device>, net::AttachError> {
    net::on_a_socket(wire)
}

/// Receives one request as the VMM does. `Ok(false)` at the end of file.
pub fn receive_request(socket: OwnedFd) -> Result<bool, Error> {
    Ok(match Server::new(socket).recv(true)? {
        std::task::Poll::Ready(Some(_)) => true,
        std::task::Poll::Ready(None) | std::task::Poll::Pending => false,
    })
}
