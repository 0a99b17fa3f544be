//! Layers: whatever is in an archive, applying it changes nothing outside of the root.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use davit_model::Mount;
use davit_snapshotter::layer::{ApplyOptions, apply, apply_to_folder};

use crate::entries;

/// Bytes as they are: plain, or a stream that decompresses.
pub fn layer_bytes(data: &[u8]) {
    let place = Place::new();
    let _ = apply_to_folder(data, &place.root);
    place.check();
}

/// Well formed archives of hostile entries, applied to a tree with something in it and to the upper folder of an
/// overlay.
pub fn layer_entries(data: &[u8]) {
    let Some((&way, rest)) = data.split_first() else { return };
    let place = Place::new();
    let outside = place.outer.path().to_str().expect("temporary folders have plain names");
    let archive = entries::archive(rest, outside);
    if way & 1 == 0 {
        let _ = apply_to_folder(archive.as_slice(), &place.root);
    } else {
        let mount = Mount {
            kind: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options: vec![
                format!("upperdir={}", place.root.display()),
                format!("lowerdir={}", place.lower.display()),
            ],
        };
        let media_type = "application/vnd.oci.image.layer.v1.tar";
        let _ = apply(archive.as_slice(), media_type, &[mount], &ApplyOptions { sync: false });
    }
    place.check();
}

/// A root in a folder whose other contents must stay as they are.
struct Place {
    outer: tempfile::TempDir,
    root: PathBuf,
    lower: PathBuf,
    before: Vec<Seen>,
}

/// What can be seen of a file or folder.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    path: PathBuf,
    /// Type and permissions, owner, group, links, modification time.
    status: (u32, u32, u32, u64, i64, i64),
    contents: Vec<u8>,
}

impl Place {
    fn new() -> Place {
        let outer = tempfile::tempdir().expect("a folder for temporary files");
        let (root, lower) = (outer.path().join("root"), outer.path().join("lower"));
        for folder in [&root, &lower] {
            fs::create_dir_all(folder.join("ab")).expect("an own folder");
        }
        fs::create_dir(lower.join("c")).expect("an own folder");
        fs::write(lower.join("c/canary"), "lower").expect("an own folder");
        symlink("..", root.join("ab/c")).expect("an own folder");
        symlink(outer.path(), lower.join("b")).expect("an own folder");
        fs::create_dir(outer.path().join("a")).expect("an own folder");
        for canary in ["canary", "a/canary", "a/b"] {
            let path = outer.path().join(canary);
            fs::write(&path, canary).expect("an own folder");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("an own file");
        }
        let before = look(outer.path(), &root);
        Place { outer, root, lower, before }
    }

    fn check(&self) {
        assert_eq!(
            look(self.outer.path(), &self.root),
            self.before,
            "something outside of the root was changed"
        );
    }
}

/// All that is in `folder`, but for what is below `except`.
fn look(folder: &Path, except: &Path) -> Vec<Seen> {
    let mut found = Vec::new();
    let mut ahead = vec![folder.to_owned()];
    while let Some(path) = ahead.pop() {
        let status = fs::symlink_metadata(&path).expect("nobody removes it");
        let contents = if status.is_file() { fs::read(&path).expect("a file") } else { Vec::new() };
        if status.is_dir() && path != except {
            ahead.extend(fs::read_dir(&path).expect("a folder").map(|entry| entry.expect("a name").path()));
        }
        // The root's own times and links change with what is in it.
        if path != except {
            let status = (
                status.mode(),
                status.uid(),
                status.gid(),
                status.nlink(),
                status.mtime(),
                status.mtime_nsec(),
            );
            found.push(Seen { path, status, contents });
        }
    }
    found.sort_by(|one, other| one.path.cmp(&other.path));
    found
}
