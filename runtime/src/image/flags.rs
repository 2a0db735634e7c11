//! Flags of `stockade run --image`: those that people know from Podman and Docker, where they mean something without
//! a daemon.

use std::env;
use std::path::PathBuf;

use clap::Args;
use oci_spec::runtime::Capability;

use super::reference::{self, Reference};
use crate::size;

/// Gives all capabilities.
const ALL: &str = "ALL";

/// When an image is pulled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Pull {
    /// If it is not in the store
    #[default]
    Missing,
    /// Each time
    Always,
    /// Not at all
    Never,
}

/// Options for containers from images.
#[derive(Args, Debug, Default)]
#[group(skip)]
#[command(next_help_heading = "Containers from images")]
pub struct Flags {
    /// Run an image: [HOST/]NAME[:TAG], oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:NAME]
    #[arg(long, value_name = "IMAGE", value_parser = reference)]
    pub image: Option<Reference>,
    #[command(flatten)]
    pub store: StoreFlag,
    /// When to look for the image where it comes from
    #[arg(long, value_enum, default_value = "missing", value_name = "WHEN", requires = "image")]
    pub pull: Pull,
    /// Container identifier; one is made up if there is none
    #[arg(long, value_name = "ID", requires = "image", conflicts_with = "container_id")]
    pub name: Option<String>,
    /// Set an environment variable, or take it over from this command's environment
    #[arg(short, long, value_name = "NAME[=VALUE]", requires = "image", value_parser = variable)]
    pub env: Vec<String>,
    /// Mount a file or directory of the host
    #[arg(short, long, value_name = "SOURCE:PATH[:ro]", requires = "image", value_parser = volume)]
    pub volume: Vec<Volume>,
    /// Working directory
    #[arg(short, long, value_name = "DIR", requires = "image")]
    pub workdir: Option<String>,
    /// User and group, by names of the image or by numbers
    #[arg(short, long, value_name = "USER[:GROUP]", requires = "image")]
    pub user: Option<String>,
    /// Pass standard input on
    #[arg(short, long, requires = "image")]
    pub interactive: bool,
    /// Run with a terminal
    #[arg(short, long, requires = "image")]
    pub tty: bool,
    /// Remove the container when it has ended, which is what happens anyway
    #[arg(long, requires = "image", conflicts_with_all = ["keep", "detach"])]
    pub rm: bool,
    /// Limit of memory, with k, m or g
    #[arg(short, long, value_name = "BYTES", requires = "image", value_parser = bytes)]
    pub memory: Option<i64>,
    /// Number of CPUs, perhaps with a fraction
    #[arg(long, value_name = "NUMBER", requires = "image", value_parser = cpus)]
    pub cpus: Option<f64>,
    /// Limit of processes and threads, -1 for none
    #[arg(long, value_name = "NUMBER", requires = "image", allow_negative_numbers = true)]
    pub pids_limit: Option<i64>,
    /// Make the root filesystem read-only, but for /run, /tmp, /var/tmp and the image's volumes
    #[arg(long, requires = "image")]
    pub read_only: bool,
    /// Program in place of the image's entrypoint, or a list of words as JSON
    #[arg(long, value_name = "PROGRAM", requires = "image")]
    pub entrypoint: Option<String>,
    /// Host name
    #[arg(long, value_name = "NAME", requires = "image")]
    pub hostname: Option<String>,
    /// Network: none is all there is
    #[arg(long, alias = "network", value_name = "MODE", requires = "image", value_parser = ["none"])]
    pub net: Option<String>,
    /// Add a capability, or all
    #[arg(long, value_name = "NAME", requires = "image", value_parser = capability)]
    pub cap_add: Vec<String>,
    /// Drop a capability, or all
    #[arg(long, value_name = "NAME", requires = "image", value_parser = capability)]
    pub cap_drop: Vec<String>,
}

/// Where images are kept.
#[derive(Args, Clone, Debug, Default)]
#[group(skip)]
pub struct StoreFlag {
    /// Directory of the image store [default: /var/lib/stockade, or $STOCKADE_IMAGE_STORE]
    #[arg(long, value_name = "DIR")]
    image_store: Option<PathBuf>,
}

impl StoreFlag {
    /// The directory.
    pub fn path(&self) -> PathBuf {
        let from_env = || env::var_os(super::store::ENV).filter(|value| !value.is_empty()).map(PathBuf::from);
        self.image_store.clone().or_else(from_env).unwrap_or_else(|| super::store::DEFAULT.into())
    }
}

/// A bind mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// On the host, absolute.
    pub source: String,
    /// In the container, absolute.
    pub destination: String,
    /// Whether the container may not write.
    pub read_only: bool,
}

impl Flags {
    /// The entrypoint, if it is not the image's.
    pub fn entrypoint(&self) -> Option<Vec<String>> {
        let text = self.entrypoint.as_ref()?;
        if text.is_empty() {
            return Some(Vec::new());
        }
        Some(serde_json::from_str(text).unwrap_or_else(|_| vec![text.clone()]))
    }

    /// Variables with their values. One that is not set here is not set there.
    pub fn environment(&self) -> Vec<String> {
        let value = |entry: &String| match entry.contains('=') {
            true => Some(entry.clone()),
            false => env::var(entry).ok().map(|value| format!("{entry}={value}")),
        };
        self.env.iter().filter_map(value).collect()
    }

    /// The capabilities of a container that has these by default, sorted.
    pub fn capabilities(&self, default: &[&str]) -> Vec<String> {
        let mut all: Vec<String> = match self.cap_drop.iter().any(|name| name == ALL) {
            true => Vec::new(),
            false => default.iter().map(|name| (*name).to_owned()).collect(),
        };
        if self.cap_add.iter().any(|name| name == ALL) {
            all = every_capability();
        }
        all.retain(|name| !self.cap_drop.contains(name));
        all.extend(self.cap_add.iter().filter(|name| *name != ALL).cloned());
        all.sort();
        all.dedup();
        all
    }

    /// Whether the user asked for a capability.
    pub fn adds(&self, capability: &str) -> bool {
        self.cap_add.iter().any(|name| name == capability || name == ALL)
    }
}

/// All that the kernel has, by the names of capabilities(7).
fn every_capability() -> Vec<String> {
    crate::bundle::CAPABILITIES.iter().map(|name| (*name).to_owned()).collect()
}

fn reference(text: &str) -> Result<Reference, reference::Error> {
    text.parse()
}

fn variable(text: &str) -> Result<String, String> {
    match text.split('=').next() {
        Some("") | None => Err("a variable has a name: write NAME=VALUE".into()),
        Some(_) if text.contains('\0') => Err("a variable has no NUL in it".into()),
        Some(_) => Ok(text.to_owned()),
    }
}

fn bytes(text: &str) -> Result<i64, String> {
    match size::parse_bytes(text) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err("write a number of bytes, or one with k, m or g".into()),
    }
}

fn cpus(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        // A quota has at least 1 ms in 100 (sched-bwc.rst).
        Ok(cpus) if (0.01..=1024.0).contains(&cpus) => Ok(cpus),
        _ => Err("write a number of CPUs of at least 0.01, such as 1.5".into()),
    }
}

fn capability(text: &str) -> Result<String, String> {
    let name = text.to_ascii_uppercase();
    if name == ALL {
        return Ok(name);
    }
    let name = if name.starts_with("CAP_") { name } else { format!("CAP_{name}") };
    match serde_json::from_value::<Capability>(name.as_str().into()) {
        Ok(_) => Ok(name),
        Err(_) => Err("that is no capability: write a name such as NET_RAW, or ALL".into()),
    }
}

fn volume(text: &str) -> Result<Volume, String> {
    let mut parts = text.split(':');
    let (Some(source), Some(destination)) = (parts.next(), parts.next()) else {
        return Err("name a path of the host and one of the container: SOURCE:PATH".into());
    };
    if !source.starts_with(['/', '.']) {
        return Err("a named volume needs a daemon that keeps it: give a path of the host".into());
    }
    let absolute = std::path::absolute(source).map_err(|e| e.to_string())?;
    let source = absolute.into_os_string().into_string().map_err(|_| "a path must be UTF-8".to_owned())?;
    if !destination.starts_with('/') || destination.trim_matches('/').is_empty() {
        return Err("the path in the container must be absolute, and not its root".into());
    }
    let mut read_only = false;
    for option in parts.flat_map(|options| options.split(',')) {
        match option {
            "ro" => read_only = true,
            "rw" => read_only = false,
            // What it says anyway.
            "rbind" | "" => {}
            other => {
                return Err(format!("the option {other:?} cannot be honoured: ro and rw can"));
            }
        }
    }
    Ok(Volume { source, destination: destination.into(), read_only })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use clap::{Command, FromArgMatches};

    /// What these words of a command line say.
    pub fn flags(words: &[&str]) -> Flags {
        parse(words).unwrap_or_else(|e| panic!("{e}"))
    }

    fn parse(words: &[&str]) -> Result<Flags, clap::Error> {
        let other = |name: &'static str| clap::Arg::new(name).long(name).action(clap::ArgAction::SetTrue);
        let command = Flags::augment_args(Command::new("run"));
        let command = command.args([other("container_id"), other("keep"), other("detach")]);
        let words = ["run", "--image", "x"].iter().chain(words);
        command.try_get_matches_from(words).and_then(|matches| Flags::from_arg_matches(&matches))
    }

    #[test]
    fn volumes_are_paths_of_the_host() {
        let volume = flags(&["-v", "/a:/b:ro"]).volume.remove(0);
        assert_eq!(volume, Volume { source: "/a".into(), destination: "/b".into(), read_only: true });
        let volume = flags(&["-v", "./a:/b"]).volume.remove(0);
        assert!(volume.source.starts_with('/') && volume.source.ends_with("/a") && !volume.read_only);
        for wrong in ["name:/b", "/a", "/a:b", "/a:/", "/a:/b:z", "/a:/b:U,ro", ":/b"] {
            assert!(parse(&["-v", wrong]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn numbers_that_make_no_sense_are_refused() {
        for words in [
            ["--memory", "lots"],
            ["--memory", "0"],
            ["--cpus", "0"],
            ["--cpus", "NaN"],
            ["--cpus", "many"],
            ["--cap-add", "FLY"],
            ["--net", "host"],
            ["--env", "=x"],
            ["--pull", "sometimes"],
        ] {
            assert!(parse(&words).is_err(), "{words:?}");
        }
        assert_eq!(flags(&["--memory", "1g"]).memory, Some(1 << 30));
        assert_eq!(flags(&["--pids-limit", "-1"]).pids_limit, Some(-1));
    }

    #[test]
    fn a_variable_without_a_value_is_this_commands() {
        let flags = flags(&["-e", "PATH", "-e", "STOCKADE_NOT_SET", "-e", "A="]);
        let path = env::var("PATH").map(|path| format!("PATH={path}")).unwrap();
        // Another test of this program changes PATH.
        let environment = flags.environment();
        assert_eq!(environment.len(), 2);
        assert!(environment[0].starts_with("PATH=") && path.starts_with("PATH="));
        assert_eq!(environment[1], "A=");
    }
}
