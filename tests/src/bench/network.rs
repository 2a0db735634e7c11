//! What a network costs: starts with one interface, and traffic between a container and the host over a veth pair.
//!
//! The namespace is the same for each runtime, made as CNI's bridge or ptp plug-in would leave it. Everything runs on
//! the lab's one CPU, so a rate on the virtual clock is how many instructions both ends and all that is between
//! them take for a byte or a packet.

use super::exits::Counter;
use super::program;
use super::runtimes::{Bundle, GREETING, Idle, Runtime};
use super::{Context, Plan, lifecycle, probe, result::Results, run_echo};
use serde_json::Value;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

const NAMESPACE: &str = "bench";
const HOST: &str = "10.77.0.1";
const GUEST: &str = "10.77.0.2";
const MIB: f64 = 1024.0 * 1024.0;

/// Bytes of a bulk transfer: a tenth of a second of the virtual clock or more.
const BULK: &str = "128M";
/// Round trips that are timed, after a tenth as many to warm up.
const ROUND_TRIPS: usize = 500;
/// Datagrams that are sent, and the bytes in each.
const DATAGRAMS: (usize, usize) = (20_000, 64);

/// `create` and `start` in a namespace with one interface, and what that adds to the same without a network.
pub fn start(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let _namespace = Namespace::new()?;
    let bundle = Bundle::idle()?.in_namespace(&Namespace::path())?;
    let starts = lifecycle::starts(plan, runtime, &bundle)?;
    let times: Vec<f64> = starts.iter().map(|start| start.create + start.start).collect();
    results.add("create-start-net", &runtime.name, "time", "virtual_s", &times);
    let without = match results.median("create-start", &runtime.name, "time") {
        Some(median) => median,
        None => {
            let mut alone = Results::default();
            lifecycle::create_and_start(plan, runtime, &mut alone)?;
            alone.median("create-start", &runtime.name, "time").unwrap_or_default()
        }
    };
    let added: Vec<f64> = times.iter().map(|time| time - without).collect();
    results.add("create-start-net", &runtime.name, "added", "virtual_s", &added);
    Ok(())
}

/// `run` of `echo` there, from its beginning to its end.
pub fn run(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let _namespace = Namespace::new()?;
    let bundle = Bundle::new(&["echo", GREETING])?.in_namespace(&Namespace::path())?;
    run_echo("run-echo-net", plan, runtime, &bundle, results)
}

/// TCP in both directions, and for a VM what exits a MiB takes.
pub fn throughput(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let idle = InNamespace::start(runtime)?;
    for (metric, direction) in [("out", None), ("in", Some("--reverse"))] {
        let counter = runtime.has_vm.then(|| Counter::new("kvm_exit", "exit_reason")).transpose()?;
        let (mut rates, mut exits) = (Vec::new(), Vec::new());
        // The first warms up.
        for run in 0..=plan.runs {
            let mut words = vec!["iperf3", "--client", HOST, "--bytes", BULK, "--json"];
            words.extend(direction);
            if let Some(counter) = &counter {
                counter.clear()?;
            }
            let report = iperf(&idle.container, &words)?;
            let count = counter.as_ref().map(Counter::read).transpose()?;
            let received = |name: &str| report["end"]["sum_received"][name].as_f64();
            let (Some(bytes), Some(rate)) = (received("bytes"), received("bits_per_second")) else {
                return Err(format!("iperf3 reports no bytes received: {report}"));
            };
            if run > 0 {
                rates.push(rate / 8.0 / MIB);
                let sum = count.map(|count| count.iter().map(|(_, count)| count).sum::<f64>());
                exits.extend(sum.map(|sum| sum / (bytes / MIB)));
            }
        }
        let case = format!("net-tcp-{metric}");
        results.add(&case, &runtime.name, "throughput", "MiB_per_virtual_s", &rates);
        if !exits.is_empty() {
            results.add(&case, &runtime.name, "exits", "per_MiB", &exits);
        }
    }
    Ok(())
}

/// A byte to the host and one back, over TCP.
pub fn latency(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let idle = InNamespace::start(runtime)?;
    let mut times = Vec::new();
    for _ in 0..plan.runs {
        let listener = TcpListener::bind((HOST, 0)).or_say("listen on the host's side")?;
        let address = listener.local_addr().or_say("listen on the host's side")?.to_string();
        let server = std::thread::spawn(move || probe::echo(&listener));
        let words = ["/mnt/stockade-bench", probe::ROLE, &address, &ROUND_TRIPS.to_string()];
        let ended = program::succeed(&mut idle.container.exec(&words))?;
        server.join().map_err(|_| "the echo server failed")?.or_say("answer the container")?;
        let nanoseconds: f64 = ended.stdout.trim().parse().or_say("read the round trips' time")?;
        times.push(nanoseconds / 1e3);
    }
    results.add("net-latency", &runtime.name, "round_trip", "virtual_us", &times);
    Ok(())
}

/// Small datagrams from the container, as fast as it can; those that arrive count.
pub fn packets(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let idle = InNamespace::start(runtime)?;
    let (count, length) = DATAGRAMS;
    let (bytes, length) = ((count * length).to_string(), length.to_string());
    let mut rates = Vec::new();
    for run in 0..=plan.runs {
        let words = ["iperf3", "--client", HOST, "--udp", "--bitrate", "0", "--length", &length];
        let report = iperf(&idle.container, &[&words[..], &["--bytes", &bytes, "--json"]].concat())?;
        let sum = |name: &str| report["end"]["sum"][name].as_f64();
        let (Some(sent), Some(lost), Some(seconds)) = (sum("packets"), sum("lost_packets"), sum("seconds"))
        else {
            return Err(format!("iperf3 reports no packets: {report}"));
        };
        if run > 0 {
            rates.push((sent - lost) / seconds);
        }
    }
    results.add("net-packets", &runtime.name, "rate", "per_virtual_s", &rates);
    Ok(())
}

/// One iperf3 run against a server on the host.
fn iperf(container: &Idle, words: &[&str]) -> Result<Value, String> {
    let _server = Server::start()?;
    let ended = program::succeed(&mut container.exec(words))?;
    serde_json::from_str(&ended.stdout).or_say("read iperf3's report")
}

/// An iperf3 server for one test, which has been told that it listens. Dropping it ends it.
struct Server(Child);

impl Server {
    fn start() -> Result<Server, String> {
        let words = ["--server", "--one-off", "--bind", HOST];
        let child = Command::new("iperf3").args(words).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let server = Server(child.or_say("run iperf3")?);
        // /proc/net/tcp: local address and port in hexadecimal, the state 0A is LISTEN. iperf3 uses 5201.
        let listens = |table: String| table.lines().any(|l| l.contains(":1451 ") && l.contains(" 0A "));
        while !listens(std::fs::read_to_string("/proc/net/tcp").or_say("read /proc/net/tcp")?) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A container with the host's programs, in the namespace.
struct InNamespace<'a> {
    // In the order in which they are to go.
    container: Idle<'a>,
    _bundle: Bundle,
    _namespace: Namespace,
}

impl<'a> InNamespace<'a> {
    fn start(runtime: &'a Runtime) -> Result<Self, String> {
        let namespace = Namespace::new()?;
        let bundle = Bundle::idle()?.in_namespace(&Namespace::path())?.with_host_programs()?;
        let container = Idle::start(runtime, &bundle, "bench-net")?;
        Ok(InNamespace { container, _bundle: bundle, _namespace: namespace })
    }
}

/// A network namespace with one interface whose other end is the host's.
struct Namespace;

impl Namespace {
    fn new() -> Result<Namespace, String> {
        shell("modprobe -a veth tun")?;
        let namespace = Namespace;
        shell(&format!(
            "ip netns add {NAMESPACE} && ip -n {NAMESPACE} link set lo up &&
             ip link add bench0 type veth peer name eth0 netns {NAMESPACE} &&
             ip addr add {HOST}/24 dev bench0 && ip link set bench0 up &&
             ip -n {NAMESPACE} addr add {GUEST}/24 dev eth0 && ip -n {NAMESPACE} link set eth0 up &&
             ip -n {NAMESPACE} route add default via {HOST}"
        ))?;
        Ok(namespace)
    }

    fn path() -> String {
        format!("/run/netns/{NAMESPACE}")
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = shell(&format!("ip netns del {NAMESPACE}"));
    }
}

fn shell(script: &str) -> Result<(), String> {
    program::succeed(Command::new("sh").args(["-c", script])).map(drop)
}
