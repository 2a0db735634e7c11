//! What the agent must do, each case a sentence.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stockade_agent_protocol::messages::{
    Empty, HandshakeRequest, ResizeRequest, SignalRequest, Stdio, UpdateRequest, event,
};
use stockade_agent_protocol::service::AgentClient;
use stockade_agent_protocol::{PROTOCOL_VERSION, Stream};
use ttrpc::Code;

use crate::guest::*;

/// Runs every case whose name contains the filter of the kernel command line.
pub async fn run() {
    let agent = dial().await;
    handshake_must_come_first(&agent).await;
    set_up(&agent).await;
    let filter = std::fs::read_to_string("/proc/cmdline")
        .ok()
        .and_then(|l| {
            l.split_ascii_whitespace().find_map(|w| w.strip_prefix("stockade.filter=").map(str::to_owned))
        })
        .unwrap_or_default();
    macro_rules! cases {
        ($($name:ident),* $(,)?) => {$(
            if stringify!($name).contains(&filter) {
                let began = Instant::now();
                let agent = greet().await;
                let result = tokio::spawn(async move { $name(&agent).await }).await;
                match result {
                    Ok(()) => say(&format!("ok {} ({:.2} s)", stringify!($name), began.elapsed().as_secs_f64())),
                    Err(_) => say(&format!("FAILED {}", stringify!($name))),
                }
            }
        )*};
    }
    cases!(
        output_and_exit_code,
        environment_and_identity,
        command_that_cannot_run,
        wrong_order_and_unknown_names,
        stdin_to_the_end,
        output_is_complete_twenty_times,
        death_by_signal,
        exec_in_a_container,
        terminal_with_a_size,
        exec_with_a_terminal,
        out_of_memory_is_told,
        limits_and_statistics,
        pause_and_resume,
        devices_are_restricted,
        seccomp_holds_for_execs_too,
        streams_that_never_come,
        a_reader_that_stops_blocks_only_its_writer,
        the_agent_survives,
        nothing_is_left,
        what_a_container_costs,
    );
}

fn code(result: ttrpc::Result<impl Sized>) -> (Code, String) {
    match result {
        Ok(_) => (Code::OK, String::new()),
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
        Err(e) => panic!("not a status: {e}"),
    }
}

async fn handshake_must_come_first(agent: &AgentClient) {
    assert_eq!(code(agent.stats(ctx(), &named("x")).await).0, Code::FAILED_PRECONDITION);
    let wrong = HandshakeRequest { protocol_version: PROTOCOL_VERSION + 1, ..Default::default() };
    assert_eq!(code(agent.handshake(ctx(), &wrong).await).0, Code::FAILED_PRECONDITION);
    let right = HandshakeRequest { protocol_version: PROTOCOL_VERSION, ..Default::default() };
    let answer = agent.handshake(ctx(), &right).await.expect("handshake");
    say(&format!(
        "kernel {}, init started at {} us, listened at {} us",
        answer.kernel_release,
        answer.init_started_ns / 1000,
        answer.listening_ns / 1000
    ));
    assert_eq!(
        code(create(agent, "early", &config("true"), all_streams()).await).0,
        Code::FAILED_PRECONDITION
    );
}

async fn output_and_exit_code(agent: &AgentClient) {
    for (script, expected) in [("true", 0), ("exit 3", 3), ("exit 127", 127)] {
        let outcome = crate::guest::run(agent, "c", &config(script), b"").await.expect(script);
        assert_eq!(outcome.wait.exit_code, expected, "{script}");
        assert_eq!(outcome.wait.signal, 0);
        assert!(!outcome.wait.oom_killed);
    }
    let outcome = crate::guest::run(agent, "c", &config("echo out; echo err >&2"), b"").await.expect("run");
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\n", "err\n"));
}

async fn environment_and_identity(agent: &AgentClient) {
    let script = "echo $WHO $HOME; id -u; id -g; id -G; pwd; hostname; ulimit -n; cat /proc/self/oom_score_adj; \
                  echo $$; cat /proc/1/cmdline | tr '\\0' ' '; echo; grep Cap /proc/self/status; \
                  cat /proc/self/cgroup; echo again > /dev/stdout; grep SigIgn /proc/self/status";
    let mut config = config(script);
    config["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [7, 8], "umask": 18});
    config["process"]["cwd"] = json!("/tmp");
    let outcome = crate::guest::run(agent, "who", &config, b"").await.expect("run");
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    let expected = ["world /home/user", "1000", "1000", "1000 7 8", "/tmp", "box", "512", "0", "1"];
    assert_eq!(lines.get(..9), Some(&expected[..]), "{} {}", outcome.stdout, outcome.stderr);
    assert!(outcome.stdout.contains("\n0::/\n"), "{}", outcome.stdout);
    assert!(outcome.stdout.contains("\nagain\n"), "{} {}", outcome.stdout, outcome.stderr);
    // busybox's shell ignores SIGQUIT; SIGPIPE, which Rust programs ignore, must not be.
    assert!(outcome.stdout.contains("SigIgn:\t0000000000000004"), "{}", outcome.stdout);
}

async fn command_that_cannot_run(agent: &AgentClient) {
    for (args, expected, words) in [
        (["nope", "x"], Code::NOT_FOUND, "\"nope\": executable file not found"),
        (["/bin/nope", "x"], Code::NOT_FOUND, "no such file"),
        (["noexec", "x"], Code::PERMISSION_DENIED, "permission denied"),
        (["/bin", "x"], Code::PERMISSION_DENIED, "permission denied"),
    ] {
        let got = code(create(agent, "bad", &args_config(&args), all_streams()).await);
        assert!(got.0 == expected && got.1.contains(words), "{args:?}: {got:?}");
    }
    create(agent, "bad", &args_config(&["badinterp"]), all_streams()).await.expect("create");
    let got = code(start(agent, "bad").await);
    assert!(got.0 == Code::NOT_FOUND && got.1.contains("interpreter"), "{got:?}");
    delete(agent, "bad", true).await.expect("delete");

    let mut config = config("true");
    config["mounts"]
        .as_array_mut()
        .expect("mounts")
        .push(json!({"destination": "/x", "type": "nosuchfs", "source": "x"}));
    let got = code(create(agent, "bad", &config, all_streams()).await);
    say(&format!("a mount that fails: {got:?}"));
    assert_eq!(got.0, Code::INTERNAL);
    assert!(got.1.contains("nosuchfs") || got.1.contains("/x"), "{got:?}");
}

async fn wrong_order_and_unknown_names(agent: &AgentClient) {
    assert_eq!(code(start(agent, "nobody").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(start(agent, "../etc").await).0, Code::INVALID_ARGUMENT);
    assert_eq!(code(create(agent, "a/b", &config("true"), all_streams()).await).0, Code::INVALID_ARGUMENT);
    assert_eq!(
        code(create(agent, "b", &json!({"ociVersion": "1.0.2"}), all_streams()).await).0,
        Code::INVALID_ARGUMENT
    );
    assert_eq!(code(create(agent, "b", &json!([1, 2]), all_streams()).await).0, Code::INVALID_ARGUMENT);
    create(agent, "b", &config("sleep 1000"), Default::default()).await.expect("create");
    assert_eq!(code(create(agent, "b", &config("true"), all_streams()).await).0, Code::ALREADY_EXISTS);
    assert_eq!(code(exec(agent, "b", "e", sh("true"), only_stdout()).await).0, Code::FAILED_PRECONDITION);
    start(agent, "b").await.expect("start");
    assert_eq!(code(start(agent, "b").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(delete(agent, "b", false).await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(exec(agent, "b", "-", sh("true"), only_stdout()).await).0, Code::INVALID_ARGUMENT);
    assert_eq!(code(agent.resume(ctx(), &named("b")).await).0, Code::FAILED_PRECONDITION);
    let resize = ResizeRequest { container_id: "b".into(), rows: 1, columns: 1, ..Default::default() };
    assert_eq!(code(agent.resize(ctx(), &resize).await).0, Code::FAILED_PRECONDITION);
    signal(agent, "b", "", 9).await.expect("kill");
    assert_eq!(wait(agent, "b", "").await.exit_code, 137);
    assert_eq!(code(signal(agent, "b", "", 9).await).0, Code::FAILED_PRECONDITION);
    delete(agent, "b", false).await.expect("delete");
    assert_eq!(code(delete(agent, "b", true).await).0, Code::FAILED_PRECONDITION);
}

async fn signal(agent: &AgentClient, id: &str, exec_id: &str, signal: u32) -> ttrpc::Result<()> {
    let request =
        SignalRequest { container_id: id.into(), exec_id: exec_id.into(), signal, ..Default::default() };
    agent.signal(ctx(), &request).await.map(drop)
}

async fn signal_all(agent: &AgentClient, id: &str, signal: u32) -> ttrpc::Result<()> {
    let request = SignalRequest { container_id: id.into(), signal, all: true, ..Default::default() };
    agent.signal(ctx(), &request).await.map(drop)
}

fn sh(script: &str) -> Value {
    let mut process = config(script)["process"].clone();
    process["rlimits"] = json!([]);
    process
}

async fn stdin_to_the_end(agent: &AgentClient) {
    let data: Vec<u8> = (0..10_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let outcome =
        crate::guest::run(agent, "sum", &config("cat | wc -c; echo end"), &data).await.expect("run");
    assert_eq!(outcome.stdout.trim(), "10000000\nend");
    let outcome = crate::guest::run(agent, "sum", &config("cat"), &data[..3_000_000]).await.expect("run");
    assert_eq!(outcome.stdout.len(), String::from_utf8_lossy(&data[..3_000_000]).len());
    // A process that does not read its input to the end.
    let outcome = crate::guest::run(agent, "sum", &config("head -c 5 | wc -c; exec <&-; echo bye"), &data)
        .await
        .expect("run");
    assert_eq!(outcome.stdout, "5\nbye\n");
}

async fn output_is_complete_twenty_times(agent: &AgentClient) {
    for _ in 0..20 {
        let outcome = crate::guest::run(agent, "seq", &config("seq 1 20000"), b"").await.expect("run");
        let lines: Vec<&str> = outcome.stdout.lines().collect();
        assert!(lines.len() == 20_000 && lines.last() == Some(&"20000"), "{} lines", lines.len());
    }
}

async fn death_by_signal(agent: &AgentClient) {
    for (number, script) in [(15, "kill -15 $$; sleep 1000"), (6, "kill -6 $$; sleep 1000")] {
        // In a pid namespace only a handler lets init die of its own signal; so from outside, and by SIGKILL.
        create(agent, "sig", &config("sleep 1000"), Default::default()).await.expect("create");
        start(agent, "sig").await.expect("start");
        exec(agent, "sig", "e", sh(script), Default::default()).await.expect("exec");
        let ended = wait(agent, "sig", "e").await;
        assert_eq!((ended.exit_code, ended.signal), (128 + number, number));
        signal_all(agent, "sig", 9).await.expect("kill all");
        assert_eq!(wait(agent, "sig", "").await.signal, 9);
        delete(agent, "sig", false).await.expect("delete");
    }
}

async fn exec_in_a_container(agent: &AgentClient) {
    create(agent, "e", &config("echo $$ > /tmp/pid; sleep 1000"), Default::default()).await.expect("create");
    start(agent, "e").await.expect("start");
    let mut readers = Vec::new();
    for i in 0..2 {
        let id = format!("x{i}");
        let in_and_out = Stdio { stdin: true, ..only_stdout() };
        let out = read_all(open(Stream::Stdout, "e", &id));
        let input = write_all(open(Stream::Stdin, "e", &id), b"hello\n".to_vec());
        exec(agent, "e", &id, sh("cat; cat /proc/1/comm; exit 123"), in_and_out).await.expect("exec");
        readers.push((id, out, input));
    }
    for (id, out, _input) in readers {
        assert_eq!(wait(agent, "e", &id).await.exit_code, 123);
        assert_eq!(text(out), "hello\nsleep\n");
    }
    let got = code(exec(agent, "e", "n", args_config(&["nope"])["process"].clone(), only_stdout()).await);
    assert_eq!(got.0, Code::NOT_FOUND, "{got:?}");
    // What an exec leaves behind holds its stdout, and must not keep its exit from being told.
    let out = read_all(open(Stream::Stdout, "e", "bg"));
    exec(agent, "e", "bg", sh("sleep 1000 & echo started"), only_stdout()).await.expect("exec");
    assert_eq!(wait(agent, "e", "bg").await.exit_code, 0);
    assert_eq!(text(out), "started\n");
    let pids = agent.pids(ctx(), &named("e")).await.expect("pids").processes;
    assert!(pids.iter().any(|p| p.command == "sleep 1000") && pids.len() >= 2, "{pids:?}");
    delete(agent, "e", true).await.expect("delete");
}

async fn terminal_with_a_size(agent: &AgentClient) {
    let mut config = config("tty; stty size; read line; stty size; echo got $line; ls -ln /dev/console");
    config["process"]["terminal"] = json!(true);
    config["process"]["consoleSize"] = json!({"height": 33, "width": 99});
    let (mut input, output) = (open(Stream::Stdin, "tty", ""), read_all(open(Stream::Stdout, "tty", "")));
    create(agent, "tty", &config, all_streams()).await.expect("create");
    start(agent, "tty").await.expect("start");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let resize = ResizeRequest { container_id: "tty".into(), rows: 44, columns: 55, ..Default::default() };
    agent.resize(ctx(), &resize).await.expect("resize");
    input.write_all(b"word\n").expect("input");
    assert_eq!(wait(agent, "tty", "").await.exit_code, 0);
    let output = text(output);
    for expected in ["/dev/pts/0", "33 99", "44 55", "got word"] {
        assert!(output.contains(expected), "{output}");
    }
    delete(agent, "tty", false).await.expect("delete");
}

async fn exec_with_a_terminal(agent: &AgentClient) {
    create(agent, "t", &config("sleep 1000"), Default::default()).await.expect("create");
    start(agent, "t").await.expect("start");
    let mut process = sh("stty size; seq 1 5000; tty; echo fine > /proc/self/fd/1");
    process["terminal"] = json!(true);
    process["user"] = json!({"uid": 1000, "gid": 1000});
    process["consoleSize"] = json!({"height": 20, "width": 30});
    let output = read_all(open(Stream::Stdout, "t", "e"));
    exec(agent, "t", "e", process, only_stdout()).await.expect("exec");
    assert_eq!(wait(agent, "t", "e").await.exit_code, 0);
    let output = text(output);
    assert!(
        output.starts_with("20 30\r\n1\r\n2\r\n") && output.contains("\r\n5000\r\n/dev/pts/0\r\nfine"),
        "{output}"
    );
    delete(agent, "t", true).await.expect("delete");
}

async fn out_of_memory_is_told(agent: &AgentClient) {
    let mut events = agent.events(ctx(), &Empty::default()).await.expect("events");
    let mut config = config("x=$(dd if=/dev/zero bs=1M count=64 2>/dev/null | tr '\\0' x); echo survived");
    config["linux"]["resources"] = json!({"memory": {"limit": 16 << 20}});
    let outcome = crate::guest::run(agent, "hog", &config, b"").await.expect("run");
    assert!(
        outcome.wait.oom_killed && outcome.wait.exit_code == 137,
        "{:?} {}",
        outcome.wait,
        outcome.stdout
    );
    let (mut oom, mut exit) = (false, false);
    while !(oom && exit) {
        let event = events.recv().await.expect("event").expect("not the end");
        match event.event {
            Some(event::Event::Oom(_)) => oom = true,
            Some(event::Event::Exit(e)) if event.container_id == "hog" => exit = e.exit_code == 137,
            _ => {}
        }
    }
}

async fn limits_and_statistics(agent: &AgentClient) {
    let mut config =
        config("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max; sleep 1000");
    config["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 20}, "cpu": {"quota": 50_000, "period": 100_000}});
    let mut output = open(Stream::Stdout, "lim", "");
    create(agent, "lim", &config, all_streams()).await.expect("create");
    start(agent, "lim").await.expect("start");
    let mut seen = String::new();
    while seen.lines().count() < 3 {
        let mut buf = [0; 256];
        let n = output.read(&mut buf).expect("output");
        assert!(n > 0, "{seen}");
        seen.push_str(&String::from_utf8_lossy(&buf[..n]));
    }
    assert_eq!(seen, "67108864\n20\n50000 100000\n");
    let stats = agent.stats(ctx(), &named("lim")).await.expect("stats");
    assert!(stats.memory.limit == 64 << 20 && stats.pids.limit == 20 && stats.cpu.usage_us > 0, "{stats}");
    let update = |json: Value| UpdateRequest {
        container_id: "lim".into(),
        resources: json.to_string().into_bytes(),
        ..Default::default()
    };
    agent.update(ctx(), &update(json!({"pids": {"limit": 5}}))).await.expect("update");
    assert_eq!(agent.stats(ctx(), &named("lim")).await.expect("stats").pids.limit, 5);
    let got = code(agent.update(ctx(), &update(json!({"cpu": {"cpus": "0-99"}}))).await);
    assert!(got.0 != Code::OK && got.1.contains("cpu.cpus"), "{got:?}");
    delete(agent, "lim", true).await.expect("delete");
}

async fn pause_and_resume(agent: &AgentClient) {
    create(agent, "p", &config("sleep 1000"), Default::default()).await.expect("create");
    start(agent, "p").await.expect("start");
    agent.pause(ctx(), &named("p")).await.expect("pause");
    assert_eq!(code(agent.pause(ctx(), &named("p")).await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(exec(agent, "p", "e", sh("true"), only_stdout()).await).0, Code::FAILED_PRECONDITION);
    agent.resume(ctx(), &named("p")).await.expect("resume");
    agent.pause(ctx(), &named("p")).await.expect("pause");
    // A frozen container can be killed.
    delete(agent, "p", true).await.expect("delete");
}

async fn devices_are_restricted(agent: &AgentClient) {
    let script = "mknod /tmp/kmsg c 1 11; cat /tmp/kmsg; mknod /tmp/null c 1 3 && echo made; cat /tmp/null && echo read; \
                  head -c 1 /dev/zero | wc -c; echo x > /dev/null && echo null";
    let mut config = config(script);
    // /tmp is mounted nodev by default.
    config["mounts"][7]["options"] = json!(["nosuid", "mode=1777"]);
    let outcome = crate::guest::run(agent, "dev", &config, b"").await.expect("run");
    assert_eq!(outcome.stdout, "made\nread\n1\nnull\n", "{}", outcome.stderr);
    assert!(outcome.stderr.contains("not permitted"), "{}", outcome.stderr);
}

async fn seccomp_holds_for_execs_too(agent: &AgentClient) {
    for no_new_privileges in [true, false] {
        let mut config = config("mkdir /tmp/x; echo $?; sleep 1000");
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
        });
        config["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let output = read_all(open(Stream::Stdout, "sec", ""));
        create(agent, "sec", &config, only_stdout()).await.expect("create");
        start(agent, "sec").await.expect("start");
        let out = read_all(open(Stream::Stdout, "sec", "e"));
        let mut process = sh("mkdir /tmp/y; echo $?; grep -E 'Seccomp:|CapEff' /proc/self/status");
        process["noNewPrivileges"] = json!(no_new_privileges);
        exec(agent, "sec", "e", process, only_stdout()).await.expect("exec");
        wait(agent, "sec", "e").await;
        let out = text(out);
        assert!(out.starts_with("1\n") && out.contains("Seccomp:\t2"), "{out}");
        assert!(out.contains("CapEff:\t00000000080004e3"), "CAP_SYS_ADMIN must be gone: {out}");
        delete(agent, "sec", true).await.expect("delete");
        assert!(text(output).starts_with("1\n"));
    }
}

async fn streams_that_never_come(agent: &AgentClient) {
    create(agent, "mute", &config("echo lost"), all_streams()).await.expect("create");
    start(agent, "mute").await.expect("start");
    assert_eq!(wait(agent, "mute", "").await.exit_code, 0);
    delete(agent, "mute", false).await.expect("delete");
    // Streams without a process, headers without sense, connections without a word.
    let strays: Vec<_> = (0..20).map(|i| open(Stream::Stdout, &format!("stray{i}"), "")).collect();
    let mut rubbish = open(Stream::Stdin, "stray0", "e");
    let _ = rubbish.write_all(&[0xff; 5000]);
    drop(strays);
    let outcome = crate::guest::run(agent, "after", &config("echo fine"), b"").await.expect("run");
    assert_eq!(outcome.stdout, "fine\n");
}

async fn a_reader_that_stops_blocks_only_its_writer(agent: &AgentClient) {
    let stalled = open(Stream::Stdout, "stall", "");
    create(agent, "stall", &config("yes"), only_stdout()).await.expect("create");
    start(agent, "stall").await.expect("start");
    let outcome =
        crate::guest::run(agent, "other", &config("seq 1 20000 | tail -n 1"), b"").await.expect("run");
    assert_eq!(outcome.stdout, "20000\n");
    let before = agent.stats(ctx(), &named("stall")).await.expect("stats").cpu.usage_us;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let after = agent.stats(ctx(), &named("stall")).await.expect("stats").cpu.usage_us;
    assert!(after - before < 50_000, "the writer goes on: {before} {after}");
    // The host goes away: the writer gets SIGPIPE.
    drop(stalled);
    let ended = wait(agent, "stall", "").await;
    say(&format!("writer without a reader ended with {}", ended.exit_code));
    delete(agent, "stall", false).await.expect("delete");
}

async fn the_agent_survives(agent: &AgentClient) {
    // A fork bomb, without a limit of its own.
    create(agent, "bomb", &config("b() { b | b & }; b; sleep 1000"), Default::default())
        .await
        .expect("create");
    start(agent, "bomb").await.expect("start");
    tokio::time::sleep(Duration::from_secs(2)).await;
    agent.stats(ctx(), &named("bomb")).await.expect("stats during a fork bomb");
    delete(agent, "bomb", true).await.expect("delete a fork bomb");
    // Filling every tmpfs.
    let fill = "dd if=/dev/zero of=/tmp/fill bs=1M count=2000; echo $?; dd if=/dev/zero of=/dev/shm/fill bs=1M count=2000";
    create(agent, "fill", &config(fill), Default::default()).await.expect("create");
    start(agent, "fill").await.expect("start");
    let ended = wait(agent, "fill", "").await;
    say(&format!("filling tmpfs ended with {} (oom {})", ended.exit_code, ended.oom_killed));
    delete(agent, "fill", true).await.expect("delete");
    // Killing everything it can see, closing stdio early.
    crate::guest::run(agent, "k", &config("kill -9 -1; exec <&- >&- 2>&-; kill -9 1; kill -9 $$"), b"")
        .await
        .expect("run");
    let outcome = crate::guest::run(agent, "after", &config("echo fine"), b"").await.expect("run");
    assert_eq!(outcome.stdout, "fine\n");
}

async fn nothing_is_left(agent: &AgentClient) {
    for dir in ["/run/stockade/state", "/run/stockade/bundles", "/run/stockade/consoles"] {
        let left: Vec<_> = std::fs::read_dir(dir).expect(dir).flatten().map(|e| e.path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    let count = || std::fs::read_dir("/proc/1/fd").expect("fds").count();
    crate::guest::run(agent, "leak", &config("true"), b"").await.expect("run");
    let before = count();
    for _ in 0..20 {
        crate::guest::run(agent, "leak", &config("true"), b"").await.expect("run");
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(count() <= before, "descriptors: {before} before, {} after", count());
}

/// Prints figures, which mean something under `-icount`, where one instruction is a fixed time of the counter.
async fn what_a_container_costs(agent: &AgentClient) {
    let config = args_config(&["echo", "hello"]);
    for round in 0..4 {
        let output = read_all(open(Stream::Stdout, "cost", ""));
        let mut t = [0; 5];
        t[0] = ticks();
        create(agent, "cost", &config, only_stdout()).await.expect("create");
        t[1] = ticks();
        start(agent, "cost").await.expect("start");
        t[2] = ticks();
        wait(agent, "cost", "").await;
        t[3] = ticks();
        delete(agent, "cost", false).await.expect("delete");
        t[4] = ticks();
        assert_eq!(text(output), "hello\n");
        let steps: Vec<u64> = t.windows(2).map(|w| (w[1] - w[0]) / 1000).collect();
        say(&format!("round {round}: thousands of ticks to create, start, wait, delete: {steps:?}"));
    }
}

fn ticks() -> u64 {
    // SAFETY: reads a counter.
    unsafe { std::arch::x86_64::_rdtsc() }
}
