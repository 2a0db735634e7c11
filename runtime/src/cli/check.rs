//! `stockade check`: whether this machine can run microVMs, and if not, why and what to do. What only weakens the wall
//! between guests is a warning.

use std::process::ExitCode;

use clap::Args;
use stockade_vmm::host::Verdict;

use super::{Outcome, print};
use crate::config::Settings;
use crate::guest_files::{GuestFiles, INITRD, KERNEL};

/// Tell whether this machine can run microVMs
#[derive(Args)]
pub struct Check {}

pub fn check() -> Outcome {
    let mut findings: Vec<(bool, String)> = stockade_vmm::host::check()
        .into_iter()
        .map(|finding| (finding.verdict != Verdict::No, finding.to_string()))
        .collect();
    let files = Settings::load().map_err(|e| e.to_string());
    match files.and_then(|settings| GuestFiles::open(&settings).map_err(|e| e.to_string())) {
        Ok(files) => findings
            .push((true, format!("ok: guest files: {KERNEL} and {INITRD} in {}", files.dir.display()))),
        Err(e) => findings.push((false, format!("no: guest files: {e}"))),
    }
    findings.push(match nix::unistd::geteuid().is_root() {
        true => (true, "ok: user: root".into()),
        false => (false, "no: user: not root; mounts need CAP_SYS_ADMIN: run stockade as root".into()),
    });
    print(&findings.iter().map(|(_, line)| format!("{line}\n")).collect::<String>())?;
    Ok(if findings.iter().all(|(ok, _)| *ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
