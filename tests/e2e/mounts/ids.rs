//! Id-mapped mounts: a container finds the host's files with other owners, and what it writes is there with theirs.
//!
//! Compared with crun, since the lab's runc is older than these.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use nix::mount::{MsFlags, mount, umount};
use serde_json::{Value, json};

use crate::harness::{Bundle, Case, Ended, Runtime, case, host_scratch};

const OLD: &str = "the lab's runc is older";

pub const CASES: &[Case] = &[
    case!(a_volume_has_the_owners_that_its_mappings_say).stockade_only(OLD),
    case!(a_volume_has_the_containers_own_mappings).stockade_only(OLD),
    case!(users_of_a_namespace_may_listen_and_ping)
        .stockade_only("without a VM the network is the namespace's"),
    case!(mounts_below_are_mapped_if_that_is_asked_for).stockade_only(OLD),
    case!(what_cannot_be_mapped_is_refused_without_a_vm).stockade_only(OLD),
];

/// Runs a bundle with crun, and with the runtime under test, which must do the same. Before each run the volume is
/// made anew.
#[track_caller]
fn alike(bundle: &Bundle, fill: impl Fn()) -> Ended {
    fill();
    let state = host_scratch();
    let known = Runtime::named("crun").global(&["--root", state.path().to_str().unwrap()]).run(bundle);
    fill();
    let ended = Runtime::under_test().run(bundle);
    assert_eq!((known.exit, known.text()), (ended.exit, ended.text()), "crun: {known:?}\nhere: {ended:?}");
    ended
}

fn mappings(ranges: &[[u32; 3]]) -> Value {
    let object = |[inside, outside, count]: &[u32; 3]| json!({"containerID": inside, "hostID": outside, "size": count});
    ranges.iter().map(object).collect()
}

/// On /dev, where the container's root can make a mount point, whoever that is.
fn mapped(source: &Path, options: &[&str], uids: &[[u32; 3]], gids: &[[u32; 3]]) -> Value {
    json!({
        "destination": "/dev/v", "type": "bind", "source": source, "options": options,
        "uidMappings": mappings(uids), "gidMappings": mappings(gids),
    })
}

/// Makes files anew, each with an owner and a group of that number.
fn fill(dir: &Path, files: &[(&str, u32)]) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::remove_file(path).unwrap();
        }
    }
    for (name, id) in files {
        fs::write(dir.join(name), "").unwrap();
        chown(dir.join(name), Some(*id), Some(*id)).unwrap();
    }
}

fn owner(path: &Path) -> (u32, u32) {
    let found = fs::metadata(path).unwrap();
    (found.uid(), found.gid())
}

fn a_volume_has_the_owners_that_its_mappings_say() {
    let source = host_scratch();
    chown(source.path(), Some(5), Some(6)).unwrap();
    // Nobody of the container's can own a file there but those that are mapped.
    let script = "
        stat -c '%n %u:%g' /dev/v /dev/v/*; id -u
        echo mine > /dev/v/new && stat -c '%n %u:%g' /dev/v/new; mkdir /dev/v/dir 2>&1; ln -s x /dev/v/link 2>&1
        chown 1004:2003 /dev/v/new && chown 77 /dev/v/new 2>&1; chgrp 1005 /dev/v/new 2>&1
        chmod 4755 /dev/v/new; stat -c %a /dev/v/new; mv /dev/v/new /dev/v/other; ln /dev/v/other /dev/v/again; cat /dev/v/again; rm /dev/v/zero; ls /dev/v";
    let mut bundle = Bundle::sh(script)
        .set("/process/user", json!({ "uid": 1005, "gid": 2006 }))
        .push("/mounts", mapped(source.path(), &["rbind", "idmap"], &[[0, 1000, 10]], &[[0, 2000, 10]]));
    for name in ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER"] {
        bundle = bundle.capability(name).push("/process/capabilities/ambient", name);
        bundle = bundle.push("/process/capabilities/inheritable", name);
    }
    let begin = || {
        let _ = fs::remove_dir(source.path().join("dir"));
        let _ = fs::remove_file(source.path().join("link"));
        let _ = fs::remove_file(source.path().join("other"));
        let _ = fs::remove_file(source.path().join("again"));
        fill(source.path(), &[("zero", 0), ("nine", 9), ("ten", 10)]);
    };
    let text = alike(&bundle, begin).text();
    assert!(
        text.starts_with(
            "/dev/v 1005:2006\n/dev/v/nine 1009:2009\n/dev/v/ten 65534:65534\n/dev/v/zero 1000:2000\n"
        ),
        "{text}"
    );
    assert!(text.contains("/dev/v/new 1005:2006\n"), "{text}");
    assert_eq!(owner(&source.path().join("other")), (4, 3));
    assert_eq!(owner(&source.path().join("dir")), (5, 6));
    let link = fs::symlink_metadata(source.path().join("link")).unwrap();
    assert_eq!((link.uid(), link.gid()), (5, 6));

    // Root is not mapped: it may do nothing that would leave a file of its.
    let script =
        "id -u; touch /dev/v/new 2>&1; mkdir /dev/v/sub 2>&1; cat /dev/v/nine; rm /dev/v/ten 2>&1; ls /dev/v";
    let bundle = Bundle::sh(script)
        .capability("CAP_DAC_OVERRIDE")
        .push("/mounts", mapped(source.path(), &["bind"], &[[0, 1000, 10]], &[[0, 2000, 10]]));
    alike(&bundle, begin);
}

fn a_volume_has_the_containers_own_mappings() {
    let source = host_scratch();
    let script = "
        stat -c '%n %u:%g' /dev/v/*; echo mine > /dev/v/new; mkdir /dev/v/dir; chown 33:44 /dev/v/dir
        stat -c '%n %u:%g' /dev/v/new /dev/v/dir
        (echo answer | nc -l -p 80 > /dev/null) & until nc 127.0.0.1 80 < /dev/null 2> /dev/null; do :; done";
    let ids = mappings(&[[0, 100_000, 1000], [1000, 300_000, 1000]]);
    for options in [&["rbind", "idmap"][..], &["bind", "ridmap"]] {
        let mut bundle = Bundle::sh(script)
            .push("/linux/namespaces", json!({ "type": "user" }))
            .set("/linux/uidMappings", ids.clone())
            .set("/linux/gidMappings", ids.clone())
            .mount("/dev/v", "bind", source.path(), options);
        for name in ["CAP_CHOWN", "CAP_DAC_OVERRIDE"] {
            bundle = bundle.capability(name);
        }
        let begin = || {
            let _ = fs::remove_dir(source.path().join("dir"));
            fill(source.path(), &[("a", 0), ("b", 1001), ("c", 2000)]);
        };
        // The lab's crun does not know ridmap, and says nothing of that.
        let ended = match options.contains(&"idmap") {
            true => alike(&bundle, begin),
            false => {
                begin();
                Runtime::under_test().run(&bundle)
            }
        };
        assert_eq!(
            ended.text(),
            "/dev/v/a 0:0\n/dev/v/b 1001:1001\n/dev/v/c 65534:65534\n/dev/v/new 0:0\n/dev/v/dir 33:44\nanswer\n"
        );
        assert_eq!(owner(&source.path().join("new")), (0, 0));
        assert_eq!(owner(&source.path().join("dir")), (33, 44));
    }
}

/// The guest's network belongs to its own users, so what capabilities would allow is allowed to all.
fn users_of_a_namespace_may_listen_and_ping() {
    let script = r#"
        use Socket;
        for (["listen", SOCK_STREAM, 0], ["ping", SOCK_DGRAM, 1], ["raw", SOCK_RAW, 1]) {
            my ($what, $type, $protocol) = @$_;
            my $good = socket(S, AF_INET, $type, $protocol) && bind(S, pack_sockaddr_in($protocol ? 0 : 80, INADDR_ANY));
            print "$what ", $good ? "yes" : "no", "
";
        }"#;
    let with = |capability: &str| {
        let bundle = Bundle::perl(script)
            .push("/linux/namespaces", json!({ "type": "user" }))
            .set("/linux/uidMappings", mappings(&[[0, 100_000, 1000]]))
            .set("/linux/gidMappings", mappings(&[[0, 100_000, 1000]]))
            .set(
                "/process/capabilities",
                json!({ "bounding": [capability], "effective": [capability], "permitted": [capability] }),
            );
        Runtime::under_test().run(&bundle).ok()
    };
    assert_eq!(
        with("CAP_NET_BIND_SERVICE"),
        "listen yes
ping no
raw no
"
    );
    assert_eq!(
        with("CAP_NET_RAW"),
        "listen no
ping yes
raw no
"
    );
}

fn mounts_below_are_mapped_if_that_is_asked_for() {
    let source = host_scratch();
    let below = source.path().join("below");
    fs::create_dir(&below).unwrap();
    mount(Some("x"), &below, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    fill(source.path(), &[("a", 3)]);
    fill(&below, &[("b", 4)]);
    let bundle = |options: &[&str]| {
        let ids = [[0, 1000, 10]];
        Bundle::sh("stat -c '%u:%g' /dev/v/a /dev/v/below/b")
            .push("/mounts", mapped(source.path(), options, &ids, &ids))
    };
    // The lab's crun leaves out what is mounted below.
    let said = ["idmap", "ridmap"].map(|option| Runtime::under_test().run(&bundle(&["rbind", option])));
    umount(&below).unwrap();
    assert_eq!(said.map(|ended| ended.ok()), ["1003:1003\n4:4\n", "1003:1003\n1004:1004\n"]);
}

fn what_cannot_be_mapped_is_refused_without_a_vm() {
    let one = [[0, 1000, 10]];
    let refused =
        |mount: Value| Runtime::under_test().run(&Bundle::sh("true").push("/mounts", mount)).refused();
    let reason = refused(mapped(Path::new("/proc"), &["rbind", "idmap"], &one, &one));
    assert!(reason.contains("cannot map the ids of /proc: the file system proc"), "{reason}");
    let reason = refused(mapped(Path::new("/tmp"), &["bind"], &one, &[]));
    assert!(reason.contains("].gidMappings is"), "{reason}");
    let reason = refused(json!({"destination": "/dev/v", "source": "/tmp", "options": ["bind", "idmap"]}));
    assert!(reason.contains("].options idmap cannot be honoured"), "{reason}");
    let reason =
        refused(json!({"destination": "/dev/v", "type": "tmpfs", "source": "x", "options": ["idmap"]}));
    assert!(reason.contains("only bind mounts"), "{reason}");
}
