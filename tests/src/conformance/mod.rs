//! Test suites of others, run against stockade and, to compare, against runc and crun: runc's own, and Podman's.
//!
//! They are those of Debian's source packages; none of them is kept here, only lists of the cases that cannot apply
//! and why (`tests/conformance`). Each runtime has a life of the lab for itself, with a host that systemd runs.

mod list;
mod podman;
pub mod recvtty;
mod report;
mod runc;
mod source;
mod suite;
mod tap;

use crate::lab::{Lab, LabError};
use list::List;
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::fmt::Display;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use suite::LaidOut;
pub use suite::{SUITES, Suite};

/// The runtimes that are compared, in the order of the table.
pub const RUNTIMES: [&str; 3] = ["runc", "crun", "stockade"];

/// Where the suite and what it needs are in the lab.
const PAYLOAD: &str = "/payload/conformance";
/// Where the suite is laid out to run: it writes beside itself.
const WORK: &str = "/tmp/conformance";

/// What is to be run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Whose cases.
    pub suite: &'static Suite,
    /// Names from [`RUNTIMES`].
    pub runtimes: Vec<String>,
    /// Only these files of the suite; all if there are none.
    pub files: Vec<String>,
    /// Only cases whose name matches this.
    pub filter: Option<String>,
    /// `bin/stockade` and `lib/stockade`.
    pub stage: PathBuf,
    /// Receives a folder for each suite, in it a file for each runtime with what the suite's files said.
    pub out: PathBuf,
    /// Runs nothing: the table is of what is there from before.
    pub report_only: bool,
}

trait Context<T> {
    /// Puts what was to be done before the reason why it could not be.
    fn or_say(self, what: impl Display) -> Result<T, String>;
}

impl<T, E: Display> Context<T> for Result<T, E> {
    fn or_say(self, what: impl Display) -> Result<T, String> {
        self.map_err(|error| format!("{what}: {error}"))
    }
}

/// Runs the suite against each runtime, in the lab, and prints the table. False when a case of stockade failed that
/// is not on the list, or the list is not true any more.
pub fn compare(plan: &Plan) -> Result<bool, String> {
    let list = List::kept(plan.suite)?;
    let folder = plan.out.join(plan.suite.name);
    let said = |runtime: &str| folder.join(format!("{runtime}.tap"));
    let mut broken_off = None;
    if !plan.report_only {
        let source = plan.suite.source.ensure().map_err(|error: LabError| error.to_string())?;
        fs::create_dir_all(&folder).or_say(folder.display())?;
        for runtime in &plan.runtimes {
            let _ = fs::remove_file(said(runtime));
        }
        for runtime in &plan.runtimes {
            println!("\n# {runtime}");
            broken_off = run_in_lab(plan, runtime, &source, &said(runtime)).err();
            if broken_off.is_some() {
                break;
            }
        }
    }
    let mut columns = Vec::new();
    for runtime in &plan.runtimes {
        let said = said(runtime);
        let text = fs::read_to_string(&said).or_say(said.display());
        match (text, &broken_off) {
            (Ok(text), _) => columns.push((runtime.clone(), tap::parse(&text).or_say(said.display())?)),
            // It was the next one's turn.
            (Err(_), Some(_)) => {}
            (Err(why), None) => return Err(why),
        }
    }
    let whole = plan.files.is_empty() && plan.filter.is_none();
    let report = report::Report::new(&columns, &list, whole);
    print!("{report}");
    broken_off.map_or(Ok(report.good()), Err)
}

fn run_in_lab(plan: &Plan, runtime: &str, source: &Path, said: &Path) -> Result<(), String> {
    let mut lab = Lab { limit: plan.suite.limit, stdout: Some(said.into()), systemd: true, ..Lab::default() };
    if plan.stage.is_dir() {
        lab.payload.add(&plan.stage, "");
    }
    lab.payload.add(source, "conformance");
    let mut words = ["--suite", plan.suite.name, "--runtime", runtime].map(String::from).to_vec();
    if let Some(filter) = &plan.filter {
        words.extend(["--filter".into(), filter.clone()]);
    }
    words.extend(plan.files.iter().cloned());
    match lab.run_self(words).map_err(|error| error.to_string())? {
        0 => Ok(()),
        code => Err(format!("the lab's command for {runtime} ended with {code}")),
    }
}

/// In the lab: runs the suite's files one by one. What bats says appears as it comes, below a line for each file.
pub fn run_suite(plan: &Plan) -> Result<(), String> {
    let [runtime] = &plan.runtimes[..] else {
        return Err("one runtime at a time".into());
    };
    let program = find_on_path(runtime).ok_or(format!("no {runtime} on PATH"))?;
    let suite = (plan.suite.lay_out)(&program)?;
    let mut files = plan.files.clone();
    if files.is_empty() {
        files = bats_files(&suite.folder)?;
    }
    for name in &files {
        println!("{}{name}", tap::FILE);
        run_file(plan, &suite, name, &program)?;
    }
    Ok(())
}

fn find_on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|path| path.is_file())
}

fn bats_files(suite: &Path) -> Result<Vec<String>, String> {
    let entries = fs::read_dir(suite).or_say("list the suite")?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.ends_with(".bats"))
        .collect();
    names.sort();
    Ok(names)
}

/// Two layers of files that are only read: the lab's and the tools' that a suite needs.
fn cover_usr() -> Result<(), String> {
    sh(&format!("mount -t overlay overlay -o lowerdir={PAYLOAD}/tools/usr:/usr /usr"))
}

fn sh(script: &str) -> Result<(), String> {
    let status = Command::new("/bin/sh").args(["-c", script]).status().or_say("run sh")?;
    status.success().then_some(()).ok_or_else(|| format!("`{script}` failed: {status}"))
}

fn run_file(plan: &Plan, suite: &LaidOut, name: &str, program: &Path) -> Result<(), String> {
    let file = suite.folder.join(name);
    let mut command = Command::new("bats");
    command.args(["--formatter", "tap", "--timing"]);
    if let Some(filter) = &plan.filter {
        command.args(["--filter", filter]);
    } else {
        // Some of them would only hang.
        let text = fs::read_to_string(&file).or_say(file.display())?;
        let list = List::kept(plan.suite)?;
        let (left_out, run): (Vec<_>, Vec<_>) =
            tap::names(&text).into_iter().partition(|case| list.needs_more_than_the_lab(name, case));
        for case in &left_out {
            println!("{}{case}", tap::LEFT_OUT);
        }
        if run.is_empty() {
            println!("1..0");
            return Ok(());
        }
        if !left_out.is_empty() {
            command.args(["--filter", &tap::pattern(&run)]);
        }
    }
    // The lab's environment has nothing that a suite distinguishes.
    command.arg(&file).envs(suite.environment.iter().cloned()).envs(plan.suite.environment.iter().copied());
    let runtime = program.file_name().unwrap_or_default().to_string_lossy();
    let waits_for = plan.suite.waits_for.unwrap_or(&runtime);
    let _terminal = on_a_terminal(&mut command).or_say("give bats a terminal")?;
    let mut child = command.stdout(Stdio::piped()).spawn().or_say("run bats")?;
    let (send, lines) = std::sync::mpsc::channel();
    let output = BufReader::new(child.stdout.take().ok_or("bats has no output")?);
    std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
    loop {
        let line = match lines.recv_timeout(plan.suite.stalled) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                println!("# hung: nothing was said for {} s", plan.suite.stalled.as_secs());
                // bats leads a session. Without what it waits for, the case fails, and the next begins.
                let session = child.id() as i32;
                let hung = in_session(session, waits_for);
                if hung.is_empty() {
                    let _ = killpg(Pid::from_raw(session), Signal::SIGKILL);
                    break;
                }
                for pid in hung {
                    let _ = kill(pid, Signal::SIGKILL);
                }
                continue;
            }
        };
        println!("{line}");
    }
    // Its exit code only repeats what was read.
    child.wait().or_say("wait for bats")?;
    Ok(())
}

/// Makes a new terminal the command's controlling one: the suite's cases presume that they were started from one.
/// Returns its other side, to be kept open.
fn on_a_terminal(command: &mut Command) -> io::Result<OwnedFd> {
    let pty = openpty(None, None)?;
    command.stdin(pty.slave);
    // SAFETY: setsid and ioctl are async-signal-safe, and the closure touches nothing else.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
    Ok(pty.master)
}

/// Processes of a session that go by this name.
fn in_session(session: i32, name: &str) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_wanted = |pid: &i32| {
        // proc_pid_stat(5): the name is in parentheses, the session the fourth field behind it.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let named = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(") "));
        named.is_some_and(|(comm, rest)| {
            comm == name && rest.split(' ').nth(3) == Some(session.to_string().as_str())
        })
    };
    pids.filter(is_wanted).map(Pid::from_raw).collect()
}
