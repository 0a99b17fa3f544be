//! What can go wrong in the store.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use davit_model::{Coded, Digest, ErrorCode};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// An error of the content store. The texts are containerd's where its clients see them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process has the store open.
    #[error("content store {} is in use by another process", path.display())]
    InUse {
        /// The root of the store.
        path: PathBuf,
    },
    /// There is no such blob.
    #[error("content {digest}")]
    NoBlob {
        /// The blob asked for.
        digest: Digest,
    },
    /// The blob to write is there already.
    #[error("content {digest}")]
    BlobExists {
        /// The blob.
        digest: Digest,
    },
    /// There is no such ingest, or it was aborted while it was written.
    #[error("ingest ref {reference:?}")]
    NoIngest {
        /// The reference asked for.
        reference: String,
    },
    /// The reference has a writer.
    #[error("ref {reference} locked for {held:?} (since {})", timestamp(*since))]
    Locked {
        /// The reference.
        reference: String,
        /// For how long.
        held: Duration,
        /// Since when.
        since: SystemTime,
    },
    /// A reference is empty or longer than [`MAX_REFERENCE_SIZE`](crate::MAX_REFERENCE_SIZE).
    #[error("{}", if *size == 0 { "ref must not be empty" } else { "ref is too long" })]
    BadReference {
        /// Bytes of the reference.
        size: usize,
    },
    /// Only truncation to nothing is possible.
    #[error("truncate to {size}: unsupported size")]
    BadTruncation {
        /// The size asked for.
        size: u64,
    },
    /// The size to commit is not the one that was written.
    #[error("unexpected commit size {actual}, expected {expected}")]
    WrongSize {
        /// Bytes written.
        actual: u64,
        /// Bytes announced.
        expected: u64,
    },
    /// The digest to commit is not that of what was written.
    #[error("unexpected commit digest {actual}, expected {expected}")]
    WrongDigest {
        /// The digest of what was written.
        actual: Digest,
        /// The digest announced.
        expected: Digest,
    },
    /// Something in the store is not what the store put there, such as a symbolic link in place of a blob.
    #[error("{} is not a {expected}", path.display())]
    Foreign {
        /// What was found.
        path: PathBuf,
        /// What should be there.
        expected: &'static str,
    },
    /// A store in another process answered with an error.
    #[error("{message}")]
    Remote {
        /// Its class.
        code: ErrorCode,
        /// Its text.
        message: String,
    },
    /// A system call failed.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err` on a system call.
    pub(crate) fn io<E: Into<io::Error>>(operation: &'static str, path: &Path) -> impl FnOnce(E) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { operation, path, source: source.into() }
    }

    /// Whether a file was not there.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(self, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether something is not there or not what the store put there, in contrast to what may pass.
    pub(crate) fn is_damage(&self) -> bool {
        match self {
            Error::Foreign { .. } => true,
            Error::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData)
            }
            _ => false,
        }
    }
}

impl Coded for Error {
    fn code(&self) -> ErrorCode {
        match self {
            Error::NoBlob { .. } | Error::NoIngest { .. } => ErrorCode::NotFound,
            Error::BlobExists { .. } => ErrorCode::AlreadyExists,
            Error::Locked { .. } => ErrorCode::Unavailable,
            Error::BadReference { .. } | Error::BadTruncation { .. } => ErrorCode::InvalidArgument,
            Error::InUse { .. } | Error::WrongSize { .. } | Error::WrongDigest { .. } => {
                ErrorCode::FailedPrecondition
            }
            Error::Foreign { .. } => ErrorCode::DataLoss,
            Error::Remote { code, .. } => *code,
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                    ErrorCode::ResourceExhausted
                }
                _ => ErrorCode::Internal,
            },
        }
    }
}

/// A time as the store writes it: RFC 3339 in UTC, with the nanoseconds that there are.
pub(crate) fn timestamp(time: SystemTime) -> String {
    // The format has no years beyond 9999; no clock shows one.
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_default()
}
