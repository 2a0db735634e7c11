//! `linux.resources.devices` as a BPF program on the cgroup, which is how cgroup v2 decides about device nodes.
//!
//! The rules are a list in cgroup v1's manner, each changing what the ones before it left. They are folded into what
//! they come to, and that is written out as instructions: a few compares for each device, then the default.

use std::fs::File;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::bpf::{self, Hook, Instruction};
use crate::error::Error;

/// Access to a device, as in `linux/bpf.h`.
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

/// Kind of a device, as in `linux/bpf.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Block = 1,
    Char = 2,
}

/// Some devices; `None` is every number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Devices {
    kind: Kind,
    major: Option<u32>,
    minor: Option<u32>,
}

impl Devices {
    const fn char(major: u32, minor: Option<u32>) -> Self {
        Self { kind: Kind::Char, major: Some(major), minor }
    }

    fn contains(&self, other: &Devices) -> bool {
        let covers = |mine: Option<u32>, other| mine.is_none() || mine == other;
        self.kind == other.kind && covers(self.major, other.major) && covers(self.minor, other.minor)
    }

    fn overlaps(&self, other: &Devices) -> bool {
        let meet = |a: Option<u32>, b: Option<u32>| a.is_none() || b.is_none() || a == b;
        self.kind == other.kind && meet(self.major, other.major) && meet(self.minor, other.minor)
    }
}

/// What every container may use, as under runc: making any node, and the devices that are in every /dev.
const ALWAYS: [(Devices, u32); 11] = [
    (Devices { kind: Kind::Char, major: None, minor: None }, MKNOD),
    (Devices { kind: Kind::Block, major: None, minor: None }, MKNOD),
    (Devices::char(1, Some(3)), ALL), // null
    (Devices::char(1, Some(5)), ALL), // zero
    (Devices::char(1, Some(7)), ALL), // full
    (Devices::char(1, Some(8)), ALL), // random
    (Devices::char(1, Some(9)), ALL), // urandom
    (Devices::char(5, Some(0)), ALL), // tty
    (Devices::char(5, Some(1)), ALL), // console
    (Devices::char(5, Some(2)), ALL), // ptmx
    (Devices::char(136, None), ALL),  // pts/*
];

/// What a list of rules comes to.
#[derive(Debug, PartialEq, Eq)]
struct Policy {
    /// What is done with a device that is not among the exceptions.
    allow: bool,
    /// Devices and the accesses for which the opposite is done.
    exceptions: Vec<(Devices, u32)>,
}

impl Policy {
    /// Without a word about devices, only those of [`ALWAYS`] are allowed.
    fn of(rules: &[LinuxDeviceCgroup]) -> Result<Self, Error> {
        let mut policy = Policy { allow: false, exceptions: Vec::new() };
        for rule in rules {
            let Some(kind) = kind_of(rule)? else {
                policy = Policy { allow: rule.allow(), exceptions: Vec::new() };
                continue;
            };
            let devices = Devices { kind, major: number(rule.major())?, minor: number(rule.minor())? };
            policy.change(rule.allow(), devices, access(rule.access().as_deref().unwrap_or_default())?)?;
        }
        if !policy.allow {
            for (devices, access) in ALWAYS {
                policy.change(true, devices, access)?;
            }
        }
        Ok(policy)
    }

    fn change(&mut self, allow: bool, devices: Devices, access: u32) -> Result<(), Error> {
        if allow != self.allow {
            match self.exceptions.iter_mut().find(|(d, _)| *d == devices) {
                Some((_, excepted)) => *excepted |= access,
                None => self.exceptions.push((devices, access)),
            }
            return Ok(());
        }
        for (excepted, accesses) in &mut self.exceptions {
            if devices.contains(excepted) {
                *accesses &= !access;
            } else if devices.overlaps(excepted) && *accesses & access != 0 {
                return Err(Error::Invalid(
                    "linux.resources.devices: a rule takes a part out of a wider rule before it, which cannot be \
                     honoured; list the devices one by one"
                        .into(),
                ));
            }
        }
        self.exceptions.retain(|(_, accesses)| *accesses != 0);
        Ok(())
    }

    /// The program: returns 1 to allow. Its context is `struct bpf_cgroup_dev_ctx`: access and kind in one word, major,
    /// minor.
    ///
    /// With a default of "deny" the accesses that exceptions allow are collected, and one that asks for no more is
    /// allowed: rules for the same device add up. With "allow" any access that an exception denies is denied.
    fn program(&self) -> Vec<Instruction> {
        // r2 = kind, r3 = access asked for, r4 = major, r5 = minor, r6 = accesses still to be settled.
        let mut program = vec![
            bpf::load_word(2, 0),
            bpf::mov_reg(3, 2),
            bpf::and_imm(2, 0xffff),
            bpf::shift_right(3, 16),
            bpf::load_word(4, 4),
            bpf::load_word(5, 8),
            bpf::mov_reg(6, 3),
        ];
        for (devices, access) in &self.exceptions {
            let mut body = Vec::new();
            if self.allow {
                body.extend([bpf::mov_reg(7, 3), bpf::and_imm(7, *access), bpf::jump_if_equal(7, 0, 2)]);
                body.extend([bpf::mov_imm(0, 0), Instruction::exit()]);
            } else {
                body.push(bpf::and_imm(6, !access & ALL));
            }
            let mut compares = Vec::new();
            compares.push((2, devices.kind as u32));
            compares.extend(devices.major.map(|major| (4, major)));
            compares.extend(devices.minor.map(|minor| (5, minor)));
            for (done, (register, value)) in compares.iter().enumerate() {
                let skip = (compares.len() - done - 1) + body.len();
                program.push(bpf::jump_if_not_equal(*register, *value, skip as i16));
            }
            program.append(&mut body);
        }
        if self.allow {
            program.extend([bpf::mov_imm(0, 1), Instruction::exit()]);
        } else {
            program.extend([
                bpf::mov_imm(0, 1),
                bpf::jump_if_equal(6, 0, 1),
                bpf::mov_imm(0, 0),
                Instruction::exit(),
            ]);
        }
        program
    }
}

fn kind_of(rule: &LinuxDeviceCgroup) -> Result<Option<Kind>, Error> {
    match rule.typ() {
        None | Some(LinuxDeviceType::A) => Ok(None),
        Some(LinuxDeviceType::B) => Ok(Some(Kind::Block)),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Ok(Some(Kind::Char)),
        Some(LinuxDeviceType::P) => {
            Err(Error::Invalid("linux.resources.devices: a fifo is no device".into()))
        }
    }
}

/// -1 and an absent number are every number.
fn number(number: Option<i64>) -> Result<Option<u32>, Error> {
    match number {
        None | Some(-1) => Ok(None),
        Some(n) => n
            .try_into()
            .map(Some)
            .map_err(|_| Error::Invalid(format!("linux.resources.devices: {n} is no device number"))),
    }
}

fn access(letters: &str) -> Result<u32, Error> {
    letters.chars().try_fold(0, |access, letter| match letter {
        'r' => Ok(access | READ),
        'w' => Ok(access | WRITE),
        'm' => Ok(access | MKNOD),
        // The host takes it in rules that deny.
        'a' => Ok(access | ALL),
        other => Err(Error::Invalid(format!(
            "linux.resources.devices: {other:?} is no access, only r, w and m are"
        ))),
    })
}

/// Lets the processes of a cgroup open and make only what `rules` allow.
pub fn restrict(cgroup: &Path, rules: &[LinuxDeviceCgroup]) -> Result<(), Error> {
    let policy = Policy::of(rules)?;
    let failed = |e| Error::os("applying linux.resources.devices", e);
    let cgroup = File::open(cgroup).map_err(failed)?;
    Hook::Device.attach(&cgroup, &policy.program()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(json: &str) -> Result<Policy, String> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        Policy::of(&rules).map_err(|e| e.to_string())
    }

    /// Runs a program as the kernel would.
    fn allows(policy: &Policy, kind: Kind, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind as u32, major, minor];
        let program = policy.program();
        let mut registers = [0u32; 10];
        let mut at = 0usize;
        for _ in 0..10_000 {
            let i = program[at];
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            let immediate = i.immediate as u32;
            at += 1;
            match i.code {
                0x61 => registers[to] = context[i.offset as usize / 4],
                0xbc => registers[to] = registers[from],
                0xb4 => registers[to] = immediate,
                0x54 => registers[to] &= immediate,
                0x74 => registers[to] >>= immediate,
                0x16 if registers[to] == immediate => at += i.offset as usize,
                0x56 if registers[to] != immediate => at += i.offset as usize,
                0x16 | 0x56 => {}
                0x95 => return registers[0] == 1,
                other => panic!("instruction {other:#x}"),
            }
        }
        panic!("does not end");
    }

    #[test]
    fn without_a_rule_only_the_usual_devices_are_there() {
        let policy = policy("[]").unwrap();
        assert!(allows(&policy, Kind::Char, READ | WRITE, 1, 3));
        assert!(allows(&policy, Kind::Char, READ | WRITE, 136, 42));
        assert!(allows(&policy, Kind::Block, MKNOD, 254, 0));
        assert!(!allows(&policy, Kind::Block, READ, 254, 0));
        assert!(!allows(&policy, Kind::Block, READ | MKNOD, 254, 0));
        assert!(!allows(&policy, Kind::Char, READ, 1, 11));
        assert!(!allows(&policy, Kind::Block, READ, 1, 3));
    }

    #[test]
    fn rules_change_what_the_ones_before_them_left() {
        let policy = policy(
            r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":8,"minor":1,"access":"r"},
                {"allow":true,"type":"b","major":8,"minor":1,"access":"w"},
                {"allow":true,"type":"c","major":10,"access":"rwm"},
                {"allow":true,"type":"c","major":7,"minor":7,"access":"rw"},
                {"allow":false,"type":"c","major":7,"minor":7,"access":"w"}]"#,
        )
        .unwrap();
        assert!(allows(&policy, Kind::Block, READ | WRITE, 8, 1));
        assert!(!allows(&policy, Kind::Block, READ | WRITE, 8, 2));
        assert!(allows(&policy, Kind::Char, READ, 10, 229));
        assert!(allows(&policy, Kind::Char, READ, 7, 7));
        assert!(!allows(&policy, Kind::Char, READ | WRITE, 7, 7));
    }

    #[test]
    fn everything_may_be_allowed_but_some() {
        let policy =
            policy(r#"[{"allow":true,"type":"a","access":"rwm"},{"allow":false,"type":"b","major":254,"access":"w"}]"#)
                .unwrap();
        assert!(allows(&policy, Kind::Char, READ | WRITE | MKNOD, 99, 99));
        assert!(allows(&policy, Kind::Block, READ, 254, 3));
        assert!(!allows(&policy, Kind::Block, READ | WRITE, 254, 3));
    }

    #[test]
    fn what_cannot_be_expressed_is_refused() {
        let carved = r#"[{"allow":true,"type":"c","major":10,"access":"rw"},
                         {"allow":false,"type":"c","major":10,"minor":1,"access":"r"}]"#;
        assert!(policy(carved).is_err_and(|e| e.contains("linux.resources.devices")));
        assert!(policy(r#"[{"allow":true,"type":"c","major":-7,"access":"rw"}]"#).is_err());
        assert!(policy(r#"[{"allow":true,"type":"c","major":1,"access":"x"}]"#).is_err());
    }
}
