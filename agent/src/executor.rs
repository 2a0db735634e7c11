//! The last steps of a container process, run by libcontainer in place of its own executor.
//!
//! Here because three things matter to a caller that libcontainer's executor does not do: a command that is missing
//! or cannot be executed is told apart from every other failure and named as runc names it; the environment reaches
//! the workload as the spec has it, in order; and the seccomp filter is [the agent's](crate::seccomp), for execs too,
//! which libcontainer leaves without.

use std::cell::RefCell;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::capabilities::drop_privileges;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::{AccessFlags, Gid, Uid, access, execve, setgroups, setresgid, setresuid};
use oci_spec::runtime::{Hook, LinuxCapabilities, LinuxSeccomp, Process, Spec};

use crate::helper::{Record, Reporter};
use crate::hooks;
use crate::seccomp::Filter;

/// Where commands are looked for when the environment has no PATH, as other runtimes' images have it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs the workload of one process.
#[derive(Clone)]
pub struct Workload {
    /// Told when the command cannot be run.
    pub reporter: Reporter,
    /// The environment names no HOME: the container's /etc/passwd does.
    pub wants_home: bool,
    /// Filter of the container, and the capabilities to keep once it is loaded.
    pub seccomp: Option<Rc<Seccomp>>,
    /// Who it is to be, for an exec in a container with users of its own.
    pub users: Option<Rc<Users>>,
    /// What to run before the workload of an init.
    pub start_hooks: Option<Rc<StartHooks>>,
    /// Where an init finds what is the host's, which may have changed it since the container was made.
    pub of_the_host: Vec<PathBuf>,
    found: RefCell<Option<PathBuf>>,
}

/// Hooks of kind `startContainer`, and what their state says.
pub struct StartHooks {
    /// In their order.
    pub hooks: Vec<Hook>,
    /// The container's id.
    pub container_id: String,
    /// Its bundle in the guest.
    pub bundle: PathBuf,
}

/// Who a process is in a user namespace that it has yet to enter.
pub struct Users {
    /// The namespace.
    pub namespace: OwnedFd,
    /// User, as it is known there.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its other groups.
    pub groups: Vec<u32>,
    /// What is left to it, of everything that it may do there when it has entered.
    pub capabilities: LinuxCapabilities,
    /// It can gain no others.
    pub no_new_privileges: bool,
}

impl Users {
    fn enter(&self) -> nix::Result<()> {
        setns(&self.namespace, CloneFlags::CLONE_NEWUSER)?;
        let groups: Vec<_> = self.groups.iter().map(|group| Gid::from_raw(*group)).collect();
        let (user, group) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        setgroups(&groups)?;
        setresgid(group, group, group)?;
        setresuid(user, user, user)?;
        if self.no_new_privileges {
            prctl::set_no_new_privs()?;
        }
        Ok(())
    }
}

/// A seccomp filter that this executor must load.
pub struct Seccomp {
    /// The container's filter.
    pub filter: LinuxSeccomp,
    /// What the spec gives the process. Until the filter is loaded it also has CAP_SYS_ADMIN.
    pub capabilities: Option<LinuxCapabilities>,
}

impl Workload {
    /// A workload that reports to `reporter`.
    pub fn new(
        reporter: Reporter,
        wants_home: bool,
        seccomp: Option<Seccomp>,
        users: Option<Users>,
        start_hooks: Option<StartHooks>,
        of_the_host: Vec<PathBuf>,
    ) -> Self {
        Self {
            reporter,
            wants_home,
            seccomp: seccomp.map(Rc::new),
            users: users.map(Rc::new),
            start_hooks: start_hooks.map(Rc::new),
            of_the_host,
            found: RefCell::new(None),
        }
    }

    fn fail(&self, record: Record) -> ExecutorError {
        self.reporter.send(&record);
        ExecutorError::Other(format!("{record:?}"))
    }
}

impl Executor for Workload {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let refuse = |record: Record| {
            self.reporter.send(&record);
            ExecutorValidationError::ArgValidationError(format!("{record:?}"))
        };
        let process = spec.process().as_ref();
        let Some(command) = process.and_then(|p| p.args().as_ref()).and_then(|args| args.first()) else {
            return Err(refuse(Record::Failed("process.args must name a command".into())));
        };
        let path = process
            .and_then(|p| p.env().as_ref())
            .and_then(|env| env.iter().rev().find_map(|e| e.strip_prefix("PATH=")))
            .unwrap_or(DEFAULT_PATH);
        *self.found.borrow_mut() = Some(find(command, path).map_err(refuse)?);
        Ok(())
    }

    /// The agent's own environment is never used, so there is nothing to set.
    fn setup_envs(&self, _: std::collections::HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let found = self.found.borrow_mut().take().ok_or(ExecutorError::InvalidArg)?;
        let invalid =
            |_| self.fail(Record::Failed("process.args and process.env must not contain NUL".into()));
        let command = CString::new(found.as_os_str().as_bytes()).map_err(invalid)?;
        let args = strings(process.args().as_deref().unwrap_or_default()).map_err(invalid)?;
        let environment = self.environment(process);
        let env = strings(&environment).map_err(invalid)?;

        self.of_the_host.iter().for_each(|place| look_again(place));
        set_window_size(process);
        restore_signals();
        if let Some(users) = &self.users {
            let failed = |e: Errno| format!("becoming user {} of the container: {}", users.uid, e.desc());
            users.enter().map_err(|e| self.fail(Record::Failed(failed(e))))?;
        }
        if let Some(seccomp) = &self.seccomp {
            load_filter(seccomp).map_err(|e| self.fail(Record::Failed(e)))?;
        } else if let Some(users) = &self.users {
            keep(&users.capabilities).map_err(|e| self.fail(Record::Failed(e)))?;
        }
        if let Some(start) = &self.start_hooks {
            let state = hooks::state(spec, &start.container_id, &start.bundle);
            hooks::run(&start.hooks, &state, &environment).map_err(|e| self.fail(Record::Failed(e)))?;
        }
        let Err(errno) = execve(&command, &args, &env);
        let name = &args[0].to_string_lossy();
        Err(self.fail(match errno {
            // The file was there a moment ago: what is missing is its interpreter.
            Errno::ENOENT | Errno::ENOTDIR => Record::CommandNotFound(format!(
                "exec {name:?}: {}: its interpreter or loader is missing",
                errno.desc()
            )),
            Errno::EACCES | Errno::ENOEXEC | Errno::EPERM | Errno::ELIBBAD => {
                Record::CommandNotExecutable(format!("exec {name:?}: {}", errno.desc()))
            }
            errno => Record::Failed(format!("exec {name:?}: {}", errno.desc())),
        }))
    }
}

impl Workload {
    fn environment(&self, process: &Process) -> Vec<String> {
        let mut env = process.env().clone().unwrap_or_default();
        if self.wants_home {
            env.retain(|e| !e.starts_with("HOME="));
            let uid = self.users.as_ref().map_or(process.user().uid(), |users| users.uid);
            env.push(format!("HOME={}", home_of(uid)));
        }
        env
    }
}

fn strings(of: &[String]) -> Result<Vec<CString>, std::ffi::NulError> {
    of.iter().map(|s| CString::new(s.as_bytes())).collect()
}

/// Finds what `command` names, relative to the working directory if it has a slash, else in `path`.
fn find(command: &str, path: &str) -> Result<PathBuf, Record> {
    if command.contains('/') {
        return match executable(Path::new(command)) {
            Ok(()) => Ok(command.into()),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                Err(Record::CommandNotExecutable(format!("exec: {command:?}: permission denied")))
            }
            Err(_) => Err(Record::CommandNotFound(format!("exec: {command:?}: no such file or directory"))),
        };
    }
    let mut denied = false;
    // An empty name would find the directories of the path themselves.
    for dir in path.split(':').filter(|_| !command.is_empty()) {
        let candidate = Path::new(if dir.is_empty() { "." } else { dir }).join(command);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => denied = true,
            _ => {}
        }
    }
    Err(if denied {
        Record::CommandNotExecutable(format!("exec: {command:?}: permission denied"))
    } else {
        Record::CommandNotFound(format!("exec: {command:?}: executable file not found in $PATH"))
    })
}

fn executable(path: &Path) -> io::Result<()> {
    if fs::metadata(path)?.is_dir() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(access(path, AccessFlags::X_OK)?)
}

/// The home directory in the container's /etc/passwd. Read by hand: a C library's lookup would load the name
/// service modules that the container's image names.
fn home_of(uid: u32) -> String {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    home_in(&passwd, uid).unwrap_or("/").to_owned()
}

fn home_in(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        (fields.next()?.parse() == Ok(uid)).then(|| fields.nth(2)).flatten().filter(|home| !home.is_empty())
    })
}

/// Sets the size that the spec asks for, before the workload can look at it.
fn set_window_size(process: &Process) {
    let (Some(true), Some(size)) = (process.terminal(), process.console_size()) else { return };
    let size = libc::winsize {
        ws_row: size.height().try_into().unwrap_or(u16::MAX),
        ws_col: size.width().try_into().unwrap_or(u16::MAX),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads a winsize, which lives until the call returns. A stdin that is no terminal refuses.
    unsafe { libc::ioctl(0, libc::TIOCSWINSZ, &size) };
}

/// Has the guest's kernel ask the host for the size and times of a file, however short ago it was told: engines fill in files
/// like /etc/hosts between a container's creation and its start.
fn look_again(place: &Path) {
    let Ok(place) = CString::new(place.as_os_str().as_bytes()) else { return };
    let mut found = std::mem::MaybeUninit::<libc::statx>::uninit();
    let flags = libc::AT_STATX_FORCE_SYNC | libc::AT_NO_AUTOMOUNT;
    // SAFETY: statx(2) reads a string and writes a struct, which both live until it returns. What it finds is not looked
    // at, and a place that the workload cannot reach needs no look.
    unsafe {
        libc::statx(libc::AT_FDCWD, place.as_ptr(), flags, libc::STATX_BASIC_STATS, found.as_mut_ptr())
    };
}

/// Rust programs ignore SIGPIPE, and an ignored signal stays ignored across execve.
pub fn restore_signals() {
    // SAFETY: installs the default action, no handler of ours.
    let _ = unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) };
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

fn load_filter(seccomp: &Seccomp) -> Result<(), String> {
    Filter::of(&seccomp.filter)?.load().map_err(|e| format!("loading linux.seccomp: {}", e.desc()))?;
    seccomp.capabilities.as_ref().map_or(Ok(()), keep)
}

fn keep(capabilities: &LinuxCapabilities) -> Result<(), String> {
    drop_privileges(capabilities, create_syscall().as_ref())
        .map_err(|e| format!("setting process.capabilities: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_found_as_a_shell_finds_them() {
        assert_eq!(find("sh", "/nonexistent:/bin"), Ok("/bin/sh".into()));
        assert_eq!(find("/bin/sh", "/nonexistent"), Ok("/bin/sh".into()));
        assert!(matches!(find("no-such-command", "/bin:/usr/bin"), Err(Record::CommandNotFound(_))));
        assert!(matches!(find("", "/bin"), Err(Record::CommandNotFound(_))));
        assert!(matches!(find("/no/such/file", "/bin"), Err(Record::CommandNotFound(_))));
        assert!(matches!(find("/etc/passwd", "/bin"), Err(Record::CommandNotExecutable(_))));
        assert!(matches!(find("/etc", "/bin"), Err(Record::CommandNotExecutable(_))));
        assert!(matches!(find("passwd", "/etc"), Err(Record::CommandNotExecutable(_))));
    }

    #[test]
    fn home_comes_from_the_line_of_the_user() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/false\nnone:x:34:34:::\n";
        assert_eq!(home_in(passwd, 0), Some("/root"));
        assert_eq!(home_in(passwd, 33), Some("/var/www"));
        assert_eq!(home_in(passwd, 34), None);
        assert_eq!(home_in(passwd, 35), None);
    }
}
