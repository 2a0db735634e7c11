//! The host process of an exec, of a container in another's VM, or of a program that is let into the guest: carries its
//! streams, passes signals and window sizes on, and learns how it ended.
//!
//! It holds no sandbox logic: the supervisor asks the agent, and gives this process the guest's streams. When this
//! process dies, the supervisor kills the one it stands for.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::sys::signal::Signal;
use tokio::task::LocalSet;

use super::Error;
use super::agent::Exit;
use super::control::{self, Conversation, Reply, Request};
use super::signals::Signals;
use super::stdio::{HostStdio, release_inherited};

/// What is to be run in a container.
pub struct Exec<'a> {
    /// A process object in JSON.
    pub process: Vec<u8>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Where the terminal's other end goes, if not to this process's own.
    pub console_socket: Option<&'a Path>,
    /// Whether nobody waits for this process's own streams.
    pub detach: bool,
    /// Run it even though the container is frozen.
    pub ignore_paused: bool,
    /// Cgroup to run it in, relative to the container's; empty for what fits.
    pub cgroup: String,
}

/// Where the streams of a process lead on the host.
pub struct Ends<'a> {
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Where the terminal's other end goes, if not to this process's own.
    pub console_socket: Option<&'a Path>,
    /// Rows and columns of a new terminal.
    pub size: Option<(u16, u16)>,
    /// Whether nobody waits for this process's own streams.
    pub detach: bool,
}

/// Runs a process in a container. `ready` is called once it runs.
pub fn exec(
    talk: Conversation,
    exec: Exec,
    ready: impl FnOnce() -> Result<(), Error>,
) -> Result<Exit, Error> {
    let Exec { process, terminal, console_socket, detach, ignore_paused, cgroup } = exec;
    let process = control::attachment(&process).map_err(|e| Error::Os("send the process", e))?;
    let pid = std::process::id() as i32;
    let ends = Ends { terminal, console_socket, size: None, detach };
    let request = |stdio| Request::Exec { pid, stdio, ignore_paused, cgroup };
    stand_for(talk, ends, request, vec![process], ready)
}

/// Runs a program in a sandbox's guest, outside of its containers: `message` is an `EnterRequest`.
pub fn enter(talk: Conversation, message: &[u8], terminal: bool) -> Result<Exit, Error> {
    let message = control::attachment(message).map_err(|e| Error::Os("send the program", e))?;
    let ends = Ends { terminal, console_socket: None, size: None, detach: false };
    stand_for(talk, ends, |stdio| Request::Enter { stdio }, vec![message], || Ok(()))
}

/// Is the process of the host for one of the guest, which the supervisor makes on this request with these descriptors.
/// `ready` is called once there is one.
pub fn stand_for(
    talk: Conversation,
    ends: Ends,
    request: impl FnOnce([bool; 3]) -> Request,
    fds: Vec<OwnedFd>,
    ready: impl FnOnce() -> Result<(), Error>,
) -> Result<Exit, Error> {
    let os = |what| move |e: io::Error| Error::Os(what, e);
    let signals = Signals::block().map_err(os("block signals"))?;
    let mut stdio = match (ends.terminal, ends.console_socket) {
        (false, _) => HostStdio::inherited().map_err(os("use the standard streams"))?,
        (true, None) => HostStdio::own_terminal()?,
        (true, Some(socket)) => HostStdio::console_socket(socket, ends.size)?,
    };
    if ends.detach {
        release_inherited().map_err(os("let go of the standard streams"))?;
    }
    let wanted = stdio.wanted();
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    talk.send(&request(wanted), &borrowed).map_err(os("talk to the supervisor"))?;
    drop(borrowed);
    drop(fds);
    let streams = match talk.recv().map_err(os("talk to the supervisor"))? {
        Some((Reply::Started, fds)) => place(wanted, fds),
        Some((Reply::Failed { message }, _)) => {
            return Err(Error::Supervisor { message, console: Vec::new() });
        }
        _ => return Err(Error::SupervisorGone),
    };
    ready()?;
    give_back();

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(os("set up the event loop"))?;
    let exit = LocalSet::new().block_on(&runtime, async {
        let relays = stdio.relay(streams, || ()).map_err(os("relay the standard streams"))?;
        let talk = talk.into_async().map_err(os("talk to the supervisor"))?;
        let resize = || {
            if let Some((rows, columns)) = stdio.terminal_size() {
                let _ = talk.send(&Request::Resize { rows, columns }, &[]);
            }
        };
        resize();
        let pass_on = signals.each(async |signal| match signal {
            Signal::SIGWINCH => resize(),
            other => {
                let _ = talk.send(&Request::Signal { signal: other as i32 }, &[]);
            }
        });
        let exit = tokio::select! {
            reply = talk.recv::<Reply>() => match reply.map_err(os("talk to the supervisor"))? {
                Some((Reply::Exited { code, signal }, _)) => Exit { code, signal, oom_killed: false },
                Some((Reply::Failed { message }, _)) => {
                    return Err(Error::Supervisor { message, console: Vec::new() });
                }
                _ => return Err(Error::SupervisorGone),
            },
            Err(e) = pass_on => return Err(Error::Os("read signals", e)),
        };
        relays.drain().await;
        Ok(exit)
    });
    stdio.restore();
    exit
}

/// Gives back what only the start took, of the heap and of the stack: this process may wait for days, one an exec.
fn give_back() {
    const PAGE: usize = 4096;
    // What the kernel keeps free below a stack (its stack_guard_gap).
    const DEPTH: usize = 256 * PAGE;
    let here = 0_u8;
    let end = ((&raw const here).addr() - PAGE) & !(PAGE - 1);
    // SAFETY: what lies below this frame by more than a page is in use by nobody, and is stack or not mapped at all.
    unsafe {
        libc::malloc_trim(0);
        libc::madvise((end - DEPTH) as *mut libc::c_void, DEPTH, libc::MADV_DONTNEED);
    }
}

/// The streams come in order, without gaps for those that were not wanted.
fn place(wanted: [bool; 3], fds: Vec<OwnedFd>) -> [Option<OwnedFd>; 3] {
    let mut fds = fds.into_iter();
    wanted.map(|wanted| if wanted { fds.next() } else { None })
}

/// Whether a combination of flags about terminals makes sense, in the words that callers of runc know.
pub fn check_terminal(terminal: bool, detach: bool, socket: Option<&Path>) -> Result<(), &'static str> {
    match (terminal, detach, socket) {
        (true, true, None) => {
            Err("cannot allocate tty if stockade will detach without setting console socket")
        }
        (false, _, Some(_)) | (_, false, Some(_)) => {
            Err("cannot use console socket if stockade will not detach or allocate tty")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_placed_by_what_was_wanted() {
        let fds = || vec![io::stdin().as_fd().try_clone_to_owned().unwrap()];
        let placed = place([false, true, true], fds());
        assert!(placed[0].is_none() && placed[1].is_some() && placed[2].is_none());
    }

    #[test]
    fn a_console_socket_needs_a_terminal_and_a_detached_process() {
        let socket = Some(Path::new("/s"));
        check_terminal(true, true, socket).unwrap();
        check_terminal(true, false, None).unwrap();
        check_terminal(false, true, None).unwrap();
        check_terminal(true, true, None).unwrap_err();
        check_terminal(true, false, socket).unwrap_err();
        check_terminal(false, true, socket).unwrap_err();
    }
}
