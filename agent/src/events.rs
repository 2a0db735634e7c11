//! Events pushed to the host: every caller of `Events` gets what happens from then on.

use std::sync::{Mutex, PoisonError};

use stockade_agent_protocol::messages::Event;
use tokio::sync::mpsc::{Receiver, Sender, channel};

/// What a subscriber may fall behind before it is dropped; it then sees its stream end.
const BACKLOG: usize = 1024;

/// The subscribers.
#[derive(Default)]
pub struct Events(Mutex<Vec<Sender<Event>>>);

impl Events {
    /// Events from now on.
    pub fn subscribe(&self) -> Receiver<Event> {
        let (sender, receiver) = channel(BACKLOG);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        receiver
    }

    /// Hands an event to everyone who still listens.
    pub fn publish(&self, event: &Event) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|subscriber| subscriber.try_send(event.clone()).is_ok());
    }
}
