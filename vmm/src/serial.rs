//! The serial console: a 16550 at the usual port, output only.
//!
//! It carries what the kernel has to say in an emergency, and a boot log when someone asks for one. Its other
//! end is a descriptor that is written to and never waited for: when nobody reads, output is dropped, because a
//! guest's chatter must never hold up a vCPU. The kernel polls this port, so there is no interrupt.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

/// First port; there are eight.
pub const PORT: u16 = 0x3f8;

/// Number of ports.
pub const PORTS: u16 = 8;

/// Bytes that are collected before they are written, unless a line ends before.
const LINE: usize = 256;

/// The emulated UART.
pub struct Console(Serial<NoInterrupt, NoEvents, Line>);

impl Console {
    /// A console that writes to `output`, which is made non-blocking.
    pub fn new(output: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&output, FcntlArg::F_GETFL)?);
        fcntl(&output, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let line = Line { output: File::from(output), bytes: Vec::with_capacity(LINE) };
        Ok(Console(Serial::new(NoInterrupt, line)))
    }

    /// The guest reads a register (0 to 7).
    pub fn read(&mut self, register: u8) -> u8 {
        self.0.read(register)
    }

    /// The guest writes a register (0 to 7).
    pub fn write(&mut self, register: u8, value: u8) {
        // Can only fail by the output or the interrupt, and neither does.
        let _ = self.0.write(register, value);
    }

    /// Writes out a line that has not ended.
    pub fn flush(&mut self) {
        self.0.writer_mut().put();
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.flush();
    }
}

struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// Collects a line, so that a character is not a system call.
struct Line {
    output: File,
    bytes: Vec<u8>,
}

impl Line {
    fn put(&mut self) {
        if !self.bytes.is_empty() {
            // What the pipe does not take is lost, as said above.
            let _ = self.output.write(&self.bytes);
            self.bytes.clear();
        }
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() >= LINE || bytes.contains(&b'\n') {
            self.put();
        }
        Ok(bytes.len())
    }

    /// The UART flushes after every byte; lines are kept together nevertheless.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    const DATA: u8 = 0;
    const LINE_STATUS: u8 = 5;
    const TRANSMITTER_EMPTY: u8 = 0x20;

    fn console() -> (io::PipeReader, Console) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, Console::new(writer.into()).unwrap())
    }

    #[test]
    fn what_the_guest_writes_comes_out_line_by_line() {
        let (mut reader, mut console) = console();
        for byte in b"hello\nhalf" {
            assert_ne!(console.read(LINE_STATUS) & TRANSMITTER_EMPTY, 0);
            console.write(DATA, *byte);
        }
        let mut line = [0; 6];
        reader.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"hello\n");
        drop(console);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "half");
    }

    #[test]
    fn a_reader_that_does_not_read_holds_nothing_up() {
        let (_reader, mut console) = console();
        for _ in 0..1 << 20 {
            console.write(DATA, b'x');
        }
        assert_ne!(console.read(LINE_STATUS) & TRANSMITTER_EMPTY, 0);
    }

    #[test]
    fn a_reader_that_is_gone_does_no_harm() {
        let (reader, mut console) = console();
        drop(reader);
        for byte in b"nobody\n" {
            console.write(DATA, *byte);
        }
    }

    #[test]
    fn every_register_takes_every_value() {
        let (_reader, mut console) = console();
        for register in 0..8 {
            for value in 0..=255 {
                console.write(register, value);
                console.read(register);
            }
        }
    }
}
