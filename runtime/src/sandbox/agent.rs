//! The agent in the guest, as its supervisor sees it: typed calls over one stream.
//!
//! The guest is hostile. A reply is data; no call waits for ever at a moment when the caller could not give up; a
//! message from the guest is made printable before anybody sees it.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use stockade_agent_protocol::messages::{
    ContainerRequest, CreateContainerRequest, DeleteContainerRequest, Empty, EnterRequest, ExecRequest,
    ForgetRequest, HandshakeRequest, HandshakeResponse, MakeVolumeRequest, Process, ProcessRequest,
    ResizeRequest, SetMemoryRequest, SetMemoryResponse, SetNetworkRequest, SetPodRequest,
    SetupSandboxRequest, ShutdownRequest, SignalRequest, StatsResponse, Stdio, UpdateRequest, WaitResponse,
    event,
};
use stockade_agent_protocol::service::AgentClient;
use stockade_agent_protocol::{PROTOCOL_VERSION, SHARE_TAG};
use tokio::time::timeout;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use super::meter::Meter;
use crate::printable::printable;

/// Most events a second that are acted upon. One is enough to know that a container's memory has run out.
const EVENTS_A_SECOND: u32 = 10;
/// Most processes that are listed, and the longest command line and terminal's name among them, in characters.
const PROCESSES_MAX: usize = 1 << 16;
const COMMAND_MAX: usize = 4096;
const TTY_MAX: usize = 64;
/// Longest state of a process, in characters.
const STATE_MAX: usize = 8;

/// How long an agent may take to pass on a signal or the size of a terminal: milliseconds, unless the guest has its
/// reasons.
const SIGNAL_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a process that was killed may take to end, with all of its output: milliseconds, unless it waits for a
/// volume, or somebody on the host does not read.
pub const END_TIMEOUT: Duration = Duration::from_secs(120);

/// How long an agent may take to remove what a container leaves: milliseconds, unless there is much to be forgotten.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a guest may take to get used to other memory: milliseconds for each 128 MiB, and seconds to move what is
/// in memory that it is to lose.
const MEMORY_TIMEOUT: Duration = Duration::from_secs(60);

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
    /// it could have answered long ago
    #[error("the agent in the guest has not answered a SIGKILL within {} s", SIGNAL_TIMEOUT.as_secs())]
    Silent,
    /// so could the process have ended
    #[error("the agent in the guest has not told of the end of a killed process within {} s", END_TIMEOUT.as_secs())]
    Lingers,
    /// it takes too long
    #[error("the agent in the guest does not answer")]
    Slow,
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
        Ok(Agent(AgentClient::new(Client::new(Socket::new(Meter::new(stream))))))
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
    pub async fn setup_sandbox(
        &self,
        realtime_ns: u64,
        entropy: Vec<u8>,
        [hostname, domainname]: [String; 2],
    ) -> Result<(), Error> {
        let request = SetupSandboxRequest {
            share_tag: SHARE_TAG.into(),
            realtime_ns,
            entropy,
            hostname,
            domainname,
            ..Default::default()
        };
        call(self.0.setup_sandbox(context(), &request)).await.map(drop)
    }

    /// Makes the guest's network what the request says.
    pub async fn set_network(&self, request: &SetNetworkRequest) -> Result<(), Error> {
        call(self.0.set_network(context(), request)).await.map(drop)
    }

    /// Has it take questions to Docker's name server.
    pub async fn relay_resolver(&self) -> Result<(), Error> {
        call(self.0.relay_resolver(context(), &Empty::default())).await.map(drop)
    }

    /// Prepares what the containers of a pod share.
    pub async fn set_pod(&self, request: &SetPodRequest) -> Result<(), Error> {
        call(self.0.set_pod(context(), request)).await.map(drop)
    }

    /// Makes a volume in the guest's memory, unless it is there already.
    pub async fn make_volume(&self, request: &MakeVolumeRequest) -> Result<(), Error> {
        call(self.0.make_volume(context(), request)).await.map(drop)
    }

    /// Creates a container. Returns the pid of its init in the guest.
    pub async fn create(&self, id: &str, spec: Vec<u8>, stdio: [bool; 3]) -> Result<u32, Error> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec,
            stdio: Some(streams(stdio)).into(),
            ..Default::default()
        };
        call(self.0.create_container(context(), &request)).await.map(|reply| reply.pid)
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

    /// Has the guest use so many bytes of what is added in blocks from `start` on. Gives up when it takes too long.
    pub async fn set_memory(&self, start: u64, block: u64, bytes: u64) -> Result<SetMemoryResponse, Error> {
        let request = SetMemoryRequest { start, block, bytes, ..Default::default() };
        let set = call(self.0.set_memory(context(), &request));
        let mut reply = timeout(MEMORY_TIMEOUT, set).await.map_err(|_| Error::Slow)??;
        reply.reason = printable(&reply.reason, MESSAGE_MAX);
        Ok(reply)
    }

    /// Reads what it uses.
    pub async fn stats(&self, id: &str) -> Result<StatsResponse, Error> {
        call(self.0.stats(context(), &container(id))).await
    }

    /// Lists its processes.
    pub async fn processes(&self, id: &str) -> Result<Vec<Process>, Error> {
        let reply = call(self.0.pids(context(), &container(id))).await?;
        let shown = |process: Process| Process {
            command: printable(&process.command, COMMAND_MAX),
            tty: printable(&process.tty, TTY_MAX),
            state: printable(&process.state, STATE_MAX),
            ..process
        };
        Ok(reply.processes.into_iter().take(PROCESSES_MAX).map(shown).collect())
    }

    /// Runs a program in the guest, outside of its containers.
    pub async fn enter(&self, request: EnterRequest, stdio: [bool; 3]) -> Result<u32, Error> {
        let request = EnterRequest { stdio: Some(streams(stdio)).into(), ..request };
        Ok(call(self.0.enter(context(), &request)).await?.pid)
    }

    /// Starts a further process in it; `process` is JSON.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: Vec<u8>,
        stdio: [bool; 3],
    ) -> Result<u32, Error> {
        self.exec_in(id, exec_id, process, stdio, "", false).await
    }

    /// The same in a cgroup below the container's, and even if the container is frozen; then it waits.
    pub async fn exec_in(
        &self,
        id: &str,
        exec_id: &str,
        process: Vec<u8>,
        stdio: [bool; 3],
        cgroup: &str,
        ignore_paused: bool,
    ) -> Result<u32, Error> {
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process,
            stdio: Some(streams(stdio)).into(),
            cgroup: cgroup.into(),
            ignore_paused,
            ..Default::default()
        };
        call(self.0.exec(context(), &request)).await.map(|reply| reply.pid)
    }

    /// Signals one process, or all of the container's. An empty `exec_id` is the container's init. A SIGKILL that is
    /// not answered is [`Error::Silent`]: who sends one must not have to wait for the guest's consent.
    pub async fn signal(&self, id: &str, exec_id: &str, signal: i32, all: bool) -> Result<(), Error> {
        let request = SignalRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        match timeout(SIGNAL_TIMEOUT, call(self.0.signal(context(), &request))).await {
            Ok(answer) => answer.map(drop),
            Err(_) if signal == Signal::SIGKILL as i32 => Err(Error::Silent),
            Err(_) => Err(Error::Slow),
        }
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
        let resized = call(self.0.resize(context(), &request));
        timeout(SIGNAL_TIMEOUT, resized).await.map_err(|_| Error::Slow)?.map(drop)
    }

    /// Removes a container that has ended. Gives up when it takes too long.
    pub async fn delete(&self, id: &str) -> Result<(), Error> {
        let request = DeleteContainerRequest { container_id: id.into(), force: true, ..Default::default() };
        let deleted = call(self.0.delete_container(context(), &request));
        timeout(REMOVE_TIMEOUT, deleted).await.map_err(|_| Error::Slow)?.map(drop)
    }

    /// Calls `act` with a container's id whenever the guest's OOM killer was at work in it, until the VM ends. A guest
    /// that says so without end is not listened to more than [`EVENTS_A_SECOND`].
    pub async fn out_of_memory(&self, act: impl Fn(&str)) -> Result<(), Error> {
        let mut events = call(self.0.events(context(), &Empty::default())).await?;
        let (mut second, mut count) = (Instant::now(), 0);
        while let Some(event) = call(events.recv()).await? {
            let Some(event::Event::Oom(_)) = event.event else { continue };
            if second.elapsed() >= Duration::from_secs(1) {
                (second, count) = (Instant::now(), 0);
            }
            if count < EVENTS_A_SECOND {
                act(&event.container_id);
            }
            count += 1;
        }
        Ok(())
    }

    /// Has it let go of parts of the share that have been taken away. Gives up when it takes too long.
    pub async fn forget(&self, paths: Vec<String>) -> Result<(), Error> {
        let request = ForgetRequest { paths, ..Default::default() };
        let forgotten = call(self.0.forget(context(), &request));
        timeout(REMOVE_TIMEOUT, forgotten).await.map_err(|_| Error::Slow)?.map(drop)
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
        ttrpc::Error::RpcStatus(status) => Error::Refused(printable(status.message(), MESSAGE_MAX)),
        other => Error::Closed(printable(&other.to_string(), MESSAGE_MAX)),
    })
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
    use std::io::Write;

    #[test]
    fn an_exit_is_what_a_shell_would_show_whatever_the_guest_claims() {
        let exit = |exit_code, signal| checked_exit(WaitResponse { exit_code, signal, ..Default::default() });
        assert_eq!(exit(3, 0), Exit { code: 3, signal: 0, oom_killed: false });
        assert_eq!(exit(0, 9).code, 137);
        assert_eq!(exit(137, 9), Exit { code: 137, signal: 9, oom_killed: false });
        assert_eq!(exit(256, 0).code, 255);
        assert_eq!(exit(7, 4_000_000_000).signal, 0);
    }

    /// An agent that says `bytes` again and again, `times` times, and then hangs up.
    fn hostile<T>(bytes: Vec<u8>, times: usize, act: impl AsyncFnOnce(Agent) -> T) -> T {
        let (ours, mut guest) = StdUnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut requests = guest.try_clone().unwrap();
        std::thread::spawn(move || io::copy(&mut requests, &mut io::sink()));
        let speaker = std::thread::spawn(move || {
            for _ in 0..times {
                // Fails when nobody listens any more.
                if guest.write_all(&bytes).is_err() {
                    break;
                }
            }
            let _ = guest.shutdown(std::net::Shutdown::Write);
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let result = runtime.block_on(async { act(Agent::new(ours.into()).unwrap()).await });
        drop(runtime);
        speaker.join().unwrap();
        result
    }

    /// A frame of ttrpc.
    fn frame(stream: u32, kind: u8, length: u32, payload: &[u8]) -> Vec<u8> {
        [&length.to_be_bytes()[..], &stream.to_be_bytes(), &[kind, 0], payload].concat()
    }

    #[test]
    fn an_agent_that_talks_garbage_ends_every_call_with_a_reason() {
        for garbage in [&b""[..], b"\0", b"HTTP/1.1 200 OK\r\n\r\n", &[0xff; 4096], &[0; 4096]] {
            let results = hostile(garbage.to_vec(), 1, async |agent| {
                let (shake, exit) = tokio::join!(agent.handshake(), agent.wait("c", ""));
                [shake.map(drop).unwrap_err(), exit.map(drop).unwrap_err()]
            });
            for error in results {
                let text = error.to_string();
                assert!(matches!(error, Error::Closed(_)) && !text.contains(char::is_control), "{text:?}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_does_not_answer_is_not_waited_for() {
        let (ours, _guest) = StdUnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let agent = Agent::new(ours.into()).unwrap();
        assert!(matches!(agent.signal("c", "", 9, false).await, Err(Error::Silent)));
        assert!(matches!(agent.signal("c", "", 15, false).await, Err(Error::Slow)));
        assert!(matches!(agent.resize("c", "", 1, 2).await, Err(Error::Slow)));
        assert!(matches!(agent.delete("c").await, Err(Error::Slow)));
        assert!(matches!(agent.forget(vec!["c".into()]).await, Err(Error::Slow)));
    }

    #[test]
    fn a_frame_of_four_gigabytes_is_not_waited_for_beyond_the_agents_end() {
        // Its first megabytes, and then the end.
        let begun = [frame(1, 2, u32::MAX, &[]), vec![7; 1 << 20]].concat();
        let error = hostile(begun, 6, async |agent| agent.handshake().await.map(drop)).unwrap_err();
        assert!(matches!(error, Error::Closed(_)), "{error}");
    }

    #[test]
    fn events_without_end_are_acted_upon_some_times_a_second() {
        let event = stockade_agent_protocol::messages::Event {
            container_id: "c".into(),
            event: Some(event::Event::Oom(Default::default())),
            ..Default::default()
        };
        let payload = protobuf::Message::write_to_bytes(&event).unwrap();
        let events = frame(1, 3, payload.len() as u32, &payload).repeat(1000);
        let begin = Instant::now();
        let count = std::cell::Cell::new(0u64);
        let _ = hostile(events, 200, async |agent| agent.out_of_memory(|_| count.set(count.get() + 1)).await);
        let most = u64::from(EVENTS_A_SECOND) * (begin.elapsed().as_secs() + 2);
        assert!((1..=most).contains(&count.get()), "{} of 200,000 events", count.get());
    }

    #[test]
    fn a_list_of_processes_is_cut_to_what_can_be_shown() {
        let process =
            Process { command: "x\x1b]0;t\x07".repeat(10_000), tty: "y".repeat(1000), ..Default::default() };
        let list = stockade_agent_protocol::messages::PidsResponse {
            processes: vec![process],
            ..Default::default()
        };
        let mut response = ttrpc::proto::Response::new();
        response.payload = protobuf::Message::write_to_bytes(&list).unwrap();
        let payload = protobuf::Message::write_to_bytes(&response).unwrap();
        let reply = frame(1, 2, payload.len() as u32, &payload);
        let list = hostile(reply, 1, async |agent| agent.processes("c").await).unwrap();
        assert_eq!((list[0].command.chars().count(), list[0].tty.len()), (COMMAND_MAX, TTY_MAX));
        assert!(!list[0].command.contains(char::is_control));
    }
}
