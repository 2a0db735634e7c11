//! The zero page: what the 64-bit Linux boot protocol hands to the kernel beside its registers
//! (`Documentation/arch/x86/boot.rst`, `zero-page.rst`).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryRegion,
};

use crate::kernel::Initrd;
use crate::memory::{BOOT_PARAMS, CMDLINE, GuestMemory, HIGH_START, LOW_END};

/// `type` of usable RAM in the e820 map.
const E820_RAM: u32 = 1;
/// `type` of what the kernel must leave alone.
const E820_RESERVED: u32 = 2;

/// `boot_flag`: the signature of a boot sector.
const BOOT_FLAG: u16 = 0xaa55;
/// `header`: "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// `type_of_loader`: one without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the kernel lies at or above 1 MiB.
const LOADED_HIGH: u8 = 1;

/// The page as it lies in guest memory.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct ZeroPage(boot_params);

// SAFETY: `boot_params` is a packed C structure of integers; every bit pattern is a value of it.
unsafe impl ByteValued for ZeroPage {}

/// Writes command line and zero page.
pub fn write(memory: &GuestMemory, cmdline: &str, initrd: &Initrd) -> Result<(), GuestMemoryError> {
    memory.write_slice(&[cmdline.as_bytes(), b"\0"].concat(), CMDLINE)?;

    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags = LOADED_HIGH;
    params.hdr.cmd_line_ptr = CMDLINE.raw_value() as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    params.hdr.ramdisk_image = initrd.start.raw_value() as u32;
    params.hdr.ramdisk_size = initrd.length as u32;
    let map = e820(memory);
    params.e820_entries = map.len() as u8;
    params.e820_table[..map.len()].copy_from_slice(&map);
    memory.write_obj(ZeroPage(params), BOOT_PARAMS)
}

/// The memory map: RAM, with the hole below 1 MiB that every PC has.
fn e820(memory: &GuestMemory) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, type_| boot_e820_entry { addr: start, size: end - start, type_ };
    let mut map = vec![entry(0, LOW_END, E820_RAM), entry(LOW_END, HIGH_START, E820_RESERVED)];
    for region in memory.iter() {
        let end = region.start_addr().raw_value() + region.len();
        let start = region.start_addr().max(GuestAddress(HIGH_START)).raw_value();
        map.push(entry(start, end, E820_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{self, GAP_END, GAP_START};

    fn map(bytes: u64) -> Vec<(u64, u64, u32)> {
        e820(&memory::create(bytes).unwrap()).iter().map(|e| (e.addr, e.addr + e.size, e.type_)).collect()
    }

    #[test]
    fn the_map_has_all_ram_and_nothing_of_the_gap() {
        assert_eq!(map(256 << 20), [(0, LOW_END, 1), (LOW_END, HIGH_START, 2), (HIGH_START, 256 << 20, 1)]);
        assert_eq!(
            map(5 << 30)[2..],
            [(HIGH_START, GAP_START, 1), (GAP_END, GAP_END + (5 << 30) - GAP_START, 1)]
        );
    }

    #[test]
    fn the_fields_lie_where_the_boot_protocol_says() {
        let memory = memory::create(memory::MIN_BYTES).unwrap();
        let initrd = Initrd { start: GuestAddress(0x123_4000), length: 0x5678 };
        write(&memory, "a=b", &initrd).unwrap();
        let word = |offset: u64| memory.read_obj::<u32>(BOOT_PARAMS.unchecked_add(offset)).unwrap();
        assert_eq!(word(0x202), HEADER_MAGIC);
        assert_eq!(word(0x218), 0x123_4000);
        assert_eq!(word(0x21c), 0x5678);
        assert_eq!(u64::from(word(0x228)), CMDLINE.raw_value());
        assert_eq!(memory.read_obj::<u8>(BOOT_PARAMS.unchecked_add(0x1e8)).unwrap(), 3);
        assert_eq!(memory.read_obj::<u64>(BOOT_PARAMS.unchecked_add(0x2d0)).unwrap(), 0);
        assert_eq!(memory.read_obj::<u64>(BOOT_PARAMS.unchecked_add(0x2d8)).unwrap(), LOW_END);
        // The sentinel: not zero would make the kernel throw away most of the page.
        assert_eq!(memory.read_obj::<u8>(BOOT_PARAMS.unchecked_add(0x1ef)).unwrap(), 0);
        let mut line = [0xffu8; 4];
        memory.read_slice(&mut line, CMDLINE).unwrap();
        assert_eq!(&line, b"a=b\0");
    }
}
