//! Snapshots as subvolumes of btrfs, which copies and deletes them in constant time and shares what they have in common.
//!
//! The mounts handed out are bind mounts of the subvolumes' folders. containerd's are mounts of the device with
//! `subvolid=`; they show the same and need the device besides.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use davit_metadata::Db;
use davit_model::Mount;
use davit_sys::btrfs;
use nix::errno::Errno;

use crate::folders::Folders;
use crate::native::{TOP_MODE, bind};
use crate::tree::{self, open_folder};
use crate::whole::{Method, Whole};
use crate::{Error, FileError, Usage};

/// The name of this snapshotter.
pub const NAME: &str = "btrfs";

/// The btrfs snapshotter.
pub type Btrfs = Whole<Subvolumes>;

/// Subvolumes. One that is committed is read-only.
pub struct Subvolumes;

impl Btrfs {
    /// Opens the snapshotter that keeps its subvolumes in `root` and its records in `db`.
    ///
    /// # Errors
    /// [`Error::NotBtrfs`]; [`Error::Root`], [`Error::Version`], [`Error::Corrupt`].
    pub fn open(root: &Path, db: Db) -> Result<Btrfs, Error> {
        // Where it can be told before anything is made there.
        let existing = root.ancestors().find(|path| path.exists()).unwrap_or(root);
        if !btrfs::is_btrfs(open_folder(existing)?.as_fd()).map_err(FileError::at("statfs", existing))? {
            return Err(Error::NotBtrfs { root: root.to_owned() });
        }
        Whole::over(root, Folders::open(root, Subvolumes::delete)?, db, Subvolumes)
    }
}

/// The folder that a path is in, open, and the name in it.
fn split(at: &Path) -> Result<(OwnedFd, CString), FileError> {
    let parent = open_folder(at.parent().unwrap_or(Path::new("/")))?;
    let name = at.file_name().unwrap_or_default().as_bytes();
    // The names are numbers.
    Ok((parent, CString::new(name).unwrap_or_default()))
}

impl Method for Subvolumes {
    const NAME: &'static str = NAME;

    fn make(&self, at: &Path) -> Result<(), FileError> {
        let (parent, name) = split(at)?;
        btrfs::create_subvolume(parent.as_fd(), &name).map_err(FileError::at("create subvolume", at))?;
        fs::set_permissions(at, fs::Permissions::from_mode(TOP_MODE)).map_err(FileError::at("chmod", at))
    }

    fn copy(&self, parent: &Path, at: &Path) -> Result<(), FileError> {
        let (folder, name) = split(at)?;
        let of = open_folder(parent)?;
        btrfs::snapshot(of.as_fd(), folder.as_fd(), &name).map_err(FileError::at("create snapshot", at))
    }

    fn freeze(&self, at: &Path) -> Result<(), FileError> {
        btrfs::set_read_only(open_folder(at)?.as_fd(), true).map_err(FileError::at("set read-only", at))
    }

    fn thaw(&self, at: &Path) -> Result<(), FileError> {
        btrfs::set_read_only(open_folder(at)?.as_fd(), false).map_err(FileError::at("set writable", at))
    }

    /// What is not in the parent as it is here. Of a file that has changed, all counts.
    fn usage(&self, at: &Path, parent: Option<&Path>) -> Result<Usage, FileError> {
        match parent {
            Some(parent) => tree::usage_beyond(at, parent),
            None => tree::usage(at),
        }
    }

    fn mount(&self, at: &Path, read_only: bool) -> Mount {
        bind(at, read_only)
    }

    fn delete(at: &Path) -> Result<(), FileError> {
        let (parent, name) = split(at)?;
        match btrfs::delete_subvolume(parent.as_fd(), &name) {
            Ok(()) | Err(Errno::ENOENT) => return Ok(()),
            // No subvolume, or one in which a container has made others: those go file by file.
            Err(Errno::EINVAL | Errno::ENOTEMPTY) => {}
            Err(errno) => return Err(FileError::at("delete subvolume", at)(errno)),
        }
        if let Ok(open) = open_folder(at)
            && btrfs::is_subvolume(open.as_fd()).unwrap_or(false)
        {
            // Removing needs writing.
            btrfs::set_read_only(open.as_fd(), false).map_err(FileError::at("set writable", at))?;
        }
        tree::remove(at)
    }
}
