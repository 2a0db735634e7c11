//! What bats says, in the Test Anything Protocol: a line for each case, its output below as comments.

use std::collections::BTreeMap;

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

/// How the line begins above what a file of the suite said. Lines of bats do not begin so.
pub const FILE: &str = "== ";

/// The results in all that one run said.
pub fn parse(text: &str) -> Result<BTreeMap<Case, Outcome>, String> {
    let mut files: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in text.lines() {
        match (line.strip_prefix(FILE), files.last_mut()) {
            (Some(name), _) => files.push((name, Vec::new())),
            (None, Some((_, lines))) => lines.push(line),
            (None, None) => {}
        }
    }
    let mut results = BTreeMap::new();
    for (file, lines) in files {
        let cases = parse_file(&lines).map_err(|why| format!("{file}: {why}"))?;
        results.extend(cases.into_iter().map(|(name, outcome)| ((file.to_string(), name), outcome)));
    }
    Ok(results)
}

/// The cases of one file. One that was announced but of which nothing was said has failed: it did not end.
fn parse_file(lines: &[&str]) -> Result<Vec<(String, Outcome)>, String> {
    let mut planned = None;
    let mut cases = Vec::new();
    let mut left_out = Vec::new();
    for line in lines {
        if let Some(count) = line.strip_prefix("1..") {
            planned = count.trim().parse::<usize>().ok();
        } else if let Some(rest) = line.strip_prefix("ok ") {
            let (name, skip) = case(rest);
            cases.push((name, skip.map_or(Outcome::Passed, Outcome::Skipped)));
        } else if let Some(rest) = line.strip_prefix("not ok ") {
            cases.push((case(rest).0, Outcome::Failed));
        } else if let Some(name) = line.strip_prefix(LEFT_OUT) {
            left_out.push((name.trim().to_string(), Outcome::LeftOut));
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
        None => Ok(vec![("(nothing was said)".into(), Outcome::Failed)]),
    }
}

/// From `<number> <name>[ in <time>ms][ # skip <why>]` the name, without blanks around it, and the reason.
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
    (name.trim().to_string(), skip)
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

    fn file(text: &str) -> Result<Vec<(String, Outcome)>, String> {
        parse_file(&text.lines().collect::<Vec<_>>())
    }

    #[test]
    fn a_run_that_was_broken_off_keeps_what_it_said() {
        let text = "lab: on the way\n== a.bats\n1..1\nok 1 x\n== b.bats\n1..2\nnot ok 1 x\n# == c.bats\n";
        let results = parse(text).unwrap();
        let outcome = |file: &str, name: &str| results.get(&(file.into(), name.into()));
        assert_eq!(results.len(), 3);
        assert_eq!(outcome("a.bats", "x"), Some(&Outcome::Passed));
        assert_eq!(outcome("b.bats", "x"), Some(&Outcome::Failed));
        assert_eq!(outcome("b.bats", "(case 2 did not end)"), Some(&Outcome::Failed));
    }

    #[test]
    fn each_outcome_is_told_from_the_others() {
        let text = "1..4\nok 1 runs in 12ms\nnot ok 2 works in vain in 7ms\n# (in test file x)\n\
                    ok 3 waits  # skip test requires systemd\nnot ok 4 hangs in 9ms # timeout after 180s\n";
        let cases = file(text).unwrap();
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
        let cases = file("1..3\nok 1 a\nok 2 b\n").unwrap();
        assert_eq!(cases.len(), 3);
        assert_eq!(cases[2].1, Outcome::Failed);
        assert_eq!(file("").unwrap()[0].1, Outcome::Failed);
        assert!(file("1..1\nok 1 a\nok 2 b\n").is_err());
    }

    #[test]
    fn a_case_that_is_left_out_is_no_other_outcome() {
        let cases = file("1..1\nok 1 a\n# left out: b (c)\n").unwrap();
        assert_eq!(cases[1], ("b (c)".to_string(), Outcome::LeftOut));
        assert_eq!(file("1..0\n# left out: b\n").unwrap().len(), 1);
    }

    #[test]
    fn a_file_s_names_become_a_pattern_of_just_them() {
        let text = "#!/usr/bin/env bats\n@test \"runs (a|b)\" {\n}\n@test \"is $HOME\"  {\n";
        assert_eq!(names(text), ["runs (a|b)", "is $HOME"]);
        assert_eq!(pattern(&names(text)), r"^(runs \(a\|b\)|is \$HOME)$");
    }
}
