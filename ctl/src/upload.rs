//! Uploading blobs to the daemon's content store, as they are read and in bounded memory.

use std::collections::VecDeque;
use std::io::Read;

use bytes::Bytes;
use davit_model::Digest;
use davit_proto::containerd::services::content::v1::{
    WriteAction, WriteContentRequest, WriteContentResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::client::Client;
use crate::error::{Error, Result};

/// The bytes of one message, as containerd's own reads have.
const CHUNK_SIZE: usize = 1 << 20;
/// How many messages may be under way before an answer is waited for.
const IN_FLIGHT: usize = 4;

/// One blob on its way.
struct Upload {
    requests: mpsc::Sender<WriteContentRequest>,
    responses: Streaming<WriteContentResponse>,
    /// The offsets that answers are still to confirm.
    pending: VecDeque<i64>,
    reference: String,
}

/// Uploads what `reader` yields, `size` bytes or, if that is 0, as many as come, and returns their digest, which must
/// be `expected` if that is given. A blob that is there already is not sent again, and `None` returned; the reader is
/// then left where it was.
///
/// # Errors
/// Those of the reader, wrapped by `read_error`, and those of the call, which include a digest or a size that differs.
pub(crate) async fn upload(
    client: &Client,
    reference: &str,
    size: u64,
    expected: Option<&Digest>,
    reader: &mut dyn Read,
    read_error: impl Fn(std::io::Error) -> Error,
) -> Result<Option<String>> {
    let total = i64::try_from(size).unwrap_or(i64::MAX);
    let expected = expected.map(ToString::to_string).unwrap_or_default();
    let first = WriteContentRequest {
        action: WriteAction::Stat.into(),
        r#ref: reference.to_owned(),
        total,
        expected: expected.clone(),
        ..WriteContentRequest::default()
    };
    let what = if expected.is_empty() { "a blob".to_owned() } else { expected.clone() };
    let error = |status| Error::Call { action: format!("store {what}"), status };
    let (mut upload, have) = match open(client, reference, first).await {
        Ok(opened) => opened,
        Err(status) if status.code() == Code::AlreadyExists => return Ok(None),
        Err(status) => return Err(error(status)),
    };
    // Another namespace may have the blob, and a daemon that shares content then has all of it ready for ours.
    let is_complete = total > 0 && have == total && !expected.is_empty();
    let mut offset = if is_complete { total } else { 0 };
    let mut chunk = if is_complete { Vec::new() } else { read_chunk(reader).map_err(&read_error)? };
    while !chunk.is_empty() {
        let count = i64::try_from(chunk.len()).expect("a chunk is small");
        let data = Bytes::from(chunk);
        let action = WriteAction::Write.into();
        let request = WriteContentRequest { action, offset, data, ..WriteContentRequest::default() };
        offset += count;
        upload.send(request, offset).await.map_err(error)?;
        chunk = read_chunk(reader).map_err(&read_error)?;
    }
    if size > 0 && offset != total {
        return Err(Error::Archive { reason: format!("it ends within {what}") });
    }
    let commit = WriteContentRequest {
        action: WriteAction::Commit.into(),
        total: offset,
        offset,
        expected,
        ..WriteContentRequest::default()
    };
    match upload.finish(commit).await {
        Ok(digest) => Ok(Some(digest)),
        Err(status) if status.code() == Code::AlreadyExists => Ok(None),
        Err(status) => Err(error(status)),
    }
}

/// The next bytes, none at the end.
fn read_chunk(reader: &mut dyn Read) -> std::io::Result<Vec<u8>> {
    let mut chunk = Vec::with_capacity(CHUNK_SIZE);
    reader.take(CHUNK_SIZE as u64).read_to_end(&mut chunk)?;
    Ok(chunk)
}

/// Opens an ingest; also returns how many bytes it has.
async fn open(
    client: &Client,
    reference: &str,
    first: WriteContentRequest,
) -> std::result::Result<(Upload, i64), Status> {
    let (requests, receiver) = mpsc::channel(IN_FLIGHT);
    let lost = || Status::unavailable("the connection was lost");
    requests.send(first).await.map_err(|_| lost())?;
    let mut responses = client.content().write(ReceiverStream::new(receiver)).await?.into_inner();
    let status = responses.message().await?.ok_or_else(lost)?;
    let upload = Upload { requests, responses, pending: VecDeque::new(), reference: reference.to_owned() };
    Ok((upload, status.offset))
}

impl Upload {
    async fn send(&mut self, request: WriteContentRequest, end: i64) -> std::result::Result<(), Status> {
        while self.pending.len() >= IN_FLIGHT {
            self.confirm().await?;
        }
        if self.requests.send(request).await.is_err() {
            // The server has ended the stream: its answer says why.
            loop {
                self.confirm().await?;
            }
        }
        self.pending.push_back(end);
        Ok(())
    }

    /// Takes one answer.
    async fn confirm(&mut self) -> std::result::Result<(), Status> {
        let response = self.responses.message().await?;
        let response = response.ok_or_else(|| Status::unavailable("the daemon ended the upload"))?;
        match self.pending.pop_front() {
            Some(end) if response.offset == end => Ok(()),
            _ => Err(Status::data_loss(format!("upload {} is at {}", self.reference, response.offset))),
        }
    }

    async fn finish(mut self, commit: WriteContentRequest) -> std::result::Result<String, Status> {
        while !self.pending.is_empty() {
            self.confirm().await?;
        }
        let lost = || Status::unavailable("the connection was lost");
        self.requests.send(commit).await.map_err(|_| lost())?;
        let response = self.responses.message().await?.ok_or_else(lost)?;
        Ok(response.digest)
    }
}
