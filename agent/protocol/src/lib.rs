//! The contract between the supervisor on the host and the agent, PID 1 of the guest.
//!
//! Messages and service are generated from `agent.proto`, which documents every field. What ttrpc does not carry
//! is here: the ports, where the share is mounted, the alphabet of ids, the header of a stdio stream, and what limits
//! come to. Both sides use this one crate, so they cannot disagree.
//!
//! Nothing in this crate does I/O or trusts its input: parsers are total, bounded and strict.

mod id;
mod question;
pub mod resources;
mod stdio;

pub use id::{ID_MAX, InvalidId, check_id};
pub use question::{QUESTION_HEADER, QuestionHeader};
pub use stdio::{HEADER_MAX, InvalidHeader, Stream, StreamHeader};

/// What the code generator makes of `agent.proto`.
// Generated: the documentation is in agent.proto, the style is the generator's.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/generated.rs"));
}

/// Messages of the contract.
pub use generated::agent as messages;
/// `AgentClient` for the host, the trait `Agent` and `create_agent` for the guest.
pub use generated::agent_ttrpc as service;

/// Version of the contract. The host brings its own guest image, so both sides must have the same.
pub const PROTOCOL_VERSION: u32 = 8;
/// Guest port of the ttrpc service.
pub const RPC_PORT: u32 = 1024;
/// Guest port of stdio streams.
pub const STDIO_PORT: u32 = 1025;
/// Tag of the virtio-fs device that holds container roots and volumes.
pub const SHARE_TAG: &str = "share";
/// Where the guest mounts that device.
pub const SHARE_MOUNT_POINT: &str = "/run/stockade/share";
/// Path of the pid namespace that a pod's containers share, in their configuration. It is made with the first of them.
pub const POD_PID_NAMESPACE: &str = "/run/stockade/pod/pid";
/// Path of the user namespace that they share, if the pod has one, with the mappings of the first of them.
pub const POD_USER_NAMESPACE: &str = "/run/stockade/pod/user";
/// Shared memory of a pod's containers.
pub const POD_SHM: &str = "/run/stockade/pod/shm";
/// Volumes of a pod that are in the guest's memory, by their numbers.
pub const POD_VOLUMES: &str = "/run/stockade/pod/volumes";
/// Parts of them, by the ids of the containers that they are for and their numbers.
pub const POD_PARTS: &str = "/run/stockade/pod/parts";
/// In place of a container's id: the guest itself, for processes that are in none. No container's id has the character.
pub const GUEST: &str = "=guest";
/// Guest port of connections that the host forwards to a TCP port of the guest, where it listens once a pod has been set
/// or a network that is to have them. The host writes the IPv4 address, a colon, the port's number and a line feed first;
/// the agent answers [`DIALLED`], or closes the connection if nobody listens there.
pub const FORWARD_PORT: u32 = 1026;
/// Longest header of such a connection, line feed included.
pub const FORWARD_HEADER_MAX: usize = "255.255.255.255:65535".len() + 1;
/// From here on, all that either side sends is the connection's.
pub const DIALLED: u8 = b'+';
/// Where Docker's name server for networks of its own is, in the container's network namespace.
pub const RESOLVER: std::net::Ipv4Addr = std::net::Ipv4Addr::new(127, 0, 0, 11);
/// Port that it is asked at.
pub const RESOLVER_DNS_PORT: u16 = 53;
/// Guest port of the stream with questions to it, after RelayResolver. Each message, question and answer, has a
/// [`QuestionHeader`] before it.
pub const RESOLVER_PORT: u32 = 1027;
