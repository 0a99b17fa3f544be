//! The snapshotters of this crate, as their users see them.
#![allow(clippy::unwrap_used, reason = "test code: clippy does not see that helpers of tests are tests")]

#[path = "snapshotters/conformance.rs"]
mod conformance;
#[path = "snapshotters/crash.rs"]
mod crash;
#[path = "snapshotters/model.rs"]
mod model;
#[path = "snapshotters/overlayfs.rs"]
mod overlayfs;

use std::path::Path;
use std::sync::Arc;

use davit_metadata::{Db, EngineKind};
use davit_snapshotter::native::Native;
use davit_snapshotter::overlayfs::{Config, Overlayfs};
use davit_snapshotter::{Error, Snapshotter};

/// Which snapshotter.
#[derive(Debug, Clone, Copy)]
enum Which {
    Overlayfs,
    Native,
}

impl Which {
    const ALL: [Which; 2] = [Which::Overlayfs, Which::Native];

    fn try_open(self, root: &Path, db: Db) -> Result<Arc<dyn Snapshotter>, Error> {
        Ok(match self {
            Which::Overlayfs => Arc::new(Overlayfs::open(root, db, Config::default())?),
            Which::Native => Arc::new(Native::open(root, db)?),
        })
    }

    fn open(self, root: &Path, db: Db) -> Arc<dyn Snapshotter> {
        self.try_open(root, db).unwrap()
    }
}

/// A database in a folder of its own.
fn database(folder: &Path) -> Db {
    let path = folder.join("db");
    std::fs::create_dir_all(&path).unwrap();
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
