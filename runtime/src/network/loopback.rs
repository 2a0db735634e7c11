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
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use stockade_sys::bpf::{self, Instruction};

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
        let sockets = bpf::map_of(listener.as_fd())?;
        let program = bpf::load(BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP, &program(sockets.as_raw_fd()))?;
        let namespace = File::open("/proc/thread-self/ns/net")?;
        Ok(Self { listener, _link: bpf::link(program.as_fd(), namespace.as_fd(), BPF_SK_LOOKUP)? })
    }
}

/// Assigns the map's socket to TCP connections of IPv4.
fn program(sockets: i32) -> [Instruction; 21] {
    let op = Instruction::new;
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
        Instruction::exit(),
    ]
}
