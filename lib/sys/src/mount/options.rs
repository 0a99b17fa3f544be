//! The options of a mount, sorted from the one list in which they come: flags of the mount, its propagation,
//! data of the filesystem, and what only containerd knows.

use davit_model::Mount;
use nix::mount::MsFlags;

use super::Error;

/// The words of fstab(5) that set a flag.
const SETTING: &[(&str, MsFlags)] = &[
    ("bind", MsFlags::MS_BIND),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC)),
    ("remount", MsFlags::MS_REMOUNT),
    ("ro", MsFlags::MS_RDONLY),
    ("nosuid", MsFlags::MS_NOSUID),
    ("nodev", MsFlags::MS_NODEV),
    ("noexec", MsFlags::MS_NOEXEC),
    ("noatime", MsFlags::MS_NOATIME),
    ("nodiratime", MsFlags::MS_NODIRATIME),
    ("relatime", MsFlags::MS_RELATIME),
    ("strictatime", MsFlags::MS_STRICTATIME),
    ("sync", MsFlags::MS_SYNCHRONOUS),
    ("dirsync", MsFlags::MS_DIRSYNC),
    ("mand", MsFlags::MS_MANDLOCK),
];

/// The words that clear a flag which an earlier word has set.
const CLEARING: &[(&str, MsFlags)] = &[
    ("rw", MsFlags::MS_RDONLY),
    ("suid", MsFlags::MS_NOSUID),
    ("dev", MsFlags::MS_NODEV),
    ("exec", MsFlags::MS_NOEXEC),
    ("atime", MsFlags::MS_NOATIME),
    ("diratime", MsFlags::MS_NODIRATIME),
    ("norelatime", MsFlags::MS_RELATIME),
    ("nostrictatime", MsFlags::MS_STRICTATIME),
    ("async", MsFlags::MS_SYNCHRONOUS),
    ("nomand", MsFlags::MS_MANDLOCK),
    ("defaults", MsFlags::empty()),
];

/// The words for how mount events spread (mount_namespaces(7)). containerd's own parser does not know them and
/// leaves them to the filesystem, which refuses them.
const PROPAGATION: &[(&str, MsFlags)] = &[
    ("shared", MsFlags::MS_SHARED),
    ("rshared", MsFlags::MS_SHARED.union(MsFlags::MS_REC)),
    ("private", MsFlags::MS_PRIVATE),
    ("rprivate", MsFlags::MS_PRIVATE.union(MsFlags::MS_REC)),
    ("slave", MsFlags::MS_SLAVE),
    ("rslave", MsFlags::MS_SLAVE.union(MsFlags::MS_REC)),
    ("unbindable", MsFlags::MS_UNBINDABLE),
    ("runbindable", MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC)),
];

/// The flags that belong to the superblock, by their names as parameters of `fsconfig(2)`.
const SUPERBLOCK: &[(&str, MsFlags)] = &[
    ("ro", MsFlags::MS_RDONLY),
    ("sync", MsFlags::MS_SYNCHRONOUS),
    ("dirsync", MsFlags::MS_DIRSYNC),
    ("mand", MsFlags::MS_MANDLOCK),
];

/// Options, sorted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    /// The flags as mount(2) takes them, without propagation.
    pub(super) flags: MsFlags,
    /// How mount events are to spread, in a call of its own; empty to leave it.
    pub(super) propagation: MsFlags,
    /// What the filesystem itself is told, `key` or `key=value`.
    pub(super) data: Vec<String>,
    /// The id mappings, users first, in containerd's form.
    pub(super) mapping: Option<(String, String)>,
    /// The source is a file, to be mounted by way of a loop device; true if that is to go past the page cache.
    pub(super) loop_device: Option<bool>,
}

impl Options {
    /// Sorts the options of a mount.
    pub(super) fn parse(mount: &Mount) -> Result<Options, Error> {
        let refuse = |option: &str, reason| {
            Err(Error::Option { mount: super::describe(mount), option: option.to_owned(), reason })
        };
        let find = |table: &[(&str, MsFlags)], word: &str| {
            table.iter().find(|(name, _)| *name == word).map(|(_, flags)| *flags)
        };
        let mut options = Options {
            flags: MsFlags::empty(),
            propagation: MsFlags::empty(),
            data: Vec::new(),
            mapping: None,
            loop_device: None,
        };
        let is_loop = mount.options.iter().any(|option| option == "loop");
        if is_loop {
            options.loop_device = Some(mount.options.iter().any(|option| option == "direct-io"));
        }
        let (mut users, mut groups) = (None, None);
        for option in &mount.options {
            if let Some(flags) = find(SETTING, option) {
                options.flags |= flags;
            } else if let Some(flags) = find(CLEARING, option) {
                options.flags &= !flags;
            } else if let Some(propagation) = find(PROPAGATION, option) {
                options.propagation = propagation;
            } else if let Some(mapping) = option.strip_prefix("uidmap=") {
                users = Some(mapping.to_owned());
            } else if let Some(mapping) = option.strip_prefix("gidmap=") {
                groups = Some(mapping.to_owned());
            } else if option.starts_with("X-containerd.") {
                return refuse(option, "is for a mount manager, which should have taken it out");
            } else if is_loop && (option == "loop" || option == "direct-io") {
            } else if option.contains('\0') {
                return refuse(option, "contains a NUL byte");
            } else if !option.is_empty() {
                options.data.push(option.clone());
            }
        }
        if mount.kind == "bind" {
            options.flags |= MsFlags::MS_BIND;
        }
        options.mapping = match (users, groups) {
            (Some(users), Some(groups)) => Some((users, groups)),
            (None, None) => None,
            (Some(users), None) => return refuse(&format!("uidmap={users}"), "needs a gidmap beside it"),
            (None, Some(groups)) => return refuse(&format!("gidmap={groups}"), "needs a uidmap beside it"),
        };
        Ok(options)
    }

    /// True for a bind mount.
    pub(super) fn bind(&self) -> bool {
        self.flags.contains(MsFlags::MS_BIND)
    }

    /// True when the mounts below the source come along.
    pub(super) fn recursive(&self) -> bool {
        self.flags.contains(MsFlags::MS_REC)
    }

    /// The `MOUNT_ATTR_*` that the flags ask for.
    pub(super) fn attributes(&self) -> u64 {
        [
            (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
            (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
            (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
            (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
            (MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
            (MsFlags::MS_NOATIME, libc::MOUNT_ATTR_NOATIME),
            (MsFlags::MS_STRICTATIME, libc::MOUNT_ATTR_STRICTATIME),
        ]
        .into_iter()
        .filter(|(flag, _)| self.flags.contains(*flag))
        .fold(0, |attributes, (_, attribute)| attributes | attribute)
    }

    /// The `MOUNT_ATTR_*` to clear before: the access time is a number of several bits, not a flag.
    pub(super) fn cleared_attributes(&self) -> u64 {
        let atime = MsFlags::MS_NOATIME | MsFlags::MS_STRICTATIME | MsFlags::MS_RELATIME;
        if self.flags.intersects(atime) { libc::MOUNT_ATTR__ATIME } else { 0 }
    }

    /// The flags of the superblock, as parameters.
    pub(super) fn superblock(&self) -> impl Iterator<Item = &'static str> {
        let flags = self.flags;
        SUPERBLOCK.iter().filter(move |(_, flag)| flags.contains(*flag)).map(|(name, _)| *name)
    }
}

/// The folders of an overlay's `lowerdir` option, nearest first, still escaped. `None` without such an option.
pub(super) fn lower_directories(data: &[String]) -> Option<Vec<&str>> {
    let list = data.iter().find_map(|option| option.strip_prefix("lowerdir="))?;
    let mut directories = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (index, byte) in list.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b':' => {
                directories.push(&list[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    directories.push(&list[start..]);
    Some(directories)
}

/// The same options with other lower folders.
pub(super) fn replace_lower_directories(data: &[String], directories: &[String]) -> Vec<String> {
    let list = format!("lowerdir={}", directories.join(":"));
    data.iter()
        .map(|option| if option.starts_with("lowerdir=") { list.clone() } else { option.clone() })
        .collect()
}

/// The longest folder that contains all paths, without the slash at its end; `None` if that is the root.
pub(super) fn common_directory<'a>(paths: &[&'a str]) -> Option<&'a str> {
    let parent = |path: &'a str| path.rfind('/').map(|slash| &path[..slash]);
    let (first, rest) = paths.split_first()?;
    let mut common = parent(first)?;
    for path in rest {
        while !path.strip_prefix(common).is_some_and(|below| below.starts_with('/') && below.len() > 1) {
            common = parent(common)?;
        }
    }
    (!common.is_empty()).then_some(common)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Result<Options, Error> {
        Options::parse(&Mount {
            kind: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        })
    }

    #[test]
    fn sorts_flags_propagation_and_data() {
        let options =
            parse(&["ro", "nosuid", "rbind", "rslave", "index=off", "userxattr", "defaults"]).unwrap();
        assert_eq!(
            options.flags,
            MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_BIND | MsFlags::MS_REC
        );
        assert_eq!(options.propagation, MsFlags::MS_SLAVE | MsFlags::MS_REC);
        assert_eq!(options.data, ["index=off", "userxattr"]);
        assert_eq!(options.attributes(), libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID);
        assert_eq!(options.superblock().collect::<Vec<_>>(), ["ro"]);
    }

    #[test]
    fn a_later_word_takes_an_earlier_back() {
        let options = parse(&["ro", "noexec", "noatime", "rw", "exec", "atime"]).unwrap();
        assert_eq!(options.flags, MsFlags::empty());
        assert_eq!(options.cleared_attributes(), 0);
    }

    #[test]
    fn refuses_what_it_cannot_do() {
        let bad: &[&[&str]] =
            &[&["X-containerd.mkdir.path=/x"], &["uidmap=0:1:2"], &["gidmap=0:1:2"], &["a\0b"]];
        for options in bad {
            assert!(matches!(parse(options), Err(Error::Option { .. })), "{options:?}");
        }
        assert_eq!(
            parse(&["uidmap=0:1:2", "gidmap=0:1:3"]).unwrap().mapping,
            Some(("0:1:2".into(), "0:1:3".into()))
        );
    }

    #[test]
    fn splits_lower_directories_at_colons_that_are_not_escaped() {
        let data = ["index=off".to_owned(), r"lowerdir=/a:/b\:c:/d\\:/e".to_owned()];
        assert_eq!(lower_directories(&data).unwrap(), ["/a", r"/b\:c", r"/d\\", "/e"]);
        assert_eq!(lower_directories(&data[..1]), None);
    }

    #[test]
    fn finds_the_common_directory() {
        let cases: &[(&[&str], Option<&str>)] = &[
            (&["/r/snapshots/1/fs", "/r/snapshots/12/fs"], Some("/r/snapshots")),
            (&["/r/snapshots/1/fs"], Some("/r/snapshots/1")),
            (&["/r/s", "/r/s/t"], Some("/r")),
            (&["/a/b", "/c/d"], None),
            (&["/a", "/b"], None),
            (&["a", "b"], None),
            (&[], None),
        ];
        for (paths, common) in cases {
            assert_eq!(common_directory(paths), *common, "{paths:?}");
        }
    }
}
