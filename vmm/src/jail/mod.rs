//! The jail: what a VMM that a guest has taken over could still reach of the host.
//!
//! The supervisor starts the process in namespaces of its own: user (ids mapped one to one, so that files keep
//! their owners, but no capability counts outside), pid (it is process 1 and sees no other), network (empty), ipc,
//! uts, and mount; and in a cgroup of its own, where the sandbox has one. [`enter`] closes the last of these and what
//! is not a namespace, before the first guest instruction:
//!
//! - The root directory is a read-only tmpfs that holds two mounts: `/share`, the sandbox's share directory, and
//!   `/proc/self/fd`, this process's own descriptors, through which the file server reopens files (beside it an empty
//!   `mountinfo`). Mounts that the
//!   supervisor makes in the share later appear, for `/share` is a slave of it. `..` ends at this root.
//! - Capabilities: none but [`FILES`], and those for the file server's thread only; all others call
//!   [`drop_capabilities`]. They count for files whose owner is mapped, which are all, so what bounds them is that
//!   no file outside of the share can be named.
//! - No new privileges by execve, no core dump, no ptrace by others of the same user.
//! - Each thread has a filter of the system calls that its kind of work needs ([`calls`]), from before the guest
//!   runs to its end; any other call kills the process. No filter lets a thread or a process be started.
//!
//! From then on no path is opened but `/share`, what the guest names in it, one component each, the places of such
//! things as the kernel tells them ([`crate::virtio::fs`], hard links), and `/proc/self/fd/N`.

pub mod calls;
mod filter;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, mkdirat, open, openat};
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_remount, move_mount, open_tree,
    unmount,
};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, chdir, fchdir, getpid, pivot_root, set_dumpable_behavior, setrlimit,
};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capability_is_in_bounding_set,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits, set_no_new_privs,
};

pub use calls::Kind;
pub use filter::close_thread;

/// Where the share directory is in the jail.
pub const SHARE: &str = "/share";

/// What the guest's root, whose requests the file server carries out, may do to files of any owner: pass over
/// permissions, which the guest has checked; create files as another user; change owner, mode and times; keep
/// set-group-ID; give file capabilities.
const FILES: CapabilitySet = CapabilitySet::DAC_OVERRIDE
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP);

/// A tmpfs for four directories and an empty file.
const ROOT_OPTIONS: &CStr = c"mode=755,size=64k,nr_inodes=16";

/// Errors of the jail. Each is one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// it is not in namespaces of its own, so that everything below would be done to the host
    #[error("the VMM is not the first process of a pid namespace of its own: let `stockade` start it")]
    NotAlone,
    /// one of the steps
    #[error("cannot {what} for the VMM's jail: {source}; see the host's kernel log")]
    Step {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// the kernel does not take a filter
    #[error(
        "cannot filter the system calls of the VMM's {thread} thread: {source}; the kernel needs CONFIG_SECCOMP_FILTER"
    )]
    Filter {
        /// Its name.
        thread: String,
        /// Why not.
        source: seccompiler::Error,
    },
}

fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Step { what, source: source.into() }
}

/// Confines the process. `share` is a mount of the share directory that is attached nowhere yet (`open_tree(2)` with
/// `OPEN_TREE_CLONE`). The process must have one thread. There is no way back.
pub fn enter(share: OwnedFd) -> Result<(), Error> {
    if getpid().as_raw_nonzero().get() != 1 {
        return Err(Error::NotAlone);
    }
    change_root(share)?;
    drop_privileges()?;
    filter::from_now_on();
    Ok(())
}

fn change_root(share: OwnedFd) -> Result<(), Error> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let descriptors = open_tree(CWD, "/proc/self/fd", clone).map_err(step("take along /proc/self/fd"))?;
    // Some directory that every system has; nothing in it is needed any more.
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("jail", "/proc", "tmpfs", flags, ROOT_OPTIONS).map_err(step("mount a root directory"))?;
    let root = open("/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(step("open the root directory"))?;
    for name in ["share", "proc", "proc/self", "proc/self/fd"] {
        mkdirat(&root, name, Mode::from_raw_mode(0o755)).map_err(step("fill the root directory"))?;
    }
    // fuse-backend-rs opens it, and would read it only for file handles, which are not in use.
    let create = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    openat(&root, "proc/self/mountinfo", create, Mode::from_raw_mode(0o444))
        .map_err(step("fill the root directory"))?;
    for (tree, name) in [(&share, "share"), (&descriptors, "proc/self/fd")] {
        move_mount(tree.as_fd(), "", &root, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(step("mount the share directory and /proc/self/fd"))?;
    }
    fchdir(&root).map_err(step("enter the root directory"))?;
    // The new root on top of the old one, which is then taken away: pivot_root(2), notes.
    pivot_root(".", ".").map_err(step("change the root directory"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("leave the host's root directory"))?;
    chdir("/").map_err(step("enter the new root directory"))?;
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | flags, "")
        .map_err(step("make the root directory read-only"))
}

fn drop_privileges() -> Result<(), Error> {
    use CapabilitiesSecureBits as Bits;
    // Files are created as the guest's users by changing this thread's user for a moment: capabilities must stay.
    let bits = Bits::NO_ROOT
        | Bits::NO_ROOT_LOCKED
        | Bits::NO_SETUID_FIXUP
        | Bits::NO_SETUID_FIXUP_LOCKED
        | Bits::NO_CAP_AMBIENT_RAISE
        | Bits::NO_CAP_AMBIENT_RAISE_LOCKED;
    set_capabilities_secure_bits(bits).map_err(step("lock the secure bits"))?;
    for bit in 0..u64::BITS {
        let Some(capability) = CapabilitySet::from_bits(1 << bit) else { continue };
        // Fails for numbers beyond the last that the kernel knows.
        if !FILES.contains(capability) && capability_is_in_bounding_set(capability).unwrap_or(false) {
            remove_capability_from_bounding_set(capability).map_err(step("drop capabilities"))?;
        }
    }
    keep(FILES).map_err(step("drop capabilities"))?;
    set_no_new_privs(true).map_err(step("rule out new privileges"))?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .map_err(step("rule out core dumps"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("rule out being traced"))
}

/// Takes all capabilities from the calling thread: for those that do not serve files.
pub fn drop_capabilities() -> Result<(), Error> {
    keep(CapabilitySet::empty()).map_err(step("drop capabilities"))
}

fn keep(set: CapabilitySet) -> rustix::io::Result<()> {
    let inheritable = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: set, permitted: set, inheritable })
}
