//! Where a shim listens: a socket that is found again from containerd's address, the namespace and the sandbox.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// containerd looks for abandoned sockets here.
const DIRECTORY: &str = "/run/containerd/s";
/// Name of the file in a bundle from which a restarted containerd learns the address.
const ADDRESS_FILE: &str = "address";

/// A shim's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address(PathBuf);

/// Who listens there now.
pub enum Bound {
    /// This process does.
    Ours(UnixListener),
    /// Another shim of the same sandbox.
    Theirs,
}

impl Address {
    /// The socket of a sandbox's shim, by containerd's rule: the hash of all that tells it from others.
    pub fn of(directory: Option<&str>, containerd: &str, namespace: &str, sandbox: &str) -> Self {
        let name = Path::new(containerd).join(namespace).join(sandbox);
        let hash = Sha256::digest(name.as_os_str().as_bytes());
        let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        Address(Path::new(directory.filter(|d| !d.is_empty()).unwrap_or(DIRECTORY)).join(hash))
    }

    /// The address that a bundle remembers.
    pub fn of_bundle(bundle: &Path) -> Option<Self> {
        let text = fs::read_to_string(bundle.join(ADDRESS_FILE)).ok()?;
        text.trim().strip_prefix("unix://").map(|path| Address(path.into()))
    }

    /// Lets a bundle remember it.
    pub fn write(&self, bundle: &Path) -> io::Result<()> {
        let temporary = bundle.join(format!(".{ADDRESS_FILE}"));
        fs::write(&temporary, self.url())?;
        fs::rename(temporary, bundle.join(ADDRESS_FILE))
    }

    /// As containerd writes it.
    pub fn url(&self) -> String {
        format!("unix://{}", self.0.display())
    }

    /// Whether somebody listens.
    pub fn is_served(&self) -> bool {
        UnixStream::connect(&self.0).is_ok()
    }

    /// Begins to listen, unless another shim does.
    pub fn bind(&self) -> io::Result<Bound> {
        if let Some(directory) = self.0.parent() {
            fs::create_dir_all(directory)?;
        }
        let listener = match UnixListener::bind(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                if self.is_served() {
                    return Ok(Bound::Theirs);
                }
                // What a shim that was killed has left.
                self.remove();
                UnixListener::bind(&self.0)?
            }
            other => other?,
        };
        fs::set_permissions(&self.0, fs::Permissions::from_mode(0o600))?;
        Ok(Bound::Ours(listener))
    }

    /// Takes the socket away. It may be gone already.
    pub fn remove(&self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_the_hash_of_what_tells_shims_apart() {
        let address = Address::of(None, "/run/containerd/containerd.sock", "default", "c1");
        // printf %s /run/containerd/containerd.sock/default/c1 | sha256sum
        let hash = "d25aa4ef11a84e954e74a5bcff06557d0b6ea8d0c00243896f29826694bbd888";
        assert_eq!(address.url(), format!("unix:///run/containerd/s/{hash}"));
        assert_ne!(address, Address::of(None, "/run/containerd/containerd.sock", "default", "c2"));
    }

    #[test]
    fn a_dead_shims_socket_is_taken_over_and_a_living_ones_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::of(dir.path().to_str(), "/a", "n", "c");
        let Bound::Ours(first) = address.bind().unwrap() else { panic!("taken") };
        assert!(matches!(address.bind().unwrap(), Bound::Theirs));
        drop(first);
        assert!(!address.is_served());
        assert!(matches!(address.bind().unwrap(), Bound::Ours(_)));
        address.write(dir.path()).unwrap();
        assert_eq!(Address::of_bundle(dir.path()), Some(address.clone()));
        address.remove();
        address.remove();
    }
}
