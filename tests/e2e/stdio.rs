//! What the workload writes arrives whole, in order and on the right stream; what it reads is what it was given.

use std::io::Read;
use std::process::{Command, Stdio};

use crate::harness::{Bundle, Case, Exit, Id, Program, Rootfs, Runtime, Stdin, case};

pub const CASES: &[Case] = &[
    case!(stdout_and_stderr_arrive_apart),
    case!(ten_megabytes_of_stdin_arrive_identical),
    case!(bytes_of_every_value_pass_both_ways),
    case!(conversation_over_pipes_ends_with_the_half_closed_stdin),
    case!(stdin_that_nobody_reads_delays_nothing),
    case!(two_million_lines_arrive_whole_and_in_order_twenty_times),
    case!(both_streams_full_at_once_are_complete),
    case!(stalled_reader_blocks_the_writer_and_nothing_else),
    case!(reader_that_goes_away_breaks_the_writers_pipe),
    case!(standard_streams_can_be_reopened_by_path),
];

fn stdout_and_stderr_arrive_apart() {
    let bundle = Bundle::sh("echo out; echo err >&2; echo out2; printf 'no newline'; printf 'e' >&2");
    let ended = Runtime::under_test().run(&bundle).code(0);
    assert_eq!((ended.text().as_str(), ended.stderr.as_str()), ("out\nout2\nno newline", "err\ne"));
}

/// Bytes without a pattern that a codec, a text mode or a lost block could preserve. xorshift64*.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn ten_megabytes_of_stdin_arrive_identical() {
    let bytes = noise(10_000_000);
    let here = Program::spawn(Command::new("sha256sum"), Stdin::Bytes(bytes.clone())).finish().ok();
    let ended = Runtime::under_test().run_with(&Bundle::sh("cat | sha256sum"), Stdin::Bytes(bytes));
    assert_eq!(ended.ok(), here);
}

fn bytes_of_every_value_pass_both_ways() {
    let bytes: Vec<u8> = (0..=255).cycle().take(256 * 1024).collect();
    let ended = Runtime::under_test().run_with(&Bundle::sh("cat"), Stdin::Bytes(bytes.clone())).code(0);
    assert!(ended.stdout == bytes, "{} bytes came back changed", ended.stdout.len());
}

fn conversation_over_pipes_ends_with_the_half_closed_stdin() {
    let bundle = Bundle::sh("while read line; do echo \"got $line\"; done; echo end; cat; echo bye");
    let mut container = Runtime::under_test().start(&bundle, Stdin::Pipe);
    for word in ["one", "two"] {
        container.program.write(format!("{word}\n"));
        container.program.expect_line(&format!("got {word}"));
    }
    container.program.close_stdin();
    assert_eq!(container.finish().ok(), "got one\ngot two\nend\nbye\n");
}

fn stdin_that_nobody_reads_delays_nothing() {
    let bundle = Bundle::sh("echo done; exit 4");
    let ended = Runtime::under_test().run_with(&bundle, Stdin::Bytes(noise(3_000_000))).code(4);
    assert_eq!(ended.text(), "done\n");
}

fn two_million_lines_arrive_whole_and_in_order_twenty_times() {
    // Debian's seq on both sides: busybox's takes ten times as long for it.
    let mut seq = Command::new("seq");
    seq.args(["1", "2000000"]);
    let expected = Program::spawn(seq, Stdin::Null).finish().code(0).stdout;
    assert_eq!(expected.len(), 14_888_896);
    let bundle = Bundle::new(Rootfs::Debian, &["seq", "1", "2000000"]);
    for round in 1..=20 {
        let ended = Runtime::under_test().run(&bundle).code(0);
        if ended.stdout != expected {
            let same = ended.stdout.iter().zip(&expected).take_while(|(got, want)| got == want).count();
            let (came, of) = (ended.stdout.len(), expected.len());
            panic!("round {round}: {came} bytes of {of} came, equal up to byte {same}");
        }
    }
}

fn both_streams_full_at_once_are_complete() {
    let bundle = Bundle::sh("seq 1 300000 & seq 300001 600000 >&2 & wait");
    let ended = Runtime::under_test().run(&bundle).code(0);
    let lines = |from: u32, to: u32| (from..=to).map(|number| format!("{number}\n")).collect::<String>();
    assert!(ended.text() == lines(1, 300_000), "stdout: {} bytes came", ended.stdout.len());
    assert!(ended.stderr == lines(300_001, 600_000), "stderr: {} bytes came", ended.stderr.len());
}

/// Writes numbered blocks without ever waiting, until the pipe has been full for two seconds; says on stderr
/// how much that took, and then goes on like any writer. Two seconds: whoever is only slow takes something in
/// that time.
const WRITER: &str = r#"
    use Fcntl; use Errno;
    my ($number, $total, $stalled, $rest) = (0, 0, 0, "");
    fcntl(STDOUT, F_SETFL, O_NONBLOCK | O_WRONLY);
    while (!$stalled || $number % 1024) {
        $rest = sprintf("%01023d\n", $number++) if $rest eq "";
        my $written = syswrite(STDOUT, $rest);
        if (defined $written) { substr($rest, 0, $written) = ""; $total += $written; next }
        die $! unless $!{EAGAIN};
        my $w = ""; vec($w, fileno(STDOUT), 1) = 1;
        next if select(undef, $w, undef, $stalled ? undef : 2);
        $stalled = 1; syswrite(STDERR, "stalled $total\n");
    }
    fcntl(STDOUT, F_SETFL, O_WRONLY);
    while ($rest ne "") { my $n = syswrite(STDOUT, $rest); die $! unless defined $n; substr($rest, 0, $n) = ""; }
    syswrite(STDERR, "wrote $number\n");
"#;

fn stalled_reader_blocks_the_writer_and_nothing_else() {
    let runtime = Runtime::under_test();
    let bundle = Bundle::perl(WRITER);
    let id = Id::new();
    let mut command = runtime.run_command(&bundle, &id);
    let (mut output, output_end) = std::io::pipe().unwrap();
    command.stdout(output_end).stderr(Stdio::piped());
    let mut container = runtime.adopt(&bundle, id, Program::spawn_as_is(command, Stdin::Null));

    // It stops, although nobody has read a byte; what has gone in is what pipes and sockets hold on the way.
    let line = container.program.stderr_line();
    let buffered: usize = line.strip_prefix("stalled ").and_then(|n| n.parse().ok()).expect("a number");
    assert!((4096..8 << 20).contains(&buffered), "{buffered} bytes were taken that nobody reads");

    // Nothing else has stopped.
    assert_eq!(container.status(), "running");
    assert_eq!(container.exec("seq 1 20000 | tail -n 1").ok(), "20000\n");
    assert_eq!(runtime.run(&Bundle::sh("echo other")).ok(), "other\n");

    // And when the reader goes on, everything is there.
    let mut bytes = Vec::new();
    output.read_to_end(&mut bytes).unwrap();
    let line = container.program.stderr_line();
    let count: usize = line.strip_prefix("wrote ").and_then(|n| n.parse().ok()).expect("a number");
    let expected: String = (0..count).map(|number| format!("{number:01023}\n")).collect();
    assert!(bytes == expected.as_bytes(), "{} bytes came of {}", bytes.len(), expected.len());
    assert_eq!(container.program.exit(), Exit::Code(0));
    container.finish();
}

fn reader_that_goes_away_breaks_the_writers_pipe() {
    let runtime = Runtime::under_test();
    let bundle =
        Bundle::sh("trap '' PIPE; while echo y; do :; done 2>/dev/null; echo 'no reader' >&2; exit 5");
    let id = Id::new();
    let mut command = runtime.run_command(&bundle, &id);
    let (mut output, output_end) = std::io::pipe().unwrap();
    command.stdout(output_end).stderr(Stdio::piped());
    let container = runtime.adopt(&bundle, id, Program::spawn_as_is(command, Stdin::Null));
    let mut first = [0; 2];
    output.read_exact(&mut first).unwrap();
    drop(output);
    assert_eq!(container.finish().code(5).stderr, "no reader\n");
}

fn standard_streams_can_be_reopened_by_path() {
    let script =
        "echo one > /dev/stdout; echo two > /proc/self/fd/1; echo three > /dev/stderr; cat < /dev/stdin";
    let ended = Runtime::under_test().run_with(&Bundle::sh(script), Stdin::Bytes(b"four\n".to_vec())).code(0);
    assert_eq!((ended.text().as_str(), ended.stderr.as_str()), ("one\ntwo\nfour\n", "three\n"));
}
