//! The operations of the OCI runtime specification, in the right order and in every wrong one, and those that
//! its callers add: list, ps, pause, resume, spec, features, logs, pid files.

use std::fs;
use std::process::{Command, ExitCode};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::Value;

use crate::harness::{
    Bundle, Case, Exit, Id, Program, Rootfs, Runtime, Stdin, case, host_scratch, wait_gone,
};

pub const CASES: &[Case] = &[
    case!(container_goes_through_every_state).exclusive(),
    case!(operations_on_a_container_that_is_not_there),
    case!(wrong_operations_on_a_created_container),
    case!(wrong_operations_on_a_running_container),
    case!(wrong_operations_on_a_stopped_container),
    case!(killed_before_start_never_runs),
    case!(forced_delete_ends_a_running_container).exclusive(),
    case!(pid_of_the_pid_file_ends_as_the_workload_does),
    case!(killing_the_host_process_stops_the_container),
    case!(signals_to_the_host_process_reach_the_workload),
    case!(kill_all_reaches_every_process),
    case!(ps_lists_the_containers_processes),
    case!(paused_container_stands_still),
    case!(created_container_that_was_paused_can_be_started),
    case!(list_shows_what_there_is),
    case!(detached_run_returns_at_once),
    case!(annotations_are_in_the_state),
    case!(spec_writes_a_bundle_that_runs),
    case!(features_tell_what_is_supported),
    case!(version_is_told),
    case!(log_file_gets_the_error_as_json),
    case!(root_directory_separates_containers),
];

fn container_goes_through_every_state() {
    let container =
        Runtime::under_test().create(&Bundle::sh("echo begun; read line; exit 5").set("/process/cwd", "/"));
    let state = container.state();
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], container.id.as_str());
    assert!(state["ociVersion"].as_str().is_some_and(|version| version.starts_with("1.")), "{state}");
    assert!(state["bundle"].as_str().is_some_and(|bundle| bundle.starts_with("/tmp/e2e-")), "{state}");
    let pid = container.pid();
    assert!(fs::exists(format!("/proc/{pid}")).unwrap(), "process {pid} of the state is not there");
    assert_eq!(container.program.stdout.len(), 0, "runs before start");

    container.op("start").ok();
    container.program.expect_line("begun");
    // Standard input is /dev/null, so the workload goes on to its end.
    container.wait_stopped(pid);
    assert_eq!(container.state()["pid"].as_i64().unwrap_or(0), 0);
    assert_eq!(container.program.stderr.text(), "");
    container.delete();
}

fn operations_on_a_container_that_is_not_there() {
    let runtime = Runtime::under_test();
    for words in [
        &["state", "e2e-none"][..],
        &["start", "e2e-none"],
        &["kill", "e2e-none", "KILL"],
        &["delete", "e2e-none"],
        &["exec", "e2e-none", "true"],
        &["ps", "e2e-none"],
        &["pause", "e2e-none"],
        &["resume", "e2e-none"],
    ] {
        let reason = runtime.call(words).refused();
        assert!(reason.contains("e2e-none") || reason.contains("does not exist"), "{words:?}: {reason}");
    }
    // Callers use it to make sure, so it is no error.
    runtime.call(&["delete", "--force", "e2e-none"]).code(0);
}

fn wrong_operations_on_a_created_container() {
    let container = Runtime::under_test().create(&Bundle::idle());
    container.op("resume").refused();
    let bundle = Bundle::idle();
    let duplicate = ["create", "--bundle", bundle.save().to_str().unwrap(), container.id.as_str()];
    let reason = Runtime::under_test().call(&duplicate).refused();
    assert!(reason.contains(container.id.as_str()) || reason.contains("exist"), "{reason}");
    container.op_with(&["kill"], &["NOSUCHSIGNAL"]).refused();
    assert_eq!(container.status(), "created");
    container.op("start").ok();
    container.program.expect_line("ready");
}

fn wrong_operations_on_a_running_container() {
    let container = Runtime::under_test().idle();
    for operation in ["start", "delete", "resume"] {
        container.op(operation).refused();
        assert_eq!(container.status(), "running", "after {operation}");
    }
    let bundle = Bundle::idle();
    let path = bundle.save().to_str().unwrap();
    for operation in ["create", "run"] {
        Runtime::under_test().call(&[operation, "--bundle", path, container.id.as_str()]).refused();
    }
    assert_eq!(container.exec("echo unharmed").ok(), "unharmed\n");
}

fn wrong_operations_on_a_stopped_container() {
    let container = Runtime::under_test().idle();
    let pid = container.pid();
    container.kill("KILL");
    container.wait_stopped(pid);
    for operation in ["start", "pause", "resume"] {
        container.op(operation).refused();
    }
    container.op_with(&["kill"], &["TERM"]).refused();
    container.exec("true").refused();
    assert_eq!(container.status(), "stopped");
    container.delete();
}

fn killed_before_start_never_runs() {
    let container = Runtime::under_test().create(&Bundle::sh("echo runs"));
    let pid = container.pid();
    container.kill("KILL");
    container.wait_stopped(pid);
    container.op("start").refused();
    assert_eq!(container.program.stdout.len(), 0);
    container.delete();
}

fn forced_delete_ends_a_running_container() {
    let mut container = Runtime::under_test().idle();
    container.op_with(&["delete", "--force"], &[]).ok();
    container.op("state").refused();
    // Nobody holds its output any more.
    container.program.finish().code(0);
}

/// When asked by its environment, this program is not the suite but a caller like conmon: a subreaper that
/// creates and starts a container and ends as the process of the pid file does.
pub fn as_subreaper() -> Option<ExitCode> {
    let pid_file = std::env::var_os("E2E_SUBREAPER")?;
    nix::sys::prctl::set_child_subreaper(true).expect("become a subreaper");
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    let (program, rest) = words.split_first().expect("a command");
    let status = Command::new(program).args(rest).status().expect("run the command");
    assert!(status.success(), "create: {status}");
    let pid = fs::read_to_string(pid_file).expect("read the pid file").trim().parse().expect("a pid");
    println!("created {pid}");
    let status = waitpid(Pid::from_raw(pid), None).expect("wait for the pid of the pid file");
    let code = match status {
        WaitStatus::Exited(_, code) => code,
        WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
        other => panic!("unexpected {other:?}"),
    };
    Some(ExitCode::from(u8::try_from(code).expect("an exit code")))
}

fn pid_of_the_pid_file_ends_as_the_workload_does() {
    let runtime = Runtime::under_test();
    for (end, code) in [("exit 42", 42), ("exec sleep 100000", 128 + 9)] {
        let bundle = Bundle::sh(&format!("echo running; {end}"));
        let id = Id::new();
        let pid_file = bundle.dir().join("pid");
        let create = runtime.command(["create", "--pid-file"]);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env("E2E_SUBREAPER", &pid_file).arg(create.get_program()).args(create.get_args());
        command.arg(&pid_file).arg("--bundle").arg(bundle.save()).arg(&id);
        let mut container = runtime.adopt(&bundle, id, Program::spawn(command, Stdin::Null));
        let pid = container.program.line().strip_prefix("created ").expect("a pid").parse::<i32>().unwrap();
        assert_eq!(container.pid(), pid);
        container.op("start").ok();
        container.program.expect_line("running");
        if code > 128 {
            container.kill("KILL");
        }
        assert_eq!(container.program.exit(), Exit::Code(code));
        container.delete();
    }
}

fn killing_the_host_process_stops_the_container() {
    let mut container = Runtime::under_test().idle();
    let pid = container.pid();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    container.wait_stopped(pid);
    container.exec("true").refused();
    container.op("delete").ok();
    container.program.finish();
    container.op("state").refused();
}

fn signals_to_the_host_process_reach_the_workload() {
    let script = "trap 'echo usr1' USR1; trap 'echo term; exit 0' TERM; echo ready; while :; do sleep 1000 & wait $!; done";
    let container = Runtime::under_test().create(&Bundle::sh(script));
    container.op("start").ok();
    container.program.expect_line("ready");
    let pid = container.pid();
    kill(Pid::from_raw(pid), Signal::SIGUSR1).unwrap();
    container.program.expect_line("usr1");
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    container.program.expect_line("term");
    container.wait_stopped(pid);
    container.delete();
}

fn kill_all_reaches_every_process() {
    let script = "
        trap 'echo first' TERM; sleep 100000 & child=$!; echo ready
        wait $child; wait $child; echo child $?; exit 8";
    let container = Runtime::under_test().start(&Bundle::sh(script), Stdin::Null);
    container.program.expect_line("ready");
    // Without --all only the first process has it.
    container.kill("TERM");
    container.program.expect_line("first");
    container.op_with(&["kill", "--all"], &["TERM"]).code(0);
    container.program.expect_line("first");
    container.program.expect_line("child 143");
    container.finish().code(8);
}

fn ps_lists_the_containers_processes() {
    let container =
        Runtime::under_test().create(&Bundle::sh("sleep 100001 & sleep 100002 & echo ready; wait"));
    container.op("start").ok();
    container.program.expect_line("ready");
    let text = container.op_with(&["ps", "--format", "json"], &[]).ok();
    let pids: Vec<i64> = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    // Its callers look the numbers up on the host.
    assert!(pids.contains(&container.pid().into()), "{text}");
    for pid in &pids {
        let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let containers = std::fs::read_to_string(format!("/proc/{}/cgroup", container.pid())).unwrap();
        assert_eq!(cgroup, containers, "{text}");
    }
    // So do those of execs, detached ones too.
    let dir = host_scratch();
    let pid_file = dir.path().join("pid");
    let options = ["--detach", "--pid-file", pid_file.to_str().unwrap()];
    let mut detached = container.start_exec(&options, &["sleep", "100003"], Stdin::Null);
    assert_eq!(detached.exit(), Exit::Code(0));
    let mut exec = container.start_exec(&[], &["sh", "-c", "echo begun; exec sleep 100004"], Stdin::Null);
    exec.expect_line("begun");
    let text = container.op_with(&["ps", "--format", "json"], &[]).ok();
    let with_execs: Vec<i64> = serde_json::from_str(&text).unwrap();
    let recorded: i64 = std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    assert!(with_execs.contains(&recorded) && with_execs.contains(&exec.pid().into()), "{with_execs:?}");
    for pid in [recorded as i32, exec.pid()] {
        kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    }
    exec.finish().code(143);
    wait_gone(recorded as i32);
    let table = container.op("ps").ok();
    assert!(table.lines().next().is_some_and(|head| head.contains("PID")), "{table}");
    assert_eq!(table.lines().count(), 4, "{table}");
    for command in ["sleep 100001", "sleep 100002"] {
        assert_eq!(
            table.matches(command).count(),
            1 + usize::from(table.contains(&format!("{command} &"))),
            "{table}"
        );
    }
}

fn paused_container_stands_still() {
    let runtime = Runtime::under_test();
    let container = runtime.create(&Bundle::sh("while :; do echo tick; done"));
    container.op("start").ok();
    container.program.expect_line("tick");
    container.op("pause").ok();
    assert_eq!(container.status(), "paused");
    container.op("pause").refused();
    container.exec("true").refused();
    // A whole other container comes and goes: what was on its way has arrived, and in the time of a second one
    // nothing more comes from a loop that would write thousands of lines.
    let other = Bundle::sh("echo other");
    runtime.run(&other).ok();
    let before = container.program.stdout.len();
    runtime.run(&other).ok();
    assert_eq!(container.program.stdout.len(), before);
    container.op("resume").ok();
    assert_eq!(container.status(), "running");
    let more = container.program.stdout.wait_for(|bytes| (bytes.len() > before + 1000).then_some(()));
    assert!(matches!(more, Ok(Some(()))), "does not go on");
    // It can be killed while it is paused.
    let pid = container.pid();
    container.op("pause").ok();
    container.kill("KILL");
    container.wait_stopped(pid);
    container.delete();
}

fn created_container_that_was_paused_can_be_started() {
    let container = Runtime::under_test().create(&Bundle::sh("echo ran"));
    container.op("pause").ok();
    container.op("resume").ok();
    assert_eq!(container.status(), "created");
    container.op("start").ok();
    container.program.expect_line("ran");
}

fn list_shows_what_there_is() {
    let runtime = Runtime::under_test();
    let (created, running) = (runtime.create(&Bundle::idle()), runtime.idle());
    let table = runtime.call(&["list"]).ok();
    for (container, status) in [(&created, "created"), (&running, "running")] {
        let line = table.lines().find(|line| line.split_whitespace().next() == Some(container.id.as_str()));
        assert!(line.is_some_and(|line| line.split_whitespace().any(|word| word == status)), "{table}");
    }
    let quiet = runtime.call(&["list", "--quiet"]).ok();
    assert!(quiet.lines().any(|line| line == created.id.as_str()), "{quiet}");
    let json: Vec<Value> = serde_json::from_str(&runtime.call(&["list", "--format", "json"]).ok()).unwrap();
    let entry = json.iter().find(|entry| entry["id"] == running.id.as_str()).expect("listed");
    assert_eq!(entry["status"], "running");
    assert_eq!(entry["pid"].as_i64(), Some(running.pid().into()));
}

fn detached_run_returns_at_once() {
    let runtime = Runtime::under_test();
    let bundle = Bundle::sh("echo begun; read line; echo $line; exit 3");
    let id = Id::new();
    let pid_file = bundle.dir().join("pid");
    let mut command = runtime.command(["run", "--detach", "--pid-file"]);
    command.arg(&pid_file).arg("--bundle").arg(bundle.save()).arg(&id);
    let mut container = runtime.adopt(&bundle, id, Program::spawn(command, Stdin::Pipe));
    assert_eq!(container.program.exit(), Exit::Code(0), "{}", container.program.report());
    container.program.expect_line("begun");
    let pid = container.pid();
    assert_eq!(fs::read_to_string(&pid_file).unwrap().trim().parse::<i32>().unwrap(), pid);
    container.program.write("word\n");
    container.program.expect_line("word");
    container.wait_stopped(pid);
    container.delete();
}

fn annotations_are_in_the_state() {
    let container = Runtime::under_test().create(&Bundle::idle().set("/annotations/org.example", "value"));
    assert_eq!(container.state()["annotations"]["org.example"], "value");
}

fn spec_writes_a_bundle_that_runs() {
    let runtime = Runtime::under_test();
    let dir = host_scratch();
    runtime.call(&["spec", "--bundle", dir.path().to_str().unwrap()]).ok();
    let file = dir.path().join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(config["process"]["args"], serde_json::json!(["sh"]));
    assert_eq!(config["root"]["path"], "rootfs");
    // It does not overwrite one.
    runtime.call(&["spec", "--bundle", dir.path().to_str().unwrap()]).refused();
    config["process"]["terminal"] = false.into();
    fs::write(&file, config.to_string()).unwrap();
    let copied =
        Command::new("cp").arg("-a").arg(Rootfs::Busybox.path()).arg(dir.path().join("rootfs")).status();
    assert!(copied.unwrap().success());
    let id = Id::new();
    let mut command = runtime.command(["run", id.as_str()]);
    command.current_dir(dir.path());
    let text = Program::spawn(command, Stdin::Bytes(b"echo from $$; hostname\n".to_vec())).finish().ok();
    assert!(text.starts_with("from 1\n"), "{text}");
}

fn features_tell_what_is_supported() {
    let features: Value = serde_json::from_str(&Runtime::under_test().call(&["features"]).ok()).unwrap();
    assert!(features["ociVersionMin"].is_string() && features["ociVersionMax"].is_string(), "{features}");
    let mounts = features["mountOptions"].as_array().expect("mountOptions");
    assert!(mounts.iter().any(|option| option == "nosuid"), "{features}");
    assert_eq!(features["linux"]["cgroup"]["v2"], true, "{features}");
    assert_eq!(features["linux"]["seccomp"]["enabled"], true, "{features}");
}

fn version_is_told() {
    let text = Runtime::under_test().call(&["--version"]).ok();
    assert!(
        text.lines().next().is_some_and(|line| line.starts_with(&Runtime::under_test().name())),
        "{text}"
    );
    assert!(text.contains("spec: 1."), "{text}");
}

fn log_file_gets_the_error_as_json() {
    let dir = host_scratch();
    let log = dir.path().join("log.json");
    let runtime = Runtime::under_test().global(&["--log", log.to_str().unwrap(), "--log-format", "json"]);
    runtime.call(&["run", "--bundle", dir.path().to_str().unwrap(), "e2e-log"]).refused();
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let error =
        lines.iter().find(|line| line["level"] == "error").unwrap_or_else(|| panic!("no error: {text}"));
    assert!(error["msg"].as_str().is_some_and(|message| message.contains("config.json")), "{text}");
    assert!(error["time"].is_string(), "{text}");
}

fn root_directory_separates_containers() {
    let dir = host_scratch();
    let other = Runtime::under_test().global(&["--root", dir.path().to_str().unwrap()]);
    let container = other.idle();
    Runtime::under_test().call(&["state", container.id.as_str()]).refused();
    assert_eq!(container.exec("echo here").ok(), "here\n");
    let pid = container.pid();
    container.kill("KILL");
    wait_gone(pid);
    container.delete();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
