//! Volumes of pods: as kubelet has them on the host, and as containers find them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use stockade_tests::cri::messages as cri;

use super::{IDLE, SHIM};
use crate::harness::{Case, Pod, Pods, Rootfs, case, mount, tool};

pub const CASES: &[Case] = &[
    case!(containers_of_a_pod_share_volumes_as_one_file_system).stockade_only(SHIM).exclusive(),
    case!(an_empty_directory_in_memory_is_the_guests_memory).stockade_only(SHIM).exclusive(),
    case!(volumes_of_kubelet_are_what_they_are_under_other_runtimes).stockade_only(SHIM).exclusive(),
];

/// Perl of the lab's Debian root, with a volume below /mnt.
fn with_perl(config: &mut cri::ContainerConfig, volume: &Path) {
    config.mounts.push(mount(&Rootfs::Debian.path(), "/debian", false));
    config.mounts.push(mount(volume, "/debian/mnt", false));
}

/// A unix socket and mapped memory on a volume, in which `number` has been written as 17, work between two containers.
fn share_as_one_file_system(pod: &Pod, volume: &Path) {
    let perl = |program: &str| format!("exec chroot /debian perl -e '{program}'");
    let server = perl(
        "use IO::Socket::UNIX; $SIG{TERM} = sub { exit };
         my $s = IO::Socket::UNIX->new(Local => \"/mnt/socket\", Listen => 1) or die \"listen: $!\";
         open F, \"+>\", \"/mnt/map\"; syswrite F, \"\\0\" x 4096; open N, \"<\", \"/mnt/number\";
         my $at = syscall(9, 0, 4096, 3, 1, fileno(F), 0); $| = 1; print \"up\\n\";
         my $c = $s->accept; print $c \"answer to \" . <$c>; close $c;
         syscall(0, fileno(N), $at, 2); print \"written\\n\"; sleep 1 while 1;",
    );
    pod.start("server", &server, |config| with_perl(config, volume));
    pod.wait_for_line("server", "up");
    let client = perl(
        "use IO::Socket::UNIX; open F, \"+<\", \"/mnt/map\"; my $at = syscall(9, 0, 4096, 3, 1, fileno(F), 0);
         my $c = IO::Socket::UNIX->new(Peer => \"/mnt/socket\") or die \"connect: $!\";
         print $c \"hello\\n\"; print <$c>; $| = 1;
         while (unpack(\"P2\", pack(\"Q\", $at)) !~ /\\d\\d/) { select undef, undef, undef, 0.05 }
         print \"mapped \", unpack(\"P2\", pack(\"Q\", $at)), \"\\n\";",
    );
    let said = pod.done("client", &client, |config| with_perl(config, volume));
    assert_eq!(said[0], "answer to hello");
    assert!(said[1] == "mapped 17", "{said:?}");
}

fn containers_of_a_pod_share_volumes_as_one_file_system() {
    let pods = Pods::start();
    let pod = pods.run("shares", |_| ());
    let volume = pod.volume("empty-dir", "shared");
    let reader = pod.start(
        "reader",
        "until [ -e /v/file ]; do sleep 0.1; done; cat /v/file; ! echo x > /v/file",
        |config| {
            config.mounts.push(mount(&volume, "/v", true));
        },
    );
    fs::write(volume.join("number"), "17").unwrap();
    share_as_one_file_system(&pod, &volume);
    fs::write(volume.join("file"), "from the host\n").unwrap();
    assert_eq!(pod.ended(&reader).exit_code, 0, "{:?}", pod.log("reader"));
    assert_eq!(fs::read_to_string(volume.join("file")).unwrap(), "from the host\n");
}

fn an_empty_directory_in_memory_is_the_guests_memory() {
    let pods = Pods::start();
    let pod = pods.run("memory", |_| ());
    let [volume, filled, large] = ["volume", "filled", "large"].map(|name| pod.volume("empty-dir", name));
    for (of, size) in [(&volume, "8m"), (&filled, "1m"), (&large, "100g")] {
        tool(&format!("mount -t tmpfs -o size={size} tmpfs {}", of.display()));
    }
    // As kubelet does for fsGroup.
    tool(&format!("chgrp 2000 {0} && chmod 2770 {0}", volume.display()));
    fs::write(filled.join("file"), "from the host\n").unwrap();
    let with = |of: &Path, readonly: bool| {
        let mount = mount(of, "/v", readonly);
        move |config: &mut cri::ContainerConfig| config.mounts.push(mount)
    };

    let said = pod.done(
        "init",
        "echo kept > /v/kept; printf 17 > /v/number; stat -c %a:%u:%g /v /v/kept; df -k /v | tail -1; \
         grep ' /v ' /proc/mounts; grep MemTotal /proc/meminfo",
        with(&volume, false),
    );
    assert_eq!(said[..2], ["2770:0:2000", "644:0:2000"]);
    assert!(said[2].starts_with("tmpfs") && said[2].contains(" 8192 "), "{said:?}");
    assert!(said[3].contains(" tmpfs rw,") && said[3].contains("size=8192k"), "{said:?}");
    // As much as the VM has, where the host would have more.
    let kib = |line: &str| -> u64 {
        let words: Vec<_> = line.split_whitespace().collect();
        words[1].parse().unwrap_or_else(|e| panic!("{line}: {e}"))
    };
    let said_of_large = pod.done("large", "df -k /v | tail -1", with(&large, false));
    let (has, total) = (kib(&said_of_large[0]), kib(&said[4]));
    assert!((total..2 * total).contains(&has), "{has} KiB of {total}");

    let reader = pod.start("reader", IDLE, with(&volume, true));
    for one in pod.list(cri::ContainerFilter::default()).iter().filter(|one| one.id != reader) {
        pod.remove_container(&one.id);
    }
    assert_eq!(pod.output(&reader, "cat /v/kept"), "kept");
    let (_, _, refused) = pod.exec(&reader, "touch /v/x");
    assert!(refused.contains("Read-only"), "{refused}");
    share_as_one_file_system(&pod, &volume);
    let writer = pod.start("writer", IDLE, with(&volume, false));
    let (_, _, full) = pod.exec(&writer, "dd if=/dev/zero of=/v/much bs=64k count=200; rm /v/much");
    assert!(full.contains("No space left"), "{full}");
    // What a container writes there counts as its memory.
    let greedy = pod.start("greedy", "dd if=/dev/zero of=/v/much bs=64k count=512", |config| {
        with(&large, false)(config);
        let resources = config.linux.mut_or_insert_default().resources.mut_or_insert_default();
        resources.memory_limit_in_bytes = 16 << 20;
    });
    let killed = pod.ended(&greedy);
    assert_eq!((killed.exit_code, killed.reason.as_str()), (137, "OOMKilled"), "{killed}");

    // As kubelet does for a subPath.
    let part = volume.ancestors().nth(3).unwrap().join("volume-subpaths/volume/part/0");
    fs::create_dir_all(&part).unwrap();
    fs::create_dir(volume.join("sub")).unwrap();
    fs::set_permissions(volume.join("sub"), std::os::unix::fs::PermissionsExt::from_mode(0o751)).unwrap();
    tool(&format!("mount --bind {} {}", volume.join("sub").display(), part.display()));
    let in_part = pod.start("part", IDLE, with(&part, false));
    assert_eq!(pod.output(&in_part, "ls /v; stat -c %a /v; echo in part > /v/file"), "751");
    assert_eq!(pod.output(&reader, "cat /v/sub/file"), "in part");
    pod.output(&writer, "rm -r /v/sub; ln -s / /v/sub; mkdir /v/mine");
    let outside = pod.start("outside", IDLE, with(&part, false));
    let listed = pod.output(&outside, "ls /v");
    assert!(listed.contains("mine") && !listed.contains("proc"), "{listed}");
    assert_eq!(pod.output(&in_part, "ls -d /v"), "/v");

    let reads = pod.start("filled", IDLE, with(&filled, false));
    assert_eq!(pod.output(&reads, "cat /v/file; echo back > /v/back"), "from the host");
    assert_eq!(fs::read_to_string(filled.join("back")).unwrap(), "back\n");

    let names = |of: &Path| fs::read_dir(of).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    assert_eq!((names(&volume), names(&large)), (vec![volume.join("sub")], Vec::new()));
    assert_eq!(names(&volume.join("sub")), Vec::<std::path::PathBuf>::new());
    pod.remove();
    for mounted in [part, volume, filled, large] {
        tool(&format!("umount {}", mounted.display()));
    }
}

fn volumes_of_kubelet_are_what_they_are_under_other_runtimes() {
    let pods = Pods::start();
    let pod = pods.run("volumes", |_| ());
    let projected = pod.volume("projected", "config");
    let publish = |number: u32| {
        let dir = format!("..{number}");
        fs::create_dir(projected.join(&dir)).unwrap();
        fs::write(projected.join(&dir).join("key"), format!("value {number}\n")).unwrap();
        symlink(&dir, projected.join("..data_tmp")).unwrap();
        fs::rename(projected.join("..data_tmp"), projected.join("..data")).unwrap();
    };
    publish(1);
    symlink("..data/key", projected.join("key")).unwrap();
    let memory = pod.volume("empty-dir", "memory");
    tool(&format!("mount -t tmpfs -o size=1m tmpfs {}", memory.display()));
    let host = pod.volume("host-path", "dir");
    fs::create_dir_all(host.join("sub/path")).unwrap();
    fs::write(host.join("sub/path/file"), "deep\n").unwrap();
    // What engines mount in their storage is told to nobody, and comes after the pod.
    let storage = pod.volume("host-path", "storage");
    let engines = storage.join("late");
    tool(&format!("mount -t tmpfs tmpfs {0} && mount --make-private {0}", storage.display()));
    fs::create_dir(&engines).unwrap();
    tool(&format!("mount -t tmpfs tmpfs {}", engines.display()));
    fs::write(engines.join("file"), "late\n").unwrap();
    let message = pod.volume("pods", "containers").join("termination");
    fs::write(&message, "").unwrap();
    fs::set_permissions(&message, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let subpath = pod.volume("subpath", "0");
    tool(&format!("mount --bind {} {}", host.join("sub").display(), subpath.display()));

    let id = pod.start(
        "main",
        "trap 'echo farewell > /dev/termination-log; exit 1' TERM; echo up; while :; do sleep 0.1; done",
        |config| {
            config.mounts.extend([
                mount(&projected, "/etc/config", true),
                mount(&memory, "/memory", false),
                mount(&subpath, "/sub", false),
                mount(&engines, "/late", true),
                mount(&host.join("sub/path/file"), "/one/file", false),
                mount(&message, "/dev/termination-log", false),
            ]);
        },
    );
    pod.wait_for_line("main", "up");
    assert_eq!(pod.output(&id, "cat /etc/config/key /late/file"), "value 1\nlate");
    publish(2);
    pod.output(&id, "until grep -q 'value 2' /etc/config/key; do sleep 0.1; done");
    let (_, _, refused) = pod.exec(&id, "touch /etc/config/x");
    assert!(refused.contains("Read-only"), "{refused}");

    assert_eq!(pod.output(&id, "cat /sub/path/file /one/file"), "deep\ndeep");
    pod.output(&id, "echo new > /sub/new; echo more >> /one/file");
    assert_eq!(fs::read_to_string(host.join("sub/new")).unwrap(), "new\n");
    assert_eq!(fs::read_to_string(host.join("sub/path/file")).unwrap(), "deep\nmore\n");

    pod.output(&id, "head -c 500000 /dev/zero > /memory/fits");
    let (_, _, full) = pod.exec(&id, "dd if=/dev/zero of=/memory/more bs=64k count=40");
    assert!(full.contains("No space left"), "{full}");

    pod.stop_container(&id, 60);
    assert_eq!(fs::read_to_string(&message).unwrap(), "farewell\n");
    pod.remove();
    for mounted in [memory, subpath, engines, storage] {
        tool(&format!("umount {}", mounted.display()));
    }
}
