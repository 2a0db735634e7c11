//! The streams of exec, attach and port-forward: channels of bytes over a WebSocket (RFC 6455), in the protocol
//! `v4.channel.k8s.io`. Each message begins with the number of its channel.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Channels of exec and attach.
pub const STDIN: u8 = 0;
/// What the process writes.
pub const STDOUT: u8 = 1;
/// What it writes to the other output.
pub const STDERR: u8 = 2;
/// How it ended, in JSON.
pub const RESULT: u8 = 3;
/// The size that its terminal is to have, in JSON.
pub const RESIZE: u8 = 4;

/// Kinds of frames.
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
/// A frame is the last of its message.
const LAST: u8 = 0x80;
/// A frame is masked, as a client's must be.
const MASKED: u8 = 0x80;

/// A connection to a streaming server.
pub struct Stream(TcpStream);

impl Stream {
    /// Connects to a URL that a CRI call has answered. Nothing may take longer than `limit`.
    pub fn connect(url: &str, limit: Duration) -> io::Result<Self> {
        let bad = || io::Error::other(format!("{url} is no URL of a streaming server"));
        let (host, path) =
            url.strip_prefix("http://").and_then(|rest| rest.split_once('/')).ok_or_else(bad)?;
        let mut stream = TcpStream::connect(host)?;
        stream.set_read_timeout(Some(limit))?;
        // The key is there so that proxies do not answer from a cache. There is none between.
        let request = format!(
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Origin: http://{host}\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: c3RvY2thZGUgaW4gdGVzdA==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        );
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            answer.extend(byte);
        }
        let answer = String::from_utf8_lossy(&answer);
        match answer.starts_with("HTTP/1.1 101") {
            true => Ok(Self(stream)),
            false => Err(io::Error::other(format!("{url}: {answer}"))),
        }
    }

    /// Sends bytes on a channel.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> io::Result<()> {
        let length = u16::try_from(bytes.len() + 1).map_err(io::Error::other)?;
        let mut frame = vec![LAST | BINARY, MASKED | 126];
        frame.extend(length.to_be_bytes());
        // A mask of zeros changes nothing.
        frame.extend([0; 4]);
        frame.push(channel);
        frame.extend(bytes);
        self.0.write_all(&frame)
    }

    /// The next bytes and their channel; nothing when the other side has closed the connection.
    pub fn receive(&mut self) -> io::Result<Option<(u8, Vec<u8>)>> {
        loop {
            let mut head = [0; 2];
            match self.0.read_exact(&mut head) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                read => read?,
            }
            let length = match head[1] {
                126 => u64::from(u16::from_be_bytes(self.bytes()?)),
                127 => u64::from_be_bytes(self.bytes()?),
                short => u64::from(short),
            };
            let mut message = vec![0; usize::try_from(length).map_err(io::Error::other)?];
            self.0.read_exact(&mut message)?;
            match head[0] & !LAST {
                CLOSE => return Ok(None),
                PING => {}
                _ if message.is_empty() => {}
                _ => return Ok(Some((message.remove(0), message))),
            }
        }
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
