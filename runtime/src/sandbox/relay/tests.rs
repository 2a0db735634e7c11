use super::*;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{pipe, pipe2};

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limited = async { tokio::time::timeout(Duration::from_secs(60), future).await };
    runtime.block_on(limited).expect("the relay hangs")
}

/// Our end as [`super::super::vmm`] makes it, and the guest's, blocking.
fn stream() -> (OwnedFd, UnixStream) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
    let theirs = UnixStream::from(theirs);
    theirs.set_nonblocking(false).unwrap();
    (ours, theirs)
}

/// 3 MB in which every position can be told from its neighbours.
fn data() -> Vec<u8> {
    (0..750_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

fn check_to_host(sink: OwnedFd, read: impl FnOnce() -> Vec<u8> + Send + 'static) {
    let (ours, mut guest) = stream();
    let writer = std::thread::spawn(move || guest.write_all(&data()).unwrap());
    let reader = std::thread::spawn(read);
    let mut calls = 0;
    block_on(async {
        to_host(ours, Endpoint::new(sink, Direction::ToHost).unwrap(), || calls += 1).await.unwrap();
    });
    writer.join().unwrap();
    assert!(reader.join().unwrap() == data(), "lost or reordered");
    assert_eq!(calls, 1);
}

fn read_all(mut from: impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    from.read_to_end(&mut all).unwrap();
    all
}

#[test]
fn output_reaches_a_pipe_whole_and_the_pipe_stays_blocking() {
    let (read, write) = pipe().unwrap();
    let copy = write.try_clone().unwrap();
    let reader = move || {
        let flags = nix::fcntl::fcntl(&copy, nix::fcntl::FcntlArg::F_GETFL).unwrap();
        assert!(!OFlag::from_bits_truncate(flags).contains(OFlag::O_NONBLOCK));
        drop(copy);
        read_all(File::from(read))
    };
    check_to_host(write, reader);
}

#[test]
fn output_reaches_a_socket_whole() {
    let (a, b) = UnixStream::pair().unwrap();
    check_to_host(a.into(), move || read_all(b));
}

#[test]
fn output_reaches_a_file_whole() {
    let file = tempfile::tempfile().unwrap();
    let (ours, mut guest) = stream();
    let writer = std::thread::spawn(move || guest.write_all(&data()).unwrap());
    let sink = file.try_clone().unwrap().into();
    block_on(async {
        to_host(ours, Endpoint::new(sink, Direction::ToHost).unwrap(), || ()).await.unwrap();
    });
    writer.join().unwrap();
    let mut file = file;
    file.rewind().unwrap();
    assert!(read_all(file) == data());
}

#[test]
fn a_reader_that_stalls_blocks_only_its_own_stream() {
    let (stalled_read, stalled_write) = pipe().unwrap();
    let (read, write) = pipe().unwrap();
    let (ours_a, mut guest_a) = stream();
    let (ours_b, mut guest_b) = stream();
    let flood = std::thread::spawn(move || guest_a.write_all(&data()).unwrap());
    let small = std::thread::spawn(move || guest_b.write_all(b"still here").unwrap());
    let reader = std::thread::spawn(move || read_all(File::from(read)));
    block_on(async {
        let a = to_host(ours_a, Endpoint::new(stalled_write, Direction::ToHost).unwrap(), || ());
        let b = to_host(ours_b, Endpoint::new(write, Direction::ToHost).unwrap(), || ());
        let mut a = std::pin::pin!(a);
        tokio::select! {
            _ = &mut a => panic!("nobody reads it"),
            result = b => result.unwrap(),
        }
        small.join().unwrap();
        assert_eq!(reader.join().unwrap(), b"still here");
        // And when the reader goes on, everything is there.
        let reader = std::thread::spawn(move || read_all(File::from(stalled_read)));
        a.await.unwrap();
        flood.join().unwrap();
        assert!(reader.join().unwrap() == data());
    });
}

#[test]
fn a_reader_that_is_gone_closes_the_guests_stream() {
    let (read, write) = pipe().unwrap();
    drop(read);
    let (ours, mut guest) = stream();
    guest.write_all(b"x").unwrap();
    let error = block_on(async {
        to_host(ours, Endpoint::new(write, Direction::ToHost).unwrap(), || ()).await.unwrap_err()
    });
    assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
    assert_eq!(guest.write_all(&data()).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

fn check_to_guest(source: OwnedFd, feed: impl FnOnce() + Send + 'static) {
    let (ours, mut guest) = stream();
    let writer = std::thread::spawn(feed);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        guest.read_to_end(&mut all).unwrap();
        all
    });
    block_on(async {
        to_guest(Endpoint::new(source, Direction::ToGuest).unwrap(), ours).await.unwrap();
    });
    writer.join().unwrap();
    assert!(reader.join().unwrap() == data(), "lost or reordered");
}

#[test]
fn input_from_a_pipe_arrives_whole_and_ends_in_a_half_close() {
    let (read, write) = pipe().unwrap();
    check_to_guest(read, move || File::from(write).write_all(&data()).unwrap());
}

#[test]
fn input_from_a_socket_arrives_whole() {
    let (a, mut b) = UnixStream::pair().unwrap();
    check_to_guest(a.into(), move || b.write_all(&data()).unwrap());
}

#[test]
fn input_from_a_file_arrives_whole() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&data()).unwrap();
    file.rewind().unwrap();
    check_to_guest(file.into(), || ());
}

#[test]
fn after_the_half_close_the_stream_stays_until_the_guest_ends_it() {
    let (ours, mut guest) = stream();
    let null = File::open("/dev/null").unwrap();
    block_on(async {
        let relay = to_guest(Endpoint::new(null.into(), Direction::ToGuest).unwrap(), ours);
        let mut relay = std::pin::pin!(relay);
        let waited = tokio::time::timeout(Duration::from_millis(50), &mut relay).await;
        assert!(waited.is_err(), "ended too early");
        assert_eq!(guest.read(&mut [0]).unwrap(), 0);
        drop(guest);
        relay.await.unwrap();
    });
}

#[test]
fn a_guest_that_takes_no_input_ends_the_relay() {
    let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let (ours, guest) = stream();
    drop(guest);
    File::from(write.try_clone().unwrap()).write_all(b"unwanted").unwrap();
    block_on(async {
        to_guest(Endpoint::new(read, Direction::ToGuest).unwrap(), ours).await.unwrap();
    });
}

#[test]
fn output_without_end_leaves_others_their_turn() {
    let (ours, mut guest) = stream();
    // Ends when the relay is dropped.
    let flood = std::thread::spawn(move || while guest.write_all(&[7; 1 << 16]).is_ok() {});
    let sink = OwnedFd::from(File::options().write(true).open("/dev/null").unwrap());
    block_on(async {
        let others = async {
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            result = to_host(ours, Endpoint::new(sink, Direction::ToHost).unwrap(), || ()) => {
                panic!("the relay has ended: {result:?}")
            }
            () = others => {}
        }
    });
    flood.join().unwrap();
}
