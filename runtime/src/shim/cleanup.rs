//! `delete`: removes what is left of a container when there is no shim to ask.
//!
//! containerd calls it when a shim is gone, however it went. A shim's death ends its VM, and its mounts go with
//! its mount namespace; what is left are files. For a container of a pod whose shim lives there is nothing to do.

use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};

use super::events::timestamp;
use super::flags::Flags;
use super::pod::KILLED;
use super::socket::Address;
use super::task::ROOTFS;
use super::{Error, os, rootfs, start};
use crate::network;
use crate::process::ProcessId;
use crate::sandbox::cgroup;
use crate::state::{self, StateDir};

/// containerd gives all of this 5 s.
const KILL_TIMEOUT: Duration = Duration::from_secs(3);

/// Removes it, and says that it was killed.
pub fn delete(flags: &Flags) -> Result<(), Error> {
    let bundle = start::bundle_of(flags).map_err(os("find the bundle"))?;
    let mut pid = 0;
    match StateDir::open(&super::state_root(&flags.namespace), &flags.id) {
        Err(state::Error::Missing { .. }) => {}
        Err(e) => return Err(e.into()),
        Ok(dir) => {
            let _lock = dir.lock()?;
            if let Ok(state) = dir.load() {
                kill(Some(state.supervisor));
                kill(state.vmm);
                pid = state.supervisor.pid as u32;
                if let Some(record) = &state.network {
                    network::clean_up(record)?;
                }
                if let Some(cgroup) = &state.cgroup {
                    cgroup::remove(cgroup, state.supervisor)?;
                }
            }
            dir.remove()?;
            if let Some(address) = Address::of_bundle(&bundle) {
                address.remove();
            }
        }
    }
    // Nothing of ours is mounted there; somebody else's mount would keep containerd from removing the bundle.
    rootfs::unmount_all(&bundle.join(ROOTFS));
    let response = DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..Default::default()
    };
    let bytes = response.write_to_bytes().map_err(|e| Error::Os("encode the answer", e.into()))?;
    io::stdout().write_all(&bytes).map_err(os("answer"))
}

fn kill(process: Option<ProcessId>) {
    if let Some(handle) = process.and_then(|process| process.open()) {
        let _ = handle.signal(libc::SIGKILL);
        handle.wait(KILL_TIMEOUT);
    }
}
