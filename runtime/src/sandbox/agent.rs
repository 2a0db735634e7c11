//! The agent in the guest, as its supervisor sees it: typed calls over one stream.
//!
//! The guest is hostile. A reply is data; no call waits for ever at a moment when the caller could not give up; a
//! message from the guest is made printable before anybody sees it.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;

use stockade_agent_protocol::messages::{
    ContainerRequest, CreateContainerRequest, DeleteContainerRequest, Empty, ExecRequest, HandshakeRequest,
    HandshakeResponse, Process, ProcessRequest, ResizeRequest, SetNetworkRequest, SetupSandboxRequest,
    ShutdownRequest, SignalRequest, StatsResponse, Stdio, UpdateRequest, WaitResponse, event,
};
use stockade_agent_protocol::service::AgentClient;
use stockade_agent_protocol::{PROTOCOL_VERSION, SHARE_TAG};
use ttrpc::asynchronous::Client;
use ttrpc::context::Context;

/// Longest message of the guest that is shown, in characters.
const MESSAGE_MAX: usize = 1000;

/// Errors of the agent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the stream is gone, and with it probably the VM
    #[error("the connection to the agent in the guest broke: {0}")]
    Closed(String),
    /// the agent says no
    #[error("{0}")]
    Refused(String),
    /// other side of another version
    #[error(
        "the agent in the guest speaks version {0} of the contract instead of {PROTOCOL_VERSION}: rebuild the guest files with `make image`"
    )]
    Version(u32),
    /// no connection could be made
    #[error("cannot talk to the agent: {0}")]
    Connect(#[source] io::Error),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; with a signal, 128 plus its number.
    pub code: u8,
    /// The signal that ended it, 0 for none.
    pub signal: i32,
    /// The guest's OOM killer was at work.
    pub oom_killed: bool,
}

/// The agent of one VM.
#[derive(Clone)]
pub struct Agent(AgentClient);

impl Agent {
    /// Talks over a stream to the agent's RPC port. Needs a runtime around it.
    pub fn new(stream: OwnedFd) -> Result<Self, Error> {
        let stream = tokio::net::UnixStream::from_std(StdUnixStream::from(stream)).map_err(Error::Connect)?;
        Ok(Agent(AgentClient::new(Client::new(stream.into()))))
    }

    /// The first call.
    pub async fn handshake(&self) -> Result<HandshakeResponse, Error> {
        let request = HandshakeRequest { protocol_version: PROTOCOL_VERSION, ..Default::default() };
        let reply = call(self.0.handshake(context(), &request)).await?;
        match reply.protocol_version {
            PROTOCOL_VERSION => Ok(reply),
            other => Err(Error::Version(other)),
        }
    }

    /// The second.
    pub async fn setup_sandbox(&self, realtime_ns: u64, entropy: Vec<u8>) -> Result<(), Error> {
        let share_tag = SHARE_TAG.into();
        let request = SetupSandboxRequest { share_tag, realtime_ns, entropy, ..Default::default() };
        call(self.0.setup_sandbox(context(), &request)).await.map(drop)
    }

    /// Makes the guest's network what the request says.
    pub async fn set_network(&self, request: &SetNetworkRequest) -> Result<(), Error> {
        call(self.0.set_network(context(), request)).await.map(drop)
    }

    /// Creates a container.
    pub async fn create(&self, id: &str, spec: Vec<u8>, stdio: [bool; 3]) -> Result<(), Error> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec,
            stdio: Some(streams(stdio)).into(),
            ..Default::default()
        };
        call(self.0.create_container(context(), &request)).await.map(drop)
    }

    /// Lets its workload run.
    pub async fn start(&self, id: &str) -> Result<(), Error> {
        call(self.0.start_container(context(), &container(id))).await.map(drop)
    }

    /// Freezes it.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        call(self.0.pause(context(), &container(id))).await.map(drop)
    }

    /// Thaws it.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        call(self.0.resume(context(), &container(id))).await.map(drop)
    }

    /// Applies limits; `resources` is JSON.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), Error> {
        let request = UpdateRequest { container_id: id.into(), resources, ..Default::default() };
        call(self.0.update(context(), &request)).await.map(drop)
    }

    /// Reads what it uses.
    pub async fn stats(&self, id: &str) -> Result<StatsResponse, Error> {
        call(self.0.stats(context(), &container(id))).await
    }

    /// Lists its processes.
    pub async fn processes(&self, id: &str) -> Result<Vec<Process>, Error> {
        call(self.0.pids(context(), &container(id))).await.map(|reply| reply.processes)
    }

    /// Starts a further process in it; `process` is JSON.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: Vec<u8>,
        stdio: [bool; 3],
    ) -> Result<u32, Error> {
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process,
            stdio: Some(streams(stdio)).into(),
            ..Default::default()
        };
        call(self.0.exec(context(), &request)).await.map(|reply| reply.pid)
    }

    /// Signals one process, or all of the container's. An empty `exec_id` is the container's init.
    pub async fn signal(&self, id: &str, exec_id: &str, signal: i32, all: bool) -> Result<(), Error> {
        let request = SignalRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        call(self.0.signal(context(), &request)).await.map(drop)
    }

    /// Waits for the end of a process, and of its output.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let request =
            ProcessRequest { container_id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        call(self.0.wait(context(), &request)).await.map(checked_exit)
    }

    /// Sets the size of a process's terminal.
    pub async fn resize(&self, id: &str, exec_id: &str, rows: u16, columns: u16) -> Result<(), Error> {
        let request = ResizeRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            rows: rows.into(),
            columns: columns.into(),
            ..Default::default()
        };
        call(self.0.resize(context(), &request)).await.map(drop)
    }

    /// Removes a container that has ended.
    pub async fn delete(&self, id: &str) -> Result<(), Error> {
        let request = DeleteContainerRequest { container_id: id.into(), force: true, ..Default::default() };
        call(self.0.delete_container(context(), &request)).await.map(drop)
    }

    /// Calls `act` with a container's id whenever the guest's OOM killer was at work in it, until the VM ends.
    pub async fn out_of_memory(&self, act: impl Fn(&str)) -> Result<(), Error> {
        let mut events = call(self.0.events(context(), &Empty::default())).await?;
        while let Some(event) = call(events.recv()).await? {
            if let Some(event::Event::Oom(_)) = event.event {
                act(&event.container_id);
            }
        }
        Ok(())
    }

    /// Has everything written back to the share.
    pub async fn sync(&self) -> Result<(), Error> {
        let request = ShutdownRequest { sync_only: true, ..Default::default() };
        call(self.0.shutdown(context(), &request)).await.map(drop)
    }
}

/// No deadline: who waits can give up by dropping the call.
fn context() -> Context {
    ttrpc::context::with_timeout(0)
}

fn container(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.into(), ..Default::default() }
}

fn streams([stdin, stdout, stderr]: [bool; 3]) -> Stdio {
    Stdio { stdin, stdout, stderr, ..Default::default() }
}

async fn call<T>(reply: impl Future<Output = ttrpc::Result<T>>) -> Result<T, Error> {
    reply.await.map_err(|e| match e {
        ttrpc::Error::RpcStatus(status) => Error::Refused(printable(status.message())),
        other => Error::Closed(printable(&other.to_string())),
    })
}

fn printable(message: &str) -> String {
    message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MESSAGE_MAX).collect()
}

/// A guest may claim anything; a success that was a death is not believed.
fn checked_exit(reply: WaitResponse) -> Exit {
    let signal = if (1..=64).contains(&reply.signal) { reply.signal as i32 } else { 0 };
    let code = if signal > 0 { 128 + signal as u32 } else { reply.exit_code };
    Exit { code: u8::try_from(code).unwrap_or(255), signal, oom_killed: reply.oom_killed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_is_what_a_shell_would_show_whatever_the_guest_claims() {
        let exit = |exit_code, signal| checked_exit(WaitResponse { exit_code, signal, ..Default::default() });
        assert_eq!(exit(3, 0), Exit { code: 3, signal: 0, oom_killed: false });
        assert_eq!(exit(0, 9).code, 137);
        assert_eq!(exit(137, 9), Exit { code: 137, signal: 9, oom_killed: false });
        assert_eq!(exit(256, 0).code, 255);
        assert_eq!(exit(7, 4_000_000_000).signal, 0);
    }

    #[test]
    fn messages_of_the_guest_are_short_and_printable() {
        assert_eq!(printable("a\x1b[2J\nb"), "a [2J b");
        assert_eq!(printable(&"x".repeat(5000)).len(), MESSAGE_MAX);
    }
}
