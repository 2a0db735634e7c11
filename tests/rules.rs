//! What holds for the sources as a whole: where dependencies come from, under which licences, how often, and how much
//! of our own code the compiler does not check.
//!
//! `deny.toml` is cargo-deny's configuration, which `make lint` runs where it is installed; here the parts of it that
//! need no network are looked at without. Of known vulnerabilities nothing can be said offline.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use serde_json::Value;

/// What is built is for one target.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The registry, as Cargo.lock names it.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Crates that bring their licence as a file only, and which it is.
const LICENCE_FILES: [(&str, &str); 1] = [("rust-criu@0.6.1", "MIT")];

/// The part of deny.toml that is looked at.
#[derive(Deserialize)]
struct Rules {
    licenses: Licences,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licences {
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    skip: Vec<Skip>,
}

#[derive(Deserialize)]
struct Skip {
    /// NAME@VERSION.
    #[serde(rename = "crate")]
    package: String,
}

/// One version of a crate.
struct Package {
    name: String,
    version: String,
    /// Its licence as an SPDX expression.
    licence: String,
    /// Where it comes from; nothing for our own.
    source: Option<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

fn rules() -> Rules {
    let text = fs::read_to_string(root().join("deny.toml")).expect("read deny.toml");
    toml::from_str(&text).expect("deny.toml")
}

/// All that is built for our target, with what only builds and tests need.
fn packages() -> Vec<Package> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--offline", "--all-features"])
        .args(["--filter-platform", TARGET])
        .current_dir(root())
        .output()
        .expect("run cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo's JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    packages
        .iter()
        .map(|package| Package {
            name: text(&package["name"]),
            version: text(&package["version"]),
            licence: text(&package["license"]),
            source: package["source"].as_str().map(str::to_owned),
        })
        .collect()
}

#[test]
fn every_dependency_comes_from_the_registry() {
    for package in packages() {
        let known = package.source.as_deref().is_none_or(|source| source == REGISTRY);
        assert!(known, "{} {} comes from {:?}", package.name, package.version, package.source);
    }
}

#[test]
fn every_licence_is_one_that_is_allowed() {
    let allowed: BTreeSet<_> = rules().licenses.allow.into_iter().collect();
    for package in packages() {
        // Some old crates write a slash for OR.
        let mode = spdx::ParseMode { allow_slash_as_or_operator: true, ..spdx::ParseMode::STRICT };
        let id = format!("{}@{}", package.name, package.version);
        let in_file = LICENCE_FILES.iter().find(|(name, _)| *name == id).map(|(_, licence)| *licence);
        let expression = spdx::Expression::parse_mode(in_file.unwrap_or(&package.licence), mode);
        let expression = expression.unwrap_or_else(|e| panic!("{} {}: {e}", package.name, package.version));
        let fits = expression.evaluate(|term| allowed.contains(&term.to_string()));
        assert!(fits, "{} {} is under {}", package.name, package.version, package.licence);
    }
}

#[test]
fn a_second_version_of_a_crate_has_its_reason() {
    let excused: BTreeSet<_> = rules().bans.skip.into_iter().map(|skip| skip.package).collect();
    let mut versions: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for package in packages() {
        let id = format!("{}@{}", package.name, package.version);
        versions.entry(package.name).or_default().push(id);
    }
    let duplicates = || versions.values().filter(|versions| versions.len() > 1);
    for several in duplicates() {
        let unexcused: Vec<_> = several.iter().filter(|version| !excused.contains(*version)).collect();
        assert!(unexcused.len() <= 1, "more than one version: {unexcused:?}");
    }
    let needed: BTreeSet<_> = duplicates().flatten().cloned().collect();
    let stale: Vec<_> = excused.difference(&needed).collect();
    assert!(stale.is_empty(), "deny.toml excuses what there is not, or not twice: {stale:?}");
}

/// The `unsafe` blocks, implementations and functions in what a folder ships: without tests.
fn count_unsafe(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    entries
        .map(|entry| entry.expect("list a folder").path())
        .filter(|path| !["tests", "target"].iter().any(|name| path.ends_with(name)))
        .map(|path| match path.extension().and_then(|extension| extension.to_str()) {
            _ if path.is_dir() => count_unsafe(&path),
            Some("rs") if !path.ends_with("tests.rs") && !path.ends_with("testing.rs") => {
                let text = fs::read_to_string(&path).expect("read a source");
                let shipped = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
                let code = shipped.lines().filter(|line| !line.trim_start().starts_with("//"));
                let begins = ["unsafe {", "unsafe impl", "unsafe fn", "unsafe extern"];
                code.map(|line| begins.iter().map(|word| line.matches(word).count()).sum::<usize>()).sum()
            }
            _ => 0,
        })
        .sum()
}

#[test]
fn unsafe_code_is_as_much_as_the_security_page_says() {
    let page = fs::read_to_string(root().join("vmm/SECURITY.md")).expect("read the page");
    for folder in ["vmm", "runtime", "agent"] {
        let count = count_unsafe(&root().join(folder));
        let row = page.lines().find(|line| line.starts_with(&format!("| `{folder}/` |")));
        let row = row.unwrap_or_else(|| panic!("no row for {folder}"));
        assert!(
            row.starts_with(&format!("| `{folder}/` | {count} |")),
            "{folder} has {count}, the page: {row}"
        );
    }
}
