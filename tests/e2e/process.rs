//! The workload's process is what `process` in config.json says: arguments, environment, identity, rights,
//! limits; and its end is the runtime's end.

use crate::harness::{Bundle, Case, Exit, Rootfs, Runtime, Stdin, case};
use nix::sys::signal::Signal;
use serde_json::json;

pub const CASES: &[Case] = &[
    case!(exit_code_is_the_workloads),
    case!(command_that_a_shell_does_not_find_is_127),
    case!(command_that_does_not_exist_is_named),
    case!(death_by_signal_is_128_plus_its_number),
    case!(signals_to_run_reach_the_workload),
    case!(arguments_arrive_as_they_are),
    case!(environment_is_the_bundles_and_nothing_of_the_hosts),
    case!(working_directory),
    case!(user_groups_and_umask),
    case!(hostname),
    case!(capabilities_of_root_are_the_bundles),
    case!(ambient_capabilities_reach_an_ordinary_user),
    case!(rlimits_oom_score_and_no_new_privileges),
    case!(seccomp_denies_a_call),
    case!(seccomp_kills_for_a_call),
];

fn exit_code_is_the_workloads() {
    for code in [0, 3] {
        let ended = Runtime::under_test().run(&Bundle::sh(&format!("exit {code}"))).code(code);
        assert_eq!((ended.text().as_str(), ended.stderr.as_str()), ("", ""));
    }
}

fn command_that_a_shell_does_not_find_is_127() {
    let ended = Runtime::under_test().run(&Bundle::sh("no-such-command")).code(127);
    assert!(ended.stderr.contains("no-such-command"), "{ended:?}");
}

fn command_that_does_not_exist_is_named() {
    let bundle = Bundle::new(Rootfs::Busybox, &["/bin/no-such-program", "argument"]);
    let reason = Runtime::under_test().run(&bundle).refused();
    assert!(reason.contains("no-such-program"), "{reason}");
}

fn death_by_signal_is_128_plus_its_number() {
    let container = Runtime::under_test().start(&Bundle::idle(), Stdin::Null);
    container.program.expect_line("ready");
    // PID 1 may not kill itself, another process of the container may itself.
    for (signal, number) in [("TERM", 15), ("SEGV", 11)] {
        container.exec(&format!("kill -{signal} $$; echo survived")).code(128 + number);
    }
    container.kill("KILL");
    let ended = container.finish().code(128 + 9);
    assert_eq!(ended.text(), "ready\n");
}

fn signals_to_run_reach_the_workload() {
    let script = "trap 'echo usr1' USR1; trap 'echo term; exit 7' TERM; echo ready; while :; do sleep 1000 & wait $!; done";
    let container = Runtime::under_test().start(&Bundle::sh(script), Stdin::Null);
    container.program.expect_line("ready");
    container.program.signal(Signal::SIGUSR1);
    container.program.expect_line("usr1");
    container.program.signal(Signal::SIGTERM);
    container.program.expect_line("term");
    container.finish().code(7);
}

fn arguments_arrive_as_they_are() {
    let bundle = Bundle::new(Rootfs::Busybox, &["printf", "[%s]", "", "a b", "ü\t'\"\\", "-n", "$HOME *"]);
    assert_eq!(Runtime::under_test().run(&bundle).ok(), "[][a b][ü\t'\"\\][-n][$HOME *]");
}

fn environment_is_the_bundles_and_nothing_of_the_hosts() {
    let bundle = Bundle::new(Rootfs::Busybox, &["env"])
        .push("/process/env", "SPACED=a b  c")
        .push("/process/env", "EQUALS=x=y=")
        .push("/process/env", "EMPTY=")
        .push("/process/env", "UNICODE=grün");
    let runtime = Runtime::under_test().env("E2E_HOST_SECRET", "host");
    let text = runtime.run(&bundle).ok();
    for line in ["SPACED=a b  c", "EQUALS=x=y=", "EMPTY=", "UNICODE=grün", "TERM=xterm"] {
        assert!(text.lines().any(|found| found == line), "{line} is missing: {text}");
    }
    // runc sets HOME where the bundle does not.
    let extra: Vec<_> = text
        .lines()
        .filter_map(|line| line.split_once('=').map(|(name, _)| name))
        .filter(|name| !["PATH", "TERM", "SPACED", "EQUALS", "EMPTY", "UNICODE", "HOME"].contains(name))
        .collect();
    assert!(extra.is_empty(), "not the bundle's: {extra:?}");
}

fn working_directory() {
    let bundle = Bundle::sh("pwd; cd -P .; pwd").set("/process/cwd", "/proc/sys");
    assert_eq!(Runtime::under_test().run(&bundle).ok(), "/proc/sys\n/proc/sys\n");
}

fn user_groups_and_umask() {
    let user = json!({ "uid": 1000, "gid": 1001, "additionalGids": [2000, 3000], "umask": 0o027 });
    let bundle = Bundle::debian("id -u; id -g; id -G; umask").set("/process/user", user);
    assert_eq!(Runtime::under_test().run(&bundle).ok(), "1000\n1001\n1001 2000 3000\n0027\n");
}

fn hostname() {
    let bundle = Bundle::sh("hostname; cat /proc/sys/kernel/hostname").set("/hostname", "two-words.example");
    assert_eq!(Runtime::under_test().run(&bundle).ok(), "two-words.example\ntwo-words.example\n");
}

/// Runs a program that shows its capability sets, and gives them in the order Inh, Prm, Eff, Bnd, Amb.
fn capability_sets(bundle: &Bundle) -> Vec<u64> {
    let text = Runtime::under_test().run(bundle).ok();
    text.lines()
        .map(|line| u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap())
        .collect()
}

fn capabilities_of_root_are_the_bundles() {
    let names = json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"]);
    let sets = json!({ "bounding": names, "effective": names, "permitted": names });
    let bundle = Bundle::new(Rootfs::Busybox, &["grep", "^Cap", "/proc/self/status"])
        .set("/process/capabilities", sets);
    let mask = 1 << 0 | 1 << 5 | 1 << 13;
    assert_eq!(capability_sets(&bundle), [0, mask, mask, mask, 0]);
}

fn ambient_capabilities_reach_an_ordinary_user() {
    let one = json!(["CAP_NET_BIND_SERVICE"]);
    let all = json!(["CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    let sets =
        json!({ "bounding": all, "permitted": all, "effective": one, "inheritable": one, "ambient": one });
    let bundle = Bundle::new(Rootfs::Busybox, &["grep", "^Cap", "/proc/self/status"])
        .set("/process/capabilities", sets)
        .set("/process/user", json!({ "uid": 1000, "gid": 1000 }));
    let (bind, both) = (1 << 10, 1 << 10 | 1 << 5);
    assert_eq!(capability_sets(&bundle), [bind, bind, bind, both, bind]);
}

fn rlimits_oom_score_and_no_new_privileges() {
    let rlimits = json!([
        { "type": "RLIMIT_NOFILE", "soft": 256, "hard": 512 },
        { "type": "RLIMIT_CORE", "soft": 0, "hard": 4096 },
        { "type": "RLIMIT_STACK", "soft": 1_048_576, "hard": 2_097_152 },
    ]);
    let script = "ulimit -Sn; ulimit -Hn; grep -E 'core file|stack size' /proc/self/limits | tr -s ' ';
                  cat /proc/self/oom_score_adj; grep NoNewPrivs /proc/self/status";
    let bundle = Bundle::sh(script).set("/process/rlimits", rlimits).set("/process/oomScoreAdj", 321);
    let expected = "256\n512\nMax stack size 1048576 2097152 bytes \nMax core file size 0 4096 bytes \n\
                    321\nNoNewPrivs:\t1\n";
    assert_eq!(Runtime::under_test().run(&bundle).ok(), expected);
}

fn seccomp_denies_a_call() {
    let filter = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1 },
            { "names": ["symlink", "symlinkat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28 }
        ]
    });
    let script = "cd /dev/shm; mkdir a; ln -s x b; mkfifo c && echo made; grep Seccomp: /proc/self/status";
    let ended = Runtime::under_test().run(&Bundle::sh(script).set("/linux/seccomp", filter)).code(0);
    assert_eq!(ended.text(), "made\nSeccomp:\t2\n");
    let reasons: Vec<_> = ended.stderr.lines().filter_map(|line| line.rsplit(": ").next()).collect();
    assert_eq!(reasons, ["Operation not permitted", "No space left on device"], "{}", ended.stderr);
}

fn seccomp_kills_for_a_call() {
    let filter = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL_PROCESS" }]
    });
    let bundle = Bundle::sh("echo before; mkdir /dev/shm/a; echo \"$?\"; exec mkdir /dev/shm/b")
        .set("/linux/seccomp", filter);
    let ended = Runtime::under_test().run(&bundle);
    // SIGSYS is 31. The shell forks for the first mkdir and becomes the second.
    assert_eq!(ended.exit, Exit::Code(128 + 31), "{ended:?}");
    assert_eq!(ended.text(), "before\n159\n");
}
