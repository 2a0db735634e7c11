//! The list of cases as the test binary runs it: shared cases two at a time, exclusive ones alone.
//!
//! An exclusive case owns the machine while it runs, so whatever is there afterwards and was not before is its
//! own leak: that is checked after each of them.

use std::sync::{PoisonError, RwLock};

use libtest_mimic::{Failed, Trial};

use super::{Runtime, Traces, parts};

/// One behaviour of the runtime.
#[derive(Clone, Copy)]
pub struct Case {
    name: &'static str,
    body: fn(),
    exclusive: bool,
    /// Why the case says nothing about a runtime without a VM, when it does not.
    stockade_only: Option<&'static str>,
    on_request: bool,
    /// Whether the host has what it is about.
    applies: fn() -> bool,
}

impl Case {
    /// A case that may run beside others. `name` begins with the name of this crate.
    pub const fn new(name: &'static str, body: fn()) -> Self {
        Self { name, body, exclusive: false, stockade_only: None, on_request: false, applies: || true }
    }

    /// Runs alone, and must leave the machine as it found it.
    pub const fn exclusive(self) -> Self {
        Self { exclusive: true, ..self }
    }

    /// Is ignored when the runtime under test is another one, for the reason given.
    pub const fn stockade_only(self, why: &'static str) -> Self {
        Self { stockade_only: Some(why), ..self }
    }

    /// Takes so long that it runs only when it is asked for, with `--ignored`.
    pub const fn on_request(self) -> Self {
        Self { on_request: true, ..self }
    }

    /// Is ignored where the host has not what it is about.
    pub const fn only_if(self, applies: fn() -> bool) -> Self {
        Self { applies, ..self }
    }

    fn run(self) -> Result<(), Failed> {
        static MACHINE: RwLock<()> = RwLock::new(());
        if !self.exclusive {
            let _shared = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
            return guarded(self.body);
        }
        let _alone = MACHINE.write().unwrap_or_else(PoisonError::into_inner);
        let before = Traces::now();
        guarded(self.body)?;
        before.assert_nothing_new()
    }
}

/// A case's panic is its failure. The hook has already printed where it happened.
fn guarded(body: fn()) -> Result<(), Failed> {
    std::panic::catch_unwind(body).map_err(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("panicked");
        Failed::from(text)
    })
}

/// Turns the cases into what the test harness runs, the exclusive ones last so that they do not make the others
/// wait.
pub fn into_trials(cases: &[Case]) -> Vec<Trial> {
    let foreign = !Runtime::under_test().is_stockade();
    let mut cases = cases.to_vec();
    cases.sort_by_key(|case| (case.exclusive, case.name));
    cases
        .into_iter()
        .map(|case| (case, case.name.split_once("::").map_or(case.name, |(_, rest)| rest)))
        .filter(|(_, name)| parts::is_asked_for(name))
        .map(|(case, name)| {
            let ignored = case.on_request || foreign && case.stockade_only.is_some() || !(case.applies)();
            Trial::test(name, move || case.run()).with_ignored_flag(ignored)
        })
        .collect()
}

/// Looks at what all cases together left, when the last has ended: a failure of its own.
pub fn leave_nothing(before: &Traces) -> bool {
    let Err(failed) = before.assert_nothing_new() else { return true };
    println!("test all_cases_together_leave_nothing ... FAILED\n{}", failed.message().unwrap_or_default());
    false
}
