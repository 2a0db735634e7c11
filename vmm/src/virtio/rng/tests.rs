use super::*;
use crate::virtio::testing::{Buf, DESC_NEXT, DESC_WRITE, HIGH_MEMORY, LOW_MEMORY, TestDriver, TestLoop};
use vm_memory::Bytes;

fn started() -> (TestLoop, TestDriver) {
    let io = TestLoop::new();
    let driver = TestDriver::started(new(io.handle.clone()));
    (io, driver)
}

#[test]
fn a_request_is_filled_with_random_bytes() {
    let (_io, mut driver) = started();
    let buffer = driver.alloc(64);
    let head = driver.add(0, &[Buf::Write(buffer, 64)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0), (head, 64));
    let first = driver.get(buffer, 64);
    assert_ne!(first, vec![0; 64]);
    driver.add(0, &[Buf::Write(buffer, 64)]);
    driver.kick(0);
    driver.wait_used(0);
    assert_ne!(driver.get(buffer, 64), first);
}

#[test]
fn a_huge_request_is_filled_in_part_only() {
    let (_io, mut driver) = started();
    let buffer = driver.alloc(1 << 20);
    driver.add(0, &[Buf::Write(buffer, 1 << 20)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1 as usize, MAX_BYTES);
    assert_eq!(driver.get(buffer + MAX_BYTES as u64, 64), vec![0; 64]);
}

#[test]
fn buffers_that_overlap_and_empty_ones_are_tolerated() {
    let (_io, mut driver) = started();
    let buffer = driver.alloc(64);
    driver.add(0, &[Buf::Write(buffer, 64), Buf::Write(buffer + 8, 0), Buf::Write(buffer + 16, 32)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 96);
}

#[test]
fn a_request_without_room_for_an_answer_gets_none() {
    let (_io, mut driver) = started();
    let buffer = driver.alloc(64);
    driver.add(0, &[Buf::Read(buffer, 64)]);
    driver.add(0, &[Buf::Write(buffer, 0)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 0);
    assert_eq!(driver.wait_used(0).1, 0);
}

#[test]
fn buffers_above_four_gigabytes_are_reached() {
    let (_io, mut driver) = started();
    driver.add(0, &[Buf::Write(HIGH_MEMORY + 0x100, 32)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 32);
    assert_ne!(driver.get(HIGH_MEMORY + 0x100, 32), vec![0; 32]);
}

#[test]
fn requests_made_available_before_the_device_is_up_are_served_without_a_kick() {
    let io = TestLoop::new();
    let mut driver = TestDriver::new(new(io.handle.clone()));
    driver.negotiate(u64::MAX);
    driver.set_up_queue(0, 8);
    let buffer = driver.alloc(16);
    driver.add(0, &[Buf::Write(buffer, 16)]);
    driver.write(0x70, 15);
    assert_eq!(driver.wait_used(0).1, 16);
}

#[test]
fn a_driver_without_event_index_is_served_too() {
    let io = TestLoop::new();
    let mut driver = TestDriver::new(new(io.handle.clone()));
    driver.negotiate(0);
    driver.set_up_queue(0, 4);
    driver.write(0x70, 15);
    for _ in 0..20 {
        let buffer = driver.alloc(16);
        driver.add(0, &[Buf::Write(buffer, 16)]);
        driver.kick(0);
        assert_eq!(driver.wait_used(0).1, 16);
    }
}

/// Runs `break_it` on a fresh device, which then must ask for a reset, and work again after one.
fn breaks(break_it: impl Fn(&mut TestDriver)) {
    let (_io, mut driver) = started();
    break_it(&mut driver);
    driver.kick(0);
    driver.wait_needs_reset();
    assert_eq!(driver.used(0), None);
    driver.start();
    let buffer = driver.alloc(16);
    driver.add(0, &[Buf::Write(buffer, 16)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 16);
}

#[test]
fn a_chain_that_loops_breaks_the_device_until_reset() {
    breaks(|driver| {
        let table = driver.queues[0].desc;
        driver.set_desc(table, 0, 0x1000, 4, DESC_WRITE | DESC_NEXT, 1);
        driver.set_desc(table, 1, 0x1000, 4, DESC_WRITE | DESC_NEXT, 0);
        driver.expose(0, 0);
    });
}

#[test]
fn a_buffer_outside_of_memory_breaks_the_device_until_reset() {
    for (addr, len) in [
        (LOW_MEMORY as u64, 1),
        (LOW_MEMORY as u64 - 4, 8),
        (0xd000_0000, 4096),
        (u64::MAX - 3, 4),
        (u64::MAX, 4096),
        (HIGH_MEMORY - 1, 2),
    ] {
        breaks(|driver| {
            driver.add(0, &[Buf::Write(addr, len)]);
        });
    }
}

#[test]
fn a_head_outside_of_the_table_breaks_the_device_until_reset() {
    breaks(|driver| driver.expose(0, 8));
    breaks(|driver| driver.expose(0, u16::MAX));
}

#[test]
fn an_available_index_that_jumps_breaks_the_device_until_reset() {
    breaks(|driver| {
        let avail = driver.queues[0].avail;
        driver.store(9u16, avail + 2);
    });
    breaks(|driver| {
        let avail = driver.queues[0].avail;
        driver.store(u16::MAX, avail + 2);
    });
}

#[test]
fn a_readable_buffer_behind_a_writable_one_breaks_the_device_until_reset() {
    breaks(|driver| {
        driver.add(0, &[Buf::Write(0x1000, 4), Buf::Read(0x1000, 4)]);
    });
}

#[test]
fn an_overlong_chain_breaks_the_device_until_reset() {
    breaks(|driver| {
        let bufs = [Buf::Write(0, LOW_MEMORY as u32 - 16); 2];
        driver.add(0, &bufs);
    });
    breaks(|driver| {
        driver.add(0, &[Buf::Write(0, u32::MAX)]);
    });
}

#[test]
fn a_reset_while_requests_are_in_flight_leaves_memory_alone_afterwards() {
    let (io, mut driver) = started();
    for _ in 0..50 {
        let buffer = driver.alloc(64);
        for _ in 0..8 {
            driver.add(0, &[Buf::Write(buffer, 64)]);
        }
        driver.kick(0);
        driver.write(0x70, 0);
        // From here on the memory is the driver's again.
        driver.memory.write_slice(&[0; 64], vm_memory::GuestAddress(buffer)).unwrap();
        io.barrier();
        assert_eq!(driver.get(buffer, 64), vec![0; 64]);
        driver.start();
    }
}
