//! Stdio: a raw vsock stream for each, a pipe or a terminal on the container's side, and a relay between the two.
//!
//! What always holds: nothing here waits for anything but its own two ends. A host that does not read blocks the
//! process that writes and nobody else; a stream that the host never opens is given up soon after the process has
//! ended. Output is complete: a process counts as ended only when its relays have handed on what it wrote.
//!
//! Containers get pipes, never the vsock socket itself: /dev/stdout can be opened again, and a process that dies
//! leaves its last words in the pipe.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid, fchown, pipe2};
use stockade_agent_protocol::messages::Stdio as Wanted;
use stockade_agent_protocol::{HEADER_MAX, Stream, StreamHeader};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::descriptor::Descriptor;
use crate::error::Error;
use crate::spec::ProcessFacts;
use crate::vsock;

/// A connection that does not say what it is within this time is closed. Many times what a loaded host needs.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a stream that has not come may still come once its process has ended.
const LATE_STREAM: Duration = Duration::from_secs(5);
/// Streams that came before their process was created. The host opens three a process, so this is a lot of
/// processes at once; beyond it the host is in error.
const UNCLAIMED_MAX: usize = 4096;
/// First and later size of a relay's buffer: most processes write little, and untouched memory costs nothing.
const BUFFER_FIRST: usize = 4096;
const BUFFER_FULL: usize = 64 * 1024;

/// A stream of the host and what came with its header.
pub struct Arrival {
    stream: vsock::Stream,
    early: Vec<u8>,
}

/// Where streams and processes find each other, whichever comes first.
#[derive(Default)]
pub struct Rendezvous(Mutex<HashMap<StreamHeader, Slot>>);

enum Slot {
    Arrived(Arrival),
    Expected(oneshot::Sender<Arrival>),
    Met,
}

impl Rendezvous {
    fn slots(&self) -> std::sync::MutexGuard<'_, HashMap<StreamHeader, Slot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arrived(&self, header: StreamHeader, arrival: Arrival) {
        let mut slots = self.slots();
        let count = slots.len();
        match slots.entry(header) {
            Entry::Vacant(slot) if count < UNCLAIMED_MAX => {
                slot.insert(Slot::Arrived(arrival));
            }
            Entry::Occupied(mut slot) if matches!(slot.get(), Slot::Expected(_)) => {
                if let Slot::Expected(process) = slot.insert(Slot::Met) {
                    let _ = process.send(arrival);
                }
            }
            entry => tracing::warn!(header = ?entry.key(), "closed a stdio stream that nobody expects"),
        }
    }

    fn expect(&self, header: StreamHeader) -> oneshot::Receiver<Arrival> {
        let (sender, receiver) = oneshot::channel();
        let mut slots = self.slots();
        if let Some(Slot::Arrived(arrival)) = slots.remove(&header) {
            slots.insert(header, Slot::Met);
            let _ = sender.send(arrival);
        } else {
            slots.insert(header, Slot::Expected(sender));
        }
        receiver
    }

    /// Drops what belongs to a process that is gone, or to all of a container's.
    pub fn forget(&self, container_id: &str, exec_id: Option<&str>) {
        self.slots().retain(|h, _| {
            h.container_id != container_id || exec_id.is_some_and(|exec_id| h.exec_id != exec_id)
        });
    }
}

/// Accepts stdio streams for as long as the VM lives.
pub async fn serve(mut listener: vsock::Listener, rendezvous: Arc<Rendezvous>) {
    loop {
        match listener.accept().await {
            Ok(stream) => {
                let rendezvous = rendezvous.clone();
                tokio::spawn(async move {
                    match timeout(HEADER_TIMEOUT, read_header(stream)).await {
                        Ok(Ok((header, arrival))) => rendezvous.arrived(header, arrival),
                        Ok(Err(e)) => tracing::warn!("closed a stdio stream: {e}"),
                        Err(_) => tracing::warn!("closed a stdio stream that sent no header"),
                    }
                });
            }
            // No descriptor or memory free: both come back when something else is closed, and nothing tells when.
            Err(e) => {
                tracing::warn!("cannot accept a stdio stream: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn read_header(stream: vsock::Stream) -> io::Result<(StreamHeader, Arrival)> {
    let mut line = Vec::new();
    loop {
        let mut chunk = [0; 256];
        let n = stream.descriptor().read(&mut chunk).await?;
        line.extend_from_slice(&chunk[..n]);
        if let Some(end) = line.iter().position(|&b| b == b'\n') {
            let early = line.split_off(end + 1);
            let header = StreamHeader::parse(&line).map_err(io::Error::other)?;
            return Ok((header, Arrival { stream, early }));
        }
        if n == 0 || line.len() >= HEADER_MAX {
            return Err(io::Error::other("it has no header line"));
        }
    }
}

/// The container's ends, for libcontainer. `None` is /dev/null.
#[derive(Default)]
pub struct ChildEnds {
    /// To read.
    pub stdin: Option<OwnedFd>,
    /// To write.
    pub stdout: Option<OwnedFd>,
    /// To write.
    pub stderr: Option<OwnedFd>,
}

/// The agent's ends, before the process exists.
#[derive(Default)]
pub struct AgentEnds {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// Makes the pipes of a process without a terminal.
pub fn pipes(wanted: &Wanted, process: &ProcessFacts) -> Result<(ChildEnds, AgentEnds), Error> {
    let mut child = ChildEnds::default();
    let mut agent = AgentEnds::default();
    if wanted.stdin {
        let (read, write) = pipe(process)?;
        (child.stdin, agent.stdin) = (Some(read), Some(write));
    }
    if wanted.stdout {
        let (read, write) = pipe(process)?;
        (agent.stdout, child.stdout) = (Some(read), Some(write));
    }
    if wanted.stderr {
        let (read, write) = pipe(process)?;
        (agent.stderr, child.stderr) = (Some(read), Some(write));
    }
    Ok((child, agent))
}

/// A pipe that the process may open again through /proc/self/fd, which goes by the owner of the inode.
fn pipe(process: &ProcessFacts) -> Result<(OwnedFd, OwnedFd), Error> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| Error::os("making a pipe for stdio", e))?;
    if process.uid != 0 || process.gid != 0 {
        fchown(&read, Some(Uid::from_raw(process.uid)), Some(Gid::from_raw(process.gid)))
            .map_err(|e| Error::os("giving a stdio pipe to the process's user", e))?;
    }
    Ok((read, write))
}

/// When an output relay is done once its process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drain {
    /// At end of file. For an init with a pid namespace of its own: every process that could still hold the other
    /// end has ended with it.
    ToTheEnd,
    /// When what is in the pipe now has been handed on. For an exec: what it started may hold the pipe for ever.
    WhatIsThere,
}

/// The relays of one process.
pub struct Relays {
    input: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
    ended: watch::Sender<Option<Drain>>,
}

/// What a process's streams are connected to.
pub enum Ends {
    /// Pipes.
    Pipes(AgentEnds),
    /// The master side of a terminal.
    Terminal(Arc<Descriptor>),
}

impl Relays {
    /// Relays between a process's streams and those that the host has opened or will open.
    pub fn start(
        rendezvous: &Rendezvous,
        container_id: &str,
        exec_id: &str,
        wanted: &Wanted,
        ends: Ends,
    ) -> io::Result<Self> {
        let arrival = |stream| {
            rendezvous.expect(StreamHeader {
                stream,
                container_id: container_id.to_owned(),
                exec_id: exec_id.to_owned(),
            })
        };
        let (ended, when_ended) = watch::channel(None);
        let mut relays = Self { input: None, outputs: Vec::new(), ended };
        let mut outputs = Vec::new();
        let stdin = match ends {
            Ends::Terminal(master) => {
                if wanted.stdout {
                    outputs.push((Stream::Stdout, master.clone()));
                }
                wanted.stdin.then_some(master)
            }
            Ends::Pipes(pipes) => {
                for (stream, pipe) in [(Stream::Stdout, pipes.stdout), (Stream::Stderr, pipes.stderr)] {
                    if let Some(pipe) = pipe {
                        outputs.push((stream, Arc::new(Descriptor::from_blocking(pipe)?)));
                    }
                }
                pipes.stdin.map(|pipe| Descriptor::from_blocking(pipe).map(Arc::new)).transpose()?
            }
        };
        for (stream, source) in outputs {
            relays.outputs.push(tokio::spawn(output(source, arrival(stream), when_ended.clone())));
        }
        relays.input = stdin.map(|sink| tokio::spawn(input(arrival(Stream::Stdin), sink)));
        Ok(relays)
    }

    /// The process has ended: waits until its output has been handed on.
    pub async fn finish(mut self, drain: Drain) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
        self.ended.send_replace(Some(drain));
        for output in self.outputs.drain(..) {
            let _ = output.await;
        }
    }
}

/// Host to process. Ends at the host's end of file, which closes the pipe, or when the process has closed its end.
async fn input(arrival: oneshot::Receiver<Arrival>, sink: Arc<Descriptor>) {
    let Ok(Arrival { stream, early }) = arrival.await else { return };
    if sink.write_all(&early).await.is_err() {
        return;
    }
    let mut buf = Buffer::new();
    loop {
        match stream.descriptor().read(buf.space()).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                if sink.write_all(&buf.space()[..n]).await.is_err() {
                    return;
                }
                buf.adapt(n);
            }
        }
    }
}

/// Process to host.
async fn output(
    source: Arc<Descriptor>,
    mut arrival: oneshot::Receiver<Arrival>,
    mut when_ended: watch::Receiver<Option<Drain>>,
) {
    let came = tokio::select! {
        came = &mut arrival => came.ok(),
        () = has_ended(&mut when_ended) => timeout(LATE_STREAM, arrival).await.ok().and_then(Result::ok),
    };
    let Some(Arrival { stream, .. }) = came else {
        tracing::warn!("the host never opened a stream that it asked for");
        return;
    };
    if copy_output(&source, &stream, &mut when_ended).await.is_ok() {
        stream.end_of_output();
        // The host closes when it has read everything; closing first would only send one more packet.
        tokio::spawn(async move { stream.descriptor().read(&mut [0; 1]).await });
    }
}

async fn has_ended(when_ended: &mut watch::Receiver<Option<Drain>>) {
    let _ = when_ended.wait_for(Option::is_some).await;
}

async fn ended_with_leftovers(when_ended: &mut watch::Receiver<Option<Drain>>) {
    if when_ended.wait_for(|drain| *drain == Some(Drain::WhatIsThere)).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn copy_output(
    source: &Descriptor,
    stream: &vsock::Stream,
    when_ended: &mut watch::Receiver<Option<Drain>>,
) -> io::Result<()> {
    let mut buf = Buffer::new();
    loop {
        let read = tokio::select! {
            read = source.read(buf.space()) => read,
            () = ended_with_leftovers(when_ended) => break,
        };
        match read {
            Ok(0) => return Ok(()),
            // A terminal whose last process has closed it.
            Err(e) if e.raw_os_error() == Some(libc::EIO) => return Ok(()),
            Err(e) => return Err(e),
            Ok(n) => {
                stream.descriptor().write_all(&buf.space()[..n]).await?;
                buf.adapt(n);
            }
        }
    }
    // What others that hold the pipe go on writing is not counted: this ends.
    let mut left = readable_bytes(source).max(BUFFER_FULL);
    while left > 0 {
        let space = buf.space();
        let limit = space.len().min(left);
        match source.read_now(&mut space[..limit]) {
            Ok(0) | Err(_) => break,
            Ok(n) => {
                stream.descriptor().write_all(&space[..n]).await?;
                left -= n;
            }
        }
    }
    Ok(())
}

/// FIONREAD: what is in a pipe. A terminal may have a little more under way, which reading it brings in.
fn readable_bytes(source: &Descriptor) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes an int, which lives until the call returns.
    let result = unsafe { libc::ioctl(source.as_fd().as_raw_fd(), libc::FIONREAD, &mut bytes) };
    if result < 0 { 0 } else { bytes.try_into().unwrap_or(0) }
}

/// A buffer that grows when it is used fully.
struct Buffer(Vec<u8>);

impl Buffer {
    fn new() -> Self {
        Self(vec![0; BUFFER_FIRST])
    }

    fn space(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn adapt(&mut self, used: usize) {
        if used == self.0.len() && used < BUFFER_FULL {
            self.0.resize(BUFFER_FULL, 0);
        }
    }
}
