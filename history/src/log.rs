//! The writing end: opening, appending, rotating, forgetting.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tracing::{info, warn};

use crate::reader::{Reader, Start};
use crate::segment::{self, End, HEADER, Scanner};
use crate::{Entry, HistoryError, Limits, MAX_SEGMENT, STRIDE};

const SUFFIX: &str = ".events";

/// The bytes that are read at once.
const PIECE: usize = 64 * 1024;

/// A segment is closed after this part of the age that it may reach, so that it does not hold young entries with old.
const AGES: u32 = 8;

/// What readers and the writer know of a segment.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    /// The cursor in its name: none in it is lower.
    pub(crate) first: u64,
    pub(crate) path: PathBuf,
    /// The bytes that are entries of ours, or may be.
    pub(crate) length: u64,
    /// When the last entry was written. No entry tells of a later time, but for clocks that are wrong.
    pub(crate) written_at: SystemTime,
}

/// The segments, oldest first.
#[derive(Default)]
pub(crate) struct Index(Mutex<VecDeque<Segment>>);

impl Index {
    pub(crate) fn segments(&self) -> MutexGuard<'_, VecDeque<Segment>> {
        // A panic while the lock is held cannot leave the list half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The segment that is written, always the last of the index.
struct Active {
    file: Arc<File>,
    begun_at: SystemTime,
    dirty: bool,
}

/// The writing end of a log. There must be one only for each folder.
pub struct Log {
    folder: PathBuf,
    limits: Limits,
    index: Arc<Index>,
    active: Option<Active>,
    next: u64,
    /// Closed segments that are not synced.
    unsynced: Vec<Arc<File>>,
    /// The folder has got a file since it was synced.
    grown: bool,
}

/// What was written and is not synced.
pub struct Unsynced {
    files: Vec<Arc<File>>,
    folder: Option<PathBuf>,
}

impl Log {
    /// Opens the log in `folder`, which is made if there is none. Blocks for about as long as it takes to read one segment.
    ///
    /// # Errors
    /// The folder can be neither made nor read. What lies in it is no error.
    pub fn open(folder: &Path, limits: Limits) -> Result<Log, HistoryError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(HistoryError::io("make", folder))?;
        let limits = Limits { segment: limits.segment.min(MAX_SEGMENT), ..limits };
        let segments = find(folder).map_err(HistoryError::io("read", folder))?;
        let index = Arc::new(Index(Mutex::new(segments)));
        let (unsynced, folder) = (Vec::new(), folder.to_owned());
        let mut log = Log { folder, limits, index, active: None, next: STRIDE, unsynced, grown: false };
        log.take_up();
        log.expire(SystemTime::now());
        Ok(log)
    }

    /// The least cursor that the next entry may have.
    pub fn next_cursor(&self) -> u64 {
        self.next
    }

    /// Reads from `start` on.
    pub fn reader(&self, start: Start) -> Reader {
        Reader::new(self.index.clone(), start)
    }

    /// Reads at least the last `bytes` of what is kept.
    pub fn recent(&self, bytes: u64) -> Reader {
        let mut found = 0;
        let first = self.index.segments().iter().rev().find_map(|segment| {
            found += segment.length;
            (found >= bytes).then_some(segment.first)
        });
        self.reader(Start::After(first.map_or(0, |first| first.saturating_sub(1))))
    }

    /// A way to readers that does not need the log itself.
    pub fn readers(&self) -> impl Fn(Start) -> Reader + Send + Sync + 'static {
        let index = self.index.clone();
        move |start| Reader::new(index.clone(), start)
    }

    /// Appends as many of the entries as fit into the segment that is written now, at least one, by one `write`, and says
    /// how many. Their cursors rise, and begin not below [`Log::next_cursor`]; no body is longer than
    /// [`segment::MAX_BODY`].
    ///
    /// # Errors
    /// The disk is full or broken. Nothing was appended then, and it may be tried again.
    pub fn append(&mut self, entries: &[Entry]) -> Result<usize, HistoryError> {
        let Some(first) = entries.first() else { return Ok(0) };
        let now = SystemTime::now();
        let mut buffer = Vec::new();
        if self.is_over(first, now) {
            self.close();
            self.make_room();
            self.expire(now);
        }
        let length = match &self.active {
            Some(_) => self.index.segments().back().map_or(0, |segment| segment.length),
            None => {
                buffer.extend_from_slice(&HEADER);
                0
            }
        };
        let (mut count, mut last) = (0, first.cursor);
        for entry in entries {
            let after = length + (buffer.len() + segment::frame_length(entry)) as u64;
            if count > 0 && after > self.limits.segment {
                break;
            }
            segment::encode(entry, &mut buffer);
            (count, last) = (count + 1, entry.cursor);
        }
        match &mut self.active {
            Some(active) => {
                active.dirty = true;
                let file = active.file.clone();
                self.write(&file, &buffer, length)?;
            }
            None => self.begin(first.cursor, &buffer, now)?,
        }
        if let Some(segment) = self.index.segments().back_mut() {
            segment.length = length + buffer.len() as u64;
            segment.written_at = now;
        }
        self.next = last + 1;
        Ok(count)
    }

    /// Removes what is too old.
    pub fn expire(&mut self, now: SystemTime) {
        while self.oldest_is(|segment| {
            now.duration_since(segment.written_at).is_ok_and(|age| age > self.limits.age)
        }) {
            self.remove_oldest();
        }
    }

    /// Gives what was written since the last call, to be synced while the log goes on.
    pub fn take_unsynced(&mut self) -> Unsynced {
        let mut files = std::mem::take(&mut self.unsynced);
        if let Some(active) = &mut self.active
            && std::mem::take(&mut active.dirty)
        {
            files.push(active.file.clone());
        }
        let folder = std::mem::take(&mut self.grown).then(|| self.folder.clone());
        Unsynced { files, folder }
    }

    /// Decides how the log of an earlier process goes on.
    fn take_up(&mut self) {
        let mut segments = self.index.segments();
        let Some(segment) = segments.back_mut() else { return };
        let (mut first, mut last) = (None, segment.first);
        let end = walk(segment, |entry| {
            first.get_or_insert(entry.time);
            last = last.max(entry.cursor);
        });
        self.next = (last / STRIDE + 1) * STRIDE;
        let path = segment.path.display();
        let file = match end {
            End::Whole => OpenOptions::new().append(true).open(&segment.path),
            End::Torn(at) => {
                info!(segment = %path, at, "the history ends in the middle of an entry and is cut there");
                segment.length = at as u64;
                cut(segment)
            }
            End::Corrupt(at) => {
                warn!(segment = %path, at, "a segment of the history is damaged; what follows the damage is lost");
                return;
            }
        };
        match file {
            // Not even its header was written.
            Ok(_) if segment.length < HEADER.len() as u64 => {
                let _ = fs::remove_file(&segment.path);
                segments.pop_back();
            }
            Ok(file) => {
                let begun_at = first.unwrap_or(segment.written_at);
                // What the earlier process has not synced, nobody else will.
                self.active = Some(Active { file: Arc::new(file), begun_at, dirty: true });
            }
            Err(error) => warn!(segment = %path, %error, "the history goes on in a new segment"),
        }
    }

    /// Whether the entry must go into a new segment.
    fn is_over(&self, entry: &Entry, now: SystemTime) -> bool {
        let Some(active) = &self.active else { return true };
        let length = self.index.segments().back().map_or(0, |segment| segment.length);
        length + segment::frame_length(entry) as u64 > self.limits.segment
            || now.duration_since(active.begun_at).is_ok_and(|age| age > self.limits.age / AGES)
    }

    fn close(&mut self) {
        if let Some(active) = self.active.take()
            && active.dirty
        {
            self.unsynced.push(active.file);
        }
    }

    /// Makes a new segment with `bytes` in it. It is in the index only if that succeeds.
    fn begin(&mut self, first: u64, bytes: &[u8], now: SystemTime) -> Result<(), HistoryError> {
        let path = self.folder.join(format!("{first:016x}{SUFFIX}"));
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(HistoryError::io("make", &path))?;
        if let Err(source) = (&file).write_all(bytes) {
            let _ = fs::remove_file(&path);
            return Err(HistoryError::Io { operation: "append to", path, source });
        }
        self.index.segments().push_back(Segment { first, path, length: 0, written_at: now });
        self.active = Some(Active { file: Arc::new(file), begun_at: now, dirty: true });
        self.grown = true;
        Ok(())
    }

    /// Appends to the active segment, which has `length` bytes. What a failed write has left is cut away; if even that
    /// fails the segment is given up, for readers do not look beyond the length that they know.
    fn write(&mut self, mut file: &File, bytes: &[u8], length: u64) -> Result<(), HistoryError> {
        let Err(source) = file.write_all(bytes) else { return Ok(()) };
        if file.set_len(length).is_err() {
            self.close();
        }
        let path = self.index.segments().back().map_or_else(PathBuf::new, |segment| segment.path.clone());
        Err(HistoryError::Io { operation: "append to", path, source })
    }

    /// Removes the oldest segments until there is room for a full one.
    fn make_room(&mut self) {
        let room = self.limits.total.saturating_sub(self.limits.segment);
        while self.index.segments().iter().map(|segment| segment.length).sum::<u64>() > room {
            self.remove_oldest();
        }
    }

    fn oldest_is(&self, wanted: impl Fn(&Segment) -> bool) -> bool {
        self.index.segments().front().is_some_and(wanted)
    }

    fn remove_oldest(&mut self) {
        let Some(segment) = self.index.segments().pop_front() else { return };
        if self.index.segments().is_empty() {
            self.active = None;
        }
        if let Err(error) = fs::remove_file(&segment.path) {
            warn!(segment = %segment.path.display(), %error, "cannot remove an old segment of the history");
        }
    }
}

impl Unsynced {
    /// Whether there is nothing to sync.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && self.folder.is_none()
    }

    /// Syncs all of it. Blocks.
    ///
    /// # Errors
    /// The disk is broken.
    pub fn sync(self) -> io::Result<()> {
        for file in &self.files {
            file.sync_data()?;
        }
        self.folder.map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    }
}

/// The segments of a folder, oldest first. What is none is left alone.
fn find(folder: &Path) -> io::Result<VecDeque<Segment>> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let digits = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
        let Some(first) = digits
            .filter(|digits| digits.len() == 16)
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .filter(|first| *first <= segment::MAX_CURSOR)
        else {
            continue;
        };
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_file() {
            let written_at = metadata.modified().unwrap_or_else(|_| SystemTime::now());
            segments.push(Segment { first, path: entry.path(), length: metadata.len(), written_at });
        }
    }
    segments.sort_by_key(|segment| segment.first);
    Ok(segments.into())
}

fn cut(segment: &Segment) -> io::Result<File> {
    let file = OpenOptions::new().append(true).open(&segment.path)?;
    file.set_len(segment.length)?;
    Ok(file)
}

/// Reads a whole segment and says how it ends. One that is longer than any of ours is not read.
fn walk(segment: &Segment, mut each: impl FnMut(Entry)) -> End {
    let longest = MAX_SEGMENT + segment::MAX_BODY as u64 + HEADER.len() as u64;
    if segment.length > longest {
        return End::Corrupt(0);
    }
    let (mut scanner, mut piece) = (Scanner::default(), vec![0; PIECE]);
    let read = File::open(&segment.path).and_then(|mut file| {
        loop {
            match file.read(&mut piece)? {
                0 => return Ok(()),
                length => scanner.feed(&piece[..length]),
            }
            std::iter::from_fn(|| scanner.next_entry()).for_each(&mut each);
            if matches!(scanner.end(), End::Corrupt(_)) {
                return Ok(());
            }
        }
    });
    match read {
        Ok(()) => scanner.end(),
        Err(error) => {
            warn!(segment = %segment.path.display(), %error, "cannot read a segment of the history");
            End::Corrupt(0)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::os::unix::fs::MetadataExt;
    use std::time::Duration;

    use super::*;
    use crate::Kind;

    fn inodes(unsynced: &Unsynced) -> BTreeSet<u64> {
        unsynced.files.iter().map(|file| file.metadata().unwrap().ino()).collect()
    }

    fn sizes(folder: &Path) -> BTreeSet<(u64, u64)> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
        entries.map(|status| (status.ino(), status.len())).collect()
    }

    /// A power cut costs what came after the last sync, and nothing before.
    #[test]
    fn every_segment_that_has_grown_is_to_be_synced() {
        let folder = tempfile::tempdir().unwrap();
        let limits = Limits { segment: 300, total: u64::MAX, age: Duration::from_secs(3600) };
        let mut log = Log::open(folder.path(), limits).unwrap();
        let mut before = sizes(folder.path());
        for number in 1..40_usize {
            for _ in 0..number % 4 {
                let kind = Kind::Event(vec![0; 10 * number % 130]);
                let entry = Entry { cursor: log.next_cursor(), time: SystemTime::now(), kind };
                assert_eq!(log.append(&[entry]).unwrap(), 1);
            }
            let now = sizes(folder.path());
            let grown: BTreeSet<u64> = now.difference(&before).map(|(inode, _)| *inode).collect();
            let unsynced = log.take_unsynced();
            assert_eq!(inodes(&unsynced), grown, "after batch {number}");
            assert_eq!(unsynced.folder.is_some(), now.len() > before.len(), "a name is new");
            unsynced.sync().unwrap();
            before = now;
        }
        drop(log);
        let mut log = Log::open(folder.path(), limits).unwrap();
        let last = log.index.segments().back().unwrap().path.metadata().unwrap().ino();
        assert!(inodes(&log.take_unsynced()).contains(&last), "what an earlier process wrote");
        assert!(log.take_unsynced().is_empty());
    }
}
