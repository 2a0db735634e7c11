//! `linux.resources` as writes to files of a container's cgroup (v2) in the guest.
//!
//! Here, because the host must know before it starts a VM what the agent would refuse. What has no meaning in
//! cgroup v2 is refused by name, unless the guest honours it anyway: it has no swap, no huge pages and no RDMA, so
//! limits on those hold. What only the host can limit, which CPUs and block devices are used, is not the guest's.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

/// A limit that cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The field below `linux.resources`.
    pub field: String,
    /// Why not.
    pub reason: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "linux.resources.{} cannot be honoured: {}", self.field, self.reason)
    }
}

impl std::error::Error for Refused {}

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The field it comes from, for messages.
    pub field: &'static str,
    /// The file in the cgroup's directory.
    pub file: String,
    /// What to write.
    pub value: String,
    /// A kernel that has no such file has nothing to limit.
    pub only_if_present: bool,
}

fn set(field: &'static str, file: &str, value: impl ToString) -> Setting {
    Setting { field, file: file.into(), value: value.to_string(), only_if_present: false }
}

fn refuse(field: &str, reason: impl Into<String>) -> Refused {
    Refused { field: field.into(), reason: reason.into() }
}

/// All writes for `resources`, in an order the kernel accepts.
pub fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, Refused> {
    let mut settings = Vec::new();
    if let Some(memory) = resources.memory() {
        memory_settings(memory, &mut settings)?;
    }
    if let Some(cpu) = resources.cpu() {
        cpu_settings(cpu, &mut settings)?;
    }
    // 0 says nothing, as in runc up to 1.3 and to those who write specs, whatever the kernel makes of it.
    if let Some(pids) = resources.pids().as_ref().filter(|pids| pids.limit() != 0) {
        settings.push(set("linux.resources.pids.limit", "pids.max", limit(pids.limit())));
    }
    for hugepages in resources.hugepage_limits().iter().flatten() {
        settings.push(Setting {
            only_if_present: true,
            ..set(
                "linux.resources.hugepageLimits",
                &format!("hugetlb.{}.max", file_part("hugepageLimits", hugepages.page_size())?),
                hugepages.limit(),
            )
        });
    }
    if let Some(network) = resources.network()
        && (network.class_id().unwrap_or(0) != 0
            || network.priorities().as_ref().is_some_and(|p| !p.is_empty()))
    {
        return Err(refuse("network", "cgroup v2 has no network controllers"));
    }
    for (file, value) in resources.unified().iter().flatten() {
        let file = file_part("unified", file)?;
        if let Some((_, reason)) = REFUSED.iter().find(|(prefix, _)| file.starts_with(prefix)) {
            return Err(refuse(&format!("unified[{file:?}]"), *reason));
        }
        let only_if_present = ABSENT.iter().any(|prefix| file.starts_with(prefix));
        settings.push(Setting { only_if_present, ..set("linux.resources.unified", file, value) });
    }
    Ok(settings)
}

/// Files that mean the host's devices and CPUs, and what to do instead.
const REFUSED: [(&str, &str); 3] = [
    ("io.", "the devices are the host's; use linux.resources.blockIO"),
    ("cpuset.", "the CPUs are the host's; use linux.resources.cpu"),
    ("rdma.", "the guest has no RDMA devices; remove it"),
];
/// Files of what the guest has none of, so that limits hold: kubelet has every container's swap be 0.
const ABSENT: [&str; 3] = ["memory.swap.", "memory.zswap.", "hugetlb."];

fn file_part<'a>(field: &str, name: &'a str) -> Result<&'a str, Refused> {
    if name.is_empty() || name.contains('/') || name.starts_with("cgroup.") {
        return Err(refuse(field, format!("{name:?} names no limit")));
    }
    Ok(name)
}

/// A limit as the kernel has it; less than none is "no limit".
fn limit(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

fn memory_settings(memory: &LinuxMemory, settings: &mut Vec<Setting>) -> Result<(), Refused> {
    #[allow(deprecated)] // Refused, not used.
    if memory.kernel().unwrap_or(0) > 0 || memory.kernel_tcp().unwrap_or(0) > 0 {
        return Err(refuse("memory.kernel", "cgroup v2 has no limit of kernel memory of its own"));
    }
    if memory.disable_oom_killer() == Some(true) {
        return Err(refuse("memory.disableOOMKiller", "cgroup v2 cannot switch the OOM killer off"));
    }
    // In the spec swap is memory plus swap, as cgroup v1 had it; -1 is "no limit".
    if let Some(swap) = memory.swap().filter(|s| *s != 0) {
        let value = match (swap, memory.limit()) {
            (..0, _) => "max".into(),
            (swap, Some(limit)) if limit > 0 && swap >= limit => (swap - limit).to_string(),
            _ => {
                return Err(refuse(
                    "memory.swap",
                    "it includes memory, so it must not be below memory.limit",
                ));
            }
        };
        settings.push(Setting {
            only_if_present: true,
            ..set("linux.resources.memory.swap", "memory.swap.max", value)
        });
    }
    if let Some(max) = memory.limit().filter(|m| *m != 0) {
        settings.push(set("linux.resources.memory.limit", "memory.max", limit(max)));
    }
    if let Some(low) = memory.reservation().filter(|m| *m != 0) {
        settings.push(set("linux.resources.memory.reservation", "memory.low", limit(low)));
    }
    Ok(())
}

fn cpu_settings(cpu: &LinuxCpu, settings: &mut Vec<Setting>) -> Result<(), Refused> {
    if cpu.realtime_runtime().unwrap_or(0) != 0 || cpu.realtime_period().unwrap_or(0) != 0 {
        return Err(refuse("cpu.realtimeRuntime", "cgroup v2 has no limit of real-time processes"));
    }
    if let Some(idle) = cpu.idle() {
        settings.push(set("linux.resources.cpu.idle", "cpu.idle", idle));
    }
    settings.extend(weight(cpu).map(|weight| set("linux.resources.cpu.shares", "cpu.weight", weight)));
    let burst = cpu.burst();
    let quota = cpu.quota().filter(|quota| *quota != 0);
    if quota.is_some() || cpu.period().is_some_and(|p| p != 0) {
        // The kernel never has more burst than quota: an old burst must not forbid a new quota.
        if burst.is_some() {
            settings.push(set("linux.resources.cpu.burst", "cpu.max.burst", 0));
        }
        let quota = limit(quota.unwrap_or(-1));
        // 100 ms is the kernel's default.
        let period = cpu.period().filter(|p| *p != 0).unwrap_or(100_000);
        settings.push(set("linux.resources.cpu.quota", "cpu.max", format!("{quota} {period}")));
    }
    if let Some(burst) = burst {
        settings.push(set("linux.resources.cpu.burst", "cpu.max.burst", burst));
    }
    Ok(())
}

/// The weight that shares come to. One who gets only what nobody else wants has none: the kernel refuses it.
pub fn weight(cpu: &LinuxCpu) -> Option<u64> {
    let shares = cpu.shares().filter(|shares| *shares != 0 && cpu.idle() != Some(1));
    shares.map(weight_of_shares)
}

/// cgroup v1's 2..=262144 to cgroup v2's 1..=10000, as runc, crun and systemd's callers convert.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Vec<(String, String)>, String> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        settings(&resources)
            .map(|all| all.into_iter().map(|s| (s.file, s.value)).collect())
            .map_err(|e| e.to_string())
    }

    fn pairs(of: &[(&str, &str)]) -> Result<Vec<(String, String)>, String> {
        Ok(of.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect())
    }

    #[test]
    fn what_docker_run_sets_becomes_cgroup_v2() {
        assert_eq!(
            of(
                r#"{"memory":{"limit":67108864,"reservation":33554432,"swap":134217728,"disableOOMKiller":false},
                   "cpu":{"shares":1024,"quota":150000,"period":100000,"cpus":"0-1"},"pids":{"limit":64},
                   "blockIO":{"weight":0}}"#
            ),
            pairs(&[
                ("memory.swap.max", "67108864"),
                ("memory.max", "67108864"),
                ("memory.low", "33554432"),
                ("cpu.weight", "39"),
                ("cpu.max", "150000 100000"),
                ("pids.max", "64"),
            ])
        );
    }

    #[test]
    fn a_new_quota_is_not_held_up_by_an_old_burst() {
        assert_eq!(
            of(r#"{"cpu":{"quota":20000,"period":100000,"burst":10000}}"#),
            pairs(&[("cpu.max.burst", "0"), ("cpu.max", "20000 100000"), ("cpu.max.burst", "10000")])
        );
        assert_eq!(
            of(r#"{"cpu":{"burst":5,"idle":1}}"#),
            pairs(&[("cpu.idle", "1"), ("cpu.max.burst", "5")])
        );
    }

    #[test]
    fn no_limit_is_spelled_in_many_ways() {
        assert_eq!(of("{}"), pairs(&[]));
        assert_eq!(of(r#"{"pids":{"limit":0}}"#), pairs(&[]));
        assert_eq!(of(r#"{"pids":{"limit":-1}}"#), pairs(&[("pids.max", "max")]));
        assert_eq!(of(r#"{"memory":{"limit":-1}}"#), pairs(&[("memory.max", "max")]));
        assert_eq!(of(r#"{"memory":{"limit":0,"swap":0}}"#), pairs(&[]));
        assert_eq!(of(r#"{"cpu":{"quota":-1}}"#), pairs(&[("cpu.max", "max 100000")]));
        assert_eq!(of(r#"{"cpu":{"quota":0,"period":0}}"#), pairs(&[]));
        assert_eq!(of(r#"{"cpu":{"shares":0}}"#), pairs(&[]));
    }

    #[test]
    fn who_gets_idle_time_only_has_no_weight() {
        assert_eq!(of(r#"{"cpu":{"idle":1,"shares":1024}}"#), pairs(&[("cpu.idle", "1")]));
        assert_eq!(
            of(r#"{"cpu":{"idle":0,"shares":1024}}"#),
            pairs(&[("cpu.idle", "0"), ("cpu.weight", "39")])
        );
    }

    #[test]
    fn what_the_guest_has_none_of_is_limited_anyway() {
        let json = r#"{"unified":{"memory.swap.max":"0"}}"#;
        let settings = settings(&serde_json::from_str(json).unwrap()).unwrap();
        assert!(settings.iter().all(|setting| setting.only_if_present));
        let json = r#"{"unified":{"memory.high":"1"}}"#;
        let settings = super::settings(&serde_json::from_str(json).unwrap()).unwrap();
        assert!(!settings[0].only_if_present);
    }

    #[test]
    fn shares_keep_their_ends() {
        assert_eq!((weight_of_shares(1), weight_of_shares(2), weight_of_shares(262_144)), (1, 1, 10_000));
        assert_eq!(weight_of_shares(u64::MAX), 10_000);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        for (json, field) in [
            (r#"{"memory":{"disableOOMKiller":true}}"#, "memory.disableOOMKiller"),
            (r#"{"memory":{"kernel":1048576}}"#, "memory.kernel"),
            (r#"{"memory":{"limit":100,"swap":50}}"#, "memory.swap"),
            (r#"{"cpu":{"realtimeRuntime":100}}"#, "cpu.realtimeRuntime"),
            (r#"{"network":{"classID":7,"priorities":[]}}"#, "network"),
            (r#"{"unified":{"../escape":"1"}}"#, "unified"),
            (r#"{"unified":{"cgroup.subtree_control":"-memory"}}"#, "unified"),
            (r#"{"unified":{"io.max":"8:0 rbps=1"}}"#, r#"unified["io.max"]"#),
            (r#"{"unified":{"cpuset.cpus":"0"}}"#, r#"unified["cpuset.cpus"]"#),
        ] {
            assert!(of(json).is_err_and(|e| e.contains(field)), "{json}");
        }
    }
}
