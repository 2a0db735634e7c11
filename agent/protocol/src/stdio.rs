//! The header of a stdio stream.
//!
//! Each stream of a process is a vsock connection of its own to [`STDIO_PORT`](crate::STDIO_PORT). The host opens
//! it and writes one line first: `stdin|stdout|stderr SP container-id SP exec-id LF`, where the exec id of a
//! container's init is `-` (so no exec can be called `-`), and the container id [`GUEST`](crate::GUEST) stands for no
//! container. After the line come raw bytes, in one
//! direction only; the sender half-closes the connection at end of file. Header and the call that creates the
//! process may arrive in any order. With a terminal, `stdin` and `stdout` carry its two directions.

use crate::GUEST;
use crate::id::{ID_MAX, InvalidId, check_id};

/// Longest header in bytes, line feed included: a reader that has seen so many bytes without a line feed stops.
pub const HEADER_MAX: usize = "stdout".len() + 1 + ID_MAX + 1 + ID_MAX + 1;

/// Which stream of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stream {
    /// From the host to the process.
    Stdin,
    /// From the process to the host.
    Stdout,
    /// From the process to the host.
    Stderr,
}

impl Stream {
    /// The word in the header.
    pub fn as_str(self) -> &'static str {
        match self {
            Stream::Stdin => "stdin",
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        }
    }
}

/// Says whose and which stream a connection is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StreamHeader {
    /// Which of the three.
    pub stream: Stream,
    /// The container.
    pub container_id: String,
    /// The exec, empty for the container's init.
    pub exec_id: String,
}

/// A header line that is not one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InvalidHeader {
    /// Not three words separated by single spaces and ended by the line's only line feed, or not UTF-8.
    Shape,
    /// The first word names no stream.
    Stream,
    /// The second word is no id.
    ContainerId(InvalidId),
    /// The third word is neither `-` nor an id.
    ExecId(InvalidId),
}

impl std::fmt::Display for InvalidHeader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            InvalidHeader::Shape => {
                write!(f, "a stdio header is \"stream container-id exec-id\" and a line feed")
            }
            InvalidHeader::Stream => write!(f, "a stdio header begins with stdin, stdout or stderr"),
            InvalidHeader::ContainerId(e) => write!(f, "container id of a stdio header: {e}"),
            InvalidHeader::ExecId(e) => write!(f, "exec id of a stdio header: {e}"),
        }
    }
}

impl std::error::Error for InvalidHeader {}

impl StreamHeader {
    /// The line, line feed included. The ids must have passed [`check_id`].
    pub fn encode(&self) -> String {
        let exec_id = if self.exec_id.is_empty() { "-" } else { &self.exec_id };
        format!("{} {} {}\n", self.stream.as_str(), self.container_id, exec_id)
    }

    /// Parses a whole line, line feed included, and accepts exactly what [`encode`](Self::encode) can produce.
    pub fn parse(line: &[u8]) -> Result<Self, InvalidHeader> {
        let line = std::str::from_utf8(line).map_err(|_| InvalidHeader::Shape)?;
        let line = line.strip_suffix('\n').ok_or(InvalidHeader::Shape)?;
        let mut words = line.split(' ');
        let (Some(stream), Some(container_id), Some(exec_id), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(InvalidHeader::Shape);
        };
        let stream = match stream {
            "stdin" => Stream::Stdin,
            "stdout" => Stream::Stdout,
            "stderr" => Stream::Stderr,
            _ => return Err(InvalidHeader::Stream),
        };
        if container_id != GUEST {
            check_id(container_id).map_err(InvalidHeader::ContainerId)?;
        }
        let exec_id = if exec_id == "-" {
            String::new()
        } else {
            check_id(exec_id).map_err(InvalidHeader::ExecId)?;
            exec_id.to_owned()
        };
        Ok(StreamHeader { stream, container_id: container_id.to_owned(), exec_id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(stream: Stream, container_id: &str, exec_id: &str) -> StreamHeader {
        StreamHeader { stream, container_id: container_id.into(), exec_id: exec_id.into() }
    }

    #[test]
    fn what_is_encoded_is_parsed_back() {
        let longest = "x".repeat(ID_MAX);
        for h in [
            header(Stream::Stdin, "c1", ""),
            header(Stream::Stdout, "c-1", "exec.7"),
            header(Stream::Stdout, GUEST, "enter-1"),
            header(Stream::Stderr, &longest, &longest),
        ] {
            let line = h.encode();
            assert!(line.len() <= HEADER_MAX);
            assert_eq!(StreamHeader::parse(line.as_bytes()), Ok(h));
        }
        assert_eq!(header(Stream::Stdin, "c1", "").encode(), "stdin c1 -\n");
        assert_eq!(header(Stream::Stdout, &longest, &longest).encode().len(), HEADER_MAX);
    }

    #[test]
    fn anything_else_is_refused() {
        use InvalidHeader::*;
        let refused: &[(&[u8], InvalidHeader)] = &[
            (b"", Shape),
            (b"\n", Shape),
            (b"stdin c1 -", Shape),
            (b"stdin c1\n", Shape),
            (b"stdin c1 - \n", Shape),
            (b"stdin  c1 -\n", Shape),
            (b"stdin  -\n", ContainerId(InvalidId::Empty)),
            (b"stdin c1 - x\n", Shape),
            (b"\xff\xfe c1 -\n", Shape),
            (b"STDIN c1 -\n", Stream),
            (b"stdlog c1 -\n", Stream),
            (b"stdin .. -\n", ContainerId(InvalidId::Dots)),
            (b"stdin =other -\n", ContainerId(InvalidId::Character('='))),
            (b"stdin a/b -\n", ContainerId(InvalidId::Character('/'))),
            (b"stdin c1 a/b\n", ExecId(InvalidId::Character('/'))),
            (b"stdin c1 -\nx\n", ExecId(InvalidId::Character('\n'))),
            (b"stdin c1 -\r\n", ExecId(InvalidId::Character('\r'))),
        ];
        for (line, why) in refused {
            assert_eq!(StreamHeader::parse(line).as_ref(), Err(why), "{:?}", String::from_utf8_lossy(line));
        }
    }
}
