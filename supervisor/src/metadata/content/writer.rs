//! [`NsWriter`]: the writer of one ingest of one namespace; and [`IoWriter`]: one for archivers and encoders.

use std::io::{self, Write};
use std::time::SystemTime;

use davit_content_store::Error as StoreError;
use davit_metadata::Txn;
use davit_model::{Digest, Labels};

use crate::blobs::BlobWriter;
use crate::metadata::error::{Error, Object};
use crate::metadata::event::Event;
use crate::metadata::schema::{self, BlobRecord, IngestRecord, Table, timestamp};
use crate::metadata::{Effects, fields, leases};

use super::{Content, IngestStatus};

/// How much of a shared blob is copied at once, when a client writes to it after all.
const COPY_BUFFER_SIZE: usize = 1 << 20;

/// The one writer of an ingest. Dropping it frees the reference and keeps what was written.
///
/// [`write`](NsWriter::write), [`truncate`](NsWriter::truncate) and [`commit`](NsWriter::commit) block: they write
/// and sync files. An asynchronous caller moves the writer into the lane of the content ([`Content::lane`]) and back
/// for each of them.
/// [`status`](NsWriter::status) and [`digest`](NsWriter::digest) do not block.
pub struct NsWriter {
    content: Content,
    reference: String,
    backend: String,
    state: State,
}

enum State {
    /// Nothing is written: the blob of another namespace is to be had as it is.
    Shared { digest: Digest, size: u64, started_at: SystemTime },
    /// Data goes to the ingest of the store.
    Open(BlobWriter),
    /// After a commit, whether or not it succeeded.
    Closed { status: IngestStatus, digest: Digest },
}

impl std::fmt::Debug for NsWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NsWriter").field("backend", &self.backend).finish_non_exhaustive()
    }
}

impl NsWriter {
    pub(super) fn new(content: Content, reference: String, backend: String, writer: BlobWriter) -> NsWriter {
        NsWriter { content, reference, backend, state: State::Open(writer) }
    }

    pub(super) fn shared(
        content: Content,
        reference: String,
        backend: String,
        digest: Digest,
        size: u64,
    ) -> NsWriter {
        let state = State::Shared { digest, size, started_at: SystemTime::now() };
        NsWriter { content, reference, backend, state }
    }

    /// How far it has come. A writer that shares a blob is complete from the start.
    pub fn status(&self) -> IngestStatus {
        let reference = self.reference.clone();
        match &self.state {
            State::Open(writer) => IngestStatus { reference, ..writer.status() },
            State::Shared { digest, size, started_at } => IngestStatus {
                reference,
                offset: *size,
                total: *size,
                expected: Some(digest.clone()),
                started_at: *started_at,
                updated_at: *started_at,
            },
            State::Closed { status, .. } => status.clone(),
        }
    }

    /// The digest of what was written so far; after a commit, that of the blob.
    pub fn digest(&self) -> Digest {
        match &self.state {
            State::Open(writer) => writer.digest(),
            State::Shared { digest, .. } | State::Closed { digest, .. } => digest.clone(),
        }
    }

    /// Appends bytes. Blocks.
    ///
    /// # Errors
    /// Those of the store; what was written before one counts.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if bytes.is_empty() {
            return Ok(());
        }
        let keep = match &self.state {
            State::Shared { size, .. } => *size,
            State::Open(_) | State::Closed { .. } => 0,
        };
        Ok(self.open(keep)?.write(bytes)?)
    }

    /// Throws away what was written; `size` must be 0. Blocks.
    ///
    /// # Errors
    /// Those of the store.
    pub fn truncate(&mut self, size: u64) -> Result<(), Error> {
        Ok(self.open(0)?.truncate(size)?)
    }

    /// The writer of the store. One that shared a blob until now gets an ingest with the first `keep` bytes of it.
    fn open(&mut self, keep: u64) -> Result<&mut BlobWriter, Error> {
        if let State::Shared { digest, .. } = &self.state {
            let store = self.content.store();
            let mut writer = store.writer(&self.backend, keep)?;
            writer.truncate(0)?;
            if keep > 0 {
                let reader = store.reader(digest)?;
                let mut buffer = vec![0; COPY_BUFFER_SIZE];
                let mut offset = 0;
                while offset < keep {
                    let read = reader.read_at(&mut buffer, offset).map_err(|source| StoreError::Io {
                        operation: "read",
                        path: digest.as_str().into(),
                        source,
                    })?;
                    if read == 0 {
                        break;
                    }
                    writer.write(&buffer[..read])?;
                    offset += read as u64;
                }
            }
            self.state = State::Open(writer);
        }
        match &mut self.state {
            State::Open(writer) => Ok(writer),
            State::Shared { .. } | State::Closed { .. } => {
                Err(Error::Invalid { rule: "cannot write to a closed writer" })
            }
        }
    }

    /// Makes what was written a blob of the namespace, if it has the size (0 = any) and the digest that are
    /// expected, with these labels; attaches it to the caller's lease in place of the ingest. Blocks until blob and
    /// record are durable. The reference is free afterwards in any case.
    ///
    /// # Errors
    /// [`Error::Size`], [`Error::CommitDigest`] and those of the store; the ingest stays as it is.
    /// [`Error::AlreadyExists`] when the namespace has the blob: the ingest is gone, the labels are not changed,
    /// and the lease holds the blob. [`Error::NotFound`] for the lease, [`Error::Label`].
    pub fn commit(&mut self, size: u64, expected: Option<&Digest>, mut labels: Labels) -> Result<(), Error> {
        let status = self.status();
        let closed = State::Closed { digest: self.digest(), status };
        let before = std::mem::replace(&mut self.state, closed);
        fields::check_labels("info.Labels", &labels)?;
        fields::drop_empty(&mut labels);

        let content = self.content.clone();
        let claims = &content.metadata.inner.blob_claims;
        let store = content.store();
        let mut shared = false;
        let (digest, size, _claims) = match before {
            State::Closed { .. } => return Err(Error::Invalid { rule: "cannot commit on closed writer" }),
            State::Shared { digest, size: found, .. } => {
                shared = true;
                self.check_size(found, size)?;
                if expected.is_some_and(|expected| *expected != digest) {
                    return Err(Error::CommitDigest { reference: self.reference.clone() });
                }
                // Alone: a writer that has renamed the blob but not synced the folder yet shares the claim.
                let claim = claims.take(digest.as_str());
                // The ingest's record held the blob, but a record expires.
                store.info(&digest)?;
                (digest, found, [Some(claim), None])
            }
            State::Open(writer) => {
                let found = writer.status().offset;
                self.check_size(found, size)?;
                // From the rename to the record nobody may take the blob for garbage. The digest may turn out to be
                // the expected one, when that is of another algorithm.
                let so_far = writer.digest();
                let claim = claims.share(so_far.as_str());
                let other = expected.filter(|expected| **expected != so_far);
                let other = other.map(|expected| claims.share(expected.as_str()));
                let digest = match writer.commit(found, expected) {
                    Ok(digest) | Err(StoreError::BlobExists { digest }) => digest,
                    Err(error) => return Err(error.into()),
                };
                (digest, found, [Some(claim), other])
            }
        };
        if let State::Closed { digest: known, .. } = &mut self.state {
            known.clone_from(&digest);
        }
        let recorded =
            content.metadata.write_blocking(&content.scope, |txn| self.record(txn, &digest, size, labels));
        if shared && recorded.is_ok() {
            // There may be data from before: the reference was opened without saying what was expected.
            match store.abort(&self.backend) {
                Ok(()) | Err(StoreError::NoIngest { .. }) => {}
                Err(error) => tracing::warn!(%error, reference = self.backend, "cannot remove an ingest"),
            }
        }
        match recorded {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::already_exists(Object::Content(digest.to_string()))),
            Err(error) => {
                // The blob is there, and nobody's.
                content.metadata.inner.mark_dirty(Effects::none().with_content().dirty);
                Err(error)
            }
        }
    }

    fn check_size(&self, found: u64, wanted: u64) -> Result<(), Error> {
        if wanted != 0 && wanted != found {
            return Err(Error::Size { reference: self.reference.clone(), found, wanted });
        }
        Ok(())
    }

    /// Replaces the ingest's record by the blob's; false if the namespace has the blob already.
    fn record(
        &self,
        txn: &mut Txn<'_>,
        digest: &Digest,
        size: u64,
        labels: Labels,
    ) -> Result<(bool, Effects), Error> {
        let scope = &self.content.scope;
        let key = Table::Ingest.key(scope.namespace(), &self.reference);
        // What was shared and then written over may be nobody's.
        let shared = schema::load::<IngestRecord>(txn, &key)?
            .is_some_and(|record| !record.expected.is_empty() && record.expected != digest.as_str());
        let effects = if shared { Effects::none().with_content() } else { Effects::none() };
        txn.delete(&key);
        leases::detach(txn, scope, &leases::ingest(&self.reference));
        leases::attach(txn, scope, &leases::content(digest))?;
        if self.content.has_blob(txn, digest) {
            return Ok((false, effects));
        }
        let now = timestamp(SystemTime::now());
        let record = BlobRecord { labels, created: now, updated: now, size };
        schema::touch_namespace(txn, scope.namespace());
        schema::store(txn, &Table::Blob.key(scope.namespace(), digest.as_str()), &record);
        Ok((true, effects.with_event(Event::ContentCreate { digest: digest.to_string(), size })))
    }
}

/// An [`NsWriter`] for what knows only [`Write`], and keeps no error but one of its own.
pub struct IoWriter {
    writer: NsWriter,
    /// What the store said first, of which who writes learns only that it failed.
    failure: Option<Error>,
}

impl IoWriter {
    /// Appends to what `writer` has.
    pub fn new(writer: NsWriter) -> IoWriter {
        IoWriter { writer, failure: None }
    }

    /// The writer, with all that was written.
    ///
    /// # Errors
    /// The first of the store.
    pub fn into_writer(self) -> Result<NsWriter, Error> {
        self.failure.map_or(Ok(self.writer), Err)
    }
}

impl Write for IoWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.writer.write(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(error) => {
                self.failure.get_or_insert(error);
                Err(io::Error::other("the content store refused it"))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
