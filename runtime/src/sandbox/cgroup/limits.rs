//! What becomes of a workload's limits on the host: those of supervisor and VMM, with what the VM needs besides.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxResources, LinuxThrottleDevice};
use stockade_agent_protocol::resources::weight;

use crate::size::{CPU_PERIOD, VmSize};

/// What supervisor and VMM need beside the guest's memory: 5 MiB seen, with room for requests under way.
const OVERHEAD: u64 = 32 << 20;
/// Of guest memory, for page tables on both sides of the wall (8 bytes for each 4 KiB, twice) with some to spare.
const TABLES_FRACTION: u64 = 128;

/// What is written to a file of a cgroup.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    pub field: &'static str,
    pub file: &'static str,
    pub value: String,
    /// The value for io.bfq.weight, which has another scale than io.weight.
    pub bfq: Option<String>,
}

pub fn set(field: &'static str, file: &'static str, value: impl ToString) -> Setting {
    Setting { field, file, value: value.to_string(), bfq: None }
}

/// What the limits of a workload are for the VM that it is in.
pub fn settings(limits: &LinuxResources, vm: VmSize) -> Vec<Setting> {
    let mut settings = Vec::new();
    if let Some(memory) = limits.memory() {
        let limit = memory.limit().filter(|limit| *limit != 0);
        match limit {
            Some(1..) => settings.push(memory_max(vm)),
            Some(_) => settings.push(set("linux.resources.memory.limit", "memory.max", "max")),
            None => {}
        }
        let swap = match (memory.swap().unwrap_or(0), limit) {
            (0, _) => None,
            (..0, _) => Some("max".to_owned()),
            (swap, limit) => Some((swap - limit.unwrap_or(0)).max(0).to_string()),
        };
        settings.extend(swap.map(|swap| set("linux.resources.memory.swap", "memory.swap.max", swap)));
        if let Some(low) = memory.reservation().filter(|low| *low > 0) {
            settings.push(set("linux.resources.memory.reservation", "memory.low", low));
        }
    }
    if let Some(cpu) = limits.cpu() {
        cpu_settings(cpu, &mut settings);
    }
    settings.extend(limits.block_io().as_ref().into_iter().flat_map(block_io));
    settings
}

fn cpu_settings(cpu: &LinuxCpu, settings: &mut Vec<Setting>) {
    if let Some(idle) = cpu.idle() {
        settings.push(set("linux.resources.cpu.idle", "cpu.idle", idle));
    }
    settings.extend(weight(cpu).map(|weight| set("linux.resources.cpu.shares", "cpu.weight", weight)));
    let period = cpu.period().filter(|period| *period != 0).unwrap_or(CPU_PERIOD);
    match cpu.quota().filter(|quota| *quota != 0) {
        // One CPU more: for the VMM's own threads, which work for the guest, and for the guest's boot, which would
        // take as many times longer as the quota is small.
        Some(quota @ 1..) => {
            let value = format!("{} {period}", quota as u64 + period);
            settings.push(set("linux.resources.cpu.quota", "cpu.max", value));
        }
        Some(_) => settings.push(set("linux.resources.cpu.quota", "cpu.max", format!("max {period}"))),
        None if cpu.period().is_some_and(|period| period != 0) => {
            settings.push(set("linux.resources.cpu.period", "cpu.max", format!("max {period}")));
        }
        None => {}
    }
    for (field, file, list) in [
        ("linux.resources.cpu.cpus", "cpuset.cpus", cpu.cpus()),
        ("linux.resources.cpu.mems", "cpuset.mems", cpu.mems()),
    ] {
        let list = list.as_ref().filter(|list| !list.trim().is_empty());
        settings.extend(list.map(|list| set(field, file, list)));
    }
}

/// Reads and writes are the VMM's, on behalf of the guest.
pub fn block_io(io: &LinuxBlockIo) -> Vec<Setting> {
    let mut settings = Vec::new();
    // cgroup v1's 10..=1000 to cgroup v2's 1..=10000.
    let weight = |weight: u16| 1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9_999 / 990;
    if let Some(named) = io.weight().filter(|weight| *weight != 0) {
        let setting =
            set("linux.resources.blockIO.weight", "io.weight", format!("default {}", weight(named)));
        settings.push(Setting { bfq: Some(format!("default {named}")), ..setting });
    }
    for device in io.weight_device().iter().flatten() {
        if let Some(named) = device.weight().filter(|weight| *weight != 0) {
            let device = format!("{}:{}", device.major(), device.minor());
            let value = format!("{device} {}", weight(named));
            let setting = set("linux.resources.blockIO.weightDevice", "io.weight", value);
            settings.push(Setting { bfq: Some(format!("{device} {named}")), ..setting });
        }
    }
    let mut throttle = |field, devices: &Option<Vec<LinuxThrottleDevice>>, key: &str| {
        for device in devices.iter().flatten() {
            let rate = if device.rate() == 0 { "max".into() } else { device.rate().to_string() };
            let value = format!("{}:{} {key}={rate}", device.major(), device.minor());
            settings.push(set(field, "io.max", value));
        }
    };
    throttle("linux.resources.blockIO.throttleReadBpsDevice", io.throttle_read_bps_device(), "rbps");
    throttle("linux.resources.blockIO.throttleWriteBpsDevice", io.throttle_write_bps_device(), "wbps");
    throttle("linux.resources.blockIO.throttleReadIOPSDevice", io.throttle_read_iops_device(), "riops");
    throttle("linux.resources.blockIO.throttleWriteIOPSDevice", io.throttle_write_iops_device(), "wiops");
    settings
}

/// Below what a VM of this size takes the host would act first, and kill all of it.
pub fn memory_max(vm: VmSize) -> Setting {
    let most = vm.memory + vm.memory / TABLES_FRACTION + OVERHEAD;
    set("linux.resources.memory.limit", "memory.max", most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn of(limits: Value, vm: VmSize) -> Vec<(&'static str, String)> {
        let limits = serde_json::from_value(limits).unwrap();
        settings(&limits, vm).into_iter().map(|setting| (setting.file, setting.value)).collect()
    }

    #[test]
    fn the_vm_gets_what_it_needs_beside_its_workload() {
        let vm = VmSize { vcpus: 1, memory: 128 << 20 };
        assert_eq!(
            of(json!({"memory": {"limit": 62 << 20, "swap": 72 << 20, "reservation": 5}}), vm),
            [
                ("memory.max", ((128 << 20) + (1 << 20) + (32 << 20)).to_string()),
                ("memory.swap.max", (10 << 20).to_string()),
                ("memory.low", "5".into())
            ]
        );
        assert_eq!(
            of(json!({"cpu": {"quota": 20_000, "shares": 1024, "cpus": "1-2", "mems": ""}}), vm),
            [("cpu.weight", "39".into()), ("cpu.max", "120000 100000".into()), ("cpuset.cpus", "1-2".into())]
        );
        assert_eq!(of(json!({"memory": {"limit": -1}, "cpu": {"quota": -1}}), vm)[1].1, "max 100000");
        assert_eq!(of(json!({"cpu": {"quota": 0, "idle": 1, "shares": 5}}), vm), [("cpu.idle", "1".into())]);
        assert_eq!(of(json!({"cpu": {"period": 50_000}}), vm), [("cpu.max", "max 50000".into())]);
        assert_eq!(of(json!({"pids": {"limit": 5}, "unified": {"memory.high": "1"}}), vm), []);
    }

    #[test]
    fn block_io_is_the_hosts() {
        let vm = VmSize { vcpus: 1, memory: 128 << 20 };
        let limits = json!({"blockIO": {
            "weight": 1000, "weightDevice": [{"major": 8, "minor": 0, "weight": 10}],
            "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1000}],
            "throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 0}],
        }});
        let settings = settings(&serde_json::from_value(limits.clone()).unwrap(), vm);
        let bfq: Vec<_> = settings.into_iter().filter_map(|setting| setting.bfq).collect();
        assert_eq!(bfq, ["default 1000", "8:0 10"]);
        assert_eq!(
            of(limits, vm),
            [
                ("io.weight", "default 10000".into()),
                ("io.weight", "8:0 1".into()),
                ("io.max", "8:0 rbps=1000".into()),
                ("io.max", "8:16 wiops=max".into())
            ]
        );
    }
}
