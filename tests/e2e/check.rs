//! `stockade check` tells whether this machine can run microVMs, and if not, why and what to do.

use std::fs;
use std::process::Command;

use crate::harness::{Case, Exit, Program, Runtime, Stdin, case, host_scratch};

const OURS: &str = "a command of stockade's own";

pub const CASES: &[Case] = &[
    case!(usable_machine_is_told_so).stockade_only(OURS),
    case!(missing_guest_files_are_found).stockade_only(OURS),
    case!(missing_kvm_is_found).stockade_only(OURS),
    case!(missing_permission_is_found).stockade_only(OURS),
];

/// Findings that are not in order name what they are about and come with a remedy.
#[track_caller]
fn finds(mut command: Command, about: &[&str]) {
    command.arg("check");
    let ended = Program::spawn(command, Stdin::Null).finish();
    assert_eq!(ended.exit, Exit::Code(1), "{ended:?}");
    let text = ended.text() + &ended.stderr;
    for word in about {
        assert!(text.lines().any(|line| line.contains(word)), "nothing about {word}: {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
}

fn usable_machine_is_told_so() {
    let text = Runtime::under_test().call(&["check"]).ok();
    assert!(text.lines().any(|line| line.contains("/dev/kvm")), "{text}");
    assert!(text.lines().any(|line| line.contains("guest files")), "{text}");
    // What does not keep them from running is looked at as well.
    for subject in ["mitigations", "SMT", "KSM"] {
        let about = |line: &&str| line.split(": ").nth(1) == Some(subject);
        let line = text.lines().find(about).unwrap_or_else(|| panic!("nothing about {subject}: {text}"));
        assert!(line.starts_with("ok: ") || line.starts_with("warning: "), "{line}");
    }
}

fn missing_guest_files_are_found() {
    let dir = host_scratch();
    let path = dir.path().display().to_string();
    let runtime = Runtime::under_test().env("STOCKADE_GUEST_DIR", dir.path());
    finds(runtime.command([""; 0]), &[&path, "make image"]);
    fs::write(dir.path().join("vmlinux"), "no kernel").unwrap();
    fs::write(dir.path().join("initrd.img"), "070701").unwrap();
    finds(runtime.command([""; 0]), &["vmlinux", "ELF"]);
}

/// The runtime's command line behind another program's.
fn behind(words: &[&str]) -> Command {
    let runtime = Runtime::under_test().command([""; 0]);
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).arg(runtime.get_program());
    command
}

fn missing_kvm_is_found() {
    // A mount namespace with an empty /dev.
    let hide = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /dev && exec \"$0\" \"$@\""];
    finds(behind(&hide), &["/dev/kvm"]);
}

fn missing_permission_is_found() {
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    finds(behind(&nobody), &["/dev/kvm", "ermission"]);
}
