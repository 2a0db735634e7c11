//! The container's cgroup on the host: it is the one that the bundle names, holds what the container costs, has the
//! limits that only a host can set, and goes with the container.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::harness::{Bundle, Case, Exit, Id, Program, Runtime, Stdin, case, vmm_of};

const VM: &str = "the cgroup of a VM";

pub const CASES: &[Case] = &[
    case!(named_cgroup_holds_the_container_and_goes_with_it),
    case!(nested_and_systemd_paths_are_laid_out),
    case!(cgroup_goes_after_its_processes_were_killed),
    case!(cgroup_of_a_run_is_gone_when_it_returns),
    case!(limits_of_the_host_stand_there),
    case!(guest_kills_for_memory_before_the_host).stockade_only(VM),
    case!(cgroup_in_use_is_refused).stockade_only("the lab's runc takes it"),
    case!(frozen_cgroup_is_refused),
    case!(one_id_at_a_time_and_nobody_else_harms_it).stockade_only(VM),
    case!(deletion_spares_who_lives_there_by_now).stockade_only(VM),
    case!(cgroup_goes_though_the_callers_is_gone).stockade_only(VM),
    case!(limits_without_a_name_have_a_cgroup_where_runc_makes_it),
];

fn on_host(path: &str) -> PathBuf {
    Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/'))
}

fn read(path: &str, file: &str) -> String {
    fs::read_to_string(on_host(path).join(file)).unwrap_or_else(|e| panic!("{path}/{file}: {e}"))
}

fn fresh() -> String {
    format!("/{}", Id::new().as_str())
}

fn cgroup_of(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap().trim().to_owned()
}

fn named_cgroup_holds_the_container_and_goes_with_it() {
    let (runtime, path) = (Runtime::under_test(), fresh());
    let container = runtime.create(&Bundle::idle().set("/linux/cgroupsPath", path.as_str()));
    container.op("start").ok();
    container.program.expect_line("ready");
    let pid = container.pid();
    assert_eq!(cgroup_of(pid), format!("0::{path}"));
    if runtime.is_stockade() {
        let members = |path: &str| {
            read(path, "cgroup.procs").lines().map(|pid| pid.parse().unwrap()).collect::<Vec<i32>>()
        };
        assert_eq!(members(&path), [pid], "the supervisor");
        assert_eq!(members(&format!("{path}/vmm")), [vmm_of(pid).expect("a VMM")]);
        let used: u64 = read(&path, "memory.current").trim().parse().unwrap();
        assert!(used > 20 << 20, "the guest's memory is not accounted: {used}");
    }
    container.kill("KILL");
    container.wait_stopped(pid);
    container.delete();
    assert!(!on_host(&path).exists());
}

fn nested_and_systemd_paths_are_laid_out() {
    let name = Id::new().as_str().replace('-', "");
    for (global, named, path) in [
        (&[][..], format!("/{name}/in/depth"), format!("/{name}/in/depth")),
        (
            &["--systemd-cgroup"],
            format!("{name}-pod.slice:cri:x"),
            format!("/{name}.slice/{name}-pod.slice/cri-x.scope"),
        ),
    ] {
        let runtime = Runtime::under_test().global(global);
        if !runtime.is_stockade() && !global.is_empty() {
            continue; // The lab has no systemd, which runc would ask.
        }
        let bundle = Bundle::idle()
            .set("/linux/cgroupsPath", named)
            .set("/linux/resources/memory", json!({ "limit": 64 << 20 }));
        let container = runtime.create(&bundle);
        assert_eq!(cgroup_of(container.pid()), format!("0::{path}"));
        assert_ne!(read(&path, "memory.max"), "max\n");
        container.op_with(&["delete", "--force"], &[]).ok();
        let leaf = on_host(&path);
        assert!(!leaf.exists());
        // The parents are nobody's: as under runc they stay.
        for parent in leaf.ancestors().skip(1).take_while(|parent| *parent != Path::new("/sys/fs/cgroup")) {
            fs::remove_dir(parent).unwrap();
        }
    }
}

fn cgroup_goes_after_its_processes_were_killed() {
    let path = fresh();
    let container = Runtime::under_test().create(&Bundle::idle().set("/linux/cgroupsPath", path.as_str()));
    let pid = container.pid();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    container.wait_stopped(pid);
    container.delete();
    assert!(!on_host(&path).exists());
}

fn cgroup_of_a_run_is_gone_when_it_returns() {
    let path = fresh();
    let bundle = Bundle::sh("exit 5").set("/linux/cgroupsPath", path.as_str());
    Runtime::under_test().run(&bundle).code(5);
    assert!(!on_host(&path).exists());
    // Nor is there one after a start that failed.
    let bundle = Bundle::sh("true")
        .set("/linux/cgroupsPath", path.as_str())
        .set("/process/args", json!(["/no/such/program"]));
    Runtime::under_test().run(&bundle).refused();
    assert!(!on_host(&path).exists());
}

fn limits_of_the_host_stand_there() {
    let (runtime, path) = (Runtime::under_test(), fresh());
    let device = fs::metadata("/").unwrap().dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let bundle = Bundle::idle()
        .set("/linux/cgroupsPath", path.as_str())
        .set("/linux/resources/cpu", json!({ "shares": 512, "cpus": "0", "mems": "0" }))
        .set(
            "/linux/resources/blockIO",
            json!({ "throttleReadBpsDevice": [{ "major": major, "minor": minor, "rate": 50_000_000 }] }),
        );
    let container = runtime.create(&bundle);
    assert_eq!(read(&path, "cpuset.cpus"), "0\n");
    assert_eq!(read(&path, "cpu.weight"), "20\n");
    let limits = read(&path, "io.max");
    assert!(limits.contains(&format!("{major}:{minor} rbps=50000000")), "{limits}");
    let resources = json!({ "cpu": { "shares": 1024 } }).to_string();
    let words = ["update", "--resources", "-", container.id.as_str()];
    Program::spawn(runtime.command(words), Stdin::Bytes(resources.into_bytes())).finish().code(0);
    assert_eq!(read(&path, "cpu.weight"), "39\n");
}

fn guest_kills_for_memory_before_the_host() {
    let path = fresh();
    let script =
        "cat /sys/fs/cgroup/memory.max; perl -e \"push @x, 'x' x 1048576 while 1\"; echo $?; read line";
    let bundle = Bundle::debian(script)
        .set("/linux/cgroupsPath", path.as_str())
        .set("/linux/resources/memory", json!({ "limit": 64 << 20, "swap": 64 << 20 }));
    let mut container = Runtime::under_test().start(&bundle, Stdin::Pipe);
    for line in ["67108864", "137"] {
        container.program.expect_line(line);
    }
    let events = read(&path, "memory.events");
    assert!(events.contains("oom_kill 0\n"), "{events}");
    let (most, used): (u64, u64) = (
        read(&path, "memory.max").trim().parse().unwrap(),
        read(&path, "memory.peak").trim().parse().unwrap(),
    );
    assert!((64 << 20..most).contains(&used), "{used} of {most}");
    container.program.write("end\n");
    container.finish();
}

fn frozen_cgroup_is_refused() {
    let path = fresh();
    fs::create_dir(on_host(&path)).unwrap();
    fs::write(on_host(&path).join("cgroup.freeze"), "1").unwrap();
    let bundle = Bundle::idle().set("/linux/cgroupsPath", path.as_str());
    let reason = Runtime::under_test().run(&bundle).refused();
    assert!(reason.contains("container's cgroup unexpectedly frozen"), "{reason}");
    fs::remove_dir(on_host(&path)).unwrap();
}

fn limits_without_a_name_have_a_cgroup_where_runc_makes_it() {
    let bundle = Bundle::idle().set("/linux/resources/pids", json!({ "limit": 100 }));
    let container = Runtime::under_test().create(&bundle);
    let path = format!("/{}", container.id.as_str());
    assert_eq!(cgroup_of(container.pid()), format!("0::{path}"));
    // With all that the host has, for its container and what that may make below.
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap();
    assert_eq!(read(&path, "cgroup.controllers"), controllers);
    let pid = container.pid();
    container.kill("KILL");
    container.wait_stopped(pid);
    container.delete();
    assert!(!on_host(&path).exists());
}

fn cgroup_in_use_is_refused() {
    let path = fresh();
    let bundle = Bundle::idle().set("/linux/cgroupsPath", path.as_str());
    let container = Runtime::under_test().create(&bundle);
    let reason = Runtime::under_test().run(&bundle).refused();
    assert!(reason.contains(&path) && reason.contains("not empty"), "{reason}");
    assert_eq!(container.status(), "created");
}

fn one_id_at_a_time_and_nobody_else_harms_it() {
    let (runtime, path, id) = (Runtime::under_test(), fresh(), Id::new());
    let bundle = Bundle::idle().set("/linux/cgroupsPath", path.as_str());
    let create = |id: &Id| {
        let words = ["create", "--bundle", bundle.save().to_str().unwrap(), id.as_str()];
        Program::spawn(runtime.command(words), Stdin::Null)
    };
    let mut both = [(); 2].map(|()| create(&id));
    let mut made = both.each_mut().map(|program| program.exit() == Exit::Code(0));
    assert!(made[0] != made[1], "{}\n{}", both[0].report(), both[1].report());
    if made[1] {
        both.reverse();
        made.reverse();
    }
    let [winner, mut loser] = both;
    let reason = loser.finish().refused();
    assert!(reason.contains("container with given ID already exists"), "{reason}");
    // And of one that runs.
    let container = runtime.adopt(&bundle, id, winner);
    container.op("start").ok();
    container.program.expect_line("ready");
    let reason = create(&container.id).finish().refused();
    assert!(reason.contains("container with given ID already exists"), "{reason}");
    assert_eq!(container.exec("echo unharmed").ok(), "unharmed\n");
    let pid = container.pid();
    container.kill("KILL");
    container.wait_stopped(pid);
    container.delete();
    assert!(!on_host(&path).exists());
}

fn deletion_spares_who_lives_there_by_now() {
    let (runtime, path) = (Runtime::under_test(), fresh());
    let bundle = || Bundle::idle().set("/linux/cgroupsPath", path.as_str());
    let old = runtime.create(&bundle());
    let pid = old.pid();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    old.wait_stopped(pid);
    let new = runtime.create(&bundle());
    new.op("start").ok();
    new.program.expect_line("ready");
    old.delete();
    assert_eq!(new.exec("echo unharmed").ok(), "unharmed\n");
    assert_eq!(cgroup_of(new.pid()), format!("0::{path}"));
    let pid = new.pid();
    new.kill("KILL");
    new.wait_stopped(pid);
    new.delete();
    assert!(!on_host(&path).exists());
}

fn cgroup_goes_though_the_callers_is_gone() {
    let (path, callers) = (fresh(), on_host(&fresh()));
    fs::create_dir(&callers).unwrap();
    let bundle = Bundle::sh("echo ready; read line; exit 5").set("/linux/cgroupsPath", path.as_str());
    let (runtime, id) = (Runtime::under_test(), Id::new());
    let script = "echo 0 > \"$0\"; exec \"$@\"";
    let run = runtime.run_command(&bundle, &id);
    let mut command = std::process::Command::new("sh");
    command
        .args(["-c", script])
        .arg(callers.join("cgroup.procs"))
        .arg(run.get_program())
        .args(run.get_args());
    let mut program = Program::spawn(command, Stdin::Pipe);
    program.expect_line("ready");
    fs::remove_dir(&callers).unwrap();
    program.write("\n");
    program.finish().code(5);
    assert!(!on_host(&path).exists());
}
