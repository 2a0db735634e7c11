//! The system calls that each kind of thread in the jail may make: the one place where they are listed.
//!
//! `build.rs` compiles the lists into filters, and the end-to-end suite compares them with what the threads do in
//! it: a call that is missing kills the VMM, and one that no case needs fails the suite, unless it is
//! [`Call::unseen`] for a reason: what depends on the moment, or on the host. A list is about the code of the host's
//! kernel that a guest could reach through a thread that it has taken over; what its descriptors are is not told apart,
//! for the jail has nothing else to open.

/// What a thread does, which decides what it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The I/O thread, which is the process's first: streams, entropy, the control socket.
    Io,
    /// One vCPU.
    Vcpu,
    /// The file server.
    Files,
    /// One network interface.
    Network,
}

impl Kind {
    /// All of them, and how their threads are called: patterns as of `Documentation/trace/events.rst`.
    pub const ALL: [(Kind, &'static str); 4] = [
        (Kind::Io, "stockade-vmm"),
        (Kind::Vcpu, "vcpu[0-9]*"),
        (Kind::Files, "fs"),
        (Kind::Network, "net[0-9]"),
    ];

    /// What its threads may call.
    pub fn calls(self) -> impl Iterator<Item = &'static Call> {
        let own = match self {
            Kind::Io => IO,
            Kind::Vcpu => VCPU,
            Kind::Files => FILES,
            Kind::Network => NETWORK,
        };
        EVERY.iter().chain(own)
    }
}

/// A system call that is allowed.
#[derive(Debug)]
pub struct Call {
    name: &'static str,
    /// Its number on x86-64.
    pub number: i64,
    /// What its arguments have to be.
    pub only: Only,
    /// Why the end-to-end suite may not get there.
    pub unseen: Option<&'static str>,
}

/// What the arguments of a call have to be.
#[derive(Clone, Copy, Debug)]
pub enum Only {
    /// Anything.
    Any,
    /// The argument of this index is one of these.
    OneOf(u8, &'static [Value]),
    /// The argument of this index has none of these bits.
    Without(u8, u32),
}

/// A value of an argument.
#[derive(Clone, Copy, Debug)]
pub struct Value {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub value: u32,
    /// Why the end-to-end suite may not get there.
    pub unseen: Option<&'static str>,
}

impl Value {
    const fn new(name: &'static str, value: u32) -> Self {
        Self { name, value, unseen: None }
    }

    const fn unseen(self, why: &'static str) -> Self {
        Self { unseen: Some(why), ..self }
    }
}

impl Call {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name.strip_prefix("SYS_").unwrap_or(self.name)
    }

    /// Whether it is one of those that every kind may make.
    pub fn every_kind(&self) -> bool {
        EVERY.iter().any(|call| call.number == self.number)
    }

    const fn only(self, only: Only) -> Self {
        Self { only, ..self }
    }

    const fn unseen(self, why: &'static str) -> Self {
        Self { unseen: Some(why), ..self }
    }
}

macro_rules! call {
    ($number:ident) => {
        Call { name: stringify!($number), number: libc::$number, only: Only::Any, unseen: None }
    };
}

macro_rules! libc_value {
    ($name:ident) => {
        Value::new(stringify!($name), libc::$name as u32)
    };
}

const NOT_EXECUTABLE: u32 = libc::PROT_EXEC as u32;
const PANIC: &str = "a panic, which ends the process with SIGABRT";
const THREAD_END: &str = "a thread's end, if the process is not killed first";
const CLOCK: &str = "hosts whose clock the vDSO cannot read";

/// What the Rust and C libraries need in every thread: memory, locks, signals, and the thread's end.
const EVERY: &[Call] = &[
    call!(SYS_futex),
    call!(SYS_brk),
    call!(SYS_mmap).only(Only::Without(2, NOT_EXECUTABLE)),
    call!(SYS_munmap),
    call!(SYS_mremap).unseen("a long list that grows"),
    call!(SYS_madvise).unseen(THREAD_END),
    call!(SYS_rt_sigreturn).unseen("a vCPU that is kicked out of the guest, if it is there just then"),
    call!(SYS_rt_sigprocmask).unseen(PANIC),
    call!(SYS_getpid).unseen(PANIC),
    call!(SYS_gettid).unseen(PANIC),
    call!(SYS_tgkill).unseen(PANIC),
    call!(SYS_clock_gettime).unseen(CLOCK),
    call!(SYS_read),
    call!(SYS_write),
    call!(SYS_close),
    call!(SYS_exit_group).unseen("the supervisor mostly kills the process first"),
];

/// Interrupts: KVM takes a message for the guest's local APICs.
const KVM_SIGNAL_MSI: Value = Value::new("KVM_SIGNAL_MSI", 0x4020_aea5);
/// Memory that the VM is given while it runs, or that is taken from it.
const KVM_SET_USER_MEMORY_REGION: Value = Value::new("KVM_SET_USER_MEMORY_REGION", 0x4020_ae46);
const TUNSETOFFLOAD: Value = libc_value!(TUNSETOFFLOAD);

const IO: &[Call] = &[
    call!(SYS_epoll_wait),
    call!(SYS_epoll_ctl),
    // Streams, and the control socket with the descriptors that come by it.
    call!(SYS_recvmsg),
    call!(SYS_sendmsg),
    call!(SYS_sendto),
    call!(SYS_shutdown),
    // Entropy for the guest.
    call!(SYS_getrandom),
    // A tap that is attached.
    call!(SYS_fcntl).only(Only::OneOf(1, &[libc_value!(F_GETFL), libc_value!(F_SETFL)])),
    call!(SYS_ioctl).only(Only::OneOf(
        1,
        &[
            KVM_SIGNAL_MSI,
            KVM_SET_USER_MEMORY_REGION,
            TUNSETOFFLOAD,
            libc_value!(TUNGETIFF),
            libc_value!(TUNSETVNETHDRSZ),
        ],
    )),
];

const VCPU: &[Call] = &[
    call!(SYS_ioctl).only(Only::OneOf(
        1,
        &[
            Value::new("KVM_RUN", 0xae80),
            KVM_SIGNAL_MSI.unseen("a device is told to raise an interrupt while the guest masks it"),
            Value::new("KVM_KVMCLOCK_CTRL", 0xaead).unseen("a VM that goes on after a pause"),
        ],
    )),
    // A driver starts a device.
    call!(SYS_eventfd2),
    call!(SYS_fcntl).only(Only::OneOf(1, &[libc_value!(F_DUPFD_CLOEXEC)])),
    call!(SYS_getrandom),
    call!(SYS_sched_yield).unseen("two threads that send at the same moment"),
    call!(SYS_sigaltstack).unseen(THREAD_END),
    call!(SYS_exit).unseen(THREAD_END),
];

/// What the guest does to files it does to those of the share; see the jail for what bounds that.
const FILES: &[Call] = &[
    call!(SYS_epoll_create1),
    call!(SYS_epoll_wait),
    call!(SYS_epoll_ctl),
    call!(SYS_ioctl).only(Only::OneOf(1, &[KVM_SIGNAL_MSI])),
    call!(SYS_getrandom),
    call!(SYS_openat),
    call!(SYS_fstat),
    call!(SYS_newfstatat),
    call!(SYS_statx),
    call!(SYS_readlinkat),
    call!(SYS_getdents64),
    call!(SYS_lseek),
    call!(SYS_preadv),
    call!(SYS_pwritev),
    call!(SYS_fsync),
    call!(SYS_fdatasync),
    call!(SYS_fallocate),
    call!(SYS_ftruncate),
    call!(SYS_fstatfs),
    call!(SYS_mkdirat),
    // Pipes and sockets, which mean something between containers of a pod; the bit stands for devices.
    call!(SYS_mknodat).only(Only::Without(2, libc::S_IFCHR)),
    call!(SYS_linkat),
    call!(SYS_symlinkat),
    call!(SYS_renameat2),
    call!(SYS_unlinkat),
    call!(SYS_fchmodat),
    call!(SYS_fchownat),
    call!(SYS_utimensat),
    call!(SYS_umask),
    call!(SYS_getxattr),
    call!(SYS_setxattr),
    call!(SYS_listxattr),
    call!(SYS_removexattr),
    // FLUSH closes a copy of the descriptor.
    call!(SYS_dup),
    // Files are made as the guest's user, and lose their set-ID bits as one without CAP_FSETID writes.
    call!(SYS_setresuid),
    call!(SYS_setresgid),
    call!(SYS_capget),
    call!(SYS_capset),
];

const NETWORK: &[Call] = &[
    call!(SYS_epoll_create1),
    call!(SYS_epoll_wait),
    call!(SYS_epoll_ctl),
    call!(SYS_readv),
    call!(SYS_writev),
    call!(SYS_ioctl).only(Only::OneOf(1, &[KVM_SIGNAL_MSI, TUNSETOFFLOAD])),
];
