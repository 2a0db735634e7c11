//! A container that is given more memory while it runs has it, in its own VM and in another's; and what it is not given
//! any more goes back to the host.

use serde_json::{Value, json};

use crate::harness::{Bundle, Case, Container, Runtime, Stdin, case};
use crate::shared::{NETWORK, sharing};

const VM: &str = "the size of the VM";

pub const CASES: &[Case] = &[
    case!(more_memory_than_at_the_beginning_is_there_to_use),
    case!(container_in_anothers_vm_has_the_memory_of_its_limit),
    case!(vm_is_as_large_as_the_limits_of_its_containers).stockade_only(VM),
    case!(limits_that_no_vm_can_have_are_refused_and_change_nothing).stockade_only(VM),
];

const MIB: u64 = 1 << 20;

/// Needs so many MiB of memory at once, and says so when it has had them.
fn take(mebibytes: u64) -> String {
    format!("dd if=/dev/zero of=/dev/null bs={mebibytes}M count=1 2>/dev/null && echo taken")
}

fn limited(limit: u64) -> Bundle {
    Bundle::idle().set("/linux/resources/memory", memory(limit))
}

fn memory(limit: u64) -> Value {
    json!({ "limit": limit * MIB, "swap": limit * MIB })
}

fn running(runtime: &Runtime, bundle: &Bundle) -> Container {
    let container = runtime.create(bundle);
    container.op("start").ok();
    container.program.expect_line("ready");
    container
}

fn update(container: &Container, size: &str) {
    container.op_with(&["update", "--memory", size, "--memory-swap", size], &[]).ok();
}

/// Memory of a container's VM in MiB, as the host knows it and as the guest does.
fn size_of(container: &Container) -> [u64; 2] {
    let listed = Runtime::under_test().call(&["sandboxes", "--format", "json"]).ok();
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let is_it = |one: &&Value| one["id"] == container.id.as_str();
    let host = listed.as_array().unwrap().iter().find(is_it).expect("the sandbox is listed");
    let guest = container.exec("awk '/^MemTotal:/ { print $2 }' /proc/meminfo").ok();
    [host["memoryBytes"].as_u64().unwrap() / MIB, guest.trim().parse::<u64>().unwrap() >> 10]
}

fn more_memory_than_at_the_beginning_is_there_to_use() {
    let container = running(&Runtime::under_test(), &limited(128));
    container.exec(&take(400)).code(137);
    update(&container, "600M");
    assert_eq!(container.exec("cat /sys/fs/cgroup/memory.max").ok(), "629145600\n");
    assert_eq!(container.exec(&take(400)).ok(), "taken\n");
    // Files in memory are counted too.
    assert_eq!(
        container.exec("dd if=/dev/zero of=/dev/shm/x bs=1M count=40 2>/dev/null; echo $?").ok(),
        "0\n"
    );
    update(&container, "128M");
    assert_eq!(
        container.exec("cat /sys/fs/cgroup/memory.max; wc -c < /dev/shm/x").ok(),
        "134217728\n41943040\n"
    );
    container.exec(&take(400)).code(137);
    assert_eq!(container.exec(&take(50)).ok(), "taken\n");
    update(&container, "600M");
    assert_eq!(container.exec(&take(400)).ok(), "taken\n");
}

fn container_in_anothers_vm_has_the_memory_of_its_limit() {
    let runtime = Runtime::under_test();
    let first = running(&runtime, &limited(64));
    let large =
        sharing(Bundle::sh(&take(400)).set("/linux/resources/memory", memory(600)), &first, &[NETWORK]);
    assert_eq!(runtime.run_with(&large, Stdin::Null).ok(), "taken\n");
    let small =
        sharing(Bundle::sh(&take(400)).set("/linux/resources/memory", memory(100)), &first, &[NETWORK]);
    runtime.run_with(&small, Stdin::Null).code(137);
    assert_eq!(first.exec("echo unharmed").ok(), "unharmed\n");
}

fn vm_is_as_large_as_the_limits_of_its_containers() {
    let runtime = Runtime::under_test();
    let first = running(&runtime, &limited(128));
    let began = size_of(&first);
    let within = |[host, guest]: [u64; 2], least: u64| {
        // Less the kernel itself and its page array; more by part of a block at most.
        assert!((least..least + 320).contains(&host), "{host} MiB for {least}");
        assert!((host * 9 / 10 - 40..=host).contains(&guest), "{guest} MiB of {host}");
    };
    within(began, 128 + 64);
    // No more in all than what can be memory that is given back: three times what the VM began with.
    update(&first, "300M");
    let alone = size_of(&first);
    within(alone, 300 + 64);
    let second = runtime.create(&sharing(limited(200), &first, &[NETWORK]));
    within(size_of(&first), 500 + 64);
    second.op_with(&["delete", "--force"], &[]).ok();
    // Nobody waits until its memory has gone back, but whoever is next for the VM's memory.
    update(&first, "300M");
    assert_eq!(size_of(&first), alone);
    update(&first, "128M");
    assert_eq!(size_of(&first), began);
    // A limit is none of this any more once it is lifted; what there was stays.
    update(&first, "-1");
    assert_eq!(size_of(&first), began);
    // Who has named the VM's size has named it for whoever comes, and may still say otherwise.
    let named = limited(64).set("/annotations", json!({ "io.stockade.memory": "192M" }));
    let named = running(&runtime, &named);
    let third = runtime.create(&sharing(limited(500), &named, &[NETWORK]));
    assert_eq!(size_of(&named)[0], 192);
    update(&third, "400M");
    within(size_of(&named), 464 + 64);
    third.op_with(&["delete", "--force"], &[]).ok();
}

fn limits_that_no_vm_can_have_are_refused_and_change_nothing() {
    let runtime = Runtime::under_test();
    let container = running(&runtime, &limited(128));
    let began = size_of(&container);
    for absurd in ["2T", "1T", "1M", "9223372036854775807"] {
        let reason = container.op_with(&["update", "--memory", absurd], &[]).refused();
        assert!(reason.contains("memory") && reason.lines().count() == 1, "{absurd}: {reason}");
    }
    assert_eq!(container.exec("cat /sys/fs/cgroup/memory.max").ok(), "134217728\n");
    assert_eq!(size_of(&container), began);
    let joining = sharing(limited(1 << 20), &container, &[NETWORK]);
    let reason = runtime.run(&joining).refused();
    assert!(reason.contains("memory"), "{reason}");
    assert_eq!(container.exec(&take(50)).ok(), "taken\n");
}
