//! Network namespaces and interfaces, made with the host's own tools as plug-ins and people make them.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

/// Where Debian has the CNI plug-ins.
const PLUGINS: &str = "/usr/lib/cni";

/// A number that no other case uses in its names and addresses: from 1, and below 200.
pub fn unique() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Runs a tool of the host, which must do well; gives what it wrote.
#[track_caller]
pub fn tool(line: &str) -> String {
    static MODULES: Once = Once::new();
    // As a host has loaded that uses namespaces. The last brings an interface along unless it is told not to.
    MODULES.call_once(|| {
        let _ = Command::new("modprobe").args(["-a", "veth", "bridge", "tun"]).status();
        let _ = Command::new("modprobe").args(["dummy", "numdummies=0"]).status();
    });
    let output = Command::new("sh").args(["-c", line]).output().expect("run a shell");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`{line}`: {}\n{text}{errors}", output.status);
    text
}

/// A named network namespace. Dropping it removes it, and the interfaces in it.
pub struct Netns {
    /// Its name.
    pub name: String,
    /// A number of its own.
    pub number: u32,
}

impl Netns {
    /// An empty one, with its loopback interface up.
    #[track_caller]
    pub fn new() -> Self {
        let number = unique();
        let name = format!("e2e-{number}");
        tool(&format!("ip netns add {name} && ip -n {name} link set lo up"));
        Self { name, number }
    }

    /// One with `eth0` that has 10.66.N.2/24 and fd66:N::2/64; the host has .1 and ::1 at the other end, `v-N`.
    #[track_caller]
    pub fn with_veth() -> Self {
        let ns = Self::new();
        let (name, n) = (&ns.name, ns.number);
        tool(&format!(
            "ip link add v-{n} type veth peer name eth0 netns {name} &&
             ip addr add 10.66.{n}.1/24 dev v-{n} && ip addr add fd66:{n}::1/64 dev v-{n} nodad &&
             ip link set v-{n} up &&
             ip -n {name} addr add 10.66.{n}.2/24 dev eth0 &&
             ip -n {name} addr add fd66:{n}::2/64 dev eth0 nodad &&
             ip -n {name} link set eth0 up &&
             ip -n {name} route add default via 10.66.{n}.1 &&
             ip -n {name} -6 route add default via fd66:{n}::1"
        ));
        ns
    }

    /// The host's address there, of [`Self::with_veth`].
    pub fn host(&self) -> String {
        format!("10.66.{}.1", self.number)
    }

    /// The container's address there.
    pub fn guest(&self) -> String {
        format!("10.66.{}.2", self.number)
    }

    /// Where bundles find it.
    pub fn path(&self) -> PathBuf {
        format!("/run/netns/{}", self.name).into()
    }

    /// Runs a tool in it.
    #[track_caller]
    pub fn tool(&self, line: &str) -> String {
        tool(&format!("ip netns exec {} {line}", self.name))
    }

    /// What a runtime may have left in it: interfaces and what is at their ingress.
    #[track_caller]
    pub fn traces(&self) -> Vec<String> {
        let links: Value = serde_json::from_str(&self.tool("ip -j link")).expect("JSON of ip");
        let links = links.as_array().expect("a list of interfaces");
        let links = links.iter().map(|link| link["ifname"].as_str().unwrap_or_default().to_owned());
        let qdiscs = self.tool("tc qdisc");
        let ingress = qdiscs.lines().filter(|line| line.contains("ingress") || line.contains("clsact"));
        links.chain(ingress.map(str::to_owned)).collect()
    }

    /// Removes it, whatever is still in it.
    #[track_caller]
    pub fn remove(&self) {
        tool(&format!("ip netns del {}", self.name));
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).stderr(Stdio::null()).status();
    }
}

/// A chain of CNI plug-ins for one container. Dropping it has them take everything back.
pub struct Cni {
    chain: Vec<Value>,
    netns: PathBuf,
    interface: String,
    id: String,
    /// What the last plug-in said: addresses, routes, DNS.
    pub result: Value,
}

impl Cni {
    /// Has each plug-in add what its configuration says, each with the result of the one before.
    #[track_caller]
    pub fn add(netns: &Netns, interface: &str, chain: Vec<Value>) -> Self {
        let mut cni = Self {
            chain,
            netns: netns.path(),
            interface: interface.into(),
            id: format!("e2e{}", unique()),
            result: Value::Null,
        };
        for index in 0..cni.chain.len() {
            let (said, success) = cni.call("ADD", index);
            assert!(success, "CNI ADD of {}: {said}", cni.chain[index]);
            cni.result = serde_json::from_str(&said).expect("JSON of a plug-in");
        }
        cni
    }

    /// The container's first address.
    pub fn address(&self) -> String {
        let address = self.result["ips"][0]["address"].as_str().expect("an address");
        address.split('/').next().unwrap_or_default().to_owned()
    }

    fn call(&self, command: &str, index: usize) -> (String, bool) {
        let mut config = self.chain[index].clone();
        config["cniVersion"] = json!("0.4.0");
        if !self.result.is_null() {
            config["prevResult"] = self.result.clone();
        }
        let kind = config["type"].as_str().expect("a plug-in's type").to_owned();
        let mut child = Command::new(format!("{PLUGINS}/{kind}"))
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.id)
            .env("CNI_NETNS", &self.netns)
            .env("CNI_IFNAME", &self.interface)
            .env("CNI_PATH", PLUGINS)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run the CNI plug-in {kind}: {error}"));
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin.write_all(config.to_string().as_bytes()).expect("write to the plug-in");
        drop(stdin);
        let output = child.wait_with_output().expect("wait for the plug-in");
        (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.success())
    }
}

impl Drop for Cni {
    fn drop(&mut self) {
        for index in (0..self.chain.len()).rev() {
            let _ = self.call("DEL", index);
        }
    }
}
