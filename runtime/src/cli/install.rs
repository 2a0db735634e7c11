//! `stockade install` and `stockade uninstall`: on this host, for the engines that it has.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use stockade_vmm::host::Verdict;

use super::{Error, Outcome, print};
use crate::config::Settings;
use crate::guest_files::GuestFiles;
use crate::install::{self, Engine, Layout, Step};
use crate::state::{DEFAULT_ROOT, StateDir};

/// Where commands look for the binary, of which containerd takes its shims.
const SEARCHED: [&str; 3] = ["/usr/local", "/usr", "/"];

/// Install this binary and its guest files, and tell containerd, CRI-O and Podman of them
#[derive(Args)]
pub struct Install {
    #[command(flatten)]
    common: Common,
    /// Install although `stockade check` finds that microVMs cannot run here
    #[arg(long)]
    force: bool,
}

/// Remove what `install` has put on this host
#[derive(Args)]
pub struct Uninstall {
    #[command(flatten)]
    common: Common,
    /// Although containers still run
    #[arg(long)]
    force: bool,
}

#[derive(Args)]
struct Common {
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Directory for bin and lib
    #[arg(long, default_value = "/usr/local", value_name = "DIR")]
    prefix: PathBuf,
    /// Where the host's root directory is, for a container that installs
    #[arg(long, default_value = "/", value_name = "DIR")]
    host_root: PathBuf,
    /// Restart containerd and CRI-O afterwards, if anything has changed
    #[arg(long)]
    restart: bool,
}

impl Common {
    fn layout(&self) -> Result<Layout, Error> {
        for (flag, dir) in [("--prefix", &self.prefix), ("--host-root", &self.host_root)] {
            if !dir.is_absolute() {
                return Err(Error::Usage(format!("{flag} {} is not absolute", dir.display())));
            }
        }
        Ok(Layout { host: self.host_root.clone(), prefix: self.prefix.clone() })
    }

    /// Does what is not done yet, and tells of all of it.
    fn carry_out(&self, layout: &Layout, steps: &[Step]) -> Outcome {
        let restart = self.restart && !self.dry_run;
        let mut changed = restart && install::is_restart_due(layout);
        if restart && steps.iter().any(|step| !step.is_done()) {
            install::set_restart_due(layout, true)?;
        }
        for step in steps {
            let done = step.is_done();
            changed |= !done;
            if done {
                print(&format!("there already: {step}\n"))?;
            } else if self.dry_run {
                print(&format!("would {step}\n"))?;
            } else {
                step.perform()?;
                print(&format!("done: {step}\n"))?;
            }
        }
        for engine in Engine::found(layout).into_iter().filter(|_| changed) {
            let Some(unit) = engine.unit() else { continue };
            if !restart {
                print(&format!("left: systemctl restart {unit}, so that it reads its configuration\n"))?;
            } else {
                install::restart(layout, unit)?;
                print(&format!("done: restart {unit}\n"))?;
            }
        }
        if restart {
            install::set_restart_due(layout, false)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

pub fn install(args: Install) -> Outcome {
    let layout = args.common.layout()?;
    let obstacles: Vec<_> =
        stockade_vmm::host::check().into_iter().filter(|finding| finding.verdict == Verdict::No).collect();
    for finding in &obstacles {
        print(&format!("{finding}\n"))?;
    }
    if !obstacles.is_empty() && !args.force && !args.common.dry_run {
        return Err(Error::Refused(
            "this host cannot run microVMs, so nothing was installed: see `stockade check`, or use --force"
                .into(),
        ));
    }
    let binary = std::env::current_exe().map_err(Error::io("find this binary"))?;
    let guest_dir = GuestFiles::open(&Settings::load()?)?.dir;
    let steps = install::install(&layout, &binary, &guest_dir)?;
    let outcome = args.common.carry_out(&layout, &steps)?;
    if !SEARCHED.iter().any(|dir| layout.prefix == Path::new(dir)) {
        print(&format!("left: have {}/bin in the PATH of containerd\n", layout.prefix.display()))?;
    }
    Ok(outcome)
}

pub fn uninstall(args: Uninstall) -> Outcome {
    let layout = args.common.layout()?;
    let running = running(&layout)?;
    if running > 0 && !args.force && !args.common.dry_run {
        return Err(Error::Refused(format!(
            "{running} containers of stockade are still there, so nothing was removed: delete them, or use --force"
        )));
    }
    let steps = install::uninstall(&layout)?;
    args.common.carry_out(&layout, &steps)
}

/// Containers and sandboxes that the host keeps state of, made by commands or by shims.
fn running(layout: &Layout) -> Result<usize, Error> {
    let mut count = StateDir::list(&layout.at(DEFAULT_ROOT))?.len();
    for namespace in StateDir::list(&layout.at(crate::shim::STATE))? {
        count += StateDir::list(&layout.at(crate::shim::STATE).join(namespace))?.len();
    }
    Ok(count)
}
