//! The report: how many cases passed, failed and do not apply, for each runtime, and which.

use super::list::{Kind, List};
use super::tap::{Case, Outcome};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// A runtime's name and its results.
pub type Column = (String, BTreeMap<Case, Outcome>);

/// The rows of the table.
const ROWS: [(&str, Row); 6] = [
    ("passed", Row::Passed),
    ("failed", Row::Failed),
    ("on the list: not for a VM", Row::Listed(Kind::Vm)),
    ("on the list: runc's own words", Row::Listed(Kind::Words)),
    ("on the list: not to be had in the lab", Row::Listed(Kind::Lab)),
    ("skipped by the suite itself", Row::Skipped),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Row {
    Passed,
    Failed,
    Listed(Kind),
    Skipped,
}

/// What is to be said.
pub struct Report {
    /// Names and counts of the table.
    columns: Vec<(String, BTreeMap<Row, usize>)>,
    /// Failed cases that are not on the list.
    failed: Vec<(String, Case)>,
    /// Cases on the list that pass, or that the suite has not.
    stale: Vec<(Case, &'static str)>,
    /// Why the suite skipped cases, and how many.
    skipped: BTreeMap<String, usize>,
}

impl Report {
    /// `whole`: all of the suite was run, so that a listed case which did not occur does not exist.
    pub fn new(columns: &[Column], list: &List, whole: bool) -> Report {
        let mut report =
            Report { columns: Vec::new(), failed: Vec::new(), stale: Vec::new(), skipped: BTreeMap::new() };
        let mut stale = BTreeSet::new();
        for (runtime, results) in columns {
            let mut counts = BTreeMap::new();
            for (case, outcome) in results {
                let listed = list.reason(case, runtime);
                // What another runtime makes of it is no matter of the list.
                if (outcome, listed.is_some(), runtime.as_str()) == (&Outcome::Passed, true, "stockade") {
                    stale.insert((case.clone(), "passes"));
                }
                let row = match (outcome, listed) {
                    (Outcome::Passed, _) => Row::Passed,
                    (Outcome::Skipped(why), _) => {
                        *report.skipped.entry(why.clone()).or_default() +=
                            usize::from(runtime == &columns[0].0);
                        Row::Skipped
                    }
                    (Outcome::Failed | Outcome::LeftOut, Some(kind)) => Row::Listed(kind),
                    (Outcome::Failed | Outcome::LeftOut, None) => {
                        report.failed.push((runtime.clone(), case.clone()));
                        Row::Failed
                    }
                };
                *counts.entry(row).or_default() += 1;
            }
            if whole {
                let missing = list.cases.keys().filter(|case| !results.contains_key(case));
                stale.extend(missing.map(|case| (case.clone(), "is not in the suite")));
            }
            report.columns.push((runtime.clone(), counts));
        }
        report.stale = stale.into_iter().collect();
        report
    }

    /// Whether no case of stockade failed that is not on the list, and the list is true.
    pub fn good(&self) -> bool {
        self.stale.is_empty() && self.failed.iter().all(|(runtime, _)| runtime != "stockade")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "\n{:<40}", "")?;
        for (name, _) in &self.columns {
            write!(f, "{name:>10}")?;
        }
        for (title, row) in ROWS {
            write!(f, "\n{title:<40}")?;
            for (_, counts) in &self.columns {
                write!(f, "{:>10}", counts.get(&row).unwrap_or(&0))?;
            }
        }
        write!(f, "\n{:<40}", "all")?;
        for (_, counts) in &self.columns {
            write!(f, "{:>10}", counts.values().sum::<usize>())?;
        }
        writeln!(f)?;
        for (why, count) in &self.skipped {
            writeln!(
                f,
                "skipped: {count} of {}: {why}",
                self.columns.first().map_or("", |column| &column.0)
            )?;
        }
        for (runtime, (file, name)) in &self.failed {
            writeln!(f, "failed: {runtime}: {file}: {name}")?;
        }
        for ((file, name), why) in &self.stale {
            writeln!(f, "to be taken off the list: {file}: {name}: {why}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(name: &str) -> Case {
        ("a.bats".into(), name.into())
    }

    fn column(runtime: &str, outcomes: &[(&str, Outcome)]) -> Column {
        let results = outcomes.iter().map(|(name, outcome)| (case(name), outcome.clone())).collect();
        (runtime.into(), results)
    }

    #[test]
    fn a_failure_that_is_not_on_the_list_is_one() {
        let list =
            List { cases: [(case("vm"), [Kind::Vm].into()), (case("words"), [Kind::Words].into())].into() };
        let outcomes = [("vm", Outcome::Failed), ("words", Outcome::Failed), ("new", Outcome::Failed)];
        let report = Report::new(&[column("stockade", &outcomes)], &list, true);
        assert!(!report.good());
        assert_eq!(report.failed, [("stockade".to_string(), case("new"))]);
        assert!(Report::new(&[column("stockade", &outcomes[..2])], &list, true).good());
        let runc = Report::new(&[column("runc", &outcomes)], &list, true);
        assert_eq!(runc.failed.len(), 3);
        assert!(runc.good(), "what runc fails is no fault of stockade");
    }

    #[test]
    fn a_list_that_is_not_true_any_more_is_a_failure() {
        let list = List { cases: [(case("vm"), [Kind::Vm].into())].into() };
        assert!(!Report::new(&[column("stockade", &[("vm", Outcome::Passed)])], &list, true).good());
        let other = [column("stockade", &[("other", Outcome::Passed)])];
        assert!(!Report::new(&other, &list, true).good());
        assert!(Report::new(&other, &list, false).good());
    }
}
