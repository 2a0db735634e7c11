//! What a runtime can leave behind on a machine: processes, mounts, cgroups, files, interfaces. Taken before
//! and after; whatever is new has been left.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use libtest_mimic::Failed;

use super::Runtime;

/// One line for each thing there is, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// What there is now.
    pub fn now() -> Self {
        let mut found: BTreeSet<String> = runtime_processes().into_iter().collect();
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read mountinfo");
        found.extend(mounts.lines().filter_map(|line| {
            // Fields 1 and 5 of proc_pid_mountinfo(5): mount id and mount point.
            let mut fields = line.split(' ');
            let (id, at) = (fields.next()?, fields.nth(3)?);
            // Made by `ip netns`, once and for all; the namespaces in it are further mounts.
            (at != "/run/netns").then(|| format!("mount {at} ({id})"))
        }));
        tree(Path::new("/sys/fs/cgroup"), "cgroup", true, &mut found);
        tree(&Path::new("/run").join(Runtime::under_test().name()), "file", false, &mut found);
        for dir in ["/run", "/tmp", "/dev/shm", "/sys/class/net"] {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                // The runtime's own directory may stay once it has been made; what is in it may not. The others are
                // made by mount(8) and ip-netns(8), which cases use.
                let own = Path::new("/run").join(Runtime::under_test().name());
                let stays = [&own, Path::new("/run/mount"), Path::new("/run/netns"), Path::new(RECORDS)];
                if !stays.contains(&path.as_path()) {
                    found.insert(format!("file {}", path.display()));
                }
            }
        }
        Self(found)
    }

    /// What is there now and was not then.
    pub fn new_since(&self) -> Vec<String> {
        Self::now().0.difference(&self.0).cloned().collect()
    }

    /// Fails when there is anything that was not there then.
    pub fn assert_nothing_new(&self) -> Result<(), Failed> {
        let new = self.new_since();
        if new.is_empty() { Ok(()) } else { Err(format!("left behind:\n  {}", new.join("\n  ")).into()) }
    }
}

/// The host's records for `stockade metrics`: two files of 256 KiB at most, of no container's.
const RECORDS: &str = "/run/stockade-records";

/// The processes of the runtime under test, one line each. A zombie that waits for the machine's init to take
/// notice of it is not the runtime's any more.
pub fn runtime_processes() -> Vec<String> {
    let name = Runtime::under_test().name();
    let mut lines = Vec::new();
    for entry in fs::read_dir("/proc").expect("read /proc").flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        // Any of these may fail because the process has just ended.
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some((before, after)) = stat.rsplit_once(") ") else { continue };
        let comm = before.split_once('(').map_or("", |(_, comm)| comm);
        let mut fields = after.split(' ');
        let (state, parent) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let program = command.split(' ').next().and_then(|path| path.rsplit('/').next()).unwrap_or("");
        let ours = comm.starts_with(&name) || program.starts_with(&name);
        if ours && !(state == "Z" && parent == "1") {
            lines.push(format!("process {pid} {state} (parent {parent}) {comm}: {}", command.trim()));
        }
    }
    lines
}

/// Where each thread of the runtime's processes is now, one line each: for the report of what hangs.
pub fn runtime_threads() -> Vec<String> {
    let mut lines = Vec::new();
    for process in runtime_processes() {
        let pid = process.split(' ').nth(1).unwrap_or_default();
        lines.push(process.clone());
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let file = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let state = file("stat").rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            let [comm, place, call] = [file("comm"), file("wchan"), file("syscall")];
            let call: Vec<_> = call.split_whitespace().take(3).collect();
            lines.push(format!(
                "    thread {} {} {} in {place}, system call {}",
                task.file_name().to_string_lossy(),
                state.unwrap_or('?'),
                comm.trim(),
                call.join(" ")
            ));
            lines.extend(file("stack").lines().map(|function| format!("        {function}")));
        }
    }
    lines
}

/// Every directory, and every file too unless `only_directories`, below `dir`.
fn tree(dir: &Path, kind: &str, only_directories: bool, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_dir || !only_directories {
            found.insert(format!("{kind} {}", entry.path().display()));
        }
        if is_dir {
            tree(&entry.path(), kind, only_directories, found);
        }
    }
}
