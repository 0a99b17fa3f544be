//! The folders of snapshots, `<root>/snapshots/<id>`, and which of them are garbage.
//!
//! ```text
//!  claim ──► being made ──► recorded (a record has its id) ──► record removed ──► deleted by clean
//!                └─────────── failed, or the daemon died ───────────┴────────────────►┘
//! ```
//!
//! A folder is made under the id that only its maker has, and the record is written when the folder is complete.
//! Removal takes the record only. So whatever has neither a record nor a maker is garbage, and a crash in between
//! leaves nothing else. **Invariant:** ids are never used twice, so a folder never becomes another snapshot's.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use davit_model::Labels;
use nix::unistd::syncfs;

use crate::records::{Draft, Record, Records};
use crate::{Error, FileError, Kind, tree};

/// Deletes what is at the place of a snapshot; nothing there is no error.
pub(crate) type Delete = fn(&Path) -> Result<(), FileError>;

/// The folder of all folders. (Of a snapshotter that keeps something else than folders, it is of that.)
pub(crate) struct Folders {
    path: PathBuf,
    delete: Delete,
    /// The ids whose folders are being made.
    making: Mutex<BTreeSet<u64>>,
    /// Held while garbage is deleted, so that two of them do not get into each other's way.
    cleaning: Mutex<()>,
}

/// A folder being made; it is deleted again unless it is [kept](Making::keep).
pub(crate) struct Making<'a> {
    folders: &'a Folders,
    id: u64,
    keep: bool,
}

impl Folders {
    /// Opens `<root>/snapshots`, making it (and `root`) accessible to root only where it is missing.
    ///
    /// The paths end up in mount options, where some characters have a meaning; a root with such is refused.
    pub(crate) fn open(root: &Path, delete: Delete) -> Result<Folders, Error> {
        let refuse = |reason| Err(Error::Root { root: root.to_owned(), reason });
        if !root.is_absolute() {
            return refuse("the path is not absolute");
        }
        match root.to_str() {
            None => return refuse("the path is not UTF-8"),
            Some(text) if text.contains([':', ',', '\\', '"', '\n']) => {
                return refuse("the path has a character that mount options cannot hold");
            }
            Some(_) => {}
        }
        let path = root.join("snapshots");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(FileError::at("create folder", &path))?;
        sync(root)?;
        Ok(Folders { path, delete, making: Mutex::default(), cleaning: Mutex::default() })
    }

    /// Syncs the filesystem of the snapshots: all that was written to them, by whomever, is on disk afterwards.
    ///
    /// Who fills a snapshot through its mounts (a container that becomes an image, a build step) syncs nothing. One
    /// syncfs(2) costs what is not on disk yet, and next to nothing directly after a layer was applied, which ends with
    /// one itself: 0.1 ms on ext4 after 2000 files.
    pub(crate) fn sync(&self) -> Result<(), FileError> {
        sync_filesystem(&self.path)
    }

    /// The folder of a snapshot.
    pub(crate) fn of(&self, id: u64) -> PathBuf {
        self.path.join(id.to_string())
    }

    /// The ids of all folders there are.
    pub(crate) fn ids(&self) -> Result<BTreeSet<u64>, FileError> {
        let mut ids = BTreeSet::new();
        for entry in fs::read_dir(&self.path).map_err(FileError::at("read folder", &self.path))? {
            let entry = entry.map_err(FileError::at("read folder", &self.path))?;
            // Whatever else lies here is not ours.
            ids.extend(entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok()));
        }
        Ok(ids)
    }

    /// Makes a snapshot: what it has of its own, by `fill`, and then its record. A view of a parent has nothing of its own.
    ///
    /// # Errors
    /// Those of `fill`, if the snapshot could still be made; those of the records.
    pub(crate) fn create(
        &self,
        records: &Records,
        draft: Draft,
        key: &str,
        parent: Option<&str>,
        labels: &Labels,
        fill: impl FnOnce(&Making<'_>, &Draft) -> Result<(), Error>,
    ) -> Result<Record, Error> {
        let making = owns_place(draft.kind, &draft.parents).then(|| self.claim(draft.id));
        if let Some(making) = &making
            && let Err(error) = fill(making, &draft)
        {
            // Most likely the parent was removed meanwhile, which is the better error then.
            records.confirm(&draft, key, parent)?;
            return Err(error);
        }
        let record = records.create(draft, key, parent, labels)?;
        if let Some(making) = making {
            making.keep();
        }
        Ok(record)
    }

    /// Makes the place of a new snapshot its caller's, who is to put something there.
    fn claim(&self, id: u64) -> Making<'_> {
        self.making().insert(id);
        Making { folders: self, id, keep: false }
    }

    /// Deletes every folder that has neither a record nor a maker.
    pub(crate) fn clean(&self, records: &Records) -> Result<(), Error> {
        let _one_at_a_time = self.cleaning.lock().unwrap_or_else(PoisonError::into_inner);
        // The order matters: a folder seen here that is not being made now was recorded before, or never will be.
        let mut garbage = self.ids()?;
        garbage.retain(|id| !self.making().contains(id));
        for record in records.all()?.values() {
            garbage.remove(&record.id);
        }
        if garbage.is_empty() {
            return Ok(());
        }
        // A crash must not bring back the record of a snapshot whose files are gone.
        records.sync()?;
        let mut first = None;
        for id in garbage {
            if let Err(error) = (self.delete)(&self.of(id)) {
                tracing::warn!(path = %error.path.display(), error = %error.source, "removed snapshot not deleted");
                first.get_or_insert(error);
            }
        }
        first.map_or(Ok(()), |error| Err(error.into()))
    }

    fn making(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.making.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Making<'_> {
    /// Where it is.
    pub(crate) fn path(&self) -> PathBuf {
        self.folders.of(self.id)
    }

    /// Makes the folder, still empty. It is as yet nobody's business, so its mode lets only root in; the maker sets what is
    /// right.
    pub(crate) fn make_folder(&self) -> Result<(), FileError> {
        let path = self.path();
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(FileError::at("create folder", &path))
    }

    /// The record is written: the folder belongs to it from now on.
    fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = (self.folders.delete)(&self.path())
        {
            tracing::warn!(path = %error.path.display(), error = %error.source, "unfinished snapshot not deleted");
        }
        self.folders.making().remove(&self.id);
    }
}

/// A view of a parent shows the parent's place.
pub(crate) fn owns_place(kind: Kind, parents: &[u64]) -> bool {
    kind != Kind::View || parents.is_empty()
}

/// Syncs the filesystem that a folder is on.
pub(crate) fn sync_filesystem(folder: &Path) -> Result<(), FileError> {
    syncfs(tree::open_folder(folder)?).map_err(FileError::at("syncfs", folder))
}

/// Syncs a folder: the names in it are on disk afterwards.
pub(crate) fn sync(path: &Path) -> Result<(), FileError> {
    fs::File::open(path).and_then(|folder| folder.sync_all()).map_err(FileError::at("sync folder", path))
}

/// The facts about a folder, or that it is missing.
pub(crate) fn metadata(key: &str, path: &Path) -> Result<fs::Metadata, Error> {
    fs::symlink_metadata(path).map_err(|source| match source.kind() {
        ErrorKind::NotFound => Error::FilesMissing { key: key.to_owned(), path: path.to_owned() },
        _ => FileError::at("stat", path)(source).into(),
    })
}
