//! Loads the guest kernel (an uncompressed ELF `vmlinux`) and the initrd into guest memory.
//!
//! Segments are read to their physical addresses (`p_paddr`). They are not mapped from the file, although that
//! would share its pages: Linux patches itself while it boots, and was seen to write to three quarters of the
//! pages of its text, so that each cost two page faults and ended up private after all (2,800 more VM exits and a
//! quarter of the boot time, on the virtual clock).
//!
//! Always true: nothing is written outside guest RAM above 1 MiB, whatever the file says, and no allocation is
//! sized by it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{Address, GuestAddress, GuestMemory as _};

use crate::memory::{self, GuestMemory, HIGH_START, PAGE};

/// Most program headers: a kernel has five.
const MAX_SEGMENTS: u16 = 64;

const HEADER_LENGTH: usize = 64;
const SEGMENT_LENGTH: usize = 56;

/// `p_type` of a segment to load.
const PT_LOAD: u32 = 1;
/// `e_machine` of x86-64.
const EM_X86_64: u16 = 62;

/// Errors of loading. The name of the file is put before them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the file cannot be read
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// the file is too short for what it says
    #[error(
        "is cut off: {what} at offset {offset:#x} lies beyond its end ({length:#x}); build or copy it again"
    )]
    Truncated {
        /// What is not there.
        what: &'static str,
        /// Where it should be.
        offset: u64,
        /// Length of the file.
        length: u64,
    },
    /// a compressed kernel
    #[error("is a compressed kernel (bzImage); give the uncompressed vmlinux of the same build")]
    BzImage,
    /// something else
    #[error("is not an ELF file; give an uncompressed vmlinux for x86-64")]
    NotElf,
    /// not for this processor or not executable
    #[error("is an ELF file, but not an x86-64 kernel ({0}); give an uncompressed vmlinux for x86-64")]
    WrongElf(&'static str),
    /// a segment has no room
    #[error(
        "has a segment at {start:#x} of {size:#x} bytes, which does not fit in the VM's memory \
         (1 MiB to {end:#x}); give the VM more memory"
    )]
    NoRoom {
        /// Guest-physical address.
        start: u64,
        /// Bytes in memory.
        size: u64,
        /// End of RAM below the gap.
        end: u64,
    },
    /// the entry point is nowhere
    #[error("has its entry point at {0:#x}, where it loads nothing; build it again")]
    Entry(u64),
    /// guest memory refuses
    #[error("cannot be put into guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Where a loaded kernel lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Guest-physical address of the first instruction.
    pub entry: GuestAddress,
    /// First address after all segments.
    pub end: GuestAddress,
}

/// Where a loaded initrd lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// Guest-physical address.
    pub start: GuestAddress,
    /// Length in bytes.
    pub length: u64,
}

/// A program header that has been found good.
struct Segment {
    offset: u64,
    start: GuestAddress,
    file_size: u64,
}

/// Loads the kernel.
pub fn load(memory: &GuestMemory, file: &File) -> Result<Kernel, Error> {
    let length = file.metadata()?.len();
    let (entry, table) = read_headers(file, length)?;
    let mut end = 0;
    let mut entry_found = false;
    let mut segments = Vec::with_capacity(table.len() / SEGMENT_LENGTH);
    for header in table.chunks_exact(SEGMENT_LENGTH) {
        if u32_at(header, 0) != PT_LOAD {
            continue;
        }
        let (offset, start) = (u64_at(header, 8), u64_at(header, 24));
        let (file_size, size) = (u64_at(header, 32), u64_at(header, 40));
        let ram_end = memory::low_end(memory).raw_value();
        let segment_end = start.checked_add(size).filter(|end| start >= HIGH_START && *end <= ram_end);
        let Some(segment_end) = segment_end else { return Err(Error::NoRoom { start, size, end: ram_end }) };
        if file_size > size {
            return Err(Error::WrongElf("a segment is larger in the file than in memory"));
        }
        if offset.checked_add(file_size).is_none_or(|end| end > length) {
            return Err(Error::Truncated { what: "a segment", offset, length });
        }
        end = end.max(segment_end);
        entry_found |= (start..segment_end).contains(&entry);
        segments.push(Segment { offset, start: GuestAddress(start), file_size });
    }
    if !entry_found {
        return Err(Error::Entry(entry));
    }
    for segment in &segments {
        read_file(memory, segment.start, file, segment.offset, segment.file_size)?;
    }
    Ok(Kernel { entry: GuestAddress(entry), end: GuestAddress(end) })
}

/// Entry point and raw program headers.
fn read_headers(file: &File, length: u64) -> Result<(u64, Vec<u8>), Error> {
    let mut header = [0u8; HEADER_LENGTH];
    let have = read_at_most(file, &mut header, 0)?;
    if have < 4 || header[..4] != *b"\x7fELF" {
        // Documentation/arch/x86/boot.rst: "HdrS" at 0x202.
        let mut magic = [0u8; 4];
        let compressed = read_at_most(file, &mut magic, 0x202)? == 4 && magic == *b"HdrS";
        return Err(if compressed { Error::BzImage } else { Error::NotElf });
    }
    if have < HEADER_LENGTH {
        return Err(Error::Truncated { what: "the ELF header", offset: 0, length });
    }
    if header[4..6] != [2, 1] {
        return Err(Error::WrongElf("not 64-bit little-endian"));
    }
    if u16_at(&header, 18) != EM_X86_64 {
        return Err(Error::WrongElf("for another processor"));
    }
    let (entry, offset) = (u64_at(&header, 24), u64_at(&header, 32));
    let (entry_size, count) = (u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(entry_size) != SEGMENT_LENGTH || count == 0 || count > MAX_SEGMENTS {
        return Err(Error::WrongElf("its program headers are not those of a kernel"));
    }
    let mut table = vec![0u8; usize::from(count) * SEGMENT_LENGTH];
    if read_at_most(file, &mut table, offset)? < table.len() {
        return Err(Error::Truncated { what: "the program headers", offset, length });
    }
    Ok((entry, table))
}

/// Reads a part of the file into guest RAM.
fn read_file(
    memory: &GuestMemory,
    start: GuestAddress,
    file: &File,
    offset: u64,
    length: u64,
) -> Result<(), Error> {
    if length == 0 {
        return Ok(());
    }
    let slice = memory.get_slice(start, length as usize)?;
    let guard = slice.ptr_guard_mut();
    let mut done = 0;
    while done < length {
        // SAFETY: the slice says that `length` bytes of guest RAM lie at the pointer, and `done` of them are
        // passed over; the kernel writes into them as a device would.
        let count = unsafe {
            libc::pread(
                file.as_raw_fd(),
                guard.as_ptr().add(done as usize).cast(),
                (length - done) as usize,
                (offset + done) as libc::off_t,
            )
        };
        match count {
            0 => return Err(Error::Truncated { what: "data", offset: offset + done, length: offset + done }),
            n if n > 0 => done += n as u64,
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e.into()),
            },
        }
    }
    Ok(())
}

/// Loads the initrd at the end of the RAM below the gap.
pub fn load_initrd(memory: &GuestMemory, file: &File, kernel: &Kernel) -> Result<Initrd, Error> {
    let length = file.metadata()?.len();
    let end = memory::low_end(memory).raw_value();
    let start = end.checked_sub(length).map(|start| start / PAGE * PAGE);
    let Some(start) = start.filter(|start| *start >= kernel.end.raw_value()) else {
        return Err(Error::NoRoom { start: kernel.end.raw_value(), size: length, end });
    };
    let start = GuestAddress(start);
    read_file(memory, start, file, 0, length)?;
    Ok(Initrd { start, length })
}

/// Reads until the buffer is full or the file ends.
fn read_at_most(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let Some(position) = offset.checked_add(done as u64).filter(|p| i64::try_from(*p).is_ok()) else {
            break;
        };
        match file.read_at(&mut buffer[done..], position) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};
    use vm_memory::Bytes;

    const ENTRY: u64 = 0x100_0000;

    struct Elf {
        segments: Vec<[u64; 5]>, // flags, offset, address, file size, memory size
        entry: u64,
        length: usize,
    }

    impl Default for Elf {
        fn default() -> Self {
            Elf { segments: vec![[5, 0x1000, ENTRY, 0x1800, 0x1800]], entry: ENTRY, length: 0x4000 }
        }
    }

    impl Elf {
        fn bytes(&self) -> Vec<u8> {
            let mut bytes: Vec<u8> = (0..self.length).map(|i| (i / 7 + i / 0x1000) as u8 | 1).collect();
            bytes[..64].fill(0);
            bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
            bytes[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
            bytes[24..32].copy_from_slice(&self.entry.to_le_bytes());
            bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
            bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
            bytes[56..58].copy_from_slice(&(self.segments.len() as u16).to_le_bytes());
            for (i, [flags, offset, address, file_size, size]) in self.segments.iter().enumerate() {
                let header = &mut bytes[64 + i * 56..][..56];
                header.fill(0);
                header[..4].copy_from_slice(&PT_LOAD.to_le_bytes());
                header[4..8].copy_from_slice(&(*flags as u32).to_le_bytes());
                header[8..16].copy_from_slice(&offset.to_le_bytes());
                header[24..32].copy_from_slice(&address.to_le_bytes());
                header[32..40].copy_from_slice(&file_size.to_le_bytes());
                header[40..48].copy_from_slice(&size.to_le_bytes());
            }
            bytes
        }
    }

    fn file(bytes: &[u8]) -> File {
        let mut file: File =
            nix::sys::memfd::memfd_create(c"elf", nix::sys::memfd::MFdFlags::empty()).unwrap().into();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    fn load_bytes(bytes: &[u8]) -> (GuestMemory, Result<Kernel, Error>) {
        let memory = memory::create(memory::MIN_BYTES).unwrap();
        let result = load(&memory, &file(bytes));
        (memory, result)
    }

    fn load_elf(elf: &Elf) -> Result<Kernel, Error> {
        load_bytes(&elf.bytes()).1
    }

    #[test]
    fn segments_arrive_whole_and_nothing_beside_them() {
        for shift in [0, 0x10] {
            let elf = Elf {
                segments: vec![[5, 0x1000 + shift, ENTRY, 0x1800, 0x2800]],
                entry: ENTRY + 0x27ff,
                ..Elf::default()
            };
            let bytes = elf.bytes();
            let (memory, kernel) = load_bytes(&bytes);
            assert_eq!(kernel.unwrap().end, GuestAddress(ENTRY + 0x2800));
            let mut loaded = vec![0; 0x3000];
            memory.read_slice(&mut loaded, GuestAddress(ENTRY)).unwrap();
            assert_eq!(loaded[..0x1800], bytes[0x1000 + shift as usize..][..0x1800]);
            assert!(loaded[0x1800..].iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn files_that_are_no_kernel_are_told_apart() {
        let mut bzimage = vec![0; 0x1000];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(matches!(load_bytes(&bzimage).1, Err(Error::BzImage)));
        assert!(matches!(load_bytes(b"").1, Err(Error::NotElf)));
        assert!(matches!(load_bytes(b"#!/bin/sh\n").1, Err(Error::NotElf)));
        assert!(matches!(load_bytes(b"\x7fELF").1, Err(Error::Truncated { .. })));
        let good = Elf::default().bytes();
        for (at, value) in [(4, 1), (5, 2), (18, 3), (54, 32), (56, 0), (57, 1)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(matches!(load_bytes(&bad).1, Err(Error::WrongElf(_))), "byte {at}");
        }
        assert!(matches!(load_bytes(&good[..100]).1, Err(Error::Truncated { .. })));
        let mut far = good.clone();
        far[32..40].fill(0xff);
        assert!(matches!(load_bytes(&far).1, Err(Error::Truncated { .. })));
    }

    #[test]
    fn segments_outside_of_ram_or_file_are_refused() {
        let with = |segment| load_elf(&Elf { segments: vec![segment], ..Elf::default() });
        for (address, size) in [
            (0, 0x2000),
            (HIGH_START - 1, 0x2000),
            (memory::MIN_BYTES - 0x1000, 0x2000),
            (memory::GAP_START, 0x2000),
            (u64::MAX, 0x2000),
            (ENTRY, u64::MAX),
            (ENTRY, memory::MIN_BYTES),
        ] {
            assert!(
                matches!(with([5, 0x1000, address, 0x1000, size]), Err(Error::NoRoom { .. })),
                "{address:#x}"
            );
        }
        assert!(matches!(with([5, 0x1000, ENTRY, 0x3001, 0x4000]), Err(Error::Truncated { .. })));
        assert!(matches!(with([5, u64::MAX, ENTRY, 0x1000, 0x1000]), Err(Error::Truncated { .. })));
        assert!(matches!(with([5, 0x1000, ENTRY, 0x2000, 0x1000]), Err(Error::WrongElf(_))));
    }

    #[test]
    fn an_entry_point_outside_of_all_segments_is_refused() {
        for entry in [0, ENTRY - 1, ENTRY + 0x1800, u64::MAX] {
            assert!(matches!(load_elf(&Elf { entry, ..Elf::default() }), Err(Error::Entry(_))), "{entry:#x}");
        }
    }

    #[test]
    fn a_random_byte_anywhere_in_the_headers_never_does_harm() {
        let good = Elf::default().bytes();
        for at in 0..64 + 56 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = load_bytes(&bad);
            }
        }
    }

    #[test]
    fn the_initrd_lies_at_the_end_and_never_on_the_kernel() {
        let memory = memory::create(memory::MIN_BYTES).unwrap();
        let kernel = Kernel { entry: GuestAddress(ENTRY), end: GuestAddress(memory::MIN_BYTES - 0x3000) };
        let initrd = load_initrd(&memory, &file(&[7; 0x1001]), &kernel).unwrap();
        assert_eq!(initrd, Initrd { start: GuestAddress(memory::MIN_BYTES - 0x2000), length: 0x1001 });
        let mut loaded = [0; 0x1002];
        memory.read_slice(&mut loaded, initrd.start).unwrap();
        assert_eq!(loaded[0x1000..], [7, 0]);
        let result = load_initrd(&memory, &file(&[7; 0x3001]), &kernel);
        assert!(matches!(result, Err(Error::NoRoom { .. })));
    }
}
