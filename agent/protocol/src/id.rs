//! Ids of containers and execs: one rule for both sides.

/// Longest id in bytes: an id names directories, cgroups among them, and a file name has at most 255 (NAME_MAX).
pub const ID_MAX: usize = 255;

/// An id that cannot be used. The text does not repeat the id, which may be long or unprintable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InvalidId {
    /// No character at all.
    Empty,
    /// More than [`ID_MAX`] bytes.
    TooLong(usize),
    /// A character outside `[A-Za-z0-9_+.-]`.
    Character(char),
    /// `.` or `..`, which are directories.
    Dots,
}

impl std::fmt::Display for InvalidId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            InvalidId::Empty => write!(f, "an id must not be empty"),
            InvalidId::TooLong(len) => write!(f, "an id has at most {ID_MAX} bytes, this one has {len}"),
            InvalidId::Character(c) => write!(f, "an id is made of [A-Za-z0-9_+.-], this one contains {c:?}"),
            InvalidId::Dots => write!(f, "\".\" and \"..\" cannot be ids"),
        }
    }
}

impl std::error::Error for InvalidId {}

/// Checks a container or exec id: `[A-Za-z0-9_+.-]`, 1 to [`ID_MAX`] bytes, not `.` or `..`. What passes is safe as
/// a file name and in a [`StreamHeader`](crate::StreamHeader).
pub fn check_id(id: &str) -> Result<(), InvalidId> {
    if id.is_empty() {
        return Err(InvalidId::Empty);
    }
    if id.len() > ID_MAX {
        return Err(InvalidId::TooLong(id.len()));
    }
    if let Some(c) = id.chars().find(|c| !(c.is_ascii_alphanumeric() || "_+.-".contains(*c))) {
        return Err(InvalidId::Character(c));
    }
    if id == "." || id == ".." {
        return Err(InvalidId::Dots);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_other_runtimes_pass() {
        for id in ["a", "web-1", "0123456789abcdef", "a.b_c+d", "...", "-", &"x".repeat(ID_MAX)] {
            assert_eq!(check_id(id), Ok(()), "{id}");
        }
    }

    #[test]
    fn what_could_leave_a_directory_or_break_a_header_does_not() {
        assert_eq!(check_id(""), Err(InvalidId::Empty));
        assert_eq!(check_id("."), Err(InvalidId::Dots));
        assert_eq!(check_id(".."), Err(InvalidId::Dots));
        assert_eq!(check_id("a/b"), Err(InvalidId::Character('/')));
        assert_eq!(check_id("a b"), Err(InvalidId::Character(' ')));
        assert_eq!(check_id("a\n"), Err(InvalidId::Character('\n')));
        assert_eq!(check_id("a\0"), Err(InvalidId::Character('\0')));
        assert_eq!(check_id("ä"), Err(InvalidId::Character('ä')));
        assert_eq!(check_id(&"x".repeat(ID_MAX + 1)), Err(InvalidId::TooLong(ID_MAX + 1)));
    }
}
