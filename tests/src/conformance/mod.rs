//! runc's own test suite, run against stockade and, to compare, against runc and crun.
//!
//! The suite is that of Debian's source package; none of it is kept here, only a list of the cases that cannot apply
//! and why (`tests/conformance/runc.md`). Each runtime has a life of the lab for itself. What the suite's helper
//! programs do is done by programs of our own, and the root file systems it would download are the lab's.

mod list;
pub mod recvtty;
mod report;
mod source;
mod tap;

use crate::lab::{Lab, LabError};
use list::List;
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::fmt::Display;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

/// The runtimes that are compared, in the order of the table.
pub const RUNTIMES: [&str; 3] = ["runc", "crun", "stockade"];

/// Limit for one runtime's life of the lab: on two cores stockade needs a third of it.
const LIMIT: Duration = Duration::from_secs(3 * 3600);
/// A case that says nothing for longer hangs; some wait for 10 s or more where nothing is emulated. (The limit that
/// bats has is a child of the case's shell, and cases that wait for all of their children would wait for it.)
const STALLED: Duration = Duration::from_secs(300);
/// Where the suite and what it needs are in the lab.
const PAYLOAD: &str = "/payload/conformance";
/// Where the suite is laid out to run: it writes beside itself.
const WORK: &str = "/tmp/conformance";

/// What is to be run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Names from [`RUNTIMES`].
    pub runtimes: Vec<String>,
    /// Only these files of the suite; all if there are none.
    pub files: Vec<String>,
    /// Only cases whose name matches this.
    pub filter: Option<String>,
    /// `bin/stockade` and `lib/stockade`.
    pub stage: PathBuf,
    /// Receives a folder for each runtime with what each file said.
    pub out: PathBuf,
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
    let list = List::kept()?;
    let source = source::ensure().map_err(|error: LabError| error.to_string())?;
    let mut columns = Vec::new();
    for runtime in &plan.runtimes {
        let out = plan.out.join(runtime);
        let _ = fs::remove_dir_all(&out);
        run_in_lab(plan, runtime, &source)?;
        columns.push((runtime.clone(), tap::read_folder(&out)?));
    }
    let whole = plan.files.is_empty() && plan.filter.is_none();
    let report = report::Report::new(&columns, &list, whole);
    print!("{report}");
    Ok(report.good())
}

fn run_in_lab(plan: &Plan, runtime: &str, source: &Path) -> Result<(), String> {
    let mut lab = Lab { limit: LIMIT, out: Some(plan.out.clone()), ..Lab::default() };
    if plan.stage.is_dir() {
        lab.payload.add(&plan.stage, "");
    }
    lab.payload.add(source, "conformance");
    let mut words = vec!["--runtime".to_string(), runtime.to_string()];
    if let Some(filter) = &plan.filter {
        words.extend(["--filter".into(), filter.clone()]);
    }
    words.extend(plan.files.iter().cloned());
    match lab.run_self(words).map_err(|error| error.to_string())? {
        0 => Ok(()),
        code => Err(format!("the lab's command for {runtime} ended with {code}")),
    }
}

/// In the lab: runs the suite's files one by one. What bats says appears as it comes and is left in
/// `/out/<runtime>/<file>.tap`.
pub fn run_suite(plan: &Plan) -> Result<(), String> {
    let [runtime] = &plan.runtimes[..] else {
        return Err("one runtime at a time".into());
    };
    let program = find_on_path(runtime).ok_or(format!("no {runtime} on PATH"))?;
    let suite = lay_out()?;
    let out = Path::new("/out").join(runtime);
    fs::create_dir_all(&out).or_say("make the results' folder")?;
    let mut files = plan.files.clone();
    if files.is_empty() {
        files = bats_files(&suite)?;
    }
    for name in &files {
        println!("# {runtime} {name}");
        run_file(&suite.join(name), &program, plan.filter.as_deref(), &out.join(format!("{name}.tap")))?;
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

/// Puts the suite where it can write, with its root file systems, its receiver of terminals, and a C compiler on PATH
/// for the few cases that compile something.
fn lay_out() -> Result<PathBuf, String> {
    let suite = Path::new(WORK).join("tests/integration");
    let tool = Path::new(WORK).join("contrib/cmd/recvtty").join(recvtty::NAME);
    let exe = std::env::current_exe().or_say("find this executable")?;
    sh(&format!("cp -a {PAYLOAD}/suite {WORK}"))?;
    // As images are: with nothing in /dev, and busybox's without the places that runtimes mount on.
    for (name, left_out) in [("busybox", "--exclude ./proc --exclude ./sys"), ("debian", "")] {
        let rootfs = format!("/bundles/{name}/rootfs");
        sh(&format!("tar -C {rootfs} --exclude './dev/*' {left_out} -cf {WORK}/{name}.tar ."))?;
    }
    let images =
        format!("#!/bin/sh\necho BUSYBOX_IMAGE={WORK}/busybox.tar\necho DEBIAN_IMAGE={WORK}/debian.tar\n");
    fs::write(suite.join("get-images.sh"), images).or_say("write the images' places")?;
    sh(&format!("mkdir -p {0} && ln -s {1} {2}", parent(&tool), exe.display(), tool.display()))?;
    // Cases ask for block devices, and look for what cgroups can do in one that is not the root.
    sh("modprobe -a loop bfq; mkdir /sys/fs/cgroup/conformance")?;
    // Two layers of files that are only read.
    sh(&format!("mount -t overlay overlay -o lowerdir={PAYLOAD}/tools/usr:/usr /usr"))?;
    Ok(suite)
}

fn parent(path: &Path) -> String {
    path.parent().unwrap_or(Path::new("/")).display().to_string()
}

fn sh(script: &str) -> Result<(), String> {
    let status = Command::new("/bin/sh").args(["-c", script]).status().or_say("run sh")?;
    status.success().then_some(()).ok_or_else(|| format!("`{script}` failed: {status}"))
}

fn run_file(file: &Path, program: &Path, filter: Option<&str>, to: &Path) -> Result<(), String> {
    let mut command = Command::new("bats");
    command.args(["--formatter", "tap", "--timing"]);
    if let Some(filter) = filter {
        command.args(["--filter", filter]);
    }
    command.arg(file).env("RUNC", program);
    // The suite distinguishes these.
    for name in ["RUNC_USE_SYSTEMD", "ROOTLESS_FEATURES"] {
        command.env_remove(name);
    }
    let _terminal = on_a_terminal(&mut command).or_say("give bats a terminal")?;
    let mut child = command.stdout(Stdio::piped()).spawn().or_say("run bats")?;
    let mut kept = fs::File::create(to).or_say(to.display())?;
    let (send, lines) = std::sync::mpsc::channel();
    let output = BufReader::new(child.stdout.take().ok_or("bats has no output")?);
    std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
    loop {
        let line = match lines.recv_timeout(STALLED) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                println!("# hung: nothing was said for {} s", STALLED.as_secs());
                // bats leads a session. Without the runtime that it waits for, the case fails, and the next begins.
                let session = child.id() as i32;
                let runtime = program.file_name().unwrap_or_default();
                let hung = in_session(session, &runtime.to_string_lossy());
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
        writeln!(kept, "{line}").or_say(to.display())?;
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
