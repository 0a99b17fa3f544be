//! What a transfer needs of a content store: a place to put content, and a place to take it from.
//!
//! The store itself has both here; the daemon's view of it, with namespaces, leases and labels, has its own. All calls
//! block, and are made on threads that may.

use std::io::Read;

use davit_content_store::{Error as StoreError, Store, Writer};
use davit_model::{Coded, Digest, ErrorCode, Labels};

/// A store failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct SinkError {
    /// The class of the error.
    pub code: ErrorCode,
    /// What the store says.
    pub text: String,
}

impl SinkError {
    /// The error of a store as one of a transfer.
    pub fn new(error: &(impl Coded + 'static)) -> SinkError {
        SinkError { code: error.code(), text: davit_model::error::chain(error) }
    }
}

impl Coded for SinkError {
    fn code(&self) -> ErrorCode {
        self.code
    }
}

/// What comes of opening a writer.
pub enum Opened {
    /// Nobody else writes it.
    Writer(Box<dyn SinkWriter>),
    /// It is there already.
    Exists,
    /// Somebody else writes it.
    Busy,
}

/// Where a pull puts content.
pub trait Sink: Send + Sync {
    /// The size of content, if it is there.
    ///
    /// # Errors
    /// The store's.
    fn size(&self, digest: &Digest) -> Result<Option<u64>, SinkError>;

    /// The whole of a document that is there, at most `limit` bytes of it.
    ///
    /// # Errors
    /// The store's, and content that is larger.
    fn read(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, SinkError>;

    /// Starts or resumes the ingest `reference` of content of this size and digest.
    ///
    /// # Errors
    /// The store's.
    fn writer(&self, reference: &str, size: u64, digest: &Digest) -> Result<Opened, SinkError>;
}

/// One ingest. Dropping it keeps what was written, for the next writer of the reference.
pub trait SinkWriter: Send {
    /// Bytes that are there.
    fn offset(&self) -> u64;

    /// The digest of the bytes that are there.
    fn digest(&self) -> Digest;

    /// Appends bytes.
    ///
    /// # Errors
    /// The store's.
    fn write(&mut self, bytes: &[u8]) -> Result<(), SinkError>;

    /// Throws away what was written.
    ///
    /// # Errors
    /// The store's.
    fn truncate(&mut self) -> Result<(), SinkError>;

    /// Makes it content with these labels, durably. Content that somebody else was faster to make is fine.
    ///
    /// # Errors
    /// The store's; size and digest are checked once more.
    fn commit(self: Box<Self>, size: u64, digest: &Digest, labels: &Labels) -> Result<(), SinkError>;
}

/// Where a push takes content from.
pub trait Source: Send + Sync {
    /// Opens content; the bytes that come are hashed by who receives them.
    ///
    /// # Errors
    /// The store's; content that is not there.
    fn open(&self, digest: &Digest) -> Result<Box<dyn Read + Send>, SinkError>;

    /// The labels of content; those of its source tell from where it can be mounted.
    ///
    /// # Errors
    /// The store's.
    fn labels(&self, digest: &Digest) -> Result<Labels, SinkError>;
}

/// The whole of what `reader` has of the content `digest`, at most `limit` bytes.
///
/// # Errors
/// Those of the reader, and content that is larger.
pub fn read_whole(reader: impl Read, digest: &Digest, limit: u64) -> Result<Vec<u8>, SinkError> {
    let failed = |text: String| SinkError { code: ErrorCode::Internal, text };
    let mut bytes = Vec::new();
    let read = reader.take(limit + 1).read_to_end(&mut bytes);
    read.map_err(|error| failed(format!("read {digest}: {error}")))?;
    if bytes.len() as u64 > limit {
        return Err(failed(format!("content {digest} has more than {limit} bytes")));
    }
    Ok(bytes)
}

impl Sink for Store {
    fn size(&self, digest: &Digest) -> Result<Option<u64>, SinkError> {
        match self.info(digest) {
            Ok(info) => Ok(Some(info.size)),
            Err(StoreError::NoBlob { .. }) => Ok(None),
            Err(error) => Err(SinkError::new(&error)),
        }
    }

    fn read(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, SinkError> {
        let reader = self.reader(digest).map_err(|error| SinkError::new(&error))?;
        read_whole(reader, digest, limit)
    }

    fn writer(&self, reference: &str, size: u64, digest: &Digest) -> Result<Opened, SinkError> {
        match Store::writer(self, reference, size, Some(digest)) {
            Ok(writer) => Ok(Opened::Writer(Box::new(writer))),
            Err(StoreError::BlobExists { .. }) => Ok(Opened::Exists),
            Err(StoreError::Locked { .. }) => Ok(Opened::Busy),
            Err(error) => Err(SinkError::new(&error)),
        }
    }
}

impl SinkWriter for Writer {
    fn offset(&self) -> u64 {
        self.status().offset
    }

    fn digest(&self) -> Digest {
        Writer::digest(self)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        Writer::write(self, bytes).map_err(|error| SinkError::new(&error))
    }

    fn truncate(&mut self) -> Result<(), SinkError> {
        Writer::truncate(self, 0).map_err(|error| SinkError::new(&error))
    }

    /// The store itself has no labels; they are for its users that have.
    fn commit(self: Box<Self>, size: u64, digest: &Digest, _: &Labels) -> Result<(), SinkError> {
        match Writer::commit(*self, size, Some(digest)) {
            Ok(_) | Err(StoreError::BlobExists { .. }) => Ok(()),
            Err(error) => Err(SinkError::new(&error)),
        }
    }
}

impl Source for Store {
    fn open(&self, digest: &Digest) -> Result<Box<dyn Read + Send>, SinkError> {
        match self.reader(digest) {
            Ok(reader) => Ok(Box::new(reader)),
            Err(error) => Err(SinkError::new(&error)),
        }
    }

    fn labels(&self, _: &Digest) -> Result<Labels, SinkError> {
        Ok(Labels::new())
    }
}
