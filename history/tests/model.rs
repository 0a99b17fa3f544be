//! The log against a list: any order of appends, deaths, torn ends, full disks, rotations and reads.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use davit_history::{Entry, Kind, Limits, Log, Reader, STRIDE, Start};
use proptest::prelude::*;

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn event(cursor: u64, body: Vec<u8>) -> Entry {
    Entry { cursor, time: at(cursor), kind: Kind::Event(body) }
}

fn small() -> Limits {
    Limits { segment: 512, total: u64::MAX, age: Duration::from_secs(3600) }
}

/// Appends all, however many segments that takes.
fn append(log: &mut Log, mut entries: &[Entry]) {
    while !entries.is_empty() {
        let count = log.append(entries).unwrap();
        assert!(count > 0);
        entries = &entries[count..];
    }
}

fn read(reader: &mut Reader) -> Vec<Entry> {
    std::iter::from_fn(|| Some(reader.next_entries()).filter(|entries| !entries.is_empty()))
        .flatten()
        .collect()
}

fn segments(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn nothing_comes_after_a_cursor_that_no_entry_can_have() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = Log::open(folder.path(), small()).unwrap();
    append(&mut log, &(1..40).map(|cursor| event(cursor, vec![0; 100])).collect::<Vec<_>>());
    assert!(segments(folder.path()).len() > 2);
    for cursor in [40, u64::MAX - 1, u64::MAX] {
        assert_eq!(read(&mut log.reader(Start::After(cursor))), [], "{cursor}");
    }
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

#[derive(Debug, Clone)]
enum Step {
    /// Events with bodies of these lengths, in one batch.
    Append(Vec<usize>),
    /// The process dies and the next one opens the log.
    Reopen,
    /// It dies in the middle of an append, of which so many bytes are there.
    Torn(u8),
    /// A reader that has followed reads on.
    Follow,
    /// Somebody reads what comes after one of the entries so far.
    After(prop::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => prop::collection::vec(0_usize..300, 1..6).prop_map(Step::Append),
        1 => Just(Step::Reopen),
        1 => any::<u8>().prop_map(Step::Torn),
        2 => Just(Step::Follow),
        2 => any::<prop::sample::Index>().prop_map(Step::After),
    ];
    prop::collection::vec(step, 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn nothing_is_lost_and_nothing_comes_twice(steps in steps()) {
        let folder = tempfile::tempdir().unwrap();
        let mut log = Log::open(folder.path(), small()).unwrap();
        let mut model: Vec<Entry> = Vec::new();
        let (mut follower, mut followed) = (log.reader(Start::After(0)), Vec::new());
        for step in steps {
            match step {
                Step::Append(lengths) => {
                    let first = log.next_cursor();
                    let entries: Vec<_> = (first..)
                        .zip(lengths)
                        .map(|(cursor, length)| event(cursor, vec![cursor as u8; length]))
                        .collect();
                    append(&mut log, &entries);
                    model.extend(entries);
                }
                Step::Reopen | Step::Torn(_) => {
                    let last = log.next_cursor();
                    drop(log);
                    if let (Step::Torn(bytes), Some(path)) = (&step, segments(folder.path()).last()) {
                        let mut frame = Vec::new();
                        davit_history::segment::encode(&event(last, vec![1; 300]), &mut frame);
                        let torn = &frame[..usize::from(*bytes).min(frame.len() - 1)];
                        let mut file = OpenOptions::new().append(true).open(path).unwrap();
                        std::io::Write::write_all(&mut file, torn).unwrap();
                    }
                    log = Log::open(folder.path(), small()).unwrap();
                    prop_assert!(log.next_cursor() >= last, "no cursor is given twice");
                    if !model.is_empty() {
                        prop_assert_eq!(log.next_cursor() % STRIDE, 0, "nor one that was lost with the power");
                    }
                    follower = log.reader(Start::After(followed.last().map_or(0, |entry: &Entry| entry.cursor)));
                }
                Step::Follow => {
                    followed.extend(read(&mut follower));
                    prop_assert_eq!(&followed, &model);
                }
                Step::After(index) => {
                    let place = index.index(model.len() + 1);
                    let after = place.checked_sub(1).map_or(0, |place| model[place].cursor);
                    prop_assert_eq!(&read(&mut log.reader(Start::After(after))), &model[place..]);
                }
            }
        }
        followed.extend(read(&mut follower));
        prop_assert_eq!(&followed, &model);
        let last = read(&mut log.recent(100));
        prop_assert_eq!(&last, &model[model.len() - last.len()..]);
        prop_assert!(!last.is_empty() || model.is_empty());
        prop_assert_eq!(&read(&mut log.recent(u64::MAX)), &model);
    }

    /// The power goes: of the last segment is there what was synced, and perhaps zeros where nothing was written. What is
    /// before the loss is read, and no cursor that anybody may have seen is given again.
    #[test]
    fn a_power_cut_costs_the_end_alone(
        lengths in prop::collection::vec(0_usize..300, 1..20),
        cut in any::<prop::sample::Index>(),
        zeros in 0_u64..100,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut log = Log::open(folder.path(), small()).unwrap();
        let first = log.next_cursor();
        let model: Vec<_> =
            (first..).zip(&lengths).map(|(cursor, length)| event(cursor, vec![1; *length])).collect();
        append(&mut log, &model);
        let seen = log.next_cursor();
        drop(log);
        let path = segments(folder.path()).pop().unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let synced = cut.index(length(&path) as usize + 1) as u64;
        file.set_len(synced).unwrap();
        file.set_len(synced + zeros).unwrap();

        let mut log = Log::open(folder.path(), small()).unwrap();
        prop_assert!(log.next_cursor() >= seen);
        let next = event(log.next_cursor(), b"next".to_vec());
        append(&mut log, std::slice::from_ref(&next));
        let mut found = read(&mut log.reader(Start::After(0)));
        found.retain(|entry| entry.kind != Kind::Gap(0));
        prop_assert_eq!(found.pop(), Some(next));
        prop_assert_eq!(&found[..], &model[..found.len()]);
    }

    /// However much is appended: the folder stays within its bound, and what is left is the end, whole.
    #[test]
    fn the_folder_is_bounded(batches in prop::collection::vec(prop::collection::vec(0_usize..300, 1..9), 1..40)) {
        let folder = tempfile::tempdir().unwrap();
        let limits = Limits { total: 2048, ..small() };
        let mut log = Log::open(folder.path(), limits).unwrap();
        let mut model = Vec::new();
        for lengths in batches {
            for length in lengths {
                let entry = event(log.next_cursor(), vec![0; length]);
                append(&mut log, std::slice::from_ref(&entry));
                model.push(entry);
            }
            let total: u64 = segments(folder.path()).iter().map(|path| length(path)).sum();
            prop_assert!(total <= limits.total, "{} bytes", total);
        }
        let kept = read(&mut log.reader(Start::After(0)));
        prop_assert_eq!(&kept, &model[model.len() - kept.len()..]);
        prop_assert!(kept.len() == model.len() || kept.len() >= 4);
    }

    /// Bytes of a segment become others: readers get what is before the damage and the other segments, and a gap.
    #[test]
    fn damage_costs_the_rest_of_its_segment(place in any::<prop::sample::Index>(), value: u8) {
        let folder = tempfile::tempdir().unwrap();
        let mut log = Log::open(folder.path(), small()).unwrap();
        let model: Vec<_> = (0..40).map(|number| event(log.next_cursor() + number, vec![7; 40])).collect();
        append(&mut log, &model);
        drop(log);
        let paths = segments(folder.path());
        let all: u64 = paths.iter().map(|path| length(path)).sum();
        let mut place = place.index(all as usize) as u64;
        let damaged = paths.iter().find(|path| {
            let inside = place < length(path);
            if !inside {
                place -= length(path);
            }
            inside
        });
        let mut bytes = fs::read(damaged.unwrap()).unwrap();
        prop_assume!(bytes[place as usize] != value);
        bytes[place as usize] = value;
        fs::write(damaged.unwrap(), &bytes).unwrap();

        let mut log = Log::open(folder.path(), small()).unwrap();
        let next = event(log.next_cursor(), b"next".to_vec());
        append(&mut log, std::slice::from_ref(&next));
        let found = read(&mut log.reader(Start::After(0)));
        let events: Vec<_> = found.iter().filter(|entry| matches!(entry.kind, Kind::Event(_))).collect();
        prop_assert_eq!(*events.last().unwrap(), &next);
        let lost = model.len() + 1 - events.len();
        // 512 bytes hold seven of them.
        prop_assert!((1..=7).contains(&lost), "{} lost", lost);
        prop_assert!(events.iter().all(|event| model.contains(event) || **event == next));
        prop_assert!(events.windows(2).all(|pair| pair[0].cursor < pair[1].cursor));
        // Where the very end is damaged, it looks torn and is cut: there is nothing that could be told apart.
        prop_assert!(found.iter().any(|entry| entry.kind == Kind::Gap(0)) || damaged == paths.last());
    }
}

#[test]
fn a_reader_that_is_overtaken_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { total: 1536, ..small() };
    let mut log = Log::open(folder.path(), limits).unwrap();
    let mut append_one = || {
        let entry = event(log.next_cursor(), vec![0; 300]);
        append(&mut log, std::slice::from_ref(&entry));
        (entry, log.reader(Start::After(STRIDE)))
    };
    let (first, mut behind) = append_one();
    assert_eq!(first.cursor, STRIDE);
    append_one();
    assert_eq!(read(&mut behind).len(), 1);
    let newest = (0..10).map(|_| append_one().0).last().unwrap();
    let found = read(&mut behind);
    assert_eq!((found[0].cursor, &found[0].kind), (STRIDE + 1, &Kind::Gap(0)));
    assert_eq!(found.last().unwrap(), &newest);
    // And one that comes back with an old cursor, too.
    let found = read(&mut append_one().1);
    assert_eq!((found[0].cursor, &found[0].kind), (STRIDE, &Kind::Gap(0)));
}

#[test]
fn old_segments_go_and_a_time_finds_where_to_begin() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = Log::open(folder.path(), small()).unwrap();
    let entries: Vec<_> = (0..6).map(|number| event(log.next_cursor() + number, vec![0; 300])).collect();
    append(&mut log, &entries);
    drop(log);
    let now = SystemTime::now();
    let hour = Duration::from_secs(3600);
    for (path, age) in segments(folder.path()).iter().zip([50, 40, 30, 20, 10, 5]) {
        let file = OpenOptions::new().append(true).open(path).unwrap();
        file.set_modified(now - hour * age / 60).unwrap();
    }
    let mut log = Log::open(folder.path(), small()).unwrap();
    let since = |log: &Log, minutes: u32| read(&mut log.reader(Start::Since(now - hour * minutes / 60)));
    assert_eq!(since(&log, 35), entries[2..]);
    assert_eq!(since(&log, 1), []);
    log.expire(now + hour * 25 / 60);
    assert_eq!(since(&log, 600), entries[2..]);
    assert_eq!(segments(folder.path()).len(), 4);
    log.expire(now + hour * 2);
    assert_eq!(since(&log, 600), []);
    let next = event(log.next_cursor(), Vec::new());
    append(&mut log, std::slice::from_ref(&next));
    assert_eq!(since(&log, 600), [next]);
}

#[test]
fn what_does_not_belong_there_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["README", "0000000000000001.event", "zzzzzzzzzzzzzzzz.events", "ffffffffffffffff.events"] {
        fs::write(path(name), "x").unwrap();
    }
    fs::create_dir(path("0000000000000002.events")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", path("0000000000000003.events")).unwrap();
    // One of a later release, as the last.
    fs::write(path("0000000000200000.events"), b"DAVITH\x02\0whatever").unwrap();
    let mut log = Log::open(folder.path(), small()).unwrap();
    assert_eq!(log.next_cursor(), 0x200000 + STRIDE);
    let entry = event(log.next_cursor(), b"x".to_vec());
    append(&mut log, std::slice::from_ref(&entry));
    let found = read(&mut log.reader(Start::After(0)));
    assert_eq!((found.len(), &found[1]), (2, &entry));
    assert_eq!(fs::read(path("0000000000200000.events")).unwrap(), b"DAVITH\x02\0whatever");
    assert_eq!(segments(folder.path()).len(), 8);
}

#[test]
fn a_long_entry_gets_a_segment_and_is_read_whole() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = Log::open(folder.path(), Limits::default()).unwrap();
    let first = log.next_cursor();
    let lengths = [10, davit_history::segment::MAX_BODY, 10];
    let entries: Vec<_> =
        (first..).zip(lengths).map(|(cursor, length)| event(cursor, vec![1; length])).collect();
    append(&mut log, &entries);
    assert_eq!(read(&mut log.reader(Start::After(0))), entries);
    let unsynced = log.take_unsynced();
    assert!(!unsynced.is_empty());
    unsynced.sync().unwrap();
    assert!(log.take_unsynced().is_empty());
}
