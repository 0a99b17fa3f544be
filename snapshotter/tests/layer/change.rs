//! Random changes of trees, made through the filesystem as a program would.

use std::fs::{self, File, Permissions};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::UNIX_EPOCH;

use davit_sys::fs::set_xattr;
use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use proptest::prelude::*;

/// One change.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Write(String, u8, u8),
    Folder(String),
    Symlink(String, u8),
    HardLink(String, String),
    Rename(String, String),
    Remove(String),
    Mode(String, u32),
    Owner(String, u32),
    Capability(String, u8),
    Node(String),
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec("[abc]", 1..4).prop_map(|parts| parts.join("/"))
}

pub(crate) fn changes(count: Range<usize>) -> impl Strategy<Value = Vec<Change>> {
    let change = prop_oneof![
        5 => (path(), any::<u8>(), 0_u8..4).prop_map(|(path, data, time)| Change::Write(path, data, time)),
        4 => path().prop_map(Change::Folder),
        1 => (path(), any::<u8>()).prop_map(|(path, target)| Change::Symlink(path, target)),
        2 => (path(), path()).prop_map(|(path, target)| Change::HardLink(path, target)),
        2 => (path(), path()).prop_map(|(path, target)| Change::Rename(path, target)),
        3 => path().prop_map(Change::Remove),
        1 => (path(), 0_u32..0o10000).prop_map(|(path, mode)| Change::Mode(path, mode)),
        1 => (path(), 0_u32..5).prop_map(|(path, owner)| Change::Owner(path, owner)),
        1 => (path(), 1_u8..20).prop_map(|(path, bits)| Change::Capability(path, bits)),
        1 => path().prop_map(Change::Node),
    ];
    prop::collection::vec(change, count)
}

/// Makes the changes that can be made; the others are no changes. Times are whole seconds, as layers keep them,
/// and few, so that equal ones on different data come up.
pub(crate) fn perform(root: &Path, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Write(path, data, time) => {
                let path = root.join(path);
                if fs::symlink_metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
                    continue;
                }
                if fs::write(&path, [*data]).is_ok() {
                    set_seconds(&path, i64::from(*time));
                }
            }
            Change::Folder(path) => drop(fs::create_dir_all(root.join(path))),
            Change::Symlink(path, target) => drop(symlink(format!("../{target}"), root.join(path))),
            Change::HardLink(path, target) => drop(fs::hard_link(root.join(target), root.join(path))),
            Change::Rename(path, target) => drop(fs::rename(root.join(path), root.join(target))),
            Change::Remove(path) => {
                let path = root.join(path);
                drop(fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path)));
            }
            Change::Mode(path, mode) => {
                if !root.join(path).is_symlink() {
                    drop(fs::set_permissions(root.join(path), Permissions::from_mode(*mode)));
                }
            }
            Change::Owner(path, owner) => {
                drop(std::os::unix::fs::lchown(root.join(path), Some(*owner), Some(*owner)));
            }
            Change::Capability(path, bits) => {
                let path = root.join(path);
                if fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_file()) {
                    let value = [1, 0, 0, 2, *bits, *bits, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
                    set_xattr(File::open(path).unwrap().as_fd(), c"security.capability", &value).unwrap();
                }
            }
            Change::Node(path) => {
                let device = makedev(1, 7);
                let _ = mknod(&root.join(path), SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), device);
            }
        }
    }
    settle(root);
}

/// Cuts the times of everything to seconds.
pub(crate) fn settle(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        let modified = metadata.modified().unwrap().duration_since(UNIX_EPOCH).unwrap();
        if modified.subsec_nanos() != 0 {
            // A new name, link or node: its time is now, which must not depend on the speed of the test.
            let seconds = if metadata.is_dir() { modified.as_secs() } else { 7 };
            set_seconds(&path, i64::try_from(seconds).unwrap());
        }
        if metadata.is_dir() {
            settle(&path);
        }
    }
}

fn set_seconds(path: &Path, seconds: i64) {
    let time = TimeSpec::new(seconds, 0);
    utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink).unwrap();
}
