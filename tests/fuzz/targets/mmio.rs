//! The registers of a virtio device, written and read in any order and width.

use arbitrary::{Result, Unstructured};
use stockade_vmm::fuzzing;
use stockade_vmm::virtio::testing::{Buf, TestDriver, TestLoop};

/// Registers with a meaning (virtio 1.3, section 4.2.2), and what lies around them.
const REGISTERS: [u64; 32] = [
    0x000, 0x004, 0x008, 0x00c, 0x010, 0x014, 0x020, 0x024, 0x030, 0x034, 0x038, 0x044, 0x050, 0x060, 0x064,
    0x070, 0x080, 0x084, 0x090, 0x094, 0x0a0, 0x0a4, 0x0ac, 0x0b0, 0x0b4, 0x0b8, 0x0bc, 0x0c0, 0x0fc, 0x100,
    0x101, 0xffc,
];

/// Values that a step of the protocol wants.
const VALUES: [u32; 20] = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    11,
    15,
    16,
    64,
    79,
    128,
    143,
    0x1000,
    0x2000,
    0x3000,
    0xd000_0000,
    1 << 31,
    u32::MAX,
];

pub fn run(input: &[u8]) {
    let io = TestLoop::new();
    let mut driver = TestDriver::new(fuzzing::rng(io.handle.clone()));
    // An input that is used up ends it.
    let _ = attack(&mut driver, &mut Unstructured::new(input));
    // Whatever was done, a driver that begins anew finds a working device.
    driver.heap = 0x1000;
    driver.start();
    let buffer = driver.alloc(64);
    let head = driver.add(0, &[Buf::Write(buffer, 64)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0), (head, 64));
}

fn attack(driver: &mut TestDriver, bytes: &mut Unstructured) -> Result<()> {
    while !bytes.is_empty() {
        let offset = match bytes.ratio(9, 10)? {
            true => *bytes.choose(&REGISTERS)?,
            false => bytes.int_in_range(0..=0xfff)?,
        };
        let value = if bytes.ratio(3, 4)? { *bytes.choose(&VALUES)? } else { bytes.arbitrary()? };
        match bytes.int_in_range(0..=9u8)? {
            0..=5 => driver.write(offset, value),
            6 => {
                // As far as a driver comes by the rules, without which little else is reached.
                for status in [0, 1, 3] {
                    driver.write(0x70, status);
                }
                driver.accept_features(1 << 32 | u64::from(value & 1) << 29);
                driver.write(0x70, 11);
            }
            7 => {
                let size = bytes.int_in_range(0..=9)?;
                let [desc, avail, used] = [0x1000, 0x2000, 0x3000].map(|at| at + u64::from(value & 0xff));
                driver.configure_queue(0, size, desc, avail, used);
            }
            8 => {
                let width = bytes.int_in_range(0..=9usize)?;
                let data: [u8; 9] = bytes.arbitrary()?;
                driver.transport.write(offset, &data[..width]);
            }
            _ => {
                let width = bytes.int_in_range(0..=9usize)?;
                driver.transport.read(offset, &mut [0xee; 9][..width]);
            }
        }
        let status = driver.status();
        assert!(status & !(15 | 0x40 | 128) == 0, "a status that does not exist: {status:#x}");
    }
    Ok(())
}
