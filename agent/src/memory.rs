//! Memory that the VM is given while it runs, and that it gives back.
//!
//! The kernel takes and gives memory in blocks, each a directory below [`BLOCKS`]. Nobody announces them to it, so it is
//! told of one by its probe file. A block's directory stays when the block has been let go of, and is there when it comes
//! back. All of this may take its time, so it is done in a helper, and what has come of it is read afterwards.
//!
//! Memory that is to be given back must hold nothing that cannot be moved, so blocks are taken for movable memory (that
//! of programs and files) as long as the kernel has a part to work with: a third as much as that.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};
use nix::sys::sysinfo::sysinfo;
use stockade_agent_protocol::messages::{SetMemoryRequest, SetMemoryResponse};

use crate::cgroup;
use crate::container::Containers;
use crate::error::Error;

/// Where blocks are, and the file that tells the kernel of a new one.
const BLOCKS: &str = "/sys/devices/system/memory";
/// Most bytes of movable memory for each byte of the kernel's.
const MOVABLE_RATIO: u64 = 3;
/// How long the kernel may try to empty blocks: without an end it tries for ever.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is reminded after that.
const REMINDER: Duration = Duration::from_millis(50);

/// Takes memory into use, or lets go of some.
pub async fn set(containers: &Containers, request: &SetMemoryRequest) -> Result<SetMemoryResponse, Error> {
    let blocks = Blocks::of(request)?;
    let wanted = request.bytes / request.block;
    let tried = containers
        .aside(move || if blocks.in_use() < wanted { blocks.take(wanted) } else { blocks.release(wanted) });
    // Whatever fails from here on: what is in use by then is.
    let tried = tried.await.and(cgroup::share_memory());
    let reason = tried.err().map(|e| e.to_string()).unwrap_or_default();
    Ok(SetMemoryResponse { bytes: blocks.in_use() * blocks.size, reason, ..Default::default() })
}

/// Blocks in a row.
#[derive(Debug, Clone, Copy)]
struct Blocks {
    /// Number of the first.
    first: u64,
    /// Bytes of each.
    size: u64,
}

impl Blocks {
    fn of(request: &SetMemoryRequest) -> Result<Self, Error> {
        let SetMemoryRequest { start, block, bytes, .. } = *request;
        let kernels = fs::read_to_string(format!("{BLOCKS}/block_size_bytes"))
            .map_err(|e| Error::os("asking for the size of memory blocks", e))?;
        let kernels = u64::from_str_radix(kernels.trim(), 16).unwrap_or(0);
        if block == 0 || block != kernels || !start.is_multiple_of(block) || !bytes.is_multiple_of(block) {
            return Err(Error::Invalid(format!(
                "memory of {bytes} bytes from {start:#x} is not made of the {kernels} bytes that the kernel takes at once"
            )));
        }
        Ok(Blocks { first: start / block, size: block })
    }

    fn file(self, index: u64, name: &str) -> PathBuf {
        format!("{BLOCKS}/memory{}/{name}", self.first + index).into()
    }

    fn is_in_use(self, index: u64) -> bool {
        fs::read(self.file(index, "state")).is_ok_and(|state| state.trim_ascii() == b"online")
    }

    /// How many are in use, up to the first that is not.
    fn in_use(self) -> u64 {
        (0..).take_while(|&index| self.is_in_use(index)).count() as u64
    }

    /// Takes blocks into use until that many are.
    fn take(self, count: u64) -> Result<(), Error> {
        let mut movable =
            (0..self.in_use()).filter(|&index| self.is_movable(index)).count() as u64 * self.size;
        for index in self.in_use()..count {
            self.announce(index)?;
            let total = sysinfo().map(|s| s.ram_total()).unwrap_or(0);
            let is_movable = movable + self.size <= total.saturating_sub(movable) * MOVABLE_RATIO;
            movable += if is_movable { self.size } else { 0 };
            self.set_state(index, if is_movable { "online_movable" } else { "online_kernel" })
                .map_err(|e| Error::os("taking memory into use that the VM was given", e))?;
        }
        Ok(())
    }

    fn is_movable(self, index: u64) -> bool {
        fs::read(self.file(index, "valid_zones")).is_ok_and(|zones| zones.trim_ascii() == b"Movable")
    }

    /// Tells the kernel of a block that it may not know.
    fn announce(self, index: u64) -> Result<(), Error> {
        let address = format!("{:#x}", (self.first + index) * self.size);
        match write(format!("{BLOCKS}/probe").into(), &address) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => {
                Err(Error::os(format!("telling the kernel of memory at {address}"), e))
            }
            _ => Ok(()),
        }
    }

    /// Lets go of the last blocks until that many are left, or one cannot be emptied.
    fn release(self, count: u64) -> Result<(), Error> {
        limit_patience().map_err(|e| Error::os("setting a timer", e))?;
        for index in (count..self.in_use()).rev() {
            self.set_state(index, "offline").map_err(|e| Error::os("letting go of memory", e))?;
        }
        Ok(())
    }

    fn set_state(self, index: u64, state: &str) -> io::Result<()> {
        write(self.file(index, "state"), state)
    }
}

fn write(path: PathBuf, value: &str) -> io::Result<()> {
    // One write call, which a signal is to end.
    let written = fs::File::options().write(true).open(path)?.write(value.as_bytes())?;
    if written == value.len() { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
}

/// Has a signal interrupt this process's calls from some time on, again and again.
fn limit_patience() -> io::Result<()> {
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGALRM, &action) }?;
    sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&SigSet::from(Signal::SIGALRM)), None)?;
    let time = |duration: Duration| libc::timeval {
        tv_sec: duration.as_secs() as libc::time_t,
        tv_usec: duration.subsec_micros().into(),
    };
    let timer = libc::itimerval { it_value: time(PATIENCE), it_interval: time(REMINDER) };
    // SAFETY: reads a structure that lives until the call returns, and sets a timer of this process.
    if unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
