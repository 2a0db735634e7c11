//! Checks of `process`, of a container or of an exec.

use oci_spec::runtime::{LinuxSchedulerPolicy, Process, Scheduler};

use super::{unsupported, value};
use crate::bundle::Error;

/// Niceness of an ordinary process (sched(7)).
const NICE: std::ops::RangeInclusive<i32> = -20..=19;
/// Priority of a real-time process (sched(7)).
const REALTIME: std::ops::RangeInclusive<i32> = 1..=99;
/// Priority of I/O in its class (ioprio_set(2)).
const IO_PRIORITY: std::ops::RangeInclusive<i64> = 0..=7;
/// Adjustment of the OOM killer's score (proc(5)).
const OOM_SCORE: std::ops::RangeInclusive<i32> = -1000..=1000;

/// Checks a process, of a container or of an exec.
pub fn check_process(process: &Process) -> Result<(), Error> {
    match process.args().as_deref() {
        None | Some([]) => return Err(Error::Missing("process.args", "it names the program to run")),
        Some([program, ..]) if program.is_empty() => {
            return value("process.args[0]", "", "name the program to run");
        }
        _ => {}
    }
    if !process.cwd().is_absolute() {
        return value("process.cwd", &process.cwd().to_string_lossy(), "give an absolute path");
    }
    for (index, entry) in process.env().iter().flatten().enumerate() {
        if !entry.contains('=') || entry.contains('\0') {
            return value(&format!("process.env[{index}]"), entry, "write NAME=value");
        }
    }
    if process.apparmor_profile().as_deref().is_some_and(|p| !p.is_empty() && p != "unconfined") {
        return unsupported("process.apparmorProfile", "the guest kernel has no AppArmor; remove it");
    }
    if process.selinux_label().as_deref().is_some_and(|l| !l.is_empty()) {
        return unsupported("process.selinuxLabel", "the guest kernel has no SELinux; remove it");
    }
    check_limits(process)?;
    if let Some(umask) = process.user().umask().filter(|umask| *umask > 0o777) {
        return value("process.user.umask", &format!("{umask:#o}"), "give permission bits, at most 0777");
    }
    if let Some(score) = process.oom_score_adj().filter(|score| !OOM_SCORE.contains(score)) {
        return value("process.oomScoreAdj", &score.to_string(), "give -1000 to 1000");
    }
    if let Some(priority) = process.io_priority().as_ref().map(|io| io.priority())
        && !IO_PRIORITY.contains(&priority)
    {
        return value("process.ioPriority.priority", &priority.to_string(), "give 0 to 7");
    }
    if let Some(scheduler) = process.scheduler() {
        check_scheduler(scheduler)?;
    }
    Ok(())
}

fn check_limits(process: &Process) -> Result<(), Error> {
    let mut seen = Vec::new();
    for (index, limit) in process.rlimits().iter().flatten().enumerate() {
        let field = |name: &str| format!("process.rlimits[{index}].{name}");
        if seen.contains(&limit.typ()) {
            return value(&field("type"), &limit.typ().to_string(), "name each type once");
        }
        seen.push(limit.typ());
        if limit.soft() > limit.hard() {
            return value(&field("soft"), &limit.soft().to_string(), "a soft limit is at most the hard one");
        }
    }
    Ok(())
}

fn check_scheduler(scheduler: &Scheduler) -> Result<(), Error> {
    use LinuxSchedulerPolicy as Policy;
    let policy = *scheduler.policy();
    if policy == Policy::SchedIso {
        return unsupported("process.scheduler.policy", "Linux never had SCHED_ISO; use SCHED_OTHER");
    }
    let priority = scheduler.priority().unwrap_or(0);
    let fits = match policy {
        Policy::SchedFifo | Policy::SchedRr => REALTIME.contains(&priority),
        _ => priority == 0,
    };
    if !fits {
        return value(
            "process.scheduler.priority",
            &priority.to_string(),
            "give 1 to 99 with SCHED_FIFO or SCHED_RR, and none with other policies",
        );
    }
    if let Some(nice) = scheduler.nice().filter(|nice| !NICE.contains(nice)) {
        return value("process.scheduler.nice", &nice.to_string(), "give -20 to 19");
    }
    let times = [scheduler.runtime(), scheduler.deadline(), scheduler.period()];
    if policy != Policy::SchedDeadline && times.iter().any(|time| time.unwrap_or(0) != 0) {
        return value(
            "process.scheduler.runtime",
            &format!("{:?}", times.map(|time| time.unwrap_or(0))),
            "runtime, deadline and period go with SCHED_DEADLINE only",
        );
    }
    Ok(())
}
