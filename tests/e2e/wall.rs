//! The wall from the host's side: what the VMM process, which a hostile guest attacks first, is left with.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::harness::{Bundle, Case, Container, Exit, Hijacked, Id, Program, Runtime, Stdin, case, vmm_of};

const VMM: &str = "the VMM process";

pub const CASES: &[Case] = &[
    case!(vmm_is_in_namespaces_of_its_own).stockade_only(VMM),
    case!(vmm_sees_its_share_and_nothing_else_of_the_host).stockade_only(VMM),
    case!(vmm_threads_have_filters_and_no_capabilities_but_the_file_servers).stockade_only(VMM),
    case!(vmm_is_as_likely_to_be_taken_for_its_memory_as_its_container).stockade_only(VMM),
    case!(vmm_holds_no_descriptor_of_its_caller).stockade_only(VMM),
    case!(files_of_all_owners_are_served_from_the_jail).stockade_only(VMM),
    case!(operations_of_all_kinds_on_files_pass_the_filter),
    case!(a_file_server_taken_over_reaches_nothing_but_the_share).stockade_only(VMM),
    case!(a_thread_taken_over_dies_of_what_it_does_not_need).stockade_only(VMM),
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

fn vmm_threads_have_filters_and_no_capabilities_but_the_file_servers() {
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
        // SECCOMP_MODE_FILTER. A helper of KVM's, for which the kernel makes a thread here, runs nothing of ours.
        let filtered = status(&task, "Seccomp") == "2";
        assert!(filtered || name.starts_with("kvm-"), "{name} has no filter");
        names.push(name);
    }
    assert!(names.iter().any(|name| name == "fs") && names.iter().any(|name| name == "vcpu0"), "{names:?}");
}

fn vmm_is_as_likely_to_be_taken_for_its_memory_as_its_container() {
    let score =
        |pid: i32| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned();
    // Of supervisor and VMM under a caller that is protected, as containerd's shims are.
    let of = |bundle: &Bundle| {
        let (runtime, id) = (Runtime::under_test(), Id::new());
        let run = runtime.run_command(bundle, &id);
        let mut command = Command::new("sh");
        command.args(["-c", "echo -500 > /proc/self/oom_score_adj && exec \"$0\" \"$@\""]);
        command.arg(run.get_program()).args(run.get_args());
        let container = runtime.adopt(bundle, id, Program::spawn(command, Stdin::Null));
        container.program.expect_line("ready");
        let supervisor = container.program.pid();
        let scores = (score(supervisor), score(vmm_of(supervisor).expect("a VMM")));
        container.kill("KILL");
        container.finish();
        scores
    };
    assert_eq!(of(&Bundle::idle()), ("-500".into(), "0".into()));
    assert_eq!(of(&Bundle::idle().set("/process/oomScoreAdj", 300)), ("-500".into(), "300".into()));
    assert_eq!(of(&Bundle::idle().set("/process/oomScoreAdj", -300)), ("-500".into(), "-300".into()));
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

fn operations_of_all_kinds_on_files_pass_the_filter() {
    let dir = crate::harness::host_scratch();
    // Numbers of system calls that no program of the image makes: setxattr, listxattr, getxattr, removexattr.
    let script = r#"set -e; cd /v
        mkdir d; mkfifo d/pipe; ln -s pipe d/link; readlink d/link; echo text > d/file; ln d/file d/hard
        mv d/hard d/moved; chmod 640 d/file; chown 7:8 d/file; truncate -s 9000 d/file; touch -d @1000000000 d/file
        fallocate -l 20000 d/full; dd if=/dev/zero of=d/synced bs=4k count=1 conv=fsync 2> /dev/null
        dd if=/dev/zero of=d/data bs=4k count=1 conv=fdatasync 2> /dev/null
        stat -c '%n %s %u:%g %a %Y' d/file; stat -c '%n %s' d/full d/synced d/data; stat -f -c %l .; ls d
        perl -e '$x = "\0" x 9; $p = "d/file"; $n = "user.x"; $v = "value";
            printf "%d %d ", syscall(188, $p, $n, $v, 5, 0), syscall(194, $p, my $l = "\0" x 64, 64);
            printf "%d %s ", syscall(191, $p, $n, $x, 9), substr($x, 0, 5);
            printf "%d\n", syscall(197, $p, $n)'
        perl -e 'open F, "+<", "d/file"; sysseek(F, 8192, 0); printf "%d\n", sysread(F, $b, 100)'
        echo more >> d/file; rm d/pipe d/link d/moved; rm -r d; ls"#;
    let bundle = Bundle::debian(script)
        .bind(dir.path(), "/v", &[])
        .capability("CAP_CHOWN")
        .capability("CAP_DAC_OVERRIDE")
        .capability("CAP_FOWNER");
    let text = Runtime::under_test().run(&bundle).code(0).text();
    let expected = "pipe\nd/file 9000 7:8 640 1000000000\nd/full 20000\nd/synced 4096\nd/data 4096\n255\n\
                    data\nfile\nfull\nlink\nmoved\npipe\nsynced\n0 7 5 value 0\n100\n";
    assert_eq!(text, expected);
}

/// What the file server could do if a guest ran code in it: it alone may open files.
fn a_file_server_taken_over_reaches_nothing_but_the_share() {
    let container = Runtime::under_test().idle();
    let mut thread = Hijacked::thread(vmm(&container), "fs");
    let open = |thread: &mut Hijacked, path: &str, flags: i32| {
        let path = thread.text(path);
        thread.call(libc::SYS_openat, [libc::AT_FDCWD as u64, path, flags as u64, 0])
    };
    // Names of the host, and ways out of the share.
    for path in [
        "/etc/passwd",
        "/proc/1/mem",
        "/proc/self/mem",
        "/proc/kallsyms",
        "/sys/kernel",
        "/dev/kvm",
        "/dev/mem",
    ]
    .into_iter()
    .map(str::to_owned)
    .chain([format!("/share/{}{}", "../".repeat(20), "etc/passwd"), "/share/../run".into()])
    {
        assert_eq!(open(&mut thread, &path, libc::O_RDONLY), Ok(-i64::from(libc::ENOENT)), "{path}");
    }
    // Its own root is what the jail says, and nothing can be made in it.
    assert_eq!(open(&mut thread, "/new", libc::O_CREAT | libc::O_WRONLY), Ok(-i64::from(libc::EROFS)));
    let new = thread.text("/new");
    let made = thread.call(libc::SYS_mknodat, [libc::AT_FDCWD as u64, new, libc::S_IFIFO.into(), 0]);
    assert_eq!(made, Ok(-i64::from(libc::EROFS)));
    assert!(open(&mut thread, "/share", libc::O_PATH).is_ok_and(|fd| fd >= 0));
    // It has no capability to give itself.
    assert_eq!(thread.call(libc::SYS_setresuid, [1, 1, 1, 0]), Ok(0));
    drop(thread);
    container.op_with(&["delete", "--force"], &[]).ok();
}

fn a_thread_taken_over_dies_of_what_it_does_not_need() {
    let bystander = Runtime::under_test().idle();
    let calls = [
        ("fs", libc::SYS_socket, libc::AF_UNIX as u64),
        ("vcpu0", libc::SYS_clone, libc::SIGCHLD as u64),
        ("stockade-vmm", libc::SYS_execve, 0),
    ];
    for (name, number, argument) in calls {
        let container = Runtime::under_test().start(&Bundle::idle(), Stdin::Null);
        container.program.expect_line("ready");
        let mut thread = Hijacked::thread(vmm_of(container.program.pid()).expect("a VMM"), name);
        assert_eq!(thread.call(number, [argument, 0, 0, 0]), Err(libc::SIGSYS), "{name}");
        let ended = container.finish();
        assert!(ended.stderr.contains("a system call that its jail forbids"), "{ended:?}");
        assert_ne!(ended.exit, Exit::Code(0));
    }
    assert_eq!(bystander.exec("echo unharmed").ok(), "unharmed\n");
}
