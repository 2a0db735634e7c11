//! The seccomp filter of a container, for its init and for execs.
//!
//! Made and loaded here because libcontainer 0.7 does two things otherwise than runc: it takes mask and value of a
//! masked comparison for each other, and it answers system calls that are newer than any the filter names as the
//! filter's default says. C libraries try new calls first and fall back when the kernel does not know them, which a
//! default of EPERM would hide from them. So, as under runc, a few instructions stand before the filter and answer
//! such calls with ENOSYS. What the filter names by a number of its own is for libseccomp to know.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};

/// Instructions that the kernel takes (BPF_MAXINSNS, linux/bpf_common.h).
const LENGTH_MAX: usize = 4096;
/// Bytes of an instruction.
const INSTRUCTION: usize = 8;
/// Offsets in `struct seccomp_data` (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// Numbers of x32 have this bit (asm/unistd.h), and its calls x86-64's architecture.
const X32_BIT: u32 = 0x4000_0000;
/// linux/audit.h: what `struct seccomp_data` says of a call.
const AUDIT_X86_64: u32 = 0xc000_003e;
const AUDIT_I386: u32 = 0x4000_0003;

/// A filter as the kernel takes it.
pub struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

impl Filter {
    /// Makes the filter that a configuration describes.
    pub fn of(seccomp: &LinuxSeccomp) -> Result<Self, String> {
        let mut program = newer_calls(seccomp);
        let described = describe(seccomp).map_err(|e| format!("linux.seccomp: {e}"))?;
        program.extend(described.chunks_exact(INSTRUCTION).map(instruction));
        if program.len() > LENGTH_MAX {
            return Err(format!(
                "linux.seccomp comes to {} instructions, and the kernel takes {LENGTH_MAX}",
                program.len()
            ));
        }
        let flag = |flag: &LinuxSeccompFilterFlag| match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            // About SCMP_ACT_NOTIFY, which is refused.
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        };
        let flags = seccomp.flags().iter().flatten().map(flag).fold(0, |all, flag| all | flag);
        Ok(Filter { program, flags })
    }

    /// Puts this thread, and what it becomes, under the filter. Needs no_new_privs or CAP_SYS_ADMIN.
    pub fn load(&self) -> Result<(), Errno> {
        let program =
            libc::sock_fprog { len: self.program.len() as u16, filter: self.program.as_ptr().cast_mut() };
        // SAFETY: seccomp(2) reads the program, which lives until it returns.
        let result = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, self.flags, &raw const program)
        };
        Errno::result(result).map(drop)
    }
}

fn instruction(bytes: &[u8]) -> libc::sock_filter {
    let byte = |n: usize| bytes.get(n).copied().unwrap_or(0);
    libc::sock_filter {
        code: u16::from_le_bytes([byte(0), byte(1)]),
        jt: byte(2),
        jf: byte(3),
        k: u32::from_le_bytes([byte(4), byte(5), byte(6), byte(7)]),
    }
}

/// The filter in libseccomp's words, as bytes of a program.
fn describe(seccomp: &LinuxSeccomp) -> Result<Vec<u8>, String> {
    let text = |e: libseccomp::error::SeccompError| e.to_string();
    let default = action(seccomp.default_action(), seccomp.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default).map_err(text)?;
    for arch in seccomp.architectures().iter().flatten() {
        filter.add_arch(architecture(*arch)).map_err(text)?;
    }
    for rule in seccomp.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        // libseccomp refuses rules that say what is so anyway.
        if action == default {
            continue;
        }
        let conditions: Vec<_> = rule.args().iter().flatten().map(condition).collect();
        for name in rule.names() {
            // One that libseccomp does not know is newer than it, or another architecture's.
            let Ok(call) = ScmpSyscall::from_name(name) else { continue };
            if conditions.is_empty() {
                filter.add_rule(action, call).map_err(text)?;
            } else if has_twins(rule.args()) {
                // Comparisons of one argument stand for alternatives, as under runc.
                for condition in &conditions {
                    filter.add_rule_conditional(action, call, &[*condition]).map_err(text)?;
                }
            } else {
                filter.add_rule_conditional(action, call, &conditions).map_err(text)?;
            }
        }
    }
    let mut file = File::from(memfd_create(c"filter", MFdFlags::MFD_CLOEXEC).map_err(|e| e.to_string())?);
    filter.export_bpf(&file).map_err(text)?;
    let mut program = Vec::new();
    file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_end(&mut program)).map_err(|e| e.to_string())?;
    Ok(program)
}

fn has_twins(args: &Option<Vec<LinuxSeccompArg>>) -> bool {
    let args = args.as_deref().unwrap_or_default();
    args.iter().enumerate().any(|(n, arg)| args.iter().skip(n + 1).any(|other| other.index() == arg.index()))
}

fn condition(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let (value, two) = (arg.value(), arg.value_two().unwrap_or(0));
    let (op, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        // The first is the mask, the second what is to be left of the argument.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(value), two),
    };
    ScmpArgCompare::new(arg.index() as u32, op, value)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, String> {
    let errno = errno.map_or(libc::EPERM, |errno| errno as i32);
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno),
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(errno.try_into().map_err(|_| format!("errnoRet {errno} is too large"))?)
        }
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => {
            return Err("SCMP_ACT_NOTIFY has its listener on the host".into());
        }
    })
}

fn architecture(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

/// Instructions that answer calls newer than any that the filter names with ENOSYS and leave others to what follows.
/// None for a filter that lets pass what it does not name.
fn newer_calls(seccomp: &LinuxSeccomp) -> Vec<libc::sock_filter> {
    use LinuxSeccompAction::{ScmpActAllow, ScmpActLog, ScmpActTrace};
    if matches!(seccomp.default_action(), ScmpActAllow | ScmpActLog | ScmpActTrace) {
        return Vec::new();
    }
    let newest = |arch| newest_named(seccomp, arch);
    let has = |wanted| seccomp.architectures().iter().flatten().any(|arch| *arch == wanted);
    let load = |offset| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let answer = statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32);
    // For one architecture: with its number loaded, whether it is newer. Three instructions.
    let judge = |number: u32| {
        [
            load(NUMBER),
            // Past the answer, which is the next.
            jump(libc::BPF_JGT, number, 0, 1),
            answer,
        ]
    };
    let mut program = Vec::new();
    if let Some(number) = newest(ScmpArch::X8664) {
        program.push(load(ARCHITECTURE));
        // Past what is for this architecture: to load the number, to look for the bit, and to judge.
        program.push(jump(libc::BPF_JEQ, AUDIT_X86_64, 0, 5));
        program.push(load(NUMBER));
        program.push(jump(libc::BPF_JGE, X32_BIT, 3, 0));
        program.extend(judge(number));
    }
    if let Some(number) = newest(ScmpArch::X86).filter(|_| has(Arch::ScmpArchX86)) {
        program.push(load(ARCHITECTURE));
        program.push(jump(libc::BPF_JEQ, AUDIT_I386, 0, 3));
        program.extend(judge(number));
    }
    program
}

/// The highest number of a call that the filter names.
fn newest_named(seccomp: &LinuxSeccomp, arch: ScmpArch) -> Option<u32> {
    let names = seccomp.syscalls().iter().flatten().flat_map(|rule| rule.names());
    let number = |name: &String| {
        let call = ScmpSyscall::from_name_by_arch(name, arch).ok()?;
        u32::try_from(call.as_raw_syscall()).ok()
    };
    names.filter_map(number).max()
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn jump(test: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: (libc::BPF_JMP | test | libc::BPF_K) as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Runs a program as the kernel does, as far as these use its language.
    fn run(program: &[libc::sock_filter], arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(number.to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend(0u64.to_le_bytes());
        args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
        let word = |at: u32| u32::from_le_bytes(data[at as usize..][..4].try_into().unwrap());
        let (mut at, mut a) = (0, 0u32);
        loop {
            let i = &program[at];
            at += 1;
            let code = u32::from(i.code);
            match code & 7 {
                libc::BPF_LD => a = word(i.k),
                libc::BPF_RET => return i.k,
                libc::BPF_ALU if code & 0xf0 == libc::BPF_AND => a &= i.k,
                libc::BPF_JMP => {
                    let holds = match code & 0xf0 {
                        libc::BPF_JA => {
                            at += i.k as usize;
                            continue;
                        }
                        libc::BPF_JEQ => a == i.k,
                        libc::BPF_JGT => a > i.k,
                        libc::BPF_JGE => a >= i.k,
                        libc::BPF_JSET => a & i.k != 0,
                        other => panic!("jump {other:#x}"),
                    };
                    at += usize::from(if holds { i.jt } else { i.jf });
                }
                other => panic!("class {other}"),
            }
        }
    }

    fn filter(changes: Value) -> Filter {
        let mut config = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                { "names": ["read", "no_such_call", "openat2"], "action": "SCMP_ACT_ALLOW" },
                { "names": ["clone"], "action": "SCMP_ACT_ALLOW",
                  "args": [{ "index": 0, "value": 0x7e02_0000u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }] },
                { "names": ["kcmp"], "action": "SCMP_ACT_ALLOW",
                  "args": [{ "index": 0, "value": 7, "op": "SCMP_CMP_EQ" }, { "index": 0, "value": 8, "op": "SCMP_CMP_EQ" }] },
            ]
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        Filter::of(&serde_json::from_value(config).unwrap()).unwrap()
    }

    fn errno(number: i32) -> u32 {
        libc::SECCOMP_RET_ERRNO | number as u32
    }

    #[test]
    fn calls_newer_than_the_filter_are_unknown_and_older_ones_denied() {
        let filter = filter(json!({}));
        let answer = |arch, number| run(&filter.program, arch, number, [0; 6]);
        let (read, openat2, mkdir) = (0, 437, 83);
        assert_eq!(answer(AUDIT_X86_64, read), libc::SECCOMP_RET_ALLOW);
        assert_eq!(answer(AUDIT_X86_64, openat2), libc::SECCOMP_RET_ALLOW);
        assert_eq!(answer(AUDIT_X86_64, mkdir), errno(libc::EPERM));
        for newer in [openat2 + 1, 1000] {
            assert_eq!(answer(AUDIT_X86_64, newer), errno(libc::ENOSYS));
            assert_eq!(answer(AUDIT_I386, newer), errno(libc::ENOSYS));
        }
        assert_eq!(answer(AUDIT_I386, 3), libc::SECCOMP_RET_ALLOW);
        assert_eq!(answer(AUDIT_I386, 39), errno(libc::EPERM));
        assert_eq!(answer(AUDIT_X86_64, X32_BIT | read), libc::SECCOMP_RET_ALLOW);
        assert_eq!(answer(AUDIT_X86_64, X32_BIT | mkdir), errno(libc::EPERM));
    }

    #[test]
    fn a_filter_that_lets_pass_what_it_does_not_name_has_nothing_before_it() {
        let filter = filter(json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            { "names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7 }
        ] }));
        let answer = |number| run(&filter.program, AUDIT_X86_64, number, [0; 6]);
        assert_eq!((answer(83), answer(1000)), (errno(7), libc::SECCOMP_RET_ALLOW));
    }

    #[test]
    fn masks_and_alternatives_are_those_of_runc() {
        let filter = filter(json!({}));
        let answer = |number, arg| run(&filter.program, AUDIT_X86_64, number, [arg, 0, 0, 0, 0, 0]);
        let (clone, kcmp, newpid) = (56, 312, 0x2000_0000);
        assert_eq!((answer(clone, 17), answer(clone, newpid)), (libc::SECCOMP_RET_ALLOW, errno(libc::EPERM)));
        for (arg, wanted) in
            [(7, libc::SECCOMP_RET_ALLOW), (8, libc::SECCOMP_RET_ALLOW), (9, errno(libc::EPERM))]
        {
            assert_eq!(answer(kcmp, arg), wanted);
        }
    }

    #[test]
    fn flags_are_those_that_the_kernel_has() {
        let flags = json!({ "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"] });
        assert_eq!(filter(flags).flags, 6);
    }
}
