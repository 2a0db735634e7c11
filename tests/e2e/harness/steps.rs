//! A program that is killed at a step of its own: before a system call that a case chooses, so that a kill falls between
//! two of them by design and not by luck.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// A system call that is about to be made.
pub struct SystemCall {
    process: Pid,
    /// Its number.
    pub number: i64,
    /// Its first four arguments.
    pub arguments: [u64; 4],
}

impl SystemCall {
    /// Bytes of the caller's memory.
    #[track_caller]
    pub fn memory(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let remote = RemoteIoVec { base: address as usize, len: length };
        let read = process_vm_readv(self.process, &mut [std::io::IoSliceMut::new(&mut bytes)], &[remote]);
        assert_eq!(read, Ok(length), "read the caller's memory");
        bytes
    }
}

/// Runs a program, whose processes other than the first are left alone, and kills it before it makes the system call that
/// comes after `steps` others that are chosen. False if it ended before by itself, as it must then: well.
#[track_caller]
#[expect(clippy::zombie_processes, reason = "it is waited for by its number")]
pub fn kill_before(mut command: Command, steps: usize, chosen: impl Fn(&SystemCall) -> bool) -> bool {
    // SAFETY: ptrace(2) is a system call of its own and allocates nothing.
    unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
    let child = command.stdin(std::process::Stdio::null()).spawn().expect("start the program");
    let process = Pid::from_raw(child.id() as i32);
    assert!(matches!(waitpid(process, None), Ok(WaitStatus::Stopped(_, Signal::SIGTRAP))));
    ptrace::setoptions(process, ptrace::Options::PTRACE_O_TRACESYSGOOD).expect("set options");
    let (mut seen, mut entering, mut signal) = (0, true, None);
    loop {
        ptrace::syscall(process, signal.take()).expect("go on");
        match waitpid(process, None).expect("wait for the program") {
            WaitStatus::PtraceSyscall(_) if entering => {
                entering = false;
                let registers = ptrace::getregs(process).expect("read registers");
                let call = SystemCall {
                    process,
                    number: registers.orig_rax as i64,
                    arguments: [registers.rdi, registers.rsi, registers.rdx, registers.r10],
                };
                if !chosen(&call) {
                    continue;
                }
                if seen == steps {
                    kill(process, Signal::SIGKILL).expect("kill the program");
                    assert!(matches!(waitpid(process, None), Ok(WaitStatus::Signaled(..))));
                    return true;
                }
                seen += 1;
            }
            WaitStatus::PtraceSyscall(_) => entering = true,
            WaitStatus::Stopped(_, received) => signal = Some(received),
            WaitStatus::Exited(_, code) => {
                assert_eq!(code, 0, "the program failed");
                return false;
            }
            other => panic!("the program ended: {other:?}"),
        }
    }
}
