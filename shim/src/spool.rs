//! Bytes that wait to be delivered: a queue of bounded size. When it is full, the oldest bytes are dropped and counted,
//! whole lines of them where there are lines: the rest of a line that was delivered in part stays.
//!
//! ```text
//!  append ──►│ file: a ring without a name in the bundle │ memory: the oldest 16 KiB │──► front, consume
//! ```
//! Short delays need no file: it is made when the memory is full, and gone when the queue is empty. Its name is gone
//! as soon as it is made, so that nothing of it is left behind by a shim that is killed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use crate::log;
use crate::stdio::saved;

/// The most bytes that wait.
pub(crate) const LIMIT: u64 = 1 << 20;
/// The most bytes that wait in memory.
const MEMORY: usize = 16 * 1024;
/// Lines up to this length are dropped as a whole: longer than any line of a json log, in which a line holds at most
/// 16 KiB that have grown at most six times as long.
const LINE: u64 = 128 * 1024;
/// The bytes that are looked at in one step for the end of a line.
const PIECE: usize = 4096;

/// A queue of bytes.
#[derive(Debug)]
pub(crate) struct Spool {
    folder: PathBuf,
    /// The rest of a line of which the beginning was delivered. What came behind it was dropped.
    lead: Vec<u8>,
    /// What is behind `lead` begins with a line.
    aligned: bool,
    /// The oldest bytes; those before `consumed` are gone.
    memory: Vec<u8>,
    consumed: usize,
    /// The bytes behind them: positions `head..tail` of the stream, at their remainders by [`LIMIT`].
    file: Option<File>,
    head: u64,
    tail: u64,
    spooled: u64,
    dropped: u64,
    failing: bool,
}

impl Spool {
    /// An empty one. Its file will be made in `folder`, the bundle.
    pub(crate) fn new(folder: &Path) -> Spool {
        Spool {
            folder: folder.to_owned(),
            lead: Vec::new(),
            aligned: true,
            memory: Vec::new(),
            consumed: 0,
            file: None,
            head: 0,
            tail: 0,
            spooled: 0,
            dropped: 0,
            failing: false,
        }
    }

    /// How many bytes wait.
    pub(crate) fn len(&self) -> u64 {
        self.lead.len() as u64 + self.behind_lead()
    }

    fn behind_lead(&self) -> u64 {
        self.in_memory() as u64 + (self.tail - self.head)
    }

    /// True if none do.
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Says that something was delivered that did not come by here, and may have ended in the middle of a line.
    pub(crate) fn bypassed(&mut self) {
        self.aligned = false;
    }

    /// How many bytes were appended ever.
    pub(crate) fn spooled(&self) -> u64 {
        self.spooled
    }

    /// How many of them were dropped.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    fn in_memory(&self) -> usize {
        self.memory.len() - self.consumed
    }

    /// Adds bytes; the oldest make room for them.
    pub(crate) fn append(&mut self, bytes: &[u8]) {
        self.spooled += bytes.len() as u64;
        let limit = usize::try_from(LIMIT).unwrap_or(usize::MAX);
        let (excess, bytes) = bytes.split_at(bytes.len().saturating_sub(limit));
        self.dropped += excess.len() as u64;
        let over = (self.len() + bytes.len() as u64).saturating_sub(LIMIT);
        if over > 0 {
            self.drop_oldest(over);
        }
        if self.head == self.tail && self.in_memory() + bytes.len() <= MEMORY {
            self.memory.drain(..self.consumed);
            self.consumed = 0;
            self.memory.extend_from_slice(bytes);
        } else if let Err(error) = self.write(bytes) {
            self.dropped += bytes.len() as u64;
            if !self.failing {
                self.failing = true;
                log::error(format_args!(
                    "output cannot be kept in {}, it is dropped: {error}",
                    self.folder.display()
                ));
            }
        } else {
            self.failing = false;
        }
    }

    /// Copies the oldest bytes to `buffer`, as many as fit, and returns their number.
    ///
    /// # Errors
    /// That of the file.
    pub(crate) fn front(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.lead.len());
        buffer[..count].copy_from_slice(&self.lead[..count]);
        Ok(count + self.peek(0, &mut buffer[count..])?)
    }

    /// Forgets the oldest bytes, which have been delivered. The space that they took is freed when all are gone.
    pub(crate) fn consume(&mut self, count: u64) {
        let of_lead = count.min(self.lead.len() as u64);
        self.lead.drain(..bounded(of_lead));
        if self.lead.is_empty() {
            self.lead = Vec::new();
        }
        if count > of_lead {
            self.aligned = false;
            self.forget(count - of_lead);
        }
    }

    /// Forgets the oldest bytes behind `lead`.
    fn forget(&mut self, count: u64) {
        let of_memory = count.min(self.in_memory() as u64);
        self.consumed += bounded(of_memory);
        self.head = (self.head + count - of_memory).min(self.tail);
        if self.in_memory() == 0 {
            (self.memory, self.consumed) = (Vec::new(), 0);
        }
        if self.behind_lead() == 0 {
            (self.file, self.head, self.tail) = (None, 0, 0);
        }
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        let all = self.len();
        self.dropped += all;
        self.consume(all);
    }

    fn drop_oldest(&mut self, least: u64) {
        if !self.aligned
            && self.lead.is_empty()
            && let Some(end) = self.end_of_line(1).filter(|end| *end <= MEMORY as u64)
        {
            let mut lead = vec![0; bounded(end)];
            if self.peek(0, &mut lead).is_ok_and(|count| count == lead.len()) {
                self.lead = lead;
                self.forget(end);
            }
        }
        let end = self.end_of_line(least);
        self.aligned = end.is_some();
        let count = end.unwrap_or(least).min(self.behind_lead());
        self.dropped += count;
        self.forget(count);
    }

    /// The end of the line that the byte before `least` belongs to.
    fn end_of_line(&self, least: u64) -> Option<u64> {
        let mut position = least.saturating_sub(1);
        let mut piece = [0; PIECE];
        while position < least + LINE {
            let count = self.peek(position, &mut piece).ok()?;
            if count == 0 {
                return None;
            }
            if let Some(index) = piece[..count].iter().position(|byte| *byte == b'\n') {
                return Some(position + index as u64 + 1);
            }
            position += count as u64;
        }
        None
    }

    /// Copies bytes from this distance behind the end of `lead` on.
    fn peek(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let memory = &self.memory[self.consumed..];
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(memory.len());
        let count = buffer.len().min(memory.len() - start);
        buffer[..count].copy_from_slice(&memory[start..start + count]);
        let (Some(file), rest) = (&self.file, &mut buffer[count..]) else { return Ok(count) };
        let mut position = (self.head + offset.saturating_sub(memory.len() as u64)).min(self.tail);
        let mut done = 0;
        while done < rest.len() && position < self.tail {
            let (at, room) = place(position);
            let part = (rest.len() - done).min(bounded(room.min(self.tail - position)));
            file.read_exact_at(&mut rest[done..done + part], at)?;
            done += part;
            position += part as u64;
        }
        Ok(count + done)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(nameless(&self.folder)?),
        };
        let mut position = self.tail;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (at, room) = place(position);
            let (part, behind) = rest.split_at(rest.len().min(bounded(room)));
            file.write_all_at(part, at)?;
            position += part.len() as u64;
            rest = behind;
        }
        self.tail = position;
        Ok(())
    }

    /// Describes it; `fds` takes note of the file.
    pub(crate) fn save(&self, fds: &mut dyn FnMut(BorrowedFd<'_>) -> u32) -> saved::Spool {
        saved::Spool {
            folder: self.folder.display().to_string(),
            memory: [&self.lead, &self.memory[self.consumed..]].concat(),
            file: self.file.as_ref().map_or(0, |file| fds(file.as_fd())),
            head: self.head,
            tail: self.tail,
            spooled: self.spooled,
            dropped: self.dropped,
        }
    }

    /// What [`Spool::save`] described.
    ///
    /// # Errors
    /// The file is missing.
    pub(crate) fn restore(
        saved: saved::Spool,
        fds: &mut dyn FnMut(u32) -> io::Result<OwnedFd>,
    ) -> io::Result<Spool> {
        let file = if saved.file == 0 { None } else { Some(File::from(fds(saved.file)?)) };
        Ok(Spool {
            folder: saved.folder.into(),
            lead: Vec::new(),
            aligned: false,
            memory: saved.memory,
            consumed: 0,
            file,
            head: saved.head,
            tail: saved.tail,
            spooled: saved.spooled,
            dropped: saved.dropped,
            failing: false,
        })
    }
}

/// Where in the ring a position of the stream is, and how many bytes follow it up to the ring's end.
fn place(position: u64) -> (u64, u64) {
    let at = position % LIMIT;
    (at, LIMIT - at)
}

fn bounded(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

/// A file without a name. Filesystems that cannot make one get a name that is removed at once.
fn nameless(folder: &Path) -> io::Result<File> {
    let options = |flags: OFlag| {
        let mut options = File::options();
        options.read(true).write(true).mode(0o600).custom_flags(flags.bits());
        options
    };
    options(OFlag::O_TMPFILE).open(folder).or_else(|_| {
        let path = folder.join(format!("spool-{}", std::process::id()));
        let file = options(OFlag::O_NOFOLLOW).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(file)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(spool: &mut Spool, most: usize) -> Vec<u8> {
        let mut buffer = vec![0; most];
        let count = spool.front(&mut buffer).unwrap();
        spool.consume(count as u64);
        buffer.truncate(count);
        buffer
    }

    fn entries(folder: &Path) -> usize {
        std::fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn bytes_come_out_in_their_order_whatever_the_sizes() {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(folder.path());
        let (mut wrote, mut read) = (0u64, 0u64);
        let pattern = |position: u64| (position % 251) as u8;
        let mut seed = 7u64;
        for _ in 0..4000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let size = (seed >> 33) % 9000;
            let fits = spool.len() + size <= LIMIT;
            if seed >> 63 == 0 && fits {
                let bytes: Vec<u8> = (wrote..wrote + size).map(pattern).collect();
                spool.append(&bytes);
                wrote += size;
            } else {
                for byte in take(&mut spool, bounded(size + 1)) {
                    assert_eq!(byte, pattern(read));
                    read += 1;
                }
            }
            assert_eq!(spool.len(), wrote - read);
            assert_eq!(entries(folder.path()), 0, "nothing has a name");
        }
        assert!(read > 3 * LIMIT, "the ring went round: {read}");
        assert_eq!((spool.spooled(), spool.dropped()), (wrote, 0));
        spool.clear();
        assert!(spool.file.is_none() && spool.memory.capacity() == 0, "an empty spool holds nothing");
    }

    #[test]
    fn the_oldest_lines_are_dropped_whole_and_counted() {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(folder.path());
        let mut total = 0;
        for number in 0..200_000 {
            let line = format!("line {number}\n");
            total += line.len() as u64;
            spool.append(line.as_bytes());
        }
        let kept = spool.len();
        assert!(kept <= LIMIT && kept > LIMIT - 64, "{kept}");
        assert_eq!(spool.dropped() + kept, total);
        let text = String::from_utf8(take(&mut spool, bounded(LIMIT))).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let first: usize = lines[0].strip_prefix("line ").unwrap().parse().unwrap();
        assert_eq!(lines.len(), 200_000 - first, "no line between the first and the last is missing");
        assert!(text.ends_with("line 199999\n"));
    }

    #[test]
    fn a_line_that_was_begun_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        for begun in [false, true] {
            let mut spool = Spool::new(folder.path());
            if begun {
                spool.append(b"the first and ");
                assert_eq!(take(&mut spool, 100), b"the first and ");
            } else {
                spool.bypassed();
            }
            spool.append(b"its end\nmore\n");
            for _ in 0..30 {
                spool.append(&[[b'x'; 49_999].as_slice(), b"\n"].concat());
            }
            assert!(spool.dropped() > 400_000 && spool.len() <= LIMIT);
            let text = take(&mut spool, bounded(LIMIT));
            let lines: Vec<&[u8]> = text.split_inclusive(|byte| *byte == b'\n').collect();
            assert_eq!(lines[0], b"its end\n");
            assert!(lines[1..].iter().all(|line| line.len() == 50_000), "the others are whole");
            assert!(spool.is_empty() && spool.file.is_none());
        }
    }

    #[test]
    fn what_has_no_lines_is_dropped_by_the_byte() {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(folder.path());
        for _ in 0..40 {
            spool.append(&[b'x'; 50_000]);
        }
        assert_eq!((spool.len(), spool.dropped()), (LIMIT, 2_000_000 - LIMIT));
        spool.append(&vec![b'y'; bounded(LIMIT) + 5]);
        assert_eq!(spool.len(), LIMIT);
        assert!(take(&mut spool, bounded(LIMIT)).iter().all(|byte| *byte == b'y'));
    }

    #[test]
    fn a_folder_that_takes_no_file_costs_output_and_nothing_else() {
        let mut spool = Spool::new(Path::new("/nonexistent"));
        spool.append(b"in memory");
        spool.append(&[0; 100_000]);
        assert_eq!((spool.len(), spool.dropped()), (9, 100_000));
    }

    #[test]
    fn it_survives_being_saved() {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(folder.path());
        spool.append(b"memory");
        spool.append(&[b'f'; 70_000]);
        take(&mut spool, 3);
        let mut kept: Vec<OwnedFd> = Vec::new();
        let saved = spool.save(&mut |fd| {
            kept.push(fd.try_clone_to_owned().unwrap());
            kept.len() as u32
        });
        drop(spool);
        let mut spool = Spool::restore(saved, &mut |_| Ok(kept.remove(0))).unwrap();
        let all = take(&mut spool, 100_000);
        assert_eq!((&all[..4], all.len()), (&b"oryf"[..], 70_003));
    }
}
