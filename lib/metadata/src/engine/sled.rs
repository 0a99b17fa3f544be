//! `sled` 0.34, hardened.
//!
//! What it promises is less than its names say (read in its source): `flush` ends in `sync_file_range`, which
//! writes neither the file's size nor the disk's cache; pages above 128 KiB go to files of their own that are
//! never synced; a `snap.*.generating` file that a crash left behind is later read as if it were whole, and then
//! the database does not open any more; recovery has assertions that panic. So here
//!
//! * one tree is used, written by one thread in whole batches, and read only when it opens;
//! * values are split at 4 KiB, so that a page (at most 17 entries) stays below the limit for such files;
//! * each commit ends in an `fdatasync` of our own on the log, on a descriptor that sees its write errors;
//! * unfinished snapshot files are removed before it opens, and if it still fails, it is tried on a copy without
//!   any snapshot file, which makes it read the whole log.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tracing::warn;

use super::{Engine, EngineError, Summary, Write, guarded, read, sync_folder};

/// The most that one entry of the tree holds, in bytes.
const CHUNK_SIZE: usize = 4096;

/// The first chunk starts with the value's length and its CRC-32C, both 32 bits, big endian.
const HEADER_SIZE: usize = 8;

/// The key of an entry ends in the number of its chunk, 16 bits, big endian. A suffix of fixed length keeps
/// keys apart whatever bytes they hold.
const SUFFIX_SIZE: usize = 2;

/// The entry of the summary: its key is too short to have a suffix.
const SUMMARY: &[u8] = b"s";

/// Pages kept in memory, in bytes.
const CACHE_SIZE: u64 = 8 << 20;

/// How long the last threads of an earlier handle may take to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

pub(super) struct Sled {
    database: sled::Db,
    /// The log, to sync.
    log: File,
    log_path: PathBuf,
    blobs_path: PathBuf,
    /// Blob files that are known to be durable.
    synced_blobs: Vec<OsString>,
    /// Chunks of each value that has more than one, to remove those that a shorter value leaves over.
    chunks: HashMap<Bytes, u16>,
}

impl Sled {
    pub(super) fn open(path: &Path, new: bool) -> Result<Sled, EngineError> {
        fs::create_dir_all(path).map_err(EngineError::io("create", path))?;
        remove_snapshots(path, |name| name.ends_with(".generating"))?;
        let first = match open_and_read(path, new) {
            Ok(sled) => return Ok(sled),
            Err(error) => error,
        };
        if new || !is_damage(&first) {
            return Err(first);
        }
        // A snapshot file only saves time; the log alone holds everything. It is tried on a copy, because a
        // failed recovery may write.
        warn!(path = %path.display(), error = %first, "sled does not open, trying without its snapshot files");
        let copy = path.with_extension("recovering");
        let damaged = path.with_extension("damaged");
        let recovered = copy_folder(path, &copy)
            .and_then(|()| remove_snapshots(&copy, |_| true))
            .and_then(|()| open_and_read(&copy, false).map(drop));
        if let Err(error) = recovered {
            warn!(path = %path.display(), error = %error, "sled does not open without its snapshot files either");
            return Err(first);
        }
        remove_folder(&damaged)?;
        fs::rename(path, &damaged).map_err(EngineError::io("rename", path))?;
        fs::rename(&copy, path).map_err(EngineError::io("rename", &copy))?;
        sync_folder(path.parent().unwrap_or(Path::new("/")))?;
        open_and_read(path, false)
    }

    /// Syncs the files that `sled` made for pages too large for its log. There are none as long as no key is
    /// larger than about 500 bytes.
    fn sync_blobs(&mut self) -> Result<(), EngineError> {
        let failed = || EngineError::io("read", &self.blobs_path);
        let mut new = Vec::new();
        let mut present = Vec::new();
        for entry in fs::read_dir(&self.blobs_path).map_err(failed())? {
            let name = entry.map_err(failed())?.file_name();
            if !self.synced_blobs.contains(&name) {
                new.push(self.blobs_path.join(&name));
            }
            present.push(name);
        }
        for path in &new {
            let file = match File::open(path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                file => file.map_err(EngineError::io("open", path))?,
            };
            file.sync_all().map_err(EngineError::io("sync", path))?;
        }
        if !new.is_empty() {
            sync_folder(&self.blobs_path)?;
        }
        self.synced_blobs = present;
        Ok(())
    }
}

impl Engine for Sled {
    fn load(&mut self, record: &mut dyn FnMut(Bytes, Bytes)) -> Result<Option<Summary>, EngineError> {
        self.chunks.clear();
        // Chunks of one value come in order, but other keys may lie between them.
        let mut summary = None;
        let mut parts: HashMap<Bytes, Vec<u8>> = HashMap::new();
        for entry in self.database.iter() {
            let (key, chunk) = entry.map_err(failed("read"))?;
            if key == SUMMARY {
                summary = Summary::from_bytes(&chunk);
                continue;
            }
            let damaged = || EngineError::Corrupt { what: format!("the record {key:?} is not whole") };
            let Some((name, number)) = key.split_last_chunk::<SUFFIX_SIZE>() else { return Err(damaged()) };
            let (name, number) = (Bytes::copy_from_slice(name), u16::from_be_bytes(*number));
            let mut part = parts.remove(&name).unwrap_or_default();
            // Every chunk but the last is full.
            if part.len() != usize::from(number) * CHUNK_SIZE {
                return Err(damaged());
            }
            part.extend_from_slice(&chunk);
            let length = part.first_chunk::<4>().ok_or_else(damaged)?;
            if part.len() < HEADER_SIZE + u32::from_be_bytes(*length) as usize {
                parts.insert(name, part);
                continue;
            }
            if number > 0 {
                self.chunks.insert(name.clone(), number + 1);
            }
            record(name, decode(&part).ok_or_else(damaged)?);
        }
        match parts.keys().next() {
            Some(name) => Err(EngineError::Corrupt { what: format!("the record {name:?} is not whole") }),
            None => Ok(summary),
        }
    }

    fn commit(&mut self, writes: &[Write], summary: Summary) -> Result<(), EngineError> {
        let mut batch = sled::Batch::default();
        for write in writes {
            let before = self.chunks.remove(&write.key).unwrap_or(1);
            let mut after = 0;
            for chunk in write.value.as_ref().map(split).into_iter().flatten() {
                batch.insert(chunk_key(&write.key, after), chunk);
                after += 1;
            }
            for number in after..before {
                batch.remove(chunk_key(&write.key, number));
            }
            if after > 1 {
                self.chunks.insert(write.key.clone(), after);
            }
        }
        batch.insert(SUMMARY, &summary.to_bytes());
        self.database.apply_batch(batch).map_err(failed("apply a batch"))?;
        self.database.flush().map_err(failed("flush"))?;
        self.sync_blobs()?;
        self.log.sync_data().map_err(EngineError::io("sync", &self.log_path))
    }

    fn check(&mut self) -> Result<(), EngineError> {
        // Reading every value, as `load` does, is all the check that there is.
        Ok(())
    }

    fn close(self: Box<Self>) -> Result<(), EngineError> {
        self.database.flush().map_err(failed("flush"))?;
        drop(self.database);
        self.log.sync_all().map_err(EngineError::io("sync", &self.log_path))
    }
}

/// Opens it when nobody has it open any more. The lock of our own folder is held, so what holds `sled`'s is an earlier
/// handle of this process: dropping the last one returns before its threads have ended and let go of the file.
fn open_unlocked(config: &sled::Config) -> sled::Result<sled::Db> {
    let end = Instant::now() + LOCK_PATIENCE;
    loop {
        match config.open() {
            Err(sled::Error::Io(error))
                if error.to_string().starts_with("could not acquire lock") && Instant::now() < end =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            opened => return opened,
        }
    }
}

/// Opens and reads it once, so that what is damaged shows here. Everything created is synced: `sled` syncs
/// neither its folders nor its configuration.
fn open_and_read(path: &Path, new: bool) -> Result<Sled, EngineError> {
    guarded(|| {
        // Without `flush_every_ms` it would sync in a thread of its own and keep errors to itself.
        let config = sled::Config::new().path(path).cache_capacity(CACHE_SIZE).flush_every_ms(None);
        let database = open_unlocked(&config).map_err(failed("open"))?;
        database.flush().map_err(failed("flush"))?;
        let log_path = path.join("db");
        let blobs_path = path.join("blobs");
        for path in [&log_path, &path.join("conf")] {
            let file = File::open(path).map_err(EngineError::io("open", path))?;
            file.sync_all().map_err(EngineError::io("sync", path))?;
        }
        for path in [&blobs_path, path, path.parent().unwrap_or(Path::new("/"))] {
            sync_folder(path)?;
        }
        let log = File::open(&log_path).map_err(EngineError::io("open", &log_path))?;
        let (synced_blobs, chunks) = (Vec::new(), HashMap::new());
        let mut sled = Sled { database, log, log_path, blobs_path, synced_blobs, chunks };
        if new {
            sled.commit(&[], Summary::default())?;
        }
        read(&mut sled, |_, _| ())?;
        Ok(sled)
    })
}

/// Whether another try without snapshot files may help.
fn is_damage(error: &EngineError) -> bool {
    match error {
        EngineError::Sled { source, .. } => match source {
            sled::Error::Corruption { .. }
            | sled::Error::ReportableBug(_)
            | sled::Error::CollectionNotFound(_) => true,
            sled::Error::Io(source) => source.kind() == std::io::ErrorKind::UnexpectedEof,
            sled::Error::Unsupported(_) => false,
        },
        EngineError::Corrupt { .. } | EngineError::Panic { .. } => true,
        EngineError::Io { .. } | EngineError::Redb { .. } => false,
    }
}

fn remove_snapshots(path: &Path, which: impl Fn(&str) -> bool) -> Result<(), EngineError> {
    let mut removed = false;
    for entry in fs::read_dir(path).map_err(EngineError::io("read", path))? {
        let name = entry.map_err(EngineError::io("read", path))?.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && which(&name) {
            let path = path.join(&*name);
            fs::remove_file(&path).map_err(EngineError::io("remove", &path))?;
            removed = true;
        }
    }
    if removed { sync_folder(path) } else { Ok(()) }
}

fn remove_folder(path: &Path) -> Result<(), EngineError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(EngineError::io("remove", path)),
    }
}

/// Copies a folder of files and folders of files, as `sled` keeps it.
fn copy_folder(from: &Path, to: &Path) -> Result<(), EngineError> {
    remove_folder(to)?;
    fs::create_dir(to).map_err(EngineError::io("create", to))?;
    for entry in fs::read_dir(from).map_err(EngineError::io("read", from))? {
        let entry = entry.map_err(EngineError::io("read", from))?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().map_err(EngineError::io("stat", &from))?.is_dir() {
            copy_folder(&from, &to)?;
        } else {
            fs::copy(&from, &to).map_err(EngineError::io("copy", &from))?;
            let copy = File::open(&to).map_err(EngineError::io("open", &to))?;
            copy.sync_all().map_err(EngineError::io("sync", &to))?;
        }
    }
    sync_folder(to)
}

fn chunk_key(key: &[u8], number: u16) -> Vec<u8> {
    [key, &number.to_be_bytes()].concat()
}

/// A value as its chunks: the header and the bytes, cut at [`CHUNK_SIZE`].
fn split(value: &Bytes) -> impl Iterator<Item = Vec<u8>> + use<'_> {
    let first = value.len().min(CHUNK_SIZE - HEADER_SIZE);
    let mut head = Vec::with_capacity(HEADER_SIZE + first);
    head.extend_from_slice(&(value.len() as u32).to_be_bytes());
    head.extend_from_slice(&crc32c::crc32c(value).to_be_bytes());
    head.extend_from_slice(&value[..first]);
    std::iter::once(head).chain(value[first..].chunks(CHUNK_SIZE).map(<[u8]>::to_vec))
}

/// The value of its joined chunks; `None` if length or checksum are not those of the header.
fn decode(joined: &[u8]) -> Option<Bytes> {
    let (length, rest) = joined.split_first_chunk::<4>()?;
    let (checksum, value) = rest.split_first_chunk::<4>()?;
    let whole = u32::from_be_bytes(*length) as usize == value.len()
        && u32::from_be_bytes(*checksum) == crc32c::crc32c(value);
    whole.then(|| Bytes::copy_from_slice(value))
}

fn failed(operation: &'static str) -> impl FnOnce(sled::Error) -> EngineError {
    move |source| EngineError::Sled { operation, source }
}
