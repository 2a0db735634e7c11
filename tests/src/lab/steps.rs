//! The steps of a long build: what is going on, how long it may still take, and what went wrong.
//!
//! Each step has an expected time. The estimate for what remains is the expected time of the steps to come,
//! scaled by how the finished ones did on this machine. A command's output goes to a log; when the command
//! fails, the error names the step and shows the log's end.

use super::LabError;
use std::fs::{self, File};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Lines of a failed command's log that the error shows.
const LOG_LINES: usize = 20;
/// How often a line is written where there is no terminal to update one in place.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// A build in progress.
pub struct Steps {
    what: &'static str,
    log: PathBuf,
    expected: &'static [u64],
    current: usize,
    started: Instant,
}

impl Steps {
    /// A build of `what` with a step for each of the `expected` times in seconds; logs go to `folder`.
    pub fn new(what: &'static str, folder: &Path, expected: &'static [u64]) -> Steps {
        let minutes = expected.iter().sum::<u64>() as f64 / 60.0;
        eprintln!("{what}: not there yet, making it; about {minutes:.1} minutes on a two-core machine");
        Steps { what, log: folder.join("build.log"), expected, current: 0, started: Instant::now() }
    }

    /// Runs the next step.
    pub fn run<T>(
        &mut self,
        name: &str,
        work: impl FnOnce(&mut Step) -> Result<T, LabError>,
    ) -> Result<T, LabError> {
        let elapsed = self.started.elapsed().as_secs_f64();
        let sum = |steps: &[u64]| steps.iter().sum::<u64>() as f64;
        let (past, future) = self.expected.split_at(self.current.min(self.expected.len()));
        // A first short step says little about the machine: weigh it with half a minute of the expectation.
        let pace = (elapsed + 30.0) / (sum(past) + 30.0);
        let prefix = format!("{}: {}/{} {name}", self.what, self.current + 1, self.expected.len());
        let mut step = Step {
            name: name.into(),
            prefix,
            log: self.log.clone(),
            remaining: sum(future) * pace,
            started: Instant::now(),
            said: None,
        };
        step.say();
        let result = work(&mut step);
        step.clear();
        self.current += 1;
        result
    }

    /// Says that the build is complete.
    pub fn done(&self) {
        eprintln!("{}: done in {:.0} s", self.what, self.started.elapsed().as_secs_f64());
    }
}

/// One step of a build.
pub struct Step {
    name: String,
    prefix: String,
    log: PathBuf,
    remaining: f64,
    started: Instant,
    said: Option<Instant>,
}

impl Step {
    /// Runs a command to its end.
    pub fn command(&mut self, command: &mut Command) -> Result<(), LabError> {
        let child = self.spawn(command, &self.log.clone())?;
        self.wait(vec![(child, self.log.clone())])
    }

    /// Runs commands side by side until all have ended.
    pub fn commands(&mut self, commands: Vec<Command>) -> Result<(), LabError> {
        let mut children = Vec::new();
        for (number, mut command) in commands.into_iter().enumerate() {
            let log = self.log.with_extension(format!("{number}.log"));
            children.push((self.spawn(&mut command, &log)?, log));
        }
        self.wait(children)
    }

    fn spawn(&self, command: &mut Command, log: &Path) -> Result<Child, LabError> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut start = || {
            let mut file = File::options().create(true).append(true).open(log)?;
            writeln!(file, "+ {command:?}")?;
            command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).spawn()
        };
        start().map_err(|source| LabError::Io { what: format!("{}: run {name}", self.name), source })
    }

    fn wait(&mut self, mut children: Vec<(Child, PathBuf)>) -> Result<(), LabError> {
        while !children.is_empty() {
            let mut running = Vec::new();
            for (mut child, log) in children {
                match child.try_wait() {
                    Ok(None) => running.push((child, log)),
                    Ok(Some(status)) if status.success() => {}
                    Ok(Some(_)) => {
                        return Err(LabError::Step { step: self.name.clone(), log: read_end(&log) });
                    }
                    Err(source) => return Err(LabError::Io { what: self.name.clone(), source }),
                }
            }
            children = running;
            std::thread::sleep(Duration::from_millis(100));
            self.say();
        }
        Ok(())
    }

    /// Shows where the build is: each second on a terminal, now and then in a log.
    fn say(&mut self) {
        let terminal = std::io::stderr().is_terminal();
        let every = if terminal { Duration::from_secs(1) } else { LINE_EVERY };
        if self.said.is_some_and(|said| said.elapsed() < every) {
            return;
        }
        self.said = Some(Instant::now());
        let elapsed = self.started.elapsed().as_secs_f64();
        let left = (self.remaining - elapsed).max(0.0);
        let estimate = match left {
            _ if left < 1.0 && elapsed > 1.0 => "longer than expected".into(),
            _ => format!("about {:.0} s to go", left.ceil()),
        };
        let line = format!("{}: {elapsed:.0} s, {estimate}", self.prefix);
        match terminal {
            true => eprint!("\r\x1b[K{line}"),
            false => eprintln!("{line}"),
        }
    }

    fn clear(&self) {
        if std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K");
        }
    }
}

/// The last lines of a log.
pub fn read_end(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    last_lines(&String::from_utf8_lossy(&text), LOG_LINES)
}

/// The last `count` lines of a text.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().join("\n")
}
