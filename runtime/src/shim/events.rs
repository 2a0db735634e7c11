//! Events for containerd: delivered one after the other in the order in which they happened.
//!
//! None is lost while this process lives: what cannot be delivered because containerd is being restarted is tried
//! again until it can. Only a containerd that understands an event and refuses it loses it, and so does a queue of
//! more than [`QUEUE_MAX`].

use std::cell::Cell;
use std::process::Stdio;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageFull};
use tokio::io::AsyncWriteExt;
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};

/// Most events that wait for containerd. A container that comes and goes has five.
const QUEUE_MAX: usize = 16_384;
/// How long one delivery may take.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two attempts, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Where events go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sink {
    /// containerd's ttrpc socket.
    Socket(String),
    /// A program of containerd's, called once an event.
    Program {
        /// Its path.
        path: String,
        /// containerd's own socket, which it is to use.
        address: String,
    },
    /// The caller listens to none.
    Nowhere,
}

/// The end into which events are put.
pub struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Envelope>,
    state: Rc<State>,
}

#[derive(Default)]
struct State {
    pending: Cell<usize>,
    delivered: Notify,
}

impl Publisher {
    /// Begins to deliver. Needs a `LocalSet` around it.
    pub fn new(namespace: String, sink: Sink) -> Self {
        let (queue, events) = mpsc::channel(QUEUE_MAX);
        let state = Rc::new(State::default());
        tokio::task::spawn_local(deliver(sink, events, state.clone()));
        Publisher { namespace, queue, state }
    }

    /// Puts an event into the queue.
    pub fn publish<E: MessageFull>(&self, topic: &str, event: &E) {
        let event = Any {
            type_url: E::descriptor().full_name().into(),
            value: event.write_to_bytes().unwrap_or_default(),
            ..Default::default()
        };
        let envelope = Envelope {
            timestamp: Some(timestamp(SystemTime::now())).into(),
            namespace: self.namespace.clone(),
            topic: topic.into(),
            event: Some(event).into(),
            ..Default::default()
        };
        match self.queue.try_send(envelope) {
            Ok(()) => self.state.pending.set(self.state.pending.get() + 1),
            Err(_) => {
                tracing::error!(topic, "an event is lost: containerd takes none, and the queue is full")
            }
        }
    }

    /// Waits until all is delivered.
    pub async fn flush(&self) {
        while self.state.pending.get() > 0 {
            self.state.delivered.notified().await;
        }
    }
}

/// Now as protobuf has it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() as i32, ..Default::default() }
}

async fn deliver(sink: Sink, mut events: mpsc::Receiver<Envelope>, state: Rc<State>) {
    let mut client = None;
    while let Some(envelope) = events.recv().await {
        let mut pause = RETRY.0;
        loop {
            let attempt = timeout(DELIVERY_TIMEOUT, attempt(&sink, &mut client, &envelope)).await;
            match attempt.unwrap_or_else(|_| Err(Failure::Try("it took too long".into()))) {
                Ok(()) => break,
                Err(Failure::Refused(reason)) => {
                    tracing::warn!(topic = envelope.topic, "containerd refused an event: {reason}");
                    break;
                }
                Err(Failure::Try(reason)) => {
                    tracing::debug!(topic = envelope.topic, "an event waits for containerd: {reason}");
                    client = None;
                    sleep(pause).await;
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
        state.pending.set(state.pending.get() - 1);
        state.delivered.notify_waiters();
    }
}

enum Failure {
    Refused(String),
    Try(String),
}

async fn attempt(sink: &Sink, client: &mut Option<EventsClient>, event: &Envelope) -> Result<(), Failure> {
    let again = |e: &dyn std::fmt::Display| Failure::Try(e.to_string());
    match sink {
        Sink::Nowhere => Ok(()),
        Sink::Socket(address) => {
            let client = match client {
                Some(client) => client,
                None => {
                    let url = match address.contains("://") {
                        true => address.clone(),
                        false => format!("unix://{address}"),
                    };
                    let connection = Client::connect(&url).await.map_err(|e| again(&e))?;
                    client.insert(EventsClient::new(connection))
                }
            };
            let request = ForwardRequest { envelope: Some(event.clone()).into(), ..Default::default() };
            match client.forward(ttrpc::context::with_timeout(0), &request).await {
                Ok(_) => Ok(()),
                Err(ttrpc::Error::RpcStatus(status)) => Err(Failure::Refused(status.message().into())),
                Err(e) => Err(again(&e)),
            }
        }
        Sink::Program { path, address } => {
            let bytes = event.event.write_to_bytes().map_err(|e| Failure::Refused(e.to_string()))?;
            let mut child = tokio::process::Command::new(path)
                .args(["--address", address, "publish", "--topic", &event.topic])
                .args(["--namespace", &event.namespace])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .kill_on_drop(true)
                .spawn()
                .map_err(|e| again(&e))?;
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(&bytes).await.map_err(|e| again(&e))?;
            }
            match child.wait().await {
                Ok(status) if status.success() => Ok(()),
                Ok(status) => Err(Failure::Try(format!("{path} ended with {status}"))),
                Err(e) => Err(again(&e)),
            }
        }
    }
}
