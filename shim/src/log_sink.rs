//! The log that the outputs of a process share: a queue, and the one helper at a time that writes to the file.
//!
//! ```text
//!            push            helper           has written
//!   Idle ──────────► Writing ────────────────────────────► Idle, or Writing what has come meanwhile
//!                      │   ▲
//!        was refused   ▼   │ after a second, or when asked to hurry
//!                    Refused
//! ```
//! While the file takes bytes, a process that writes faster than the disk waits for it. As soon as a write takes longer
//! than [`PATIENCE`] or is refused, the process goes on, and the queue drops its oldest lines when it is full. With the
//! mode `blocking` the process waits in any case.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::executor::race;
use crate::log;
use crate::log_file::{Format, LogFile};
use crate::offload;
use crate::reactor::sleep;
use crate::spool::{LIMIT, Spool};
use crate::stdio::saved;
use crate::sync::Condition;

/// The time that a log or logger that takes nothing makes its process wait, once, and only when the queue is full: a busy
/// disk may well take this long, and does not have output dropped.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);
/// The time between two attempts to write what was refused.
const RETRY: Duration = Duration::from_secs(1);
/// The most bytes that a helper is given at once. Larger than any line, see [`crate::spool`].
const BATCH: usize = 128 * 1024;
/// What must be free in the queue for another [`Log::push`].
const ROOM: u64 = 256 * 1024;

/// A log.
pub(crate) struct Log {
    /// `None` while the helper has it.
    file: RefCell<Option<LogFile>>,
    json: bool,
    blocking: bool,
    /// What the file did not take.
    refused: RefCell<Vec<u8>>,
    queue: RefCell<Spool>,
    /// Since when the helper is at it.
    writing: Cell<Option<Instant>>,
    failing: Cell<bool>,
    attempts: Cell<u64>,
    hurry: Cell<bool>,
    delayed: Cell<u64>,
    changed: Condition,
}

impl Log {
    /// A log in this file, whose queue is in `spool`.
    pub(crate) fn new(file: LogFile, spool: Spool, blocking: bool) -> Log {
        Log {
            json: file.format() != Format::Plain,
            file: RefCell::new(Some(file)),
            blocking,
            refused: RefCell::default(),
            queue: RefCell::new(spool),
            writing: Cell::new(None),
            failing: Cell::new(false),
            attempts: Cell::new(0),
            hurry: Cell::new(false),
            delayed: Cell::new(0),
            changed: Condition::default(),
        }
    }

    /// True if it holds lines of JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Takes bytes, at most 256 KiB; of a json log whole lines.
    pub(crate) fn push(&self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if self.writing.get().is_some() || self.failing.get() {
            self.delayed.set(self.delayed.get() + bytes.len() as u64);
        }
        self.queue.borrow_mut().append(bytes);
        self.changed.changed();
    }

    /// Waits until [`Log::push`] may be called.
    pub(crate) async fn room(&self) {
        loop {
            let full = self.queue.borrow().len() + ROOM > LIMIT;
            if !full || !self.blocking && self.failing.get() {
                return;
            }
            let left = match self.writing.get() {
                Some(since) if !self.blocking => PATIENCE.saturating_sub(since.elapsed()),
                _ => RETRY,
            };
            if left.is_zero() {
                return;
            }
            let attempts = self.attempts.get();
            race(self.changed.until(|| self.attempts.get() != attempts), sleep(left)).await;
        }
    }

    /// Waits until everything is in the file.
    pub(crate) async fn flushed(&self) {
        self.changed.until(|| self.is_flushed()).await;
    }

    fn is_flushed(&self) -> bool {
        self.writing.get().is_none() && self.queue.borrow().is_empty() && self.refused.borrow().is_empty()
    }

    /// Has what was refused tried again at once. Returns what [`Log::is_hopeless`] asks for.
    pub(crate) fn hurry(&self) -> u64 {
        self.hurry.set(true);
        self.changed.changed();
        self.attempts.get()
    }

    /// True if the file has refused since [`Log::hurry`].
    pub(crate) fn is_hopeless(&self, attempts: u64) -> bool {
        self.failing.get() && self.attempts.get() > attempts
    }

    /// Waits for the next attempt to write to come to its end.
    pub(crate) async fn attempted(&self) {
        let attempts = self.attempts.get();
        self.changed.until(|| self.attempts.get() != attempts).await;
    }

    /// The bytes that came while the file was busy, and those that were dropped.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.delayed.get(), self.queue.borrow().dropped())
    }

    /// Writes for ever.
    pub(crate) async fn run(&self) {
        loop {
            let nothing = || self.queue.borrow().is_empty() && self.refused.borrow().is_empty();
            self.changed.until(|| !nothing()).await;
            if self.failing.get() {
                race(sleep(RETRY), self.changed.until(|| self.hurry.replace(false))).await;
            }
            self.write().await;
        }
    }

    async fn write(&self) {
        // Nothing is taken before a helper may begin: until then the queue is the state.
        let admitted = offload::admitted().await;
        let Some(mut file) = self.file.take() else { return };
        let batch = self.next_batch();
        self.writing.set(Some(Instant::now()));
        let work = move || {
            let written = file.write(&batch);
            (file, batch, written)
        };
        let (file, mut batch, written) = offload::begin(admitted, work).done().await;
        self.file.replace(Some(file));
        self.writing.set(None);
        batch.drain(..written.count);
        *self.refused.borrow_mut() = batch;
        self.attempts.set(self.attempts.get() + 1);
        match written.error {
            Some(error) => {
                if !self.failing.replace(true) {
                    log::error(format_args!("log does not take output, it waits meanwhile: {error}"));
                }
            }
            None => {
                if self.failing.replace(false) {
                    let dropped = self.counts().1;
                    log::warn(format_args!(
                        "log takes output again, {dropped} bytes of it were dropped so far"
                    ));
                }
            }
        }
        self.changed.changed();
    }

    fn next_batch(&self) -> Vec<u8> {
        let refused = self.refused.take();
        if !refused.is_empty() {
            return refused;
        }
        let mut queue = self.queue.borrow_mut();
        let mut batch = vec![0; BATCH.min(usize::try_from(queue.len()).unwrap_or(BATCH))];
        let mut count = match queue.front(&mut batch) {
            Ok(count) => count,
            Err(error) => {
                log::error(format_args!("output that was kept cannot be read, it is dropped: {error}"));
                queue.clear();
                0
            }
        };
        if self.json {
            let end = batch[..count].iter().rposition(|byte| *byte == b'\n');
            count = end.map_or(count, |index| index + 1);
        }
        batch.truncate(count);
        queue.consume(count as u64);
        batch
    }

    /// Describes it. No helper may have the file.
    pub(crate) fn save(&self, fds: &mut dyn FnMut(BorrowedFd<'_>) -> u32) -> saved::Log {
        let mut saved = self.file.borrow().as_ref().map(|file| file.save(fds)).unwrap_or_default();
        saved.refused = self.refused.borrow().clone();
        saved.spool = Some(self.queue.borrow().save(fds));
        saved.blocking = self.blocking;
        saved.delayed = self.delayed.get();
        saved
    }

    /// What [`Log::save`] described.
    ///
    /// # Errors
    /// A descriptor is missing.
    pub(crate) fn restore(
        saved: saved::Log,
        fds: &mut dyn FnMut(u32) -> io::Result<OwnedFd>,
    ) -> io::Result<Log> {
        let file = LogFile::restore(&saved, fds)?;
        let spool = Spool::restore(saved.spool.unwrap_or_default(), fds)?;
        let log = Log::new(file, spool, saved.blocking);
        *log.refused.borrow_mut() = saved.refused;
        log.delayed.set(saved.delayed);
        Ok(log)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::{run, spawn};
    use std::path::Path;
    use std::rc::Rc;

    #[test]
    fn what_is_pushed_is_in_the_file_when_it_is_flushed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (to, spool) = (path.clone(), Spool::new(folder.path()));
        run(async move {
            let log = Rc::new(Log::new(LogFile::open(&to, Format::Plain).unwrap(), spool, false));
            let writer = log.clone();
            spawn(async move { writer.run().await });
            for number in 0..100_000 {
                log.room().await;
                log.push(format!("{number}\n").as_bytes());
            }
            log.flushed().await;
            assert_eq!(log.counts().1, 0, "a disk that works is waited for");
        });
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.lines().enumerate().all(|(number, line)| line == number.to_string()));
        assert_eq!(text.lines().count(), 100_000);
    }

    #[test]
    fn a_log_that_refuses_delays_nobody_unless_it_is_to() {
        let folder = tempfile::tempdir().unwrap();
        let log = |blocking| {
            let file = LogFile::open_existing(Path::new("/dev/full")).unwrap();
            Rc::new(Log::new(file, Spool::new(folder.path()), blocking))
        };
        let (free, blocking) = (log(false), log(true));
        run(async move {
            for log in [&free, &blocking] {
                let writer = log.clone();
                spawn(async move { writer.run().await });
            }
            for _ in 0..40 {
                free.room().await;
                free.push(&[b'x'; 100_000]);
            }
            assert!(free.counts().1 > 2_000_000);
            let attempts = free.hurry();
            free.changed.until(|| free.is_hopeless(attempts)).await;
            let push = async {
                loop {
                    blocking.room().await;
                    blocking.push(&[b'x'; 100_000]);
                }
            };
            race(push, sleep(Duration::from_millis(300))).await;
            assert_eq!(blocking.counts().1, 0);
        });
    }
}
