//! Programs for the kernel's BPF machine, as the agent and the host's side load them: what an instruction is, and bpf(2).
//! Both write theirs by hand, a dozen instructions each, since a guest has no compiler for them and needs none.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct bpf_insn` (Documentation/bpf/standardization/instruction-set.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// What is done.
    pub code: u8,
    /// The register that is written to in the lower four bits, the other in the upper.
    pub registers: u8,
    /// From an address, or how many instructions a jump leaves out.
    pub offset: i16,
    /// A value.
    pub immediate: i32,
}

impl Instruction {
    /// One of these parts.
    pub const fn new(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Self {
        Self { code, registers: to | from << 4, offset, immediate }
    }

    /// Ends with what is in r0.
    pub const fn exit() -> Self {
        Self::new(0x95, 0, 0, 0, 0)
    }
}

/// Loads a program of this `enum bpf_prog_type`, to be attached as this `enum bpf_attach_type`. The error is what the
/// verifier makes of it, or EPERM without CAP_BPF.
pub fn load(program_type: u32, attach_type: u32, program: &[Instruction]) -> io::Result<OwnedFd> {
    /// Up to `expected_attach_type`.
    #[derive(Default)]
    #[repr(C)]
    struct Attributes {
        program_type: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        attach_type: u32,
    }
    let attributes = Attributes {
        program_type,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        attach_type,
        ..Default::default()
    };
    bpf_fd(BPF_PROG_LOAD, &attributes)
}

/// Has a program run for a cgroup, with `BPF_F_…` flags. It stays when its descriptor is closed.
pub fn attach(program: BorrowedFd, cgroup: BorrowedFd, attach_type: u32, flags: u32) -> io::Result<()> {
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        attach_type,
        flags,
    };
    bpf(BPF_PROG_ATTACH, &attributes).map(drop)
}

/// Has a program run for a network namespace, until what is returned is closed.
pub fn link(program: BorrowedFd, namespace: BorrowedFd, attach_type: u32) -> io::Result<OwnedFd> {
    let attributes = LinkAttributes {
        program: program.as_raw_fd() as u32,
        target: namespace.as_raw_fd() as u32,
        attach_type,
        flags: 0,
    };
    bpf_fd(BPF_LINK_CREATE, &attributes)
}

/// A map with this one socket, under 0.
pub fn map_of(socket: BorrowedFd) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    #[repr(C)]
    struct Update {
        map: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let create = Create { map_type: BPF_MAP_TYPE_SOCKMAP, key_size: 4, value_size: 8, max_entries: 1 };
    let map = bpf_fd(BPF_MAP_CREATE, &create)?;
    let (key, value) = (0u32, socket.as_raw_fd() as u64);
    let update = Update {
        map: map.as_raw_fd() as u32,
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &update)?;
    Ok(map)
}

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;

#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// bpf(2). `A` is the beginning of `union bpf_attr` for the command; what it points to must live.
fn bpf<A>(command: libc::c_int, attributes: &A) -> io::Result<i32> {
    loop {
        // SAFETY: the kernel reads the attributes and what they point to, all of which outlive the call.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<A>()) };
        if result >= 0 {
            return Ok(result as i32);
        }
        // The verifier gives up when a signal is pending, such as SIGCHLD, which has been handled by now.
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::WouldBlock {
            return Err(e);
        }
    }
}

fn bpf_fd<A>(command: libc::c_int, attributes: &A) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: these commands return a new descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
