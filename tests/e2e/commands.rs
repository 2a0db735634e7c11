//! Commands and flags as runc's callers use them, and what they read in the answers: new limits for a running
//! container, statistics, lists of processes, and the words by which an error is known.

use std::fs;
use std::io::IoSliceMut;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

use crate::harness::{Bundle, Case, Id, Program, Runtime, Stdin, case, host_scratch};

pub const CASES: &[Case] = &[
    case!(update_changes_limits_of_a_running_container),
    case!(update_beyond_the_vms_processors_is_refused).stockade_only("a host without VMs always has more"),
    case!(events_tell_what_is_used),
    case!(events_tell_of_memory_that_ran_out),
    case!(ps_takes_the_options_of_ps),
    case!(errors_have_the_words_that_callers_know),
    case!(created_container_is_deleted_without_force).exclusive(),
    case!(exec_in_a_created_container),
    case!(run_with_keep_leaves_the_state),
    case!(checkpoint_and_restore_are_refused).stockade_only("runc has CRIU"),
    case!(pidfd_socket_gets_the_host_process).stockade_only("newer than the lab's runc"),
];

fn update_changes_limits_of_a_running_container() {
    let runtime = Runtime::under_test();
    let bundle = Bundle::idle()
        .set("/linux/resources/memory", json!({ "limit": 100 << 20 }))
        .set("/linux/resources/cpu", json!({ "shares": 1024, "quota": 50_000, "period": 100_000 }));
    let container = runtime.create(&bundle);
    let limits = || container.exec("cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight").ok();
    // It need not have been started.
    container.op_with(&["update", "--pids-limit", "30"], &[]).ok();
    container.op("start").ok();
    container.program.expect_line("ready");
    assert_eq!(limits(), "104857600\n30\n50000 100000\n39\n");
    let flags = ["--memory", "64M", "--memory-swap", "64M", "--cpu-quota", "20000", "--cpu-share", "2"];
    container.op_with(&[&["update"], &flags[..]].concat(), &[]).ok();
    assert_eq!(limits(), "67108864\n30\n20000 100000\n1\n");
    let resources = json!({ "memory": { "limit": 48 << 20, "swap": 48 << 20 }, "pids": { "limit": 40 } });
    let stdin = Stdin::Bytes(resources.to_string().into_bytes());
    let words = ["update", "--resources", "-", container.id.as_str()];
    Program::spawn(runtime.command(words), stdin).finish().code(0);
    assert_eq!(limits(), "50331648\n40\n20000 100000\n1\n");
    let file = bundle.dir().join("resources.json");
    fs::write(&file, json!({ "cpu": { "quota": -1 } }).to_string()).unwrap();
    container.op_with(&["update", &format!("--resources={}", file.display())], &[]).ok();
    assert_eq!(limits(), "50331648\n40\nmax 100000\n1\n");
    container.op_with(&["update", "--memory", "lots"], &[]).refused();
}

fn update_beyond_the_vms_processors_is_refused() {
    let container = Runtime::under_test().create(&Bundle::idle());
    let reason = container.op_with(&["update", "--cpu-quota", "300000"], &[]).refused();
    assert!(reason.contains("cpu.quota") && reason.contains("1 vCPU"), "{reason}");
    let reason = container.op_with(&["update", "--cpu-rt-runtime", "100"], &[]).refused();
    assert!(reason.contains("realtimeRuntime"), "{reason}");
    container.op("start").ok();
    container.program.expect_line("ready");
    assert_eq!(container.exec("cd /sys/fs/cgroup; cat memory.max cpu.max").ok(), "max\nmax 100000\n");
}

fn events_tell_what_is_used() {
    let bundle = Bundle::idle()
        .set("/linux/resources/memory", json!({ "limit": 64 << 20 }))
        .set("/linux/resources/pids", json!({ "limit": 33 }));
    let runtime = Runtime::under_test();
    let container = runtime.create(&bundle);
    container.op("start").ok();
    container.program.expect_line("ready");
    let text = container.op_with(&["events", "--stats"], &[]).ok();
    assert_eq!(text.lines().count(), 1, "{text}");
    let event: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&event["type"], &event["id"]), (&json!("stats"), &json!(container.id.as_str())));
    let data = &event["data"];
    assert_eq!(data["memory"]["usage"]["limit"], 64 << 20);
    assert_eq!((&data["pids"]["current"], &data["pids"]["limit"]), (&json!(1), &json!(33)));
    for pointer in ["/cpu/usage/total", "/memory/usage/usage", "/memory/raw/anon"] {
        assert!(data.pointer(pointer).and_then(Value::as_u64) > Some(0), "{pointer}: {data}");
    }
    let words = ["events", "--interval", "200ms", container.id.as_str()];
    let mut events = Program::spawn(runtime.command(words), Stdin::Null);
    for _ in 0..2 {
        let line = events.line();
        assert!(line.starts_with("{\"type\":\"stats\",\"id\":"), "{line}");
    }
    container.kill("KILL");
    events.finish().code(0);
}

fn events_tell_of_memory_that_ran_out() {
    let runtime = Runtime::under_test();
    let bundle = Bundle::debian("echo ready; exec sleep 100000")
        .set("/linux/resources/memory", json!({ "limit": 48 << 20, "swap": 48 << 20 }));
    let container = runtime.create(&bundle);
    container.op("start").ok();
    container.program.expect_line("ready");
    let words = ["events", "--interval", "300ms", container.id.as_str()];
    let mut events = Program::spawn(runtime.command(words), Stdin::Null);
    assert!(events.line().contains("\"stats\""));
    container.exec("perl -e 'push @x, q(x) x 1048576 while 1'; echo hog").code(0);
    while !events.line().contains("{\"type\":\"oom\"") {}
    container.kill("KILL");
    events.finish();
}

fn ps_takes_the_options_of_ps() {
    let container = Runtime::under_test().idle();
    let text = container.op_with(&["ps"], &["-o", "pid,args"]).ok();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(lines[0].trim_start().starts_with("PID") && !text.contains("UID"), "{text}");
    assert!(lines[1].ends_with("sleep 100000"), "{text}");
    let text = container.op_with(&["ps"], &["-ef"]).ok();
    let head: Vec<_> = text.lines().next().unwrap_or_default().split_whitespace().collect();
    assert_eq!(head, ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]);
    let text = container.op_with(&["ps"], &["-e", "-x"]).ok();
    let lines: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["PID", "TTY", "STAT", "TIME", "COMMAND"]);
    assert!(lines[1][2].starts_with('S') && lines[1][4..] == ["sleep", "100000"], "{text}");
    container.op_with(&["ps"], &["--no-such-option"]).refused();
    let pid = container.pid();
    container.kill("0");
    container.kill("KILL");
    container.wait_stopped(pid);
    container.op_with(&["kill"], &["0"]).refused();
    container.op_with(&["kill", "--all"], &["0"]).code(0);
    // As under runc: a container that has stopped has no processes, which is no error.
    assert_eq!(container.op("ps").ok().lines().count(), 1);
}

/// What containerd, CRI-O, Podman and Docker look for in the last record of the log.
fn errors_have_the_words_that_callers_know() {
    let dir = host_scratch();
    let log = dir.path().join("log");
    let runtime = Runtime::under_test().global(&["--log", log.to_str().unwrap(), "--log-format", "json"]);
    let refused = |words: &[&str], known: &str| {
        let _ = fs::remove_file(&log);
        runtime.call(words).refused();
        let text = fs::read_to_string(&log).unwrap_or_default();
        let last: Value = serde_json::from_str(text.lines().last().unwrap_or_default())
            .unwrap_or_else(|error| panic!("{words:?}: no JSON record ({error}): {text}"));
        let message = last["msg"].as_str().unwrap_or_default();
        assert!(last["level"] == "error" && message.contains(known), "{words:?}: {last}");
        assert!(last["time"].as_str().is_some_and(|time| time.contains('T')), "{last}");
    };
    for command in ["state", "start", "delete", "pause", "resume", "kill"] {
        refused(&[command, "e2e-none"], "does not exist");
    }
    let container = runtime.idle();
    let id = container.id.as_str();
    let bundle = Bundle::idle();
    refused(
        &["create", "--bundle", bundle.save().to_str().unwrap(), id],
        "container with given ID already exists",
    );
    refused(&["start", id], "cannot start an already running container");
    refused(&["delete", id], "that is not stopped");
    refused(&["resume", id], "container not paused");
    refused(&["exec", id, "no-such-program"], "executable file not found in $PATH");
    refused(&["exec", id, "/no/such/program"], "no such file or directory");
    refused(&["exec", id, "/etc/passwd"], "permission denied");
    container.op("pause").ok();
    refused(&["exec", id, "true"], "cannot exec in a paused container");
    container.op("resume").ok();
    let pid = container.pid();
    container.kill("KILL");
    container.wait_stopped(pid);
    refused(&["kill", id, "TERM"], "container not running");
    refused(&["pause", id], "container not running");
    refused(&["start", id], "cannot start a container that has stopped");
    refused(&["exec", id, "true"], "cannot exec in a stopped container");
    refused(&["update", "--pids-limit", "5", id], "container not running");
}

fn created_container_is_deleted_without_force() {
    let mut container = Runtime::under_test().create(&Bundle::idle());
    container.op("delete").ok();
    container.op("state").refused();
    assert_eq!(container.program.finish().code(0).text(), "");
}

fn exec_in_a_created_container() {
    let container = Runtime::under_test().create(&Bundle::idle());
    assert_eq!(container.exec("hostname").ok(), "e2e\n");
    assert_eq!(container.status(), "created");
    container.op("start").ok();
    container.program.expect_line("ready");
}

fn run_with_keep_leaves_the_state() {
    let runtime = Runtime::under_test();
    let (bundle, id) = (Bundle::sh("exit 3"), Id::new());
    let mut command = runtime.command(["run", "--keep", "--bundle"]);
    command.arg(bundle.save()).arg(&id);
    let mut container = runtime.adopt(&bundle, id, Program::spawn(command, Stdin::Null));
    container.program.finish().code(3);
    assert_eq!(container.status(), "stopped");
    container.delete();
}

fn checkpoint_and_restore_are_refused() {
    let runtime = Runtime::under_test();
    for words in [&["checkpoint", "--image-path", "/i", "x"][..], &["restore", "--bundle", "/b", "x"]] {
        let reason = runtime.call(words).refused();
        assert!(reason.contains(words[0]) && reason.contains("CRIU"), "{reason}");
    }
}

fn pidfd_socket_gets_the_host_process() {
    let dir = host_scratch();
    let path = dir.path().join("pidfd");
    let listener = UnixListener::bind(&path).unwrap();
    let options = ["--pidfd-socket".as_ref(), path.as_os_str()];
    let container = Runtime::under_test().create_with(&Bundle::idle(), Stdin::Null, &options);
    let received = |listener: &UnixListener| {
        let (stream, _) = listener.accept().unwrap();
        let mut bytes = [0; 64];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let packet =
            recvmsg::<()>(stream.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::empty()).unwrap();
        let fds = packet.cmsgs().unwrap().find_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fds.unwrap()[0])).unwrap();
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")).unwrap().trim();
        pid.parse::<i32>().unwrap()
    };
    assert_eq!(received(&listener), container.pid());
}
