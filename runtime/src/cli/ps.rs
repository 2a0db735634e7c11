//! `stockade ps`: the container's processes. Their pids are those of the guest.

use super::list::columns;
use super::{Error, Global, Outcome, ask, open, print, stopped};
use crate::sandbox::control::{ProcessInfo, Request, read_attachment};

pub fn ps(global: &Global, args: liboci_cli::Ps) -> Outcome {
    if !args.ps_options.is_empty() {
        return Err(Error::Usage(
            "options for ps(1) cannot be honoured: the container's processes are in a VM, where ps(1) does not reach"
                .into(),
        ));
    }
    let (dir, state) = open(global, &args.container_id)?;
    let (_, fds) = ask(&dir, &Request::Processes)?.ok_or_else(|| stopped("container not running", &state))?;
    let bytes = read_attachment(fds).map_err(Error::io("read the list of processes"))?;
    let list: Vec<ProcessInfo> = serde_json::from_slice(&bytes)
        .map_err(|e| Error::Io("read the list of processes".into(), e.into()))?;
    match args.format.as_str() {
        "table" => print(&table(&list)),
        "json" => {
            let pids: Vec<u32> = list.iter().map(|process| process.pid).collect();
            let text =
                serde_json::to_string(&pids).map_err(|e| Error::Io("show the list".into(), e.into()))?;
            print(&(text + "\n"))
        }
        other => Err(Error::Usage(format!("--format {other:?} is not known: it is table or json"))),
    }
}

fn table(list: &[ProcessInfo]) -> String {
    let mut rows = vec![["UID", "PID", "PPID", "TTY", "TIME", "CMD"].map(String::from)];
    rows.extend(list.iter().map(|process| {
        let seconds = process.cpu_ns / 1_000_000_000;
        [
            process.uid.to_string(),
            process.pid.to_string(),
            process.ppid.to_string(),
            if process.tty.is_empty() { "?".into() } else { printable(&process.tty) },
            format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60),
            printable(&process.command),
        ]
    }));
    columns(&rows)
}

/// Names are the workload's: no control character of it reaches a terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_a_line_whatever_its_name() {
        let process = ProcessInfo {
            pid: 7,
            ppid: 1,
            uid: 0,
            cpu_ns: 3_725_000_000_000,
            started: 0,
            tty: String::new(),
            command: "sh\n\x1b[2J".into(),
        };
        let text = table(&[process]);
        assert_eq!(text.lines().count(), 2);
        assert!(text.contains("01:02:05") && text.contains("sh??[2J"));
    }
}
