//! The queues of each device: descriptors, rings and the memory around them in every hostile form, while the device
//! works, and resets in between.

use std::os::unix::net::UnixDatagram;

use arbitrary::{Result, Unstructured};
use stockade_vmm::fuzzing;
use stockade_vmm::virtio::testing::{
    Buf, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, HIGH_MEMORY, TestDriver, TestLoop,
};

use super::fuse::{ShareDir, init_request};

/// Where rings and buffers of an input lie: so close to each other that they overlap.
const ARENA: u64 = 0x1000;

pub fn rng(input: &[u8]) {
    let io = TestLoop::new();
    let mut driver = TestDriver::started(fuzzing::rng(io.handle.clone()));
    let _ = attack(&mut driver, &io, &mut Unstructured::new(input));
    revive(&mut driver);
    let buffer = driver.alloc(8);
    driver.add(0, &[Buf::Write(buffer, 8)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 8);
}

pub fn vsock(input: &[u8]) {
    let io = TestLoop::new();
    let (device, _dialer) = fuzzing::vsock(3, io.handle.clone()).unwrap();
    let mut driver = TestDriver::started(device);
    let _ = attack(&mut driver, &io, &mut Unstructured::new(input));
    revive(&mut driver);
    // A connect of the guest's is answered.
    let answer = driver.alloc(64);
    driver.add(0, &[Buf::Write(answer, 64)]);
    let mut packet = [0; 44];
    (packet[0], packet[8], packet[28], packet[30]) = (3, 2, 1, 1);
    let packet = driver.put(&packet);
    driver.add(1, &[Buf::Read(packet, 44)]);
    driver.kick(1);
    assert_eq!(driver.wait_used(0).1, 44);
}

pub fn fs(input: &[u8]) {
    let io = TestLoop::new();
    let dir = ShareDir::new();
    let mut driver = TestDriver::started(fuzzing::fs(&dir.share()).unwrap());
    let _ = attack(&mut driver, &io, &mut Unstructured::new(input));
    revive(&mut driver);
    let request = driver.put(&init_request());
    let reply = driver.alloc(256);
    driver.add(1, &[Buf::Read(request, init_request().len() as u32), Buf::Write(reply, 256)]);
    driver.kick(1);
    assert!(driver.wait_used(1).1 > 16);
    dir.check();
}

pub fn net(input: &[u8]) {
    let io = TestLoop::new();
    let (ours, wire) = UnixDatagram::pair().unwrap();
    wire.set_nonblocking(true).unwrap();
    let mut driver = TestDriver::started(fuzzing::net(ours).unwrap());
    let mut bytes = Unstructured::new(input);
    for _ in 0..bytes.int_in_range(0..=4u8).unwrap_or(0) {
        let _ = wire.send(&[0; 512]);
    }
    let _ = attack(&mut driver, &io, &mut bytes);
    // What is on the wire may be all that a frame can be, but not more.
    let mut frame = vec![0; 1 << 17];
    let mut longest = 0;
    while let Ok(n) = wire.recv(&mut frame) {
        longest = longest.max(n);
    }
    assert!(longest <= 12 + 40 + 65_535 + 22, "a frame of {longest} bytes left the guest");
    revive(&mut driver);
    let frame = driver.put(&[0; 12 + 60]);
    driver.add(1, &[Buf::Read(frame, 72)]);
    driver.kick(1);
    driver.wait_used(1);
}

/// A driver that begins anew, in memory that nobody has touched.
fn revive(driver: &mut TestDriver) {
    driver.write(0x70, 0);
    driver.heap = 1 << 20;
    driver.start();
}

fn attack(driver: &mut TestDriver, io: &TestLoop, bytes: &mut Unstructured) -> Result<()> {
    driver.heap = ARENA;
    driver.write(0x70, 0);
    driver.start();
    let queues = driver.queues.len();
    while !bytes.is_empty() {
        let queue = bytes.choose_index(queues)?;
        let (size, desc) = (driver.queues[queue].size, driver.queues[queue].desc);
        match bytes.int_in_range(0..=11u8)? {
            0..=3 => {
                let index = bytes.int_in_range(0..=7u16)?;
                let flags = match bytes.int_in_range(0..=7u8)? {
                    0 | 1 => 0,
                    2 => DESC_NEXT,
                    3 | 4 => DESC_WRITE,
                    5 => DESC_NEXT | DESC_WRITE,
                    6 => DESC_INDIRECT,
                    _ => bytes.arbitrary()?,
                };
                let (address, length) = (address(bytes)?, length(bytes)?);
                let next = bytes.int_in_range(0..=8u16)?;
                driver.set_desc(desc, index, address, length, flags, next);
            }
            4 | 5 => {
                let head =
                    if bytes.ratio(9, 10)? { bytes.int_in_range(0..=7)? } else { bytes.arbitrary()? };
                driver.expose(queue, head);
            }
            6 | 7 => driver.kick(queue),
            8 => {
                // Into the rings and whatever else lies there.
                let ring = [desc, driver.queues[queue].avail, driver.queues[queue].used];
                let at = ring[bytes.choose_index(3)?] + u64::from(bytes.int_in_range(0..=64u16)?);
                let value: u16 = bytes.arbitrary()?;
                driver.store(value, at);
            }
            9 => {
                // Content for the device to read: a header of some kind.
                let at = ARENA + 4 * u64::from(bytes.arbitrary::<u16>()?);
                let data: [u8; 44] = bytes.arbitrary()?;
                for (offset, byte) in data.into_iter().enumerate() {
                    driver.store(byte, at + offset as u64);
                }
            }
            10 => io.barrier(),
            _ => {
                driver.write(0x70, 0);
                driver.heap = ARENA;
                driver.start();
            }
        }
        assert!(size.is_power_of_two());
    }
    for queue in 0..queues {
        driver.kick(queue);
    }
    io.barrier();
    Ok(())
}

fn address(bytes: &mut Unstructured) -> Result<u64> {
    Ok(match bytes.int_in_range(0..=9u8)? {
        0..=5 => ARENA + 4 * u64::from(bytes.arbitrary::<u16>()?),
        6 => HIGH_MEMORY + u64::from(bytes.arbitrary::<u16>()?),
        7 => (16 << 20) - u64::from(bytes.arbitrary::<u8>()?),
        8 => u64::MAX - u64::from(bytes.arbitrary::<u8>()?),
        _ => bytes.arbitrary()?,
    })
}

fn length(bytes: &mut Unstructured) -> Result<u32> {
    Ok(match bytes.int_in_range(0..=5u8)? {
        0 => 0,
        1 | 2 => bytes.arbitrary::<u8>()?.into(),
        3 => *bytes.choose(&[12, 40, 44, 56, 80, 4096])?,
        4 => bytes.arbitrary::<u16>()?.into(),
        _ => bytes.arbitrary()?,
    })
}
