//! A stream that takes no more from the guest than a bounded amount a second.
//!
//! What the agent has to say fits in far less; a guest that chatters is held back by the flow control of its own vsock
//! stream, and costs its supervisor neither memory nor the CPU that reading and decoding without end would.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// Bytes a second in the long run.
const RATE: u64 = 1 << 20;
/// Bytes that may come at once: two of the largest messages that there can be (ttrpc, MESSAGE_LENGTH_MAX).
const BURST: u64 = 8 << 20;

/// See the module.
pub struct Meter<S> {
    stream: S,
    /// Bytes that may be read now.
    allowance: u64,
    /// Until when the allowance has been counted.
    counted: Instant,
    pause: Pin<Box<Sleep>>,
}

impl<S> Meter<S> {
    /// Needs a runtime around it.
    pub fn new(stream: S) -> Self {
        let now = Instant::now();
        Meter { stream, allowance: BURST, counted: now, pause: Box::pin(sleep_until(now)) }
    }

    /// Counts what has come to the allowance since the last time.
    fn refill(&mut self) {
        let now = Instant::now();
        let earned = now.duration_since(self.counted).as_micros().min(1 << 40) as u64 * RATE / 1_000_000;
        if earned > 0 {
            self.allowance = (self.allowance + earned).min(BURST);
            self.counted = now;
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Meter<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context, buf: &mut ReadBuf) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        if me.allowance == 0 {
            ready!(me.pause.as_mut().poll(cx));
            me.refill();
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut me.stream).poll_read(cx, buf))?;
        let taken = (buf.filled().len() - before) as u64;
        me.allowance = me.allowance.saturating_sub(taken);
        if me.allowance == 0 {
            me.pause.as_mut().reset(Instant::now() + Duration::from_millis(100));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Meter<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context,
        bytes: &[io::IoSlice],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    #[tokio::test(start_paused = true)]
    async fn a_guest_without_end_is_read_at_the_rate_and_no_faster() {
        let (ours, mut guest) = duplex(64 << 10);
        tokio::spawn(async move { while guest.write_all(&[7; 4096]).await.is_ok() {} });
        let mut meter = Meter::new(ours);
        let begin = Instant::now();
        let (seconds, mut taken) = (20, 0u64);
        let mut buffer = vec![0; 4096];
        while begin.elapsed() < Duration::from_secs(seconds) {
            taken += meter.read(&mut buffer).await.unwrap() as u64;
        }
        let most = BURST + (seconds + 1) * RATE;
        assert!(taken <= most, "{taken} bytes in {seconds} s");
        assert!(taken >= BURST + (seconds - 1) * RATE, "{taken} bytes in {seconds} s");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_within_the_burst_is_not_held_back() {
        let (ours, mut guest) = duplex(64 << 10);
        let bytes = 4 << 20;
        tokio::spawn(async move { guest.write_all(&vec![7; bytes]).await });
        let begin = Instant::now();
        let mut all = Vec::new();
        Meter::new(ours).read_to_end(&mut all).await.unwrap();
        assert_eq!((all.len(), begin.elapsed()), (bytes, Duration::ZERO));
    }
}
