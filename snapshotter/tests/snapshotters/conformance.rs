//! The suite that every snapshotter passes.

use davit_snapshotter::testsuite::{Traits, run};

use super::ground::Ground;
use super::{Which, database};

fn suite(which: Which, traits: Traits) {
    let Some(ground) = Ground::new(which) else { return };
    let databases = tempfile::tempdir().unwrap();
    run(ground.path(), traits, &|root| {
        let name = root.parent().unwrap().file_name().unwrap();
        which.open(root, database(&databases.path().join(name)))
    });
    ground.assert_unused();
}

#[test]
fn overlayfs_conforms() {
    suite(Which::Overlayfs, Traits::default());
}

#[test]
fn native_conforms() {
    suite(
        Which::Native,
        Traits { renames_folders: true, usage_excludes_parents: false, ..Traits::default() },
    );
}

#[test]
fn btrfs_conforms() {
    suite(Which::Btrfs, Traits { renames_folders: true, ..Traits::default() });
}

#[test]
fn blockfile_conforms() {
    let traits =
        Traits { renames_folders: true, active_is_file: true, committed_is_file: true, ..Traits::default() };
    suite(Which::Blockfile, traits);
}

#[test]
fn erofs_conforms() {
    suite(Which::Erofs, Traits { committed_is_file: true, ..Traits::default() });
}
