//! What goes over a container's interfaces: much of it, counted, with nobody who takes it, or garbage.

use super::{idle_in, json_of};
use crate::harness::{Case, Container, Netns, Program, Stdin, case, sized, tool};

pub const CASES: &[Case] = &[
    case!(traffic_counters_move_in_stats).stockade_only("runc counts only interfaces that it made itself"),
    case!(bulk_arrives_complete_both_ways),
    case!(reader_that_stalls_stalls_nothing_else),
    case!(frames_of_garbage_hurt_nobody),
];

/// Bytes and packets in and out, as `events --stats` has them.
fn traffic(container: &Container) -> [u64; 4] {
    let event = json_of(&container.op_with(&["events", "--stats"], &[]).ok());
    let interface = &event["data"]["network_interfaces"][0];
    assert_eq!(interface["Name"], "eth0", "{event}");
    ["RxBytes", "RxPackets", "TxBytes", "TxPackets"].map(|name| interface[name].as_u64().expect("a number"))
}

fn traffic_counters_move_in_stats() {
    let netns = Netns::with_veth();
    let container = idle_in(&netns);
    let before = traffic(&container);
    container.exec(&format!("ping -q -c 3 -s 1000 {}", netns.host())).code(0);
    let after = traffic(&container);
    for (index, least) in [3000, 3, 3000, 3].into_iter().enumerate() {
        assert!(after[index] >= before[index] + least, "{before:?} {after:?}");
    }
}

/// A MiB in which no word comes twice, so that it shows what is lost, doubled or out of place.
const BLOCK: &str = r#"use IO::Socket::INET; $| = 1; my $block = join "", map { pack "N", $_ * 2654435761 % 4294967296 } 0 .. 262143;"#;
/// Takes one connection to ADDRESS:PORT and COUNT blocks, and tells after each 64.
const RECEIVE: &str = r#"
    my ($to, $count) = @ARGV;
    my $listener = IO::Socket::INET->new(Listen => 1, LocalAddr => $to, ReuseAddr => 1) or die "listen: $!";
    print "listening\n"; my $peer = $listener->accept;
    for my $n (1 .. $count) {
        my $got = "";
        while (length $got < length $block) {
            sysread $peer, $got, length($block) - length $got, length $got or die "ended in block $n: $!";
        }
        $got eq $block or die "block $n differs"; $n % 64 or print "had $n\n";
    }
    print sysread($peer, my $more, 1) ? "more\n" : "all\n";
"#;
/// Sends COUNT blocks to ADDRESS:PORT.
const SEND: &str = r#"
    my ($to, $count) = @ARGV;
    my $peer = IO::Socket::INET->new($to) or die "connect: $!";
    for (1 .. $count) {
        for (my $sent = 0; $sent < length $block;) {
            $sent += syswrite $peer, $block, length($block) - $sent, $sent or die "send: $!";
        }
    }
"#;

fn bulk_arrives_complete_both_ways() {
    let netns = Netns::with_veth();
    let container = idle_in(&netns);
    // MiB each way.
    let count = sized(192, 10 << 10);
    let words = |script: &str, to: &str| {
        ["perl".into(), "-e".into(), format!("{BLOCK} {script}"), to.to_owned(), count.to_string()]
    };
    let inside = |script: &str, to: &str| {
        let words = words(script, to);
        container.start_exec(&[], &words.each_ref().map(String::as_str), Stdin::Null)
    };
    let outside = |script: &str, to: &str| {
        let words = words(script, to);
        let mut command = std::process::Command::new(&words[0]);
        command.args(&words[1..]);
        Program::spawn(command, Stdin::Null)
    };
    let arrives = |receiver: &Program, send: &dyn Fn() -> Program| {
        receiver.expect_line("listening");
        let mut sender = send();
        for n in 1..=count / 64 {
            receiver.expect_line(&format!("had {}", n * 64));
        }
        receiver.expect_line("all");
        sender.finish().code(0);
    };
    let (host, guest) = (format!("{}:6002", netns.host()), format!("{}:6001", netns.guest()));
    arrives(&inside(RECEIVE, &guest), &|| outside(SEND, &guest));
    arrives(&outside(RECEIVE, &host), &|| inside(SEND, &host));
}

fn reader_that_stalls_stalls_nothing_else() {
    let netns = Netns::with_veth();
    let container = idle_in(&netns);
    let (host, guest) = (netns.host(), netns.guest());
    // Takes a connection and never reads from it; the sender fills every buffer on the way.
    let sleeper = container.start_exec(
        &[],
        &["socat", "-d", "-d", "-u", "TCP-LISTEN:6100,reuseaddr", "SYSTEM:exec sleep 100000"],
        Stdin::Null,
    );
    while !sleeper.stderr_line().contains("listening") {}
    let mut flood = std::process::Command::new("sh");
    flood.args(["-c", &format!("echo begun; socat -u /dev/zero TCP:{guest}:6100")]);
    let flood = Program::spawn(flood, Stdin::Null);
    flood.expect_line("begun");
    // Datagrams for nobody, as fast as they go.
    let mut datagrams = std::process::Command::new("sh");
    datagrams.args(["-c", &format!("echo begun; socat -u -b 1400 /dev/zero UDP-SENDTO:{guest}:6101")]);
    let datagrams = Program::spawn(datagrams, Stdin::Null);
    datagrams.expect_line("begun");
    for _ in 0..3 {
        assert_eq!(container.exec("echo alive").ok(), "alive\n");
    }
    drop((flood, datagrams));
    container.exec(&format!("ping -q -c 2 {host}")).code(0);
}

fn frames_of_garbage_hurt_nobody() {
    let netns = Netns::with_veth();
    let container = idle_in(&netns);
    // AF_PACKET with frames that are too short, too long and of no sense; the kernel may refuse some of them.
    let script = r#"
        socket(my $s, 17, 3, 0x0300) or die "socket: $!";
        my $index = do { open(my $f, "<", "/sys/class/net/eth0/ifindex") or die; 0 + <$f> };
        my $to = pack("S n i S C C a8", 17, 3, $index, 0, 0, 6, "\xff" x 6);
        srand(1); my ($sent, $lied) = (0, 0);
        for my $i (1 .. 2000) {
            my $frame = join "", map { chr int rand 256 } 1 .. int rand 200;
            $frame = "\xff" x 6 . "\x02" x 6 . (("\x08\x00", "\x86\xdd", "\x81\x00", "\x88\xa8")[$i % 4]) . $frame;
            $frame = substr($frame, 0, $i % 16) if $i % 5 == 0;
            $sent++ if send($s, $frame, 0, $to);
        }
        print "sent ", $sent > 1000 ? "most" : $sent, "\n";
        # The same with headers that lie of what is in the frame: checksums, segments, lengths (PACKET_VNET_HDR).
        setsockopt($s, 263, 15, pack("i", 1)) or die "setsockopt: $!";
        for my $i (1 .. 2000) {
            my $header = pack "CCSSSS", (0, 1, 2, 3)[$i % 4], (0, 1, 3, 4, 5, 0x81, 0x84)[$i % 7], map { int rand(
                $i % 3 ? 200 : 65536) } 1 .. 4;
            my $frame = "\xff" x 6 . "\x02" x 6 . "\x08\x00\x45\x00" . join "", map { chr int rand 256 } 1 .. int rand 1400;
            $lied++ if send($s, $header . $frame, 0, $to);
        }
        print "lied ", $lied > 100 ? "often" : $lied, "\n";
    "#;
    let perl = container.start_exec(&[], &["perl", "-e", script], Stdin::Null).finish();
    assert_eq!(perl.ok(), "sent most\nlied often\n");
    container.exec(&format!("ping -q -c 2 {}", netns.host())).code(0);
    tool(&format!("ping -q -c 2 {}", netns.guest()));
}
