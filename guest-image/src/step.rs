//! Runs one command of a build: its output goes to a log, and its failure is told with the end of that log.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

/// How much of the log an error shows: the compiler's message and what led to it.
const SHOWN_LINES: usize = 30;

/// Why a step did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command ended with a failure.
    #[error("step `{step}` failed ({status}); its log is {log}, which ends with\n{tail}", log = log.display())]
    Failed { step: &'static str, status: ExitStatus, log: PathBuf, tail: String },
    /// The command could not be executed.
    #[error("step `{step}` cannot run {program}; is its package installed?")]
    Spawn { step: &'static str, program: String, source: io::Error },
    /// The log cannot be written, or the command's output not read.
    #[error("step `{step}` cannot write its log {log}", log = log.display())]
    Log { step: &'static str, log: PathBuf, source: io::Error },
}

/// Runs `command`, appends what it prints to `log` and shows each line to `on_line` as it comes.
pub fn run(
    step: &'static str,
    mut command: Command,
    log: &Path,
    mut on_line: impl FnMut(&str),
) -> Result<(), Error> {
    let log_failed = |source| Error::Log { step, log: log.to_owned(), source };
    let mut file = OpenOptions::new().create(true).append(true).open(log).map_err(log_failed)?;
    writeln!(file, "## {step}: {command:?}").map_err(log_failed)?;

    let (reader, writer) = io::pipe().map_err(log_failed)?;
    command.stdin(Stdio::null()).stdout(writer.try_clone().map_err(log_failed)?).stderr(writer);
    let mut child = command.spawn().map_err(|source| Error::Spawn {
        step,
        program: command.get_program().to_string_lossy().into_owned(),
        source,
    })?;
    // It holds the writing ends of the pipe, which would keep the loop below from ever seeing the end.
    drop(command);

    let mut tail = VecDeque::with_capacity(SHOWN_LINES);
    for line in BufReader::new(reader).split(b'\n') {
        let line = String::from_utf8_lossy(&line.map_err(log_failed)?).into_owned();
        writeln!(file, "{line}").map_err(log_failed)?;
        on_line(&line);
        if tail.len() == SHOWN_LINES {
            tail.pop_front();
        }
        tail.push_back(line);
    }
    let status = child.wait().map_err(log_failed)?;
    if status.success() {
        return Ok(());
    }
    let tail = tail.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n");
    Err(Error::Failed { step, status, log: log.to_owned(), tail })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn shows_each_line_and_keeps_both_streams_in_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let mut lines = Vec::new();
        run("try", shell("echo out; echo err >&2"), &log, |line| lines.push(line.to_string())).unwrap();
        assert_eq!(lines, ["out", "err"]);
        assert!(fs::read_to_string(&log).unwrap().ends_with("\nout\nerr\n"));
    }

    #[test]
    fn a_failure_names_the_step_and_ends_with_the_last_30_lines() {
        let directory = tempfile::tempdir().unwrap();
        let error =
            run("compile", shell("seq 100; exit 3"), &directory.path().join("log"), |_| ()).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("step `compile` failed (exit status: 3)"), "{text}");
        let shown: Vec<_> = text.lines().skip(1).map(str::trim).collect();
        assert_eq!(shown, (71..=100).map(|n: u32| n.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let command = Command::new("stockade-no-such-program");
        let error = run("unpack", command, &directory.path().join("log"), |_| ()).unwrap_err();
        assert!(error.to_string().contains("cannot run stockade-no-such-program"), "{error}");
    }
}
