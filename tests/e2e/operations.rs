//! What somebody who runs a host asks: which VMs there are, what their guests have said, where the time of a start went.

use serde_json::{Value, json};

use crate::harness::{Bundle, Case, Container, HANG, Program, Runtime, Stdin, case, tool, vmm_of};

const OURS: &str = "a command of stockade's own";

pub const CASES: &[Case] = &[
    case!(sandboxes_are_listed_with_their_pods_and_memory).stockade_only(OURS),
    case!(logs_have_what_the_guest_has_said).stockade_only(OURS),
    case!(metrics_have_what_prometheus_reads).stockade_only(OURS),
    case!(trace_shows_a_start_from_the_process_to_the_workload).stockade_only(OURS),
];

fn call(container: &Container, words: &[&str]) -> String {
    Runtime::under_test().call(&[words, &[container.id.as_str()]].concat()).ok()
}

fn sandboxes_are_listed_with_their_pods_and_memory() {
    let annotations =
        json!({ "io.kubernetes.cri.sandbox-namespace": "shop", "io.kubernetes.cri.sandbox-name": "cart-7" });
    let container =
        Runtime::under_test().start(&Bundle::idle().set("/annotations", annotations), Stdin::Null);
    container.program.expect_line("ready");
    let id = container.id.as_str().to_owned();
    let listed = || {
        let text = Runtime::under_test().call(&["sandboxes", "--format", "json"]).ok();
        let all: Vec<Value> = serde_json::from_str(&text).unwrap();
        all.into_iter().find(|sandbox| sandbox["id"] == *id)
    };
    let sandbox = listed().expect("it is listed");
    assert_eq!((&sandbox["pod"], &sandbox["status"]), (&json!("shop/cart-7"), &json!("running")));
    assert_eq!((&sandbox["vcpus"], &sandbox["memoryBytes"]), (&json!(1), &json!(256 << 20)));
    assert_eq!(sandbox["pid"], container.program.pid());
    let used = sandbox["usedBytes"].as_u64().unwrap() >> 20;
    assert!((10..256).contains(&used), "{used} MiB");
    let table = Runtime::under_test().call(&["sandboxes"]).ok();
    let row = table.lines().find(|line| line.starts_with(&id)).expect("it is in the table");
    assert!(row.contains("shop/cart-7") && row.contains("256M"), "{row}");
    container.kill("KILL");
    container.finish();
    assert_eq!(listed(), None);
}

fn logs_have_what_the_guest_has_said() {
    let script = "echo ready; read line; printf '<0>said \\033[2J by the guest\\n' > /dev/kmsg; echo written; exec sleep 100000";
    let bundle = Bundle::sh(script)
        .push(
            "/linux/devices",
            json!({ "path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11, "fileMode": 0o600 }),
        )
        .set("/linux/resources/devices", json!([{ "allow": true, "access": "rwm" }]));
    let mut container = Runtime::under_test().start(&bundle, Stdin::Pipe);
    container.program.expect_line("ready");
    let before = call(&container, &["logs"]);
    assert!(!before.contains("by the guest"), "{before}");
    container.program.write(b"go on\n");
    container.program.expect_line("written");
    // By another way than the line above.
    let begin = std::time::Instant::now();
    while !call(&container, &["logs"]).contains("said  [2J by the guest") {
        assert!(begin.elapsed() < HANG, "{}", call(&container, &["logs"]));
    }
    container.kill("KILL");
    container.finish();
    let reason = Runtime::under_test().call(&["logs", "none-of-this-name"]).refused();
    assert!(reason.contains("none-of-this-name") && reason.contains("stockade sandboxes"), "{reason}");
}

fn trace_shows_a_start_from_the_process_to_the_workload() {
    let container = Runtime::under_test().create(&Bundle::idle());
    let id = container.id.as_str().to_owned();
    let reason = Runtime::under_test().call(&["trace", &id]).refused();
    assert!(reason.contains(&id) && reason.contains("has run"), "{reason}");
    container.op("start").ok();
    let trace: Value = serde_json::from_str(&call(&container, &["trace"])).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let end = |name: &str| {
        let span = events.iter().find(|event| event["name"] == name && event["ph"] == "X");
        let span = span.unwrap_or_else(|| panic!("no {name}: {trace}"));
        span["ts"].as_f64().unwrap() + span["dur"].as_f64().unwrap()
    };
    let order =
        ["vmm_spawned", "first_guest_instruction", "guest_init_started", "agent_ready", "container_started"];
    assert!(order.windows(2).all(|two| end(two[0]) <= end(two[1])), "{trace}");
}

/// The value of a sample without labels but these.
fn sample(text: &str, name: &str) -> f64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().expect("a number"))
}

fn metrics_have_what_prometheus_reads() {
    let server =
        Program::spawn(Runtime::under_test().command(["metrics", "--listen", "127.0.0.1:0"]), Stdin::Null);
    let line = server.line();
    let url = line.strip_prefix("serving ").unwrap_or_else(|| panic!("{line}"));
    let scrape = || tool(&format!("curl -sf {url}"));
    let before = scrape();
    let container = Runtime::under_test().start(&Bundle::idle(), Stdin::Null);
    container.program.expect_line("ready");
    let during = scrape();
    let booted = "stockade_boot_seconds_count";
    assert!(sample(&during, booted) > sample(&before, booted), "{during}");
    let part = |part| {
        format!("stockade_sandbox_memory_bytes{{sandbox=\"{}\",part=\"{part}\"}}", container.id.as_str())
    };
    assert!(sample(&during, &part("vmm")) > 10e6 && sample(&during, &part("supervisor")) > 1e5, "{during}");
    // A VM that is killed is a failure.
    let failed = "stockade_failures_total{reason=\"vm_ended\"}";
    let vmm = vmm_of(container.program.pid()).expect("a VMM");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(vmm), nix::sys::signal::Signal::SIGKILL).unwrap();
    container.finish();
    let after = scrape();
    assert!(sample(&after, failed) > sample(&during, failed), "{after}");
}
