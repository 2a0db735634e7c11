//! gRPC over HTTP/2 on a unix socket, unary calls only (gRPC's PROTOCOL-HTTP2).

use std::fmt;
use std::path::Path;

use h2::client;
use http::{HeaderMap, Request};
use protobuf::Message;
use tokio::net::UnixStream;

/// Before each message: a byte that says it is not compressed, and its length.
const PREFIX: usize = 5;

/// A call that went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// gRPC's status; without one the connection failed.
    pub code: Option<u32>,
    /// In the other side's words.
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => write!(to, "{} (gRPC status {code})", self.message),
            None => write!(to, "the call did not get through: {}", self.message),
        }
    }
}

fn broken(why: impl fmt::Display) -> Failure {
    Failure { code: None, message: why.to_string() }
}

/// One call on a connection of its own.
pub fn call<A: Message>(
    socket: &Path,
    service: &str,
    method: &str,
    request: &impl Message,
) -> Result<A, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(broken)?;
    let message = request.write_to_bytes().map_err(broken)?;
    let mut frame = vec![0];
    frame.extend((message.len() as u32).to_be_bytes());
    frame.extend(message);
    let answer = runtime.block_on(exchange(socket, &format!("{service}/{method}"), frame))?;
    let message = answer.get(PREFIX..).ok_or_else(|| broken("the answer is too short"))?;
    A::parse_from_bytes(message).map_err(broken)
}

async fn exchange(socket: &Path, path: &str, frame: Vec<u8>) -> Result<Vec<u8>, Failure> {
    let stream = UnixStream::connect(socket).await.map_err(broken)?;
    let (mut sender, connection) = client::handshake(stream).await.map_err(broken)?;
    // It ends with this call's runtime.
    tokio::spawn(connection);
    let request = Request::post(format!("http://localhost/{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(broken)?;
    let (response, mut body) = sender.send_request(request, false).map_err(broken)?;
    body.send_data(frame.into(), true).map_err(broken)?;
    let response = response.await.map_err(broken)?;
    // An answer without a message has its status in front.
    status(response.headers())?;
    let mut body = response.into_body();
    let mut answer = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.map_err(broken)?;
        body.flow_control().release_capacity(data.len()).map_err(broken)?;
        answer.extend_from_slice(&data);
    }
    if let Some(trailers) = body.trailers().await.map_err(broken)? {
        status(&trailers)?;
    }
    Ok(answer)
}

fn status(headers: &HeaderMap) -> Result<(), Failure> {
    let text = |name: &str| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
    let code = text("grpc-status").and_then(|code| code.parse().ok()).unwrap_or(0);
    match code {
        0 => Ok(()),
        code => {
            let message = decoded(&text("grpc-message").unwrap_or_default());
            Err(Failure { code: Some(code), message })
        }
    }
}

/// `%` and two hexadecimal digits are a byte.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let hex = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok();
        match (first, tail.get(..2).and_then(hex)) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_a_failure_with_its_message_decoded() {
        let mut headers = HeaderMap::new();
        assert_eq!(status(&headers), Ok(()));
        headers.insert("grpc-status", "0".parse().unwrap());
        assert_eq!(status(&headers), Ok(()));
        headers.insert("grpc-status", "5".parse().unwrap());
        headers.insert("grpc-message", "no such pod%3A \"x%22 100%".parse().unwrap());
        let failure = status(&headers).unwrap_err();
        assert_eq!((failure.code, failure.message.as_str()), (Some(5), "no such pod: \"x\" 100%"));
    }
}
