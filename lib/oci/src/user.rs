//! Users and groups of a process, looked up in the image's own `/etc/passwd` and `/etc/group`.
//!
//! The files come from the image and are not trusted: their size is bounded, lines that do not parse are skipped
//! instead of read as zero, and what looks like a number is only ever a number. A name in the image's passwd such as
//! `4294967296` or `1000` can thus not turn a numeric user into root (CVE-2024-40635, CVE-2026-46680), and a huge
//! group file cannot exhaust memory (CVE-2026-47262).

use std::path::Path;

use davit_model::{Coded, ErrorCode};

use crate::rootfs::{Rootfs, RootfsError};

/// The highest user or group id, which is runc's limit: it keeps them in a signed 32-bit number.
pub const MAX_ID: u32 = i32::MAX as u32;
/// The most bytes of `/etc/passwd` and of `/etc/group`.
const MAX_FILE_SIZE: u64 = 4 << 20;
/// The most supplementary groups of a process (`NGROUPS_MAX`).
const MAX_GROUPS: usize = 65536;

/// A resolved user: numbers only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    /// The user id.
    pub uid: u32,
    /// The primary group.
    pub gid: u32,
    /// All groups, the primary one first, without repetitions. The primary group is in the list because a process
    /// could otherwise drop a group that was meant to deny it access (CVE-2022-36109).
    pub groups: Vec<u32>,
}

/// Why a user could not be resolved.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// Neither `user` nor `user:group`.
    #[error("invalid user {text:?}: want a name or number, and optionally a colon and a group")]
    Format {
        /// What was given.
        text: String,
    },
    /// A number above [`MAX_ID`], or with a sign.
    #[error("invalid user {text:?}: {kind} out of range, want 0 to {MAX_ID}")]
    Range {
        /// What was given.
        text: String,
        /// `uid` or `gid`.
        kind: &'static str,
    },
    /// The image has no user of that name.
    #[error("unable to find user {name:?}: no matching entry in the image's /etc/passwd")]
    NoUser {
        /// The name.
        name: String,
    },
    /// The image has no group of that name.
    #[error("unable to find group {name:?}: no matching entry in the image's /etc/group")]
    NoGroup {
        /// The name.
        name: String,
    },
    /// The user is in more groups than a process can have.
    #[error("user {text:?} is in more than {MAX_GROUPS} groups")]
    TooManyGroups {
        /// What was given.
        text: String,
    },
    /// A file of the image could not be read.
    #[error("cannot look up users and groups")]
    Rootfs(#[source] RootfsError),
}

impl Coded for UserError {
    fn code(&self) -> ErrorCode {
        match self {
            UserError::Format { .. } | UserError::Range { .. } | UserError::TooManyGroups { .. } => {
                ErrorCode::InvalidArgument
            }
            UserError::NoUser { .. } | UserError::NoGroup { .. } => ErrorCode::NotFound,
            UserError::Rootfs(source) => source.code(),
        }
    }
}

/// A name or a number.
enum Word<'a> {
    Number(u32),
    Name(&'a str),
}

/// Resolves `user[:group]` (empty: root) by Docker's rules. A user given alone gets its primary group from the
/// passwd file, or 0 for a number that is not in there, and all groups that list its name. With a group, that is the
/// primary one and no others are looked up. `extra` (`--group-add`) come on top.
///
/// # Errors
/// [`UserError`].
pub fn resolve(rootfs: &Rootfs, user: &str, extra: &[String]) -> Result<User, UserError> {
    let (user_part, group_part) = match user.split_once(':') {
        None => (user, None),
        Some((user_part, group_part)) => (user_part, Some(group_part)),
    };
    if group_part.is_some_and(|group| group.is_empty() || group.contains(':')) {
        return Err(UserError::Format { text: user.to_owned() });
    }
    let wanted = if user_part.is_empty() { Word::Number(0) } else { parse_word(user, user_part, "uid")? };

    let passwd = read(rootfs, "/etc/passwd")?;
    let entry = passwd.lines().filter_map(parse_passwd).find(|entry| match wanted {
        Word::Number(uid) => entry.uid == uid,
        Word::Name(name) => entry.name == name,
    });
    let (uid, mut gid) = match (&entry, wanted) {
        (Some(entry), _) => (entry.uid, entry.gid),
        (None, Word::Number(uid)) => (uid, 0),
        (None, Word::Name(name)) => return Err(UserError::NoUser { name: name.to_owned() }),
    };

    let file = if group_part.is_none() && entry.is_none() && extra.is_empty() {
        String::new()
    } else {
        read(rootfs, "/etc/group")?
    };
    let find = |word: Word<'_>| match word {
        Word::Number(gid) => Ok(gid),
        Word::Name(name) => file
            .lines()
            .filter_map(parse_group)
            .find(|group| group.name == name)
            .map(|group| group.gid)
            .ok_or_else(|| UserError::NoGroup { name: name.to_owned() }),
    };
    let mut groups = Vec::new();
    if let Some(group_part) = group_part {
        gid = find(parse_word(user, group_part, "gid")?)?;
    } else if let Some(entry) = &entry {
        // A member list of the user's own group only says again what passwd says.
        let lists = |group: &GroupEntry<'_>| group.members.split(',').any(|member| member == entry.name);
        groups.extend(file.lines().filter_map(parse_group).filter(lists).map(|group| group.gid));
    }
    for group in extra {
        groups.push(find(parse_word(group, group, "gid")?)?);
    }
    let mut all = vec![gid];
    let mut seen = std::collections::HashSet::from([gid]);
    all.extend(groups.into_iter().filter(|gid| seen.insert(*gid)));
    if all.len() > MAX_GROUPS {
        return Err(UserError::TooManyGroups { text: user.to_owned() });
    }
    Ok(User { uid, gid, groups: all })
}

fn parse_word<'a>(whole: &str, part: &'a str, kind: &'static str) -> Result<Word<'a>, UserError> {
    let digits = part.strip_prefix(['+', '-']).unwrap_or(part);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        if part.is_empty() || part.contains(['\0', '\n']) {
            return Err(UserError::Format { text: whole.to_owned() });
        }
        return Ok(Word::Name(part));
    }
    parse_id(part).map(Word::Number).ok_or_else(|| UserError::Range { text: whole.to_owned(), kind })
}

/// A number without a sign, within [`MAX_ID`].
fn parse_id(text: &str) -> Option<u32> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|id| *id <= MAX_ID)
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// A line of passwd(5): name, password, uid, gid, …
fn parse_passwd(line: &str) -> Option<PasswdEntry<'_>> {
    let mut fields = line.trim().split(':');
    let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
    let uid = parse_id(fields.nth(1)?.trim())?;
    let gid = parse_id(fields.next()?.trim())?;
    Some(PasswdEntry { name, uid, gid })
}

/// A line of group(5): name, password, gid, members.
fn parse_group(line: &str) -> Option<GroupEntry<'_>> {
    let mut fields = line.trim().split(':');
    let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
    let gid = parse_id(fields.nth(1)?.trim())?;
    Some(GroupEntry { name, gid, members: fields.next().unwrap_or("") })
}

/// The text of a file; a missing one is empty.
fn read(rootfs: &Rootfs, path: &str) -> Result<String, UserError> {
    let bytes = rootfs.read(Path::new(path), MAX_FILE_SIZE).map_err(UserError::Rootfs)?.unwrap_or_default();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbad line\nbroken:x:abc:0::/:\nuser:x:1000:1001:u:/home/u:/bin/sh\n\
         4294967296:x:0:0:::\n1234:x:0:0:::\nbig:x:4294967295:0:::\n# x:x:5:5\n";
    const GROUP: &str = "root:x:0:\nwheel:x:10:root,user\naudio:x:63:user\nuser:x:1001:user\nbad:x:-5:user\nhuge:x:99999999999:user\n";

    fn rootfs(passwd: &str, group: &str) -> (tempfile::TempDir, Rootfs) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("etc")).unwrap();
        fs::write(folder.path().join("etc/passwd"), passwd).unwrap();
        fs::write(folder.path().join("etc/group"), group).unwrap();
        let rootfs = Rootfs::from_path(folder.path());
        (folder, rootfs)
    }

    fn user(uid: u32, gid: u32, groups: &[u32]) -> User {
        User { uid, gid, groups: groups.to_vec() }
    }

    #[test]
    fn names_numbers_and_groups_as_docker_resolves_them() {
        let (_folder, rootfs) = rootfs(PASSWD, GROUP);
        let get = |text: &str| resolve(&rootfs, text, &[]).unwrap();
        assert_eq!(get(""), user(0, 0, &[0, 10]));
        assert_eq!(get("root"), user(0, 0, &[0, 10]));
        assert_eq!(get("user"), user(1000, 1001, &[1001, 10, 63]));
        assert_eq!(get("1000"), user(1000, 1001, &[1001, 10, 63]));
        assert_eq!(get("7"), user(7, 0, &[0]));
        assert_eq!(get("7:8"), user(7, 8, &[8]));
        assert_eq!(get("user:audio"), user(1000, 63, &[63]));
        assert_eq!(get("user:0"), user(1000, 0, &[0]));
        assert_eq!(get("2147483647"), user(2_147_483_647, 0, &[0]));
        let extra = ["audio".to_owned(), "77".to_owned(), "77".to_owned()];
        assert_eq!(resolve(&rootfs, "7:8", &extra).unwrap(), user(7, 8, &[8, 63, 77]));
    }

    #[test]
    fn numbers_are_never_names_and_never_wrap() {
        let (_folder, rootfs) = rootfs(PASSWD, GROUP);
        assert_eq!(resolve(&rootfs, "1234", &[]).unwrap(), user(1234, 0, &[0]));
        for text in
            ["4294967296", "2147483648", "4294967295", "-1", "+5", "99999999999999999999999", "0:2147483648"]
        {
            assert!(matches!(resolve(&rootfs, text, &[]), Err(UserError::Range { .. })), "{text}");
        }
    }

    #[test]
    fn what_is_not_there_or_not_well_formed_is_an_error() {
        let (_folder, rootfs) = rootfs(PASSWD, GROUP);
        assert!(matches!(resolve(&rootfs, "nobody", &[]), Err(UserError::NoUser { .. })));
        assert!(matches!(resolve(&rootfs, "broken", &[]), Err(UserError::NoUser { .. })));
        assert!(matches!(resolve(&rootfs, "big", &[]), Err(UserError::NoUser { .. })));
        assert!(matches!(resolve(&rootfs, "user:nogroup", &[]), Err(UserError::NoGroup { .. })));
        for text in ["user:", "a:b:c", ":"] {
            assert!(resolve(&rootfs, text, &[]).is_err(), "{text}");
        }
    }

    #[test]
    fn missing_files_are_empty_and_large_ones_refused() {
        let folder = tempfile::tempdir().unwrap();
        let rootfs = Rootfs::from_path(folder.path());
        assert_eq!(resolve(&rootfs, "", &[]).unwrap(), user(0, 0, &[0]));
        assert!(resolve(&rootfs, "root", &[]).is_err());
        fs::create_dir(folder.path().join("etc")).unwrap();
        fs::write(folder.path().join("etc/passwd"), vec![b'x'; MAX_FILE_SIZE as usize + 1]).unwrap();
        assert!(matches!(
            resolve(&rootfs, "root", &[]),
            Err(UserError::Rootfs(RootfsError::TooLarge { .. }))
        ));
    }

    proptest! {
        #[test]
        fn a_user_that_is_not_zero_never_becomes_root(text in "[0-9+-]{1,14}") {
            let (_folder, rootfs) = rootfs(PASSWD, GROUP);
            if let Ok(resolved) = resolve(&rootfs, &text, &[]) {
                prop_assert_eq!(u64::from(resolved.uid), text.parse::<u64>().unwrap());
            }
        }
    }
}
