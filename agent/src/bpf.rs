//! Programs for the kernel's BPF machine: the instructions that the agent's programs are made of, and how one comes to a
//! cgroup. Registers are used as 32-bit words.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `struct bpf_insn` (Documentation/bpf/standardization/instruction-set.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    pub code: u8,
    /// The one written to in the lower four bits, the other in the upper.
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

impl Instruction {
    const fn new(code: u8, to: u8, from: u8, offset: i16, immediate: u32) -> Self {
        Self { code, registers: to | from << 4, offset, immediate: immediate as i32 }
    }

    /// to = 32-bit word at the context (r1) + offset.
    pub const fn load_word(to: u8, offset: i16) -> Self {
        Self::new(0x61, to, 1, offset, 0)
    }

    /// 32-bit word at the context (r1) + offset = from.
    pub const fn store_word(offset: i16, from: u8) -> Self {
        Self::new(0x63, 1, from, offset, 0)
    }

    /// to = from.
    pub const fn mov_reg(to: u8, from: u8) -> Self {
        Self::new(0xbc, to, from, 0, 0)
    }

    /// to = value.
    pub const fn mov_imm(to: u8, value: u32) -> Self {
        Self::new(0xb4, to, 0, 0, value)
    }

    /// to &= value.
    pub const fn and_imm(to: u8, value: u32) -> Self {
        Self::new(0x54, to, 0, 0, value)
    }

    /// to >>= by.
    pub const fn shift_right(to: u8, by: u32) -> Self {
        Self::new(0x74, to, 0, 0, by)
    }

    /// Leaves out the next `by` instructions if the register has this value.
    pub const fn jump_if_equal(register: u8, value: u32, by: i16) -> Self {
        Self::new(0x16, register, 0, by, value)
    }

    /// The same if it has another.
    pub const fn jump_if_not_equal(register: u8, value: u32, by: i16) -> Self {
        Self::new(0x56, register, 0, by, value)
    }

    /// Ends with what is in r0.
    pub const fn exit() -> Self {
        Self::new(0x95, 0, 0, 0, 0)
    }
}

/// When a program of a cgroup is run.
#[derive(Debug, Clone, Copy)]
pub enum Hook {
    /// A device node is made or opened. The context is `struct bpf_cgroup_dev_ctx`, 1 allows it.
    Device,
    /// A socket connects to an IPv4 address. The context of this and the next ones is `struct bpf_sock_addr`.
    Connect,
    /// A datagram goes to an IPv4 address from a socket that is not connected.
    Send,
    /// A datagram has come from an IPv4 address, and a process is told which.
    Receive,
}

impl Hook {
    /// `enum bpf_prog_type`, `enum bpf_attach_type` and what BPF_PROG_ATTACH is told.
    fn numbers(self) -> (u32, u32, u32) {
        match self {
            // Takes the place of the program before it.
            Hook::Device => (15, 6, 0),
            Hook::Connect => (18, 10, BPF_F_ALLOW_MULTI),
            Hook::Send => (18, 14, BPF_F_ALLOW_MULTI),
            Hook::Receive => (18, 19, BPF_F_ALLOW_MULTI),
        }
    }

    /// Has a program run for the processes of a cgroup and those below it.
    pub fn attach(self, cgroup: &File, program: &[Instruction]) -> io::Result<()> {
        let program = self.load(program)?;
        let (_, attach_type, flags) = self.numbers();
        let attributes = AttachAttributes {
            target_fd: cgroup.as_raw_fd() as u32,
            program_fd: program.as_raw_fd() as u32,
            attach_type,
            flags,
        };
        // SAFETY: the kernel reads the attributes, which outlive the call.
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &attributes, size_of::<AttachAttributes>())
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn load(self, program: &[Instruction]) -> io::Result<OwnedFd> {
        let (program_type, attach_type, _) = self.numbers();
        let attributes = LoadAttributes {
            program_type,
            instruction_count: program.len() as u32,
            instructions: program.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            attach_type,
            ..Default::default()
        };
        let fd = loop {
            // SAFETY: the kernel reads the attributes and what they point to, all of which outlive the call.
            let fd = unsafe {
                libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &attributes, size_of::<LoadAttributes>())
            };
            if fd >= 0 {
                break fd;
            }
            // The verifier gives up when a signal is pending, here SIGCHLD, which has been handled by now.
            let e = io::Error::last_os_error();
            if e.kind() != io::ErrorKind::WouldBlock {
                return Err(e);
            }
        };
        // SAFETY: the kernel just returned this descriptor; nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The beginning of `union bpf_attr` for BPF_PROG_LOAD.
#[derive(Default)]
#[repr(C)]
struct LoadAttributes {
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

/// The beginning of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttributes {
    target_fd: u32,
    program_fd: u32,
    attach_type: u32,
    flags: u32,
}
