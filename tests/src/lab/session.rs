//! One life of the lab: boot, one command, end.
//!
//! A single loop waits on the link, the console and two deadlines (for the boot, and for everything), so
//! each way to end is in one place: the exit code arrives, the host's kernel dies, QEMU dies, time is up.
//! Input is the only thing with a thread of its own, because the lab may be slow to take it.

use super::link::{self, Kind, Reader, Start};
use super::machine::{Clock, Hardware, Machine};
use super::payload::Payload;
use super::steps::last_lines;
use super::terminal::Terminal;
use super::{LabError, image, initrd, io_error, systemd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// A host that takes longer to come up than this is not going to.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// The same where the build machine has no CPU to spare for it: time in which QEMU only waits for one does not
/// count, but not for ever.
const STARVED_BOOT_LIMIT: Duration = Duration::from_secs(300);
/// How often the lab says that it lives, where its time is the build machine's.
const ALIVE_SECONDS: u64 = 5;
/// After this much silence the lab gets an interrupt, which wakes a CPU that sleeps without a timer.
const NUDGE: Duration = Duration::from_secs(30);
/// A host that is silent for longer stands still. Time in which QEMU only waits for a CPU does not count.
const STANDSTILL: Duration = Duration::from_secs(120);
/// How long the console is still read after QEMU or the link has ended, for the last words.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Lines of the console that an error shows.
const CONSOLE_LINES: usize = 60;
/// Console text kept in memory, in bytes.
const CONSOLE_KEPT: usize = 256 * 1024;
/// What the host's kernel says when it is beyond help (some of these hang instead of rebooting).
const HOST_DEATHS: [&str; 5] = [
    "Kernel panic",
    "TASK stack guard page was hit",
    "corrupted stack end",
    "KVM internal error",
    STOOD_STILL,
];
/// Above what QEMU's monitor says of a host that has stopped.
const STOOD_STILL: &str = "the host stands still; QEMU says of its CPUs:";
/// How the lab's init begins what it says when it gives up.
const INIT_GAVE_UP: &str = "lab init:";

/// How to run a command in the lab.
#[derive(Debug, Clone)]
pub struct Lab {
    /// What time means in it.
    pub clock: Clock,
    /// Number of CPUs; none: one, and the virtual clock has no more. With a thread for each of several CPUs, QEMU 7.2
    /// loses what one changes under another (patched code, nested page tables), and host kernels and guests died in
    /// one of some fifty VM starts; with one thread for all of them, each waits 100 ms for another's answer.
    pub cpus: Option<u32>,
    /// Memory of the host, in MiB.
    pub memory_mib: u32,
    /// Limit for boot and command together.
    pub limit: Duration,
    /// What is seen under /payload.
    pub payload: Payload,
    /// Variables for the command.
    pub env: Vec<(String, String)>,
    /// Folder that receives what the command leaves in /out.
    pub out: Option<PathBuf>,
    /// File that gets the command's standard output too, as it comes: all of it is there when the lab dies.
    pub stdout: Option<PathBuf>,
    /// File for the console of the host; without it only an error shows its end.
    pub console_log: Option<PathBuf>,
    /// Whether this process's standard input goes to the command.
    pub input: bool,
    /// Whether the command gets a terminal of its own, wired to this process's.
    pub terminal: bool,
    /// Whether systemd runs the host, and the command is a service of its.
    pub systemd: bool,
    /// More words for the host kernel's command line.
    pub kernel_arguments: String,
}

impl Default for Lab {
    fn default() -> Lab {
        Lab {
            clock: Clock::Fast,
            cpus: None,
            memory_mib: 4096,
            limit: Duration::from_secs(1800),
            payload: Payload::new(),
            env: Vec::new(),
            out: None,
            stdout: None,
            console_log: None,
            input: false,
            terminal: false,
            systemd: false,
            kernel_arguments: String::new(),
        }
    }
}

impl Lab {
    /// Boots the lab, runs the command with its output on this process's stdout and stderr, and returns its
    /// exit code (128 + n when signal n ended it). Builds the image first if it is not there yet.
    pub fn run(&self, argv: &[String]) -> Result<i32, LabError> {
        let image = image::ensure()?;
        let scratch = make_scratch().map_err(io_error("make a temporary folder"))?;
        let initrd = scratch.path().join("initrd.img");
        let init = std::env::current_exe().map_err(io_error("find this executable"))?;
        initrd::write(&initrd, &init, &image.modules()).map_err(io_error("write the lab's initrd"))?;
        let payload = scratch.path().join("payload.ext4");
        let tree = scratch.path().join("payload");
        std::fs::create_dir(&tree).map_err(io_error("make a temporary folder"))?;
        self.payload.write_image(&payload, &tree)?;

        let systemd = if self.systemd { systemd::WANTED } else { "" };
        let started = Instant::now();
        let machine = Machine::start(&Hardware {
            clock: self.clock,
            cpus: self.cpus.unwrap_or(1),
            memory_mib: self.memory_mib,
            kernel: &image.kernel(),
            initrd: &initrd,
            root: &image.root(),
            payload: Some(&payload),
            kernel_arguments: &format!("{KERNEL_ARGUMENTS} {systemd} {}", self.kernel_arguments),
        })?;
        let log = match &self.console_log {
            Some(path) => Some(File::create(path).map_err(io_error("write the console's log"))?),
            None => None,
        };
        let stdout = match &self.stdout {
            Some(path) => Some(File::create(path).map_err(io_error("keep the command's output"))?),
            None => None,
        };
        let terminal = match self.terminal {
            true => Some(Terminal::take().map_err(io_error("use this terminal"))?),
            false => None,
        };
        let writer = machine.link.try_clone().map_err(io_error("use the lab's link"))?;
        let mut session = Session {
            lab: self,
            argv,
            machine,
            writer: Arc::new(Mutex::new(writer)),
            reader: Reader::default(),
            console: Console { text: String::new(), log },
            stdout,
            out: None,
            terminal,
            started,
            up: None,
            heard: Heard { at: started, starved: Duration::ZERO, nudged: false },
            scratch: Some(scratch),
        };
        session.go()
    }
}

/// quiet: the console is for what went wrong. panic=-1 with -no-reboot: a dead host ends QEMU at once. The
/// watchdogs would take the build machine's own stalls for the lab's.
const KERNEL_ARGUMENTS: &str =
    "console=ttyS0 quiet loglevel=4 reboot=t panic=-1 oops=panic nowatchdog nosoftlockup";

/// Where the temporary folders of runs are: their images are too big for a /tmp in memory.
const SCRATCH: &str = "/var/tmp";

/// A folder for one run's images. Takes away those of runs that were killed before they could.
fn make_scratch() -> io::Result<tempfile::TempDir> {
    let prefix = "stockade-lab-";
    for entry in std::fs::read_dir(SCRATCH)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(prefix).and_then(|rest| rest.split_once('-')).map(|(pid, _)| pid);
        if owner.is_some_and(|pid| !std::path::Path::new("/proc").join(pid).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    tempfile::Builder::new().prefix(&format!("{prefix}{}-", std::process::id())).tempdir_in(SCRATCH)
}

struct Console {
    text: String,
    log: Option<File>,
}

struct Session<'a> {
    lab: &'a Lab,
    argv: &'a [String],
    machine: Machine,
    writer: Arc<Mutex<UnixStream>>,
    reader: Reader,
    console: Console,
    stdout: Option<File>,
    out: Option<(Child, ChildStdin)>,
    terminal: Option<Terminal>,
    started: Instant,
    up: Option<Duration>,
    heard: Heard,
    scratch: Option<tempfile::TempDir>,
}

/// The last sign of life.
struct Heard {
    at: Instant,
    /// What [`Machine::starved`] was then.
    starved: Duration,
    /// Whether the lab has been nudged since.
    nudged: bool,
}

impl Session<'_> {
    fn go(&mut self) -> Result<i32, LabError> {
        let mut buffer = vec![0; link::MAX_BODY];
        loop {
            self.check_time()?;
            let (link_ready, console_ready) = self.wait()?;
            if console_ready {
                self.read_console(&mut buffer)?;
            }
            if link_ready {
                match self.machine.link.read(&mut buffer) {
                    Ok(0) => return Err(self.died("the lab ended before the command did")),
                    Ok(n) => self.reader.push(buffer.get(..n).unwrap_or_default()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return Err(self.died("the lab's link broke")),
                }
            }
            while let Some((kind, body)) =
                self.reader.next_frame().map_err(io_error("read the lab's link"))?
            {
                if let Some(code) = self.take(kind, &body)? {
                    return Ok(code);
                }
            }
        }
    }

    fn check_time(&mut self) -> Result<(), LabError> {
        let elapsed = self.started.elapsed();
        if self.up.is_none() && elapsed > BOOT_LIMIT {
            let starved = self.machine.starved();
            if elapsed > STARVED_BOOT_LIMIT || elapsed.saturating_sub(starved) > BOOT_LIMIT {
                let (elapsed, starved) = (elapsed.as_secs(), starved.as_secs());
                let why = format!(
                    "the lab did not come up within {elapsed} s, in {starved} s of which it waited for a CPU"
                );
                return Err(self.died(&why));
            }
        }
        self.check_pulse()?;
        if elapsed > self.lab.limit {
            let limit = self.lab.limit.as_secs();
            return Err(self.died(&format!("the command was not done within {limit} s")));
        }
        if let Some(size) = self.terminal.as_mut().and_then(Terminal::changed_size) {
            self.send(Kind::Resize, &size);
        }
        Ok(())
    }

    /// A lab whose time is real says regularly that it lives.
    fn check_pulse(&mut self) -> Result<(), LabError> {
        if self.up.is_none() || self.lab.clock != Clock::Fast || self.heard.at.elapsed() < NUDGE {
            return Ok(());
        }
        let starved = self.machine.starved().saturating_sub(self.heard.starved);
        let silent = self.heard.at.elapsed().saturating_sub(starved);
        if silent > NUDGE && !self.heard.nudged {
            self.heard.nudged = true;
            eprintln!("lab: nothing heard of the host for {} s; it gets an interrupt", silent.as_secs());
            let _ = (&self.machine.console).write_all(b"\n");
        }
        match silent > STANDSTILL {
            false => Ok(()),
            true => {
                let registers = self.machine.registers();
                self.console.push(format!("\n{STOOD_STILL}\n{registers}").as_bytes());
                Err(self.died(&format!("the host has stood still for {} s", silent.as_secs())))
            }
        }
    }

    /// Waits for input of link and console, or for the next look at the time.
    fn wait(&self) -> Result<(bool, bool), LabError> {
        let mut fds = [
            PollFd::new(self.machine.link.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.machine.console.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::from(200u8)) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(io_error("wait for the lab")(error.into())),
        }
        let ready = |fd: &PollFd| fd.any().unwrap_or(false);
        Ok((ready(&fds[0]), ready(&fds[1])))
    }

    fn read_console(&mut self, buffer: &mut [u8]) -> Result<(), LabError> {
        let n = match self.machine.console.read(buffer) {
            Ok(0) | Err(_) => return Err(self.died("QEMU ended")),
            Ok(n) => n,
        };
        self.console.push(buffer.get(..n).unwrap_or_default());
        let dead =
            |line: &&str| line.contains(INIT_GAVE_UP) || HOST_DEATHS.iter().any(|death| line.contains(death));
        let line = self.console.text.lines().find(dead);
        match line.map(|line| line.trim().to_string()) {
            Some(line) => Err(self.died(&format!("the lab's host died: {line}"))),
            None => Ok(()),
        }
    }

    /// Acts on a frame; the exit code when it was the last.
    fn take(&mut self, kind: Kind, body: &[u8]) -> Result<Option<i32>, LabError> {
        if self.heard.nudged {
            eprintln!("lab: the host goes on");
        }
        self.heard = Heard { at: Instant::now(), starved: self.machine.starved(), nudged: false };
        match kind {
            Kind::Alive => {}
            Kind::Ready => self.start_command()?,
            Kind::Stdout => {
                if let Some(file) = &mut self.stdout {
                    file.write_all(body).map_err(io_error("keep the command's output"))?;
                }
                // Whoever reads this process's output may stop doing so (`| head`); the command goes on.
                let _ = io::stdout().write_all(body).and_then(|()| io::stdout().flush());
            }
            Kind::Stderr => drop(io::stderr().write_all(body)),
            Kind::Out => self.unpack(body).map_err(io_error("unpack /out"))?,
            Kind::Exit => {
                if let Some((mut tar, archive)) = self.out.take() {
                    drop(archive);
                    tar.wait().map_err(io_error("unpack /out"))?;
                }
                let code = String::from_utf8_lossy(body).parse().unwrap_or(255);
                return Ok(Some(code));
            }
            Kind::Failed => return Err(self.died(&String::from_utf8_lossy(body))),
            Kind::Start | Kind::Stdin | Kind::StdinEof | Kind::Resize => {
                return Err(
                    self.died("the lab's link is corrupt: a frame that only goes to the lab came back")
                );
            }
        }
        Ok(None)
    }

    fn start_command(&mut self) -> Result<(), LabError> {
        self.up = Some(self.started.elapsed());
        // QEMU has every file open by now.
        self.scratch.take();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut env = self.lab.env.clone();
        if self.terminal.is_some() {
            let kind = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
            env.push(("TERM".into(), kind));
        }
        let tty = self.terminal.as_ref().map(|terminal| terminal.size);
        let alive_seconds = (self.lab.clock == Clock::Fast).then_some(ALIVE_SECONDS);
        let start = Start { argv: self.argv.to_vec(), env, tty, now, alive_seconds };
        let body =
            serde_json::to_vec(&start).map_err(|error| io_error("describe the command")(error.into()))?;
        self.send(Kind::Start, &body);
        if self.lab.input {
            let writer = self.writer.clone();
            std::thread::spawn(move || forward_input(&writer));
        } else {
            self.send(Kind::StdinEof, &[]);
        }
        Ok(())
    }

    fn send(&self, kind: Kind, body: &[u8]) {
        // A broken link shows on the reading side, where the reason is known.
        let _ = send_locked(&self.writer, kind, body);
    }

    fn unpack(&mut self, piece: &[u8]) -> io::Result<()> {
        let Some(folder) = &self.lab.out else { return Ok(()) };
        if self.out.is_none() {
            std::fs::create_dir_all(folder)?;
            let mut tar = Command::new("tar");
            // The lab's clock may be ahead: its times mean nothing here.
            tar.arg("-C").arg(folder).args(["--no-same-owner", "--touch", "-xf", "-"]).stdin(Stdio::piped());
            let mut child = tar.spawn()?;
            let archive = child.stdin.take().ok_or_else(|| io::Error::other("no pipe to tar"))?;
            self.out = Some((child, archive));
        }
        match &mut self.out {
            Some((_, archive)) => archive.write_all(piece),
            None => Ok(()),
        }
    }

    /// The error for a lab that is gone, with the end of its console.
    fn died(&mut self, why: &str) -> LabError {
        let until = Instant::now() + LAST_WORDS;
        let mut buffer = [0; 4096];
        let _ = self.machine.console.set_read_timeout(Some(Duration::from_millis(200)));
        while Instant::now() < until {
            match self.machine.console.read(&mut buffer) {
                Ok(n @ 1..) => self.console.push(buffer.get(..n).unwrap_or_default()),
                _ => break,
            }
        }
        // QEMU's warnings about features that TCG lacks are harmless and only in the way.
        let lines = self.console.text.lines().filter(|line| !line.contains("warning: TCG doesn't support"));
        let text = lines.collect::<Vec<_>>().join("\n");
        let (why, console) = (why.into(), last_lines(&text, CONSOLE_LINES));
        match HOST_DEATHS.iter().any(|death| text.contains(death)) {
            true => LabError::HostDied { why, console },
            false => LabError::Died { why, console },
        }
    }
}

impl Console {
    fn push(&mut self, bytes: &[u8]) {
        if let Some(log) = &mut self.log {
            let _ = log.write_all(bytes);
        }
        self.text.push_str(&String::from_utf8_lossy(bytes).replace('\r', ""));
        if self.text.len() > CONSOLE_KEPT {
            let middle = self.text.len() - CONSOLE_KEPT / 2;
            let cut = (middle..self.text.len()).find(|at| self.text.is_char_boundary(*at));
            self.text.drain(..cut.unwrap_or(0));
        }
    }
}

fn send_locked(writer: &Mutex<UnixStream>, kind: Kind, body: &[u8]) -> io::Result<()> {
    let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
    link::send(&mut *writer, kind, body)
}

fn forward_input(writer: &Mutex<UnixStream>) {
    let mut buffer = vec![0; link::MAX_BODY];
    let mut stdin = io::stdin().lock();
    while let Ok(n @ 1..) = stdin.read(&mut buffer) {
        if send_locked(writer, Kind::Stdin, buffer.get(..n).unwrap_or_default()).is_err() {
            return;
        }
    }
    let _ = send_locked(writer, Kind::StdinEof, &[]);
}
