//! Leaving a process behind that outlives this command.
//!
//! It is forked, not started anew: all that was read and checked is there, and it is a descendant of its caller, as
//! conmon and other subreapers want it. It leads a session, so that its process group is its own and dies as a
//! whole. This command waits until it says that it is ready or why it is not.

use std::fs::File;
use std::io::{self, Read, Write};

use nix::fcntl::OFlag;
use nix::unistd::{ForkResult, fork, pipe2, setsid};

use super::Error;
use super::agent::Exit;
use super::signals::end_like;

/// First byte of a good word.
const READY: u8 = b'+';
/// Exit code of a supervisor whose container's end is not known, as containerd has it.
const UNKNOWN_EXIT: u8 = 255;

/// Says once that all is well.
pub type Ready = Box<dyn FnOnce() -> Result<(), Error>>;

/// Forks a process that does `work` and ends as that does. Returns its pid once it is ready.
///
/// This process must have one thread.
pub fn leave_behind(work: impl FnOnce(Ready) -> Result<Exit, Error>) -> Result<i32, Error> {
    let os = |e: nix::Error| Error::Os("fork the supervisor", e.into());
    let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(os)?;
    // SAFETY: this process has one thread, so the child may do all that the parent may.
    match unsafe { fork() }.map_err(os)? {
        ForkResult::Parent { child } => {
            drop(write);
            wait_for_word(File::from(read)).map(|()| child.as_raw())
        }
        ForkResult::Child => {
            drop(read);
            let _ = setsid();
            let word = File::from(write);
            let failure = match word.try_clone() {
                Ok(failure) => failure,
                Err(_) => std::process::exit(UNKNOWN_EXIT.into()),
            };
            // The pipe ends with the first word: both descriptors must go then.
            let failure = std::rc::Rc::new(std::cell::RefCell::new(Some(failure)));
            let on_ready = failure.clone();
            let ready = Box::new(move || {
                on_ready.take();
                // A caller that is gone does not undo what it asked for.
                let _ = (&word).write_all(&[READY]);
                Ok(())
            });
            match work(ready) {
                Ok(exit) => end_like(exit.code, exit.signal),
                Err(e) => {
                    tracing::error!("{e}");
                    if let Some(mut failure) = failure.take() {
                        let _ = failure.write_all(describe(&e).as_bytes());
                    }
                    std::process::exit(UNKNOWN_EXIT.into())
                }
            }
        }
    }
}

/// The error, and below it the console's lines.
fn describe(error: &Error) -> String {
    let mut text = error.to_string().replace('\n', " ");
    for line in error.console() {
        text.push('\n');
        text.push_str(line);
    }
    text
}

fn wait_for_word(mut pipe: File) -> Result<(), Error> {
    let mut word = Vec::new();
    match pipe.read_to_end(&mut word) {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
        Err(e) => return Err(Error::Os("hear from the supervisor", e)),
    }
    match word.split_first() {
        None => Err(Error::SupervisorGone),
        Some((&READY, _)) => Ok(()),
        Some(_) => {
            let text = String::from_utf8_lossy(&word);
            let mut lines = text.lines().map(str::to_owned);
            let message = lines.next().unwrap_or_default();
            Err(Error::Supervisor { message, console: lines.collect() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: u8, signal: i32) -> Exit {
        Exit { code, signal, oom_killed: false }
    }

    /// The test harness has threads, but its children here only use what survives a fork.
    fn outcome(work: impl FnOnce(Ready) -> Result<Exit, Error>) -> nix::sys::wait::WaitStatus {
        let pid = leave_behind(work).unwrap();
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None).unwrap()
    }

    #[test]
    fn a_process_left_behind_ends_as_its_workload_does() {
        use nix::sys::wait::WaitStatus;
        let ended = outcome(|ready| ready().map(|()| exit(42, 0)));
        assert!(matches!(ended, WaitStatus::Exited(_, 42)));
        let ended = outcome(|ready| ready().map(|()| exit(137, 9)));
        assert!(matches!(ended, WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGKILL, _)));
        let ended = outcome(|ready| ready().and(Err(Error::SupervisorGone)));
        assert!(matches!(ended, WaitStatus::Exited(_, 255)));
    }

    #[test]
    fn an_error_before_ready_is_the_callers() {
        let console = vec!["line 1".to_owned(), "line 2".to_owned()];
        let lines = console.clone();
        let work = |_: Ready| Err(Error::VmEnded { what: "no VM".into(), console: lines });
        let error = leave_behind(work).unwrap_err();
        assert_eq!(error.to_string(), "no VM");
        assert_eq!(error.console(), console);
        let silent = leave_behind(|_| std::process::exit(0)).unwrap_err();
        assert!(matches!(silent, Error::SupervisorGone));
    }
}
