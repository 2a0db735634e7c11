//! Pods through CRI, as kubelet has containerd make them: their life, settings and limits.

pub mod streams;
pub mod users;
pub mod volumes;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::net::UnixListener;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::MessageField;
use stockade_tests::cri::host::containerd_version;
use stockade_tests::cri::messages as cri;

use crate::harness::{
    BY_SANDBOX_API, Case, HANDLER, Pod, Pods, Runtime, Traces, case, container, files_in_no_mount, mount,
    runtime_of, security, state_of, tool, wait_gone,
};

const SHIM: &str = "the shim";

pub const CASES: &[Case] = &[
    case!(a_pod_has_an_address_and_containers_that_come_and_go).stockade_only(SHIM).exclusive(),
    case!(a_pod_is_measured_sized_and_limited).stockade_only(SHIM).exclusive(),
    case!(a_workload_is_asked_once_to_stop_and_then_killed).stockade_only(SHIM).exclusive(),
    case!(runtime_handlers_are_told_apart).stockade_only(SHIM).exclusive(),
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
    let update = |memory: i64| {
        let linux = cri::LinuxContainerResources {
            memory_limit_in_bytes: memory,
            cpu_period: 100_000,
            cpu_quota: 50_000,
            ..Default::default()
        };
        let linux = MessageField::some(linux);
        let request =
            cri::UpdateContainerResourcesRequest { container_id: id.clone(), linux, ..Default::default() };
        let _: cri::Empty = pods.ask("UpdateContainerResources", &request);
    };
    update(100 << 20);
    assert_eq!(limit(), "104857600\n50000 100000");
    // More than the pod's limits came to, when it was made.
    let size = || state_of(&pod.id)["vm"]["memory"].as_u64().unwrap();
    let began = size();
    update(700 << 20);
    assert_eq!(limit(), "734003200\n50000 100000");
    assert!(size() > 700 << 20 && began < 700 << 20, "{began}, {}", size());
    let take = "dd if=/dev/zero of=/dev/null bs=500M count=1 2>/dev/null && echo taken";
    assert_eq!(pod.output(&id, take), "taken");
    update(100 << 20);
    assert_eq!(size(), began);
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
