//! The emulated machine: QEMU's command line for the two clocks, and the process.
//!
//! The process never outlives this one: it dies with the thread that made it (PR_SET_PDEATHSIG) and is
//! killed when [`Machine`] is dropped. It holds three ends of socket pairs, the serial console, the link and its
//! monitor, and shares nothing else with this process.

use super::mend::mend;
use super::{LabError, io_error};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long QEMU's monitor may be silent before it has said all.
const MONITOR_PAUSE: Duration = Duration::from_secs(2);
/// More than it has to say, in bytes.
const MONITOR_MAX: u64 = 64 * 1024;

/// What time means in the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Clock {
    /// The build machine's own time: for tests.
    #[default]
    Fast,
    /// One CPU on which each instruction takes 2 ns of the lab's time, so that times are instruction counts:
    /// for benchmarks. What the build machine does beside does not show.
    Virtual,
}

/// What the machine is made of.
pub(super) struct Hardware<'a> {
    pub clock: Clock,
    pub cpus: u32,
    pub memory_mib: u32,
    pub kernel: &'a Path,
    pub initrd: &'a Path,
    pub root: &'a Path,
    pub payload: Option<&'a Path>,
    pub kernel_arguments: &'a str,
}

/// A running QEMU.
pub(super) struct Machine {
    child: Child,
    /// This side of the serial console.
    pub console: UnixStream,
    /// This side of the virtio-serial port.
    pub link: UnixStream,
    /// This side of QEMU's monitor.
    monitor: UnixStream,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Machine {
    pub fn start(hardware: &Hardware) -> Result<Machine, LabError> {
        let (console, guest_console) = UnixStream::pair().map_err(io_error("make the lab's console"))?;
        let (link, guest_link) = UnixStream::pair().map_err(io_error("make the lab's link"))?;
        let (monitor, qemu_monitor) = UnixStream::pair().map_err(io_error("make the lab's monitor"))?;
        let inherited: [OwnedFd; 3] = [
            guest_console.try_clone().map_err(io_error("make the lab's console"))?.into(),
            guest_link.into(),
            qemu_monitor.into(),
        ];
        let fds = inherited.each_ref().map(AsRawFd::as_raw_fd);
        let mut command = Command::new("qemu-system-x86_64");
        command.args(arguments(hardware, fds));
        // What QEMU itself has to say is read where the console is.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(OwnedFd::from(guest_console));
        // Away from the terminal's process group: in a shell, ^C belongs to the lab.
        command.process_group(0);
        let parent = std::process::id() as i32;
        // SAFETY: the closure makes only async-signal-safe calls (prctl, getppid, fcntl) on values it owns.
        unsafe { command.pre_exec(move || leave_fork(parent, &fds)) };
        let child = command.spawn().map_err(|source| LabError::Io {
            what: "run qemu-system-x86_64 (package qemu-system-x86)".into(),
            source,
        })?;
        if let Err(why) = mend(&child) {
            eprintln!("lab: QEMU gives guests an interrupt twice now and then, and is not mended: {why}");
        }
        Ok(Machine { child, console, link, monitor })
    }

    /// Where the emulated CPUs and their timers stand: what QEMU's monitor says.
    pub fn registers(&mut self) -> String {
        let _ = self.monitor.set_read_timeout(Some(MONITOR_PAUSE));
        let _ = self.monitor.write_all(b"info registers -a\ninfo lapic\ninfo pic\n");
        let mut text = Vec::new();
        // It ends with the pause after the last answer.
        let _ = Read::by_ref(&mut self.monitor).take(MONITOR_MAX).read_to_end(&mut text);
        String::from_utf8_lossy(&text).replace('\r', "")
    }

    /// For how long QEMU's threads could have run but had no CPU of the build machine, all together.
    pub fn starved(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id()));
        // schedstat: nanoseconds on a CPU, nanoseconds in its queue, times on it.
        let waited = |task: std::fs::DirEntry| {
            let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split(' ').nth(1)?.parse::<u64>().ok()
        };
        Duration::from_nanos(tasks.into_iter().flatten().flatten().filter_map(waited).sum())
    }
}

/// In the child, before QEMU: die with the parent, keep the sockets.
fn leave_fork(parent: i32, fds: &[RawFd]) -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    // The parent may be gone already.
    if nix::unistd::getppid().as_raw() != parent {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    for fd in fds {
        // SAFETY: F_SETFD only changes a flag of a descriptor that this process owns.
        if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn arguments(hardware: &Hardware, [console, link, monitor]: [RawFd; 3]) -> Vec<String> {
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |words: &str| arguments.extend(words.split(' ').map(String::from));
    // -cpu max would make guests of guests stall; see the notes in `super`.
    add("-M q35 -cpu EPYC -nodefaults -no-user-config -display none -no-reboot");
    match hardware.clock {
        Clock::Fast => add("-accel tcg,thread=single"),
        Clock::Virtual => add("-accel tcg,thread=single -icount shift=1,sleep=off"),
    }
    add(&format!("-smp {} -m {}", hardware.cpus, hardware.memory_mib));
    add(&format!("-chardev socket,id=console,fd={console} -serial chardev:console"));
    add(&format!("-chardev socket,id=link,fd={link} -device virtio-serial-pci"));
    add("-device virtserialport,chardev=link,name=stockade.lab");
    add(&format!("-chardev socket,id=monitor,fd={monitor} -mon chardev=monitor,mode=readline"));
    let mut drive = |id: &str, path: &Path, options: &str| {
        // A comma in a path is doubled in QEMU's option syntax.
        let path = path.display().to_string().replace(',', ",,");
        arguments.extend(["-drive".into(), format!("id={id},if=none,format=raw,{options},file={path}")]);
        arguments.extend(["-device".into(), format!("virtio-blk-pci,drive={id}")]);
    };
    // What the lab writes goes to a temporary file that QEMU removes as soon as it has opened it.
    drive("root", hardware.root, "snapshot=on,cache=unsafe");
    if let Some(payload) = hardware.payload {
        drive("payload", payload, "readonly=on");
    }
    let files = [("-kernel", hardware.kernel), ("-initrd", hardware.initrd)];
    arguments.extend(files.map(|(name, path)| [name.to_string(), path.display().to_string()]).concat());
    arguments.extend(["-append".into(), hardware.kernel_arguments.into()]);
    arguments
}
