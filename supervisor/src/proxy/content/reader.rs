//! Reading a blob of another process.

use std::io::{self, ErrorKind, Read};

use bytes::{Buf, Bytes};
use davit_content_store::Hasher;
use davit_model::Digest;
use davit_proto::containerd::services::content::v1::{ReadContentRequest, ReadContentResponse};
use tonic::Streaming;

use super::ProxyStore;
use crate::proxy::connection::Failure;

/// An open blob. Reading blocks.
#[derive(Debug)]
pub struct ProxyReader {
    store: ProxyStore,
    digest: Digest,
    size: u64,
    /// How much was read.
    position: u64,
    /// What is being read in order, from the first read on.
    pieces: Option<Streaming<ReadContentResponse>>,
    piece: Bytes,
    hasher: Hasher,
}

impl ProxyReader {
    pub(super) fn new(store: ProxyStore, digest: Digest, size: u64) -> ProxyReader {
        let hasher = Hasher::new(digest.algorithm());
        ProxyReader { store, digest, size, position: 0, pieces: None, piece: Bytes::new(), hasher }
    }

    /// Bytes of the blob.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn failed(&self, failure: Failure) -> io::Error {
        io::Error::other(failure)
    }

    fn wrong(&self, text: &str) -> io::Error {
        let failure = self.store.connection.nonsense(format!("content {} {text}", self.digest));
        io::Error::new(ErrorKind::InvalidData, failure)
    }

    /// The bytes from `offset` on as the plugin sends them; `size` of them, or all.
    async fn open(&self, offset: u64, size: u64) -> Result<Streaming<ReadContentResponse>, tonic::Status> {
        let wire = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let digest = self.digest.to_string();
        let message = ReadContentRequest { digest, offset: wire(offset), size: wire(size) };
        let request = self.store.connection.session(self.store.namespace(), message);
        Ok(self.store.client().read(request).await?.into_inner())
    }

    /// Reads at an offset, without moving the position of `Read`; 0 at the end.
    ///
    /// # Errors
    /// The plugin's.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let wanted = self.size.saturating_sub(offset).min(buffer.len() as u64);
        if wanted == 0 {
            return Ok(0);
        }
        let mut filled = 0;
        let read = async {
            let mut pieces = self.open(offset, wanted).await?;
            while filled < buffer.len() {
                let Some(piece) = pieces.message().await? else { break };
                let length = piece.data.len().min(buffer.len() - filled);
                buffer[filled..filled + length].copy_from_slice(&piece.data[..length]);
                filled += length;
            }
            Ok(())
        };
        self.store
            .connection
            .wait(self.store.change_limit(), read)
            .map_err(|failure| self.failed(failure))?;
        if filled as u64 != wanted {
            return Err(self.wrong("ends before its size"));
        }
        Ok(filled)
    }

    /// The next piece, which may be empty; false at the end, where the whole has been checked.
    fn next(&mut self) -> io::Result<bool> {
        let connection = self.store.connection.clone();
        if self.position == self.size {
            let found = std::mem::replace(&mut self.hasher, Hasher::new(self.digest.algorithm())).finish();
            if self.pieces.take().is_some() && found != self.digest {
                return Err(self.wrong(&format!("came as {found}")));
            }
            return Ok(false);
        }
        if self.pieces.is_none() {
            let opened = connection
                .wait(connection.patience.look, self.open(0, 0))
                .map_err(|failure| self.failed(failure))?;
            self.pieces = Some(opened);
        }
        let Some(pieces) = &mut self.pieces else { return Ok(false) };
        let piece = connection.wait(connection.patience.look, pieces.message()).map_err(io::Error::other)?;
        let Some(piece) = piece else { return Err(self.wrong("ends before its size")) };
        if piece.data.len() as u64 > self.size - self.position {
            return Err(self.wrong("goes on behind its size"));
        }
        self.hasher.update(&piece.data);
        self.position += piece.data.len() as u64;
        self.piece = piece.data;
        Ok(true)
    }
}

impl Read for ProxyReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // An empty piece is not the end.
        while self.piece.is_empty() && self.next()? {}
        let length = self.piece.len().min(buffer.len());
        self.piece.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}
