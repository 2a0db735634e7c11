//! What `--image` names: a place where an image is, and which one of those there.
//!
//! Local places have a prefix, as with other tools: `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]` and
//! `docker-archive:FILE[:NAME]`. Everything else is a name in a registry, with `docker://` before it or not, by the
//! grammar of the distribution specification: `[HOST[:PORT]/]NAME[:TAG][@DIGEST]`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::digest::Digest;

/// The registry of names without a host, as everybody who uses containers expects it.
pub const DEFAULT_REGISTRY: &str = "docker.io";
/// Where names of one part are in the default registry.
const DEFAULT_NAMESPACE: &str = "library";
/// Bytes of a repository's name, host included (distribution specification, pulling manifests).
const NAME_MAX: usize = 255;
/// Bytes of a tag, from the same place.
const TAG_MAX: usize = 128;

/// An image as the user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// A directory in the OCI image layout.
    Layout(Local),
    /// The same as a tar archive.
    Archive(Local),
    /// What `docker save` writes.
    DockerArchive(Local),
    /// In a registry.
    Registry(Name),
}

/// A file or directory of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// Where.
    pub path: PathBuf,
    /// Which of the images there; needed where there is more than one.
    pub tag: Option<String>,
}

/// A name in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// `host` or `host:port`.
    pub registry: String,
    /// Without host and tag.
    pub repository: String,
    /// Tag, where there is one.
    pub tag: Option<String>,
    /// Digest, which goes before the tag.
    pub digest: Option<Digest>,
}

/// What is no reference.
#[derive(Debug, thiserror::Error)]
#[error("{reference:?} names no image: {reason}")]
pub struct Error {
    reference: String,
    reason: String,
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |reason: String| Error { reference: text.chars().take(200).collect(), reason };
        let local = |rest: &str| {
            // As with other tools, the first colon ends the path.
            let (path, tag) = match rest.split_once(':') {
                Some((path, tag)) if !tag.is_empty() => (path, Some(tag.to_owned())),
                Some((path, _)) => (path, None),
                None => (rest, None),
            };
            if path.is_empty() {
                return Err(wrong("give the path after the colon, as in oci:DIR:TAG".into()));
            }
            Ok(Local { path: path.into(), tag })
        };
        match text.split_once(':') {
            Some(("oci", rest)) => Ok(Reference::Layout(local(rest)?)),
            Some(("oci-archive", rest)) => Ok(Reference::Archive(local(rest)?)),
            Some(("docker-archive", rest)) => Ok(Reference::DockerArchive(local(rest)?)),
            Some((kind @ ("dir" | "docker-daemon" | "containers-storage" | "ostree" | "sif"), _)) => {
                Err(wrong(format!(
                    "{kind}: is not supported; copy it with skopeo to oci:, oci-archive: or a registry"
                )))
            }
            _ => {
                let name = text.strip_prefix("docker://").unwrap_or(text);
                parse_name(name).map(Reference::Registry).map_err(wrong)
            }
        }
    }
}

fn parse_name(text: &str) -> Result<Name, String> {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse::<Digest>().map_err(|e| e.to_string())?)),
        None => (text, None),
    };
    // A colon after the last slash is a tag's; one before it is a port's.
    let (path, tag) = match rest.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
        _ => (rest, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err("a tag has up to 128 letters, digits, and `_`, `.`, `-` after the first".into());
    }
    let (registry, repository) = match path.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest.to_owned()),
        Some(_) => (DEFAULT_REGISTRY, path.to_owned()),
        None => (DEFAULT_REGISTRY, format!("{DEFAULT_NAMESPACE}/{path}")),
    };
    if !is_host(registry) {
        return Err(format!("{registry:?} is no host with an optional port"));
    }
    if registry.len() + repository.len() >= NAME_MAX || !repository.split('/').all(is_component) {
        return Err(
            "a name has lower-case letters and digits, with single `.`, `_`, `__` or dashes between them"
                .into(),
        );
    }
    // A digest says it all.
    let tag = match (tag, &digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, Some(_)) => None,
        (None, None) => Some("latest".to_owned()),
    };
    Ok(Name { registry: registry.into(), repository, tag, digest })
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=TAG_MAX).contains(&tag.len())
        && tag.bytes().enumerate().all(|(i, b)| word(b) || (i > 0 && matches!(b, b'.' | b'-')))
}

fn is_host(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (text, None),
    };
    let v6 = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let good = match v6 {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            let part = |part: &str| {
                !part.is_empty()
                    && !part.starts_with('-')
                    && !part.ends_with('-')
                    && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            };
            host.split('.').all(part)
        }
    };
    good && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(text: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut separator = String::new();
    for (index, byte) in text.bytes().enumerate() {
        if !alphanumeric(byte) {
            separator.push(byte.into());
            continue;
        }
        let between = matches!(&*separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-');
        if !between || (index == separator.len() && index > 0) {
            return false;
        }
        separator.clear();
    }
    !text.is_empty() && separator.is_empty()
}

impl Name {
    /// What the distribution API is asked for: the digest, or else the tag.
    pub fn version(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".into(),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, local) = match self {
            Reference::Layout(local) => ("oci", local),
            Reference::Archive(local) => ("oci-archive", local),
            Reference::DockerArchive(local) => ("docker-archive", local),
            Reference::Registry(name) => return name.fmt(f),
        };
        write!(f, "{kind}:{}", local.path.display())?;
        match &local.tag {
            Some(tag) => write!(f, ":{tag}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        text.parse::<Reference>().map_or_else(|e| panic!("{e}"), |reference| reference.to_string())
    }

    #[test]
    fn short_names_mean_what_everybody_expects() {
        assert_eq!(shown("debian"), "docker.io/library/debian:latest");
        assert_eq!(shown("user/app:1.2"), "docker.io/user/app:1.2");
        assert_eq!(shown("docker://debian:12"), "docker.io/library/debian:12");
    }

    #[test]
    fn a_first_part_with_dot_colon_or_localhost_is_a_host() {
        assert_eq!(shown("127.0.0.1:5000/a/b_c"), "127.0.0.1:5000/a/b_c:latest");
        assert_eq!(shown("localhost/x"), "localhost/x:latest");
        assert_eq!(shown("registry.example/team/a--b/c__d:v1"), "registry.example/team/a--b/c__d:v1");
        assert_eq!(shown("[::1]:5000/x:y"), "[::1]:5000/x:y");
    }

    #[test]
    fn a_digest_goes_before_a_tag() {
        let digest = Digest::of(b"");
        let text = format!("r.example/x:1@{digest}");
        let Ok(Reference::Registry(name)) = text.parse() else { panic!() };
        assert_eq!(name.version(), digest.to_string());
        assert_eq!(name.to_string(), text);
        assert_eq!(shown(&format!("r.example/x@{digest}")), format!("r.example/x@{digest}"));
    }

    #[test]
    fn local_places_have_a_path_and_perhaps_a_tag() {
        let local = |path: &str, tag: Option<&str>| Local { path: path.into(), tag: tag.map(Into::into) };
        assert_eq!("oci:/d:t".parse::<Reference>().unwrap(), Reference::Layout(local("/d", Some("t"))));
        assert_eq!("oci:dir".parse::<Reference>().unwrap(), Reference::Layout(local("dir", None)));
        let archive = "docker-archive:/f.tar:docker.io/library/x:1".parse::<Reference>().unwrap();
        assert_eq!(archive, Reference::DockerArchive(local("/f.tar", Some("docker.io/library/x:1"))));
        assert_eq!(archive.to_string(), "docker-archive:/f.tar:docker.io/library/x:1");
    }

    #[test]
    fn what_names_no_image_is_refused_in_one_line() {
        for text in [
            "",
            ":",
            "oci:",
            "UPPER",
            "a//b",
            "a/../b",
            "../a",
            "/a",
            "a/",
            "-a",
            "a-",
            "a._b",
            "a___b",
            "x:",
            "x:.t",
            "x:t/y:",
            "x@sha256:12",
            "x@md5:00",
            "host.example:0/x",
            "host.example:99999/x",
            "ho st.example/x",
            "-h.example/x",
            "[zz]:1/x",
            "dir:/x",
            "a b",
            "x?y",
            "x\ny",
            &"x/".repeat(200),
            &format!("x:{}", "t".repeat(129)),
        ] {
            let error = text.parse::<Reference>().map(|r| r.to_string()).unwrap_err().to_string();
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
