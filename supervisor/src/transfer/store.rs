//! A namespace's content, as the registry client wants it. All calls block, on threads of the pool that are counted for
//! transfers: what is here keeps the turn of its transfer.

use std::io::Read;

use davit_content_store::Error as StoreError;
use davit_distribution::{Opened, Sink, SinkError, SinkWriter, Source, read_whole};
use davit_model::{Digest, Labels};
use tokio::runtime::Handle;

use super::Place;
use crate::metadata::{Content, Error, Leases, NsWriter, Resource};

/// Where a pull puts content: what it finds and what it makes belongs to the lease.
pub(super) struct NsSink {
    content: Content,
    leases: Leases,
    lease: String,
    runtime: Handle,
    place: Place,
}

impl NsSink {
    /// Content of a scope with the lease `lease`.
    pub(super) fn new(content: Content, leases: Leases, lease: &str, place: Place) -> NsSink {
        NsSink { content, leases, lease: lease.to_owned(), runtime: Handle::current(), place }
    }
}

fn failed(error: Error) -> SinkError {
    SinkError::new(&error)
}

impl Sink for NsSink {
    fn size(&self, digest: &Digest) -> Result<Option<u64>, SinkError> {
        let look = || match self.content.info(digest) {
            Ok(info) => Ok(Some(info.size)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(failed(error)),
        };
        if look()?.is_none() {
            return Ok(None);
        }
        let resource = Resource { id: digest.to_string(), kind: "content".to_owned() };
        self.runtime.block_on(self.leases.add_resource(&self.lease, &resource)).map_err(failed)?;
        // It may have been collected before the lease had it.
        look()
    }

    fn read(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, SinkError> {
        let reader = self.runtime.block_on(self.content.reader(digest)).map_err(failed)?;
        read_whole(reader, digest, limit)
    }

    fn writer(&self, reference: &str, size: u64, digest: &Digest) -> Result<Opened, SinkError> {
        match self.runtime.block_on(self.content.writer(reference, size, Some(digest))) {
            Ok(writer) => Ok(Opened::Writer(Box::new(Writing { writer, _place: self.place.clone() }))),
            Err(Error::AlreadyExists { .. }) => Ok(Opened::Exists),
            Err(Error::Store(StoreError::Locked { .. })) => Ok(Opened::Busy),
            Err(error) => Err(failed(error)),
        }
    }
}

/// One ingest.
struct Writing {
    writer: NsWriter,
    _place: Place,
}

impl SinkWriter for Writing {
    fn offset(&self) -> u64 {
        self.writer.status().offset
    }

    fn digest(&self) -> Digest {
        self.writer.digest()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.writer.write(bytes).map_err(failed)
    }

    fn truncate(&mut self) -> Result<(), SinkError> {
        self.writer.truncate(0).map_err(failed)
    }

    fn commit(mut self: Box<Self>, size: u64, digest: &Digest, labels: &Labels) -> Result<(), SinkError> {
        match self.writer.commit(size, Some(digest), labels.clone()) {
            Ok(()) | Err(Error::AlreadyExists { .. }) => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }
}

/// Where a push takes content from.
pub(super) struct NsSource {
    content: Content,
    runtime: Handle,
    _place: Place,
}

impl NsSource {
    /// Content of a scope.
    pub(super) fn new(content: Content, place: Place) -> NsSource {
        NsSource { content, runtime: Handle::current(), _place: place }
    }
}

impl Source for NsSource {
    fn open(&self, digest: &Digest) -> Result<Box<dyn Read + Send>, SinkError> {
        let reader = self.runtime.block_on(self.content.reader(digest)).map_err(failed)?;
        Ok(Box::new(reader))
    }

    fn labels(&self, digest: &Digest) -> Result<Labels, SinkError> {
        self.content.info(digest).map(|info| info.labels).map_err(failed)
    }
}
