use std::cell::RefCell;

use vm_memory::Bytes;

use super::*;
use crate::memory::create;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn set(memory: &GuestMemory, bytes: u64) -> Result<(), Error> {
    memory.set_added(bytes, &|_| Ok(()))
}

#[test]
fn the_window_lies_above_all_memory_and_is_made_of_what_the_kernel_takes() {
    for (began, start, block) in [
        (64 * MIB, 4 * GIB, 128 * MIB),
        (GAP_START, 4 * GIB, 128 * MIB),
        (GAP_START + 2 * MIB, 4 * GIB + 128 * MIB, 128 * MIB),
        (5 * GIB, 4 * GIB + 5 * GIB - GAP_START, 128 * MIB),
        (LARGE_MACHINE - 4 * GIB + GAP_START, LARGE_MACHINE, 2 * GIB),
        (LARGE_MACHINE - 4 * GIB + GAP_START + 2 * MIB, LARGE_MACHINE + 128 * MIB, 128 * MIB),
        (LARGE_MACHINE - 3 * GIB + GAP_START, LARGE_MACHINE + GIB, GIB),
    ] {
        assert_eq!(Window::of(began), Window { start, block }, "{began:#x}");
    }
    assert_eq!(Window::of(64 * MIB).blocks_for(129 * MIB), 256 * MIB);
    assert_eq!(Window::of(64 * MIB).blocks_for(0), 0);
}

#[test]
fn what_was_added_is_memory_and_what_was_not_is_nothing() {
    let memory = create(64 * MIB).unwrap();
    let Window { start, block } = Window::of(64 * MIB);
    let at = |offset: u64| GuestAddress(start + offset);
    assert!(memory.write_obj(1u8, at(0)).is_err());
    let device = memory.clone();
    set(&memory, 2 * block).unwrap();
    device.write_obj(7u64, at(2 * block - 8)).unwrap();
    assert_eq!(memory.read_obj::<u64>(at(2 * block - 8)).unwrap(), 7);
    assert!(
        device.write_obj(7u64, at(2 * block - 4)).is_err() && device.read_obj::<u8>(at(2 * block)).is_err()
    );
    assert_eq!(memory.iter().count(), 3);
    // From one block into the next, as a device's buffer may.
    device.write_slice(&[9; 64], at(block - 32)).unwrap();
    assert!(device.check_range(at(block - 32), 64));
    let lengths: Vec<usize> =
        device.get_slices(at(block - 32), 64).map(|slice| slice.unwrap().len()).collect();
    assert_eq!(lengths, [32, 32]);
}

#[test]
fn what_is_taken_away_is_gone_for_devices_and_comes_back_empty() {
    let memory = create(64 * MIB).unwrap();
    let Window { start, block } = Window::of(64 * MIB);
    let at = GuestAddress(start + block);
    set(&memory, 2 * block).unwrap();
    memory.write_obj(7u64, at).unwrap();
    let held = memory.get_slice(at, 8).unwrap();
    set(&memory, block).unwrap();
    assert!(memory.read_obj::<u64>(at).is_err() && memory.read_obj::<u64>(GuestAddress(start)).is_ok());
    // Who has been told of it before does no harm.
    assert_eq!(held.read_obj::<u64>(0).unwrap(), 0);
    set(&memory, 2 * block).unwrap();
    assert_eq!(memory.read_obj::<u64>(at).unwrap(), 0);
}

#[test]
fn kvm_is_told_of_each_block_by_a_slot_of_its_own() {
    let memory = create(5 * GIB).unwrap();
    let Window { start, block } = Window::of(5 * GIB);
    let told = RefCell::new(Vec::new());
    let tell = |slot: kvm_userspace_memory_region| {
        assert_eq!(slot.userspace_addr % (2 * MIB), 0);
        told.borrow_mut().push((slot.slot, slot.guest_phys_addr, slot.memory_size));
        Ok(())
    };
    memory.set_added(2 * block, &tell).unwrap();
    memory.set_added(2 * block, &tell).unwrap();
    memory.set_added(0, &tell).unwrap();
    let second = start + block;
    assert_eq!(told.take(), [(2, start, block), (3, second, block), (3, second, 0), (2, start, 0)]);
}

#[test]
fn a_host_that_refuses_leaves_what_there_was() {
    let memory = create(64 * MIB).unwrap();
    let Window { start, block } = Window::of(64 * MIB);
    set(&memory, block).unwrap();
    let third = start + 2 * block;
    let refuse = |slot: kvm_userspace_memory_region| match (slot.guest_phys_addr == third, slot.memory_size) {
        (true, 1..) => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
        _ => Ok(()),
    };
    assert!(matches!(memory.set_added(4 * block, &refuse), Err(Error::Kvm(_))));
    assert_eq!(memory.iter().count(), 2);
    set(&memory, 4 * block).unwrap();
    for bad in [block + 1, block / 2, Window::of(64 * MIB).size() + block, u64::MAX] {
        assert!(matches!(set(&memory, bad), Err(Error::Added { .. })), "{bad}");
    }
    assert_eq!(memory.iter().count(), 5);
}
