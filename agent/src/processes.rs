//! What `ps` shows of a container: its processes, from /proc.

use std::fs;
use std::path::PathBuf;

use nix::unistd::{Pid, SysconfVar, sysconf};
use stockade_agent_protocol::messages::Process;

/// Longest command line that is reported.
const COMMAND_MAX: usize = 4096;

/// Describes processes; those that have ended meanwhile are left out.
pub fn describe(pids: &[Pid]) -> Vec<Process> {
    let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100).max(1) as u64;
    let booted = fs::read_to_string("/proc/stat")
        .ok()
        .and_then(|text| text.lines().find_map(|l| l.strip_prefix("btime ")?.parse().ok()))
        .unwrap_or(0);
    pids.iter().filter_map(|pid| describe_one(*pid, ticks, booted)).collect()
}

fn describe_one(pid: Pid, ticks: u64, booted: u64) -> Option<Process> {
    let dir = PathBuf::from(format!("/proc/{pid}"));
    let stat = Stat::parse(&fs::read_to_string(dir.join("stat")).ok()?)?;
    let status = fs::read_to_string(dir.join("status")).ok()?;
    let uid =
        status.lines().find_map(|l| l.strip_prefix("Uid:")?.split_ascii_whitespace().next()?.parse().ok())?;
    let arguments = fs::read(dir.join("cmdline")).ok()?;
    Some(Process {
        pid: pid.as_raw() as u32,
        ppid: stat.ppid,
        uid,
        cpu_ns: stat.ticks.saturating_mul(1_000_000_000 / ticks),
        started: booted + stat.started_ticks / ticks,
        tty: terminal_name(stat.tty),
        command: command(&arguments, &stat.name),
        state: stat.state,
        ..Default::default()
    })
}

/// The fields of /proc/PID/stat that are used (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    state: String,
    ppid: u32,
    tty: u32,
    ticks: u64,
    started_ticks: u64,
}

impl Stat {
    /// The name is in parentheses and may contain anything, parentheses and spaces too.
    fn parse(text: &str) -> Option<Self> {
        let (before, after) = (text.find('(')?, text.rfind(')')?);
        let name = text.get(before + 1..after)?.to_owned();
        let fields: Vec<&str> = text.get(after + 1..)?.split_ascii_whitespace().collect();
        // fields[0] is the third field, state.
        let number = |field: usize| fields.get(field - 3)?.parse::<i64>().ok();
        let mut state = fields.first()?.to_string();
        // As ps(1) has them: niceness, leader of a session, threads, foreground of a terminal.
        let pid = text.split(' ').next()?.parse::<i64>().ok()?;
        let flags = [
            ('<', number(19)? < 0),
            ('N', number(19)? > 0),
            ('s', number(6)? == pid),
            ('l', number(20)? > 1),
            ('+', number(5)? == number(8)?),
        ];
        state.extend(flags.into_iter().filter(|(_, holds)| *holds).map(|(flag, _)| flag));
        Some(Stat {
            name,
            state,
            ppid: number(4)? as u32,
            tty: number(7)? as u32,
            ticks: number(14)? as u64 + number(15)? as u64,
            started_ticks: number(22)? as u64,
        })
    }
}

/// Unix98 terminals have the major numbers 136 to 143 (Documentation/admin-guide/devices.txt).
fn terminal_name(tty: u32) -> String {
    let (major, minor) = ((tty >> 8) & 0xfff, (tty & 0xff) | ((tty >> 12) & 0xfff00));
    match major {
        136..=143 => format!("pts/{}", (major - 136) * 256 + minor),
        _ => String::new(),
    }
}

fn command(arguments: &[u8], name: &str) -> String {
    let arguments =
        String::from_utf8_lossy(arguments.strip_suffix(b"\0").unwrap_or(arguments)).replace('\0', " ");
    let mut command = if arguments.is_empty() { format!("[{name}]") } else { arguments };
    command.truncate(command.floor_char_boundary(COMMAND_MAX));
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_contain_anything() {
        let text = "42 (a) b (c) S 7 42 42 34817 42 4194304 96 0 0 0 25 13 0 0 20 0 1 0 1234 4198400 0 0\n";
        let stat = Stat {
            name: "a) b (c".into(),
            state: "Ss+".into(),
            ppid: 7,
            tty: 34817,
            ticks: 38,
            started_ticks: 1234,
        };
        assert_eq!(Stat::parse(text), Some(stat));
        assert_eq!(Stat::parse("42 (cut"), None);
        assert_eq!(Stat::parse("42 (sh) S 1"), None);
        let text = "43 (a) R 7 40 42 34817 42 4194304 96 0 0 0 25 13 0 0 39 19 3 0 1234 4198400 0 0\n";
        assert_eq!(Stat::parse(text).unwrap().state, "RNl");
    }

    #[test]
    fn terminals_have_the_name_that_ps_shows() {
        assert_eq!(terminal_name(34817), "pts/1");
        assert_eq!(terminal_name(137 << 8), "pts/256");
        assert_eq!(terminal_name(0), "");
        assert_eq!(terminal_name((4 << 8) | 64), "");
    }

    #[test]
    fn a_command_line_is_readable_and_bounded() {
        assert_eq!(command(b"sleep\x0060\0", "sleep"), "sleep 60");
        assert_eq!(command(b"", "kthread"), "[kthread]");
        assert!(command("ä".repeat(10_000).as_bytes(), "x").len() <= COMMAND_MAX);
    }
}
