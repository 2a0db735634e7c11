//! VM exits of one run, by reason, counted by the kernel.
//!
//! The counters in debugfs vanish with the VM, so tracefs's hist triggers count instead: one on `kvm_exit`
//! for every exit, one on `kvm_userspace_exit` for those that reach the VMM. The names of the numbers are in
//! the events' own format files. Documentation/trace/histogram.rst.

use super::runtimes::{self, Bundle, Runtime};
use super::{Context, Plan, result::Results};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::PathBuf;

const CASE: &str = "run-echo-exits";
/// Reasons that get a row of their own; the others are summed up.
const SHOWN: usize = 12;

/// Counts the exits of `plan.runs` runs.
pub fn measure(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let bundle = Bundle::new(&["echo", runtimes::GREETING])?;
    runtime.run_echo(&bundle, None)?;
    let all = Counter::new("kvm_exit", "exit_reason")?;
    let user = Counter::new("kvm_userspace_exit", "reason")?;
    let (mut totals, mut to_user) = (Vec::new(), Vec::new());
    let mut reasons: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for run in 0..plan.runs {
        all.clear()?;
        user.clear()?;
        runtime.run_echo(&bundle, None)?;
        let counts = all.read()?;
        totals.push(counts.iter().map(|(_, count)| count).sum());
        to_user.push(user.read()?.iter().map(|(_, count)| count).sum());
        for (reason, count) in counts {
            // A reason that one of the runs did not have counts zero there.
            let samples = reasons.entry(reason).or_default();
            samples.resize(run, 0.0);
            samples.push(count);
        }
    }
    results.add(CASE, &runtime.name, "exits", "count", &totals);
    results.add(CASE, &runtime.name, "exits_to_user", "count", &to_user);
    let mut reasons: Vec<_> = reasons.into_iter().collect();
    reasons.iter_mut().for_each(|(_, samples)| samples.resize(plan.runs, 0.0));
    reasons.sort_by(|a, b| b.1.iter().sum::<f64>().total_cmp(&a.1.iter().sum()));
    let rest = reasons.split_off(reasons.len().min(SHOWN));
    for (reason, samples) in reasons {
        results.add(CASE, &runtime.name, &format!("reason.{reason}"), "count", &samples);
    }
    if !rest.is_empty() {
        let sums: Vec<f64> =
            (0..plan.runs).map(|run| rest.iter().filter_map(|(_, samples)| samples.get(run)).sum()).collect();
        results.add(CASE, &runtime.name, "reason.others", "count", &sums);
    }
    Ok(())
}

/// A hist trigger on one event of KVM, taken away again when dropped.
pub struct Counter {
    folder: PathBuf,
    key: &'static str,
    names: BTreeMap<u64, String>,
}

impl Counter {
    /// Counts from now on.
    pub fn new(event: &str, key: &'static str) -> Result<Counter, String> {
        let folder = PathBuf::from("/sys/kernel/tracing/events/kvm").join(event);
        let format =
            fs::read_to_string(folder.join("format")).or_say(format!("read the format of {event}"))?;
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").or_say("read /proc/cpuinfo")?;
        let names = names(&format, cpuinfo.split_whitespace().any(|flag| flag == "svm"));
        let counter = Counter { folder, key, names };
        counter.trigger(&format!("hist:keys={key}"))?;
        Ok(counter)
    }

    /// Adds to what is set: opening the file truncated would remove all triggers (Linux, trace/events.rst).
    fn trigger(&self, text: &str) -> Result<(), String> {
        let file = fs::File::options().append(true).open(self.folder.join("trigger"));
        file.and_then(|mut file| file.write_all(text.as_bytes())).or_say(format!("set the trigger {text}"))
    }

    /// Begins again from zero.
    pub fn clear(&self) -> Result<(), String> {
        self.trigger(&format!("hist:keys={}:clear", self.key))
    }

    /// Reasons and how often each was there.
    pub fn read(&self) -> Result<Vec<(String, f64)>, String> {
        let text = fs::read_to_string(self.folder.join("hist")).or_say("read the count of exits")?;
        let name = |number: u64| self.names.get(&number).cloned().unwrap_or_else(|| format!("{number:#x}"));
        Ok(counts(&text).into_iter().map(|(number, count)| (name(number), count)).collect())
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        let _ = self.trigger(&format!("!hist:keys={}", self.key));
    }
}

/// The lines `{ exit_reason: 123 } hitcount: 2` of a histogram.
fn counts(hist: &str) -> Vec<(u64, f64)> {
    let line = |line: &str| {
        let (key, count) = line.strip_prefix('{')?.split_once('}')?;
        let number = key.rsplit_once(':')?.1.trim().parse().ok()?;
        Some((number, count.rsplit_once(':')?.1.trim().parse().ok()?))
    };
    hist.lines().filter_map(line).collect()
}

/// The names of exit reasons in the event's print format, whose `__print_symbolic` lists have entries like
/// `{ 0x040 + 14, "PF excp" }`. `kvm_exit` has two lists, for VMX first, then for SVM.
fn names(format: &str, svm: bool) -> BTreeMap<u64, String> {
    let lists: Vec<&str> = format.split("__print_symbolic(").skip(1).collect();
    let list = if svm { lists.last() } else { lists.first() };
    let entry = |entry: &str| {
        let (value, name) = entry.split_once(',')?;
        Some((evaluate(value)?, name.split('"').nth(1)?.to_string()))
    };
    list.into_iter().flat_map(|list| list.split('{').skip(1)).filter_map(entry).collect()
}

fn evaluate(sum: &str) -> Option<u64> {
    sum.split('+')
        .map(|term| match term.trim().strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => term.trim().parse().ok(),
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_read() {
        let hist = "# event histogram\n#\n\n{ exit_reason:       1024 } hitcount:         12\n\
                    { exit_reason:        123 } hitcount:          2\n\nTotals:\n    Hits: 3\n";
        assert_eq!(counts(hist), [(1024, 12.0), (123, 2.0)]);
    }

    #[test]
    fn reasons_have_the_names_of_their_processor() {
        let format = r#"print fmt: "reason %s", (REC->isa == 1) ? __print_symbolic(REC->exit_reason & 0xffff, { 0, "EXCEPTION_NMI" }, { 10, "CPUID" }) : __print_symbolic(REC->exit_reason, { 0x040 + 14, "PF excp" }, { 0x400, "npf" }, { -1, "invalid" }), REC->guest_rip"#;
        let svm = names(format, true);
        assert_eq!(svm.get(&0x400).map(String::as_str), Some("npf"));
        assert_eq!(svm.get(&0x4e).map(String::as_str), Some("PF excp"));
        assert_eq!(svm.len(), 2);
        assert_eq!(names(format, false).get(&10).map(String::as_str), Some("CPUID"));
    }
}
