//! Pods with users of their own (`hostUsers: false`): what runc makes of them, side by side.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};

use protobuf::MessageField;
use serde_json::Value;
use stockade_tests::cri::host::containerd_version;
use stockade_tests::cri::messages as cri;

use super::{IDLE, SHIM};
use crate::harness::{Case, HANDLER, Pod, Pods, SHIM_TYPE, case, mount, security, tool};

pub const CASES: &[Case] = &[case!(a_pod_with_users_of_its_own_is_as_under_runc)
    .stockade_only(SHIM)
    .exclusive()
    .only_if(has_user_namespaces)];

/// Before, CRI had none, or the snapshots of images could not be mapped.
fn has_user_namespaces() -> bool {
    containerd_version().is_ok_and(|version| version >= (2, 1))
}

fn mapping(host_id: u32) -> Vec<cri::IDMapping> {
    vec![cri::IDMapping { host_id, container_id: 0, length: 65_536, ..Default::default() }]
}

fn users() -> MessageField<cri::UserNamespace> {
    MessageField::some(cri::UserNamespace {
        mode: cri::NamespaceMode::POD.into(),
        uids: mapping(100_000),
        gids: mapping(200_000),
        ..Default::default()
    })
}

/// As kubelet has it: every volume of such a pod is mapped.
fn with_users(config: &mut cri::ContainerConfig, mounts: &[cri::Mount]) {
    security(config).namespace_options.mut_or_insert_default().userns_options = users();
    config.mounts.extend(mounts.iter().cloned().map(|mount| cri::Mount {
        uid_mappings: mapping(100_000),
        gid_mappings: mapping(200_000),
        ..mount
    }));
}

/// What containers of such a pod say, under one runtime.
fn said(pods: &Pods, handler: &str) -> Vec<String> {
    let mut config = pods.config("users");
    let linux = config.linux.mut_or_insert_default();
    let options = linux.security_context.mut_or_insert_default().namespace_options.mut_or_insert_default();
    options.userns_options = users();
    let pod = pods
        .try_run(config, handler)
        .unwrap_or_else(|e| panic!("RunPodSandbox: {e}\n{}", pods.containerd.log()));
    let volume = pod.volume("host-path", "volume");
    fs::write(volume.join("file"), "of the host\n").unwrap();
    chown(volume.join("file"), Some(33), Some(44)).unwrap();
    let memory = pod.volume("empty-dir", "memory");
    tool(&format!(
        "mount -t tmpfs -o size=1m tmpfs {0} && chgrp 2000 {0} && chmod 2770 {0}",
        memory.display()
    ));
    let mounts = [mount(&volume, "/v", false), mount(&memory, "/memory", false)];

    let mut said = first_container(&pod, &mounts);
    let made = fs::metadata(volume.join("new")).unwrap();
    said.push(format!("on the host {}:{}", made.uid(), made.gid()));
    said.extend(containers_that_share_processes(&pod, &mounts));
    pod.remove();
    tool(&format!("umount {}", memory.display()));
    said
}

fn first_container(pod: &Pod, mounts: &[cri::Mount]) -> Vec<String> {
    let script = "
        id -u; id -g; tr -s ' ' < /proc/self/uid_map; tr -s ' ' < /proc/self/gid_map
         stat -c '%n %u:%g %a' / /bin/busybox /etc/hosts /etc/hostname /etc/resolv.conf /v/file /memory
         cat /v/file; echo mine > /v/new && chown 5:6 /v/new && stat -c '%n %u:%g' /v/new
         echo in memory > /memory/new && stat -c '%n %u:%g' /memory/new
         mkdir /made && touch /made/file && chown 7:8 /made/file && stat -c '%n %u:%g' /made /made/file
         chown 70000 /made/file 2>&1
         grep -c ' /dev/mqueue mqueue ' /proc/mounts; hostname; grep CapEff /proc/self/status
         (echo answer | nc -l -p 80 > /dev/null) & until nc 127.0.0.1 80 < /dev/null 2> /dev/null; do :; done";
    let mut said = pod.done("first", script, |config| with_users(config, mounts));

    let readonly = |config: &mut cri::ContainerConfig| {
        with_users(config, mounts);
        security(config).readonly_rootfs = true;
        security(config).run_as_user =
            MessageField::some(cri::Int64Value { value: 1000, ..Default::default() });
        security(config).supplemental_groups = vec![2000];
    };
    let script = "id; echo more > /memory/more && stat -c '%n %u:%g' /memory/more; cat /memory/new; touch /x 2>&1; true";
    said.extend(pod.done("readonly", script, readonly));
    said
}

/// Who reads another's environment is root in the same user namespace.
fn containers_that_share_processes(pod: &Pod, mounts: &[cri::Mount]) -> Vec<String> {
    let shared = |config: &mut cri::ContainerConfig| {
        with_users(config, mounts);
        let options = security(config).namespace_options.mut_or_insert_default();
        options.pid = cri::NamespaceMode::POD.into();
    };
    let id = pod.start("one", &format!("export WHO=one; exec sh -c \"{IDLE}\""), shared);
    pod.wait_for_line("one", "up");
    let script =
        "for one in /proc/[0-9]*; do tr '\\0' '\\n' < $one/environ 2>/dev/null | grep WHO=; done | sort -u
                  ls -d /proc/1; id -u";
    let other = pod.start("other", IDLE, shared);
    let mut said: Vec<String> = pod.output(&other, script).lines().map(String::from).collect();
    said.push(
        pod.output(&id, "id -u; stat -c '%u:%g' /proc/self; touch /v/by-exec; stat -c '%u:%g' /v/by-exec"),
    );
    said
}

fn a_pod_with_users_of_its_own_is_as_under_runc() {
    let pods = Pods::start();
    // From 2.2.7 and 2.3.4 on containerd tells kubelet, by this.
    let info = pods.containerd.ctr(&["plugins", "inspect-runtime", "--runtime", SHIM_TYPE]).ok();
    let info: Value = serde_json::from_str(&info).unwrap_or_else(|e| panic!("{e}: {info}"));
    let linux = &info["Features"]["linux"];
    assert_eq!(linux["mountExtensions"]["idmap"]["enabled"], true, "{info}");
    assert!(linux["namespaces"].as_array().is_some_and(|all| all.contains(&"user".into())), "{info}");

    let known = said(&pods, "runc");
    let here = said(&pods, HANDLER);
    assert_eq!(known, here, "{}", pods.containerd.log());
    for line in ["0 100000 65536", "/v/file 33:44 644", "/memory 0:2000 2770", "on the host 5:6", "WHO=one"] {
        assert!(here.iter().any(|said| said.trim() == line), "{line}: {here:?}");
    }
}
