//! A packet on the control socket between supervisor and VMM, in either direction, with or without descriptors. The
//! VMM, which a guest may have taken over, must not be able to harm its supervisor.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use stockade_vmm::control::{Client, MAX_MESSAGE};
use stockade_vmm::fuzzing;

pub fn run(input: &[u8]) {
    let [how, packet @ ..] = input else { return };
    let null: OwnedFd = File::open("/dev/null").unwrap().into();
    let before = descriptors();
    let fds = vec![null.as_raw_fd(); usize::from(how >> 1 & 7)];
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[] } else { &rights[..] };
    let (client, theirs) = Client::pair().unwrap();
    let to_vmm = how & 1 == 0;
    // The top bits have it repeated, to get beyond what a packet may have.
    let packet = packet.repeat(1 << (how >> 5));
    let packet = &packet[..packet.len().min(MAX_MESSAGE + 100)];
    let from = if to_vmm { client.as_raw_fd() } else { theirs.as_raw_fd() };
    sendmsg::<()>(from, &[IoSlice::new(packet)], control, MsgFlags::empty(), None).unwrap();
    let error = if to_vmm {
        fuzzing::receive_request(theirs).err().map(|error| error.to_string())
    } else {
        let result = client.recv();
        assert!(fds.is_empty() || !matches!(result, Ok(Some(_))), "an event came with descriptors");
        drop(theirs);
        result.err().map(|error| error.to_string())
    };
    if let Some(error) = error {
        assert!(error.len() < 1000 && !error.contains(char::is_control), "{error:?}");
    }
    drop(client);
    // Threads of targets before this one may still be closing theirs.
    assert!(descriptors() <= before, "a descriptor was kept");
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
