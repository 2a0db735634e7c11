//! Puts the filters of [`super::calls`], which `build.rs` has compiled, in force.

use std::ffi::CString;
use std::sync::atomic::{AtomicBool, Ordering};

use seccompiler::sock_filter;

use super::{Error, Kind};

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// Whether this process is in the jail: a test that runs devices in its own process is not.
static IN_FORCE: AtomicBool = AtomicBool::new(false);

/// Threads that close themselves later than this get filters.
pub fn from_now_on() {
    IN_FORCE.store(true, Ordering::Relaxed);
}

/// Names the calling thread, and closes it to all system calls that its kind does not need.
pub fn close_thread(kind: Kind, name: &str) -> Result<(), Error> {
    if let Ok(name) = CString::new(name) {
        let _ = rustix::thread::set_name(&name);
    }
    if !IN_FORCE.load(Ordering::Relaxed) {
        return Ok(());
    }
    seccompiler::apply_filter(program(kind)).map_err(|source| Error::Filter { thread: name.into(), source })
}

fn program(kind: Kind) -> &'static [sock_filter] {
    match kind {
        Kind::Io => &IO,
        Kind::Vcpu => &VCPU,
        Kind::Files => &FILES,
        Kind::Network => &NETWORK,
    }
}

#[cfg(test)]
mod tests {
    use super::super::calls::Only;
    use super::*;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    /// Makes a system call in a process with the filter of `kind`.
    fn call(kind: Kind, number: i64, arguments: [u64; 3]) -> WaitStatus {
        // SAFETY: the child makes system calls, and nothing else that could need what other threads hold.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => waitpid(child, None).unwrap(),
            // SAFETY: as above; pointers among the arguments are the caller's, who waits.
            ForkResult::Child => unsafe {
                if seccompiler::apply_filter(program(kind)).is_ok() {
                    let [a, b, c] = arguments;
                    libc::syscall(number, a, b, c, 0, 0, 0);
                }
                libc::syscall(libc::SYS_exit_group, 0);
                unreachable!()
            },
        }
    }

    #[test]
    fn what_no_thread_needs_kills_the_process() {
        let writable = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let calls = [
            (libc::SYS_execve, 0, 0, 0),
            (libc::SYS_execveat, 0, 0, 0),
            (libc::SYS_fork, 0, 0, 0),
            (libc::SYS_vfork, 0, 0, 0),
            (libc::SYS_clone, libc::SIGCHLD as u64, 0, 0),
            (libc::SYS_clone3, 0, 0, 0),
            (libc::SYS_ptrace, libc::PTRACE_TRACEME.into(), 0, 0),
            (libc::SYS_process_vm_readv, 1, 0, 0),
            (libc::SYS_process_vm_writev, 1, 0, 0),
            (libc::SYS_kill, 1, 0, 0),
            (libc::SYS_pidfd_open, 1, 0, 0),
            (libc::SYS_pidfd_getfd, 0, 0, 0),
            (libc::SYS_unshare, libc::CLONE_NEWUSER as u64, 0, 0),
            (libc::SYS_setns, 0, 0, 0),
            (libc::SYS_mount, 0, 0, 0),
            (libc::SYS_umount2, 0, 0, 0),
            (libc::SYS_open_tree, 0, 0, 0),
            (libc::SYS_move_mount, 0, 0, 0),
            (libc::SYS_pivot_root, 0, 0, 0),
            (libc::SYS_chroot, 0, 0, 0),
            (libc::SYS_open_by_handle_at, 0, 0, 0),
            (libc::SYS_socket, libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0),
            (libc::SYS_socketpair, libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0),
            (libc::SYS_connect, 0, 0, 0),
            (libc::SYS_init_module, 0, 0, 0),
            (libc::SYS_finit_module, 0, 0, 0),
            (libc::SYS_kexec_load, 0, 0, 0),
            (libc::SYS_bpf, 0, 0, 0),
            (libc::SYS_perf_event_open, 0, 0, 0),
            (libc::SYS_io_uring_setup, 1, 0, 0),
            (libc::SYS_userfaultfd, 0, 0, 0),
            (libc::SYS_memfd_create, 0, 0, 0),
            (libc::SYS_keyctl, 0, 0, 0),
            (libc::SYS_prctl, libc::PR_SET_DUMPABLE as u64, 1, 0),
            (libc::SYS_mprotect, 0, 4096, writable as u64),
            (libc::SYS_mmap, 0, 4096, writable as u64),
            (libc::SYS_ioctl, 0, libc::TIOCSTI, 0),
            // KVM_CREATE_VCPU, which runs as whoever enters it.
            (libc::SYS_ioctl, 0, 0xae41, 0),
            (libc::SYS_fcntl, 0, libc::F_SETOWN as u64, 1),
            // The same number in the x32 ABI.
            (libc::SYS_read | 0x4000_0000, 0, 0, 0),
        ];
        for (kind, _) in Kind::ALL {
            for (number, a, b, c) in calls {
                let status = call(kind, number, [a, b, c]);
                let killed = matches!(status, WaitStatus::Signaled(_, Signal::SIGSYS, _));
                assert!(killed, "{kind:?}, system call {number}: {status:?}");
            }
        }
    }

    #[test]
    fn only_the_thread_that_hears_the_supervisor_changes_the_guests_memory() {
        const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
        for (kind, _) in Kind::ALL {
            let status = call(kind, libc::SYS_ioctl, [u64::MAX, KVM_SET_USER_MEMORY_REGION, 0]);
            assert_eq!(matches!(status, WaitStatus::Exited(_, 0)), kind == Kind::Io, "{kind:?}: {status:?}");
        }
    }

    #[test]
    fn only_the_file_server_opens_files_and_it_makes_no_devices() {
        for (kind, _) in Kind::ALL {
            let opened = call(kind, libc::SYS_openat, [libc::AT_FDCWD as u64, c"/".as_ptr() as u64, 0]);
            let made = call(kind, libc::SYS_mknodat, [u64::MAX, 0, libc::S_IFBLK.into()]);
            let changed = call(kind, libc::SYS_setresuid, [u64::MAX; 3]);
            assert!(matches!(made, WaitStatus::Signaled(_, Signal::SIGSYS, _)), "{kind:?}: {made:?}");
            for status in [opened, changed] {
                let lived = matches!(status, WaitStatus::Exited(_, 0));
                assert_eq!(lived, kind == Kind::Files, "{kind:?}: {status:?}");
            }
        }
        let pipe = call(Kind::Files, libc::SYS_mknodat, [u64::MAX, 0, libc::S_IFIFO.into()]);
        assert!(matches!(pipe, WaitStatus::Exited(_, 0)), "{pipe:?}");
    }

    #[test]
    fn every_call_of_a_list_passes_its_filter() {
        // What would not come back, or would wait.
        let apart = [libc::SYS_exit, libc::SYS_exit_group, libc::SYS_rt_sigreturn, libc::SYS_tgkill];
        for (kind, _) in Kind::ALL {
            for listed in kind.calls().filter(|listed| !apart.contains(&listed.number)) {
                let mut arguments = [u64::MAX, 0, 0];
                if let Only::OneOf(index, values) = listed.only {
                    arguments[usize::from(index)] = values[0].value.into();
                }
                let status = call(kind, listed.number, arguments);
                assert!(matches!(status, WaitStatus::Exited(_, 0)), "{kind:?} {}: {status:?}", listed.name());
            }
        }
    }
}
