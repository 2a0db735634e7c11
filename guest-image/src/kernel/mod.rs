//! The guest kernel: Debian's kernel source, our configuration fragment over `allnoconfig`, an ELF `vmlinux`.
//!
//! What always holds: the cache entry of a kernel is named by a hash of everything that decides its bytes
//! ([`inputs::Inputs`]), and every line of the fragment is true in the configuration that was built. The
//! bytes are the same wherever the same source package, gcc and binutils are installed: time, user, host and
//! build number are fixed, the environment is not inherited, and no path of the build is in the objects.

mod fragment;
mod inputs;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;

use crate::cache::{self, Origin};
use crate::digest::sha256;
use crate::manifest;
use crate::progress::{Progress, minutes};
use crate::step;
use inputs::Inputs;

/// stockade's own fragment.
const FRAGMENT: &str = include_str!("../../kernel.config");

/// How many objects a build with that fragment compiles (lines `CC` and `AS` of its log), and what the whole
/// build costs in processor time: only for the estimate, and measured with Debian's gcc 12.
const EXPECTED_OBJECTS: usize = 1213;
const EXPECTED_CPU_MINUTES: usize = 19;

/// The file names in a cache entry.
pub const VMLINUX: &str = "vmlinux";
pub const RECORD: &str = "kernel.json";

/// What is not unpacked, because no guest is built from it: two thirds of the source, which would take minutes
/// to write and to remove again. Kconfig reads all its files, so those stay.
const NOT_UNPACKED: [&str; 13] = [
    "*/Documentation/*/*",
    "*/drivers/accel/*.[ch]",
    "*/drivers/gpu/*.[ch]",
    "*/drivers/infiniband/*.[ch]",
    "*/drivers/media/*.[ch]",
    "*/drivers/net/ethernet/*.[ch]",
    "*/drivers/net/wireless/*.[ch]",
    "*/drivers/scsi/*.[ch]",
    "*/drivers/staging/*.[ch]",
    "*/sound/*.[ch]",
    "*/tools/perf/*",
    "*/tools/testing/*",
    "*.dts*",
];

/// Fixed in place of what the kernel's build would ask the machine for
/// (Documentation/kbuild/reproducible-builds.rst).
const FIXED: [(&str, &str); 7] = [
    ("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970"),
    ("KBUILD_BUILD_USER", "stockade"),
    ("KBUILD_BUILD_HOST", "stockade"),
    ("KBUILD_BUILD_VERSION", "1"),
    ("HOME", "/nonexistent"),
    ("LC_ALL", "C"),
    ("TZ", "UTC"),
];

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Package or tools are missing.
    #[error("the guest kernel cannot be built on this machine")]
    Inputs(#[from] inputs::Error),
    /// The cache cannot be used.
    #[error("no place for the guest kernel")]
    Cache(#[from] cache::Error),
    /// A command of the build failed.
    #[error("building the guest kernel")]
    Step(#[from] step::Error),
    /// The fragment is wrong.
    #[error("the configuration fragment of the guest kernel is wrong")]
    Fragment(#[from] fragment::Error),
    /// A file of the build cannot be used.
    #[error("building the guest kernel: cannot {what} {path}", path = path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
}

/// The text of the fragment to use: that in `file`, or stockade's own.
pub fn fragment(file: Option<&Path>) -> Result<String, Error> {
    match file {
        Some(path) => fs::read_to_string(path).map_err(failed("read", path)),
        None => Ok(FRAGMENT.to_string()),
    }
}

/// The cache entry below `root` that holds the kernel of this fragment; built if there is none.
pub fn ensure(root: &Path, fragment: &str) -> Result<(PathBuf, Origin), Error> {
    let settings = fragment::parse(fragment)?;
    let inputs = Inputs::of_this_machine(root, fragment)?;
    let name = format!("kernel-{}", inputs.key());
    let log = root.join(format!("{name}.log"));
    cache::ensure(root, &name, |directory| build(directory, &log, &inputs, &settings))
}

/// Fills `directory` with vmlinux, its configuration, its symbol table and the record for the manifest.
fn build(directory: &Path, log: &Path, inputs: &Inputs, settings: &fragment::Settings) -> Result<(), Error> {
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    eprintln!(
        "building the guest kernel from {} {}: about {} min with {jobs} jobs; log: {}",
        inputs::SOURCE_PACKAGE,
        inputs.source_version,
        EXPECTED_CPU_MINUTES.div_ceil(jobs),
        log.display()
    );
    let start = Instant::now();
    fs::write(log, "").map_err(failed("write", log))?;
    let tree = directory.join("source");

    unpack(&tree, log)?;
    configure(&tree, &inputs.fragment, settings, log)?;
    let objects = compile(&tree, jobs, log)?;
    let vmlinux = strip(&tree, directory, log)?;

    for (from, to) in [(".config", "config"), ("System.map", "System.map")] {
        fs::copy(tree.join(from), directory.join(to)).map_err(failed("copy", &tree.join(from)))?;
    }
    record(&tree, directory, inputs, &vmlinux)?;
    fs::remove_dir_all(&tree).map_err(failed("remove", &tree))?;
    eprintln!("guest kernel built: {objects} objects in {}", minutes(start.elapsed()));
    Ok(())
}

fn unpack(tree: &Path, log: &Path) -> Result<(), Error> {
    fs::create_dir(tree).map_err(failed("create", tree))?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--use-compress-program=xz -T0", "--strip-components=1"])
        .args(NOT_UNPACKED.map(|pattern| format!("--exclude={pattern}")))
        .args(["--file", inputs::SOURCE_TARBALL, "--directory"])
        .arg(tree);
    let _progress = Progress::start("unpacking the kernel source (some 20 s)", None);
    Ok(step::run("unpack", tar, log, |_| ())?)
}

fn configure(tree: &Path, text: &str, settings: &fragment::Settings, log: &Path) -> Result<(), Error> {
    let file = tree.join("stockade.config");
    fs::write(&file, text).map_err(failed("write", &file))?;
    let mut command = make(tree);
    command.arg("KCONFIG_ALLCONFIG=stockade.config").arg("allnoconfig");
    let _progress = Progress::start("configuring the kernel", None);
    step::run("configure", command, log, |_| ())?;
    let config = tree.join(".config");
    let config = fs::read_to_string(&config).map_err(failed("read", &config))?;
    Ok(fragment::check(settings, &config)?)
}

/// Returns how many objects were compiled.
fn compile(tree: &Path, jobs: usize, log: &Path) -> Result<usize, Error> {
    let mut command = make(tree);
    command.arg(format!("-j{jobs}")).arg(VMLINUX);
    let progress = Progress::start("compiling the guest kernel, object files", Some(EXPECTED_OBJECTS));
    step::run("compile", command, log, |line| {
        if is_object(line) {
            progress.advance();
        }
    })?;
    Ok(progress.done())
}

/// The lines kbuild prints for an object file are `  CC      init/main.o` and `  AS      …`.
fn is_object(line: &str) -> bool {
    line.starts_with("  CC ") || line.starts_with("  AS ")
}

/// The VMM loads segments only: symbols and sections for debuggers would merely be bytes to copy and to ship.
fn strip(tree: &Path, directory: &Path, log: &Path) -> Result<PathBuf, Error> {
    let vmlinux = directory.join(VMLINUX);
    let mut command = Command::new("strip");
    command.arg("--strip-all").arg("-o").arg(&vmlinux).arg(tree.join(VMLINUX));
    step::run("strip", command, log, |_| ())?;
    Ok(vmlinux)
}

fn record(tree: &Path, directory: &Path, inputs: &Inputs, vmlinux: &Path) -> Result<(), Error> {
    let read = |path: &Path| fs::read(path).map_err(failed("read", path));
    let release = read(&tree.join("include/config/kernel.release"))?;
    let record = manifest::Kernel {
        file: manifest::File::of(VMLINUX, &read(vmlinux)?),
        release: String::from_utf8_lossy(&release).trim().to_string(),
        source_package: inputs::SOURCE_PACKAGE.to_string(),
        source_version: inputs.source_version.clone(),
        compiler: inputs.compiler.clone(),
        linker: inputs.linker.clone(),
        fragment_sha256: sha256(inputs.fragment.as_bytes()),
        config_sha256: sha256(&read(&tree.join(".config"))?),
    };
    let path = directory.join(RECORD);
    fs::write(&path, manifest::json(&record)).map_err(failed("write", &path))
}

/// `make` in `tree` with nothing of our own environment: not the variables of a `make` that runs us, nor a
/// user's CFLAGS or locale. Rust is not offered to the kernel, whose configuration would record its version.
fn make(tree: &Path) -> Command {
    let mut command = Command::new("make");
    command.env_clear().envs(FIXED).arg("-C").arg(tree).args(["ARCH=x86_64", "RUSTC=false", "BINDGEN=false"]);
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    command
}

fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::File { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_fragment_is_well_formed() {
        assert!(fragment::parse(FRAGMENT).unwrap().len() > 100);
    }

    #[test]
    fn counts_the_object_files_of_the_guest_only() {
        assert!(is_object("  CC      init/main.o"));
        assert!(is_object("  AS      arch/x86/kernel/head_64.o"));
        assert!(!is_object("  HOSTCC  scripts/kallsyms"));
        assert!(!is_object("make[1]: Entering directory '  CC '"));
    }

    #[test]
    fn make_inherits_nothing_but_the_path() {
        let names: Vec<_> = make(Path::new("/tree")).get_envs().map(|(name, _)| name.to_owned()).collect();
        assert!(names.iter().all(|name| name == "PATH" || FIXED.iter().any(|(fixed, _)| name == fixed)));
    }
}
