//! The seam to what keeps the records on disk.
//!
//! An engine is owned by one thread, is read once when it opens, and otherwise only ever applies groups of
//! writes. That keeps the seam narrow enough for two implementations to be true alternatives.

mod redb;
mod sled;
mod summary;

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use bytes::Bytes;
use davit_model::{Coded, ErrorCode};

pub(crate) use self::summary::Summary;

/// Which engine keeps the records. It is chosen when a database is created and cannot change afterwards.
///
/// Both lose nothing that was acknowledged in the crash tests (1,500 kills and 300 power cuts each). `redb` is the
/// default for what happens to a damaged file: `sled` takes damage for the end of its log, so that of 60 copies with
/// a torn end, an emptied page or a flipped bit 57 opened with fewer records and no word of it, where `redb` refused
/// 35 and the rest held every record. It also needs less than half the memory (71 MB against 155 MB with 60 MB of
/// records) and no threads (`sled` keeps 7).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// `sled` 0.34, a log-structured tree.
    Sled,
    /// `redb`, a copy-on-write B-tree in one file.
    #[default]
    Redb,
}

impl EngineKind {
    /// The name in the configuration and in the format file.
    pub fn as_str(self) -> &'static str {
        match self {
            EngineKind::Sled => "sled",
            EngineKind::Redb => "redb",
        }
    }

    /// The file or folder of this engine, inside of the database's folder.
    pub(crate) fn file_name(self) -> &'static str {
        match self {
            EngineKind::Sled => "sled",
            EngineKind::Redb => "metadata.redb",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for EngineKind {
    type Err = String;

    fn from_str(name: &str) -> Result<EngineKind, String> {
        match name {
            "sled" => Ok(EngineKind::Sled),
            "redb" => Ok(EngineKind::Redb),
            _ => Err(format!("unknown metadata engine {name:?}: want redb or sled")),
        }
    }
}

/// What an engine failed with.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// `sled` returned an error.
    #[error("sled: {operation}")]
    Sled {
        /// What was asked of it.
        operation: &'static str,
        /// Its answer.
        source: ::sled::Error,
    },
    /// `redb` returned an error.
    #[error("redb: {operation}")]
    Redb {
        /// What was asked of it.
        operation: &'static str,
        /// Its answer.
        source: Box<::redb::Error>,
    },
    /// A system call of our own failed.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The engine's own check found, or a record of ours shows, that the files are damaged.
    #[error("damaged: {what}")]
    Corrupt {
        /// What was found.
        what: String,
    },
    /// The engine panicked.
    #[error("panicked: {message}")]
    Panic {
        /// The panic's message.
        message: String,
    },
}

impl EngineError {
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> EngineError {
        let path = path.to_owned();
        move |source| EngineError::Io { operation, path, source }
    }

    /// The system call's error at the bottom, if that is what it was.
    fn io_error(&self) -> Option<&io::Error> {
        match self {
            EngineError::Sled { source: ::sled::Error::Io(source), .. } | EngineError::Io { source, .. } => {
                Some(source)
            }
            EngineError::Redb { source, .. } => match &**source {
                ::redb::Error::Io(source) => Some(source),
                _ => None,
            },
            EngineError::Sled { .. } | EngineError::Corrupt { .. } | EngineError::Panic { .. } => None,
        }
    }
}

impl Coded for EngineError {
    fn code(&self) -> ErrorCode {
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded, io::ErrorKind::FileTooLarge];
        if self.io_error().is_some_and(|error| full.contains(&error.kind())) {
            return ErrorCode::ResourceExhausted;
        }
        match self {
            EngineError::Sled { .. } | EngineError::Redb { .. } | EngineError::Io { .. } => {
                ErrorCode::Internal
            }
            EngineError::Corrupt { .. } => ErrorCode::DataLoss,
            EngineError::Panic { .. } => ErrorCode::Internal,
        }
    }
}

/// One record to set or, without a value, to remove.
#[derive(Debug, Clone)]
pub(crate) struct Write {
    pub(crate) key: Bytes,
    pub(crate) value: Option<Bytes>,
}

impl Write {
    /// What it takes in memory, roughly, in bytes.
    pub(crate) fn size(&self) -> usize {
        size_of::<Write>() + self.key.len() + self.value.as_ref().map_or(0, Bytes::len)
    }
}

/// What keeps the records on disk.
pub(crate) trait Engine: Send {
    /// Calls `record` with every record, in any order; returns the summary that was stored last.
    fn load(&mut self, record: &mut dyn FnMut(Bytes, Bytes)) -> Result<Option<Summary>, EngineError>;

    /// Applies all writes, each of another key, and stores the summary of the records with them. When it returns
    /// `Ok` they are on stable storage; after a crash before that, either all of them are there or none.
    fn commit(&mut self, writes: &[Write], summary: Summary) -> Result<(), EngineError>;

    /// Checks the engine's own structures on disk, as far as `load` does not.
    fn check(&mut self) -> Result<(), EngineError>;

    /// Leaves the files in the state that opens fastest.
    fn close(self: Box<Self>) -> Result<(), EngineError>;
}

/// Opens the engine's files in the database's folder; if it is `new`, creates and syncs them.
pub(crate) fn open(kind: EngineKind, folder: &Path, new: bool) -> Result<Box<dyn Engine>, EngineError> {
    let path = folder.join(kind.file_name());
    match kind {
        EngineKind::Redb => Ok(Box::new(redb::Redb::open(&path, new)?)),
        EngineKind::Sled => Ok(Box::new(sled::Sled::open(&path, new)?)),
    }
}

/// Calls `record` with every record; fails if they do not add up to the stored summary, which is returned.
pub(crate) fn read(
    engine: &mut dyn Engine,
    mut record: impl FnMut(Bytes, Bytes),
) -> Result<Summary, EngineError> {
    let mut found = Summary::default();
    let stored = engine.load(&mut |key, value| {
        found.add(&key, &value);
        record(key, value);
    })?;
    if stored == Some(found) {
        return Ok(found);
    }
    Err(EngineError::Corrupt {
        what: format!("the records are not those written last: {stored:?}, {found:?}"),
    })
}

/// Runs a call into an engine; a panic in there becomes an error.
pub(crate) fn guarded<T>(call: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    // Nothing of ours is shared with the call but the engine itself, and that is never used again after a panic.
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(EngineError::Panic { message: text.unwrap_or_else(|| "no message".to_owned()) })
    })
}

/// Makes the entries of a folder durable.
pub(crate) fn sync_folder(path: &Path) -> Result<(), EngineError> {
    let folder = std::fs::File::open(path).map_err(EngineError::io("open", path))?;
    folder.sync_all().map_err(EngineError::io("sync", path))
}
