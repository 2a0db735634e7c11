//! The runtimes that are compared, their bundles, and what every case does with them.

use super::Context;
use super::program::{self, Ended, LIMIT, readable_in_time};
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// What `echo` says in every run.
pub const GREETING: &str = "hello";

/// Names of VM-isolated runtimes with runc's command line, beside stockade.
const OTHER_VM_RUNTIMES: [&str; 3] = ["krun", "runv", "kata-runtime"];

/// A runtime with runc's command line.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// Its name, on PATH.
    pub name: String,
    /// Whether its containers run in a VM, so that there are exits to count.
    pub has_vm: bool,
    /// Whether it writes down the phases of a start.
    pub has_timeline: bool,
}

impl Runtime {
    /// Stockade, runc, crun and every other VM-isolated runtime that is there.
    pub fn all_on_path() -> Vec<Runtime> {
        let known = ["stockade", "runc", "crun"].into_iter().chain(OTHER_VM_RUNTIMES);
        known
            .filter(|name| on_path(name))
            .map(|name| Runtime {
                name: name.into(),
                has_vm: !matches!(name, "runc" | "crun"),
                has_timeline: name == "stockade",
            })
            .collect()
    }

    /// A call of it.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.name);
        command.args(words);
        command
    }

    /// The command that runs a bundle.
    pub fn run_command(&self, bundle: &Bundle, id: &str) -> Command {
        let mut command = self.command(&["run", "--bundle"]);
        command.arg(bundle.folder.path()).arg(id);
        command
    }

    /// One `run` of a bundle that says [`GREETING`], checked for its output and exit code.
    pub fn run_echo(&self, bundle: &Bundle, timeline: Option<&Path>) -> Result<Ended, String> {
        let id = "bench-echo";
        let mut command = self.run_command(bundle, id);
        if let Some(path) = timeline {
            command.env("STOCKADE_TIMELINE", path);
        }
        match program::run(&mut command)? {
            Ok(ended) => says_greeting(&command, ended),
            Err(child) => {
                self.remove(child, id);
                Err(format!("{} run stalled for {LIMIT} s", self.name))
            }
        }
    }

    /// Ends a run by force. Twice, because one that has stalled may hold its container until it is killed.
    pub fn remove(&self, mut child: Child, id: &str) {
        self.delete_by_force(id);
        let _ = child.kill();
        let _ = child.wait();
        self.delete_by_force(id);
    }

    /// Removes a container, if there is one.
    pub fn delete_by_force(&self, id: &str) {
        let _ = self.command(&["delete", "--force", id]).stdin(Stdio::null()).output();
    }

    /// Creates a container; the pid that it is known by and what the command took.
    pub fn create(&self, bundle: &Bundle, id: &str) -> Result<(i32, Ended), String> {
        let pid_file = bundle.folder.path().join("pid");
        let mut command = self.command(&["create", "--bundle"]);
        command.arg(bundle.folder.path()).arg("--pid-file").arg(&pid_file).arg(id);
        let ended = program::succeed(&mut command)?;
        let pid = std::fs::read_to_string(&pid_file).or_say("read the pid file")?;
        Ok((pid.trim().parse().or_say("read the pid file")?, ended))
    }
}

/// A run whose output must be [`GREETING`].
pub fn says_greeting(command: &Command, ended: Ended) -> Result<Ended, String> {
    if ended.status.success() && ended.stdout == format!("{GREETING}\n") {
        return Ok(ended);
    }
    let Ended { status, stdout, stderr, .. } = ended;
    let name = command.get_program().to_string_lossy();
    Err(format!("{name} run: {status}, stdout {stdout:?}, stderr {stderr:?}"))
}

fn on_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// A container that runs and does nothing. Dropping it removes it.
pub struct Idle<'a> {
    runtime: &'a Runtime,
    /// Its id.
    pub id: &'static str,
    /// The host process that stands for it.
    pub pid: i32,
}

impl<'a> Idle<'a> {
    /// Creates and starts it.
    pub fn start(runtime: &'a Runtime, bundle: &Bundle, id: &'static str) -> Result<Idle<'a>, String> {
        runtime.delete_by_force(id);
        let (pid, _) = runtime.create(bundle, id)?;
        let idle = Idle { runtime, id, pid };
        program::succeed(&mut runtime.command(&["start", id]))?;
        Ok(idle)
    }

    /// A command that runs another process in it.
    pub fn exec(&self, words: &[&str]) -> Command {
        let mut command = self.runtime.command(&["exec", self.id]);
        command.args(words);
        command
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        self.runtime.delete_by_force(self.id);
    }
}

/// Starts a program whose first output is the line `ready`, and waits for that.
pub fn start_until_ready(command: &mut Command) -> Result<Child, String> {
    let (mut output, stdout) = std::io::pipe().or_say("make a pipe")?;
    let child = command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::null()).spawn();
    let mut child = child.or_say(format!("run {}", command.get_program().to_string_lossy()))?;
    command.stdout(Stdio::null());
    let mut ready = [0; 6];
    if readable_in_time(&output)? && output.read(&mut ready).or_say("wait for a container")? > 0 {
        return Ok(child);
    }
    let _ = child.kill();
    let _ = child.wait();
    Err("the container did not become ready".into())
}

/// A bundle over one of the lab's roots.
pub struct Bundle {
    folder: tempfile::TempDir,
    config: Value,
    /// The host's own root is mounted on `rootfs` in it.
    mounted: bool,
}

impl Bundle {
    /// What `runc spec` writes, with this command in the busybox root and no terminal.
    pub fn new(argv: &[&str]) -> Result<Bundle, String> {
        let folder = tempfile::tempdir().or_say("make a bundle")?;
        program::succeed(Command::new("runc").args(["spec", "--bundle"]).arg(folder.path()))?;
        let text = std::fs::read_to_string(folder.path().join("config.json")).or_say("read config.json")?;
        let mut config: Value = serde_json::from_str(&text).or_say("read config.json")?;
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(argv);
        config["root"] = json!({ "path": "/bundles/busybox/rootfs", "readonly": true });
        let bundle = Bundle { folder, config, mounted: false };
        bundle.save()?;
        Ok(bundle)
    }

    /// One that does nothing for ever.
    pub fn idle() -> Result<Bundle, String> {
        Bundle::new(&["sleep", "100000"])
    }

    /// Lives in this network namespace.
    pub fn in_namespace(mut self, path: &str) -> Result<Bundle, String> {
        let list = self.config["linux"]["namespaces"].as_array_mut().ok_or("runc spec has no namespaces")?;
        list.retain(|namespace| namespace["type"] != "network");
        list.push(json!({ "type": "network", "path": path }));
        self.save()?;
        Ok(self)
    }

    /// Has the host's own root as its root, read-only and without what is mounted in it, and the programs that were
    /// brought into the lab on /mnt.
    pub fn with_host_programs(mut self) -> Result<Bundle, String> {
        let root = self.folder.path().join("rootfs");
        std::fs::create_dir(&root).or_say("make a root")?;
        let flags = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some("/"), &root, None::<&str>, flags, None::<&str>).or_say("mount the root")?;
        self.mounted = true;
        self.config["root"] = json!({ "path": "rootfs", "readonly": true });
        let mounts = self.config["mounts"].as_array_mut().ok_or("runc spec has no mounts")?;
        mounts.push(json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs" }));
        mounts.push(json!({
            "destination": "/mnt", "type": "bind", "source": "/payload/bin", "options": ["bind", "ro"]
        }));
        self.save()?;
        Ok(self)
    }

    fn save(&self) -> Result<(), String> {
        std::fs::write(self.folder.path().join("config.json"), self.config.to_string())
            .or_say("write config.json")
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if self.mounted {
            let root = self.folder.path().join("rootfs");
            let _ = nix::mount::umount2(&root, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}
