//! The kept list: cases of the suite whose premise is false here, each with a reason.
//!
//! It is a page to read, one for each suite in `tests/conformance`: the tables in it are the list, and the word after
//! `##` says for which runtimes the tables below it count. A case is on it because of what it presumes, never because it fails; so
//! one that passes nevertheless has no place there.

use super::suite::Suite;
use super::tap::Case;
use std::collections::{BTreeMap, BTreeSet};

/// Why a case cannot apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// What it presumes is false for a VM.
    Vm,
    /// It looks for words that only runc itself says.
    Words,
    /// It needs something that the lab has not.
    Lab,
}

impl Kind {
    /// All, with the words that begin their headings.
    const ALL: [(&str, Kind); 3] = [("vm", Kind::Vm), ("words", Kind::Words), ("lab", Kind::Lab)];

    /// Whether the premise is false for this runtime.
    pub fn counts_for(self, runtime: &str) -> bool {
        match self {
            Kind::Vm => runtime == "stockade",
            Kind::Words => runtime != "runc",
            Kind::Lab => true,
        }
    }
}

/// The list.
#[derive(Debug)]
pub struct List {
    /// Why each case is on it; for different runtimes there can be different reasons.
    pub cases: BTreeMap<Case, BTreeSet<Kind>>,
}

impl List {
    /// The first reason for a case to be on it that counts for a runtime.
    pub fn reason(&self, case: &Case, runtime: &str) -> Option<Kind> {
        self.cases.get(case)?.iter().copied().find(|kind| kind.counts_for(runtime))
    }

    /// Whether the lab has not what a case needs, whatever the runtime.
    pub fn needs_more_than_the_lab(&self, file: &str, case: &str) -> bool {
        let kinds = self.cases.get(&(file.to_string(), case.trim().to_string()));
        kinds.is_some_and(|kinds| kinds.contains(&Kind::Lab))
    }

    /// The one that is kept for a suite.
    pub fn kept(suite: &Suite) -> Result<List, String> {
        let (text, place) = suite.kept;
        List::parse(text).map_err(|why| format!("{place}: {why}"))
    }

    fn parse(text: &str) -> Result<List, String> {
        let mut kind = None;
        let mut cases = BTreeMap::new();
        for line in text.lines() {
            if let Some(heading) = line.strip_prefix("## ") {
                let word = heading.split([':', ' ']).next().unwrap_or_default();
                kind = Kind::ALL.iter().find(|(name, _)| *name == word).map(|(_, kind)| *kind);
            }
            let Some(row) = line.strip_prefix("| `") else { continue };
            let kind = kind.ok_or_else(|| format!("a table above any heading of a kind: {line}"))?;
            let cells: Vec<&str> = row.trim_end().trim_end_matches('|').split(" | ").map(str::trim).collect();
            let [file, name, why] = cells[..] else {
                return Err(format!("not a file, a case and a reason: {line}"));
            };
            if why.is_empty() {
                return Err(format!("no reason: {line}"));
            }
            let case = (file.trim_end_matches('`').to_string(), name.to_string());
            if !cases.entry(case).or_insert_with(BTreeSet::new).insert(kind) {
                return Err(format!("a case that is there already: {line}"));
            }
        }
        Ok(List { cases })
    }
}

#[cfg(test)]
mod tests {
    use super::super::suite::SUITES;
    use super::*;

    #[test]
    fn the_kept_lists_can_be_read() {
        for suite in SUITES {
            assert!(!List::kept(suite).unwrap().cases.is_empty());
        }
    }

    #[test]
    fn a_row_needs_a_kind_and_a_reason() {
        let row = "| `exec.bats` | runc exec --preserve-fds | descriptors of the host |\n";
        let list =
            List::parse(&format!("## vm: false\n\n| file | case | why |\n|---|---|---|\n{row}")).unwrap();
        let case = ("exec.bats".to_string(), "runc exec --preserve-fds".to_string());
        assert_eq!(list.reason(&case, "stockade"), Some(Kind::Vm));
        assert_eq!(list.reason(&case, "runc"), None);
        assert!(List::parse(row).is_err());
        assert!(List::parse("## vm\n| `exec.bats` | runc exec |\n").is_err());
        assert!(List::parse("## vm\n| `exec.bats` | runc exec |  |\n").is_err());
        assert!(List::parse(&format!("## vm\n{row}{row}")).is_err());
    }
}
