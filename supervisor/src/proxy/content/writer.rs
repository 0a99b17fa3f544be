//! Writing a blob in another process: one stream, in which each step waits for its answer.

use std::time::SystemTime;

use bytes::Bytes;
use davit_content_store::{Error, Hasher, Status};
use davit_model::{Algorithm, Digest, ErrorCode, Labels};
use davit_proto::containerd::services::content::v1::{
    WriteAction, WriteContentRequest, WriteContentResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::ProxyStore;
use crate::proxy::connection::{Failure, ROOT_LABEL, ROOT_VALUE, time};

/// The most bytes of one message.
const PIECE: usize = 1 << 20;

/// The one writer of an ingest. Dropping it ends the stream, upon which the plugin frees the reference.
#[derive(Debug)]
pub struct ProxyWriter {
    store: ProxyStore,
    reference: String,
    requests: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
    offset: u64,
    total: u64,
    started_at: SystemTime,
    updated_at: SystemTime,
    /// What the plugin says that it has.
    digest: Digest,
    /// What it must have, as far as all of it went through here.
    hasher: Option<Hasher>,
}

fn wire(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

impl ProxyWriter {
    pub(super) fn open(store: &ProxyStore, reference: &str, total: u64) -> Result<ProxyWriter, Error> {
        let (requests, receiver) = mpsc::channel(1);
        let stat = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: reference.to_owned(),
            total: wire(total),
            ..Default::default()
        };
        // There is room for one, and a Go server answers nothing before the first message.
        requests.try_send(stat).expect("a new channel has room");
        let connection = &store.connection;
        let stream = ReceiverStream::new(receiver);
        let request = connection.session(store.namespace_for(reference), stream);
        let mut client = store.client();
        let opened = connection.wait(connection.patience.change, async {
            let mut answers = client.write(request).await?.into_inner();
            let first = answers.message().await?;
            Ok((answers, first))
        });
        let (answers, first) = opened.map_err(|failure| locked(reference, failure))?;
        let first = first.ok_or_else(|| connection.nonsense("an ingest without an answer"))?;
        let offset = u64::try_from(first.offset)
            .map_err(|_| connection.nonsense(format!("an ingest of {} bytes", first.offset)))?;
        let mut writer = ProxyWriter {
            store: store.clone(),
            reference: reference.to_owned(),
            requests,
            answers,
            offset,
            total: u64::try_from(first.total).unwrap_or(0),
            started_at: time(first.started_at),
            updated_at: time(first.updated_at),
            digest: Hasher::new(Algorithm::Sha256).finish(),
            hasher: (offset == 0).then(|| Hasher::new(Algorithm::Sha256)),
        };
        if offset > 0 {
            writer.learn(&first.digest);
        }
        Ok(writer)
    }

    /// How far it has come.
    pub fn status(&self) -> Status {
        Status {
            reference: self.reference.clone(),
            offset: self.offset,
            total: self.total,
            expected: None,
            started_at: self.started_at,
            updated_at: self.updated_at,
        }
    }

    /// The digest of what was written so far.
    pub fn digest(&self) -> Digest {
        self.hasher.as_ref().map_or_else(|| self.digest.clone(), Hasher::digest)
    }

    fn learn(&mut self, digest: &str) {
        if let Ok(digest) = digest.parse() {
            self.digest = digest;
        }
    }

    /// Says something and waits for what is answered.
    fn step(&mut self, request: WriteContentRequest) -> Result<WriteContentResponse, Failure> {
        let connection = self.store.connection.clone();
        let (requests, answers) = (&self.requests, &mut self.answers);
        let answer = connection.wait(connection.patience.change, async {
            // A stream that the plugin has ended says why.
            let _ = requests.send(request).await;
            answers.message().await
        })?;
        let answer = answer.ok_or_else(|| connection.nonsense("the stream of a write ended"))?;
        self.learn(&answer.digest);
        Ok(answer)
    }

    /// Asks when the plugin took what it has, so that who asks it later is told the same.
    fn ask(&mut self) -> Result<(), Error> {
        let answer =
            self.step(WriteContentRequest { action: WriteAction::Stat.into(), ..Default::default() })?;
        self.updated_at = time(answer.updated_at);
        Ok(())
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`Error::Remote`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        for piece in bytes.chunks(PIECE) {
            let answer = self.step(WriteContentRequest {
                action: WriteAction::Write.into(),
                offset: wire(self.offset),
                data: Bytes::copy_from_slice(piece),
                ..Default::default()
            })?;
            let offset = self.offset + piece.len() as u64;
            if answer.offset != wire(offset) {
                let text = format!("an ingest of {} bytes after {offset} were written", answer.offset);
                return Err(self.store.connection.nonsense(text).into());
            }
            self.offset = offset;
            if let Some(hasher) = &mut self.hasher {
                hasher.update(piece);
            }
        }
        self.ask()
    }

    /// Throws away what was written; `size` must be 0. On the wire that is a write at the start.
    ///
    /// # Errors
    /// [`Error::BadTruncation`], [`Error::Remote`].
    pub fn truncate(&mut self, size: u64) -> Result<(), Error> {
        if size != 0 {
            return Err(Error::BadTruncation { size });
        }
        if self.offset > 0 {
            self.step(WriteContentRequest { action: WriteAction::Write.into(), ..Default::default() })?;
        }
        self.offset = 0;
        self.hasher = Some(Hasher::new(Algorithm::Sha256));
        self.ask()
    }

    /// Makes what was written a blob.
    ///
    /// # Errors
    /// [`Error::WrongSize`], [`Error::WrongDigest`], [`Error::BlobExists`], [`Error::NoIngest`], [`Error::Remote`].
    pub fn commit(mut self, size: u64, expected: Option<&Digest>) -> Result<Digest, Error> {
        if size > 0 && size != self.offset {
            return Err(Error::WrongSize { actual: self.offset, expected: size });
        }
        let written = self.hasher.as_ref().map(Hasher::digest);
        if let (Some(expected), Some(written)) = (expected, &written)
            && expected.algorithm() == written.algorithm()
            && expected != written
        {
            return Err(Error::WrongDigest { actual: written.clone(), expected: expected.clone() });
        }
        let answer = self.step(WriteContentRequest {
            action: WriteAction::Commit.into(),
            total: wire(size),
            offset: wire(self.offset),
            expected: expected.map(Digest::to_string).unwrap_or_default(),
            labels: Labels::from([(ROOT_LABEL.to_owned(), ROOT_VALUE.to_owned())]),
            ..Default::default()
        });
        let answer = answer.map_err(|failure| match failure.code {
            ErrorCode::AlreadyExists => {
                Error::BlobExists { digest: expected.cloned().unwrap_or_else(|| self.digest()) }
            }
            ErrorCode::NotFound => Error::NoIngest { reference: self.reference.clone() },
            _ => failure.into(),
        })?;
        let wrong = |text: String| self.store.connection.nonsense(text);
        let digest: Digest =
            answer.digest.parse().map_err(|_| wrong(format!("a blob {:?}", answer.digest)))?;
        // A blob is known by the digest that was asked for, or by that of what was sent.
        let known = expected.or(written.as_ref());
        if known.is_some_and(|known| *known != digest) {
            return Err(wrong(format!("it made {digest} of {known:?}")).into());
        }
        if answer.offset != wire(self.offset) {
            return Err(wrong(format!("a blob of {} bytes of {}", answer.offset, self.offset)).into());
        }
        Ok(digest)
    }
}

/// A reference that has a writer is told from a plugin that cannot be reached.
fn locked(reference: &str, failure: Failure) -> Error {
    if failure.code == ErrorCode::Unavailable && failure.text.contains("locked") {
        let (reference, since) = (reference.to_owned(), SystemTime::now());
        return Error::Locked { reference, held: std::time::Duration::ZERO, since };
    }
    failure.into()
}
