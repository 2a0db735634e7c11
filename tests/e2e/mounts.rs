//! The container sees the file systems its bundle describes, with their options, and what it writes to the
//! host's directories is there on the host.

pub mod ids;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use serde_json::json;

use crate::harness::{Bundle, Case, Rootfs, Runtime, case, host_scratch};

pub const CASES: &[Case] = &[
    case!(read_only_root_cannot_be_written),
    case!(writes_to_a_writable_root_reach_the_host),
    case!(masked_and_read_only_paths),
    case!(tmpfs_with_options),
    case!(bind_mounted_directory_is_shared_both_ways),
    case!(bind_mount_options_hold),
    case!(bind_mounted_file_is_the_hosts_file),
    case!(bind_mounted_file_is_as_the_host_has_it_when_the_workload_starts),
    case!(mounts_below_a_bind_source_come_along),
    case!(files_of_the_same_number_on_two_file_systems_are_two),
    case!(what_was_written_through_a_mapping_is_on_the_host_at_the_end),
    case!(host_files_behave_like_a_file_system),
    case!(directory_with_a_thousand_files_is_listed_whole),
    case!(unix_socket_on_a_volume_connects),
    case!(proc_is_not_mounted_through_a_link),
    case!(device_nodes_are_the_bundles),
    case!(device_rules_hold),
    case!(sysctls),
];

fn proc_is_not_mounted_through_a_link() {
    for name in ["proc", "sys"] {
        let root = host_scratch();
        std::os::unix::fs::symlink("/elsewhere", root.path().join(name)).unwrap();
        let root = json!({ "path": root.path(), "readonly": true });
        let reason = Runtime::under_test().run(&Bundle::sh("true").set("/root", root)).refused();
        assert!(reason.contains("must be mounted on ordinary directory"), "{reason}");
    }
}

/// Expects each line of a script's output to be what stands after `=>` of the pair.
#[track_caller]
fn check_lines(bundle: &Bundle, expected: &[&str]) {
    let ended = Runtime::under_test().run(bundle);
    let text = ended.text();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines, expected, "{ended:?}");
    ended.code(0);
}

fn read_only_root_cannot_be_written() {
    let script = "for path in /new /bin/busybox /etc; do touch $path 2>&1 || echo no; done; awk '$5==\"/\"{print substr($6,1,2)}' /proc/self/mountinfo";
    let ended = Runtime::under_test().run(&Bundle::sh(script)).code(0);
    let text = ended.text();
    assert_eq!(text.matches("Read-only file system").count(), 3, "{text}");
    assert_eq!(text.matches("no\n").count(), 3, "{text}");
    assert!(text.ends_with("ro\n"), "{text}");
}

fn writes_to_a_writable_root_reach_the_host() {
    let bundle = Bundle::sh("mkdir -p /data/sub && echo text > /data/sub/file && chmod 640 /data/sub/file && chown 12:34 /data/sub/file && rm /bin/yes && cat /data/sub/file").writable().capability("CAP_CHOWN").capability("CAP_DAC_OVERRIDE");
    assert_eq!(Runtime::under_test().run(&bundle).ok(), "text\n");
    let file = bundle.written().join("data/sub/file");
    assert_eq!(fs::read_to_string(&file).unwrap(), "text\n");
    let meta = fs::metadata(&file).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o640, 12, 34));
    assert!(!bundle.dir().join("rootfs/bin/yes").exists());
}

fn masked_and_read_only_paths() {
    let script = "
        cat /mnt/secret; ls -A /mnt/dir; echo x > /mnt/frozen/file; cat /mnt/frozen/file
        wc -c < /proc/timer_list; echo 1 > /proc/sys/kernel/msgmax; cat /mnt/open";
    let source = host_scratch();
    for (path, text) in [("secret", "s"), ("dir/inner", "s"), ("frozen/file", "old\n"), ("open", "open\n")] {
        let path = source.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let bundle = Bundle::sh(script)
        .bind(source.path(), "/mnt", &[])
        .push("/linux/maskedPaths", "/mnt/secret")
        .push("/linux/maskedPaths", "/mnt/dir")
        .push("/linux/maskedPaths", "/no/such/path")
        .push("/linux/readonlyPaths", "/mnt/frozen");
    let ended = Runtime::under_test().run(&bundle).code(0);
    // /proc/timer_list is masked or not in the guest's kernel at all; both are nothing to read.
    let text = ended.text();
    assert!(text == "old\n0\nopen\n" || text == "old\nopen\n", "{ended:?}");
    assert_eq!(ended.stderr.matches("Read-only file system").count(), 2, "{ended:?}");
    assert_eq!(fs::read_to_string(source.path().join("frozen/file")).unwrap(), "old\n");
}

fn tmpfs_with_options() {
    let script = "
        grep ' /scratch ' /proc/self/mountinfo | grep -o 'nosuid\\|nodev\\|noexec' | sort | tr '\\n' ' '; echo
        stat -c %a /scratch; df -k /scratch | awk 'END{print $2}'
        cp /bin/busybox /scratch/true && { /scratch/true 2>/dev/null || echo \"not executable\"; }
        dd if=/dev/zero of=/scratch/big bs=1M count=9 2>/dev/null || echo full";
    let options = ["nosuid", "nodev", "noexec", "mode=1750", "size=8m"];
    let bundle = Bundle::sh(script).mount("/scratch", "tmpfs", "tmpfs", &options);
    check_lines(&bundle, &["nodev noexec nosuid ", "1750", "8192", "not executable", "full"]);
}

fn bind_mounted_directory_is_shared_both_ways() {
    let source = host_scratch();
    fs::write(source.path().join("from-host"), "host\n").unwrap();
    fs::set_permissions(source.path(), fs::Permissions::from_mode(0o751)).unwrap();
    let script = "cat /mnt/from-host; stat -c %a /mnt; echo ready; read word; cat /mnt/later; echo guest > /mnt/from-guest; echo $word";
    let bundle = Bundle::sh(script).bind(source.path(), "/mnt", &["rw"]);
    let mut container = Runtime::under_test().start(&bundle, crate::harness::Stdin::Pipe);
    for line in ["host", "751", "ready"] {
        container.program.expect_line(line);
    }
    // A file that the host makes while the container runs is there at once.
    fs::write(source.path().join("later"), "later\n").unwrap();
    container.program.write("go\n");
    container.program.expect_line("later");
    container.program.expect_line("go");
    container.finish().ok();
    assert_eq!(fs::read_to_string(source.path().join("from-guest")).unwrap(), "guest\n");
}

fn bind_mount_options_hold() {
    let source = host_scratch();
    fs::copy(Rootfs::Busybox.program("busybox"), source.path().join("sh")).unwrap();
    fs::write(source.path().join("file"), "old\n").unwrap();
    let script = "
        echo new 2>/dev/null > /ro/file || echo 'ro: no'
        cat /rw/file; echo new > /rw/file && cat /ro/file
        /rw/sh -c 'echo runs'; /ne/sh -c 'echo runs' 2>/dev/null || echo 'noexec: no'
        for dir in ro ne rw; do echo $dir $(awk -v d=/$dir '$5==d{print $6}' /proc/self/mountinfo | tr , '\\n' | grep -E '^(ro|rw|nosuid|nodev|noexec|noatime)$' | sort); done";
    let bundle = Bundle::sh(script)
        .writable()
        .bind(source.path(), "/ro", &["ro", "nosuid", "nodev"])
        .bind(source.path(), "/ne", &["noexec", "noatime"])
        .bind(source.path(), "/rw", &[]);
    check_lines(
        &bundle,
        &[
            "ro: no",
            "old",
            "new",
            "runs",
            "noexec: no",
            "ro nodev nosuid ro",
            "ne noatime noexec rw",
            "rw rw",
        ],
    );
}

fn bind_mounted_file_is_the_hosts_file() {
    let source = host_scratch();
    let (plain, readonly) = (source.path().join("plain"), source.path().join("readonly"));
    fs::write(&plain, "plain\n").unwrap();
    fs::write(&readonly, "readonly\n").unwrap();
    fs::write(source.path().join("beside"), "secret\n").unwrap();
    let script = "cat /etc/plain /etc/readonly; echo more >> /etc/plain; echo x 2>/dev/null >> /etc/readonly || echo no; ls /etc/beside 2>/dev/null; cat /etc/plain";
    let bundle = Bundle::sh(script).writable().bind(&plain, "/etc/plain", &[]).bind(
        &readonly,
        "/etc/readonly",
        &["ro"],
    );
    check_lines(&bundle, &["plain", "readonly", "no", "plain", "more"]);
    assert_eq!(fs::read_to_string(plain).unwrap(), "plain\nmore\n");
    assert_eq!(fs::read_to_string(readonly).unwrap(), "readonly\n");
}

/// Podman from 5 on fills in /etc/hosts then.
fn bind_mounted_file_is_as_the_host_has_it_when_the_workload_starts() {
    let source = host_scratch();
    let file = source.path().join("file");
    fs::write(&file, "").unwrap();
    // A program that is there at once: what the guest knows of the file is good for a second.
    let script = ["sh", "-c", "cat /etc/file; echo end"];
    let bundle = Bundle::new(Rootfs::Busybox, &script).writable().bind(&file, "/etc/file", &[]);
    let container = Runtime::under_test().create(&bundle);
    fs::write(&file, "after create\n").unwrap();
    container.op("start").ok();
    container.program.expect_line("after create");
    container.program.expect_line("end");
}

fn mounts_below_a_bind_source_come_along() {
    let source = host_scratch();
    let inner = source.path().join("inner");
    fs::create_dir(&inner).unwrap();
    nix::mount::mount(Some("tmpfs"), &inner, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)
        .unwrap();
    fs::write(inner.join("file"), "below\n").unwrap();
    let bundle =
        Bundle::sh("cat /mnt/inner/file; echo back > /mnt/inner/back").bind(source.path(), "/mnt", &[]);
    let ended = Runtime::under_test().run(&bundle);
    let back = fs::read_to_string(inner.join("back"));
    // Whoever still held the mount would make this fail with EBUSY.
    nix::mount::umount(&inner).unwrap();
    assert_eq!(ended.ok(), "below\n");
    assert_eq!(back.unwrap(), "back\n");
}

/// diff(1), cp(1), tar(1) and find(1) tell files apart, and the ends of a file system, by device and number.
fn files_of_the_same_number_on_two_file_systems_are_two() {
    let source = host_scratch();
    let places = ["one", "two", "one/below"].map(|name| source.path().join(name));
    for place in &places {
        fs::create_dir(place).unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), place, Some("tmpfs"), flags, None::<&str>).unwrap();
        fs::write(place.join("file"), place.as_os_str().as_encoded_bytes()).unwrap();
    }
    let numbers = places.each_ref().map(|place| fs::metadata(place.join("file")).unwrap().ino());
    let script = "
        stat -c %d:%i /one/file /two/file /one/below/file /file1 /file2 | sort | uniq | wc -l
        stat -c %d / /one /two /one/below | sort | uniq | wc -l
        stat -c %d /one /one/file | uniq | wc -l
        cmp -s /one/file /two/file || echo differ; cp /one/file /two/new && cat /two/new && echo
        find /one -xdev -name file; du -xs /one | wc -l
        ls -i /one/file /file1 | sort > /tmp/a; sleep 1.1; ls -i /one/file /file1 | sort | cmp - /tmp/a && echo stay";
    let bundle = Bundle::debian(script)
        .writable()
        .bind(&places[0], "/one", &[])
        .bind(&places[1], "/two", &[])
        .bind(places[1].join("file"), "/file1", &[])
        .bind(places[2].join("file"), "/file2", &[]);
    let ended = Runtime::under_test().run(&bundle);
    for place in places.iter().rev() {
        nix::mount::umount(place).unwrap();
    }
    assert!(numbers.iter().all(|number| *number == numbers[0]), "{numbers:?}");
    let text = ended.ok();
    // Under runc, file1 and file2 are the other two's, which a file that is mounted for itself is not in a VM.
    let files = if Runtime::under_test().is_stockade() { "5" } else { "3" };
    let one = places[0].display().to_string();
    assert_eq!(text.lines().collect::<Vec<_>>(), [files, "4", "1", "differ", &one, "/one/file", "1", "stay"]);
}

/// Such a write is not written through: the guest's kernel has it until it is told to let go.
fn what_was_written_through_a_mapping_is_on_the_host_at_the_end() {
    let source = host_scratch();
    fs::write(source.path().join("file"), "old text").unwrap();
    // mmap(2) of the file, shared, and read(2) into it: perl alone cannot write to an address.
    let script = r#"perl -e 'open F, "+<", "/mnt/file"; open G, "<", "/mnt/new"; $at = syscall 9, 0, 4096, 3, 1, fileno F, 0; print syscall(0, fileno G, $at, 3), "\n"'"#;
    fs::write(source.path().join("new"), "new").unwrap();
    let bundle = Bundle::debian(script).bind(source.path(), "/mnt", &[]);
    assert_eq!(Runtime::under_test().run(&bundle).ok(), "3\n");
    assert_eq!(fs::read_to_string(source.path().join("file")).unwrap(), "new text");
}

fn host_files_behave_like_a_file_system() {
    let source = host_scratch();
    let script = r#"
        set -e
        cd /mnt
        echo a > a; mv a b; ln b c; ln -s b d; stat -c '%h' b; cat d; readlink d
        echo more >> c; cat b; rm b; cat c
        mkdir -p x/y/z; rmdir x/y/z; [ ! -e x/y/z ] && echo gone
        truncate -s 1G sparse; stat -c '%s' sparse; truncate -s 3 c; cat c; echo
        touch -d '2001-02-03 04:05:06.789 UTC' c; stat -c '%Y' c
        chmod 4711 c; stat -c '%a' c; chown 7:8 c; stat -c '%u:%g %a' c
        mkfifo f; (echo through > f &); cat f
        perl -e 'open F, "+>", "m"; syswrite F, "x" x 8192; seek F, 4096, 0; syswrite F, "MID"; seek F, 4094, 0; sysread F, $b, 7; print "$b\n"'
        perl -e 'use Fcntl ":flock"; open A, ">l"; open B, ">l"; print flock(A, LOCK_EX|LOCK_NB) ? 1:0, flock(B, LOCK_EX|LOCK_NB) ? 1:0, "\n"'
        perl -e 'open F, ">u"; unlink "u"; print F "deleted"; close F; print -e "u" ? "there" : "away", "\n"'
        ls -A | tr '\n' ' '; echo
        cat no-such 2>&1 || true
        mv x/y moved; rm -r x; [ -d moved ] && echo moved"#;
    let mut bundle = Bundle::debian(script).bind(source.path(), "/mnt", &[]);
    for name in ["CAP_CHOWN", "CAP_FOWNER", "CAP_FSETID", "CAP_DAC_OVERRIDE"] {
        bundle = bundle.capability(name);
    }
    check_lines(
        &bundle,
        &[
            "2",
            "a",
            "b",
            "a",
            "more",
            "a",
            "more",
            "gone",
            "1073741824",
            "a\nm",
            "981173106",
            "4711",
            "7:8 711",
            "through",
            "xxMIDxx",
            "10",
            "away",
            "c d f l m sparse x ",
            "cat: no-such: No such file or directory",
            "moved",
        ]
        .iter()
        .flat_map(|line| line.split('\n'))
        .collect::<Vec<_>>(),
    );
    let meta = fs::metadata(source.path().join("c")).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.len(), meta.mtime()), (7, 8, 3, 981_173_106));
}

fn directory_with_a_thousand_files_is_listed_whole() {
    let source = host_scratch();
    for number in 0..1000 {
        fs::write(source.path().join(format!("file-with-a-rather-long-name-{number:04}")), "").unwrap();
    }
    let script = "ls /mnt | wc -l; ls /mnt | sort -u | wc -l; rm /mnt/*; ls -A /mnt | wc -l";
    check_lines(&Bundle::sh(script).bind(source.path(), "/mnt", &[]), &["1000", "1000", "0"]);
    assert_eq!(fs::read_dir(source.path()).unwrap().count(), 0);
}

fn unix_socket_on_a_volume_connects() {
    let source = host_scratch();
    let script = r#"
        use Socket;
        socket(S, AF_UNIX, SOCK_STREAM, 0); bind(S, pack_sockaddr_un("/mnt/s")) or die "bind: $!"; listen(S, 1);
        if (!fork) {
            socket(C, AF_UNIX, SOCK_STREAM, 0); connect(C, pack_sockaddr_un("/mnt/s")) or die "connect: $!";
            syswrite(C, "over the socket\n"); exit 0;
        }
        accept(A, S) or die; print scalar <A>; wait"#;
    check_lines(&Bundle::perl(script).bind(source.path(), "/mnt", &[]), &["over the socket"]);
}

fn device_nodes_are_the_bundles() {
    let script = "
        for node in null zero full random urandom tty extra block; do echo $node $(stat -c '%F %t:%T %a %u:%g' /dev/$node); done
        head -c 3 /dev/zero | wc -c; head -c 9 /dev/urandom | wc -c; head -c 9 /dev/random | wc -c
        echo x > /dev/null; echo x 2>/dev/null > /dev/full || echo full; head -c 2 /dev/extra | wc -c
        for link in fd stdin ptmx; do readlink /dev/$link; done";
    let bundle = Bundle::sh(script)
        .capability("CAP_DAC_OVERRIDE")
        .push("/linux/devices", json!({ "path": "/dev/extra", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 5, "gid": 6 }))
        .push("/linux/devices", json!({ "path": "/dev/block", "type": "b", "major": 7, "minor": 3, "fileMode": 0o600, "uid": 0, "gid": 0 }))
        .push("/linux/resources/devices", json!({ "allow": true, "type": "c", "major": 1, "minor": 5, "access": "rw" }));
    check_lines(
        &bundle,
        &[
            "null character special file 1:3 666 0:0",
            "zero character special file 1:5 666 0:0",
            "full character special file 1:7 666 0:0",
            "random character special file 1:8 666 0:0",
            "urandom character special file 1:9 666 0:0",
            "tty character special file 5:0 666 0:0",
            "extra character special file 1:5 640 5:6",
            "block block special file 7:3 600 0:0",
            "3",
            "9",
            "9",
            "full",
            "2",
            "/proc/self/fd",
            "/proc/self/fd/0",
            "pts/ptmx",
        ],
    );
}

fn device_rules_hold() {
    // Making a node is allowed by default, opening it is not: /dev/kmsg is 1:11. /dev/null's numbers are.
    let script = "
        mknod /dev/kmsg2 c 1 11 && mknod /dev/null2 c 1 3 && mknod /dev/block2 b 254 0 && echo made
        echo x > /dev/null2 && echo null
        cat /dev/kmsg2 2>&1 | grep -o 'Operation not permitted'
        cat /dev/block2 2>&1 | grep -o 'Operation not permitted'";
    let bundle = Bundle::sh(script)
        .capability("CAP_MKNOD")
        .push("/linux/resources/devices", json!({ "allow": true, "type": "c", "access": "m" }))
        .push("/linux/resources/devices", json!({ "allow": true, "type": "b", "access": "m" }));
    check_lines(&bundle, &["made", "null", "Operation not permitted", "Operation not permitted"]);
}

fn sysctls() {
    let bundle = Bundle::sh(
        "cd /proc/sys; cat kernel/msgmax net/ipv4/ip_unprivileged_port_start fs/mqueue/msg_max",
    )
    .set(
        "/linux/sysctl",
        json!({
            "kernel.msgmax": "4242", "net.ipv4.ip_unprivileged_port_start": "99", "fs.mqueue.msg_max": "17"
        }),
    );
    check_lines(&bundle, &["4242", "99", "17"]);
}
