//! Digests of content: `sha256:` and 64 hexadecimal digits, the one algorithm that every registry and every engine
//! uses (OCI image-spec, descriptor.md). Another one is refused by name, because content that is not verified is
//! not used.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A SHA-256 digest. Its hexadecimal form is safe as a file name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

/// What is no digest.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no digest that can be verified: it must be sha256: and 64 hexadecimal digits")]
pub struct Error(String);

impl Digest {
    /// The digest of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::default();
        hasher.update(bytes);
        hasher.finish()
    }

    /// The 64 digits.
    pub fn hex(&self) -> &str {
        &self.0
    }

    /// As many digits as people read.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let hex = text.strip_prefix("sha256:").unwrap_or_default();
        let is_hex = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if is_hex { Ok(Digest(hex.into())) } else { Err(Error(text.chars().take(100).collect())) }
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A digest in the making.
#[derive(Clone, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// Takes more bytes in.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all of them.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// A reader that hashes what is read through it.
pub struct Hashing<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Hashing<R> {
    /// Begins with nothing read.
    pub fn new(inner: R) -> Self {
        Hashing { inner, hasher: Hasher::default() }
    }

    /// Reads to the end, which is at most `max` bytes away; the digest of all bytes that came through.
    pub fn finish(mut self, max: u64) -> io::Result<Digest> {
        if io::copy(&mut (&mut self).take(max + 1), &mut io::sink())? > max {
            return Err(io::Error::other("it goes on after its end"));
        }
        Ok(self.hasher.finish())
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_digest_is_what_was_hashed() {
        assert_eq!(Digest::of(b"").to_string(), EMPTY);
        assert_eq!(Hashing::new(&b"abc"[..]).finish(3).unwrap(), Digest::of(b"abc"));
        Hashing::new(&b"abc"[..]).finish(2).unwrap_err();
    }

    #[test]
    fn only_what_can_be_verified_is_a_digest() {
        EMPTY.parse::<Digest>().unwrap();
        for text in
            ["", "sha256:", &EMPTY[..70], &EMPTY.to_uppercase(), "md5:00", "sha256:../../../etc", &EMPTY[7..]]
        {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
        let sha512 = format!("sha512:{}", "0".repeat(128));
        assert!(sha512.parse::<Digest>().unwrap_err().to_string().contains("sha512"));
    }
}
