//! What the containers of a pod share: the guest's own uts and ipc namespaces, a file system for shared memory, a user
//! namespace if the pod has one, and a pid namespace if one of them asks for it.
//!
//! That last one belongs to the user namespace, where there is one. It has an init, the only process that a pod ever
//! needs beside its containers' own: it takes over orphans and reaps them. Every container in the namespace sees it, so
//! it is this program executed anew, with nothing of the agent's in its memory, no capability, and an empty root.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{
    ForkResult, Gid, Pid, Uid, chdir, chroot, execv, fork, pipe2, setgroups, setresgid, setresuid,
};
use stockade_agent_protocol::messages::SetPodRequest;
use stockade_agent_protocol::{POD_PID_NAMESPACE, POD_SHM, POD_USER_NAMESPACE};

use crate::container::set_sysctl;
use crate::error::Error;
use crate::sandbox::set_names;
use crate::spec::Ids;

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

/// Makes a user namespace with these mappings, and keeps it in a file. To be called in a process that ends with it.
pub fn make_user_namespace(ids: &Ids, file: &str) -> Result<(), Error> {
    let failed =
        |e: io::Error| Error::os("making a user namespace with linux.uidMappings and gidMappings", e);
    let member = Member::fork(|| {
        unshare(CloneFlags::CLONE_NEWUSER)?;
        Ok(0)
    })
    .map_err(failed)?;
    for (name, map) in ["uid_map", "gid_map"].into_iter().zip(ids.maps()) {
        fs::write(format!("/proc/{}/{name}", member.pid), map).map_err(failed)?;
    }
    member.keep("user", file).map_err(failed)
}

/// Makes the shared pid namespace, with a process in it that keeps it: in the shared user namespace, if `users` says that
/// there is one. To be called in a process that ends with it. Returns that process, which is then the agent's child.
pub fn make_pid_namespace(users: bool) -> Result<Pid, Error> {
    let failed = |e: io::Error| Error::os("making the pod's pid namespace", e);
    fs::create_dir_all(EMPTY).map_err(failed)?;
    let member = Member::fork(|| {
        if users {
            setns(File::open(POD_USER_NAMESPACE)?, CloneFlags::CLONE_NEWUSER)?;
            be(0)?;
        }
        unshare(CloneFlags::CLONE_NEWPID)?;
        // SAFETY: this process has one thread.
        match unsafe { fork() }? {
            ForkResult::Child => {
                let _ = execv(c"/proc/self/exe", &[CString::new(PAUSE).unwrap_or_default()]);
                // SAFETY: ends this process at once.
                unsafe { libc::_exit(1) }
            }
            ForkResult::Parent { child } => Ok(child.as_raw()),
        }
    })
    .map_err(failed)?;
    let init = Pid::from_raw(member.word);
    // Of the process's parent the file is the one of the children to come.
    member.keep("pid_for_children", POD_PID_NAMESPACE).map_err(failed)?;
    Ok(init)
}

/// A process in namespaces of its own, for somebody outside to keep them, who still may: it only waits.
struct Member {
    pid: Pid,
    /// What it said when it had.
    word: i32,
    /// It ends when this is closed.
    _gate: OwnedFd,
}

impl Member {
    /// Forks it. To be called in a process with one thread.
    fn fork(enter: impl FnOnce() -> io::Result<i32>) -> io::Result<Self> {
        let (word, word_end) = pipe2(OFlag::O_CLOEXEC)?;
        let (gate_end, gate) = pipe2(OFlag::O_CLOEXEC)?;
        // SAFETY: this process has one thread.
        match unsafe { fork() }? {
            ForkResult::Child => {
                drop((word, gate));
                let said = match enter() {
                    Ok(word) => [0, word],
                    Err(e) => [e.raw_os_error().unwrap_or(libc::EIO), 0],
                };
                let bytes = said.map(i32::to_ne_bytes).concat();
                let _ = File::from(word_end).write_all(&bytes);
                let _ = File::from(gate_end).read(&mut [0]);
                // SAFETY: ends this process at once.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                drop((word_end, gate_end));
                let mut said = [0; 8];
                File::from(word).read_exact(&mut said)?;
                let [error, word] = [0, 4].map(|at| {
                    let mut number = [0; 4];
                    number.copy_from_slice(&said[at..at + 4]);
                    i32::from_ne_bytes(number)
                });
                match error {
                    0 => Ok(Self { pid: child, word, _gate: gate }),
                    error => Err(io::Error::from_raw_os_error(error)),
                }
            }
        }
    }

    /// Keeps one of its namespaces in a file.
    fn keep(&self, namespace: &str, file: &str) -> io::Result<()> {
        if let Some(directory) = Path::new(file).parent() {
            fs::create_dir_all(directory)?;
        }
        File::create(file)?;
        let namespace = format!("/proc/{}/ns/{namespace}", self.pid);
        Ok(mount(Some(namespace.as_str()), file, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
    }
}

/// Becomes this user, of this group and no other.
fn be(id: u32) -> nix::Result<()> {
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)
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
    be(NOBODY)
}
