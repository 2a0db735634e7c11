//! The lab's initrd: the running executable as `/init` and the modules that the host needs to find its root.
//!
//! It is made anew for each run (a few milliseconds), so that a change to the init never costs an image.
//! Format: newc cpio, Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.

use std::io::{self, Write};
use std::path::Path;

/// Writes the initrd: `init` becomes `/init`, the files of `modules` go to `/modules`.
pub(super) fn write(to: &Path, init: &Path, modules: &Path) -> io::Result<()> {
    let mut archive = io::BufWriter::new(std::fs::File::create(to)?);
    entry(&mut archive, "init", 0o100755, &std::fs::read(init)?)?;
    for folder in ["modules", "dev", "proc"] {
        entry(&mut archive, folder, 0o040755, &[])?;
    }
    // The kernel opens it as init's stdio before init can mount anything. 5:1, from devices.txt.
    device(&mut archive, "dev/console", 0o020600, (5, 1))?;
    for module in std::fs::read_dir(modules)? {
        let module = module?;
        let name = format!("modules/{}", module.file_name().to_string_lossy());
        entry(&mut archive, &name, 0o100644, &std::fs::read(module.path())?)?;
    }
    entry(&mut archive, "TRAILER!!!", 0, &[])?;
    archive.flush()
}

fn entry(archive: &mut impl Write, name: &str, mode: u32, body: &[u8]) -> io::Result<()> {
    write_entry(archive, name, mode, (0, 0), body)
}

fn device(archive: &mut impl Write, name: &str, mode: u32, number: (u32, u32)) -> io::Result<()> {
    write_entry(archive, name, mode, number, &[])
}

fn write_entry(
    archive: &mut impl Write,
    name: &str,
    mode: u32,
    (major, minor): (u32, u32),
    body: &[u8],
) -> io::Result<()> {
    let size = u32::try_from(body.len()).map_err(|_| io::Error::other(format!("{name} is over 4 GiB")))?;
    // inode, mode, uid, gid, links, mtime, size, device, device number, name length with NUL, checksum
    let fields = [0, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name.len() as u32 + 1, 0];
    let mut header = String::from("070701");
    for field in fields {
        header.push_str(&format!("{field:08x}"));
    }
    write!(archive, "{header}{name}\0")?;
    pad(archive, header.len() + name.len() + 1)?;
    archive.write_all(body)?;
    pad(archive, body.len())
}

/// Name and body end on a multiple of four bytes.
fn pad(archive: &mut impl Write, written: usize) -> io::Result<()> {
    let missing = written.next_multiple_of(4) - written;
    archive.write_all([0; 3].get(..missing).unwrap_or_default())
}
