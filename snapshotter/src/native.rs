//! Snapshots as full copies of folders: works on every filesystem that can hold what a container makes, and takes time
//! and space with every snapshot, unless the filesystem shares blocks between copies (btrfs, xfs).

mod copy;

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use davit_metadata::Db;
use davit_model::Mount;

pub(crate) use copy::{copy_data, copy_extents};

use crate::folders::Folders;
use crate::whole::{Method, Whole};
use crate::{Error, FileError, Usage, tree};

/// The name of this snapshotter.
pub const NAME: &str = "native";

/// The mode of the top folder of a snapshot without parent.
pub(crate) const TOP_MODE: u32 = 0o755;

/// The snapshotter that copies.
pub type Native = Whole<Copies>;

/// Copies of folders, file by file.
pub struct Copies;

impl Native {
    /// Opens the snapshotter that keeps its folders in `root` and its records in `db`.
    ///
    /// # Errors
    /// [`Error::Root`] when mount options cannot hold that path; [`Error::Version`], [`Error::Corrupt`].
    pub fn open(root: &Path, db: Db) -> Result<Native, Error> {
        Whole::over(root, Folders::open(root, Copies::delete)?, db, Copies)
    }
}

/// The bind mount of a folder.
pub(crate) fn bind(folder: &Path, read_only: bool) -> Mount {
    let mode = if read_only { "ro" } else { "rw" };
    Mount {
        kind: "bind".to_owned(),
        source: folder.display().to_string(),
        target: String::new(),
        options: vec!["rbind".to_owned(), mode.to_owned()],
    }
}

impl Method for Copies {
    const NAME: &'static str = NAME;

    fn make(&self, at: &Path) -> Result<(), FileError> {
        fs::DirBuilder::new().mode(0o700).create(at).map_err(FileError::at("create folder", at))?;
        fs::set_permissions(at, fs::Permissions::from_mode(TOP_MODE)).map_err(FileError::at("chmod", at))
    }

    fn copy(&self, parent: &Path, at: &Path) -> Result<(), FileError> {
        // Only root gets in until it is as it has to be.
        fs::DirBuilder::new().mode(0o700).create(at).map_err(FileError::at("create folder", at))?;
        copy::copy_tree(parent, at)
    }

    /// As with containerd, this counts the whole copy, parents and all: that is what it takes.
    fn usage(&self, at: &Path, _parent: Option<&Path>) -> Result<Usage, FileError> {
        tree::usage(at)
    }

    fn mount(&self, at: &Path, read_only: bool) -> Mount {
        bind(at, read_only)
    }

    fn delete(at: &Path) -> Result<(), FileError> {
        tree::remove(at)
    }
}
