//! Pods through CRI, as kubelet has containerd make them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::MessageField;
use stockade_tests::cri::host::containerd_version;
use stockade_tests::cri::messages as cri;
use stockade_tests::cri::stream::{RESIZE, RESULT, STDERR, STDIN, STDOUT, Stream};

use crate::harness::{
    BY_SANDBOX_API, Case, HANDLER, Pod, Pods, Rootfs, Runtime, Traces, case, container, files_in_no_mount,
    mount, runtime_of, security, state_of, tool, wait_gone,
};

const SHIM: &str = "the shim";

pub const CASES: &[Case] = &[
    case!(a_pod_has_an_address_and_containers_that_come_and_go).stockade_only(SHIM).exclusive(),
    case!(logs_have_cris_format_and_are_reopened).stockade_only(SHIM).exclusive(),
    case!(a_pod_is_measured_sized_and_limited).stockade_only(SHIM).exclusive(),
    case!(exec_attach_and_forwarded_ports_carry_streams).stockade_only(SHIM).exclusive(),
    case!(a_workload_is_asked_once_to_stop_and_then_killed).stockade_only(SHIM).exclusive(),
    case!(runtime_handlers_are_told_apart).stockade_only(SHIM).exclusive(),
    case!(containers_of_a_pod_share_volumes_as_one_file_system).stockade_only(SHIM).exclusive(),
    case!(an_empty_directory_in_memory_is_the_guests_memory).stockade_only(SHIM).exclusive(),
    case!(volumes_of_kubelet_are_what_they_are_under_other_runtimes).stockade_only(SHIM).exclusive(),
    case!(settings_of_a_pod_hold_in_its_containers).stockade_only(SHIM).exclusive(),
    case!(a_pod_is_entered_only_where_its_node_allows_it).stockade_only(SHIM).exclusive(),
    case!(what_is_the_hosts_is_refused_in_words_that_say_what_to_do).stockade_only(SHIM).exclusive(),
    case!(pods_outlive_a_killed_containerd_and_a_killed_shim_is_no_success).stockade_only(SHIM).exclusive(),
    case!(the_sandbox_api_makes_pods_without_a_pause_container)
        .stockade_only(SHIM)
        .exclusive()
        .only_if(has_sandbox_api),
    case!(ten_pods_of_three_containers_at_once).stockade_only(SHIM).exclusive().on_request(),
];

/// Ends well when it is asked to.
const IDLE: &str = "trap 'echo asked; exit 5' TERM; echo up; while :; do sleep 1; done";

fn a_pod_has_an_address_and_containers_that_come_and_go() {
    let pods = Pods::start();
    let pod = pods.run("first", |config| {
        config.labels.insert("app".into(), "a".into());
    });
    let other = pods.run("second", |_| ());
    let address = pod.address();
    assert!(address.starts_with("10.67.") && address != other.address(), "{address}");

    for init in ["init-1", "init-2"] {
        let said = pod.done(init, "hostname; uname -r; echo error >&2", |_| ());
        assert_eq!(said[0], "first");
        assert_ne!(said[1], tool("uname -r").trim());
    }
    let id = pod.start("main", IDLE, |_| ());
    assert!(pod.output(&id, "ip -4 addr show eth0").contains(&address));
    assert_eq!(pod.exec(&id, "echo out; echo error >&2; exit 3"), (3, "out\n".into(), "error\n".into()));
    // Through the bridge, and the host.
    let served = pod.start("serve", "while :; do echo served | nc -l -p 80; done", |_| ());
    let ask = format!("until nc {address} 80 | grep served; do :; done");
    other.done("ask", &ask, |_| ());

    let with = |state: cri::ContainerState| {
        let state =
            MessageField::some(cri::ContainerStateValue { state: state.into(), ..Default::default() });
        let all = pod.list(cri::ContainerFilter { state, ..Default::default() });
        let mut names: Vec<_> = all.into_iter().map(|one| one.metadata.name.clone()).collect();
        names.sort();
        names
    };
    assert_eq!(with(cri::ContainerState::CONTAINER_RUNNING), ["main", "serve"]);
    assert_eq!(with(cri::ContainerState::CONTAINER_EXITED), ["init-1", "init-2"]);
    let labelled = |value: &str| {
        let label_selector = [("app".into(), value.into())].into();
        pods.list(cri::PodSandboxFilter { label_selector, ..Default::default() }).len()
    };
    assert_eq!((labelled("a"), labelled("b")), (1, 0));
    assert_eq!(pods.list(cri::PodSandboxFilter::default()).len(), 2);

    // The last container ends, and is followed by others.
    for id in [&id, &served] {
        pod.stop_container(id, 30);
        pod.remove_container(id);
    }
    assert!(pod.is_ready());
    assert_eq!(pod.done("again", "echo again", |_| ()), ["again"]);
    // What the guest knew of the others is no reason for the host to keep their files.
    for one in pod.list(cri::ContainerFilter::default()) {
        pod.remove_container(&one.id);
    }
    let (vmm, _) = runtime_of(&pod.id);
    pods.wait("the VMM to let go of removed containers", || files_in_no_mount(vmm) == 0);
    for pod in [&pod, &other] {
        pod.stop();
        assert!(!pod.is_ready());
        pod.remove();
    }
    assert_eq!(pods.state_of_shims(), [""; 0]);
}

fn logs_have_cris_format_and_are_reopened() {
    let pods = Pods::start();
    let pod = pods.run("logs", |_| ());
    let script = "echo out; echo error >&2; printf part; echo; head -c 40000 /dev/zero | tr '\\0' x; echo; \
                  until [ -e /go ]; do sleep 0.1; done; echo later; while :; do sleep 1; done";
    let id = pod.start("main", script, |_| ());
    let long = "x".repeat(40_000);
    pod.wait_for_line("main", &long);
    let lines = pod.log("main");
    let of = |stream: &str| {
        let all = lines.iter().filter(|line| line.stream == stream);
        all.map(|line| line.text.as_str()).collect::<Vec<_>>()
    };
    assert_eq!((of("stdout"), of("stderr")), (vec!["out", "part", &long], vec!["error"]));

    // As kubelet rotates.
    let path = pod.log_path("main");
    fs::rename(&path, path.with_extension("1")).unwrap();
    let _: cri::Empty = pods.ask("ReopenContainerLog", &container(&id));
    pod.output(&id, "touch /go");
    pod.wait_for_line("main", "later");
    assert_eq!(pod.log("main").len(), 1);
}

fn a_pod_is_measured_sized_and_limited() {
    const MIB: u64 = 1 << 20;
    let pods = Pods::start();
    let pod = pods.run("measured", |config| {
        // As kubelet adds them up.
        config.linux.mut_or_insert_default().resources = MessageField::some(cri::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 150_000,
            cpu_shares: 1024,
            memory_limit_in_bytes: 200 << 20,
            ..Default::default()
        });
    });
    // 16 MiB that are used, not only cached.
    let script = "mkdir /run/big; trap 'exit 0' TERM; x=$(head -c 16777216 /dev/zero | tr '\\0' x); echo full; \
                  while :; do sleep 1; done";
    let id = pod.start("main", script, |config| {
        let resources = config.linux.mut_or_insert_default().resources.mut_or_insert_default();
        resources.memory_limit_in_bytes = 150 << 20;
    });
    let idle = pod.start("idle", IDLE, |_| ());
    pod.wait_for_line("main", "full");
    assert_eq!(pod.output(&id, "nproc"), "2");
    let kib: u64 = pod.output(&id, "awk '/^MemTotal/ { print $2 }' /proc/meminfo").parse().unwrap();
    assert!((200 * 1024..280 * 1024).contains(&kib), "the guest has {kib} KiB");

    let stats =
        |id: &str| pods.ask::<cri::ContainerStatsResponse>("ContainerStats", &container(id)).stats.unwrap();
    let used = stats(&id);
    assert!((16 * MIB..150 * MIB).contains(&used.memory.working_set_bytes.value), "{used}");
    assert!(stats(&idle).memory.working_set_bytes.value < 12 * MIB);
    let before = used.cpu.usage_core_nano_seconds.value;
    pod.output(&id, "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done");
    let after = stats(&id).cpu.usage_core_nano_seconds.value;
    assert!(before > 0 && after > before, "{before}, then {after}");
    let list: cri::ListContainerStatsResponse =
        pods.ask("ListContainerStats", &cri::ListContainerStatsRequest::default());
    assert_eq!(list.stats.len(), 2);

    // The VM is in the pod's cgroup on the host, and charged to it.
    let request = cri::PodSandboxId { pod_sandbox_id: pod.id.clone(), ..Default::default() };
    let of_pod = pods.ask::<cri::PodSandboxStatsResponse>("PodSandboxStats", &request).stats.unwrap().linux;
    assert!(of_pod.memory.usage_bytes.value > 64 * MIB, "{of_pod:?}");
    assert!(of_pod.cpu.usage_core_nano_seconds.value > 0, "{of_pod:?}");
    assert_eq!(of_pod.network.default_interface.name, "eth0");
    assert_eq!(of_pod.containers.len(), 2);

    let greedy = pod.start("greedy", "x=$(head -c 33554432 /dev/zero | tr '\\0' x)", |config| {
        let resources = config.linux.mut_or_insert_default().resources.mut_or_insert_default();
        resources.memory_limit_in_bytes = 16 << 20;
    });
    let killed = pod.ended(&greedy);
    assert_eq!((killed.exit_code, killed.reason.as_str()), (137, "OOMKilled"), "{killed}");

    let limit = || pod.output(&id, "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max");
    assert_eq!(limit().lines().next(), Some("157286400"));
    let linux = cri::LinuxContainerResources {
        memory_limit_in_bytes: 100 << 20,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        ..Default::default()
    };
    let request = cri::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: MessageField::some(linux),
        ..Default::default()
    };
    let _: cri::Empty = pods.ask("UpdateContainerResources", &request);
    assert_eq!(limit(), "104857600\n50000 100000");
}

/// Reads a channel until it has said this.
#[track_caller]
fn expect(stream: &mut Stream, channel: u8, text: &str) {
    let mut said = String::new();
    while !said.contains(text) {
        match stream.receive().unwrap() {
            Some((of, bytes)) if of == channel => said.push_str(&String::from_utf8_lossy(&bytes)),
            Some((of, bytes)) => {
                let bytes = String::from_utf8_lossy(&bytes);
                assert!(bytes.is_empty(), "after {said:?} on channel {of}: {bytes}")
            }
            None => panic!("closed after {said:?}, before {text:?}"),
        }
    }
}

fn exec_attach_and_forwarded_ports_carry_streams() {
    let pods = Pods::start();
    let pod = pods.run("streams", |_| ());
    let reads = "while read word; do echo got $word; [ $word = end ] && exit 4; done";
    let id = pod.start("main", reads, |config| config.stdin = true);
    let mut exec = pod.exec_stream(&id, "read word; echo $word; echo error >&2; read word; exit 3", false);
    exec.send(STDIN, b"typed\n").unwrap();
    expect(&mut exec, STDOUT, "typed\n");
    expect(&mut exec, STDERR, "error\n");
    exec.send(STDIN, b"x\n").unwrap();
    expect(&mut exec, RESULT, "\"message\":\"3\"");

    // The sizes and the input take different ways through containerd, so neither waits for the other.
    let resized = "tty; read word; until stty size | grep '31 97'; do sleep 0.1; done; exit 0";
    let mut terminal = pod.exec_stream(&id, resized, true);
    expect(&mut terminal, STDOUT, "/dev/pts/");
    terminal.send(RESIZE, b"{\"Width\":97,\"Height\":31}").unwrap();
    terminal.send(STDIN, b"\n").unwrap();
    expect(&mut terminal, STDOUT, "31 97\r\n");
    expect(&mut terminal, RESULT, "Success");

    let mut attached = pod.attach(&id);
    attached.send(STDIN, b"one\n").unwrap();
    expect(&mut attached, STDOUT, "got one\n");
    attached.send(STDIN, b"end\n").unwrap();
    expect(&mut attached, STDOUT, "got end\n");
    assert_eq!(pod.ended(&id).exit_code, 4);

    let serve = pod.start("serve", "nc -ll -p 8080 -e cat", |_| ());
    pod.output(&serve, "until netstat -ltn | grep -q :8080; do sleep 0.1; done");
    const DATA: u8 = 0;
    const ERROR: u8 = 1;
    let mut forwarded = pod.forward(8080);
    for channel in [DATA, ERROR] {
        let (of, port) = forwarded.receive().unwrap().expect("the port");
        assert_eq!((of, port), (channel, 8080u16.to_le_bytes().to_vec()));
    }
    let sent: String = (0..3000).map(|number| format!("line {number}\n")).collect();
    forwarded.send(DATA, sent.as_bytes()).unwrap();
    let mut back = Vec::new();
    while back.len() < sent.len() {
        let (channel, bytes) = forwarded.receive().unwrap().expect("the echo");
        assert_eq!(channel, DATA, "{}", String::from_utf8_lossy(&bytes));
        back.extend(bytes);
    }
    assert!(back == sent.as_bytes());
    // Nobody listens there.
    let mut refused = pod.forward(8081);
    let mut said = Vec::new();
    while let Some((channel, bytes)) = refused.receive().unwrap() {
        if !bytes.is_empty() && bytes != 8081u16.to_le_bytes() {
            said.push((channel, String::from_utf8_lossy(&bytes).into_owned()));
        }
    }
    assert!(said.iter().all(|(channel, _)| *channel == ERROR), "{said:?}");
}

fn a_workload_is_asked_once_to_stop_and_then_killed() {
    let pods = Pods::start();
    let before = Traces::now();
    let pod = pods.run("stops", |_| ());
    let obeys = pod.start("obeys", IDLE, |_| ());
    let ignores =
        pod.start("ignores", "trap 'echo asked' TERM; echo up; while :; do sleep 0.1; done", |_| ());
    for name in ["obeys", "ignores"] {
        pod.wait_for_line(name, "up");
    }
    pod.stop_container(&obeys, 60);
    pod.stop_container(&ignores, 2);
    assert_eq!((pod.ended(&obeys).exit_code, pod.ended(&ignores).exit_code), (5, 137));
    for name in ["obeys", "ignores"] {
        let lines: Vec<_> = pod.log(name).into_iter().map(|line| line.text).collect();
        assert_eq!(lines, ["up", "asked"], "{name}");
    }
    // By force, with containers that run and one that never ran.
    pod.start("more", IDLE, |_| ());
    pod.try_create("never", IDLE, |_| ()).unwrap();
    pod.remove();
    assert_nothing_left(&pods, &before);
}

fn runtime_handlers_are_told_apart() {
    let pods = Pods::start();
    let unknown = pods.try_run(pods.config("none"), "no-such-handler").map(drop).unwrap_err();
    assert!(unknown.message.contains("no-such-handler"), "{unknown}");
    let host = tool("uname -r");
    for (handler, is_hosts) in [("runc", true), (HANDLER, false)] {
        let pod = pods.try_run(pods.config(handler), handler).unwrap_or_else(|e| panic!("{handler}: {e}"));
        assert_eq!(pod.status().runtime_handler, handler);
        assert_eq!(pod.done("main", "uname -r", |_| ())[0] == host.trim(), is_hosts, "{handler}");
    }
}

/// Perl of the lab's Debian root, with a volume below /mnt.
fn with_perl(config: &mut cri::ContainerConfig, volume: &Path) {
    config.mounts.push(mount(&Rootfs::Debian.path(), "/debian", false));
    config.mounts.push(mount(volume, "/debian/mnt", false));
}

/// A unix socket and mapped memory on a volume, in which `number` has been written as 17, work between two containers.
fn share_as_one_file_system(pod: &Pod, volume: &Path) {
    let perl = |program: &str| format!("exec chroot /debian perl -e '{program}'");
    let server = perl(
        "use IO::Socket::UNIX; $SIG{TERM} = sub { exit };
         my $s = IO::Socket::UNIX->new(Local => \"/mnt/socket\", Listen => 1) or die \"listen: $!\";
         open F, \"+>\", \"/mnt/map\"; syswrite F, \"\\0\" x 4096; open N, \"<\", \"/mnt/number\";
         my $at = syscall(9, 0, 4096, 3, 1, fileno(F), 0); $| = 1; print \"up\\n\";
         my $c = $s->accept; print $c \"answer to \" . <$c>; close $c;
         syscall(0, fileno(N), $at, 2); print \"written\\n\"; sleep 1 while 1;",
    );
    pod.start("server", &server, |config| with_perl(config, volume));
    pod.wait_for_line("server", "up");
    let client = perl(
        "use IO::Socket::UNIX; open F, \"+<\", \"/mnt/map\"; my $at = syscall(9, 0, 4096, 3, 1, fileno(F), 0);
         my $c = IO::Socket::UNIX->new(Peer => \"/mnt/socket\") or die \"connect: $!\";
         print $c \"hello\\n\"; print <$c>; $| = 1;
         while (unpack(\"P2\", pack(\"Q\", $at)) !~ /\\d\\d/) { select undef, undef, undef, 0.05 }
         print \"mapped \", unpack(\"P2\", pack(\"Q\", $at)), \"\\n\";",
    );
    let said = pod.done("client", &client, |config| with_perl(config, volume));
    assert_eq!(said[0], "answer to hello");
    assert!(said[1] == "mapped 17", "{said:?}");
}

fn containers_of_a_pod_share_volumes_as_one_file_system() {
    let pods = Pods::start();
    let pod = pods.run("shares", |_| ());
    let volume = pod.volume("empty-dir", "shared");
    let reader = pod.start(
        "reader",
        "until [ -e /v/file ]; do sleep 0.1; done; cat /v/file; ! echo x > /v/file",
        |config| {
            config.mounts.push(mount(&volume, "/v", true));
        },
    );
    fs::write(volume.join("number"), "17").unwrap();
    share_as_one_file_system(&pod, &volume);
    fs::write(volume.join("file"), "from the host\n").unwrap();
    assert_eq!(pod.ended(&reader).exit_code, 0, "{:?}", pod.log("reader"));
    assert_eq!(fs::read_to_string(volume.join("file")).unwrap(), "from the host\n");
}

fn an_empty_directory_in_memory_is_the_guests_memory() {
    let pods = Pods::start();
    let pod = pods.run("memory", |_| ());
    let [volume, filled, large] = ["volume", "filled", "large"].map(|name| pod.volume("empty-dir", name));
    for (of, size) in [(&volume, "8m"), (&filled, "1m"), (&large, "100g")] {
        tool(&format!("mount -t tmpfs -o size={size} tmpfs {}", of.display()));
    }
    // As kubelet does for fsGroup.
    tool(&format!("chgrp 2000 {0} && chmod 2770 {0}", volume.display()));
    fs::write(filled.join("file"), "from the host\n").unwrap();
    let with = |of: &Path, readonly: bool| {
        let mount = mount(of, "/v", readonly);
        move |config: &mut cri::ContainerConfig| config.mounts.push(mount)
    };

    let said = pod.done(
        "init",
        "echo kept > /v/kept; printf 17 > /v/number; stat -c %a:%u:%g /v /v/kept; df -k /v | tail -1; \
         grep ' /v ' /proc/mounts; grep MemTotal /proc/meminfo",
        with(&volume, false),
    );
    assert_eq!(said[..2], ["2770:0:2000", "644:0:2000"]);
    assert!(said[2].starts_with("tmpfs") && said[2].contains(" 8192 "), "{said:?}");
    assert!(said[3].contains(" tmpfs rw,") && said[3].contains("size=8192k"), "{said:?}");
    // As much as the VM has, where the host would have more.
    let kib = |line: &str| -> u64 {
        let words: Vec<_> = line.split_whitespace().collect();
        words[1].parse().unwrap_or_else(|e| panic!("{line}: {e}"))
    };
    let said_of_large = pod.done("large", "df -k /v | tail -1", with(&large, false));
    let (has, total) = (kib(&said_of_large[0]), kib(&said[4]));
    assert!((total..2 * total).contains(&has), "{has} KiB of {total}");

    let reader = pod.start("reader", IDLE, with(&volume, true));
    for one in pod.list(cri::ContainerFilter::default()).iter().filter(|one| one.id != reader) {
        pod.remove_container(&one.id);
    }
    assert_eq!(pod.output(&reader, "cat /v/kept"), "kept");
    let (_, _, refused) = pod.exec(&reader, "touch /v/x");
    assert!(refused.contains("Read-only"), "{refused}");
    share_as_one_file_system(&pod, &volume);
    let writer = pod.start("writer", IDLE, with(&volume, false));
    let (_, _, full) = pod.exec(&writer, "dd if=/dev/zero of=/v/much bs=64k count=200; rm /v/much");
    assert!(full.contains("No space left"), "{full}");
    // What a container writes there counts as its memory.
    let greedy = pod.start("greedy", "dd if=/dev/zero of=/v/much bs=64k count=512", |config| {
        with(&large, false)(config);
        let resources = config.linux.mut_or_insert_default().resources.mut_or_insert_default();
        resources.memory_limit_in_bytes = 16 << 20;
    });
    let killed = pod.ended(&greedy);
    assert_eq!((killed.exit_code, killed.reason.as_str()), (137, "OOMKilled"), "{killed}");

    // As kubelet does for a subPath.
    let part = volume.ancestors().nth(3).unwrap().join("volume-subpaths/volume/part/0");
    fs::create_dir_all(&part).unwrap();
    fs::create_dir(volume.join("sub")).unwrap();
    fs::set_permissions(volume.join("sub"), std::os::unix::fs::PermissionsExt::from_mode(0o751)).unwrap();
    tool(&format!("mount --bind {} {}", volume.join("sub").display(), part.display()));
    let in_part = pod.start("part", IDLE, with(&part, false));
    assert_eq!(pod.output(&in_part, "ls /v; stat -c %a /v; echo in part > /v/file"), "751");
    assert_eq!(pod.output(&reader, "cat /v/sub/file"), "in part");
    pod.output(&writer, "rm -r /v/sub; ln -s / /v/sub; mkdir /v/mine");
    let outside = pod.start("outside", IDLE, with(&part, false));
    let listed = pod.output(&outside, "ls /v");
    assert!(listed.contains("mine") && !listed.contains("proc"), "{listed}");
    assert_eq!(pod.output(&in_part, "ls -d /v"), "/v");

    let reads = pod.start("filled", IDLE, with(&filled, false));
    assert_eq!(pod.output(&reads, "cat /v/file; echo back > /v/back"), "from the host");
    assert_eq!(fs::read_to_string(filled.join("back")).unwrap(), "back\n");

    let names = |of: &Path| fs::read_dir(of).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    assert_eq!((names(&volume), names(&large)), (vec![volume.join("sub")], Vec::new()));
    assert_eq!(names(&volume.join("sub")), Vec::<std::path::PathBuf>::new());
    pod.remove();
    for mounted in [part, volume, filled, large] {
        tool(&format!("umount {}", mounted.display()));
    }
}

fn volumes_of_kubelet_are_what_they_are_under_other_runtimes() {
    let pods = Pods::start();
    let pod = pods.run("volumes", |_| ());
    let projected = pod.volume("projected", "config");
    let publish = |number: u32| {
        let dir = format!("..{number}");
        fs::create_dir(projected.join(&dir)).unwrap();
        fs::write(projected.join(&dir).join("key"), format!("value {number}\n")).unwrap();
        symlink(&dir, projected.join("..data_tmp")).unwrap();
        fs::rename(projected.join("..data_tmp"), projected.join("..data")).unwrap();
    };
    publish(1);
    symlink("..data/key", projected.join("key")).unwrap();
    let memory = pod.volume("empty-dir", "memory");
    tool(&format!("mount -t tmpfs -o size=1m tmpfs {}", memory.display()));
    let host = pod.volume("host-path", "dir");
    fs::create_dir_all(host.join("sub/path")).unwrap();
    fs::write(host.join("sub/path/file"), "deep\n").unwrap();
    // What engines mount in their storage is told to nobody, and comes after the pod.
    let storage = pod.volume("host-path", "storage");
    let engines = storage.join("late");
    tool(&format!("mount -t tmpfs tmpfs {0} && mount --make-private {0}", storage.display()));
    fs::create_dir(&engines).unwrap();
    tool(&format!("mount -t tmpfs tmpfs {}", engines.display()));
    fs::write(engines.join("file"), "late\n").unwrap();
    let message = pod.volume("pods", "containers").join("termination");
    fs::write(&message, "").unwrap();
    fs::set_permissions(&message, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let subpath = pod.volume("subpath", "0");
    tool(&format!("mount --bind {} {}", host.join("sub").display(), subpath.display()));

    let id = pod.start(
        "main",
        "trap 'echo farewell > /dev/termination-log; exit 1' TERM; echo up; while :; do sleep 0.1; done",
        |config| {
            config.mounts.extend([
                mount(&projected, "/etc/config", true),
                mount(&memory, "/memory", false),
                mount(&subpath, "/sub", false),
                mount(&engines, "/late", true),
                mount(&host.join("sub/path/file"), "/one/file", false),
                mount(&message, "/dev/termination-log", false),
            ]);
        },
    );
    pod.wait_for_line("main", "up");
    assert_eq!(pod.output(&id, "cat /etc/config/key /late/file"), "value 1\nlate");
    publish(2);
    pod.output(&id, "until grep -q 'value 2' /etc/config/key; do sleep 0.1; done");
    let (_, _, refused) = pod.exec(&id, "touch /etc/config/x");
    assert!(refused.contains("Read-only"), "{refused}");

    assert_eq!(pod.output(&id, "cat /sub/path/file /one/file"), "deep\ndeep");
    pod.output(&id, "echo new > /sub/new; echo more >> /one/file");
    assert_eq!(fs::read_to_string(host.join("sub/new")).unwrap(), "new\n");
    assert_eq!(fs::read_to_string(host.join("sub/path/file")).unwrap(), "deep\nmore\n");

    pod.output(&id, "head -c 500000 /dev/zero > /memory/fits");
    let (_, _, full) = pod.exec(&id, "dd if=/dev/zero of=/memory/more bs=64k count=40");
    assert!(full.contains("No space left"), "{full}");

    pod.stop_container(&id, 60);
    assert_eq!(fs::read_to_string(&message).unwrap(), "farewell\n");
    pod.remove();
    for mounted in [memory, subpath, engines, storage] {
        tool(&format!("umount {}", mounted.display()));
    }
}

fn settings_of_a_pod_hold_in_its_containers() {
    let pods = Pods::start();
    let pod = pods.run("settings", |config| {
        let linux = config.linux.mut_or_insert_default();
        for (name, value) in
            [("net.core.somaxconn", "77"), ("kernel.msgmax", "1234"), ("fs.mqueue.msg_max", "7")]
        {
            linux.sysctls.insert(name.into(), value.into());
        }
        let shared = cri::NamespaceOption { pid: cri::NamespaceMode::POD.into(), ..Default::default() };
        linux.security_context.mut_or_insert_default().namespace_options = MessageField::some(shared);
        config.dns_config = MessageField::some(cri::DNSConfig {
            servers: vec!["10.9.8.7".into()],
            searches: vec!["lab.example".into()],
            ..Default::default()
        });
    });
    let shares = |config: &mut cri::ContainerConfig| {
        security(config).namespace_options.mut_or_insert_default().pid = cri::NamespaceMode::POD.into();
    };
    let first =
        pod.start("first", "trap 'exit 0' TERM; echo up; (sleep 1000 &); while :; do sleep 1; done", shares);
    pod.wait_for_line("first", "up");
    assert_eq!(
        pod.output(&first, "cd /proc/sys; cat net/core/somaxconn kernel/msgmax fs/mqueue/msg_max; hostname"),
        "77\n1234\n7\nsettings"
    );
    assert_eq!(pod.output(&first, "cat /etc/resolv.conf"), "search lab.example\nnameserver 10.9.8.7");
    let shm = pod.output(&first, "df -k /dev/shm | tail -1; echo shared > /dev/shm/file");
    assert!(shm.split_whitespace().any(|word| word == "65536"), "{shm}");
    assert_eq!(pod.output(&first, "cat /proc/1/comm"), "pause");
    let volume = pod.volume("empty-dir", "owned");
    tool(&format!("chgrp 2000 {0} && chmod 2775 {0}", volume.display()));
    let second = pod.start("second", IDLE, |config| {
        shares(config);
        config.mounts.push(mount(&volume, "/v", false));
        let security = security(config);
        security.run_as_user = MessageField::some(cri::Int64Value { value: 1000, ..Default::default() });
        security.run_as_group = MessageField::some(cri::Int64Value { value: 1001, ..Default::default() });
        security.supplemental_groups = vec![2000];
        security.readonly_rootfs = true;
        security.no_new_privs = true;
    });
    assert_eq!(pod.output(&second, "id -u; id -G; cat /dev/shm/file"), "1000\n1001 2000\nshared");
    assert_eq!(pod.output(&second, "echo x > /v/file; stat -c %u:%g /v/file; ! touch /file"), "1000:2000");
    let processes = pod.output(&second, "ps -o args");
    assert!(processes.contains("sleep 1000") && processes.contains("pause"), "{processes}");
    // Signals cross from one container to the other, and an init that ends takes its container along, not the pod.
    let (code, _, errors) =
        pod.exec(&second, "kill -TERM $(ps -o pid,args | awk '/[s]leep 1000/ { print $1 }')");
    assert!(code != 0 && errors.contains("not permitted"), "{code} {errors}");
    pod.stop_container(&first, 30);
    assert_eq!(pod.ended(&first).exit_code, 0);
    pod.remove_container(&first);
    let processes = pod.output(&second, "ps -o args");
    assert!(!processes.contains("sleep 1000"), "{processes}");
    pod.stop_container(&second, 30);
    assert_eq!(pod.ended(&second).exit_code, 5);
}

fn a_pod_is_entered_only_where_its_node_allows_it() {
    let enter =
        |pod: &Pod, words: &[&str]| Runtime::under_test().call(&[&["enter", &pod.id], words].concat());
    let annotate = |config: &mut cri::PodSandboxConfig| {
        config.annotations.insert("io.stockade.enter".into(), "1".into());
    };
    let closed = Pods::start();
    let reason = enter(&closed.run("closed", annotate), &["ps"]).code(255).refused();
    assert!(reason.contains("enter = true"), "{reason}");
    drop(closed);

    let pods = Pods::configured_with("", &[("STOCKADE_ENTER", "1")]);
    let pod = pods.run("open", |_| ());
    // Without any container, too.
    assert!(enter(&pod, &["ps"]).ok().contains("/init"));
    let id = pod.start("main", IDLE, |_| ());
    pod.wait_for_line("main", "up");
    let processes = enter(&pod, &["ps"]).ok();
    assert!(processes.contains("sh -c trap"), "{processes}");
    enter(&pod, &["sh", "-c", "exit 9"]).code(9);
    // Everything else is containerd's.
    let root = ["--root", "/run/containerd/stockade/k8s.io"];
    let reason = Runtime::under_test().global(&root).call(&["pause", &pod.id]).refused();
    assert!(reason.contains("containerd"), "{reason}");
    assert_eq!(pod.output(&id, "echo still"), "still");
    pod.remove();
    assert_eq!(pods.state_of_shims(), [""; 0]);
}

fn what_is_the_hosts_is_refused_in_words_that_say_what_to_do() {
    refuses(&Pods::start());
    // Allowed to be privileged in its VM, a container is.
    let pods = Pods::configured("privileged_without_host_devices = true");
    let pod = pods.run("may", |config| {
        config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
    });
    let said =
        pod.done("all", "mkdir /m && mount -t tmpfs x /m && echo mounted; ls /dev/vda || :", |config| {
            security(config).privileged = true;
        });
    assert_eq!(said, ["mounted"]);
}

/// By the default configuration.
fn refuses(pods: &Pods) {
    let refused = |name: &str, change: &dyn Fn(&mut cri::NamespaceOption)| {
        let mut config = pods.config(name);
        let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        change(security.namespace_options.mut_or_insert_default());
        pods.try_run(config, HANDLER).map(drop).expect_err(name).message
    };
    let host = cri::NamespaceMode::NODE;
    if !pods.by_sandbox_api {
        // Of which containerd 2.1 dies there before anybody is asked.
        let message = refused("network", &|option| option.network = host.into());
        assert!(message.contains("hostNetwork") && message.contains("runtime class"), "{message}");
    }
    for (name, message) in [
        ("hostPID", refused("pid", &|option| option.pid = host.into())),
        ("hostIPC", refused("ipc", &|option| option.ipc = host.into())),
    ] {
        assert!(message.contains(name) && message.contains("runtime class"), "{message}");
    }
    let mut unsafe_sysctl = pods.config("sysctl");
    unsafe_sysctl.linux.mut_or_insert_default().sysctls.insert("vm.swappiness".into(), "1".into());
    let message = pods.try_run(unsafe_sysctl, HANDLER).map(drop).unwrap_err().message;
    assert!(message.contains("vm.swappiness"), "{message}");

    let pod = pods.run("refuses", |config| {
        config.linux.mut_or_insert_default().security_context.mut_or_insert_default().privileged = true;
    });
    let start = |name: &str, change: &dyn Fn(&mut cri::ContainerConfig)| {
        let id = pod.try_create(name, IDLE, change).map_err(|e| e.message)?;
        pod.try_start(&id).map_err(|e| e.message)
    };
    let message = start("privileged", &|config| security(config).privileged = true).unwrap_err();
    assert!(message.contains("privileged_without_host_devices"), "{message}");
    let socket = pod.volume("host-path", "socket").join("socket");
    let _listens = UnixListener::bind(&socket).unwrap();
    let message =
        start("socket", &|config| config.mounts.push(mount(&socket, "/socket", false))).unwrap_err();
    assert!(message.contains(&socket.display().to_string()) && message.contains("socket"), "{message}");
    let disk = fs::read_dir("/dev").unwrap().flatten().map(|entry| entry.path());
    let disk = disk.into_iter().find(|path| path.starts_with("/dev/vda")).expect("the lab's disk");
    let message = start("device", &|config| config.mounts.push(mount(&disk, "/disk", false))).unwrap_err();
    assert!(message.contains("/dev/vda"), "{message}");
    let message = start("no-program", &|config| config.command = vec!["no-such-program".into()]).unwrap_err();
    assert!(message.contains("no-such-program") && message.contains("not found"), "{message}");
    assert_eq!(pod.done("works", "echo still", |_| ()), ["still"]);
}

fn pods_outlive_a_killed_containerd_and_a_killed_shim_is_no_success() {
    let mut pods = Pods::start();
    let ids = {
        let stays = pods.run("stays", |_| ());
        let dies = pods.run("dies", |_| ());
        let run = |pod: &Pod| (pod.id.clone(), pod.start("main", IDLE, |_| ()), pod.config.clone());
        [run(&stays), run(&dies)]
    };
    pods.kill_and_restart();
    let [stays, dies] = ids.map(|(id, main, config)| (pods.pod(id, config), main));
    assert!(stays.0.is_ready() && dies.0.is_ready());
    assert_eq!(stays.0.output(&stays.1, "echo still here"), "still here");

    let (vmm, shim) = runtime_of(&dies.0.id);
    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    wait_gone(vmm);
    let ended = dies.0.ended(&dies.1);
    assert_ne!(ended.exit_code, 0, "{ended}");
    pods.wait("the pod to be known as dead", || !dies.0.is_ready());
    dies.0.remove();
    // A VM that ends by itself is no success either.
    let (vmm, _) = runtime_of(&stays.0.id);
    kill(Pid::from_raw(vmm), Signal::SIGKILL).unwrap();
    let ended = stays.0.ended(&stays.1);
    assert_ne!(ended.exit_code, 0, "{ended}");
    pods.wait("the pod to be known as dead", || !stays.0.is_ready());
    stays.0.stop();
    stays.0.remove();
    assert_eq!(pods.state_of_shims(), [""; 0]);
}

/// containerd 2 has it.
fn has_sandbox_api() -> bool {
    containerd_version().is_ok_and(|(major, _)| major >= 2)
}

fn the_sandbox_api_makes_pods_without_a_pause_container() {
    let mut pods = Pods::configured(BY_SANDBOX_API);
    let before = Traces::now();
    let (id, first, config) = {
        let pod = pods.run("made", |config| {
            let linux = config.linux.mut_or_insert_default();
            linux.sysctls.insert("net.core.somaxconn".into(), "77".into());
            let resources = linux.resources.mut_or_insert_default();
            resources.cpu_period = 100_000;
            resources.cpu_quota = 150_000;
            config.dns_config = MessageField::some(cri::DNSConfig {
                servers: vec!["10.9.8.7".into()],
                searches: vec!["lab.example".into()],
                ..Default::default()
            });
        });
        // Not before the guest is up; and nothing stands for the pod but its shim.
        assert!(state_of(&pod.id)["network"].is_object(), "{}", state_of(&pod.id));
        let containers = pods.containerd.ctr(&["--namespace", "k8s.io", "container", "ls", "--quiet"]).ok();
        assert_eq!(containers, "");
        assert!(pod.address().starts_with("10.67."));
        let first = pod.start("first", IDLE, |_| ());
        let said =
            pod.output(&first, "cat /etc/hostname /etc/resolv.conf /proc/sys/net/core/somaxconn; nproc");
        assert_eq!(said, "made\nsearch lab.example\nnameserver 10.9.8.7\n77\n2");
        assert_eq!(pod.output(&first, "hostname; grep -c made /etc/hosts; ! touch /etc/hosts"), "made\n2");
        pod.output(&first, "echo shared > /dev/shm/file");
        (pod.id.clone(), first, pod.config.clone())
    };
    pods.kill_and_restart();
    let pod = pods.pod(id, config);
    assert!(pod.is_ready());
    assert_eq!(pod.output(&first, "echo still here"), "still here");
    assert_eq!(
        pod.done("second", "cat /dev/shm/file; df -k /dev/shm | grep -c 65536", |_| ()),
        ["shared", "1"]
    );
    pod.stop_container(&first, 60);
    assert_eq!(pod.ended(&first).exit_code, 5);
    pod.remove_container(&first);
    // Without any container it is still there.
    assert!(pod.is_ready());
    let third = pod.start("third", IDLE, |_| ());

    // Its VM's end is its end, and no success of a container's.
    let (vmm, shim) = runtime_of(&pod.id);
    kill(Pid::from_raw(vmm), Signal::SIGKILL).unwrap();
    assert_ne!(pod.ended(&third).exit_code, 0);
    pods.wait("the pod to be known as dead", || !pod.is_ready());
    assert!(pod.try_create("late", IDLE, |_| ()).and_then(|id| pod.try_start(&id)).is_err());
    pod.remove();
    wait_gone(shim);

    let dies = pods.run("dies", |_| ());
    let main = dies.start("main", IDLE, |_| ());
    let (vmm, shim) = runtime_of(&dies.id);
    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    wait_gone(vmm);
    assert_ne!(dies.ended(&main).exit_code, 0);
    pods.wait("the pod to be known as dead", || !dies.is_ready());
    dies.remove();

    let stops = pods.run("stops", |_| ());
    stops.start("main", IDLE, |_| ());
    stops.stop();
    assert!(!stops.is_ready());
    stops.remove();

    // Not hostNetwork, of which containerd 2.1 dies before anybody is asked.
    let mut host = pods.config("host");
    let security = host.linux.mut_or_insert_default().security_context.mut_or_insert_default();
    security.namespace_options.mut_or_insert_default().pid = cri::NamespaceMode::NODE.into();
    let message = pods.try_run(host, HANDLER).map(drop).unwrap_err().message;
    assert!(
        message.contains("hostPID") && message.contains("runtime class"),
        "{message}\n{}",
        pods.containerd.log()
    );
    assert_nothing_left(&pods, &before);
}

fn ten_pods_of_three_containers_at_once() {
    const NAMES: [&str; 3] = ["a", "b", "c"];
    let pods = Pods::start();
    let before = Traces::now();
    let all: Vec<Pod> = std::thread::scope(|scope| {
        let start = |number: usize| {
            let pods = &pods;
            scope.spawn(move || {
                let pod = pods.run(&format!("pod-{number}"), |_| ());
                for name in NAMES {
                    let id = pod.start(name, IDLE, |_| ());
                    pod.wait_for_line(name, "up");
                    assert_eq!(pod.output(&id, "hostname"), format!("pod-{number}"));
                }
                pod
            })
        };
        let started: Vec<_> = (0..10).map(start).collect();
        started.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let addresses: BTreeSet<_> = all.iter().map(Pod::address).collect();
    assert_eq!(addresses.len(), 10);
    let running: cri::ListContainersResponse =
        pods.ask("ListContainers", &cri::ListContainersRequest::default());
    let running_state = cri::ContainerState::CONTAINER_RUNNING.into();
    assert_eq!(running.containers.iter().filter(|one| one.state == running_state).count(), 30);
    std::thread::scope(|scope| {
        for pod in &all {
            scope.spawn(|| {
                pod.stop();
                pod.remove();
            });
        }
    });
    for pod in &all {
        for name in NAMES {
            let lines: Vec<_> = pod.log(name).into_iter().map(|line| line.text).collect();
            // A pod is stopped at once: whom to give time, kubelet has stopped before.
            assert_eq!(lines, ["up"], "{name} of {}", pod.id);
        }
    }
    assert_nothing_left(&pods, &before);
}

/// Of pods that have been removed, but for what belongs to kubelet and CNI.
#[track_caller]
fn assert_nothing_left(pods: &Pods, before: &Traces) {
    let mut left = before.new_since();
    left.retain(|line| !line.contains("/sys/fs/cgroup") && !line.contains("file /sys/class/net"));
    left.extend(pods.state_of_shims());
    assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
}
