//! The queue of changes and the one thread that makes them durable.
//!
//! ```text
//!            somebody waits, or 100 ms have passed
//!   waiting ───────────────────────────────────────▶ committing ──▶ waiting
//!      │                                                  │
//!      │ close                                            │ the engine fails
//!      ▼                                                  ▼
//!   closed                                             failed (no change is accepted any more)
//! ```

use std::collections::{BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;
use tracing::error;

use crate::engine::{Engine, EngineError, Summary, Write, guarded, read};
use crate::error::{CommitError, VerifyError};
use crate::index::Index;

/// How long a change that nobody waits for may stay in memory only. Long enough for the change that follows in
/// the same operation to carry it along, and well below the half second that is promised.
const ORDERED_DELAY: Duration = Duration::from_millis(100);

/// How many bytes of changes that nobody waits for may queue up before they are waited for after all.
const ORDERED_LIMIT: usize = 8 << 20;

/// Called once, from the committer's thread, when a change is durable or has failed. It must not block.
pub(crate) type Reply = Box<dyn FnOnce(Result<(), CommitError>) + Send>;

/// What both sides share: the callers of a database, and its committer.
pub(crate) struct Shared {
    pub(crate) path: PathBuf,
    /// Held while a closure runs and its change is queued: the order of changes is the order of the queue.
    writer: Mutex<()>,
    /// What views and closures see. Held for the time of a clone only.
    visible: Mutex<Index>,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// True once the engine has failed.
    failed: watch::Sender<bool>,
}

struct Queue {
    jobs: VecDeque<Job>,
    state: State,
    /// A group has been taken from the queue and is not durable yet.
    committing: bool,
    /// When the oldest change arrived that is in the queue.
    oldest: Option<Instant>,
    /// Somebody waits for what is in the queue.
    awaited: bool,
    /// The size of the writes in the queue.
    bytes: usize,
}

enum State {
    Open,
    Closed,
    Failed(CommitError),
}

enum Job {
    Change { writes: Vec<Write>, after: Index, reply: Option<Reply> },
    Verify { reply: Box<dyn FnOnce(Result<(), VerifyError>) + Send> },
}

/// The right to make the next change.
pub(crate) struct Turn<'a> {
    shared: &'a Shared,
    _writer: MutexGuard<'a, ()>,
}

impl Shared {
    pub(crate) fn new(path: PathBuf, index: Index) -> Shared {
        let queue = Queue {
            jobs: VecDeque::new(),
            state: State::Open,
            committing: false,
            oldest: None,
            awaited: false,
            bytes: 0,
        };
        Shared {
            path,
            writer: Mutex::new(()),
            visible: Mutex::new(index),
            queue: Mutex::new(queue),
            changed: Condvar::new(),
            failed: watch::Sender::new(false),
        }
    }

    pub(crate) fn visible(&self) -> Index {
        lock(&self.visible).clone()
    }

    /// Waits for changes before it, and fails if the database takes none any more.
    pub(crate) fn turn(&self) -> Result<Turn<'_>, CommitError> {
        let writer = lock(&self.writer);
        match &lock(&self.queue).state {
            State::Open => Ok(Turn { shared: self, _writer: writer }),
            State::Closed => Err(CommitError::Closed { path: self.path.clone() }),
            State::Failed(error) => Err(error.clone()),
        }
    }

    /// The first failure of the engine, if there was one.
    pub(crate) fn failure(&self) -> Option<CommitError> {
        match &lock(&self.queue).state {
            State::Failed(error) => Some(error.clone()),
            State::Open | State::Closed => None,
        }
    }

    /// Waits for the first failure of the engine; for ever, if it never fails.
    pub(crate) async fn failed(&self) -> CommitError {
        let mut failed = self.failed.subscribe();
        // The sender lives in `self`, so the wait ends with a failure alone.
        let _ = failed.wait_for(|failed| *failed).await;
        self.failure().unwrap_or_else(|| CommitError::Closed { path: self.path.clone() })
    }

    /// Asks the committer to compare the disk with memory.
    pub(crate) fn verify(
        &self,
        reply: Box<dyn FnOnce(Result<(), VerifyError>) + Send>,
    ) -> Result<(), CommitError> {
        let _turn = self.turn()?;
        let mut queue = lock(&self.queue);
        queue.jobs.push_back(Job::Verify { reply });
        queue.awaited = true;
        self.changed.notify_one();
        Ok(())
    }

    /// Takes no change any more; the committer finishes what is queued and ends.
    pub(crate) fn close(&self) {
        let _writer = lock(&self.writer);
        let mut queue = lock(&self.queue);
        if let State::Open = queue.state {
            queue.state = State::Closed;
        }
        self.changed.notify_one();
    }

    /// Refuses all changes from now on, goes back to what is durable, and tells everybody who waits.
    fn fail(&self, error: &CommitError, durable: Index, group: Vec<Job>) {
        // With the right to write held, no closure can publish what it built on the state that is given up.
        let _writer = lock(&self.writer);
        *lock(&self.visible) = durable;
        let mut queue = lock(&self.queue);
        queue.state = State::Failed(error.clone());
        let rest = std::mem::take(&mut queue.jobs);
        drop(queue);
        self.failed.send_replace(true);
        for job in group.into_iter().chain(rest) {
            match job {
                Job::Change { reply: Some(reply), .. } => reply(Err(error.clone())),
                Job::Change { reply: None, .. } => {}
                Job::Verify { reply } => reply(Err(VerifyError::Unusable(error.clone()))),
            }
        }
    }

    /// The next group, when there is one that should be made durable now; `None` when all is done.
    fn next_group(&self) -> Option<Vec<Job>> {
        let mut queue = lock(&self.queue);
        queue.committing = false;
        loop {
            let open = matches!(queue.state, State::Open);
            let age = queue.oldest.map(|oldest| oldest.elapsed());
            if queue.awaited
                || (!open && !queue.jobs.is_empty())
                || age.is_some_and(|age| age >= ORDERED_DELAY)
            {
                queue.committing = true;
                queue.awaited = false;
                queue.oldest = None;
                queue.bytes = 0;
                return Some(queue.jobs.drain(..).collect());
            }
            if !open {
                return None;
            }
            queue = match age {
                None => self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(age) => {
                    let waited = self.changed.wait_timeout(queue, ORDERED_DELAY.saturating_sub(age));
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl Turn<'_> {
    /// Makes a change visible and queues it. Without a reply it may wait for the next change that has one;
    /// returns false if there is so much of that kind that the caller should wait until it is written.
    ///
    /// A reply to a change that writes nothing comes when everything that it saw is durable.
    pub(crate) fn finish(self, writes: Vec<Write>, after: Index, reply: Option<Reply>) -> bool {
        let mut queue = lock(&self.shared.queue);
        if writes.is_empty() {
            let Some(reply) = reply else { return true };
            if queue.jobs.is_empty() && !queue.committing {
                drop(queue);
                reply(Ok(()));
                return true;
            }
            queue.jobs.push_back(Job::Change { writes, after, reply: Some(reply) });
            queue.awaited = true;
            self.shared.changed.notify_one();
            return true;
        }
        *lock(&self.shared.visible) = after.clone();
        // The committer is woken to commit, or to start waiting for the delay to pass.
        if reply.is_some() || queue.oldest.is_none() {
            self.shared.changed.notify_one();
        }
        queue.awaited |= reply.is_some();
        queue.oldest.get_or_insert_with(Instant::now);
        queue.bytes += writes.iter().map(Write::size).sum::<usize>();
        let accepted = queue.bytes <= ORDERED_LIMIT;
        queue.jobs.push_back(Job::Change { writes, after, reply });
        accepted
    }
}

/// What the committer owns: the engine, and what is known to be in it.
pub(crate) struct Durable {
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) index: Index,
    pub(crate) summary: Summary,
}

/// The committer's thread: runs until the database is closed or its engine fails.
pub(crate) fn run(shared: &Arc<Shared>, durable: Durable) {
    // The engine's panics are caught where it is called. One of our own must not leave callers waiting either.
    let ended = guarded(|| {
        commit_groups(shared, durable);
        Ok(())
    });
    if let Err(source) = ended {
        let failure = CommitError::Failed { path: shared.path.clone(), source: Arc::new(source) };
        shared.fail(&failure, shared.visible(), Vec::new());
    }
}

fn commit_groups(shared: &Shared, mut durable: Durable) {
    while let Some(mut group) = shared.next_group() {
        // A verification sees what was changed before it, and not what was changed after it.
        while !group.is_empty() {
            let end = group.iter().position(|job| matches!(job, Job::Verify { .. })).unwrap_or(group.len());
            let rest = group.split_off(end);
            if let Err(source) = durable.commit(&group) {
                error!(path = %shared.path.display(), error = %davit_model::error::chain(&source),
                    "metadata database failed, refusing all further changes");
                let failure = CommitError::Failed { path: shared.path.clone(), source: Arc::new(source) };
                group.extend(rest);
                shared.fail(&failure, durable.index, group);
                // What an engine does after an error must not take the process along.
                let _ = guarded(move || durable.engine.close());
                return;
            }
            for job in group {
                if let Job::Change { reply: Some(reply), .. } = job {
                    reply(Ok(()));
                }
            }
            group = rest;
            if !group.is_empty()
                && let Job::Verify { reply } = group.remove(0)
            {
                reply(durable.verify(&shared.path));
            }
        }
    }
    if let Err(error) = guarded(move || durable.engine.close()) {
        error!(path = %shared.path.display(), error = %davit_model::error::chain(&error),
            "metadata database did not close cleanly");
    }
}

impl Durable {
    /// Has the engine take the difference that a group makes.
    fn commit(&mut self, group: &[Job]) -> Result<(), EngineError> {
        let mut keys = BTreeSet::new();
        let mut last = None;
        for job in group {
            if let Job::Change { writes, after, .. } = job {
                keys.extend(writes.iter().map(|write| &write.key));
                last = Some(after);
            }
        }
        let Some(after) = last else { return Ok(()) };
        let mut summary = self.summary;
        let mut writes = Vec::with_capacity(keys.len());
        for key in keys {
            let (before, value) = (self.index.get(key), after.get(key));
            if before != value {
                let write = Write { key: key.clone(), value: value.cloned() };
                summary.apply(before, &write);
                writes.push(write);
            }
        }
        if !writes.is_empty() {
            guarded(|| self.engine.commit(&writes, summary))?;
        }
        self.index = after.clone();
        self.summary = summary;
        Ok(())
    }

    fn verify(&mut self, path: &Path) -> Result<(), VerifyError> {
        let failed = |source| VerifyError::Engine { path: path.to_owned(), source };
        guarded(|| self.engine.check()).map_err(failed)?;
        // A stored record is right, or differs, or is one too many; what is left of the durable ones is missing.
        let (mut right, mut wrong) = (0, 0);
        let count = |key: Bytes, value: Bytes| match self.index.get(&key) {
            Some(wanted) if *wanted == value => right += 1,
            Some(_) => {}
            None => wrong += 1,
        };
        guarded(|| read(&mut *self.engine, count)).map_err(failed)?;
        let (records, different) = (self.index.size(), self.index.size() - right + wrong);
        if different > 0 {
            return Err(VerifyError::Different { path: path.to_owned(), different, records });
        }
        Ok(())
    }
}

/// No lock of this module is held over code that may panic halfway through a change, except for the closures,
/// and those work on a copy.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
