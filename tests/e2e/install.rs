//! `stockade install` and `uninstall`: what a host's engines need is there, and gone again.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use stockade_tests::cri::host::config_version;

use crate::harness::{Bundle, Case, Ended, Program, Rootfs, Runtime, Stdin, case, host_scratch};

const OURS: &str = "a command of stockade's own";

pub const CASES: &[Case] = &[
    case!(engines_know_it_until_it_is_uninstalled).stockade_only(OURS),
    case!(a_configuration_is_begun_in_the_words_of_the_containerd_that_is_there).stockade_only(OURS),
    case!(a_dry_run_changes_nothing).stockade_only(OURS),
    case!(nothing_is_removed_under_running_containers).stockade_only(OURS),
    case!(a_full_disk_leaves_nothing_half_made).stockade_only(OURS),
];

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

fn a_configuration_is_begun_in_the_words_of_the_containerd_that_is_there() {
    let host = host_scratch();
    let at = |path: &str| host.path().join(path);
    for dir in ["etc/containerd", "bin"] {
        fs::create_dir_all(at(dir)).unwrap();
    }
    // The host's root directory is another one, with what can be asked there for the version of this one's.
    fs::copy(Rootfs::Busybox.path().join("bin/busybox"), at("bin/busybox")).unwrap();
    let version = Program::spawn(command("containerd", &["--version"]), Stdin::Null).finish().ok();
    fs::write(at("bin/containerd"), format!("#!/bin/busybox sh\necho '{}'\n", version.trim())).unwrap();
    fs::set_permissions(at("bin/containerd"), fs::Permissions::from_mode(0o755)).unwrap();
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
