//! Which system calls the VMM's threads make while the suite runs, to compare with the lists in the VMM's jail.
//!
//! The kernel counts them: histogram triggers (`Documentation/trace/histogram.rst`) in a tracing instance of this
//! suite's own, one for each kind of thread. A thread takes its name with its filter, so what it did before that
//! does not count.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use stockade_vmm::calls::{Call, Kind, Only, Value};

const INSTANCES: &str = "/sys/kernel/tracing/instances";

/// What a line begins with that tells of a use, between the suite's parts and what adds them up.
const USE: &str = "used by the VMM: ";

/// The kernel counts from here on.
pub struct CallWatch(PathBuf);

impl CallWatch {
    /// Begins to count.
    pub fn begin() -> Self {
        let instance = Path::new(INSTANCES).join(format!("stockade-e2e-{}", std::process::id()));
        fs::create_dir(&instance).expect("make a tracing instance (needs root and tracefs)");
        let this = Self(instance);
        for (kind, threads) in Kind::ALL {
            this.count("raw_syscalls/sys_enter", "id", threads);
            for call in kind.calls() {
                if let Only::OneOf(index, _) = call.only {
                    let event = format!("syscalls/sys_enter_{}", call.name());
                    let argument = this.argument(&event, index);
                    this.count(&event, &argument, threads);
                }
            }
        }
        this
    }

    fn event(&self, event: &str) -> PathBuf {
        self.0.join("events").join(event)
    }

    fn count(&self, event: &str, key: &str, threads: &str) {
        let trigger = format!("hist:keys={key} if COMM ~ \"{threads}\"");
        // Truncating the file would take away the triggers that there are.
        let file = File::options().append(true).open(self.event(event).join("trigger"));
        file.and_then(|mut file| file.write_all(trigger.as_bytes()))
            .unwrap_or_else(|e| panic!("set the trigger {trigger} of {event}: {e}"));
    }

    /// The name of an argument of a call. The number of the call comes before the first.
    fn argument(&self, event: &str, index: u8) -> String {
        let format = fs::read_to_string(self.event(event).join("format")).expect("read an event's format");
        let fields = format.lines().filter(|line| line.contains("field:") && !line.contains("common_"));
        let field = fields.skip(1).nth(index.into()).expect("as many arguments as the call has");
        let declaration = field.split(';').next().unwrap_or_default();
        declaration.rsplit([' ', '*']).next().expect("a name").to_owned()
    }

    /// The keys that the kernel has counted for threads of this name.
    fn seen(&self, event: &str, threads: &str) -> BTreeSet<u64> {
        let text = fs::read_to_string(self.event(event).join("hist")).expect("read a histogram");
        let ours = text.split("# trigger info:").filter(|part| part.contains(&format!("\"{threads}\"")));
        let lines = ours.flat_map(str::lines).filter_map(|line| line.strip_prefix("{ ")?.split_once('}'));
        lines.filter_map(|(key, _)| key.split_once(':')?.1.trim().parse().ok()).collect()
    }

    /// Ends it: one line for each use.
    pub fn end(self) -> BTreeSet<String> {
        let mut uses = BTreeSet::new();
        for (kind, threads) in Kind::ALL {
            let mut unlisted = self.seen("raw_syscalls/sys_enter", threads);
            for call in kind.calls() {
                if !unlisted.remove(&(call.number as u64)) {
                    continue;
                }
                let Only::OneOf(..) = call.only else {
                    uses.extend(entries(kind, call).into_iter().map(|entry| entry.text));
                    continue;
                };
                let mut values = self.seen(&format!("syscalls/sys_enter_{}", call.name()), threads);
                for entry in entries(kind, call) {
                    if values.remove(&entry.value.into()) {
                        uses.insert(entry.text);
                    }
                }
                uses.extend(values.into_iter().map(|value| format!("{kind:?} {} {value:#x}", call.name())));
            }
            // With these it gets its filter.
            unlisted.remove(&(libc::SYS_prctl as u64));
            unlisted.remove(&(libc::SYS_seccomp as u64));
            uses.extend(unlisted.into_iter().map(|number| format!("{kind:?} system call {number}")));
        }
        uses
    }
}

impl Drop for CallWatch {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// What a list says of a call: one entry, or one for each value of its argument.
struct Entry {
    text: String,
    value: u32,
    seen: bool,
}

fn entries(kind: Kind, call: &Call) -> Vec<Entry> {
    // What every thread may do is one list, whoever uses it.
    let list = if call.every_kind() { "every thread".to_owned() } else { format!("{kind:?}") };
    let text = format!("{list} {}", call.name());
    match call.only {
        Only::OneOf(_, values) => {
            let entry = |value: &Value| Entry {
                text: format!("{text} {}", value.name),
                value: value.value,
                seen: value.unseen.is_none(),
            };
            values.iter().map(entry).collect()
        }
        _ => vec![Entry { text, value: 0, seen: call.unseen.is_none() }],
    }
}

/// Tells whoever adds up the parts of the suite.
pub fn tell(uses: &BTreeSet<String>) {
    for entry in uses {
        println!("{USE}{entry}");
    }
}

/// What a part has told.
pub fn told(output: &str) -> impl Iterator<Item = String> {
    output.lines().filter_map(|line| line.strip_prefix(USE)).map(str::to_owned)
}

/// Compares what the whole suite has used with the lists: a test of its own.
pub fn compare(mut used: BTreeSet<String>) -> bool {
    let lists = || Kind::ALL.into_iter().flat_map(|(kind, _)| kind.calls().map(move |call| (kind, call)));
    let listed: Vec<_> = lists().flat_map(|(kind, call)| entries(kind, call)).collect();
    let needless = listed.iter().filter(|entry| entry.seen && !used.contains(&entry.text));
    let mut wrong: Vec<_> = needless.map(|entry| format!("no case needs: {}", entry.text)).collect();
    for entry in &listed {
        used.remove(&entry.text);
    }
    wrong.extend(used.into_iter().map(|entry| format!("not in the list: {entry}")));
    wrong.sort();
    wrong.dedup();
    let result = if wrong.is_empty() { "ok" } else { "FAILED" };
    println!("test filters_allow_what_the_suite_needs_and_no_more ... {result}");
    wrong.iter().for_each(|line| println!("  {line}"));
    wrong.is_empty()
}
