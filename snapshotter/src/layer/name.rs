//! Names of entries: made clean, and told apart by what the layer format means with them.

use super::error::EntryFault;

/// The longest name of an entry: one less than the kernel's `PATH_MAX`, which counts a NUL.
const NAME_LIMIT: usize = 4095;

const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// Names with this prefix are bookkeeping of AUFS, which the format comes from; all but one are to be ignored.
const AUFS_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";

/// A relative path of plain components: not empty, no `.` and `..`, no NUL, no slash at either end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Name {
    path: Vec<u8>,
    /// Where the last component begins.
    base: usize,
}

/// What an entry's name says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The root itself, whose metadata are the snapshot's and not the layer's.
    Root,
    /// Something to make.
    Plain(Name),
    /// What this name stands for is removed from the layers below.
    Whiteout(Name),
    /// Everything that the layers below have in this folder is removed from it. Empty for the root.
    Opaque(Vec<u8>),
    /// Nothing that concerns the tree.
    Ignored,
}

impl Name {
    /// The whole path.
    pub(super) fn path(&self) -> &[u8] {
        &self.path
    }

    /// The path without the last component; empty for the root.
    pub(super) fn parent(&self) -> &[u8] {
        &self.path[..self.base.saturating_sub(1)]
    }

    /// The last component.
    pub(super) fn base(&self) -> &[u8] {
        &self.path[self.base..]
    }

    /// Makes a name clean, by its text alone as Go's `filepath.Clean`: `./a//b/../c` is `a/c`, and an absolute
    /// name is relative to the root. `None` is the root itself.
    pub(super) fn clean(name: &[u8]) -> Result<Option<Name>, EntryFault> {
        if name.is_empty() {
            return Err(EntryFault::EmptyName);
        }
        if name.contains(&0) {
            return Err(EntryFault::NulInName);
        }
        if name.len() > NAME_LIMIT {
            return Err(EntryFault::NameTooLong { length: name.len() });
        }
        let mut path: Vec<u8> = Vec::with_capacity(name.len());
        let mut starts = Vec::new();
        for component in name.split(|&byte| byte == b'/') {
            match component {
                b"" | b"." => {}
                b".." => {
                    let start: usize = starts.pop().ok_or(EntryFault::Escape)?;
                    path.truncate(start.saturating_sub(1));
                }
                component => {
                    if !path.is_empty() {
                        path.push(b'/');
                    }
                    starts.push(path.len());
                    path.extend_from_slice(component);
                }
            }
        }
        Ok(starts.last().map(|&base| Name { path, base }))
    }

    /// The name beside this one with another last component.
    fn sibling(&self, base: &[u8]) -> Name {
        let mut path = self.path[..self.base].to_vec();
        path.extend_from_slice(base);
        Name { path, base: self.base }
    }
}

/// What the name of an entry means.
pub(super) fn meaning(name: &[u8]) -> Result<Meaning, EntryFault> {
    let Some(name) = Name::clean(name)? else { return Ok(Meaning::Root) };
    let mut folders = name.parent().split(|&byte| byte == b'/');
    if name.base() == OPAQUE_MARKER {
        if folders.any(|folder| folder.starts_with(WHITEOUT_PREFIX)) {
            return Err(EntryFault::Whiteout);
        }
        return Ok(Meaning::Opaque(name.parent().to_vec()));
    }
    if name.path().split(|&byte| byte == b'/').any(|component| component.starts_with(AUFS_PREFIX)) {
        return Ok(Meaning::Ignored);
    }
    if folders.any(|folder| folder.starts_with(WHITEOUT_PREFIX)) {
        return Err(EntryFault::Whiteout);
    }
    match name.base().strip_prefix(WHITEOUT_PREFIX) {
        Some(b"" | b"." | b"..") => Err(EntryFault::Whiteout),
        Some(hidden) => Ok(Meaning::Whiteout(name.sibling(hidden))),
        None => Ok(Meaning::Plain(name)),
    }
}

/// The name of the whiteout of an entry.
pub(super) fn whiteout(path: &[u8]) -> Vec<u8> {
    let base = path.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
    [&path[..base], WHITEOUT_PREFIX, &path[base..]].concat()
}

/// The name of the marker that makes a folder opaque.
pub(super) fn opaque_marker(folder: &[u8]) -> Vec<u8> {
    [folder, b"/", OPAQUE_MARKER].concat()
}

/// True for names of files that no layer can hold, because they would be taken for whiteouts.
pub(super) fn is_reserved(base: &[u8]) -> bool {
    base.starts_with(WHITEOUT_PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(name: &str) -> Result<Option<String>, EntryFault> {
        let name = Name::clean(name.as_bytes())?;
        Ok(name.map(|name| {
            let joined = [name.parent(), name.base()].join(&b'/');
            assert_eq!(joined.strip_prefix(b"/").unwrap_or(&joined), name.path());
            String::from_utf8(name.path).unwrap()
        }))
    }

    #[test]
    fn names_become_clean_and_cannot_climb_out() {
        for (name, expected) in [
            ("a", "a"),
            ("./a//b/", "a/b"),
            ("/etc/passwd", "etc/passwd"),
            ("a/../b", "b"),
            ("a/b/../../c/./d", "c/d"),
            ("a/...", "a/..."),
        ] {
            assert_eq!(clean(name).unwrap().as_deref(), Some(expected), "{name}");
        }
        for root in [".", "./", "/", "//", "a/..", "a/b/../.."] {
            assert_eq!(clean(root), Ok(None), "{root}");
        }
        for outside in ["..", "../a", "a/../../b", "/..", "./../a"] {
            assert_eq!(clean(outside), Err(EntryFault::Escape), "{outside}");
        }
        assert_eq!(clean(""), Err(EntryFault::EmptyName));
        assert_eq!(clean("a\0b"), Err(EntryFault::NulInName));
        assert_eq!(clean(&"a/".repeat(3000)), Err(EntryFault::NameTooLong { length: 6000 }));
    }

    #[test]
    fn whiteouts_name_one_thing_beside_them() {
        let named = |name: &str| Name::clean(name.as_bytes()).unwrap().unwrap();
        assert_eq!(meaning(b"a/.wh.b"), Ok(Meaning::Whiteout(named("a/b"))));
        assert_eq!(meaning(b".wh.b/"), Ok(Meaning::Whiteout(named("b"))));
        assert_eq!(meaning(b".wh...."), Ok(Meaning::Whiteout(named("..."))));
        assert_eq!(meaning(b"a/.wh..wh..opq"), Ok(Meaning::Opaque(b"a".to_vec())));
        assert_eq!(meaning(b"./.wh..wh..opq"), Ok(Meaning::Opaque(Vec::new())));
        assert_eq!(meaning(b"a.wh.b"), Ok(Meaning::Plain(named("a.wh.b"))));
        assert_eq!(meaning(b".wh..wh.plnk/1.2"), Ok(Meaning::Ignored));
        assert_eq!(meaning(b"a/.wh..wh.aufs"), Ok(Meaning::Ignored));
        for bad in [
            ".wh.",
            "a/.wh.",
            ".wh..",
            ".wh...",
            "a/.wh...",
            ".wh.a/b",
            "x/.wh.a/.wh.b",
            ".wh.a/.wh..wh..opq",
        ] {
            assert_eq!(meaning(bad.as_bytes()), Err(EntryFault::Whiteout), "{bad}");
        }
    }

    #[test]
    fn markers_are_made_as_they_are_read() {
        assert_eq!(whiteout(b"a/b"), b"a/.wh.b");
        assert_eq!(whiteout(b"b"), b".wh.b");
        assert_eq!(meaning(&opaque_marker(b"a/b")), Ok(Meaning::Opaque(b"a/b".to_vec())));
        assert!(is_reserved(b".wh.x") && !is_reserved(b"x.wh."));
    }
}
