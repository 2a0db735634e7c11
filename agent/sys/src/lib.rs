//! System calls that the agent and the host's side both make and no crate has as they need them.

pub mod bpf;
pub mod inside;
