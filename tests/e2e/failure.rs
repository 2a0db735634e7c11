//! Whatever dies, and whenever: the caller is told with a non-zero exit, and a delete leaves nothing.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::shared::{NETWORK, sharing};
use crate::harness::{
    Bundle, Case, Container, Ended, Exit, Program, Runtime, Stdin, Traces, case, host_scratch, vmm_of,
};

const VM: &str = "the processes and the kernel of the VM";

pub const CASES: &[Case] = &[
    case!(fifty_kills_at_random_moments).stockade_only(VM).exclusive(),
    case!(killed_while_it_ends_tells_no_lies).stockade_only(VM).exclusive(),
    case!(vmm_death_is_told_and_stops_the_container).stockade_only(VM).exclusive(),
    case!(kernel_panic_is_reported_with_the_last_console_lines).stockade_only(VM).exclusive(),
    case!(guest_that_resets_itself_is_no_success).stockade_only(VM).exclusive(),
    case!(workload_that_eats_the_guest_does_not_hurt_the_agent).stockade_only(VM),
    case!(fork_bomb_is_contained),
    case!(deletion_by_force_does_not_wait_for_an_update),
    case!(deletion_by_force_does_not_wait_for_a_guest_that_stands_still).stockade_only(VM),
    case!(commands_wait_while_there_is_no_room_for_another_descriptor).stockade_only(VM),
    case!(hook_that_does_not_end_keeps_nothing_alive).stockade_only(VM),
    case!(host_without_another_thread_fails_what_needs_one_and_nothing_else).stockade_only(VM),
];

/// A random generator whose seed is printed, so that a failure can be repeated: xorshift64*.
struct Random(u64);

impl Random {
    /// From STOCKADE_E2E_SEED, or from the clock.
    fn seeded() -> (Self, u64) {
        let given = std::env::var("STOCKADE_E2E_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed: u64 = given.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            u64::from(now.subsec_nanos()) << 16 | now.as_secs() & 0xffff
        });
        (Self(seed | 1), seed)
    }

    /// A number in [0, 1).
    fn fraction(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Makes PID 1 of the guest die: a workload with the VM's own pid namespace and the right to trace overwrites
/// its stack. Its own output then wakes the agent up.
const AGENT_KILLER: &str = r#"
    $| = 1; print "ready\n"; my $x = 0;
    for (1 .. $ENV{COUNT}) { $x += $_ }
    open(MAPS, "/proc/1/maps") or die "maps: $!"; open(MEM, "+<", "/proc/1/mem") or die "mem: $!";
    for (<MAPS>) {
        next unless /^(\w+)-(\w+) rw.*\[stack\]/;
        my ($from, $to) = (hex $1, hex $2);
        sysseek(MEM, $from, 0); syswrite(MEM, "\xff" x ($to - $from)) or die "write: $!";
    }
    print "still here\n" while 1;
"#;

#[derive(Debug, Clone, Copy)]
enum Victim {
    Vmm,
    Supervisor,
    Agent,
}

/// Starts a run that never ends by itself and kills the victim at a moment of its life: from 0, its first
/// instruction, over 1, when its workload has begun in a normal run, onwards.
fn run_and_kill(victim: Victim, moment: f64, ready_after: Duration, bundle: &Bundle) -> Ended {
    let mut container = Runtime::under_test().start(bundle, Stdin::Null);
    let wait = ready_after.mul_f64(moment);
    match victim {
        Victim::Agent => {}
        Victim::Supervisor => {
            assert!(!container.program.ended_within(wait), "ended by itself: {}", container.program.report());
            container.program.signal(Signal::SIGKILL);
        }
        Victim::Vmm => {
            assert!(!container.program.ended_within(wait), "ended by itself: {}", container.program.report());
            // There may be none yet: then it dies as soon as it is there.
            let deadline = Instant::now() + crate::harness::HANG;
            let vmm = loop {
                match vmm_of(container.program.pid()) {
                    Some(vmm) => break vmm,
                    None if container.program.ended_within(Duration::from_millis(1)) => {
                        panic!("ended before there was a VMM: {}", container.program.report())
                    }
                    None => assert!(Instant::now() < deadline, "no VMM: {}", container.program.report()),
                }
            };
            kill(Pid::from_raw(vmm), Signal::SIGKILL).unwrap();
        }
    }
    let id = container.id.as_str().to_owned();
    let ended = container.finish();
    Runtime::under_test().call(&["delete", "--force", &id]).code(0);
    ended
}

/// How long a normal run takes to the first line of its workload, and to its end.
fn normal_run(script: &str) -> (Duration, Duration) {
    let begin = Instant::now();
    let container = Runtime::under_test().start(&Bundle::sh(script), Stdin::Null);
    container.program.expect_line("ready");
    let ready = begin.elapsed();
    container.finish().code(0);
    (ready, begin.elapsed())
}

fn fifty_kills_at_random_moments() {
    let (mut random, seed) = Random::seeded();
    println!("seed of the random moments: STOCKADE_E2E_SEED={seed}");
    let (ready_after, _) = normal_run("echo ready");
    let before = Traces::now();
    for round in 0..50 {
        let victim = match round % 5 {
            0 | 2 => Victim::Vmm,
            1 | 3 => Victim::Supervisor,
            _ => Victim::Agent,
        };
        // The last third of the moments is when the workload is busy writing.
        let moment = random.fraction() * 1.5;
        let bundle = match victim {
            Victim::Agent => Bundle::perl(AGENT_KILLER)
                .without_namespace("pid")
                .capability("CAP_SYS_PTRACE")
                .push("/process/env", format!("COUNT={}", (moment * 100_000.0) as u64)),
            // In a cgroup of its own, which must not stay either.
            Victim::Supervisor => Bundle::sh("echo ready; while :; do seq 1 1000; done")
                .set("/linux/cgroupsPath", format!("/{}", crate::harness::Id::new().as_str())),
            Victim::Vmm => Bundle::sh("echo ready; while :; do seq 1 1000; done"),
        };
        let ended = run_and_kill(victim, moment, ready_after, &bundle);
        drop(bundle);
        let about = || format!("round {round}, {victim:?} at {moment:.3} (seed {seed})");
        assert!(ended.exit != Exit::Code(0), "{}: {ended:?}", about());
        match victim {
            Victim::Supervisor => assert_eq!(ended.exit, Exit::Signal(9), "{}: {ended:?}", about()),
            Victim::Vmm => assert!(!ended.stderr.is_empty(), "no reason given; {}: {ended:?}", about()),
            Victim::Agent => assert!(ended.stderr.contains("Kernel panic"), "{}: {ended:?}", about()),
        }
        let left = before.new_since();
        assert!(left.is_empty(), "{}: left behind:\n{}\n{ended:?}", about(), left.join("\n"));
    }
}

fn killed_while_it_ends_tells_no_lies() {
    let (mut random, seed) = Random::seeded();
    println!("seed of the random moments: STOCKADE_E2E_SEED={seed}");
    let script = "echo ready; seq 1 20000";
    let (ready_after, end_after) = normal_run(script);
    let expected: String = (1..=20_000).map(|number| format!("{number}\n")).collect();
    let before = Traces::now();
    for round in 0..10 {
        let bundle = Bundle::sh(script);
        let mut container = Runtime::under_test().start(&bundle, Stdin::Null);
        container.program.expect_line("ready");
        let moment = (end_after - ready_after).mul_f64(random.fraction() * 1.1);
        if !container.program.ended_within(moment) {
            let vmm = vmm_of(container.program.pid()).filter(|_| round % 2 == 0);
            // Either may be gone in this moment.
            let _ = kill(Pid::from_raw(vmm.unwrap_or(container.program.pid())), Signal::SIGKILL);
        }
        let id = container.id.as_str().to_owned();
        let ended = container.finish();
        Runtime::under_test().call(&["delete", "--force", &id]).code(0);
        drop(bundle);
        let complete = ended.text() == format!("ready\n{expected}");
        let told = ended.exit != Exit::Code(0) || complete;
        assert!(told, "round {round} (seed {seed}): success without all its output: {ended:?}");
        let left = before.new_since();
        assert!(left.is_empty(), "round {round} (seed {seed}): left behind:\n{}", left.join("\n"));
    }
}

fn vmm_death_is_told_and_stops_the_container() {
    let created = Runtime::under_test().create(&Bundle::idle());
    let running = Runtime::under_test().idle();
    let mut exec = running.start_exec(&[], &["sh", "-c", "echo begun; exec sleep 100000"], Stdin::Null);
    exec.expect_line("begun");
    let die = |container: &Container| {
        let pid = container.pid();
        kill(Pid::from_raw(vmm_of(pid).expect("a VMM")), Signal::SIGKILL).unwrap();
        container.wait_stopped(pid);
    };
    die(&created);
    die(&running);
    let ended = exec.finish();
    assert!(ended.exit != Exit::Code(0) && !ended.stderr.is_empty(), "{ended:?}");
    created.op("start").refused();
    running.exec("true").refused();
    created.delete();
    running.delete();
}

/// A guest directory with the real kernel and this initrd.
fn guest_with(initrd: &[u8]) -> (tempfile::TempDir, Runtime) {
    let dir = host_scratch();
    let runtime = Runtime::under_test();
    std::os::unix::fs::symlink(runtime.guest_dir().join("vmlinux"), dir.path().join("vmlinux")).unwrap();
    fs::write(dir.path().join("initrd.img"), initrd).unwrap();
    let runtime = runtime.env("STOCKADE_GUEST_DIR", dir.path());
    (dir, runtime)
}

/// A cpio archive in the `newc` format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
fn cpio(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (number, (name, mode, bytes)) in files.iter().chain(&[("TRAILER!!!", 0, &[][..])]).enumerate() {
        let fields = [number + 1, *mode as usize, 1, 0, 0, 0, bytes.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend_from_slice(b"070701");
        archive.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(bytes);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// The smallest program for x86-64 Linux: one ELF header, one loaded segment, and this code after them.
fn program(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const CODE: u64 = 64 + 56;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2_u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1_u32.to_le_bytes());
    for address in [BASE + CODE, 64, 0] {
        elf.extend(address.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // PT_LOAD, readable and executable.
    for word in [1_u32, 5] {
        elf.extend(word.to_le_bytes());
    }
    let size = CODE + code.len() as u64;
    for long in [0, BASE, BASE, size, size, 4096] {
        elf.extend(long.to_le_bytes());
    }
    elf.extend_from_slice(code);
    elf
}

#[track_caller]
fn reports_the_panic(runtime: &Runtime, what: &str) {
    let bundle = Bundle::sh("echo never");
    for operation in ["run", "create"] {
        let before = Traces::now();
        let path = bundle.save().display().to_string();
        let ended = runtime.call(&[operation, "--bundle", &path, "e2e-panic"]);
        assert!(matches!(ended.exit, Exit::Code(1..=255)), "{ended:?}");
        assert_eq!(ended.text(), "");
        assert!(ended.stderr.contains("Kernel panic") && ended.stderr.contains(what), "{ended:?}");
        assert_eq!(before.new_since(), [""; 0], "left behind by {operation}");
    }
}

fn kernel_panic_is_reported_with_the_last_console_lines() {
    // mov edi, 7; mov eax, 60 (exit); syscall
    let exits = program(b"\xbf\x07\0\0\0\xb8\x3c\0\0\0\x0f\x05");
    let (_dir, runtime) = guest_with(&cpio(&[("init", 0o100_755, &exits)]));
    reports_the_panic(&runtime, "Attempted to kill init");
    let (_dir, runtime) = guest_with(&cpio(&[("init", 0o100_644, &exits)]));
    reports_the_panic(&runtime, "init");
}

fn guest_that_resets_itself_is_no_success() {
    // Without a pid namespace of its own, reboot(2) is the machine's.
    let bundle =
        Bundle::sh("echo ready; reboot -f; sleep 100000").without_namespace("pid").capability("CAP_SYS_BOOT");
    let container = Runtime::under_test().start(&bundle, Stdin::Null);
    let ended = container.finish();
    assert!(matches!(ended.exit, Exit::Code(1..=255)), "{ended:?}");
    assert!(!ended.stderr.is_empty(), "{ended:?}");
    drop(bundle);
}

fn workload_that_eats_the_guest_does_not_hurt_the_agent() {
    let container = Runtime::under_test().idle();
    // More memory than the VM has, first as processes' own, then as files: nobody has set a limit.
    let hog = "trap '' TERM; x=x; while :; do x=$x$x; done";
    let ended = container.exec(hog);
    assert!(ended.exit != Exit::Code(0), "{ended:?}");
    container.exec("cat /dev/zero > /dev/shm/fill");
    assert_eq!(container.exec("rm /dev/shm/fill; echo well").ok(), "well\n");
    assert_eq!(container.status(), "running");
}

fn fork_bomb_is_contained() {
    let bundle = Bundle::sh("echo ready; b() { b | b & }; b; exec sleep 100000")
        .set("/linux/resources/pids", serde_json::json!({ "limit": 64 }));
    let container = Runtime::under_test().start(&bundle, Stdin::Null);
    container.program.expect_line("ready");
    assert_eq!(container.status(), "running");
    container.op_with(&["kill", "--all"], &["KILL"]).code(0);
    let ended = container.finish();
    assert_eq!(ended.exit, Exit::Code(137), "{ended:?}");
}

/// Waits until something can be read in this file of /proc.
#[track_caller]
fn wait_for(path: &str, what: impl Fn(&str) -> bool) {
    let deadline = Instant::now() + crate::harness::HANG;
    while !what(&fs::read_to_string(path).unwrap_or_default()) {
        assert!(Instant::now() < deadline, "{path} never came to say so");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn deletion_by_force_does_not_wait_for_an_update() {
    let (runtime, container) = (Runtime::under_test(), Runtime::under_test().idle());
    let words = ["update", "--resources", "-", container.id.as_str()];
    let mut update = Program::spawn(runtime.command(words), Stdin::Pipe);
    // It reads what nobody writes: read(2) is 0, and so is its first argument.
    wait_for(&format!("/proc/{}/syscall", update.pid()), |call| call.starts_with("0 0x0 "));
    container.op_with(&["delete", "--force"], &[]).ok();
    container.op("state").refused();
    update.write("{}");
    update.close_stdin();
    let reason = update.finish().refused();
    assert!(!runtime.is_stockade() || reason.contains("does not exist"), "{reason}");
}

fn deletion_by_force_does_not_wait_for_a_guest_that_stands_still() {
    let (runtime, container) = (Runtime::under_test(), Runtime::under_test().idle());
    kill(Pid::from_raw(vmm_of(container.pid()).expect("a VMM")), Signal::SIGSTOP).unwrap();
    let words = ["update", "--pids-limit", "20", container.id.as_str()];
    let mut update = Program::spawn(runtime.command(words), Stdin::Null);
    let pid = format!(" {} ", update.pid());
    wait_for("/proc/locks", |locks| locks.lines().any(|lock| lock.contains("FLOCK") && lock.contains(&pid)));
    container.op_with(&["delete", "--force"], &[]).ok();
    container.op("state").refused();
    update.finish().refused();
}

fn commands_wait_while_there_is_no_room_for_another_descriptor() {
    let log = host_scratch();
    let path = log.path().join("log");
    let runtime = Runtime::under_test().global(&["--log", path.to_str().unwrap()]);
    let container = runtime.idle();
    let pid = container.pid();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let numbers = open.map(|entry| entry.unwrap().file_name().into_string().unwrap().parse::<u64>().unwrap());
    let taken = numbers.collect::<std::collections::BTreeSet<_>>();
    let first_free = (0..).find(|number| !taken.contains(number)).unwrap();
    let prlimit = |options: &[&str]| {
        let mut command = std::process::Command::new("prlimit");
        command.args(["--pid", &pid.to_string()]).args(options);
        Program::spawn(command, Stdin::Null).finish().ok()
    };
    let before = prlimit(&["--nofile", "--raw", "--noheadings", "--output", "SOFT"]);
    prlimit(&[&format!("--nofile={first_free}:")]);
    let mut exec = container.start_exec(&[], &["echo", "heard"], Stdin::Null);
    wait_for(path.to_str().unwrap(), |log| log.contains("commands wait until there is room"));
    prlimit(&[&format!("--nofile={}:", before.trim())]);
    assert_eq!(exec.finish().ok(), "heard\n");
    assert_eq!(container.exec("echo again").ok(), "again\n");
}

fn hook_that_does_not_end_keeps_nothing_alive() {
    let bundle = Bundle::sh("read line");
    let file = bundle.dir().join("hook");
    let script = format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 100000", file.display());
    let bundle = bundle.push(
        "/hooks/poststart",
        serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]}),
    );
    let runtime = Runtime::under_test();
    let mut container = runtime.create_with(&bundle, Stdin::Pipe, &[]);
    let pid = container.pid();
    let mut start = Program::spawn(runtime.command(["start", container.id.as_str()]), Stdin::Null);
    let path = file.to_str().unwrap();
    wait_for(path, |hook| hook.ends_with('\n'));
    let hook = fs::read_to_string(path).unwrap().trim().parse().unwrap();
    container.program.write("\n");
    container.wait_stopped(pid);
    container.op("delete").ok();
    start.finish();
    kill(Pid::from_raw(hook), Signal::SIGKILL).unwrap();
}

fn host_without_another_thread_fails_what_needs_one_and_nothing_else() {
    let runtime = Runtime::under_test();
    let path = format!("/{}", crate::harness::Id::new().as_str());
    let first = runtime.create(&Bundle::idle().set("/linux/cgroupsPath", path.as_str()));
    first.op("start").ok();
    first.program.expect_line("ready");
    let file = |name| std::path::Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/')).join(name);
    fs::write(file("pids.max"), fs::read_to_string(file("pids.current")).unwrap().trim()).unwrap();
    let reason = runtime.run(&sharing(Bundle::sh("true"), &first, &[NETWORK])).refused();
    assert!(reason.contains("cannot start a thread"), "{reason}");
    fs::write(file("pids.max"), "max").unwrap();
    runtime.run(&sharing(Bundle::sh("true"), &first, &[NETWORK])).ok();
    assert_eq!(first.exec("echo unharmed").ok(), "unharmed\n");
}
