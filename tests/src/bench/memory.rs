//! Host memory of one idle container: the proportional set size (PSS) of all its host processes.
//!
//! PSS counts a page that n processes share as one n-th, so the sum over processes is what they take. For a
//! VM it is split into the guest's memory, as far as the guest has touched it, and everything else.

use super::runtimes::{Bundle, Runtime, readable_in_time};
use super::{Context, Plan, result::Results};
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::process::Stdio;
use std::time::Duration;

const CASE: &str = "idle";
/// What a container may still do after it has said that it is ready. Costs nothing on the virtual clock.
const SETTLE: Duration = Duration::from_secs(2);
/// The smallest mapping that can be a guest's memory, in KiB.
const GUEST_AT_LEAST: u64 = 64 * 1024;

/// Measures `plan.runs` containers, one after another.
pub fn measure(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let bundle = Bundle::new(&["sh", "-c", "echo ready; exec sleep 100000"])?;
    let mut samples = Vec::new();
    for _ in 0..plan.runs {
        samples.push(one(runtime, &bundle)?);
    }
    let mut add = |metric: &str, value: fn(&Pss) -> f64| {
        let values: Vec<f64> = samples.iter().map(value).collect();
        results.add(CASE, &runtime.name, metric, "MiB", &values);
    };
    add("pss", |pss| pss.total / 1024.0);
    if runtime.has_vm {
        add("pss.guest_memory", |pss| pss.guest / 1024.0);
        add("pss.vmm_overhead", |pss| (pss.total - pss.guest) / 1024.0);
    }
    Ok(())
}

/// In KiB.
struct Pss {
    total: f64,
    guest: f64,
}

fn one(runtime: &Runtime, bundle: &Bundle) -> Result<Pss, String> {
    let id = "bench-idle";
    let (mut output, stdout) = std::io::pipe().or_say("make a pipe")?;
    let mut command = runtime.run_command(bundle, id);
    let child = command
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(Stdio::null())
        .spawn()
        .or_say(format!("run {}", runtime.name))?;
    drop(command);
    let mut ready = [0; 6];
    let came = readable_in_time(&output)? && output.read(&mut ready).or_say("wait for the container")? > 0;
    std::thread::sleep(SETTLE);
    let pss = came.then(|| pss_of_tree(child.id())).transpose();
    runtime.remove(child, id);
    pss?.ok_or_else(|| "the container did not become ready".into())
}

/// The PSS of a process and all its descendants.
fn pss_of_tree(root: u32) -> Result<Pss, String> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").or_say("read /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // pid (name) state parent …, and the name may hold anything.
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        children.entry(parent.unwrap_or(0)).or_default().push(pid);
    }
    let mut sum = Pss { total: 0.0, guest: 0.0 };
    let mut tree = vec![root];
    while let Some(pid) = tree.pop() {
        tree.extend(children.remove(&pid).unwrap_or_default());
        let smaps =
            fs::read_to_string(format!("/proc/{pid}/smaps")).or_say(format!("read smaps of {pid}"))?;
        let mappings = mappings(&smaps);
        sum.total += mappings.iter().map(|mapping| mapping.pss).sum::<u64>() as f64;
        sum.guest += guest_memory(&mappings) as f64;
    }
    Ok(sum)
}

/// One mapping: addresses, file (empty: anonymous), PSS in KiB.
struct Mapping {
    start: u64,
    end: u64,
    file: String,
    pss: u64,
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
                all.push(Mapping { start, end, file, pss: 0 });
            }
            (None, Some(mapping)) if first == "Pss:" => {
                mapping.pss = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
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
