//! Whose a mount says that its files are: `uidMappings` and `gidMappings` of a mount, and the options `idmap` and
//! `ridmap`.
//!
//! Without mappings of its own a mount with one of the options has those of the container's user namespace. Podman and
//! crun have mappings in the option too: `idmap=uids=0-100000-65536#…;gids=…`, where `@` before a triple says that its
//! second number is one of the container's.

use oci_spec::runtime::{Linux, LinuxIdMapping, Mount};

use super::Error;

/// What the kernel takes of a map (user_namespaces(7)).
const RANGES_MAX: usize = 340;
/// Whose what is not mapped is: the kernel's `overflowuid` and `overflowgid`, unless somebody has changed them.
const NOBODY: u32 = 65_534;

/// Owners and groups of a file system, and as which others a mount shows them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap {
    uids: Vec<Range>,
    gids: Vec<Range>,
    /// For what is mounted below, too.
    pub recursive: bool,
}

/// As many ids, beginning with these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    /// In the file system.
    stored: u32,
    /// Where it is mounted.
    shown: u32,
    count: u32,
}

impl IdMap {
    /// That of `mounts[index]` of a container; `linux` is the container's. Nothing where ids are shown as they are.
    pub fn of(index: usize, mount: &Mount, linux: Option<&Linux>) -> Result<Option<Self>, Error> {
        let options = mount.options().iter().flatten();
        let option = options.rev().find_map(|option| parse_option(option));
        let own = (mount.uid_mappings().as_deref(), mount.gid_mappings().as_deref());
        let (uids, gids) = (own.0.unwrap_or_default(), own.1.unwrap_or_default());
        let field = |name: &str| format!("mounts[{index}].{name}");
        let containers = |of: fn(&Linux) -> &Option<Vec<LinuxIdMapping>>| {
            linux.and_then(|linux| of(linux).as_deref()).unwrap_or_default()
        };
        let (uids, gids, names) = match (uids.is_empty(), gids.is_empty(), option) {
            (true, true, None) => return Ok(None),
            (true, true, Some(Idmap { ranges: Some(text), .. })) => {
                let failed = || Error::Value {
                    field: field("options"),
                    value: text.chars().take(200).collect(),
                    remedy: "write idmap=uids=STORED-SHOWN-COUNT;gids=STORED-SHOWN-COUNT, with # between triples",
                };
                let users = (containers(Linux::uid_mappings), containers(Linux::gid_mappings));
                let (uids, gids) = parse_ranges(text, users).ok_or_else(failed)?;
                (uids, gids, [field("options"), field("options")])
            }
            (true, true, Some(_)) => {
                let (uids, gids) = (containers(Linux::uid_mappings), containers(Linux::gid_mappings));
                if uids.is_empty() || gids.is_empty() {
                    return Err(Error::Unsupported {
                        field: field("options idmap"),
                        reason: "neither mount nor container has mappings to take; give uidMappings and gidMappings",
                    });
                }
                let names = ["linux.uidMappings", "linux.gidMappings"].map(String::from);
                (ranges(uids), ranges(gids), names)
            }
            (false, false, _) => (ranges(uids), ranges(gids), [field("uidMappings"), field("gidMappings")]),
            (true, false, _) | (false, true, _) => {
                let missing = if uids.is_empty() { "uidMappings" } else { "gidMappings" };
                return Err(Error::Value {
                    field: field(missing),
                    value: String::new(),
                    remedy: "a mount has mappings of both users and groups, or none",
                });
            }
        };
        for (name, ranges) in names.iter().zip([&uids, &gids]) {
            check(name, ranges)?;
        }
        Ok(Some(Self { uids, gids, recursive: option.is_some_and(|option| option.recursive) }))
    }

    /// One of `STORED:SHOWN:COUNT` with commas between them, as containerd writes users and groups.
    pub fn of_containerd(uids: &str, gids: &str) -> Option<Self> {
        let parse = |text: &str| -> Option<Vec<Range>> {
            let ranges: Option<Vec<_>> = text.split(',').map(|triple| Range::parse(triple, ':')).collect();
            ranges.filter(|ranges| check("", ranges).is_ok())
        };
        Some(Self { uids: parse(uids)?, gids: parse(gids)?, recursive: true })
    }

    /// The maps of a user namespace that a mount can be given: of its users and of its groups.
    pub fn maps(&self) -> [String; 2] {
        let text = |ranges: &[Range]| {
            let line = |range: &Range| format!("{} {} {}\n", range.stored, range.shown, range.count);
            ranges.iter().map(line).collect()
        };
        [text(&self.uids), text(&self.gids)]
    }

    /// Who is shown as a file's owner and group.
    pub fn shown(&self, uid: u32, gid: u32) -> (u32, u32) {
        let find = |ranges: &[Range], id| ranges.iter().find_map(|range| range.shown(id)).unwrap_or(NOBODY);
        (find(&self.uids, uid), find(&self.gids, gid))
    }
}

impl Range {
    fn shown(&self, id: u32) -> Option<u32> {
        let distance = id.checked_sub(self.stored)?;
        (distance < self.count).then(|| self.shown.saturating_add(distance))
    }

    fn parse(text: &str, between: char) -> Option<Self> {
        let mut numbers = text.split(between).map(|number| number.parse().ok());
        let range = Self { stored: numbers.next()??, shown: numbers.next()??, count: numbers.next()?? };
        numbers.next().is_none().then_some(range)
    }
}

/// Takes from a mount what the host does of it.
pub fn take_out(mount: &mut Mount) {
    mount.set_uid_mappings(None).set_gid_mappings(None);
    mount.options_mut().iter_mut().for_each(|all| all.retain(|option| !is_option(option)));
}

/// Whether this is one of the options.
pub fn is_option(option: &str) -> bool {
    parse_option(option).is_some()
}

/// Whether a mount asks for it.
pub fn is_asked_for(mount: &Mount) -> bool {
    mount.uid_mappings().as_ref().is_some_and(|mappings| !mappings.is_empty())
        || mount.gid_mappings().as_ref().is_some_and(|mappings| !mappings.is_empty())
        || mount.options().iter().flatten().any(|option| is_option(option))
}

#[derive(Clone, Copy)]
struct Idmap<'a> {
    recursive: bool,
    ranges: Option<&'a str>,
}

/// One of the options, with the ranges that it may have.
fn parse_option(option: &str) -> Option<Idmap<'_>> {
    let (name, ranges) = match option.split_once('=') {
        Some((name, ranges)) => (name, Some(ranges).filter(|ranges| !ranges.is_empty())),
        None => (option, None),
    };
    match name {
        "idmap" => Some(Idmap { recursive: false, ranges }),
        "ridmap" => Some(Idmap { recursive: true, ranges }),
        _ => None,
    }
}

/// `users` are mappings of the container.
fn parse_ranges(
    text: &str,
    users: (&[LinuxIdMapping], &[LinuxIdMapping]),
) -> Option<(Vec<Range>, Vec<Range>)> {
    let (mut uids, mut gids) = (Vec::new(), Vec::new());
    for part in text.split(';').filter(|part| !part.is_empty()) {
        let (kind, triples) = part.split_once('=')?;
        let (to, containers) = match kind {
            "uids" => (&mut uids, users.0),
            "gids" => (&mut gids, users.1),
            _ => return None,
        };
        for triple in triples.split('#') {
            to.push(match triple.strip_prefix('@') {
                None => Range::parse(triple, '-')?,
                Some(triple) => {
                    let range = Range::parse(triple, '-')?;
                    let shown = ranges(containers).iter().find_map(|users| users.shown(range.shown))?;
                    Range { shown, ..range }
                }
            });
        }
    }
    Some((uids, gids))
}

fn ranges(mappings: &[LinuxIdMapping]) -> Vec<Range> {
    let range =
        |of: &LinuxIdMapping| Range { stored: of.container_id(), shown: of.host_id(), count: of.size() };
    mappings.iter().map(range).collect()
}

/// What the kernel would refuse without a word on why.
fn check(field: &str, ranges: &[Range]) -> Result<(), Error> {
    let refused = |value: String, remedy| Err(Error::Value { field: field.into(), value, remedy });
    if ranges.is_empty() || ranges.len() > RANGES_MAX {
        return refused(format!("{} ranges", ranges.len()), "give at least one range, and 340 at most");
    }
    for (index, range) in ranges.iter().enumerate() {
        let Range { stored, shown, count } = *range;
        let text = || format!("{stored} to {shown}, {count} ids");
        if count == 0 || stored.checked_add(count).is_none() || shown.checked_add(count).is_none() {
            return refused(text(), "give a number of ids above zero, the last of which is below 4294967295");
        }
        let overlap = |a: u32, b: u32, others: u32| a < b + others && b < a + count;
        let earlier = ranges[..index].iter();
        if earlier.into_iter().any(|other| {
            overlap(stored, other.stored, other.count) || overlap(shown, other.shown, other.count)
        }) {
            return refused(text(), "name no id twice: this range has ids of an earlier one");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn of(mount: Value, linux: Value) -> Result<Option<IdMap>, String> {
        let mut config = json!({"destination": "/v", "source": "/s", "options": ["bind"]});
        config.as_object_mut().unwrap().extend(mount.as_object().unwrap().clone());
        let mount: Mount = serde_json::from_value(config).unwrap();
        let linux: Linux = serde_json::from_value(linux).unwrap();
        IdMap::of(7, &mount, Some(&linux)).map_err(|e| e.to_string())
    }

    fn mapping(inside: u32, outside: u32, count: u32) -> Value {
        json!({"containerID": inside, "hostID": outside, "size": count})
    }

    fn users() -> Value {
        json!({"uidMappings": [mapping(0, 5, 10)], "gidMappings": [mapping(0, 7, 10), mapping(10, 100, 50)]})
    }

    #[test]
    fn a_mount_has_its_own_mappings_or_the_containers() {
        assert_eq!(of(json!({}), users()), Ok(None));
        let own = json!({
            "options": ["rbind", "ridmap"], "uidMappings": [mapping(0, 1000, 2)], "gidMappings": [mapping(1, 3, 4)],
        });
        let map = of(own.clone(), users()).unwrap().unwrap();
        assert_eq!((map.maps(), map.recursive), (["0 1000 2\n".into(), "1 3 4\n".into()], true));
        let mut without_option = own;
        without_option["options"] = json!(["rbind"]);
        assert!(!of(without_option, json!({})).unwrap().unwrap().recursive);
        let map = of(json!({"options": ["bind", "ridmap", "idmap"]}), users()).unwrap().unwrap();
        assert_eq!((map.maps(), map.recursive), (["0 5 10\n".into(), "0 7 10\n10 100 50\n".into()], false));
    }

    #[test]
    fn ranges_may_stand_in_the_option() {
        let map = |option: &str| of(json!({"options": [option]}), users()).map(|map| map.unwrap().maps());
        assert_eq!(
            map("idmap=uids=0-1-10#10-11-10;gids=0-100-10"),
            Ok(["0 1 10\n10 11 10\n".into(), "0 100 10\n".into()])
        );
        assert_eq!(map("idmap=uids=@0-1-3;gids=@2-12-3"), Ok(["0 6 3\n".into(), "2 102 3\n".into()]));
        assert_eq!(map("idmap="), map("idmap"));
        for wrong in
            ["idmap=uids=0-1", "idmap=uids=0-1-2-3;gids=0-0-1", "idmap=pids=0-1-2", "idmap=uids=@0-99-1"]
        {
            let error = map(wrong).unwrap_err();
            assert!(error.starts_with("mounts[7].options is") && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn what_the_kernel_would_refuse_is_named() {
        for (uids, gids, linux, words) in [
            (json!([mapping(0, 1, 1)]), json!([]), users(), "mounts[7].gidMappings"),
            (json!([mapping(0, 1, 0)]), json!([mapping(0, 1, 1)]), users(), "mounts[7].uidMappings"),
            (json!([mapping(0, 1, 1)]), json!([mapping(0, u32::MAX, 1)]), users(), "mounts[7].gidMappings"),
            (json!([mapping(0, 1, 9), mapping(8, 50, 1)]), json!([mapping(0, 1, 1)]), users(), "twice"),
            (json!([mapping(0, 1, 9), mapping(20, 9, 1)]), json!([mapping(0, 1, 1)]), users(), "twice"),
            (json!([]), json!([]), json!({}), "mounts[7].options idmap"),
        ] {
            let mount = json!({"options": ["idmap"], "uidMappings": uids, "gidMappings": gids});
            let error = of(mount, linux).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        let many: Vec<_> = (0..341).map(|n| mapping(n, n + 1000, 1)).collect();
        let error =
            of(json!({"uidMappings": many, "gidMappings": [mapping(0, 1, 1)]}), json!({})).unwrap_err();
        assert!(error.contains("340"), "{error}");
    }

    #[test]
    fn containerds_words_are_read() {
        let map = IdMap::of_containerd("0:100000:10,10:7:1", "0:200000:65536").unwrap();
        assert_eq!(map.maps(), ["0 100000 10\n10 7 1\n".to_owned(), "0 200000 65536\n".into()]);
        assert_eq!(map.shown(3, 65_535), (100_003, 265_535));
        assert_eq!(map.shown(11, 65_536), (NOBODY, NOBODY));
        for wrong in ["", "0:1", "0:1:-1", "0:1:1:1", "0:1:0", "a:1:1"] {
            assert_eq!(IdMap::of_containerd(wrong, "0:1:1"), None, "{wrong}");
        }
    }
}
