//! runc's suite. What its helper programs do is done by programs of our own, and the root file systems that it would
//! download are the lab's.

use super::source::Source;
use super::suite::{LaidOut, Suite};
use super::{Context, PAYLOAD, WORK, cover_usr, recvtty, sh};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// It.
pub const SUITE: Suite = Suite {
    name: "runc",
    source: Source {
        package: "runc",
        // The suite, and what it calls of the helpers' folders.
        folders: &["tests/integration", "contrib/cmd"],
        // Of the packages that Debian's own run of the suite asks for; two of its cases compile something.
        tools: "gcc,libc6-dev,gawk",
        kind: "conformance",
    },
    kept: (include_str!("../../conformance/runc.md"), "tests/conformance/runc.md"),
    waits_for: None,
    // Some cases wait for 10 s or more where nothing is emulated, and take up to 40 s in the lab.
    stalled: Duration::from_secs(150),
    // On two cores stockade needs a third of it.
    limit: Duration::from_secs(3 * 3600),
    environment: &[],
    lay_out,
};

/// The same, but systemd makes the cgroups.
pub const WITH_SYSTEMD: Suite =
    Suite { name: "runc-systemd", environment: &[("RUNC_USE_SYSTEMD", "yes")], ..SUITE };

/// What starts and stops a slice for its cases.
const SD_HELPER: &str = "#!/bin/sh\n# --parent SLICE start|stop NAME\nexec systemctl \"$3\" \"$4\"\n";

/// Puts the suite where it can write, with its root file systems, its receiver of terminals, and a C compiler on PATH.
fn lay_out(runtime: &Path) -> Result<LaidOut, String> {
    let folder = Path::new(WORK).join("tests/integration");
    let tools = Path::new(WORK).join("contrib/cmd/recvtty");
    let exe = std::env::current_exe().or_say("find this executable")?;
    sh(&format!("cp -a {PAYLOAD}/suite {WORK}"))?;
    // As images are: with nothing in /dev, and busybox's without the places that runtimes mount on.
    for (name, left_out) in [("busybox", "--exclude ./proc --exclude ./sys"), ("debian", "")] {
        let rootfs = format!("/bundles/{name}/rootfs");
        sh(&format!("tar -C {rootfs} --exclude './dev/*' {left_out} -cf {WORK}/{name}.tar ."))?;
    }
    let images =
        format!("#!/bin/sh\necho BUSYBOX_IMAGE={WORK}/busybox.tar\necho DEBIAN_IMAGE={WORK}/debian.tar\n");
    fs::write(folder.join("get-images.sh"), images).or_say("write the images' places")?;
    sh(&format!("mkdir -p {0} && ln -s {1} {0}/{2}", tools.display(), exe.display(), recvtty::NAME))?;
    let helper = Path::new(WORK).join("contrib/cmd/sd-helper");
    fs::create_dir_all(&helper).or_say(helper.display())?;
    fs::write(helper.join("sd-helper"), SD_HELPER).or_say("write the slices' helper")?;
    sh(&format!("chmod 755 {}/sd-helper", helper.display()))?;
    // Cases ask for block devices, and look for what cgroups can do in one that is not the root.
    // With systemd runc warns of a device that is not there, in the middle of what cases read.
    sh("modprobe -a loop bfq tun; mkdir /sys/fs/cgroup/conformance")?;
    cover_usr()?;
    Ok(LaidOut { folder, environment: vec![("RUNC", runtime.into())] })
}
