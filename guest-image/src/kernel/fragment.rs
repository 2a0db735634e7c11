//! The kernel's configuration fragment, and the check that the kernel was configured as it says.
//!
//! Kconfig drops a line whose option does not exist or whose dependencies are not met, without a word. A
//! fragment that merely looks as if it turned something on (or off) is worse than none, so such a line is an
//! error here.

use std::collections::BTreeMap;

/// Option (with `CONFIG_`) to value; `n` for an option that is to be off.
pub type Settings = BTreeMap<String, String>;

/// What is wrong with a fragment.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// Neither a comment nor a setting.
    #[error("line {0} is neither a comment nor CONFIG_NAME=value: {1}")]
    Malformed(usize, String),
    /// An option that is set twice.
    #[error("line {0} sets {1} again; say it once")]
    Twice(usize, String),
    /// What Kconfig made of it.
    #[error(
        "the kernel's configuration came out otherwise than these lines say, because the option does not exist, \
         lacks something it depends on, or is selected by another: {}",
        .0.join(", ")
    )]
    NotHeld(Vec<String>),
}

/// Reads the lines `CONFIG_NAME=value`; all others must be empty or comments.
pub fn parse(text: &str) -> Result<Settings, Error> {
    let mut settings = Settings::new();
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, value) = line
            .split_once('=')
            .filter(|(name, value)| is_option(name) && !value.is_empty())
            .ok_or_else(|| Error::Malformed(number, line.to_string()))?;
        if settings.insert(name.to_string(), value.to_string()).is_some() {
            return Err(Error::Twice(number, name.to_string()));
        }
    }
    Ok(settings)
}

fn is_option(name: &str) -> bool {
    name.strip_prefix("CONFIG_").is_some_and(|rest| {
        !rest.is_empty()
            && rest.chars().all(|character| character.is_ascii_alphanumeric() || character == '_')
    })
}

/// Checks that `config`, the text of the `.config` that came out, holds every setting. In it an option that is
/// off is `# CONFIG_NAME is not set` or is not there at all.
pub fn check(settings: &Settings, config: &str) -> Result<(), Error> {
    let came_out: BTreeMap<&str, &str> = config
        .lines()
        .filter(|line| line.starts_with("CONFIG_"))
        .filter_map(|line| line.split_once('='))
        .collect();
    let not_held: Vec<_> = settings
        .iter()
        .filter_map(|(name, value)| {
            let actual = came_out.get(name.as_str()).copied().unwrap_or("n");
            (actual != value).then(|| format!("{name}={value} (is {actual})"))
        })
        .collect();
    if not_held.is_empty() { Ok(()) } else { Err(Error::NotHeld(not_held)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_settings_between_comments() {
        let settings = parse("# why\n\nCONFIG_SMP=y\nCONFIG_LSM=\"landlock\"\nCONFIG_X86_16BIT=n\n").unwrap();
        assert_eq!(settings["CONFIG_LSM"], "\"landlock\"");
        assert_eq!(settings.len(), 3);
    }

    #[test]
    fn names_the_line_that_is_no_setting() {
        for text in ["CONFIG_SMP", "SMP=y", "CONFIG_SMP=", "CONFIG_=y", "CONFIG_A B=y"] {
            assert_eq!(parse(&format!("\n{text}")), Err(Error::Malformed(2, text.into())));
        }
    }

    #[test]
    fn refuses_an_option_that_is_set_twice() {
        assert_eq!(parse("CONFIG_A=y\nCONFIG_A=n"), Err(Error::Twice(2, "CONFIG_A".into())));
    }

    #[test]
    fn an_option_that_is_off_may_be_unset_or_absent() {
        let settings = parse("CONFIG_A=y\nCONFIG_B=n\nCONFIG_C=n\nCONFIG_D=32").unwrap();
        assert_eq!(check(&settings, "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D=32\n"), Ok(()));
    }

    #[test]
    fn every_line_that_does_not_hold_is_named() {
        let settings = parse("CONFIG_A=y\nCONFIG_B=n\nCONFIG_D=32").unwrap();
        let error = check(&settings, "# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_D=64\n").unwrap_err();
        let expected = ["CONFIG_A=y (is n)", "CONFIG_B=n (is y)", "CONFIG_D=32 (is 64)"];
        assert_eq!(error, Error::NotHeld(expected.map(String::from).to_vec()));
        assert!(error.to_string().ends_with("CONFIG_A=y (is n), CONFIG_B=n (is y), CONFIG_D=32 (is 64)"));
    }
}
