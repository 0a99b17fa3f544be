//! The folders of checkpoints: what criu writes a checkpoint into, and what a checkpoint is unpacked into.

use std::fmt;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use davit_shim_protocol::bundle::{self, BundleError};

use super::registry::Shared;

/// What a task is restored from.
#[derive(Debug, Clone, Default)]
pub enum Checkpoint {
    /// Nothing: it is started afresh.
    #[default]
    None,
    /// The images in a folder of the client's.
    Folder(PathBuf),
    /// The same, beside which there may be `rootfs-diff.tar` with what the container had written. The task is started at
    /// once, for that is what those want who name such a folder (containerd's annotation `RestoreFromPath`).
    FolderAndRootfs(PathBuf),
    /// Images that were unpacked for this task, and go with it.
    Unpacked(Arc<CheckpointFolder>),
}

/// The file beside a folder of images that has the changes of the root filesystem (checkpointctl's layout).
pub(super) const ROOTFS_DIFF: &str = "rootfs-diff.tar";

/// A folder of the daemon's for one checkpoint. It is removed when nobody has it any more, or by the next daemon: its name
/// is hidden, and what is hidden among the work folders is out of use ([`bundle::set_aside`]).
pub struct CheckpointFolder {
    path: PathBuf,
    shared: Arc<Shared>,
}

impl CheckpointFolder {
    /// Makes one. Blocks.
    pub(super) fn make(shared: &Arc<Shared>, namespace: &str) -> Result<CheckpointFolder, BundleError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let parent = shared.config.root.join(namespace);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!(".checkpoint--{}-{number}", std::process::id()));
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| BundleError::Io { operation: "make", path, source }
        };
        bundle::make_parents(&parent).map_err(failed(&parent))?;
        // It holds the memory of processes.
        DirBuilder::new().mode(0o700).create(&path).map_err(failed(&path))?;
        Ok(CheckpointFolder { path, shared: shared.clone() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl fmt::Debug for CheckpointFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CheckpointFolder").field(&self.path).finish()
    }
}

impl Drop for CheckpointFolder {
    fn drop(&mut self) {
        self.shared.remove_folder_later(self.path.clone());
    }
}
