//! The flow control of a stream as arithmetic, for any behaviour of the guest and of the host's socket: nothing that
//! the guest says makes the host hold more than it promised, or send more than the guest has room for.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::packet::{MAX_PAYLOAD, Op};
use super::stream::{Next, Phase, Stream};
use crate::virtio::testing::{Buf, QueueTap};

/// What happens to a stream.
#[derive(Debug, Clone)]
enum Step {
    /// The guest tells its credit, truly or not.
    Credit { buf_alloc: u32, fwd_cnt: u32 },
    /// The guest sends as much.
    Sends(u32),
    /// The host's reader takes as much.
    HostReads(usize),
    /// The host's writer gives as much, which is there to be read.
    HostWrites(usize),
    /// The stream's turn in the receive queue, with a buffer of that size.
    Turn(usize),
}

fn any_step() -> impl Strategy<Value = Step> {
    let extreme =
        prop_oneof![Just(0u32), Just(1), Just(u32::MAX), Just(1 << 31), 0..200_000u32, any::<u32>()];
    prop_oneof![
        (extreme.clone(), extreme).prop_map(|(buf_alloc, fwd_cnt)| Step::Credit { buf_alloc, fwd_cnt }),
        (0..100_000u32).prop_map(Step::Sends),
        (0..300_000usize).prop_map(Step::HostReads),
        (0..100_000usize).prop_map(Step::HostWrites),
        (0..70_000usize).prop_map(Step::Turn),
    ]
}

/// Where buffers lie in the fake memory.
const BUFFER: u64 = 1 << 20;

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn neither_side_is_ever_given_more_than_it_promised_to_take(
        limit in 1..300_000u32,
        steps in prop::collection::vec(any_step(), 1..60),
    ) {
        let (ours, mut host) = UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        let (mut driver, mut queue) = QueueTap::started(8);
        let mut stream = Stream::new(1, 1024, ours, limit);
        stream.phase = Phase::Open;
        // Of the way to the host: what was sent and accepted, and how much of it the host has.
        let (mut accepted, mut delivered) = (0u64, 0u64);
        // Of the way to the guest.
        let (mut sent, mut credit) = (0u32, (0u32, 0u32));
        for step in steps {
            match step {
                Step::Credit { buf_alloc, fwd_cnt } => {
                    stream.take_credit(buf_alloc, fwd_cnt);
                    credit = (buf_alloc, fwd_cnt);
                }
                Step::Sends(len) => {
                    driver.add(0, &[Buf::Read(BUFFER, len)]);
                    let mut chain = queue.pop(&driver.memory).unwrap().unwrap();
                    let held = stream.held();
                    let taken = stream.data_from_guest(&mut chain.readable, len as usize).is_ok();
                    // Exactly what was promised is taken.
                    prop_assert_eq!(taken, len <= limit.saturating_sub(held));
                    accepted += if taken { u64::from(len) } else { 0 };
                    queue.push(&driver.memory, chain.head(), 0).unwrap();
                    while driver.used(0).is_some() {}
                }
                Step::HostReads(len) => {
                    delivered += host.read(&mut vec![0; len]).unwrap_or(0) as u64;
                    stream.flush();
                }
                Step::HostWrites(len) => {
                    let _ = host.write(&vec![7; len]);
                    stream.host_is_readable(false);
                }
                Step::Turn(room) => match stream.next() {
                    Some(Next::Data(max)) => {
                        // Linux' own arithmetic: what is under way, and what the guest says it can hold.
                        let in_flight = sent.wrapping_sub(credit.1);
                        prop_assert!(max <= MAX_PAYLOAD && max <= credit.0.saturating_sub(in_flight) as usize);
                        driver.add(0, &[Buf::Write(BUFFER, room as u32)]);
                        let mut chain = queue.pop(&driver.memory).unwrap().unwrap();
                        let n = stream.read_host(&mut chain.writable, max);
                        prop_assert!(n <= max && n <= room);
                        sent = sent.wrapping_add(n as u32);
                        queue.push(&driver.memory, chain.head(), n).unwrap();
                        while driver.used(0).is_some() {}
                    }
                    Some(Next::Control(op, flags)) => {
                        prop_assert_ne!(op, Op::Rst);
                        let (buf_alloc, fwd_cnt) = stream.credit_fields();
                        prop_assert_eq!(buf_alloc, limit);
                        // What the guest is told of was forwarded.
                        prop_assert!(u64::from(fwd_cnt) <= accepted);
                        stream.control_sent(op, flags);
                    }
                    None => {}
                },
            }
            prop_assert!(stream.held() <= limit, "{} bytes are held, {} were promised", stream.held(), limit);
            prop_assert!(delivered <= accepted);
        }
        // Nothing is lost: what was accepted arrives, as soon as it is read.
        while delivered < accepted {
            let n = host.read(&mut [0; 1 << 16]).unwrap();
            prop_assert!(n > 0);
            delivered += n as u64;
            stream.flush();
        }
        prop_assert_eq!(stream.held(), 0);
        driver.memory.write_slice(&[0; 16], GuestAddress(BUFFER)).unwrap();
    }
}
