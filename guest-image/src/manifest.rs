//! manifest.json: what the guest files beside it are and what they were made from. It is written last, so
//! where it is, the other two are as it says.

use serde::{Deserialize, Serialize};

use crate::digest::sha256;

/// The whole manifest.
#[derive(Debug, Serialize)]
pub struct Manifest {
    /// Version of stockade, whose runtime, agent and guest files belong together.
    pub stockade: String,
    /// The guest kernel.
    pub kernel: Kernel,
    /// The initrd.
    pub initrd: Initrd,
}

/// The guest kernel and everything that decided its bytes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Kernel {
    /// vmlinux.
    #[serde(flatten)]
    pub file: File,
    /// What `uname -r` prints in the guest.
    pub release: String,
    /// Debian's package of the source.
    pub source_package: String,
    /// Its version.
    pub source_version: String,
    /// First line of `gcc --version`.
    pub compiler: String,
    /// First line of `ld --version`.
    pub linker: String,
    /// Of our configuration fragment.
    pub fragment_sha256: String,
    /// Of the complete configuration it led to.
    pub config_sha256: String,
}

/// The initrd.
#[derive(Debug, Serialize)]
pub struct Initrd {
    /// initrd.img.
    #[serde(flatten)]
    pub file: File,
    /// Of the agent in it.
    pub agent_sha256: String,
}

/// One of the files beside the manifest.
#[derive(Debug, Serialize, Deserialize)]
pub struct File {
    /// Its name.
    pub file: String,
    /// In bytes.
    pub size: u64,
    /// 64 hex digits.
    pub sha256: String,
}

impl File {
    /// Describes `content` under `name`.
    pub fn of(name: &str, content: &[u8]) -> File {
        File { file: name.to_string(), size: content.len() as u64, sha256: sha256(content) }
    }
}

/// JSON for people, ending with a newline.
pub fn json(value: &impl Serialize) -> String {
    // These types have string keys only and no fallible conversions, the two things serde_json refuses.
    let text = serde_json::to_string_pretty(value).unwrap_or_else(|error| unreachable!("{error}"));
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_record_reads_back_as_written() {
        let kernel = Kernel {
            file: File::of("vmlinux", b"abc"),
            release: "6.12.1".into(),
            source_package: "linux-source-6.12".into(),
            source_version: "6.12.1-1".into(),
            compiler: "gcc".into(),
            linker: "ld".into(),
            fragment_sha256: sha256(b"fragment"),
            config_sha256: sha256(b"config"),
        };
        let text = json(&kernel);
        assert!(text.contains("\"size\": 3"), "{text}");
        assert_eq!(json(&serde_json::from_str::<Kernel>(&text).unwrap()), text);
    }
}
