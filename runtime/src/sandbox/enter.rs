//! A process of the guest and the command on the host that stands for it: an exec's, a container's, or one that has been
//! let in.

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::Signal;
use protobuf::Message;
use stockade_agent_protocol::GUEST;
use stockade_agent_protocol::messages::EnterRequest;

use super::Sandbox;
use super::agent::{self, Agent, END_TIMEOUT, Exit};
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
    let exit = until_exit(&sandbox.agent, talk, ids, alive).await.map_err(|e| e.to_string())?;
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
///
/// The agent's word on the end is listened to all the time: what it says to that meanwhile would be kept without bounds.
pub async fn until_exit(
    agent: &Agent,
    talk: &AsyncConversation,
    ids: (&str, &str),
    alive: bool,
) -> Result<Exit, agent::Error> {
    tokio::select! {
        biased;
        exit = agent.wait(ids.0, ids.1) => exit,
        given_up = pass_on(agent, talk, ids, alive) => Err(given_up),
    }
}

/// Passes on what a command sends. Ends only where a process that is to go does not, and says why.
async fn pass_on(
    agent: &Agent,
    talk: &AsyncConversation,
    (id, exec_id): (&str, &str),
    mut alive: bool,
) -> agent::Error {
    while alive {
        let passed_on = match talk.recv::<Request>().await {
            Ok(Some((Request::Signal { signal }, _))) => agent.signal(id, exec_id, signal, false).await,
            Ok(Some((Request::Resize { rows, columns }, _))) => {
                agent.resize(id, exec_id, rows, columns).await
            }
            Ok(Some(_)) => Ok(()),
            Ok(None) | Err(_) => {
                alive = false;
                Ok(())
            }
        };
        match passed_on {
            Err(silent @ agent::Error::Silent) => return silent,
            Err(e) => tracing::debug!(container = id, exec = exec_id, "not passed on: {e}"),
            Ok(()) => {}
        }
    }
    // The process on the host is gone, so the one that it stands for must go.
    match agent.signal(id, exec_id, Signal::SIGKILL as i32, exec_id.is_empty()).await {
        Err(silent @ agent::Error::Silent) => silent,
        // Killed, or ended before.
        _ => {
            tokio::time::sleep(END_TIMEOUT).await;
            agent::Error::Lingers
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::control::{Conversation, Listener};
    use crate::state::StateDir;
    use std::os::unix::net::UnixStream as StdUnixStream;
    use std::time::Duration;
    use stockade_agent_protocol::messages::WaitResponse;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio::time::timeout;

    /// An agent, and the guest's end of its connection.
    fn agent() -> (Agent, UnixStream) {
        let (ours, guest) = StdUnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        guest.set_nonblocking(true).unwrap();
        (Agent::new(ours.into()).unwrap(), UnixStream::from_std(guest).unwrap())
    }

    /// The two ends of a conversation.
    async fn talk() -> (Conversation, AsyncConversation) {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::create(root.path(), "c").unwrap();
        let listener = Listener::bind(&dir).unwrap();
        let command = Conversation::connect(&dir).unwrap();
        let (send, mut conversations) = tokio::sync::mpsc::unbounded_channel();
        let talk = tokio::select! {
            _ = listener.each(|talk| send.send(talk).unwrap()) => panic!("ended"),
            talk = conversations.recv() => talk.unwrap(),
        };
        (command, talk)
    }

    /// The number of the stream of the next request.
    async fn request(guest: &mut UnixStream) -> u32 {
        let mut header = [0; 10];
        guest.read_exact(&mut header).await.unwrap();
        let [length, stream] = [0, 4].map(|at| u32::from_be_bytes(header[at..at + 4].try_into().unwrap()));
        guest.read_exact(&mut vec![0; length as usize]).await.unwrap();
        stream
    }

    async fn answer(guest: &mut UnixStream, stream: u32, answer: &impl Message) {
        let mut response = ttrpc::proto::Response::new();
        response.payload = answer.write_to_bytes().unwrap();
        let payload = response.write_to_bytes().unwrap();
        let header = [(payload.len() as u32).to_be_bytes(), stream.to_be_bytes()].concat();
        guest.write_all(&[&header[..], &[2, 0], &payload].concat()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_a_process_is_heard_while_the_agent_owes_another_answer() {
        let ((agent, mut guest), (command, talk)) = (agent(), talk().await);
        command.send(&Request::Resize { rows: 1, columns: 2 }, &[]).unwrap();
        let guest = async {
            let wait = request(&mut guest).await;
            request(&mut guest).await;
            answer(&mut guest, wait, &WaitResponse { exit_code: 7, ..Default::default() }).await;
            // Nothing more, and no hanging up either.
            std::future::pending::<()>().await
        };
        // Less than the agent has for the size of a terminal.
        let exit = timeout(Duration::from_secs(5), until_exit(&agent, &talk, ("c", ""), true));
        tokio::select! {
            exit = exit => assert_eq!(exit.unwrap().unwrap().code, 7),
            () = guest => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_answers_nothing_is_given_up_when_the_command_is_gone() {
        let ((agent, _guest), (command, talk)) = (agent(), talk().await);
        command.send(&Request::Resize { rows: 1, columns: 2 }, &[]).unwrap();
        command.send(&Request::Signal { signal: Signal::SIGTERM as i32 }, &[]).unwrap();
        drop(command);
        let given_up = until_exit(&agent, &talk, ("c", ""), true).await;
        assert!(matches!(given_up, Err(agent::Error::Silent)), "{given_up:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_is_killed_and_never_ends_is_given_up() {
        let ((agent, mut guest), (command, talk)) = (agent(), talk().await);
        drop(command);
        let guest = async {
            request(&mut guest).await;
            let kill = request(&mut guest).await;
            answer(&mut guest, kill, &stockade_agent_protocol::messages::Empty::default()).await;
            std::future::pending::<()>().await
        };
        tokio::select! {
            given_up = until_exit(&agent, &talk, ("c", ""), true) => {
                assert!(matches!(given_up, Err(agent::Error::Lingers)), "{given_up:?}");
            }
            () = guest => {}
        }
    }
}
