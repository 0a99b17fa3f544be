//! Content: each namespace's claim to blobs that are stored once for all, and its ingests.
//!
//! A namespace sees a blob when it has a record of it, which a commit makes. Whether it may have the blob of another
//! namespace without sending it is the sharing policy's matter: then the writer opens already full, and its commit
//! only makes the record.
//!
//! ```text
//!   writer(ref) ──▶ ingest record + backend ingest `NS/SEQ/REF` ── commit ──▶ blob, durable ──▶ blob record, durable
//!        │                 │ abort, or nothing keeps it any more                   ▲
//!        │                 ▼                                                       │ commit (nothing is sent)
//!        └──▶ ingest record that expects a blob of another namespace ──────────────┘
//! ```

mod writer;

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use davit_content_store::Error as StoreError;
use davit_metadata::Txn;
use davit_model::filter::{Adaptor, Filter, label_field};
use davit_model::{Digest, Labels};

pub use davit_content_store::Status as IngestStatus;
pub use writer::{IoWriter, NsWriter};

use super::error::{Error, Object};
use super::event::Event;
use super::schema::{
    self, BlobRecord, IngestRecord, NAMESPACE_PREFIX, NamespaceRecord, Table, time, timestamp,
};
use super::{Effects, Metadata, Scope, Sharing, blocking, fields, leases};
use crate::blobs::{BlobReader, Blobs};
use crate::lane::Lane;

/// How long an ingest that no lease holds is kept after a writer was opened.
const INGEST_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// The label of a namespace whose blobs all others may have, whatever the sharing policy.
const LABEL_SHAREABLE: &str = "containerd.io/namespace.shareable";

/// A blob, as a namespace sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentInfo {
    /// Its name.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// The namespace's labels for it.
    pub labels: Labels,
    /// When the namespace got it.
    pub created_at: SystemTime,
    /// When its labels changed.
    pub updated_at: SystemTime,
}

impl Adaptor for ContentInfo {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.first()?.as_str() {
            "digest" => Some(Cow::Borrowed(self.digest.as_str())),
            "labels" => label_field(&self.labels, &path[1..]),
            _ => None,
        }
    }
}

struct ByReference<'a>(&'a str);

impl Adaptor for ByReference<'_> {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        (path.first()? == "ref").then_some(Cow::Borrowed(self.0))
    }
}

/// The blobs and ingests of a namespace.
#[derive(Clone)]
pub struct Content {
    metadata: Metadata,
    scope: Scope,
}

impl Content {
    pub(super) fn new(metadata: Metadata, scope: Scope) -> Content {
        Content { metadata, scope }
    }

    fn store(&self) -> Blobs {
        self.metadata.inner.store.in_namespace(self.scope.namespace())
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        self.scope.namespace()
    }

    /// Where what blocks on the store has to run; a caller needs it for a reader and for a writer.
    pub fn lane(&self) -> &Lane {
        &self.metadata.inner.content_lane
    }

    /// A blob.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn info(&self, digest: &Digest) -> Result<ContentInfo, Error> {
        let key = Table::Blob.key(self.scope.namespace(), digest.as_str());
        let record = schema::load(&self.metadata.view(), &key)?;
        record.map(|record| from_record(digest.clone(), record)).ok_or_else(|| no_blob(digest))
    }

    /// The blobs that match one of the filters (`digest`, `labels.*`), by digest.
    ///
    /// # Errors
    /// [`Error::Filter`].
    pub fn list(&self, filters: &[String]) -> Result<Vec<ContentInfo>, Error> {
        let filter = Filter::parse(filters)?;
        let view = self.metadata.view();
        let mut infos = Vec::new();
        for (key, value) in view.scan(&Table::Blob.key(self.scope.namespace(), "")) {
            let (_, digest) = Table::Blob.split(&key)?;
            let digest = digest.parse().map_err(|_| Error::Key { key: digest.to_owned() })?;
            let info = from_record(digest, schema::decode(&key, &value)?);
            if filter.matches(&info) {
                infos.push(info);
            }
        }
        Ok(infos)
    }

    /// Changes labels: those that `paths` names as `labels` or `labels.KEY`, or all of them when it is empty.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Field`], [`Error::Label`].
    pub async fn update(
        &self,
        digest: &Digest,
        labels: Labels,
        paths: &[String],
    ) -> Result<ContentInfo, Error> {
        let (namespace, digest, paths) = (self.scope.namespace.clone(), digest.clone(), paths.to_vec());
        let change = move |txn: &mut Txn<'_>| {
            let key = Table::Blob.key(&namespace, digest.as_str());
            let Some(mut record) = schema::load::<BlobRecord>(txn, &key)? else {
                return Err(no_blob(&digest));
            };
            if paths.is_empty() {
                record.labels.clone_from(&labels);
            }
            for path in paths {
                if !fields::replace("labels", &path, &mut record.labels, &labels) {
                    return Err(Error::Field { path, object: format!("content info {:?}", digest.as_str()) });
                }
            }
            fields::check_labels("info.Labels", &record.labels)?;
            fields::drop_empty(&mut record.labels);
            record.updated = timestamp(SystemTime::now());
            schema::store(txn, &key, &record);
            Ok((from_record(digest, record), Effects::none()))
        };
        self.metadata.write(&self.scope, change).await
    }

    /// Gives up the namespace's claim to a blob. The blob goes when no namespace has one any more.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn delete(&self, digest: &Digest) -> Result<(), Error> {
        let (scope, digest) = (self.scope.clone(), digest.clone());
        let change = move |txn: &mut Txn<'_>| {
            let key = Table::Blob.key(scope.namespace(), digest.as_str());
            if txn.get(&key).is_none() {
                return Err(no_blob(&digest));
            }
            txn.delete(&key);
            leases::detach(txn, &scope, &leases::content(&digest));
            let event = Event::ContentDelete { digest: digest.to_string() };
            Ok(((), Effects::removed().with_content().with_event(event)))
        };
        self.metadata.write(&self.scope, change).await
    }

    /// Opens a blob to read. Reading blocks as files do, and goes on if the blob is deleted meanwhile.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn reader(&self, digest: &Digest) -> Result<BlobReader, Error> {
        self.info(digest)?;
        let (store, digest) = (self.store(), digest.clone());
        blocking(self.lane(), move || Ok(store.reader(&digest)?)).await
    }

    /// How far an ingest has come.
    ///
    /// # Errors
    /// [`Error::NotFound`]; that of the store if the ingest has no data, because it shares a blob.
    pub async fn status(&self, reference: &str) -> Result<IngestStatus, Error> {
        let key = Table::Ingest.key(self.scope.namespace(), reference);
        let record: IngestRecord =
            schema::load(&self.metadata.view(), &key)?.ok_or_else(|| no_ingest(reference))?;
        let (store, reference) = (self.store(), reference.to_owned());
        blocking(self.lane(), move || Ok(IngestStatus { reference, ..store.status(&record.backend)? })).await
    }

    /// The ingests that match one of the filters (`ref`), by reference; those without data are left out.
    ///
    /// # Errors
    /// [`Error::Filter`].
    pub async fn statuses(&self, filters: &[String]) -> Result<Vec<IngestStatus>, Error> {
        let filter = Filter::parse(filters)?;
        let view = self.metadata.view();
        let mut wanted = Vec::new();
        for (key, value) in view.scan(&Table::Ingest.key(self.scope.namespace(), "")) {
            let (_, reference) = Table::Ingest.split(&key)?;
            if filter.matches(&ByReference(reference)) {
                let record: IngestRecord = schema::decode(&key, &value)?;
                wanted.push((reference.to_owned(), record.backend));
            }
        }
        let store = self.store();
        let read = move || {
            let mut statuses = Vec::new();
            for (reference, backend) in wanted {
                match store.status(&backend) {
                    Ok(status) => statuses.push(IngestStatus { reference, ..status }),
                    Err(StoreError::NoIngest { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(statuses)
        };
        blocking(self.lane(), read).await
    }

    /// Removes an ingest. A writer that has it open can no longer commit.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn abort(&self, reference: &str) -> Result<(), Error> {
        let (content, reference) = (self.clone(), reference.to_owned());
        blocking(self.lane(), move || content.abort_blocking(&reference)).await
    }

    fn abort_blocking(&self, reference: &str) -> Result<(), Error> {
        let backend = self.metadata.write_blocking(&self.scope, |txn| {
            let key = Table::Ingest.key(self.scope.namespace(), reference);
            let Some(record) = schema::load::<IngestRecord>(txn, &key)? else {
                return Err(no_ingest(reference));
            };
            txn.delete(&key);
            leases::detach(txn, &self.scope, &leases::ingest(reference));
            Ok((record.backend, Effects::none().with_content()))
        })?;
        match self.store().abort(&backend) {
            Ok(()) | Err(StoreError::NoIngest { .. }) => {}
            // For the client the ingest is gone; the collector tries again.
            Err(error) => tracing::warn!(%error, reference, "cannot remove an aborted ingest"),
        }
        Ok(())
    }

    /// Opens the ingest `reference`, new or where it was left, for this writer alone. `total` is the size of the
    /// blob if it is known, or 0; `expected` its digest. The ingest is attached to the caller's lease; without one
    /// it is kept for a day.
    ///
    /// The methods of the writer block; see there.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] when the namespace has the expected blob, which is then attached to the lease;
    /// that of the store, `Unavailable`, when the ingest has a writer; [`Error::NotFound`] for the lease;
    /// [`Error::Invalid`] without a reference.
    pub async fn writer(
        &self,
        reference: &str,
        total: u64,
        expected: Option<&Digest>,
    ) -> Result<NsWriter, Error> {
        let (content, reference, expected) = (self.clone(), reference.to_owned(), expected.cloned());
        blocking(self.lane(), move || content.writer_blocking(reference, total, expected)).await
    }

    fn writer_blocking(
        &self,
        reference: String,
        total: u64,
        expected: Option<Digest>,
    ) -> Result<NsWriter, Error> {
        if reference.is_empty() {
            return Err(Error::Invalid { rule: "ref must not be empty" });
        }
        let inner = &self.metadata.inner;
        // While we look at a blob that we may come to share, nobody deletes it.
        let _claim = expected.as_ref().map(|digest| inner.blob_claims.share(digest.as_str()));
        let stored = expected.as_ref().and_then(|digest| self.store().info(digest).ok());
        // Not synced: an ingest that a power cut takes away is begun anew.
        let opened = self.metadata.write_ordered(|txn| {
            let shared = match &expected {
                None => None,
                Some(digest) if self.has_blob(txn, digest) => {
                    leases::attach(txn, &self.scope, &leases::content(digest))?;
                    return Ok(Opened::Exists);
                }
                Some(digest) => stored
                    .filter(|info| total == 0 || total == info.size)
                    .filter(|_| inner.sharing == Sharing::Shared || is_shareable(txn, digest))
                    .map(|info| (info.digest, info.size)),
            };
            let key = Table::Ingest.key(self.scope.namespace(), &reference);
            let found = schema::load::<IngestRecord>(txn, &key)?;
            let new = found.is_none();
            let mut record = found.unwrap_or_default();
            if new {
                schema::touch_namespace(txn, self.scope.namespace());
                let number = schema::next_sequence(txn)?;
                record.backend = format!("{}/{number}/{reference}", self.scope.namespace());
            }
            if !leases::attach(txn, &self.scope, &leases::ingest(&reference))? {
                record.expires = timestamp(SystemTime::now() + INGEST_LIFETIME);
            }
            let expected = shared.as_ref().map(|(digest, _)| digest.to_string()).unwrap_or_default();
            // The blob that it shared until now may be nobody's.
            let unshared = !record.expected.is_empty() && record.expected != expected;
            record.expected = expected;
            schema::store(txn, &key, &record);
            Ok(Opened::Ingest { backend: record.backend, new, shared, unshared })
        })?;
        if matches!(opened, Opened::Ingest { unshared: true, .. }) {
            inner.mark_dirty(Effects::none().with_content().dirty);
        }
        match opened {
            Opened::Exists => {
                // The answer promises that the lease holds it.
                inner.db.sync()?;
                let digest = expected.map(|digest| digest.to_string()).unwrap_or_default();
                Err(Error::already_exists(Object::Content(digest)))
            }
            Opened::Ingest { backend, shared: Some((digest, size)), .. } => {
                Ok(NsWriter::shared(self.clone(), reference, backend, digest, size))
            }
            Opened::Ingest { backend, new, shared: None, .. } => match self.store().writer(&backend, total) {
                Ok(writer) => Ok(NsWriter::new(self.clone(), reference, backend, writer)),
                Err(error) => {
                    if new {
                        self.forget_ingest(&reference)?;
                    }
                    Err(error.into())
                }
            },
        }
    }

    fn forget_ingest(&self, reference: &str) -> Result<(), Error> {
        self.metadata.write_ordered(|txn| {
            txn.delete(&Table::Ingest.key(self.scope.namespace(), reference));
            leases::detach(txn, &self.scope, &leases::ingest(reference));
            Ok(())
        })
    }

    fn has_blob(&self, txn: &Txn<'_>, digest: &Digest) -> bool {
        txn.get(&Table::Blob.key(self.scope.namespace(), digest.as_str())).is_some()
    }
}

enum Opened {
    Exists,
    Ingest { backend: String, new: bool, shared: Option<(Digest, u64)>, unshared: bool },
}

/// Whether a namespace that shares with all others has the blob.
fn is_shareable(txn: &Txn<'_>, digest: &Digest) -> bool {
    txn.scan(NAMESPACE_PREFIX.as_bytes()).any(|(key, value)| {
        let Ok(record) = schema::decode::<NamespaceRecord>(&key, &value) else { return false };
        let namespace = String::from_utf8_lossy(&key[NAMESPACE_PREFIX.len()..]);
        record.labels.get(LABEL_SHAREABLE).is_some_and(|value| value == "true")
            && txn.get(&Table::Blob.key(&namespace, digest.as_str())).is_some()
    })
}

fn no_blob(digest: &Digest) -> Error {
    Error::not_found(Object::ContentDigest(digest.to_string()))
}

fn no_ingest(reference: &str) -> Error {
    Error::not_found(Object::Ingest(reference.to_owned()))
}

fn from_record(digest: Digest, record: BlobRecord) -> ContentInfo {
    ContentInfo {
        digest,
        size: record.size,
        labels: record.labels,
        created_at: time(record.created),
        updated_at: time(record.updated),
    }
}
