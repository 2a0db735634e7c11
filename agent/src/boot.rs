//! From the kernel's hand-over to a guest that can hold containers.
//!
//! This is on the path of every start: only what is necessary, in plain system calls, no process.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{chroot, fchdir};
use tracing::level_filters::LevelFilter;

use crate::cgroup;
use crate::error::Error;

/// State of containers and the mount point of the share live here, in the root's ramfs.
pub const RUN: &str = "/run/stockade";

/// What the kernel command line tells the agent.
pub struct Options {
    /// `stockade.log=error|warn|info|debug|trace`.
    pub log_level: LevelFilter,
    /// `stockade.loopback`: also serve callers inside the guest. For tests without a host; with it every container
    /// can command the agent.
    pub loopback: bool,
    /// `stockade.enter`: the host may have programs of its own run here, outside of the containers.
    pub enter: bool,
}

impl Options {
    /// Reads `/proc/cmdline`. Words that are not for the agent are none of its business.
    pub fn from_kernel_command_line() -> Result<Self, Error> {
        let line = fs::read_to_string("/proc/cmdline").map_err(|e| Error::os("reading /proc/cmdline", e))?;
        Ok(Self::parse(&line))
    }

    fn parse(line: &str) -> Self {
        let mut options = Options { log_level: LevelFilter::WARN, loopback: false, enter: false };
        for word in line.split_ascii_whitespace() {
            if let Some(level) = word.strip_prefix("stockade.log=") {
                options.log_level = level.parse().unwrap_or(LevelFilter::WARN);
            } else if word == "stockade.loopback" {
                options.loopback = true;
            } else if word == "stockade.enter" {
                options.enter = true;
            }
        }
        options
    }
}

/// Makes a root that containers can leave with pivot_root(2), and mounts the kernel's file systems on it.
pub fn mount_file_systems() -> Result<(), Error> {
    leave_the_first_root()?;
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    mount_new("proc", "/proc", plain, "")?;
    mount_new("sysfs", "/sys", plain, "")?;
    hurry_grace_periods()?;
    mount_new("devtmpfs", "/dev", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "mode=0755")?;
    null_standard_streams()?;
    // nsdelegate: a container that manages cgroups of its own cannot lift the limits of its own cgroup.
    // favordynmods: moving a process into a cgroup does not wait for an RCU grace period.
    mount_new("cgroup2", cgroup::ROOT, plain, "nsdelegate,favordynmods")?;
    cgroup::prepare()?;
    for dir in [RUN, crate::container::STATE_DIR, crate::container::BUNDLE_DIR, crate::container::CONSOLE_DIR]
    {
        make_dir(dir)?;
    }
    Ok(())
}

/// The kernel unpacks the initrd into its very first mount, and pivot_root(2) refuses to put that one away: a mount
/// without a parent cannot be moved. So a second mount of the same ramfs is laid over the first and entered. Each
/// container's mount namespace is a copy with the same shape, in which libcontainer pivots as on any host; its
/// alternative, MS_MOVE and chroot, would leave the guest's root mounted underneath the container's.
fn leave_the_first_root() -> Result<(), Error> {
    let failed = |e: std::io::Error| Error::os("laying a second mount over the initial root", e);
    let here = CString::default();
    let root = c"/";
    // SAFETY: open_tree takes a descriptor, a NUL-terminated path and flags, and returns a new descriptor or -1.
    let tree = unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            root.as_ptr(),
            libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC,
        )
    };
    if tree < 0 {
        return Err(failed(std::io::Error::last_os_error()));
    }
    // SAFETY: the kernel just returned this descriptor; nothing else owns it.
    let tree = unsafe { OwnedFd::from_raw_fd(tree as i32) };
    // SAFETY: move_mount takes two descriptors, two NUL-terminated paths and flags.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            here.as_ptr(),
            libc::AT_FDCWD,
            root.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if moved < 0 {
        return Err(failed(std::io::Error::last_os_error()));
    }
    fchdir(tree.as_fd()).and_then(|()| chroot(".")).map_err(|e| failed(e.into()))
}

/// Lets every waiter for an RCU grace period have an expedited one. Mounting cgroup2, or without favordynmods moving
/// the first process, waits for one, and an ordinary one takes two to three ticks of an otherwise idle guest: seen,
/// 27 ms. Expedited it is 34,000 instructions.
fn hurry_grace_periods() -> Result<(), Error> {
    fs::write("/sys/kernel/rcu_expedited", "1").map_err(|e| Error::os("writing /sys/kernel/rcu_expedited", e))
}

/// Mounts a file system of the kernel's.
pub fn mount_new(kind: &str, at: &str, flags: MsFlags, data: &str) -> Result<(), Error> {
    make_dir(at)?;
    mount(Some(kind), at, Some(kind), flags, Some(data))
        .map_err(|e| Error::os(format!("mounting {kind} on {at}"), e))
}

fn make_dir(path: &str) -> Result<(), Error> {
    if Path::new(path).is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(|e| Error::os(format!("making the directory {path}"), e))
}

/// Descriptors 0 to 2 become /dev/null: the kernel opens a console for them only where there is one, and libcontainer
/// and every container count on their being open.
fn null_standard_streams() -> Result<(), Error> {
    let failed = |e| Error::os("opening /dev/null", e);
    let null = fs::File::options().read(true).write(true).open("/dev/null").map_err(failed)?;
    for fd in 0..3 {
        if null.as_raw_fd() != fd {
            // SAFETY: dup2 of an open descriptor on a number that nothing in this process owns yet.
            if unsafe { libc::dup2(null.as_raw_fd(), fd) } < 0 {
                return Err(failed(std::io::Error::last_os_error()));
            }
        }
    }
    if null.as_raw_fd() < 3 {
        // It got one of the three numbers, opened close-on-exec, and stays.
        // SAFETY: clears the flag of a descriptor that is open.
        unsafe { libc::fcntl(null.as_raw_fd(), libc::F_SETFD, 0) };
        std::mem::forget(null);
    }
    Ok(())
}

/// Grants every reservation of address space, as a host with much memory does. The VM is hardly larger than its
/// workload's limit, so the kernel's heuristic would refuse what runtimes reserve and never touch; what is touched
/// is bounded by the container's cgroup.
pub fn allow_overcommit() {
    if let Err(e) = fs::write("/proc/sys/vm/overcommit_memory", "1") {
        tracing::warn!("cannot allow large reservations of memory: {e}");
    }
}

/// Makes the agent the last process the kernel kills for memory, and gives it descriptors for thousands of streams.
/// Containers inherit its limits unless their spec says otherwise, as under other runtimes' daemons.
///
/// What the kernel derives from the size of the machine is as high as it gets: an engine asks for the limits that it
/// found on the host, and a process in a user namespace of its own may not raise what it has been given.
pub fn raise_limits() {
    const DESCRIPTORS: u64 = 1 << 20; // fs.nr_open's default, the most there can be.
    if let Err(e) = fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::warn!("cannot protect the agent from the OOM killer: {e}");
    }
    if let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS) {
        tracing::warn!("cannot raise the limit of open files: {e}");
    }
    for resource in [
        Resource::RLIMIT_NPROC,
        Resource::RLIMIT_SIGPENDING,
        Resource::RLIMIT_MEMLOCK,
        Resource::RLIMIT_MSGQUEUE,
    ] {
        let raised = getrlimit(resource).and_then(|(soft, _)| setrlimit(resource, soft, RLIM_INFINITY));
        if let Err(e) = raised {
            tracing::warn!("cannot raise {resource:?}: {e}");
        }
    }
}

/// Sets `lo` up: 127.0.0.1 and ::1 then come by themselves.
pub fn bring_loopback_up() {
    if let Err(e) = try_bring_loopback_up() {
        tracing::warn!("cannot bring the loopback interface up: {e}");
    }
}

fn try_bring_loopback_up() -> std::io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: ifreq is a plain structure for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which lives until the call returns.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(|t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
        .unwrap_or(0)
}

/// Resets the machine, which ends the VM. What had to be written back has been.
pub fn reset() -> ! {
    // Fails only without CAP_SYS_BOOT. PID 1's exit then makes the kernel panic, which ends the VM as well.
    let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
    std::process::exit(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_read_for_our_words_only() {
        let quiet = Options::parse("quiet reboot=t nomodule panic=-1\n");
        assert_eq!((quiet.log_level, quiet.loopback, quiet.enter), (LevelFilter::WARN, false, false));
        let loud = Options::parse("stockade.log=debug stockade.loopback stockade.enter root=/dev/vda");
        assert_eq!((loud.log_level, loud.loopback, loud.enter), (LevelFilter::DEBUG, true, true));
        assert_eq!(Options::parse("stockade.log=loudest").log_level, LevelFilter::WARN);
    }
}
