//! A thread taken over, as an attacker has it who runs code in its process: system calls are made in its name.
//!
//! By ptrace(2) from outside, where no filter or namespace of the thread's counts, so that nothing in the product has
//! to lend a hand: the thread is stopped where it makes a system call, and makes another one instead.

use std::fs;
use std::io::IoSlice;

use libc::user_regs_struct;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// The thread. What it would have done is lost: its process is of no use any more.
pub struct Hijacked {
    thread: Pid,
    /// Where it stands, at the beginning of a system call.
    registers: user_regs_struct,
}

impl Hijacked {
    /// Takes over the thread of this name. It must be one that makes system calls, or waits in one.
    #[track_caller]
    pub fn thread(process: i32, name: &str) -> Self {
        let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("list the threads").flatten();
        let named = |task: &fs::DirEntry| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
        };
        let task = tasks.into_iter().find(named).unwrap_or_else(|| panic!("no thread {name}"));
        let thread = Pid::from_raw(task.file_name().to_string_lossy().parse().expect("a number"));
        ptrace::attach(thread).expect("attach to the thread");
        assert!(matches!(wait(thread), WaitStatus::Stopped(_, Signal::SIGSTOP)));
        ptrace::setoptions(thread, ptrace::Options::PTRACE_O_TRACESYSGOOD).expect("set options");
        // A signal ends the call it was in, so this is the beginning of one.
        // SAFETY: all zeroes are values of these numbers; they are replaced below.
        let mut this = Self { thread, registers: unsafe { std::mem::zeroed() } };
        assert_eq!(this.go_on(), Ok(()));
        this.registers = ptrace::getregs(thread).expect("read registers");
        this
    }

    /// Puts a text, ended by a zero, into its memory until the next one; returns the address.
    pub fn text(&mut self, text: &str) -> u64 {
        let bytes = [text.as_bytes(), &[0]].concat();
        // On its stack, below what is in use.
        let address = self.registers.rsp - 1024;
        let remote = RemoteIoVec { base: address as usize, len: bytes.len() };
        let written = process_vm_writev(self.thread, &[IoSlice::new(&bytes)], &[remote]);
        assert_eq!(written, Ok(bytes.len()));
        address
    }

    /// Has it make a system call: what that returned, or the signal that the process died of.
    pub fn call(&mut self, number: i64, arguments: [u64; 4]) -> Result<i64, i32> {
        let mut registers = self.registers;
        registers.orig_rax = number as u64;
        [registers.rdi, registers.rsi, registers.rdx, registers.r10] = arguments;
        ptrace::setregs(self.thread, registers).expect("set registers");
        self.go_on()?;
        let mut registers = ptrace::getregs(self.thread).expect("read registers");
        let result = registers.rax as i64;
        // Once more to the instruction that begins a call.
        registers.rip -= 2;
        registers.rax = self.registers.orig_rax;
        ptrace::setregs(self.thread, registers).expect("set registers");
        // Where the thread dies that was refused a call.
        self.go_on()?;
        Ok(result)
    }

    /// To the next beginning or end of a system call.
    fn go_on(&self) -> Result<(), i32> {
        ptrace::syscall(self.thread, None).expect("go on");
        match wait(self.thread) {
            WaitStatus::PtraceSyscall(_) => Ok(()),
            WaitStatus::Signaled(_, signal, _) => Err(signal as i32),
            other => panic!("{other:?} instead of a system call"),
        }
    }
}

impl Drop for Hijacked {
    fn drop(&mut self) {
        let _ = ptrace::detach(self.thread, Signal::SIGKILL);
    }
}

fn wait(thread: Pid) -> WaitStatus {
    waitpid(thread, Some(WaitPidFlag::__WALL)).expect("wait for the thread")
}
