//! Interfaces, addresses and routes that come, go or change while a container runs, as engines do that to connect one to
//! a further network: what is outside is inside, soon after.

use std::fs;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{addresses, idle_in, lines, settle};
use crate::harness::{
    Bundle, Case, Container, HANG, Netns, Runtime, case, host_scratch, sized, tool, wait_gone,
};

const VM: &str = "what is wired to a VM";

pub const CASES: &[Case] = &[
    case!(interface_added_to_a_running_container_carries_traffic),
    case!(interface_removed_from_a_running_container_is_gone_and_may_come_again),
    case!(interface_replaced_by_its_like_goes_on),
    case!(addresses_routes_and_states_changed_outside_change_inside),
    case!(what_a_workload_did_to_its_network_outlasts_changes_of_something_else).stockade_only(VM),
    case!(an_interface_too_many_is_named_in_the_log_and_waits_for_room).stockade_only(VM),
    case!(a_storm_of_changes_ends_with_what_is_there),
    case!(a_supervisor_killed_after_changes_leaves_nothing_after_delete).stockade_only(VM),
];

/// Adds `name` to a namespace, with 10.(66+k).N.2/24 and an IPv6 address; the host has .1 at the other end, `wk-N`.
fn add(netns: &Netns, name: &str, k: u32, more: &str) {
    let (ns, n, net) = (&netns.name, netns.number, 66 + k);
    tool(&format!(
        "ip link add w{k}-{n} type veth peer name {name} {more} netns {ns} && ip addr add 10.{net}.{n}.1/24 dev w{k}-{n} &&
         ip addr add fd{net}:{n}::1/64 dev w{k}-{n} nodad && ip link set w{k}-{n} up &&
         ip -n {ns} addr add 10.{net}.{n}.2/24 dev {name} && ip -n {ns} addr add fd{net}:{n}::2/64 dev {name} nodad &&
         ip -n {ns} link set {name} up"
    ));
}

/// Waits until inside is what is outside, but for the runtime's own taps there.
#[track_caller]
fn wait_for_the_same(netns: &Netns, container: &Container) {
    const LOOK: &str = "ip -j addr && echo && ip route show table all && ip -6 route show table all && \
                        ip neigh show nud permanent";
    let seen = |text: &str| {
        let (links, rest) = text.split_once('\n').expect("lines");
        let rest: Vec<_> = lines(rest).into_iter().filter(|line| !line.contains("stockade")).collect();
        (addresses(links), rest)
    };
    settle(netns);
    let begin = Instant::now();
    loop {
        let outside = seen(&netns.tool(&format!("sh -c '{LOOK}'")));
        let inside = seen(&container.exec(LOOK).ok());
        if inside == outside {
            return;
        }
        assert!(begin.elapsed() < HANG / 2, "inside it stays {inside:#?},\noutside it is {outside:#?}");
    }
}

/// Frames go both ways over the interface of [`add`].
#[track_caller]
fn assert_carries(netns: &Netns, container: &Container, k: u32) {
    let (n, net) = (netns.number, 66 + k);
    container.exec(&format!("ping -q -c 2 -W 20 10.{net}.{n}.1")).code(0);
    tool(&format!("ping -q -c 2 -W 20 10.{net}.{n}.2"));
}

fn interface_added_to_a_running_container_carries_traffic() {
    let netns = Netns::with_veth();
    let container = idle_in(&netns);
    add(&netns, "eth1", 1, "address 02:00:00:00:42:01 mtu 1400");
    wait_for_the_same(&netns, &container);
    assert_carries(&netns, &container, 1);
    assert_carries(&netns, &container, 0);
    // One that nobody has given an address yet.
    tool(&format!("ip link add w2-{} type veth peer name bare0 netns {}", netns.number, netns.name));
    wait_for_the_same(&netns, &container);
    container.op_with(&["delete", "--force"], &[]).ok();
    assert_nothing_left(&netns);
}

fn interface_removed_from_a_running_container_is_gone_and_may_come_again() {
    let netns = Netns::with_veth();
    add(&netns, "eth1", 1, "");
    let container = idle_in(&netns);
    let n = netns.number;
    for _ in 0..2 {
        tool(&format!("ip link del w1-{n}"));
        wait_for_the_same(&netns, &container);
        container.exec("test ! -e /sys/class/net/eth1").code(0);
        assert_carries(&netns, &container, 0);
        // With another address of its own each time.
        add(&netns, "eth1", 1, "");
        wait_for_the_same(&netns, &container);
        assert_carries(&netns, &container, 1);
    }
    // The first and the last too, and then none is left.
    tool(&format!("ip link del v-{n} && ip link del w1-{n}"));
    wait_for_the_same(&netns, &container);
    add(&netns, "eth0", 1, "");
    wait_for_the_same(&netns, &container);
    assert_carries(&netns, &container, 1);
}

fn interface_replaced_by_its_like_goes_on() {
    let netns = Netns::new();
    let n = netns.number;
    let like = "address 02:00:00:00:42:07";
    add(&netns, "eth0", 1, like);
    let container = idle_in(&netns);
    assert_carries(&netns, &container, 1);
    // As `podman network reload` does it.
    tool(&format!("ip link del w1-{n}"));
    add(&netns, "eth0", 1, like);
    wait_for_the_same(&netns, &container);
    assert_carries(&netns, &container, 1);
    // What a driver asks for only once: the address, and the largest MTU.
    tool(&format!("ip -n {ns} link set eth0 address 02:00:00:00:42:08", ns = netns.name));
    wait_for_the_same(&netns, &container);
    assert_carries(&netns, &container, 1);
    tool(&format!("ip link set w1-{n} mtu 9000; ip -n {} link set eth0 mtu 9000", netns.name));
    wait_for_the_same(&netns, &container);
    container.exec(&format!("ping -q -c 2 -W 20 -M do -s 8972 10.67.{n}.1")).code(0);
}

fn addresses_routes_and_states_changed_outside_change_inside() {
    let netns = Netns::with_veth();
    let container = idle_in(&netns);
    let (ns, n) = (&netns.name, netns.number);
    let change = |script: &str| {
        for line in script.lines().map(str::trim) {
            tool(&format!("ip -n {ns} {line}"));
        }
        wait_for_the_same(&netns, &container);
    };
    change(&format!(
        "addr add 10.80.{n}.5/24 dev eth0
         route add 192.0.2.0/24 via 10.80.{n}.1 metric 50
         -6 route add 2001:db8::/32 via fd66:{n}::1 metric 77
         neigh add 10.66.{n}.50 lladdr 02:00:00:00:00:50 dev eth0 nud permanent"
    ));
    change(&format!(
        "neigh del 10.66.{n}.50 dev eth0
         route del 192.0.2.0/24
         addr del 10.80.{n}.5/24 dev eth0
         -6 route del 2001:db8::/32
         route replace default via 10.66.{n}.9
         link set eth0 mtu 1300"
    ));
    change("link set eth0 down");
    change(&format!(
        "link set eth0 name lan0
         link set lan0 up
         route replace default via 10.66.{n}.1
         addr add fd66:{n}::2/64 dev lan0 nodad"
    ));
    assert_carries(&netns, &container, 0);
}

fn what_a_workload_did_to_its_network_outlasts_changes_of_something_else() {
    let netns = Netns::with_veth();
    let bundle = Bundle::sh("echo ready; exec sleep 100000")
        .host_programs()
        .capability("CAP_NET_ADMIN")
        .capability("CAP_NET_RAW")
        .network(&netns);
    let container = Runtime::under_test().create(&bundle);
    container.op("start").ok();
    container.program.expect_line("ready");
    let n = netns.number;
    let own = "ip addr add 198.51.100.1/24 dev eth0 && ip route del default && ip route add 203.0.113.0/24 dev eth0";
    container.exec(own).ok();
    add(&netns, "eth1", 1, "");
    let arrived =
        format!("until ip -4 addr show dev eth1 2>/dev/null | grep -q 10.67.{n}.2; do :; done; ip route");
    let routes = container.exec(&arrived).ok();
    for (line, there) in [("198.51.100.0/24", true), ("203.0.113.0/24", true), ("default", false)] {
        assert_eq!(routes.contains(line), there, "{line} in {routes}");
    }
    assert_carries(&netns, &container, 1);
    // A device that the workload has taken for itself goes with its interface all the same.
    container.exec("ip link set eth1 down && ip link set eth1 name mine && ip link set mine address 02:00:00:00:42:02").ok();
    tool(&format!("ip link del w1-{n}"));
    container.exec("while ip link show mine 2>/dev/null; do :; done").ok();
}

fn an_interface_too_many_is_named_in_the_log_and_waits_for_room() {
    let netns = Netns::with_veth();
    let dir = host_scratch();
    let log = dir.path().join("log");
    let runtime = Runtime::under_test().global(&["--log", log.to_str().unwrap()]);
    let bundle = Bundle::sh("echo ready; exec sleep 100000").host_programs().network(&netns);
    let container = runtime.create(&bundle);
    container.op("start").ok();
    container.program.expect_line("ready");
    let (ns, n) = (&netns.name, netns.number);
    // Five at once beside the first one.
    let all: String =
        (1..=5).map(|k| format!("link add w{k}-{n} type veth peer name eth{k} netns {ns}\n")).collect();
    fs::write(dir.path().join("batch"), all).unwrap();
    tool(&format!("ip -batch {}", dir.path().join("batch").display()));
    let count = |wanted: usize| {
        container.exec(&format!("until [ $(ls /sys/class/net | grep -c eth) = {wanted} ]; do :; done")).ok()
    };
    count(4);
    let begin = Instant::now();
    let named = |log: &str| log.lines().any(|line| line.contains("at most 4") && line.contains("eth5"));
    while !named(&fs::read_to_string(&log).unwrap()) {
        assert!(begin.elapsed() < HANG, "not in the log: {}", fs::read_to_string(&log).unwrap());
    }
    assert_carries(&netns, &container, 0);
    tool(&format!("ip link del w1-{n} && ip link del w2-{n} && ip link del w3-{n}"));
    container.exec("until [ -e /sys/class/net/eth4 ] && [ -e /sys/class/net/eth5 ]; do :; done").ok();
    wait_for_the_same(&netns, &container);
    let complaints = fs::read_to_string(&log).unwrap();
    assert!(complaints.lines().count() < 20, "{complaints}");
}

fn a_storm_of_changes_ends_with_what_is_there() {
    let netns = Netns::with_veth();
    let container = idle_in(&netns);
    let dir = host_scratch();
    let n = netns.number;
    let round = format!(
        "link add storm type dummy\nlink set storm up\naddr add 192.0.2.1/24 dev storm\n\
         addr add 10.81.{n}.5/24 dev eth0\nroute add 198.51.100.0/24 via 10.66.{n}.1\n\
         addr del 10.81.{n}.5/24 dev eth0\nroute del 198.51.100.0/24\nlink del storm\n"
    );
    fs::write(dir.path().join("batch"), round.repeat(sized(100, 2000))).unwrap();
    let storm = format!("ip -n {} -batch {}", netns.name, dir.path().join("batch").display());
    std::thread::scope(|scope| {
        let storm = scope.spawn(|| tool(&storm));
        // Meanwhile it answers.
        container.exec("echo $((6 * 7))").ok();
        storm.join().unwrap();
    });
    wait_for_the_same(&netns, &container);
    assert_carries(&netns, &container, 0);
}

fn a_supervisor_killed_after_changes_leaves_nothing_after_delete() {
    let netns = Netns::with_veth();
    let container = idle_in(&netns);
    let n = netns.number;
    add(&netns, "eth1", 1, "");
    wait_for_the_same(&netns, &container);
    // One that was there from the beginning has gone by then.
    tool(&format!("ip link del v-{n}"));
    wait_for_the_same(&netns, &container);
    let pid = container.pid();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    wait_gone(pid);
    container.delete();
    assert_nothing_left(&netns);
}

#[track_caller]
fn assert_nothing_left(netns: &Netns) {
    let traces = netns.traces();
    assert!(traces.iter().any(|line| line == "eth1"), "{traces:?}");
    assert!(!traces.iter().any(|line| line.contains("stockade") || line.contains("ingress")), "{traces:?}");
}
