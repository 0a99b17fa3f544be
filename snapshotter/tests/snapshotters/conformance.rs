//! The suite that every snapshotter passes.

use davit_snapshotter::testsuite::{Traits, run};

use super::{Which, database, may_mount};

fn suite(which: Which, traits: Traits) {
    if !may_mount() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let databases = tempfile::tempdir().unwrap();
    run(folder.path(), traits, &|root| {
        let name = root.parent().unwrap().file_name().unwrap();
        which.open(root, database(&databases.path().join(name)))
    });
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(folder.path().to_str().unwrap()), "a mount is left");
}

#[test]
fn overlayfs_conforms() {
    suite(Which::Overlayfs, Traits { renames_folders: false, usage_excludes_parents: true });
}

#[test]
fn native_conforms() {
    suite(Which::Native, Traits { renames_folders: true, usage_excludes_parents: false });
}
