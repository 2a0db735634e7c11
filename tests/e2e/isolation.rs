//! The container is in a machine of its own: another kernel, other processes, other files.

use std::fs;

use crate::harness::{Bundle, Case, Program, Runtime, Stdin, case, host_scratch};

pub const CASES: &[Case] = &[
    case!(guest_kernel_is_another_one).stockade_only("the guest's kernel"),
    case!(first_process_is_the_workload),
    case!(host_processes_are_not_visible),
    case!(host_processes_are_not_visible_even_without_a_pid_namespace).stockade_only("the VM's processes"),
    case!(host_files_are_not_visible),
    case!(containers_do_not_see_each_other),
    case!(only_the_loopback_interface_is_there),
];

fn guest_kernel_is_another_one() {
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let script = "uname -r; cat /proc/version; cat /proc/sys/kernel/random/boot_id";
    let text = Runtime::under_test().run(&Bundle::sh(script)).ok();
    let lines: Vec<_> = text.lines().collect();
    assert_ne!(lines[0], host.trim());
    assert!(lines[1].contains(lines[0]), "{text}");
    assert_ne!(lines[2], fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim());
}

fn first_process_is_the_workload() {
    let script = "tr '\\0' ' ' < /proc/1/cmdline; echo; echo $$; set -- /proc/[0-9]*; echo $#; for ns in pid mnt uts ipc cgroup; do readlink /proc/self/ns/$ns; done | sort -u | wc -l";
    let text = Runtime::under_test().run(&Bundle::sh(script)).ok();
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with("sh -c tr "), "{text}");
    // There is the shell alone, and no namespace is another's.
    assert_eq!(lines[1..], ["1", "1", "5"], "{text}");
}

/// Runs a process on the host whose command line holds a word that is nowhere else, and gives what a container
/// sees of it.
fn looks_for_a_host_process(bundle: Bundle) -> String {
    let word = format!("e2e-marker-{}", std::process::id());
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "echo ready; read line", &word]);
    let mut marker = Program::spawn(command, Stdin::Pipe);
    marker.expect_line("ready");
    // The pattern does not match itself.
    let script = "grep -l 'e2e-[m]arker' /proc/[0-9]*/cmdline; set -- /proc/[0-9]*; echo $#";
    let text = Runtime::under_test().run(&bundle.script(script)).ok();
    marker.close_stdin();
    marker.exit();
    text
}

fn host_processes_are_not_visible() {
    // The shell alone.
    assert_eq!(looks_for_a_host_process(Bundle::sh("")), "1\n");
}

fn host_processes_are_not_visible_even_without_a_pid_namespace() {
    let text = looks_for_a_host_process(Bundle::sh("").without_namespace("pid"));
    assert!(!text.contains("/proc/"), "{text}");
}

fn host_files_are_not_visible() {
    let dir = host_scratch();
    let marker = dir.path().join("marker");
    fs::write(&marker, "host").unwrap();
    let script = format!(
        "cat {0} /proc/1/root{0} /proc/self/root/../..{0}; cat /proc/self/mountinfo",
        marker.display()
    );
    let ended = Runtime::under_test().run(&Bundle::sh(&script)).code(0);
    let text = ended.text();
    assert!(!text.contains("host"), "{text}");
    let root = text.lines().find(|line| line.split(' ').nth(4) == Some("/")).expect("a root mount");
    assert!(!root.contains(&dir.path().display().to_string()), "{root}");
    assert_eq!(ended.stderr.matches("No such file").count(), 3, "{ended:?}");
}

fn containers_do_not_see_each_other() {
    let runtime = Runtime::under_test();
    let (one, other) = (runtime.idle(), runtime.idle());
    one.exec("echo secret > /dev/shm/file").ok();
    // The workload and this shell.
    assert_eq!(other.exec("ls -A /dev/shm; set -- /proc/[0-9]*; echo $#").ok(), "2\n");
    // Their addresses do not meet either.
    let mut server = one.start_exec(&[], &["sh", "-c", "echo up; nc -l -p 4000"], Stdin::Null);
    server.expect_line("up");
    let refused = other.exec("nc 127.0.0.1 4000 < /dev/null");
    assert_ne!(refused.exit, crate::harness::Exit::Code(0), "{refused:?}");
    one.kill("KILL");
    server.finish();
}

fn only_the_loopback_interface_is_there() {
    let text = Runtime::under_test()
        .run(&Bundle::sh("ls /sys/class/net; ip -o link | wc -l; cat /proc/net/unix | wc -l"))
        .ok();
    assert_eq!(text.lines().next(), Some("lo"), "{text}");
}
