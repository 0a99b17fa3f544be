//! [`Db`]: opening, changing, closing.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};

use tokio::sync::oneshot;

use crate::committer::{self, Durable, Reply, Shared};
use crate::engine::{self, Engine, EngineKind, Summary, guarded};
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
            let mut opened = engine::open(engine, path, folder.is_new())?;
            let summary = engine::read(&mut *opened, |key, value| index.insert_mut(key, value))?;
            Ok((opened, summary))
        });
        let (opened, summary) = opened.map_err(failed)?;
        folder.set_ready()?;
        Db::start(path, folder, opened, index, summary)
    }

    fn start(
        path: &Path,
        folder: Folder,
        engine: Box<dyn Engine>,
        index: Index,
        summary: Summary,
    ) -> Result<Db, OpenError> {
        let shared = Arc::new(Shared::new(path.to_owned(), index.clone()));
        let committer = thread::Builder::new()
            .name("metadata".to_owned())
            .spawn({
                let shared = shared.clone();
                move || committer::run(&shared, Durable { engine, index, summary })
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
    /// The closure must not update or close the same database; it would wait for itself.
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
    /// for, completes. Blocks only when megabytes of such changes have queued up for a slow disk.
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

    /// Waits until a failure ends all writing: a daemon that cannot keep its promises any more should end and be
    /// started again. Never returns while all is well.
    pub async fn failed(&self) -> CommitError {
        self.inner.shared.failed().await
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
    use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
    use std::time::{Duration, Instant};

    use bytes::Bytes;
    use davit_model::{Coded, ErrorCode};

    use super::*;
    use crate::engine::{EngineError, Write};

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
                txn.put(b"a/2", &[7; 100_000]);
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

    /// What the engine of a test does with a group.
    enum Order {
        Accept,
        Refuse,
        Panic,
    }

    /// An engine that tells of each group and waits for an order before it takes it.
    struct Scripted {
        groups: Sender<Vec<Write>>,
        orders: Receiver<Order>,
    }

    impl Engine for Scripted {
        fn load(&mut self, _: &mut dyn FnMut(Bytes, Bytes)) -> Result<Option<Summary>, EngineError> {
            Ok(None)
        }

        fn commit(&mut self, writes: &[Write], _: Summary) -> Result<(), EngineError> {
            self.groups.send(writes.to_vec()).unwrap();
            match self.orders.recv() {
                Ok(Order::Accept) | Err(_) => Ok(()),
                Ok(Order::Refuse) => {
                    let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
                    Err(EngineError::Io { operation: "write", path: "disk".into(), source })
                }
                Ok(Order::Panic) => panic!("as ordered"),
            }
        }

        fn check(&mut self) -> Result<(), EngineError> {
            Ok(())
        }

        fn close(self: Box<Self>) -> Result<(), EngineError> {
            Ok(())
        }
    }

    struct Script {
        folder: tempfile::TempDir,
        db: Db,
        groups: Receiver<Vec<Write>>,
        orders: Sender<Order>,
    }

    fn script() -> Script {
        let folder = tempfile::tempdir().unwrap();
        let (groups_sender, groups) = channel();
        let (orders, orders_receiver) = channel();
        let engine = Box::new(Scripted { groups: groups_sender, orders: orders_receiver });
        let lock = Folder::lock(folder.path(), EngineKind::Redb).unwrap();
        let db = Db::start(folder.path(), lock, engine, Index::new_sync(), Summary::default()).unwrap();
        Script { folder, db, groups, orders }
    }

    fn set<'a>(key: &'a [u8], value: &'a [u8]) -> impl FnOnce(&mut Txn<'_>) -> Result<(), CommitError> + 'a {
        move |txn| {
            txn.put(key, value);
            Ok(())
        }
    }

    impl Script {
        /// The keys of the next group that reaches the engine.
        fn group(&self) -> Vec<Bytes> {
            let group = self.groups.recv_timeout(Duration::from_secs(10)).unwrap();
            group.into_iter().map(|write| write.key).collect()
        }

        /// Starts a change in a thread; returns where its result will come.
        fn put(&self, key: &'static str) -> Receiver<Result<(), CommitError>> {
            self.run(move |db| db.update(set(key.as_bytes(), b"")))
        }

        fn run<T: Send + 'static>(&self, call: impl FnOnce(Db) -> T + Send + 'static) -> Receiver<T> {
            let (sender, receiver) = channel();
            let db = self.db.clone();
            thread::spawn(move || sender.send(call(db)));
            receiver
        }

        fn wait_until_visible(&self, key: &str) {
            let deadline = Instant::now() + Duration::from_secs(10);
            while self.db.view().get(key.as_bytes()).is_none() {
                assert!(Instant::now() < deadline, "{key} does not become visible");
                thread::yield_now();
            }
        }
    }

    fn result<T>(receiver: &Receiver<T>) -> T {
        receiver.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn changes_that_come_during_a_commit_are_one_group() {
        let script = script();
        let first = script.put("first");
        assert_eq!(script.group(), ["first"]);
        // Readers see what is under way, and do not wait for it.
        assert!(script.db.view().get(b"first").is_some());
        let others: Vec<_> = ["a", "b", "c"].into_iter().map(|key| script.put(key)).collect();
        for key in ["a", "b", "c"] {
            script.wait_until_visible(key);
        }
        assert!(matches!(first.try_recv(), Err(TryRecvError::Empty)));
        script.orders.send(Order::Accept).unwrap();
        result(&first).unwrap();
        assert_eq!(script.group().len(), 3);
        for other in &others {
            assert!(matches!(other.try_recv(), Err(TryRecvError::Empty)));
        }
        script.orders.send(Order::Accept).unwrap();
        for other in &others {
            result(other).unwrap();
        }
    }

    #[test]
    fn an_ordered_change_goes_with_the_next_or_soon() {
        let script = script();
        let put = |key: &'static [u8]| script.db.update_ordered(set(key, b""));
        put(b"alone").unwrap();
        assert!(script.db.view().get(b"alone").is_some());
        assert_eq!(script.group(), ["alone"]);
        script.orders.send(Order::Accept).unwrap();

        // While the engine is busy, the next ones queue up together.
        let busy = script.put("busy");
        assert_eq!(script.group(), ["busy"]);
        put(b"1").unwrap();
        put(b"2").unwrap();
        let waited = script.put("3");
        script.wait_until_visible("3");
        script.orders.send(Order::Accept).unwrap();
        result(&busy).unwrap();
        assert_eq!(script.group(), ["1", "2", "3"]);
        script.orders.send(Order::Accept).unwrap();
        result(&waited).unwrap();
    }

    #[test]
    fn a_change_without_writes_waits_for_what_it_saw() {
        let script = script();
        script.db.sync().unwrap();
        let first = script.put("first");
        assert_eq!(script.group(), ["first"]);
        let reader = script.run(|db| db.update::<_, CommitError>(|txn| Ok(txn.get(b"first").is_some())));
        let sync = script.run(|db| db.sync());
        assert!(reader.recv_timeout(Duration::from_millis(20)).is_err());
        assert!(sync.try_recv().is_err());
        script.orders.send(Order::Accept).unwrap();
        assert!(result(&reader).unwrap());
        result(&sync).unwrap();
        result(&first).unwrap();
    }

    #[test]
    fn a_flood_of_ordered_changes_waits_for_the_disk() {
        let script = script();
        let busy = script.put("busy");
        assert_eq!(script.group(), ["busy"]);
        let flood = script.run(|db| {
            for number in 0..40_u8 {
                db.update_ordered(set(&[number], &[0; 1 << 20]))?;
            }
            Ok::<_, CommitError>(())
        });
        assert!(flood.recv_timeout(Duration::from_millis(200)).is_err());
        assert!(script.db.view().scan(b"").count() < 20);
        drop(script.orders);
        result(&flood).unwrap();
        result(&busy).unwrap();
        assert_eq!(script.db.view().scan(b"").count(), 41);
    }

    #[test]
    fn the_first_failure_ends_all_writing() {
        for (order, code) in
            [(Order::Refuse, ErrorCode::ResourceExhausted), (Order::Panic, ErrorCode::Internal)]
        {
            let script = script();
            let durable = script.put("durable");
            script.group();
            script.orders.send(Order::Accept).unwrap();
            result(&durable).unwrap();

            let lost = script.put("lost");
            script.group();
            let queued = script.put("queued");
            script.wait_until_visible("queued");
            let verified = script.run(|db| db.verify());
            script.orders.send(order).unwrap();
            for receiver in [lost, queued] {
                let error = result(&receiver).unwrap_err();
                assert!(matches!(error, CommitError::Failed { .. }), "{error}");
                assert_eq!(error.code(), code);
            }
            assert!(matches!(result(&verified), Err(VerifyError::Unusable(_))));

            // Readers go on with what is durable, nobody else does anything.
            let keys: Vec<_> = script.db.view().scan(b"").map(|(key, _)| key).collect();
            assert_eq!(keys, ["durable"]);
            let refused = [
                script.db.update(set(b"more", b"")),
                script.db.update_ordered(set(b"more", b"")),
                script.db.sync(),
                script.db.failure().map_or(Ok(()), Err),
            ];
            for result in refused {
                assert!(matches!(result, Err(CommitError::Failed { .. })));
            }
            assert!(script.groups.try_recv().is_err());
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            assert!(matches!(runtime.block_on(script.db.failed()), CommitError::Failed { .. }));
            assert!(matches!(script.db.clone().close(), Err(CommitError::Failed { .. })));
            // The folder stays locked, so that nobody else writes to what this process still shows.
            assert!(matches!(
                Folder::lock(script.folder.path(), EngineKind::Redb),
                Err(OpenError::Locked { .. })
            ));
        }
    }

    #[test]
    fn a_closure_that_fails_or_panics_changes_nothing() {
        let script = script();
        let error = script.db.update::<(), CommitError>(|txn| {
            txn.put(b"refused", b"");
            Err(CommitError::TooLarge { key_size: 0, value_size: 0 })
        });
        assert!(matches!(error, Err(CommitError::TooLarge { .. })));
        let panicked = script.run(|db| {
            std::panic::catch_unwind(|| {
                db.update::<(), CommitError>(|txn| {
                    txn.put(b"panicked", b"");
                    panic!("in the closure")
                })
            })
            .is_err()
        });
        assert!(result(&panicked));
        let error = script.db.update::<_, CommitError>(|txn| {
            txn.put(b"small", b"");
            txn.put(&[0; crate::MAX_KEY_SIZE + 1], b"");
            Ok(())
        });
        assert_eq!(error.unwrap_err().code(), ErrorCode::InvalidArgument);
        assert_eq!(script.db.view().scan(b"").count(), 0);
        let next = script.put("next");
        assert_eq!(script.group(), ["next"]);
        script.orders.send(Order::Accept).unwrap();
        result(&next).unwrap();
    }

    #[test]
    fn closing_writes_what_is_queued_and_refuses_the_rest() {
        let script = script();
        script.db.update_ordered(set(b"last", b"")).unwrap();
        let view = script.db.view();
        drop(script.orders);
        script.db.clone().close().unwrap();
        assert_eq!(script.groups.recv().unwrap()[0].key, "last");
        let refused = script.db.update(set(b"more", b""));
        assert!(matches!(refused, Err(CommitError::Closed { .. })));
        assert!(matches!(script.db.verify(), Err(VerifyError::Unusable(CommitError::Closed { .. }))));
        assert!(view.get(b"last").is_some());
    }

    #[tokio::test]
    async fn an_asynchronous_caller_waits_without_blocking_and_may_go_away() {
        let script = script();
        let mut update = Box::pin(script.db.update_async(set(b"a", b"")));
        let waited = tokio::time::timeout(Duration::from_millis(20), &mut update).await;
        assert!(waited.is_err());
        assert_eq!(script.group(), ["a"]);
        let gone = script.db.update_async(set(b"b", b""));
        assert!(tokio::time::timeout(Duration::from_millis(20), gone).await.is_err());
        script.orders.send(Order::Accept).unwrap();
        update.await.unwrap();
        assert_eq!(script.group(), ["b"]);
        script.orders.send(Order::Accept).unwrap();
        script.db.sync_async().await.unwrap();
    }
}
