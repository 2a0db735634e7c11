//! The receiver of terminals that runc's suite uses: the listening end of `--console-socket`.
//!
//! In mode `null` any number of terminals is taken and what they say is thrown away; in mode `single` one is taken and
//! joined to this process's own standard streams. A terminal stays open until its other side is closed.

use super::Context;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::termios::{OutputFlags, SetArg, tcgetattr, tcsetattr};
use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

/// The program's name.
pub const NAME: &str = "recvtty";

/// Takes `[--pid-file FILE] [--mode null|single] [--no-stdin] SOCKET`.
pub fn main(mut words: impl Iterator<Item = String>) -> Result<(), String> {
    // Who started it waits for the end of what is inherited here.
    // SAFETY: nothing in this process owns a descriptor from 3 on: it has just been started.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    let (mut socket, mut mode, mut pid_file, mut input) = (None, "single".to_string(), None, true);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--pid-file" => pid_file = words.next(),
            "--mode" => mode = words.next().unwrap_or_default(),
            "--no-stdin" => input = false,
            _ => socket = Some(word),
        }
    }
    let socket = socket.ok_or("recvtty [--pid-file FILE] [--mode null|single] [--no-stdin] SOCKET")?;
    if let Some(path) = pid_file {
        std::fs::write(&path, std::process::id().to_string()).or_say(path)?;
    }
    let listener = UnixListener::bind(&socket).or_say(socket)?;
    match mode.as_str() {
        "null" => loop {
            let (connection, _) = listener.accept().or_say("accept")?;
            thread::spawn(move || receive(&connection).map(|terminal| drain(terminal, &mut io::sink())));
        },
        "single" => {
            let (connection, _) = listener.accept().or_say("accept")?;
            drop(listener);
            let terminal = receive(&connection)?;
            if input {
                let mut keyboard = terminal.try_clone().or_say("use the terminal")?;
                thread::spawn(move || io::copy(&mut io::stdin(), &mut keyboard));
            }
            drain(terminal, &mut io::stdout());
            Ok(())
        }
        _ => Err(format!("--mode {mode}: neither null nor single")),
    }
}

/// The master side of a terminal, with line ends as the program on the other side writes them.
fn receive(connection: &UnixStream) -> Result<File, String> {
    let mut name = [0; 4096];
    let mut control = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut name)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(connection.as_raw_fd(), &mut parts, Some(&mut control), flags)
        .or_say("receive a terminal")?;
    let mut fds = message.cmsgs().or_say("receive a terminal")?.flat_map(|message| match message {
        ControlMessageOwned::ScmRights(fds) => fds,
        _ => Vec::new(),
    });
    let fd = fds.next().ok_or("no terminal came over the socket")?;
    // SAFETY: the kernel has just installed this descriptor for us.
    let terminal = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let mut settings = tcgetattr(&terminal).or_say("read the terminal's settings")?;
    settings.output_flags.remove(OutputFlags::ONLCR);
    tcsetattr(&terminal, SetArg::TCSANOW, &settings).or_say("change the terminal's settings")?;
    Ok(terminal)
}

/// Until the last user of the other side is gone, which reads as an error on a terminal.
fn drain(mut terminal: File, to: &mut impl Write) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = terminal.read(&mut buffer) {
        let _ = to.write_all(buffer.get(..count).unwrap_or_default()).and_then(|()| to.flush());
    }
}
