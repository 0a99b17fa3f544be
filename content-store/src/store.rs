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
            Err(error) if error.is_missing() => Err(Error::NoIngest { reference: reference.to_owned() }),
            result => result,
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

    /// Removes ingests without their reference or data: no status shows them, so nobody would ever abort them.
    fn remove_leftovers(&self) -> Result<(), Error> {
        for name in self.ingests.names()? {
            let status = self.ingests.folder(&name).and_then(|folder| ingest::read_status(&folder));
            if status.is_err_and(|error| error.is_damage()) {
                info!(ingest = name, "removing what is left of an ingest");
                if let Err(error) = self.ingests.remove_folder(&name) {
                    warn!(ingest = name, %error, "cannot remove what is left of an ingest");
                }
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
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::PathBuf;

    use davit_model::{Coded, ErrorCode};
    use tempfile::TempDir;

    use super::*;
    use crate::hasher::Hasher;

    fn store() -> (TempDir, Store) {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        (root, store)
    }

    fn put(store: &Store, reference: &str, bytes: &[u8]) -> Digest {
        let mut writer = store.writer(reference, 0, None).unwrap();
        writer.write(bytes).unwrap();
        writer.commit(0, None).unwrap()
    }

    fn ingest_path(root: &TempDir, reference: &str) -> PathBuf {
        root.path().join("ingest").join(ingest::folder_name(reference))
    }

    #[test]
    fn the_layout_is_that_of_containerd() {
        let (root, store) = store();
        let mut writer = store.writer("layer", 6, None).unwrap();
        writer.write(b"foo").unwrap();
        let name = Hasher::digest_of(Algorithm::Sha256, b"layer");
        let path = root.path().join("ingest").join(name.hex());
        let mut names: Vec<_> =
            fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["data", "ref", "startedat", "total", "updatedat"]);
        assert_eq!(fs::read_to_string(path.join("ref")).unwrap(), "layer");
        assert_eq!(fs::read_to_string(path.join("total")).unwrap(), "6");
        assert_eq!(fs::read_to_string(path.join("data")).unwrap(), "foo");
        let started = fs::read_to_string(path.join("startedat")).unwrap();
        assert!(started.len() > 20 && started.contains('T') && started.ends_with('Z'), "{started}");
        writer.write(b"bar").unwrap();
        let digest = writer.commit(6, None).unwrap();
        let blob = root.path().join("blobs/sha256").join(digest.hex());
        assert_eq!(fs::metadata(&blob).unwrap().permissions().mode() & 0o7777, 0o444);
        for folder in ["blobs", "blobs/sha256", "blobs/sha512", "ingest"] {
            assert_eq!(fs::metadata(root.path().join(folder)).unwrap().permissions().mode() & 0o7777, 0o700);
        }
        assert!(!path.exists());
    }

    #[test]
    fn an_ingest_of_containerd_is_resumed() {
        let (root, store) = store();
        let path = ingest_path(&root, "default/1/layer");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("ref"), "default/1/layer").unwrap();
        fs::write(path.join("startedat"), "2024-01-02T03:04:05.000000006+01:00").unwrap();
        fs::write(path.join("updatedat"), "2024-01-02T03:04:05.000000006+01:00").unwrap();
        fs::write(path.join("total"), "6").unwrap();
        fs::write(path.join("data"), "foo").unwrap();
        let mut writer = store.writer("default/1/layer", 0, None).unwrap();
        let status = writer.status();
        assert_eq!((status.offset, status.total), (3, 6));
        assert_eq!(crate::error::timestamp(status.started_at), "2024-01-02T02:04:05.000000006Z");
        writer.write(b"bar").unwrap();
        writer.commit(6, None).unwrap();
    }

    #[test]
    fn a_second_process_is_refused() {
        let (root, store) = store();
        let error = Store::open(root.path()).unwrap_err();
        assert_eq!(error.code(), ErrorCode::FailedPrecondition);
        assert!(error.to_string().contains(root.path().to_str().unwrap()));
        drop(store.clone());
        assert!(Store::open(root.path()).is_err());
        drop(store);
        Store::open(root.path()).unwrap();
    }

    #[test]
    fn texts_are_those_of_containerd() {
        let (_root, store) = store();
        let digest = put(&store, "first", b"foo");
        let _writer = store.writer("busy", 0, None).unwrap();
        let text = store.writer("busy", 0, None).unwrap_err().to_string();
        assert!(text.starts_with("ref busy locked for ") && text.contains(" (since "), "{text}");
        let mut writer = store.writer("second", 0, None).unwrap();
        writer.write(b"bar").unwrap();
        let text = writer.commit(4, None).unwrap_err().to_string();
        assert_eq!(text, "unexpected commit size 3, expected 4");
        let writer = store.writer("second", 0, None).unwrap();
        let text = writer.commit(3, Some(&digest)).unwrap_err().to_string();
        let bar = Hasher::digest_of(Algorithm::Sha256, b"bar");
        assert_eq!(text, format!("unexpected commit digest {bar}, expected {digest}"));
        store.delete(&digest).unwrap();
        assert_eq!(store.info(&digest).unwrap_err().to_string(), format!("content {digest}"));
        assert_eq!(store.writer("", 0, None).unwrap_err().to_string(), "ref must not be empty");
    }

    #[test]
    fn links_are_not_followed() {
        let (root, store) = store();
        let outside = root.path().join("outside");
        fs::write(&outside, "secret").unwrap();
        let digest = Hasher::digest_of(Algorithm::Sha256, b"secret");
        let blob = root.path().join("blobs/sha256").join(digest.hex());
        symlink(&outside, &blob).unwrap();
        assert_eq!(store.info(&digest).unwrap_err().code(), ErrorCode::DataLoss);
        assert_eq!(store.reader(&digest).unwrap_err().code(), ErrorCode::DataLoss);
        assert!(store.walk().unwrap().is_empty());
        store.delete(&digest).unwrap();
        assert_eq!(fs::read_to_string(&outside).unwrap(), "secret");

        // A link in place of an ingest's data, and of its folder; a FIFO, which nobody else opens.
        for what in ["data", "folder", "fifo"] {
            drop(store.writer("ref", 0, None).unwrap());
            let path = ingest_path(&root, "ref");
            match what {
                "data" => {
                    fs::remove_file(path.join("data")).unwrap();
                    symlink(&outside, path.join("data")).unwrap();
                }
                "folder" => {
                    fs::rename(&path, root.path().join("moved")).unwrap();
                    symlink(root.path().join("moved"), &path).unwrap();
                }
                _ => {
                    fs::remove_file(path.join("ref")).unwrap();
                    nix::unistd::mkfifo(&path.join("ref"), nix::sys::stat::Mode::S_IRWXU).unwrap();
                }
            }
            assert!(store.status("ref").is_err());
            assert!(store.statuses().unwrap().is_empty());
            let mut writer = store.writer("ref", 0, None).unwrap();
            writer.write(b"overwritten").unwrap();
            assert_eq!(writer.status().offset, 11);
            drop(writer);
            store.abort("ref").unwrap();
            assert_eq!(fs::read_to_string(&outside).unwrap(), "secret");
        }
        assert_eq!(fs::read_to_string(root.path().join("moved/data")).unwrap(), "");
    }

    #[test]
    fn what_a_crash_left_is_tolerated() {
        let (root, store) = store();
        for missing in ["ref", "data", "startedat", "updatedat", "total"] {
            let mut writer = store.writer(missing, 9, None).unwrap();
            writer.write(b"foo").unwrap();
            drop(writer);
            fs::remove_file(ingest_path(&root, missing).join(missing)).unwrap();
        }
        for torn in ["startedat", "updatedat", "total"] {
            let reference = format!("torn {torn}");
            drop(store.writer(&reference, 9, None).unwrap());
            fs::write(ingest_path(&root, &reference).join(torn), "2024-01").unwrap();
        }
        fs::create_dir(ingest_path(&root, "empty")).unwrap();
        drop(store.writer("emptied", 9, None).unwrap());
        fs::write(ingest_path(&root, "emptied").join("ref"), "").unwrap();
        fs::write(root.path().join("ingest/file"), "").unwrap();
        assert_eq!(store.statuses().unwrap().len(), 6);
        assert_eq!(store.status("startedat").unwrap().offset, 3);
        assert_eq!(store.status("ref").unwrap_err().code(), ErrorCode::NotFound);
        // A writer makes up for what is missing, or starts anew.
        assert_eq!(store.writer("startedat", 9, None).unwrap().status().offset, 3);
        assert_eq!(store.writer("total", 8, None).unwrap().status().total, 8);
        assert_eq!(store.writer("data", 9, None).unwrap().status().offset, 0);
        store.abort("ref").unwrap();
        drop(store);
        // What no status shows is removed when the store is opened.
        let store = Store::open(root.path()).unwrap();
        assert_eq!(fs::read_dir(root.path().join("ingest")).unwrap().count(), 7 + 1);
        assert_eq!(store.statuses().unwrap().len(), 7);
    }

    #[test]
    fn an_aborted_writer_cannot_commit() {
        let (_root, store) = store();
        let mut writer = store.writer("ref", 0, None).unwrap();
        writer.write(b"foo").unwrap();
        store.abort("ref").unwrap();
        writer.write(b"bar").unwrap();
        assert_eq!(writer.commit(0, None).unwrap_err().code(), ErrorCode::NotFound);
        assert!(store.walk().unwrap().is_empty());
        put(&store, "ref", b"foo");
    }

    #[test]
    fn one_of_many_equal_commits_wins() {
        let (_root, store) = store();
        let results: Vec<_> = std::thread::scope(|scope| {
            let commit = |number: usize| {
                let store = &store;
                scope.spawn(move || {
                    let mut writer = store.writer(&format!("ref {number}"), 0, None).unwrap();
                    writer.write(b"the same").unwrap();
                    writer.commit(0, None)
                })
            };
            let threads: Vec<_> = (0..8).map(commit).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
        let mut errors = results.into_iter().filter_map(Result::err);
        assert!(errors.all(|error| error.code() == ErrorCode::AlreadyExists));
        assert!(store.statuses().unwrap().is_empty());
    }

    #[test]
    fn a_blob_that_is_read_may_be_deleted() {
        let (_root, store) = store();
        let digest = put(&store, "ref", b"foobar");
        let mut reader = store.reader(&digest).unwrap();
        store.delete(&digest).unwrap();
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert_eq!((bytes.as_slice(), reader.size()), (&b"foobar"[..], 6));
        let mut some = [0; 3];
        assert_eq!(reader.read_at(&mut some, 2).unwrap(), 3);
        assert_eq!(&some, b"oba");
    }

    #[test]
    fn a_blob_shares_nothing_with_its_ingest() {
        let (root, store) = store();
        let digest = put(&store, "ref", b"foobar");
        let blob = root.path().join("blobs/sha256").join(digest.hex());
        assert_eq!(fs::metadata(&blob).unwrap().nlink(), 1);
    }
}
