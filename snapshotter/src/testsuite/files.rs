//! Changing folders, and telling whether two of them hold the same.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

/// Makes or overwrites a file, with this mode whatever the umask.
pub(super) fn file(root: &Path, path: &str, content: &str, bits: u32) {
    fs::write(root.join(path), content).unwrap();
    mode(root, path, bits);
}

/// Makes a folder with this mode.
pub(super) fn folder(root: &Path, path: &str, bits: u32) {
    fs::create_dir(root.join(path)).unwrap();
    mode(root, path, bits);
}

/// Sets a mode.
pub(super) fn mode(root: &Path, path: &str, bits: u32) {
    fs::set_permissions(root.join(path), fs::Permissions::from_mode(bits)).unwrap();
}

/// Sets user and group.
pub(super) fn owner(root: &Path, path: &str, id: u32) {
    lchown(root.join(path), Some(id), Some(id)).unwrap();
}

/// Deletes a file, or a folder with all in it.
pub(super) fn delete(root: &Path, path: &str) {
    let path = root.join(path);
    if path.symlink_metadata().unwrap().is_dir() {
        fs::remove_dir_all(path).unwrap();
    } else {
        fs::remove_file(path).unwrap();
    }
}

/// What one entry is.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    mode: u32,
    owner: (u32, u32),
    device: u64,
    content: Vec<u8>,
    /// The first path of the same inode, if that is another.
    linked_to: Option<PathBuf>,
}

fn describe(root: &Path) -> BTreeMap<PathBuf, Entry> {
    let mut entries = BTreeMap::new();
    let mut inodes: HashMap<(u64, u64), PathBuf> = HashMap::new();
    let mut folders = vec![PathBuf::new()];
    let mut paths = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let path = folder.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                folders.push(path.clone());
            }
            paths.push(path);
        }
    }
    paths.sort();
    for path in paths {
        let full = root.join(&path);
        let metadata = full.symlink_metadata().unwrap();
        let kind = metadata.file_type();
        let content = if kind.is_file() {
            fs::read(&full).unwrap()
        } else if kind.is_symlink() {
            fs::read_link(&full).unwrap().into_os_string().into_encoded_bytes()
        } else {
            Vec::new()
        };
        let special = kind.is_char_device() || kind.is_block_device();
        let first = inodes.entry((metadata.dev(), metadata.ino())).or_insert_with(|| path.clone());
        let entry = Entry {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            device: if special { metadata.rdev() } else { 0 },
            content,
            linked_to: (*first != path).then(|| first.clone()),
        };
        entries.insert(path, entry);
    }
    entries
}

/// Compares two folders: names, kinds, modes, owners, contents, hard links.
pub(super) fn assert_same(expected: &Path, found: &Path, what: &str) {
    let (expected, found) = (describe(expected), describe(found));
    for (path, entry) in &expected {
        match found.get(path) {
            Some(other) => assert_eq!(entry, other, "{what}: {path:?} differs"),
            None => panic!("{what}: {path:?} is missing"),
        }
    }
    for path in found.keys() {
        assert!(expected.contains_key(path), "{what}: {path:?} is too much");
    }
}
