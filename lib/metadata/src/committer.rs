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

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracing::error;

use crate::engine::{Engine, EngineError, Write, guarded};
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
        queue.awaited |= reply.is_some();
        queue.oldest.get_or_insert_with(Instant::now);
        queue.bytes += writes.iter().map(Write::size).sum::<usize>();
        let accepted = queue.bytes <= ORDERED_LIMIT;
        queue.jobs.push_back(Job::Change { writes, after, reply });
        self.shared.changed.notify_one();
        accepted
    }
}

/// The committer's thread: runs until the database is closed or its engine fails.
pub(crate) fn run(shared: &Arc<Shared>, engine: Box<dyn Engine>, durable: Index) {
    // The engine's panics are caught where it is called. One of our own must not leave callers waiting either.
    let ended = guarded(|| {
        commit_groups(shared, engine, durable);
        Ok(())
    });
    if let Err(source) = ended {
        let failure = CommitError::Failed { path: shared.path.clone(), source: Arc::new(source) };
        shared.fail(&failure, shared.visible(), Vec::new());
    }
}

fn commit_groups(shared: &Shared, mut engine: Box<dyn Engine>, mut durable: Index) {
    while let Some(mut group) = shared.next_group() {
        // A verification sees what was changed before it, and not what was changed after it.
        while !group.is_empty() {
            let end = group.iter().position(|job| matches!(job, Job::Verify { .. })).unwrap_or(group.len());
            let rest = group.split_off(end);
            if let Err(source) = commit(&mut *engine, &group) {
                error!(path = %shared.path.display(), error = %davit_model::error::chain(&source),
                    "metadata database failed, refusing all further changes");
                let failure = CommitError::Failed { path: shared.path.clone(), source: Arc::new(source) };
                group.extend(rest);
                shared.fail(&failure, durable, group);
                // What an engine does after an error must not take the process along.
                let _ = guarded(move || engine.close());
                return;
            }
            for job in group {
                if let Job::Change { after, reply, .. } = job {
                    durable = after;
                    if let Some(reply) = reply {
                        reply(Ok(()));
                    }
                }
            }
            group = rest;
            if !group.is_empty()
                && let Job::Verify { reply } = group.remove(0)
            {
                reply(verify(shared, &mut *engine, &durable));
            }
        }
    }
    if let Err(error) = guarded(move || engine.close()) {
        error!(path = %shared.path.display(), error = %davit_model::error::chain(&error),
            "metadata database did not close cleanly");
    }
}

fn commit(engine: &mut dyn Engine, group: &[Job]) -> Result<(), EngineError> {
    let mut writes = Vec::new();
    for job in group {
        if let Job::Change { writes: more, .. } = job {
            writes.extend_from_slice(more);
        }
    }
    if writes.is_empty() {
        return Ok(());
    }
    guarded(|| engine.commit(&writes))
}

fn verify(shared: &Shared, engine: &mut dyn Engine, durable: &Index) -> Result<(), VerifyError> {
    let failed = |source| VerifyError::Engine { path: shared.path.clone(), source };
    guarded(|| engine.check()).map_err(failed)?;
    let mut stored: HashMap<Bytes, Bytes> = HashMap::new();
    guarded(|| {
        engine.load(&mut |key, value| {
            stored.insert(key, value);
        })
    })
    .map_err(failed)?;
    let mut different = 0;
    for (key, value) in durable.iter() {
        if stored.remove(key).as_ref() != Some(value) {
            different += 1;
        }
    }
    different += stored.len();
    if different > 0 {
        return Err(VerifyError::Different { path: shared.path.clone(), different, records: durable.size() });
    }
    Ok(())
}

/// No lock of this module is held over code that may panic halfway through a change, except for the closures,
/// and those work on a copy.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
