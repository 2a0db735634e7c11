//! Reading a cgroup's accounts.

use stockade_agent_protocol::messages::{CpuStats, MemoryStats, PidsStats, StatsResponse};

use crate::error::Error;

/// Collects statistics from the files of a cgroup. A file that the kernel does not have counts as empty.
pub fn read(file: impl Fn(&str) -> Result<String, Error>) -> Result<StatsResponse, Error> {
    let cpu = file("cpu.stat")?;
    let optional = |name| file(name).unwrap_or_default();
    let (current, peak, max) = (optional("memory.current"), optional("memory.peak"), optional("memory.max"));
    let (stat, events, swap) =
        (optional("memory.stat"), optional("memory.events"), optional("memory.swap.current"));
    let (pids, pids_max) = (optional("pids.current"), optional("pids.max"));
    Ok(StatsResponse {
        cpu: Some(CpuStats {
            usage_us: field(&cpu, "usage_usec"),
            user_us: field(&cpu, "user_usec"),
            system_us: field(&cpu, "system_usec"),
            periods: field(&cpu, "nr_periods"),
            throttled_periods: field(&cpu, "nr_throttled"),
            throttled_us: field(&cpu, "throttled_usec"),
            ..Default::default()
        })
        .into(),
        memory: Some(MemoryStats {
            usage: number(&current),
            peak: number(&peak),
            limit: number(&max),
            swap: number(&swap),
            stat: fields(&stat).map(|(name, value)| (name.to_owned(), value)).collect(),
            oom: field(&events, "oom"),
            oom_kill: field(&events, "oom_kill"),
            ..Default::default()
        })
        .into(),
        pids: Some(PidsStats { current: number(&pids), limit: number(&pids_max), ..Default::default() })
            .into(),
        ..Default::default()
    })
}

/// A file of one number; `max`, which is no limit, is 0.
fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// A file of lines `name value`.
fn fields(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (name, value) = line.split_once(' ')?;
        Some((name, value.parse().ok()?))
    })
}

/// One value of such a file, 0 if it is not there.
pub fn field(text: &str, name: &str) -> u64 {
    fields(text).find(|(n, _)| *n == name).map_or(0, |(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files of a container that was throttled and lost a process to memory, from a 6.12 kernel.
    fn sample(file: &str) -> Result<String, Error> {
        let text = match file {
            "cpu.stat" => {
                "usage_usec 1250311\nuser_usec 900000\nsystem_usec 350311\nnice_usec 0\nnr_periods 25\nnr_throttled 11\n\
                 throttled_usec 734000\nnr_bursts 0\nburst_usec 0\n"
            }
            "memory.current" => "16777216\n",
            "memory.peak" => "33554432\n",
            "memory.max" => "33554432\n",
            "memory.stat" => "anon 12288000\nfile 0\nkernel 245760\nslab_unreclaimable 98304\n",
            "memory.events" => "low 0\nhigh 0\nmax 312\noom 2\noom_kill 1\noom_group_kill 0\n",
            "pids.current" => "3\n",
            "pids.max" => "max\n",
            other => return Err(Error::Internal(format!("no {other}"))),
        };
        Ok(text.into())
    }

    #[test]
    fn every_account_is_found() {
        let stats = read(sample).unwrap();
        let (cpu, memory, pids) = (&stats.cpu, &stats.memory, &stats.pids);
        assert_eq!((cpu.usage_us, cpu.user_us, cpu.system_us), (1_250_311, 900_000, 350_311));
        assert_eq!((cpu.periods, cpu.throttled_periods, cpu.throttled_us), (25, 11, 734_000));
        assert_eq!(
            (memory.usage, memory.peak, memory.limit, memory.swap),
            (16_777_216, 33_554_432, 33_554_432, 0)
        );
        assert_eq!((memory.oom, memory.oom_kill), (2, 1));
        assert_eq!(memory.stat.get("kernel"), Some(&245_760));
        assert_eq!(memory.stat.len(), 4);
        assert_eq!((pids.current, pids.limit), (3, 0));
    }

    #[test]
    fn oom_is_not_taken_for_oom_kill() {
        assert_eq!(field("oom_group_kill 7\noom 5\noom_kill 3\n", "oom_kill"), 3);
        assert_eq!(field("", "oom_kill"), 0);
    }
}
