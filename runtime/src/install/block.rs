//! Our lines in containerd's configuration, which has one file and may be anybody's.
//!
//! They stand at its end, between two marks. TOML lets a table be added there whatever comes before, unless somebody has
//! written the same one: that is found by reading the result before it is written.

use std::path::Path;

use toml::{Table, Value};

use super::Error;

const BEGIN: &str = "# Begin of what `stockade install` wrote; `stockade uninstall` removes it.\n";
const END: &str = "# End of what `stockade install` wrote.\n";

/// The lines.
#[derive(Debug, PartialEq, Eq)]
pub struct Block(String);

impl Block {
    /// For a file with this text, which says in which version's words the plug-in is called; where there is nothing yet, in
    /// those of the containerd that there is, of this major version if that is known.
    ///
    /// Pods are made with a pause container, as containerd does unless `sandboxer = "shim"` says otherwise, under 2.x too:
    /// it costs no process here. By the sandbox API containerd would not pass on which of a pod's annotations it allows, so
    /// that `io.stockade.vcpus` and the like could not be honoured, and 2.1 dies of any pod with `hostNetwork`.
    pub fn containerd(path: &Path, old: &str, major: Option<u32>) -> Result<Self, Error> {
        let rest = Self::taken_from(old).unwrap_or_else(|| old.to_owned());
        let table = parse(path, &rest)?;
        let version = table.get("version").and_then(Value::as_integer);
        let plugin = match version {
            None if table.is_empty() && major >= Some(2) => return Ok(Self::of("version = 3\n", V3)),
            // All know it that know a shim of version 2.
            None if table.is_empty() => return Ok(Self::of("version = 2\n", V2)),
            None | Some(1) => "cri",
            // containerd 2 reads it as well.
            Some(2) => V2,
            Some(3 | 4) => V3,
            Some(other) => {
                let reason = format!("its version is {other}, and 1 to 4 are known");
                return Err(Error::Config { path: path.to_owned(), reason });
            }
        };
        Ok(Self::of("", plugin))
    }

    fn of(before: &str, plugin: &str) -> Self {
        Block(format!(
            "{before}[plugins.{plugin}.containerd.runtimes.stockade]\nruntime_type = \"io.containerd.stockade.v2\"\n\
             pod_annotations = [\"io.stockade.*\"]\nprivileged_without_host_devices = true\n"
        ))
    }

    /// The file with the block, in place of an older one.
    pub fn put_into(&self, path: &Path, old: &str) -> Result<String, Error> {
        let mut text = Self::taken_from(old).unwrap_or_else(|| old.to_owned());
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.extend([BEGIN, &self.0, END]);
        parse(path, &text)?;
        Ok(text)
    }

    /// The file without the block; `None` if it has none.
    pub fn taken_from(old: &str) -> Option<String> {
        let (before, rest) = old.split_once(BEGIN)?;
        let (_, after) = rest.split_once(END)?;
        Some(format!("{before}{after}"))
    }
}

const V2: &str = "\"io.containerd.grpc.v1.cri\"";
const V3: &str = "\"io.containerd.cri.v1.runtime\"";

/// The major version in what `containerd --version` writes, as in `containerd github.com/containerd/containerd 1.6.20`.
pub fn major(text: &str) -> Option<u32> {
    text.split_whitespace().nth(2)?.trim_start_matches('v').split('.').next()?.parse().ok()
}

fn parse(path: &Path, text: &str) -> Result<Table, Error> {
    text.parse::<Table>().map_err(|e| {
        let line = e.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        Error::Config { path: path.to_owned(), reason: format!("line {line}: {}", e.message()) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(old: &str) -> Result<String, Error> {
        let path = Path::new("/etc/containerd/config.toml");
        Block::containerd(path, old, None)?.put_into(path, old)
    }

    #[test]
    fn where_nothing_is_said_the_installed_version_decides() {
        let path = Path::new("/etc/containerd/config.toml");
        for (said, version) in [
            ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u2\n", 2),
            ("containerd github.com/containerd/containerd v1.7.24 88bf19b\n", 2),
            ("containerd github.com/containerd/containerd/v2 v2.1.9 88bf19b\n", 3),
            ("containerd containerd.io 10.0.0", 3),
            ("", 2),
        ] {
            let block = Block::containerd(path, "", major(said)).unwrap();
            let text = block.put_into(path, "").unwrap();
            assert_eq!(text.parse::<Table>().unwrap()["version"].as_integer(), Some(version), "{said}");
            // A second time it is the same, although there is something by then.
            assert_eq!(
                Block::containerd(path, &text, major(said)).unwrap().put_into(path, &text).unwrap(),
                text
            );
        }
        let kept = Block::containerd(path, "version = 2\n", Some(2)).unwrap();
        assert!(kept.put_into(path, "version = 2\n").unwrap().contains("io.containerd.grpc.v1.cri"));
    }

    #[test]
    fn the_runtime_is_where_each_version_looks_for_it() {
        for (old, plugin) in [
            ("", "io.containerd.grpc.v1.cri"),
            (
                "version = 2\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n",
                "io.containerd.grpc.v1.cri",
            ),
            (
                "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd]",
                "io.containerd.cri.v1.runtime",
            ),
            ("version = 4\n", "io.containerd.cri.v1.runtime"),
            ("disabled_plugins = [\"cri\"]\n", "cri"),
        ] {
            let table: Table = put(old).unwrap().parse().unwrap();
            let runtime = &table["plugins"][plugin]["containerd"]["runtimes"]["stockade"];
            assert_eq!(runtime["runtime_type"].as_str(), Some("io.containerd.stockade.v2"), "{old}");
        }
    }

    #[test]
    fn what_was_there_is_there_again_afterwards() {
        for old in ["version = 2\n# A remark\n[grpc]\n  address = \"/x\"\n", "", "version = 3\n"] {
            let with = put(old).unwrap();
            assert_eq!(Block::taken_from(&with).unwrap(), old);
            assert_eq!(put(&with).unwrap(), with, "a second time");
        }
        assert_eq!(Block::taken_from("version = 2\n"), None);
    }

    #[test]
    fn what_cannot_be_added_to_is_named_with_its_line() {
        let same = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.stockade]\n";
        for (old, word) in [(same, "line "), ("version = 9\n", "version is 9"), ("version =\n", "line 1")] {
            let error = put(old).unwrap_err().to_string();
            assert!(
                error.contains(word) && error.contains("config.toml") && !error.contains('\n'),
                "{error}"
            );
        }
    }
}
