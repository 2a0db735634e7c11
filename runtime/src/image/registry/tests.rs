//! A registry on loopback that behaves as each test wants it to.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use serde_json::json;
use tempfile::TempDir;

use super::super::compression::Compression;
use super::super::reference::Reference;
use super::*;

/// A request as the registry sees it.
struct Request {
    path: String,
    headers: HashMap<String, String>,
    /// How many there were before it.
    number: usize,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

fn answer(stream: &mut TcpStream, status: &str, headers: &[&str], body: &[u8]) {
    let mut text = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n", body.len());
    for header in headers {
        text += &format!("{header}\r\n");
    }
    let _ = stream.write_all(&[text.as_bytes(), b"\r\n", body].concat());
}

/// Starts a registry; it lives as long as the test program.
fn registry(handle: impl Fn(&Request, &mut TcpStream) + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let handle = Arc::new(handle);
    let number = Arc::new(AtomicUsize::new(0));
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (handle, number) = (handle.clone(), number.clone());
            std::thread::spawn(move || {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                let Some(Ok(first)) = lines.next() else { return };
                let path = first.split(' ').nth(1).unwrap().to_owned();
                let headers = lines.map_while(Result::ok).take_while(|line| !line.is_empty());
                let headers = headers.filter_map(|line| {
                    let (name, value) = line.split_once(':')?;
                    Some((name.to_ascii_lowercase(), value.trim().to_owned()))
                });
                let headers = headers.collect();
                let number = number.fetch_add(1, Ordering::Relaxed);
                handle(&Request { path, headers, number }, &mut stream);
            });
        }
    });
    address
}

fn client(address: &str) -> Registry {
    let Ok(Reference::Registry(name)) = format!("{address}/team/app:1").parse() else { panic!() };
    let mut client = Registry::new(&name).unwrap();
    client.credentials = None;
    client
}

fn layer(content: &[u8]) -> Layer {
    let digest = Digest::of(content);
    Layer { diff_id: digest.clone(), digest, size: content.len() as u64, compression: Compression::None }
}

fn file() -> (TempDir, File) {
    let dir = tempfile::tempdir().unwrap();
    let mut options = std::fs::OpenOptions::new();
    let file =
        options.read(true).write(true).create(true).truncate(false).open(dir.path().join("f")).unwrap();
    (dir, file)
}

fn download(client: &Registry, layer: &Layer, file: &File) -> Result<Vec<u8>, Error> {
    let progress = Progress::new("x", 1, layer.size);
    client.layer(layer, file, &progress, &AtomicBool::new(false))?;
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    Ok(bytes)
}

/// Manifest and configuration of an image without layers.
fn documents() -> (Vec<u8>, Vec<u8>) {
    let config =
        json!({ "os": "linux", "architecture": "amd64", "rootfs": { "type": "layers", "diff_ids": [] } });
    let config = config.to_string().into_bytes();
    let manifest = json!({ "schemaVersion": 2, "layers": [], "config": {
        "mediaType": "application/vnd.oci.image.config.v1+json", "size": config.len(), "digest": Digest::of(&config),
    } });
    (manifest.to_string().into_bytes(), config)
}

#[test]
fn an_image_is_found_by_its_tag_through_an_index_with_a_token() {
    let (manifest, config) = documents();
    let index = json!({ "schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": manifest.len(),
        "digest": Digest::of(&manifest), "platform": { "os": "linux", "architecture": "amd64" },
    }] });
    let paths = [
        ("/v2/team/app/manifests/1".to_owned(), index.to_string().into_bytes()),
        (format!("/v2/team/app/manifests/{}", Digest::of(&manifest)), manifest.clone()),
        (format!("/v2/team/app/blobs/{}", Digest::of(&config)), config.clone()),
    ];
    let address = registry(move |request, stream| {
        let host = request.header("host").unwrap();
        if request.path.starts_with("/token?") {
            assert!(request.path.contains("scope=repository") && request.path.contains("service=me"));
            return answer(stream, "200 OK", &[], br#"{"access_token":"secret"}"#);
        }
        if request.header("authorization") != Some("Bearer secret") {
            let challenge = format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\", service=\"me\"");
            return answer(stream, "401 Unauthorized", &[&challenge], b"");
        }
        match paths.iter().find(|(path, _)| *path == request.path) {
            Some((_, body)) => answer(stream, "200 OK", &[], body),
            None => answer(stream, "404 Not Found", &[], b""),
        }
    });
    let image = client(&address).resolve().unwrap();
    assert_eq!((image.manifest, image.config), (manifest, config));
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_was() {
    let content: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    let whole = content.clone();
    let address = registry(move |request, stream| {
        let from: usize = request
            .header("range")
            .map_or(0, |range| range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
        assert_eq!(from > 0, request.number > 0, "it goes on");
        let rest = &whole[from..];
        let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\n\r\n",
            rest.len(),
            whole.len() - 1,
            whole.len()
        );
        let part = if request.number < 3 { &rest[..rest.len() / 2] } else { rest };
        let _ = stream.write_all(&[head.as_bytes(), part].concat());
    });
    let (_dir, file) = file();
    assert!(download(&client(&address), &layer(&content), &file).unwrap() == content);
}

#[test]
fn what_an_earlier_pull_has_left_is_used_and_what_it_spoilt_is_not() {
    let content = vec![7; 100_000];
    let whole = content.clone();
    let address = registry(move |request, stream| match request.header("range") {
        Some("bytes=40000-") => {
            answer(
                stream,
                "206 Partial Content",
                &["Content-Range: bytes 40000-99999/100000"],
                &whole[40000..],
            );
        }
        Some(other) => panic!("{other}"),
        // One that knows no ranges.
        None => answer(stream, "200 OK", &[], &whole),
    });
    let (_dir, file) = file();
    file.write_all_at(&content[..40000], 0).unwrap();
    assert!(download(&client(&address), &layer(&content), &file).unwrap() == content);
    // Complete already.
    assert!(download(&client("127.0.0.1:1"), &layer(&content), &file).unwrap() == content);
    file.set_len(0).unwrap();
    file.write_all_at(&[8; 40000], 0).unwrap();
    assert!(download(&client(&address), &layer(&content), &file).unwrap() == content, "it begins anew");
    let address = registry(|_, stream| answer(stream, "200 OK", &[], &[8; 100_000]));
    file.set_len(40000).unwrap();
    let error = download(&client(&address), &layer(&content), &file).unwrap_err();
    assert!(matches!(error, Error::Digest { .. }), "{error}");
    assert_eq!(file.metadata().unwrap().len(), 0, "nobody goes on from it");
}

#[test]
fn a_registry_without_ranges_sends_it_all_again() {
    let content = vec![7; 100_000];
    let whole = content.clone();
    let address = registry(move |_, stream| answer(stream, "200 OK", &[], &whole));
    let (_dir, file) = file();
    file.write_all_at(&[9; 500], 0).unwrap();
    assert!(download(&client(&address), &layer(&content), &file).unwrap() == content);
}

#[test]
fn a_layer_is_as_long_as_its_manifest_says() {
    let address = registry(|_, stream| answer(stream, "200 OK", &[], &[7; 1000]));
    let (_dir, file) = file();
    let error = download(&client(&address), &layer(&[7; 999]), &file).unwrap_err();
    assert!(error.to_string().contains("more than"), "{error}");
    let error = download(&client(&address), &layer(&[7; 1001]), &file).unwrap_err();
    assert!(error.to_string().contains("127.0.0.1"), "{error}");
}

#[test]
fn a_document_without_end_is_cut_off() {
    let address = registry(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{\"x\":\"");
        while stream.write_all(&[b'x'; 65536]).is_ok() {}
    });
    let error = client(&address).resolve().unwrap_err();
    assert!(error.to_string().contains("more than 4194304 bytes"), "{error}");
}

#[test]
fn one_who_never_answers_is_given_up() {
    let address = registry(|_, stream| {
        let _ = stream.read(&mut [0]);
    });
    let Ok(Reference::Registry(name)) = format!("{address}/x:1").parse() else { panic!() };
    let mut client = Registry::new(&name).unwrap();
    client.timeout = Duration::from_secs(1);
    let config = Agent::config_builder().http_status_as_error(false).timeout_per_read(Some(client.timeout));
    client.agent = Agent::new_with_config(config.build());
    let error = client.resolve().unwrap_err();
    assert!(error.to_string().contains("does not answer within 1 s"), "{error}");
}

#[test]
fn what_passes_is_tried_again_and_what_does_not_is_told() {
    let (manifest, config) = documents();
    let body = manifest.clone();
    let address = registry(move |request, stream| match request.number {
        0 => answer(stream, "503 Service Unavailable", &[], b""),
        1 => {}
        _ if request.path.contains("/manifests/") => answer(stream, "200 OK", &[], &body),
        _ => answer(stream, "200 OK", &[], &config),
    });
    assert_eq!(client(&address).resolve().unwrap().manifest, manifest);
    for (status, part) in [
        ("404 Not Found", "has no image"),
        ("401 Unauthorized", "log in"),
        ("403 Forbidden", "log in"),
        ("400 Bad Request", "answers 400"),
        ("301 Moved Permanently", "cannot pull"),
    ] {
        let body = br#"{"errors":[{"message":"evil\u001b[31m\nreason"}]}"#;
        let headers = ["WWW-Authenticate: Basic realm=x", "Location: ftp://127.0.0.1/"];
        let address = registry(move |_, stream| answer(stream, status, &headers, body));
        let error = client(&address).resolve().unwrap_err().to_string();
        assert!(error.contains(part), "{status}: {error}");
        assert!(!error.contains(['\n', '\u{1b}']), "{error}");
    }
    let error = client("127.0.0.1:1").resolve().unwrap_err().to_string();
    assert!(error.contains("refuses the connection"), "{error}");
}

#[test]
fn content_that_is_not_what_was_asked_for_is_refused() {
    let (manifest, _) = documents();
    let body = manifest.clone();
    let address = registry(move |_, stream| answer(stream, "200 OK", &[], &body));
    // The configuration is the manifest, too.
    assert!(matches!(client(&address).resolve(), Err(Error::Digest { .. })));
    let mut pinned = client(&address);
    pinned.name.digest = Some(Digest::of(b"another"));
    assert!(matches!(pinned.resolve(), Err(Error::Digest { .. })));
    let claim = format!("Docker-Content-Digest: {}", Digest::of(b"another"));
    let address = registry(move |_, stream| answer(stream, "200 OK", &[&claim], &manifest));
    assert!(matches!(client(&address).resolve(), Err(Error::Digest { .. })));
}

#[test]
fn credentials_go_nowhere_without_encryption() {
    let (manifest, config) = documents();
    for realm in
        ["http://registry.example/token", "ftp://127.0.0.1/token", "token", "http://127.0.0.1@evil.example/"]
    {
        let challenge = format!("WWW-Authenticate: Bearer realm=\"{realm}\"");
        let address = registry(move |_, stream| answer(stream, "401 Unauthorized", &[&challenge], b""));
        let error = client(&address).resolve().unwrap_err().to_string();
        assert!(error.contains("without encryption"), "{realm}: {error}");
    }
    // Another host gets no authorization by redirection.
    let other = registry(move |request, stream| {
        assert_eq!(request.header("authorization"), None);
        answer(stream, "200 OK", &[], if request.path.ends_with("/1") { &manifest } else { &config });
    });
    let port = other.rsplit(':').next().unwrap().to_owned();
    let address = registry(move |request, stream| {
        assert_eq!(request.header("authorization"), Some("Bearer mine"));
        let location = format!("Location: http://localhost:{port}{}", request.path);
        answer(stream, "307 Temporary Redirect", &[&location], b"");
    });
    let client = client(&address);
    *client.authorization.lock().unwrap() = Some("Bearer mine".into());
    client.resolve().unwrap();
}

#[test]
fn only_this_host_is_loopback() {
    for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.9.9.9", "[::1]:5000", "[::1]"] {
        assert!(is_loopback(host), "{host}");
    }
    for host in ["localhost.example", "128.0.0.1", "registry.example:5000", "[::2]:1", "127.0.0.1.example"] {
        assert!(!is_loopback(host), "{host}");
    }
    assert_eq!(authority("https://user@h.example:1/x@y?z"), "h.example:1");
}

#[test]
fn a_timeout_is_a_number_of_seconds() {
    assert_eq!(timeout(None).unwrap(), Duration::from_secs(TIMEOUT));
    assert_eq!(timeout(Some("5".into())).unwrap(), Duration::from_secs(5));
    for wrong in ["0", "3601", "-1", "soon"] {
        assert!(timeout(Some(wrong.into())).is_err());
    }
}
