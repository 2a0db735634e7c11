//! The agent's programs for the kernel's BPF machine: the instructions that they are made of, and how one comes to a
//! cgroup. Registers are used as 32-bit words.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use stockade_sys::bpf;
pub use stockade_sys::bpf::Instruction;

/// to = 32-bit word at the context (r1) + offset.
pub const fn load_word(to: u8, offset: i16) -> Instruction {
    Instruction::new(0x61, to, 1, offset, 0)
}

/// 32-bit word at the context (r1) + offset = from.
pub const fn store_word(offset: i16, from: u8) -> Instruction {
    Instruction::new(0x63, 1, from, offset, 0)
}

/// to = from.
pub const fn mov_reg(to: u8, from: u8) -> Instruction {
    Instruction::new(0xbc, to, from, 0, 0)
}

/// to = value.
pub const fn mov_imm(to: u8, value: u32) -> Instruction {
    Instruction::new(0xb4, to, 0, 0, value as i32)
}

/// to &= value.
pub const fn and_imm(to: u8, value: u32) -> Instruction {
    Instruction::new(0x54, to, 0, 0, value as i32)
}

/// to >>= by.
pub const fn shift_right(to: u8, by: u32) -> Instruction {
    Instruction::new(0x74, to, 0, 0, by as i32)
}

/// Leaves out the next `by` instructions if the register has this value.
pub const fn jump_if_equal(register: u8, value: u32, by: i16) -> Instruction {
    Instruction::new(0x16, register, 0, by, value as i32)
}

/// The same if it has another.
pub const fn jump_if_not_equal(register: u8, value: u32, by: i16) -> Instruction {
    Instruction::new(0x56, register, 0, by, value as i32)
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
        let (program_type, attach_type, flags) = self.numbers();
        let program = bpf::load(program_type, attach_type, program)?;
        bpf::attach(program.as_fd(), cgroup.as_fd(), attach_type, flags)
    }
}

const BPF_F_ALLOW_MULTI: u32 = 2;
