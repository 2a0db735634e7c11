//! `stockade-image` builds the two files every microVM starts from, the guest kernel and the initrd, and the
//! manifest that says what they are.
//!
//! What always holds: the same inputs give the same bytes; an output file is renamed into place complete, so
//! a VM that has the old one open keeps it; the kernel, which takes minutes, is built once for each set of
//! inputs and kept in the cache (`$STOCKADE_CACHE`, by default /var/cache/stockade) for every checkout.
//!
//! Results go to standard output, one line each; progress and errors go to standard error.

mod cache;
mod compose;
mod cpio;
mod digest;
mod elf;
mod initrd;
mod kernel;
mod manifest;
mod progress;
mod step;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(version, about = "Build the guest kernel and the initrd of stockade's microVMs")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the guest kernel, or find it in the cache, and print where it is
    Kernel {
        #[command(flatten)]
        kernel: KernelArguments,
    },
    /// Make the initrd
    Initrd {
        /// The static agent that becomes /init
        #[arg(long, value_name = "PATH")]
        agent: PathBuf,
        /// The file to write
        #[arg(long, value_name = "FILE", default_value = "initrd.img")]
        out: PathBuf,
    },
    /// Put vmlinux, initrd.img and manifest.json into one directory
    All {
        #[command(flatten)]
        kernel: KernelArguments,
        /// The static agent that becomes /init
        #[arg(long, value_name = "PATH")]
        agent: PathBuf,
        /// The directory to fill
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

#[derive(clap::Args)]
struct KernelArguments {
    /// Build with this configuration fragment in place of stockade's own
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stockade-image: {}", one_line(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Box<dyn Error>> {
    match command {
        Command::Kernel { kernel } => {
            let (directory, origin) =
                kernel::ensure(&cache::root(), &kernel::fragment(kernel.config.as_deref())?)?;
            println!("guest kernel: {origin} {}", directory.display());
        }
        Command::Initrd { agent, out } => {
            let made = compose::initrd(&agent, &out)?;
            println!("initrd: {} bytes, sha256 {}, {}", made.size, made.sha256, out.display());
        }
        Command::All { kernel, agent, out } => {
            let fragment = kernel::fragment(kernel.config.as_deref())?;
            let (directory, origin) = kernel::ensure(&cache::root(), &fragment)?;
            println!("guest kernel: {origin} {}", directory.display());
            let manifest = compose::all(&directory, &agent, &out)?;
            println!(
                "guest files: kernel {} ({:.1} MiB), initrd ({:.1} MiB) in {}",
                manifest.kernel.release,
                compose::mebibytes(manifest.kernel.file.size),
                compose::mebibytes(manifest.initrd.file.size),
                out.display()
            );
            if let Some(warning) = compose::size_warning(&manifest) {
                eprintln!("stockade-image: warning: {warning}");
            }
        }
    }
    Ok(())
}

/// The error and what caused it, joined by colons.
fn one_line(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
