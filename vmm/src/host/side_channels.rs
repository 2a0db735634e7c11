//! What lets one guest learn of another's memory through the processor or through shared pages, as far as the host's
//! kernel says: its mitigations, threads of a core that several guests use at once, and merged pages.
//!
//! Nothing here is changed, and nothing stops a start: an administrator may have reasons. What is off is a warning.

use std::fs;
use std::path::Path;

use super::{Finding, Verdict};

/// How the kernel begins the state of a weakness that it does nothing against
/// (Documentation/ABI/testing/sysfs-devices-system-cpu, `vulnerabilities`).
const OPEN: [&str; 2] = ["Vulnerable", "KVM: Vulnerable"];

/// Looks below `sys`, where sysfs is mounted.
pub fn check(sys: &Path) -> Vec<Finding> {
    let read = |path: &str| fs::read_to_string(sys.join(path)).ok().map(|text| text.trim().to_owned());
    vec![
        mitigations(&sys.join("devices/system/cpu/vulnerabilities")),
        threads(read("devices/system/cpu/smt/active").as_deref()),
        merging(read("kernel/mm/ksm/run").as_deref()),
    ]
}

fn mitigations(dir: &Path) -> Finding {
    let subject = "mitigations";
    let mut found: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|file| {
            let state = fs::read_to_string(file.path()).ok()?;
            Some((file.file_name().to_string_lossy().into_owned(), state.trim().to_owned()))
        })
        .collect();
    found.sort();
    if found.is_empty() {
        let detail = format!("{} tells nothing: mount sysfs there to have them looked at", dir.display());
        return Finding { subject, detail, verdict: Verdict::Warning };
    }
    let open: Vec<_> = found
        .iter()
        .filter(|(_, state)| OPEN.iter().any(|word| state.starts_with(word)))
        .map(|(name, state)| format!("{name} ({state})"))
        .collect();
    if open.is_empty() {
        let detail = format!(
            "on for each of the {} weaknesses that the kernel knows and this processor has",
            found.len()
        );
        return Finding { subject, detail, verdict: Verdict::Ok };
    }
    let detail = format!(
        "the host does nothing against {}: update kernel and microcode, and remove mitigations=off from the kernel's \
         command line",
        open.join(", ")
    );
    Finding { subject, detail, verdict: Verdict::Warning }
}

fn threads(active: Option<&str>) -> Finding {
    let subject = "SMT";
    match active {
        Some("1") => Finding {
            subject,
            detail: "on: two guests may share a core and its caches at the same time; where they are strangers to each \
                     other, switch it off (nosmt on the kernel's command line)"
                .into(),
            verdict: Verdict::Warning,
        },
        _ => Finding { subject, detail: "off".into(), verdict: Verdict::Ok },
    }
}

fn merging(run: Option<&str>) -> Finding {
    let subject = "KSM";
    match run {
        Some("1") => Finding {
            subject,
            detail: "on: equal pages of processes that ask for it are merged, and the time of a write tells one that \
                     another has the page. stockade does not ask for guests' memory; switch it off where others do \
                     (echo 2 > /sys/kernel/mm/ksm/run)"
                .into(),
            verdict: Verdict::Warning,
        },
        _ => Finding { subject, detail: "off".into(), verdict: Verdict::Ok },
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    /// A sysfs with these files.
    fn sys(files: &[(&str, &str)]) -> TempDir {
        let dir = TempDir::new().unwrap();
        for (path, text) in files {
            let path = dir.as_path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        dir
    }

    #[test]
    fn what_is_off_is_named_with_the_kernels_word() {
        let dir = sys(&[
            ("devices/system/cpu/vulnerabilities/meltdown", "Mitigation: PTI"),
            (
                "devices/system/cpu/vulnerabilities/mds",
                "Vulnerable: Clear CPU buffers attempted, no microcode",
            ),
            ("devices/system/cpu/vulnerabilities/itlb_multihit", "KVM: Vulnerable"),
            ("devices/system/cpu/vulnerabilities/l1tf", "Not affected"),
            ("devices/system/cpu/smt/active", "1"),
            ("kernel/mm/ksm/run", "1"),
        ]);
        let found = check(dir.as_path());
        assert!(found.iter().all(|finding| finding.verdict == Verdict::Warning), "{found:?}");
        let text = &found[0].detail;
        assert!(text.contains("mds (Vulnerable: Clear CPU buffers attempted, no microcode)"), "{text}");
        assert!(
            text.contains("itlb_multihit") && !text.contains("meltdown") && !text.contains("l1tf"),
            "{text}"
        );
    }

    #[test]
    fn a_host_that_is_closed_has_nothing_to_warn_of() {
        let dir = sys(&[
            ("devices/system/cpu/vulnerabilities/meltdown", "Mitigation: PTI"),
            ("devices/system/cpu/vulnerabilities/l1tf", "Not affected"),
            ("devices/system/cpu/smt/active", "0"),
            ("kernel/mm/ksm/run", "0"),
        ]);
        assert!(check(dir.as_path()).iter().all(|finding| finding.verdict == Verdict::Ok));
    }

    #[test]
    fn a_kernel_that_tells_nothing_of_its_mitigations_is_not_taken_for_closed() {
        let found = check(sys(&[]).as_path());
        assert_eq!(found[0].verdict, Verdict::Warning);
    }
}
