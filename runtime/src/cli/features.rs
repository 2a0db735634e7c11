//! `stockade features`: what this runtime can do, in the structure of the runtime specification (features.md).

use serde_json::{Value, json};

use super::{Outcome, print};
use crate::bundle::{CAPABILITIES, MOUNT_OPTIONS};
use crate::size::{ANNOTATION_MEMORY, ANNOTATION_VCPUS};

pub fn features() -> Outcome {
    print(&format!("{:#}\n", structure()))
}

/// What it prints, which containerd's shim answers too.
pub fn structure() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.3.0",
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": CAPABILITIES,
            "cgroup": {"v1": false, "v2": true, "systemd": true, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE",
                ],
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}},
            "netDevices": {"enabled": false},
        },
        "annotations": {
            "io.stockade.version": env!("CARGO_PKG_VERSION"),
            "io.stockade.annotations": format!("{ANNOTATION_VCPUS},{ANNOTATION_MEMORY}"),
        },
        "potentiallyUnsafeConfigAnnotations": [ANNOTATION_VCPUS, ANNOTATION_MEMORY],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted_and_known() {
        assert!(MOUNT_OPTIONS.is_sorted());
        for name in CAPABILITIES {
            serde_json::from_value::<oci_spec::runtime::Capability>((*name).into()).unwrap();
        }
    }
}
