//! The shim's journal: what it knows that must survive it, in a file of the container's bundle.
//!
//! A shim appends each exit before it tells anyone, and each event before it sends it; when the daemon has
//! acknowledged an event, it appends that too. So whoever reads the file later (the shim's `delete` action,
//! or a daemon that finds a dead shim) knows how every process ended and which events nobody has received.
//!
//! # Durability
//! A record is one `write` to a file in the bundle, which lies on tmpfs where the host's `/run` does. It
//! survives the death of the shim and of the daemon. It is not synced: after a power cut the containers are
//! gone with everything that the record is about.
//!
//! # Format
//! ```text
//! file   = magic "DAVITJ" | version u16 (1) | record*
//! record = length u32 | crc32c u32 | kind u8 | body       all integers little endian
//! ```
//! `length` counts kind and body, the checksum covers them. The body is a protobuf message. Records of an
//! unknown kind are skipped, a file of a higher version is refused. A record that is incomplete or does not
//! match its checksum ends the file: it was torn when its writer died, and so nobody acted on it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use davit_model::{Coded, ErrorCode};
use nix::fcntl::OFlag;
use prost::Message;

/// The name of the file in the bundle.
pub const FILE_NAME: &str = "journal";

const MAGIC: &[u8; 6] = b"DAVITJ";
const VERSION: u16 = 1;
const HEADER: u64 = 8;
const RECORD_HEADER: usize = 8;
/// More than any record of ours: an event holds at most a request, and frames are limited to 4 MiB.
const MAX_RECORD: usize = 8 << 20;

/// The most that is read of a file; what is behind that counts as torn. A million events.
const MAX_JOURNAL: u64 = 256 << 20;
/// The folder may be in the reach of a container: a link is not followed there, and the other end of a FIFO not waited for.
const CAREFULLY: i32 = OFlag::O_NOFOLLOW.union(OFlag::O_NONBLOCK).bits();

const KIND_EXIT: u8 = 1;
const KIND_EVENT: u8 = 2;
const KIND_SENT: u8 = 3;
const KIND_FORGOTTEN: u8 = 4;
const KIND_START: u8 = 5;

/// Why a journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The operation on the file failed.
    #[error("{operation} journal {path}", path = path.display())]
    Io {
        /// `open`, `read`, `append to`, …
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The answer of the kernel.
        source: io::Error,
    },
    /// The file is something else.
    #[error("{path} is no journal", path = path.display())]
    Magic {
        /// The file.
        path: PathBuf,
    },
    /// A later release wrote it.
    #[error("journal {path} has version {version}, known are versions up to {VERSION}", path = path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version found.
        version: u16,
    },
    /// There is no such event where one was said to be.
    #[error("no event at offset {offset} of journal {path}", path = path.display())]
    NoEvent {
        /// The file.
        path: PathBuf,
        /// The offset.
        offset: u64,
    },
}

impl Coded for JournalError {
    fn code(&self) -> ErrorCode {
        match self {
            JournalError::Io { .. } => ErrorCode::Internal,
            JournalError::Magic { .. } | JournalError::NoEvent { .. } => ErrorCode::DataLoss,
            JournalError::Version { .. } => ErrorCode::Unimplemented,
        }
    }
}

/// How a process ended.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ExitRecord {
    /// The exec's id, or the container's for its init process.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Its pid, as the host sees it.
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    /// The code, or 128 plus the signal.
    #[prost(uint32, tag = "3")]
    pub status: u32,
    /// When, in seconds since the epoch.
    #[prost(int64, tag = "4")]
    pub seconds: i64,
    /// The nanoseconds of that second.
    #[prost(int32, tag = "5")]
    pub nanos: i32,
    /// The shim was gone, and who cleaned up after it killed the process: how it would have ended nobody knows.
    #[prost(bool, tag = "6")]
    pub killed: bool,
}

/// A process that the runtime has left to the shim, so that whoever cleans up after the shim knows it again.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StartRecord {
    /// The exec's id, or the container's for its init process.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Its pid, as the host sees it.
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    /// When it was made, in clock ticks since boot (`starttime` of proc_pid_stat(5)): the pid alone may be another
    /// process's by now.
    #[prost(uint64, tag = "3")]
    pub start_time: u64,
}

/// An event on its way to the daemon.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct EventRecord {
    /// Rises by at least one from event to event of a shim.
    #[prost(uint64, tag = "1")]
    pub sequence: u64,
    /// When, in seconds since the epoch.
    #[prost(int64, tag = "2")]
    pub seconds: i64,
    /// The nanoseconds of that second.
    #[prost(int32, tag = "3")]
    pub nanos: i32,
    /// The namespace of the container.
    #[prost(string, tag = "4")]
    pub namespace: String,
    /// Such as `/tasks/exit`.
    #[prost(string, tag = "5")]
    pub topic: String,
    /// The bare full name of the message.
    #[prost(string, tag = "6")]
    pub type_url: String,
    /// The message, encoded.
    #[prost(bytes = "vec", tag = "7")]
    pub value: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct SentBody {
    #[prost(uint64, tag = "1")]
    sequence: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct ForgottenBody {
    #[prost(string, tag = "1")]
    id: String,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A process is there.
    Start(StartRecord),
    /// A process has ended.
    Exit(ExitRecord),
    /// An event wants to be sent.
    Event(EventRecord),
    /// The daemon has acknowledged the event of this sequence number.
    Sent(u64),
    /// The exec of this id is deleted: neither its start nor its exit need be kept.
    Forgotten(String),
}

/// What a journal says, all records taken together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// The processes that were left to the shim and of whose end it knows nothing, by id.
    pub running: BTreeMap<String, StartRecord>,
    /// The last exit of each process that is not forgotten, by id.
    pub exits: BTreeMap<String, ExitRecord>,
    /// The events that nobody has acknowledged, in order.
    pub unsent: Vec<EventRecord>,
    /// The highest sequence number seen.
    pub last_sequence: u64,
    /// True if something behind the last whole record had to be ignored.
    pub torn: bool,
}

impl Contents {
    /// The exits in the order in which they happened.
    pub fn exits_in_order(&self) -> Vec<&ExitRecord> {
        let mut exits: Vec<&ExitRecord> = self.exits.values().collect();
        exits.sort_by_key(|exit| (exit.seconds, exit.nanos));
        exits
    }
}

/// A journal that is open for appending.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    length: u64,
}

impl Journal {
    /// Opens the journal at `path`, or makes it (mode 0600). What is torn at its end is cut off.
    ///
    /// # Errors
    /// [`JournalError`]; a file that is no journal, or one of a later version, is left as it is.
    pub fn open(path: &Path) -> Result<(Journal, Contents), JournalError> {
        let io = |operation, source| JournalError::Io { operation, path: path.to_owned(), source };
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.custom_flags(CAREFULLY).open(path).map_err(|source| io("open", source))?;
        let bytes = read_all(&file).map_err(|source| io("read", source))?;
        let (contents, mut length) = parse(path, &bytes)?;
        if (bytes.len() as u64) != length || length < HEADER {
            file.set_len(length).map_err(|source| io("truncate", source))?;
        }
        if length < HEADER {
            file.write_all_at(&header(), 0).map_err(|source| io("append to", source))?;
            length = HEADER;
        }
        Ok((Journal { file, path: path.to_owned(), length }, contents))
    }

    /// What [`Journal::resume`] needs beside the length.
    pub fn file(&self) -> (BorrowedFd<'_>, &Path) {
        (self.file.as_fd(), &self.path)
    }

    /// A journal that the writer before had open, with what it knew of it. Nothing is read.
    pub fn resume(file: OwnedFd, path: PathBuf, length: u64) -> Journal {
        Journal { file: file.into(), path, length }
    }

    /// Appends records in one write: after a crash of the writer either a prefix of them is there or none.
    /// Returns where each of them begins, for [`Journal::event`].
    ///
    /// # Errors
    /// The write failed, mostly for want of space; the file is as it was before.
    pub fn append(&mut self, records: &[Record]) -> Result<Vec<u64>, JournalError> {
        let mut bytes = Vec::new();
        let mut offsets = Vec::with_capacity(records.len());
        for record in records {
            offsets.push(self.length + bytes.len() as u64);
            encode(record, &mut bytes);
        }
        if let Err(source) = self.file.write_all_at(&bytes, self.length) {
            // A part may have been written; without its end it is torn, and the next append overwrites it.
            let _ = self.file.set_len(self.length);
            return Err(JournalError::Io { operation: "append to", path: self.path.clone(), source });
        }
        self.length += bytes.len() as u64;
        Ok(offsets)
    }

    /// Reads the event that was appended at this offset. Works also after the file has been unlinked.
    ///
    /// # Errors
    /// The read failed, or no whole event is there.
    pub fn event(&self, offset: u64) -> Result<EventRecord, JournalError> {
        let io = |source| JournalError::Io { operation: "read", path: self.path.clone(), source };
        let none = || JournalError::NoEvent { path: self.path.clone(), offset };
        let mut head = [0u8; RECORD_HEADER];
        self.file.read_exact_at(&mut head, offset).map_err(io)?;
        let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        if length > MAX_RECORD {
            return Err(none());
        }
        let mut bytes = head.to_vec();
        bytes.resize(RECORD_HEADER + length, 0);
        self.file.read_exact_at(&mut bytes[RECORD_HEADER..], offset + RECORD_HEADER as u64).map_err(io)?;
        match next_record(&bytes) {
            Some((Some(Record::Event(event)), _)) => Ok(event),
            Some(_) | None => Err(none()),
        }
    }

    /// The bytes of the file.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Replaces the file by one that holds only these records, so that it does not grow for ever. Offsets
    /// returned before are void after that.
    ///
    /// # Errors
    /// The old file stays in place and in use. `NotFound` means that the bundle is gone, or that there is
    /// another one in its place, whose journal is not ours to replace.
    pub fn rewrite(&mut self, records: &[Record]) -> Result<(), JournalError> {
        let io = |operation, source| JournalError::Io { operation, path: self.path.clone(), source };
        let named = std::fs::symlink_metadata(&self.path).map_err(|source| io("find", source))?;
        let ours = self.file.metadata().map_err(|source| io("find", source))?;
        if (named.dev(), named.ino()) != (ours.dev(), ours.ino()) {
            return Err(io("find", io::ErrorKind::NotFound.into()));
        }
        let temporary = self.path.with_extension("new");
        let io = |operation, source| JournalError::Io { operation, path: temporary.clone(), source };
        let mut bytes = header().to_vec();
        for record in records {
            encode(record, &mut bytes);
        }
        // What a writer left that died here, or somebody else put there.
        let _ = std::fs::remove_file(&temporary);
        let mut file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(|source| io("open", source))?;
        file.write_all(&bytes).map_err(|source| io("append to", source))?;
        std::fs::rename(&temporary, &self.path).map_err(|source| io("rename", source))?;
        self.file = file;
        self.length = bytes.len() as u64;
        Ok(())
    }
}

/// Reads a journal without touching it: that of a dead shim, or of a live one, whose next record may be half
/// written. A missing file is an empty journal.
///
/// # Errors
/// [`JournalError`].
pub fn read(path: &Path) -> Result<Contents, JournalError> {
    let opened = File::options().read(true).custom_flags(CAREFULLY).open(path);
    match opened.and_then(|file| read_all(&file)) {
        Ok(bytes) => Ok(parse(path, &bytes)?.0),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(Contents::default()),
        Err(source) => Err(JournalError::Io { operation: "read", path: path.to_owned(), source }),
    }
}

/// What is read of a file: all of it up to [`MAX_JOURNAL`], and nothing of what is no file at all.
fn read_all(file: &File) -> io::Result<Vec<u8>> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_JOURNAL).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn header() -> [u8; HEADER as usize] {
    let mut bytes = [0; HEADER as usize];
    bytes[..6].copy_from_slice(MAGIC);
    bytes[6..].copy_from_slice(&VERSION.to_le_bytes());
    bytes
}

fn encode(record: &Record, bytes: &mut Vec<u8>) {
    let (kind, body) = match record {
        Record::Start(start) => (KIND_START, start.encode_to_vec()),
        Record::Exit(exit) => (KIND_EXIT, exit.encode_to_vec()),
        Record::Event(event) => (KIND_EVENT, event.encode_to_vec()),
        Record::Sent(sequence) => (KIND_SENT, SentBody { sequence: *sequence }.encode_to_vec()),
        Record::Forgotten(id) => (KIND_FORGOTTEN, ForgottenBody { id: id.clone() }.encode_to_vec()),
    };
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&[kind]), &body);
    bytes.extend_from_slice(&((body.len() + 1) as u32).to_le_bytes());
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes.push(kind);
    bytes.extend_from_slice(&body);
}

/// The record at the start of `bytes` and its length. The record is `None` if its kind is not known; all is
/// `None` if no whole record is there.
fn next_record(bytes: &[u8]) -> Option<(Option<Record>, usize)> {
    let (head, rest) = bytes.split_at_checked(RECORD_HEADER)?;
    let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let checksum = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
    let (kind, body) = rest.get(..length)?.split_first()?;
    if length > MAX_RECORD || crc32c::crc32c(&rest[..length]) != checksum {
        return None;
    }
    let record = match *kind {
        KIND_START => Some(Record::Start(StartRecord::decode(body).ok()?)),
        KIND_EXIT => Some(Record::Exit(ExitRecord::decode(body).ok()?)),
        KIND_EVENT => Some(Record::Event(EventRecord::decode(body).ok()?)),
        KIND_SENT => Some(Record::Sent(SentBody::decode(body).ok()?.sequence)),
        KIND_FORGOTTEN => Some(Record::Forgotten(ForgottenBody::decode(body).ok()?.id)),
        _ => None,
    };
    Some((record, RECORD_HEADER + length))
}

/// Takes a file apart. Also returns the length of its valid part, 0 if even the header is not whole.
fn parse(path: &Path, bytes: &[u8]) -> Result<(Contents, u64), JournalError> {
    let header = header();
    let Some((head, _)) = bytes.split_at_checked(HEADER as usize) else {
        if header.starts_with(bytes) {
            return Ok((Contents { torn: !bytes.is_empty(), ..Contents::default() }, 0));
        }
        return Err(JournalError::Magic { path: path.to_owned() });
    };
    if !head.starts_with(MAGIC) {
        return Err(JournalError::Magic { path: path.to_owned() });
    }
    let version = u16::from_le_bytes([head[6], head[7]]);
    if version != VERSION {
        return Err(JournalError::Version { path: path.to_owned(), version });
    }
    let mut contents = Contents::default();
    let mut sent = BTreeSet::new();
    let mut position = HEADER as usize;
    while let Some((record, length)) = next_record(&bytes[position..]) {
        match record {
            Some(Record::Start(start)) => {
                // A second life of the same name: an exit from the first would be taken for its own.
                contents.exits.remove(&start.id);
                contents.running.insert(start.id.clone(), start);
            }
            Some(Record::Exit(exit)) => {
                contents.running.remove(&exit.id);
                contents.exits.insert(exit.id.clone(), exit);
            }
            Some(Record::Event(event)) => {
                contents.last_sequence = contents.last_sequence.max(event.sequence);
                contents.unsent.push(event);
            }
            Some(Record::Sent(sequence)) => {
                sent.insert(sequence);
            }
            Some(Record::Forgotten(id)) => {
                contents.running.remove(&id);
                contents.exits.remove(&id);
            }
            None => {}
        }
        position += length;
    }
    contents.unsent.retain(|event| !sent.contains(&event.sequence));
    contents.torn = position != bytes.len();
    Ok((contents, position as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn exit(id: &str, status: u32) -> Record {
        Record::Exit(ExitRecord { id: id.to_owned(), pid: 42, status, seconds: 1, nanos: 2, killed: false })
    }

    fn event(sequence: u64) -> Record {
        Record::Event(EventRecord {
            sequence,
            topic: "/tasks/exit".to_owned(),
            value: vec![sequence as u8; sequence as usize % 300],
            ..EventRecord::default()
        })
    }

    #[test]
    fn a_fifo_or_a_link_is_no_journal() {
        let folder = tempfile::tempdir().unwrap();
        let (fifo, link, canary) =
            (folder.path().join("fifo"), folder.path().join("link"), folder.path().join("canary"));
        // Opened without care it would wait for a writer, for ever.
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::write(&canary, header()).unwrap();
        std::os::unix::fs::symlink(&canary, &link).unwrap();
        for path in [&fifo, &link] {
            assert!(matches!(read(path), Err(JournalError::Io { .. })), "{}", path.display());
            assert!(matches!(Journal::open(path), Err(JournalError::Io { .. })), "{}", path.display());
        }
        let path = folder.path().join(FILE_NAME);
        let (mut journal, _) = Journal::open(&path).unwrap();
        std::os::unix::fs::symlink(&canary, path.with_extension("new")).unwrap();
        journal.rewrite(&[exit("a", 1)]).unwrap();
        assert_eq!(std::fs::read(&canary).unwrap(), header());
        assert_eq!(read(&path).unwrap().exits.len(), 1);
    }

    #[test]
    fn what_is_appended_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        assert_eq!(read(&path).unwrap(), Contents::default());
        let (mut journal, _) = Journal::open(&path).unwrap();
        let offsets = journal.append(&[exit("a", 1), event(1), event(2)]).unwrap();
        journal.append(&[exit("e", 3), Record::Sent(1)]).unwrap();
        assert_eq!(journal.event(offsets[2]).unwrap().sequence, 2);
        assert!(journal.event(offsets[0]).is_err());
        let contents = read(&path).unwrap();
        assert_eq!(contents.exits["a"].status, 1);
        assert_eq!(contents.unsent.iter().map(|event| event.sequence).collect::<Vec<_>>(), [2]);
        assert_eq!((contents.last_sequence, contents.torn), (2, false));
        journal.append(&[Record::Forgotten("e".to_owned())]).unwrap();
        drop(journal);
        let (_, contents) = Journal::open(&path).unwrap();
        assert_eq!(contents.exits.keys().collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn what_runs_is_known_until_it_ends_and_ends_are_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        let (mut journal, _) = Journal::open(&path).unwrap();
        let start =
            |id: &str, pid| Record::Start(StartRecord { id: id.to_owned(), pid, start_time: u64::from(pid) });
        let ended = |id: &str, seconds| {
            Record::Exit(ExitRecord { id: id.to_owned(), seconds, ..ExitRecord::default() })
        };
        journal.append(&[start("c", 1), start("z", 2), start("a", 3), start("gone", 4)]).unwrap();
        journal.append(&[ended("z", 5), ended("a", 6), ended("gone", 4)]).unwrap();
        journal.append(&[Record::Forgotten("gone".to_owned())]).unwrap();
        let contents = read(&path).unwrap();
        assert_eq!(contents.running.values().map(|start| start.pid).collect::<Vec<_>>(), [1]);
        let order: Vec<_> = contents.exits_in_order().iter().map(|exit| exit.id.as_str()).collect();
        assert_eq!(order, ["z", "a"]);
        journal.append(&[start("z", 9)]).unwrap();
        let contents = read(&path).unwrap();
        assert!(contents.running.contains_key("z") && !contents.exits.contains_key("z"));
    }

    #[test]
    fn a_rewritten_journal_holds_only_what_is_given() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        let (mut journal, _) = Journal::open(&path).unwrap();
        journal.append(&[exit("a", 1), event(1), event(2)]).unwrap();
        journal.rewrite(&[exit("a", 1)]).unwrap();
        let offset = journal.append(&[event(3)]).unwrap()[0];
        assert_eq!(journal.event(offset).unwrap().sequence, 3);
        let contents = read(&path).unwrap();
        assert_eq!((contents.exits.len(), contents.unsent.len()), (1, 1));
        // A journal that was put in its place is left alone.
        std::fs::remove_file(&path).unwrap();
        let (mut other, _) = Journal::open(&path).unwrap();
        other.append(&[event(9)]).unwrap();
        assert!(journal.rewrite(&[]).is_err());
        assert_eq!(read(&path).unwrap().last_sequence, 9);
        std::fs::remove_dir_all(folder.path()).unwrap();
        assert!(journal.rewrite(&[]).is_err());
        assert_eq!(journal.event(offset).unwrap().sequence, 3);
    }

    #[test]
    fn foreign_and_later_files_are_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        std::fs::write(&path, b"something else").unwrap();
        assert!(matches!(Journal::open(&path), Err(JournalError::Magic { .. })));
        std::fs::write(&path, b"DAVITJ\x02\x00").unwrap();
        assert!(matches!(Journal::open(&path), Err(JournalError::Version { version: 2, .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"DAVITJ\x02\x00");
    }

    #[test]
    fn unknown_kinds_are_skipped() {
        let mut bytes = header().to_vec();
        bytes.extend_from_slice(&3u32.to_le_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(&[200, 1, 2]).to_le_bytes());
        bytes.extend_from_slice(&[200, 1, 2]);
        encode(&exit("a", 1), &mut bytes);
        let (contents, length) = parse(Path::new("x"), &bytes).unwrap();
        assert_eq!((contents.exits.len(), contents.torn, length), (1, false, bytes.len() as u64));
    }

    #[test]
    fn the_journal_of_a_later_bundle_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        let (mut earlier, _) = Journal::open(&path).unwrap();
        earlier.append(&[exit("box", 1)]).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(earlier.rewrite(&[]).is_err(), "its bundle is gone");
        let (mut later, _) = Journal::open(&path).unwrap();
        assert!(earlier.rewrite(&[]).is_err(), "its bundle is gone, and another one is there");
        later.append(&[exit("box", 2)]).unwrap();
        assert_eq!(read(&path).unwrap().exits["box"].status, 2);
    }

    /// What a writer that died has left behind the damage must not come back when the next one writes over the damage.
    #[test]
    fn nothing_behind_the_damage_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        let (mut journal, _) = Journal::open(&path).unwrap();
        let offsets = journal.append(&[exit("one", 1), exit("two", 2), exit("ten", 3)]).unwrap();
        drop(journal);
        let mut bytes = std::fs::read(&path).unwrap();
        let damaged = usize::try_from(offsets[1]).unwrap() + RECORD_HEADER;
        bytes[damaged] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let (mut journal, contents) = Journal::open(&path).unwrap();
        assert!(contents.torn);
        // As long as the damaged one.
        journal.append(&[exit("new", 4)]).unwrap();
        let found = read(&path).unwrap();
        assert!(!found.torn);
        assert_eq!(found.exits.keys().collect::<Vec<_>>(), ["new", "one"]);
    }

    proptest! {
        /// Whatever a crash leaves of the file, a prefix of the records is read, and the journal goes on.
        #[test]
        fn a_torn_tail_costs_only_itself(count in 1u64..8, cut in 0usize..2000) {
            let mut bytes = header().to_vec();
            let mut ends = vec![bytes.len()];
            for sequence in 1..=count {
                encode(&event(sequence), &mut bytes);
                ends.push(bytes.len());
            }
            let cut = cut % (bytes.len() + 1);
            let whole = ends.iter().filter(|end| **end <= cut).count().saturating_sub(1);
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join(FILE_NAME);
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let (mut journal, contents) = Journal::open(&path).unwrap();
            prop_assert_eq!(contents.unsent.len(), whole);
            journal.append(&[event(100)]).unwrap();
            prop_assert_eq!(read(&path).unwrap().unsent.len(), whole + 1);
        }

        /// No content of a file makes the reader panic, and no flipped bit goes unnoticed.
        #[test]
        fn damage_is_noticed(at in 8usize..200, bit in 0u8..8, noise in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut bytes = header().to_vec();
            encode(&exit("some-container", 137), &mut bytes);
            let clean = bytes.len();
            let at = 8 + (at - 8) % (clean - 8);
            bytes[at] ^= 1 << bit;
            bytes.extend_from_slice(&noise);
            let (contents, _) = parse(Path::new("x"), &bytes).unwrap();
            prop_assert!(contents.exits.is_empty());
        }
    }
}
