//! Both ends of the round trips that are timed. The near end runs in the container: it is this executable again.

use super::program::monotonic_ns;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};

/// The first argument of the near end; then an address and a number of round trips.
pub const ROLE: &str = "probe-round-trips";

/// Gives each byte of one connection back.
pub fn echo(listener: &TcpListener) -> io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

/// The near end: nanoseconds of a round trip, on average.
pub fn round_trips(address: &str, count: usize) -> io::Result<f64> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut byte = [1];
    let mut trip = || stream.write_all(&byte).and_then(|()| stream.read_exact(&mut byte));
    for _ in 0..count / 10 {
        trip()?;
    }
    let begin = monotonic_ns();
    for _ in 0..count {
        trip()?;
    }
    Ok((monotonic_ns() - begin) as f64 / count as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_take_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || echo(&listener));
        assert!(round_trips(&address, 20).unwrap() > 0.0);
        server.join().unwrap().unwrap();
    }
}
