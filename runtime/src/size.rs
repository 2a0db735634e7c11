//! How big the VM is: vCPUs and memory.
//!
//! The first that says something decides: an annotation of the bundle, the environment, the bundle's own limits,
//! the configuration file, the default. A limit of the bundle is what the workload may use, so the VM gets what it
//! needs itself on top; the others name the size of the VM. A value out of range is an error that says which value
//! stood where; nothing is silently made to fit.
//!
//! That is what a VM begins with. Its memory grows with limits that are raised and with containers that come later
//! ([`Demand`]); the number of its vCPUs stays, because a machine without ACPI has no way to announce new ones.

use std::collections::{BTreeMap, HashMap};

use oci_spec::runtime::{LinuxCpu, LinuxResources};
use serde::{Deserialize, Serialize};

use crate::config::{Settings, SizeSettings, Sourced};
use crate::printable::printable;

/// Annotation with the number of vCPUs.
pub const ANNOTATION_VCPUS: &str = "io.stockade.vcpus";
/// Annotation with the guest memory.
pub const ANNOTATION_MEMORY: &str = "io.stockade.memory";
/// Characters of an annotation's name that a warning shows.
const ANNOTATION_SHOWN: usize = 200;

const MIB: u64 = 1 << 20;
/// The kernel's default period of CPU quotas, µs.
pub const CPU_PERIOD: u64 = 100_000;
/// Without any limit.
const DEFAULT_VCPUS: u64 = 1;
/// Without any limit.
const DEFAULT_MEMORY: u64 = 256 * MIB;
/// What the VMM's MP table and the guest kernel's CONFIG_NR_CPUS allow.
pub const MAX_VCPUS: u64 = 32;
/// Below it guest kernel, initrd and agent do not start.
const MIN_MEMORY: u64 = 64 * MIB;
/// The guest's page tables and the host's address space allow more, but nobody has tried it.
const MAX_MEMORY: u64 = 1 << 40;
/// The smallest workload limit that makes sense: below it not even a shell with its container setup runs.
const MIN_LIMIT: u64 = 4 * MIB;
/// What guest kernel, agent and page cache of the agent need beside the workload.
pub const VM_OVERHEAD: u64 = 64 * MIB;
/// Of guest memory, for the kernel's `struct page` array (64 bytes for each 4 KiB).
const PAGE_ARRAY_FRACTION: u64 = 64;
/// Guest memory is made of pieces of this size, so that 2 MiB pages can back it.
const GRANULE: u64 = 2 * MIB;

/// The size of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    /// 1 to 32.
    pub vcpus: u8,
    /// Bytes, a multiple of 2 MiB.
    pub memory: u64,
}

/// A size that cannot be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// out of range
    #[error("{origin} asks for {value}: a VM has 1 to {MAX_VCPUS} vCPUs")]
    Vcpus { origin: String, value: String },
    /// out of range
    #[error("{origin} asks for {value}: a VM has {} to {} of memory", show(MIN_MEMORY), show(MAX_MEMORY))]
    Memory { origin: String, value: String },
    /// out of range
    #[error(
        "linux.resources.memory.limit is {limit} bytes: it must be between {} and {}",
        show(MIN_LIMIT),
        show(MAX_MEMORY)
    )]
    Limit { limit: i64 },
    /// not a size at all
    #[error("{origin} is {value:?}: write a number of bytes, or one with K, M, G or T")]
    NoSize { origin: String, value: String },
    /// a new quota is more than the VM has vCPUs
    #[error(
        "linux.resources.cpu.quota is {quota} of {period} µs, but the VM of this container has {vcpus} vCPU and gets no \
         more: create it anew"
    )]
    Quota { quota: i64, period: u64, vcpus: u8 },
    /// limits add up to more than a VM can have
    #[error(
        "the memory limits of the containers in this VM come to {sum} bytes: with what the VM needs itself it would have \
         more than {}; lower them",
        show(MAX_MEMORY)
    )]
    Sum { sum: u64 },
    /// an engine's sum
    #[error("annotation {key} is {value:?}: the engine must write numbers there")]
    Hint { key: String, value: String },
    /// the list of CPUs is not one
    #[error("linux.resources.cpu.cpus is {0:?}: write numbers and ranges, such as \"0-3,8\"")]
    Cpus(String),
}

/// What said how much memory a VM begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// Somebody who meant the VM itself.
    Name,
    /// A limit, which is for all that is in the VM at first.
    Limit,
    /// Nobody: what containers without a limit get.
    Default,
}

impl VmSize {
    /// Sizes a VM for a bundle. Tells what its memory was chosen by.
    pub fn of(
        annotations: Option<&HashMap<String, String>>,
        resources: Option<&LinuxResources>,
        settings: &Settings,
    ) -> Result<(Self, By), Error> {
        let annotations = annotated(annotations);
        let cpu = resources.and_then(|r| r.cpu().as_ref());
        let limit = resources.and_then(|r| r.memory().as_ref()).and_then(|m| m.limit());
        let vcpus = vcpus(&annotations, cpu, settings)?;
        let (memory, by) = memory(&annotations, limit, settings)?;
        Ok((VmSize { vcpus, memory: memory.next_multiple_of(GRANULE) }, by))
    }

    /// Whether new limits are such that a VM with these vCPUs can have them.
    pub fn check_update(&self, limits: &LinuxResources) -> Result<(), Error> {
        memory_limit(limits)?;
        let quota = limits.cpu().as_ref().and_then(|cpu| Some((cpu.quota().filter(|q| *q > 0)?, cpu)));
        if let Some((quota, cpu)) = quota {
            let period = cpu.period().filter(|p| *p > 0).unwrap_or(CPU_PERIOD);
            if (quota as u64).div_ceil(period) > u64::from(self.vcpus) {
                return Err(Error::Quota { quota, period, vcpus: self.vcpus });
            }
        }
        Ok(())
    }
}

/// The limit of memory, if there is one.
pub fn memory_limit(limits: &LinuxResources) -> Result<Option<u64>, Error> {
    checked(limits.memory().as_ref().and_then(|m| m.limit()))
}

fn checked(limit: Option<i64>) -> Result<Option<u64>, Error> {
    // 0 and -1 mean no limit.
    let Some(limit) = limit.filter(|l| !matches!(l, 0 | -1)) else { return Ok(None) };
    let bytes = u64::try_from(limit).ok().filter(|bytes| (MIN_LIMIT..=MAX_MEMORY).contains(bytes));
    bytes.ok_or(Error::Limit { limit }).map(Some)
}

/// How much memory a VM has to have for the containers in it: the sum of their limits, and what it needs itself. What a VM
/// has by default is for those without a limit, as long as there is one, and comes on top.
#[derive(Clone, Debug)]
pub struct Demand {
    without_limit: u64,
    limits: BTreeMap<String, Option<u64>>,
}

impl Demand {
    /// Of nobody, in a VM of this size.
    pub fn new(size: VmSize, by: By) -> Self {
        let without_limit = match by {
            By::Default => without_overhead(size.memory),
            By::Name | By::Limit => 0,
        };
        Self { without_limit, limits: BTreeMap::new() }
    }

    /// Counts a container with its limit in place of what it had before, which is returned.
    pub fn count(&mut self, container: &str, limit: Option<u64>) -> Option<Option<u64>> {
        self.limits.insert(container.into(), limit)
    }

    /// Counts it as [`Self::count`] has said that it was counted before, unless it has gone meanwhile.
    pub fn restore(&mut self, container: &str, before: Option<Option<u64>>) {
        match (self.limits.get_mut(container), before) {
            (Some(limit), Some(before)) => *limit = before,
            (_, None) => self.forget(container),
            (None, Some(_)) => {}
        }
    }

    /// Counts it no more.
    pub fn forget(&mut self, container: &str) {
        self.limits.remove(container);
    }

    /// Memory of the VM in bytes.
    pub fn memory(&self) -> Result<u64, Error> {
        let has_unlimited = self.limits.values().any(Option::is_none);
        let first = if has_unlimited { self.without_limit } else { 0 };
        let sum = self.limits.values().flatten().fold(first, |sum, limit| sum.saturating_add(*limit));
        let memory = if sum > MAX_MEMORY { u64::MAX } else { with_overhead(sum).next_multiple_of(GRANULE) };
        if memory > MAX_MEMORY { Err(Error::Sum { sum }) } else { Ok(memory) }
    }
}

/// The memory of a VM whose workload may use so much.
fn with_overhead(limit: u64) -> u64 {
    limit + VM_OVERHEAD + limit / PAGE_ARRAY_FRACTION
}

/// What the workload of a VM with so much memory may use.
fn without_overhead(memory: u64) -> u64 {
    let rest = memory.saturating_sub(VM_OVERHEAD);
    rest - rest.div_ceil(PAGE_ARRAY_FRACTION + 1)
}

/// Our annotations. They may come from who is not trusted with the host, so none names a path or a program, and one
/// that is not known is nothing but a warning.
fn annotated(annotations: Option<&HashMap<String, String>>) -> SizeSettings {
    let mut found = SizeSettings::default();
    for (key, value) in annotations.into_iter().flatten() {
        let sourced = || Some(Sourced { value: value.clone(), origin: format!("annotation {key}") });
        match key.as_str() {
            ANNOTATION_VCPUS => found.vcpus = sourced(),
            ANNOTATION_MEMORY => found.memory = sourced(),
            other if other.starts_with("io.stockade.") => tracing::warn!(
                "annotation {} is ignored: there are {ANNOTATION_VCPUS} and {ANNOTATION_MEMORY}",
                printable(other, ANNOTATION_SHOWN)
            ),
            _ => {}
        }
    }
    found
}

fn vcpus(annotations: &SizeSettings, cpu: Option<&LinuxCpu>, settings: &Settings) -> Result<u8, Error> {
    if let Some(named) = annotations.vcpus.as_ref().or(settings.environment.vcpus.as_ref()) {
        return parse_vcpus(named);
    }
    if let Some(cpu) = cpu {
        // A quota of 0 or below means none, as in cgroup v1.
        if let Some(quota) = cpu.quota().filter(|q| *q > 0) {
            let period = cpu.period().filter(|p| *p > 0).unwrap_or(CPU_PERIOD);
            return in_range(
                (quota as u64).div_ceil(period),
                "linux.resources.cpu.quota",
                &format!("{quota} of {period} µs"),
            );
        }
        if let Some(cpus) = cpu.cpus().as_ref().filter(|c| !c.trim().is_empty()) {
            let count = count_cpus(cpus).ok_or_else(|| Error::Cpus(cpus.clone()))?;
            return in_range(count, "linux.resources.cpu.cpus", cpus);
        }
    }
    settings.file.vcpus.as_ref().map_or(Ok(DEFAULT_VCPUS as u8), parse_vcpus)
}

fn parse_vcpus(named: &Sourced<String>) -> Result<u8, Error> {
    let count = named.value.trim().parse().unwrap_or(0);
    in_range(count, &named.origin, &named.value)
}

fn in_range(count: u64, origin: &str, value: &str) -> Result<u8, Error> {
    match count {
        1..=MAX_VCPUS => Ok(count as u8),
        _ => Err(Error::Vcpus { origin: origin.into(), value: format!("{value:.100}") }),
    }
}

/// How many CPUs a list like `0-3,8` names; a CPU named twice counts once.
fn count_cpus(list: &str) -> Option<u64> {
    let mut ranges = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last {
            return None;
        }
        ranges.push((first, last));
    }
    ranges.sort_unstable();
    let (mut count, mut next) = (0u64, 0);
    for (first, last) in ranges {
        let first = first.max(next);
        if first <= last {
            count = count.checked_add((last - first).checked_add(1)?)?;
            next = last.checked_add(1)?;
        }
    }
    Some(count)
}

fn memory(annotations: &SizeSettings, limit: Option<i64>, settings: &Settings) -> Result<(u64, By), Error> {
    if let Some(named) = annotations.memory.as_ref().or(settings.environment.memory.as_ref()) {
        return Ok((parse_memory(named)?, By::Name));
    }
    if let Some(bytes) = checked(limit)? {
        return Ok((with_overhead(bytes).min(MAX_MEMORY), By::Limit));
    }
    let bytes = settings.file.memory.as_ref().map_or(Ok(DEFAULT_MEMORY), parse_memory)?;
    Ok((bytes, By::Default))
}

/// A number of bytes with or without a unit, as flags have it; -1 is a number.
pub fn parse_bytes(text: &str) -> Option<i64> {
    if let Ok(number) = text.trim().parse() {
        return Some(number);
    }
    i64::try_from(bytes_in(text)?).ok()
}

fn bytes_in(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" | "ki" => 1 << 10,
        "m" | "mb" | "mib" | "mi" => 1 << 20,
        "g" | "gb" | "gib" | "gi" => 1 << 30,
        "t" | "tb" | "tib" | "ti" => 1 << 40,
        _ => return None,
    };
    digits.trim_end().parse::<u64>().ok()?.checked_mul(factor)
}

fn parse_memory(named: &Sourced<String>) -> Result<u64, Error> {
    let Sourced { value, origin } = named;
    let short = || format!("{value:.100}");
    match bytes_in(value) {
        Some(bytes) if (MIN_MEMORY..=MAX_MEMORY).contains(&bytes) => Ok(bytes),
        Some(_) => Err(Error::Memory { origin: origin.clone(), value: short() }),
        None => Err(Error::NoSize { origin: origin.clone(), value: short() }),
    }
}

/// Bytes as a person writes them; for the powers of two above.
fn show(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 40 && b % (1 << 40) == 0 => format!("{} TiB", b >> 40),
        b => format!("{} MiB", b >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn size(
        annotations: &[(&str, &str)],
        resources: serde_json::Value,
        settings: &Settings,
    ) -> Result<VmSize, Error> {
        let annotations = annotations.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let resources = serde_json::from_value(resources).unwrap();
        Ok(VmSize::of(Some(&annotations), Some(&resources), settings)?.0)
    }

    fn sourced(value: &str) -> Option<Sourced<String>> {
        Some(Sourced { value: value.into(), origin: "ORIGIN".into() })
    }

    #[test]
    fn without_limits_a_vm_is_small() {
        let (size, by) = VmSize::of(None, None, &Settings::default()).unwrap();
        assert_eq!((size, by), (VmSize { vcpus: 1, memory: 256 * MIB }, By::Default));
        let unlimited = json!({"cpu": {"quota": -1, "cpus": ""}, "memory": {"limit": -1}});
        assert_eq!(super::tests::size(&[], unlimited, &Settings::default()).unwrap(), size);
    }

    #[test]
    fn limits_of_the_bundle_are_rounded_up_and_get_the_overhead() {
        let all = json!({"cpu": {"quota": 150_000, "period": 100_000}, "memory": {"limit": 512 * MIB}});
        let size = size(&[], all, &Settings::default()).unwrap();
        assert_eq!(size.vcpus, 2);
        assert_eq!(size.memory, (512 + 64 + 8) * MIB);
    }

    #[test]
    fn a_cpuset_counts_each_cpu_once() {
        for (list, count) in [("0", 1), ("0-3", 4), ("0-3,2-5,9", 7), (" 1 , 0 ", 2), ("5,5", 1)] {
            assert_eq!(count_cpus(list), Some(count), "{list}");
        }
        for bad in ["x", "3-1", "1,,2", "-1", "0-18446744073709551615"] {
            assert_eq!(count_cpus(bad), None, "{bad}");
        }
        let size = size(&[], json!({"cpu": {"cpus": "0,2"}}), &Settings::default()).unwrap();
        assert_eq!(size.vcpus, 2);
    }

    #[test]
    fn annotation_before_environment_before_bundle_before_file() {
        let file = SizeSettings { vcpus: sourced("2"), memory: sourced("128M") };
        let mut settings = Settings { file, ..Settings::default() };
        let none = json!({});
        let limits = json!({"cpu": {"quota": 300_000}, "memory": {"limit": 64 * MIB}});
        assert_eq!(size(&[], none, &settings).unwrap(), VmSize { vcpus: 2, memory: 128 * MIB });
        let bundle = size(&[], limits.clone(), &settings).unwrap();
        assert_eq!(bundle, VmSize { vcpus: 3, memory: 130 * MIB });
        settings.environment = SizeSettings { vcpus: sourced("4"), memory: sourced("1G") };
        let environment = size(&[], limits.clone(), &settings).unwrap();
        assert_eq!(environment, VmSize { vcpus: 4, memory: 1024 * MIB });
        let annotations = [(ANNOTATION_VCPUS, "5"), (ANNOTATION_MEMORY, "512MiB")];
        assert_eq!(size(&annotations, limits, &settings).unwrap(), VmSize { vcpus: 5, memory: 512 * MIB });
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        let none = Settings::default;
        for (resources, part) in [
            (json!({"memory": {"limit": MIB}}), "memory.limit is 1048576"),
            (json!({"memory": {"limit": 1u64 << 50}}), "memory.limit is 1125899906842624"),
            (json!({"memory": {"limit": -5}}), "memory.limit is -5"),
            (json!({"cpu": {"quota": 100_000_000}}), "cpu.quota"),
            (json!({"cpu": {"cpus": "0-999"}}), "0-999"),
            (json!({"cpu": {"cpus": "a"}}), "\"a\""),
        ] {
            let error = size(&[], resources, &none()).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        for (key, value) in [
            (ANNOTATION_VCPUS, "0"),
            (ANNOTATION_VCPUS, "1000"),
            (ANNOTATION_VCPUS, "-1"),
            (ANNOTATION_VCPUS, "many"),
            (ANNOTATION_MEMORY, "1M"),
            (ANNOTATION_MEMORY, "1024T"),
            (ANNOTATION_MEMORY, "-1"),
            (ANNOTATION_MEMORY, "99999999999999999999999999T"),
            (ANNOTATION_MEMORY, "1X"),
            (ANNOTATION_MEMORY, ""),
        ] {
            let error = size(&[(key, value)], json!({}), &none()).unwrap_err().to_string();
            assert!(error.contains(key) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn an_annotation_that_is_not_known_changes_nothing() {
        let plain = size(&[], json!({}), &Settings::default()).unwrap();
        assert_eq!(
            size(&[("io.stockade.kernel", "/bin/sh")], json!({}), &Settings::default()).unwrap(),
            plain
        );
    }

    #[test]
    fn an_update_is_held_against_what_a_vm_can_have() {
        let limit = |limit: u64| json!({"memory": {"limit": limit}});
        let vm = size(&[], limit(100 * MIB + 1), &Settings::default()).unwrap();
        let check = |json| vm.check_update(&serde_json::from_value(json).unwrap());
        for fits in [limit(900 * MIB), limit(8 * MIB), json!({"memory": {"limit": -1}}), json!({})] {
            check(fits.clone()).unwrap_or_else(|e| panic!("{fits}: {e}"));
        }
        check(json!({"cpu": {"quota": 100_000}})).unwrap();
        assert!(matches!(check(limit(1)), Err(Error::Limit { .. })));
        assert!(matches!(check(limit(MAX_MEMORY + 1)), Err(Error::Limit { .. })));
        assert!(matches!(check(json!({"cpu": {"quota": 100_001}})), Err(Error::Quota { .. })));
    }

    #[test]
    fn a_vm_has_room_for_the_limits_of_all_and_its_own_needs() {
        let vm = |annotations: &[(&str, &str)], resources| {
            let annotations = annotations.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            let resources: LinuxResources = serde_json::from_value(resources).unwrap();
            VmSize::of(Some(&annotations), Some(&resources), &Settings::default()).unwrap()
        };
        let limit = |limit: u64| json!({"memory": {"limit": limit}});
        let of = |limits: &[Option<u64>], (size, by)| {
            let mut demand = Demand::new(size, by);
            for (index, limit) in limits.iter().enumerate() {
                demand.count(&index.to_string(), *limit);
            }
            demand.memory()
        };
        let (small, large) = (Some(128 * MIB), Some(512 * MIB));
        let limited = vm(&[], limit(128 * MIB));
        assert_eq!(of(&[small], limited).unwrap(), limited.0.memory);
        assert_eq!(of(&[small, large, None], limited).unwrap(), (640 + 64 + 10) * MIB);
        // What there is without a limit is for who has none.
        let default = vm(&[], json!({}));
        assert!(of(&[None], default).unwrap() <= default.0.memory);
        assert!(of(&[small], default).unwrap() <= default.0.memory);
        assert_eq!(of(&[large], default).unwrap(), (512 + 64 + 8) * MIB);
        let more = of(&[None, large], default).unwrap();
        assert!((768 * MIB..780 * MIB).contains(&more), "{more}");
        // And who has named the size has named it for all.
        let named = vm(&[(ANNOTATION_MEMORY, "1G")], json!({}));
        assert!(of(&[None, large], named).unwrap() < 1 << 30);
        for absurd in [&[Some(MAX_MEMORY)][..], &[Some(u64::MAX), Some(u64::MAX)]] {
            assert!(matches!(of(absurd, default), Err(Error::Sum { .. })));
        }
    }

    #[test]
    fn a_container_counts_once_and_not_when_it_has_gone() {
        let mut demand = Demand::new(VmSize { vcpus: 1, memory: 194 * MIB }, By::Limit);
        let none = demand.memory().unwrap();
        assert_eq!(demand.count("a", Some(64 * MIB)), None);
        let one = demand.memory().unwrap();
        assert_eq!(demand.count("a", Some(128 * MIB)), Some(Some(64 * MIB)));
        assert!((64 * MIB..67 * MIB).contains(&(demand.memory().unwrap() - one)));
        demand.forget("a");
        assert_eq!(demand.memory().unwrap(), none);
    }

    #[test]
    fn a_limit_that_comes_to_nothing_is_taken_back_but_brings_nobody_back() {
        let mut demand = Demand::new(VmSize { vcpus: 1, memory: 194 * MIB }, By::Limit);
        demand.count("a", Some(64 * MIB));
        let one = demand.memory().unwrap();
        for container in ["a", "b"] {
            let before = demand.count(container, Some(512 * MIB));
            demand.restore(container, before);
            assert_eq!(demand.memory().unwrap(), one, "{container}");
        }
        let before = demand.count("a", None);
        demand.forget("a");
        let none = demand.memory().unwrap();
        demand.restore("a", before);
        assert_eq!(demand.memory().unwrap(), none);
    }

    #[test]
    fn two_gibibytes_and_more_are_fine() {
        let size = size(&[(ANNOTATION_MEMORY, "6G")], json!({}), &Settings::default()).unwrap();
        assert_eq!(size.memory, 6 << 30);
    }
}
