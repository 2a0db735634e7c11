//! The runtime under the host's Podman, which calls it through conmon.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::harness::{Case, Exit, PODMAN_IMAGE, Podman, Program, Pty, Stdin, case, tool};

const VM: &str = "the VM's boundary";

pub const CASES: &[Case] = &[
    case!(run_reports_output_exit_code_and_why_it_cannot).exclusive(),
    case!(a_container_is_watched_changed_and_stopped).exclusive(),
    case!(attach_run_and_exec_carry_input_and_terminals).exclusive(),
    case!(options_of_run_reach_the_workload).exclusive(),
    case!(files_are_copied_in_and_out_and_committed).exclusive(),
    case!(who_enters_the_mount_namespace_finds_the_containers_files_only).exclusive(),
    case!(a_port_of_the_default_network_leads_to_the_container).exclusive(),
    case!(networks_are_connected_disconnected_and_reloaded_while_a_container_runs).exclusive(),
    case!(containers_of_a_pod_without_infra_live_and_end_together).exclusive(),
    case!(containers_of_a_pod_share_its_network_memory_and_name).exclusive(),
    case!(a_container_joins_the_namespaces_of_another).exclusive(),
    case!(a_killed_supervisor_is_no_success_and_the_container_starts_again).exclusive(),
    case!(what_a_vm_cannot_honour_is_refused_by_name).stockade_only(VM).exclusive(),
];

/// Ends well when it is asked to.
const IDLE: &str = "trap 'echo asked; exit 5' TERM; echo up; while :; do sleep 1; done";

fn run_reports_output_exit_code_and_why_it_cannot() {
    let podman = Podman::new();
    let ended = podman.run(&[], "echo out; echo error >&2; exit 7").code(7);
    assert_eq!((ended.text().as_str(), ended.stderr.as_str()), ("out\n", "error\n"));
    podman.run(&[], "sh -c 'kill -KILL $$'; exit $?").code(137);
    let lines: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    assert!(podman.run(&[], "seq 1 20000").code(0).text() == lines, "output is not complete");

    let run = |program: &str| podman.podman(&["run", "--rm", "--network", "none", PODMAN_IMAGE, program]);
    let missing = run("no-such-program").code(127);
    assert!(
        missing.stderr.contains("no-such-program") && missing.stderr.contains("not found"),
        "{missing:?}"
    );
    let no_program = run("/etc").code(126);
    assert!(no_program.stderr.contains("/etc") && no_program.stderr.contains("permission"), "{no_program:?}");
    assert_eq!(podman.podman(&["ps", "--all", "--quiet"]).ok(), "");
}

fn a_container_is_watched_changed_and_stopped() {
    let podman = Podman::new();
    let health = ["--network", "none", "--health-interval", "disable", "--health-cmd", "test -e /ok"];
    podman.detached("a", &health, IDLE);
    podman.wait_for_line("a", "up");
    assert_eq!(podman.exec("a", "echo $((6 * 7)); exit 3").code(3).text(), "42\n");
    podman.exec("a", "kill -TERM $$").code(143);

    podman.podman(&["healthcheck", "run", "a"]).code(1);
    podman.exec("a", "touch /ok").code(0);
    podman.podman(&["healthcheck", "run", "a"]).code(0);

    let stats = podman.podman(&["stats", "--no-stream", "--format", "json", "a"]).code(0).text();
    let stats: Value = serde_json::from_str(&stats).unwrap_or_else(|e| panic!("{e}: {stats}"));
    assert!(stats[0]["pids"].as_str().is_some_and(|n| n.parse::<u32>().is_ok_and(|n| n > 0)), "{stats}");
    assert!(stats[0]["mem_usage"].as_str().is_some_and(|used| !used.starts_with("0B")), "{stats}");
    // With an option that only ps(1) has, Podman ran that in the container until, from 4.4 on, it took the host's, in a
    // namespace of which it thinks that it is the container's.
    if podman.version() < (4, 4) {
        let processes = podman.podman(&["top", "a", "-o", "pid,args"]).code(0).text();
        assert!(processes.lines().any(|line| line.trim_start().starts_with("1 sh -c")), "{processes}");
    }

    podman.podman(&["pause", "a"]).code(0);
    assert_eq!(podman.inspect("a", "/State/Status"), "paused");
    podman.podman(&["exec", "a", "true"]).refused();
    podman.podman(&["unpause", "a"]).code(0);
    assert_eq!(podman.inspect("a", "/State/Status"), "running");

    let pid = podman.inspect("a", "/State/Pid");
    podman.podman(&["restart", "a"]).code(0);
    assert_ne!(podman.inspect("a", "/State/Pid"), pid);
    podman.exec("a", "test -e /ok").code(0);

    podman.podman(&["kill", "a"]).code(0);
    assert_eq!(podman.podman(&["wait", "a"]).ok(), "137\n");
    podman.podman(&["start", "a"]).code(0);
    podman.podman(&["stop", "a"]).code(0);
    assert_eq!(podman.inspect("a", "/State/ExitCode"), 5);
    assert_eq!(podman.inspect("a", "/State/OOMKilled"), false);
    let logs = podman.podman(&["logs", "a"]).code(0).text();
    assert_eq!(logs.lines().last(), Some("asked"), "{logs}");
    podman.podman(&["rm", "a"]).code(0);
}

fn attach_run_and_exec_carry_input_and_terminals() {
    let podman = Podman::new();
    let run = ["run", "--rm", "--interactive", "--network", "none", PODMAN_IMAGE, "cat"];
    let bytes: Vec<u8> = (0..200_000u32).flat_map(|n| n.to_le_bytes()).collect();
    let ended = Program::spawn(podman.command(&run), Stdin::Bytes(bytes.clone())).finish().code(0);
    assert!(ended.stdout == bytes, "{} bytes of {} came back", ended.stdout.len(), bytes.len());

    let reads = "while read word; do echo got $word; [ $word = end ] && exit 4; done";
    podman.detached("a", &["--network", "none", "--interactive"], reads);
    let exec = podman.command(&["exec", "--interactive", "a", "sort"]);
    let sorted = Program::spawn(exec, Stdin::Bytes(b"b\na\n".to_vec())).finish();
    assert_eq!(sorted.code(0).text(), "a\nb\n");
    let attach = podman.command(&["attach", "a"]);
    let attached = Program::spawn(attach, Stdin::Bytes(b"one\nend\n".to_vec())).finish();
    // It adds an empty line of its own.
    assert_eq!(attached.code(0).text().trim_end(), "got one\ngot end");
    assert_eq!(podman.podman(&["wait", "a"]).ok(), "4\n");
    podman.remove("a");

    let run = ["run", "--rm", "--interactive", "--tty", "--network", "none", PODMAN_IMAGE, "sh", "-c"];
    let script = "tty; stty -echo; echo ready; read word; echo got $word; read word; stty size; exit 6";
    let (terminal, slave) = Pty::open(31, 97);
    let mut command = podman.command(&[&run[..], &[script]].concat());
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
    let mut program = Program::spawn_raw(command, Stdin::Null);
    let tty = terminal.line();
    assert!(tty == "/dev/pts/0" || tty == "/dev/console", "{tty}");
    terminal.expect_line("ready");
    terminal.write("typed\n");
    terminal.expect_line("got typed");
    terminal.write("\n");
    terminal.expect_line("31 97");
    assert_eq!(program.exit(), Exit::Code(6));
}

fn options_of_run_reach_the_workload() {
    let podman = Podman::new();
    let volume = podman.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "of the host\n").unwrap();
    let script =
        "id -u; id -g; hostname; cat /volume/file; echo new > /volume/new; touch /data/new; echo $WHO
        touch /no 2>/dev/null || echo read-only; grep CapBnd /proc/self/status; ulimit -n
        grep -c ' /scratch tmpfs rw,.*size=4096k' /proc/mounts; grep -w box /etc/hosts | cut -f2 | cut -d' ' -f1
        cd /sys/fs/cgroup; cat memory.max pids.max cpu.max; cat /proc/sys/net/ipv4/ip_forward";
    let options = format!(
        "--volume {}:/volume --volume named:/data:U --tmpfs /scratch:size=4m --read-only --user 1000:1001
         --cap-drop all --cap-add kill --memory 128m --cpus 1 --pids-limit 50 --env WHO=me --hostname box
         --ulimit nofile=100:200
         --security-opt no-new-privileges --sysctl net.ipv4.ip_forward=1 --workdir / --init",
        volume.display()
    );
    std::os::unix::fs::chown(&volume, Some(1000), Some(1001)).unwrap();
    let options: Vec<_> = options.split_whitespace().collect();
    let said = podman.run(&options, script).code(0).text();
    let expected = "1000\n1001\nbox\nof the host\nme\nread-only\nCapBnd:\t0000000000000020\n100\n1\n\
        box\n134217728\n50\n100000 100000\n1\n";
    assert_eq!(said, expected);
    assert_eq!(fs::read_to_string(volume.join("new")).unwrap(), "new\n");
    assert!(podman.dir().join("root/volumes/named/_data/new").exists());

    // Both are overlays that the runtime is to mount.
    let overlay = format!("{}:/over:O", volume.display());
    let image = format!("type=image,src={PODMAN_IMAGE},dst=/image,rw=true");
    let script = "cat /over/new; rm /over/new; touch /image/new; ls /image/bin/busybox";
    let said = podman.run(&["--volume", &overlay, "--mount", &image], script).ok();
    assert_eq!(said, "new\n/image/bin/busybox\n");
    assert!(volume.join("new").exists());

    let secret = podman.dir().join("secret");
    fs::write(&secret, "s3cret").unwrap();
    podman.podman(&["secret", "create", "word", &secret.display().to_string()]).code(0);
    let secrets = ["--secret", "word", "--secret", "word,type=env,target=WORD"];
    assert_eq!(
        podman.run(&secrets, "cat /run/secrets/word; echo $WORD").code(0).text(),
        "s3cret".repeat(2) + "\n"
    );

    let mapped = podman.run(&["--uidmap", "0:100000:5000"], "id -u; cut -c1-40 /proc/self/uid_map").code(0);
    assert_eq!(mapped.text().split_whitespace().collect::<Vec<_>>(), ["0", "0", "100000", "5000"]);
    let volume_of_its_own = format!("{}:/v:idmap", volume.display());
    let options = ["--uidmap", "0:100000:5000", "--volume", &volume_of_its_own];
    let said = podman.run(&options, "stat -c %u:%g /v /v/file; touch /v/mapped; chown 3:700 /v/mapped").ok();
    assert_eq!(said, "1000:1001\n0:0\n");
    let made = fs::metadata(volume.join("mapped")).unwrap();
    let owner = std::os::unix::fs::MetadataExt::uid(&made);
    assert_eq!((owner, std::os::unix::fs::MetadataExt::gid(&made)), (3, 700));
}

fn files_are_copied_in_and_out_and_committed() {
    let podman = Podman::new();
    podman.detached("a", &["--network", "none", "--volume", "named:/data"], IDLE);
    podman.wait_for_line("a", "up");
    podman.exec("a", "echo inside > /file; echo volume > /data/file").code(0);
    let copy = |from: &str, to: &str| podman.podman(&["cp", from, to]);
    let host = |name: &str| podman.dir().join(name).display().to_string();
    let read = |name: &str| fs::read_to_string(podman.dir().join(name)).unwrap();
    copy("a:/file", &host("out")).code(0);
    copy("a:/data/file", &host("volume")).code(0);
    assert_eq!((read("out").as_str(), read("volume").as_str()), ("inside\n", "volume\n"));
    fs::write(podman.dir().join("in"), "from the host\n").unwrap();
    copy(&host("in"), "a:/new").code(0);
    copy(&host("in"), "a:/data/new").code(0);
    assert_eq!(podman.exec("a", "cat /new /data/new").ok(), "from the host\nfrom the host\n");

    let changed = podman.podman(&["diff", "a"]).ok();
    assert!(changed.lines().any(|line| line == "A /new"), "{changed}");
    podman.podman(&["commit", "--quiet", "a", "localhost/lab/changed"]).code(0);
    podman.remove("a");
    let run = ["run", "--rm", "--network", "none", "localhost/lab/changed", "cat", "/new", "/file"];
    assert_eq!(podman.podman(&run).ok(), "from the host\ninside\n");
}

fn who_enters_the_mount_namespace_finds_the_containers_files_only() {
    let podman = Podman::new();
    podman.detached("a", &["--network", "none"], IDLE);
    podman.wait_for_line("a", "up");
    let out = podman.dir().join("out");
    // A file that the host has and the image does not.
    let refused = podman.podman(&["cp", "a:/etc/debian_version", &out.display().to_string()]).refused();
    assert!(refused.contains("debian_version"), "{refused}");
    assert!(!out.exists());
    let pid = podman.inspect("a", "/State/Pid");
    let namespace = fs::File::open(format!("/proc/{pid}/ns/mnt")).unwrap();
    let seen = std::thread::spawn(move || {
        // A namespace is a thread's own, once its root directory is.
        unshare(CloneFlags::CLONE_FS).unwrap();
        setns(namespace, CloneFlags::CLONE_NEWNS).unwrap();
        let names = fs::read_dir("/").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().file_name());
        let processes = processes.filter(|name| name.to_string_lossy().parse::<u32>().is_ok());
        (names.collect::<BTreeSet<_>>(), processes.count())
    });
    let inside = podman.exec("a", "ls /").ok();
    assert_eq!(seen.join().unwrap(), (inside.lines().map(String::from).collect(), 0));
}

fn a_port_of_the_default_network_leads_to_the_container() {
    let podman = Podman::new();
    let serve = "mkdir /www; echo served > /www/index.html; httpd -p 80 -h /www; echo up; exec sleep 100000";
    podman.detached("web", &["--publish", "127.0.0.1:18080:80"], serve);
    podman.wait_for_line("web", "up");
    assert_eq!(tool("curl -sS --max-time 60 http://127.0.0.1:18080/"), "served\n");
    let address = podman.inspect("web", "/NetworkSettings/IPAddress");
    let address = address.as_str().unwrap();
    let fetch = format!("wget -q -O - http://{address}/; ip -o -4 addr show dev eth0 | wc -l");
    let other = podman.podman(&["run", "--rm", PODMAN_IMAGE, "sh", "-c", &fetch]);
    assert_eq!(other.code(0).text(), "served\n1\n");
    podman.remove("web");
}

fn networks_are_connected_disconnected_and_reloaded_while_a_container_runs() {
    let podman = Podman::new();
    for network in ["one", "two"] {
        podman.podman(&["network", "create", "--disable-dns", network]).code(0);
    }
    let serve = "mkdir /www; echo served > /www/index.html; httpd -p 80 -h /www; echo up; exec sleep 100000";
    podman.detached("web", &["--network", "one", "--publish", "127.0.0.1:18082:80"], serve);
    podman.wait_for_line("web", "up");
    let address = |network: &str| {
        let place = format!("/NetworkSettings/Networks/{network}/IPAddress");
        podman.inspect("web", &place).as_str().expect("an address").to_owned()
    };
    let served = |url: &str| {
        let fetch = format!("curl -sS --max-time 10 --retry 20 --retry-all-errors {url}");
        assert_eq!(tool(&fetch), "served\n", "{url}");
    };
    let wait_for = |address: &str| {
        podman.exec("web", &format!("until ip addr | grep -q 'inet {address}/'; do sleep 0.1; done")).code(0);
    };
    podman.podman(&["network", "connect", "two", "web"]).code(0);
    let two = address("two");
    wait_for(&two);
    served(&format!("http://{two}/"));
    podman.podman(&["network", "reload", "web"]).code(0);
    for (network, url) in [("one", "http://127.0.0.1:18082/"), ("two", &format!("http://{two}/"))] {
        wait_for(&address(network));
        served(url);
    }
    podman.podman(&["network", "disconnect", "one", "web"]).code(0);
    podman
        .exec("web", "while [ -e /sys/class/net/eth0 ]; do sleep 0.1; done; test -e /sys/class/net/eth1")
        .code(0);
    served(&format!("http://{two}/"));
    podman.podman(&["network", "connect", "one", "web"]).code(0);
    wait_for(&address("one"));
    served("http://127.0.0.1:18082/");
    podman.remove("web");
}

fn containers_of_a_pod_without_infra_live_and_end_together() {
    let podman = Podman::new();
    podman.podman(&["pod", "create", "--infra=false", "--name", "pod"]).code(0);
    for name in ["a", "b"] {
        podman.detached(name, &["--pod", "pod", "--network", "none"], IDLE);
        podman.wait_for_line(name, "up");
    }
    let pod = podman.podman(&["pod", "inspect", "--format", "{{.State}} {{.NumContainers}}", "pod"]);
    assert_eq!(pod.ok(), "Running 2\n");
    podman.podman(&["pod", "pause", "pod"]).code(0);
    assert_eq!(podman.inspect("b", "/State/Status"), "paused");
    podman.podman(&["pod", "unpause", "pod"]).code(0);
    podman.podman(&["pod", "stop", "pod"]).code(0);
    assert_eq!(
        (podman.inspect("a", "/State/ExitCode"), podman.inspect("b", "/State/ExitCode")),
        (5.into(), 5.into())
    );
    podman.podman(&["pod", "rm", "pod"]).code(0);
}

fn containers_of_a_pod_share_its_network_memory_and_name() {
    let podman = Podman::new();
    let create = ["pod", "create", "--name", "pod", "--publish", "127.0.0.1:18081:8080"];
    // Podman 4.3 denies all devices to a cgroup that it makes for a pod itself, and no runtime can do without /dev/null.
    // As the usual pause program, this one ends when it is asked to.
    let pause = "syslogd -n -O /dev/null";
    let infra = ["--infra-image", PODMAN_IMAGE, "--infra-command", pause, "--share-parent=false"];
    podman.podman(&[&create[..], &infra].concat()).code(0);
    let serves = format!("nc -ll -p 8080 -e cat & echo shared > /dev/shm/file; {IDLE}");
    podman.detached("a", &["--pod", "pod"], &serves);
    // Takes longer to end than the pause program.
    let slow = "trap 'sleep 2; exit 5' TERM; echo up; while :; do sleep 1; done";
    podman.detached("b", &["--pod", "pod"], slow);
    for name in ["a", "b"] {
        podman.wait_for_line(name, "up");
    }
    let echo = "until echo said | nc -w 5 127.0.0.1 8080 | grep said; do sleep 0.1; done";
    assert_eq!(podman.exec("b", echo).code(0).text(), "said\n");
    assert_eq!(podman.exec("b", "cat /dev/shm/file").code(0).text(), "shared\n");
    let names = ["a", "b"].map(|name| podman.exec(name, "hostname").code(0).text());
    assert_eq!(names, ["pod\n", "pod\n"]);
    // Each has its own processes and files.
    assert_eq!(podman.exec("b", "ps -o args | grep -c '[n]c -ll'").code(1).text(), "0\n");
    fs::write(podman.dir().join("given"), "given").unwrap();
    let given = podman.dir().join("given").display().to_string();
    podman.podman(&["cp", &given, "b:/given"]).code(0);
    assert_eq!(podman.exec("b", "cat /given").code(0).text(), "given");
    podman.exec("a", "test ! -e /given").code(0);
    // From outside.
    let mut outside = TcpStream::connect("127.0.0.1:18081").unwrap();
    outside.write_all(b"out").unwrap();
    outside.shutdown(Shutdown::Write).unwrap();
    let mut back = String::new();
    outside.read_to_string(&mut back).unwrap();
    assert_eq!(back, "out");

    let run = ["run", "--rm", "--interactive", "--pod", "pod", PODMAN_IMAGE, "sh", "-c", "cat; exit 7"];
    let ended = Program::spawn(podman.command(&run), Stdin::Bytes(b"through".to_vec())).finish();
    assert_eq!(ended.code(7).text(), "through");
    podman.podman(&["pause", "b"]).code(0);
    podman.exec("a", "true").code(0);
    podman.podman(&["unpause", "b"]).code(0);
    podman.podman(&["stop", "--time", "100", "b"]).code(0);
    assert_eq!(podman.inspect("b", "/State/ExitCode"), 5);
    podman.exec("a", "true").code(0);
    podman.podman(&["start", "b"]).code(0);
    podman.exec("b", "cat /dev/shm/file").code(0);
    let pid = podman.inspect("b", "/State/Pid").as_i64().unwrap();
    kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGKILL).unwrap();
    assert_eq!(podman.podman(&["wait", "b"]).ok(), "137\n");
    podman.podman(&["start", "b"]).code(0);
    podman.exec("b", "true").code(0);

    let pod = podman.podman(&["pod", "inspect", "--format", "{{.State}} {{.NumContainers}}", "pod"]);
    assert_eq!(pod.ok(), "Running 3\n");
    podman.podman(&["pod", "stop", "--time", "100", "pod"]).code(0);
    let ended = ["a", "b"].map(|name| podman.inspect(name, "/State/ExitCode"));
    assert_eq!(ended, [5, 5], "they were not let end by themselves");
    podman.podman(&["pod", "start", "pod"]).code(0);
    podman.exec("a", "true").code(0);
    podman.podman(&["pod", "rm", "--force", "--time", "0", "pod"]).code(0);
}

fn a_container_joins_the_namespaces_of_another() {
    let podman = Podman::new();
    podman.detached(
        "a",
        &["--network", "none", "--ipc", "shareable"],
        &format!("echo 1 > /dev/shm/n; nc -ll -p 8080 -e cat & {IDLE}"),
    );
    podman.wait_for_line("a", "up");
    let network = ["--network", "container:a"];
    let run = |options: &[&str], script: &str| {
        let words = [&["run", "--rm"], &network[..], options, &[PODMAN_IMAGE, "sh", "-c", script]].concat();
        podman.podman(&words)
    };
    let call = "until echo said | nc -w 5 127.0.0.1 8080 | grep said; do sleep 0.1; done";
    assert_eq!(run(&[], call).code(0).text(), "said\n");
    assert_eq!(run(&["--ipc", "container:a"], "cat /dev/shm/n; exit 3").code(3).text(), "1\n");
    fs::write(podman.dir().join("file"), "of the host\n").unwrap();
    let overlay = format!("{}:/over:O", podman.dir().display());
    let ended = run(&["--volume", &overlay], "cat /over/file; echo changed > /over/file; cat /over/file");
    assert_eq!(ended.code(0).text(), "of the host\nchanged\n");
    assert_eq!(fs::read_to_string(podman.dir().join("file")).unwrap(), "of the host\n");
    let shared = run(&["--pid", "container:a"], "ps -o args | grep -c '^nc -ll'; kill -TERM 1");
    assert_eq!(shared.code(0).text(), "1\n");
    assert_eq!(podman.podman(&["wait", "a"]).ok(), "5\n");
    podman.remove("a");
}

fn a_killed_supervisor_is_no_success_and_the_container_starts_again() {
    let podman = Podman::new();
    podman.detached("a", &["--network", "none"], IDLE);
    podman.wait_for_line("a", "up");
    let pid = podman.inspect("a", "/State/Pid").as_i64().unwrap();
    kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGKILL).unwrap();
    assert_eq!(podman.podman(&["wait", "a"]).ok(), "137\n");
    podman.podman(&["start", "a"]).code(0);
    podman.exec("a", "true").code(0);
    podman.remove("a");
}

fn what_a_vm_cannot_honour_is_refused_by_name() {
    let podman = Podman::new();
    podman.detached("a", &["--network", "none"], IDLE);
    for (options, words) in [
        (&["--network", "host"][..], ["linux.namespaces", "host's network"]),
        (&["--network", "none", "--pid", "container:a"], ["linux.namespaces", "--network container:"]),
        (&["--network", "none", "--pid", "ns:/proc/1/ns/pid"], ["linux.namespaces", "pid"]),
        (
            &["--network", "none", "--cap-add", "sys_admin", "--volume", "/tmp:/x:rshared"],
            ["CAP_SYS_ADMIN", "host"],
        ),
    ] {
        let run = [&["run", "--rm"][..], options, &[PODMAN_IMAGE, "true"]].concat();
        let ended = podman.podman(&run).code(126);
        assert!(words.iter().all(|word| ended.stderr.contains(word)), "{ended:?}");
    }
    let more = podman.podman(&["update", "--memory", "2t", "a"]).refused();
    assert!(more.contains("memory.limit") && more.contains("2199023255552"), "{more}");
    let checkpoint = podman.podman(&["container", "checkpoint", "a"]).refused();
    assert!(!checkpoint.is_empty(), "{checkpoint}");
    podman.remove("a");
}
