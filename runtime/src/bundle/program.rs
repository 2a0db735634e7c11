//! Whether a program of the host can run in the guest, where nothing else of the host's is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// `e_ident` of a 64-bit little-endian ELF file (elf(5)).
const MAGIC: [u8; 6] = *b"\x7fELF\x02\x01";
/// `e_machine` of x86-64.
const X86_64: u16 = 62;
/// A program header that names a loader.
const PT_INTERP: u32 = 3;
/// Size of a program header; files with another are none of ours.
const HEADER_SIZE: usize = 56;

/// Whether the file is an x86-64 program that needs no loader and no interpreter.
pub fn is_static(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    let mut head = [0; 64];
    if file.read_exact_at(&mut head, 0).is_err() || !head.starts_with(&MAGIC) {
        return Ok(false);
    }
    let word = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    let (machine, size, count) = (word(18), usize::from(word(54)), word(56));
    let mut at = 0u64.to_le_bytes();
    at.copy_from_slice(&head[32..40]);
    if machine != X86_64 || size != HEADER_SIZE {
        return Ok(false);
    }
    for index in 0..u64::from(count) {
        let mut kind = [0; 4];
        let offset = u64::from_le_bytes(at).checked_add(index * HEADER_SIZE as u64);
        match offset.map(|offset| file.read_exact_at(&mut kind, offset)) {
            Some(Ok(())) if u32::from_le_bytes(kind) != PT_INTERP => {}
            _ => return Ok(false),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_is_static_and_a_shell_is_not() {
        assert!(is_static(&std::env::current_exe().unwrap()).unwrap());
        assert!(!is_static(Path::new("/bin/sh")).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("script");
        std::fs::write(&script, "#!/bin/sh\n").unwrap();
        assert!(!is_static(&script).unwrap());
        assert!(is_static(&dir.path().join("none")).is_err());
    }
}
