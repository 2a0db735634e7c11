//! The wall from the host's side: what the VMM process, which a hostile guest attacks first, is left with.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::harness::{Bundle, Case, Container, Runtime, Stdin, case, vmm_of};

const VMM: &str = "the VMM process";

pub const CASES: &[Case] = &[
    case!(vmm_is_in_namespaces_of_its_own).stockade_only(VMM),
    case!(vmm_sees_its_share_and_nothing_else_of_the_host).stockade_only(VMM),
    case!(vmm_threads_have_no_capabilities_but_the_file_servers).stockade_only(VMM),
    case!(vmm_holds_no_descriptor_of_its_caller).stockade_only(VMM),
    case!(files_of_all_owners_are_served_from_the_jail).stockade_only(VMM),
];

fn vmm(container: &Container) -> i32 {
    vmm_of(container.pid()).expect("a VMM")
}

/// The value of a line of /proc/PID/status.
fn status(file: &Path, name: &str) -> String {
    let text = fs::read_to_string(file.join("status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {}", file.display())).trim().to_owned()
}

fn vmm_is_in_namespaces_of_its_own() {
    let container = Runtime::under_test().idle();
    let vmm = vmm(&container);
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_ne!(namespace(vmm), namespace(container.pid()), "{kind}");
        assert_ne!(namespace(vmm), namespace(1), "{kind}");
    }
    // Process 1 there, and nothing in its network but a loopback that is down.
    assert!(status(Path::new(&format!("/proc/{vmm}")), "NSpid").ends_with("\t1"));
    let interfaces = fs::read_to_string(format!("/proc/{vmm}/net/dev")).unwrap();
    assert_eq!(interfaces.lines().count(), 3, "{interfaces}");
}

fn vmm_sees_its_share_and_nothing_else_of_the_host() {
    let container = Runtime::under_test().idle();
    let root = format!("/proc/{}/root", vmm(&container));
    let names = |dir: &str| {
        let entries = fs::read_dir(format!("{root}/{dir}")).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names(""), ["proc", "share"]);
    assert_eq!(names("proc"), ["self"]);
    assert_eq!(names("proc/self"), ["fd", "mountinfo"]);
    assert_eq!(names("share"), [container.id.as_str()]);
    // Its mounts: the root, the share with what is in it, and its descriptors. None of them can run a program.
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", vmm(&container))).unwrap();
    for line in mounts.lines() {
        let fields: Vec<_> = line.split(' ').collect();
        let place = fields[4];
        assert!(place == "/" || place == "/proc/self/fd" || place.starts_with("/share"), "{line}");
        if place != "/proc/self/fd" {
            assert!(["nosuid", "nodev", "noexec"].iter().all(|flag| fields[5].contains(flag)), "{line}");
        }
    }
    let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
    assert!(root.split(' ').nth(5).unwrap().starts_with("ro,"), "{root}");
}

fn vmm_threads_have_no_capabilities_but_the_file_servers() {
    let container = Runtime::under_test().idle();
    let process = format!("/proc/{}", vmm(&container));
    assert_eq!(status(Path::new(&process), "NoNewPrivs"), "1");
    let limits = fs::read_to_string(format!("{process}/limits")).unwrap();
    let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().next(), Some("0"));
    // CAP_CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP (linux/capability.h).
    let files: u64 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31;
    let mut names = Vec::new();
    for task in fs::read_dir(format!("{process}/task")).unwrap() {
        let task = task.unwrap().path();
        let name = fs::read_to_string(task.join("comm")).unwrap().trim().to_owned();
        let expected = if name == "fs" { files } else { 0 };
        for set in ["CapPrm", "CapEff"] {
            let found = u64::from_str_radix(&status(&task, set), 16).unwrap();
            assert_eq!(found, expected, "{set} of {name}: {found:#x}");
        }
        assert_eq!(status(&task, "CapInh"), "0000000000000000", "{name}");
        assert_eq!(status(&task, "CapAmb"), "0000000000000000", "{name}");
        names.push(name);
    }
    assert!(names.iter().any(|name| name == "fs") && names.iter().any(|name| name == "vcpu0"), "{names:?}");
}

fn vmm_holds_no_descriptor_of_its_caller() {
    let runtime = Runtime::under_test();
    let secret = crate::harness::host_scratch();
    let path = secret.path().join("secret");
    fs::write(&path, "secret").unwrap();
    let file = fs::File::open(&path).unwrap();
    // Inherited by the runtime, as a careless caller would have it.
    let fd = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_DUPFD(100)).unwrap();
    let bundle = Bundle::idle();
    let container = runtime.env("SECRET", Path::new("of the caller")).start(&bundle, Stdin::Null);
    container.program.expect_line("ready");
    let vmm = vmm_of(container.program.pid()).expect("a VMM");
    let _ = nix::unistd::close(fd);
    for entry in fs::read_dir(format!("/proc/{vmm}/fd")).unwrap().flatten() {
        // One that is closed just now is not held.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        assert_ne!(target, path);
        let inside =
            target.starts_with("/share") || !target.is_absolute() || target == Path::new("/dev/null");
        // What the file server holds is named as it sees it, from its own root.
        assert!(inside || target.starts_with("/proc/self") || target == Path::new("/"), "{target:?}");
    }
    assert_eq!(fs::read(format!("/proc/{vmm}/environ")).unwrap(), b"");
    container.kill("KILL");
    container.finish();
}

fn files_of_all_owners_are_served_from_the_jail() {
    let dir = crate::harness::host_scratch();
    let file = dir.path().join("theirs");
    fs::write(&file, "text").unwrap();
    std::os::unix::fs::chown(&file, Some(4711), Some(815)).unwrap();
    nix::sys::stat::fchmodat(
        nix::fcntl::AT_FDCWD,
        &file,
        nix::sys::stat::Mode::S_IRUSR,
        nix::sys::stat::FchmodatFlags::FollowSymlink,
    )
    .unwrap();
    let script = "stat -c %u:%g /v/theirs; cat /v/theirs; echo; echo new > /v/theirs; touch /v/own; chown 7:8 /v/own; \
                  chmod 4755 /v/own; su -s /bin/sh nobody -c 'touch /v/x' 2> /dev/null || echo denied";
    let bundle = Bundle::sh(script)
        .bind(dir.path(), "/v", &[])
        .capability("CAP_CHOWN")
        .capability("CAP_DAC_OVERRIDE")
        .capability("CAP_FOWNER")
        .capability("CAP_SETUID")
        .capability("CAP_SETGID");
    let text = Runtime::under_test().run(&bundle).code(0).text();
    assert_eq!(text, "4711:815\ntext\ndenied\n");
    assert_eq!(fs::read_to_string(&file).unwrap(), "new\n");
    let own = fs::metadata(dir.path().join("own")).unwrap();
    assert_eq!((own.uid(), own.gid(), own.mode() & 0o7777), (7, 8, 0o4755));
}
