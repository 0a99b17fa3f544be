//! [`Db`]: opening, changing, closing.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};

use tokio::sync::oneshot;

use crate::committer::{self, Reply, Shared};
use crate::engine::{self, EngineKind, guarded};
use crate::error::{CommitError, OpenError, VerifyError};
use crate::folder::Folder;
use crate::index::{Index, Txn, View, check_sizes};

/// An open database. Clones are handles of the same one; it closes with the last of them, or by
/// [`close`](Db::close).
#[derive(Clone)]
pub struct Db {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    committer: Mutex<Option<JoinHandle<()>>>,
    /// Declared last: unlocked when the committer has ended.
    _folder: Folder,
}

impl Db {
    /// Opens the database in the folder `path`, or creates it, and reads all of it into memory.
    ///
    /// # Errors
    /// [`OpenError::Locked`] if another process has it open; [`OpenError::OtherEngine`] if it was created with
    /// the other engine; the others if it is damaged, of an unknown format, or cannot be read.
    pub fn open(path: &Path, engine: EngineKind) -> Result<Db, OpenError> {
        let mut folder = Folder::lock(path, engine)?;
        let failed = |source| OpenError::Engine { engine, path: path.to_owned(), source };
        let mut index = Index::new_sync();
        let opened = guarded(|| {
            let mut opened = engine::open(engine, path)?;
            opened.load(&mut |key, value| index.insert_mut(key, value))?;
            Ok(opened)
        });
        let opened = opened.map_err(failed)?;
        folder.set_ready()?;
        let shared = Arc::new(Shared::new(path.to_owned(), index.clone()));
        let committer = thread::Builder::new()
            .name("metadata".to_owned())
            .spawn({
                let shared = shared.clone();
                move || committer::run(&shared, opened, index)
            })
            .map_err(OpenError::io("start the committer's thread of", path))?;
        let committer = Mutex::new(Some(committer));
        Ok(Db { inner: Arc::new(Inner { shared, committer, _folder: folder }) })
    }

    /// The state of now, as a snapshot that does not change. Never waits for the disk.
    ///
    /// It shows changes that are not durable yet (for a fraction of a millisecond, as a rule). A reader that is
    /// about to do something for good outside of the database because of what it saw, such as to delete the blob
    /// of a record that is gone, calls [`sync`](Db::sync) in between.
    pub fn view(&self) -> View {
        View::new(self.inner.shared.visible())
    }

    /// Runs `change` and, if it returns `Ok`, makes its writes one atomic change; returns when that is durable,
    /// together with everything that the closure saw. Blocks: not to be called from an asynchronous context.
    ///
    /// The closure must not call an update of the same database; it would wait for itself.
    ///
    /// # Errors
    /// The closure's own, in which case nothing is changed. [`CommitError::TooLarge`], likewise.
    /// [`CommitError::Failed`]: whether the change is on disk is known only after the next open.
    pub fn update<T, E: From<CommitError>>(
        &self,
        change: impl FnOnce(&mut Txn<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let reply: Reply = Box::new(move |result| {
            // The receiver waits below, whatever happens.
            let _ = sender.send(result);
        });
        let (value, _) = self.apply(change, Some(reply))?;
        match receiver.recv() {
            Ok(result) => result.map(|()| value).map_err(E::from),
            Err(mpsc::RecvError) => Err(self.closed().into()),
        }
    }

    /// As [`update`](Db::update), for an asynchronous caller: the closure runs at once, in the first poll, and
    /// only the wait is asynchronous. A caller that goes away in the middle of it undoes nothing.
    ///
    /// # Errors
    /// As for [`update`](Db::update).
    pub async fn update_async<T, E: From<CommitError>>(
        &self,
        change: impl FnOnce(&mut Txn<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let (sender, receiver) = oneshot::channel();
        let reply: Reply = Box::new(move |result| {
            // The caller may have gone away.
            let _ = sender.send(result);
        });
        let (value, _) = self.apply(change, Some(reply))?;
        match receiver.await {
            Ok(result) => result.map(|()| value).map_err(E::from),
            Err(_) => Err(self.closed().into()),
        }
    }

    /// As [`update`](Db::update), but returns at once. The change is visible immediately, and durable no later
    /// than any change after it, or half a second if none follows. For records that a later one, which is waited
    /// for, completes.
    ///
    /// # Errors
    /// The closure's own, and those of [`CommitError`] that are known at once: a later failure is reported to
    /// the next change.
    pub fn update_ordered<T, E: From<CommitError>>(
        &self,
        change: impl FnOnce(&mut Txn<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let (value, accepted) = self.apply(change, None)?;
        if !accepted {
            // Changes arrive faster than the disk takes them: memory must not pay for it.
            self.sync()?;
        }
        Ok(value)
    }

    /// Returns when everything that is visible now is durable. Blocks.
    ///
    /// # Errors
    /// [`CommitError::Failed`] or [`CommitError::Closed`].
    pub fn sync(&self) -> Result<(), CommitError> {
        self.update(|_| Ok(()))
    }

    /// As [`sync`](Db::sync), for an asynchronous caller.
    ///
    /// # Errors
    /// As for [`sync`](Db::sync).
    pub async fn sync_async(&self) -> Result<(), CommitError> {
        self.update_async(|_| Ok(())).await
    }

    /// Has the engine check its files, reads all records from disk again and compares them with memory. Blocks,
    /// and holds up all changes meanwhile.
    ///
    /// # Errors
    /// What was found, or that the database cannot be used any more.
    pub fn verify(&self) -> Result<(), VerifyError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let reply = Box::new(move |result| {
            let _ = sender.send(result);
        });
        self.inner.shared.verify(reply).map_err(VerifyError::Unusable)?;
        receiver.recv().unwrap_or_else(|_| Err(VerifyError::Unusable(self.closed())))
    }

    /// The failure that ended all writing, if there was one; for a health check.
    pub fn failure(&self) -> Option<CommitError> {
        self.inner.shared.failure()
    }

    /// Makes everything durable and closes the database for all handles. Views stay usable. Blocks.
    ///
    /// # Errors
    /// [`CommitError::Failed`] if not everything is durable.
    pub fn close(self) -> Result<(), CommitError> {
        self.inner.stop();
        self.failure().map_or(Ok(()), Err)
    }

    fn apply<T, E: From<CommitError>>(
        &self,
        change: impl FnOnce(&mut Txn<'_>) -> Result<T, E>,
        reply: Option<Reply>,
    ) -> Result<(T, bool), E> {
        let turn = self.inner.shared.turn()?;
        let mut index = self.inner.shared.visible();
        let mut writes = Vec::new();
        let value = change(&mut Txn::new(&mut index, &mut writes))?;
        check_sizes(&writes)?;
        Ok((value, turn.finish(writes, index, reply)))
    }

    fn closed(&self) -> CommitError {
        self.failure().unwrap_or_else(|| CommitError::Closed { path: self.inner.shared.path.clone() })
    }
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db").field("path", &self.inner.shared.path).finish_non_exhaustive()
    }
}

impl Inner {
    /// Closes the queue and waits until the committer has written it.
    fn stop(&self) {
        self.shared.close();
        let committer = self.committer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(committer) = committer {
            // Its panics are caught where they can happen; one more would have been printed.
            let _ = committer.join();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENGINES: [EngineKind; 2] = [EngineKind::Redb, EngineKind::Sled];

    #[test]
    fn a_change_is_visible_and_survives_reopening() {
        for engine in ENGINES {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("metadata");
            let db = Db::open(&path, engine).unwrap();
            let before = db.view();
            db.update::<_, CommitError>(|txn| {
                txn.put(b"a/1", b"one");
                txn.put(b"a/2", &vec![7; 100_000]);
                txn.put(b"b", b"");
                Ok(())
            })
            .unwrap();
            db.update_ordered::<_, CommitError>(|txn| {
                assert_eq!(txn.get(b"a/1").unwrap(), "one");
                txn.delete(b"a/1");
                txn.put(b"a/3", b"three");
                Ok(())
            })
            .unwrap();
            assert!(before.get(b"a/1").is_none());
            let check = |view: View| {
                let keys: Vec<_> = view.scan(b"a/").map(|(key, _)| key).collect();
                assert_eq!(keys, ["a/2", "a/3"]);
                assert_eq!(view.get(b"a/2").unwrap(), vec![7; 100_000]);
                assert_eq!(view.get(b"b").unwrap(), "");
                assert_eq!(view.scan(b"").count(), 3);
            };
            check(db.view());
            db.verify().unwrap();
            drop(db);
            let db = Db::open(&path, engine).unwrap();
            check(db.view());
            db.verify().unwrap();
            db.close().unwrap();
        }
    }
}
