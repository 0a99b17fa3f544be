//! The snapshotters of this daemon: which there are, and what the configuration says of each.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use davit_metadata::Db;
use davit_model::error::chain;
use davit_snapshotter::blockfile::{self, Blockfile};
use davit_snapshotter::btrfs::{self, Btrfs};
use davit_snapshotter::erofs::{self, Erofs};
use davit_snapshotter::native::{self, Native};
use davit_snapshotter::overlayfs::{self, Overlayfs};
use davit_snapshotter::{Error, Snapshotter};

use crate::config;
use crate::plugins::SnapshotterEntry;

/// How many there are.
pub const COUNT: usize = 5;

/// Snapshotters of containerd that are not built. Those who look for one find in the plugin list that it is not there.
const NOT_BUILT: [&str; 2] = ["devmapper", "zfs"];

/// The snapshotters that can be used, by name.
pub type Snapshotters = BTreeMap<String, Arc<dyn Snapshotter>>;

/// Why a snapshotter is not loaded.
#[derive(Debug, thiserror::Error)]
enum NotLoaded {
    /// The configuration wants what is not built, and would be less safe without it.
    #[error("{key} is not built")]
    Key {
        /// The key.
        key: &'static str,
    },
    /// It does not work here.
    #[error(transparent)]
    Open(#[from] Error),
}

impl NotLoaded {
    /// Whether there is nothing wrong with that: what the snapshotter needs is not here.
    fn is_skipped(&self) -> bool {
        matches!(self, NotLoaded::Open(Error::NotBtrfs { .. } | Error::NoScratch | Error::NoErofs))
    }
}

/// Opens every snapshotter that is not disabled, for the folder `root` of the daemon. One that cannot work here is told as
/// such in the plugin list, and stops nothing.
pub fn open(
    root: &Path,
    config: &config::Snapshotters,
    db: &Db,
    disabled: impl Fn(&str) -> bool,
) -> (Snapshotters, Vec<SnapshotterEntry>) {
    let (mut snapshotters, mut entries) = (BTreeMap::new(), Vec::new());
    for name in [overlayfs::NAME, native::NAME, btrfs::NAME, blockfile::NAME, erofs::NAME] {
        if disabled(name) {
            continue;
        }
        let state = match open_one(name, root, config, db) {
            Ok(snapshotter) => {
                let state = (snapshotter.capabilities(), snapshotter.exports());
                snapshotters.insert(name.to_owned(), snapshotter);
                Ok(state)
            }
            Err(error) if error.is_skipped() => {
                tracing::debug!(snapshotter = name, error = chain(&error), "snapshotter is not used here");
                Err(chain(&error))
            }
            Err(error) => {
                tracing::warn!(snapshotter = name, error = chain(&error), "snapshotter cannot be used here");
                Err(chain(&error))
            }
        };
        entries.push(SnapshotterEntry { name: name.to_owned(), state });
    }
    entries.extend(NOT_BUILT.into_iter().filter(|name| !disabled(name)).map(|name| SnapshotterEntry {
        name: name.to_owned(),
        state: Err(format!("davitd has no snapshotter {name}: skip plugin")),
    }));
    (snapshotters, entries)
}

fn open_one(
    name: &str,
    root: &Path,
    config: &config::Snapshotters,
    db: &Db,
) -> Result<Arc<dyn Snapshotter>, NotLoaded> {
    let folder = |configured: &Path| match configured.as_os_str().is_empty() {
        true => root.join(format!("io.containerd.snapshotter.v1.{name}")),
        false => configured.to_owned(),
    };
    let given = |path: &PathBuf| Some(path.clone()).filter(|path| !path.as_os_str().is_empty());
    let db = db.clone();
    let config::Snapshotters { overlayfs, native, btrfs, blockfile, erofs } = config;
    Ok(match name {
        overlayfs::NAME => {
            let options = overlayfs::Config {
                mount_options: overlayfs.mount_options.clone(),
                upperdir_label: overlayfs.upperdir_label,
            };
            Arc::new(Overlayfs::open(&folder(&overlayfs.root_path), db, options)?)
        }
        btrfs::NAME => Arc::new(Btrfs::open(&folder(&btrfs.root_path), db)?),
        blockfile::NAME => {
            let options = blockfile::Config {
                scratch_file: given(&blockfile.scratch_file),
                recreate_scratch: blockfile.recreate_scratch,
                fs_type: Some(blockfile.fs_type.clone()).filter(|kind| !kind.is_empty()),
                mount_options: blockfile.mount_options.clone(),
            };
            Arc::new(Blockfile::open(&folder(&blockfile.root_path), db, options)?)
        }
        erofs::NAME => {
            let wanted = [
                ("enable_fsverity", erofs.enable_fsverity),
                ("default_size", !erofs.default_size.is_empty()),
                ("dmverity_mode", !matches!(erofs.dmverity_mode.as_str(), "" | "auto" | "off")),
            ];
            if let Some((key, _)) = wanted.into_iter().find(|(_, wanted)| *wanted) {
                return Err(NotLoaded::Key { key });
            }
            let options = erofs::Config {
                ovl_mount_options: erofs.ovl_mount_options.clone(),
                set_immutable: erofs.set_immutable,
            };
            Arc::new(Erofs::open(&folder(&erofs.root_path), db, options)?)
        }
        _ => Arc::new(Native::open(&folder(&native.root_path), db)?),
    })
}

#[cfg(test)]
mod tests {
    use davit_metadata::EngineKind;

    use super::*;

    #[test]
    fn what_cannot_be_used_is_told_and_stops_nothing() {
        let root = tempfile::tempdir().unwrap();
        let databases = tempfile::tempdir().unwrap();
        let db = Db::open(databases.path(), EngineKind::Redb).unwrap();
        let mut config = config::Snapshotters::default();
        config.erofs.enable_fsverity = true;
        let (snapshotters, entries) = open(root.path(), &config, &db, |name| name == "overlayfs");
        assert!(snapshotters.contains_key("native"));
        let told = |name: &str| entries.iter().find(|entry| entry.name == name).map(|entry| &entry.state);
        assert!(told("overlayfs").is_none() && !snapshotters.contains_key("overlayfs"));
        assert_eq!(told("erofs").unwrap().as_ref().unwrap_err(), "enable_fsverity is not built");
        for name in ["blockfile", "devmapper", "zfs"] {
            let text = told(name).unwrap().as_ref().unwrap_err();
            assert!(text.ends_with(": skip plugin"), "{text}");
        }
        assert_eq!(entries.len(), COUNT - 1 + NOT_BUILT.len());
        assert!(!root.path().join("io.containerd.snapshotter.v1.blockfile").exists());
    }
}
