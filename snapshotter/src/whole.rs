//! Snapshots that are whole: each holds all that it shows, as a copy of its parent. How such a thing is made, copied and
//! deleted is the [`Method`]; when, is here.
//!
//! ```text
//! <root>/snapshots/<id>    the snapshot: a folder, a subvolume or a file
//! ```
//!
//! A view of a parent shows the parent's own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use davit_metadata::Db;
use davit_model::{Labels, Mount};

use crate::folders::{self, Folders, owns_place};
use crate::records::{Record, Records};
use crate::{Error, FileError, Info, Kind, Snapshotter, Usage};

/// How whole snapshots are kept.
pub trait Method: Send + Sync {
    /// The name of the snapshotter.
    const NAME: &'static str;

    /// Makes an empty snapshot where nothing is.
    fn make(&self, at: &Path) -> Result<(), FileError>;

    /// Makes a copy of `parent`, which does not change, where nothing is.
    fn copy(&self, parent: &Path, at: &Path) -> Result<(), FileError>;

    /// Does what the method can so that nothing changes in a snapshot any more, which is about to be committed.
    fn freeze(&self, _at: &Path) -> Result<(), FileError> {
        Ok(())
    }

    /// Undoes [`freeze`](Method::freeze), for a commit that failed or that a crash has cut off.
    fn thaw(&self, _at: &Path) -> Result<(), FileError> {
        Ok(())
    }

    /// Has a snapshot on disk when this returns, by whomever it was written: who fills one through its mounts syncs
    /// nothing.
    fn sync(&self, at: &Path) -> Result<(), FileError> {
        folders::sync_filesystem(at)
    }

    /// What a snapshot takes on disk, as far as the method can tell without what it shares with its parent.
    fn usage(&self, at: &Path, parent: Option<&Path>) -> Result<Usage, FileError>;

    /// The mount that shows a snapshot.
    fn mount(&self, at: &Path, read_only: bool) -> Mount;

    /// Deletes what is at the place of a snapshot, whatever it is. Nothing there is no error.
    fn delete(at: &Path) -> Result<(), FileError>;
}

/// A snapshotter of whole snapshots.
pub struct Whole<M> {
    root: PathBuf,
    folders: Folders,
    records: Records,
    method: M,
}

impl<M: Method> Whole<M> {
    /// Opens the snapshotter that keeps its snapshots in `root`, which [`Folders::open`] has taken, and its records in `db`.
    pub(crate) fn over(root: &Path, folders: Folders, db: Db, method: M) -> Result<Whole<M>, Error> {
        let ids = folders.ids()?;
        let records = Records::open(db, M::NAME, ids.last().copied().unwrap_or(0))?;
        let whole = Whole { root: root.to_owned(), folders, records, method };
        whole.check(&ids)?;
        Ok(whole)
    }

    /// Looks at what a crash may have left.
    fn check(&self, ids: &BTreeSet<u64>) -> Result<(), Error> {
        for (key, record) in self.records.all()? {
            if !owns_place(record.kind, &record.parents) {
                continue;
            }
            if !ids.contains(&record.id) {
                tracing::error!(snapshot.key = key, "files of a snapshot are missing");
            } else if record.kind == Kind::Active
                && let Err(error) = self.method.thaw(&self.folders.of(record.id))
            {
                let error = davit_model::error::chain(&error);
                tracing::error!(snapshot.key = key, error, "snapshot cannot be written to");
            }
        }
        Ok(())
    }

    fn create(
        &self,
        kind: Kind,
        key: &str,
        parent: Option<&str>,
        labels: &Labels,
    ) -> Result<Vec<Mount>, Error> {
        let draft = self.records.draft(kind, key, parent)?;
        let record = self.folders.create(&self.records, draft, key, parent, labels, |making, draft| {
            self.fill(key, &making.path(), &draft.parents)?;
            // The copy is what the snapshot promises to begin with, so it is on disk before the record.
            Ok(self.method.sync(&making.path())?)
        })?;
        Ok(self.mounts_of(&record))
    }

    fn fill(&self, key: &str, at: &Path, parents: &[u64]) -> Result<(), Error> {
        match parents.first() {
            Some(parent) => {
                let parent = self.folders.of(*parent);
                folders::metadata(key, &parent)?;
                Ok(self.method.copy(&parent, at)?)
            }
            None => Ok(self.method.make(at)?),
        }
    }

    fn mounts_of(&self, record: &Record) -> Vec<Mount> {
        let id = match record.parents.first() {
            Some(parent) if record.kind == Kind::View => *parent,
            _ => record.id,
        };
        vec![self.method.mount(&self.folders.of(id), record.kind == Kind::View)]
    }

    fn count(&self, record: &Record) -> Result<Usage, FileError> {
        let parent = record.parents.first().map(|parent| self.folders.of(*parent));
        self.method.usage(&self.folders.of(record.id), parent.as_deref())
    }
}

impl<M: Method> Snapshotter for Whole<M> {
    fn stat(&self, key: &str) -> Result<Info, Error> {
        Ok(self.records.get(key)?.into_info(key))
    }

    fn update(&self, name: &str, labels: &Labels, fields: &[String]) -> Result<Info, Error> {
        Ok(self.records.update(name, labels, fields)?.into_info(name))
    }

    fn usage(&self, key: &str) -> Result<Usage, Error> {
        let record = self.records.get(key)?;
        match record.kind {
            Kind::Active => Ok(self.count(&record)?),
            Kind::View | Kind::Committed => Ok(record.usage()),
        }
    }

    fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error> {
        let record = self.records.get(key)?;
        match record.kind {
            Kind::Active | Kind::View => Ok(self.mounts_of(&record)),
            Kind::Committed => Err(Error::NotMountable { key: key.to_owned() }),
        }
    }

    fn prepare(&self, key: &str, parent: Option<&str>, labels: &Labels) -> Result<Vec<Mount>, Error> {
        self.create(Kind::Active, key, parent, labels)
    }

    fn view(&self, key: &str, parent: Option<&str>, labels: &Labels) -> Result<Vec<Mount>, Error> {
        self.create(Kind::View, key, parent, labels)
    }

    fn commit(&self, name: &str, key: &str, labels: &Labels, parent: Option<&str>) -> Result<(), Error> {
        let record = self.records.check_commit(name, key, parent)?;
        if record.parent.is_none() && parent.is_some() {
            return Err(Error::RebaseUnsupported { snapshotter: M::NAME, key: key.to_owned() });
        }
        let at = self.folders.of(record.id);
        self.method.freeze(&at)?;
        let committed = self
            .count(&record)
            .and_then(|usage| self.method.sync(&at).map(|()| usage))
            .map_err(Error::from)
            .and_then(|usage| self.records.commit(record.id, name, key, labels, parent, usage));
        // Of two commits of one snapshot the slower one must not thaw what the faster one has committed.
        if committed.is_err()
            && self.records.get(key).is_ok_and(|now| now.id == record.id)
            && let Err(error) = self.method.thaw(&at)
        {
            let error = davit_model::error::chain(&error);
            tracing::error!(snapshot.key = key, error, "snapshot cannot be written to any more");
        }
        committed
    }

    fn remove(&self, key: &str) -> Result<(), Error> {
        self.records.remove(key)
    }

    fn list(&self) -> Result<Vec<Info>, Error> {
        Ok(self.records.all()?.into_iter().map(|(key, record)| record.into_info(&key)).collect())
    }

    fn cleanup(&self) -> Result<(), Error> {
        self.folders.clean(&self.records)
    }

    fn capabilities(&self) -> Vec<String> {
        Vec::new()
    }

    fn exports(&self) -> BTreeMap<String, String> {
        BTreeMap::from([("root".to_owned(), self.root.display().to_string())])
    }
}
