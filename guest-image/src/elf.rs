//! Just enough of ELF to refuse an agent that could never be PID 1 of the guest, while it is being built
//! rather than as a kernel panic ("No working init found") at the first start.

/// Why a file is no static x86-64 program.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// No ELF magic, another class, byte order or machine.
    #[error("it is not an ELF file for x86-64")]
    NotElf,
    /// The program headers lie outside the file.
    #[error("its ELF program headers are cut off")]
    Truncated,
    /// It has a PT_INTERP segment, and the initrd holds no dynamic loader.
    #[error("it is dynamically linked; build it with `-C target-feature=+crt-static`")]
    Dynamic,
}

const IDENTITY: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
const EM_X86_64: u16 = 62;
const PT_INTERP: u32 = 3;

/// Checks that `file` is a statically linked x86-64 ELF program (ELF-64 object file format, figure 2 and 6).
pub fn check_static(file: &[u8]) -> Result<(), Error> {
    if !file.starts_with(&IDENTITY) || u16_at(file, 18) != Some(EM_X86_64) {
        return Err(Error::NotElf);
    }
    let headers = (|| {
        let offset = usize::try_from(u64_at(file, 32)?).ok()?;
        Some((offset, usize::from(u16_at(file, 54)?), usize::from(u16_at(file, 56)?)))
    })();
    let (offset, size, count) = headers.ok_or(Error::Truncated)?;
    for index in 0..count {
        let at = size.checked_mul(index).and_then(|n| n.checked_add(offset)).ok_or(Error::Truncated)?;
        if u32_at(file, at).ok_or(Error::Truncated)? == PT_INTERP {
            return Err(Error::Dynamic);
        }
    }
    Ok(())
}

fn bytes_at<const N: usize>(file: &[u8], at: usize) -> Option<[u8; N]> {
    file.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(file: &[u8], at: usize) -> Option<u16> {
    bytes_at(file, at).map(u16::from_le_bytes)
}

fn u32_at(file: &[u8], at: usize) -> Option<u32> {
    bytes_at(file, at).map(u32::from_le_bytes)
}

fn u64_at(file: &[u8], at: usize) -> Option<u64> {
    bytes_at(file, at).map(u64::from_le_bytes)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// An ELF header and one program header of this type, nothing behind them.
    pub fn program(segment_type: u32) -> Vec<u8> {
        let mut file = vec![0; 64 + 56];
        file[..6].copy_from_slice(&IDENTITY);
        file[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&1u16.to_le_bytes());
        file[64..68].copy_from_slice(&segment_type.to_le_bytes());
        file
    }

    #[test]
    fn accepts_a_static_program() {
        assert_eq!(check_static(&program(1)), Ok(()));
    }

    #[test]
    fn refuses_a_dynamic_program() {
        assert_eq!(check_static(&program(PT_INTERP)), Err(Error::Dynamic));
    }

    #[test]
    fn refuses_what_is_no_elf() {
        assert_eq!(check_static(b"#!/bin/sh\n"), Err(Error::NotElf));
        assert_eq!(check_static(b""), Err(Error::NotElf));
    }

    #[test]
    fn refuses_headers_outside_the_file() {
        let mut file = program(1);
        file[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(check_static(&file), Err(Error::Truncated));
        assert_eq!(check_static(&program(1)[..60]), Err(Error::Truncated));
    }
}
