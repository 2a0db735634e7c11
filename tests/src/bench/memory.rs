//! Host memory of one idle container: the proportional set size (PSS) of all its host processes.
//!
//! PSS counts a page that n processes share as one n-th, so the sum over processes is what they take. For a
//! VM it is split into the guest's memory, as far as the guest has touched it, and everything else.

use super::runtimes::{Bundle, Idle, Runtime, start_until_ready};
use super::{Context, Plan, result::Results};
use std::collections::BTreeMap;
use std::fs;
use std::ops::{Add, Sub};
use std::time::Duration;

/// What a container may still do after it has said that it is ready. Costs nothing on the virtual clock.
const SETTLE: Duration = Duration::from_secs(2);
/// The smallest mapping that can be a guest's memory, in KiB.
const GUEST_AT_LEAST: u64 = 64 * 1024;
/// Says `ready` and idles.
const WAIT: [&str; 3] = ["sh", "-c", "echo ready; exec sleep 100000"];

/// An idle container: `plan.runs` of them, one after another.
pub fn container(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let bundle = Bundle::new(&WAIT)?;
    let id = "bench-idle";
    let mut samples = Vec::new();
    for _ in 0..plan.runs {
        let child = start_until_ready(&mut runtime.run_command(&bundle, id));
        let pss = child.as_ref().map_err(Clone::clone).and_then(|child| settled_tree(child.id()));
        match child {
            Ok(child) => runtime.remove(child, id),
            Err(_) => runtime.delete_by_force(id),
        }
        samples.push(pss?);
    }
    add("idle", &runtime.name, runtime.has_vm, &samples, results);
    Ok(())
}

/// An exec that idles: the host process that stands for it, and what all of the container's processes grow by.
pub fn exec(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let bundle = Bundle::idle()?;
    let (mut own, mut private, mut growth) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..plan.runs {
        let idle = Idle::start(runtime, &bundle, "bench-idle-exec")?;
        let before = settled_tree(idle.pid as u32)?;
        let mut exec = start_until_ready(&mut idle.exec(&WAIT))?;
        let pss = settled_tree(exec.id());
        // Where the exec's processes are the container's children already they are not counted twice.
        let after = settled_tree(idle.pid as u32);
        drop(idle);
        let _ = exec.kill();
        let _ = exec.wait();
        let (pss, after) = (pss?, after?);
        own.push(pss.total / 1024.0);
        private.push(pss.private / 1024.0);
        growth.push((after.total + pss.total - before.total) / 1024.0);
    }
    results.add("idle-exec", &runtime.name, "pss", "MiB", &own);
    results.add("idle-exec", &runtime.name, "private", "MiB", &private);
    results.add("idle-exec", &runtime.name, "growth", "MiB", &growth);
    Ok(())
}

/// Rows for the whole, and for a VM its parts.
pub fn add(case: &str, runtime: &str, has_vm: bool, samples: &[Pss], results: &mut Results) {
    let mut add = |metric: &str, value: fn(&Pss) -> f64| {
        let values: Vec<f64> = samples.iter().map(|pss| value(pss) / 1024.0).collect();
        results.add(case, runtime, metric, "MiB", &values);
    };
    add("pss", |pss| pss.total);
    if has_vm {
        add("pss.guest_memory", |pss| pss.guest);
        add("pss.vmm_overhead", |pss| pss.total - pss.guest);
    }
}

/// In KiB.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pss {
    /// All of it.
    pub total: f64,
    /// The part that is a guest's memory.
    pub guest: f64,
    /// What nobody else has: it goes with the processes. Pages of files are the cache's, whoever maps them.
    pub private: f64,
}

impl Add for Pss {
    type Output = Pss;

    fn add(self, other: Pss) -> Pss {
        Pss {
            total: self.total + other.total,
            guest: self.guest + other.guest,
            private: self.private + other.private,
        }
    }
}

impl Sub for Pss {
    type Output = Pss;

    fn sub(self, other: Pss) -> Pss {
        let other = other.scaled(-1.0);
        self + other
    }
}

impl Pss {
    /// A multiple of it.
    pub fn scaled(self, by: f64) -> Pss {
        Pss { total: self.total * by, guest: self.guest * by, private: self.private * by }
    }
}

/// The PSS of a process and all its descendants, once they have come to rest.
pub fn settled_tree(root: u32) -> Result<Pss, String> {
    std::thread::sleep(SETTLE);
    let mut children = children()?;
    let mut sum = Pss::default();
    let mut tree = vec![root];
    while let Some(pid) = tree.pop() {
        tree.extend(children.remove(&pid).unwrap_or_default());
        sum = sum + of_process(pid)?;
    }
    Ok(sum)
}

/// The children of each process.
fn children() -> Result<BTreeMap<u32, Vec<u32>>, String> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").or_say("read /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // pid (name) state parent …, and the name may hold anything.
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        children.entry(parent.unwrap_or(0)).or_default().push(pid);
    }
    Ok(children)
}

fn of_process(pid: u32) -> Result<Pss, String> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).or_say(format!("read smaps of {pid}"))?;
    let mappings = mappings(&smaps);
    let sum = |value: fn(&Mapping) -> u64| mappings.iter().map(value).sum::<u64>() as f64;
    Ok(Pss {
        total: sum(|mapping| mapping.pss),
        private: sum(|mapping| mapping.private),
        guest: guest_memory(&mappings) as f64,
    })
}

/// One mapping: addresses, file (empty: anonymous), PSS and memory of its own in KiB.
struct Mapping {
    start: u64,
    end: u64,
    file: String,
    pss: u64,
    private: u64,
}

/// Reads /proc/PID/smaps.
fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let range = first.split_once('-').and_then(|(start, end)| {
            Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
        });
        match (range, all.last_mut()) {
            (Some((start, end)), _) => {
                let file = words.skip(4).collect::<Vec<_>>().join(" ");
                all.push(Mapping { start, end, file, pss: 0, private: 0 });
            }
            (None, Some(mapping)) if first == "Pss:" => {
                mapping.pss = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            }
            (None, Some(mapping)) if first == "Private_Dirty:" => {
                mapping.private = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            }
            _ => {}
        }
    }
    all
}

/// The PSS of a guest's memory in KiB, zero when the process has none. It is the process's largest anonymous
/// mapping; a VMM that maps the guest's kernel from its file cuts that into pieces, with the kernel between.
fn guest_memory(mappings: &[Mapping]) -> u64 {
    let anonymous = |mapping: &Mapping| mapping.file.is_empty() || mapping.file.starts_with("[anon");
    let kernel = |mapping: &Mapping| mapping.file.contains("vmlinux");
    let size = |mapping: &Mapping| mapping.end - mapping.start;
    let largest =
        mappings.iter().enumerate().filter(|(_, mapping)| anonymous(mapping)).max_by_key(|(_, m)| size(m));
    let Some((largest, mapping)) = largest else { return 0 };
    if size(mapping) < GUEST_AT_LEAST * 1024 {
        return 0;
    }
    // Backwards over what joins: up to the anonymous piece below the kernel's first part.
    let joins = |at: usize| {
        let (Some(low), Some(high)) = (mappings.get(at - 1), mappings.get(at)) else { return false };
        low.end == high.start && (anonymous(low) || kernel(low))
    };
    let run = (1..=largest).rev().take_while(|at| joins(*at)).count();
    let pieces = mappings.get(largest - run..=largest).unwrap_or_default();
    let first = match pieces.iter().position(kernel) {
        Some(kernel) => kernel.saturating_sub(1),
        None => run,
    };
    pieces.get(first..).unwrap_or_default().iter().map(|mapping| mapping.pss).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0001000000 rw-p 00000000 00:00 0 \nPss:                 10 kB\n\
7f1000000000-7f1001000000 rw-p 00000000 00:00 0 \nPss:                 20 kB\n\
7f1001000000-7f1001800000 r-xp 00001000 08:01 5                          /usr/lib/stockade/vmlinux\nPss:                 40 kB\n\
7f1001800000-7f1010000000 rw-p 00000000 00:00 0 \nPss_Dirty: 7 kB\nPss:                 80 kB\n\
7f1010000000-7f1010100000 rw-p 00000000 00:00 0 \nPss:                160 kB\n\
7ffc00000000-7ffc00100000 rw-p 00000000 00:00 0                          [stack]\nPss:                320 kB\n";

    #[test]
    fn guest_memory_is_the_largest_mapping_with_the_kernel_in_it() {
        let mappings = mappings(SMAPS);
        assert_eq!(mappings.len(), 6);
        assert_eq!(guest_memory(&mappings), 20 + 40 + 80);
    }

    #[test]
    fn a_process_without_a_large_mapping_has_no_guest() {
        assert_eq!(guest_memory(&mappings(&SMAPS[..200])), 0);
        assert_eq!(guest_memory(&[]), 0);
    }
}
