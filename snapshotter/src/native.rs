//! Snapshots as full copies: works on every filesystem that can hold what a container makes, and takes time and
//! space with every snapshot, unless the filesystem shares blocks between copies (btrfs, xfs).
//!
//! ```text
//! <root>/snapshots/<id>    the whole filesystem of the snapshot
//! ```

mod copy;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use davit_metadata::Db;
use davit_model::{Labels, Mount};

use crate::folders::{self, Folders};
use crate::records::{Record, Records};
use crate::{Error, FileError, Info, Kind, Snapshotter, Usage, tree};

/// The name of this snapshotter.
pub const NAME: &str = "native";

/// The snapshotter that copies.
pub struct Native {
    root: PathBuf,
    folders: Folders,
    records: Records,
}

impl Native {
    /// Opens the snapshotter that keeps its folders in `root` and its records in `db`.
    ///
    /// # Errors
    /// [`Error::Root`] when mount options cannot hold that path; [`Error::Version`], [`Error::Corrupt`].
    pub fn open(root: &Path, db: Db) -> Result<Native, Error> {
        let folders = Folders::open(root)?;
        let ids = folders.ids()?;
        let records = Records::open(db, NAME, ids.last().copied().unwrap_or(0))?;
        for (key, record) in records.all()? {
            if owns_folder(record.kind, &record.parents) && !ids.contains(&record.id) {
                tracing::error!(snapshot.key = key, "files of a snapshot are missing");
            }
        }
        Ok(Native { root: root.to_owned(), folders, records })
    }

    fn create(
        &self,
        kind: Kind,
        key: &str,
        parent: Option<&str>,
        labels: &Labels,
    ) -> Result<Vec<Mount>, Error> {
        let draft = self.records.draft(kind, key, parent)?;
        let making = if owns_folder(kind, &draft.parents) {
            let making = self.folders.begin(draft.id)?;
            if let Err(error) = self.fill(key, &making.path(), &draft.parents) {
                // Most likely the parent was removed meanwhile, which is the better error then.
                self.records.confirm(&draft, key, parent)?;
                return Err(error);
            }
            // The copy is what the snapshot promises to begin with, so it is on disk before the record.
            self.folders.sync()?;
            Some(making)
        } else {
            None
        };
        let record = self.records.create(draft, key, parent, labels)?;
        if let Some(making) = making {
            making.keep();
        }
        Ok(self.mounts_of(&record))
    }

    fn fill(&self, key: &str, path: &Path, parents: &[u64]) -> Result<(), Error> {
        match parents.first() {
            Some(parent) => {
                let parent = self.folders.of(*parent);
                folders::metadata(key, &parent)?;
                copy::copy_tree(&parent, path)?;
            }
            None => fs::set_permissions(path, fs::Permissions::from_mode(0o755))
                .map_err(FileError::at("chmod", path))?,
        }
        Ok(())
    }

    fn mounts_of(&self, record: &Record) -> Vec<Mount> {
        let id = match record.parents.first() {
            Some(parent) if record.kind == Kind::View => *parent,
            _ => record.id,
        };
        let mode = if record.kind == Kind::View { "ro" } else { "rw" };
        vec![Mount {
            kind: "bind".to_owned(),
            source: self.folders.of(id).display().to_string(),
            target: String::new(),
            options: vec!["rbind".to_owned(), mode.to_owned()],
        }]
    }
}

/// A view of a parent shows the parent's folder.
fn owns_folder(kind: Kind, parents: &[u64]) -> bool {
    kind != Kind::View || parents.is_empty()
}

impl Snapshotter for Native {
    fn stat(&self, key: &str) -> Result<Info, Error> {
        Ok(self.records.get(key)?.into_info(key))
    }

    fn update(&self, name: &str, labels: &Labels, fields: &[String]) -> Result<Info, Error> {
        Ok(self.records.update(name, labels, fields)?.into_info(name))
    }

    /// As with containerd, this counts the whole copy, parents and all: that is what it takes.
    fn usage(&self, key: &str) -> Result<Usage, Error> {
        let record = self.records.get(key)?;
        match record.kind {
            Kind::Active => Ok(tree::usage(&self.folders.of(record.id))?),
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
            return Err(Error::RebaseUnsupported { snapshotter: NAME, key: key.to_owned() });
        }
        let usage = tree::usage(&self.folders.of(record.id))?;
        self.folders.sync()?;
        self.records.commit(record.id, name, key, labels, parent, usage)
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
