//! What the containers of a pod share: the guest's own uts and ipc namespaces, a file system for shared memory, and a
//! pid namespace if one of them asks for it.
//!
//! That last one has an init, the only process that a pod ever needs beside its containers' own: it takes over orphans
//! and reaps them. Every container in the namespace sees it, so it is this program executed anew, with nothing of the
//! agent's in its memory, no capability, and an empty root.

use std::ffi::CString;
use std::fs::{self, File};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Gid, Pid, Uid, chdir, chroot, execv, fork, setgroups, setresgid, setresuid};
use stockade_agent_protocol::messages::SetPodRequest;
use stockade_agent_protocol::{POD_PID_NAMESPACE, POD_SHM};

use crate::container::set_sysctl;
use crate::error::Error;
use crate::sandbox::set_names;

/// The name under which this program is the init of the shared pid namespace, as a pod's users know it.
const PAUSE: &str = "pause";
/// Its root.
const EMPTY: &str = "/run/stockade/pod/empty";
/// Nobody.
const NOBODY: u32 = 65534;

/// Does what the request asks for.
pub fn set(request: &SetPodRequest) -> Result<(), Error> {
    set_names([&request.hostname, &request.domainname])?;
    for (name, value) in &request.sysctls {
        set_sysctl(name, value)?;
    }
    if request.shm_bytes == 0 {
        return Ok(());
    }
    fs::create_dir_all(POD_SHM).map_err(|e| Error::os(format!("making {POD_SHM}"), e))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = format!("mode=1777,size={}", request.shm_bytes);
    mount(Some("shm"), POD_SHM, Some("tmpfs"), flags, Some(options.as_str()))
        .map_err(|e| Error::os(format!("mounting a tmpfs on {POD_SHM}"), e))
}

/// Makes the shared pid namespace, with a process in it that keeps it. To be called in a process that ends with it.
/// Returns that process, which is then the agent's child.
pub fn make_pid_namespace() -> Result<Pid, Error> {
    let failed = |what: &str, e: Errno| Error::os(format!("{what} of the pod's pid namespace"), e);
    let file = |e| Error::os(format!("making {POD_PID_NAMESPACE}"), e);
    fs::create_dir_all(EMPTY).map_err(file)?;
    File::create(POD_PID_NAMESPACE).map_err(file)?;
    let program = c"/proc/self/exe";
    let name = CString::new(PAUSE).unwrap_or_default();
    unshare(CloneFlags::CLONE_NEWPID).map_err(|e| failed("making", e))?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(|e| failed("forking the init", e))? {
        ForkResult::Child => {
            let _ = execv(program, &[name]);
            // SAFETY: ends this process at once.
            unsafe { libc::_exit(1) }
        }
        ForkResult::Parent { child } => {
            // Of the process's parent the file is the one of the children to come.
            let namespace = Path::new("/proc/self/ns/pid_for_children");
            mount(Some(namespace), POD_PID_NAMESPACE, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(|e| failed("keeping", e))?;
            Ok(child)
        }
    }
}

/// Whether this process is to be the init of the shared pid namespace.
pub fn is_pause() -> bool {
    std::env::args_os().next().is_some_and(|name| name == PAUSE)
}

/// The life of that init.
pub fn pause() -> ! {
    let _ = prctl::set_name(&CString::new(PAUSE).unwrap_or_default());
    let left = give_everything_up();
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    let blocked = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&signals), None);
    while left.is_ok() && blocked.is_ok() {
        while waitpid(None, Some(WaitPidFlag::WNOHANG)).is_ok_and(|status| status.pid().is_some()) {}
        let _ = signals.wait();
    }
    // The namespace ends with this, which who enters it is told.
    std::process::exit(1);
}

fn give_everything_up() -> nix::Result<()> {
    chroot(EMPTY)?;
    chdir("/")?;
    setgroups(&[])?;
    setresgid(Gid::from_raw(NOBODY), Gid::from_raw(NOBODY), Gid::from_raw(NOBODY))?;
    setresuid(Uid::from_raw(NOBODY), Uid::from_raw(NOBODY), Uid::from_raw(NOBODY))
}
