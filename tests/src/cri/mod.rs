//! A client of the container runtime interface: what kubelet says to containerd, said by the tests.
//!
//! Each call has a connection of its own and returns when it is answered, so that a [`Client`] can be used from
//! several threads, and over a restart of the other side.

mod grpc;
pub mod host;
pub mod stream;

use std::path::{Path, PathBuf};

use protobuf::Message;

pub use grpc::Failure;

// Generated: what the fields mean is in cri.proto, the style is the generator's.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/cri/generated.rs"));
}

/// The messages.
pub use generated::cri as messages;

/// The service for pods and containers.
const RUNTIME: &str = "runtime.v1.RuntimeService";
/// The service for images.
const IMAGES: &str = "runtime.v1.ImageService";

/// Speaks to the service behind a unix socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// Nothing is connected yet.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Calls a method of the service for pods and containers, whose answer `A` the caller names.
    pub fn call<A: Message>(&self, method: &str, request: &impl Message) -> Result<A, Failure> {
        grpc::call(&self.socket, RUNTIME, method, request)
    }

    /// Whether the runtime and the network of pods are ready.
    pub fn is_ready(&self) -> bool {
        let status: Result<messages::StatusResponse, _> = self.call("Status", &messages::Empty::default());
        // containerd 2 adds a condition that says whether something in its configuration is on its way out.
        let is_of_it = |one: &&messages::RuntimeCondition| one.type_.ends_with("Ready");
        status.is_ok_and(|status| status.status.conditions.iter().filter(is_of_it).all(|one| one.status))
    }

    /// Whether there is an image of this name.
    pub fn has_image(&self, name: &str) -> Result<bool, Failure> {
        let image = messages::ImageSpec { image: name.into(), ..Default::default() };
        let request = messages::ImageStatusRequest { image: Some(image).into(), ..Default::default() };
        let answer: messages::ImageStatusResponse =
            grpc::call(&self.socket, IMAGES, "ImageStatus", &request)?;
        Ok(answer.image.is_some())
    }
}
