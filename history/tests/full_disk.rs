//! A disk that is really full.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use davit_history::{Entry, Kind, Limits, Log, Start};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A small filesystem that goes with the test.
struct Small(tempfile::TempDir);

impl Small {
    fn new() -> Small {
        let folder = tempfile::tempdir().unwrap();
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
        mount(Some("tmpfs"), folder.path(), Some("tmpfs"), flags, Some("size=64k,mode=700")).unwrap();
        Small(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(self.path(), MntFlags::MNT_DETACH);
    }
}

fn event(cursor: u64, length: usize) -> Entry {
    Entry { cursor, time: SystemTime::UNIX_EPOCH, kind: Kind::Event(vec![cursor as u8; length]) }
}

fn read(log: &Log) -> Vec<Entry> {
    let mut reader = log.reader(Start::After(0));
    std::iter::from_fn(|| Some(reader.next_entries()).filter(|entries| !entries.is_empty()))
        .flatten()
        .collect()
}

/// Appends until there is no space; gives what has found some.
fn fill(log: &mut Log, length: usize) -> Vec<Entry> {
    let mut kept = Vec::new();
    loop {
        // More than one, so that a part of what is written at once would fit.
        let next = log.next_cursor();
        let batch = [event(next, length), event(next + 1, length), event(next + 2, length)];
        match log.append(&batch) {
            Ok(count) => kept.extend_from_slice(&batch[..count]),
            Err(error) => {
                assert_eq!(davit_model::Coded::code(&error), davit_model::ErrorCode::ResourceExhausted);
                return kept;
            }
        }
    }
}

#[test]
fn a_full_disk_costs_nothing_that_was_written() {
    let uid = Command::new("id").arg("-u").output().unwrap().stdout;
    if uid != b"0\n" {
        eprintln!("skipped: needs root");
        return;
    }
    for segment in [4 << 10, 1 << 20] {
        let disk = Small::new();
        let ballast = disk.path().join("ballast");
        fs::write(&ballast, vec![0; 24 << 10]).unwrap();
        let limits = Limits { segment, total: u64::MAX, ..Limits::default() };
        let mut log = Log::open(&disk.path().join("log"), limits).unwrap();
        let mut model = fill(&mut log, 700);
        assert!(model.len() > 20);
        assert_eq!(read(&log), model);
        // Nothing torn is left, for this process and the next.
        assert!(log.append(&[event(log.next_cursor(), 8 << 10)]).is_err());
        drop(log);
        let mut log = Log::open(&disk.path().join("log"), limits).unwrap();
        assert_eq!(read(&log), model);
        fs::remove_file(&ballast).unwrap();
        model.extend(fill(&mut log, 700));
        assert_eq!(read(&log), model);
        assert!(model.len() > 40);
    }
}
