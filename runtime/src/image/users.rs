//! Users by name, as the image's own /etc/passwd and /etc/group have them (image-spec, config.md, `User`).
//!
//! The rules are those that engines have in common: a name goes before a number, a number need not be in the file, and
//! a user without a group named with it has the groups that list it.

/// Who a process is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Further groups.
    pub additional: Vec<u32>,
    /// Home directory, if the image knows the user.
    pub home: Option<String>,
}

/// A user that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// nobody of that name
    #[error("the image has no user {0:?} in its /etc/passwd: use a number, or name another one with --user")]
    NoUser(String),
    /// no group of that name
    #[error("the image has no group {0:?} in its /etc/group: use a number, or name another one with --user")]
    NoGroup(String),
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Finds `USER[:GROUP]`, both names or numbers; nothing is root.
pub fn find(wanted: &str, passwd: &str, group: &str) -> Result<User, Error> {
    let (user, wanted_group) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (wanted, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = id(user);
    let account = accounts(passwd)
        .find(|account| account.name == user)
        .or_else(|| accounts(passwd).find(|account| Some(account.uid) == number));
    let (uid, gid) = match (&account, number) {
        (Some(account), _) => (account.uid, account.gid),
        (None, Some(uid)) => (uid, 0),
        (None, None) => return Err(Error::NoUser(cut(user))),
    };
    let home = account.as_ref().map(|a| a.home.to_owned()).filter(|home| home.starts_with('/'));
    if let Some(wanted) = wanted_group {
        let number = id(wanted);
        let found = groups(group)
            .find(|group| group.name == wanted)
            .map(|group| group.gid)
            .or(number)
            .ok_or_else(|| Error::NoGroup(cut(wanted)))?;
        return Ok(User { uid, gid: found, additional: Vec::new(), home });
    }
    let name = account.map(|account| account.name);
    let mut additional: Vec<u32> = groups(group)
        .filter(|group| name.is_some_and(|name| group.members.split(',').any(|member| member.trim() == name)))
        .map(|group| group.gid)
        .collect();
    additional.sort_unstable();
    additional.dedup();
    Ok(User { uid, gid, additional, home })
}

/// passwd(5). Lines that are none are passed over.
fn accounts(text: &str) -> impl Iterator<Item = Account<'_>> {
    text.lines().filter_map(|line| {
        let fields: Vec<_> = line.trim().split(':').collect();
        match fields[..] {
            [name, _, uid, gid, _, home, ..] if !name.is_empty() => {
                Some(Account { name, uid: id(uid)?, gid: id(gid)?, home })
            }
            _ => None,
        }
    })
}

/// group(5).
fn groups(text: &str) -> impl Iterator<Item = Group<'_>> {
    text.lines().filter_map(|line| {
        let fields: Vec<_> = line.trim().split(':').collect();
        match fields[..] {
            [name, _, gid, members, ..] if !name.is_empty() => Some(Group { name, gid: id(gid)?, members }),
            _ => None,
        }
    })
}

/// The highest number means nobody.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX)
}

fn cut(text: &str) -> String {
    text.chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# comment\nweb:x:33:34:Web:/srv/web:/bin/false\n\
                          77:x:1000:1000::/n:/bin/sh\nbroken:x:y:0::/:\nrelative:x:5:5::home:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nssl:x:110:other, web\naudio:x:29:web\nnone:x:z:web\n";

    fn found(wanted: &str) -> (u32, u32, Vec<u32>, Option<String>) {
        let user = find(wanted, PASSWD, GROUP).unwrap();
        (user.uid, user.gid, user.additional, user.home)
    }

    #[test]
    fn names_and_numbers_are_found_with_their_groups() {
        let root = (0, 0, vec![], Some("/root".into()));
        assert_eq!(found(""), root);
        assert_eq!(found("root"), root);
        let web = (33, 34, vec![29, 110], Some("/srv/web".into()));
        assert_eq!(found("web"), web);
        assert_eq!(found("33"), web);
        assert_eq!(found("web:"), web);
        assert_eq!(found("web:audio"), (33, 29, vec![], Some("/srv/web".into())));
        assert_eq!(found("4711:4712"), (4711, 4712, vec![], None));
        assert_eq!(found("4711"), (4711, 0, vec![], None));
        assert_eq!(found(":ssl"), (0, 110, vec![], Some("/root".into())));
    }

    #[test]
    fn a_name_of_digits_goes_before_the_number() {
        assert_eq!(found("77").0, 1000);
    }

    #[test]
    fn a_home_that_is_no_absolute_path_is_none() {
        assert_eq!(found("relative").3, None);
    }

    #[test]
    fn who_is_not_there_is_named() {
        assert!(find("nobody", PASSWD, GROUP).unwrap_err().to_string().contains("nobody"));
        assert!(find("web:nogroup", PASSWD, GROUP).unwrap_err().to_string().contains("nogroup"));
        for wanted in ["-1", "4294967295", "4294967296", "broken"] {
            find(wanted, PASSWD, GROUP).unwrap_err();
        }
        assert_eq!(find("7:8", "", "").unwrap().gid, 8);
    }
}
