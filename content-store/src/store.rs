//! [`Store`]: opening, looking, deleting, and the locks of references.

use std::collections::HashMap;
use std::fs::{DirBuilder, File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use davit_model::{Algorithm, Digest};
use nix::sys::stat::FileStat;
use tracing::{info, warn};

use crate::error::Error;
use crate::folder::Folder;
use crate::ingest::{self, Status};
use crate::reader::Reader;
use crate::writer::Writer;

/// The longest reference that a writer accepts, in bytes. Those of clients have some hundred.
pub const MAX_REFERENCE_SIZE: usize = 16 << 10;

/// What the store knows of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Its name.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// When it was committed.
    pub created_at: SystemTime,
    /// The same: a blob never changes, and what changes about it is not in here.
    pub updated_at: SystemTime,
}

/// An open store; clones are handles of the same one.
#[derive(Debug, Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) ingests: Folder,
    sha256: Folder,
    sha512: Folder,
    /// Held from the check that a blob does not exist to its rename.
    pub(crate) publishing: Mutex<()>,
    locks: Mutex<HashMap<String, (SystemTime, Instant)>>,
    /// The root, locked with `flock(2)` for as long as the store is open.
    root: File,
}

impl Store {
    /// Opens the store below `root`, or creates it, and removes what a crash left of ingests that cannot be
    /// resumed.
    ///
    /// # Errors
    /// [`Error::InUse`] if it is open already; [`Error::Foreign`] if something else has the name of one of its
    /// folders; [`Error::Io`].
    pub fn open(root: &Path) -> Result<Store, Error> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(root).map_err(Error::io("create", root))?;
        let lock = File::open(root).map_err(Error::io("open", root))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: root.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(Error::io("lock", root)(source)),
        }
        let folder = Folder::root(root)?;
        let blobs = subfolder(&folder, "blobs")?;
        let inner = Inner {
            ingests: subfolder(&folder, "ingest")?,
            sha256: subfolder(&blobs, Algorithm::Sha256.as_str())?,
            sha512: subfolder(&blobs, Algorithm::Sha512.as_str())?,
            publishing: Mutex::new(()),
            locks: Mutex::new(HashMap::new()),
            root: lock,
        };
        blobs.sync()?;
        folder.sync()?;
        inner.remove_leftovers()?;
        Ok(Store { inner: Arc::new(inner) })
    }

    /// What is known of a blob.
    ///
    /// # Errors
    /// [`Error::NoBlob`].
    pub fn info(&self, digest: &Digest) -> Result<Info, Error> {
        let stat = self.inner.blobs(digest.algorithm()).stat(digest.hex());
        Ok(blob_info(digest.clone(), &stat.map_err(no_blob(digest))?))
    }

    /// Opens a blob to read.
    ///
    /// # Errors
    /// [`Error::NoBlob`].
    pub fn reader(&self, digest: &Digest) -> Result<Reader, Error> {
        let opened = self.inner.blobs(digest.algorithm()).open(digest.hex());
        let (file, stat) = opened.map_err(no_blob(digest))?;
        Ok(Reader::new(file, ingest::size(&stat)))
    }

    /// Starts or resumes the ingest `reference` and locks it until the writer is dropped. What is there is hashed
    /// again. An ingest that was started with another total than `total` (0 = unknown) is started anew, and so
    /// is a damaged one.
    ///
    /// # Errors
    /// [`Error::BadReference`]; [`Error::Locked`] if the reference has a writer; [`Error::BlobExists`] if there
    /// is a blob of the expected digest.
    pub fn writer(&self, reference: &str, total: u64, expected: Option<&Digest>) -> Result<Writer, Error> {
        if reference.is_empty() || reference.len() > MAX_REFERENCE_SIZE {
            return Err(Error::BadReference { size: reference.len() });
        }
        let lock = self.lock(reference)?;
        if let Some(digest) = expected
            && self.inner.exists(digest)?
        {
            return Err(Error::BlobExists { digest: digest.clone() });
        }
        Writer::open(lock, total, expected)
    }

    /// How far an ingest has come.
    ///
    /// # Errors
    /// [`Error::NoIngest`].
    pub fn status(&self, reference: &str) -> Result<Status, Error> {
        let folder = self.inner.ingests.folder(&ingest::folder_name(reference));
        let status = folder.and_then(|folder| ingest::read_status(&folder));
        match status {
            Ok(status) if status.reference == reference => Ok(status),
            Err(error) if !error.is_missing() => Err(error),
            _ => Err(Error::NoIngest { reference: reference.to_owned() }),
        }
    }

    /// All ingests, in no order. One that is damaged or that ends meanwhile is left out.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder of ingests cannot be read.
    pub fn statuses(&self) -> Result<Vec<Status>, Error> {
        let mut statuses = Vec::new();
        for name in self.inner.ingests.names()? {
            let status = self.inner.ingests.folder(&name).and_then(|folder| ingest::read_status(&folder));
            match status {
                Ok(status) => statuses.push(status),
                Err(error) if error.is_missing() => {}
                Err(error) => warn!(ingest = name, %error, "skipping a damaged ingest"),
            }
        }
        Ok(statuses)
    }

    /// Removes an ingest, damaged or not. A writer that has it open can no longer commit.
    ///
    /// # Errors
    /// [`Error::NoIngest`].
    pub fn abort(&self, reference: &str) -> Result<(), Error> {
        match self.inner.ingests.remove_folder(&ingest::folder_name(reference)) {
            Err(error) if error.is_missing() => Err(Error::NoIngest { reference: reference.to_owned() }),
            result => result,
        }
    }

    /// Removes a blob. After a power cut it may be back.
    ///
    /// # Errors
    /// [`Error::NoBlob`].
    pub fn delete(&self, digest: &Digest) -> Result<(), Error> {
        self.inner.blobs(digest.algorithm()).remove(digest.hex()).map_err(no_blob(digest))
    }

    /// All blobs, in no order. What is no blob is left out.
    ///
    /// # Errors
    /// [`Error::Io`] if a folder of blobs cannot be read.
    pub fn walk(&self) -> Result<Vec<Info>, Error> {
        let mut infos = Vec::new();
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let folder = self.inner.blobs(algorithm);
            for name in folder.names()? {
                let Ok(digest) = format!("{}:{name}", algorithm.as_str()).parse::<Digest>() else {
                    warn!(path = %folder.path().join(&name).display(), "skipping what is no blob");
                    continue;
                };
                match folder.stat(&name) {
                    Ok(stat) => infos.push(blob_info(digest, &stat)),
                    Err(error) if error.is_missing() => {}
                    Err(error) => warn!(%digest, %error, "skipping what is no blob"),
                }
            }
        }
        Ok(infos)
    }

    fn lock(&self, reference: &str) -> Result<Lock, Error> {
        let mut locks = locked(&self.inner.locks);
        if let Some((since, start)) = locks.get(reference) {
            let (reference, held) = (reference.to_owned(), start.elapsed());
            return Err(Error::Locked { reference, held, since: *since });
        }
        locks.insert(reference.to_owned(), (SystemTime::now(), Instant::now()));
        Ok(Lock { inner: self.inner.clone(), reference: reference.to_owned() })
    }
}

/// The right to write to a reference.
#[derive(Debug)]
pub(crate) struct Lock {
    pub(crate) inner: Arc<Inner>,
    pub(crate) reference: String,
}

impl Drop for Lock {
    fn drop(&mut self) {
        locked(&self.inner.locks).remove(&self.reference);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Closing the file would do, if no child of this process were between `fork` and `exec` and held it, too.
        let _ = self.root.unlock();
    }
}

impl Inner {
    pub(crate) fn blobs(&self, algorithm: Algorithm) -> &Folder {
        match algorithm {
            Algorithm::Sha256 => &self.sha256,
            Algorithm::Sha512 => &self.sha512,
        }
    }

    /// Whether there is a blob. If so, its entry is durable when this returns: its writer may have renamed it, but
    /// not synced the folder yet, and the caller's client takes "exists" for an acknowledgement.
    pub(crate) fn exists(&self, digest: &Digest) -> Result<bool, Error> {
        let folder = self.blobs(digest.algorithm());
        match folder.stat(digest.hex()) {
            Ok(_) => folder.sync().map(|()| true),
            Err(error) if error.is_missing() => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn publishing(&self) -> MutexGuard<'_, ()> {
        locked(&self.publishing)
    }

    /// Removes ingests without reference or data: no status shows them, so nobody would ever abort them.
    fn remove_leftovers(&self) -> Result<(), Error> {
        for name in self.ingests.names()? {
            let status = self.ingests.folder(&name).and_then(|folder| ingest::read_status(&folder));
            if status.is_err_and(|error| error.is_missing()) {
                info!(ingest = name, "removing what is left of an ingest");
                self.ingests.remove_folder(&name)?;
            }
        }
        Ok(())
    }
}

fn subfolder(folder: &Folder, name: &str) -> Result<Folder, Error> {
    folder.make_folder(name)?;
    folder.folder(name)
}

fn no_blob(digest: &Digest) -> impl FnOnce(Error) -> Error {
    move |error| if error.is_missing() { Error::NoBlob { digest: digest.clone() } } else { error }
}

fn blob_info(digest: Digest, stat: &FileStat) -> Info {
    let time = ingest::modified(stat);
    Info { digest, size: ingest::size(stat), created_at: time, updated_at: time }
}

/// Nothing that is done under a lock of this module can panic halfway.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_written_resumed_and_committed() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let mut writer = store.writer("first", 6, None).unwrap();
        writer.write(b"foo").unwrap();
        assert!(matches!(store.writer("first", 6, None), Err(Error::Locked { .. })));
        drop(writer);
        let mut writer = store.writer("first", 6, None).unwrap();
        assert_eq!(writer.status().offset, 3);
        writer.write(b"bar").unwrap();
        let digest = writer.commit(6, None).unwrap();
        assert_eq!(store.info(&digest).unwrap().size, 6);
        assert!(store.statuses().unwrap().is_empty());
    }
}
