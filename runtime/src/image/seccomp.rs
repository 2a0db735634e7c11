//! The system calls of a container that nobody asked to be special: those that container engines allow by default.
//!
//! What is not listed fails: with EPERM if it is known and needs a privilege that the container has not, with ENOSYS
//! otherwise, so that a C library falls back to what it did before the call existed. The filter is made for 64-bit
//! and 32-bit programs of x86-64.

use serde_json::{Value, json};

/// errno.h
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET of clone(2).
const CLONE_NAMESPACES: u64 = 0x7e02_0000;
/// Addresses between a VM and its host, which are not the workload's business.
const AF_VSOCK: u64 = 40;
/// personality(2): Linux with or without UNAME26 and ADDR_NO_RANDOMIZE, 32-bit Linux, and the question for it.
const PERSONALITIES: [u64; 5] = [0x0, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Allowed with whatever arguments.
const ALLOWED: &str = "accept accept4 access adjtimex alarm arch_prctl bind brk capget capset chdir chmod chown \
    chown32 clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 \
    clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 \
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd \
    eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark \
    fchdir fchmod fchmodat fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork \
    fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_time64 \
    futex_waitv futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid getegid32 \
    geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid \
    getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid getsockname \
    getsockopt gettid gettimeofday getuid getuid32 getxattr inotify_add_watch inotify_init inotify_init1 \
    inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioctl \
    ioprio_get ioprio_set ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lchown32 \
    lgetxattr link linkat listen listxattr llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 madvise \
    membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mmap2 \
    mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 \
    mq_unlink mremap msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep \
    newfstatat _newselect open openat openat2 pause pidfd_getfd pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc \
    pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_madvise \
    process_mrelease pselect6 pselect6_time64 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recv \
    recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr rename renameat renameat2 restart_syscall \
    rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait \
    rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity \
    sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 \
    sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop \
    semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto setfsgid setfsgid32 setfsuid \
    setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid \
    setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit set_robust_list setsid setsockopt set_thread_area \
    set_tid_address setuid setuid32 setxattr shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 \
    sigpending sigprocmask sigreturn socketcall socketpair splice stat stat64 statfs statfs64 statx symlink symlinkat \
    sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime \
    timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime \
    timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname unlink unlinkat utime utimensat \
    utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev";

/// Allowed to who has the capability, and EPERM to others.
const PRIVILEGED: &[(&str, &str)] = &[
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "CAP_SYS_ADMIN",
        "bpf clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount \
         open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("CAP_SYS_BOOT", "reboot kexec_load kexec_file_load"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module init_module finit_module"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_PTRACE", "kcmp ptrace process_vm_readv process_vm_writev"),
    ("CAP_SYS_RAWIO", "iopl ioperm"),
    ("CAP_SYS_TIME", "clock_settime clock_settime64 settimeofday stime"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    ("CAP_SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
];

/// Dangerous or of no use in a container, whatever its capabilities are.
const REFUSED: &str = "add_key keyctl request_key io_uring_enter io_uring_register io_uring_setup move_pages \
    migrate_pages nfsservctl pivot_root swapon swapoff uselib userfaultfd ustat vm86 vm86old";

/// `linux.seccomp` for a container with these capabilities.
pub fn profile(capabilities: &[String]) -> Value {
    let has = |name: &str| capabilities.iter().any(|capability| capability == name);
    let words = |text: &'static str| text.split_whitespace();
    let (mut allowed, mut refused): (Vec<_>, Vec<_>) = (words(ALLOWED).collect(), words(REFUSED).collect());
    for (capability, names) in PRIVILEGED {
        match has(capability) {
            true => allowed.extend(words(names)),
            // A C library tries clone3 first, and must be told that there is none.
            false => refused.extend(words(names).filter(|name| *name != "clone3")),
        }
    }
    let mut rules = vec![
        json!({ "names": allowed, "action": "SCMP_ACT_ALLOW" }),
        json!({ "names": refused, "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM }),
        json!({ "names": ["socket"], "action": "SCMP_ACT_ALLOW",
                "args": [{ "index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_NE" }] }),
    ];
    for value in PERSONALITIES {
        rules.push(json!({ "names": ["personality"], "action": "SCMP_ACT_ALLOW",
                           "args": [{ "index": 0, "value": value, "op": "SCMP_CMP_EQ" }] }));
    }
    rules.push(match has("CAP_SYS_ADMIN") {
        true => json!({ "names": ["clone"], "action": "SCMP_ACT_ALLOW" }),
        false => json!({ "names": ["clone"], "action": "SCMP_ACT_ALLOW",
                         "args": [{ "index": 0, "value": CLONE_NAMESPACES, "valueTwo": 0,
                                    "op": "SCMP_CMP_MASKED_EQ" }] }),
    });
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": ENOSYS,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": rules,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn action_of(profile: &Value, name: &str) -> Option<String> {
        let rules = profile["syscalls"].as_array().unwrap();
        let rule = rules.iter().find(|rule| rule["names"].as_array().unwrap().iter().any(|n| n == name))?;
        Some(rule["action"].as_str().unwrap().trim_start_matches("SCMP_ACT_").to_owned())
    }

    #[test]
    fn a_call_has_one_action() {
        for capabilities in [vec![], vec!["CAP_SYS_ADMIN".to_owned(), "CAP_SYS_PTRACE".to_owned()]] {
            let profile = profile(&capabilities);
            let rules = profile["syscalls"].as_array().unwrap();
            let mut names: Vec<_> =
                rules.iter().take(3).flat_map(|r| r["names"].as_array().unwrap()).collect();
            let count = names.len();
            names.sort_by_key(|name| name.as_str());
            names.dedup();
            assert_eq!(names.len(), count);
        }
    }

    #[test]
    fn privileges_come_with_their_capability() {
        let (without, with) = (profile(&[]), profile(&["CAP_SYS_ADMIN".into()]));
        assert_eq!(action_of(&without, "mount").unwrap(), "ERRNO");
        assert_eq!(action_of(&with, "mount").unwrap(), "ALLOW");
        assert_eq!(action_of(&without, "clone3"), None);
        assert_eq!(action_of(&with, "clone3").unwrap(), "ALLOW");
        assert_eq!(action_of(&with, "io_uring_setup").unwrap(), "ERRNO");
        assert_eq!(action_of(&without, "read").unwrap(), "ALLOW");
    }
}
