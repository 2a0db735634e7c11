//! `stockade install` and `uninstall`: what a host's engines need is there, and gone again.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use stockade_tests::cri::host::config_version;

use crate::harness::{
    Bundle, Case, Ended, Podman, Program, Rootfs, Runtime, Stdin, Systemd, case, host_scratch, tool,
};

const OURS: &str = "a command of stockade's own";

pub const CASES: &[Case] = &[
    case!(engines_know_it_until_it_is_uninstalled).stockade_only(OURS),
    case!(a_configuration_is_begun_in_the_words_of_the_containerd_that_is_there).stockade_only(OURS),
    case!(the_daemon_sets_image_installs_on_the_host_and_tells_its_figures).stockade_only(OURS).exclusive(),
    case!(systemd_restarts_an_engine_that_has_to_read_its_configuration).stockade_only(OURS).exclusive(),
    case!(a_dry_run_changes_nothing).stockade_only(OURS),
    case!(nothing_is_removed_under_running_containers).stockade_only(OURS),
    case!(a_full_disk_leaves_nothing_half_made).stockade_only(OURS),
];

/// What is deployed on a cluster's nodes, as the repository has it.
const CONTAINERFILE: &str = include_str!("../../runtime/deploy/Containerfile");
const DAEMON_SET: &str = include_str!("../../runtime/deploy/daemonset.yaml");
/// As Debian's package has it.
const CONTAINERD: &str = "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    \
                          [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\"\n";

/// The host's root directory of somebody who has containerd and Podman.
fn host() -> tempfile::TempDir {
    let dir = host_scratch();
    for name in ["containerd", "containers"] {
        fs::create_dir_all(dir.path().join("etc").join(name)).unwrap();
    }
    fs::write(dir.path().join("etc/containerd/config.toml"), CONTAINERD).unwrap();
    dir
}

#[track_caller]
fn call(what: &str, host: &Path, more: &[&str]) -> Ended {
    let host = host.display().to_string();
    Runtime::under_test().call(&[&[what, "--host-root", &host], more].concat())
}

fn files(dir: &Path) -> Vec<String> {
    let output = Command::new("find").arg(dir).args(["-type", "f", "-o", "-type", "l"]).output().unwrap();
    let mut found: Vec<_> = String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
    found.sort();
    found
}

/// What the host's containerd makes of a configuration, which must have the runtime in it.
#[track_caller]
fn understood(config: &Path) -> String {
    let dump = command("containerd", &["--config", &config.display().to_string(), "config", "dump"]);
    let text = Program::spawn(dump, Stdin::Null).finish().code(0).text();
    let all: toml::Table = text.parse().unwrap_or_else(|e| panic!("{e}: {text}"));
    let plugin = match config_version().unwrap() {
        2 => "io.containerd.grpc.v1.cri",
        _ => "io.containerd.cri.v1.runtime",
    };
    let runtime = &all["plugins"][plugin]["containerd"]["runtimes"]["stockade"];
    assert_eq!(runtime["runtime_type"].as_str(), Some("io.containerd.stockade.v2"), "{text}");
    assert_eq!(runtime["privileged_without_host_devices"].as_bool(), Some(true), "{text}");
    text
}

/// Puts a program on a host of its own, which can have no more than a shell script.
fn put_program(host: &Path, name: &str, script: &str) {
    let bin = host.join("bin");
    fs::create_dir_all(&bin).unwrap();
    fs::copy(Rootfs::Busybox.path().join("bin/busybox"), bin.join("busybox")).unwrap();
    fs::write(bin.join(name), format!("#!/bin/busybox sh\n{script}\n")).unwrap();
    fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
}

fn a_configuration_is_begun_in_the_words_of_the_containerd_that_is_there() {
    let host = host_scratch();
    let at = |path: &str| host.path().join(path);
    fs::create_dir_all(at("etc/containerd")).unwrap();
    // The host's root directory is another one, with what can be asked there for the version of this one's.
    let version = Program::spawn(command("containerd", &["--version"]), Stdin::Null).finish().ok();
    put_program(host.path(), "containerd", &format!("echo '{}'", version.trim()));
    call("install", host.path(), &[]).code(0);
    let config = at("etc/containerd/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains(&format!("version = {}\n", config_version().unwrap())), "{version}: {text}");
    understood(&config);
    call("uninstall", host.path(), &[]).code(0);
    assert!(!config.exists());
}

fn command(program: &str, words: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(words);
    command
}

fn engines_know_it_until_it_is_uninstalled() {
    let host = host();
    let at = |path: &str| host.path().join(path);
    let before = files(host.path());
    let said = call("install", host.path(), &[]).ok();
    assert!(said.contains("left: systemctl restart containerd"), "{said}");

    // containerd itself understands it, and what was there before still counts.
    let text = understood(&at("etc/containerd/config.toml"));
    assert!(text.contains("/usr/lib/cni"), "{text}");

    // What was installed works from where it is.
    let installed = Runtime::named(at("usr/local/bin/stockade").to_str().unwrap());
    let guest_dir = at("usr/local/lib/stockade").display().to_string();
    assert!(installed.call(&["check"]).code(0).text().contains(&guest_dir));
    assert_eq!(installed.run(&Bundle::sh("echo installed")).ok(), "installed\n");
    let shim = at("usr/local/bin/containerd-shim-stockade-v2");
    assert!(fs::metadata(&shim).unwrap().ino() == fs::metadata(at("usr/local/bin/stockade")).unwrap().ino());

    let again = call("install", host.path(), &[]).ok();
    assert!(again.lines().all(|line| line.starts_with("there already: ")), "{again}");

    call("uninstall", host.path(), &[]).code(0);
    assert_eq!(files(host.path()), before);
    assert_eq!(fs::read_to_string(at("etc/containerd/config.toml")).unwrap(), CONTAINERD);
}

/// What a container of the daemon set is called with, after the program's name.
fn words_of(container: &str) -> Vec<&'static str> {
    let (_, rest) = DAEMON_SET.split_once(&format!("- name: {container}\n")).expect(container);
    let line = rest.lines().find_map(|line| line.trim().strip_prefix("command: [")).expect("its command");
    let mut words = line.trim_end_matches(']').split(", ").map(|word| word.trim_matches('"'));
    assert_eq!(words.next(), Some("/usr/local/bin/stockade"));
    words.collect()
}

fn the_daemon_sets_image_installs_on_the_host_and_tells_its_figures() {
    const IMAGE: &str = "localhost/lab/stockade";
    let (host, podman) = (host(), Podman::with(&Runtime::named("runc")));
    let at = |path: &str| host.path().join(path);
    put_program(host.path(), "systemctl", "echo $@ >> /asked");
    let containerfile = podman.dir().join("Containerfile");
    fs::write(&containerfile, CONTAINERFILE).unwrap();
    let stage = Runtime::under_test().guest_dir().join("../..").display().to_string();
    let containerfile = containerfile.display().to_string();
    podman.podman(&["build", "--file", &containerfile, "--tag", IMAGE, &stage]).code(0);

    // As the manifest has it: privileged, with the host's root directory.
    let root = format!("{}:/host", host.path().display());
    let run = ["run", "--rm", "--network", "none", "--pid", "host", "--privileged", "--volume", &root, IMAGE];
    let install = || podman.podman(&[&run[..], &words_of("install")].concat());
    let said = install().ok();
    assert!(said.contains("done: restart containerd"), "{said}");
    assert_eq!(fs::read_to_string(at("asked")).unwrap(), "restart containerd\n");
    understood(&at("etc/containerd/config.toml"));
    let installed = Runtime::named(at("usr/local/bin/stockade").to_str().unwrap());
    assert_eq!(installed.run(&Bundle::sh("echo installed")).ok(), "installed\n");
    // Again, as after a reboot of the node: nothing is done, and nothing restarted.
    let said = install().ok();
    assert!(said.lines().all(|line| line.starts_with("there already: ")), "{said}");
    assert_eq!(fs::read_to_string(at("asked")).unwrap(), "restart containerd\n");

    // With the rights that it has there: the host's processes and /run, and two capabilities.
    let container = Runtime::under_test().start(&Bundle::idle(), Stdin::Null);
    container.program.expect_line("ready");
    let mut words = words_of("metrics");
    *words.last_mut().unwrap() = "127.0.0.1:0";
    let run = [
        "run",
        "--rm",
        "--name",
        "metrics",
        "--network",
        "host",
        "--pid",
        "host",
        "--volume",
        "/run:/run:ro",
    ];
    let rights = ["--cap-drop", "ALL", "--cap-add", "SYS_PTRACE,DAC_READ_SEARCH", IMAGE];
    let mut server = Program::spawn(podman.command(&[&run[..], &rights, &words].concat()), Stdin::Null);
    let line = server.line();
    let url = line.strip_prefix("serving ").unwrap_or_else(|| panic!("{line}\n{}", server.report()));
    let text = tool(&format!("curl -sf {url}"));
    let memory =
        format!("stockade_sandbox_memory_bytes{{sandbox=\"{}\",part=\"vmm\"}} ", container.id.as_str());
    let bytes = text.lines().find_map(|line| line.strip_prefix(&memory)).unwrap_or_else(|| panic!("{text}"));
    assert!(bytes.parse::<f64>().unwrap() > 10e6, "{bytes}");
    podman.podman(&["stop", "--time", "0", "metrics"]).code(0);
    server.exit();
}

fn systemd_restarts_an_engine_that_has_to_read_its_configuration() {
    const UNIT: &str = "[Service]\nExecStart=/bin/sleep 100000\n";
    const UNIT_FILE: &str = "/run/systemd/system/containerd.service";
    let host = Systemd::boot();
    let root = host_scratch();
    let root = root.path().display();
    // Its own root directory by another path, as a pod has it; what is written there is in memory.
    let prepare = format!(
        "mount --rbind / {root} && mount --make-rprivate {root} \
         && for place in etc/containerd usr/local; do mount -t tmpfs tmpfs {root}/$place || exit; done \
         && printf '{UNIT}' > {UNIT_FILE} && systemctl daemon-reload"
    );
    host.call(&["sh", "-c", &prepare]).code(0);
    let state = || host.property("containerd.service", "ActiveState");
    assert_eq!(state(), "inactive");
    let program = Runtime::under_test().path().display().to_string();
    let install = || host.call(&[&program, "install", "--host-root", &root.to_string(), "--restart"]);
    let said = install().ok();
    assert!(said.contains("done: restart containerd"), "{said}");
    assert_eq!(state(), "active");
    let main = host.property("containerd.service", "MainPID");
    assert!(!install().ok().contains("restart"));
    assert_eq!(host.property("containerd.service", "MainPID"), main);
    // One that does not come up again is told of.
    let broken = format!(
        "rm {root}/etc/containerd/config.toml && sed -i '/Exec/iExecStartPre=/bin/false' {UNIT_FILE} && systemctl daemon-reload"
    );
    host.call(&["sh", "-c", &broken]).code(0);
    let reason = install().refused();
    assert!(reason.contains("cannot restart containerd") && reason.contains("journalctl"), "{reason}");
    // And not forgotten, though all else has been done.
    host.call(&["sh", "-c", &format!("sed -i /Pre/d {UNIT_FILE} && systemctl daemon-reload")]).code(0);
    assert_ne!(state(), "active");
    let said = install().ok();
    assert!(said.contains("done: restart containerd") && !said.contains("done: write"), "{said}");
    assert_eq!(state(), "active");
    assert!(!install().ok().contains("restart"));
}

fn a_dry_run_changes_nothing() {
    let host = host();
    let before = files(host.path());
    let said = call("install", host.path(), &["--dry-run"]).ok();
    assert!(said.contains("would write ") && said.contains("would copy "), "{said}");
    assert_eq!(files(host.path()), before);
    assert_eq!(fs::read_to_string(host.path().join("etc/containerd/config.toml")).unwrap(), CONTAINERD);
}

fn nothing_is_removed_under_running_containers() {
    let host = host();
    call("install", host.path(), &[]).code(0);
    let before = files(host.path());
    // Their state, where the host has it.
    let state = host.path().join("run/stockade/one");
    fs::create_dir_all(&state).unwrap();
    let reason = call("uninstall", host.path(), &[]).refused();
    assert!(reason.contains("1 ") && reason.contains("--force"), "{reason}");
    assert_eq!(files(host.path()), before);
    call("uninstall", host.path(), &["--force"]).code(0);
}

fn a_full_disk_leaves_nothing_half_made() {
    let host = host();
    let local = host.path().join("usr/local");
    fs::create_dir_all(&local).unwrap();
    nix::mount::mount(Some("none"), &local, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=1m"))
        .unwrap();
    let ended = call("install", host.path(), &[]);
    let left = files(&local);
    nix::mount::umount(&local).unwrap();
    let reason = ended.refused();
    assert!(reason.contains("No space left on device") && reason.contains("vmlinux"), "{reason}");
    assert_eq!(left, [""; 0]);
    assert_eq!(fs::read_to_string(host.path().join("etc/containerd/config.toml")).unwrap(), CONTAINERD);
}
