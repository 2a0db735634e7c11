//! What a container uses, in the shape of runc's `events`, which its callers parse.
//!
//! The numbers are those of the container's cgroup in the guest: a claim of the guest's about itself. Only traffic is
//! the host's count. Times are nanoseconds, sizes bytes; no limit is the largest number, as runc has it.

use serde_json::{Map, Value, json};
use stockade_agent_protocol::messages::StatsResponse;

use crate::network::Traffic;

/// The kernel has some sixty counters in memory.stat; a guest that claims more is cut short.
const COUNTERS_MAX: usize = 256;
/// Longest name of one of them, with room to spare.
const NAME_MAX: usize = 64;

/// The `data` of an event of type `stats`.
pub fn as_runc_has_it(stats: &StatsResponse, traffic: &[Traffic]) -> Value {
    let (cpu, memory, pids) = (&stats.cpu, &stats.memory, &stats.pids);
    let ns = |us: u64| us.saturating_mul(1000);
    let limit = |limit: u64| if limit == 0 { u64::MAX } else { limit };
    let raw: Map<String, Value> = memory
        .stat
        .iter()
        .filter(|(name, _)| name.len() <= NAME_MAX && name.chars().all(|c| c.is_ascii_graphic()))
        .take(COUNTERS_MAX)
        .map(|(name, value)| (name.clone(), (*value).into()))
        .collect();
    json!({
        "cpu": {
            "usage": {"total": ns(cpu.usage_us), "kernel": ns(cpu.system_us), "user": ns(cpu.user_us)},
            "throttling": {
                "periods": cpu.periods,
                "throttledPeriods": cpu.throttled_periods,
                "throttledTime": ns(cpu.throttled_us),
            },
        },
        "cpuset": {},
        "memory": {
            "cache": memory.stat.get("file").copied().unwrap_or(0),
            "usage": {
                "limit": limit(memory.limit),
                "usage": memory.usage,
                "max": memory.peak,
                "failcnt": memory.oom,
            },
            "swap": {"limit": 0, "usage": memory.swap, "failcnt": 0},
            "kernel": {"limit": 0, "failcnt": 0},
            "kernelTCP": {"limit": 0, "failcnt": 0},
            "raw": raw,
        },
        "pids": {"current": pids.current, "limit": pids.limit},
        "blkio": {},
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": if traffic.is_empty() { Value::Null } else { json!(traffic) },
        // Not in runc's: what `events` tells an event of type `oom` by.
        "oomKills": memory.oom_kill,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use stockade_agent_protocol::messages::{CpuStats, MemoryStats};

    #[test]
    fn units_and_absent_limits_are_runcs() {
        let cpu = CpuStats { usage_us: 5, throttled_us: u64::MAX, ..Default::default() };
        let mut memory = MemoryStats { usage: 7, ..Default::default() };
        memory.stat.insert("file".into(), 3);
        memory.stat.insert("bad\nname".into(), 3);
        memory.stat.insert("x".repeat(NAME_MAX + 1), 3);
        let stats =
            StatsResponse { cpu: Some(cpu).into(), memory: Some(memory).into(), ..Default::default() };
        let shown = as_runc_has_it(&stats, &[]);
        assert_eq!(shown["cpu"]["usage"]["total"], 5000);
        assert_eq!(shown["cpu"]["throttling"]["throttledTime"], u64::MAX);
        assert_eq!(shown["memory"]["usage"]["limit"], u64::MAX);
        assert_eq!((&shown["memory"]["usage"]["usage"], &shown["memory"]["cache"]), (&json!(7), &json!(3)));
        assert_eq!(shown["memory"]["raw"], json!({"file": 3}));
    }
}
