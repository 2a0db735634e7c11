//! The microVM monitor: KVM, guest memory and virtio devices. Knows nothing of containers.

mod boot_params;
mod cmdline;
pub mod control;
pub mod host;
mod kernel;
pub mod memory;
mod mp_table;
mod slots;
