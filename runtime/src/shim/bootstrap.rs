//! What a caller hands to `start` on standard input, and the answer that it understands.
//!
//! Up to containerd 2.2 the input is the runtime's options and the plain address a good answer. From 2.3 on it is a
//! `BootstrapParams` message, and its answer says too that the task service's third version is served. So does an answer
//! in JSON, which 2.0 to 2.2 understand: only where it is them that call for certain, which is by the sandbox API. It
//! spares them to call this program for each container of a pod.

use std::io::{self, Read, Write};

use containerd_shim_protos::TASK_API_VERSION;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;

use super::role::Role;

/// How the task service is spoken to.
const PROTOCOL: &str = "ttrpc";
/// More than any options have; a caller that sends more is none.
const INPUT_MAX: u64 = 4 << 20;

/// Who calls.
#[derive(Debug)]
pub enum Caller {
    /// It wants a plain address.
    Plain,
    /// It wants JSON.
    Json,
    /// It said what it is.
    Bootstrap(Box<BootstrapParams>),
}

impl Caller {
    /// Reads standard input to its end.
    pub fn read() -> io::Result<Self> {
        let mut input = Vec::new();
        io::stdin().lock().take(INPUT_MAX).read_to_end(&mut input)?;
        Ok(Self::from(&input))
    }

    /// Options are an `Any`, whose two fields are a type's URL and its value; only the other message has a socket
    /// to talk to.
    fn from(input: &[u8]) -> Self {
        match BootstrapParams::parse_from_bytes(input) {
            Ok(params)
                if !params.instance_id.is_empty()
                    && (!params.containerd_grpc_address.is_empty()
                        || !params.containerd_ttrpc_address.is_empty()) =>
            {
                Caller::Bootstrap(Box::new(params))
            }
            _ => Caller::Plain,
        }
    }

    /// The same, of a caller that starts something of this kind.
    pub fn knowing(self, role: &Role) -> Self {
        match (self, role) {
            (Caller::Plain, Role::Announced) => Caller::Json,
            (caller, _) => caller,
        }
    }

    /// Says where the shim listens.
    pub fn answer(&self, address: &str, mut out: impl Write) -> io::Result<()> {
        match self {
            Caller::Plain => out.write_all(address.as_bytes()),
            Caller::Json => {
                let answer = serde_json::json!({
                    "version": TASK_API_VERSION, "address": address, "protocol": PROTOCOL,
                });
                out.write_all(answer.to_string().as_bytes())
            }
            Caller::Bootstrap(_) => {
                let result = BootstrapResult {
                    version: TASK_API_VERSION,
                    address: address.into(),
                    protocol: PROTOCOL.into(),
                    ..Default::default()
                };
                out.write_all(&result.write_to_bytes()?)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::well_known_types::any::Any;

    fn answer(input: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        Caller::from(input).answer("unix:///s", &mut out).unwrap();
        out
    }

    #[test]
    fn callers_up_to_2_2_get_the_plain_address() {
        assert_eq!(answer(b""), b"unix:///s");
        let options = Any { type_url: "runtimeoptions.v1.Options".into(), ..Default::default() };
        assert_eq!(answer(&options.write_to_bytes().unwrap()), b"unix:///s");
        let named = Any { value: b"namespace".to_vec(), ..options };
        assert_eq!(answer(&named.write_to_bytes().unwrap()), b"unix:///s");
        assert_eq!(answer(b"{\"version\":3}"), b"unix:///s");
    }

    #[test]
    fn callers_of_the_sandbox_api_get_the_third_version_in_json() {
        let mut out = Vec::new();
        let caller = Caller::from(b"").knowing(&Role::Announced);
        caller.answer("unix:///s", &mut out).unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(answer, serde_json::json!({"version": 3, "address": "unix:///s", "protocol": "ttrpc"}));
        assert!(matches!(Caller::from(b"").knowing(&Role::Pod), Caller::Plain));
    }

    #[test]
    fn a_caller_that_says_what_it_is_gets_the_third_version() {
        let params = BootstrapParams {
            instance_id: "c".into(),
            containerd_ttrpc_address: "unix:///t".into(),
            ..Default::default()
        };
        let answer = BootstrapResult::parse_from_bytes(&answer(&params.write_to_bytes().unwrap())).unwrap();
        assert_eq!(
            (answer.version, answer.address.as_str(), answer.protocol.as_str()),
            (3, "unix:///s", "ttrpc")
        );
    }
}
