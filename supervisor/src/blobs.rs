//! The blobs of all namespaces: in the store of this daemon, or in that of a proxy plugin, which takes its place.

use std::io::{self, Read};

use davit_content_store::{Error, Info, Reader, Status, Store, Writer};
use davit_model::Digest;

use crate::proxy::{ProxyReader, ProxyStore, ProxyWriter};

/// A content store; clones are handles of the same one. All calls block. What they promise stands at [`Store`].
#[derive(Debug, Clone)]
pub enum Blobs {
    /// On the disks of this host.
    Local(Store),
    /// In another process.
    Proxy(ProxyStore),
}

impl From<Store> for Blobs {
    fn from(store: Store) -> Blobs {
        Blobs::Local(store)
    }
}

impl Blobs {
    /// Whether it is in another process.
    pub fn is_process(&self) -> bool {
        matches!(self, Blobs::Proxy(_))
    }

    /// The same store, for the calls of a client in `namespace`; only another process is told.
    #[must_use]
    pub fn in_namespace(&self, namespace: &str) -> Blobs {
        match self {
            Blobs::Local(store) => Blobs::Local(store.clone()),
            Blobs::Proxy(store) => Blobs::Proxy(store.in_namespace(namespace)),
        }
    }

    /// See [`Store::info`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn info(&self, digest: &Digest) -> Result<Info, Error> {
        match self {
            Blobs::Local(store) => store.info(digest),
            Blobs::Proxy(store) => store.info(digest),
        }
    }

    /// See [`Store::reader`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn reader(&self, digest: &Digest) -> Result<BlobReader, Error> {
        match self {
            Blobs::Local(store) => store.reader(digest).map(BlobReader::Local),
            Blobs::Proxy(store) => Ok(BlobReader::Proxy(Box::new(store.reader(digest)?))),
        }
    }

    /// See [`Store::writer`]; the digest is not announced.
    ///
    /// # Errors
    /// Those of the store.
    pub fn writer(&self, reference: &str, total: u64) -> Result<BlobWriter, Error> {
        match self {
            Blobs::Local(store) => Ok(BlobWriter::Local(Box::new(store.writer(reference, total, None)?))),
            Blobs::Proxy(store) => Ok(BlobWriter::Proxy(Box::new(store.writer(reference, total)?))),
        }
    }

    /// See [`Store::status`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn status(&self, reference: &str) -> Result<Status, Error> {
        match self {
            Blobs::Local(store) => store.status(reference),
            Blobs::Proxy(store) => store.status(reference),
        }
    }

    /// See [`Store::statuses`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn statuses(&self) -> Result<Vec<Status>, Error> {
        match self {
            Blobs::Local(store) => store.statuses(),
            Blobs::Proxy(store) => store.statuses(),
        }
    }

    /// See [`Store::abort`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn abort(&self, reference: &str) -> Result<(), Error> {
        match self {
            Blobs::Local(store) => store.abort(reference),
            Blobs::Proxy(store) => store.abort(reference),
        }
    }

    /// See [`Store::delete`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn delete(&self, digest: &Digest) -> Result<(), Error> {
        match self {
            Blobs::Local(store) => store.delete(digest),
            Blobs::Proxy(store) => store.delete(digest),
        }
    }

    /// See [`Store::walk`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn walk(&self) -> Result<Vec<Info>, Error> {
        match self {
            Blobs::Local(store) => store.walk(),
            Blobs::Proxy(store) => store.walk(),
        }
    }
}

/// An open blob. Reading blocks.
#[derive(Debug)]
pub enum BlobReader {
    /// A file.
    Local(Reader),
    /// What another process sends.
    Proxy(Box<ProxyReader>),
}

impl BlobReader {
    /// Bytes of the blob.
    pub fn size(&self) -> u64 {
        match self {
            BlobReader::Local(reader) => reader.size(),
            BlobReader::Proxy(reader) => reader.size(),
        }
    }

    /// Reads at an offset, without moving the position of `Read`; 0 at the end.
    ///
    /// # Errors
    /// Those of the store.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        match self {
            BlobReader::Local(reader) => reader.read_at(buffer, offset),
            BlobReader::Proxy(reader) => reader.read_at(buffer, offset),
        }
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            BlobReader::Local(reader) => reader.read(buffer),
            BlobReader::Proxy(reader) => reader.read(buffer),
        }
    }
}

/// The one writer of an ingest. What its calls promise stands at [`Writer`].
#[derive(Debug)]
pub enum BlobWriter {
    /// A file.
    Local(Box<Writer>),
    /// A conversation with another process.
    Proxy(Box<ProxyWriter>),
}

impl BlobWriter {
    /// See [`Writer::status`]. Does not block.
    pub fn status(&self) -> Status {
        match self {
            BlobWriter::Local(writer) => writer.status(),
            BlobWriter::Proxy(writer) => writer.status(),
        }
    }

    /// See [`Writer::digest`]. Does not block.
    pub fn digest(&self) -> Digest {
        match self {
            BlobWriter::Local(writer) => writer.digest(),
            BlobWriter::Proxy(writer) => writer.digest(),
        }
    }

    /// See [`Writer::write`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        match self {
            BlobWriter::Local(writer) => writer.write(bytes),
            BlobWriter::Proxy(writer) => writer.write(bytes),
        }
    }

    /// See [`Writer::truncate`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn truncate(&mut self, size: u64) -> Result<(), Error> {
        match self {
            BlobWriter::Local(writer) => writer.truncate(size),
            BlobWriter::Proxy(writer) => writer.truncate(size),
        }
    }

    /// See [`Writer::commit`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn commit(self, size: u64, expected: Option<&Digest>) -> Result<Digest, Error> {
        match self {
            BlobWriter::Local(writer) => writer.commit(size, expected),
            BlobWriter::Proxy(writer) => writer.commit(size, expected),
        }
    }
}
