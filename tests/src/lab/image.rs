//! Builds the lab's image: the host's kernel, the modules its initrd needs, and its root file system.
//!
//! Everything comes from Debian's archive by apt and mmdebstrap. The result is a cache entry whose name is
//! the hash of [`recipe`]; what Debian serves under that recipe changes with security updates, which do not
//! make a new entry: versions are written to `manifest.json` in it instead.

use super::cache;
use super::steps::{Step, Steps};
use super::{LabError, io_error};
use sha2::{Digest, Sha256};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Raise this when the steps below change what they make.
const RECIPE: u32 = 2;

/// Names another of [`SUITES`] than the first.
const SUITE: &str = "STOCKADE_LAB_SUITE";

/// The suites of Debian that the lab's root can be of, and what each needs beyond [`PACKAGES`]: later ones have newer
/// callers. The host's kernel is the first one's in all of them.
const SUITES: [(&str, &str); 3] = [("bookworm", ""), ("trixie", ",docker-cli"), ("sid", ",docker-cli")];

/// Packages of the lab's root beyond Debian's minbase: the runtimes that stockade is compared with, what calls a
/// runtime and what makes its images and networks, and what the suites look at a host with.
const PACKAGES: &str = "runc,crun,busybox-static,procps,psmisc,util-linux,systemd,dbus,iproute2,iptables,kmod,strace,socat,jq,python3-minimal,\
    containerd,docker.io,podman,conmon,catatonit,netavark,aardvark-dns,containernetworking-plugins,\
    buildah,skopeo,umoci,docker-registry,bats,\
    iputils-ping,iperf3,dnsmasq-base,curl,ethtool,tcpdump,nftables,fio,erofs-utils,attr";

/// Debian's cloud kernel as apt names it; the newest that there is gets taken.
const KERNEL: &str = r"^linux-image-6\.12\.[0-9]+\+deb12-cloud-amd64-unsigned$";

/// Modules that are left out: drivers of real hardware, and file systems of other machines.
const UNWANTED: &[&str] = &[
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/infiniband",
    "drivers/comedi",
    "drivers/hid",
    "drivers/scsi",
    "drivers/target",
    "drivers/nvme",
    "drivers/ata",
    "drivers/gpu",
    "drivers/xen",
    "drivers/thermal",
    "drivers/input",
    "drivers/usb",
    "net/ceph",
    "net/sunrpc",
    "net/smc",
    "net/rds",
    "net/tipc",
    "net/sctp",
    "fs/ceph",
    "fs/nfs",
    "fs/nfsd",
    "fs/smb",
    "fs/ocfs2",
    "fs/gfs2",
    "fs/jfs",
    "fs/xfs",
    "fs/btrfs",
    "fs/f2fs",
    "fs/afs",
    "fs/udf",
];

/// What the initrd loads, with all that these depend on: the root's disk and the reason for the lab.
const BOOT_MODULES: [&str; 2] = ["virtio_blk", "kvm-amd"];

/// Folders of the roots that no test reads: their pages would only fill the image.
const BALLAST: [&str; 5] =
    ["usr/share/doc", "usr/share/locale", "usr/share/man", "usr/share/info", "var/cache/apt"];

/// A finished image: a folder with `vmlinux`, `modules/` and `root.ext4`.
#[derive(Debug, Clone)]
pub struct Image {
    /// The cache entry.
    pub folder: PathBuf,
}

impl Image {
    pub(super) fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinux")
    }

    pub(super) fn modules(&self) -> PathBuf {
        self.folder.join("modules")
    }

    pub(super) fn root(&self) -> PathBuf {
        self.folder.join("root.ext4")
    }
}

/// The suite that is asked for: its name, and what it needs beyond [`PACKAGES`].
fn suite(asked: Option<&str>) -> Result<(&'static str, &'static str), LabError> {
    let [first, ..] = SUITES;
    let Some(asked) = asked.filter(|asked| !asked.is_empty()) else { return Ok(first) };
    SUITES.into_iter().find(|(name, _)| *name == asked).ok_or_else(|| LabError::Suite {
        asked: asked.into(),
        known: SUITES.map(|(name, _)| name).join(", "),
    })
}

/// Everything that decides what the image is.
fn recipe(suite: &str, more: &str) -> String {
    format!("{RECIPE}\n{suite}\n{PACKAGES}{more}\n{KERNEL}\n{UNWANTED:?}\n{BOOT_MODULES:?}\n{BALLAST:?}\n")
}

/// The image, from the cache or made now (about a minute and a half on two cores).
pub fn ensure() -> Result<Image, LabError> {
    let (suite, more) = suite(std::env::var(SUITE).ok().as_deref())?;
    let hash = Sha256::digest(recipe(suite, more));
    let hash: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    // Each suite is a kind of its own, so that its entries are not in the way of the others'.
    let kind = if suite == SUITES[0].0 { "lab".into() } else { format!("{suite}-lab") };
    cache::entry(&kind, &hash, |work| build(work, suite, more)).map(|folder| Image { folder })
}

fn build(work: &Path, suite: &str, more: &str) -> Result<(), LabError> {
    // Seconds that each step takes on a two-core machine; the estimate follows the ones that are done.
    let mut steps = Steps::new("lab image", work, &[5, 60, 15, 3, 5]);
    let kernel = steps.run("fetch the host's kernel", |step| fetch_kernel(work, step))?;
    let (root, bundle) = (work.join("root"), work.join("debian"));
    steps.run("unpack the host's root and a Debian root for bundles", |step| {
        step.commands(vec![
            mmdebstrap(suite, &format!("{PACKAGES}{more}"), &root),
            mmdebstrap(suite, "", &bundle),
        ])
    })?;
    let version = steps.run("unpack the kernel and its modules", |step| {
        let unpacked = work.join("kernel");
        step.command(Command::new("dpkg").arg("-x").arg(&kernel).arg(&unpacked))?;
        unpack_kernel(&unpacked, &root, work, step)
    })?;
    steps.run("lay out the bundles", |_| {
        let place = root.join("bundles/debian/rootfs");
        fs::create_dir_all(root.join("bundles/debian")).map_err(io_error("make the bundles"))?;
        for tree in [&root, &bundle] {
            for name in BALLAST {
                let _ = fs::remove_dir_all(tree.join(name));
            }
        }
        fs::rename(&bundle, place).map_err(io_error("move the Debian root to its bundle"))?;
        busybox_bundle(&root).map_err(io_error("make the busybox bundle"))?;
        for (file, content) in [
            ("etc/resolv.conf", ""),
            ("etc/hostname", "stockade-lab\n"),
            ("etc/hosts", "127.0.0.1 localhost stockade-lab\n"),
        ] {
            let _ = fs::remove_file(root.join(file));
            fs::write(root.join(file), content).map_err(io_error("write the root's /etc"))?;
        }
        Ok(())
    })?;
    steps.run("make the root's disk image", |step| {
        step.command(
            Command::new("/sbin/mke2fs")
                .args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-L", "lab", "-d"])
                .args([&root, &work.join("root.ext4")])
                .arg("8G"),
        )
    })?;
    let manifest = serde_json::json!({ "recipe": recipe(suite, more), "kernel": version });
    fs::write(work.join("manifest.json"), format!("{manifest:#}\n"))
        .map_err(io_error("write the manifest"))?;
    for scrap in ["root", "kernel"] {
        fs::remove_dir_all(work.join(scrap)).map_err(io_error("clear the lab's build"))?;
    }
    let _ = fs::remove_file(kernel);
    steps.done();
    Ok(())
}

fn mmdebstrap(suite: &str, include: &str, to: &Path) -> Command {
    let mut command = Command::new("mmdebstrap");
    command.arg("--variant=minbase");
    // Signed it is, but sid's index says itself when it is stale, and a mirror that has stood still serves it all the same.
    command.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
    if !include.is_empty() {
        command.arg(format!("--include={include}"));
    }
    command.arg(suite).arg(to);
    command
}

/// Downloads the newest kernel package to `work` and returns its path.
fn fetch_kernel(work: &Path, step: &mut Step) -> Result<PathBuf, LabError> {
    let mut name = newest_kernel()?;
    if name.is_none() {
        step.command(Command::new("apt-get").args(["-q", "update"]))?;
        name = newest_kernel()?;
    }
    let name = name.ok_or_else(|| LabError::Step {
        step: "find the host's kernel".into(),
        log: format!(
            "apt knows no package {KERNEL}; are the bookworm and bookworm-security archives set up?"
        ),
    })?;
    step.command(Command::new("apt-get").args(["-q", "download", &name]).current_dir(work))?;
    let found = fs::read_dir(work).map_err(io_error("list the download"))?;
    found
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| LabError::Step { step: format!("download {name}"), log: "apt left no .deb".into() })
}

fn newest_kernel() -> Result<Option<String>, LabError> {
    let output = Command::new("apt-cache")
        .args(["search", "--names-only", KERNEL])
        .output()
        .map_err(io_error("run apt-cache"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let patch = |name: &&str| -> Option<u32> { name.split(['.', '+']).nth(2)?.parse().ok() };
    Ok(text.lines().filter_map(|line| line.split(' ').next()).max_by_key(patch).map(String::from))
}

/// From the unpacked package to `vmlinux`, the root's /lib/modules and the initrd's modules.
fn unpack_kernel(unpacked: &Path, root: &Path, work: &Path, step: &mut Step) -> Result<String, LabError> {
    let fail = || io_error("lay out the host's kernel");
    let from = unpacked.join("lib/modules");
    let version = fs::read_dir(&from)
        .map_err(fail())?
        .flatten()
        .find_map(|entry| entry.file_name().into_string().ok())
        .ok_or_else(|| LabError::Step { step: "unpack the kernel".into(), log: "no modules in it".into() })?;
    extract_vmlinux(&unpacked.join(format!("boot/vmlinuz-{version}")), &work.join("vmlinux"), step)?;

    let modules = from.join(&version);
    for unwanted in UNWANTED {
        let _ = fs::remove_dir_all(modules.join("kernel").join(unwanted));
    }
    // Decompressing them in the emulator at each load would cost far more than room on the disk. The type
    // information is for BPF programs that look into modules; parsing it is half of the time to load kvm.
    for script in [
        "find . -name '*.xz' -print0 | xargs -0 -P2 -n64 xz -d",
        "find . -name '*.ko' -print0 | xargs -0 -P2 -n1 objcopy -R .BTF",
    ] {
        step.command(Command::new("sh").arg("-c").arg(script).current_dir(&modules))?;
    }
    let to = root.join("usr/lib/modules");
    fs::create_dir_all(&to).map_err(fail())?;
    fs::rename(&modules, to.join(&version)).map_err(fail())?;
    step.command(Command::new("depmod").arg("-b").arg(root).arg(&version))?;

    let boot = work.join("modules");
    fs::create_dir_all(&boot).map_err(fail())?;
    let mut count = 0;
    for module in BOOT_MODULES {
        let output = Command::new("modprobe")
            .arg("-d")
            .arg(root)
            .args(["-S", &version, "--show-depends", module])
            .output()
            .map_err(io_error("run modprobe"))?;
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let Some(path) = line.strip_prefix("insmod ").map(str::trim) else { continue };
            let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy().into_owned();
            fs::copy(path, boot.join(format!("{count:02}-{name}"))).map_err(fail())?;
            count += 1;
        }
    }
    Ok(version)
}

/// Takes the ELF out of the bzImage, so that the emulator need not decompress it at each boot.
/// Documentation/arch/x86/boot.rst: setup_sects at 0x1f1, payload_offset at 0x248, payload_length at 0x24c.
fn extract_vmlinux(bzimage: &Path, to: &Path, step: &mut Step) -> Result<(), LabError> {
    let image = fs::read(bzimage).map_err(io_error("read the host's kernel"))?;
    let word = |at: usize| image.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let payload = || {
        let setup = (usize::from(*image.get(0x1f1)?) + 1) * 512;
        let start = setup + word(0x248)? as usize;
        // The last four bytes are the unpacked size, which zstd does not expect.
        image.get(start..start + (word(0x24c)? as usize).checked_sub(4)?)
    };
    let broken = |log: &str| LabError::Step { step: "extract the host's vmlinux".into(), log: log.into() };
    let payload = payload().ok_or_else(|| broken("the bzImage's header points outside of it"))?;
    if !payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        return Err(broken("the kernel is not compressed by zstd"));
    }
    let packed = to.with_extension("zst");
    fs::write(&packed, payload).map_err(io_error("write the host's kernel"))?;
    step.command(Command::new("zstd").args(["-q", "-d", "--rm", "-f"]).arg(&packed).arg("-o").arg(to))
}

/// A root with nothing but busybox, its applets as links.
fn busybox_bundle(root: &Path) -> std::io::Result<()> {
    let bundle = root.join("bundles/busybox/rootfs");
    for folder in ["bin", "dev", "etc", "proc", "root", "sys", "tmp", "usr", "var"] {
        fs::create_dir_all(bundle.join(folder))?;
    }
    let busybox = ["usr/bin/busybox", "bin/busybox"]
        .map(|path| root.join(path))
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| std::io::Error::other("no busybox in the lab's root"))?;
    fs::copy(&busybox, bundle.join("bin/busybox"))?;
    let applets = Command::new(&busybox).arg("--list").output()?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|name| *name != "busybox") {
        symlink("busybox", bundle.join("bin").join(applet))?;
    }
    for folder in ["sbin", "usr/bin", "usr/sbin"] {
        symlink(if folder.starts_with("usr") { "../bin" } else { "bin" }, bundle.join(folder))?;
    }
    fs::write(
        bundle.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    )?;
    fs::write(bundle.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_suite_is_taken_unless_another_is_asked_for_and_an_unknown_one_is_named() {
        assert_eq!(suite(None).unwrap().0, "bookworm");
        assert_eq!(suite(Some("")).unwrap().0, "bookworm");
        assert_eq!(suite(Some("sid")).unwrap().0, "sid");
        let error = suite(Some("potato")).unwrap_err().to_string();
        assert!(error.contains("potato") && error.contains("bookworm, trixie, sid"), "{error}");
    }
}
