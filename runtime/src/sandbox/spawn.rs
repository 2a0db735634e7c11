//! Starting the VMM process in namespaces of its own.
//!
//! All of them are made with the process, because two can only be entered that way: it is process 1 of its pid
//! namespace, and it runs in a user namespace from its first instruction, so that none of its capabilities has ever
//! counted on the host. User and group ids are mapped to themselves, because the file server acts on files of any
//! owner. `stockade_vmm`'s jail closes the rest from inside.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};

use super::oom_score;

/// What the process has of its own. A mount namespace too: it leaves the host's root behind in there.
const NAMESPACES: libc::c_int = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS;

/// linux/sched.h: more than 32 bits, which the constant of libc has not.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// A child that is known by its number until it has been waited for.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    status: Option<ExitStatus>,
}

impl Child {
    /// Its process id in this process's namespace.
    pub fn id(&self) -> i32 {
        self.pid.as_raw()
    }

    /// One that has just been forked.
    pub fn of(pid: Pid) -> Self {
        Child { pid, status: None }
    }

    /// Kills it, unless it has been waited for.
    pub fn kill(&self) {
        if self.status.is_none() {
            // The number is its own until it is waited for.
            let _ = kill(self.pid, Signal::SIGKILL);
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        let mut raw = 0;
        loop {
            // SAFETY: waitpid(2) writes an int, which lives until it returns.
            let result = unsafe { libc::waitpid(self.pid.as_raw(), &mut raw, 0) };
            if result == self.pid.as_raw() {
                return Ok(*self.status.insert(ExitStatus::from_raw(raw)));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// Starts this binary again with `arguments` and an empty environment, `stdin` and `stderr` as its streams, in a
/// process group and in namespaces of its own, and in a cgroup if there is one for it.
pub fn spawn(
    arguments: &[&CStr],
    stdin: OwnedFd,
    stderr: OwnedFd,
    cgroup: Option<BorrowedFd>,
) -> io::Result<Child> {
    let (gate_end, gate) = pipe2(OFlag::O_CLOEXEC)?;
    let (failure, failure_end) = pipe2(OFlag::O_CLOEXEC)?;
    let stdout = File::options().write(true).open("/dev/null").map_err(|e| {
        let why = format!("it cannot have /dev/null: {e}: does its cgroup deny it devices?");
        io::Error::new(e.kind(), why)
    })?;
    let mut argv: Vec<_> = arguments.iter().map(|word| word.as_ptr()).collect();
    argv.push(std::ptr::null());
    let program = Program {
        argv: argv.as_ptr(),
        streams: [stdin.as_raw_fd(), stdout.as_raw_fd(), stderr.as_raw_fd()],
        gate: gate_end.as_raw_fd(),
        gate_writer: gate.as_raw_fd(),
        failure: failure_end.as_raw_fd(),
    };
    let mut child = match clone_into(NAMESPACES, cgroup)? {
        // SAFETY: this is the child, and all that `program` points to was copied with it.
        None => unsafe { program.run() },
        Some(pid) => Child::of(pid),
    };
    drop((gate_end, failure_end, stdin, stdout, stderr));
    let started = prepare(&child, gate).and_then(|()| {
        let mut errno = [0; 4];
        match File::from(failure).read_exact(&mut errno) {
            Ok(()) => Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
            // Closed by execve.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
            Err(e) => Err(e),
        }
    });
    match started {
        Ok(()) => Ok(child),
        Err(error) => {
            child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

/// What must be done before the program runs: with ids that nobody has mapped it would lose its capabilities, and
/// in its namespace it could not raise a limit.
fn prepare(child: &Child, gate: OwnedFd) -> io::Result<()> {
    for map in ["uid_map", "gid_map"] {
        let ours = fs::read_to_string(format!("/proc/self/{map}"))?;
        fs::write(format!("/proc/{}/{map}", child.id()), onto_itself(&ours))?;
    }
    let descriptors = stockade_vmm::DESCRIPTORS;
    let limit = libc::rlimit { rlim_cur: descriptors, rlim_max: descriptors };
    // SAFETY: prlimit(2) reads a struct that lives until it returns. Where it is not allowed, the limit stays as it is.
    unsafe { libc::prlimit(child.id(), libc::RLIMIT_NOFILE, &limit, std::ptr::null_mut()) };
    oom_score::begin(child.id())?;
    File::from(gate).write_all(&[1])
}

/// A map of ids (user_namespaces(7)) that gives each id that there is in this namespace to itself.
fn onto_itself(map: &str) -> String {
    let lines = map.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (inside, _, count) = (fields.next()?, fields.next()?, fields.next()?);
        Some(format!("{inside} {inside} {count}\n"))
    });
    lines.collect()
}

/// fork(2) into new namespaces, and into a cgroup (Linux 5.7): moving there later would wait for the whole machine.
/// `None` in the child, which must make async-signal-safe calls only.
pub fn clone_into(namespaces: libc::c_int, cgroup: Option<BorrowedFd>) -> io::Result<Option<Pid>> {
    // SAFETY: zero is a value of all its numbers.
    let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
    how.flags = namespaces as u64;
    how.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        how.flags |= CLONE_INTO_CGROUP;
        how.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: clone3(2) without CLONE_VM and with no stack is fork(2): the child goes on with a copy of this one's
    // memory. What it does then is up to who asked for it.
    match unsafe { libc::syscall(libc::SYS_clone3, &how, size_of_val(&how)) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => Ok(Some(Pid::from_raw(pid as i32))),
    }
}

/// What the child needs, all of it made before: it must not allocate.
struct Program {
    argv: *const *const libc::c_char,
    streams: [RawFd; 3],
    gate: RawFd,
    gate_writer: RawFd,
    failure: RawFd,
}

impl Program {
    /// Becomes the program, once the gate is open.
    ///
    /// # Safety
    /// Only in a child that has just been forked, which owns everything that is named here.
    unsafe fn run(&self) -> ! {
        // SAFETY: system calls on descriptors and memory of this process; nothing here returns into code that
        // could expect them as they were.
        unsafe {
            libc::setpgid(0, 0);
            // The signals that the supervisor reads from a descriptor are nobody else's business.
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
            // Else the end of the parent would not show at the gate.
            libc::close(self.gate_writer);
            let mut byte = 0u8;
            if libc::read(self.gate, (&raw mut byte).cast(), 1) != 1 {
                libc::_exit(1);
            }
            // Above 2, all of them, since the standard streams of this process are open (std sees to it).
            for (to, from) in (0..).zip(self.streams) {
                libc::dup2(from, to);
            }
            let environment = [std::ptr::null()];
            libc::execve(c"/proc/self/exe".as_ptr(), self.argv, environment.as_ptr());
            let errno = Errno::last_raw().to_ne_bytes();
            libc::write(self.failure, errno.as_ptr().cast(), errno.len());
            libc::_exit(1)
        }
    }
}
