//! stockade as containerd's runtime `io.containerd.stockade.v2`, with the host's containerd and ctr(8).

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{Bundle, Case, Containerd, Exit, Program, Stdin, Traces, case, tool, unique, wait_gone};

const SHIM: &str = "the shim";

pub const CASES: &[Case] = &[
    case!(run_reports_output_and_exit_code).stockade_only(SHIM).exclusive(),
    case!(detached_task_is_executed_in_paused_measured_and_killed).stockade_only(SHIM).exclusive(),
    case!(interface_that_a_hook_adds_is_there_when_the_task_starts).stockade_only(SHIM).exclusive(),
    case!(events_come_in_the_order_of_what_happened).stockade_only(SHIM).exclusive(),
    case!(five_tasks_at_once_are_apart).stockade_only(SHIM).exclusive(),
    case!(tasks_outlive_a_killed_containerd).stockade_only(SHIM).exclusive(),
    case!(killed_vmm_or_shim_is_no_success_and_leaves_nothing).stockade_only(SHIM).exclusive(),
];

const IDLE: &[&str] = &["sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 1; done"];

fn run_reports_output_and_exit_code() {
    let containerd = Containerd::start();
    let run = |id: &str, script: &str| containerd.start_run(&["--rm"], id, &["sh", "-c", script]).finish();
    assert_eq!(run("a", "uname -r; echo error >&2").stderr, "error\n");
    let guest = run("b", "uname -r; exit 7").code(7).text();
    assert_ne!(guest.trim(), std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim());
    run("c", "sh -c 'kill -KILL $$'; exit $?").code(137);
    let reason = containerd.start_run(&["--rm"], "d", &["no-such-program"]).finish().refused();
    assert!(reason.contains("no-such-program") && reason.contains("not found"), "{reason}");
    let lines: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    assert!(run("e", "seq 1 20000").code(0).text() == lines, "output is not complete");
    assert_eq!(containerd.ctr(&["task", "ls", "-q"]).ok(), "");
}

fn detached_task_is_executed_in_paused_measured_and_killed() {
    let containerd = Containerd::start();
    containerd.start_run(&["--detach"], "a", IDLE).exit();
    assert_eq!(containerd.status("a"), "RUNNING");
    let exec =
        |id: &str, script: &str| containerd.ctr(&["task", "exec", "--exec-id", id, "a", "sh", "-c", script]);
    assert_eq!(exec("e1", "echo $((6 * 7)); exit 3").code(3).text(), "42\n");
    // Numbers of the host, whatever runs in the guest.
    let listed = containerd.ctr(&["task", "ps", "a"]).ok();
    let listed: Vec<_> = listed.lines().skip(1).map(|line| line.split_whitespace().next()).collect();
    assert_eq!(listed, [Some(&*containerd.pid("a").to_string())]);
    let metrics = containerd.ctr(&["task", "metrics", "--format", "json", "a"]).ok();
    let metrics: Value = serde_json::from_str(&metrics).unwrap_or_else(|e| panic!("{e}: {metrics}"));
    assert!(metrics["pids"]["current"].as_u64() >= Some(2), "{metrics}");
    assert!(metrics["memory"]["usage"].as_u64() > Some(0), "{metrics}");
    containerd.ctr(&["task", "pause", "a"]).code(0);
    assert_eq!(containerd.status("a"), "PAUSED");
    containerd.ctr(&["task", "resume", "a"]).code(0);
    assert_eq!(containerd.status("a"), "RUNNING");
    containerd.ctr(&["task", "kill", "a"]).code(0);
    containerd.wait_status("a", "STOPPED");
    let deleted = containerd.ctr(&["task", "delete", "a"]);
    assert!(deleted.stderr.contains("exit code 5") || deleted.exit == Exit::Code(5), "{deleted:?}");
    containerd.ctr(&["container", "delete", "a"]).code(0);
}

fn interface_that_a_hook_adds_is_there_when_the_task_starts() {
    let containerd = Containerd::start();
    tool("modprobe tun");
    // As Docker's hook does where it uses the shim: by the number in the state.
    let n = unique();
    let script = format!(
        r#"pid=$(sed 's/.*"pid": *\([0-9]*\).*/\1/') && ip link add v-{n} type veth peer name eth0 netns $pid &&
           nsenter -t $pid -n ip addr add 10.66.{n}.2/24 dev eth0 && nsenter -t $pid -n ip link set eth0 up"#
    );
    let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]});
    let bundle = Bundle::sh("ip -o -4 addr show eth0 | awk '{print $4}'").push("/hooks/prestart", hook);
    let config = bundle.save().join("config.json").display().to_string();
    let words = ["run", "--rm", "--runtime", "io.containerd.stockade.v2", "--config", &config, "a"];
    assert_eq!(containerd.ctr(&words).ok(), format!("10.66.{n}.2/24\n"));
}

fn events_come_in_the_order_of_what_happened() {
    let containerd = Containerd::start();
    let events = Program::spawn(containerd.command(&["events"]), Stdin::Null);
    // The stream is there when the first of them, of a namespace, has come through it.
    let mut number = 0;
    while events.stdout.len() == 0 {
        number += 1;
        containerd.ctr(&["namespace", "create", &format!("n{number}")]).code(0);
    }
    containerd.start_run(&["--rm"], "a", &["true"]).finish().code(0);
    let mut topics = Vec::new();
    while topics.last().map(String::as_str) != Some("/tasks/delete") {
        let line = events.line();
        topics.extend(line.split(' ').find(|word| word.starts_with("/tasks/")).map(String::from));
    }
    assert_eq!(topics, ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
}

fn five_tasks_at_once_are_apart() {
    let containerd = Containerd::start();
    let ids = ["a", "b", "c", "d", "e"];
    let runs = ids
        .map(|id| containerd.start_run(&["--rm"], id, &["sh", "-c", &format!("echo I am {id}; ps | wc -l")]));
    for (mut run, id) in runs.into_iter().zip(ids) {
        let text = run.finish().code(0).text();
        assert!(text.starts_with(&format!("I am {id}\n")), "{text}");
    }
}

fn tasks_outlive_a_killed_containerd() {
    let mut containerd = Containerd::start();
    for id in ["stays", "ends"] {
        containerd.start_run(&["--detach"], id, IDLE).exit();
    }
    let ends = containerd.vmm("ends");
    containerd.ctr(&["task", "kill", "ends"]).code(0);
    containerd.kill_and_restart();
    wait_gone(ends);
    assert_eq!(containerd.status("stays"), "RUNNING");
    containerd.wait_status("ends", "STOPPED");
    let words = ["task", "exec", "--exec-id", "e", "stays", "echo", "still here"];
    assert_eq!(containerd.ctr(&words).ok(), "still here\n");
    containerd.ctr(&["task", "kill", "--signal", "KILL", "stays"]).code(0);
    containerd.wait_status("stays", "STOPPED");
    for id in ["stays", "ends"] {
        containerd.ctr(&["task", "delete", id]);
        containerd.ctr(&["container", "delete", id]).code(0);
    }
}

fn killed_vmm_or_shim_is_no_success_and_leaves_nothing() {
    let containerd = Containerd::start();
    let before = Traces::now();
    let mut run = containerd.start_run(&["--rm"], "a", IDLE);
    run.expect_line("up");
    kill(Pid::from_raw(containerd.vmm("a")), Signal::SIGKILL).unwrap();
    let ended = run.finish();
    assert!(ended.exit != Exit::Code(0), "{ended:?}");

    containerd.start_run(&["--detach"], "b", IDLE).exit();
    let vmm = containerd.vmm("b");
    kill(Pid::from_raw(containerd.pid("b")), Signal::SIGKILL).unwrap();
    wait_gone(vmm);
    // containerd notices the broken connection, has the shim's `delete` clear up, and knows the task no more.
    containerd.wait_status("b", "");
    containerd.ctr(&["container", "delete", "b"]).code(0);
    let mut left = before.new_since();
    // The parent of a container's cgroup stays, as under runc.
    left.retain(|line| line != "cgroup /sys/fs/cgroup/default");
    left.extend(containerd.state_of_shims("default"));
    assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
}
