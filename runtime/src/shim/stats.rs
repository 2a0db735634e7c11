//! A container's accounts as containerd decodes them: the metrics of cgroup v2.
//!
//! They are the guest's word on the guest's own use; nothing on the host is decided by them.

use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageFull};
use stockade_agent_protocol::messages::StatsResponse;

/// Translates what the agent read.
pub fn metrics(stats: &StatsResponse) -> Metrics {
    let (cpu, memory, pids) = (&stats.cpu, &stats.memory, &stats.pids);
    let of = |name: &str| memory.stat.get(name).copied().unwrap_or(0);
    Metrics {
        pids: Some(PidsStat { current: pids.current, limit: pids.limit, ..Default::default() }).into(),
        cpu: Some(CPUStat {
            usage_usec: cpu.usage_us,
            user_usec: cpu.user_us,
            system_usec: cpu.system_us,
            nr_periods: cpu.periods,
            nr_throttled: cpu.throttled_periods,
            throttled_usec: cpu.throttled_us,
            ..Default::default()
        })
        .into(),
        memory: Some(MemoryStat {
            anon: of("anon"),
            file: of("file"),
            kernel_stack: of("kernel_stack"),
            slab: of("slab"),
            sock: of("sock"),
            shmem: of("shmem"),
            file_mapped: of("file_mapped"),
            file_dirty: of("file_dirty"),
            file_writeback: of("file_writeback"),
            anon_thp: of("anon_thp"),
            inactive_anon: of("inactive_anon"),
            active_anon: of("active_anon"),
            inactive_file: of("inactive_file"),
            active_file: of("active_file"),
            unevictable: of("unevictable"),
            slab_reclaimable: of("slab_reclaimable"),
            slab_unreclaimable: of("slab_unreclaimable"),
            pgfault: of("pgfault"),
            pgmajfault: of("pgmajfault"),
            workingset_refault: of("workingset_refault_anon") + of("workingset_refault_file"),
            workingset_activate: of("workingset_activate_anon") + of("workingset_activate_file"),
            workingset_nodereclaim: of("workingset_nodereclaim"),
            pgrefill: of("pgrefill"),
            pgscan: of("pgscan"),
            pgsteal: of("pgsteal"),
            pgactivate: of("pgactivate"),
            pgdeactivate: of("pgdeactivate"),
            pglazyfree: of("pglazyfree"),
            pglazyfreed: of("pglazyfreed"),
            thp_fault_alloc: of("thp_fault_alloc"),
            thp_collapse_alloc: of("thp_collapse_alloc"),
            usage: memory.usage,
            // As the kernel writes a limit that is none.
            usage_limit: if memory.limit == 0 { u64::MAX } else { memory.limit },
            swap_usage: memory.swap,
            max_usage: memory.peak,
            ..Default::default()
        })
        .into(),
        memory_events: Some(MemoryEvents {
            oom: memory.oom,
            oom_kill: memory.oom_kill,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

/// Adds one container's accounts to others'. There is no limit to all of them.
pub fn add(sum: &mut StatsResponse, stats: &StatsResponse) {
    let cpu = sum.cpu.mut_or_insert_default();
    cpu.usage_us = cpu.usage_us.saturating_add(stats.cpu.usage_us);
    cpu.user_us = cpu.user_us.saturating_add(stats.cpu.user_us);
    cpu.system_us = cpu.system_us.saturating_add(stats.cpu.system_us);
    let memory = sum.memory.mut_or_insert_default();
    memory.usage = memory.usage.saturating_add(stats.memory.usage);
    memory.swap = memory.swap.saturating_add(stats.memory.swap);
    memory.oom = memory.oom.saturating_add(stats.memory.oom);
    memory.oom_kill = memory.oom_kill.saturating_add(stats.memory.oom_kill);
    for (name, value) in &stats.memory.stat {
        let all = memory.stat.entry(name.clone()).or_default();
        *all = all.saturating_add(*value);
    }
    let pids = sum.pids.mut_or_insert_default();
    pids.current = pids.current.saturating_add(stats.pids.current);
}

/// Packs them.
pub fn to_any(metrics: &Metrics) -> Any {
    Any {
        type_url: Metrics::descriptor().full_name().into(),
        value: metrics.write_to_bytes().unwrap_or_default(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stockade_agent_protocol::messages::{CpuStats, MemoryStats};

    #[test]
    fn accounts_of_containers_add_up() {
        let one = |usage: u64, name: &str| {
            let memory = MemoryStats { usage, stat: [(name.to_owned(), usage)].into(), ..Default::default() };
            StatsResponse { memory: Some(memory).into(), ..Default::default() }
        };
        let mut sum = StatsResponse::default();
        for stats in [one(1, "anon"), one(2, "file"), one(u64::MAX, "anon")] {
            add(&mut sum, &stats);
        }
        assert_eq!(
            (sum.memory.usage, sum.memory.stat["anon"], sum.memory.stat["file"]),
            (u64::MAX, u64::MAX, 2)
        );
    }

    #[test]
    fn figures_keep_their_meaning_and_an_empty_answer_is_all_zero() {
        let stat = [("inactive_file", 7), ("workingset_refault_anon", 1), ("workingset_refault_file", 2)];
        let memory = MemoryStats {
            usage: 100,
            limit: 0,
            stat: stat.map(|(name, value)| (name.to_owned(), value)).into(),
            ..Default::default()
        };
        let cpu = CpuStats { usage_us: 9, ..Default::default() };
        let stats =
            StatsResponse { cpu: Some(cpu).into(), memory: Some(memory).into(), ..Default::default() };
        let metrics = metrics(&stats);
        assert_eq!((metrics.cpu.usage_usec, metrics.memory.usage), (9, 100));
        assert_eq!((metrics.memory.inactive_file, metrics.memory.workingset_refault), (7, 3));
        assert_eq!(metrics.memory.usage_limit, u64::MAX);
        assert_eq!(to_any(&metrics).type_url, "io.containerd.cgroups.v2.Metrics");
        assert_eq!(super::metrics(&StatsResponse::default()).memory.usage, 0);
    }
}
