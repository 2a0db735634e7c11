//! What cannot be run is refused at once: one line on stderr with the cause and what to do, exit code 1, and
//! nothing left behind.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::harness::{Bundle, Case, Runtime, Traces, case, host_scratch};

const OURS: &str = "how stockade reports errors";

pub const CASES: &[Case] = &[
    case!(bundle_without_config).stockade_only(OURS).exclusive(),
    case!(broken_config).stockade_only(OURS).exclusive(),
    case!(root_that_cannot_be_used).stockade_only(OURS).exclusive(),
    case!(ids_that_cannot_be).stockade_only(OURS).exclusive(),
    case!(duplicate_id).stockade_only(OURS).exclusive(),
    case!(guest_files_that_cannot_be_booted).stockade_only(OURS).exclusive(),
    case!(sizes_out_of_range).stockade_only(OURS).exclusive(),
    case!(annotations_that_are_not_known_are_ignored_with_a_warning).stockade_only("its own annotations"),
    case!(capability_that_is_not_known_is_left_out),
    case!(fields_that_cannot_be_honoured_are_named).stockade_only(OURS).exclusive(),
    case!(words_nobody_knows).stockade_only(OURS).exclusive(),
];

/// Runs a bundle directory and requires the refusal that this file's first lines promise. The line must contain
/// `about`: what the user has to look at.
#[track_caller]
fn refused_for(runtime: &Runtime, bundle: &Path, id: &str, about: &str) {
    for operation in ["run", "create"] {
        let before = Traces::now();
        let ended = runtime.call(&[operation, "--bundle", &bundle.display().to_string(), id]).code(1);
        is_one_line_with_a_remedy(&ended.stderr, about);
        assert_eq!(ended.text(), "");
        assert_eq!(before.new_since(), [""; 0], "left behind by `{operation}`, which said: {}", ended.stderr);
    }
}

/// One line, which says what it is about, and after the cause what to do about it: with an imperative, or with
/// the values that are possible.
#[track_caller]
fn is_one_line_with_a_remedy(stderr: &str, about: &str) {
    assert!(stderr.ends_with('\n') && stderr.matches('\n').count() == 1, "not one line: {stderr:?}");
    assert!(stderr.contains(about), "does not say {about:?}: {stderr}");
    assert!(stderr.len() < 600, "too long to read: {stderr}");
    let words: Vec<String> =
        stderr.split(|c: char| !c.is_alphanumeric()).map(str::to_ascii_lowercase).collect();
    const REMEDIES: &[&str] = &[
        "add", "ask", "build", "choose", "check", "correct", "delete", "fix", "give", "install", "lower",
        "make", "must", "name", "pass", "raise", "remove", "run", "set", "use", "with", "write", "has",
    ];
    assert!(words.iter().any(|word| REMEDIES.contains(&word.as_str())), "no remedy: {stderr}");
}

#[track_caller]
fn refused(bundle: &Bundle, about: &str) {
    refused_for(&Runtime::under_test(), bundle.save(), "e2e-bad", about);
}

fn bundle_without_config() {
    let runtime = Runtime::under_test();
    let dir = host_scratch();
    refused_for(&runtime, dir.path(), "e2e-bad", "config.json");
    refused_for(&runtime, Path::new("/no/such/bundle"), "e2e-bad", "/no/such/bundle");
    fs::create_dir(dir.path().join("config.json")).unwrap();
    refused_for(&runtime, dir.path(), "e2e-bad", "config.json");
}

fn broken_config() {
    let runtime = Runtime::under_test();
    let dir = host_scratch();
    for text in
        ["", "{", "not json", "[]", "{\"ociVersion\": 1}", "{\"ociVersion\": \"1.0.2\"}", "\u{0}\u{1}"]
    {
        fs::write(dir.path().join("config.json"), text).unwrap();
        refused_for(&runtime, dir.path(), "e2e-bad", "config.json");
    }
    refused(&Bundle::sh("true").set("/process/args", "no list"), "args");
    refused(&Bundle::sh("true").set("/process/args", json!([])), "args");
    refused(&Bundle::sh("true").set("/process/cwd", "not/absolute"), "cwd");
    refused(&Bundle::sh("true").set("/ociVersion", "7.0.0"), "7.0.0");
    refused(&Bundle::sh("true").set("/ociVersion", "new"), "new");
}

fn root_that_cannot_be_used() {
    refused(&Bundle::sh("true").set("/root/path", "/no/such/rootfs"), "/no/such/rootfs");
    refused(&Bundle::sh("true").set("/root/path", "no-rootfs-here"), "no-rootfs-here");
    refused(&Bundle::sh("true").set("/root/path", "../../etc"), "../../etc");
    refused(&Bundle::sh("true").set("/root/path", "/proc/version"), "/proc/version");
    refused(&Bundle::sh("true").remove("/root"), "root");
    refused(&Bundle::sh("true").bind("/no/such/source", "/tmp", &[]), "/no/such/source");
}

fn ids_that_cannot_be() {
    let runtime = Runtime::under_test();
    let bundle = Bundle::sh("true");
    let long = "x".repeat(2048);
    for (id, about) in [("a/b", "a/b"), ("..", ".."), (".", "\".\""), ("a b", "a b"), (long.as_str(), "xxx")]
    {
        refused_for(&runtime, bundle.save(), id, about);
    }
    for operation in ["state", "start", "delete"] {
        let ended = runtime.call(&[operation, "../../etc"]).code(1);
        is_one_line_with_a_remedy(&ended.stderr, "../../etc");
    }
}

fn duplicate_id() {
    let runtime = Runtime::under_test();
    let container = runtime.idle();
    refused_for(&runtime, Bundle::sh("true").save(), container.id.as_str(), container.id.as_str());
    assert_eq!(container.exec("echo unharmed").ok(), "unharmed\n");
}

fn guest_files_that_cannot_be_booted() {
    let bundle = Bundle::sh("true");
    let dir = host_scratch();
    let runtime = Runtime::under_test().env("STOCKADE_GUEST_DIR", dir.path());
    let (kernel, initrd) = (dir.path().join("vmlinux"), dir.path().join("initrd.img"));
    let expect = |file: &Path| refused_for(&runtime, bundle.save(), "e2e-bad", &file.display().to_string());
    fs::write(&initrd, b"070701").unwrap();
    expect(&kernel);
    for bytes in [&b""[..], b"MZ and more that is a bzImage, perhaps", b"\x7fELF", &[0; 8192]] {
        fs::write(&kernel, bytes).unwrap();
        expect(&kernel);
    }
    // An ELF header that promises segments where there are none, and one of another machine.
    for (machine, segments) in [(62_u8, 40_u8), (183, 1)] {
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(64, 0);
        (elf[16], elf[18], elf[20], elf[32], elf[54], elf[56]) = (2, machine, 1, 64, 56, segments);
        fs::write(&kernel, elf).unwrap();
        expect(&kernel);
    }
    fs::remove_file(&kernel).unwrap();
    std::os::unix::fs::symlink("/proc/version", &kernel).unwrap();
    expect(&kernel);
}

fn sizes_out_of_range() {
    const MIB: u64 = 1 << 20;
    let memory = |bytes: u64| Bundle::sh("true").set("/linux/resources/memory", json!({ "limit": bytes }));
    refused(&memory(MIB), "memory");
    refused(&memory(1 << 50), "memory");
    let cpus = |quota: u64| {
        Bundle::sh("true").set("/linux/resources/cpu", json!({ "quota": quota, "period": 1000 }))
    };
    refused(&cpus(1_000_000), "cpu");
    refused(&Bundle::sh("true").set("/linux/resources/cpu", json!({ "cpus": "0-999" })), "0-999");
    for (name, value) in [
        ("vcpus", "0"),
        ("vcpus", "1000"),
        ("vcpus", "-1"),
        ("vcpus", "some"),
        ("memory", "1M"),
        ("memory", "1024T"),
        ("memory", "0"),
        ("memory", "much"),
    ] {
        let annotated =
            Bundle::sh("true").set("/annotations", json!({ format!("io.stockade.{name}"): value }));
        refused(&annotated, &format!("io.stockade.{name}"));
        let variable = format!("STOCKADE_{}", name.to_uppercase());
        let runtime = Runtime::under_test().env(&variable, value);
        refused_for(&runtime, Bundle::sh("true").save(), "e2e-bad", &variable);
    }
}

/// They may come from who is not trusted with the host.
fn annotations_that_are_not_known_are_ignored_with_a_warning() {
    let annotations = json!({ "io.stockade.kernel": "/evil", "org.example.other": "x" });
    let dir = host_scratch();
    let log = dir.path().join("log");
    let runtime = Runtime::under_test().global(&["--log", log.to_str().unwrap()]);
    assert_eq!(runtime.run(&Bundle::sh("echo ran").set("/annotations", annotations)).ok(), "ran\n");
    let log = fs::read_to_string(&log).unwrap();
    let warnings: Vec<_> = log.lines().filter(|line| line.contains("level=warning")).collect();
    assert!(warnings.len() == 1 && warnings[0].contains("io.stockade.kernel"), "{log}");
    assert!(!log.contains("/evil"), "{log}");
}

fn capability_that_is_not_known_is_left_out() {
    let bundle = Bundle::sh("grep CapBnd /proc/self/status");
    let known = Runtime::under_test().run(&bundle).ok();
    let bundle = bundle.push("/process/capabilities/bounding", "CAP_FLYING");
    assert_eq!(Runtime::under_test().run(&bundle).ok(), known);
}

fn fields_that_cannot_be_honoured_are_named() {
    let namespace = json!({ "type": "pid", "path": "/proc/1/ns/pid" });
    refused(&Bundle::sh("true").without_namespace("pid").push("/linux/namespaces", namespace), "pid");
    let device = json!({ "path": "/dev/x", "type": "q", "major": 1, "minor": 5 });
    refused(&Bundle::sh("true").push("/linux/devices", device), "/dev/x");
    let rlimit = json!({ "type": "RLIMIT_WINGS", "soft": 1, "hard": 1 });
    refused(&Bundle::sh("true").push("/process/rlimits", rlimit), "RLIMIT_WINGS");
    refused(
        &Bundle::sh("true").set("/linux/seccomp", json!({ "defaultAction": "SCMP_ACT_SMILE" })),
        "SCMP_ACT_SMILE",
    );
    refused(&Bundle::sh("true").set("/linux/sysctl", json!({ "kernel.no_such_knob": "1" })), "no_such_knob");
}

fn words_nobody_knows() {
    let runtime = Runtime::under_test();
    for words in [&["frobnicate"][..], &["run", "--no-such-option", "x"], &["run"], &[]] {
        let ended = runtime.call(words);
        assert!(!matches!(ended.exit, crate::harness::Exit::Code(0)), "{ended:?}");
        assert!(!ended.stderr.is_empty(), "{ended:?}");
    }
}
