//! `linux.resources`: what of it can be honoured, and what an update makes of it.

use oci_spec::runtime::{LinuxDeviceType, LinuxResources};
use serde_json::Value;
use stockade_agent_protocol::resources;

use super::Error;
use super::validate::{unsupported, value};

/// Checks limits before anything is done with them.
pub fn check(limits: &LinuxResources) -> Result<(), Error> {
    resources::settings(limits)?;
    if limits.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()) {
        return unsupported("linux.resources.rdma", "the guest has no RDMA devices; remove it");
    }
    if let Some(io) = limits.block_io() {
        let leaves = io.weight_device().iter().flatten().any(|device| device.leaf_weight().unwrap_or(0) != 0);
        if leaves || io.leaf_weight().unwrap_or(0) != 0 {
            return unsupported(
                "linux.resources.blockIO.leafWeight",
                "cgroup v2 has no leaf weight; remove it",
            );
        }
    }
    for (index, rule) in limits.devices().iter().flatten().enumerate() {
        let field = |name: &str| format!("linux.resources.devices[{index}].{name}");
        if rule.typ() == Some(LinuxDeviceType::P) {
            return value(&field("type"), "p", "give a, b or c: a fifo is no device");
        }
        for (name, number) in [("major", rule.major()), ("minor", rule.minor())] {
            if let Some(number) = number.filter(|n| *n != -1 && u32::try_from(*n).is_err()) {
                return value(&field(name), &number.to_string(), "give a device number, or -1 for all");
            }
        }
        let access = rule.access().as_deref().unwrap_or_default();
        // To deny `a` is to deny all: so runc's callers mean it, and runc takes it.
        let letters = if rule.allow() { "rwm" } else { "rwma" };
        if access.chars().any(|letter| !letters.contains(letter)) {
            return value(&field("access"), access, "use the letters r, w and m");
        }
    }
    Ok(())
}

/// Limits of which an update says nothing by 0 or an empty list, as in runc, whose example of an update is full of them.
const ZERO_SAYS_NOTHING: [&str; 10] = [
    "/memory/limit",
    "/memory/reservation",
    "/memory/swap",
    "/cpu/shares",
    "/cpu/quota",
    "/cpu/period",
    "/cpu/cpus",
    "/cpu/mems",
    "/pids/limit",
    "/blockIO/weight",
];

/// The limits in force after `changes`: what they do not name stays, but that swap has no limit where memory has none any
/// more. Rules for devices are not changed this way, as in runc.
pub fn merge(current: &LinuxResources, changes: &LinuxResources) -> Result<LinuxResources, Error> {
    let mut merged = serde_json::to_value(current).map_err(Error::Encode)?;
    let mut changes = serde_json::to_value(changes).map_err(Error::Encode)?;
    for named in ZERO_SAYS_NOTHING {
        if let Some(value) = changes.pointer_mut(named).filter(|value| **value == 0 || **value == "") {
            *value = Value::Null;
        }
    }
    if let Some(memory) = changes.pointer_mut("/memory")
        && memory["limit"].as_i64().is_some_and(|limit| limit < 0)
        && memory["swap"].is_null()
    {
        memory["swap"] = memory["limit"].clone();
    }
    merge_values(&mut merged, changes);
    let mut merged: LinuxResources = serde_json::from_value(merged).map_err(Error::Encode)?;
    merged.set_devices(None);
    Ok(merged)
}

fn merge_values(current: &mut Value, changes: Value) {
    match (current, changes) {
        (Value::Object(current), Value::Object(changes)) => {
            for (name, change) in changes {
                merge_values(current.entry(name).or_insert(Value::Null), change);
            }
        }
        (_, Value::Null) => {}
        (current, change) => *current = change,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn limits(json: Value) -> LinuxResources {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn an_update_changes_what_it_names_and_no_rules_for_devices() {
        let current = limits(json!({
            "memory": {"limit": 100, "swap": 200}, "cpu": {"shares": 5, "cpus": "0"},
            "unified": {"memory.high": "1"},
        }));
        let changes = limits(json!({
            "memory": {"limit": 50}, "pids": {"limit": 7}, "unified": {"pids.max": "3"},
            "devices": [{"allow": true, "access": "rwm"}],
        }));
        let merged = serde_json::to_value(merge(&current, &changes).unwrap()).unwrap();
        assert_eq!(merged["memory"], json!({"limit": 50, "swap": 200}));
        assert_eq!(merged["cpu"]["shares"], 5);
        assert_eq!(merged["pids"]["limit"], 7);
        assert_eq!(merged["unified"], json!({"memory.high": "1", "pids.max": "3"}));
        assert!(merged.get("devices").is_none());
    }

    #[test]
    fn an_update_of_zeros_changes_nothing() {
        let current = json!({
            "memory": {"limit": 100, "swap": 200, "reservation": 5},
            "cpu": {"shares": 5, "quota": 1000, "period": 5000, "cpus": "0", "mems": "0"}, "pids": {"limit": 7},
            "blockIO": {"weight": 20},
        });
        let zeros = json!({
            "memory": {"limit": 0, "swap": 0, "reservation": 0, "kernel": 0, "kernelTCP": 0},
            "cpu": {"shares": 0, "quota": 0, "period": 0, "realtimeRuntime": 0, "cpus": "", "mems": ""},
            "pids": {"limit": 0}, "blockIO": {"weight": 0},
        });
        let merged = merge(&limits(current.clone()), &limits(zeros)).unwrap();
        check(&merged).unwrap();
        let merged = serde_json::to_value(merged).unwrap();
        for limit in ZERO_SAYS_NOTHING {
            assert_eq!(merged.pointer(limit), current.pointer(limit), "{limit}");
        }
    }

    #[test]
    fn without_a_limit_of_memory_there_is_none_of_swap() {
        let current = limits(json!({"memory": {"limit": 100, "swap": 200}}));
        let merged = merge(&current, &limits(json!({"memory": {"limit": -1}}))).unwrap();
        check(&merged).unwrap();
        assert_eq!(merged.memory().unwrap().swap(), Some(-1));
    }

    #[test]
    fn zeros_of_callers_say_nothing() {
        let zeros = json!({"blockIO": {"weight": 0, "leafWeight": 0, "throttleReadBpsDevice": []}});
        check(&limits(zeros)).unwrap();
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        for (json, field) in [
            (json!({"memory": {"limit": 100, "swap": 50}}), "linux.resources.memory.swap"),
            (json!({"cpu": {"realtimePeriod": 100}}), "linux.resources.cpu.realtimeRuntime"),
            (json!({"rdma": {"mlx5_1": {"hcaHandles": 3}}}), "linux.resources.rdma"),
            (json!({"devices": [{"allow": true, "type": "p"}]}), "linux.resources.devices[0].type"),
            (json!({"devices": [{"allow": true, "access": "x"}]}), "linux.resources.devices[0].access"),
            (json!({"devices": [{"allow": true, "access": "rwa"}]}), "linux.resources.devices[0].access"),
            (json!({"devices": [{"allow": true, "major": -2}]}), "linux.resources.devices[0].major"),
            (json!({"unified": {"a/b": "1"}}), "linux.resources.unified"),
            (json!({"blockIO": {"leafWeight": 500}}), "linux.resources.blockIO.leafWeight"),
        ] {
            let error = check(&limits(json.clone())).unwrap_err().to_string();
            assert!(error.starts_with(field), "{json}: {error}");
        }
    }
}
