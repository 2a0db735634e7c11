//! One socket that accepts the TCP connections to every port of a network namespace, which are made in it: whatever comes
//! over its interfaces goes to the VM before anything here sees it.
//!
//! Who forwards a port of a sandbox enters its namespace on the host and dials there, where nobody listens: the
//! workload is in the VM. A program for socket lookups (Documentation/bpf/prog_sk_lookup.rst, Linux 5.9) gives all
//! of these connections to one listener, whose accepted sockets still know what was dialled. It ends with the
//! descriptors that hold it.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

/// Helpers (bpf-helpers(7)).
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// A program's verdict: go on with the socket that was assigned, or with the usual lookup.
const SK_PASS: i32 = 1;

/// Offsets in `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;

/// Accepts for all ports as long as it lives.
pub struct AllPorts {
    /// Listens, in the namespace that this process was in when it was made.
    pub listener: TcpListener,
    _link: OwnedFd,
}

impl AllPorts {
    /// Begins to accept in the network namespace that this process is in.
    pub fn listen() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let sockets = make_map()?;
        put(&sockets, &listener)?;
        let program = load(&program(sockets.as_raw_fd()))?;
        let namespace = File::open("/proc/thread-self/ns/net")?;
        Ok(Self { listener, _link: attach(&program, &namespace)? })
    }
}

/// `struct bpf_insn` (Documentation/bpf/standardization/instruction-set.rst).
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    /// Source in the upper four bits, destination in the lower.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: source << 4 | destination, offset, immediate }
}

/// Assigns the map's socket to TCP connections of IPv4.
fn program(sockets: i32) -> [Instruction; 21] {
    // Codes: a load of four bytes, a move, jumps, a store, a call.
    const LOAD: u8 = 0x61;
    const MOVE: u8 = 0xbf;
    const SET: u8 = 0xb7;
    const UNLESS: u8 = 0x55;
    const IF: u8 = 0x15;
    const CALL: u8 = 0x85;
    /// `BPF_PSEUDO_MAP_FD`: the number is a map's descriptor.
    const MAP: u8 = 1;
    // How far it is from an instruction to the last two.
    let out = |at: i16| 19 - at - 1;
    [
        op(MOVE, 6, 1, 0, 0),
        op(LOAD, 2, 1, FAMILY, 0),
        op(UNLESS, 2, 0, out(2), libc::AF_INET),
        op(LOAD, 2, 1, PROTOCOL, 0),
        op(UNLESS, 2, 0, out(4), libc::IPPROTO_TCP),
        // The key, 0, on the stack.
        op(0x62, 10, 0, -4, 0),
        op(MOVE, 2, 10, 0, 0),
        op(0x07, 2, 0, 0, -4),
        op(0x18, 1, MAP, 0, sockets),
        op(0, 0, 0, 0, 0),
        op(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        op(IF, 0, 0, out(11), 0),
        op(MOVE, 7, 0, 0, 0),
        op(MOVE, 1, 6, 0, 0),
        op(MOVE, 2, 7, 0, 0),
        op(SET, 3, 0, 0, 0),
        op(CALL, 0, 0, 0, SK_ASSIGN),
        op(MOVE, 1, 7, 0, 0),
        op(CALL, 0, 0, 0, SK_RELEASE),
        op(SET, 0, 0, 0, SK_PASS),
        op(0x95, 0, 0, 0, 0),
    ]
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    /// The beginning of `union bpf_attr` for BPF_PROG_LOAD, up to `expected_attach_type`.
    #[repr(C)]
    #[derive(Default)]
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
        program_type: BPF_PROG_TYPE_SK_LOOKUP,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        attach_type: BPF_SK_LOOKUP,
        ..Default::default()
    };
    bpf_fd(BPF_PROG_LOAD, &attributes)
}

fn make_map() -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    let attributes =
        Attributes { map_type: BPF_MAP_TYPE_SOCKMAP, key_size: 4, value_size: 8, max_entries: 1 };
    bpf_fd(BPF_MAP_CREATE, &attributes)
}

fn put(map: &OwnedFd, socket: &TcpListener) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        map: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let (key, value) = (0u32, socket.as_raw_fd() as u64);
    let attributes = Attributes {
        map: map.as_raw_fd() as u32,
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &attributes).map(drop)
}

fn attach(program: &OwnedFd, namespace: &File) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    let attributes = Attributes {
        program: program.as_raw_fd() as u32,
        target: namespace.as_raw_fd() as u32,
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    bpf_fd(BPF_LINK_CREATE, &attributes)
}

/// bpf(2). `A` is the beginning of `union bpf_attr` for the command; what it points to must live.
fn bpf<A>(command: libc::c_int, attributes: &A) -> io::Result<i32> {
    loop {
        // SAFETY: the kernel reads the attributes and what they point to, all of which outlive the call.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<A>()) };
        if result >= 0 {
            return Ok(result as i32);
        }
        // The verifier gives up when a signal is pending.
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
