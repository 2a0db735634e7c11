//! A bundle's config.json, from whoever makes bundles of images and annotations.

use std::fs;
use std::path::Path;

use arbitrary::{Result, Unstructured};
use serde_json::{Value, json};
use stockade::fuzzing;

/// Longest message about a bundle: a field, what it holds, and what to do.
const SHOWN: usize = 4 * 4000;

pub fn run(input: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("rootfs")).unwrap();
    let mut bytes = Unstructured::new(input);
    // As text, or as changes of a configuration that is right.
    let config = match bytes.arbitrary::<u8>() {
        Ok(kind) if kind & 1 == 1 => bytes.take_rest().to_vec(),
        _ => {
            let mut config = valid();
            let _ = change(&mut config, &mut bytes);
            config.to_string().into_bytes()
        }
    };
    fs::write(dir.path().join("config.json"), &config).unwrap();
    let before = contents(dir.path());
    if let Err(error) = fuzzing::load_bundle(dir.path()) {
        assert!(error.len() < SHOWN, "a message of {} bytes", error.len());
        assert!(!error.contains(char::is_control), "{error:?}");
    }
    assert_eq!(contents(dir.path()), before, "reading a bundle changed it");
}

fn contents(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A configuration in which every part of the specification that there is occurs.
fn valid() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false, "user": {"uid": 0, "gid": 0, "umask": 18, "additionalGids": [5]},
            "consoleSize": {"height": 24, "width": 80},
            "args": ["sh"], "env": ["PATH=/bin"], "cwd": "/", "oomScoreAdj": 100, "noNewPrivileges": true,
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"],
                             "inheritable": [], "ambient": []},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "scheduler": {"policy": "SCHED_OTHER", "nice": 1, "flags": []},
            "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4}
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "host", "domainname": "domain",
        "hooks": {"prestart": [], "createRuntime": [{"path": "/bin/true", "args": ["true"], "timeout": 5}],
                  "createContainer": [], "startContainer": [{"path": "/bin/true"}], "poststart": [], "poststop": []},
        "annotations": {"io.stockade.x": "1"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/v", "type": "bind", "source": "/tmp", "options": ["rbind", "ro", "rprivate"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k", "mode=755"]}
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/proc/self/ns/net"}, {"type": "mount"},
                           {"type": "user"}],
            "uidMappings": [{"containerID": 0, "hostID": 0, "size": 65536}],
            "gidMappings": [{"containerID": 0, "hostID": 0, "size": 65536}],
            "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438, "uid": 0}],
            "cgroupsPath": "/a/b", "sysctl": {"net.ipv4.ip_forward": "1"},
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 3}],
                "memory": {"limit": 536_870_912, "reservation": 1, "swap": 536_870_912},
                "cpu": {"shares": 1024, "quota": 100_000, "period": 100_000, "cpus": "0-1", "mems": "0"},
                "pids": {"limit": 100}, "unified": {"memory.high": "1"}, "hugepageLimits": [],
                "blockIO": {"weight": 100}, "network": {"classID": 1}, "rdma": {}
            },
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64"],
                        "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                                      "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]}]},
            "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"], "rootfsPropagation": "slave",
            "mountLabel": "", "personality": {"domain": "LINUX"}, "timeOffsets": {"boottime": {"secs": 1}}
        }
    })
}

/// Replaces, removes and adds values anywhere.
fn change(config: &mut Value, bytes: &mut Unstructured) -> Result<()> {
    while !bytes.is_empty() {
        let depth = bytes.int_in_range(1..=5u8)?;
        let pointer = find(config, depth, bytes)?;
        let place = config.pointer_mut(&pointer).unwrap();
        match (place, bytes.int_in_range(0..=6u8)?) {
            (Value::Object(map), 0) if !map.is_empty() => {
                let name = map.keys().nth(bytes.choose_index(map.len())?).unwrap().clone();
                map.remove(&name);
            }
            (Value::Array(list), 1) if list.len() < 100 => list.push(value(bytes)?),
            (Value::Array(list), 2) if !list.is_empty() && list.len() < 100 => list.push(list[0].clone()),
            (place, _) => *place = value(bytes)?,
        }
    }
    Ok(())
}

/// Some place in a configuration, at most so deep, as a JSON pointer.
fn find(place: &Value, depth: u8, bytes: &mut Unstructured) -> Result<String> {
    let names: Vec<String> = match place {
        Value::Object(map) if depth > 0 => map.keys().cloned().collect(),
        Value::Array(list) if depth > 0 => (0..list.len()).map(|index| index.to_string()).collect(),
        _ => Vec::new(),
    };
    let Some(name) = names.get(bytes.choose_index(names.len().max(1))?) else { return Ok(String::new()) };
    let pointer = format!("/{}", name.replace('~', "~0").replace('/', "~1"));
    let member = place.pointer(&pointer).unwrap();
    Ok(pointer + &find(member, depth - 1, bytes)?)
}

fn value(bytes: &mut Unstructured) -> Result<Value> {
    Ok(match bytes.int_in_range(0..=9u8)? {
        0 => Value::Null,
        1 => bytes.arbitrary::<bool>()?.into(),
        2 => bytes.arbitrary::<i8>()?.into(),
        3 => bytes.arbitrary::<i64>()?.into(),
        4 => bytes.arbitrary::<u64>()?.into(),
        5 => json!([]),
        6 => json!({}),
        7 => {
            let words = [
                "",
                ".",
                "..",
                "/",
                "//",
                "/..",
                "../..",
                "a/b",
                "/proc/self/fd/0",
                "/dev/null",
                "\u{1b}[2J",
                "a\nb",
                "a\0b",
                "a\u{202e}b",
                "rbind",
                "size=-1",
                "mode=99999",
                "idmap",
                "0-4294967295",
                "max",
                "-1",
                "bind",
                "tmpfs",
                "overlay",
                "cgroup",
                "SCMP_ACT_NOTIFY",
                "SCMP_ACT_KILL",
                "b",
                "p",
                "shared",
                "SCHED_DEADLINE",
                "SCHED_FIFO",
                "RLIMIT_CORE",
                "memory.max",
                "net.core.somaxconn",
                "kernel.domainname",
            ];
            (*bytes.choose(&words)?).into()
        }
        8 => "x".repeat(bytes.arbitrary::<u16>()?.into()).into(),
        _ => bytes.arbitrary::<&str>()?.into(),
    })
}
