//! The reading end: from a cursor or a time on, piece by piece, while the log grows and forgets.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tracing::warn;

use crate::log::{Index, Segment};
use crate::segment::{self, Frame, HEADER};
use crate::{Entry, Kind};

/// The bytes that are read at once, unless an entry is longer.
const PIECE: u64 = 256 * 1024;

/// The time of a file may be that of the kernel's last tick, and so a little before what was written then.
const TICK: Duration = Duration::from_secs(1);

/// Where to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the first entry after the one with this cursor; zero is the oldest that is kept.
    After(u64),
    /// With an entry before which everything that was written is older. Not all that follow are younger.
    Since(SystemTime),
}

/// Reads a log in the order of its cursors, each entry once.
pub struct Reader {
    index: Arc<Index>,
    /// The last entry that was given.
    after: u64,
    since: Option<SystemTime>,
    /// The segments up to the one that begins with this cursor are done with.
    done: Option<u64>,
    current: Option<Current>,
}

struct Current {
    segment: Segment,
    file: File,
    offset: u64,
}

impl Reader {
    pub(crate) fn new(index: Arc<Index>, start: Start) -> Reader {
        let (after, since) = match start {
            // Clients say where they were, and no entry is behind the largest cursor.
            Start::After(cursor) => (cursor.min(segment::MAX_CURSOR), None),
            Start::Since(time) => (0, Some(time.checked_sub(TICK).unwrap_or(time))),
        };
        Reader { index, after, since, done: None, current: None }
    }

    /// The next entries; none when all that is written so far has been given. Blocks while it reads.
    ///
    /// Where entries are missing, because they were forgotten or are damaged, there is a gap of an unknown number, with the
    /// cursor of the last entry before it.
    pub fn next_entries(&mut self) -> Vec<Entry> {
        loop {
            let Some(mut current) = self.current.take() else {
                match self.begin() {
                    Begun::Nothing => return Vec::new(),
                    Begun::Segment => continue,
                    Begun::Gap(gap) => return vec![gap],
                }
            };
            self.look_again(&mut current);
            if current.offset < current.segment.length {
                match self.read(&mut current) {
                    Ok(entries) => {
                        self.current = Some(current);
                        if entries.is_empty() {
                            continue;
                        }
                        return entries;
                    }
                    Err(error) => {
                        let (path, at) = (current.segment.path.display(), current.offset);
                        warn!(segment = %path, at, %error, "the rest of a segment of the history is skipped");
                        self.done = Some(current.segment.first);
                        return vec![self.gap(current.segment.written_at)];
                    }
                }
            }
            let is_last = match self.index.segments().back() {
                Some(last) => last.first == current.segment.first,
                None => true,
            };
            if is_last {
                self.current = Some(current);
                return Vec::new();
            }
            self.done = Some(current.segment.first);
        }
    }

    /// Opens the segment to go on with.
    fn begin(&mut self) -> Begun {
        let (segment, forgotten) = {
            let segments = self.index.segments();
            // No entry that is wanted lies in a segment if the next one begins at it or before it.
            let passed =
                |place: usize| segments.get(place + 1).is_some_and(|next| next.first <= self.after + 1);
            let chosen = segments.iter().enumerate().find(|(place, segment)| {
                self.done.is_none_or(|done| segment.first > done)
                    && !passed(*place)
                    && self.since.is_none_or(|since| segment.written_at >= since)
            });
            let Some((place, segment)) = chosen else { return Begun::Nothing };
            // Entries between the last that was given and the oldest that is kept are gone.
            let forgotten = place == 0 && self.after > 0 && segment.first > self.after + 1;
            (segment.clone(), forgotten && self.done.is_none_or(|done| done < segment.first))
        };
        let file = match File::open(&segment.path) {
            Ok(file) => file,
            Err(error) => {
                // Forgotten just now, in most cases.
                if error.kind() != io::ErrorKind::NotFound {
                    warn!(segment = %segment.path.display(), %error, "a segment of the history is skipped");
                }
                self.done = Some(segment.first);
                return Begun::Gap(self.gap(segment.written_at));
            }
        };
        let written_at = segment.written_at;
        self.current = Some(Current { segment, file, offset: 0 });
        if forgotten { Begun::Gap(self.gap(written_at)) } else { Begun::Segment }
    }

    /// Learns how long the segment is by now. One that was forgotten stays readable to its end.
    fn look_again(&self, current: &mut Current) {
        let segments = self.index.segments();
        if let Some(known) = segments.iter().rev().find(|known| known.first == current.segment.first) {
            current.segment.length = known.length;
            current.segment.written_at = known.written_at;
        }
    }

    /// Reads a piece.
    fn read(&mut self, current: &mut Current) -> io::Result<Vec<Entry>> {
        let left = current.segment.length - current.offset;
        let mut bytes = self.piece(current, left.min(PIECE))?;
        let mut place = 0;
        if current.offset == 0 {
            if !bytes.starts_with(&HEADER) {
                return Err(damaged());
            }
            place = HEADER.len();
        }
        let mut entries = Vec::new();
        while place < bytes.len() {
            match segment::decode(&bytes[place..]) {
                Frame::Whole(entry, length) => {
                    place += length;
                    entries.extend(entry.filter(|entry| entry.cursor > self.after));
                    self.after = entries.last().map_or(self.after, |entry| entry.cursor);
                }
                Frame::Part(length) if current.offset + (place + length) as u64 > current.segment.length => {
                    if entries.is_empty() {
                        return Err(damaged());
                    }
                    break;
                }
                // It goes on in the next piece, unless it does not fit into any.
                Frame::Part(_) if place > 0 => break,
                Frame::Part(length) => bytes = self.piece(current, length as u64)?,
                Frame::Corrupt if entries.is_empty() => return Err(damaged()),
                Frame::Corrupt => break,
            }
        }
        current.offset += place as u64;
        Ok(entries)
    }

    fn piece(&self, current: &Current, length: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length as usize];
        current.file.read_exact_at(&mut bytes, current.offset)?;
        Ok(bytes)
    }

    fn gap(&self, time: SystemTime) -> Entry {
        Entry { cursor: self.after, time, kind: Kind::Gap(0) }
    }
}

enum Begun {
    Nothing,
    Segment,
    Gap(Entry),
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "damaged")
}
