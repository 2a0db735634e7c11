//! PID 1 of the lab's host: the same executable that started the lab, run by the kernel as `/init`. (Or a service of the
//! systemd that it became: see [`super::systemd`].)
//!
//! It loads the modules that the initrd brings, mounts the host's root file system and what a host has on
//! it, tells the build machine that it is up, runs the one command it is sent, and sends back the exit code
//! and what lies in `/out`. It never returns: when it cannot go on it says why on the link and the console,
//! and ends the machine.

use super::link::{self, Kind, Reader, Start};
use super::{static_keys, systemd};
use nix::mount::{MsFlags, mount};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long what the command started may hold its output open after it has ended.
const DRAIN: Duration = Duration::from_secs(2);

const PATH: &str = "/payload/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Error of a step: what could not be done, and why.
type Step<T> = Result<T, String>;

pub(super) trait Context<T> {
    fn or_say(self, what: impl std::fmt::Display) -> Step<T>;
}

impl<T, E: std::fmt::Display> Context<T> for Result<T, E> {
    fn or_say(self, what: impl std::fmt::Display) -> Step<T> {
        self.map_err(|error| format!("{what}: {error}"))
    }
}

/// The lab's end of the link, shared by the threads that send.
#[derive(Clone)]
struct Link(Arc<Mutex<File>>);

impl Link {
    fn send(&self, kind: Kind, body: &[u8]) {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody is left to tell when the link itself is gone.
        let _ = link::send(&mut *port, kind, body);
    }
}

/// Whether this process is the lab's init: the kernel started it from the initrd, or systemd a copy.
pub(super) fn is_init() -> bool {
    let named = std::env::args_os().next().is_some_and(|name| name == "/init");
    named && (std::process::id() == 1 || systemd::is_unit())
}

/// The life of the lab's host.
pub(super) fn run() -> ! {
    if !systemd::is_unit() {
        if let Err(why) = bring_up() {
            fail(None, &why);
        }
        if systemd::wanted() {
            let Err(why) = systemd::hand_over();
            fail(None, &why);
        }
    }
    // On one CPU, as on the virtual clock, the trouble cannot be, and measurements shall see KVM as it is.
    let several = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
    let _held = match several.then(static_keys::hold).transpose() {
        Ok(held) => held,
        Err(error) => fail(None, &format!("hold a VM and a cgroup: {error}")),
    };
    let port = match open_link() {
        Ok(port) => port,
        Err(why) => fail(None, &why),
    };
    let link = match port.try_clone() {
        Ok(clone) => Link(Arc::new(Mutex::new(clone))),
        Err(error) => fail(None, &error.to_string()),
    };
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds: f64 = uptime.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or_default();
    link.send(Kind::Ready, format!("{:.0}", seconds * 1000.0).as_bytes());
    match serve(port, &link) {
        Ok(code) => link.send(Kind::Exit, code.to_string().as_bytes()),
        Err(why) => fail(Some(&link), &why),
    }
    // The other side kills the machine when it has read the last frame.
    std::thread::sleep(Duration::from_secs(5));
    power_off()
}

fn fail(link: Option<&Link>, why: &str) -> ! {
    let line = format!("lab init: {why}");
    if let Ok(mut console) = File::options().write(true).open("/dev/console") {
        let _ = writeln!(console, "{line}");
    }
    if let Some(link) = link {
        link.send(Kind::Failed, line.as_bytes());
    }
    power_off()
}

fn power_off() -> ! {
    nix::unistd::sync();
    // QEMU runs with -no-reboot, where a reset ends it.
    let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
    std::process::exit(1)
}

/// From the initrd to a host as its services would have left it.
fn bring_up() -> Step<()> {
    mount_new("devtmpfs", "/dev", "devtmpfs", "mode=0755")?;
    mount_new("proc", "/proc", "proc", "")?;
    let mut modules: Vec<_> = fs::read_dir("/modules")
        .or_say("list the initrd's modules")?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .collect();
    modules.sort();
    for module in &modules {
        load_module(module)?;
    }
    let root = "/root";
    fs::create_dir_all(root).or_say("make the mount point of the root")?;
    mount(Some("/dev/vda"), root, Some("ext4"), MsFlags::MS_NOATIME, None::<&str>)
        .or_say("mount the host's root /dev/vda")?;
    for place in ["dev", "proc"] {
        let to = format!("{root}/{place}");
        mount(Some(&*format!("/{place}")), &*to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .or_say(format!("move /{place} to the root"))?;
    }
    std::env::set_current_dir(root).or_say("enter the root")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).or_say("move the root")?;
    nix::unistd::chroot(".").or_say("chroot to the root")?;
    std::env::set_current_dir("/").or_say("enter the new root")?;
    mount_file_systems()?;
    settle()
}

fn load_module(path: &Path) -> Step<()> {
    let file = File::open(path).or_say(format!("open module {}", path.display()))?;
    // SAFETY: finit_module(2) takes a descriptor, a NUL-terminated string that lives on, and flags.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result < 0 {
        return Err(io::Error::last_os_error()).or_say(format!("load module {}", path.display()));
    }
    Ok(())
}

fn mount_new(source: &str, target: &str, kind: &str, options: &str) -> Step<()> {
    fs::create_dir_all(target).or_say(format!("make {target}"))?;
    mount(Some(source), target, Some(kind), MsFlags::empty(), Some(options))
        .or_say(format!("mount {kind} on {target}"))
}

fn mount_file_systems() -> Step<()> {
    mount_new("sysfs", "/sys", "sysfs", "")?;
    mount_new("cgroup2", "/sys/fs/cgroup", "cgroup2", "nsdelegate")?;
    mount_new("bpf", "/sys/fs/bpf", "bpf", "")?;
    mount_new("tracefs", "/sys/kernel/tracing", "tracefs", "")?;
    mount_new("debugfs", "/sys/kernel/debug", "debugfs", "")?;
    mount_new("devpts", "/dev/pts", "devpts", "gid=5,mode=620,ptmxmode=666")?;
    mount_new("shm", "/dev/shm", "tmpfs", "mode=1777")?;
    mount_new("mqueue", "/dev/mqueue", "mqueue", "")?;
    mount_new("run", "/run", "tmpfs", "mode=0755")?;
    mount_new("tmp", "/tmp", "tmpfs", "mode=1777")?;
    fs::create_dir_all("/out").or_say("make /out")?;
    mount_new("out", "/out", "tmpfs", "mode=0755")?;
    fs::create_dir_all("/payload").or_say("make /payload")?;
    if Path::new("/dev/vdb").exists() {
        mount(Some("/dev/vdb"), "/payload", Some("ext4"), MsFlags::MS_RDONLY, None::<&str>)
            .or_say("mount the payload /dev/vdb")?;
    }
    // systemd makes every mount of a host shared, and runtimes are written for that.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>)
        .or_say("make the mounts shared")
}

/// What remains: device links, host name, loopback, cgroup controllers.
fn settle() -> Step<()> {
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "fd/0"),
        ("/dev/stdout", "fd/1"),
        ("/dev/stderr", "fd/2"),
    ] {
        if !Path::new(link).exists() {
            symlink(target, link).or_say(format!("link {link}"))?;
        }
    }
    nix::unistd::sethostname("stockade-lab").or_say("set the host name")?;
    loopback_up().or_say("bring lo up")?;
    let controllers =
        fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").or_say("read the controllers")?;
    let enable: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", enable.join(" ")).or_say("enable the controllers")?;
    if !Path::new("/dev/kvm").exists() {
        return Err("kvm-amd is loaded but there is no /dev/kvm: does QEMU run with -cpu EPYC?".into());
    }
    Ok(())
}

/// Sets the loopback interface up; the kernel gives it its addresses by itself.
fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: an all-zero ifreq is a valid value of that plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"lo") {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which `request` is, and the socket is open.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn open_link() -> Step<File> {
    // The port's device appears when the device has told its ports: an event that takes a moment.
    let mut last = String::from("no virtio-serial port");
    for _ in 0..500 {
        match File::options().read(true).write(true).open("/dev/vport0p1").or_say("open /dev/vport0p1") {
            Ok(port) => return Ok(port),
            Err(error) => last = error,
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(last)
}

/// Runs the command that the link brings and returns its exit code.
fn serve(mut port: File, link: &Link) -> Step<i32> {
    let mut reader = Reader::default();
    let frame = reader.wait_frame(&mut port).or_say("read the command")?;
    let Some((Kind::Start, body)) = frame else {
        return Err(format!("expected a command, got {:?}", frame.map(|(kind, _)| kind)));
    };
    let start: Start = serde_json::from_slice(&body).or_say("read the command")?;
    let now = nix::sys::time::TimeSpec::new(start.now as i64, 0);
    nix::time::clock_settime(nix::time::ClockId::CLOCK_REALTIME, now).or_say("set the clock")?;

    if let Some(seconds) = start.alive_seconds {
        let link = link.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_secs(seconds));
                link.send(Kind::Alive, &[]);
            }
        });
    }
    let (mut command, mut stdio) = prepare(&start)?;
    let mut input = stdio.input.take();
    let terminal = stdio.terminal.take();
    std::thread::spawn(move || {
        while let Ok(Some((kind, body))) = reader.wait_frame(&mut port) {
            match kind {
                // A command that has closed its input is not an error of the lab.
                Kind::Stdin => drop(input.as_mut().map(|input| input.write_all(&body))),
                Kind::StdinEof => drop(input.take()),
                Kind::Resize => {
                    if let (Some(terminal), &[a, b, c, d]) = (&terminal, body.as_slice()) {
                        let _ = resize(terminal, u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
                    }
                }
                _ => {}
            }
        }
    });
    let name = start.argv.first().map(String::as_str).unwrap_or_default();
    let spawned = command.spawn();
    // The command holds the child's ends of its pipes; while they are open here no output would ever end.
    drop(command);
    let code = match spawned {
        Ok(child) => {
            let pumps: Vec<_> =
                stdio.outputs.into_iter().map(|(kind, from)| pump(link, kind, from)).collect();
            let code = reap_until(Pid::from_raw(child.id() as i32))?;
            drain(pumps);
            code
        }
        Err(error) => {
            link.send(Kind::Stderr, format!("lab: cannot run {name}: {error}\n").as_bytes());
            127
        }
    };
    send_out(link)?;
    Ok(code)
}

/// The lab's ends of the command's stdio.
struct Stdio {
    input: Option<Box<dyn Write + Send>>,
    outputs: Vec<(Kind, Box<dyn Read + Send>)>,
    terminal: Option<OwnedFd>,
}

fn prepare(start: &Start) -> Step<(Command, Stdio)> {
    let (program, arguments) = start.argv.split_first().ok_or("the command is empty")?;
    // Command looks the program up on this process's PATH.
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("PATH", PATH) };
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/root").env_clear();
    command.env("PATH", PATH).env("HOME", "/root").env("LANG", "C.UTF-8").env(super::INSIDE, "1");
    command.envs(start.env.iter().map(|(name, value)| (name, value)));
    let stdio = match start.tty {
        Some(size) => on_terminal(&mut command, size)?,
        None => on_pipes(&mut command).or_say("make the command's pipes")?,
    };
    Ok((command, stdio))
}

fn on_pipes(command: &mut Command) -> io::Result<Stdio> {
    let (stdin, input): (PipeReader, PipeWriter) = io::pipe()?;
    let (output, stdout) = io::pipe()?;
    let (errors, stderr) = io::pipe()?;
    command.stdin(stdin).stdout(stdout).stderr(stderr).process_group(0);
    Ok(Stdio {
        input: Some(Box::new(input)),
        outputs: vec![(Kind::Stdout, Box::new(output)), (Kind::Stderr, Box::new(errors))],
        terminal: None,
    })
}

fn on_terminal(command: &mut Command, (rows, columns): (u16, u16)) -> Step<Stdio> {
    let pty = nix::pty::openpty(None, None).or_say("make a terminal")?;
    resize(&pty.master, rows, columns).or_say("set the terminal's size")?;
    let side = |fd: &OwnedFd| fd.try_clone().or_say("make a terminal");
    command.stdin(side(&pty.slave)?).stdout(side(&pty.slave)?).stderr(pty.slave);
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
    Ok(Stdio {
        input: Some(Box::new(File::from(side(&pty.master)?))),
        outputs: vec![(Kind::Stdout, Box::new(File::from(side(&pty.master)?)))],
        terminal: Some(pty.master),
    })
}

fn resize(terminal: &impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize, which `size` is.
    match unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn pump(link: &Link, kind: Kind, mut from: Box<dyn Read + Send>) -> JoinHandle<()> {
    let link = link.clone();
    std::thread::spawn(move || {
        let mut buffer = vec![0; link::MAX_BODY];
        // A terminal ends with EIO when its last user is gone, a pipe with end of file.
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            link.send(kind, buffer.get(..n).unwrap_or_default());
        }
    })
}

/// Reaps whatever ends until the command does.
fn reap_until(command: Pid) -> Step<i32> {
    loop {
        match waitpid(None, Some(WaitPidFlag::empty())) {
            Ok(WaitStatus::Exited(pid, code)) if pid == command => return Ok(code),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == command => return Ok(128 + signal as i32),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(format!("wait for the command: {error}")),
        }
    }
}

/// Waits until the output is sent, but not for ever on a process that was left behind holding it.
fn drain(pumps: Vec<JoinHandle<()>>) {
    let (done, all) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for pump in pumps {
            let _ = pump.join();
        }
        let _ = done.send(());
    });
    let _ = all.recv_timeout(DRAIN);
}

/// Sends what lies in /out, as a tar archive.
fn send_out(link: &Link) -> Step<()> {
    if fs::read_dir("/out").or_say("read /out")?.next().is_none() {
        return Ok(());
    }
    let mut tar = Command::new("/bin/tar")
        .args(["-C", "/out", "-cf", "-", "."])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .or_say("run tar")?;
    if let Some(archive) = tar.stdout.take() {
        let _ = pump(link, Kind::Out, Box::new(archive)).join();
    }
    match tar.wait().or_say("wait for tar")?.success() {
        true => Ok(()),
        false => Err("tar could not pack /out".into()),
    }
}
