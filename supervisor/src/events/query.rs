//! Reading the history, and going on with what happens.

use std::time::SystemTime;

use davit_history::{Entry, Kind, Start};
use davit_model::Filter;
use tokio::sync::mpsc;

use super::history::History;
use super::{Asked, Envelope, Reading, record};

/// The entries that wait for a slow reader, beside those of one piece of the log.
const AHEAD: usize = 16;

/// Where to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// With what happened at a time or later.
    Time(SystemTime),
    /// With what comes after an event; zero is before all.
    Cursor(u64),
    /// With what happens after the call.
    Now,
}

/// What is wanted.
pub struct Query {
    /// Where to begin.
    pub since: Since,
    /// Only what happened before.
    pub until: Option<SystemTime>,
    /// What must match; a gap always does.
    pub filter: Filter,
    /// The most that is given, if that is bounded.
    pub limit: Option<u64>,
    /// Whether to go on for ever.
    pub follow: bool,
}

/// What is in one place of the history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// An event.
    Event(Envelope),
    /// Events are missing.
    Gap {
        /// How many; zero if that is not known.
        lost: u64,
        /// When that was noticed.
        time: SystemTime,
    },
}

impl History {
    /// Gives what is wanted with its cursors, in their order, each once, to whoever reads the receiver; dropping it ends
    /// the query. A slow reader slows nobody.
    pub async fn query(&self, reading: Reading, query: Query) -> mpsc::Receiver<(u64, Found)> {
        // Everything that happened before the call is there to be read.
        self.recorded().await;
        let (out, receiver) = mpsc::channel(AHEAD);
        let after = match query.since {
            Since::Time(_) => 0,
            Since::Cursor(cursor) => cursor,
            Since::Now => self.newest(),
        };
        let run = Run { history: self.clone(), reading, left: query.limit, query, after, out };
        tokio::spawn(run.run());
        receiver
    }
}

struct Run {
    history: History,
    reading: Reading,
    query: Query,
    /// The last cursor that was looked at.
    after: u64,
    left: Option<u64>,
    out: mpsc::Sender<(u64, Found)>,
}

/// Nobody wants more.
struct Over;

impl Run {
    async fn run(mut self) {
        // Whoever is served is never told why it ends: either it has all, or it is gone.
        let _ = self.serve().await;
    }

    async fn serve(&mut self) -> Result<(), Over> {
        let mut settled = self.history.settled();
        let mut reader = self.history.reader(match self.query.since {
            Since::Time(time) => Start::Since(time),
            Since::Cursor(_) | Since::Now => Start::After(self.after),
        });
        loop {
            settled.borrow_and_update();
            // Taken first: what is written while the log is read is then in both, and never in neither.
            let unwritten = self.history.unwritten(self.after);
            loop {
                let read = move || {
                    let entries = reader.next_entries();
                    (reader, entries)
                };
                let (again, entries) = self.history.lane().run(read).await.map_err(|_| Over)?;
                reader = again;
                if entries.is_empty() {
                    break;
                }
                self.give(entries).await?;
            }
            self.give(unwritten).await?;
            if !self.query.follow {
                return Ok(());
            }
            // Both arms wait for a state that stays until it is seen.
            tokio::select! {
                changed = settled.changed() => changed.map_err(|_| Over)?,
                () = self.out.closed() => return Err(Over),
            }
        }
    }

    async fn give(&mut self, entries: Vec<Entry>) -> Result<(), Over> {
        for entry in entries {
            // The reader's own gaps have the cursor of what came before them.
            if entry.cursor <= self.after && entry.kind != Kind::Gap(0) {
                continue;
            }
            let cursor = entry.cursor.max(self.after);
            self.after = cursor;
            let Some(found) = self.wanted(entry) else { continue };
            self.out.send((cursor, found)).await.map_err(|_| Over)?;
            self.left = self.left.map(|left| left - 1);
            if self.left == Some(0) {
                return Err(Over);
            }
        }
        Ok(())
    }

    fn wanted(&self, entry: Entry) -> Option<Found> {
        let too_early = matches!(self.query.since, Since::Time(since) if entry.time < since);
        if too_early || self.query.until.is_some_and(|until| entry.time >= until) {
            return None;
        }
        match entry.kind {
            Kind::Gap(lost) => Some(Found::Gap { lost, time: entry.time }),
            Kind::Event(body) => {
                let envelope = record::decode(&body)?;
                let filter = &self.query.filter;
                let wanted = filter.matches_everything() || {
                    let fields = (self.reading.fields)(&envelope.event);
                    filter.matches(&Asked { envelope: &envelope, fields: &fields })
                };
                wanted.then_some(Found::Event(envelope))
            }
        }
    }
}
