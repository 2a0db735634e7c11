//! The microVM monitor: KVM, guest memory and virtio devices. Knows nothing of containers.

mod boot_params;
mod bus;
mod cmdline;
pub mod control;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod host;
mod io_apic;
pub mod io_loop;
mod jail;
mod kernel;
mod machine;
pub mod memory;
mod mp_table;
mod process;
mod serial;
pub mod slots;
mod vcpu;
pub mod virtio;

pub use jail::calls;
pub use machine::{GUEST_CID, MAX_VCPUS, SHARE_TAG};
pub use process::run;
pub use virtio::fs::DESCRIPTORS;
