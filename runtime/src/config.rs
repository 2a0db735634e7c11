//! Settings: /etc/stockade/config.toml and the environment.
//!
//! Every value has a default, so no file is needed. A value that is there is right or an error that names it and
//! says where it stands; a key nobody knows is an error too, because it is a typing mistake.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where the file is looked for.
pub const PATH: &str = "/etc/stockade/config.toml";

/// Environment variables, which go before the file.
pub const ENV_GUEST_DIR: &str = "STOCKADE_GUEST_DIR";
/// Number of vCPUs.
pub const ENV_VCPUS: &str = "STOCKADE_VCPUS";
/// Guest memory, as in the file.
pub const ENV_MEMORY: &str = "STOCKADE_MEMORY";

/// Whether VMs may be entered, as in the file.
pub const ENV_ENTER: &str = "STOCKADE_ENTER";

/// A value and where it was found, for errors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sourced<T> {
    /// The value.
    pub value: T,
    /// A phrase like `STOCKADE_VCPUS` or `vm.vcpus in /etc/stockade/config.toml`.
    pub origin: String,
}

/// All settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Directory with kernel and initrd, in place of the usual ones.
    pub guest_dir: Option<PathBuf>,
    /// Overrides of the VM's size by the environment: they go before what the bundle says.
    pub environment: SizeSettings,
    /// Defaults of the VM's size by the file: for what the bundle does not say.
    pub file: SizeSettings,
    /// Whether who runs this host may enter the guest of a VM that is started now.
    pub enter: bool,
}

/// vCPUs and memory as somebody wrote them; ranges are checked when the VM is sized.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SizeSettings {
    /// Number of vCPUs.
    pub vcpus: Option<Sourced<String>>,
    /// Guest memory: bytes, or a number with K, M, G or T (powers of 1024).
    pub memory: Option<Sourced<String>>,
}

/// Errors of the settings.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the file exists but cannot be read
    #[error("cannot read {0}: {1}")]
    Read(PathBuf, #[source] io::Error),
    /// the file is not what it should be
    #[error("{path} is not understood: {reason}")]
    Parse { path: PathBuf, reason: String },
    /// a variable has a value that it cannot have
    #[error("{0} is {1:?}: it can be 1 or 0")]
    Switch(&'static str, String),
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct File {
    guest_dir: Option<PathBuf>,
    #[serde(default)]
    vm: Vm,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Vm {
    vcpus: Option<i64>,
    memory: Option<Memory>,
    #[serde(default)]
    enter: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Memory {
    Bytes(i64),
    Text(String),
}

impl Settings {
    /// Reads the file, if there is one, and the environment.
    pub fn load() -> Result<Self, Error> {
        Self::from(Path::new(PATH), |name| env::var(name).ok().filter(|v| !v.is_empty()))
    }

    fn from(path: &Path, variable: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let file = match fs::read_to_string(path) {
            Ok(text) => parse(path, &text)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => File::default(),
            Err(e) => return Err(Error::Read(path.into(), e)),
        };
        let from_env = |name: &str| variable(name).map(|value| Sourced { value, origin: name.into() });
        let from_file = |key: &str, value: Option<String>| {
            value.map(|value| Sourced { value, origin: format!("{key} in {}", path.display()) })
        };
        let enter = match variable(ENV_ENTER).as_deref() {
            None => file.vm.enter,
            Some("1") => true,
            Some("0") => false,
            Some(other) => return Err(Error::Switch(ENV_ENTER, other.into())),
        };
        Ok(Settings {
            enter,
            guest_dir: variable(ENV_GUEST_DIR).map(PathBuf::from).or(file.guest_dir),
            environment: SizeSettings { vcpus: from_env(ENV_VCPUS), memory: from_env(ENV_MEMORY) },
            file: SizeSettings {
                vcpus: from_file("vm.vcpus", file.vm.vcpus.map(|n| n.to_string())),
                memory: from_file(
                    "vm.memory",
                    file.vm.memory.map(|memory| match memory {
                        Memory::Bytes(n) => n.to_string(),
                        Memory::Text(text) => text,
                    }),
                ),
            },
        })
    }
}

fn parse(path: &Path, text: &str) -> Result<File, Error> {
    toml::from_str(text).map_err(|e| {
        // The parser's own text is a drawing of several lines.
        let line = e.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        let reason = e.message().replace('\n', " ");
        let reason = line.map_or(reason.clone(), |line| format!("line {line}: {reason}"));
        Error::Parse { path: path.into(), reason }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, variables: &[(&str, &str)]) -> Result<Settings, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        fs::write(&path, text).unwrap();
        Settings::from(&path, |name| variables.iter().find(|v| v.0 == name).map(|v| v.1.to_owned()))
    }

    #[test]
    fn no_file_and_no_environment_is_all_defaults() {
        let settings = Settings::from(Path::new("/nonexistent"), |_| None).unwrap();
        assert_eq!(settings, Settings::default());
    }

    #[test]
    fn file_and_environment_are_told_apart() {
        let settings = load(
            "guest_dir = \"/a\"\n[vm]\nvcpus = 2\nmemory = \"512M\"\n",
            &[("STOCKADE_VCPUS", "3"), ("STOCKADE_GUEST_DIR", "/b")],
        )
        .unwrap();
        assert_eq!(settings.guest_dir, Some("/b".into()));
        assert_eq!(settings.environment.vcpus.unwrap().value, "3");
        assert_eq!(settings.environment.memory, None);
        assert_eq!(settings.file.vcpus.unwrap().value, "2");
        let memory = settings.file.memory.unwrap();
        assert_eq!(memory.value, "512M");
        assert!(memory.origin.starts_with("vm.memory in "));
        assert_eq!(load("vm.memory = 1024", &[]).unwrap().file.memory.unwrap().value, "1024");
    }

    #[test]
    fn nobody_enters_unless_it_is_allowed() {
        let enter = |text: &str, variables: &[(&str, &str)]| load(text, variables).map(|all| all.enter);
        assert!(!enter("", &[]).unwrap() && !enter("[vm]\nvcpus = 2", &[]).unwrap());
        assert!(enter("vm.enter = true", &[]).unwrap() && enter("", &[("STOCKADE_ENTER", "1")]).unwrap());
        assert!(!enter("vm.enter = true", &[("STOCKADE_ENTER", "0")]).unwrap());
        assert!(enter("vm.enter = 1", &[]).is_err());
        let error = enter("", &[("STOCKADE_ENTER", "perhaps")]).unwrap_err().to_string();
        assert!(error.contains("STOCKADE_ENTER") && error.contains("perhaps"), "{error}");
    }

    #[test]
    fn mistakes_are_named_with_their_line_in_one_line() {
        for (text, part) in [
            ("\n\n[vm]\nvcpu = 2\n", "vcpu"),
            ("[vm]\nvcpus = \"two\"", "line 2"),
            ("[vm", "line 1"),
            ("kernel = \"/x\"", "kernel"),
        ] {
            let error = load(text, &[]).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
