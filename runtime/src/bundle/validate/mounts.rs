//! Checks of `mounts`.

use std::fs;
use std::path::Path;

use oci_spec::runtime::{Capability, Linux, Mount, Spec};

use super::{unsupported, value};
use crate::bundle::idmap::{self, IdMap};
use crate::bundle::pod::leads_across;
use crate::bundle::{Error, MOUNT_OPTIONS};

/// File systems that the guest's kernel mounts by itself. Of others the source would be looked for in the guest, or it
/// has them not.
const FILE_SYSTEMS: [&str; 10] =
    ["proc", "sysfs", "tmpfs", "ramfs", "devpts", "mqueue", "cgroup", "cgroup2", "bpf", "devtmpfs"];

/// Whether a mount makes something of the host visible, and not a file system of its own.
pub fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

/// Whether a mount is an overlay of directories, which are the host's.
pub fn is_overlay(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("overlay") && !is_bind(mount)
}

pub(super) fn check_mount(
    index: usize,
    mount: &Mount,
    linux: Option<&Linux>,
    can_mount: bool,
) -> Result<(), Error> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    if mount.destination().as_os_str().is_empty() {
        return value(&field("destination"), "", "give a path in the container");
    }
    if is_bind(mount) {
        IdMap::of(index, mount, linux)?;
        if mount.source().as_ref().is_none_or(|source| source.as_os_str().is_empty()) {
            return value(&field("source"), "", "a bind mount needs a source");
        }
        return check_bind_options(&field("options"), mount, can_mount);
    }
    if idmap::is_asked_for(mount) {
        return unsupported(
            &field("uidMappings"),
            "only bind mounts are id-mapped, a new file system has no files of others; remove it, and idmap",
        );
    }
    if mount.options().iter().flatten().any(|option| option == "remount") {
        return unsupported(
            &field("options"),
            "there is nothing to remount; mount it with the options it is to have",
        );
    }
    match mount.typ().as_deref() {
        Some("overlay") => check_overlay_options(&field("options"), mount, can_mount),
        Some(typ) if FILE_SYSTEMS.contains(&typ) => Ok(()),
        Some(typ) => value(
            &field("type"),
            typ,
            "the guest cannot mount it: mount it on the host and name it as a bind mount",
        ),
        None => value(&field("type"), "", "name a file system, or \"bind\""),
    }
}

/// Whether the container can mount something that others could see: a mount made in a user namespace of its own is not
/// passed on.
pub(super) fn can_mount(spec: &Spec) -> bool {
    let capabilities = spec.process().as_ref().and_then(|process| process.capabilities().as_ref());
    let bounding = capabilities.and_then(|sets| sets.bounding().as_ref());
    bounding.is_some_and(|set| set.contains(&Capability::SysAdmin))
}

/// What is left aside without a word may be what was to protect.
fn check_bind_options(field: &str, mount: &Mount, can_mount: bool) -> Result<(), Error> {
    for option in mount.options().iter().flatten() {
        check_propagation(field, option, can_mount)?;
        match option.as_str() {
            "remount" => {
                return unsupported(
                    field,
                    "there is nothing to remount; bind it with the options it is to have",
                );
            }
            "shared" | "rshared" | "defaults" | "bind" | "rbind" | "copy" | "nocopy" => {}
            known if MOUNT_OPTIONS.contains(&known) => {}
            ids if idmap::is_option(ids) => {}
            unknown => return value(field, unknown, "no bind mount has this option; remove it"),
        }
    }
    Ok(())
}

/// The host mounts it; what the kernel does not know, it refuses then.
fn check_overlay_options(field: &str, mount: &Mount, can_mount: bool) -> Result<(), Error> {
    let options = mount.options().iter().flatten();
    options.clone().try_for_each(|option| check_propagation(field, option, can_mount))?;
    match options.clone().flat_map(|option| option.split(',')).any(|word| word.starts_with("lowerdir=")) {
        true => Ok(()),
        false => value(field, "", "an overlay needs lowerdir="),
    }
}

fn check_propagation(field: &str, option: &str, can_mount: bool) -> Result<(), Error> {
    match option {
        "shared" | "rshared" if can_mount => unsupported(
            field,
            "mounts that the container makes with CAP_SYS_ADMIN cannot appear on the host; use rslave",
        ),
        _ => Ok(()),
    }
}

/// Checks that what shows the kernel is mounted where the bundle says: an image whose /proc is a link would have what
/// is masked and read-only there somewhere else.
pub fn check_kernel_mount_points(spec: &Spec, rootfs: &Path) -> Result<(), Error> {
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        let destination = mount.destination();
        let place = rootfs.join(destination.strip_prefix("/").unwrap_or(destination));
        if matches!(mount.typ().as_deref(), Some("proc" | "sysfs"))
            && !is_bind(mount)
            && fs::symlink_metadata(place).is_ok_and(|found| !found.is_dir())
        {
            return value(
                &format!("mounts[{index}].destination"),
                &destination.to_string_lossy(),
                "a file system of this type must be mounted on ordinary directory",
            );
        }
    }
    Ok(())
}

/// Checks that what is to be bound exists.
pub fn check_mount_sources(spec: &Spec, bundle: &Path) -> Result<(), Error> {
    for (index, mount) in spec.mounts().iter().flatten().enumerate().filter(|(_, m)| is_bind(m)) {
        let path = bundle.join(mount.source().as_deref().unwrap_or(Path::new("")));
        fs::metadata(&path).map_err(|source| Error::Path {
            field: format!("mounts[{index}].source"),
            path: path.clone(),
            source,
        })?;
        if !leads_across(&path) {
            return unsupported(
                &format!("mounts[{index}].source {}", path.display()),
                "a socket, pipe or device of the host does not lead into a VM; mount a file or a directory",
            );
        }
    }
    Ok(())
}
