//! Many containers, one after another and at once, leave nothing behind, and what stays does not grow.

use std::fs;

use crate::harness::{Bundle, Case, Container, Runtime, Stdin, case};

pub const CASES: &[Case] = &[
    case!(fifty_runs_in_sequence_leave_nothing).exclusive(),
    case!(eight_runs_at_once_leave_nothing).exclusive(),
    case!(fifty_execs_leave_nothing_in_the_container),
];

/// What a process and its descendants hold of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    processes: usize,
    threads: usize,
    descriptors: usize,
    /// KiB of private and proportionally shared memory.
    memory: usize,
}

impl Held {
    /// By the processes of a container on the host, found from its host process.
    fn by(container: &Container) -> Self {
        let mut held = Self { processes: 0, threads: 0, descriptors: 0, memory: 0 };
        let mut pids = vec![container.pid()];
        while let Some(pid) = pids.pop() {
            let proc = |file: &str| format!("/proc/{pid}/{file}");
            let Ok(tasks) = fs::read_dir(proc("task")) else { continue };
            held.processes += 1;
            for task in tasks.flatten() {
                held.threads += 1;
                let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
                pids.extend(children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
            }
            held.descriptors += fs::read_dir(proc("fd")).map_or(0, Iterator::count);
            let rollup = fs::read_to_string(proc("smaps_rollup")).unwrap_or_default();
            let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap_or("0");
            held.memory += pss.trim().trim_end_matches(" kB").parse::<usize>().unwrap_or(0);
        }
        held
    }
}

/// Memory of the host that is neither free nor a cache that could be, in KiB.
fn memory_in_use() -> usize {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let value = |name: &str| -> usize {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
    };
    value("MemTotal") - value("MemAvailable")
}

fn fifty_runs_in_sequence_leave_nothing() {
    let runtime = Runtime::under_test();
    let bystander = runtime.idle();
    let run = |number: usize| {
        let text = runtime.run(&Bundle::sh(&format!("echo {number}"))).ok();
        assert_eq!(text, format!("{number}\n"));
    };
    // The first few fill caches and pools of the host's kernel.
    (0..5).for_each(run);
    let before = (Held::by(&bystander), memory_in_use());
    (5..55).for_each(run);
    let after = (Held::by(&bystander), memory_in_use());

    assert_eq!(
        (after.0.processes, after.0.threads, after.0.descriptors),
        (before.0.processes, before.0.threads, before.0.descriptors),
        "{before:?} {after:?}"
    );
    // 200 KiB a run would be 10 MiB; the host's own caches are coarser than nothing.
    assert!(after.0.memory <= before.0.memory + 2048, "{before:?} {after:?}");
    assert!(after.1 <= before.1 + 10 * 1024, "{before:?} {after:?}");
    assert_eq!(bystander.exec("echo well").ok(), "well\n");
}

fn eight_runs_at_once_leave_nothing() {
    let runtime = Runtime::under_test();
    // Each waits for its word, so that all eight are alive at the same time.
    let bundle = Bundle::sh("echo ready; read word; seq 1 50000; echo $word");
    let mut containers: Vec<_> = (0..8).map(|_| runtime.start(&bundle, Stdin::Pipe)).collect();
    for container in &containers {
        container.program.expect_line("ready");
    }
    let expected: String = (1..=50_000).map(|number| format!("{number}\n")).collect();
    for (number, container) in containers.iter_mut().enumerate() {
        container.program.write(format!("word-{number}\n"));
    }
    for (number, container) in containers.into_iter().enumerate() {
        let text = container.finish().ok();
        assert!(
            text == format!("ready\n{expected}word-{number}\n"),
            "container {number}: {} bytes",
            text.len()
        );
    }
}

fn fifty_execs_leave_nothing_in_the_container() {
    let container = Runtime::under_test().idle();
    let exec =
        |number: usize| assert_eq!(container.exec(&format!("echo {number}")).ok(), format!("{number}\n"));
    (0..5).for_each(exec);
    let before = Held::by(&container);
    (5..55).for_each(exec);
    let after = Held::by(&container);
    assert_eq!(
        (after.processes, after.threads, after.descriptors),
        (before.processes, before.threads, before.descriptors)
    );
    // The guest may touch a few more of its pages; a mebibyte an exec would be a leak.
    assert!(after.memory <= before.memory + 16 * 1024, "{before:?} {after:?}");
    // The workload and this shell.
    assert_eq!(
        container.exec("set -- /proc/[0-9]*; echo $#").ok(),
        "2
"
    );
}
