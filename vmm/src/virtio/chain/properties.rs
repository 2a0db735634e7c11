//! What always holds of a checked chain, whatever descriptors a driver wrote: compared with a walk of our own that
//! follows the specification and nothing else.

use proptest::prelude::*;
use vm_memory::GuestMemory as _;

use super::*;
use crate::virtio::queue::RingError;
use crate::virtio::testing::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, HIGH_MEMORY, LOW_MEMORY, QueueTap};

const SIZE: u16 = 8;
/// Where indirect tables lie, if the driver means them.
const TABLE: u64 = 0x8000;

#[derive(Debug, Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

fn any_address() -> impl Strategy<Value = u64> {
    let end = LOW_MEMORY as u64;
    prop_oneof![
        4 => 0..end,
        1 => end - 64..end + 64,
        1 => HIGH_MEMORY..HIGH_MEMORY + (1 << 20) + 64,
        1 => Just(TABLE),
        1 => u64::MAX - 64..=u64::MAX,
        1 => any::<u64>(),
    ]
}

fn any_descriptor() -> impl Strategy<Value = Descriptor> {
    let length = prop_oneof![4 => 0..4096u32, 1 => Just(0), 1 => 0..(32u32 << 20), 1 => any::<u32>()];
    let flags = prop_oneof![
        4 => Just(DESC_NEXT),
        4 => Just(DESC_NEXT | DESC_WRITE),
        2 => Just(0),
        2 => Just(DESC_WRITE),
        1 => Just(DESC_INDIRECT),
        1 => any::<u16>(),
    ];
    let next = prop_oneof![4 => 0..SIZE, 1 => any::<u16>()];
    (any_address(), length, flags, next).prop_map(|(address, length, flags, next)| Descriptor {
        address,
        length,
        flags,
        next,
    })
}

/// The buffers of the chain that begins at the first descriptor, if it is one by the specification's rules.
fn walk(table: &[Descriptor], memory: &GuestMemory) -> Option<(Vec<Descriptor>, Vec<Descriptor>)> {
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    let mut at = 0u16;
    let mut bytes = 0u64;
    // Longer than the table is a loop.
    for _ in 0..SIZE {
        let descriptor = *table.get(usize::from(at))?;
        if descriptor.flags & DESC_INDIRECT != 0 {
            return None;
        }
        bytes += u64::from(descriptor.length);
        let inside = descriptor.length == 0
            || memory.check_range(vm_memory::GuestAddress(descriptor.address), descriptor.length as usize);
        if !inside || bytes > MAX_CHAIN_BYTES as u64 {
            return None;
        }
        if descriptor.flags & DESC_WRITE != 0 {
            writable.push(descriptor);
        } else if writable.is_empty() {
            readable.push(descriptor);
        } else {
            return None;
        }
        if descriptor.flags & DESC_NEXT == 0 {
            return Some((readable, writable));
        }
        at = descriptor.next;
    }
    None
}

fn total(descriptors: &[Descriptor]) -> usize {
    descriptors.iter().map(|descriptor| descriptor.length as usize).sum()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_chain_is_taken_if_and_only_if_the_specification_allows_it(
        mut table in prop::collection::vec(any_descriptor(), usize::from(SIZE)),
    ) {
        // Indirect tables are the other property's.
        table.iter_mut().for_each(|descriptor| descriptor.flags &= !DESC_INDIRECT);
        let (mut driver, mut queue) = QueueTap::started(SIZE);
        let at = driver.queues[0].desc;
        for (index, d) in table.iter().enumerate() {
            driver.set_desc(at, index as u16, d.address, d.length, d.flags, d.next);
        }
        driver.expose(0, 0);
        let expected = walk(&table, &driver.memory);
        match (queue.pop(&driver.memory), expected) {
            (Ok(Some(chain)), Some((readable, writable))) => {
                prop_assert_eq!(usize::from(chain.descriptors()), readable.len() + writable.len());
                prop_assert_eq!(chain.readable.remaining(), total(&readable));
                prop_assert_eq!(chain.writable.remaining(), total(&writable));
            }
            (Err(RingError::Chain(_)), None) => {}
            (got, expected) => prop_assert!(false, "{:?} instead of {:?}", got, expected),
        }
    }

    #[test]
    fn whatever_is_taken_lies_in_guest_memory_and_is_no_longer_than_the_limits(
        table in prop::collection::vec(any_descriptor(), usize::from(SIZE)),
        indirect in prop::collection::vec(any_descriptor(), 1..20),
        length in prop_oneof![3 => (0..20u32).prop_map(|n| 16 * n), 1 => any::<u32>()],
    ) {
        let (mut driver, mut queue) = QueueTap::started(SIZE);
        let at = driver.queues[0].desc;
        for (index, d) in table.iter().enumerate() {
            driver.set_desc(at, index as u16, d.address, d.length, d.flags, d.next);
        }
        driver.set_desc(at, 0, TABLE, length, DESC_INDIRECT, 0);
        for (index, d) in indirect.iter().enumerate() {
            driver.set_desc(TABLE, index as u16, d.address, d.length, d.flags, d.next);
        }
        driver.expose(0, 0);
        if let Ok(Some(mut chain)) = queue.pop(&driver.memory) {
            prop_assert!(chain.descriptors() <= SIZE);
            for buffers in [&mut chain.readable, &mut chain.writable] {
                prop_assert!(buffers.remaining() <= MAX_CHAIN_BYTES);
                let mut iovecs = Vec::new();
                let bytes = buffers.push_iovecs(&mut iovecs, usize::MAX);
                prop_assert_eq!(bytes, buffers.remaining());
                for iovec in iovecs {
                    let inside = driver.memory.iter().any(|region| {
                        use vm_memory::GuestMemoryRegion as _;
                        let begin = region.get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap() as usize;
                        let end = begin + region.len() as usize;
                        (begin..end).contains(&(iovec.iov_base as usize))
                            && iovec.iov_base as usize + iovec.iov_len <= end
                    });
                    prop_assert!(inside);
                }
            }
        }
    }

    #[test]
    fn a_split_at_any_place_loses_and_repeats_nothing(
        lengths in prop::collection::vec(0..5000u32, 1..8),
        places in prop::collection::vec(0..6000usize, 1..8),
    ) {
        use crate::virtio::testing::Buf;
        let (mut driver, mut queue) = QueueTap::started(SIZE);
        let whole: Vec<u8> = (0..lengths.iter().sum::<u32>()).map(|n| (n % 251) as u8).collect();
        let mut rest = &whole[..];
        let bufs: Vec<_> = lengths
            .iter()
            .map(|length| {
                let (piece, after) = rest.split_at(*length as usize);
                rest = after;
                Buf::Read(driver.put(piece), *length)
            })
            .collect();
        driver.add(0, &bufs);
        let mut chain = queue.pop(&driver.memory).unwrap().unwrap();
        let mut got = Vec::new();
        for place in places {
            let before = chain.readable.remaining();
            match chain.readable.split_front(place) {
                Some(mut front) => {
                    let mut bytes = vec![0; place];
                    prop_assert_eq!((front.remaining(), front.read(&mut bytes)), (place, place));
                    got.extend(bytes);
                }
                None => prop_assert!(place > before && chain.readable.remaining() == before),
            }
        }
        let mut bytes = vec![0; chain.readable.remaining()];
        chain.readable.read(&mut bytes);
        got.extend(bytes);
        prop_assert_eq!(got, whole);
    }
}
