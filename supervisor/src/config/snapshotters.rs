//! `[snapshotters.NAME]`: the snapshotters, with the keys of containerd's plugins.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `[snapshotters]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Snapshotters {
    /// Layers of overlayfs.
    pub overlayfs: Overlayfs,
    /// Full copies.
    pub native: Native,
    /// Subvolumes.
    pub btrfs: Btrfs,
    /// Files with a filesystem each.
    pub blockfile: Blockfile,
    /// Read-only images, stacked by overlayfs.
    pub erofs: Erofs,
}

/// `[snapshotters.overlayfs]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Overlayfs {
    /// Its folder; empty for `<root>/io.containerd.snapshotter.v1.overlayfs`.
    pub root_path: PathBuf,
    /// More options for every overlay.
    pub mount_options: Vec<String>,
    /// Show the folder of its changes as a label of each snapshot.
    pub upperdir_label: bool,
}

/// `[snapshotters.native]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Native {
    /// Its folder; empty for `<root>/io.containerd.snapshotter.v1.native`.
    pub root_path: PathBuf,
}

/// `[snapshotters.btrfs]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Btrfs {
    /// Its folder, on a btrfs; empty for `<root>/io.containerd.snapshotter.v1.btrfs`.
    pub root_path: PathBuf,
}

/// `[snapshotters.blockfile]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Blockfile {
    /// Its folder; empty for `<root>/io.containerd.snapshotter.v1.blockfile`.
    pub root_path: PathBuf,
    /// The file that a snapshot without parent begins as. It is copied to `scratch` in the folder.
    pub scratch_file: PathBuf,
    /// Copy it at every start, and not only when there is none.
    pub recreate_scratch: bool,
    /// The filesystem in it; empty for `ext4`.
    pub fs_type: String,
    /// Options of every mount. `loop` is always one of them.
    pub mount_options: Vec<String>,
}

/// `[snapshotters.erofs]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Erofs {
    /// Its folder; empty for `<root>/io.containerd.snapshotter.v1.erofs`.
    pub root_path: PathBuf,
    /// More options for every overlay.
    pub ovl_mount_options: Vec<String>,
    /// Make images immutable.
    pub set_immutable: bool,
    /// Protect images by fs-verity. Not built: with it the snapshotter is not loaded.
    pub enable_fsverity: bool,
    /// Give every active snapshot a disk of this size. Not built: with it the snapshotter is not loaded.
    pub default_size: String,
    /// Protect images by dm-verity. Not built: with `on` the snapshotter is not loaded, and there is no image with it for
    /// `auto`.
    pub dmverity_mode: String,
}
