//! `stockade update`: other limits for a container that exists, applied while it runs.
//!
//! Limits stand in the container's cgroup in the guest and in its sandbox's cgroup on the host. The VM's memory grows with
//! them, and shrinks as far as it can; vCPUs that it does not have it cannot get.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use super::{Error, Global, Outcome, ask_with, open, stopped};
use crate::bundle;
use crate::sandbox::cgroup;
use crate::sandbox::control::{Request, attachment};
use crate::size;
use crate::state::{State, Status};

/// More than any `linux.resources` object has.
const RESOURCES_MAX: u64 = 1 << 20;

/// Change a container's limits
#[derive(Args)]
pub struct Update {
    /// File with a linux.resources object, or - for standard input; all other options are ignored then
    #[arg(short, long, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Weight of block I/O, 10 to 1000
    #[arg(long, value_name = "N")]
    blkio_weight: Option<u16>,
    /// Period of the CPU quota, µs
    #[arg(long, value_name = "US")]
    cpu_period: Option<u64>,
    /// CPU time in each period, µs; -1 for no limit
    #[arg(long, value_name = "US", allow_hyphen_values = true)]
    cpu_quota: Option<i64>,
    /// CPU time that may be saved up for later periods, µs
    #[arg(long, value_name = "US")]
    cpu_burst: Option<u64>,
    /// Share of CPU time against other containers
    #[arg(long, value_name = "N")]
    cpu_share: Option<u64>,
    /// 1: only CPU time that nobody else wants
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    cpu_idle: Option<i64>,
    /// CPUs of the host to use
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Memory nodes of the host to use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Memory, with a unit such as M or in bytes; -1 for no limit
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory: Option<String>,
    /// Memory that is not reclaimed
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory_reservation: Option<String>,
    /// Memory and swap together
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory_swap: Option<String>,
    /// Number of processes; -1 for no limit
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pids_limit: Option<i64>,
    #[arg(long, hide = true, allow_hyphen_values = true)]
    cpu_rt_period: Option<u64>,
    #[arg(long, hide = true, allow_hyphen_values = true)]
    cpu_rt_runtime: Option<i64>,
    #[arg(long, hide = true, allow_hyphen_values = true)]
    kernel_memory: Option<String>,
    #[arg(long, hide = true, allow_hyphen_values = true)]
    kernel_memory_tcp: Option<String>,
    #[arg(long, hide = true)]
    l3_cache_schema: Option<String>,
    #[arg(long, hide = true)]
    mem_bw_schema: Option<String>,
    /// Container identifier
    container_id: String,
}

pub fn update(global: &Global, args: Update) -> Outcome {
    let (dir, state) = open(global, &args.container_id)?;
    must_run(&state)?;
    if args.l3_cache_schema.is_some() || args.mem_bw_schema.is_some() {
        return Err(Error::Usage(
            "--l3-cache-schema and --mem-bw-schema cannot be honoured: the guest has no control of the host's caches"
                .into(),
        ));
    }
    let changes = match &args.resources {
        Some(path) => read(path)?,
        None => flags(&args)?,
    };
    let changes: LinuxResources = serde_json::from_value(changes)
        .map_err(|e| Error::Usage(format!("the new limits are no linux.resources object: {e}")))?;
    // Not before: who is to write the limits may take its time, and others want the container meanwhile.
    let _lock = dir.lock()?;
    let state = dir.load()?;
    must_run(&state)?;
    state.vm.check_update(&changes).map_err(|e| Error::Refused(e.to_string()))?;
    if let (None, Some(field)) = (&state.cgroup, cgroup::only_on_host(&changes)) {
        return Err(Error::Refused(format!(
            "linux.resources.{field} cannot be honoured: this container has no cgroup on the host; create it with linux.cgroupsPath"
        )));
    }
    let merged = bundle::merge_resources(&state.resources, &changes)?;
    bundle::check_resources(&merged)?;
    let text = serde_json::to_vec(&merged).map_err(|e| Error::Io("encode the limits".into(), e.into()))?;
    let limits = attachment(&text).map_err(Error::io("send the limits"))?;
    match ask_with(&dir, &Request::Update, &[limits.as_fd()])? {
        Some(_) => Ok(ExitCode::SUCCESS),
        None => Err(stopped("container not running", &state)),
    }
}

fn must_run(state: &State) -> Result<(), Error> {
    match state.status() {
        Status::Stopped => Err(stopped("container not running", state)),
        _ => Ok(()),
    }
}

fn read(path: &std::path::Path) -> Result<Value, Error> {
    let failed = || Error::io(format!("read the new limits from {}", path.display()));
    let mut text = String::new();
    match path.as_os_str() == "-" {
        true => std::io::stdin().lock().take(RESOURCES_MAX).read_to_string(&mut text),
        false => fs::File::open(path).and_then(|file| file.take(RESOURCES_MAX).read_to_string(&mut text)),
    }
    .map_err(failed())?;
    serde_json::from_str(&text)
        .map_err(|e| Error::Usage(format!("{} is no linux.resources object: {e}", path.display())))
}

/// The object that the single flags come to.
fn flags(args: &Update) -> Result<Value, Error> {
    let bytes = |flag: &str, text: &Option<String>| match text {
        None => Ok(Value::Null),
        Some(text) => size::parse_bytes(text)
            .map(Value::from)
            .ok_or_else(|| Error::Usage(format!("{flag} {text:?}: write bytes, a size such as 64M, or -1"))),
    };
    let mut object = json!({
        "cpu": {
            "period": args.cpu_period, "quota": args.cpu_quota, "burst": args.cpu_burst,
            "shares": args.cpu_share, "idle": args.cpu_idle,
            "cpus": args.cpuset_cpus, "mems": args.cpuset_mems,
            "realtimePeriod": args.cpu_rt_period, "realtimeRuntime": args.cpu_rt_runtime,
        },
        "memory": {
            "limit": bytes("--memory", &args.memory)?,
            "reservation": bytes("--memory-reservation", &args.memory_reservation)?,
            "swap": bytes("--memory-swap", &args.memory_swap)?,
            "kernel": bytes("--kernel-memory", &args.kernel_memory)?,
            "kernelTCP": bytes("--kernel-memory-tcp", &args.kernel_memory_tcp)?,
        },
        "pids": {"limit": args.pids_limit},
        "blockIO": {"weight": args.blkio_weight},
    });
    // What was not given says nothing.
    if let Some(object) = object.as_object_mut() {
        object.values_mut().filter_map(Value::as_object_mut).for_each(drop_nulls);
        object.retain(|_, section| section.as_object().is_none_or(|section| !section.is_empty()));
    }
    Ok(object)
}

fn drop_nulls(section: &mut Map<String, Value>) {
    section.retain(|_, value| !value.is_null());
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::FromArgMatches;

    fn parsed(line: &str) -> Result<Value, Error> {
        let command = Update::augment_args(clap::Command::new("update"));
        let matches = command.get_matches_from(line.split(' '));
        flags(&Update::from_arg_matches(&matches).unwrap())
    }

    #[test]
    fn flags_become_the_object_that_runc_makes_of_them() {
        let line = "update --memory 64M --memory-swap -1 --cpu-quota -1 --cpu-period 50000 --pids-limit 20 \
                    --cpuset-cpus 0-1 --blkio-weight 500 ID";
        let wanted = json!({
            "cpu": {"period": 50_000, "quota": -1, "cpus": "0-1"},
            "memory": {"limit": 64 << 20, "swap": -1},
            "pids": {"limit": 20},
            "blockIO": {"weight": 500},
        });
        assert_eq!(parsed(line).unwrap(), wanted);
        assert_eq!(parsed("update ID").unwrap(), json!({}));
        assert!(parsed("update --memory lots ID").unwrap_err().to_string().contains("--memory"));
    }
}
