//! Connections that the host forwards to ports of the guest.
//!
//! Each is a vsock connection of its own. The host says in a line what was dialled; the agent dials that here, says
//! [`DIALLED`] if somebody listens there and closes the connection if not, and from then on what comes from either side
//! goes to the other.

use std::io;
use std::net::{Ipv6Addr, SocketAddrV4};
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
    let to = timeout(HEADER_TIMEOUT, read_address(&mut stream)).await??;
    let mut target = match TcpStream::connect(to).await {
        Err(_) if to.ip().is_loopback() => {
            // Servers that listen on one family only are common.
            TcpStream::connect((Ipv6Addr::LOCALHOST, to.port())).await?
        }
        other => other?,
    };
    stream.write_all(&[DIALLED]).await?;
    copy_bidirectional(&mut stream, &mut target).await.map(drop)
}

/// Byte by byte: what follows the line is not the agent's.
async fn read_address(stream: &mut Stream) -> io::Result<SocketAddrV4> {
    let mut line = Vec::new();
    while line.len() < FORWARD_HEADER_MAX {
        match stream.read_u8().await? {
            b'\n' => {
                let to = std::str::from_utf8(&line).ok().and_then(|text| text.parse().ok());
                return to.ok_or_else(|| io::Error::other("its first line is no address and port"));
            }
            byte => line.push(byte),
        }
    }
    Err(io::Error::other("its first line is too long"))
}
