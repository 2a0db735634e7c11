//! A containerd of one's own: its configuration, its state and its shim in a directory that goes with it, and an
//! image from the lab's busybox tree.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use sha2::{Digest, Sha256};
use stockade_tests::cri::host::config_version;
use tempfile::TempDir;

use super::program::{Ended, Program, Stdin};
use super::runtime::vmm_of;
use super::{HANG, Rootfs, Runtime, host_scratch};

/// Where shims and containerd's own parts have their state, whatever its configuration says.
const SHARED_STATE: &str = "/run/containerd";
/// Where containerd 2 listens for plug-ins besides.
const NRI: &str = "/run/nri";
/// Where containerd has the cgroups of its default namespace.
const CGROUP: &str = "/sys/fs/cgroup/default";
/// The image's name.
pub const IMAGE: &str = "docker.io/lab/busybox:latest";
/// The same with another command, for the process that stands for a pod under runtimes that need one.
pub const PAUSE_IMAGE: &str = "docker.io/lab/pause:latest";
/// The runtime's type.
pub const RUNTIME: &str = "io.containerd.stockade.v2";

/// Variables of its environment, which its shims inherit.
pub type Env = &'static [(&'static str, &'static str)];

/// A running containerd. Dropping it ends it and removes what it has made.
pub struct Containerd {
    dir: TempDir,
    daemon: Child,
    env: Env,
    /// What was not there before of what no configuration moves.
    new: Vec<&'static str>,
}

impl Containerd {
    /// Starts one and gives it the image.
    pub fn start() -> Self {
        let this = Self::configured(&[], |_| "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n".into());
        this.import("default", &[(IMAGE, &["sh"])]);
        this
    }

    /// Starts one with what `more` adds to its configuration, which is given the directory of all its files.
    pub fn configured(env: Env, more: impl FnOnce(&Path) -> String) -> Self {
        let dir = host_scratch();
        let at = dir.path();
        let bin = at.join("bin");
        fs::create_dir(&bin).unwrap();
        let stockade = Runtime::under_test().guest_dir().join("../../bin/stockade");
        symlink(stockade, bin.join("containerd-shim-stockade-v2")).unwrap();
        let path = |name: &str| at.join(name).display().to_string();
        let config = format!(
            "version = {}\nroot = {:?}\nstate = {:?}\n{}[grpc]\naddress = {:?}\n",
            config_version().expect("containerd's version"),
            path("root"),
            path("state"),
            more(at),
            path("socket"),
        );
        fs::write(at.join("config.toml"), config).unwrap();
        let new = [SHARED_STATE, NRI].into_iter().filter(|place| !Path::new(place).exists()).collect();
        fs::create_dir_all(SHARED_STATE).unwrap();
        let daemon = spawn(at, env);
        let this = Containerd { dir, daemon, env, new };
        this.wait_until_it_answers();
        this
    }

    /// Gives one of its namespaces images of these names and commands.
    pub fn import(&self, namespace: &str, all: &[(&str, &[&str])]) {
        let archive = images(self.dir.path(), all).display().to_string();
        self.ctr(&["--namespace", namespace, "image", "import", &archive]).code(0);
    }

    /// Where all its files are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Kills it and starts it again over the same state.
    pub fn kill_and_restart(&mut self) {
        self.stop();
        self.daemon = spawn(self.dir.path(), self.env);
        self.wait_until_it_answers();
    }

    fn stop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }

    fn wait_until_it_answers(&self) {
        let begin = Instant::now();
        while !self.command(&["version"]).output().expect("run ctr").status.success() {
            assert!(begin.elapsed() < HANG, "containerd does not answer:\n{}", self.log());
        }
    }

    /// What shims keep of tasks of one of its namespaces.
    pub fn state_of_shims(&self, namespace: &str) -> Vec<String> {
        let state = Path::new(SHARED_STATE).join("stockade").join(namespace);
        let entries = fs::read_dir(state).into_iter().flatten().flatten();
        entries.map(|entry| entry.path().display().to_string()).collect()
    }

    /// A call of ctr(8).
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.socket()).args(words);
        command
    }

    /// Calls ctr(8) and waits for its end.
    #[track_caller]
    pub fn ctr(&self, words: &[&str]) -> Ended {
        Program::spawn(self.command(words), Stdin::Null).finish()
    }

    /// Begins `ctr run` of the image under the shim.
    pub fn start_run(&self, options: &[&str], id: &str, command: &[&str]) -> Program {
        let words = [&["run", "--runtime", RUNTIME], options, &[IMAGE, id], command].concat();
        Program::spawn(self.command(&words), Stdin::Null)
    }

    /// The state of a task: RUNNING, STOPPED, …; empty without one.
    #[track_caller]
    pub fn status(&self, id: &str) -> String {
        let list = self.ctr(&["task", "ls"]).ok();
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(id));
        line.and_then(|line| line.split_whitespace().nth(2)).unwrap_or_default().to_owned()
    }

    /// The process that stands for a task.
    #[track_caller]
    pub fn pid(&self, id: &str) -> i32 {
        let list = self.ctr(&["task", "ls"]).ok();
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(id));
        line.and_then(|line| line.split_whitespace().nth(1)).expect("a task").parse().expect("a pid")
    }

    /// The VMM that a task runs in.
    #[track_caller]
    pub fn vmm(&self, id: &str) -> i32 {
        vmm_of(self.pid(id)).expect("a task's process is its shim, which has a VMM")
    }

    /// Waits until a task has this state.
    #[track_caller]
    pub fn wait_status(&self, id: &str, status: &str) {
        let begin = Instant::now();
        while self.status(id) != status {
            assert!(begin.elapsed() < HANG, "{id} is {:?} and not {status}", self.status(id));
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.stop();
        // What a failed case has left mounted is below this directory, and goes first.
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut below: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
        below.retain(|place| Path::new(place).starts_with(self.dir.path()));
        for place in below.into_iter().rev() {
            let _ = nix::mount::umount2(place, nix::mount::MntFlags::MNT_DETACH);
        }
        // As under runc, parents of cgroups stay.
        let _ = fs::remove_dir(CGROUP);
        for place in &self.new {
            let _ = fs::remove_dir_all(place);
        }
    }
}

fn spawn(at: &Path, env: Env) -> Child {
    let log = fs::File::options().create(true).append(true).open(at.join("log")).unwrap();
    let path = format!("{}:{}", at.join("bin").display(), std::env::var("PATH").unwrap_or_default());
    Command::new("containerd")
        .arg("--config")
        .arg(at.join("config.toml"))
        .env("PATH", path)
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("start containerd")
}

/// An archive of the image.
pub fn image(at: &Path) -> PathBuf {
    images(at, &[(IMAGE, &["sh"])])
}

/// An archive as `docker save` writes it, of images of one layer: their names and commands.
fn images(at: &Path, all: &[(&str, &[&str])]) -> PathBuf {
    let make = at.join("image");
    fs::create_dir(&make).unwrap();
    let tar = |archive: &str, from: &Path, names: &[&str]| {
        let status =
            Command::new("tar").arg("-C").arg(from).arg("-cf").arg(make.join(archive)).args(names).status();
        assert!(status.expect("run tar").success());
    };
    tar("layer.tar", &Rootfs::Busybox.path(), &["."]);
    let digest = Sha256::digest(fs::read(make.join("layer.tar")).unwrap());
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut manifest = Vec::new();
    let mut files = vec!["manifest.json".to_owned(), "layer.tar".to_owned()];
    for (number, (name, command)) in all.iter().enumerate() {
        let file = format!("config-{number}.json");
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": { "Env": ["PATH=/bin"], "Cmd": command },
            "history": [{ "created_by": "the lab" }],
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
        });
        fs::write(make.join(&file), config.to_string()).unwrap();
        let name = name.trim_start_matches("docker.io/");
        manifest.push(serde_json::json!({ "Config": file, "RepoTags": [name], "Layers": ["layer.tar"] }));
        files.push(file);
    }
    fs::write(make.join("manifest.json"), serde_json::Value::from(manifest).to_string()).unwrap();
    tar("image.tar", &make, &files.iter().map(String::as_str).collect::<Vec<_>>());
    make.join("image.tar")
}
