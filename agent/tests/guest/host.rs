//! The host's side: packs the initrd, boots it, judges by what the console says.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Emulated and on a loaded machine, all cases take about a minute.
const TIME_LIMIT: Duration = Duration::from_secs(600);

pub fn main() {
    let Ok(kernel) = std::env::var("STOCKADE_TEST_BZIMAGE") else {
        eprintln!(
            "STOCKADE_TEST_BZIMAGE names no guest kernel: build its bzImage, and set it to the path of that"
        );
        std::process::exit(1);
    };
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let dir = tempfile_dir();
    let initrd = dir.join("initrd");
    std::fs::write(&initrd, archive()).expect("writing the initrd");
    let result = boot(&kernel, &initrd, &filter);
    let _ = std::fs::remove_dir_all(&dir);
    if result != ExitCode::SUCCESS {
        std::process::exit(1);
    }
}

fn tempfile_dir() -> std::path::PathBuf {
    let dir = std::env::temp_dir().join(format!("stockade-agent-guest-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("making a temporary directory");
    dir
}

fn boot(kernel: &str, initrd: &Path, filter: &str) -> ExitCode {
    let extra = std::env::var("STOCKADE_TEST_QEMU").unwrap_or_default();
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-M", "microvm,acpi=off", "-cpu", "EPYC", "-m", "512", "-nodefaults", "-no-user-config"])
        .args(["-nographic", "-serial", "stdio", "-no-reboot", "-accel", "tcg", "-kernel", kernel, "-initrd"])
        .arg(initrd)
        .args(extra.split_ascii_whitespace())
        .arg("-append")
        .arg(format!(
            "earlyprintk=serial,0x3f8,115200,keep loglevel=1 printk.devkmsg=on reboot=t panic=-1 stockade.loopback \
             stockade.filter={filter} {}",
            std::env::var("STOCKADE_TEST_APPEND").unwrap_or_default()
        ))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starting qemu-system-x86_64");
    let console = BufReader::new(qemu.stdout.take().expect("piped"));
    let pid = qemu.id();
    let started = Instant::now();
    let (ended, watch) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        if watch.recv_timeout(TIME_LIMIT).is_err() {
            println!("the guest did not end within {TIME_LIMIT:?}");
            let _ = Command::new("kill").arg(pid.to_string()).status();
        }
    });
    let (mut failed, mut done) = (false, false);
    for line in console.lines().map_while(Result::ok) {
        failed |= line.contains("guest-test: FAILED");
        done |= line.contains("guest-test: done");
        println!("{line}");
        let _ = std::io::stdout().flush();
    }
    let _ = ended.send(());
    let _ = qemu.wait();
    println!("guest ran for {:?}", started.elapsed());
    if done && !failed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A cpio archive in the kernel's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).
fn archive() -> Vec<u8> {
    let mut out = Vec::new();
    let busybox = std::fs::read("/bin/busybox").expect("reading /bin/busybox");
    for dir in [
        "rootfs",
        "rootfs/bin",
        "rootfs/etc",
        "rootfs/proc",
        "rootfs/dev",
        "rootfs/sys",
        "rootfs/tmp",
        "client",
    ] {
        entry(&mut out, dir, 0o40_755, &[]);
    }
    let this = std::fs::read(std::env::current_exe().expect("own path")).expect("reading this program");
    entry(&mut out, "init", 0o100_755, &this);
    entry(&mut out, "agent", 0o100_755, &std::fs::read(agent()).expect("reading the agent"));
    entry(&mut out, "rootfs/bin/busybox", 0o100_755, &busybox);
    entry(
        &mut out,
        "rootfs/etc/passwd",
        0o100_644,
        b"root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    );
    entry(&mut out, "rootfs/bin/noexec", 0o100_644, b"#!/bin/sh\n");
    entry(&mut out, "rootfs/bin/badinterp", 0o100_755, b"#!/bin/nonexistent\n");
    for applet in [
        "sh",
        "echo",
        "cat",
        "sleep",
        "seq",
        "true",
        "id",
        "env",
        "pwd",
        "hostname",
        "ls",
        "grep",
        "stty",
        "dd",
        "head",
        "sha256sum",
        "mount",
        "tail",
        "wc",
        "yes",
        "kill",
        "mknod",
        "ulimit",
        "touch",
        "tr",
        "cut",
        "chmod",
        "tty",
        "ps",
        "mkdir",
    ] {
        entry(&mut out, &format!("rootfs/bin/{applet}"), 0o120_777, b"busybox");
    }
    entry(&mut out, "TRAILER!!!", 0, &[]);
    out
}

/// The agent that cargo built for this test, or the one to measure.
fn agent() -> std::path::PathBuf {
    std::env::var_os("STOCKADE_TEST_AGENT")
        .unwrap_or_else(|| env!("CARGO_BIN_EXE_stockade-agent").into())
        .into()
}

fn entry(out: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let inode = out.len() as u32 + 1;
    let links = if mode & 0o170_000 == 0o40_000 { 2 } else { 1 };
    let fields = [inode, mode, 0, 0, links, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(4), 0);
}
