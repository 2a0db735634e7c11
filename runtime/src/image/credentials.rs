//! Credentials for a registry, from where `podman login` and `docker login` put them.
//!
//! A file's `auths` are used as they are. Where it names a credential helper for the registry (`credHelpers`,
//! `credsStore`), that is run as everybody does: the program `docker-credential-NAME` on PATH, asked with `get`. Its
//! name comes from a file of this user's, and cannot be a path.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::reference::{DEFAULT_REGISTRY, Name};

/// Where somebody without credentials is told to put them.
pub const FIRST_PLACE: &str = "~/.config/containers/auth.json";
/// As Docker calls the default registry in its file, from the time of its first API.
const DEFAULT_KEY: &str = "https://index.docker.io/v1/";
/// User name with which helpers give a refresh token in place of a password.
const TOKEN_USER: &str = "<token>";

/// What can go wrong with credentials.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// a file is not what it should be
    #[error("{path} is no file with credentials: {reason}; correct it, or log in again")]
    File { path: PathBuf, reason: String },
    /// a helper fails
    #[error("the credential helper docker-credential-{helper}, which {path} names, fails: {reason}")]
    Helper { helper: String, path: PathBuf, reason: String },
}

/// Who asks.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    secret: Secret,
    /// The file they are from.
    pub place: String,
}

#[derive(Clone, PartialEq, Eq)]
enum Secret {
    Password { user: String, password: String },
    RefreshToken(String),
}

impl Credentials {
    /// The header for basic authentication.
    pub fn basic(&self) -> Option<String> {
        match &self.secret {
            Secret::Password { user, password } => {
                Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
            }
            Secret::RefreshToken(_) => None,
        }
    }

    /// What a token service takes in place of a password.
    pub fn refresh_token(&self) -> Option<&str> {
        match &self.secret {
            Secret::RefreshToken(token) => Some(token),
            Secret::Password { .. } => None,
        }
    }

    /// The user, for messages.
    pub fn who(&self) -> String {
        match &self.secret {
            Secret::Password { user, .. } => format!("the user {user:?}"),
            Secret::RefreshToken(_) => "the holder of the stored token".into(),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct AuthFile {
    auths: HashMap<String, Auth>,
    creds_store: Option<String>,
    cred_helpers: HashMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: String,
    identitytoken: String,
}

/// Credentials for a name, from the first file that has any.
pub fn find(name: &Name) -> Result<Option<Credentials>, Error> {
    for path in places(|variable| env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from)) {
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => continue,
            Err(e) => return Err(Error::File { path, reason: e.to_string() }),
        };
        if let Some(found) = find_in(&path, &text, name)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Files in the order in which Podman looks at them (containers-auth.json(5)).
fn places(variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    if let Some(only) = variable("REGISTRY_AUTH_FILE") {
        return vec![only];
    }
    let home = variable("HOME").unwrap_or_else(|| "/root".into());
    let config = variable("XDG_CONFIG_HOME").unwrap_or_else(|| home.join(".config"));
    let docker = variable("DOCKER_CONFIG").unwrap_or_else(|| home.join(".docker"));
    let run = variable("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json"));
    let system = format!("/run/containers/{}/auth.json", nix::unistd::getuid());
    run.into_iter()
        .chain([system.into(), config.join("containers/auth.json"), docker.join("config.json")])
        .collect()
}

fn find_in(path: &Path, text: &[u8], name: &Name) -> Result<Option<Credentials>, Error> {
    let failed = |reason: String| Error::File { path: path.to_owned(), reason };
    let file: AuthFile = serde_json::from_slice(text).map_err(|e| failed(e.to_string()))?;
    let place = path.display().to_string();
    if let Some(helper) = file.cred_helpers.get(&name.registry) {
        return ask(helper, &name.registry, path);
    }
    let keys = keys(name);
    for key in &keys {
        let Some(auth) = file.auths.get(key) else { continue };
        if !auth.identitytoken.is_empty() {
            return Ok(Some(Credentials { secret: Secret::RefreshToken(auth.identitytoken.clone()), place }));
        }
        if auth.auth.is_empty() {
            // Its place is kept here, but it is a helper that has it.
            continue;
        }
        let decoded = STANDARD.decode(&auth.auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = decoded.as_deref().and_then(|text| text.trim_end_matches('\0').split_once(':'));
        let (user, password) = pair.ok_or_else(|| failed(format!("auths.{key}.auth makes no sense")))?;
        let secret = Secret::Password { user: user.into(), password: password.into() };
        return Ok(Some(Credentials { secret, place }));
    }
    match file.creds_store.filter(|store| !store.is_empty()) {
        Some(helper) => {
            let server = if name.registry == DEFAULT_REGISTRY { DEFAULT_KEY } else { &name.registry };
            ask(&helper, server, path)
        }
        None => Ok(None),
    }
}

/// What a name's credentials may be filed under, the closest first.
fn keys(name: &Name) -> Vec<String> {
    let mut path = format!("{}/{}", name.registry, name.repository);
    let mut keys = vec![path.clone()];
    while let Some(slash) = path.rfind('/') {
        path.truncate(slash);
        keys.push(path.clone());
    }
    for scheme in ["https://", "http://"] {
        for tail in ["", "/", "/v1/", "/v2/"] {
            keys.push(format!("{scheme}{}{tail}", name.registry));
        }
    }
    if name.registry == DEFAULT_REGISTRY {
        keys.push(DEFAULT_KEY.into());
    }
    keys
}

/// The protocol of Docker's credential helpers: the registry on standard input, JSON on standard output.
fn ask(helper: &str, server: &str, path: &Path) -> Result<Option<Credentials>, Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    let failed = |reason: String| Error::Helper { helper: helper.to_owned(), path: path.to_owned(), reason };
    if helper.is_empty()
        || !helper.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    {
        return Err(failed("that is no name of a program".into()));
    }
    let mut child = Command::new(format!("docker-credential-{helper}"))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read has its reasons.
        let _ = stdin.write_all(server.as_bytes());
    }
    let output = child.wait_with_output().map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stdout);
        if text.contains("credentials not found") {
            return Ok(None);
        }
        let first = text.lines().next().unwrap_or_default().chars().take(200).collect::<String>();
        return Err(failed(if first.is_empty() { output.status.to_string() } else { first }));
    }
    let answer: Answer = serde_json::from_slice(&output.stdout).map_err(|e| failed(e.to_string()))?;
    let secret = match answer.username.as_str() {
        TOKEN_USER => Secret::RefreshToken(answer.secret),
        _ => Secret::Password { user: answer.username, password: answer.secret },
    };
    Ok(Some(Credentials { secret, place: path.display().to_string() }))
}

#[cfg(test)]
mod tests {
    use super::super::reference::Reference;
    use super::*;
    use serde_json::{Value, json};
    use std::os::unix::fs::PermissionsExt;

    fn name(text: &str) -> Name {
        match text.parse().unwrap() {
            Reference::Registry(name) => name,
            other => panic!("{other}"),
        }
    }

    fn found(file: Value, reference: &str) -> Result<Option<Credentials>, Error> {
        find_in(Path::new("/auth.json"), file.to_string().as_bytes(), &name(reference))
    }

    fn user(file: Value, reference: &str) -> Option<String> {
        found(file, reference).unwrap().map(|c| c.who())
    }

    fn auth(user: &str) -> Value {
        json!({ "auth": STANDARD.encode(format!("{user}:pass:word")) })
    }

    #[test]
    fn the_closest_entry_counts() {
        let file = json!({ "auths": {
            "r.example": auth("all"), "r.example/team": auth("team"), "r.example/team/app": auth("app"),
            "https://index.docker.io/v1/": auth("hub"), "https://old.example/v2/": auth("old"),
        } });
        for (reference, who) in [
            ("r.example/x", Some("all")),
            ("r.example/team/other", Some("team")),
            ("r.example/team/app:1", Some("app")),
            ("debian", Some("hub")),
            ("old.example/x", Some("old")),
            ("r.example:5000/x", None),
        ] {
            assert_eq!(
                user(file.clone(), reference),
                who.map(|who| format!("the user {who:?}")),
                "{reference}"
            );
        }
    }

    #[test]
    fn a_password_may_have_colons_and_a_token_is_no_password() {
        let credentials =
            found(json!({ "auths": { "r.example": auth("u") } }), "r.example/x").unwrap().unwrap();
        assert_eq!(credentials.basic().unwrap(), format!("Basic {}", STANDARD.encode("u:pass:word")));
        let file = json!({ "auths": { "r.example": { "auth": "", "identitytoken": "t" } } });
        let credentials = found(file, "r.example/x").unwrap().unwrap();
        assert_eq!((credentials.basic(), credentials.refresh_token()), (None, Some("t")));
    }

    #[test]
    fn what_makes_no_sense_is_an_error_that_names_the_file() {
        let error = found(json!({ "auths": { "r.example": { "auth": "!" } } }), "r.example/x").err().unwrap();
        assert!(error.to_string().contains("/auth.json"), "{error}");
        assert!(found(json!("text"), "r.example/x").is_err());
        assert!(
            found(json!({ "auths": { "other.example": { "auth": "!" } } }), "r.example/x").unwrap().is_none()
        );
        for helper in ["", "../evil", "a/b", "a b"] {
            assert!(
                found(json!({ "credHelpers": { "r.example": helper } }), "r.example/x").is_err(),
                "{helper}"
            );
        }
    }

    #[test]
    fn files_are_looked_at_in_podmans_order() {
        let variables = |list: &'static [(&str, &str)]| {
            places(|name| list.iter().find(|v| v.0 == name).map(|v| PathBuf::from(v.1)))
        };
        assert_eq!(variables(&[("REGISTRY_AUTH_FILE", "/a"), ("HOME", "/h")]), [Path::new("/a")]);
        let places = variables(&[("HOME", "/h"), ("XDG_RUNTIME_DIR", "/x"), ("DOCKER_CONFIG", "/d")]);
        assert_eq!(places.len(), 4);
        assert_eq!(places[0], Path::new("/x/containers/auth.json"));
        assert_eq!(places[2], Path::new("/h/.config/containers/auth.json"));
        assert_eq!(places[3], Path::new("/d/config.json"));
    }

    #[test]
    fn a_helper_is_asked_for_the_registry() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("docker-credential-stockade-test");
        let script = "#!/bin/sh\nread -r server\n[ \"$1 $server\" = 'get r.example' ] || { echo credentials not found; exit 1; }\n\
                      echo '{\"ServerURL\":\"\",\"Username\":\"<token>\",\"Secret\":\"s\"}'\n";
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let path = env::join_paths(
            [dir.path().to_owned()].into_iter().chain(env::split_paths(&env::var_os("PATH").unwrap())),
        )
        .unwrap();
        // SAFETY: no other test of this program reads or writes this variable at the same time for another value.
        unsafe { env::set_var("PATH", path) };
        let file = json!({ "credsStore": "stockade-test" });
        let credentials = found(file.clone(), "r.example/x").unwrap().unwrap();
        assert_eq!(credentials.refresh_token(), Some("s"));
        assert!(found(file, "other.example/x").unwrap().is_none());
        assert!(found(json!({ "credsStore": "stockade-none" }), "r.example/x").is_err());
    }
}
