//! Pulling from a registry: the distribution specification's GET requests, token and basic authentication.
//!
//! Nothing that a registry sends is believed. Documents have a cap and a time limit; every answer must go on coming,
//! and a layer must come at a rate that will end in a person's lifetime; what arrives is hashed while it is written.
//! Plain HTTP is spoken with registries on this host's own loopback only, and no redirect leads back from TLS to it.
//!
//! Blocking I/O with one thread a layer: there is no event loop here, and no thread pool, and none of this is
//! initialised before there is something to pull.

mod auth;

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Body};

use super::credentials::{self, Credentials};
use super::digest::{Digest, Hasher};
use super::dns::Dns;
use super::manifest::{self, ACCEPT, DEPTH_MAX, Document, Image, Layer};
use super::progress::Progress;
use super::reference::{DEFAULT_REGISTRY, Name};
use super::store::DOCUMENT_MAX;
use super::trust;

/// Seconds without a byte after which a registry counts as gone, unless [`ENV_TIMEOUT`] says otherwise.
const TIMEOUT: u64 = 30;
/// Environment variable with another number of seconds.
pub const ENV_TIMEOUT: &str = "STOCKADE_PULL_TIMEOUT";
/// A layer that comes more slowly than this over a whole [`RATE_SPAN`] will not end.
const RATE_MIN: u64 = 1 << 10;
/// Times the timeout.
const RATE_SPAN: u32 = 4;
/// How often something that may pass is tried: a broken connection, an overloaded registry.
const TRIES: u32 = 4;
/// Wait before the first repetition; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(500);
/// Pieces in which a layer is written.
const CHUNK: usize = 256 << 10;
/// Where the default registry serves the API; its own name is that of a web site.
const DEFAULT_API: &str = "registry-1.docker.io";

/// What can go wrong with a registry.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// no answer, or a broken one
    #[error("cannot pull from {registry}: {reason}")]
    Connection { registry: String, reason: String },
    /// it says that there is no such thing
    #[error("{registry} has no {what}: check the name and the tag")]
    Missing { registry: String, what: String },
    /// it wants somebody else
    #[error(
        "{registry} does not let {who} pull {name}: log in with `podman login {registry}` or correct the credentials in {place}"
    )]
    Denied { registry: String, who: String, name: String, place: String },
    /// it says something else
    #[error("{registry} answers {status} to the request for {what}{detail}: try again later")]
    Status { registry: String, status: u16, what: String, detail: String },
    /// content is not what its digest says
    #[error("{registry} sent {what} whose content is not that of its digest: it is damaged or forged")]
    Digest { registry: String, what: String },
    /// content is not as long as it should be
    #[error("{registry} sent {what} with {reason}")]
    Size { registry: String, what: String, reason: String },
    /// of the image's documents
    #[error(transparent)]
    Manifest(#[from] manifest::Error),
    /// of the credentials
    #[error(transparent)]
    Credentials(#[from] credentials::Error),
    /// of the certificates
    #[error(transparent)]
    Trust(#[from] trust::Error),
    /// a setting makes no sense
    #[error("{ENV_TIMEOUT} is {0:?}: it must be a number of seconds from 1 to 3600")]
    Timeout(String),
    /// what was downloaded cannot be kept
    #[error("cannot write to the image store: {0}")]
    Write(#[source] io::Error),
}

/// A registry, and the name in it that is pulled.
pub struct Registry {
    agent: Agent,
    name: Name,
    base: String,
    /// Whether it is on this host, and plain HTTP will do.
    plain: bool,
    timeout: Duration,
    credentials: Option<Credentials>,
    authorization: Mutex<Option<String>>,
}

/// One answer, or why another try may help.
enum Attempt<T> {
    Done(T),
    Again(Error),
}

impl Registry {
    /// Nothing is sent yet.
    pub fn new(name: &Name) -> Result<Self, Error> {
        let timeout = timeout(std::env::var(ENV_TIMEOUT).ok())?;
        let plain = is_loopback(&name.registry);
        let host = if name.registry == DEFAULT_REGISTRY { DEFAULT_API } else { &name.registry };
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .https_only(!plain)
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .max_redirects(5)
            .user_agent(concat!("stockade/", env!("CARGO_PKG_VERSION")))
            .max_response_header_size(64 << 10)
            .timeout_resolve(Some(timeout))
            .timeout_connect(Some(timeout))
            .timeout_recv_response(Some(timeout))
            .timeout_per_read(Some(timeout))
            .timeout_per_write(Some(timeout));
        if plain {
            config = config.proxy(None);
        } else {
            config = config.tls_config(trust::tls(&name.registry)?);
        }
        let connector = ureq::unversioned::transport::DefaultConnector::new();
        Ok(Registry {
            agent: Agent::with_parts(config.build(), connector, Dns::system()),
            base: format!("{}://{host}/v2/{}", if plain { "http" } else { "https" }, name.repository),
            credentials: credentials::find(name)?,
            name: name.clone(),
            plain,
            timeout,
            authorization: Mutex::new(None),
        })
    }

    /// The image for this machine.
    pub fn resolve(&self) -> Result<Image, Error> {
        let mut bytes = self.document("manifests", &self.name.version(), self.name.digest.as_ref())?;
        for _ in 0..DEPTH_MAX {
            match manifest::parse(&bytes)? {
                Document::Index(index) => {
                    let digest = manifest::choose(&index)?.digest().to_string();
                    let digest = digest.parse().map_err(manifest::Error::from)?;
                    bytes =
                        self.document("manifests", &String::from(Digest::clone(&digest)), Some(&digest))?;
                }
                Document::Manifest(manifest) => {
                    let digest = manifest.config().digest().to_string();
                    let digest: Digest = digest.parse().map_err(manifest::Error::from)?;
                    let config = self.document("blobs", &digest.to_string(), Some(&digest))?;
                    let layers = manifest::layers(&manifest, &manifest::config(&config)?)?;
                    return Ok(Image { manifest: bytes, config, layers });
                }
            }
        }
        Err(manifest::Error::Broken(format!("index has further ones in it, more than {DEPTH_MAX} deep"))
            .into())
    }

    /// Downloads a layer to `file`, going on from what is in it, and checks it.
    pub fn layer(
        &self,
        layer: &Layer,
        file: &File,
        progress: &Progress,
        cancelled: &AtomicBool,
    ) -> Result<(), Error> {
        let is_resumed = file.metadata().map_err(Error::Write)?.len() > 0;
        match self.complete(layer, file, progress, cancelled) {
            // What was in it may have come from another registry: this one is blamed only for what it alone has sent.
            Err(Error::Digest { .. }) if is_resumed => {
                progress.remove(layer.size);
                self.complete(layer, file, progress, cancelled)
            }
            other => other,
        }
    }

    fn complete(
        &self,
        layer: &Layer,
        file: &File,
        progress: &Progress,
        cancelled: &AtomicBool,
    ) -> Result<(), Error> {
        let mut hasher = Hasher::default();
        let mut have = resume(file, layer.size, &mut hasher).map_err(Error::Write)?;
        progress.add(have);
        let mut tries = 0;
        while have < layer.size {
            let before = have;
            match self.rest(layer, file, &mut have, &mut hasher, progress, cancelled)? {
                Attempt::Done(()) => break,
                // Whoever sends something each time is not given up.
                Attempt::Again(_) if have > before => tries = 0,
                Attempt::Again(error) if tries + 1 == TRIES => return Err(error),
                Attempt::Again(error) => {
                    tracing::debug!("{error}");
                    std::thread::sleep(PAUSE * 2_u32.pow(tries));
                    tries += 1;
                }
            }
        }
        if hasher.finish() == layer.digest {
            return Ok(());
        }
        // Nobody shall go on from it.
        file.set_len(0).map_err(Error::Write)?;
        Err(Error::Digest { registry: self.name.registry.clone(), what: self.blob(layer) })
    }

    /// One request for what is missing of a layer.
    fn rest(
        &self,
        layer: &Layer,
        file: &File,
        have: &mut u64,
        hasher: &mut Hasher,
        progress: &Progress,
        cancelled: &AtomicBool,
    ) -> Result<Attempt<()>, Error> {
        let from = *have;
        let path = format!("blobs/{}", layer.digest);
        let answer = match self.get(&path, "*/*", (from > 0).then_some(from), &self.blob(layer))? {
            Attempt::Done(answer) => answer,
            Attempt::Again(error) => return Ok(Attempt::Again(error)),
        };
        if answer.status() == StatusCode::PARTIAL_CONTENT {
            let range = answer.headers().get(header::CONTENT_RANGE).and_then(|v| v.to_str().ok());
            if !range.is_some_and(|range| range.starts_with(&format!("bytes {from}-"))) {
                return Err(self.wrong_size(layer, "another part than was asked for"));
            }
        } else if from > 0 {
            // It sends all of it again.
            file.set_len(0).map_err(Error::Write)?;
            progress.remove(*have);
            *have = 0;
            *hasher = Hasher::default();
        }
        let mut body = answer.into_body().into_with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; CHUNK];
        let (mut since, mut at) = (Instant::now(), *have);
        loop {
            if cancelled.load(Ordering::Relaxed) {
                return Err(self.failed("the pull was ended"));
            }
            let count = match body.read(&mut buffer) {
                Ok(0) if *have == layer.size => return Ok(Attempt::Done(())),
                Ok(0) => return Ok(Attempt::Again(self.wrong_size(layer, "less than its manifest says"))),
                Ok(count) => count,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return self.lost(&e.into()).map(Attempt::Again),
            };
            if *have + count as u64 > layer.size {
                file.set_len(0).map_err(Error::Write)?;
                return Err(self.wrong_size(layer, "more than its manifest says"));
            }
            file.write_all_at(&buffer[..count], *have).map_err(Error::Write)?;
            hasher.update(&buffer[..count]);
            *have += count as u64;
            progress.add(count as u64);
            let span = self.timeout * RATE_SPAN;
            if since.elapsed() > span {
                if *have - at < RATE_MIN * span.as_secs() {
                    return Err(self.failed("it sends too slowly to ever come to an end"));
                }
                (since, at) = (Instant::now(), *have);
            }
        }
    }

    /// A manifest, an index or a configuration.
    fn document(&self, kind: &str, version: &str, digest: Option<&Digest>) -> Result<Vec<u8>, Error> {
        let what = match kind {
            "manifests" => format!("image {}", self.name),
            _ => format!("blob {version}"),
        };
        let mut tries = 0;
        loop {
            match self.try_document(kind, version, digest, &what)? {
                Attempt::Done(bytes) => return Ok(bytes),
                Attempt::Again(error) if tries + 1 == TRIES => return Err(error),
                Attempt::Again(error) => {
                    tracing::debug!("{error}");
                    std::thread::sleep(PAUSE * 2_u32.pow(tries));
                    tries += 1;
                }
            }
        }
    }

    fn try_document(
        &self,
        kind: &str,
        version: &str,
        digest: Option<&Digest>,
        what: &str,
    ) -> Result<Attempt<Vec<u8>>, Error> {
        let accept = if kind == "manifests" { ACCEPT } else { "*/*" };
        let mut answer = match self.get(&format!("{kind}/{version}"), accept, None, what)? {
            Attempt::Done(answer) => answer,
            Attempt::Again(error) => return Ok(Attempt::Again(error)),
        };
        let claimed = answer.headers().get("docker-content-digest").and_then(|v| v.to_str().ok());
        let claimed = claimed.and_then(|text| text.parse::<Digest>().ok());
        let bytes = match self.body(&mut answer, DOCUMENT_MAX) {
            Ok(bytes) => bytes,
            Err(Ok(again)) => return Ok(Attempt::Again(again)),
            Err(Err(error)) => return Err(error),
        };
        let wrong = [digest, claimed.as_ref()].into_iter().flatten().any(|d| *d != Digest::of(&bytes));
        if wrong {
            return Err(Error::Digest { registry: self.name.registry.clone(), what: what.to_owned() });
        }
        Ok(Attempt::Done(bytes))
    }

    /// A body that fits into memory: an error that another try may help with is the inner `Ok`.
    fn body(&self, answer: &mut Response<Body>, max: u64) -> Result<Vec<u8>, Result<Error, Error>> {
        let begin = Instant::now();
        let mut reader = answer.body_mut().with_config().limit(u64::MAX).reader();
        let mut bytes = Vec::new();
        let mut buffer = [0; 8 << 10];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Ok(bytes),
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(self.lost(&e.into()).map_or_else(Err, Ok)),
            }
            if bytes.len() as u64 > max {
                return Err(Err(self.failed(&format!("it sends a document of more than {max} bytes"))));
            }
            if begin.elapsed() > self.timeout * RATE_SPAN {
                return Err(Err(self.failed("it sends too slowly to ever come to an end")));
            }
        }
    }

    /// A request with whatever authorization it needs.
    fn get(
        &self,
        path: &str,
        accept: &str,
        from: Option<u64>,
        what: &str,
    ) -> Result<Attempt<Response<Body>>, Error> {
        let mut asked = false;
        loop {
            let authorization = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let mut request = self.agent.get(format!("{}/{path}", self.base)).header(header::ACCEPT, accept);
            if let Some(value) = &authorization {
                request = request.header(header::AUTHORIZATION, value);
            }
            if let Some(from) = from {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            let answer = match request.call() {
                Ok(answer) => answer,
                Err(e) => return self.lost(&e).map(Attempt::Again),
            };
            let status = answer.status();
            match status {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(Attempt::Done(answer)),
                StatusCode::UNAUTHORIZED if !asked => {
                    asked = true;
                    let value = match self.authorize(&answer)? {
                        Attempt::Done(value) => value,
                        Attempt::Again(error) => return Ok(Attempt::Again(error)),
                    };
                    *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
                }
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(self.denied()),
                StatusCode::NOT_FOUND => {
                    let registry = self.name.registry.clone();
                    return Err(Error::Missing { registry, what: what.to_owned() });
                }
                StatusCode::RANGE_NOT_SATISFIABLE => {
                    return Err(self.failed("it has less of a layer than the image's manifest says"));
                }
                _ => {
                    let passes = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
                    let error = self.status(answer, what);
                    return if passes { Ok(Attempt::Again(error)) } else { Err(error) };
                }
            }
        }
    }

    /// An answer that is no good, with what the registry says about it (distribution specification, error codes).
    fn status(&self, mut answer: Response<Body>, what: &str) -> Error {
        let status = answer.status().as_u16();
        let body = self.body(&mut answer, 64 << 10).unwrap_or_default();
        let json: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        let message = json["errors"][0]["message"].as_str().unwrap_or_default();
        let message: String = message.chars().filter(|c| !c.is_control()).take(200).collect();
        let detail = if message.is_empty() { message } else { format!(" ({message})") };
        Error::Status { registry: self.name.registry.clone(), status, what: what.to_owned(), detail }
    }

    /// A request that came to nothing: `Ok` if another try may help.
    fn lost(&self, error: &ureq::Error) -> Result<Error, Error> {
        let seconds = self.timeout.as_secs();
        match error {
            ureq::Error::Timeout(_) => Err(self.failed(&format!("it does not answer within {seconds} s"))),
            ureq::Error::HostNotFound => {
                Err(self.failed("its name is not known: check the name and the DNS"))
            }
            ureq::Error::RequireHttpsOnly(_) => {
                Err(self.failed("it leads away from TLS, which only a registry on this host may do without"))
            }
            ureq::Error::Io(e) if matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => {
                Err(self.failed(&format!("it does not answer within {seconds} s")))
            }
            // A certificate, for example: the same the next time. It comes as an I/O error, too.
            ureq::Error::Io(e) if matches!(e.kind(), ErrorKind::InvalidData) => {
                Err(self.failed(&format!("its TLS is not to be trusted: {e}")))
            }
            ureq::Error::Rustls(e) => Err(self.failed(&format!("its TLS is not to be trusted: {e}"))),
            ureq::Error::Io(e) if e.kind() == ErrorKind::ConnectionRefused => {
                Err(self.failed("it refuses the connection: check that it runs, and the port"))
            }
            ureq::Error::Io(e) => Ok(self.failed(&e.to_string())),
            ureq::Error::ConnectionFailed => Ok(self.failed("the connection failed")),
            other => Err(self.failed(&other.to_string().replace('\n', " "))),
        }
    }

    fn failed(&self, reason: &str) -> Error {
        Error::Connection { registry: self.name.registry.clone(), reason: reason.to_owned() }
    }

    fn wrong_size(&self, layer: &Layer, reason: &str) -> Error {
        Error::Size {
            registry: self.name.registry.clone(),
            what: self.blob(layer),
            reason: reason.to_owned(),
        }
    }

    fn blob(&self, layer: &Layer) -> String {
        format!("layer {}", layer.digest.short())
    }
}

/// What is in the file already, hashed; nothing if it is longer than it may be.
fn resume(file: &File, size: u64, hasher: &mut Hasher) -> io::Result<u64> {
    let have = file.metadata()?.len();
    if have > size {
        file.set_len(0)?;
        return Ok(0);
    }
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < have {
        let count = file.read_at(&mut buffer, at)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        at += count as u64;
    }
    Ok(at)
}

fn timeout(setting: Option<String>) -> Result<Duration, Error> {
    match setting.filter(|text| !text.is_empty()) {
        None => Ok(Duration::from_secs(TIMEOUT)),
        Some(text) => match text.parse() {
            Ok(seconds @ 1..=3600) => Ok(Duration::from_secs(seconds)),
            _ => Err(Error::Timeout(text)),
        },
    }
}

/// Whether `host[:port]` is this host itself, whatever its network is.
fn is_loopback(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// `host[:port]` of a URL.
fn authority(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let authority = &rest[..end];
    authority.rsplit_once('@').map_or(authority, |(_, host)| host)
}

#[cfg(test)]
mod tests;
