//! Setting the guest up for containers: the share, the clock, entropy, names.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Component, Path};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::{Pid, mkdir};
use stockade_agent_protocol::SHARE_MOUNT_POINT;
use stockade_agent_protocol::messages::SetupSandboxRequest;

use crate::error::Error;

/// Bounds of the entropy in a request, bytes.
const ENTROPY: std::ops::RangeInclusive<usize> = 32..=512;

/// Does what the request asks for.
pub fn set_up(request: &SetupSandboxRequest) -> Result<(), Error> {
    if !request.entropy.is_empty() && !ENTROPY.contains(&request.entropy.len()) {
        return Err(Error::Invalid(format!(
            "entropy must have {} to {} bytes, not {}",
            ENTROPY.start(),
            ENTROPY.end(),
            request.entropy.len()
        )));
    }
    if request.realtime_ns != 0 {
        set_clock(request.realtime_ns)?;
    }
    if !request.entropy.is_empty() {
        credit_entropy(&request.entropy)?;
    }
    set_names([&request.hostname, &request.domainname])?;
    mount_share(&request.share_tag)
}

/// Names the uts namespace that this process is in: its host and its domain, where that is not empty.
pub fn set_names(names: [&str; 2]) -> Result<(), Error> {
    for (file, name) in ["hostname", "domainname"].into_iter().zip(names).filter(|(_, name)| !name.is_empty())
    {
        fs::write(format!("/proc/sys/kernel/{file}"), name)
            .map_err(|e| Error::os(format!("setting the {file} to {name:?}"), e))?;
    }
    Ok(())
}

/// Names the uts namespace of a process. To be called in a process that ends with it.
pub fn set_names_of(process: Pid, [hostname, domainname]: &[String; 2]) -> Result<(), Error> {
    let failed = |e| Error::os("entering the container's uts namespace", e);
    let namespace = File::open(format!("/proc/{process}/ns/uts")).map_err(failed)?;
    setns(namespace, CloneFlags::CLONE_NEWUTS).map_err(|e| failed(e.into()))?;
    set_names([hostname, domainname])
}

/// An empty tag leaves the guest without a share: for tests of the agent alone.
fn mount_share(tag: &str) -> Result<(), Error> {
    if tag.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(SHARE_MOUNT_POINT).map_err(|e| Error::os(format!("making {SHARE_MOUNT_POINT}"), e))?;
    // No nosuid or nodev here: whether they apply is for each container's mounts to say. Devices are decided about by
    // the container's device cgroup.
    mount(Some(tag), SHARE_MOUNT_POINT, Some("virtiofs"), MsFlags::empty(), None::<&str>)
        .map_err(|e| Error::os(format!("mounting the virtio-fs tag {tag:?} on {SHARE_MOUNT_POINT}"), e))
}

fn set_clock(realtime_ns: u64) -> Result<(), Error> {
    let time = TimeSpec::new((realtime_ns / 1_000_000_000) as i64, (realtime_ns % 1_000_000_000) as i64);
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(|e| Error::os("setting the clock", e))
}

/// RNDADDENTROPY: mixes bytes into the kernel's generator and counts them as unpredictable (random(4)).
fn credit_entropy(entropy: &[u8]) -> Result<(), Error> {
    /// struct rand_pool_info with room for the most that is accepted.
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: libc::c_int,
        bytes: libc::c_int,
        buf: [u8; 512],
    }
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    let mut info =
        PoolInfo { entropy_bits: entropy.len() as i32 * 8, bytes: entropy.len() as i32, buf: [0; 512] };
    info.buf[..entropy.len()].copy_from_slice(entropy);
    let failed = |e| Error::os("crediting entropy to /dev/urandom", e);
    let random = File::options().write(true).open("/dev/urandom").map_err(failed)?;
    // SAFETY: the kernel reads `bytes` bytes behind the header, which are there.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &info) } < 0 {
        return Err(failed(std::io::Error::last_os_error()));
    }
    Ok(())
}

/// Lets go of what is known of parts of the share that the host has taken away. Where a new directory is to be made the
/// kernel asks whether there is something of that name, however short ago it was told, and drops all that it has
/// cached of the old one. The host makes none: the directories of the share are its own.
pub fn forget(paths: &[String]) -> Result<(), Error> {
    for path in paths.iter().map(Path::new) {
        if path.components().any(|component| !matches!(component, Component::Normal(_))) {
            return Err(Error::Invalid(format!("{path:?} is no path below the share")));
        }
        let _ = mkdir(&Path::new(SHARE_MOUNT_POINT).join(path), Mode::empty());
    }
    Ok(())
}

/// Writes back what is dirty in the share, each of whose mounts is a file system of its own. Everything else in the guest
/// lives and dies with its memory.
pub fn write_back() {
    nix::unistd::sync();
}
