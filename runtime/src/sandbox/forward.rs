//! Ports of a sandbox, for who enters its network namespace on the host and dials them there, as containerd does for
//! `kubectl port-forward` and the port handler of slirp4netns for `podman run -p`: each connection is carried to the same
//! address and port in the guest.

use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use nix::sys::socket::{setsockopt, sockopt};
use stockade_agent_protocol::DIALLED;
use tokio::io::{AsyncReadExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;

use crate::network::loopback::AllPorts;

/// Connections at once. Each is one of the VM's streams, which containers need as well.
const CONNECTIONS_MAX: usize = 64;

/// Carries connections for as long as the sandbox lives; `dial` makes a stream into the guest. To be called in the
/// sandbox's network namespace.
pub async fn serve(dial: impl Fn(SocketAddrV4) -> Result<OwnedFd, String> + 'static) {
    let (_all, listener) = match listen() {
        Ok(made) => made,
        Err(e) => {
            tracing::warn!("ports cannot be forwarded (it takes Linux 5.9 and CAP_BPF): {e}");
            return;
        }
    };
    let dial = Rc::new(dial);
    let free = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = free.clone().acquire_owned().await else { return };
        let accepted = listener.accept().await;
        let dial = dial.clone();
        tokio::task::spawn_local(async move {
            let carried = match accepted {
                Ok((connection, _)) => carry(&*dial, connection).await,
                Err(e) => Err(e),
            };
            if let Err(e) = carried {
                tracing::info!("a forwarded connection ended: {e}");
            }
            drop(permit);
        });
    }
}

fn listen() -> io::Result<(AllPorts, TcpListener)> {
    let all = AllPorts::listen()?;
    let listener = all.listener.try_clone()?;
    listener.set_nonblocking(true)?;
    Ok((all, TcpListener::from_std(listener)?))
}

async fn carry(
    dial: &dyn Fn(SocketAddrV4) -> Result<OwnedFd, String>,
    mut connection: TcpStream,
) -> io::Result<()> {
    let SocketAddr::V4(to) = connection.local_addr()? else {
        return Err(io::Error::other("it is none of IPv4"));
    };
    let opened = dial(to).map_err(io::Error::other);
    let dialled = async {
        let mut stream = UnixStream::from_std(opened?.into())?;
        match stream.read_u8().await? {
            DIALLED => Ok(stream),
            other => Err(io::Error::other(format!("the guest says {other} of {to}"))),
        }
    };
    match dialled.await {
        Ok(mut stream) => copy_bidirectional(&mut connection, &mut stream).await.map(drop),
        Err(e) => {
            // Nobody listens there: what the caller would be told, had the kernel known.
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            let _ = setsockopt(&connection, sockopt::Linger, &linger);
            Err(e)
        }
    }
}
