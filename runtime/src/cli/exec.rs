//! `stockade exec`: a further process in a container that runs.

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use oci_spec::runtime::{Capability, Process};

use super::{Announce, Error, Global, Outcome, open, refuse_descriptors, stopped};
use crate::bundle;
use crate::sandbox::control::Conversation;
use crate::sandbox::{attach, launch, pidfd};
use crate::state::{State, Status};

/// Run a further process in a container
#[derive(Args)]
#[group(skip)]
pub struct Exec {
    #[command(flatten)]
    common: liboci_cli::Exec,
    /// Unix socket that gets a pidfd of the exec's host process
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
}

pub fn exec(global: &Global, args: Exec) -> Outcome {
    // A code that few workloads have: callers tell by it that it was not the workload's.
    exec_or_fail(global, args).map_err(|e| Error::Exec(Box::new(e)))
}

fn exec_or_fail(global: &Global, args: Exec) -> Outcome {
    let Exec { common: args, pidfd_socket } = args;
    refuse_descriptors(args.preserve_fds)?;
    let cgroup = args.cgroup.clone().unwrap_or_default();
    if Path::new(&cgroup).components().any(|part| part == Component::ParentDir) {
        return Err(Error::Usage(format!("--cgroup: {cgroup} is not a sub cgroup path")));
    }
    let (dir, state) = open(global, &args.container_id)?;
    if state.status() == Status::Stopped {
        return Err(stopped("cannot exec in a stopped container", &state));
    }
    let process = process(&state, &args)?;
    bundle::check_process(&process)?;
    let terminal = process.terminal().unwrap_or(false);
    attach::check_terminal(terminal, args.detach, args.console_socket.as_deref())
        .map_err(|e| Error::Usage(e.into()))?;
    let exec = attach::Exec {
        process: serde_json::to_vec(&process)
            .map_err(|e| Error::Io("encode the process".into(), e.into()))?,
        terminal,
        console_socket: args.console_socket.as_deref(),
        detach: args.detach,
        ignore_paused: args.ignore_paused,
        cgroup,
    };
    let talk = Conversation::connect(&dir).map_err(Error::io("reach the container's supervisor"))?;
    let announce = Announce { pid_file: args.pid_file, pidfd_socket };
    let announce = || announce.process(pidfd::Kind::Exec);
    if args.detach {
        launch::leave_behind(|ready| attach::exec(talk, exec, || announce().and_then(|()| ready())))?;
        return Ok(ExitCode::SUCCESS);
    }
    let exit = attach::exec(talk, exec, announce)?;
    Ok(ExitCode::from(exit.code))
}

/// The process to run: a file's, or the container's own with what the flags change.
fn process(state: &State, args: &liboci_cli::Exec) -> Result<Process, Error> {
    let mut process = match &args.process {
        Some(path) => {
            let text = fs::read(path).map_err(Error::io(format!("read {}", path.display())))?;
            let mut process = bundle::parse_process(&text)
                .map_err(|e| Error::Usage(format!("{} is not a valid process: {e}", path.display())))?;
            // A bundle that is gone by now has nothing to add.
            if let Some(own) = bundle::read_spec(&state.bundle).ok().and_then(|spec| spec.process().clone()) {
                inherit(&mut process, &own);
            }
            return Ok(process);
        }
        None => bundle::read_spec(&state.bundle)?.process().clone().unwrap_or_default(),
    };
    if args.command.is_empty() {
        return Err(Error::Usage("exec needs a program to run, or --process".into()));
    }
    process.set_args(Some(args.command.clone())).set_terminal(Some(args.tty));
    process.set_console_size(None);
    if let Some(cwd) = &args.cwd {
        process.set_cwd(cwd.clone());
    }
    let env = process.env_mut().get_or_insert_default();
    for (name, value) in &args.env {
        env.retain(|entry| entry.split_once('=').is_none_or(|(n, _)| n != name));
        env.push(format!("{name}={value}"));
    }
    if let Some((uid, gid)) = args.user {
        let user = process.user_mut();
        user.set_uid(uid);
        if let Some(gid) = gid {
            user.set_gid(gid);
        }
    }
    if !args.additional_gids.is_empty() {
        process.user_mut().additional_gids_mut().get_or_insert_default().extend(&args.additional_gids);
    }
    if args.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(profile) = &args.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    if let Some(label) = &args.process_label {
        process.set_selinux_label(Some(label.clone()));
    }
    add_capabilities(&mut process, &args.cap)?;
    Ok(process)
}

/// What a file leaves out is the container's own, as in runc.
fn inherit(process: &mut Process, own: &Process) {
    if process.capabilities().is_none() {
        process.set_capabilities(own.capabilities().clone());
    }
    if process.rlimits().is_none() {
        process.set_rlimits(own.rlimits().clone());
    }
    if process.io_priority().is_none() {
        process.set_io_priority(*own.io_priority());
    }
    if process.scheduler().is_none() {
        process.set_scheduler(own.scheduler().clone());
    }
    if process.exec_cpu_affinity().is_none() {
        process.set_exec_cpu_affinity(own.exec_cpu_affinity().clone());
    }
}

/// `--cap` adds to the bounding, effective and permitted sets.
fn add_capabilities(process: &mut Process, names: &[String]) -> Result<(), Error> {
    if names.is_empty() {
        return Ok(());
    }
    let mut sets = process.capabilities().clone().unwrap_or_default();
    for name in names {
        let capability: Capability = serde_json::from_value(name.as_str().into()).map_err(|_| {
            Error::Usage(format!("unknown capability {name:?}: give a name such as CAP_KILL"))
        })?;
        let with = |set: &Option<std::collections::HashSet<Capability>>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(capability);
            Some(set)
        };
        let (bounding, effective, permitted) =
            (with(sets.bounding()), with(sets.effective()), with(sets.permitted()));
        sets.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
    }
    process.set_capabilities(Some(sets));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::tests::bundle;
    use crate::process::ProcessId;
    use clap::{FromArgMatches, Subcommand};
    use serde_json::json;

    fn parsed(flags: &str) -> liboci_cli::Exec {
        let line = format!("exec {flags}");
        let command = liboci_cli::CommonCmd::augment_subcommands(clap::Command::new("stockade"));
        let matches = command.get_matches_from(std::iter::once("stockade").chain(line.split_whitespace()));
        match liboci_cli::CommonCmd::from_arg_matches(&matches).unwrap() {
            liboci_cli::CommonCmd::Exec(args) => args,
            _ => panic!("not exec"),
        }
    }

    fn state(bundle: &bundle::Bundle) -> State {
        State {
            oci_version: "1.0.2".into(),
            id: "c".into(),
            status: Status::Running,
            supervisor: ProcessId::current().unwrap(),
            vmm: None,
            sandbox: None,
            bundle: bundle.path.clone(),
            rootfs: bundle.rootfs.clone(),
            created: String::new(),
            owner: 0,
            annotations: Default::default(),
            error: None,
            cgroup: None,
            resources: Default::default(),
            vm: crate::size::VmSize { vcpus: 1, memory: 256 << 20 },
            network: None,
            scratch: None,
            poststop: Vec::new(),
        }
    }

    #[test]
    fn flags_change_the_containers_own_process() {
        let (_dir, bundle) = bundle(json!({"process": {"env": ["A=1", "B=2"]}}));
        let state = state(&bundle.unwrap());
        let flags = "-t -e B=3 -e C=4=5 -u 1000:100 -g 7 --cwd /tmp --cap CAP_SYS_ADMIN ID ls -l";
        let process = process(&state, &parsed(flags)).unwrap();
        assert_eq!(process.args().as_ref().unwrap(), &["ls", "-l"]);
        assert_eq!(process.env().as_ref().unwrap(), &["A=1", "B=3", "C=4=5"]);
        assert_eq!((process.user().uid(), process.user().gid()), (1000, 100));
        assert_eq!(process.user().additional_gids().as_ref().unwrap(), &[7]);
        assert_eq!(process.terminal(), Some(true));
        let sets = process.capabilities().as_ref().unwrap();
        assert!(sets.effective().as_ref().unwrap().contains(&Capability::SysAdmin));
        assert!(super::process(&state, &parsed("ID")).is_err());
        assert!(super::process(&state, &parsed("--cap CAP_NONE ID ls")).is_err());
    }

    #[test]
    fn a_process_file_is_taken_with_what_the_container_has_besides() {
        let (dir, bundle) = bundle(json!({"process": {
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}],
            "capabilities": {"bounding": ["CAP_KILL"]},
            "execCPUAffinity": {"initial": "0"},
            "env": ["A=1"],
        }}));
        let state = state(&bundle.unwrap());
        let path = dir.path().join("process.json");
        fs::write(&path, r#"{"args": ["id"], "cwd": "/", "user": {"uid": 5, "gid": 6}}"#).unwrap();
        let flags = format!("--process {} ID", path.display());
        let process = process(&state, &parsed(&flags)).unwrap();
        assert_eq!(process.args().as_ref().unwrap(), &["id"]);
        assert_eq!(process.user().uid(), 5);
        assert_eq!(process.rlimits().as_ref().unwrap()[0].soft(), 5);
        assert!(
            process.capabilities().as_ref().unwrap().bounding().as_ref().unwrap().contains(&Capability::Kill)
        );
        assert_eq!(process.exec_cpu_affinity().as_ref().unwrap().initial().as_deref(), Some("0"));
        assert_eq!(process.env(), &None);
        // Go's zero values.
        fs::write(&path, r#"{"args": ["id"], "cwd": "/"}"#).unwrap();
        let process = super::process(&state, &parsed(&flags)).unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (0, 0));
        fs::write(&path, "{").unwrap();
        assert!(super::process(&state, &parsed(&flags)).unwrap_err().to_string().contains("line"));
    }
}
