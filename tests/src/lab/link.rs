//! The link between the build machine and the lab: frames over one virtio-serial port.
//!
//! One port carries everything (the command to run, its stdio, its exit code, the files it leaves in
//! `/out`), so that the command's output is byte for byte its own and the console stays free for the kernel.
//! A frame is a kind (one byte), a length (four bytes, little endian) and that many bytes of body.
//! Both ends are this crate, built at once, so there is no version: a kind that is not known is an error.

use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};

/// The longest body that either side sends, in bytes. A length above it means that the stream is corrupt.
pub const MAX_BODY: usize = 64 * 1024;

/// What a frame carries. The numbers are the bytes on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// To the lab: the command, as JSON of [`Start`]. Sent once.
    Start = 1,
    /// To the lab: bytes for the command's standard input.
    Stdin = 2,
    /// To the lab: end of the command's standard input. Empty.
    StdinEof = 3,
    /// To the lab: the terminal's size, rows and columns as two little-endian u16.
    Resize = 4,
    /// From the lab: the host is up and waits for the command. The body is its uptime in milliseconds, in text.
    Ready = 16,
    /// From the lab: bytes of the command's standard output (or of its terminal).
    Stdout = 17,
    /// From the lab: bytes of the command's standard error.
    Stderr = 18,
    /// From the lab: the next piece of a tar archive of `/out`.
    Out = 19,
    /// From the lab, the last frame: the command's exit code (128 + n for signal n) in text.
    Exit = 20,
    /// From the lab: it cannot go on; one line that says why.
    Failed = 21,
    /// From the lab, every [`Start::alive_seconds`]: its clock and its link work. Empty.
    Alive = 22,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        use Kind::*;
        [Start, Stdin, StdinEof, Resize, Ready, Stdout, Stderr, Out, Exit, Failed, Alive]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// The command that the lab is to run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// Program and arguments; the program is looked up on the lab's PATH.
    pub argv: Vec<String>,
    /// Variables on top of the lab's own environment.
    pub env: Vec<(String, String)>,
    /// Rows and columns of the terminal to run it on; none: stdout and stderr are pipes.
    pub tty: Option<(u16, u16)>,
    /// Seconds since the epoch, for the lab's clock.
    pub now: u64,
    /// How often the lab is to say that it lives; none: never.
    pub alive_seconds: Option<u64>,
}

/// Writes one frame; a body over [`MAX_BODY`] is split into several of the same kind.
pub fn send(to: &mut impl Write, kind: Kind, body: &[u8]) -> io::Result<()> {
    let mut rest = body;
    loop {
        let (piece, tail) = rest.split_at(rest.len().min(MAX_BODY));
        let mut frame = Vec::with_capacity(5 + piece.len());
        frame.push(kind as u8);
        frame.extend_from_slice(&(piece.len() as u32).to_le_bytes());
        frame.extend_from_slice(piece);
        to.write_all(&frame)?;
        if tail.is_empty() {
            return Ok(());
        }
        rest = tail;
    }
}

/// Collects bytes as they come and gives back whole frames.
#[derive(Default)]
pub struct Reader {
    pending: Vec<u8>,
}

impl Reader {
    /// Takes bytes that were read from the link.
    pub fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// The next whole frame, none when more bytes are needed.
    pub fn next_frame(&mut self) -> io::Result<Option<(Kind, Vec<u8>)>> {
        let Some((header, rest)) = self.pending.split_first_chunk::<5>() else { return Ok(None) };
        let [kind, length @ ..] = *header;
        let length = u32::from_le_bytes(length) as usize;
        let corrupt = |what: String| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        let Some(kind) = Kind::from_byte(kind) else {
            return corrupt(format!("the lab's link is corrupt: frame of unknown kind {kind}"));
        };
        if length > MAX_BODY {
            return corrupt(format!("the lab's link is corrupt: {kind:?} frame of {length} bytes"));
        }
        let Some(body) = rest.get(..length).map(<[u8]>::to_vec) else { return Ok(None) };
        self.pending.drain(..5 + length);
        Ok(Some((kind, body)))
    }

    /// Blocks on `from` until a whole frame is there; none at end of file.
    pub fn wait_frame(&mut self, from: &mut impl Read) -> io::Result<Option<(Kind, Vec<u8>)>> {
        let mut buffer = vec![0; MAX_BODY];
        loop {
            if let Some(frame) = self.next_frame()? {
                return Ok(Some(frame));
            }
            match from.read(&mut buffer)? {
                0 => return Ok(None),
                n => self.push(buffer.get(..n).unwrap_or_default()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_being_cut_anywhere() {
        let mut wire = Vec::new();
        send(&mut wire, Kind::Stdout, b"hello").unwrap();
        send(&mut wire, Kind::Exit, b"").unwrap();
        let mut reader = Reader::default();
        let mut got = Vec::new();
        for byte in wire {
            reader.push(&[byte]);
            got.extend(reader.next_frame().unwrap());
        }
        assert_eq!(got, [(Kind::Stdout, b"hello".to_vec()), (Kind::Exit, Vec::new())]);
    }

    #[test]
    fn a_long_body_is_split() {
        let mut wire = Vec::new();
        let body: Vec<u8> = (0..MAX_BODY + 10).map(|i| i as u8).collect();
        send(&mut wire, Kind::Out, &body).unwrap();
        let mut reader = Reader::default();
        reader.push(&wire);
        let first = reader.next_frame().unwrap().unwrap();
        let second = reader.next_frame().unwrap().unwrap();
        assert_eq!([first.1, second.1].concat(), body);
        assert!(reader.next_frame().unwrap().is_none());
    }

    #[test]
    fn garbage_is_an_error() {
        let mut reader = Reader::default();
        reader.push(&[99, 0, 0, 0, 0]);
        assert!(reader.next_frame().is_err());
        let mut reader = Reader::default();
        reader.push(&[17, 255, 255, 255, 255]);
        assert!(reader.next_frame().is_err());
    }
}
