//! Snapshots as files that hold a filesystem each, mounted by way of loop devices: for runtimes that take block devices,
//! and to bound what a container can write.
//!
//! ```text
//! <root>/scratch           the file that a snapshot without parent begins as
//! <root>/snapshots/<id>    the file of a snapshot
//! ```
//!
//! A snapshot is a copy of its parent's file: the blocks are shared where the filesystem can (btrfs, xfs), and where it
//! cannot only what is not a hole is copied.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use davit_metadata::Db;
use davit_model::Mount;
use davit_sys::loop_device::wait_until_free;

use crate::folders::{self, Folders};
use crate::native::copy_data;
use crate::whole::{Method, Whole};
use crate::{Error, FileError, Usage, tree};

/// The name of this snapshotter.
pub const NAME: &str = "blockfile";

/// What can be set about this snapshotter, by the names of containerd's plugin.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// A file with an empty filesystem, which is copied to `<root>/scratch`. Without it that file has to be there.
    pub scratch_file: Option<PathBuf>,
    /// Copy it at every start, and not only when there is none.
    pub recreate_scratch: bool,
    /// The type of the filesystem; `ext4` by default.
    pub fs_type: Option<String>,
    /// Options of every mount. `loop` is always one of them.
    pub mount_options: Vec<String>,
}

/// The blockfile snapshotter.
pub type Blockfile = Whole<Files>;

/// Files with filesystems in them.
pub struct Files {
    scratch: PathBuf,
    fs_type: String,
    options: Vec<String>,
}

impl Blockfile {
    /// Opens the snapshotter that keeps its files in `root` and its records in `db`.
    ///
    /// # Errors
    /// [`Error::NoScratch`] where it is not configured; [`Error::Root`], [`Error::Version`], [`Error::Corrupt`];
    /// [`Error::File`] when the scratch file cannot be copied.
    pub fn open(root: &Path, db: Db, config: Config) -> Result<Blockfile, Error> {
        let scratch = root.join("scratch");
        let present = match fs::symlink_metadata(&scratch) {
            Ok(_) => true,
            Err(error) if error.kind() == ErrorKind::NotFound => false,
            Err(source) => return Err(FileError::at("stat", &scratch)(source).into()),
        };
        if config.scratch_file.is_none() && (config.recreate_scratch || !present) {
            return Err(Error::NoScratch);
        }
        let folders = Folders::open(root, Files::delete)?;
        if let Some(from) = &config.scratch_file
            && (config.recreate_scratch || !present)
        {
            // Whole under its name or not there: a crash must not leave half a filesystem for all snapshots to come.
            let new = root.join("scratch.new");
            Files::delete(&new)?;
            copy_file(from, &new)?;
            sync_file(&new)?;
            fs::rename(&new, &scratch).map_err(FileError::at("rename", &new))?;
            folders::sync(root)?;
        }
        let mut options = config.mount_options;
        if !options.iter().any(|option| option == "loop") {
            options.push("loop".to_owned());
        }
        let fs_type = config.fs_type.unwrap_or_else(|| "ext4".to_owned());
        Whole::over(root, folders, db, Files { scratch, fs_type, options })
    }
}

/// Copies a file with its holes to where nothing is.
fn copy_file(from: &Path, to: &Path) -> Result<(), FileError> {
    let source = File::open(from).map_err(FileError::at("open", from))?;
    let metadata = source.metadata().map_err(FileError::at("fstat", from))?;
    if !metadata.is_file() {
        return Err(FileError::at("copy", from)(std::io::Error::other("not a regular file")));
    }
    let target = File::options().write(true).create_new(true).mode(0o600).open(to);
    let target = target.map_err(FileError::at("create", to))?;
    let size = i64::try_from(metadata.len()).unwrap_or(i64::MAX);
    copy_data(&source, &target, size).map_err(FileError::at("copy", from))
}

/// Has a file and its name on disk. What else its filesystem holds does not matter, and is not waited for.
fn sync_file(path: &Path) -> Result<(), FileError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(FileError::at("fsync", path))?;
    folders::sync(path.parent().unwrap_or(path))
}

impl Method for Files {
    const NAME: &'static str = NAME;

    fn make(&self, at: &Path) -> Result<(), FileError> {
        copy_file(&self.scratch, at)
    }

    fn copy(&self, parent: &Path, at: &Path) -> Result<(), FileError> {
        copy_file(parent, at)
    }

    /// What the filesystem in the file has to write is in the file when it is mounted nowhere any more. After a crash of
    /// the machine it is recovered when it is mounted to be written to.
    fn freeze(&self, at: &Path) -> Result<(), FileError> {
        wait_until_free(at).map_err(FileError::at("commit what is still mounted,", at))
    }

    fn sync(&self, at: &Path) -> Result<(), FileError> {
        sync_file(at)
    }

    /// The blocks that the file has beyond those of its parent; containerd counts the lengths of the files instead, by
    /// which every snapshot but the first takes nothing. Blocks that the filesystem shares are not told apart.
    fn usage(&self, at: &Path, parent: Option<&Path>) -> Result<Usage, FileError> {
        let bytes = |path: &Path| {
            let metadata = fs::symlink_metadata(path).map_err(FileError::at("stat", path))?;
            Ok(i64::try_from(metadata.blocks() * 512).unwrap_or(i64::MAX))
        };
        let below = parent.map(bytes).transpose()?.unwrap_or(0);
        Ok(Usage { size: (bytes(at)? - below).max(0), inodes: 1 })
    }

    fn mount(&self, at: &Path, read_only: bool) -> Mount {
        let mode = if read_only { "ro" } else { "rw" };
        let mut options = self.options.clone();
        options.push(mode.to_owned());
        Mount { kind: self.fs_type.clone(), source: at.display().to_string(), target: String::new(), options }
    }

    fn delete(at: &Path) -> Result<(), FileError> {
        match fs::remove_file(at) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) if error.kind() == ErrorKind::IsADirectory => tree::remove(at),
            result => result.map_err(FileError::at("delete", at)),
        }
    }
}
