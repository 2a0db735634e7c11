//! How big a pod's VM is to be, by what the engine says of all of its containers.
//!
//! kubelet tells the engine the sum of the pod's limits and requests when it asks for the sandbox, and containerd
//! (from 1.6 on) and CRI-O write them into the sandbox's annotations.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};
use serde::Deserialize;

use crate::config::{Settings, Sourced};
use crate::size::{By, CPU_PERIOD, Error, MAX_VCPUS, VmSize};

/// containerd's annotations begin with it.
const CRI: &str = "io.kubernetes.cri.sandbox-";
/// CRI-O's is one, in JSON.
const CRI_O: &str = "io.kubernetes.cri-o.PodLinuxResources";
/// What a request of one CPU is in shares.
const SHARES_OF_A_CPU: u64 = 1024;

/// The sums. Zero is none.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Hints {
    cpu_period: i64,
    cpu_quota: i64,
    cpu_shares: i64,
    #[serde(rename = "memory_limit_in_bytes")]
    memory: i64,
}

/// Sizes the VM of a pod. Tells what its memory was chosen by.
pub fn size(
    annotations: Option<&HashMap<String, String>>,
    settings: &Settings,
) -> Result<(VmSize, By), Error> {
    let hints = Hints::of(annotations)?;
    let mut settings = settings.clone();
    // Who requests CPUs without a limit gets as many, if the VM would have fewer.
    let requested = u64::try_from(hints.cpu_shares).unwrap_or(0).div_ceil(SHARES_OF_A_CPU).min(MAX_VCPUS);
    let by_default = settings.file.vcpus.as_ref().map_or(Some(1), |vcpus| vcpus.value.trim().parse().ok());
    if by_default.is_some_and(|vcpus: u64| vcpus < requested) {
        let origin = "the pod's CPU request".into();
        settings.file.vcpus = Some(Sourced { value: requested.to_string(), origin });
    }
    VmSize::of(annotations, Some(&hints.limits()), &settings)
}

impl Hints {
    fn of(annotations: Option<&HashMap<String, String>>) -> Result<Self, Error> {
        let get = |key: &str| annotations.and_then(|all| all.get(key));
        let failed = |key: &str, value: &str| Error::Hint { key: key.into(), value: format!("{value:.100}") };
        if let Some(json) = get(CRI_O) {
            return serde_json::from_str(json).map_err(|_| failed(CRI_O, json));
        }
        let number = |name: &str| {
            let key = format!("{CRI}{name}");
            match get(&key) {
                None => Ok(0),
                Some(value) => value.trim().parse().map_err(|_| failed(&key, value)),
            }
        };
        Ok(Self {
            cpu_period: number("cpu-period")?,
            cpu_quota: number("cpu-quota")?,
            cpu_shares: number("cpu-shares")?,
            memory: number("memory")?,
        })
    }

    fn limits(&self) -> LinuxResources {
        let mut cpu = LinuxCpu::default();
        if self.cpu_quota > 0 {
            cpu.set_quota(Some(self.cpu_quota));
            cpu.set_period(Some(
                u64::try_from(self.cpu_period).ok().filter(|p| *p > 0).unwrap_or(CPU_PERIOD),
            ));
        }
        let mut memory = LinuxMemory::default();
        memory.set_limit(Some(self.memory).filter(|limit| *limit > 0));
        let mut limits = LinuxResources::default();
        limits.set_cpu(Some(cpu)).set_memory(Some(memory));
        limits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sized(annotations: &[(&str, &str)], settings: &Settings) -> Result<VmSize, Error> {
        let annotations = annotations.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Ok(size(Some(&annotations), settings)?.0)
    }

    #[test]
    fn a_pod_has_the_sum_of_its_limits_and_what_the_guest_needs() {
        let (default, _) = VmSize::of(None, None, &Settings::default()).unwrap();
        assert_eq!(sized(&[], &Settings::default()).unwrap(), default);
        let size = sized(
            &[
                ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
                ("io.kubernetes.cri.sandbox-cpu-quota", "250000"),
                ("io.kubernetes.cri.sandbox-cpu-shares", "512"),
                ("io.kubernetes.cri.sandbox-memory", "1073741824"),
            ],
            &Settings::default(),
        )
        .unwrap();
        assert_eq!((size.vcpus, size.memory > 1 << 30, size.memory < 1200 << 20), (3, true, true));
        let json = "{\"cpu_period\":100000,\"cpu_quota\":250000,\"memory_limit_in_bytes\":1073741824,\"oom_score_adj\":1}";
        assert_eq!(sized(&[(CRI_O, json)], &Settings::default()).unwrap(), size);
    }

    #[test]
    fn a_request_raises_the_default_and_nothing_else() {
        let shares = ("io.kubernetes.cri.sandbox-cpu-shares", "3000");
        assert_eq!(sized(&[shares], &Settings::default()).unwrap().vcpus, 3);
        assert_eq!(sized(&[shares, ("io.stockade.vcpus", "2")], &Settings::default()).unwrap().vcpus, 2);
        let mut settings = Settings::default();
        settings.file.vcpus = Some(Sourced { value: "4".into(), origin: "file".into() });
        assert_eq!(sized(&[shares], &settings).unwrap().vcpus, 4);
        let all = ("io.kubernetes.cri.sandbox-cpu-shares", "262144");
        assert_eq!(u64::from(sized(&[all], &Settings::default()).unwrap().vcpus), MAX_VCPUS);
    }

    #[test]
    fn what_is_no_number_is_named() {
        let error = sized(&[("io.kubernetes.cri.sandbox-memory", "much")], &Settings::default()).unwrap_err();
        assert!(
            error.to_string().contains("sandbox-memory") && error.to_string().contains("much"),
            "{error}"
        );
    }
}
