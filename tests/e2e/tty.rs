//! Terminals: handed over a console socket, or the caller's own; of a container and of an exec; their size.

use std::ffi::OsStr;

use serde_json::json;

use crate::harness::{Bundle, Case, ConsoleSocket, Exit, Id, Program, Pty, Runtime, Stdin, case};

pub const CASES: &[Case] = &[
    case!(console_socket_gets_a_terminal_of_the_size_asked_for),
    case!(resize_reaches_the_workload),
    case!(run_takes_over_the_callers_terminal),
    case!(redirected_streams_leave_the_controlling_terminal),
    case!(interrupt_key_reaches_the_workload),
    case!(exec_uses_the_callers_terminal),
    case!(detached_exec_hands_its_terminal_over),
    case!(console_socket_without_terminal_is_refused),
];

/// Says its size now and at each change.
const SIZES: &str = "trap 'stty size' WINCH; stty size; echo ready; while :; do sleep 1000 & wait $!; done";

fn console_socket_gets_a_terminal_of_the_size_asked_for() {
    let runtime = Runtime::under_test();
    let socket = ConsoleSocket::new();
    let script =
        "tty; stty size; echo err >&2; stty -echo; echo ready; read line; echo \"got $line\"; exit 3";
    let bundle =
        Bundle::sh(script).terminal().set("/process/consoleSize", json!({ "height": 31, "width": 97 }));
    let options = ["--console-socket".as_ref(), socket.path().as_os_str()];
    let container = runtime.create_with(&bundle, Stdin::Null, &options);
    let terminal = socket.terminal();
    let pid = container.pid();
    container.op("start").ok();
    let tty = terminal.line();
    assert!(tty == "/dev/pts/0" || tty == "/dev/console", "{tty}");
    for line in ["31 97", "err", "ready"] {
        terminal.expect_line(line);
    }
    terminal.write("typed\n");
    terminal.expect_line("got typed");
    container.wait_stopped(pid);
    container.delete();
    terminal.ended();
}

fn resize_reaches_the_workload() {
    let socket = ConsoleSocket::new();
    let options: [&OsStr; 2] = ["--console-socket".as_ref(), socket.path().as_os_str()];
    let container = Runtime::under_test().create_with(&Bundle::sh(SIZES).terminal(), Stdin::Null, &options);
    let terminal = socket.terminal();
    terminal.resize(24, 80);
    container.op("start").ok();
    terminal.expect_line("24 80");
    terminal.expect_line("ready");
    for (rows, columns) in [(40, 132), (10, 20)] {
        terminal.resize(rows, columns);
        terminal.expect_line(&format!("{rows} {columns}"));
    }
    // Again to the same size: no event, and the next real one still comes.
    terminal.resize(10, 20);
    terminal.resize(50, 60);
    terminal.expect_line("50 60");
}

/// Begins to run a bundle on a terminal of the test's own.
fn run_on_terminal(bundle: &Bundle, rows: u16, columns: u16) -> (crate::harness::Container, Pty) {
    let runtime = Runtime::under_test();
    let (terminal, slave) = Pty::open(rows, columns);
    let id = Id::new();
    let mut command = runtime.run_command(bundle, &id);
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
    let program = Program::spawn_raw(command, Stdin::Null);
    (runtime.adopt(bundle, id, program), terminal)
}

fn run_takes_over_the_callers_terminal() {
    let (mut container, terminal) = run_on_terminal(&Bundle::sh(SIZES).terminal(), 33, 44);
    terminal.expect_line("33 44");
    terminal.expect_line("ready");
    terminal.resize(55, 66);
    // Whoever sets the size of a terminal has its foreground group signalled; `run` has no controlling terminal
    // here, so its caller does it, as a terminal would.
    container.program.signal(nix::sys::signal::Signal::SIGWINCH);
    terminal.expect_line("55 66");
    container.kill("KILL");
    assert_eq!(container.program.exit(), Exit::Code(137));
}

fn redirected_streams_leave_the_controlling_terminal() {
    let script = "tty; test -t 0 && test -t 1 && test -t 2 && echo all; stty size";
    let runtime = Runtime::under_test();
    let bundle = Bundle::sh(script).terminal();
    let id = Id::new();
    let (_terminal, slave) = Pty::open(28, 93);
    let run = |line: Vec<&OsStr>| {
        let mut command = std::process::Command::new("setsid");
        command.args(["--wait", "--ctty", "sh", "-c", "exec 2>&1 </dev/null \"$@\" | cat", "sh"]);
        command.args(line).stdin(slave.try_clone().unwrap()).stdout(std::process::Stdio::piped());
        let output = command.output().expect("run setsid");
        String::from_utf8_lossy(&output.stdout).replace('\r', "")
    };
    let command = runtime.run_command(&bundle, &id);
    let said = run(std::iter::once(command.get_program()).chain(command.get_args()).collect());
    let lines: Vec<&str> = said.lines().collect();
    assert!(matches!(lines[..], ["/dev/pts/0" | "/dev/console", "all", "28 93"]), "{said:?}");
}

fn interrupt_key_reaches_the_workload() {
    let script = "trap 'echo interrupted; exit 9' INT; echo ready; while :; do sleep 1000 & wait $!; done";
    let (mut container, terminal) = run_on_terminal(&Bundle::sh(script).terminal(), 24, 80);
    terminal.expect_line("ready");
    terminal.write("\x03");
    let line = terminal.line();
    assert!(line.ends_with("interrupted"), "{line:?}");
    assert_eq!(container.program.exit(), Exit::Code(9));
}

const EXEC: &str = "tty; test -t 0 && test -t 1 && test -t 2 && echo all; stty -echo; echo ready
    read line; echo \"got $line\"; stty size; exit 6";

fn exec_uses_the_callers_terminal() {
    let container = Runtime::under_test().idle();
    let (terminal, slave) = Pty::open(19, 71);
    let mut command =
        Runtime::under_test().command(["exec", "--tty", container.id.as_str(), "sh", "-c", EXEC]);
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
    let mut exec = Program::spawn_raw(command, Stdin::Null);
    talks_on(&terminal);
    terminal.expect_line("19 71");
    assert_eq!(exec.exit(), Exit::Code(6));
    // The container's own streams have seen nothing of it.
    container.kill("KILL");
    assert_eq!(container.program.stdout.text(), "ready\n");
}

fn detached_exec_hands_its_terminal_over() {
    let container = Runtime::under_test().idle();
    let socket = ConsoleSocket::new();
    let path = socket.path().display().to_string();
    let options = ["--detach", "--tty", "--console-socket", &path];
    let mut exec = container.start_exec(&options, &["sh", "-c", EXEC], Stdin::Null);
    let terminal = socket.terminal();
    assert_eq!(exec.exit(), Exit::Code(0), "{}", exec.report());
    talks_on(&terminal);
    terminal.ended();
}

/// Talks with [`EXEC`].
#[track_caller]
fn talks_on(terminal: &Pty) {
    let tty = terminal.line();
    assert!(tty.starts_with("/dev/"), "{tty}");
    for line in ["all", "ready"] {
        terminal.expect_line(line);
    }
    terminal.write("typed\n");
    terminal.expect_line("got typed");
}

fn console_socket_without_terminal_is_refused() {
    let socket = ConsoleSocket::new();
    let bundle = Bundle::sh("true");
    let id = Id::new();
    let runtime = Runtime::under_test();
    let mut command = runtime.command(["create", "--console-socket"]);
    command.arg(socket.path()).arg("--bundle").arg(bundle.save()).arg(&id);
    Program::spawn(command, Stdin::Null).finish().refused();
    runtime.call(&["state", id.as_str()]).refused();
}
