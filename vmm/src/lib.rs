//! The microVM monitor: KVM, guest memory and virtio devices. Knows nothing of containers.

mod boot_params;
mod cmdline;
pub mod control;
pub mod host;
pub mod io_loop;
mod kernel;
pub mod memory;
mod mp_table;
mod slots;
pub mod virtio;
