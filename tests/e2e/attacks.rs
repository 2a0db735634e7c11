//! Attacks from inside: a container that may do everything in its guest does its worst to what the host runs for it.
//! Whatever comes of it in the guest, on the host no process but the sandbox's own may be harmed, none of those may
//! take more memory than it is due, and the sandbox ends with a reason and leaves nothing.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{
    Bundle, Case, Container, Exit, HANG, Runtime, Stdin, case, host_scratch, sized, vmm_of,
};

const GUEST: &str = "the guest";

pub const CASES: &[Case] = &[
    case!(console_flood_is_bounded_and_forges_nothing).stockade_only(GUEST),
    case!(only_the_host_reaches_the_agent).stockade_only(GUEST),
    case!(thousands_of_vsock_connects_are_refused_and_cost_nothing).stockade_only(GUEST),
    case!(drivers_taken_from_their_devices_and_given_back_during_traffic).stockade_only(GUEST),
    case!(directories_that_hold_the_shared_files_are_the_supervisors).stockade_only(GUEST),
    case!(read_only_files_are_read_only_on_the_host_too).stockade_only(GUEST),
    case!(memory_that_the_guest_was_not_given_is_none).stockade_only(GUEST),
    case!(fork_bomb_and_memory_hog_stay_in_their_guest).stockade_only(GUEST),
    case!(agent_without_its_connection_is_the_end_with_a_reason).stockade_only(GUEST),
    case!(agent_that_was_overwritten_is_the_end_with_a_reason).stockade_only(GUEST),
    case!(agent_that_says_nothing_any_more_does_not_keep_a_sandbox).stockade_only(GUEST),
    case!(garbage_in_the_agents_place_is_the_end_with_a_reason).stockade_only(GUEST),
    case!(chatter_in_the_agents_place_is_bounded).stockade_only(GUEST),
];

/// What a supervisor and a VMM hold in memory of their own beside the guest's, with much to spare, in MiB.
const OWN_MEMORY: u64 = 64;
/// Memory of the attackers' VMs, in MiB: their container's limit, and what the guest needs itself.
const LIMIT: u64 = 128;
const GUEST_MEMORY: u64 = LIMIT + 160;

/// A container that runs a script as root of its guest: all capabilities, all devices, the guest's own pid
/// namespace, nothing masked or read-only.
fn privileged(bundle: Bundle) -> Bundle {
    let all: Vec<String> = [
        "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE",
        "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT",
        "SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP",
        "MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE",
    ]
    .iter()
    .flat_map(|line| line.split(' '))
    .map(|name| format!("CAP_{name}"))
    .collect();
    bundle
        .set("/process/capabilities", json!({ "bounding": all, "effective": all, "permitted": all }))
        .set("/process/noNewPrivileges", false)
        .set("/linux/resources/devices", json!([{ "allow": true, "access": "rwm" }]))
        .set("/linux/resources/memory", json!({ "limit": LIMIT << 20 }))
        .set("/linux/maskedPaths", json!([]))
        .set("/linux/readonlyPaths", json!([]))
        .without_namespace("pid")
        .mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "rw"])
        .mount("/tmp", "tmpfs", "tmpfs", &["dev", "size=8m"])
}

/// Resident memory of a process in MiB, at its highest.
fn peak(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") >> 10
}

/// The two processes of a sandbox, while it is attacked.
fn costs_what_it_may(attacker: &Container) {
    let supervisor = attacker.program.pid();
    let vmm = vmm_of(supervisor).expect("a VMM");
    let (of_supervisor, of_vmm) = (peak(supervisor), peak(vmm));
    assert!(of_supervisor <= OWN_MEMORY, "the supervisor took {of_supervisor} MiB");
    assert!(of_vmm <= GUEST_MEMORY + OWN_MEMORY, "the VMM took {of_vmm} MiB");
}

fn works(other: &Container) {
    assert_eq!(
        other.exec("echo well; cat /etc/hostname 2> /dev/null; true").code(0).text().lines().next(),
        Some("well")
    );
}

fn console_flood_is_bounded_and_forges_nothing() {
    let runtime = Runtime::under_test();
    let other = runtime.idle();
    let dir = host_scratch();
    let log = dir.path().join("log");
    // As loud as the kernel can be, with what a terminal or a log could take for something else.
    let script = "mknod /tmp/kmsg c 1 11; echo on > /proc/sys/kernel/printk_devkmsg; echo 8 > /proc/sys/kernel/printk; \
                  line=$(printf 'x\\033[2J\\033]0;title\\007\\302\\2331mlevel=error msg=forged'); \
                  (while :; do echo \"<0>$line\"; done > /tmp/kmsg) & \
                  (while :; do echo \"<0>$line$line$line\"; done > /tmp/kmsg) & echo flooding; wait";
    let loud = runtime.clone().global(&["--debug", "--log", log.to_str().unwrap()]);
    let attacker = loud.start(&privileged(Bundle::sh(script)), Stdin::Null);
    attacker.program.expect_line("flooding");
    for _ in 0..sized(10, 300) {
        works(&other);
    }
    costs_what_it_may(&attacker);
    attacker.kill("KILL");
    attacker.finish();
    works(&other);
    let text = fs::read(&log).unwrap();
    assert!(text.len() < 8 << 20, "the log has {} bytes", text.len());
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("forged"), "nothing of the console was logged");
    assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "control characters in the log");
    for line in text.lines() {
        assert!(line.starts_with("time=\""), "a line that is no record: {line}");
    }
}

fn only_the_host_reaches_the_agent() {
    // In a sandbox that the host may enter, with every capability: by each address that the guest could have, at each
    // port that the agent has.
    let script = r#"
        $SIG{PIPE} = "IGNORE";
        for my $cid (0 .. 16, 4294967295) {
            for my $port (1024, 1025, 1026) {
                socket(my $s, 40, 1, 0) or die "socket: $!";
                connect($s, pack("SSLLx4", 40, 0, $port, $cid)) or next;
                print "connected
";
                syswrite $s, "stdin =guest enter-0
" x 4096;
                sysread($s, my $answer, 1) and die "an answer from $cid at $port";
            }
        }
        $| = 1; print "nobody
"; sleep 100000"#;
    let bundle = privileged(Bundle::perl(script)).push("/linux/namespaces", json!({ "type": "pid" }));
    let attacker = Runtime::under_test().env("STOCKADE_ENTER", "1").start(&bundle, Stdin::Null);
    while attacker.program.line() != "nobody" {}
    let enter = Runtime::under_test().call(&["enter", attacker.id.as_str(), "id", "-u"]);
    assert_eq!(enter.ok(), "0\n");
    works(&attacker);
}

fn thousands_of_vsock_connects_are_refused_and_cost_nothing() {
    let runtime = Runtime::under_test();
    let other = runtime.idle();
    // AF_VSOCK, to the host and to others, from several processes at once.
    let script = r#"
        $| = 1; print "attacking\n";
        my @children;
        for my $child (1..3) {
            my $pid = fork; push @children, $pid and next if $pid;
            my $refused = 0;
            for my $n (1..COUNT) {
                socket(my $s, 40, 1, 0) or die "socket: $!";
                my $cid = (2, 2, 2, 0, 77)[$n % 5];
                connect($s, pack("SSLLx4", 40, 0, $n * $child, $cid)) and die "connected";
                $refused++; close $s; $n % 1000 or print "going on\n";
            }
            exit($refused == COUNT ? 0 : 1);
        }
        for (@children) { waitpid $_, 0; print "refused $?\n" }
        print "done\n"; sleep 100000"#;
    let script = script.replace("COUNT", &sized(1000, 33_334).to_string());
    let attacker = runtime.start(&privileged(Bundle::perl(&script)), Stdin::Null);
    attacker.program.expect_line("attacking");
    works(&other);
    let mut refused = 0;
    loop {
        match &*attacker.program.line() {
            "going on" => {}
            "refused 0" => refused += 1,
            line => break assert_eq!((line, refused), ("done", 3)),
        }
    }
    costs_what_it_may(&attacker);
    // Its own streams still work.
    works(&attacker);
    works(&other);
    attacker.kill("KILL");
    attacker.finish();
}

fn drivers_taken_from_their_devices_and_given_back_during_traffic() {
    let runtime = Runtime::under_test();
    let other = runtime.idle();
    // Each bind is a reset, a negotiation and an activation. Not the root's file system, nor the agent's connection.
    let script = "cd /sys/bus/virtio/drivers; \
                  (while :; do dd if=/dev/hwrng of=/dev/null bs=4k count=1 2> /dev/null; done) & \
                  mknod /tmp/hwrng c 10 183; \
                  (while :; do dd if=/tmp/hwrng of=/dev/null bs=4k count=4 2> /dev/null; done) & \
                  n=0; while [ $n -lt 50 ]; do \
                    for driver in virtio_balloon virtio_net virtio_blk virtio_rng; do \
                      for device in $driver/virtio*; do [ -e $device ] || continue; name=${device#*/}; \
                        echo $name > $driver/unbind; echo $name > $driver/bind; bound=$driver; done; done; \
                    n=$((n + 1)); done; echo rebound $n $bound; sleep 1000";
    let attacker = runtime.start(&privileged(Bundle::sh(script)), Stdin::Null);
    attacker.program.expect_line("rebound 50 virtio_rng");
    works(&attacker);
    works(&other);
    costs_what_it_may(&attacker);
    attacker.kill("KILL");
    attacker.finish();
}

/// The supervisor works in them by path, as root of the host: a link of the guest's there would lead it astray.
fn directories_that_hold_the_shared_files_are_the_supervisors() {
    let dir = host_scratch();
    fs::write(dir.path().join("file"), "text").unwrap();
    let script = "cd /proc/1/root/run/stockade/share/* || exit 1; ls; \
                  for try in 'touch made' 'ln -s /etc link' 'mv mounts other' 'mv rootfs other' 'rmdir mounts/0' \
                             'mkdir ../other' 'ln -s /etc ../link' 'mv ../* ../moved' 'chmod 777 .' 'mknod pipe p'; do \
                    $try 2> /dev/null && echo \"done: $try\"; done; \
                  echo inside > rootfs/inside && echo inside > mounts/0/inside && cat mounts/0/file";
    let bundle = privileged(Bundle::sh(script)).writable().bind(dir.path(), "/v", &[]);
    let ended = Runtime::under_test().run(&bundle).code(0);
    assert_eq!(ended.text(), "mounts\nrootfs\ntext", "{ended:?}");
    assert_eq!(fs::read_to_string(bundle.written().join("inside")).unwrap(), "inside\n");
    assert_eq!(fs::read_to_string(dir.path().join("inside")).unwrap(), "inside\n");
}

fn read_only_files_are_read_only_on_the_host_too() {
    let dir = host_scratch();
    fs::write(dir.path().join("file"), "text").unwrap();
    let script = "for mount in / /v; do mount -o remount,rw $mount; mount -o remount,bind,rw $mount; done 2> /dev/null; \
                  mkdir /tmp/s; mount -t virtiofs share /tmp/s 2> /dev/null; s=/proc/1/root/run/stockade/share; ls $s/*; \
                  for place in / /v /tmp/s $s $s/* $s/*/*; do touch $place/made 2> /dev/null && echo made $place; done; \
                  echo x 2> /dev/null > /v/file && echo written; chmod 777 /v/file 2> /dev/null && echo changed; \
                  rm -f /v/file 2> /dev/null && echo removed; echo done";
    let bundle = privileged(Bundle::sh(script)).bind(dir.path(), "/v", &["ro"]);
    let ended = Runtime::under_test().run(&bundle).code(0);
    assert_eq!(ended.text(), "mounts\nrootfs\ndone\n", "{ended:?}");
    assert_eq!(fs::read_to_string(dir.path().join("file")).unwrap(), "text");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

fn memory_that_the_guest_was_not_given_is_none() {
    let runtime = Runtime::under_test();
    let other = runtime.idle();
    // Where the host would add memory, had somebody asked for it. The kernel believes it, to its own harm.
    let script = "cd /sys/devices/system/memory; block=$((0x$(cat block_size_bytes))); echo lying; for n in 0 1 2 3; do \
                  at=$((4294967296 + n * block)); echo $at > probe; echo online_movable > memory$((at / block))/state; \
                  done; dd if=/dev/zero of=/dev/null bs=90M count=1";
    let attacker = runtime.start(&privileged(Bundle::sh(script)), Stdin::Null);
    attacker.program.expect_line("lying");
    for _ in 0..sized(5, 50) {
        works(&other);
    }
    // Unless that has been the end of it already.
    attacker.op_with(&["kill"], &["KILL"]);
    let ended = attacker.finish();
    assert_ne!(ended.exit, Exit::Code(0), "{ended:?}");
    works(&other);
}

fn fork_bomb_and_memory_hog_stay_in_their_guest() {
    let runtime = Runtime::under_test();
    let other = runtime.idle();
    let script = r#"$| = 1; print "bomb\n"; fork while 1"#;
    let bomb = runtime.start(&privileged(Bundle::perl(script)), Stdin::Null);
    bomb.program.expect_line("bomb");
    let script = r#"$| = 1; print "hog\n"; if (fork) { wait; sleep 1000 } push @x, 'x' x (1 << 20) while 1"#;
    let hog = runtime.start(&privileged(Bundle::perl(script)), Stdin::Null);
    hog.program.expect_line("hog");
    for _ in 0..3 {
        works(&other);
    }
    costs_what_it_may(&bomb);
    // By force, whatever the guest can still do.
    bomb.op_with(&["delete", "--force"], &[]).code(0);
    hog.op_with(&["delete", "--force"], &[]).code(0);
    bomb.op("state").refused();
    hog.op("state").refused();
    works(&other);
}

/// A privileged container that does something to its agent, and what its caller is told.
fn end_of(script: &str) -> String {
    let runtime = Runtime::under_test();
    let other = runtime.idle();
    let ended = runtime.run(&privileged(Bundle::perl(script)));
    assert!(matches!(ended.exit, Exit::Code(1..)), "{ended:?}");
    assert!(ended.text().starts_with("attacking"), "{ended:?}");
    works(&other);
    ended.stderr
}

fn agent_without_its_connection_is_the_end_with_a_reason() {
    let script = r#"
        $| = 1; print "attacking\n"; my $drivers = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport";
        -d $drivers or ($drivers) = glob "/sys/bus/virtio/drivers/*vsock* /sys/bus/virtio/drivers/*virtio_transport*";
        my ($device) = glob "$drivers/virtio[0-9]*"; $device =~ s{.*/}{};
        open F, ">", "$drivers/unbind" or die "$drivers: $!"; syswrite F, $device; sleep 1000"#;
    let reason = end_of(script);
    assert!(reason.contains("agent") || reason.contains("guest"), "{reason}");
}

fn agent_that_was_overwritten_is_the_end_with_a_reason() {
    let script = r#"
        $| = 1; print "attacking\n";
        open MAPS, "/proc/1/maps" or die "maps: $!"; my @maps = grep { / rw/ } <MAPS>;
        open MEM, "+<", "/proc/1/mem" or die "mem: $!";
        for (@maps) {
            my ($from, $to) = map { hex } /^(\w+)-(\w+)/;
            sysseek MEM, $from, 0; syswrite MEM, "\x41" x ($to - $from);
        }
        kill "CHLD", 1; sleep 1000"#;
    let reason = end_of(script);
    assert!(reason.contains("panic") || reason.contains("agent") || reason.contains("guest"), "{reason}");
}

/// Stops every thread of the agent: to the host the VM runs on, and nobody answers.
const SILENCE: &str = r#"
    for my $thread (map { m{(\d+)$} } glob "/proc/1/task/*") {
        # PTRACE_SEIZE, PTRACE_INTERRUPT
        for my $request (0x4206, 0x4207) { syscall(101, $request, 0 + $thread, 0, 0) == 0 or die "ptrace: $!" }
    }
"#;

/// Takes the agent's connection to the supervisor from it, as `$connection`.
const CONNECTION: &str = r#"
    my $agent = syscall(434, 1, 0); $agent >= 0 or die "pidfd_open: $!";
    my $connection;
    for my $fd (map { m{(\d+)$} } glob "/proc/1/fd/*") {
        readlink("/proc/1/fd/$fd") =~ /^socket:/ or next;
        my $ours = syscall(438, $agent, 0 + $fd, 0); $ours >= 0 or die "pidfd_getfd: $!";
        open(my $socket, "+<&=", $ours) or die "open: $!";
        # SO_ACCEPTCONN, and AF_VSOCK with the port that the agent is called on.
        unpack("i", getsockopt($socket, 1, 30)) and next;
        my ($family, $port) = unpack "SxxL", getsockname($socket) . "\0" x 8;
        $connection = $socket if $family == 40 && $port == 1024;
    }
    $connection or die "the agent has no connection";
    binmode $connection;
"#;

/// Tells the host that the attack has come so far: by a file, for which the guest needs no agent.
const MARK: &str = r#" open(my $mark, ">", "/v/here") or die "mark: $!"; close $mark; "#;

/// A privileged container that has run a script as far as [`MARK`], which it leaves in a directory. That has to outlive
/// the container: the mark shows here before the guest has been told that it is made.
#[track_caller]
fn attacking(script: &str, dir: &Path) -> Container {
    let bundle = privileged(Bundle::perl(script)).bind(dir, "/v", &[]);
    let mut attacker = Runtime::under_test().start(&bundle, Stdin::Null);
    let begin = Instant::now();
    while !dir.join("here").exists() {
        assert!(!attacker.program.ended_within(Duration::from_millis(10)), "{}", attacker.program.report());
        assert!(begin.elapsed() < HANG, "{}", attacker.program.report());
    }
    attacker
}

fn agent_that_says_nothing_any_more_does_not_keep_a_sandbox() {
    let other = Runtime::under_test().idle();
    let script = format!("{SILENCE} {MARK} sleep 100000");
    // By force nobody in the guest is asked.
    let dir = host_scratch();
    let attacker = attacking(&script, dir.path());
    attacker.op_with(&["delete", "--force"], &[]).code(0);
    attacker.op("state").refused();
    // Without it the guest has its time, and then that is the end.
    let dir = host_scratch();
    let attacker = attacking(&script, dir.path());
    costs_what_it_may(&attacker);
    attacker.kill("KILL");
    let ended = attacker.finish();
    assert_ne!(ended.exit, Exit::Code(0), "{ended:?}");
    assert!(ended.stderr.contains("SIGKILL") || ended.stderr.contains("agent"), "{ended:?}");
    works(&other);
}

fn garbage_in_the_agents_place_is_the_end_with_a_reason() {
    let other = Runtime::under_test().idle();
    // No frame at all; one of 4 GiB; one that breaks off; a request from whom only answers are due; and answers to all
    // that may have been asked, the container's end among them, that are no messages.
    for garbage in [
        r#""\x41" x 65536"#,
        r#"pack("NNCC", 0xffffffff, 1, 2, 0) . "x" x 100"#,
        r#"pack("NNCC", 100, 1, 2, 0) . "x""#,
        r#"pack("NNCC", 4, 2, 1, 0) . "\xff" x 4"#,
        r#"join "", map { pack("NNCC", 40, $_, 2, 0) . "\xff" x 40 } 0 .. 99"#,
    ] {
        let script = format!(
            "{SILENCE} {CONNECTION} {MARK} syswrite $connection, {garbage}; shutdown $connection, 2; sleep 100000"
        );
        let dir = host_scratch();
        let ended = attacking(&script, dir.path()).finish();
        assert!(matches!(ended.exit, Exit::Code(1..)), "{garbage}: {ended:?}");
        let reason = &ended.stderr;
        assert!(reason.contains("agent") || reason.contains("guest"), "{garbage}: {ended:?}");
        works(&other);
    }
}

fn chatter_in_the_agents_place_is_bounded() {
    let other = Runtime::under_test().idle();
    // Answers that nobody waits for, as large as one may be and as fast as they go.
    let script = format!(
        r#"{SILENCE} {CONNECTION} {MARK}
           my $answer = pack("NNCC", 4 << 20, 77777, 2, 0) . "x" x (4 << 20);
           while (syswrite $connection, $answer) {{}}
           sleep 100000"#
    );
    let dir = host_scratch();
    let attacker = attacking(&script, dir.path());
    for _ in 0..5 {
        works(&other);
    }
    costs_what_it_may(&attacker);
    attacker.op_with(&["delete", "--force"], &[]).code(0);
    attacker.op("state").refused();
    works(&other);
}
