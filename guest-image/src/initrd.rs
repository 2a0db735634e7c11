//! The initrd: the static agent as /init, and the directories it mounts on before it can make any.
//!
//! It holds nothing else, because every page of it is copied during each boot, and it is not compressed,
//! because unpacking would cost the guest more than the host's page cache costs us. The same agent gives the
//! same bytes.

use std::collections::BTreeMap;

use crate::cpio::{self, Entry};
use crate::elf;

/// Why an initrd cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel could not execute the agent.
    #[error("the agent cannot be the guest's /init")]
    Agent(#[from] elf::Error),
    /// The archive format has its limits.
    #[error("the initrd cannot be written")]
    Archive(#[from] cpio::Error),
}

/// The archive with `agent`, the bytes of a static ELF program, as /init.
pub fn build(agent: Vec<u8>) -> Result<Vec<u8>, Error> {
    elf::check_static(&agent)?;
    let directory = |name: &str| (name.to_string(), Entry::Directory { mode: 0o755 });
    let entries = BTreeMap::from([
        directory("dev"),
        // The kernel opens it as the three standard descriptors of /init (console_on_rootfs in init/main.c).
        ("dev/console".to_string(), Entry::CharacterDevice { mode: 0o600, major: 5, minor: 1 }),
        ("init".to_string(), Entry::File { mode: 0o755, content: agent }),
        directory("proc"),
        directory("run"),
        directory("sys"),
    ]);
    Ok(cpio::archive(&entries)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::sha256;
    use crate::elf::tests::program;

    /// The digest is written down so that a change of the format, or of anything the machine contributes, shows.
    #[test]
    fn the_same_agent_gives_the_same_bytes_everywhere() {
        let first = build(program(1)).unwrap();
        assert_eq!(first, build(program(1)).unwrap());
        assert_eq!(sha256(&first), "55451bb439ac0c93a047256aa1ad5181554b7f4d2763c49a565c57e184d351e5");
    }

    #[test]
    fn another_agent_gives_other_bytes() {
        let mut agent = program(1);
        agent.push(0);
        assert_ne!(build(agent).unwrap(), build(program(1)).unwrap());
    }

    #[test]
    fn refuses_an_agent_that_the_guest_could_not_execute() {
        assert!(matches!(build(program(3)), Err(Error::Agent(elf::Error::Dynamic))));
        assert!(matches!(build(b"not a program".to_vec()), Err(Error::Agent(elf::Error::NotElf))));
    }
}
