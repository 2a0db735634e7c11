//! Further processes in a running container.

use std::fs;

use serde_json::json;

use crate::harness::{Bundle, Case, Container, Exit, Runtime, Stdin, case, host_scratch};

pub const CASES: &[Case] = &[
    case!(exit_code_streams_and_stdin_of_an_exec),
    case!(exec_options_set_environment_user_and_directory),
    case!(process_file_describes_the_exec),
    case!(an_exec_is_a_user_of_the_containers_namespace),
    case!(two_execs_run_at_once),
    case!(first_execs_that_come_together_all_run),
    case!(detached_exec_has_a_host_process),
    case!(exec_of_a_missing_command_is_named_and_harms_nothing),
    case!(exec_that_cannot_run_ends_with_255),
    case!(exec_is_where_the_init_is_if_its_cgroup_takes_no_processes),
    case!(exec_joins_the_cgroup_that_it_is_told),
    case!(exec_ends_with_its_container),
];

fn exit_code_streams_and_stdin_of_an_exec() {
    let container = Runtime::under_test().idle();
    let ended = container.exec("echo out; echo err >&2; exit 123").code(123);
    assert_eq!((ended.text().as_str(), ended.stderr.as_str()), ("out\n", "err\n"));

    let bytes: Vec<u8> = (0..2_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let copied = container.start_exec(&[], &["cat"], Stdin::Bytes(bytes.clone())).finish().code(0);
    assert!(copied.stdout == bytes, "{} bytes came back changed", copied.stdout.len());

    // It is in the container: same namespaces, same cgroup, and the workload beside it.
    let text =
        container.exec("hostname; cat /proc/1/cmdline | tr '\\0' ' '; echo; [ $$ != 1 ] && echo beside").ok();
    assert_eq!(text, "e2e\nsleep 100000 \nbeside\n");
    for kind in ["pid", "mnt", "uts", "ipc", "net", "cgroup"] {
        let same =
            container.exec(&format!("[ $(readlink /proc/self/ns/{kind}) = $(readlink /proc/1/ns/{kind}) ]"));
        same.code(0);
    }
    assert_eq!(container.status(), "running");
}

fn exec_options_set_environment_user_and_directory() {
    let container = Runtime::under_test().idle();
    let options = ["--env", "ADDED=a b", "--cwd", "/proc", "--user", "7:8"];
    let script = "echo $ADDED $TERM; pwd; id -u; id -g; hostname";
    let text = container.start_exec(&options, &["sh", "-c", script], Stdin::Null).finish().ok();
    assert_eq!(text, "a b xterm\n/proc\n7\n8\ne2e\n");
}

fn process_file_describes_the_exec() {
    let container = Runtime::under_test().idle();
    let dir = host_scratch();
    let file = dir.path().join("process.json");
    let process = json!({
        "terminal": false,
        "user": { "uid": 11, "gid": 12, "additionalGids": [13] },
        "args": ["sh", "-c", "id -u; id -G; pwd; echo $ONLY; ulimit -n; grep CapBnd /proc/self/status; exit 21"],
        "env": ["PATH=/bin", "ONLY=this"],
        "cwd": "/dev",
        "capabilities": { "bounding": ["CAP_CHOWN"] },
        "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 77, "hard": 77 }],
        "noNewPrivileges": true
    });
    fs::write(&file, process.to_string()).unwrap();
    let options = ["--process", file.to_str().unwrap()];
    let ended = container.start_exec(&options, &[], Stdin::Null).finish().code(21);
    assert_eq!(ended.text(), "11\n12 13\n/dev\nthis\n77\nCapBnd:\t0000000000000001\n");
    // What runc's callers may leave out.
    fs::write(&file, json!({ "args": ["sh", "-c", "id -u; id -G"], "cwd": "/" }).to_string()).unwrap();
    assert_eq!(container.start_exec(&options, &[], Stdin::Null).finish().ok(), "0\n0\n");
}

fn an_exec_is_a_user_of_the_containers_namespace() {
    let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    let bundle = Bundle::idle()
        .push("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", map.clone())
        .set("/linux/gidMappings", map);
    let container = Runtime::under_test().create(&bundle);
    container.op("start").ok();
    container.program.expect_line("ready");
    let script = "[ $(readlink /proc/self/ns/user) = $(readlink /proc/1/ns/user) ] && echo same
        id -u; id -G; tr -s ' ' < /proc/self/uid_map; grep -E 'Cap|NoNewPrivs' /proc/self/status";
    let text = container.exec(script).ok();
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    assert_eq!(lines[..4], ["same", "0", "0", "0 100000 65536"]);
    let init = container.exec("grep -E 'Cap|NoNewPrivs' /proc/1/status").ok();
    assert_eq!(lines[4..], init.lines().collect::<Vec<_>>());

    let dir = host_scratch();
    let file = dir.path().join("process.json");
    let process = json!({
        "user": { "uid": 11, "gid": 12, "additionalGids": [13], "umask": 0o027 },
        "args": ["sh", "-c", "id -u; id -G; umask; echo $HOME; grep CapBnd /proc/self/status; touch /dev/shm/x; stat -c %u:%g /dev/shm/x"],
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": { "bounding": ["CAP_CHOWN"] }
    });
    fs::write(&file, process.to_string()).unwrap();
    let ended =
        container.start_exec(&["--process", file.to_str().unwrap()], &[], Stdin::Null).finish().code(0);
    assert_eq!(ended.text(), "11\n12 13\n0027\n/\nCapBnd:\t0000000000000001\n11:12\n");
}

fn two_execs_run_at_once() {
    let container = Runtime::under_test().idle();
    let script = "echo hello; read line; echo \"$line\"; exit";
    let mut first = container.start_exec(&[], &["sh", "-c", &format!("{script} 1")], Stdin::Pipe);
    let mut second = container.start_exec(&[], &["sh", "-c", &format!("{script} 2")], Stdin::Pipe);
    // Both have begun before either can end.
    first.expect_line("hello");
    second.expect_line("hello");
    second.write("to the second\n");
    assert_eq!(second.finish().code(2).text(), "hello\nto the second\n");
    first.write("to the first\n");
    assert_eq!(first.finish().code(1).text(), "hello\nto the first\n");
}

fn first_execs_that_come_together_all_run() {
    for _ in 0..3 {
        let container = Runtime::under_test().idle();
        let execs: Vec<_> =
            (0..6).map(|i| container.start_exec(&[], &["echo", &i.to_string()], Stdin::Null)).collect();
        for (i, mut exec) in execs.into_iter().enumerate() {
            assert_eq!(exec.finish().ok(), format!("{i}\n"));
        }
    }
}

fn detached_exec_has_a_host_process() {
    let container = Runtime::under_test().idle();
    let dir = host_scratch();
    let pid_file = dir.path().join("pid");
    let options = ["--detach", "--pid-file", pid_file.to_str().unwrap()];
    let mut exec = container.start_exec(&options, &["sh", "-c", "echo detached; read line"], Stdin::Pipe);
    assert_eq!(exec.exit(), Exit::Code(0), "{}", exec.report());
    exec.expect_line("detached");
    let pid: i32 = fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    assert!(fs::exists(format!("/proc/{pid}")).unwrap(), "process {pid} of the pid file is not there");
    exec.write("end\n");
    crate::harness::wait_gone(pid);
    exec.finish();
    assert_eq!(container.status(), "running");
}

fn exec_of_a_missing_command_is_named_and_harms_nothing() {
    let container = Runtime::under_test().idle();
    let reason = container.start_exec(&[], &["no-such-program"], Stdin::Null).finish().refused();
    assert!(reason.contains("no-such-program"), "{reason}");
    assert_eq!(container.exec("echo still").ok(), "still\n");
}

/// The workload may well end with 1, and callers tell the two apart.
fn exec_that_cannot_run_ends_with_255() {
    let container = Runtime::under_test().idle();
    let exec = |options: &[&str], command: &str| {
        container.start_exec(options, &[command], Stdin::Null).finish().code(255);
    };
    exec(&[], "no-such-program");
    exec(&["--pid-file", "/no/where/pid"], "true");
    exec(&["--detach"], "no-such-program");
    exec(&["--cwd", "relative"], "true");
    Runtime::under_test().call(&["exec", "e2e-none", "true"]).code(255);
    container.op("pause").ok();
    let stderr = container.start_exec(&[], &["true"], Stdin::Null).finish().code(255).stderr;
    assert!(stderr.contains("cannot exec in a paused container"), "{stderr}");
    // One that is told not to mind runs once the container does.
    let mut patient = container.start_exec(&["--ignore-paused"], &["echo", "patient"], Stdin::Null);
    container.op("resume").ok();
    assert_eq!(patient.finish().ok(), "patient\n");
    container.exec("exit 1").code(1);
}

/// A container that may make cgroups of its own, as systemd does.
fn with_cgroups() -> Container {
    let cgroup = json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup" });
    let container = Runtime::under_test().start(&Bundle::idle().set("/mounts/6", cgroup), Stdin::Null);
    container.program.expect_line("ready");
    container
}

fn exec_is_where_the_init_is_if_its_cgroup_takes_no_processes() {
    let container = with_cgroups();
    container.exec("mkdir /sys/fs/cgroup/init.scope && echo 1 >/sys/fs/cgroup/init.scope/cgroup.procs").ok();
    assert_eq!(container.exec("cat /proc/self/cgroup").ok(), "0::/\n");
    let script = "cd /sys/fs/cgroup; echo $$ >init.scope/cgroup.procs; echo +memory >cgroup.subtree_control";
    container.exec(script).ok();
    assert_eq!(container.exec("cat /proc/self/cgroup").ok(), "0::/init.scope\n");
    // Nothing of it is left behind.
    container.kill("KILL");
    container.finish().code(137);
}

fn exec_joins_the_cgroup_that_it_is_told() {
    let container = with_cgroups();
    let exec = |cgroup: &str| {
        let command = ["cat", "/proc/self/cgroup"];
        container.start_exec(&["--cgroup", cgroup], &command, Stdin::Null).finish()
    };
    container.exec("mkdir -p /sys/fs/cgroup/a/b").ok();
    assert_eq!(exec("a/b").ok(), "0::/a/b\n");
    assert_eq!(exec("/a").ok(), "0::/a\n");
    assert_eq!(exec("/").ok(), "0::/\n");
    let stderr = exec("..").code(255).stderr;
    assert!(stderr.contains(" .. is not a sub cgroup path"), "{stderr}");
    let stderr = exec("none").code(255).stderr;
    assert!(stderr.contains("/none/cgroup.procs: no such file"), "{stderr}");
    container.exec("[ ! -e /sys/fs/cgroup/none ]").code(0);
    let script = "cd /sys/fs/cgroup; echo 1 >a/b/cgroup.procs; echo $$ >a/b/cgroup.procs; echo +memory >cgroup.subtree_control";
    container.exec(script).ok();
    let stderr = exec("/").code(255).stderr;
    assert!(stderr.contains("/cgroup.procs: device or resource busy"), "{stderr}");
}

fn exec_ends_with_its_container() {
    let container = Runtime::under_test().start(&Bundle::idle(), Stdin::Null);
    container.program.expect_line("ready");
    let mut exec = container.start_exec(&[], &["sh", "-c", "echo begun; exec sleep 100000"], Stdin::Null);
    exec.expect_line("begun");
    container.kill("KILL");
    container.finish().code(137);
    exec.finish().code(137);
}
