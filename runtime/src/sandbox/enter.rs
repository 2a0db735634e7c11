//! A process of the guest and the command on the host that stands for it: an exec's, a container's, or one that has been
//! let in.

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::Signal;
use protobuf::Message;
use stockade_agent_protocol::GUEST;
use stockade_agent_protocol::messages::EnterRequest;

use super::Sandbox;
use super::agent::{self, Exit};
use super::control::{self, AsyncConversation, Reply, Request};

/// Why a sandbox is not entered, with what to do.
pub const NOT_ALLOWED: &str = "this sandbox was not started as one that can be entered: have `enter = true` in section \
                               [vm] of /etc/stockade/config.toml, or STOCKADE_ENTER=1 in the environment of who starts it, \
                               and start it anew";

/// Runs a program of the host's in the guest, outside of its containers, for the command at the other end of `talk`, and
/// as long as that lives. The program is what came with the command.
pub async fn enter(
    sandbox: &Sandbox,
    talk: &AsyncConversation,
    fds: Vec<OwnedFd>,
    wanted: [bool; 3],
    exec_id: &str,
) -> Result<(), String> {
    if !sandbox.can_be_entered() {
        return Err(NOT_ALLOWED.into());
    }
    let bytes = control::read_attachment(fds).map_err(|e| e.to_string())?;
    let mut request = EnterRequest::parse_from_bytes(&bytes).map_err(|e| e.to_string())?;
    request.exec_id = exec_id.into();
    let streams = sandbox.connect_streams(wanted, GUEST, exec_id).map_err(|e| e.to_string())?;
    sandbox.agent.enter(request, wanted).await.map_err(|e| e.to_string())?;
    follow(sandbox, talk, (GUEST, exec_id), streams).await
}

/// Gives a command the streams of a process that runs, passes on what it sends, and tells it how the process ended.
pub async fn follow(
    sandbox: &Sandbox,
    talk: &AsyncConversation,
    ids: (&str, &str),
    streams: [Option<OwnedFd>; 3],
) -> Result<(), String> {
    let alive = begun(talk, streams);
    let exit = until_exit(sandbox, talk, ids, alive).await.map_err(|e| e.to_string())?;
    let _ = talk.send(&Reply::Exited { code: exit.code, signal: exit.signal }, &[]);
    Ok(())
}

/// Tells a command that its process is there, with its streams; false if nobody hears it.
pub fn begun(talk: &AsyncConversation, streams: [Option<OwnedFd>; 3]) -> bool {
    let fds: Vec<_> = streams.iter().flatten().map(|fd| fd.as_fd()).collect();
    talk.send(&Reply::Started, &fds).is_ok()
}

/// Passes on what a command sends to its process, and kills that when the command is gone. An empty `exec_id` is the
/// container's init, and dies with all of it.
pub async fn until_exit(
    sandbox: &Sandbox,
    talk: &AsyncConversation,
    (id, exec_id): (&str, &str),
    mut alive: bool,
) -> Result<Exit, agent::Error> {
    let agent = &sandbox.agent;
    let kill = async || {
        let _ = agent.signal(id, exec_id, Signal::SIGKILL as i32, exec_id.is_empty()).await;
    };
    let exit = agent.wait(id, exec_id);
    let mut exit = std::pin::pin!(exit);
    if !alive {
        kill().await;
    }
    loop {
        tokio::select! {
            exit = &mut exit => return exit,
            packet = talk.recv::<Request>(), if alive => match packet {
                Ok(Some((Request::Signal { signal }, _))) => {
                    let _ = agent.signal(id, exec_id, signal, false).await;
                }
                Ok(Some((Request::Resize { rows, columns }, _))) => {
                    let _ = agent.resize(id, exec_id, rows, columns).await;
                }
                Ok(Some(_)) => {}
                // The process on the host is gone, so the one that it stands for must go.
                Ok(None) | Err(_) => {
                    alive = false;
                    kill().await;
                }
            },
        }
    }
}
