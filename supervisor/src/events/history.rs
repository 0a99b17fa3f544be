//! The history: every event that was published, on disk, for a while.
//!
//! ```text
//!            append            one write for all that wait          once a second
//! publisher ────────▶ queue ──────────────────────────────▶ log ───────────────────▶ synced
//!                                       │
//!                                       ▼ settled: whoever reads or waits goes on
//! ```
//! A publisher only puts the event into a queue; a thread of its own writes, because even a write into the page cache may
//! sleep for long on a busy disk. A shim is answered when its event is written ([`History::recorded`]): it survives
//! the death of the daemon then. The sync comes up to a second later and is not waited for. A power cut takes the
//! containers along, and with them at most the last second of what is told here.
//!
//! A disk that is full, broken or stuck stops nobody. Events stay in the queue, where readers find them, and are written
//! when that works again; when the queue is full too, events are lost to the history, and it says how many.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use davit_history::{Entry, HistoryError, Kind, Limits, Log, Reader, Start, segment};
use davit_model::error::chain;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{Envelope, record};
use crate::lane::Lane;

/// The end of the history that is looked through at start: more than [`RECENT`](super::RECENT) events of shims.
const RECENT_BYTES: u64 = 4 << 20;

/// The bytes that may wait to be written: some 80,000 events.
const QUEUE_BYTES: usize = 16 << 20;

/// The bytes that are written at once, about.
const BATCH_BYTES: usize = 1 << 20;

/// From the first write that is not synced to the sync.
const SYNC_AFTER: Duration = Duration::from_secs(1);

/// From a failed write to the next try.
const RETRY: Duration = Duration::from_secs(1);

/// How long a shim waits for a write before it is answered without one.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often an idle history looks whether something is too old.
const EXPIRE_EVERY: Duration = Duration::from_secs(3600);

/// The history. Clones are the same.
#[derive(Clone)]
pub struct History {
    shared: Arc<Shared>,
}

struct Shared {
    queue: Mutex<Queue>,
    /// Something is in the queue, or it is the end.
    work: Condvar,
    /// The cursor up to which every event is written, or kept in the queue because it cannot be.
    settled: watch::Sender<u64>,
    readers: Box<dyn Fn(Start) -> Reader + Send + Sync>,
    /// What earlier daemons have kept last.
    recent: Mutex<Option<Reader>>,
    lane: Lane,
    writer: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Queue {
    next: u64,
    /// What is not written, oldest first.
    pending: VecDeque<Entry>,
    bytes: usize,
    /// So many of `pending`, from the front, are just being written.
    in_flight: usize,
    /// Events since the last of `pending` that found no place there.
    lost: u64,
    /// Writing fails or takes too long: nobody waits for it.
    failing: bool,
    stopping: bool,
}

impl History {
    /// Opens the history in `folder`. Blocks.
    ///
    /// # Errors
    /// The folder can be neither made nor read.
    pub fn open(folder: &Path, limits: Limits) -> Result<History, HistoryError> {
        let log = Log::open(folder, limits)?;
        let recent = Mutex::new(Some(log.recent(RECENT_BYTES)));
        let next = log.next_cursor();
        let queue = Queue { next, ..Queue::default() };
        let shared = Arc::new(Shared {
            queue: Mutex::new(queue),
            work: Condvar::new(),
            settled: watch::Sender::new(next - 1),
            readers: Box::new(log.readers()),
            recent,
            lane: Lane::history(),
            writer: Mutex::new(None),
        });
        let log = Arc::new(Mutex::new(log));
        let (written, to_sync) = sync_channel(1);
        let syncing = log.clone();
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(work);
            spawned.map_err(|source| HistoryError::Io {
                operation: "start a thread for",
                path: folder.to_owned(),
                source,
            })
        };
        spawn("history-sync", Box::new(move || sync(&syncing, &to_sync)))?;
        let writing = shared.clone();
        let writer = spawn("history", Box::new(move || writing.write(&log, &written)))?;
        *shared.writer.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
        Ok(History { shared })
    }

    /// Gives the last events of earlier daemons, oldest first; the second time none. Blocks.
    pub(super) fn for_each_earlier(&self, mut each: impl FnMut(Envelope)) {
        let Some(mut reader) = self.shared.recent.lock().unwrap_or_else(PoisonError::into_inner).take()
        else {
            return;
        };
        loop {
            // Piece by piece: what is allocated all at once stays with the daemon for ever.
            let entries = reader.next_entries();
            if entries.is_empty() {
                return;
            }
            for entry in entries {
                if let Kind::Event(body) = entry.kind {
                    record::decode(&body).map(&mut each);
                }
            }
        }
    }

    /// Puts an event into the history, behind all before it. Never waits for the disk.
    pub(super) fn append(&self, envelope: &Envelope) {
        let body = record::encode(envelope);
        let mut queue = self.shared.queue();
        queue.append(envelope.timestamp, body);
        if queue.failing {
            self.shared.settle(queue.next - 1);
        }
        drop(queue);
        self.shared.work.notify_all();
    }

    /// Returns when every event that was appended before the call is written, and so survives the daemon; or when that
    /// fails or takes too long.
    pub async fn recorded(&self) {
        let (cursor, failing, stopping) = {
            let queue = self.shared.queue();
            (queue.next - 1, queue.failing, queue.stopping)
        };
        if stopping {
            // What is not answered now is told again to the next daemon.
            return std::future::pending().await;
        }
        if failing {
            return;
        }
        let mut settled = self.shared.settled.subscribe();
        let written = settled.wait_for(|settled| *settled >= cursor);
        if tokio::time::timeout(PATIENCE, written).await.is_err() {
            warn!("writing the history takes too long; it is not waited for any more");
            let mut queue = self.shared.queue();
            queue.failing = true;
            self.shared.settle(queue.next - 1);
        }
    }

    /// Writes and syncs what is left. What is published later is lost to the history. Blocks.
    pub fn close(&self) {
        self.shared.queue().stopping = true;
        self.shared.work.notify_all();
        let writer = self.shared.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if writer.is_some_and(|writer| writer.join().is_err()) {
            warn!("the writer of the history panicked");
        }
    }

    /// The cursor of the newest event.
    pub(super) fn newest(&self) -> u64 {
        self.shared.queue().next - 1
    }

    /// Tells when there is more to read.
    pub(super) fn settled(&self) -> watch::Receiver<u64> {
        self.shared.settled.subscribe()
    }

    pub(super) fn reader(&self, start: Start) -> Reader {
        (self.shared.readers)(start)
    }

    /// The lane for what reads.
    pub(super) fn lane(&self) -> &Lane {
        &self.shared.lane
    }

    /// What is not written and comes after `after`, up to what is settled.
    pub(super) fn unwritten(&self, after: u64) -> Vec<Entry> {
        let queue = self.shared.queue();
        let settled = *self.shared.settled.borrow();
        let wanted = queue.pending.iter().filter(|entry| entry.cursor > after && entry.cursor <= settled);
        wanted.cloned().collect()
    }
}

impl Queue {
    fn append(&mut self, time: SystemTime, body: Vec<u8>) {
        if body.len() > segment::MAX_BODY || self.bytes + body.len() > QUEUE_BYTES {
            self.lost += 1;
            return;
        }
        self.note_gap();
        self.push(time, Kind::Event(body));
    }

    /// Puts what was lost into the queue, as a gap.
    fn note_gap(&mut self) {
        if self.lost == 0 {
            return;
        }
        let lost = std::mem::take(&mut self.lost);
        if self.pending.len() > self.in_flight
            && let Some(Entry { kind: Kind::Gap(before), .. }) = self.pending.back_mut()
        {
            *before += lost;
        } else {
            self.push(SystemTime::now(), Kind::Gap(lost));
        }
    }

    fn push(&mut self, time: SystemTime, kind: Kind) {
        let entry = Entry { cursor: self.next, time, kind };
        self.bytes += length(&entry);
        self.pending.push_back(entry);
        self.next += 1;
    }

    /// What to write next.
    fn batch(&mut self) -> Vec<Entry> {
        let mut bytes = 0;
        let small = self.pending.iter().take_while(|entry| {
            let before = bytes;
            bytes += length(entry);
            before < BATCH_BYTES
        });
        let batch: Vec<Entry> = small.cloned().collect();
        self.in_flight = batch.len();
        batch
    }

    /// So many of the batch were written, and no more are tried.
    fn written(&mut self, count: usize) {
        self.in_flight = 0;
        for entry in self.pending.drain(..count) {
            self.bytes -= length(&entry);
        }
    }
}

/// The memory that an entry takes.
fn length(entry: &Entry) -> usize {
    let body = match &entry.kind {
        Kind::Event(body) => body.len(),
        Kind::Gap(_) => 0,
    };
    body + size_of::<Entry>()
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // A panic while the lock is held cannot leave the queue half changed.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle(&self, cursor: u64) {
        self.settled.send_if_modified(|settled| {
            let more = cursor > *settled;
            *settled = cursor.max(*settled);
            more
        });
    }

    /// The thread that writes, until the end.
    fn write(&self, log: &Mutex<Log>, written: &SyncSender<()>) {
        while let Some(batch) = self.next_batch() {
            if batch.is_empty() {
                lock(log).expire(SystemTime::now());
                continue;
            }
            let appended = lock(log).append(&batch);
            let mut queue = self.queue();
            match appended {
                Ok(count) => {
                    queue.written(count);
                    if std::mem::take(&mut queue.failing) {
                        info!("the history is written again");
                    }
                    self.settle(batch[..count].last().map_or(0, |entry| entry.cursor));
                    // It is full when the sync that it stands for has not begun.
                    let _ = written.try_send(());
                }
                Err(error) => {
                    queue.written(0);
                    if !std::mem::replace(&mut queue.failing, true) {
                        warn!(error = chain(&error), "cannot write the history; trying again");
                    }
                    self.settle(queue.next - 1);
                    if !self.pause(queue) {
                        break;
                    }
                }
            }
        }
        if let Err(error) = lock(log).take_unsynced().sync() {
            warn!(%error, "cannot sync the history");
        }
    }

    /// Waits for something to write; `None` at the end, and nothing when there has been nothing for long.
    fn next_batch(&self) -> Option<Vec<Entry>> {
        let mut queue = self.queue();
        loop {
            queue.note_gap();
            if !queue.pending.is_empty() {
                return Some(queue.batch());
            }
            if queue.stopping {
                return None;
            }
            let waited = self.work.wait_timeout(queue, EXPIRE_EVERY);
            let (again, waited) = waited.unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() {
                return Some(Vec::new());
            }
            queue = again;
        }
    }

    /// Waits before the next try; false at the end.
    fn pause(&self, mut queue: MutexGuard<'_, Queue>) -> bool {
        let deadline = Instant::now() + RETRY;
        while !queue.stopping {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            queue = self.work.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }
}

/// The thread that syncs. It ends with the one that writes.
fn sync(log: &Mutex<Log>, written: &Receiver<()>) {
    while written.recv().is_ok() {
        std::thread::sleep(SYNC_AFTER);
        let unsynced = lock(log).take_unsynced();
        if let Err(error) = unsynced.sync() {
            warn!(%error, "cannot sync the history");
        }
    }
}

fn lock(log: &Mutex<Log>) -> MutexGuard<'_, Log> {
    // The log keeps its own order before every call that may fail.
    log.lock().unwrap_or_else(PoisonError::into_inner)
}
