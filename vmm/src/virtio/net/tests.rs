use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;

use super::header::{MAX_FRAME, SIZE};
use super::*;
use crate::virtio::testing::{Buf, DESC_NEXT, DESC_WRITE, HIGH_MEMORY, LOW_MEMORY, TestDriver};

const RX: usize = 0;
const TX: usize = 1;
const CTRL: usize = 2;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A device on a socket, the other end of which plays the wire.
struct Wire {
    driver: TestDriver,
    plug: Plug,
    wire: UnixDatagram,
}

fn interface() -> Interface {
    Interface { mac: MAC, mtu: 1500, up: true }
}

fn unstarted() -> Wire {
    let (ours, wire) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let (device, plug) = new("net0".into()).unwrap();
    plug.0.attach(interface(), || Ok(Tap::fake(ours.into(), |_, _| Ok(())))).unwrap();
    Wire { driver: TestDriver::new(device), plug, wire }
}

fn started() -> Wire {
    let mut wire = unstarted();
    wire.driver.start();
    wire
}

fn without(feature: u32) -> Wire {
    let mut wire = unstarted();
    wire.driver.negotiate(!bit(feature));
    for (index, size) in QUEUE_SIZES.into_iter().enumerate() {
        wire.driver.set_up_queue(index, size);
    }
    wire.driver.write(0x70, 15);
    wire
}

fn frame(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 % 251) as u8).collect()
}

impl Wire {
    fn post(&mut self, count: usize, length: u32) -> Vec<(u16, u64)> {
        (0..count)
            .map(|_| {
                let buffer = self.driver.alloc(length.into());
                (self.driver.add(RX, &[Buf::Write(buffer, length)]), buffer)
            })
            .collect()
    }

    /// Sends a frame with this header, in one buffer.
    fn transmit(&mut self, header: &[u8], frame: &[u8]) {
        let buffer = self.driver.put(&[header, frame].concat());
        self.driver.add(TX, &[Buf::Read(buffer, (header.len() + frame.len()) as u32)]);
        self.driver.kick(TX);
        self.driver.wait_used(TX);
    }

    fn on_the_wire(&self) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 17];
        let n = self.wire.recv(&mut bytes).unwrap();
        bytes.truncate(n);
        bytes
    }

    fn nothing_on_the_wire(&self) {
        self.wire.set_nonblocking(true).unwrap();
        assert!(self.wire.recv(&mut [0; 64]).is_err());
        self.wire.set_nonblocking(false).unwrap();
    }

    fn transmit_dropped(&self) -> u64 {
        self.plug.0.counters.transmit_dropped.load(Ordering::Relaxed)
    }
}

#[test]
fn a_placeholder_is_no_device_until_a_tap_is_attached() {
    let (device, plug) = new("net0".into()).unwrap();
    let mut driver = TestDriver::new(device);
    assert_eq!(driver.read(0x8), TYPE_PLACEHOLDER);
    assert_eq!(driver.offered_features(), crate::virtio::F_VERSION_1);
    let (ours, _wire) = UnixDatagram::pair().unwrap();
    plug.0.attach(interface(), || Ok(Tap::fake(ours.into(), |_, _| Ok(())))).unwrap();
    assert_eq!(driver.read(0x8), TYPE_NET);
    assert_ne!(driver.offered_features() & bit(abi::VIRTIO_NET_F_GUEST_TSO4), 0);
    let mut config = [0; 12];
    driver.transport.read(0x100, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 5]);
}

#[test]
fn a_placeholder_that_is_driven_all_the_same_asks_for_a_reset() {
    let (device, _plug) = new("net0".into()).unwrap();
    let mut driver = TestDriver::new(device);
    driver.negotiate(0);
    for (index, size) in QUEUE_SIZES.into_iter().enumerate() {
        driver.set_up_queue(index, size);
    }
    driver.write(0x70, 15);
    driver.wait_needs_reset();
}

#[test]
fn a_slot_takes_one_interface_and_no_impossible_one() {
    let (_device, plug) = new("net0".into()).unwrap();
    let fake = || {
        let (ours, _) = UnixDatagram::pair().unwrap();
        Ok(Tap::fake(ours.into(), |_, _| Ok(())))
    };
    let attach = |interface| plug.0.attach(interface, fake);
    assert!(matches!(attach(Interface { mac: [1, 0, 0, 0, 0, 1], ..interface() }), Err(AttachError::Mac(_))));
    assert!(matches!(attach(Interface { mac: [0; 6], ..interface() }), Err(AttachError::Mac(_))));
    assert!(matches!(attach(Interface { mtu: 67, ..interface() }), Err(AttachError::Mtu(67))));
    attach(interface()).unwrap();
    assert!(matches!(attach(interface()), Err(AttachError::Taken)));
}

#[test]
fn a_slot_that_is_emptied_is_a_placeholder_and_takes_another_interface() {
    let mut wire = started();
    wire.plug.detach();
    assert_eq!(wire.driver.read(0x8), TYPE_PLACEHOLDER);
    // Its carrier is nobody's any more.
    wire.plug.set_link(false);
    // The driver lets go, and then the tap's other end has none.
    wire.driver.write(0x70, 0);
    assert!(wire.wire.send(&[0; 64]).is_err());
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let other = Interface { mac: [2, 0, 0, 0, 0, 2], mtu: 9000, up: true };
    wire.plug.0.attach(other, || Ok(Tap::fake(ours.into(), |_, _| Ok(())))).unwrap();
    wire.wire = theirs;
    let mut config = [0; 12];
    wire.driver.transport.read(0x100, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 2, 1, 0, 1, 0, 0x28, 0x23]);
    wire.driver.start();
    wire.transmit(&[0; SIZE], &frame(60));
    assert_eq!(wire.on_the_wire()[SIZE..], frame(60));
}

#[test]
fn the_carrier_is_a_configuration_change() {
    let mut wire = started();
    let status = |driver: &mut TestDriver| driver.read(0x104) >> 16;
    assert_eq!(status(&mut wire.driver), 1);
    let generation = wire.driver.read(0xfc);
    wire.plug.set_link(false);
    assert_eq!(wire.driver.wait_interrupt() & 2, 2);
    assert_eq!(status(&mut wire.driver), 0);
    assert_ne!(wire.driver.read(0xfc), generation);
    wire.plug.set_link(true);
    assert_eq!(status(&mut wire.driver), 1);
}

#[test]
fn a_frame_of_the_guest_reaches_the_wire_with_a_header_that_was_checked() {
    let mut wire = started();
    let (mut header, frame) = ([0xee; SIZE], frame(60));
    (header[0], header[1]) = (0, 0);
    wire.transmit(&header, &frame);
    let got = wire.on_the_wire();
    assert_eq!(got[..SIZE], [0; SIZE]);
    assert_eq!(got[SIZE..], frame);
}

#[test]
fn a_frame_of_the_guest_may_lie_in_pieces_anywhere() {
    let mut wire = started();
    let frame = frame(3000);
    let whole = [&[0; SIZE][..], &frame].concat();
    let (a, b) = (wire.driver.put(&whole[..5]), wire.driver.put(&whole[5..2000]));
    vm_memory::Bytes::write_slice(&wire.driver.memory, &whole[2000..], vm_memory::GuestAddress(HIGH_MEMORY))
        .unwrap();
    wire.driver.add(
        TX,
        &[
            Buf::Read(a, 5),
            Buf::Read(b, 1995),
            Buf::Read(b, 0),
            Buf::Read(HIGH_MEMORY, whole.len() as u32 - 2000),
        ],
    );
    wire.driver.kick(TX);
    wire.driver.wait_used(TX);
    assert_eq!(wire.on_the_wire()[SIZE..], frame);
}

#[test]
fn lies_are_dropped_and_counted_and_the_device_goes_on() {
    let mut wire = started();
    let mut lies = 0;
    for (header, length) in [
        (&[0; SIZE][..], 0),
        (&[0; SIZE], 13),
        (&[0; 3], 0),
        (&[0; SIZE], MAX_FRAME + 1),
        (&[1, 0, 0, 0, 0, 0, 59, 0, 0, 0, 0, 0], 60),
        (&[1, 0x11, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0], 3000),
        (&[1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0], 3000),
        (&[0, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0], 3000),
        (&[1, 1, 255, 255, 100, 0, 34, 0, 16, 0, 0, 0], 3000),
        (&[1, 3, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0], 3000),
    ] {
        wire.transmit(header, &frame(length));
        lies += 1;
        assert_eq!(wire.transmit_dropped(), lies, "{header:?} with {length} bytes");
    }
    wire.nothing_on_the_wire();
    wire.transmit(&[0; SIZE], &frame(60));
    assert_eq!(wire.on_the_wire().len(), SIZE + 60);
    assert_eq!(wire.transmit_dropped(), lies);
}

#[test]
fn a_large_frame_needs_the_feature() {
    let large = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    let mut wire = started();
    wire.transmit(&large, &frame(60_000));
    let got = wire.on_the_wire();
    assert_eq!((&got[..SIZE], got.len()), (&large[..], SIZE + 60_000));
    let mut wire = without(abi::VIRTIO_NET_F_HOST_TSO4);
    wire.transmit(&large, &frame(60_000));
    assert_eq!(wire.transmit_dropped(), 1);
}

#[test]
fn a_wire_that_takes_no_more_holds_frames_back_and_loses_none() {
    let mut wire = started();
    let sent = 200;
    for n in 0..sent {
        let buffer = wire.driver.put(&[&[0; SIZE][..], &[n as u8; 2000]].concat());
        wire.driver.add(TX, &[Buf::Read(buffer, SIZE as u32 + 2000)]);
    }
    wire.driver.kick(TX);
    for n in 0..sent {
        assert_eq!(wire.on_the_wire()[SIZE..], [n as u8; 2000]);
    }
    for _ in 0..sent {
        wire.driver.wait_used(TX);
    }
    assert_eq!(wire.transmit_dropped(), 0);
}

#[test]
fn a_frame_for_the_guest_goes_over_as_many_buffers_as_it_needs() {
    let mut wire = started();
    let buffers = wire.post(100, 1500);
    wire.driver.kick(RX);
    for length in [60, 1488, 1489, 40_000] {
        let frame = frame(length);
        wire.wire.send(&[&[0x40; SIZE][..], &frame].concat()).unwrap();
        let mut got = Vec::new();
        let (head, written) = wire.driver.wait_used(RX);
        let mut take = |head: u16, written: u32, driver: &TestDriver| {
            let (_, address) = buffers.iter().find(|(h, _)| *h == head).unwrap();
            got.extend(driver.get(*address, written as usize));
        };
        take(head, written, &wire.driver);
        let pieces = (SIZE + length).div_ceil(1500);
        for _ in 1..pieces {
            // They are all there: no interrupt has to be waited for.
            let (head, written) = wire.driver.used(RX).unwrap();
            take(head, written, &wire.driver);
        }
        assert_eq!(u16::from_le_bytes([got[10], got[11]]) as usize, pieces);
        assert_eq!(got[..10], [0x40; 10]);
        assert_eq!(got[SIZE..], frame, "{length}");
    }
}

#[test]
fn a_receiver_without_buffers_holds_frames_back_and_does_not_stop_the_other_direction() {
    let mut wire = started();
    for n in 0..5 {
        wire.wire.send(&[&[0; SIZE][..], &[n; 100]].concat()).unwrap();
    }
    for _ in 0..10 {
        wire.transmit(&[0; SIZE], &frame(60));
        assert_eq!(wire.on_the_wire().len(), SIZE + 60);
    }
    assert_eq!(wire.driver.used(RX), None);
    let buffers = wire.post(60, 1600);
    wire.driver.kick(RX);
    for n in 0..5 {
        let (head, written) = wire.driver.wait_used(RX);
        let (_, address) = buffers.iter().find(|(h, _)| *h == head).unwrap();
        assert_eq!(written as usize, SIZE + 100);
        assert_eq!(wire.driver.get(address + SIZE as u64, 100), [n; 100]);
    }
}

#[test]
fn a_frame_that_is_longer_than_all_buffers_is_dropped_and_counted() {
    let mut wire = started();
    // All that the ring can hold is less than the longest frame.
    wire.post(256, 100);
    wire.driver.kick(RX);
    wire.wire.send(&[0; SIZE + 30_000]).unwrap();
    wire.wire.send(&[0; SIZE + 64]).unwrap();
    assert_eq!(wire.driver.wait_used(RX).1 as usize, SIZE + 64);
    assert_eq!(wire.plug.0.counters.receive_dropped.load(Ordering::Relaxed), 1);
}

#[test]
fn without_mergeable_buffers_a_frame_has_one() {
    let mut wire = without(abi::VIRTIO_NET_F_MRG_RXBUF);
    wire.post(2, 70_000);
    wire.driver.kick(RX);
    wire.wire.send(&[0; SIZE + 60_000]).unwrap();
    assert_eq!(wire.driver.wait_used(RX).1 as usize, SIZE + 60_000);
    wire.wire.send(&[0; SIZE + 60]).unwrap();
    assert_eq!(wire.driver.wait_used(RX).1 as usize, SIZE + 60);
}

#[test]
fn a_large_frame_is_not_waited_for_when_the_guest_takes_none() {
    let mut wire = without(abi::VIRTIO_NET_F_GUEST_CSUM);
    wire.post(2, 1536);
    wire.driver.kick(RX);
    wire.wire.send(&[0; SIZE + 1400]).unwrap();
    assert_eq!(wire.driver.wait_used(RX).1 as usize, SIZE + 1400);
}

#[test]
fn offloads_are_set_as_the_guest_says_and_only_those_agreed_on() {
    static SEEN: Mutex<Vec<u32>> = Mutex::new(Vec::new());
    let (ours, _wire) = UnixDatagram::pair().unwrap();
    let (device, plug) = new("net0".into()).unwrap();
    let tell: tap::SetOffload = |_, offloads| {
        SEEN.lock().unwrap().push(offloads);
        Ok(())
    };
    plug.0.attach(interface(), || Ok(Tap::fake(ours.into(), tell))).unwrap();
    let mut driver = TestDriver::started(device);
    // Each was set before the driver was told so.
    let next = || SEEN.lock().unwrap().pop().unwrap();
    assert_ne!(next() & libc::TUN_F_TSO4, 0);

    let mut command = |class: u8, offloads: u64| {
        let bytes = driver.put(&[&[class, 0][..], &offloads.to_le_bytes()].concat());
        let ack = driver.put(&[7]);
        driver.add(CTRL, &[Buf::Read(bytes, 10), Buf::Write(ack, 1)]);
        driver.kick(CTRL);
        driver.wait_used(CTRL);
        driver.get(ack, 1)[0]
    };
    assert_eq!(command(5, bit(abi::VIRTIO_NET_F_GUEST_CSUM)), 0);
    assert_eq!(next(), libc::TUN_F_CSUM);
    assert_eq!(command(5, 1 << 40), 1);
    assert_eq!(command(0, 0), 1);
    assert_eq!(command(4, 0), 1);
    assert_eq!(command(5, 0), 0);
    assert_eq!(next(), 0);
}

#[test]
fn a_control_command_without_room_for_an_answer_gets_none() {
    let mut wire = started();
    let bytes = wire.driver.put(&[5, 0]);
    wire.driver.add(CTRL, &[Buf::Read(bytes, 2)]);
    wire.driver.kick(CTRL);
    assert_eq!(wire.driver.wait_used(CTRL).1, 0);
}

/// Runs `break_it` on a fresh device, which then must ask for a reset, and work again after one.
fn breaks(queue: usize, break_it: impl Fn(&mut TestDriver)) {
    let mut wire = started();
    break_it(&mut wire.driver);
    wire.driver.kick(queue);
    wire.driver.wait_needs_reset();
    wire.driver.start();
    wire.transmit(&[0; SIZE], &frame(60));
    assert_eq!(wire.on_the_wire().len(), SIZE + 60);
}

#[test]
fn broken_rings_stop_the_device_until_reset() {
    for queue in [RX, TX, CTRL] {
        breaks(queue, |driver| {
            let table = driver.queues[queue].desc;
            let flags = DESC_NEXT | if queue == RX { DESC_WRITE } else { 0 };
            driver.set_desc(table, 0, 0x1000, 64, flags, 1);
            driver.set_desc(table, 1, 0x1000, 64, flags, 0);
            driver.expose(queue, 0);
        });
        breaks(queue, |driver| driver.expose(queue, 9999));
        breaks(queue, |driver| {
            let avail = driver.queues[queue].avail;
            driver.store(u16::MAX, avail + 2);
        });
        for (address, length) in [(LOW_MEMORY as u64 - 4, 64), (0xd000_0000, 64), (u64::MAX - 8, 64)] {
            breaks(queue, |driver| {
                let buf = if queue == RX { Buf::Write(address, length) } else { Buf::Read(address, length) };
                driver.add(queue, &[buf]);
            });
        }
        breaks(queue, |driver| {
            driver.add(queue, &[Buf::Write(0x1000, 64), Buf::Read(0x1000, 64)]);
        });
    }
}

#[test]
fn a_receive_buffer_without_room_for_the_header_stops_the_device() {
    breaks(RX, |driver| {
        driver.add(RX, &[Buf::Write(0x1000, SIZE as u32 - 1)]);
    });
    breaks(RX, |driver| {
        driver.add(RX, &[Buf::Read(0x1000, 2000)]);
    });
}

#[test]
fn a_reset_in_the_middle_of_traffic_leaves_memory_alone_afterwards() {
    let mut wire = started();
    for _ in 0..20 {
        let heap = wire.driver.heap;
        let buffers = wire.post(60, 1600);
        wire.driver.kick(RX);
        for _ in 0..8 {
            wire.wire.send(&[0x55; SIZE + 1000]).unwrap();
        }
        wire.driver.write(0x70, 0);
        for (_, buffer) in &buffers {
            let zero = [0; 1600];
            vm_memory::Bytes::write_slice(&wire.driver.memory, &zero, vm_memory::GuestAddress(*buffer))
                .unwrap();
        }
        wire.wire.send(&[0x55; SIZE + 1000]).unwrap();
        for (_, buffer) in &buffers {
            assert_eq!(wire.driver.get(*buffer, 1600), [0; 1600]);
        }
        wire.driver.heap = heap;
        wire.driver.start();
        // What is still on the wire belongs to nobody.
        wire.post(200, 1600);
        wire.driver.kick(RX);
        wire.wire.send(&[0; SIZE + 77]).unwrap();
        while wire.driver.wait_used(RX).1 as usize != SIZE + 77 {}
        wire.driver.write(0x70, 0);
        wire.driver.heap = heap;
        wire.driver.start();
    }
}
