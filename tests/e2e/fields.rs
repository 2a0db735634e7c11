//! Fields of `config.json` one by one: what they do under runc they do here, seen by running the same bundle with
//! both; and those that are newer than the lab's runc do what the specification says.

use std::fs;

use nix::mount::{MsFlags, mount, umount};
use serde_json::{Value, json};

use crate::harness::{Bundle, Case, Ended, Rootfs, Runtime, Stdin, case, host_scratch};

const NEWER: &str = "newer than the lab's runc";

/// Debian's runc gives a cgroup away only where systemd has made it.
const BY_SYSTEMD: &str = "runc does so with systemd only";

pub const CASES: &[Case] = &[
    case!(process_fields_mean_what_they_mean_to_runc),
    case!(missing_working_directory_is_made),
    case!(names_that_are_not_given_are_the_hosts),
    case!(mount_options_mean_what_they_mean_to_runc),
    case!(an_overlay_of_the_hosts_directories),
    case!(read_only_paths_keep_their_other_flags),
    case!(read_only_dev),
    case!(tmpfs_is_filled_from_the_root),
    case!(later_mounts_of_the_host_appear_unless_private),
    case!(read_only_is_the_mount_and_not_what_is_below),
    case!(a_cgroup_that_is_writable_in_a_container_is_its_users).stockade_only(BY_SYSTEMD),
    case!(users_of_a_namespace_are_mapped),
    case!(limits_mean_what_they_mean_to_runc),
    case!(newer_limits_stand_in_the_cgroup).stockade_only(NEWER),
    case!(seccomp_actions_mean_what_they_mean_to_runc),
    case!(hooks_run_in_their_order_with_the_state),
    case!(failing_hook_fails_its_operation),
    case!(poststop_hooks_run_each_whatever_fails),
    case!(hooks_timeout_is_kept),
    case!(scheduler_and_io_priority).stockade_only(NEWER),
    case!(cpu_affinity_of_an_exec).stockade_only(NEWER),
    case!(clocks_of_a_time_namespace_are_shifted).stockade_only(NEWER),
    case!(personality_and_domainname).stockade_only(NEWER),
];

/// Runs a bundle with runc and with the runtime under test, which must do the same, and gives what that did.
#[track_caller]
fn alike(bundle: &Bundle) -> Ended {
    let known = under_runc(bundle);
    let ended = Runtime::under_test().run(bundle);
    assert_eq!((known.exit, known.text()), (ended.exit, ended.text()), "runc: {known:?}\nhere: {ended:?}");
    ended
}

/// Runs a bundle with runc, which gets a state directory that goes away with its state.
#[track_caller]
fn under_runc(bundle: &Bundle) -> Ended {
    let root = host_scratch();
    Runtime::named("runc").global(&["--root", root.path().to_str().unwrap()]).run(bundle)
}

fn process_fields_mean_what_they_mean_to_runc() {
    let user = json!({ "uid": 33, "gid": 34, "additionalGids": [5, 4000], "umask": 0o072 });
    let rlimits: Vec<_> = [
        "CORE",
        "CPU",
        "DATA",
        "FSIZE",
        "LOCKS",
        "MEMLOCK",
        "MSGQUEUE",
        "NICE",
        "NOFILE",
        "NPROC",
        "RSS",
        "RTPRIO",
        "RTTIME",
        "SIGPENDING",
        "STACK",
        "AS",
    ]
    .iter()
    .enumerate()
    .map(|(n, name)| {
        let soft = (1 << 27) + n;
        json!({ "type": format!("RLIMIT_{name}"), "soft": if *name == "NOFILE" { 99 } else { soft },
                "hard": if *name == "NOFILE" { 999 } else { soft + 1 } })
    })
    .collect();
    let script = "id -u; id -g; id -G; umask; pwd; cat /proc/self/limits | tr -s ' '; cat /proc/self/oom_score_adj
                  grep -E '^(Cap|NoNewPrivs|Groups|Seccomp:|SigBlk)' /proc/self/status; env | sort; readlink /proc/self/cwd";
    let sets = json!(["CAP_KILL", "CAP_SETUID", "CAP_SYS_NICE"]);
    let bundle = Bundle::debian(script)
        .set("/process/user", user)
        .set("/process/rlimits", rlimits)
        .set("/process/oomScoreAdj", -7)
        .set("/process/noNewPrivileges", false)
        .set("/process/cwd", "/usr/lib")
        .set(
            "/process/capabilities",
            json!({ "bounding": sets, "permitted": sets, "effective": sets, "inheritable": ["CAP_KILL"],
                    "ambient": ["CAP_KILL"] }),
        );
    alike(&bundle).code(0);
    // Nothing that the bundle does not name is left of what the runtime has.
    let script = "id -G; umask; grep -E '^(Cap|NoNewPrivs|Groups)' /proc/self/status; env | sort";
    alike(&Bundle::debian(script).remove("/process/capabilities")).code(0);
}

fn names_that_are_not_given_are_the_hosts() {
    let script = "hostname; cat /proc/sys/kernel/domainname";
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let unnamed = || Bundle::sh(script).remove("/hostname");
    for bundle in [unnamed(), unnamed().without_namespace("uts")] {
        let ended = alike(&bundle);
        assert!(ended.text().starts_with(&host), "{ended:?}");
    }
}

fn missing_working_directory_is_made() {
    let bundle = Bundle::sh("pwd; stat -c '%a %u' .").writable().set("/process/cwd", "/work/in/depth");
    assert_eq!(alike(&bundle).ok(), "/work/in/depth\n755 0\n");
}

fn mount_options_mean_what_they_mean_to_runc() {
    let source = host_scratch();
    fs::create_dir(source.path().join("below")).unwrap();
    fs::write(source.path().join("file"), "text\n").unwrap();
    std::os::unix::fs::symlink("file", source.path().join("link")).unwrap();
    let all = [
        &["ro", "nosuid", "nodev", "noexec"][..],
        &["rro"],
        &["rw", "noatime", "rprivate"],
        &["nodiratime", "nosuid", "suid"],
        &["ro", "rw", "unbindable"],
    ];
    let script = "
        awk '$5~/^\\/(m|t)/{print $5,$6}' /proc/self/mountinfo | sed 's/,relatime//'
        for dir in /m0 /m1 /m2; do touch $dir/below/x 2>/dev/null && echo written || echo not; done
        stat -c %a /t1; df -k /t1 | awk 'END{print $2}'; cat /m0/link; cat /rel/file; ls /t2";
    let mut bundle = Bundle::sh(script).writable();
    for (n, options) in all.iter().enumerate() {
        bundle = bundle.bind(source.path(), &format!("/m{n}"), options);
    }
    bundle = bundle
        .bind(source.path(), "rel", &["ro"])
        .mount("/t1", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=711", "size=64k"])
        .push("/mounts", json!({ "destination": "/t2", "type": "tmpfs", "options": ["ro", "noexec"] }));
    alike(&bundle).code(0);
    // Newer than the lab's runc: links are not followed, though they are there.
    if Runtime::under_test().is_stockade() {
        let bundle = Bundle::sh("readlink /m/link; cat /m/link; cat /m/file").bind(
            source.path(),
            "/m",
            &["ro", "nosymfollow"],
        );
        let ended = Runtime::under_test().run(&bundle.writable()).code(0);
        assert_eq!(ended.text(), "file\ntext\n");
        assert!(ended.stderr.contains("Too many levels of symbolic links"), "{ended:?}");
    }
}

fn an_overlay_of_the_hosts_directories() {
    let source = host_scratch();
    let place = |name: &str| source.path().join(name);
    for name in ["one", "two", "upper-runc", "work-runc", "upper", "work"] {
        fs::create_dir(place(name)).unwrap();
    }
    fs::write(place("one/file"), "of one\n").unwrap();
    fs::write(place("two/file"), "hidden\n").unwrap();
    fs::write(place("two/old"), "old\n").unwrap();
    let script = "
        cat /rw/file /rw/old; echo changed > /rw/old; rm /rw/file; echo new > /rw/new; ls /rw; cat /ro/file
        touch /ro/x /ro2/x 2>/dev/null || echo no
        for dir in ro rw; do awk -v d=/$dir '$5==d{print $6}' /proc/self/mountinfo | grep -o noexec; done; true";
    let lower = format!("lowerdir={}:{}", place("one").display(), place("two").display());
    let bundle = |of: &str| {
        let upper = format!("{lower},upperdir={}", place(&format!("upper{of}")).display());
        let work = format!("workdir={}", place(&format!("work{of}")).display());
        Bundle::sh(script)
            .writable()
            .mount("/ro", "overlay", "overlay", &[&lower, "noexec"])
            .mount("/ro2", "overlay", "overlay", &[&lower, "ro"])
            .mount("/rw", "overlay", "overlay", &[&upper, &work, "private"])
    };
    let expected = "of one\nold\nnew\nold\nof one\nno\nnoexec\n";
    assert_eq!(under_runc(&bundle("-runc")).ok(), expected);
    assert_eq!(Runtime::under_test().run(&bundle("")).ok(), expected);
    for upper in ["upper-runc", "upper"] {
        assert_eq!(fs::read_to_string(place(upper).join("new")).unwrap(), "new\n");
    }
    assert_eq!(fs::read_to_string(place("two/old")).unwrap(), "old\n");
    if Runtime::under_test().is_stockade() {
        for (options, named) in
            [("ro", "mounts[7].options"), ("lowerdir=/no/such:/etc", "lowerdir=/no/such:/etc")]
        {
            let bundle = Bundle::sh("true").writable().mount("/x", "overlay", "overlay", &[options]);
            let reason = Runtime::under_test().run(&bundle).refused();
            assert!(reason.contains(named), "{reason}");
        }
    }
}

fn read_only_paths_keep_their_other_flags() {
    let script = "/usr/bin/id -u; touch /usr/bin/x 2>/dev/null || echo no; touch /var/x && echo yes; ls /usr/lib | head -n 1 | wc -l";
    let bundle = Bundle::debian(script)
        .writable()
        .push("/linux/readonlyPaths", "/usr")
        .push("/linux/readonlyPaths", "/no/such/path");
    assert_eq!(alike(&bundle).ok(), "0\nno\nyes\n1\n");
}

fn read_only_dev() {
    let mut config = Bundle::sh(
        "touch /dev/new 2>/dev/null || echo no; echo x > /dev/null && ls /dev/zero; : > /dev/shm/x && echo yes",
    );
    config =
        config.set("/mounts/1/options", json!(["nosuid", "strictatime", "mode=755", "size=65536k", "ro"]));
    assert_eq!(alike(&config).ok(), "no\n/dev/zero\nyes\n");
}

fn tmpfs_is_filled_from_the_root() {
    let script = "
        cd /etc; stat -c '%n %F %a %u' . passwd sub sub/link; readlink sub/link; cat sub/file
        echo more >> passwd && echo written; awk '$5==\"/etc\"{print $6}' /proc/self/mountinfo | grep -c nosuid";
    let bundle = Bundle::sh(script).writable();
    let etc = bundle.dir().join("rootfs/etc");
    fs::create_dir(etc.join("sub")).unwrap();
    fs::write(etc.join("sub/file"), "inside\n").unwrap();
    std::os::unix::fs::symlink("/proc/self/nowhere", etc.join("sub/link")).unwrap();
    let bundle =
        bundle.mount("/etc", "tmpfs", "tmpfs", &["nosuid", "nodev", "rprivate", "tmpcopyup", "mode=755"]);
    alike(&bundle).code(0);
    let passwd = fs::read_to_string(etc.join("passwd")).unwrap();
    assert!(!passwd.contains("more"), "{passwd}");
}

fn later_mounts_of_the_host_appear_unless_private() {
    let source = host_scratch();
    mount(Some("tmpfs"), source.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    mount(None::<&str>, source.path(), None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
    let inner = source.path().join("inner");
    fs::create_dir(&inner).unwrap();
    let bundle = Bundle::sh("echo ready; read line; ls /slave/inner /private/inner")
        .bind(source.path(), "/slave", &["rslave"])
        .bind(source.path(), "/private", &["rprivate"])
        .writable();
    let mut container = Runtime::under_test().start(&bundle, Stdin::Pipe);
    container.program.expect_line("ready");
    mount(Some("tmpfs"), &inner, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    fs::write(inner.join("later"), "").unwrap();
    container.program.write("go\n");
    let ended = container.finish().code(0);
    umount(&inner).unwrap();
    umount(source.path()).unwrap();
    assert_eq!(ended.text(), "ready\n/private/inner:\n\n/slave/inner:\nlater\n");
}

fn read_only_is_the_mount_and_not_what_is_below() {
    let source = host_scratch();
    mount(Some("tmpfs"), source.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let inner = source.path().join("in ner");
    fs::create_dir(&inner).unwrap();
    mount(Some("tmpfs"), &inner, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let script =
        "for path in /ro /ro/in*ner /rro /rro/in*ner; do touch \"$path/new\" && echo \"$path\"; done 2>&1";
    let bundle = Bundle::sh(script)
        .bind(source.path(), "/ro", &["ro"])
        .bind(source.path(), "/rro", &["rro"])
        .writable();
    let text = alike(&bundle).text();
    umount(&inner).unwrap();
    umount(source.path()).unwrap();
    assert_eq!(text.lines().filter(|line| line.starts_with('/')).count(), 1, "{text}");
}

fn users_of_a_namespace_are_mapped() {
    let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    let script = "
        id -u; id -g; tr -s ' ' < /proc/self/uid_map; tr -s ' ' < /proc/self/gid_map; stat -c '%u:%g' /bin/busybox
        touch /dev/shm/new /data/new && stat -c '%u:%g' /dev/shm/new /data/new; echo x > /dev/null; echo y > /proc/self/fd/1
        grep CapEff /proc/self/status; ls /sys/kernel > /dev/null && mount -t tmpfs none /mnt 2>/dev/null || echo no";
    let data = host_scratch();
    std::os::unix::fs::chown(data.path(), Some(100_005), Some(100_006)).unwrap();
    let bundle = |user: Value| {
        Bundle::sh(script)
            .writable()
            .push("/linux/namespaces", json!({ "type": "user" }))
            .set("/linux/uidMappings", map.clone())
            .set("/linux/gidMappings", map.clone())
            .set("/process/user", user)
            .push("/process/rlimits", json!({ "type": "RLIMIT_NPROC", "hard": 32_768, "soft": 32_768 }))
            .bind(data.path(), "/data", &[])
    };
    let writable = |bundle: Bundle| {
        // What the container's root has nothing to say about, it could not make mount points in.
        for name in ["upper", "work", "rootfs"] {
            std::os::unix::fs::chown(bundle.dir().join(name), Some(100_000), Some(100_000)).unwrap();
        }
        fs::set_permissions(bundle.dir(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        bundle
    };
    let ended = alike(&writable(bundle(json!({ "uid": 5, "gid": 6 }))));
    assert!(ended.text().contains("5:6\n5:6\n"), "{ended:?}");
    let host = std::os::unix::fs::MetadataExt::uid(&fs::metadata(data.path().join("new")).unwrap());
    assert_eq!(host, 100_005);
}

fn a_cgroup_that_is_writable_in_a_container_is_its_users() {
    let script = "
        cd /sys/fs/cgroup; stat -c %u . cgroup.procs cgroup.subtree_control memory.max
        mkdir mine 2>/dev/null && echo $$ > mine/cgroup.procs && cat /proc/self/cgroup || echo no";
    let bundle = || Bundle::sh(script).set("/process/user", json!({ "uid": 7, "gid": 7 }));
    assert_eq!(Runtime::under_test().run(&bundle()).ok(), "0\n0\n0\n0\nno\n");
    let options = ["nosuid", "noexec", "nodev", "rw"];
    let writable = bundle().mount("/sys/fs/cgroup", "cgroup", "cgroup", &options);
    assert_eq!(Runtime::under_test().run(&writable).ok(), "7\n7\n7\n0\n0::/mine\n");
}

fn limits_mean_what_they_mean_to_runc() {
    let files = "memory.max memory.low memory.high pids.max cpu.weight cpu.max cpuset.cpus.effective";
    let bundle =
        Bundle::sh(&format!("cd /sys/fs/cgroup; cat {files} | head -n 6; cat cgroup.controllers | wc -w"))
            .set(
                "/linux/resources/memory",
                json!({ "limit": 80 << 20, "reservation": 40 << 20, "swap": 80 << 20, "swappiness": 10 }),
            )
            .set("/linux/resources/pids", json!({ "limit": 44 }))
            .set(
                "/linux/resources/cpu",
                json!({ "shares": 300, "quota": 40_000, "period": 80_000, "cpus": "0", "mems": "0" }),
            )
            .set("/linux/resources/unified", json!({ "memory.high": "70000000" }))
            .set("/linux/resources/hugepageLimits", json!([{ "pageSize": "2MB", "limit": 4_194_304 }]));
    let known = under_runc(&bundle).code(0).text();
    let ended = Runtime::under_test().run(&bundle).code(0).text();
    // How many controllers there are is the kernel's business.
    let limits = |text: &str| text.lines().take(6).map(String::from).collect::<Vec<_>>();
    assert_eq!(limits(&known), limits(&ended));
}

fn newer_limits_stand_in_the_cgroup() {
    let runtime = Runtime::under_test();
    let script = "cd /sys/fs/cgroup; cat cpu.idle; cat cpu.max.burst cpu.max";
    let bundle = Bundle::sh(script).set(
        "/linux/resources/cpu",
        json!({ "quota": 50_000, "period": 100_000, "burst": 20_000, "idle": 1 }),
    );
    assert_eq!(runtime.run(&bundle).ok(), "1\n20000\n50000 100000\n");
    // Below what is in use, who asked to be told is told.
    let container = runtime.idle();
    let resources = json!({ "memory": { "limit": 4 << 20, "checkBeforeUpdate": true } }).to_string();
    container.exec("dd if=/dev/zero of=/dev/shm/x bs=1M count=16 2>/dev/null").ok();
    let words = ["update", "--resources", "-", container.id.as_str()];
    let stdin = Stdin::Bytes(resources.into_bytes());
    let reason = crate::harness::Program::spawn(runtime.command(words), stdin).finish().refused();
    assert!(reason.contains("checkBeforeUpdate"), "{reason}");
    assert_eq!(container.exec("cat /sys/fs/cgroup/memory.max").ok(), "max\n");
}

fn seccomp_actions_mean_what_they_mean_to_runc() {
    // A call's answer, or how it ended the process that made it.
    let script = r#"
        for (["mkdir", 83], ["sethostname", 170], ["kill", 62], ["personality", 135], ["getppid", 110],
                ["sched_get_priority_max", 146], ["newer than the filter", 1000]) {
            my ($name, $number) = @$_;
            pipe R, W;
            if (!fork) { $! = 0; my $r = syscall($number, $number == 135 ? 8 : $number == 146 ? 0x100 : 0, 0); syswrite W, "$r " . ($! + 0); exec "/bin/true" }
            wait; close W; my $answer = <R>; $answer = "" unless defined $answer;
            $answer = "fine" if $number == 110 && $answer !~ /^-1/;
            print "$name [$answer] $?\n";
        }"#;
    let filter = |action: &str, errno: Option<u32>| {
        let mut call = json!({ "names": ["mkdir"], "action": action });
        if let Some(errno) = errno {
            call["errnoRet"] = errno.into();
        }
        json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                call,
                { "names": ["sethostname", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 77 },
                { "names": ["personality"], "action": "SCMP_ACT_ERRNO", "errnoRet": 78,
                  "args": [{ "index": 0, "value": 8, "op": "SCMP_CMP_EQ" }] },
                { "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 79,
                  "args": [{ "index": 1, "value": 255, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }] },
                { "names": ["sched_get_priority_max"], "action": "SCMP_ACT_ERRNO", "errnoRet": 82,
                  "args": [{ "index": 0, "value": 0xf00, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }] },
            ]
        })
    };
    for (action, errno) in [
        ("SCMP_ACT_ERRNO", None),
        ("SCMP_ACT_LOG", None),
        ("SCMP_ACT_TRAP", None),
        ("SCMP_ACT_TRACE", Some(5)),
        ("SCMP_ACT_KILL_PROCESS", None),
        ("SCMP_ACT_KILL_THREAD", None),
    ] {
        let bundle = Bundle::perl(script).set("/linux/seccomp", filter(action, errno));
        alike(&bundle).code(0);
    }
    if Runtime::under_test().is_stockade() {
        // Newer than the lab's runc.
        let mut flagged = filter("SCMP_ACT_ERRNO", Some(81));
        flagged["flags"] =
            json!(["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"]);
        let text = Runtime::under_test().run(&Bundle::perl(script).set("/linux/seccomp", flagged)).ok();
        assert!(text.contains("mkdir [-1 81] 0"), "{text}");
    }
    // What is not named is denied, and the default has its own answer.
    let mut denied = filter("SCMP_ACT_ALLOW", None);
    denied["defaultAction"] = "SCMP_ACT_ERRNO".into();
    denied["defaultErrnoRet"] = 80.into();
    denied["syscalls"] = json!([{ "names": [
        "read", "write", "close", "execve", "brk", "mmap", "munmap", "mprotect", "openat", "newfstatat", "fstat", "lseek", "ioctl",
        "fcntl", "pread64", "arch_prctl", "set_tid_address", "set_robust_list", "rseq", "prlimit64", "getrandom", "access", "exit_group",
        "rt_sigaction", "rt_sigprocmask", "clone", "clone3", "wait4", "pipe2", "pipe", "futex", "readlink", "getuid", "geteuid", "getgid",
        "getegid", "stat", "poll", "getcwd", "sigaltstack", "capget", "capset", "prctl", "setgroups", "setuid", "setgid", "epoll_ctl",
        "fstatfs", "getdents64", "madvise", "sched_getaffinity", "epoll_pwait", "nanosleep", "tgkill", "getpid", "gettid", "chdir", "fchdir",
        "statfs", "openat2", "dup3", "dup2", "close_range", "statx", "faccessat2", "umask", "sched_yield", "setresuid", "setresgid",
        "getppid", "rt_sigreturn", "recvfrom", "sendto", "recvmsg", "sendmsg", "socket", "connect", "accept4", "unlinkat", "setsid",
        "keyctl", "eventfd2", "epoll_create1", "pidfd_open", "memfd_create", "pidfd_send_signal", "mkdirat", "restart_syscall"
    ], "action": "SCMP_ACT_ALLOW" }]);
    let ended = alike(&Bundle::perl(script).set("/linux/seccomp", denied)).code(0);
    assert!(ended.text().contains("mkdir [-1 80] 0"), "{ended:?}");
}

/// A hook that adds a line to a log: its kind and the state's status, or as root of the container what it finds.
fn hook(kind: &str, script: &str) -> Value {
    let program = match kind {
        // Lent to the guest, so it has to be static; and one of the container's own.
        "createContainer" => Rootfs::Busybox.program("busybox").display().to_string(),
        "startContainer" => "/bin/sh".into(),
        _ => "/bin/sh".into(),
    };
    json!({ "path": program, "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin", format!("KIND={kind}")] })
}

const STATUS: &str = r#"sed -e 's/.*"status": *"\([a-z]*\)".*/\1/'"#;

fn hooks_run_in_their_order_with_the_state() {
    let kinds = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
    let log = |run: &dyn Fn(&Bundle) -> Ended| {
        let dir = host_scratch();
        let mut bundle = Bundle::sh("echo workload >> /log/log").bind(dir.path(), "/log", &[]).writable();
        for kind in kinds {
            let place = match kind {
                // The bundle that the state names has the root's path, and below that the mounts are made already.
                "createContainer" => {
                    "bundle=$(printf %s \"$state\" | sed -e 's/.*\"bundle\": *\"\\([^\"]*\\)\".*/\\1/');
                     cd \"$bundle\" && cd $(sed -e 's/.*\"root\":{[^}]*\"path\":\"\\([^\"]*\\)\".*/\\1/' config.json)/log"
                }
                "startContainer" => "cd /log",
                _ => &format!("cd {}", dir.path().display()),
            };
            let script =
                format!("state=$(cat); {place}; echo $KIND $(printf %s \"$state\" | {STATUS}) >> log");
            bundle = bundle.push(&format!("/hooks/{kind}"), hook(kind, &script));
        }
        let ended = run(&bundle).code(0);
        fs::read_to_string(dir.path().join("log")).unwrap_or_else(|e| panic!("no log ({e}): {ended:?}"))
    };
    let here = log(&|bundle| Runtime::under_test().run(bundle));
    assert_eq!(
        here,
        "prestart creating\ncreateRuntime creating\ncreateContainer creating\nstartContainer created\n\
         workload\npoststart running\npoststop stopped\n"
    );
    let known = log(&under_runc).replace("poststart created", "poststart running");
    // When poststart and the workload come to write is a race of theirs, and what runc says of the state then another.
    let sorted = |log: &str| {
        let mut lines: Vec<_> = log.lines().map(String::from).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&known), sorted(&here));
}

fn failing_hook_fails_its_operation() {
    for kind in ["prestart", "createRuntime", "createContainer", "startContainer"] {
        let bundle = Bundle::sh("echo workload")
            .push(&format!("/hooks/{kind}"), hook(kind, "echo broken >&2; exit 3"))
            .push("/hooks/poststop", hook("poststop", "exit 0"));
        let ended = Runtime::under_test().run(&bundle).code(1);
        assert_eq!(ended.text(), "", "{kind}: {ended:?}");
        assert!(ended.stderr.contains("hook"), "{kind}: {ended:?}");
        if Runtime::under_test().is_stockade() {
            assert!(ended.stderr.contains(kind), "{kind}: {ended:?}");
        }
    }
    let bundle = Bundle::sh("exec sleep 100000").push("/hooks/poststart", hook("poststart", "exit 3"));
    let ended = Runtime::under_test().run(&bundle).code(1);
    assert!(ended.stderr.contains("poststart"), "{ended:?}");
}

fn poststop_hooks_run_each_whatever_fails() {
    let dir = host_scratch();
    let log = dir.path().join("log");
    let last = |bundle: Bundle| {
        let note = |word: &str| hook("poststop", &format!("echo {word} >> {}", log.display()));
        bundle
            .push("/hooks/poststop", note("first"))
            .push("/hooks/poststop", hook("poststop", "exit 3"))
            .push("/hooks/poststop", note("last"))
    };
    let logged = || {
        let lines = fs::read_to_string(&log).unwrap_or_default();
        let _ = fs::remove_file(&log);
        lines
    };
    assert_eq!(Runtime::under_test().run(&last(Bundle::sh("echo workload"))).ok(), "workload\n");
    assert_eq!(logged(), "first\nlast\n");
    // What a hook has taken another has to give back, of a container that does not come to be as well.
    let broken = Bundle::sh("true").push("/hooks/createContainer", hook("createContainer", "exit 3"));
    Runtime::under_test().run(&last(broken)).code(1);
    assert_eq!(logged(), "first\nlast\n");
}

fn hooks_timeout_is_kept() {
    for kind in ["createRuntime", "createContainer", "startContainer"] {
        let mut hang = hook(kind, "exec sleep 100000");
        hang["timeout"] = 1.into();
        let bundle = Bundle::sh("echo workload").push(&format!("/hooks/{kind}"), hang);
        let ended = Runtime::under_test().run(&bundle).code(1);
        assert_eq!(ended.text(), "", "{kind}: {ended:?}");
    }
}

fn scheduler_and_io_priority() {
    let script = "chrt -p $$ | grep -o ': .*'; ionice -p $$";
    let bundle = Bundle::debian(script)
        .set(
            "/process/scheduler",
            json!({ "policy": "SCHED_FIFO", "priority": 7, "flags": ["SCHED_FLAG_RESET_ON_FORK"] }),
        )
        .set("/process/ioPriority", json!({ "class": "IOPRIO_CLASS_IDLE", "priority": 0 }));
    assert_eq!(Runtime::under_test().run(&bundle).ok(), ": SCHED_FIFO|SCHED_RESET_ON_FORK\n: 7\nidle\n");
    let bundle = Bundle::debian("nice; chrt -p $$ | grep -o ': .*'; ionice -p $$")
        .set("/process/scheduler", json!({ "policy": "SCHED_BATCH", "nice": 5 }))
        .set("/process/ioPriority", json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 }));
    assert_eq!(Runtime::under_test().run(&bundle).ok(), "5\n: SCHED_BATCH\n: 0\nbest-effort: prio 6\n");
}

fn cpu_affinity_of_an_exec() {
    let bundle = Bundle::idle().set("/linux/resources/cpu", json!({ "quota": 200_000, "period": 100_000 }));
    let container = Runtime::under_test().create(&bundle);
    container.op("start").ok();
    container.program.expect_line("ready");
    let process = json!({
        "args": ["grep", "Cpus_allowed_list", "/proc/self/status"], "env": ["PATH=/bin"], "cwd": "/",
        "user": { "uid": 0, "gid": 0 }, "execCPUAffinity": { "initial": "0", "final": "1" },
    });
    let file = bundle.dir().join("process.json");
    fs::write(&file, process.to_string()).unwrap();
    let options = ["--process", file.to_str().unwrap()];
    let text = container.start_exec(&options, &[], Stdin::Null).finish().ok();
    assert_eq!(text, "Cpus_allowed_list:\t1\n");
}

fn clocks_of_a_time_namespace_are_shifted() {
    let bundle = Bundle::sh("cut -d. -f1 /proc/uptime; cat /proc/self/timens_offsets | tr -s ' '")
        .push("/linux/namespaces", json!({ "type": "time" }))
        .set(
            "/linux/timeOffsets",
            json!({ "boottime": { "secs": 5_000_000 }, "monotonic": { "secs": 7, "nanosecs": 9 } }),
        );
    let text = Runtime::under_test().run(&bundle).ok();
    let uptime: u64 = text.lines().next().unwrap().parse().unwrap();
    assert!((5_000_000..5_100_000).contains(&uptime), "{text}");
    assert!(text.contains("monotonic 7 9") && text.contains("boottime 5000000 0"), "{text}");
}

fn personality_and_domainname() {
    let bundle = Bundle::sh("uname -m; cat /proc/sys/kernel/domainname")
        .set("/linux/personality", json!({ "domain": "LINUX32" }))
        .set("/domainname", "nis.example");
    assert_eq!(Runtime::under_test().run(&bundle).ok(), "i686\nnis.example\n");
}
