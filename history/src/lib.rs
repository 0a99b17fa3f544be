//! A bounded log of what happened, on disk: appended by one writer, read by many while it grows.
//!
//! The log is a folder of segments, `<first cursor, 16 hex digits>.events`, whose format `segment` describes. What an entry
//! says is up to the caller; this crate keeps its bytes, its time and its *cursor*, a number that rises from entry to entry
//! for as long as the folder exists.
//!
//! # Durability
//! An append is one `write`: it survives the death of the process at once. Syncing is the caller's to do, beside the
//! appends ([`Log::take_unsynced`]); what was not synced is lost with the power. No cursor is ever given twice, not
//! even then: each time that the log is opened, cursors go on at the next multiple of [`STRIDE`], which is more than what can
//! have been lost.
//!
//! # Damage
//! A segment that ends in the middle of an entry is cut there, for its writer died. What is damaged otherwise is read up to
//! the damage and left as it is; readers are told of a gap, and the log goes on in a new segment. Nothing that lies in the
//! folder stops a log from being opened.
//!
//! # Bounds
//! All segments together never take more than [`Limits::total`]; the oldest make room. A segment whose last entry is older
//! than [`Limits::age`] goes as well.

mod log;
mod reader;
pub mod segment;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use davit_model::{Coded, ErrorCode};

pub use log::{Log, Unsynced};
pub use reader::{Reader, Start};

/// The distance of the cursors of one opening of a log from those of the next, at least.
pub const STRIDE: u64 = 1 << 20;

/// A segment takes no more than this, so that it holds fewer entries than [`STRIDE`].
const MAX_SEGMENT: u64 = 16 << 20;
const _: () = assert!(MAX_SEGMENT / (segment::MIN_FRAME as u64) < STRIDE);

/// One entry of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its place: later entries have higher ones. Zero is before all.
    pub cursor: u64,
    /// When it happened, which need not rise.
    pub time: SystemTime,
    /// What it says.
    pub kind: Kind,
}

/// What an entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Something happened.
    Event(Vec<u8>),
    /// Here so many events are missing; zero when it is not known how many.
    Gap(u64),
}

/// How much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A segment is closed at this many bytes (at most 16 MiB).
    pub segment: u64,
    /// All segments together.
    pub total: u64,
    /// Nothing is kept for longer than this, but for an eighth of it: segments go as a whole.
    pub age: Duration,
}

impl Default for Limits {
    /// 64 MiB and seven days: some 300,000 events.
    fn default() -> Self {
        Limits { segment: 4 << 20, total: 64 << 20, age: Duration::from_secs(7 * 24 * 3600) }
    }
}

/// Why a log cannot be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// An operation on the folder or a segment failed.
    #[error("{operation} {path}", path = path.display())]
    Io {
        /// `make`, `append to`, …
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The answer of the kernel.
        source: io::Error,
    },
}

impl HistoryError {
    fn io(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> HistoryError {
        let path = path.into();
        move |source| HistoryError::Io { operation, path, source }
    }
}

impl Coded for HistoryError {
    fn code(&self) -> ErrorCode {
        match self {
            HistoryError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                ErrorCode::ResourceExhausted
            }
            HistoryError::Io { .. } => ErrorCode::Internal,
        }
    }
}
