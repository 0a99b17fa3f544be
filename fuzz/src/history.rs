//! The history of events.

use std::fs;
use std::time::SystemTime;

use davit_history::segment::{self, End, HEADER};
use davit_history::{Entry, Kind, Limits, Log, STRIDE, Start};

/// A folder with anything in its last segment: what is read from it is what was written, it is opened all the same, and what
/// is appended is read behind it.
pub fn history(data: &[u8]) {
    // Noise hardly ever begins with the right header.
    let (kind, rest) = data.split_first().map_or((0, data), |(kind, rest)| (*kind, rest));
    let mut bytes = if kind & 1 == 1 { HEADER.to_vec() } else { Vec::new() };
    bytes.extend_from_slice(rest);
    let (entries, end) = segment::scan(&bytes);
    assert!(entries.windows(2).all(|pair| pair[0].cursor < pair[1].cursor), "cursors do not rise");
    let mut again = HEADER.to_vec();
    entries.iter().for_each(|entry| segment::encode(entry, &mut again));
    assert_eq!(segment::scan(&again), (entries.clone(), End::Whole));

    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let path = folder.path().join("0000000000000001.events");
    fs::write(&path, &bytes).expect("a file in an own folder");
    let mut log = Log::open(folder.path(), Limits::default()).expect("nothing in it is in the way");
    let cursor = log.next_cursor();
    assert!(cursor % STRIDE == 0 && entries.last().is_none_or(|last| last.cursor < cursor));
    if matches!(end, End::Corrupt(_)) {
        assert_eq!(fs::read(&path).expect("the file"), bytes, "a damaged segment is left alone");
    }
    let entry = Entry { cursor, time: SystemTime::UNIX_EPOCH, kind: Kind::Event(b"after".to_vec()) };
    assert_eq!(log.append(std::slice::from_ref(&entry)).expect("there is space"), 1);
    let mut reader = log.reader(Start::After(0));
    let read = std::iter::from_fn(|| Some(reader.next_entries()).filter(|entries| !entries.is_empty()));
    let read: Vec<Entry> = read.flatten().filter(|entry| entry.kind != Kind::Gap(0)).collect();
    let mut expected = entries;
    // A gap of an unknown number is what readers make of damage, too.
    expected.retain(|entry| entry.kind != Kind::Gap(0));
    expected.push(entry);
    assert_eq!(read, expected);
}
