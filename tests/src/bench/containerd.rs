//! Under containerd: `ctr run` with stockade's shim and with runc's, and what sandboxes take that idle.

use super::memory::{self, Pss};
use super::program;
use super::runtimes::{GREETING, Runtime, says_greeting};
use super::{Context, Plan, image, result::Results};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The image's name.
pub const IMAGE: &str = "docker.io/lab/busybox:latest";
/// How many sandboxes idle at once.
pub const SANDBOXES: [usize; 3] = [1, 5, 20];
/// Containers with the same value of this annotation share a sandbox.
const GROUP: &str = "io.containerd.runc.v2.group";
const NO_SHIM: &str = "containerd has no name for this runtime";

/// `ctr run --rm` of `echo`, process start to process exit.
pub fn run(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let kind = kind(runtime).ok_or(NO_SHIM)?;
    let containerd = Containerd::start()?;
    let times = containerd.times_of_echo(plan, kind, &[])?;
    results.add("ctr-run-echo", &runtime.name, "time", "virtual_s", &times);
    Ok(())
}

/// A further container of a sandbox: `ctr run --rm` of `echo` in it, and what it grows by when it idles.
pub fn second(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let kind = kind(runtime).ok_or(NO_SHIM)?;
    let containerd = Containerd::start()?;
    let group = format!("{GROUP}=first");
    let grouped = ["--annotation", &group];
    containerd.run_idle(kind, &grouped, "first")?;
    let times = containerd.times_of_echo(plan, kind, &grouped)?;
    results.add("ctr-second", &runtime.name, "time", "virtual_s", &times);
    let mut growth = Vec::new();
    for _ in 0..plan.runs {
        let before = containerd.shims()?;
        containerd.run_idle(kind, &grouped, "second")?;
        growth.push(containerd.shims()? - before);
        containerd.remove("second");
    }
    memory::add("ctr-second", &runtime.name, runtime.has_vm, &growth, results);
    containerd.remove("first");
    Ok(())
}

/// The memory of sandboxes that idle, per sandbox: once for each number, since many take their time.
pub fn idle(_: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    let kind = kind(runtime).ok_or(NO_SHIM)?;
    let containerd = Containerd::start()?;
    let mut started = 0;
    for number in SANDBOXES {
        while started < number {
            started += 1;
            containerd.run_idle(kind, &[], &format!("idle-{started}"))?;
        }
        let each = containerd.shims()?.scaled(1.0 / number as f64);
        memory::add(&format!("ctr-idle-{number}"), &runtime.name, runtime.has_vm, &[each], results);
    }
    (1..=started).for_each(|number| containerd.remove(&format!("idle-{number}")));
    Ok(())
}

/// containerd's name for a runtime, if it has one.
pub fn kind(runtime: &Runtime) -> Option<&'static str> {
    match runtime.name.as_str() {
        "stockade" => Some("io.containerd.stockade.v2"),
        "runc" => Some("io.containerd.runc.v2"),
        _ => None,
    }
}

/// A daemon with state of its own. Dropping it ends it.
pub struct Containerd {
    folder: tempfile::TempDir,
    daemon: Child,
}

impl Containerd {
    /// Starts it and gives it the image.
    fn start() -> Result<Containerd, String> {
        let containerd =
            Self::configured(|_| Ok("disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n".into()))?;
        containerd.import("default")?;
        Ok(containerd)
    }

    /// Starts it with what `more` adds to its configuration, which is given the folder of all its files.
    pub fn configured(more: impl FnOnce(&Path) -> Result<String, String>) -> Result<Containerd, String> {
        // In memory: while the lab waits for its disk, to which containerd's database goes each time, the virtual
        // clock jumps.
        let folder = tempfile::tempdir().or_say("make a folder")?;
        let at = folder.path();
        fs::create_dir(at.join("bin")).or_say("make a folder")?;
        symlink("/payload/bin/stockade", at.join("bin/containerd-shim-stockade-v2"))
            .or_say("link the shim")?;
        let config = format!(
            "version = {}\nroot = {:?}\nstate = {:?}\n{}[grpc]\naddress = {:?}\n",
            crate::cri::host::config_version().or_say("read containerd's version")?,
            at.join("root"),
            at.join("state"),
            more(at)?,
            at.join("socket"),
        );
        fs::write(at.join("config.toml"), config).or_say("write containerd's configuration")?;
        fs::create_dir_all("/run/containerd").or_say("make /run/containerd")?;
        let log = fs::File::create(at.join("log")).or_say("make containerd's log")?;
        let path = format!("{}:{}", at.join("bin").display(), std::env::var("PATH").unwrap_or_default());
        let daemon = Command::new("containerd")
            .arg("--config")
            .arg(at.join("config.toml"))
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .or_say("run containerd")?;
        let mut containerd = Containerd { folder, daemon };
        while program::succeed(&mut containerd.ctr(&["version"])).is_err() {
            if let Some(status) = containerd.daemon.try_wait().or_say("wait for containerd")? {
                let log = fs::read_to_string(containerd.folder.path().join("log")).unwrap_or_default();
                return Err(format!("containerd ended at its start: {status}: {log}"));
            }
        }
        Ok(containerd)
    }

    /// The folder of all its files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Gives one of its namespaces the image.
    pub fn import(&self, namespace: &str) -> Result<(), String> {
        let at = self.folder.path();
        image::layout(&at.join("layout"))?;
        let archive = at.join("image.tar");
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(at.join("layout")).arg("-cf").arg(&archive).arg(".");
        program::succeed(&mut tar)?;
        let base = IMAGE.trim_end_matches(":latest");
        let mut import = self.ctr(&["--namespace", namespace, "image", "import", "--base-name", base]);
        program::succeed(import.arg(archive)).map(drop)
    }

    fn ctr(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.folder.path().join("socket")).args(words);
        command
    }

    fn times_of_echo(&self, plan: &Plan, kind: &str, options: &[&str]) -> Result<Vec<f64>, String> {
        let start = ["run", "--rm", "--runtime", kind];
        let words = [&start[..], options, &[IMAGE, "bench", "echo", GREETING]].concat();
        let once = || {
            let mut command = self.ctr(&words);
            let ended = program::succeed(&mut command).inspect_err(|_| self.remove("bench"))?;
            Ok::<f64, String>(says_greeting(&command, ended)?.seconds())
        };
        once()?;
        (0..plan.runs).map(|_| once()).collect()
    }

    fn run_idle(&self, kind: &str, options: &[&str], id: &str) -> Result<(), String> {
        let start = ["run", "--detach", "--runtime", kind];
        let words = [&start[..], options, &[IMAGE, id, "sleep", "100000"]].concat();
        program::succeed(&mut self.ctr(&words)).map(drop)
    }

    fn remove(&self, id: &str) {
        let _ = program::run(&mut self.ctr(&["task", "delete", "--force", id]));
        let _ = program::run(&mut self.ctr(&["container", "delete", id]));
    }

    /// What all shims take with all that is below them.
    pub fn shims(&self) -> Result<Pss, String> {
        let mut sum = Pss::default();
        for entry in fs::read_dir("/proc").or_say("read /proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let line = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
            let program = line.split('\0').next().map(Path::new).and_then(Path::file_name);
            if program.is_some_and(|name| name.to_string_lossy().starts_with("containerd-shim-")) {
                sum = sum + memory::settled_tree(pid)?;
            }
        }
        Ok(sum)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        // What a failed case has left mounted is below this folder, and goes first.
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let below = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        let below: Vec<&str> =
            below.filter(|place| Path::new(place).starts_with(self.folder.path())).collect();
        for place in below.into_iter().rev() {
            let _ = nix::mount::umount2(place, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}
