mod guest;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::packet::{HEADER_SIZE, Header, Op, SHUTDOWN_RCV, SHUTDOWN_SEND};
use super::*;
use crate::virtio::testing::{Buf, TestDriver, TestLoop, wait_readable};
use guest::*;

/// Bytes that tell where they belong.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

#[test]
fn the_configuration_space_holds_the_context_id() {
    let mut guest = Guest::down();
    let mut cid = [0; 8];
    guest.driver.transport.read(0x100, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), CID);
}

#[test]
fn a_connect_is_established_when_the_guest_accepts() {
    let mut guest = Guest::listening();
    let peer = guest.open(1 << 16);
    assert_eq!(peer.room, 256 << 10);
    guest.expect_silence();
}

#[test]
fn a_connect_that_the_guest_refuses_is_refused() {
    let mut guest = Guest::listening();
    let mut host = guest.dial(5, 99);
    let (request, _) = guest.expect(Op::Request);
    guest.send_raw(Op::Rst as u16, 99, request.src_port.into(), 0, &[], (0, 0));
    assert_eq!(guest.reply(), (5, Err(Refusal::NotListening)));
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn connects_wait_for_the_driver_and_for_the_agent_and_go_out_in_order() {
    let mut guest = Guest::down();
    let _early: Vec<_> = (0..3).map(|id| guest.dial(id, 1025)).collect();
    guest.start();
    let _later: Vec<_> = (3..6).map(|id| guest.dial(id, 1025 + id as u32)).collect();
    guest.expect_silence();
    assert!(guest.replies.try_recv().is_err());
    guest.send_raw(Op::Request as u16, 2048, 1024, 0, &[], (0, 0));
    guest.expect(Op::Rst);
    let mut ports = Vec::new();
    for _ in 0..6 {
        ports.push(u32::from(guest.expect(Op::Request).0.dst_port));
    }
    assert_eq!(ports, [1025, 1025, 1025, 1028, 1029, 1030]);
}

#[test]
fn the_guest_cannot_dial_out() {
    let mut guest = Guest::listening();
    for (cid, kind) in [(2u64, 1u16), (0, 1), (1, 1), (77, 1), (2, 2)] {
        let header = Header {
            src_cid: CID.into(),
            dst_cid: cid.into(),
            src_port: 50.into(),
            dst_port: 22.into(),
            kind: kind.into(),
            op: (Op::Request as u16).into(),
            ..Header::default()
        };
        guest.send_header(header, &[]);
        let (rst, _) = guest.receive();
        assert_eq!(u16::from(rst.op), Op::Rst as u16);
        assert_eq!(u64::from(rst.src_cid), cid);
        assert_eq!((u32::from(rst.src_port), u32::from(rst.dst_port)), (22, 50));
        assert_eq!(u16::from(rst.kind), kind);
    }
}

#[test]
fn megabytes_from_the_host_arrive_unchanged() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(256 << 10);
    let data = pattern(5 << 20);
    let mut host = peer.host.try_clone().unwrap();
    let sender = {
        let data = data.clone();
        std::thread::spawn(move || host.write_all(&data).unwrap())
    };
    let mut got = Vec::new();
    while got.len() < data.len() {
        got.extend(peer.receive_data(&mut guest, (128 << 10).min(data.len() - got.len())));
        peer.send(&mut guest, Op::CreditUpdate, 0, &[]);
    }
    sender.join().unwrap();
    assert!(got == data);
}

#[test]
fn megabytes_from_the_guest_arrive_unchanged_and_credit_comes_back() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(0);
    let data = pattern(5 << 20);
    let mut host = peer.host.try_clone().unwrap();
    let total = data.len();
    let receiver = std::thread::spawn(move || {
        let mut got = vec![0; total];
        host.read_exact(&mut got).unwrap();
        got
    });
    let mut rest = &data[..];
    while !rest.is_empty() {
        while peer.allowance() == 0 {
            let (update, _) = guest.expect(Op::CreditUpdate);
            peer.note(&update);
        }
        let n = rest.len().min(peer.allowance() as usize).min(64 << 10);
        peer.send(&mut guest, Op::Rw, 0, &rest[..n]);
        rest = &rest[n..];
    }
    assert!(receiver.join().unwrap() == data);
}

#[test]
fn no_more_is_sent_to_the_guest_than_its_credit_allows() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1000);
    peer.host.write_all(&pattern(5000)).unwrap();
    assert_eq!(peer.receive_data(&mut guest, 1000).len(), 1000);
    guest.expect_silence();
    peer.send(&mut guest, Op::CreditUpdate, 0, &[]);
    assert_eq!(peer.receive_data(&mut guest, 1000).len(), 1000);
    guest.expect_silence();
}

#[test]
fn a_guest_that_claims_to_have_got_more_than_was_sent_gets_nothing() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(0);
    peer.host.write_all(b"hello").unwrap();
    peer.credit = 4096;
    peer.got = 1;
    peer.send(&mut guest, Op::CreditUpdate, 0, &[]);
    guest.expect_silence();
    peer.got = 0;
    peer.send(&mut guest, Op::CreditUpdate, 0, &[]);
    assert_eq!(peer.receive_data(&mut guest, 5), b"hello");
}

#[test]
fn a_guest_that_sends_more_than_its_credit_loses_the_stream_but_not_what_was_promised() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(0);
    // Fill the socket and then the backlog, with nobody reading.
    let mut sent = Vec::new();
    loop {
        let piece = pattern(64 << 10);
        peer.send(&mut guest, Op::Rw, 0, &piece);
        guest.io.barrier();
        guest.collect();
        match guest.received.pop_front() {
            None => sent.extend(piece),
            Some((header, _)) if u16::from(header.op) == Op::CreditUpdate as u16 => {
                peer.note(&header);
                sent.extend(piece);
            }
            Some((header, _)) => {
                assert_eq!(u16::from(header.op), Op::Rst as u16);
                break;
            }
        }
        assert!(sent.len() < 4 << 20, "the device takes without end");
    }
    let mut got = Vec::new();
    peer.host.read_to_end(&mut got).unwrap();
    assert!(got == sent);
}

#[test]
fn a_host_that_stops_reading_blocks_its_own_stream_only() {
    let mut guest = Guest::listening();
    let mut stalled = guest.open(1 << 20);
    let mut other = guest.open(1 << 20);
    // As much as the guest may send without any credit coming back.
    let mut sent = 0;
    while stalled.allowance() > 0 {
        let n = stalled.allowance().min(64 << 10) as usize;
        stalled.send(&mut guest, Op::Rw, 0, &pattern(n));
        sent += n;
        guest.io.barrier();
        guest.collect();
        while let Some((header, _)) = guest.received.pop_front() {
            stalled.note(&header);
        }
    }
    assert!(sent >= 256 << 10);
    // Both directions of the other stream, and the other direction of this one, go on.
    other.send(&mut guest, Op::Rw, 0, b"to the host");
    let mut text = [0; 11];
    other.host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"to the host");
    other.host.write_all(b"to the guest").unwrap();
    assert_eq!(other.receive_data(&mut guest, 12), b"to the guest");
    stalled.host.write_all(b"still open").unwrap();
    assert_eq!(stalled.receive_data(&mut guest, 10), b"still open");
    // When the host reads again, everything comes, and so does credit.
    let mut got = vec![0; sent];
    stalled.host.read_exact(&mut got).unwrap();
    let (update, _) = guest.expect(Op::CreditUpdate);
    stalled.note(&update);
    assert!(stalled.allowance() > 0);
}

#[test]
fn a_guest_without_receive_buffers_stops_the_host_and_loses_nothing() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 24);
    guest.refill = false;
    let data = pattern(2 << 20);
    peer.host.set_nonblocking(true).unwrap();
    let mut written = 0;
    // Until both the rings and the socket are full.
    loop {
        match peer.host.write(&data[written..]) {
            Ok(n) => written += n,
            Err(_) => {
                let before = guest.rx.len();
                guest.io.barrier();
                guest.collect();
                if guest.rx.len() == before && guest.rx.is_empty() {
                    break;
                }
            }
        }
    }
    assert!(written < 1 << 20, "{written} bytes went somewhere");
    guest.refill = true;
    for _ in 0..64 {
        guest.add_receive_buffer(RX_BUFFER);
    }
    guest.driver.kick(RX);
    let got = peer.receive_data(&mut guest, written);
    assert!(got == data[..written]);
}

#[test]
fn an_end_of_file_of_the_host_reaches_the_guest_after_the_data_and_leaves_the_other_direction_open() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 20);
    peer.host.write_all(&pattern(10_000)).unwrap();
    peer.host.shutdown(Shutdown::Write).unwrap();
    assert!(peer.receive_data(&mut guest, 10_000) == pattern(10_000));
    let (shutdown, _) = guest.expect(Op::Shutdown);
    assert_eq!(u32::from(shutdown.flags), SHUTDOWN_SEND);
    peer.send(&mut guest, Op::Rw, 0, b"answer");
    peer.send(&mut guest, Op::Shutdown, SHUTDOWN_SEND, &[]);
    let mut answer = String::new();
    peer.host.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    // Both have said their last: the device is done with the stream.
    assert_eq!(u32::from(guest.expect(Op::Shutdown).0.flags), BOTH);
    guest.expect_silence();
}

#[test]
fn an_end_of_file_of_the_guest_reaches_the_host_after_the_data_and_leaves_the_other_direction_open() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 20);
    peer.send(&mut guest, Op::Rw, 0, b"all");
    peer.send(&mut guest, Op::Shutdown, SHUTDOWN_SEND, &[]);
    let mut text = String::new();
    peer.host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "all");
    peer.host.write_all(b"back").unwrap();
    assert_eq!(peer.receive_data(&mut guest, 4), b"back");
    // Data after the end breaks the protocol.
    peer.send(&mut guest, Op::Rw, 0, b"more");
    guest.expect(Op::Rst);
}

#[test]
fn an_end_of_file_behind_a_backlog_waits_for_the_backlog() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(0);
    let mut sent = 0;
    while peer.allowance() > 0 {
        let n = peer.allowance().min(64 << 10) as usize;
        peer.send(&mut guest, Op::Rw, 0, &vec![7; n]);
        sent += n;
        guest.io.barrier();
        guest.collect();
        while let Some((header, _)) = guest.received.pop_front() {
            peer.note(&header);
        }
    }
    peer.send(&mut guest, Op::Shutdown, BOTH, &[]);
    guest.expect(Op::Rst);
    let mut got = Vec::new();
    peer.host.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), sent);
}

#[test]
fn a_close_by_the_guest_is_confirmed_and_seen_by_the_host() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 20);
    peer.send(&mut guest, Op::Rw, 0, b"last words");
    peer.send(&mut guest, Op::Shutdown, BOTH, &[]);
    guest.expect(Op::Rst);
    let mut text = String::new();
    peer.host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last words");
    assert!(peer.host.write_all(b"x").is_err());
    // The stream is unknown from now on.
    peer.send(&mut guest, Op::Rw, 0, b"x");
    guest.expect(Op::Rst);
}

#[test]
fn a_guest_that_wants_no_more_data_makes_the_hosts_writes_fail() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 20);
    peer.send(&mut guest, Op::Shutdown, SHUTDOWN_RCV, &[]);
    guest.io.barrier();
    assert_eq!(peer.host.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    peer.send(&mut guest, Op::Rw, 0, b"but I talk");
    let mut text = [0; 10];
    peer.host.read_exact(&mut text).unwrap();
    drop(peer.host);
    let (shutdown, _) = guest.expect(Op::Shutdown);
    assert_eq!(u32::from(shutdown.flags), BOTH);
}

#[test]
fn a_close_by_the_host_shuts_both_directions_down_for_the_guest() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 20);
    peer.host.write_all(b"bye").unwrap();
    let (port, host_port) = (peer.port, peer.host_port);
    assert_eq!(peer.receive_data(&mut guest, 3), b"bye");
    drop(peer);
    let (shutdown, _) = guest.expect(Op::Shutdown);
    assert_eq!(u32::from(shutdown.flags), BOTH);
    guest.send_raw(Op::Rw as u16, port, host_port, 0, b"too late", (0, 0));
    guest.expect(Op::Rst);
}

#[test]
fn a_host_that_reads_no_more_stops_the_guest_from_sending() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 20);
    peer.host.shutdown(Shutdown::Read).unwrap();
    peer.send(&mut guest, Op::Rw, 0, b"to nobody");
    let (shutdown, _) = guest.expect(Op::Shutdown);
    assert_eq!(u32::from(shutdown.flags), SHUTDOWN_RCV);
    peer.host.write_all(b"but I talk").unwrap();
    assert_eq!(peer.receive_data(&mut guest, 10), b"but I talk");
}

#[test]
fn a_reset_by_the_guest_delivers_what_was_sent_before_and_closes() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 20);
    peer.send(&mut guest, Op::Rw, 0, b"data");
    peer.send(&mut guest, Op::Rst, 0, &[]);
    let mut text = String::new();
    peer.host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "data");
    guest.expect_silence();
}

#[test]
fn a_request_for_credit_is_answered() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(0);
    peer.send(&mut guest, Op::Rw, 0, b"12345");
    peer.host.read_exact(&mut [0; 5]).unwrap();
    peer.send(&mut guest, Op::CreditRequest, 0, &[]);
    let (update, _) = guest.expect(Op::CreditUpdate);
    assert_eq!(u32::from(update.fwd_cnt), 5);
    assert_eq!(u32::from(update.buf_alloc), 256 << 10);
}

#[test]
fn packets_that_make_no_sense_reset_their_stream_and_no_other() {
    for (op, flags, declared) in [
        (0u16, 0u32, 0u32),
        (8, 0, 0),
        (0xffff, 0, 0),
        (Op::Request as u16, 0, 0),
        (Op::Response as u16, 0, 0),
    ]
    .into_iter()
    .chain([(Op::Rw as u16, 0, 1000), (Op::Rw as u16, 0, u32::MAX)])
    {
        let mut guest = Guest::listening();
        let mut other = guest.open(1 << 16);
        let mut peer = guest.open(1 << 16);
        let header = Header {
            src_cid: CID.into(),
            dst_cid: 2.into(),
            src_port: peer.port.into(),
            dst_port: peer.host_port.into(),
            len: declared.into(),
            kind: 1.into(),
            op: op.into(),
            flags: flags.into(),
            ..Header::default()
        };
        guest.send_header(header, &[]);
        guest.expect(Op::Rst);
        assert_eq!(peer.host.read(&mut [0]).unwrap_or(0), 0);
        other.send(&mut guest, Op::Rw, 0, b"fine");
        other.host.read_exact(&mut [0; 4]).unwrap();
    }
}

#[test]
fn packets_for_unknown_streams_are_answered_with_a_reset_and_resets_with_nothing() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 16);
    for op in [Op::Response, Op::Rw, Op::Shutdown, Op::CreditUpdate, Op::CreditRequest] {
        // A wrong port of the host's, and a right one with a wrong port of the guest's.
        for (from, to) in [(peer.port, 1), (peer.port + 1, peer.host_port)] {
            guest.send_raw(op as u16, from, to, BOTH, &[], (0, 0));
            let (rst, _) = guest.expect(Op::Rst);
            assert_eq!((u32::from(rst.src_port), u32::from(rst.dst_port)), (to, from));
            guest.send_raw(Op::Rst as u16, from, to, 0, &[], (0, 0));
        }
    }
    guest.expect_silence();
    peer.send(&mut guest, Op::Rw, 0, b"fine");
    peer.host.read_exact(&mut [0; 4]).unwrap();
}

#[test]
fn packets_without_a_whole_header_or_from_a_foreign_source_are_dropped() {
    let mut guest = Guest::listening();
    let at = guest.driver.alloc(64);
    for len in [0, 1, HEADER_SIZE as u32 - 1] {
        guest.driver.add(TX, &[Buf::Read(at, len)]);
    }
    guest.driver.add(TX, &[Buf::Write(at, 64)]);
    guest.driver.kick(TX);
    let header =
        Header { src_cid: 4.into(), dst_cid: 2.into(), op: 1.into(), kind: 1.into(), ..Header::default() };
    guest.send_header(header, &[]);
    guest.expect_silence();
}

#[test]
fn a_packet_may_be_cut_into_any_number_of_buffers() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(0);
    let data = pattern(20);
    let header = Header {
        src_cid: CID.into(),
        dst_cid: 2.into(),
        src_port: peer.port.into(),
        dst_port: peer.host_port.into(),
        len: 20.into(),
        kind: 1.into(),
        op: (Op::Rw as u16).into(),
        ..Header::default()
    };
    let whole = [header.as_slice(), &data].concat();
    let at = guest.driver.put(&whole);
    let bufs: Vec<_> = (0..16).map(|i| Buf::Read(at + 4 * i, 4)).collect();
    guest.driver.add(TX, &bufs);
    guest.driver.kick(TX);
    let mut got = [0; 20];
    peer.host.read_exact(&mut got).unwrap();
    assert_eq!(got[..], data[..]);
}

#[test]
fn answers_that_find_no_receive_buffer_are_bounded_and_hold_up_the_transmit_queue() {
    let mut guest = Guest::booting();
    guest.refill = false;
    // Use up all receive buffers, then go on.
    let header = Header {
        src_cid: CID.into(),
        dst_cid: 2.into(),
        kind: 1.into(),
        op: (Op::Rw as u16).into(),
        ..Header::default()
    };
    let at = guest.driver.put(header.as_slice());
    let (mut sent, mut done) = (0, 0);
    loop {
        while guest.driver.try_add(TX, &[Buf::Read(at, HEADER_SIZE as u32)]).is_some() {
            sent += 1;
        }
        guest.driver.kick(TX);
        guest.io.barrier();
        let before = done;
        while guest.driver.used(TX).is_some() {
            done += 1;
        }
        if done == before {
            break;
        }
    }
    assert!(sent > 128, "the test does not fill everything");
    assert!(done <= 64 + 64 + 1, "{done} packets taken");
    // With buffers it goes on to the end.
    guest.refill = true;
    while guest.received.len() < sent {
        if !guest.collect() {
            guest.driver.wait_interrupt();
        }
    }
    guest.io.barrier();
    guest.collect();
    assert_eq!(guest.received.len(), sent);
}

#[test]
fn receive_buffers_for_no_more_than_a_header_do_no_harm() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 20);
    guest.refill = false;
    // Use up the big buffers.
    peer.host.write_all(&pattern(64 * 4052)).unwrap();
    while !guest.rx.is_empty() {
        if !guest.collect() {
            guest.driver.wait_interrupt();
        }
    }
    for len in [HEADER_SIZE as u32, 10, HEADER_SIZE as u32] {
        guest.add_receive_buffer(len);
    }
    peer.host.write_all(b"x").unwrap();
    guest.driver.kick(RX);
    guest.io.barrier();
    while guest.driver.used(RX).is_some() {}
    guest.add_receive_buffer(RX_BUFFER);
    guest.driver.kick(RX);
    let total: usize = 64 * 4052 + 1;
    let mut got = 0;
    while got < total {
        let (header, payload) = guest.receive();
        if u16::from(header.op) == Op::Rw as u16 {
            got += payload.len();
        }
    }
    assert_eq!(got, total);
}

#[test]
fn a_reset_of_the_device_closes_streams_and_refuses_pending_connects_and_later_ones_work() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 20);
    let _pending = guest.dial(8, 1);
    guest.expect(Op::Request);
    guest.driver.write(0x70, 0);
    assert_eq!(guest.reply(), (8, Err(Refusal::DeviceStopped)));
    assert_eq!(peer.host.read(&mut [0]).unwrap(), 0);
    guest.received.clear();
    guest.start();
    guest.hint();
    let mut peer = guest.open(1 << 20);
    peer.send(&mut guest, Op::Rw, 0, b"again");
    peer.host.read_exact(&mut [0; 5]).unwrap();
}

#[test]
fn a_broken_ring_closes_all_streams_and_the_device_asks_for_a_reset() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 20);
    guest.driver.expose(TX, 500);
    guest.driver.kick(TX);
    guest.driver.wait_needs_reset();
    assert_eq!(peer.host.read(&mut [0]).unwrap(), 0);
    let _refused = guest.dial(9, 1025);
    assert_eq!(guest.reply(), (9, Err(Refusal::DeviceStopped)));
    guest.received.clear();
    guest.start();
    guest.hint();
    guest.open(0);
}

fn raise_descriptor_limit(wanted: u64) {
    // SAFETY: a plain structure, which the kernel fills and reads.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = limit.rlim_cur.max(wanted.min(limit.rlim_max));
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
    }
}

#[test]
fn two_thousand_streams_work_at_once() {
    raise_descriptor_limit(8192);
    let mut guest = Guest::listening();
    let mut peers: Vec<Peer> = (0..2000).map(|_| guest.open(4096)).collect();
    for (i, peer) in peers.iter_mut().enumerate() {
        peer.host.write_all(&(i as u32).to_le_bytes()).unwrap();
    }
    let mut seen = std::collections::HashMap::new();
    while seen.len() < peers.len() {
        let (header, payload) = guest.expect(Op::Rw);
        seen.insert(u32::from(header.src_port), u32::from_le_bytes(payload.try_into().unwrap()));
    }
    for (i, peer) in peers.iter_mut().enumerate() {
        assert_eq!(seen[&peer.host_port], i as u32);
        peer.send(&mut guest, Op::Rw, 0, &(i as u32).to_le_bytes());
    }
    for (i, mut peer) in peers.into_iter().enumerate() {
        let mut word = [0; 4];
        peer.host.read_exact(&mut word).unwrap();
        assert_eq!(u32::from_le_bytes(word), i as u32);
    }
    // All of them closed by the host.
    for _ in 0..2000 {
        assert_eq!(u32::from(guest.expect(Op::Shutdown).0.flags), BOTH);
    }
}

#[test]
fn more_streams_than_the_limit_are_refused() {
    raise_descriptor_limit(MAX_STREAMS as u64 + 8192);
    let mut guest = Guest::down();
    let (_keep, one) = UnixStream::pair().unwrap();
    for id in 0..MAX_STREAMS as u64 {
        // Any descriptor will do for a stream that nobody takes.
        guest.dialer.connect(id, 1, one.try_clone().unwrap().into());
    }
    guest.dialer.connect(9999, 1, one.into());
    assert_eq!(guest.reply(), (9999, Err(Refusal::TooManyStreams)));
    guest.start();
    let (_keep, one) = UnixStream::pair().unwrap();
    guest.io.barrier();
    guest.dialer.connect(10_000, 1, one.into());
    assert_eq!(guest.reply(), (10_000, Err(Refusal::TooManyStreams)));
}

#[test]
fn an_interrupt_of_the_receive_queue_wakes_a_sleeping_driver() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 20);
    while guest.driver.irq.read().is_ok() {}
    peer.host.write_all(b"ping").unwrap();
    assert!(wait_readable(guest.driver.irq.as_raw_fd()));
    assert_eq!(peer.receive_data(&mut guest, 4), b"ping");
}

#[test]
fn transmit_buffers_come_back_with_what_is_received_or_when_they_are_many() {
    let mut guest = Guest::listening();
    let mut peer = guest.open(1 << 20);
    guest.collect();
    while guest.driver.used(TX).is_some() {}
    while guest.driver.irq.read().is_ok() {}
    // A few small packets: no interrupt of their own.
    for _ in 0..4 {
        peer.send(&mut guest, Op::Rw, 0, b"x");
    }
    assert!(guest.driver.irq.read().is_err(), "an interrupt for nothing but sent packets");
    assert_eq!(guest.driver.used(TX), None);
    peer.host.write_all(b"y").unwrap();
    assert_eq!(peer.receive_data(&mut guest, 1), b"y");
    for _ in 0..4 {
        guest.driver.used(TX).unwrap();
    }
    // Many, or large ones: at once.
    peer.send(&mut guest, Op::Rw, 0, &[0; 65_536]);
    guest.driver.used(TX).unwrap();
    let at = guest.driver.alloc(64);
    for _ in 0..17 {
        guest.driver.add(TX, &[Buf::Read(at, 1)]);
    }
    guest.driver.kick(TX);
    for _ in 0..17 {
        guest.driver.wait_used(TX);
    }
}

#[test]
fn a_guest_that_only_sends_never_runs_out_of_transmit_buffers() {
    let mut guest = Guest::listening();
    let peer = guest.open(0);
    let mut host = peer.host.try_clone().unwrap();
    std::thread::spawn(move || std::io::copy(&mut host, &mut std::io::sink()));
    let header = Header {
        src_cid: CID.into(),
        dst_cid: 2.into(),
        src_port: peer.port.into(),
        dst_port: peer.host_port.into(),
        len: 17.into(),
        kind: 1.into(),
        op: (Op::Rw as u16).into(),
        ..Header::default()
    };
    let at = guest.driver.put(&[header.as_slice(), &[1; 17]].concat());
    let mut bufs = vec![Buf::Read(at, HEADER_SIZE as u32)];
    // As many descriptors as a packet of Linux can have.
    bufs.extend((0..17).map(|i| Buf::Read(at + HEADER_SIZE as u64 + i, 1)));
    for _ in 0..200 {
        while guest.driver.try_add(TX, &bufs).is_none() {
            guest.driver.wait_used(TX);
        }
        guest.driver.kick(TX);
    }
}
