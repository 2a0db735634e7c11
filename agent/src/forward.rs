//! Connections that the host forwards to ports of the pod.
//!
//! Each is a vsock connection of its own. The host says which port in a line; the agent dials that on the loopback
//! interface, says [`DIALLED`] if somebody listens there and closes the connection if not, and from then on what
//! comes from either side goes to the other.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use stockade_agent_protocol::{DIALLED, FORWARD_HEADER_MAX};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::vsock::{Listener, Stream};

/// A connection that does not say its port within this time is closed.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// Accepts connections for as long as the VM lives.
pub async fn serve(mut listener: Listener) {
    loop {
        match listener.accept().await {
            Ok(stream) => {
                tokio::spawn(async move {
                    if let Err(e) = forward(stream).await {
                        tracing::info!("a forwarded connection ended: {e}");
                    }
                });
            }
            // No descriptor or memory free: both come back when something else is closed, and nothing tells when.
            Err(e) => {
                tracing::warn!("cannot accept a connection to forward: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn forward(mut stream: Stream) -> io::Result<()> {
    let port = timeout(HEADER_TIMEOUT, read_port(&mut stream)).await??;
    let mut target = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(target) => target,
        // Servers that listen on one family only are common.
        Err(_) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await?,
    };
    stream.write_all(&[DIALLED]).await?;
    copy_bidirectional(&mut stream, &mut target).await.map(drop)
}

/// Byte by byte: what follows the line is not the agent's.
async fn read_port(stream: &mut Stream) -> io::Result<u16> {
    let mut line = Vec::new();
    while line.len() < FORWARD_HEADER_MAX {
        match stream.read_u8().await? {
            b'\n' => {
                let port = std::str::from_utf8(&line).ok().and_then(|text| text.parse().ok());
                return port.ok_or_else(|| io::Error::other("its first line is no port"));
            }
            byte => line.push(byte),
        }
    }
    Err(io::Error::other("its first line is too long"))
}
