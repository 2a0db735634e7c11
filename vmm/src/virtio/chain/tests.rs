use super::*;
use crate::virtio::queue::{RingError, Virtqueue};
use crate::virtio::testing::{
    Buf, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, HIGH_MEMORY, LOW_MEMORY, QueueTap, TestDriver,
};

fn tap() -> (TestDriver, Virtqueue) {
    QueueTap::started(8)
}

/// Pops the one chain that `build` makes available, and says what is wrong with it.
fn fault(build: impl FnOnce(&mut TestDriver)) -> ChainError {
    let (mut driver, mut queue) = tap();
    build(&mut driver);
    match queue.pop(&driver.memory) {
        Err(RingError::Chain(error)) => error,
        other => panic!("the chain was taken for {other:?}"),
    }
}

#[test]
fn readable_and_writable_parts_are_told_apart_and_keep_their_order() {
    let (mut driver, mut queue) = tap();
    let (a, b, c) = (driver.put(b"hello "), driver.put(b"world"), driver.alloc(4));
    let head = driver.add(0, &[Buf::Read(a, 6), Buf::Read(b, 5), Buf::Write(c, 4)]);
    let memory = driver.memory.clone();
    let mut chain = queue.pop(&memory).unwrap().unwrap();
    assert_eq!(chain.head(), head);
    let mut text = [0; 20];
    assert_eq!(chain.readable.read(&mut text), 11);
    assert_eq!(&text[..11], b"hello world");
    assert_eq!(chain.readable.remaining(), 0);
    assert_eq!(chain.readable.consumed(), 11);
    assert_eq!(chain.writable.write(b"abcdef"), 4);
    assert_eq!(driver.get(c, 4), b"abcd");
    assert!(queue.pop(&memory).unwrap().is_none());
}

#[test]
fn an_object_may_lie_across_buffers() {
    let (mut driver, mut queue) = tap();
    let (a, b) = (driver.put(&[1, 2, 3]), driver.put(&[4, 5]));
    driver.add(0, &[Buf::Read(a, 3), Buf::Read(b, 0), Buf::Read(b, 2)]);
    let memory = driver.memory.clone();
    let mut chain = queue.pop(&memory).unwrap().unwrap();
    assert_eq!(chain.readable.read_obj::<u32>(), Some(0x0403_0201));
    assert_eq!(chain.readable.read_obj::<u32>(), None);
    assert_eq!(chain.readable.remaining(), 1);
}

#[test]
fn the_front_can_be_split_off_inside_of_a_buffer() {
    let (mut driver, mut queue) = tap();
    let (a, b) = (driver.alloc(10), driver.alloc(10));
    driver.add(0, &[Buf::Write(a, 10), Buf::Write(b, 10)]);
    let memory = driver.memory.clone();
    let mut rest = queue.pop(&memory).unwrap().unwrap().writable;
    assert!(rest.split_front(21).is_none());
    let mut front = rest.split_front(12).unwrap();
    assert_eq!(rest.write(b"tail"), 4);
    assert_eq!(front.write(b"this is the front"), 12);
    assert_eq!(driver.get(a, 10), b"this is th");
    assert_eq!(driver.get(b, 6), b"e tail");
    assert_eq!(rest.consumed(), 16);
}

#[test]
fn overlapping_buffers_and_buffers_over_the_rings_are_mere_memory() {
    let (mut driver, mut queue) = tap();
    let desc = driver.queues[0].desc;
    driver.add(0, &[Buf::Read(desc, 128), Buf::Write(desc, 128), Buf::Write(desc + 4, 64)]);
    let memory = driver.memory.clone();
    let mut chain = queue.pop(&memory).unwrap().unwrap();
    let mut copy = [0; 128];
    assert_eq!(chain.readable.read(&mut copy), 128);
    assert_eq!(chain.writable.write(&[0xff; 192]), 192);
    queue.push(&memory, chain.head(), 192).unwrap();
}

#[test]
fn an_undone_pop_gives_the_same_chain_again() {
    let (mut driver, mut queue) = tap();
    let head = driver.add(0, &[Buf::Write(0x1000, 4)]);
    let memory = driver.memory.clone();
    assert_eq!(queue.pop(&memory).unwrap().unwrap().head(), head);
    queue.undo_pop();
    assert_eq!(queue.pop(&memory).unwrap().unwrap().head(), head);
    assert!(queue.pop(&memory).unwrap().is_none());
}

#[test]
fn an_indirect_table_stands_for_its_descriptors() {
    let (mut driver, mut queue) = tap();
    let (table, text) = (driver.alloc(64), driver.put(b"indirect"));
    driver.set_desc(table, 0, text, 8, DESC_NEXT, 2);
    driver.set_desc(table, 2, text, 4, DESC_WRITE, 0);
    let desc = driver.queues[0].desc;
    driver.set_desc(desc, 3, table, 48, DESC_INDIRECT, 0);
    driver.expose(0, 3);
    let memory = driver.memory.clone();
    let mut chain = queue.pop(&memory).unwrap().unwrap();
    assert_eq!(chain.head(), 3);
    let mut text = [0; 8];
    assert_eq!(chain.readable.read(&mut text), 8);
    assert_eq!(&text, b"indirect");
    assert_eq!(chain.writable.remaining(), 4);
}

#[test]
fn loops_are_found() {
    let itself = |driver: &mut TestDriver| {
        let desc = driver.queues[0].desc;
        driver.set_desc(desc, 0, 0x1000, 4, DESC_NEXT, 0);
        driver.expose(0, 0);
    };
    assert_eq!(fault(itself), ChainError::Broken);
    let empty = |driver: &mut TestDriver| {
        let desc = driver.queues[0].desc;
        driver.set_desc(desc, 0, 0x1000, 0, DESC_NEXT, 1);
        driver.set_desc(desc, 1, 0x1000, 0, DESC_NEXT, 0);
        driver.expose(0, 0);
    };
    assert_eq!(fault(empty), ChainError::Broken);
}

#[test]
fn a_next_index_outside_of_the_table_is_found() {
    let outside = |driver: &mut TestDriver| {
        let desc = driver.queues[0].desc;
        driver.set_desc(desc, 0, 0x1000, 4, DESC_NEXT, 8);
        driver.expose(0, 0);
    };
    assert_eq!(fault(outside), ChainError::Broken);
}

#[test]
fn bad_indirect_tables_are_found() {
    // Not a multiple of 16; empty; outside of memory; endless; longer than any table.
    for (addr, len) in [
        (0x1000, 15),
        (0x1000, 0),
        (LOW_MEMORY as u64, 16),
        (u64::MAX - 7, 16),
        (0x1000, 0xffff_fff0),
        (0x1000, 0x10_0000),
    ] {
        let table = |driver: &mut TestDriver| {
            let desc = driver.queues[0].desc;
            driver.set_desc(desc, 0, addr, len, DESC_INDIRECT, 0);
            driver.set_desc(0x1000, 0, 0x1000, 1, DESC_NEXT, u16::MAX);
            driver.expose(0, 0);
        };
        assert_eq!(fault(table), ChainError::Broken, "{addr:#x} {len:#x}");
    }
}

#[test]
fn an_indirect_table_in_an_indirect_table_is_found() {
    let nested = |driver: &mut TestDriver| {
        let desc = driver.queues[0].desc;
        let table = driver.alloc(32);
        driver.set_desc(table, 0, 0x1000, 4, DESC_NEXT, 1);
        driver.set_desc(table, 1, table, 32, DESC_INDIRECT, 0);
        driver.set_desc(desc, 0, table, 32, DESC_INDIRECT, 0);
        driver.expose(0, 0);
    };
    assert_eq!(fault(nested), ChainError::Broken);
}

#[test]
fn an_indirect_table_with_more_descriptors_than_the_queue_has_is_found() {
    let long = |driver: &mut TestDriver| {
        let desc = driver.queues[0].desc;
        let table = driver.alloc(16 * 9);
        for i in 0..9 {
            driver.set_desc(table, i, 0x1000, 1, if i < 8 { DESC_NEXT } else { 0 }, i + 1);
        }
        driver.set_desc(desc, 0, table, 16 * 9, DESC_INDIRECT, 0);
        driver.expose(0, 0);
    };
    assert_eq!(fault(long), ChainError::TooManyDescriptors);
}

#[test]
fn addresses_outside_of_memory_are_found() {
    for (addr, len) in [
        (LOW_MEMORY as u64 - 1, 2),
        (LOW_MEMORY as u64, 1),
        (HIGH_MEMORY - 1, 1),
        (HIGH_MEMORY + (1 << 20), 1),
        // In the window for memory that a VM is given later, and was not.
        (HIGH_MEMORY + (1 << 30), 1),
        (u64::MAX, 1),
        (u64::MAX, 2),
    ] {
        let outside = |driver: &mut TestDriver| {
            driver.add(0, &[Buf::Write(addr, len)]);
        };
        assert_eq!(fault(outside), ChainError::OutOfRange(addr));
    }
}

#[test]
fn more_bytes_than_the_cap_are_found_whether_in_one_buffer_or_many() {
    let one = |driver: &mut TestDriver| {
        driver.add(0, &[Buf::Read(0, u32::MAX)]);
    };
    assert_eq!(fault(one), ChainError::TooLong);
    let many = |driver: &mut TestDriver| {
        driver.add(0, &[Buf::Read(0, 9 << 20), Buf::Read(0, 9 << 20)]);
    };
    assert_eq!(fault(many), ChainError::TooLong);
}

#[test]
fn an_empty_writable_buffer_still_ends_the_readable_part() {
    let order = |driver: &mut TestDriver| {
        driver.add(0, &[Buf::Write(0x1000, 0), Buf::Read(0x1000, 4)]);
    };
    assert_eq!(fault(order), ChainError::Order);
}
