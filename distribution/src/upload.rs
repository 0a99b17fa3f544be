//! Pushing one blob or one manifest.
//!
//! A blob that the registry has is left alone; one that another of its repositories has is mounted from there; else an
//! upload is begun (`POST`) and all bytes are sent at once (`PUT`). A `PUT` that fails is begun anew: what became of
//! the session is not known then.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use davit_model::Digest;
use davit_oci::image::Descriptor;
use http::header::{CONTENT_TYPE, LOCATION};
use http::{HeaderValue, Method, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::sync::mpsc;
use tracing::debug;

use crate::endpoint::{Ask, Endpoint, Payload, Target, failure};
use crate::error::Error;
use crate::policy::Policy;
use crate::repository::{DIGEST_HEADER, Operation, Repository, check_digest};
use crate::retry::Backoff;
use crate::store::Source;
use crate::transport::{RequestBody, Response};
use crate::uri;

/// How much of a blob is read at once.
const PIECE: usize = 256 << 10;
/// Pieces that wait to be sent.
const QUEUE: usize = 4;

/// What became of something that was to be pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Uploaded {
    /// It was sent.
    Sent,
    /// The registry had it.
    Existed,
    /// The registry took it from this repository of its own.
    Mounted(String),
}

/// A blob of a store, as the body of a request.
#[derive(Clone)]
pub(crate) struct Blob {
    source: Arc<dyn Source>,
    digest: Digest,
    size: u64,
    told: Arc<dyn Fn(u64) + Send + Sync>,
}

impl Blob {
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// A body that reads the blob from its start, on a thread that may block.
    pub(crate) fn body(&self, sent: Arc<AtomicU64>) -> RequestBody {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let blob = self.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = blob.read_into(&sender) {
                // Nobody listens any more if this fails, and then nobody has to know.
                let _ = sender.blocking_send(Err(error));
            }
        });
        BlobBody { receiver, left: self.size, size: self.size, sent, told: self.told.clone() }.boxed_unsync()
    }

    fn read_into(&self, sender: &mpsc::Sender<io::Result<Bytes>>) -> io::Result<()> {
        let mut reader = self.source.open(&self.digest).map_err(io::Error::other)?;
        let mut left = self.size;
        while left > 0 {
            let mut piece = BytesMut::zeroed(PIECE.min(usize::try_from(left).unwrap_or(PIECE)));
            reader.read_exact(&mut piece)?;
            left -= piece.len() as u64;
            if sender.blocking_send(Ok(piece.freeze())).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blob").field("digest", &self.digest).field("size", &self.size).finish_non_exhaustive()
    }
}

struct BlobBody {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    left: u64,
    size: u64,
    sent: Arc<AtomicU64>,
    told: Arc<dyn Fn(u64) + Send + Sync>,
}

impl Body for BlobBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let Some(piece) = ready!(self.receiver.poll_recv(context)) else { return Poll::Ready(None) };
        Poll::Ready(Some(piece.map(|bytes| {
            self.left = self.left.saturating_sub(bytes.len() as u64);
            let sent = self.size - self.left;
            self.sent.store(sent, Ordering::Relaxed);
            (self.told)(sent);
            Frame::data(bytes)
        })))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

impl Repository {
    /// The host that is pushed to: the first that may be.
    fn push_host(&self) -> Result<&Endpoint, Error> {
        Ok(self.hosts(Operation::Push, &[])?[0].1)
    }

    /// Pushes a manifest or index by its tag, or by its digest if `tag` is none.
    ///
    /// # Errors
    /// [`Error::Denied`]; [`Error::WrongDigest`] if the registry took it for something else; those of requests.
    pub async fn put_manifest(
        &self,
        descriptor: &Descriptor,
        bytes: Bytes,
        tag: Option<&str>,
    ) -> Result<Uploaded, Error> {
        let host = self.push_host()?;
        let scopes = self.scopes(Operation::Push);
        let path = self.path(&format!("manifests/{}", tag.unwrap_or(descriptor.digest.as_str())));
        let head = Ask::new(Method::HEAD, path.clone(), &scopes).accept(&[&descriptor.media_type, "*/*"]);
        if let Some(response) = existing(host, &head).await?
            && (tag.is_none() || response.header(DIGEST_HEADER) == Some(descriptor.digest.as_str()))
        {
            return Ok(Uploaded::Existed);
        }
        let mut ask = Ask::new(Method::PUT, path, &scopes);
        let kind = HeaderValue::from_str(&descriptor.media_type).map_err(|_| Error::Descriptor {
            digest: descriptor.digest.clone(),
            reason: "its media type cannot be written into a header",
        })?;
        ask.headers.insert(CONTENT_TYPE, kind);
        ask.payload = Payload::Bytes(bytes);
        let response = host.send(&ask).await.map_err(denied)?;
        finished(response, &descriptor.digest).await
    }

    /// Pushes a blob of a store, or mounts it from the repository `from`. `told` is called with the bytes that were
    /// taken to be sent.
    ///
    /// # Errors
    /// As [`Repository::put_manifest`]; and those of the store.
    pub(crate) async fn put_blob(
        &self,
        descriptor: &Descriptor,
        source: Arc<dyn Source>,
        from: Option<&str>,
        mut backoff: Backoff,
        told: Arc<dyn Fn(u64) + Send + Sync>,
    ) -> Result<Uploaded, Error> {
        let host = self.push_host()?;
        let scopes = self.scopes(Operation::Push);
        let digest = &descriptor.digest;
        let head = Ask::new(Method::HEAD, self.path(&format!("blobs/{digest}")), &scopes);
        if existing(host, &head).await?.is_some() {
            return Ok(Uploaded::Existed);
        }
        let mut session = None;
        if let Some(from) = from {
            match self.mount(host, &scopes, digest, from).await? {
                Mount::Mounted => return Ok(Uploaded::Mounted(from.to_owned())),
                Mount::Session(response) => session = Some(*response),
                Mount::Refused => debug!(%digest, from, "cannot mount, sending instead"),
            }
        }
        let blob = Blob { source, digest: digest.clone(), size: descriptor.size, told };
        loop {
            let begun = match session.take() {
                Some(response) => response,
                None => begin(host, self.path("blobs/uploads/"), &scopes).await?,
            };
            match self.send_blob(host, begun, &scopes, blob.clone()).await {
                Err(error) if error.is_transient() || error.is_not_found() => {
                    let Some(pause) = backoff.after_failure(None) else { return Err(error) };
                    debug!(%digest, error = %davit_model::error::chain(&error), "beginning the upload anew");
                    tokio::time::sleep(pause).await;
                }
                result => return result,
            }
        }
    }

    async fn mount(
        &self,
        host: &Endpoint,
        scopes: &[String],
        digest: &Digest,
        from: &str,
    ) -> Result<Mount, Error> {
        let query = form_urlencoded::Serializer::new(String::new())
            .append_pair("mount", digest.as_str())
            .append_pair("from", from)
            .finish();
        let mut scopes = scopes.to_vec();
        scopes.push(format!("repository:{from}:pull"));
        let ask = Ask::new(Method::POST, self.path(&format!("blobs/uploads/?{query}")), &scopes);
        match host.send(&ask).await {
            Ok(response) if response.status == StatusCode::CREATED => {
                response.discard().await;
                Ok(Mount::Mounted)
            }
            Ok(response) if response.status == StatusCode::ACCEPTED => Ok(Mount::Session(Box::new(response))),
            // The other repository may be private, or gone.
            Ok(_) | Err(Error::Unauthorized { .. } | Error::Status { .. }) => Ok(Mount::Refused),
            Err(error) => Err(error),
        }
    }

    async fn send_blob(
        &self,
        host: &Endpoint,
        begun: Response,
        scopes: &[String],
        blob: Blob,
    ) -> Result<Uploaded, Error> {
        let url = begun.shown();
        let malformed = |reason| Error::Malformed { url: url.clone(), reason };
        let location =
            begun.header(LOCATION.as_str()).ok_or_else(|| malformed("it names no place to upload to"))?;
        let bad_place = || malformed("the place to upload to is no address of HTTP");
        let place = uri::join(&begun.uri, location).ok_or_else(bad_place)?;
        if begun.uri.scheme_str() == Some("https") && place.scheme_str() != Some("https") {
            return Err(malformed("the place to upload to is not encrypted"));
        }
        let place = uri::with_query(&place, "digest", blob.digest.as_str()).ok_or_else(bad_place)?;
        let policy = Policy::named_by(begun.peer);
        begun.discard().await;
        let digest = blob.digest.clone();
        let mut ask = Ask::new(Method::PUT, String::new(), scopes);
        // Credentials go along only if it is the host itself.
        ask.target = Target::Named(place, policy);
        ask.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        ask.payload = Payload::Blob(blob);
        // A failed PUT is begun anew with a new session, not sent again to this one.
        ask.last = false;
        let response = host.send(&ask).await.map_err(denied)?;
        finished(response, &digest).await
    }
}

enum Mount {
    Mounted,
    Session(Box<Response>),
    Refused,
}

async fn begin(host: &Endpoint, path: String, scopes: &[String]) -> Result<Response, Error> {
    let response = host.send(&Ask::new(Method::POST, path, scopes)).await.map_err(denied)?;
    match response.status.as_u16() {
        200 | 202 | 204 => Ok(response),
        _ => Err(failure(response, Method::POST).await),
    }
}

/// The response to a `HEAD` if the thing is there.
async fn existing(host: &Endpoint, ask: &Ask<'_>) -> Result<Option<Response>, Error> {
    match host.send(ask).await {
        Ok(response) if response.status == StatusCode::OK => Ok(Some(response)),
        Ok(response) if response.status == StatusCode::NOT_FOUND => Ok(None),
        Ok(response) => Err(failure(response, Method::HEAD).await),
        // Some registries let push, but not look.
        Err(Error::Unauthorized { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The end of a `PUT`.
async fn finished(response: Response, digest: &Digest) -> Result<Uploaded, Error> {
    if !matches!(response.status.as_u16(), 200 | 201 | 204) {
        return Err(failure(response, Method::PUT).await);
    }
    check_digest(&response, digest)?;
    response.discard().await;
    Ok(Uploaded::Sent)
}

fn denied(error: Error) -> Error {
    match error {
        Error::Unauthorized { .. } => Error::Denied { operation: "push", source: Box::new(error) },
        error => error,
    }
}
