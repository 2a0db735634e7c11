//! Limits of `linux.resources` stand in the container's cgroup and are enforced; and the VM is as large as they
//! and the settings for its size ask for.

use serde_json::json;

use crate::harness::{Bundle, Case, Runtime, case};

const VM: &str = "the size of the VM";

pub const CASES: &[Case] = &[
    case!(pids_limit),
    case!(memory_limit_kills_a_hog_and_spares_the_rest),
    case!(memory_hog_as_the_workload_is_reported),
    case!(hog_that_leaves_no_page_for_its_own_code_is_killed)
        .stockade_only("the code of a program on the host is in nobody's memory limit"),
    case!(cpu_quota_and_weight),
    case!(unified_limits),
    case!(vm_has_its_default_size).stockade_only(VM),
    case!(vm_follows_the_bundles_limits).stockade_only(VM),
    case!(vm_follows_the_cpuset).stockade_only(VM),
    case!(vm_of_three_gibibytes_uses_memory_beyond_the_gap).stockade_only(VM),
];

fn pids_limit() {
    // The perl process itself is one of the twenty.
    let script = r#"
        open F, "/sys/fs/cgroup/pids.max"; print <F>;
        my $children = 0;
        for (1..30) { my $pid = fork; last unless defined $pid; if (!$pid) { sleep 1000; exit } $children++ }
        print "$children $!\n"; open F, "/sys/fs/cgroup/pids.current"; print <F>;
        kill "KILL", -1"#;
    let bundle = Bundle::perl(script).set("/linux/resources/pids", json!({ "limit": 20 }));
    let ended = Runtime::under_test().run(&bundle).code(0);
    assert_eq!(ended.text(), "20\n19 Resource temporarily unavailable\n20\n");
}

/// Takes memory until somebody says no.
const HOG: &str = "my $mebibyte = 1 << 20; push @x, 'x' x $mebibyte while 1";

fn memory_limit_kills_a_hog_and_spares_the_rest() {
    let script = format!(
        "cat /sys/fs/cgroup/memory.max; perl -e \"{}\"; echo \"hog $?\"; grep '^oom_kill ' /sys/fs/cgroup/memory.events",
        HOG.replace('$', "\\$")
    );
    let bundle = Bundle::debian(&script)
        .set("/linux/resources/memory", json!({ "limit": 64 << 20, "swap": 64 << 20 }));
    let ended = Runtime::under_test().run(&bundle).code(0);
    assert_eq!(ended.text(), "67108864\nhog 137\noom_kill 1\n", "{ended:?}");
}

fn memory_hog_as_the_workload_is_reported() {
    let runtime = Runtime::under_test();
    let bundle =
        Bundle::perl(HOG).set("/linux/resources/memory", json!({ "limit": 64 << 20, "swap": 64 << 20 }));
    let ended = runtime.run(&bundle).code(137);
    assert_eq!(ended.text(), "");
    // runc says nothing here; for our users it is the difference between a mystery and a cause.
    if runtime.is_stockade() {
        assert!(ended.stderr.contains("killed") && ended.stderr.contains("memory.limit"), "{ended:?}");
    }
}

/// Linux lets such a program go on for minutes, since it reads its code again and again and makes progress.
fn hog_that_leaves_no_page_for_its_own_code_is_killed() {
    // mmap of a file, all of whose pages are then needed in turn.
    let script = r#"my $len = 3 << 20; open F, "<", "/usr/bin/perl"; my $at = syscall(9, 0, $len, 1, 1, fileno(F), 0);
        while (1) {
            open S, "<", "/sys/fs/cgroup/memory.stat"; my %used = map { split } <S>;
            last if $used{anon} + $used{kernel} > (64 << 20) - (200 << 10);
            push @x, "x" x 65536;
        }
        while (1) { unpack("P1", pack("Q", $at + 4096 * $_)) for 0 .. $len / 4096 - 1 }"#;
    let bundle =
        Bundle::perl(script).set("/linux/resources/memory", json!({ "limit": 64 << 20, "swap": 64 << 20 }));
    let ended = Runtime::under_test().run(&bundle).code(137);
    assert!(ended.stderr.contains("memory.limit"), "{ended:?}");
}

fn cpu_quota_and_weight() {
    // 20 ms in 100 ms: whoever burns 100 ms of processor time has been held back.
    let script = r#"
        for my $f (qw(cpu.max cpu.weight)) { open F, "/sys/fs/cgroup/$f"; print <F> }
        1 while (times)[0] < 0.1;
        open F, "/sys/fs/cgroup/cpu.stat"; for (<F>) { print "throttled\n" if /^nr_throttled [1-9]/ }"#;
    let bundle = Bundle::perl(script)
        .set("/linux/resources/cpu", json!({ "quota": 20_000, "period": 100_000, "shares": 512 }));
    // 512 shares of 1024: 1 + (512 - 2) * 9999 / 262142.
    assert_eq!(Runtime::under_test().run(&bundle).ok(), "20000 100000\n20\nthrottled\n");
}

/// As kubelet has them, which gives no container any swap.
fn unified_limits() {
    let script = "cat /sys/fs/cgroup/memory.high /sys/fs/cgroup/pids.max";
    let bundle = Bundle::sh(script).set(
        "/linux/resources/unified",
        json!({ "memory.high": "50331648", "pids.max": "77", "memory.swap.max": "0" }),
    );
    assert_eq!(Runtime::under_test().run(&bundle).ok(), "50331648\n77\n");
}

/// Processors and memory (in MiB) that a VM has for this bundle.
#[track_caller]
fn vm_size(runtime: &Runtime, bundle: Bundle) -> (usize, usize) {
    let script = "grep -c ^processor /proc/cpuinfo; awk '/MemTotal/{print $2}' /proc/meminfo";
    let text = runtime.run(&bundle.script(script)).ok();
    let numbers: Vec<usize> = text.lines().map(|line| line.parse().unwrap()).collect();
    (numbers[0], numbers[1] / 1024)
}

fn vm_has_its_default_size() {
    let (cpus, memory) = vm_size(&Runtime::under_test(), Bundle::sh(""));
    // 256 MiB less what the guest's kernel keeps for itself.
    assert!(cpus == 1 && (200..=256).contains(&memory), "{cpus} CPUs, {memory} MiB");
}

fn vm_follows_the_bundles_limits() {
    let bundle = Bundle::sh("")
        .set("/linux/resources/cpu", json!({ "quota": 150_000, "period": 100_000 }))
        .set("/linux/resources/memory", json!({ "limit": 400 << 20 }));
    let (cpus, memory) = vm_size(&Runtime::under_test(), bundle);
    assert!(cpus == 2 && (400..=800).contains(&memory), "{cpus} CPUs, {memory} MiB");
}

fn vm_follows_the_cpuset() {
    let cpus = |list: String| Bundle::sh("").set("/linux/resources/cpu", json!({ "cpus": list }));
    let there = std::thread::available_parallelism().unwrap().get().min(3);
    let runtime = Runtime::under_test();
    assert_eq!(vm_size(&runtime, cpus(format!("0-{}", there - 1))).0, there);
    // It holds for the VM on the host too, which has no such CPU.
    let reason = runtime.run(&cpus("0,5000".into())).refused();
    assert!(reason.contains("cpu.cpus"), "{reason}");
}

fn vm_of_three_gibibytes_uses_memory_beyond_the_gap() {
    let bundle = Bundle::sh("").set("/linux/resources/memory", json!({ "limit": 3_u64 << 30 }));
    let (_, memory) = vm_size(&Runtime::under_test(), bundle);
    assert!((2900..=3500).contains(&memory), "{memory} MiB");
}
