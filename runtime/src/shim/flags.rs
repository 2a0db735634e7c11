//! How containerd calls a shim: flags as Go's `flag` package has them, then one word.

use std::path::PathBuf;

/// What the shim is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start a sandbox's shim, or find the one that runs, and say where it listens.
    Start,
    /// Remove what a shim that is gone has left of one container.
    Delete,
    /// Say what this runtime is.
    Info,
    /// Say which version this is.
    Version,
}

/// The command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flags {
    /// What is to be done.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// The container, or the sandbox.
    pub id: String,
    /// containerd's own socket.
    pub address: String,
    /// A program that publishes events, where there is no socket for them.
    pub publish_binary: String,
    /// The container's bundle, for `delete`.
    pub bundle: PathBuf,
    /// Log more.
    pub debug: bool,
}

/// Understands a command line without the program's name.
pub fn parse(arguments: impl Iterator<Item = String>) -> Result<Flags, String> {
    let mut flags = Flags {
        action: Action::Start,
        namespace: String::new(),
        id: String::new(),
        address: String::new(),
        publish_binary: String::new(),
        bundle: PathBuf::new(),
        debug: false,
    };
    let mut arguments = arguments;
    let mut action = None;
    while let Some(argument) = arguments.next() {
        let Some(flag) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
            action = match argument.as_str() {
                "start" => Some(Action::Start),
                "delete" => Some(Action::Delete),
                other => return Err(format!("unknown command {other:?}: it is start or delete")),
            };
            break;
        };
        let (name, mut value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        match name {
            "debug" => flags.debug = value.is_none_or(|value| value != "false"),
            "info" => action = Some(Action::Info),
            // The second is what CRI-O asks.
            "v" | "version" => action = Some(Action::Version),
            "namespace" | "id" | "address" | "publish-binary" | "bundle" | "socket" => {
                let value = value.take().or_else(|| arguments.next());
                let value = value.ok_or_else(|| format!("the flag -{name} needs a value"))?;
                match name {
                    "namespace" => flags.namespace = value,
                    "id" => flags.id = value,
                    "address" => flags.address = value,
                    "publish-binary" => flags.publish_binary = value,
                    "bundle" => flags.bundle = value.into(),
                    // An old containerd's way to say where to listen; a shim that starts itself decides that.
                    _ => {}
                }
            }
            other => return Err(format!("unknown flag -{other}")),
        }
        if matches!(action, Some(Action::Info | Action::Version)) {
            break;
        }
    }
    flags.action = action.ok_or("no command: it is start or delete")?;
    if matches!(flags.action, Action::Start | Action::Delete) && flags.namespace.is_empty() {
        return Err("the flag -namespace is missing".into());
    }
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Flags, String> {
        parse(line.split(' ').map(str::to_owned))
    }

    #[test]
    fn what_containerd_says_is_understood() {
        let flags = parsed(
            "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id abc -debug start",
        )
        .unwrap();
        assert_eq!(flags.action, Action::Start);
        assert_eq!((flags.namespace.as_str(), flags.id.as_str()), ("k8s.io", "abc"));
        assert_eq!(flags.publish_binary, "/usr/bin/containerd");
        assert!(flags.debug);
        let flags = parsed("--namespace=n --address= --id x -bundle /b delete").unwrap();
        assert_eq!((flags.action, flags.bundle), (Action::Delete, "/b".into()));
        assert_eq!(parsed("-info").unwrap().action, Action::Info);
        assert_eq!(parsed("-v").unwrap().action, Action::Version);
        assert_eq!(parsed("--version").unwrap().action, Action::Version);
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        for (line, part) in [
            ("-namespace n", "no command"),
            ("-namespace", "-namespace needs"),
            ("-id x start", "-namespace is missing"),
            ("-namespace n stop", "stop"),
            ("-colour red start", "-colour"),
        ] {
            assert!(parsed(line).unwrap_err().contains(part), "{line}");
        }
    }
}
