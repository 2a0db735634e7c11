//! What somebody who runs a host asks: which VMs there are, what their guests have said, where the time of a start went.

use serde_json::{Value, json};

use crate::harness::{
    Bundle, Case, Container, Exit, HANG, Program, Pty, Runtime, Stdin, case, tool, vmm_of, wait_gone,
};

const OURS: &str = "a command of stockade's own";

pub const CASES: &[Case] = &[
    case!(sandboxes_are_listed_with_their_pods_and_memory).stockade_only(OURS),
    case!(logs_have_what_the_guest_has_said).stockade_only(OURS),
    case!(metrics_have_what_prometheus_reads).stockade_only(OURS),
    case!(trace_shows_a_start_from_the_process_to_the_workload).stockade_only(OURS),
    case!(nobody_enters_a_sandbox_for_which_the_host_has_not_allowed_it).stockade_only(OURS),
    case!(who_enters_is_outside_of_the_containers_with_programs_of_the_host).stockade_only(OURS),
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

/// Has sandboxes started that may be entered.
fn allowing() -> Runtime {
    Runtime::under_test().env("STOCKADE_ENTER", "1")
}

fn nobody_enters_a_sandbox_for_which_the_host_has_not_allowed_it() {
    // What comes with a container is not the host's word.
    let annotations = json!({ "io.stockade.enter": "1", "io.stockade.vm.enter": "true" });
    let bundle = Bundle::idle().set("/annotations", annotations).push("/process/env", "STOCKADE_ENTER=1");
    let container = Runtime::under_test().start(&bundle, Stdin::Null);
    container.program.expect_line("ready");
    let id = container.id.as_str();
    // Nor does it help to say so later.
    for runtime in [Runtime::under_test(), allowing()] {
        let reason = runtime.call(&["enter", id, "ps"]).code(255).refused();
        assert!(reason.contains("enter = true") && reason.contains("STOCKADE_ENTER=1"), "{reason}");
    }
    let words = container.exec("cat /proc/cmdline").ok();
    assert!(words.contains("loglevel") && !words.contains("enter"), "{words}");
    let reason = allowing().call(&["enter", "none-of-this-name"]).code(255).refused();
    assert!(reason.contains("none-of-this-name"), "{reason}");
    let wrong = Runtime::under_test().env("STOCKADE_ENTER", "perhaps");
    let reason = wrong.run(&Bundle::idle()).refused();
    assert!(reason.contains("STOCKADE_ENTER") && reason.contains("perhaps"), "{reason}");
}

fn who_enters_is_outside_of_the_containers_with_programs_of_the_host() {
    let container = allowing().start(&Bundle::idle(), Stdin::Null);
    container.program.expect_line("ready");
    let id = container.id.as_str();
    let enter = |words: &[&str]| Runtime::under_test().call(&[&["enter", id], words].concat());
    let processes = enter(&["ps", "-o", "pid,comm,args"]).ok();
    assert!(processes.contains("/init") && processes.contains("sleep 1"), "{processes}");
    assert!(enter(&["mount"]).ok().contains("virtiofs"));
    assert!(enter(&["dmesg"]).ok().contains("Linux version"));
    let script = "for n in pid mnt net; do a=$(readlink /proc/1/ns/$n) b=$(readlink /proc/self/ns/$n); \
                  [ $a = $b ] && echo same; done; grep CapEff /proc/self/status; cat /proc/self/cgroup; exit 7";
    let ended = enter(&["sh", "-c", script]).code(7);
    let said: Vec<_> = std::str::from_utf8(&ended.stdout).unwrap().lines().collect();
    assert_eq!(said[..3], ["same"; 3], "{said:?}");
    assert_eq!(u64::from_str_radix(&said[3][8..], 16).unwrap().count_ones(), 41, "{said:?}");
    assert!(said[4].starts_with("0::/enter-"), "{said:?}");
    let reason = enter(&["--program", "/bin/sh"]).code(255).refused();
    assert!(reason.contains("/bin/sh") && reason.contains("busybox-static"), "{reason}");

    let words = ["enter", id, "sh", "-c", "while read word; do echo got $word; done; echo error >&2"];
    let mut program = Program::spawn(Runtime::under_test().command(words), Stdin::Pipe);
    program.write("one\n");
    program.expect_line("got one");
    program.close_stdin();
    let ended = program.finish();
    assert_eq!((ended.exit, ended.stderr.as_str()), (Exit::Code(0), "error\n"), "{ended:?}");

    // A shell, where there is a terminal.
    let (terminal, slave) = Pty::open(19, 71);
    let mut command = Runtime::under_test().command(["enter", id]);
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
    let mut shell = Program::spawn_raw(command, Stdin::Null);
    terminal.write("stty -echo; tty; stty size; echo $TERM; sleep 4711 & echo $!; wait\n");
    while !terminal.line().contains("/dev/pts/") {}
    terminal.expect_line("19 71");
    let runs = || enter(&["ps"]).ok().contains("sleep 4711");
    let begin = std::time::Instant::now();
    while !runs() {
        assert!(begin.elapsed() < HANG, "{}", terminal.output.text());
    }
    // Who goes takes what he has begun along.
    shell.signal(nix::sys::signal::Signal::SIGKILL);
    assert_eq!(shell.exit(), Exit::Signal(9));
    while runs() {
        assert!(begin.elapsed() < HANG);
    }

    // The sandbox's end is the end of all in it.
    let mut inside = Program::spawn(
        Runtime::under_test().command(["enter", id, "sh", "-c", "echo in; sleep 100000"]),
        Stdin::Null,
    );
    inside.expect_line("in");
    let vmm = vmm_of(container.program.pid()).unwrap();
    container.kill("KILL");
    let ended = inside.finish();
    assert!(ended.exit == Exit::Code(255) && ended.stderr.contains("has ended"), "{ended:?}");
    container.finish();
    wait_gone(vmm);
}
