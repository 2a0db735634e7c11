//! What goes in and out of a pod's containers: logs, exec, attach, forwarded ports.

use std::fs;

use stockade_tests::cri::messages as cri;
use stockade_tests::cri::stream::{RESIZE, RESULT, STDERR, STDIN, STDOUT, Stream};

use super::SHIM;
use crate::harness::{Case, Pods, case, container};

pub const CASES: &[Case] = &[
    case!(logs_have_cris_format_and_are_reopened).stockade_only(SHIM).exclusive(),
    case!(exec_attach_and_forwarded_ports_carry_streams).stockade_only(SHIM).exclusive(),
];

fn logs_have_cris_format_and_are_reopened() {
    let pods = Pods::start();
    let pod = pods.run("logs", |_| ());
    let script = "echo out; echo error >&2; printf part; echo; head -c 40000 /dev/zero | tr '\\0' x; echo; \
                  until [ -e /go ]; do sleep 0.1; done; echo later; while :; do sleep 1; done";
    let id = pod.start("main", script, |_| ());
    let long = "x".repeat(40_000);
    pod.wait_for_line("main", &long);
    let lines = pod.log("main");
    let of = |stream: &str| {
        let all = lines.iter().filter(|line| line.stream == stream);
        all.map(|line| line.text.as_str()).collect::<Vec<_>>()
    };
    assert_eq!((of("stdout"), of("stderr")), (vec!["out", "part", &long], vec!["error"]));

    // As kubelet rotates.
    let path = pod.log_path("main");
    fs::rename(&path, path.with_extension("1")).unwrap();
    let _: cri::Empty = pods.ask("ReopenContainerLog", &container(&id));
    pod.output(&id, "touch /go");
    pod.wait_for_line("main", "later");
    assert_eq!(pod.log("main").len(), 1);
}

/// Reads a channel until it has said this.
#[track_caller]
fn expect(stream: &mut Stream, channel: u8, text: &str) {
    let mut said = String::new();
    while !said.contains(text) {
        match stream.receive().unwrap() {
            Some((of, bytes)) if of == channel => said.push_str(&String::from_utf8_lossy(&bytes)),
            Some((of, bytes)) => {
                let bytes = String::from_utf8_lossy(&bytes);
                assert!(bytes.is_empty(), "after {said:?} on channel {of}: {bytes}")
            }
            None => panic!("closed after {said:?}, before {text:?}"),
        }
    }
}

fn exec_attach_and_forwarded_ports_carry_streams() {
    let pods = Pods::start();
    let pod = pods.run("streams", |_| ());
    let reads = "while read word; do echo got $word; [ $word = end ] && exit 4; done";
    let id = pod.start("main", reads, |config| config.stdin = true);
    let mut exec = pod.exec_stream(&id, "read word; echo $word; echo error >&2; read word; exit 3", false);
    exec.send(STDIN, b"typed\n").unwrap();
    expect(&mut exec, STDOUT, "typed\n");
    expect(&mut exec, STDERR, "error\n");
    exec.send(STDIN, b"x\n").unwrap();
    expect(&mut exec, RESULT, "\"message\":\"3\"");

    // The sizes and the input take different ways through containerd, so neither waits for the other.
    let resized = "tty; read word; until stty size | grep '31 97'; do sleep 0.1; done; exit 0";
    let mut terminal = pod.exec_stream(&id, resized, true);
    expect(&mut terminal, STDOUT, "/dev/pts/");
    terminal.send(RESIZE, b"{\"Width\":97,\"Height\":31}").unwrap();
    terminal.send(STDIN, b"\n").unwrap();
    expect(&mut terminal, STDOUT, "31 97\r\n");
    expect(&mut terminal, RESULT, "Success");

    let mut attached = pod.attach(&id);
    attached.send(STDIN, b"one\n").unwrap();
    expect(&mut attached, STDOUT, "got one\n");
    attached.send(STDIN, b"end\n").unwrap();
    expect(&mut attached, STDOUT, "got end\n");
    assert_eq!(pod.ended(&id).exit_code, 4);

    let serve = pod.start("serve", "nc -ll -p 8080 -e cat", |_| ());
    pod.output(&serve, "until netstat -ltn | grep -q :8080; do sleep 0.1; done");
    const DATA: u8 = 0;
    const ERROR: u8 = 1;
    let mut forwarded = pod.forward(8080);
    for channel in [DATA, ERROR] {
        let (of, port) = forwarded.receive().unwrap().expect("the port");
        assert_eq!((of, port), (channel, 8080u16.to_le_bytes().to_vec()));
    }
    let sent: String = (0..3000).map(|number| format!("line {number}\n")).collect();
    forwarded.send(DATA, sent.as_bytes()).unwrap();
    let mut back = Vec::new();
    while back.len() < sent.len() {
        let (channel, bytes) = forwarded.receive().unwrap().expect("the echo");
        assert_eq!(channel, DATA, "{}", String::from_utf8_lossy(&bytes));
        back.extend(bytes);
    }
    assert!(back == sent.as_bytes());
    // Nobody listens there.
    let mut refused = pod.forward(8081);
    let mut said = Vec::new();
    while let Some((channel, bytes)) = refused.receive().unwrap() {
        if !bytes.is_empty() && bytes != 8081u16.to_le_bytes() {
            said.push((channel, String::from_utf8_lossy(&bytes).into_owned()));
        }
    }
    assert!(said.iter().all(|(channel, _)| *channel == ERROR), "{said:?}");
}
