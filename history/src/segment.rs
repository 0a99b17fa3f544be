//! The format of a segment: how entries become bytes and are read back. No file is touched here.
//!
//! ```text
//! file  = magic "DAVITH" | version u16 (1) | frame*
//! frame = length u32 | crc32c u32 | kind u8 | cursor u64 | time i64 | body       all integers little endian
//! ```
//! `length` counts what follows the checksum, and the checksum covers it. `time` is in nanoseconds since the epoch.
//! Cursors rise from frame to frame. A frame of an unknown kind is one of a later release and is skipped.

use std::time::{Duration, SystemTime};

use crate::{Entry, Kind};

/// The magic and the version: what a segment begins with.
pub const HEADER: [u8; 8] = *b"DAVITH\x01\0";

/// Length and checksum.
const PREFIX: usize = 8;
/// Kind, cursor and time.
const FIXED: usize = 17;
/// The smallest frame.
pub(crate) const MIN_FRAME: usize = PREFIX + FIXED;

/// The longest body: more than any message of a shim, whose frames end at 4 MiB.
pub const MAX_BODY: usize = 4 << 20;

/// Nobody counts that far; a cursor beyond it is none of ours, and there are always some left.
pub(crate) const MAX_CURSOR: u64 = u64::MAX / 2;

const KIND_EVENT: u8 = 1;
const KIND_GAP: u8 = 2;

/// Appends the frame of an entry. The body must not be longer than [`MAX_BODY`].
pub fn encode(entry: &Entry, to: &mut Vec<u8>) {
    let start = to.len();
    to.extend_from_slice(&[0; PREFIX]);
    let (kind, lost);
    let body: &[u8] = match &entry.kind {
        Kind::Event(body) => {
            kind = KIND_EVENT;
            body
        }
        Kind::Gap(count) => {
            kind = KIND_GAP;
            lost = count.to_le_bytes();
            &lost
        }
    };
    to.push(kind);
    to.extend_from_slice(&entry.cursor.to_le_bytes());
    to.extend_from_slice(&nanoseconds(entry.time).to_le_bytes());
    to.extend_from_slice(body);
    let covered = &to[start + PREFIX..];
    let (length, checksum) = (covered.len() as u32, crc32c::crc32c(covered));
    to[start..start + 4].copy_from_slice(&length.to_le_bytes());
    to[start + 4..start + PREFIX].copy_from_slice(&checksum.to_le_bytes());
}

/// How many bytes [`encode`] appends for an entry.
pub(crate) fn frame_length(entry: &Entry) -> usize {
    MIN_FRAME
        + match &entry.kind {
            Kind::Event(body) => body.len(),
            Kind::Gap(_) => 8,
        }
}

/// What lies at the beginning of some bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A frame of so many bytes. `None`: one that only a later release understands.
    Whole(Option<Entry>, usize),
    /// The beginning of one that has so many bytes in all.
    Part(usize),
    /// No frame.
    Corrupt,
}

/// Reads the frame at the beginning of `bytes`.
pub fn decode(bytes: &[u8]) -> Frame {
    let (Some(length), Some(checksum)) = (u32_at(bytes, 0), u32_at(bytes, 4)) else {
        return Frame::Part(MIN_FRAME);
    };
    let length = length as usize;
    if !(FIXED..=FIXED + MAX_BODY).contains(&length) {
        return Frame::Corrupt;
    }
    let Some(covered) = bytes.get(PREFIX..PREFIX + length) else { return Frame::Part(PREFIX + length) };
    if crc32c::crc32c(covered) != checksum {
        return Frame::Corrupt;
    }
    let (kind, rest) = (covered[0], &covered[1..]);
    let (Some(cursor), Some(time)) = (u64_at(rest, 0), u64_at(rest, 8)) else { return Frame::Corrupt };
    if cursor > MAX_CURSOR {
        return Frame::Corrupt;
    }
    let body = &rest[16..];
    let kind = match kind {
        KIND_EVENT => Some(Kind::Event(body.to_vec())),
        KIND_GAP => u64_at(body, 0).map(Kind::Gap),
        _ => None,
    };
    let time = system_time(i64::from_le_bytes(time.to_le_bytes()));
    Frame::Whole(kind.map(|kind| Entry { cursor, time, kind }), PREFIX + length)
}

/// How a segment ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With its last frame.
    Whole,
    /// In the middle of a frame: its writer died. What comes before is so many bytes.
    Torn(usize),
    /// With something that no writer of ours leaves, after so many bytes.
    Corrupt(usize),
}

/// Reads a segment as it comes, piece by piece, as far as it makes sense.
#[derive(Default)]
pub struct Scanner {
    buffer: Vec<u8>,
    /// What of the buffer is done with.
    place: usize,
    /// What came before the buffer.
    before: usize,
    last: u64,
    corrupt: bool,
}

impl Scanner {
    /// Takes in what follows.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.place);
        self.before += std::mem::take(&mut self.place);
        self.buffer.extend_from_slice(bytes);
    }

    /// The next entry; `None` when more is needed, or nothing follows any more.
    pub fn next_entry(&mut self) -> Option<Entry> {
        if self.before + self.place == 0 {
            let start = &self.buffer[..self.buffer.len().min(HEADER.len())];
            self.corrupt = !HEADER.starts_with(start);
            if self.corrupt || start.len() < HEADER.len() {
                return None;
            }
            self.place = HEADER.len();
        }
        while !self.corrupt && self.place < self.buffer.len() {
            match decode(&self.buffer[self.place..]) {
                Frame::Whole(Some(entry), _) if entry.cursor <= self.last => self.corrupt = true,
                Frame::Whole(None, length) => self.place += length,
                Frame::Whole(Some(entry), length) => {
                    self.place += length;
                    self.last = entry.cursor;
                    return Some(entry);
                }
                Frame::Part(_) => return None,
                Frame::Corrupt => self.corrupt = true,
            }
        }
        None
    }

    /// How the segment ends, if nothing comes any more and every entry was taken.
    pub fn end(&self) -> End {
        let at = self.before + self.place;
        match () {
            () if self.corrupt => End::Corrupt(at),
            () if at == 0 || self.place < self.buffer.len() => End::Torn(at),
            () => End::Whole,
        }
    }
}

/// Reads a whole segment, as far as it makes sense.
pub fn scan(bytes: &[u8]) -> (Vec<Entry>, End) {
    let mut scanner = Scanner::default();
    scanner.feed(bytes);
    let entries = std::iter::from_fn(|| scanner.next_entry()).collect();
    (entries, scanner.end())
}

fn u32_at(bytes: &[u8], place: usize) -> Option<u32> {
    bytes.get(place..place + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], place: usize) -> Option<u64> {
    bytes.get(place..place + 8)?.try_into().ok().map(u64::from_le_bytes)
}

/// Times outside of the years 1677 to 2262 become the nearest that fits.
fn nanoseconds(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => {
            i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |nanoseconds| -nanoseconds)
        }
    }
}

fn system_time(nanoseconds: i64) -> SystemTime {
    let distance = Duration::from_nanos(nanoseconds.unsigned_abs());
    let epoch = SystemTime::UNIX_EPOCH;
    if nanoseconds < 0 { epoch - distance } else { epoch + distance }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entries() -> impl Strategy<Value = Vec<Entry>> {
        let kind = prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40).prop_map(Kind::Event),
            any::<u64>().prop_map(Kind::Gap),
        ];
        let entry = (1..u64::from(u32::MAX), any::<i64>(), kind);
        prop::collection::vec(entry, 0..12).prop_map(|parts| {
            let mut cursor = 0;
            let entry = |(step, time, kind)| {
                cursor += step;
                Entry { cursor, time: system_time(time), kind }
            };
            parts.into_iter().map(entry).collect()
        })
    }

    fn written(entries: &[Entry]) -> Vec<u8> {
        let mut bytes = HEADER.to_vec();
        for entry in entries {
            let before = bytes.len();
            encode(entry, &mut bytes);
            assert_eq!(bytes.len() - before, frame_length(entry));
        }
        bytes
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(entries in entries()) {
            prop_assert_eq!(scan(&written(&entries)), (entries, End::Whole));
        }

        /// A cut leaves the entries before it, and says where they end.
        #[test]
        fn a_torn_end_costs_only_itself(entries in entries(), cut in any::<prop::sample::Index>()) {
            let bytes = written(&entries);
            let cut = cut.index(bytes.len() + 1);
            let (read, end) = scan(&bytes[..cut]);
            prop_assert_eq!(&read, &entries[..read.len()]);
            let whole = written(&read).len();
            match end {
                End::Whole => prop_assert_eq!(cut, whole),
                End::Torn(at) => prop_assert!(at == whole && cut > at || at == 0 && cut < HEADER.len()),
                End::Corrupt(at) => prop_assert!(false, "corrupt at {}", at),
            }
        }

        /// However the bytes come, the entries are the same.
        #[test]
        fn pieces_make_no_difference(entries in entries(), step in 1_usize..50, cut in any::<prop::sample::Index>()) {
            let bytes = written(&entries);
            let bytes = &bytes[..cut.index(bytes.len() + 1)];
            let (mut scanner, mut read) = (Scanner::default(), Vec::new());
            for piece in bytes.chunks(step) {
                scanner.feed(piece);
                read.extend(std::iter::from_fn(|| scanner.next_entry()));
            }
            prop_assert_eq!((read, scanner.end()), scan(bytes));
        }

        /// A flipped bit costs the frame that it is in and what follows, and is never read as something else.
        #[test]
        fn a_flipped_bit_is_seen(entries in entries(), bit in any::<prop::sample::Index>()) {
            let mut bytes = written(&entries);
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let (read, end) = scan(&bytes);
            prop_assert_eq!(&read, &entries[..read.len()]);
            prop_assert!(end != End::Whole && written(&read).len() <= bit / 8 + HEADER.len());
        }
    }

    #[test]
    fn a_frame_of_a_later_release_is_skipped() {
        let entry = |cursor| Entry { cursor, time: SystemTime::UNIX_EPOCH, kind: Kind::Event(b"x".to_vec()) };
        let mut bytes = written(&[entry(1)]);
        let start = bytes.len();
        encode(&entry(2), &mut bytes);
        bytes[start + PREFIX] = 77;
        let checksum = crc32c::crc32c(&bytes[start + PREFIX..]);
        bytes[start + 4..start + PREFIX].copy_from_slice(&checksum.to_le_bytes());
        encode(&entry(3), &mut bytes);
        assert_eq!(scan(&bytes), (vec![entry(1), entry(3)], End::Whole));
    }

    #[test]
    fn a_cursor_behind_which_there_is_no_other_is_none() {
        let entry = |cursor| Entry { cursor, time: SystemTime::UNIX_EPOCH, kind: Kind::Gap(1) };
        let good = entry(MAX_CURSOR);
        assert_eq!(scan(&written(std::slice::from_ref(&good))), (vec![good], End::Whole));
        assert_eq!(scan(&written(&[entry(MAX_CURSOR + 1)])), (Vec::new(), End::Corrupt(HEADER.len())));
    }

    #[test]
    fn times_that_do_not_fit_become_the_nearest() {
        let far = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40);
        assert_eq!(nanoseconds(far), i64::MAX);
        let before = SystemTime::UNIX_EPOCH - Duration::from_nanos(5);
        assert_eq!(system_time(nanoseconds(before)), before);
    }
}
