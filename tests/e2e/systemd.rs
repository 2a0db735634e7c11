//! Hosts that systemd runs, as most are: sandboxes live in scopes that it makes and knows the limits of.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Instant;

use serde_json::json;

use crate::harness::{
    Bundle, Case, Ended, Exit, HANG, Program, Rootfs, Runtime, Stdin, Systemd, case, host_scratch,
};

pub const CASES: &[Case] = &[
    case!(a_scope_holds_the_container_and_its_limits_and_goes_with_it).exclusive(),
    case!(scopes_of_the_killed_and_of_the_refused_are_gone).exclusive(),
    case!(a_pod_of_podmans_has_its_containers_in_its_slice).exclusive(),
    case!(podman_with_its_usual_manager_sees_what_a_container_takes).exclusive(),
    case!(a_shim_moves_into_the_scope_of_its_sandbox).exclusive(),
];

const SCOPE: &str = "pre-name.scope";
const CGROUP: &str = "lab.slice/lab-x.slice/pre-name.scope";
/// The one that containerd is run as.
const UNIT: &str = "lab-containerd";
const MIB: u64 = 1 << 20;

fn program() -> String {
    Runtime::under_test().path().display().to_string()
}

fn limited() -> Bundle {
    Bundle::idle()
        .set("/linux/cgroupsPath", "lab-x.slice:pre:name")
        .set("/linux/resources/memory", json!({"limit": 100 * MIB}))
        .set("/linux/resources/cpu", json!({"shares": 512, "quota": 50000, "period": 100000}))
}

fn run_detached(host: &Systemd, bundle: &Bundle, id: &str) -> Exit {
    let bundle = bundle.save().display().to_string();
    host.detach(&[&program(), "--systemd-cgroup", "run", "--detach", "--bundle", &bundle, id])
}

fn number(path: &Path) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.trim().parse().unwrap_or_else(|e| panic!("{}: {text:?}: {e}", path.display()))
}

fn a_scope_holds_the_container_and_its_limits_and_goes_with_it() {
    let (host, program, bundle) = (Systemd::boot(), program(), limited());
    let call = |words: &[&str]| host.call(&[&[program.as_str(), "--systemd-cgroup"], words].concat());
    assert_eq!(run_detached(&host, &bundle, "c"), Exit::Code(0));
    assert_eq!(host.property(SCOPE, "ActiveState"), "active");
    assert_eq!(host.property(SCOPE, "ControlGroup"), format!("/{CGROUP}"));
    let cgroup = host.cgroup(CGROUP);
    for (name, of_the_container) in
        [("cgroup.procs", true), ("vmm/cgroup.procs", Runtime::under_test().is_stockade())]
    {
        let processes = fs::read_to_string(cgroup.join(name)).unwrap_or_default();
        assert_eq!(processes.lines().count(), usize::from(of_the_container), "{name}: {processes}");
    }
    let limits = || (number(&cgroup.join("memory.max")), number(&cgroup.join("cpu.weight")));
    let (memory, weight) = limits();
    assert!(memory >= 100 * MIB && weight == 20, "{memory} {weight}");
    // systemd takes away what it does not know of.
    host.call(&["systemctl", "daemon-reload"]).code(0);
    assert_eq!(limits(), (memory, weight));
    call(&["update", "--cpu-share", "256", "c"]).code(0);
    host.call(&["systemctl", "daemon-reload"]).code(0);
    assert_eq!(limits(), (memory, 10));
    assert_eq!(host.property(SCOPE, "CPUWeight"), "10");
    call(&["kill", "c", "KILL"]).code(0);
    call(&["delete", "--force", "c"]).code(0);
    host.wait_gone(SCOPE);
    assert!(!cgroup.exists());
}

fn scopes_of_the_killed_and_of_the_refused_are_gone() {
    let (host, program, bundle) = (Systemd::boot(), program(), limited());
    let call = |words: &[&str]| host.call(&[&[program.as_str(), "--systemd-cgroup"], words].concat());
    assert_eq!(run_detached(&host, &bundle, "c"), Exit::Code(0));
    // The name is taken.
    let refused = call(&["run", "--bundle", &bundle.save().display().to_string(), "other"]).refused();
    assert!(refused.contains(SCOPE), "{refused}");
    assert_eq!(host.property(SCOPE, "ActiveState"), "active");
    host.call(&["systemctl", "kill", "--signal", "KILL", SCOPE]).code(0);
    call(&["delete", "--force", "c"]).code(0);
    host.wait_gone(SCOPE);
    // A directory that is called like somebody else's unit is not that.
    let other = "lab-other.scope";
    let mut theirs = Program::spawn(
        host.command(&[
            "systemd-run",
            "--quiet",
            "--scope",
            "--unit",
            "lab-other",
            "sh",
            "-c",
            "echo up; exec sleep 1000",
        ]),
        Stdin::Null,
    );
    theirs.expect_line("up");
    let named = limited().set("/linux/cgroupsPath", format!("/lab/{other}"));
    let named = named.save().display().to_string();
    assert_eq!(host.detach(&[&program, "run", "--detach", "--bundle", &named, "c"]), Exit::Code(0));
    call(&["update", "--cpu-share", "256", "c"]).code(0);
    call(&["delete", "--force", "c"]).code(0);
    assert_eq!(host.property(other, "ActiveState"), "active");
    assert_eq!(host.property(other, "CPUWeight"), "[not set]");
    host.call(&["systemctl", "stop", other]).code(0);
    theirs.exit();
    // Nothing in it ever runs.
    let missing = limited().set("/process/args", json!(["/no-such-program"]));
    call(&["run", "--bundle", &missing.save().display().to_string(), "c"]).refused();
    host.wait_gone(SCOPE);
    // Left behind frozen: systemd would use it, and whoever it put there would stand still.
    let left = host.cgroup(CGROUP);
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join("cgroup.freeze"), "1").unwrap();
    let refused = call(&["run", "--bundle", &limited().save().display().to_string(), "c"]).refused();
    assert!(refused.contains("frozen") && refused.contains(SCOPE), "{refused}");
    fs::remove_dir(&left).unwrap();
    let no_path = limited().set("/linux/cgroupsPath", "/not/systemds");
    let refused = call(&["run", "--bundle", &no_path.save().display().to_string(), "c"]).refused();
    assert!(refused.contains("cgroupsPath"), "{refused}");
}

/// Calls of Podman with its usual manager and an image `lab`, in a host that systemd runs.
fn podman_on<'a>(host: &'a Systemd, dir: &Path) -> impl Fn(&[&str]) -> Ended + 'a {
    let place = |name: &str| dir.join(name).display().to_string();
    let (root, runroot, archive, program) = (place("root"), place("runroot"), place("image.tar"), program());
    let podman = move |words: &[&str]| {
        let own = ["podman", "--root", &root, "--runroot", &runroot, "--runtime", &program];
        host.call(&[&own[..], words].concat())
    };
    assert_eq!(podman(&["info", "--format", "{{.Host.CgroupManager}}"]).code(0).text().trim(), "systemd");
    let rootfs = Rootfs::Busybox.path().display().to_string();
    host.call(&["tar", "-C", &rootfs, "-cf", &archive, "."]).code(0);
    podman(&["import", "--quiet", &archive, "lab"]).code(0);
    podman
}

fn podman_with_its_usual_manager_sees_what_a_container_takes() {
    let (host, dir) = (Systemd::boot(), host_scratch());
    let podman = podman_on(&host, dir.path());
    podman(&[
        "run",
        "--detach",
        "--name",
        "c",
        "--network",
        "none",
        "--memory",
        "128m",
        "lab",
        "sleep",
        "1000",
    ])
    .code(0);
    let id = podman(&["inspect", "--format", "{{.Id}}", "c"]).code(0).text().trim().to_owned();
    let scope = format!("libpod-{id}.scope");
    assert_eq!(host.property(&scope, "ControlGroup"), format!("/machine.slice/{scope}"));
    let stats = podman(&["stats", "--no-stream", "--no-reset", "--format", "{{.MemUsage}} {{.PIDs}}", "c"])
        .code(0)
        .text();
    assert!(!stats.starts_with("0B") && !stats.trim().ends_with(" 0"), "{stats}");
    podman(&["rm", "--force", "--time", "0", "c"]).code(0);
    // The one of conmon, which Podman has made, goes when that has ended.
    host.wait_gone(&scope);
    podman(&["system", "reset", "--force"]).code(0);
}

fn a_pod_of_podmans_has_its_containers_in_its_slice() {
    let (host, dir) = (Systemd::boot(), host_scratch());
    let podman = podman_on(&host, dir.path());
    let infra = ["--infra-image", "lab", "--infra-command", "sleep 1000"];
    let create = [&["pod", "create", "--name", "p", "--network", "none"][..], &infra].concat();
    let pod = podman(&create).code(0).text().trim().to_owned();
    for name in ["a", "b"] {
        podman(&["run", "--detach", "--name", name, "--pod", "p", "lab", "sleep", "1000"]).code(0);
        podman(&["exec", name, "true"]).code(0);
        let id = podman(&["inspect", "--format", "{{.Id}}", name]).code(0).text().trim().to_owned();
        let scope = format!("libpod-{id}.scope");
        let slice = format!("/machine.slice/machine-libpod_pod_{pod}.slice");
        assert_eq!(host.property(&scope, "ControlGroup"), format!("{slice}/{scope}"));
    }
    let count = podman(&["pod", "inspect", "--format", "{{.State}} {{.NumContainers}}", "p"]);
    assert_eq!(count.code(0).text(), "Running 3\n");
    podman(&["rm", "--force", "--time", "0", "a"]).code(0);
    podman(&["exec", "b", "true"]).code(0);
    podman(&["pod", "rm", "--force", "--time", "0", "p"]).code(0);
    podman(&["system", "reset", "--force"]).code(0);
}

/// As kubelet names the cgroups of pods with its usual driver.
fn a_shim_moves_into_the_scope_of_its_sandbox() {
    let (host, dir) = (Systemd::boot(), host_scratch());
    let place = |name: &str| dir.path().join(name).display().to_string();
    let socket = place("socket");
    let config = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {socket:?}\n",
        place("root"),
        place("state"),
    );
    fs::write(place("config.toml"), config).unwrap();
    symlink(program(), place("containerd-shim-stockade-v2")).unwrap();
    let path = format!("--setenv=PATH={}:/usr/sbin:/usr/bin:/sbin:/bin", dir.path().display());
    host.call(&["systemd-run", &path, "--unit", UNIT, "containerd", "--config", &place("config.toml")])
        .code(0);
    let ctr = |words: &[&str]| host.call(&[&["ctr", "--address", socket.as_str()], words].concat());
    let begin = Instant::now();
    while ctr(&["version"]).exit != Exit::Code(0) {
        assert!(begin.elapsed() < HANG, "hung: containerd does not answer");
    }
    let rootfs = Rootfs::Busybox.path().display().to_string();
    let runtime = Runtime::under_test();
    let kind = if runtime.is_stockade() { "io.containerd.stockade.v2" } else { "io.containerd.runc.v2" };
    ctr(&[
        "run",
        "--detach",
        "--runtime",
        kind,
        "--cgroup",
        "lab-x.slice:pre:name",
        "--rootfs",
        &rootfs,
        "c",
        "sleep",
        "1000",
    ])
    .code(0);
    let inside = fs::read_to_string(host.cgroup(CGROUP).join("vmm/cgroup.procs")).unwrap();
    assert_eq!(inside.lines().count(), 1, "{inside}");
    let shim = fs::read_to_string(host.cgroup(CGROUP).join("cgroup.procs")).unwrap();
    assert_eq!(shim.lines().count(), 1, "{shim}");
    ctr(&["task", "kill", "--signal", "KILL", "c"]).code(0);
    ctr(&["task", "delete", "--force", "c"]);
    ctr(&["container", "delete", "c"]).code(0);
    host.wait_gone(SCOPE);
    host.call(&["systemctl", "stop", UNIT]).code(0);
}
