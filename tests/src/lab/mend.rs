//! Takes one store out of QEMU, with which it gives a guest of the lab's host an interrupt twice.
//!
//! `helper_vmrun` (target/i386/tcg/sysemu/svm_helper.c) delivers the interrupt that KVM injects, and leaves its
//! vector in `exception_index` as if it were still to be delivered. Mostly a VM exit soon puts something else
//! there. But when QEMU leaves its inner loop before that, because another of its threads kicks the CPU or, on the
//! virtual clock, a time slice ends, it finds the vector and delivers it once more, whether or not the guest has
//! interrupts enabled. Then Linux runs its timer interrupt inside its timer interrupt, and waits for ever for a
//! lock that it holds itself: the vCPU is busy, and nothing else is. Seen in one of ten to thirty VM starts on
//! the virtual clock and in one of some two thousand on the other, mostly where the build machine had much to do.
//!
//! Nothing needs that store, since the interrupt is delivered by a call. So it becomes a `nop`, in the memory of
//! the process and long before its first VMRUN; the file stays as it is. It is found in Debian's QEMU 7.2, 10.0 and
//! 11.1; one in which it is not there just once is left alone.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::process::Child;

/// `mov %esi, OFFSET(%rbx)`: the store, whose operand is also the second argument of the call that follows.
const STORE: [u8; 2] = [0x89, 0xb3];
/// A `nop` of the store's six bytes.
const NOP: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];
/// `movl $0, OFFSET(%rbx)`, exception_is_int, up to its offset.
const CLEAR_IS_INT: [u8; 2] = [0xc7, 0x83];
/// `movq $-1, OFFSET(%rbx)`, exception_next_eip, up to its offset.
const SET_NEXT_EIP: [u8; 3] = [0x48, 0xc7, 0x83];
/// `mov $1, %edx; mov %rbx, %rdi; call`: do_interrupt_x86_hardirq(env, vector, 1).
const DELIVER: [u8; 9] = [0xba, 1, 0, 0, 0, 0x48, 0x89, 0xdf, 0xe8];
/// Within how many bytes after the store the call comes: a look at the log level is between.
const DELIVER_WITHIN: usize = 64;

/// Mends a QEMU that has just been started; else says why it is as it was.
pub(super) fn mend(qemu: &Child) -> Result<(), String> {
    let process = format!("/proc/{}", qemu.id());
    let program = fs::read_link(format!("{process}/exe")).map_err(cannot("see which program it is"))?;
    let maps = fs::read_to_string(format!("{process}/maps")).map_err(cannot("read its memory map"))?;
    let (begin, length) =
        code(&maps, &program.to_string_lossy()).ok_or("its code is not in its memory map")?;
    let memory = File::options().read(true).write(true).open(format!("{process}/mem"));
    let memory = memory.map_err(cannot("open its memory"))?;
    let mut text = vec![0; length];
    memory.read_exact_at(&mut text, begin).map_err(cannot("read its code"))?;
    match stores(&text)[..] {
        [at] => memory.write_all_at(&NOP, begin + at as u64).map_err(cannot("write to its code")),
        ref found => Err(format!("the store is there {} times", found.len())),
    }
}

/// How a failed call reads.
fn cannot(what: &'static str) -> impl FnOnce(io::Error) -> String {
    move |error| format!("cannot {what}: {error}")
}

/// Where the code of a program begins in a process, and its length in bytes, by the lines of /proc/PID/maps.
fn code(maps: &str, program: &str) -> Option<(u64, usize)> {
    let line = maps.lines().find(|line| line.contains(" r-xp ") && line.ends_with(program))?;
    let (begin, end) = line.split_once(' ')?.0.split_once('-')?;
    let (begin, end) = (u64::from_str_radix(begin, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    Some((begin, (end - begin) as usize))
}

/// Every place of the store in `text`.
fn stores(text: &[u8]) -> Vec<usize> {
    let places = (0..text.len()).filter(|at| text[*at..].starts_with(&STORE));
    places.filter(|at| is_store(&text[*at..])).collect()
}

/// Whether `text` begins with the store and what follows it.
fn is_store(text: &[u8]) -> bool {
    let offset = |at: usize| Some(i32::from_le_bytes(text.get(at..at + 4)?.try_into().ok()?));
    let has = |at: usize, bytes: &[u8]| text.get(at..).is_some_and(|rest| rest.starts_with(bytes));
    // Six bytes, then ten, then eleven; the two fields stand beside each other.
    let fields =
        has(6, &CLEAR_IS_INT) && offset(12) == Some(0) && has(16, &SET_NEXT_EIP) && offset(23) == Some(-1);
    let call = text.get(27..).unwrap_or_default();
    let call = &call[..call.len().min(DELIVER_WITHIN)];
    fields
        && offset(8).zip(offset(19)).is_some_and(|(is_int, next_eip)| next_eip == is_int.wrapping_add(4))
        && call.windows(DELIVER.len()).any(|window| window == DELIVER)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Debian's QEMU 7.2 has it, from the store to the call.
    const DEBIAN: &str = "89b354efffff c7838433000000000000 48c78388330000ffffffff f605ba45b60002 0f856c010000 \
                          ba01000000 4889df e8a74f0500";

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<char> = hex.chars().filter(|digit| !digit.is_whitespace()).collect();
        digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(&pair.iter().collect::<String>(), 16).unwrap())
            .collect()
    }

    #[test]
    fn store_is_found_where_it_stands() {
        let text = [vec![0x90; 33], bytes(DEBIAN), vec![0xc3; 10]].concat();
        assert_eq!(stores(&text), [33]);
    }

    #[test]
    fn store_of_an_exception_which_is_still_to_be_delivered_is_another() {
        // r12d and not esi, and no call follows.
        let exception = "4489a354efffff c7838433000000000000 48c78388330000ffffffff f6056b44b60002 7558 4889ef e800000000";
        assert!(stores(&bytes(exception)).is_empty());
        let no_call = DEBIAN.replace("ba01000000 4889df", "ba02000000 4889df");
        assert!(stores(&bytes(&no_call)).is_empty());
    }

    #[test]
    fn code_that_ends_early_has_no_store() {
        let whole = bytes(DEBIAN);
        for length in 0..whole.len() - 4 {
            assert!(stores(&whole[..length]).is_empty(), "{length} bytes");
        }
    }

    #[test]
    fn code_is_what_may_be_run_of_the_program() {
        let maps = "55d0-55e0 r--p 0 00:01 7 /usr/bin/qemu\n55e0-56f0 r-xp 0 00:01 7 /usr/bin/qemu\n\
                    7f00-7f10 r-xp 0 00:01 9 /usr/lib/libc.so\n";
        assert_eq!(code(maps, "/usr/bin/qemu"), Some((0x55e0, 0x110)));
        assert_eq!(code(maps, "/usr/bin/other"), None);
    }
}
