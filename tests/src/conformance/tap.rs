//! What bats says, in the Test Anything Protocol: a line for each case, its output below as comments.

use super::Context;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What became of a case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    /// The suite itself found that this host has not what the case needs; with its words.
    Skipped(String),
    Failed,
    /// Not run, because the kept list says that the lab has not what it needs.
    LeftOut,
}

/// How a line begins that tells of a case which was not run.
pub const LEFT_OUT: &str = "# left out: ";

/// A case's file and name.
pub type Case = (String, String);

/// The results in a folder of `<file>.tap`.
pub fn read_folder(folder: &Path) -> Result<BTreeMap<Case, Outcome>, String> {
    let mut results = BTreeMap::new();
    for entry in fs::read_dir(folder).or_say(folder.display())? {
        let path = entry.or_say(folder.display())?.path();
        let text = fs::read_to_string(&path).or_say(path.display())?;
        let file = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let cases = parse(&text).or_say(path.display())?;
        results.extend(cases.into_iter().map(|(name, outcome)| ((file.clone(), name), outcome)));
    }
    Ok(results)
}

/// The cases of one file. One that was announced but of which nothing was said has failed: it did not end.
fn parse(text: &str) -> Result<Vec<(String, Outcome)>, String> {
    let mut planned = None;
    let mut cases = Vec::new();
    let mut left_out = Vec::new();
    for line in text.lines() {
        if let Some(count) = line.strip_prefix("1..") {
            planned = count.trim().parse::<usize>().ok();
        } else if let Some(rest) = line.strip_prefix("ok ") {
            let (name, skip) = case(rest);
            cases.push((name, skip.map_or(Outcome::Passed, Outcome::Skipped)));
        } else if let Some(rest) = line.strip_prefix("not ok ") {
            cases.push((case(rest).0, Outcome::Failed));
        } else if let Some(name) = line.strip_prefix(LEFT_OUT) {
            left_out.push((name.to_string(), Outcome::LeftOut));
        }
    }
    match planned {
        Some(count) if count < cases.len() => {
            Err(format!("{} cases where {count} were announced", cases.len()))
        }
        Some(count) => {
            let lost =
                (cases.len() + 1..=count).map(|n| (format!("(case {n} did not end)"), Outcome::Failed));
            cases.extend(lost.chain(left_out).collect::<Vec<_>>());
            Ok(cases)
        }
        None => Err("no cases were announced".into()),
    }
}

/// From `<number> <name>[ in <time>ms][ # skip <why>]` the name and the reason.
fn case(rest: &str) -> (String, Option<String>) {
    let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start();
    let (rest, skip) = match rest.split_once(" # skip") {
        Some((name, why)) => (name, Some(why.trim().to_string())),
        None => (rest.split_once(" # timeout").map_or(rest, |(name, _)| name), None),
    };
    let name = match rest.rsplit_once(" in ") {
        Some((name, time)) if is_time(time) => name,
        _ => rest,
    };
    (name.to_string(), skip)
}

fn is_time(word: &str) -> bool {
    let digits = word.strip_suffix("ms").or(word.strip_suffix("sec")).unwrap_or_default();
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// The names of the cases that a file of a suite has.
pub fn names(text: &str) -> Vec<&str> {
    let heads = text.lines().filter_map(|line| line.strip_prefix("@test "));
    heads
        .filter_map(|head| head.trim_end().strip_suffix('{'))
        .map(|name| name.trim().trim_matches(['"', '\'']))
        .collect()
}

/// A pattern for bats that matches these names and no others.
pub fn pattern(names: &[&str]) -> String {
    let literal = |name: &&str| {
        let escaped = |c: char| r"\.[]{}()*+?^$|".contains(c).then_some('\\');
        name.chars().flat_map(|c| escaped(c).into_iter().chain([c])).collect::<String>()
    };
    format!("^({})$", names.iter().map(literal).collect::<Vec<_>>().join("|"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_outcome_is_told_from_the_others() {
        let text = "1..4\nok 1 runs in 12ms\nnot ok 2 works in vain in 7ms\n# (in test file x)\n\
                    ok 3 waits # skip test requires systemd\nnot ok 4 hangs in 9ms # timeout after 180s\n";
        let cases = parse(text).unwrap();
        let expected = [
            ("runs", Outcome::Passed),
            ("works in vain", Outcome::Failed),
            ("waits", Outcome::Skipped("test requires systemd".into())),
            ("hangs", Outcome::Failed),
        ];
        assert_eq!(cases, expected.map(|(name, outcome)| (name.to_string(), outcome)));
    }

    #[test]
    fn a_case_that_did_not_end_has_failed() {
        let cases = parse("1..3\nok 1 a\nok 2 b\n").unwrap();
        assert_eq!(cases.len(), 3);
        assert_eq!(cases[2].1, Outcome::Failed);
        assert!(parse("").is_err());
        assert!(parse("1..1\nok 1 a\nok 2 b\n").is_err());
    }

    #[test]
    fn a_case_that_is_left_out_is_no_other_outcome() {
        let cases = parse("1..1\nok 1 a\n# left out: b (c)\n").unwrap();
        assert_eq!(cases[1], ("b (c)".to_string(), Outcome::LeftOut));
        assert_eq!(parse("1..0\n# left out: b\n").unwrap().len(), 1);
    }

    #[test]
    fn a_file_s_names_become_a_pattern_of_just_them() {
        let text = "#!/usr/bin/env bats\n@test \"runs (a|b)\" {\n}\n@test \"is $HOME\"  {\n";
        assert_eq!(names(text), ["runs (a|b)", "is $HOME"]);
        assert_eq!(pattern(&names(text)), r"^(runs \(a\|b\)|is \$HOME)$");
    }
}
