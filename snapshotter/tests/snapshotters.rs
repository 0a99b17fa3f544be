//! The snapshotters of this crate, as their users see them.
#![allow(clippy::unwrap_used, reason = "test code: clippy does not see that helpers of tests are tests")]

#[path = "snapshotters/conformance.rs"]
mod conformance;
#[path = "snapshotters/crash.rs"]
mod crash;
#[path = "snapshotters/layers.rs"]
mod layers;
#[path = "snapshotters/model.rs"]
mod model;
#[path = "snapshotters/overlayfs.rs"]
mod overlayfs;

#[path = "snapshotters/ground.rs"]
mod ground;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use davit_metadata::{Db, EngineKind};
use davit_model::Mount;
use davit_snapshotter::blockfile::{self, Blockfile};
use davit_snapshotter::btrfs::Btrfs;
use davit_snapshotter::erofs::{self, Erofs};
use davit_snapshotter::native::Native;
use davit_snapshotter::overlayfs::{Config, Overlayfs};
use davit_snapshotter::{Error, Snapshotter};
use davit_sys::mount::{mount_all, unmount_all};

/// Which snapshotter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Overlayfs,
    Native,
    Btrfs,
    Blockfile,
    Erofs,
}

impl Which {
    const ALL: [Which; 5] = [Which::Overlayfs, Which::Native, Which::Btrfs, Which::Blockfile, Which::Erofs];

    /// The name of the snapshotter.
    fn name(self) -> &'static str {
        match self {
            Which::Overlayfs => "overlayfs",
            Which::Native => "native",
            Which::Btrfs => "btrfs",
            Which::Blockfile => "blockfile",
            Which::Erofs => "erofs",
        }
    }

    fn try_open(self, root: &Path, db: Db) -> Result<Arc<dyn Snapshotter>, Error> {
        Ok(match self {
            Which::Overlayfs => Arc::new(Overlayfs::open(root, db, Config::default())?),
            Which::Native => Arc::new(Native::open(root, db)?),
            Which::Btrfs => Arc::new(Btrfs::open(root, db)?),
            Which::Blockfile => {
                let scratch_file = Some(ground::scratch());
                let config = blockfile::Config { scratch_file, ..blockfile::Config::default() };
                Arc::new(Blockfile::open(root, db, config)?)
            }
            Which::Erofs => Arc::new(Erofs::open(root, db, erofs::Config::default())?),
        })
    }

    fn open(self, root: &Path, db: Db) -> Arc<dyn Snapshotter> {
        let opened = self.try_open(root, db);
        opened.unwrap_or_else(|error| panic!("{}", davit_model::error::chain(&error)))
    }
}

/// A database in a folder of its own.
fn database(folder: &Path) -> Db {
    let path = folder.join("db");
    fs::create_dir_all(&path).unwrap();
    Db::open(&path, EngineKind::Redb).unwrap()
}

/// False, and says so, when the test cannot mount.
fn may_mount() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

/// The place of a snapshot: its folder of changes or of everything, or its file.
fn place_of(mounts: &[Mount]) -> PathBuf {
    let last = mounts.last().unwrap();
    let upper = last.options.iter().find_map(|option| option.strip_prefix("upperdir="));
    PathBuf::from(upper.unwrap_or(&last.source))
}

/// The files of a snapshot: where they lie, as far as folders hold them, or mounted for as long as this lives.
struct Files {
    path: PathBuf,
    mounted: Option<tempfile::TempDir>,
}

impl Files {
    /// What can be written to, without what is below it where that is in other places.
    fn of(mounts: &[Mount]) -> Files {
        let place = place_of(mounts);
        if place.is_dir() { Files { path: place, mounted: None } } else { Files::shown(mounts) }
    }

    /// All that is to be seen.
    fn shown(mounts: &[Mount]) -> Files {
        let folder = tempfile::tempdir().unwrap();
        mount_all(mounts, folder.path())
            .unwrap_or_else(|error| panic!("{}", davit_model::error::chain(&error)));
        Files { path: folder.path().to_owned(), mounted: Some(folder) }
    }
}

impl std::ops::Deref for Files {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if let Some(folder) = &self.mounted {
            unmount_all(folder.path()).unwrap();
        }
    }
}
