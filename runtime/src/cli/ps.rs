//! `stockade ps`: the container's processes.
//!
//! The table is for people and has the guest's processes with their pids there. The list of numbers is for callers,
//! which look them up on the host, where they would find somebody else: it has the host's processes that the container
//! consists of.
//!
//! runc hands its options to the host's ps(1), which does not see into a VM; so the options that its callers use are
//! understood here, and others refused.

use std::fs;

use super::{Error, Global, Outcome, ask, open, print};
use crate::clock;
use crate::printable::is_shown;
use crate::sandbox::control::{ProcessInfo, Request, read_attachment};

/// What `ps -ef` shows.
const FULL: [Column; 8] = [
    Column::User,
    Column::Pid,
    Column::Ppid,
    Column::CpuPercent,
    Column::Started,
    Column::Tty,
    Column::Time,
    Column::Args,
];

/// What `ps x` shows.
const BSD: [Column; 5] = [Column::Pid, Column::Tty, Column::State, Column::Time, Column::Line];

/// What a process can be shown by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    User,
    Pid,
    Ppid,
    CpuPercent,
    Started,
    Elapsed,
    Tty,
    State,
    Time,
    Command,
    Args,
    /// The same under BSD's name.
    Line,
}

impl Column {
    /// By the names that ps(1) has for it.
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "user" | "uid" | "euid" | "ruid" | "euser" | "ruser" => Column::User,
            "pid" | "tgid" => Column::Pid,
            "ppid" => Column::Ppid,
            "c" | "pcpu" | "%cpu" => Column::CpuPercent,
            "stime" | "start_time" | "start" | "bsdstart" => Column::Started,
            "etime" => Column::Elapsed,
            "tty" | "tt" | "tname" => Column::Tty,
            "stat" | "state" | "s" => Column::State,
            "time" | "cputime" | "bsdtime" => Column::Time,
            "comm" | "ucmd" | "ucomm" => Column::Command,
            "args" | "cmd" | "command" => Column::Args,
            _ => return None,
        })
    }

    fn head(self) -> &'static str {
        match self {
            Column::User => "UID",
            Column::Pid => "PID",
            Column::Ppid => "PPID",
            Column::CpuPercent => "C",
            Column::Started => "STIME",
            Column::Elapsed => "ELAPSED",
            Column::Tty => "TTY",
            Column::State => "STAT",
            Column::Time => "TIME",
            Column::Command | Column::Line => "COMMAND",
            Column::Args => "CMD",
        }
    }

    /// How wide it is at least, and whether it stands to the right, as ps(1) has it.
    fn layout(self) -> (usize, bool) {
        match self {
            Column::User | Column::Tty => (8, false),
            Column::Pid | Column::Ppid => (7, true),
            Column::CpuPercent => (2, true),
            Column::Started => (5, false),
            Column::Elapsed => (11, true),
            Column::State => (4, false),
            Column::Time => (8, true),
            Column::Command => (15, false),
            Column::Args | Column::Line => (27, false),
        }
    }

    /// `now` is seconds since the epoch.
    fn of(self, process: &ProcessInfo, now: u64) -> String {
        let elapsed = now.saturating_sub(process.started);
        match self {
            Column::User => user_name(process.uid),
            Column::Pid => process.pid.to_string(),
            Column::Ppid => process.ppid.to_string(),
            Column::CpuPercent => {
                (process.cpu_ns / 10_000_000).checked_div(elapsed).unwrap_or(0).min(99).to_string()
            }
            Column::Started => clock::hour_and_minute(process.started),
            Column::Elapsed => in_hours(elapsed),
            Column::Tty if process.tty.is_empty() => "?".into(),
            Column::Tty => printable(&process.tty),
            Column::Time => in_hours(process.cpu_ns / 1_000_000_000),
            Column::Command => {
                let program = process.command.split(' ').next().unwrap_or_default();
                printable(program.rsplit('/').next().unwrap_or_default())
            }
            Column::State => printable(&process.state),
            Column::Args | Column::Line => printable(&process.command),
        }
    }
}

pub fn ps(global: &Global, args: liboci_cli::Ps) -> Outcome {
    let wanted = wanted(&args.ps_options)?;
    let (dir, state) = open(global, &args.container_id)?;
    if args.format == "json" {
        let processes = [Some(state.supervisor), state.vmm];
        let mut pids: Vec<i32> =
            processes.iter().flatten().filter(|process| process.is_alive()).map(|p| p.pid).collect();
        if let Some((_, fds)) = ask(&dir, &Request::Execs)? {
            let bytes = read_attachment(fds).map_err(Error::io("read the list of execs"))?;
            let execs: Vec<i32> = serde_json::from_slice(&bytes)
                .map_err(|e| Error::Io("read the list of execs".into(), e.into()))?;
            pids.extend(execs);
        }
        let text = serde_json::to_string(&pids).map_err(|e| Error::Io("show the list".into(), e.into()))?;
        return print(&(text + "\n"));
    }
    // One that has stopped has none: as under runc that is no error.
    let list: Vec<ProcessInfo> = match ask(&dir, &Request::Processes)? {
        Some((_, fds)) => {
            let bytes = read_attachment(fds).map_err(Error::io("read the list of processes"))?;
            serde_json::from_slice(&bytes)
                .map_err(|e| Error::Io("read the list of processes".into(), e.into()))?
        }
        None => Vec::new(),
    };
    match args.format.as_str() {
        "table" => print(&table(&list, &wanted, clock::realtime_ns() / 1_000_000_000)),
        other => Err(Error::Usage(format!("--format {other:?} is not known: it is table or json"))),
    }
}

/// The columns that options of ps(1) ask for. Which processes are shown is not for them to say.
fn wanted(options: &[String]) -> Result<Vec<Column>, Error> {
    let mut columns = Vec::new();
    let mut words = options.iter();
    let mut default = &FULL[..];
    while let Some(word) = words.next() {
        let list = match word.as_str() {
            "-e" | "-A" | "-f" | "-ef" | "-fe" | "-Af" | "aux" | "-aux" | "axu" => continue,
            "-x" | "x" | "-ax" | "ax" => {
                default = &BSD;
                continue;
            }
            "-o" | "-eo" | "-Ao" | "o" | "axo" | "--format" => words.next().map(String::as_str),
            other => other
                .strip_prefix("--format=")
                .or_else(|| other.strip_prefix("-eo"))
                .or_else(|| other.strip_prefix("-o")),
        };
        let list = list.filter(|list| !list.is_empty()).ok_or_else(|| {
            Error::Usage(format!(
                "the option {word:?} for ps(1) cannot be honoured: the processes are in a VM; use -ef, aux or -o"
            ))
        })?;
        for name in list.split([',', ' ']).map(|name| name.split('=').next().unwrap_or_default()) {
            columns.push(Column::named(&name.to_ascii_lowercase()).ok_or_else(|| {
                Error::Usage(format!(
                    "ps(1)'s column {name:?} cannot be honoured: use pid, ppid, user, stime, etime, tty, time, comm or args"
                ))
            })?);
        }
    }
    Ok(if columns.is_empty() { default.to_vec() } else { columns })
}

fn table(list: &[ProcessInfo], wanted: &[Column], now: u64) -> String {
    let mut rows = vec![wanted.iter().map(|column| column.head().to_owned()).collect::<Vec<_>>()];
    rows.extend(list.iter().map(|process| wanted.iter().map(|column| column.of(process, now)).collect()));
    let width = |n: usize, least| {
        rows.iter().filter_map(|row| row.get(n)).map(|cell| cell.chars().count()).fold(least, usize::max)
    };
    let layouts: Vec<_> = wanted
        .iter()
        .map(|column| column.layout())
        .enumerate()
        .map(|(n, (least, right))| (width(n, least), right))
        .collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&layouts).map(|(cell, (width, right))| match right {
            true => format!("{cell:>width$}"),
            false => format!("{cell:<width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join(" ").trim_end());
        text.push('\n');
    }
    text
}

/// The user's name on the host, as runc's callers see it; its number if it has none. A guest's users are the host's.
fn user_name(uid: u32) -> String {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    name_in(&passwd, uid).map_or(uid.to_string(), printable)
}

fn name_in(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then_some(name)
    })
}

fn in_hours(seconds: u64) -> String {
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// Names are the workload's: no control character of it reaches a terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if is_shown(c) { c } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(String::from).collect()
    }

    #[test]
    fn a_process_is_a_line_whatever_its_name() {
        let process = ProcessInfo {
            pid: 7,
            ppid: 1,
            uid: 0,
            cpu_ns: 3_725_000_000_000,
            started: 1000,
            tty: String::new(),
            state: "Ss".into(),
            command: "/bin/sh\n\x1b[2J -c x".into(),
        };
        let text = table(std::slice::from_ref(&process), &FULL, 8450);
        assert_eq!(text.lines().count(), 2);
        assert!(text.contains("01:02:05") && text.contains("sh??[2J"));
        assert_eq!(
            words(text.lines().nth(1).unwrap())[..7],
            ["root", "7", "1", "50", "00:16", "?", "01:02:05"]
        );
        // A guest that claims to have begun in the future divides by nothing.
        let text = table(&[process], &wanted(&words("-o pid,c,etime,comm")).unwrap(), 0);
        assert_eq!(words(text.lines().nth(1).unwrap()), ["7", "0", "00:00:00", "sh??[2J"]);
    }

    #[test]
    fn a_user_is_called_what_the_host_calls_it() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/false\n";
        assert_eq!(name_in(passwd, 33), Some("web"));
        assert_eq!(name_in(passwd, 34), None);
    }

    #[test]
    fn options_of_ps_say_what_is_shown() {
        assert_eq!(wanted(&[]).unwrap(), FULL);
        assert_eq!(wanted(&words("-ef")).unwrap(), FULL);
        assert_eq!(wanted(&words("aux")).unwrap(), FULL);
        assert_eq!(wanted(&words("-e -x")).unwrap(), BSD);
        let two = [Column::Pid, Column::Args];
        for line in ["-o pid,args", "-eo pid,cmd", "-o pid -o args", "-opid,ARGS", "--format=pid,args="] {
            assert_eq!(wanted(&words(line)).unwrap(), two, "{line}");
        }
        for line in ["-Z", "-o", "-o pid,label", "--forest"] {
            assert!(wanted(&words(line)).is_err(), "{line}");
        }
    }
}
