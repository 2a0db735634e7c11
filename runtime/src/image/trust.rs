//! Whom to believe on the network: the certificates that this host trusts, and those that it trusts for one registry.
//!
//! The same places as other programs: `SSL_CERT_FILE` and `SSL_CERT_DIR`, or the distribution's own, and
//! `/etc/containers/certs.d/HOST` or `/etc/docker/certs.d/HOST` with `*.crt` of a registry's own authority. They are
//! read when they are needed; none are built in, so that the host's administrator has the last word.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, TlsProvider, parse_pem};

/// Directories with one directory a registry.
const PLACES: [&str; 2] = ["/etc/containers/certs.d", "/etc/docker/certs.d"];

/// What can go wrong with certificates.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// there are none
    #[error(
        "this host trusts no certificate authority, so no registry can be reached by TLS: install ca-certificates, or set SSL_CERT_FILE"
    )]
    None,
    /// a file is not what it should be
    #[error("{0} is no certificate in PEM form: correct or remove it")]
    Broken(String),
}

/// TLS as this host trusts it.
pub fn tls(registry: &str) -> Result<TlsConfig, Error> {
    let mut certificates: Vec<Certificate<'static>> = rustls_native_certs::load_native_certs()
        .certs
        .iter()
        .map(|certificate| Certificate::from_der(certificate.as_ref()).to_owned())
        .collect();
    for place in PLACES {
        certificates.extend(authorities(&Path::new(place).join(registry))?);
    }
    if certificates.is_empty() {
        return Err(Error::None);
    }
    Ok(TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .root_certs(RootCerts::Specific(Arc::new(certificates)))
        .build())
}

/// A registry's own authorities.
fn authorities(dir: &Path) -> Result<Vec<Certificate<'static>>, Error> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "crt") {
            continue;
        }
        let broken = || Error::Broken(path.display().to_string());
        let text = fs::read(&path).map_err(|_| broken())?;
        let before = all.len();
        for item in parse_pem(&text) {
            if let PemItem::Certificate(certificate) = item.map_err(|_| broken())? {
                all.push(certificate);
            }
        }
        if all.len() == before {
            return Err(broken());
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registrys_own_authorities_are_the_crt_files_of_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        assert!(authorities(&dir.path().join("none")).unwrap().is_empty());
        fs::write(dir.path().join("client.key"), "x").unwrap();
        assert!(authorities(dir.path()).unwrap().is_empty());
        let pem = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
        fs::write(dir.path().join("ca.crt"), pem.repeat(2)).unwrap();
        assert_eq!(authorities(dir.path()).unwrap().len(), 2);
        fs::write(dir.path().join("ca.crt"), "nothing").unwrap();
        assert!(authorities(dir.path()).is_err());
    }
}
