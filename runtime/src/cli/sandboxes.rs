//! `stockade sandboxes`: all VMs of this host, whoever started them, with the pods that they are.
//!
//! Commands keep a sandbox's state below `--root`, shims below a directory of their own; here both are looked through.

use std::fs;

use clap::Args;
use serde::Serialize;

use super::list::columns;
use super::{Error, Global, Outcome, print};
use crate::process::ProcessId;
use crate::shim;
use crate::state::{self, State, StateDir};

const HEADER: [&str; 8] = ["SANDBOX", "NAMESPACE", "POD", "STATUS", "VCPUS", "MEMORY", "USED", "CREATED"];
/// A pod's namespace and name, by containerd's CRI plug-in and by CRI-O.
const POD: [[&str; 2]; 2] = [
    ["io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri.sandbox-name"],
    ["io.kubernetes.pod.namespace", "io.kubernetes.pod.name"],
];

/// List the VMs of this host, with the pods that they are and the memory that they take
#[derive(Args)]
pub struct Sandboxes {
    /// table or json
    #[arg(long, short, default_value = "table", value_parser = ["table", "json"])]
    format: String,
}

/// One of them.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Shown {
    pub id: String,
    /// containerd's, if a shim started it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// NAMESPACE/NAME.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    pub status: state::Status,
    pub pid: i32,
    pub vcpus: u8,
    /// Of the VM, bytes.
    pub memory_bytes: u64,
    /// That its processes on the host have, the guest's with them; a share of what they have in common with others (PSS).
    pub used_bytes: u64,
    /// Of that, the VMM's, which has the guest's memory.
    pub vmm_bytes: u64,
    pub created: String,
}

impl Shown {
    fn of(state: State, namespace: Option<&str>) -> Self {
        let pod = POD.iter().find_map(|names| {
            let [space, name] = names.map(|name| state.annotations.get(name));
            Some(format!("{}/{}", space?, name?))
        });
        let used = |process: Option<ProcessId>| {
            process.filter(ProcessId::is_alive).map_or(0, |process| pss(process.pid))
        };
        let vmm_bytes = used(state.vmm);
        Shown {
            status: state.status(),
            id: state.id,
            namespace: namespace.map(str::to_owned),
            pod,
            pid: state.supervisor.pid,
            vcpus: state.vm.vcpus,
            memory_bytes: state.vm.memory,
            used_bytes: used(Some(state.supervisor)) + vmm_bytes,
            vmm_bytes,
            created: state.created,
        }
    }

    fn row(&self) -> [String; 8] {
        let mib = |bytes: u64| format!("{}M", bytes >> 20);
        [
            self.id.clone(),
            self.namespace.clone().unwrap_or_else(|| "-".into()),
            self.pod.clone().unwrap_or_else(|| "-".into()),
            self.status.as_str().into(),
            self.vcpus.to_string(),
            mib(self.memory_bytes),
            mib(self.used_bytes),
            self.created.clone(),
        ]
    }
}

/// Proportional set size in bytes (proc(5), smaps_rollup); zero for a process that has just ended.
fn pss(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// All of them, as they are now.
pub fn all(global: &Global) -> Result<Vec<Shown>, Error> {
    let mut all = Vec::new();
    for (namespace, dir) in everywhere(global)? {
        match dir.load() {
            // In the VM of another.
            Ok(state) if state.sandbox.is_some() => {}
            Ok(state) => all.push(Shown::of(state, namespace.as_deref())),
            // It is being made, or was removed while we looked.
            Err(state::Error::Missing { .. } | state::Error::Unfinished(_)) => {}
            Err(e) => tracing::warn!("{e}"),
        }
    }
    Ok(all)
}

pub fn sandboxes(global: &Global, args: Sandboxes) -> Outcome {
    let all = all(global)?;
    if args.format == "json" {
        let text = serde_json::to_string(&all).map_err(|e| Error::Io("show the list".into(), e.into()))?;
        return print(&(text + "\n"));
    }
    let mut rows = vec![HEADER.map(String::from)];
    rows.extend(all.iter().map(Shown::row));
    print(&columns(&rows))
}

/// State directories of all sandboxes, those of shims with containerd's namespace.
fn everywhere(global: &Global) -> Result<Vec<(Option<String>, StateDir)>, Error> {
    let mut roots = vec![(None, global.root.clone())];
    for namespace in StateDir::list(shim::STATE.as_ref())? {
        let root = std::path::Path::new(shim::STATE).join(&namespace);
        roots.push((Some(namespace), root));
    }
    let mut all = Vec::new();
    for (namespace, root) in roots {
        for id in StateDir::list(&root)? {
            match StateDir::open(&root, &id) {
                Ok(dir) => all.push((namespace.clone(), dir)),
                Err(state::Error::Missing { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(all)
}

/// The state directory of a sandbox, whoever started it.
pub fn find(global: &Global, id: &str) -> Result<StateDir, Error> {
    match StateDir::open(&global.root, id) {
        Err(state::Error::Missing { .. }) => {}
        found => {
            let dir = found?;
            return match dir.load() {
                Ok(State { sandbox: Some(sandbox), .. }) => Ok(StateDir::open(&global.root, &sandbox)?),
                _ => Ok(dir),
            };
        }
    }
    let is_it = |dir: &StateDir| dir.path().file_name().is_some_and(|name| name == id);
    match everywhere(global)?.into_iter().find(|(_, dir)| is_it(dir)) {
        Some((_, dir)) => Ok(dir),
        None => Err(Error::Refused(format!(
            "there is no sandbox {id} on this host: `stockade sandboxes` shows those that there are"
        ))),
    }
}
