//! The runtime under test, called as its users call it: as a program with the OCI command line.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use super::bundle::Place;
use super::program::{Ended, Exit, Program, Stdin};
use super::{Bundle, program};

/// A container id that no other case uses. Dropping it force-deletes what still goes by it.
pub struct Id(String);

impl Id {
    /// A fresh id.
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self(format!("e2e-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)))
    }

    /// The id as a word of a command line.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl AsRef<OsStr> for Id {
    fn as_ref(&self) -> &OsStr {
        self.0.as_ref()
    }
}

/// The runtime under test.
#[derive(Clone)]
pub struct Runtime {
    program: PathBuf,
    env: Vec<(String, String)>,
    before: Vec<String>,
}

impl Runtime {
    /// The one that STOCKADE_E2E_RUNTIME names, `stockade` unless it does. With `runc` there the suite shows
    /// that its expectations are what an OCI runtime does.
    pub fn under_test() -> Self {
        let program = std::env::var_os("STOCKADE_E2E_RUNTIME").unwrap_or_else(|| "stockade".into());
        Self { program: program.into(), env: Vec::new(), before: Vec::new() }
    }

    /// Another runtime of the host, to compare with.
    pub fn named(program: &str) -> Self {
        Self { program: program.into(), env: Vec::new(), before: Vec::new() }
    }

    /// Whether it is ours.
    pub fn is_stockade(&self) -> bool {
        self.name().starts_with("stockade")
    }

    /// The runtime's name, as processes and directories bear it.
    pub fn name(&self) -> String {
        self.program.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// The program's path.
    pub fn path(&self) -> PathBuf {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found =
            std::env::split_paths(&path).map(|dir| dir.join(&self.program)).find(|file| file.is_file());
        found.unwrap_or_else(|| self.program.clone())
    }

    /// Where an installed runtime has its guest files: beside the program's directory.
    pub fn guest_dir(&self) -> PathBuf {
        self.path().parent().and_then(Path::parent).expect("bin/ and its parent").join("lib/stockade")
    }

    /// With this environment variable.
    pub fn env(mut self, name: &str, value: impl AsRef<Path>) -> Self {
        self.env.push((name.to_owned(), value.as_ref().display().to_string()));
        self
    }

    /// With these words before the subcommand.
    pub fn global(mut self, words: &[&str]) -> Self {
        self.before.extend(words.iter().map(|word| (*word).to_owned()));
        self
    }

    /// The command line with these words.
    pub fn command<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.before).args(words).envs(self.env.iter().cloned());
        command
    }

    /// Calls the runtime and waits for its end and for the end of its output.
    #[track_caller]
    pub fn call(&self, words: &[&str]) -> Ended {
        Program::spawn(self.command(words), Stdin::Null).finish()
    }

    /// Runs a bundle from beginning to end with nothing to read.
    #[track_caller]
    pub fn run(&self, bundle: &Bundle) -> Ended {
        self.run_with(bundle, Stdin::Null)
    }

    /// Runs a bundle from beginning to end.
    #[track_caller]
    pub fn run_with(&self, bundle: &Bundle, stdin: Stdin) -> Ended {
        self.start(bundle, stdin).finish()
    }

    /// Begins to run a bundle.
    #[track_caller]
    pub fn start(&self, bundle: &Bundle, stdin: Stdin) -> Container {
        let id = Id::new();
        let command = self.run_command(bundle, &id);
        Container {
            program: Program::spawn(command, stdin),
            runtime: self.clone(),
            id,
            ended: false,
            _place: bundle.place(),
        }
    }

    /// The command that runs a bundle under an id.
    pub fn run_command(&self, bundle: &Bundle, id: &Id) -> Command {
        let mut command = self.command(["run", "--bundle"]);
        command.arg(bundle.save()).arg(id);
        command
    }

    /// Takes over a `run` that the case has started itself.
    pub fn adopt(&self, bundle: &Bundle, id: Id, program: Program) -> Container {
        Container { program, runtime: self.clone(), id, ended: false, _place: bundle.place() }
    }

    /// Creates a container and waits for `create` to end, which it must do well. The container's streams are
    /// those of `create`.
    #[track_caller]
    pub fn create(&self, bundle: &Bundle) -> Container {
        self.create_with(bundle, Stdin::Null, &[])
    }

    /// The same with something to read and more options.
    #[track_caller]
    pub fn create_with(&self, bundle: &Bundle, stdin: Stdin, options: &[&OsStr]) -> Container {
        let id = Id::new();
        let mut command = self.command(["create", "--bundle"]);
        command.arg(bundle.save()).args(options).arg(&id);
        let program = Program::spawn(command, stdin);
        let mut container =
            Container { program, runtime: self.clone(), id, ended: false, _place: bundle.place() };
        let exit = container.program.exit();
        assert_eq!(exit, Exit::Code(0), "create failed: {}", container.program.report());
        container
    }

    /// Creates and starts the bundle of [`Bundle::idle`], and waits until its workload runs.
    #[track_caller]
    pub fn idle(&self) -> Container {
        let container = self.create(&Bundle::idle());
        container.op("start").ok();
        container.program.expect_line("ready");
        container
    }
}

/// A container, and the program (`run` or `create`) that made it. Dropping it deletes the container by force.
pub struct Container {
    pub program: Program,
    pub id: Id,
    runtime: Runtime,
    ended: bool,
    _place: Arc<Place>,
}

impl Container {
    /// Waits for the end of the program and of its output. The container must be gone then, or the case must
    /// delete it: it is no longer cleared away by itself.
    #[track_caller]
    pub fn finish(mut self) -> Ended {
        let ended = self.program.finish();
        self.ended = true;
        ended
    }

    /// Calls `<operation> <id>`.
    #[track_caller]
    pub fn op(&self, operation: &str) -> Ended {
        self.runtime.call(&[operation, self.id.as_str()])
    }

    /// Calls `<words> <id> <after>`: some command lines take their options only before the id.
    #[track_caller]
    pub fn op_with(&self, words: &[&str], after: &[&str]) -> Ended {
        self.runtime.call(&[words, &[self.id.as_str()], after].concat())
    }

    /// Sends a signal to the workload.
    #[track_caller]
    pub fn kill(&self, signal: &str) {
        self.op_with(&["kill"], &[signal]).code(0);
    }

    /// Begins an exec of a command.
    #[track_caller]
    pub fn start_exec(&self, options: &[&str], command: &[&str], stdin: Stdin) -> Program {
        let words = std::iter::once("exec")
            .chain(options.iter().copied())
            .chain(std::iter::once(self.id.as_str()))
            .chain(command.iter().copied());
        Program::spawn(self.runtime.command(words), stdin)
    }

    /// Executes a shell script in the container from beginning to end.
    #[track_caller]
    pub fn exec(&self, script: &str) -> Ended {
        self.start_exec(&[], &["sh", "-c", script], Stdin::Null).finish()
    }

    /// What `state` says.
    #[track_caller]
    pub fn state(&self) -> Value {
        let text = self.op("state").ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("`state` wrote no JSON ({error}): {text}"))
    }

    /// The state's `status`.
    #[track_caller]
    pub fn status(&self) -> String {
        self.state()["status"].as_str().expect("state has a status").to_owned()
    }

    /// The state's `pid`.
    #[track_caller]
    pub fn pid(&self) -> i32 {
        let pid = self.state()["pid"].as_i64().expect("state has a pid");
        i32::try_from(pid).expect("a process id")
    }

    /// Waits for the end of the container's host process.
    #[track_caller]
    pub fn wait_stopped(&self, pid: i32) {
        program::wait_gone(pid);
        assert_eq!(self.status(), "stopped");
    }

    /// Deletes the stopped container, which must leave nothing to be said about it.
    #[track_caller]
    pub fn delete(mut self) {
        self.op("delete").ok();
        self.ended = true;
        self.op("state").refused();
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if !self.ended {
            let mut command = self.runtime.command(["delete", "--force", self.id.as_str()]);
            // Best effort: the case has failed already, or it does not care how its container goes.
            let _ = command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).status();
        }
    }
}

/// The VMM among the children of a supervisor.
pub fn vmm_of(supervisor: i32) -> Option<i32> {
    let tasks = fs::read_dir(format!("/proc/{supervisor}/task")).ok()?;
    let children: Vec<i32> = tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|pids| pids.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect();
    children.into_iter().find(|pid| {
        // Between fork and exec a child still has its parent's command line.
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|byte| *byte == 0).nth(1) == Some(b"vmm")
    })
}
