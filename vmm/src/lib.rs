//! The microVM monitor: KVM, guest memory and virtio devices. Knows nothing of containers.

pub mod control;
