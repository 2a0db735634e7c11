//! `stockade logs`: what the guest's kernel and its agent have said on the console.

use clap::Args;

use super::{Error, Global, Outcome, print, sandboxes};
use crate::sandbox::console;

/// Show what a sandbox's guest kernel and agent have said; the last of it, and only while the sandbox is there
#[derive(Args)]
pub struct Logs {
    /// A container's or pod's id
    sandbox: String,
}

pub fn logs(global: &Global, args: Logs) -> Outcome {
    let dir = sandboxes::find(global, &args.sandbox)?;
    let lines = console::kept_lines(dir.path()).map_err(Error::io("read the guest's console"))?;
    print(&lines.iter().map(|line| format!("{line}\n")).collect::<String>())
}
