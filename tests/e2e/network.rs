//! Networks: a container has what its network namespace holds, whoever made it, and everything outside goes on
//! treating it so.

pub mod changes;
pub mod traffic;

use std::fs;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{
    Bundle, Case, Cni, Container, HANG, Id, Netns, Program, Runtime, Stdin, SystemCall, case, host_scratch,
    kill_before, sized, tool, unique, wait_gone,
};

const VM: &str = "what is wired to a VM";

pub const CASES: &[Case] = &[
    case!(addresses_routes_and_neighbours_are_the_same_inside),
    case!(two_interfaces_keep_their_names_and_mtus),
    case!(hosts_and_resolv_conf_are_the_bundles_and_names_resolve),
    case!(bridge_with_mapped_port_serves_outside_and_other_containers),
    case!(ptp_reaches_the_host_with_routes_that_the_plugin_replaced),
    case!(macvlan_reaches_its_neighbours),
    case!(ipvlan_reaches_its_neighbours),
    case!(ports_of_a_user_space_network_are_dialled_within_the_namespace),
    case!(interface_that_comes_between_create_and_start_is_there),
    case!(prestart_hook_fills_a_fresh_namespace_by_pid),
    case!(carrier_inside_follows_the_one_outside).stockade_only(VM),
    case!(a_network_namespace_of_its_own_has_loopback_only_and_the_hosts_is_refused).stockade_only(VM),
    case!(hosts_own_namespace_is_refused).stockade_only(VM),
    case!(interfaces_that_cannot_be_wired_are_named).stockade_only(VM),
    case!(namespace_that_is_gone_first_does_not_keep_a_container),
    case!(a_kill_between_any_two_steps_of_wiring_leaves_nothing_after_delete).stockade_only(VM).exclusive(),
    case!(kills_at_any_moment_leave_nothing_after_delete).stockade_only(VM).exclusive(),
    case!(thirty_containers_leave_nothing_in_the_namespace).exclusive(),
];

/// A container that idles in a namespace, with the host's programs.
#[track_caller]
fn idle_in(netns: &Netns) -> Container {
    let bundle = Bundle::sh("echo ready; exec sleep 100000").host_programs().network(netns);
    let container = Runtime::under_test().create(&bundle);
    container.op("start").ok();
    container.program.expect_line("ready");
    container
}

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("no JSON ({error}): {text}"))
}

/// What `ip -j addr` says of interfaces, without what has to differ: indices, the kind and length of the queue, who is
/// at the other end, how the kind of device words that it is up (the flags say it for all), and whether the kernel is still
/// asking who else has an address, which the guest need not do again. Nor do the runtime's own taps count.
fn addresses(text: &str) -> Value {
    let mut links = json_of(text);
    let is_ours = |link: &Value| link["ifname"].as_str().is_some_and(|name| name.starts_with("stockade"));
    links.as_array_mut().expect("a list").retain(|link| !is_ours(link));
    for link in links.as_array_mut().expect("a list") {
        for word in ["ifindex", "link", "link_index", "link_netnsid", "qdisc", "txqlen", "operstate", "group"]
        {
            link.as_object_mut().expect("an object").remove(word);
        }
        for address in link["addr_info"].as_array_mut().expect("addresses") {
            let address = address.as_object_mut().expect("an object");
            address.retain(|word, _| !["nodad", "tentative", "protocol"].contains(&word.as_str()));
        }
    }
    let mut list = links.as_array().expect("a list").clone();
    list.sort_by_key(|link| link["ifname"].to_string());
    Value::Array(list)
}

fn lines(text: &str) -> Vec<String> {
    let mut lines: Vec<_> = text.lines().map(|line| line.trim().to_owned()).collect();
    lines.sort();
    lines
}

/// Waits until the host's kernel has seen that nobody else has the addresses that it gave: before that they have no
/// routes, and some interfaces get another one then.
fn settle(netns: &Netns) {
    let begin = Instant::now();
    while netns.tool("ip -j addr").contains("tentative") {
        assert!(begin.elapsed() < HANG, "addresses stay tentative");
    }
}

/// Compares inside and outside; returns the container.
#[track_caller]
fn assert_the_same_inside(netns: &Netns) -> Container {
    settle(netns);
    let outside = addresses(&netns.tool("ip -j addr"));
    let routes = ["ip route show table all", "ip -6 route show table all", "ip neigh show nud permanent"];
    let outside_routes = routes.map(|line| lines(&netns.tool(line)));
    let container = idle_in(netns);
    assert_eq!(addresses(&container.exec("ip -j addr").ok()), outside);
    for (line, outside) in routes.iter().zip(outside_routes) {
        assert_eq!(lines(&container.exec(line).ok()), outside, "{line}");
    }
    container
}

fn addresses_routes_and_neighbours_are_the_same_inside() {
    let netns = Netns::with_veth();
    let (name, n) = (&netns.name, netns.number);
    tool(&format!(
        "ip -n {name} link set eth0 mtu 1400 &&
         ip -n {name} addr add 10.66.{n}.77/32 dev eth0 label eth0:x &&
         ip -n {name} route add 192.0.2.0/24 via 10.66.{n}.1 metric 50 mtu 1300 &&
         ip -n {name} route add 198.51.100.0/24 dev eth0 scope link src 10.66.{n}.77 &&
         ip -n {name} route add 203.0.113.7 via 169.254.1.1 dev eth0 onlink &&
         ip -n {name} route add blackhole 203.0.113.8 &&
         ip -n {name} route add 10.99.0.0/16 via 10.66.{n}.1 table 100 &&
         ip -n {name} -6 route add 2001:db8::/32 via fd66:{n}::1 metric 77 &&
         ip -n {name} neigh add 10.66.{n}.50 lladdr 02:00:00:00:00:50 dev eth0 nud permanent"
    ));
    let container = assert_the_same_inside(&netns);
    let (host, n) = (netns.host(), netns.number);
    container.exec(&format!("ping -q -c 2 {host} && ping -q -c 2 fd66:{n}::1")).code(0);
    tool(&format!("ping -q -c 2 {} && ping -q -c 2 fd66:{n}::2", netns.guest()));
}

fn two_interfaces_keep_their_names_and_mtus() {
    let netns = Netns::with_veth();
    let (name, n) = (&netns.name, netns.number);
    // Names that the guest would have given the other way round.
    tool(&format!(
        "ip -n {name} link set eth0 down && ip -n {name} link set eth0 name eth1 &&
         ip -n {name} link set eth1 up &&
         ip link add w-{n} mtu 9000 type veth peer name eth0 mtu 9000 netns {name} &&
         ip addr add 10.67.{n}.1/24 dev w-{n} && ip link set w-{n} up &&
         ip -n {name} addr add 10.67.{n}.2/24 dev eth0 && ip -n {name} link set eth0 up"
    ));
    let container = assert_the_same_inside(&netns);
    // A datagram that goes over the wire in one piece at this MTU only.
    container.exec(&format!("ping -q -c 1 -M do -s 8972 10.67.{n}.1")).code(0);
    container.exec(&format!("ping -q -c 1 -M do -s 1472 10.66.{n}.1")).code(0);
    container.exec(&format!("ping -q -c 1 -M do -s 1473 10.66.{n}.1")).code(1);
}

fn hosts_and_resolv_conf_are_the_bundles_and_names_resolve() {
    let netns = Netns::with_veth();
    let dir = host_scratch();
    let (hosts, resolv) = (dir.path().join("hosts"), dir.path().join("resolv.conf"));
    fs::write(&hosts, format!("{} gateway\n", netns.host())).unwrap();
    fs::write(&resolv, format!("nameserver {}\n", netns.host())).unwrap();
    let mut dnsmasq = std::process::Command::new("dnsmasq");
    let address = netns.host();
    dnsmasq.args([
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--bind-interfaces",
    ]);
    dnsmasq.args(["--user=root", "--pid-file", "--log-facility=-", "--log-queries"]);
    dnsmasq.args([&format!("--listen-address={address}"), "--except-interface=lo"]);
    dnsmasq.arg("--address=/name.in.the.lab/192.0.2.55");
    let dns = Program::spawn(dnsmasq, Stdin::Null);
    dns.stderr_line();

    let bundle = Bundle::sh("echo ready; exec sleep 100000")
        .host_programs()
        .network(&netns)
        .bind(&hosts, "/etc/hosts", &["ro"])
        .bind(&resolv, "/etc/resolv.conf", &["ro"]);
    let container = Runtime::under_test().create(&bundle);
    container.op("start").ok();
    container.program.expect_line("ready");
    assert!(container.exec("getent hosts gateway").ok().starts_with(&netns.host()));
    assert!(container.exec("getent hosts name.in.the.lab").ok().starts_with("192.0.2.55"));
    fs::write(&hosts, "192.0.2.1 newcomer\n").unwrap();
    assert!(container.exec("getent hosts newcomer").ok().starts_with("192.0.2.1"));
}

fn bridge_config(n: u32) -> Value {
    json!({
        "name": format!("net{n}"), "type": "bridge", "bridge": format!("br-{n}"), "isGateway": true,
        "ipMasq": true, "hairpinMode": true,
        "ipam": {
            "type": "host-local", "ranges": [[{"subnet": format!("10.68.{n}.0/24")}], [{"subnet": format!("fd68:{n}::/64")}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            "dataDir": format!("/tmp/e2e-cni-{n}"),
        }
    })
}

/// Answers every connection to a port with a line, until it is dropped.
fn serve(container: &Container, port: u16, kind: &str, line: &str) -> Program {
    let listen = format!("{kind}-LISTEN:{port},reuseaddr,fork");
    let server = container.start_exec(
        &[],
        &["socat", "-d", "-d", &listen, &format!("SYSTEM:echo {line}")],
        Stdin::Null,
    );
    while !server.stderr_line().contains("listening") {}
    server
}

fn bridge_with_mapped_port_serves_outside_and_other_containers() {
    let n = unique();
    let (one, two) = (Netns::new(), Netns::new());
    let mapped = 20_000 + n as u16;
    let portmap = json!({
        "name": format!("net{n}"), "type": "portmap", "capabilities": {"portMappings": true},
        "runtimeConfig": {"portMappings": [{"hostPort": mapped, "containerPort": 80, "protocol": "tcp"}]}
    });
    let firewall = json!({"name": format!("net{n}"), "type": "firewall", "backend": "iptables"});
    let cni_one = Cni::add(&one, "eth0", vec![bridge_config(n), portmap, firewall]);
    let cni_two = Cni::add(&two, "eth0", vec![bridge_config(n)]);
    // Another address of the host: the one under which outsiders know it.
    tool(&format!(
        "ip link add d-{n} type dummy && ip addr add 10.69.{n}.1/32 dev d-{n} && ip link set d-{n} up"
    ));
    let container_one = idle_in(&one);
    let container_two = idle_in(&two);

    let serve_pages = "echo served > /tmp/index.html && exec busybox httpd -f -p 80 -h /tmp";
    let _http = container_one.start_exec(&[], &["sh", "-c", serve_pages], Stdin::Null);
    let get = "curl -s --retry 50 --retry-connrefused --retry-delay 1";
    assert_eq!(tool(&format!("{get} http://10.69.{n}.1:{mapped}/")), "served\n");
    assert_eq!(tool(&format!("{get} http://{}/", cni_one.address())), "served\n");
    let from_two = container_two.exec(&format!("{get} http://{}/", cni_one.address()));
    assert_eq!(from_two.ok(), "served\n");
    let six = cni_one.result["ips"][1]["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
    container_two.exec(&format!("ping -q -c 2 {six}")).code(0);

    let _udp = serve(&container_two, 5353, "UDP", "datagram");
    let ask = format!("echo ask | socat -t 20 - UDP:{}:5353 | head -n 1", cni_two.address());
    assert_eq!(container_one.exec(&ask).ok(), "datagram\n");
    assert_eq!(tool(&ask), "datagram\n");
    drop((container_one, container_two, cni_one, cni_two));
    tool(&format!("ip link del d-{n}; ip link del br-{n}; rm -r /tmp/e2e-cni-{n}"));
}

fn ptp_reaches_the_host_with_routes_that_the_plugin_replaced() {
    let n = unique();
    let netns = Netns::new();
    let config = json!({
        "name": format!("ptp{n}"), "type": "ptp", "ipMasq": true, "mtu": 1400,
        "ipam": {
            "type": "host-local", "subnet": format!("10.70.{n}.0/24"), "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": format!("/tmp/e2e-cni-{n}"),
        }
    });
    let cni = Cni::add(&netns, "eth0", vec![config]);
    let container = assert_the_same_inside(&netns);
    container.exec(&format!("ping -q -c 2 10.70.{n}.1")).code(0);
    let _server = serve(&container, 7000, "TCP", "over ptp");
    assert_eq!(tool(&format!("socat -u TCP:{}:7000 -", cni.address())), "over ptp\n");
    drop((container, cni));
    tool(&format!("rm -r /tmp/e2e-cni-{n}"));
}

/// A link of the host and what is at its other end, 10.71.N.1 in a namespace of its own.
fn outside_world(n: u32) -> Netns {
    let world = Netns::new();
    let name = &world.name;
    tool(&format!(
        "ip link add up-{n} type veth peer name far netns {name} && ip link set up-{n} up &&
         ip -n {name} addr add 10.71.{n}.1/24 dev far && ip -n {name} link set far up"
    ));
    world
}

fn reaches_its_neighbours(kind: &str, mode: &str) {
    let n = unique();
    let (world, netns) = (outside_world(n), Netns::new());
    let config = json!({
        "name": format!("{kind}{n}"), "type": kind, "master": format!("up-{n}"), "mode": mode,
        "ipam": {
            "type": "host-local", "subnet": format!("10.71.{n}.0/24"), "rangeStart": format!("10.71.{n}.10"),
            "dataDir": format!("/tmp/e2e-cni-{n}"),
        }
    });
    let cni = Cni::add(&netns, "eth0", vec![config]);
    let container = assert_the_same_inside(&netns);
    container.exec(&format!("ping -q -c 2 10.71.{n}.1")).code(0);
    world.tool(&format!("ping -q -c 2 {}", cni.address()));
    let _server = serve(&container, 7000, "TCP", "hello");
    assert_eq!(world.tool(&format!("socat -u TCP:{}:7000 -", cni.address())), "hello\n");
    drop((container, cni));
    tool(&format!("rm -r /tmp/e2e-cni-{n}"));
}

fn macvlan_reaches_its_neighbours() {
    reaches_its_neighbours("macvlan", "bridge");
}

fn ipvlan_reaches_its_neighbours() {
    reaches_its_neighbours("ipvlan", "l2");
}

fn ports_of_a_user_space_network_are_dialled_within_the_namespace() {
    let netns = Netns::new();
    let (name, n) = (&netns.name, netns.number);
    // As slirp4netns has it; its port handler dials this address, others 127.0.0.1.
    tool(&format!(
        "ip -n {name} tuntap add mode tap name tap0 && ip -n {name} addr add 10.72.{n}.100/24 dev tap0 &&
         ip -n {name} link set tap0 up"
    ));
    let container = idle_in(&netns);
    let own = format!("10.72.{n}.100");
    let _anywhere = serve(&container, 7000, "TCP4", "hello");
    let server = format!("TCP4-LISTEN:7001,bind={own},reuseaddr,fork");
    let own_only = container.start_exec(&[], &["socat", "-d", "-d", &server, "SYSTEM:cat"], Stdin::Null);
    while !own_only.stderr_line().contains("listening") {}
    for address in ["127.0.0.1", &own] {
        assert_eq!(netns.tool(&format!("socat -u TCP4:{address}:7000 -")), "hello\n", "{address}");
    }
    let echo = format!("seq 100000 | ip netns exec {name} socat -t 60 - TCP4:{own}:7001 | tail -n 1");
    assert_eq!(tool(&echo), "100000\n");
    for closed in ["127.0.0.1:7001", "127.0.0.1:7002", &format!("{own}:7002")] {
        let dial = format!("ip netns exec {name} curl -sS --max-time 100 http://{closed}/ 2>&1 || true");
        let refused = tool(&dial);
        assert!(refused.contains("refused") || refused.contains("reset"), "{closed}: {refused}");
    }
}

fn interface_that_comes_between_create_and_start_is_there() {
    let netns = Netns::new();
    let bundle = Bundle::sh("ip -j addr; echo; exec sleep 100000").host_programs().network(&netns);
    let container = Runtime::under_test().create(&bundle);
    let (name, n) = (&netns.name, netns.number);
    tool(&format!(
        "ip link add v-{n} type veth peer name late0 netns {name} && ip addr add 10.66.{n}.1/24 dev v-{n} &&
         ip link set v-{n} up && ip -n {name} addr add 10.66.{n}.2/24 dev late0 && ip -n {name} link set late0 up &&
         ip -n {name} route add default via 10.66.{n}.1"
    ));
    let outside = addresses(&netns.tool("ip -j addr"));
    container.op("start").ok();
    assert_eq!(addresses(&container.program.line()), outside);
    container.exec(&format!("ping -q -c 2 10.66.{n}.1")).code(0);
    tool(&format!("ping -q -c 2 10.66.{n}.2"));
}

fn prestart_hook_fills_a_fresh_namespace_by_pid() {
    let n = unique();
    tool("modprobe tun");
    // What Docker's hook does: finds the namespace by the pid in the state, and fills it.
    let script = format!(
        r#"pid=$(sed 's/.*"pid": *\([0-9]*\).*/\1/') && [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/self/ns/net)" ] &&
           ip link add v-{n} type veth peer name eth0 netns $pid && ip addr add 10.66.{n}.1/24 dev v-{n} && ip link set v-{n} up &&
           nsenter -t $pid -n ip addr add 10.66.{n}.2/24 dev eth0 && nsenter -t $pid -n ip link set eth0 up"#
    );
    let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]});
    let bundle = Bundle::sh("echo ready; exec sleep 100000")
        .host_programs()
        .capability("CAP_NET_RAW")
        .push("/hooks/prestart", hook);
    let container = Runtime::under_test().create(&bundle);
    container.op("start").ok();
    container.program.expect_line("ready");
    container.exec(&format!("ping -q -c 2 10.66.{n}.1")).code(0);
    // Who looks at the container's process finds its network, as with any runtime.
    let seen = tool(&format!("nsenter -t {} -n ip -br addr show eth0", container.pid()));
    assert!(seen.contains(&format!("10.66.{n}.2")), "{seen}");
}

fn carrier_inside_follows_the_one_outside() {
    let netns = Netns::with_veth();
    let container = idle_in(&netns);
    let n = netns.number;
    let wait_for = |carrier: &str| {
        let script = format!("until [ \"$(cat /sys/class/net/eth0/carrier)\" = {carrier} ]; do :; done");
        container.exec(&script).ok();
    };
    wait_for("1");
    tool(&format!("ip link set v-{n} down"));
    wait_for("0");
    tool(&format!("ip link set v-{n} up"));
    wait_for("1");
    container.exec(&format!("ping -q -c 2 {}", netns.host())).code(0);
}

fn a_network_namespace_of_its_own_has_loopback_only_and_the_hosts_is_refused() {
    let bundle = Bundle::sh("ls /sys/class/net").without_namespace("network");
    let reason = Runtime::under_test().run(&bundle).refused();
    assert!(reason.contains("linux.namespaces") && reason.contains("host's network"), "{reason}");
    assert_eq!(Runtime::under_test().run(&Bundle::sh("ls /sys/class/net")).ok(), "lo\n");
}

fn hosts_own_namespace_is_refused() {
    let bundle = Bundle::sh("true");
    for path in ["/proc/self/ns/net", "/proc/1/ns/net"] {
        let namespaces =
            json!([{"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "network", "path": path}]);
        let bundle = Bundle::sh("true").set("/linux/namespaces", namespaces);
        let reason = Runtime::under_test().run(&bundle).refused();
        assert!(reason.contains("network") && reason.contains("host"), "{reason}");
    }
    let missing = json!([{"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "network", "path": "/run/netns/none"}]);
    let reason = Runtime::under_test().run(&bundle.set("/linux/namespaces", missing)).refused();
    assert!(reason.contains("/run/netns/none"), "{reason}");
}

fn interfaces_that_cannot_be_wired_are_named() {
    let refused = |set_up: &str, word: &str| {
        let netns = Netns::new();
        tool(&set_up.replace("NS", &netns.name));
        let before = netns.traces();
        let reason = Runtime::under_test().run(&Bundle::sh("true").network(&netns)).refused();
        assert!(reason.contains(word) && reason.lines().count() == 1, "{reason}");
        assert_eq!(netns.traces(), before, "after a refusal");
    };
    refused("ip -n NS tuntap add mode tun name tun7 && ip -n NS link set tun7 up", "tun7");
    refused(
        "ip -n NS link add eth0 type dummy && ip -n NS link add link eth0 name eth0.5 type vlan id 5",
        "eth0.5",
    );
    refused("ip -n NS link add eth0 type dummy && tc -n NS qdisc add dev eth0 clsact", "eth0");
    refused("for i in 0 1 2 3 4; do ip -n NS link add many$i type dummy; done", "many4");
    refused("ip -n NS link add eth0 type dummy && ip -n NS rule add from 10.0.0.1 table 77", "ip rule");
}

fn namespace_that_is_gone_first_does_not_keep_a_container() {
    let netns = Netns::with_veth();
    let container = idle_in(&netns);
    netns.remove();
    let pid = container.pid();
    container.kill("KILL");
    container.wait_stopped(pid);
    container.delete();
}

/// A step that changes the namespace: a tap is made, or something is asked of rtnetlink that is no question.
fn wires(call: &SystemCall) -> bool {
    // TUNSETIFF (linux/if_tun.h)
    let makes_tap = call.number == libc::SYS_ioctl && call.arguments[1] as u32 == 0x4004_54ca;
    if call.number != libc::SYS_sendto {
        return makes_tap;
    }
    // RTM_NEWLINK, SETLINK, NEWQDISC, DELQDISC, NEWTFILTER (linux/rtnetlink.h), after the length in a netlink header
    let header = call.memory(call.arguments[1], 6);
    [16, 19, 36, 37, 44].contains(&u16::from_ne_bytes([header[4], header[5]]))
}

fn a_kill_between_any_two_steps_of_wiring_leaves_nothing_after_delete() {
    let netns = Netns::with_veth();
    let before = netns.traces();
    let mut steps = 0;
    loop {
        let (runtime, id) = (Runtime::under_test(), Id::new());
        let bundle = Bundle::sh("true").network(&netns);
        let killed = kill_before(runtime.run_command(&bundle, &id), steps, wires);
        if !killed {
            break;
        }
        runtime.call(&["delete", "--force", id.as_str()]).code(0);
        assert_eq!(netns.traces(), before, "killed before step {steps}");
        steps += 1;
    }
    assert_eq!(netns.traces(), before, "not killed");
    // A tap, its MTU and that it is up, a qdisc and a filter at each end, and one of them taken back.
    assert!(steps >= 8, "only {steps} steps were seen");
}

fn kills_at_any_moment_leave_nothing_after_delete() {
    let netns = Netns::with_veth();
    let before = netns.traces();
    // Of a container that runs.
    let container = idle_in(&netns);
    let pid = container.pid();
    assert_ne!(netns.traces(), before, "it is not wired");
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    wait_gone(pid);
    container.delete();
    assert_eq!(netns.traces(), before);
    // And of one that is being made: the moments are spread over what a creation takes.
    for moment in 0..6u64 {
        let bundle = Bundle::idle().network(&netns);
        let mut container = Runtime::under_test().start(&bundle, Stdin::Null);
        let limit = std::time::Duration::from_millis(300 * moment);
        if !container.program.ended_within(limit) {
            kill(Pid::from_raw(container.program.pid()), Signal::SIGKILL).unwrap();
        }
        container.program.exit();
        container.op_with(&["delete", "--force"], &[]).code(0);
        assert_eq!(netns.traces(), before, "killed after {limit:?}");
    }
    // The namespace is as good as new.
    let container = idle_in(&netns);
    container.exec(&format!("ping -q -c 1 {}", netns.host())).code(0);
}

fn thirty_containers_leave_nothing_in_the_namespace() {
    let netns = Netns::with_veth();
    let before = netns.traces();
    for _ in 0..sized(30, 200) {
        let container = Runtime::under_test().create(&Bundle::idle().network(&netns));
        container.op_with(&["delete", "--force"], &[]).ok();
        assert_eq!(netns.traces(), before);
    }
}
