//! Containers that share namespaces with another: named by the paths of its process, as engines do.

use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::harness::{Bundle, Case, Container, Id, Runtime, Stdin, Traces, case};

const VM: &str = "the VM is the other container's";

pub const CASES: &[Case] = &[
    case!(what_is_shared_is_the_others_and_the_rest_its_own),
    case!(one_that_shares_goes_through_every_state).exclusive(),
    case!(it_can_be_made_again_once_it_was_deleted_by_force).exclusive(),
    case!(hooks_and_volumes_of_one_that_shares_are_its_own).exclusive(),
    case!(it_outlives_the_first_which_ends_as_the_vm).stockade_only(VM).exclusive(),
    case!(killing_the_first_once_more_ends_the_vm).stockade_only(VM).exclusive(),
    case!(it_is_killed_with_the_vm).stockade_only(VM).exclusive(),
    case!(what_needs_another_network_is_refused).stockade_only(VM),
    case!(one_whose_caller_cannot_be_told_leaves_nothing).exclusive(),
];

/// Has it share these namespaces with a container.
pub fn sharing(bundle: Bundle, with: &Container, types: &[(&str, &str)]) -> Bundle {
    let pid = with.pid();
    types.iter().fold(bundle, |bundle, (typ, file)| {
        let namespace = json!({"type": typ, "path": format!("/proc/{pid}/ns/{file}")});
        bundle.without_namespace(typ).push("/linux/namespaces", namespace)
    })
}

/// The network namespace, and its file.
pub const NETWORK: (&str, &str) = ("network", "net");
const IPC: (&str, &str) = ("ipc", "ipc");
const UTS: (&str, &str) = ("uts", "uts");
const PID: (&str, &str) = ("pid", "pid");

fn what_is_shared_is_the_others_and_the_rest_its_own() {
    let runtime = Runtime::under_test();
    let first = runtime.create(&Bundle::idle().set("/hostname", "first"));
    first.op("start").ok();
    first.program.expect_line("ready");
    let script = "hostname; ps -o args | grep -c '^sleep 100000'; cat; exit 3";
    let bundle = || Bundle::sh(script).remove("/hostname");
    let shared = runtime
        .run_with(&sharing(bundle(), &first, &[NETWORK, IPC, UTS, PID]), Stdin::Bytes(b"input\n".to_vec()));
    assert_eq!(shared.code(3).text(), "first\n1\ninput\n");
    // To name a namespace that is shared is to name it for all.
    let named = sharing(Bundle::sh("hostname").set("/hostname", "renamed"), &first, &[NETWORK, UTS]);
    assert_eq!(runtime.run(&named).ok(), "renamed\n");
    assert_eq!(first.exec("hostname").ok(), "renamed\n");
    let own = sharing(bundle().set("/hostname", "second"), &first, &[NETWORK, IPC]);
    assert_eq!(runtime.run_with(&own, Stdin::Null).code(3).text(), "second\n0\n");
    let namespaces = "readlink /proc/self/ns/net; readlink /proc/self/ns/ipc";
    let of_first = first.exec(namespaces).ok();
    assert_eq!(runtime.run(&sharing(Bundle::sh(namespaces), &first, &[NETWORK, IPC])).ok(), of_first);
}

fn one_that_shares_goes_through_every_state() {
    let runtime = Runtime::under_test();
    let first = runtime.idle();
    let second = runtime.create(&sharing(Bundle::idle(), &first, &[NETWORK, IPC]));
    assert_eq!(second.status(), "created");
    second.op("start").ok();
    second.program.expect_line("ready");
    assert_ne!(second.pid(), first.pid());
    assert_eq!(second.exec("echo inside").ok(), "inside\n");
    second.op("pause").ok();
    assert_eq!((second.status(), first.status()), ("paused".into(), "running".into()));
    second.op("resume").ok();
    second.op("delete").refused();
    let pid = second.pid();
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    assert_eq!(second.exec("echo still here").ok(), "still here\n", "a PID 1 without a handler");
    second.kill("KILL");
    second.wait_stopped(pid);
    second.exec("true").refused();
    second.delete();
    assert_eq!(first.exec("echo unharmed").ok(), "unharmed\n");
    first.kill("KILL");
}

fn it_can_be_made_again_once_it_was_deleted_by_force() {
    let runtime = Runtime::under_test();
    let first = runtime.idle();
    let bundle = sharing(Bundle::idle(), &first, &[NETWORK]);
    let mut second = runtime.create(&bundle);
    let words = ["create", "--bundle", bundle.save().to_str().unwrap(), second.id.as_str()];
    // Its streams would be held by what it leaves behind.
    let create = || {
        let mut command = runtime.command(words);
        let silent = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        assert!(silent.status().unwrap().success());
    };
    for _ in 0..3 {
        second.op_with(&["delete", "--force"], &[]).ok();
        second.op("state").refused();
        create();
        second.op("start").ok();
    }
    let pid = second.pid();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    second.wait_stopped(pid);
    second.op("delete").ok();
    second.program.finish();
    assert_eq!(first.exec("echo unharmed").ok(), "unharmed\n");
    first.kill("KILL");
}

fn hooks_and_volumes_of_one_that_shares_are_its_own() {
    let runtime = Runtime::under_test();
    let first = runtime.idle();
    let bundle = Bundle::sh("cat /volume/said; echo back > /volume/answer; ls /nothing 2>&1");
    let dir = bundle.dir().join("volume");
    std::fs::create_dir(&dir).unwrap();
    let said = dir.join("said");
    let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", format!("cat > {}", said.display())]});
    let bundle = bundle.bind(&dir, "/volume", &[]).push("/hooks/createRuntime", hook);
    let stopped = dir.join("stopped");
    let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", format!("cat > {}", stopped.display())]});
    let bundle = sharing(bundle.push("/hooks/poststop", hook), &first, &[NETWORK, IPC]);
    let ended = runtime.run(&bundle).code(1).text();
    assert!(ended.contains("\"status\":\"creating\"") && ended.contains("/nothing"), "{ended}");
    assert_eq!(std::fs::read_to_string(dir.join("answer")).unwrap(), "back\n");
    assert!(std::fs::read_to_string(stopped).unwrap().contains("\"status\":\"stopped\""));
    first.kill("KILL");
}

fn it_outlives_the_first_which_ends_as_the_vm() {
    let runtime = Runtime::under_test();
    let mut first = runtime.start(&Bundle::sh("echo ready; read line; exit 4"), Stdin::Pipe);
    first.program.expect_line("ready");
    let mut second = runtime.create(&sharing(
        Bundle::sh("echo up; trap 'echo asked; exit 5' TERM; while :; do sleep 0.1; done"),
        &first,
        &[NETWORK],
    ));
    second.op("start").ok();
    second.program.expect_line("up");
    first.program.write("\n");
    // Nothing more can be made in it.
    let late = || runtime.run(&sharing(Bundle::sh("true"), &first, &[NETWORK]));
    while late().stderr.is_empty() {}
    let pid = second.pid();
    second.kill("TERM");
    second.program.expect_line("asked");
    second.wait_stopped(pid);
    first.program.finish().code(4);
    second.program.finish();
    second.op("delete").ok();
}

fn killing_the_first_once_more_ends_the_vm() {
    let runtime = Runtime::under_test();
    let mut first =
        runtime.create(&Bundle::sh("trap 'exit 4' TERM; echo ready; while :; do sleep 0.1; done"));
    first.op("start").ok();
    first.program.expect_line("ready");
    let mut second = runtime.create(&sharing(Bundle::idle(), &first, &[NETWORK]));
    second.op("start").ok();
    second.program.expect_line("ready");
    let pids = [&first, &second].map(Container::pid);
    first.kill("TERM");
    // It has ended, and counts as running for the other's sake.
    while first.exec("true").stderr.is_empty() {}
    assert_eq!(first.status(), "running");
    assert_eq!(second.exec("echo unharmed").ok(), "unharmed\n");
    first.kill("KILL");
    for (container, pid) in [&mut first, &mut second].into_iter().zip(pids) {
        container.wait_stopped(pid);
        container.op("delete").ok();
        container.program.finish();
    }
}

fn it_is_killed_with_the_vm() {
    let runtime = Runtime::under_test();
    let mut first = runtime.idle();
    let mut second = runtime.create(&sharing(Bundle::idle(), &first, &[NETWORK]));
    second.op("start").ok();
    second.program.expect_line("ready");
    let pids = [&first, &second].map(Container::pid);
    kill(Pid::from_raw(pids[0]), Signal::SIGKILL).unwrap();
    for (container, pid) in [&mut first, &mut second].into_iter().zip(pids) {
        container.wait_stopped(pid);
        container.op("start").refused();
        container.op("delete").ok();
        container.program.finish();
    }
}

fn what_needs_another_network_is_refused() {
    let runtime = Runtime::under_test();
    let first = runtime.idle();
    let reason = runtime.run(&sharing(Bundle::sh("true"), &first, &[IPC])).refused();
    assert!(reason.contains("linux.namespaces") && reason.contains("network"), "{reason}");
    let user = ("user", "user");
    let reason = runtime.run(&sharing(Bundle::sh("true"), &first, &[NETWORK, user])).refused();
    assert!(reason.contains("(user)"), "{reason}");
}

fn one_whose_caller_cannot_be_told_leaves_nothing() {
    let runtime = Runtime::under_test();
    let first = runtime.idle();
    let bundle = sharing(Bundle::idle(), &first, &[NETWORK, IPC]);
    let (id, dir) = (Id::new(), bundle.save().to_str().unwrap());
    let before = Traces::now();
    runtime.call(&["create", "--bundle", dir, "--pid-file", "/no/such/dir/pid", id.as_str()]).refused();
    runtime.call(&["state", id.as_str()]).refused();
    assert_eq!(before.new_since(), [""; 0]);
    assert_eq!(first.exec("echo unharmed").ok(), "unharmed\n");
    first.kill("KILL");
}
