//! A lab whose host systemd runs, as most are: journald, its bus, scopes, slices, timers.
//!
//! The lab's init hands PID 1 over to it when the host's files are in place. What is left to do it does as a service of
//! systemd's: it serves the link, and the command is in its cgroup.

use super::init::Context;
use std::convert::Infallible;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The word on the kernel's command line that asks for it.
pub(super) const WANTED: &str = "lab.systemd";

/// The init's executable: where the kernel found it is hidden below the root.
const INIT: &str = "/run/lab/init";
/// How the service knows itself.
const MARK: &str = "LAB_UNIT";

/// Sockets, and not the timers: at midnight those of the lab's packages would work beside the command. systemd bounds and
/// ends services in ways that a shell's commands do not know.
const UNIT: &str = "\
[Unit]
Description=The lab's command
Requires=sockets.target
After=sockets.target
[Service]
Type=exec
ExecStart=@/run/lab/init /init
Environment=LAB_UNIT=1
StandardError=journal+console
IgnoreSIGPIPE=no
OOMPolicy=continue
TasksMax=infinity
";

/// Whether this host is to be one.
pub(super) fn wanted() -> bool {
    let words = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    words.split_whitespace().any(|word| word == WANTED)
}

/// Whether this process is the service.
pub(super) fn is_unit() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Becomes systemd, which starts the service when it is up.
pub(super) fn hand_over() -> Result<Infallible, String> {
    for folder in ["/run/lab", "/run/systemd/system"] {
        fs::create_dir_all(folder).or_say(folder)?;
    }
    fs::copy("/proc/self/exe", INIT).or_say("keep the init")?;
    fs::write("/run/systemd/system/lab.service", UNIT).or_say("write the unit")?;
    let mut systemd = Command::new("/lib/systemd/systemd");
    systemd.args(["--system", "--unit=lab.service"]).env_clear();
    Err(systemd.exec()).or_say("become systemd")
}
