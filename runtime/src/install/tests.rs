use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::*;

/// A host with these engines, and something to install.
fn host(engines: &[&str]) -> (TempDir, Layout, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (host, from) = (dir.path().join("host"), dir.path().join("from"));
    fs::create_dir_all(&from).unwrap();
    fs::create_dir_all(host.join("etc")).unwrap();
    for engine in engines {
        fs::create_dir(host.join("etc").join(engine)).unwrap();
    }
    for name in ["stockade", KERNEL, INITRD] {
        fs::write(from.join(name), name).unwrap();
    }
    let layout = Layout { host, prefix: "/opt/x".into() };
    (dir, layout, from.join("stockade"), from)
}

fn perform(steps: &[Step]) {
    for step in steps {
        if !step.is_done() {
            step.perform().unwrap_or_else(|e| panic!("{step}: {e}"));
        }
        assert!(step.is_done(), "{step}");
    }
}

fn files_below(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(
                files_below(&path)
                    .iter()
                    .map(|name| format!("{}/{name}", path.file_name().unwrap().display())),
            );
        } else {
            found.push(path.file_name().unwrap().display().to_string());
        }
    }
    found.sort();
    found
}

#[test]
fn a_host_gets_what_its_engines_need_and_loses_it_again() {
    let (_dir, layout, binary, guest) = host(&["containerd", "crio", "containers"]);
    let config = layout.host.join("etc/containerd/config.toml");
    fs::write(&config, "version = 2\n").unwrap();
    fs::set_permissions(&config, fs::Permissions::from_mode(0o600)).unwrap();
    perform(&install(&layout, &binary, &guest).unwrap());
    assert_eq!(
        files_below(&layout.host),
        [
            "etc/containerd/config.toml",
            "etc/containers/containers.conf.d/stockade.conf",
            "etc/crio/crio.conf.d/50-stockade.conf",
            "opt/x/bin/containerd-shim-stockade-v2",
            "opt/x/bin/stockade",
            "opt/x/lib/stockade/initrd.img",
            "opt/x/lib/stockade/vmlinux",
        ]
    );
    let mode = |path: &str| fs::metadata(layout.at(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("/opt/x/bin/stockade"), mode("/etc/containerd/config.toml")), (0o755, 0o600));
    let podman = fs::read_to_string(layout.at(Engine::Podman.file())).unwrap();
    assert!(podman.contains("stockade = [\"/opt/x/bin/stockade\"]"), "{podman}");
    for engine in [Engine::CriO, Engine::Podman] {
        fs::read_to_string(layout.at(engine.file())).unwrap().parse::<toml::Table>().unwrap();
    }

    // A second time there is nothing to do.
    assert!(install(&layout, &binary, &guest).unwrap().iter().all(Step::is_done));

    perform(&uninstall(&layout).unwrap());
    assert_eq!(files_below(&layout.host), ["etc/containerd/config.toml"]);
    assert_eq!(fs::read_to_string(&config).unwrap(), "version = 2\n");
    assert!(uninstall(&layout).unwrap().iter().all(Step::is_done));
}

#[test]
fn engines_that_are_not_there_get_nothing() {
    let (_dir, layout, binary, guest) = host(&[]);
    perform(&install(&layout, &binary, &guest).unwrap());
    assert!(files_below(&layout.host.join("etc")).is_empty());
    assert_eq!(Engine::found(&layout), []);
}

#[test]
fn a_configuration_that_was_made_is_removed_whole() {
    let (_dir, layout, binary, guest) = host(&["containerd"]);
    perform(&install(&layout, &binary, &guest).unwrap());
    assert!(layout.at(Engine::Containerd.file()).exists());
    perform(&uninstall(&layout).unwrap());
    assert!(!layout.at(Engine::Containerd.file()).exists());
}

#[test]
fn something_else_of_the_shims_name_stays() {
    let (_dir, layout, binary, guest) = host(&[]);
    let shim = layout.at(layout.shim());
    fs::create_dir_all(shim.parent().unwrap()).unwrap();
    fs::write(&shim, "another").unwrap();
    let steps = install(&layout, &binary, &guest).unwrap();
    let error = steps.iter().try_for_each(Step::perform).unwrap_err();
    assert!(matches!(error, Error::InTheWay(_)), "{error}");
    assert_eq!(fs::read_to_string(&shim).unwrap(), "another");
}
