//! Cgroups of hosts that systemd runs: it makes the scope a sandbox lives in, and is told of the limits.
//!
//! What systemd has not been told of it takes away again when it next looks at its units, so every limit for which it has
//! a property is set as one, and written to the files besides, like the others. Below the scope the cgroups are ours
//! (`Delegate`), and the scope is gone with its last process, however that ended (`CollectMode`). Interface:
//! org.freedesktop.systemd1(5).

use std::path::Path;
use std::time::{Duration, Instant};

use rustbus::connection::Timeout;
use rustbus::message_builder::{MarshalledMessage, MessageBuilder};
use rustbus::wire::errors::MarshalError;
use rustbus::wire::unmarshal::traits::Variant;
use rustbus::wire::{ObjectPath, marshal::traits::Marshal};
use rustbus::{MessageType, RpcConn, dbus_variant_sig};

use super::Error;
use super::limits::Setting;

/// There when systemd runs the host (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
const NAME: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const SCOPE: &str = "org.freedesktop.systemd1.Scope";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const UNKNOWN_OBJECT: &str = "org.freedesktop.DBus.Error.UnknownObject";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
/// How long systemd may take for a job. It has a queue of them, and a host that boots has many.
const JOB_TIMEOUT: Duration = Duration::from_secs(30);
/// Microseconds: systemd keeps a quota as a percentage of a CPU.
const QUOTA_STEP: u64 = 10_000;
const SECOND: u64 = 1_000_000;

dbus_variant_sig!(Value, Flag => bool; Number => u64; Text => String; Bytes => Vec<u8>; Pids => Vec<u32>);

type Property = (String, Value);

/// Whether systemd runs this host.
pub fn runs_the_host() -> bool {
    Path::new(BOOTED).exists()
}

/// Has systemd make a scope in a slice, and move this process there.
pub fn start(slice: &str, scope: &str, settings: &[Setting]) -> Result<(), Error> {
    let failed = |why: String| Error::Systemd { what: "start", unit: scope.into(), why };
    let mut properties = vec![
        ("Description".to_owned(), Value::Text("stockade: a VM with its containers".into())),
        ("Slice".to_owned(), Value::Text(slice.into())),
        ("PIDs".to_owned(), Value::Pids(vec![std::process::id()])),
        ("CollectMode".to_owned(), Value::Text("inactive-or-failed".into())),
    ];
    // The last: not to be stopped before what uses it when the host goes down.
    for (name, value) in [
        ("Delegate", true),
        ("MemoryAccounting", true),
        ("CPUAccounting", true),
        ("IOAccounting", true),
        ("TasksAccounting", true),
        ("DefaultDependencies", false),
    ] {
        properties.push((name.into(), Value::Flag(value)));
    }
    properties.extend(properties_of(settings));
    let mut systemd = Systemd::connect().map_err(failed)?;
    systemd.call("Subscribe", ()).map_err(failed)?;
    let auxiliary: Vec<(String, Vec<Property>)> = Vec::new();
    let answer =
        systemd.call("StartTransientUnit", (scope, "replace", properties, auxiliary)).map_err(failed)?;
    match systemd.finish(&answer).map_err(failed)?.as_str() {
        "done" => Ok(()),
        other => Err(failed(format!("its job ended as {other:?}; see journalctl"))),
    }
}

/// Tells systemd of new limits of what [`start`] has made. What is not systemd's has no properties to keep.
pub fn set(scope: &str, cgroup: &str, settings: &[Setting]) -> Result<(), Error> {
    let failed = |why: String| Error::Systemd { what: "set limits of", unit: scope.into(), why };
    let properties = properties_of(settings);
    let mut systemd = Systemd::connect().map_err(failed)?;
    if !systemd.has(scope, cgroup).map_err(failed)? {
        return Ok(());
    }
    match systemd.call("SetUnitProperties", (scope, true, properties)) {
        Err(e) if !e.starts_with(NO_SUCH_UNIT) => Err(failed(e)),
        _ => Ok(()),
    }
}

/// Has systemd end what [`start`] has made, and waits until it has. One that is gone already is fine, and so is another
/// unit of the name, which goes on.
pub fn stop(scope: &str, cgroup: &str) -> Result<(), Error> {
    let failed = |why: String| Error::Systemd { what: "stop", unit: scope.into(), why };
    let mut systemd = Systemd::connect().map_err(failed)?;
    if !systemd.has(scope, cgroup).map_err(failed)? {
        return Ok(());
    }
    systemd.call("Subscribe", ()).map_err(failed)?;
    match systemd.call("StopUnit", (scope, "replace")) {
        Err(e) if e.starts_with(NO_SUCH_UNIT) => Ok(()),
        Err(e) => Err(failed(e)),
        // However the job ends: the unit may have gone by itself in between.
        Ok(answer) => systemd.finish(&answer).map(drop).map_err(failed),
    }
}

/// systemd's manager, by the system's bus.
struct Systemd(RpcConn);

impl Systemd {
    fn connect() -> Result<Self, String> {
        let failed = |e| format!("no system bus ({e}); start dbus, or use the cgroupfs manager");
        let mut systemd = Self(RpcConn::system_conn(Timeout::Duration(JOB_TIMEOUT)).map_err(failed)?);
        let rule = format!(
            "type='signal',sender='{NAME}',path='{OBJECT}',interface='{MANAGER}',member='JobRemoved'"
        );
        systemd.ask(rustbus::standard_messages::add_match(&rule))?;
        Ok(systemd)
    }

    /// Whether this cgroup is a unit's: its path alone does not say, because anybody may call a directory so.
    fn has(&mut self, scope: &str, cgroup: &str) -> Result<bool, String> {
        let mut message =
            MessageBuilder::new().call("GetUnit").with_interface(MANAGER).on(OBJECT).at(NAME).build();
        message.body.push_param(scope).map_err(|e| e.to_string())?;
        let answer = match self.ask(message) {
            Err(e) if e.starts_with(NO_SUCH_UNIT) => return Ok(false),
            other => other?,
        };
        let unit: ObjectPath<&str> = answer.body.parser().get().map_err(|e| e.to_string())?;
        let mut message =
            MessageBuilder::new().call("Get").with_interface(PROPERTIES).on(unit.as_ref()).at(NAME).build();
        message.body.push_param2(SCOPE, "ControlGroup").map_err(|e| e.to_string())?;
        let answer = match self.ask(message) {
            // It has gone in between.
            Err(e) if e.starts_with(NO_SUCH_UNIT) || e.starts_with(UNKNOWN_OBJECT) => return Ok(false),
            other => other?,
        };
        let value: Variant = answer.body.parser().get().map_err(|e| e.to_string())?;
        Ok(value.get::<&str>().map_err(|e| e.to_string())? == cgroup)
    }

    fn call(&mut self, method: &str, parameters: impl Parameters) -> Result<MarshalledMessage, String> {
        let mut message =
            MessageBuilder::new().call(method).with_interface(MANAGER).on(OBJECT).at(NAME).build();
        parameters.push(&mut message).map_err(|e| e.to_string())?;
        self.ask(message)
    }

    /// The answer to a message. An error is its name, and what it says.
    fn ask(&mut self, mut message: MarshalledMessage) -> Result<MarshalledMessage, String> {
        let sent = self.0.send_message(&mut message).map_err(|e| e.to_string())?;
        let serial = sent.write_all().map_err(|(_, e)| e.to_string())?;
        let answer =
            self.0.wait_response(serial, Timeout::Duration(JOB_TIMEOUT)).map_err(|e| e.to_string())?;
        match answer.typ {
            MessageType::Error => {
                let name = answer.dynheader.error_name.clone().unwrap_or_default();
                let text = answer.body.parser().get::<&str>().unwrap_or_default();
                Err(format!("{name}: {text}"))
            }
            _ => Ok(answer),
        }
    }

    /// Waits until the job that is the answer to a call is over. Each that ends is told to all who have subscribed.
    fn finish(&mut self, answer: &MarshalledMessage) -> Result<String, String> {
        let begin = Instant::now();
        let job: ObjectPath<&str> = answer.body.parser().get().map_err(|e| e.to_string())?;
        loop {
            let left = JOB_TIMEOUT.checked_sub(begin.elapsed());
            let left =
                left.ok_or_else(|| format!("it has not said anything for {} s", JOB_TIMEOUT.as_secs()))?;
            let signal = self.0.wait_signal(Timeout::Duration(left)).map_err(|e| e.to_string())?;
            // Others of the bus itself come unasked.
            let ended = signal.body.parser().get4::<u32, ObjectPath<&str>, &str, &str>();
            if let Ok((_, ended, _, result)) = ended
                && ended == job
            {
                return Ok(result.to_owned());
            }
        }
    }
}

/// What methods are called with.
trait Parameters {
    fn push(self, message: &mut MarshalledMessage) -> Result<(), MarshalError>;
}

impl Parameters for () {
    fn push(self, _: &mut MarshalledMessage) -> Result<(), MarshalError> {
        Ok(())
    }
}

impl<A: Marshal, B: Marshal> Parameters for (A, B) {
    fn push(self, message: &mut MarshalledMessage) -> Result<(), MarshalError> {
        message.body.push_param2(self.0, self.1)
    }
}

impl<A: Marshal, B: Marshal, C: Marshal> Parameters for (A, B, C) {
    fn push(self, message: &mut MarshalledMessage) -> Result<(), MarshalError> {
        message.body.push_param3(self.0, self.1, self.2)
    }
}

impl<A: Marshal, B: Marshal, C: Marshal, D: Marshal> Parameters for (A, B, C, D) {
    fn push(self, message: &mut MarshalledMessage) -> Result<(), MarshalError> {
        message.body.push_param4(self.0, self.1, self.2, self.3)
    }
}

/// systemd's names for limits. `io.max` and `cpu.idle` have none that it would overwrite.
fn properties_of(settings: &[Setting]) -> Vec<Property> {
    let mut properties = Vec::new();
    for Setting { file, value, .. } in settings {
        let number = value.parse().unwrap_or(u64::MAX);
        let mut add = |name: &str, value| properties.push((name.to_owned(), value));
        match *file {
            "memory.max" => add("MemoryMax", Value::Number(number)),
            "memory.swap.max" => add("MemorySwapMax", Value::Number(number)),
            "memory.low" => add("MemoryLow", Value::Number(number)),
            "cpu.weight" => add("CPUWeight", Value::Number(number)),
            "cpu.max" => {
                let (quota, period) = value.split_once(' ').unwrap_or((value, ""));
                let period = period.parse().unwrap_or(crate::size::CPU_PERIOD);
                let per_second = quota.parse().ok().and_then(|quota: u64| {
                    Some(quota.checked_mul(SECOND)?.checked_div(period)?.next_multiple_of(QUOTA_STEP))
                });
                add("CPUQuotaPeriodUSec", Value::Number(period));
                add("CPUQuotaPerSecUSec", Value::Number(per_second.unwrap_or(u64::MAX)));
            }
            "cpuset.cpus" => add("AllowedCPUs", Value::Bytes(mask(value))),
            "cpuset.mems" => add("AllowedMemoryNodes", Value::Bytes(mask(value))),
            "io.weight" => {
                if let Some(weight) = value.strip_prefix("default ").and_then(|weight| weight.parse().ok()) {
                    add("IOWeight", Value::Number(weight));
                }
            }
            _ => {}
        }
    }
    properties
}

/// A list like `0-3,8` as a bit for each, the lowest first. What is no list the kernel refuses.
fn mask(list: &str) -> Vec<u8> {
    const MOST: usize = 8192;
    let mut mask = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.trim().parse::<usize>(), last.trim().parse::<usize>()) else {
            continue;
        };
        for bit in first..=last.min(MOST) {
            if mask.len() <= bit / 8 {
                mask.resize(bit / 8 + 1, 0);
            }
            mask[bit / 8] |= 1 << (bit % 8);
        }
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(file: &'static str, value: &str) -> Vec<(String, Value)> {
        properties_of(&[super::super::limits::set("field", file, value)])
    }

    #[test]
    fn limits_have_systemds_names_and_units() {
        let number = |name: &str, value| (name.to_owned(), Value::Number(value));
        assert_eq!(of("memory.max", "1048576"), [number("MemoryMax", 1 << 20)]);
        assert_eq!(of("memory.swap.max", "max"), [number("MemorySwapMax", u64::MAX)]);
        assert_eq!(
            of("cpu.max", "150000 100000"),
            [number("CPUQuotaPeriodUSec", 100_000), number("CPUQuotaPerSecUSec", 1_500_000)]
        );
        // In whole hundredths of a CPU, and never less than asked for.
        assert_eq!(of("cpu.max", "333 1000")[1], number("CPUQuotaPerSecUSec", 340_000));
        assert_eq!(of("cpu.max", "max 100000")[1], number("CPUQuotaPerSecUSec", u64::MAX));
        assert_eq!(of("cpuset.cpus", "0-2,9"), [("AllowedCPUs".to_owned(), Value::Bytes(vec![7, 2]))]);
        assert_eq!(of("io.weight", "default 500"), [number("IOWeight", 500)]);
        assert_eq!(of("io.max", "8:0 rbps=1"), []);
    }
}
