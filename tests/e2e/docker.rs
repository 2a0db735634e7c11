//! The runtime under the host's Docker daemon, which calls it through containerd's shim for runc.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::harness::{Case, DOCKER_IMAGE, Docker, Exit, Program, Pty, Stdin, case, tool, wait_gone};

const VM: &str = "the VM's boundary";
const SHIM: &str = "containerd's shim";

pub const CASES: &[Case] = &[
    case!(run_reports_output_exit_code_and_why_it_cannot).exclusive(),
    case!(a_container_of_the_default_bridge_serves_is_watched_and_stopped).exclusive(),
    case!(containers_of_a_network_find_each_other_by_name).exclusive(),
    case!(networks_are_connected_and_disconnected_while_a_container_runs).exclusive(),
    case!(containers_of_the_shim_have_the_network_and_are_run_and_stopped).stockade_only(SHIM).exclusive(),
    case!(containers_are_restarted_as_their_policy_says).exclusive(),
    case!(top_names_processes_of_the_sandbox_only).stockade_only(VM).exclusive(),
    case!(what_a_vm_cannot_honour_is_refused_by_name).stockade_only(VM).exclusive(),
];

/// Ends well when it is asked to.
const IDLE: &str = "trap 'echo asked; exit 5' TERM; echo up; while :; do sleep 1; done";

fn run_reports_output_exit_code_and_why_it_cannot() {
    let docker = Docker::start();
    let ended = docker.run(&[], "echo out; echo error >&2; ip -o -4 addr show eth0 | wc -l; exit 7").code(7);
    assert_eq!((ended.text().as_str(), ended.stderr.as_str()), ("out\n1\n", "error\n"));
    docker.run(&["--network", "none"], "sh -c 'kill -KILL $$'; exit $?").code(137);
    let lines: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    assert!(
        docker.run(&["--network", "none"], "seq 1 20000").code(0).text() == lines,
        "output is not complete"
    );
    let missing = docker.docker(&["run", "--rm", DOCKER_IMAGE, "no-such-program"]).code(127);
    assert!(
        missing.stderr.contains("no-such-program") && missing.stderr.contains("not found"),
        "{missing:?}"
    );
    let input = ["run", "--rm", "--interactive", "--network", "none", DOCKER_IMAGE, "sort"];
    let sorted = Program::spawn(docker.command(&input), Stdin::Bytes(b"b\na\n".to_vec())).finish();
    assert_eq!(sorted.code(0).text(), "a\nb\n");

    let volume = docker.dir().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("file"), "of the host\n").unwrap();
    let options = format!(
        "--volume {}:/volume:ro --volume named:/data --tmpfs /scratch:size=4m --read-only --user 1000:1001
         --cap-drop all --memory 128m --cpus 1 --pids-limit 50 --env WHO=me --hostname box --ulimit nofile=100:200
         --security-opt no-new-privileges --init --network none",
        volume.display()
    );
    let options: Vec<_> = options.split_whitespace().collect();
    let script =
        "id -u; id -g; hostname; cat /volume/file; echo $WHO; touch /no 2>/dev/null || echo read-only
        grep CapBnd /proc/self/status; ulimit -n; grep -c ' /scratch tmpfs rw,.*size=4096k' /proc/mounts
        cat /proc/1/comm; cd /sys/fs/cgroup; cat memory.max pids.max cpu.max";
    let expected = "1000\n1001\nbox\nof the host\nme\nread-only\nCapBnd:\t0000000000000000\n100\n1\ndocker-init\n\
        134217728\n50\n100000 100000\n";
    assert_eq!(docker.run(&options, script).code(0).text(), expected);
}

fn a_container_of_the_default_bridge_serves_is_watched_and_stopped() {
    let docker = Docker::start();
    let serve = format!("mkdir /www; echo served > /www/index.html; httpd -p 80 -h /www; {IDLE}");
    let options =
        ["--publish", "127.0.0.1:18081:80", "--memory", "128m", "--cpus", "1", "--pids-limit", "50"];
    docker.detached("web", &options, &serve);
    docker.wait_for_line("web", "up");
    assert_eq!(tool("curl -sS --max-time 60 http://127.0.0.1:18081/"), "served\n");
    let address = docker.inspect("web", "/NetworkSettings/IPAddress");
    let fetch = format!("wget -q -O - http://{}/", address.as_str().unwrap());
    assert_eq!(docker.run(&[], &fetch).ok(), "served\n");
    let joined = ["--network", "container:web", "--ipc", "private"];
    assert_eq!(docker.run(&joined, "wget -q -O - http://127.0.0.1/").ok(), "served\n");
    let joined = ["--network", "container:web", "--pid", "container:web"];
    assert_eq!(docker.run(&joined, "ps -o args | grep -c '^httpd'").ok(), "1\n");

    let exec = |script: &str| docker.docker(&["exec", "web", "sh", "-c", script]);
    assert_eq!(exec("echo $((6 * 7)); exit 3").code(3).text(), "42\n");
    let stats = docker.docker(&["stats", "--no-stream", "--format", "{{json .}}", "web"]).ok();
    let stats: Value = serde_json::from_str(&stats).unwrap_or_else(|e| panic!("{e}: {stats}"));
    assert!(stats["PIDs"].as_str().is_some_and(|n| n.parse::<u32>().is_ok_and(|n| n > 2)), "{stats}");
    assert!(stats["NetIO"].as_str().is_some_and(|io| !io.starts_with("0B / 0B")), "{stats}");
    docker.docker(&["update", "--cpus", "0.5", "--pids-limit", "40", "web"]).code(0);
    assert_eq!(exec("cd /sys/fs/cgroup; cat cpu.max pids.max").ok(), "50000 100000\n40\n");
    docker.docker(&["update", "--memory", "700m", "--memory-swap", "700m", "web"]).code(0);
    let take =
        "cat /sys/fs/cgroup/memory.max; dd if=/dev/zero of=/dev/null bs=500M count=1 2>/dev/null; echo $?";
    assert_eq!(exec(take).ok(), "734003200\n0\n");
    docker.docker(&["pause", "web"]).code(0);
    assert_eq!(docker.inspect("web", "/State/Status"), "paused");
    docker.docker(&["unpause", "web"]).code(0);

    let out = docker.dir().join("out");
    docker.docker(&["cp", "web:/www/index.html", &out.display().to_string()]).code(0);
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "served\n");
    docker.docker(&["cp", &out.display().to_string(), "web:/www/copy"]).code(0);
    assert_eq!(exec("cat /www/copy").ok(), "served\n");

    let (terminal, slave) = Pty::open(31, 97);
    let script = "tty; stty -echo; echo ready; read word; echo got $word; exit 6";
    let mut command = docker.command(&["exec", "--interactive", "--tty", "web", "sh", "-c", script]);
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
    let mut program = Program::spawn_raw(command, Stdin::Null);
    terminal.expect_line("/dev/pts/0");
    terminal.expect_line("ready");
    terminal.write("typed\n");
    terminal.expect_line("got typed");
    assert_eq!(program.exit(), Exit::Code(6));

    docker.docker(&["stop", "web"]).code(0);
    assert_eq!(docker.inspect("web", "/State/ExitCode"), 5);
    docker.docker(&["start", "web"]).code(0);
    assert_eq!(exec("cat /www/copy").ok(), "served\n");
    docker.docker(&["kill", "web"]).code(0);
    docker.wait_for("web", "/State/ExitCode", 137);
    let logs = docker.docker(&["logs", "web"]).code(0).text();
    assert!(logs.starts_with("up\nasked\n"), "{logs}");
    docker.docker(&["rm", "web"]).code(0);
}

fn containers_of_a_network_find_each_other_by_name() {
    let docker = Docker::start();
    docker.docker(&["network", "create", "own"]).code(0);
    let own = ["--network", "own", "--network-alias", "site"];
    // It serves at the name server's port too, on all addresses.
    let serve = format!(
        "mkdir /www; echo served > /www/index.html; httpd -p 80 -h /www; httpd -p 53 -h /www; {IDLE}"
    );
    docker.detached("web", &own, &serve);
    docker.wait_for_line("web", "up");
    let ask = "cat /etc/resolv.conf | grep ^nameserver; wget -q -O - http://web/; wget -q -O - http://site:53/
        nslookup site 127.0.0.11 | grep -c '^Server:.*127.0.0.11'; nslookup nobody >/dev/null 2>&1 || echo unknown";
    let answers = "nameserver 127.0.0.11\nserved\nserved\n1\nunknown\n";
    assert_eq!(docker.run(&["--network", "own"], ask).ok(), answers);
    // Who shares the network of one asks the same, and its own exec too.
    assert_eq!(docker.run(&["--network", "container:web"], "wget -q -O - http://site/").ok(), "served\n");
    assert_eq!(docker.docker(&["exec", "web", "wget", "-q", "-O", "-", "http://site/"]).ok(), "served\n");
    docker.docker(&["kill", "web"]).code(0);
    docker.docker(&["rm", "--force", "web"]).code(0);
    docker.docker(&["network", "rm", "own"]).code(0);
}

/// Docker lets containerd call the shim, and finds the network namespace by the number of the task (27) or of its hook's
/// state (before).
fn containers_of_the_shim_have_the_network_and_are_run_and_stopped() {
    let docker = Docker::start();
    let shim = ["--runtime", "io.containerd.stockade.v2"];
    let version = docker.docker(&["version", "--format", "{{.Server.Version}}"]).ok();
    let major: u32 = version.split('.').next().and_then(|n| n.parse().ok()).expect("a version");
    if major < 23 {
        // It knows no shims but runc's.
        assert!(docker.run(&shim, "true").code(125).stderr.contains("Unknown runtime"));
        return;
    }
    let ended = docker
        .run(&shim, "ip -o -4 addr show eth0 | wc -l; grep -c ' / virtiofs ' /proc/mounts; exit 7")
        .code(7);
    assert_eq!(ended.text(), "1\n1\n");
    let serve = format!("mkdir /www; echo served > /www/index.html; httpd -p 80 -h /www; {IDLE}");
    docker.detached("web", &[&shim[..], &["--publish", "127.0.0.1:18084:80"]].concat(), &serve);
    docker.wait_for_line("web", "up");
    assert_eq!(tool("curl -sS --max-time 60 http://127.0.0.1:18084/"), "served\n");
    let pid = docker.inspect("web", "/State/Pid");
    let address = docker.inspect("web", "/NetworkSettings/IPAddress");
    let seen = tool(&format!("nsenter --target {pid} --net ip -o -4 addr show eth0"));
    assert!(seen.contains(address.as_str().unwrap()), "{seen}");
    assert_eq!(docker.docker(&["exec", "web", "cat", "/www/index.html"]).ok(), "served\n");
    docker.docker(&["stop", "web"]).code(0);
    assert_eq!(docker.inspect("web", "/State/ExitCode"), 5);
    docker.docker(&["rm", "web"]).code(0);
}

fn networks_are_connected_and_disconnected_while_a_container_runs() {
    let docker = Docker::start();
    docker.docker(&["network", "create", "two"]).code(0);
    let serve = "mkdir /www; echo served > /www/index.html; httpd -p 80 -h /www; echo up; exec sleep 100000";
    docker.detached("web", &[], serve);
    docker.wait_for_line("web", "up");
    let inside = |script: &str| docker.docker(&["exec", "web", "sh", "-c", script]).code(0);
    for _ in 0..2 {
        docker.docker(&["network", "connect", "two", "web"]).code(0);
        let address = docker.inspect("web", "/NetworkSettings/Networks/two/IPAddress");
        let address = address.as_str().unwrap();
        inside(&format!("until ip addr | grep -q 'inet {address}/'; do sleep 0.1; done"));
        let fetch = format!("curl -sS --max-time 10 --retry 20 --retry-all-errors http://{address}/");
        assert_eq!(tool(&fetch), "served\n");
        // A name of that network, which the container could not ask before.
        inside("until wget -q -O /dev/null http://web/; do sleep 0.1; done");
        docker.docker(&["network", "disconnect", "two", "web"]).code(0);
        inside("while [ -e /sys/class/net/eth1 ]; do sleep 0.1; done; test -e /sys/class/net/eth0");
    }
    docker.docker(&["rm", "--force", "web"]).code(0);
    docker.docker(&["network", "rm", "two"]).code(0);
}

fn containers_are_restarted_as_their_policy_says() {
    let docker = Docker::start();
    docker.detached("fails", &["--network", "none", "--restart", "on-failure:2"], "echo up; exit 3");
    docker.detached("stays", &["--network", "none", "--restart", "always"], IDLE);
    docker.wait_for("fails", "/RestartCount", 2);
    docker.wait_for("fails", "/State/Status", "exited");
    assert_eq!(docker.inspect("fails", "/State/ExitCode"), 3);
    assert_eq!(docker.docker(&["logs", "fails"]).ok(), "up\nup\nup\n");
    let pid = docker.inspect("stays", "/State/Pid").as_i64().unwrap();
    // Whatever ends the sandbox, it is no success.
    kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGKILL).unwrap();
    docker.wait_for("stays", "/RestartCount", 1);
    docker.wait_for("stays", "/State/Status", "running");
    wait_gone(pid.try_into().unwrap());
    docker.docker(&["exec", "stays", "true"]).code(0);
}

fn top_names_processes_of_the_sandbox_only() {
    let docker = Docker::start();
    docker.detached("aa", &["--network", "none"], IDLE);
    let lines = docker.docker(&["top", "aa", "-o", "pid,args"]).ok();
    let supervisor = docker.inspect("aa", "/State/Pid").to_string();
    let mut lines = lines.lines().skip(1);
    assert!(lines.clone().any(|line| line.split_whitespace().next() == Some(supervisor.as_str())));
    assert!(lines.all(|line| line.contains("stockade")));
}

fn what_a_vm_cannot_honour_is_refused_by_name() {
    let docker = Docker::start();
    docker.detached("aa", &["--network", "none"], IDLE);
    for (options, words) in [
        // 20.10 names the host's namespace, 26 and later name none.
        (&["--network", "host"][..], ["linux.namespaces", "the host's"]),
        (&["--pid", "container:aa"], ["linux.namespaces", "--network container:"]),
        (&["--cap-add", "sys_admin", "--volume", "/tmp:/x:rshared"], ["CAP_SYS_ADMIN", "host"]),
    ] {
        let ended = docker.docker(&[&["run", "--rm"][..], options, &[DOCKER_IMAGE, "true"]].concat());
        let refused = ended.refused();
        assert!(words.iter().all(|word| refused.contains(word)), "{options:?}: {refused}");
    }
    let more = docker.docker(&["update", "--memory", "2t", "--memory-swap", "2t", "aa"]).refused();
    assert!(more.contains("memory.limit") && more.contains("2199023255552"), "{more}");
}
