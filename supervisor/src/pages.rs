//! Pages that are read with HTTP/1.1: the metrics and the diagnostics. One request a connection, without a body.

use std::borrow::Cow;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// The most requests at once; more wait in the kernel's queue.
const REQUESTS: usize = 8;

/// The most bytes of a request.
const LONGEST_REQUEST: usize = 8 << 10;

/// A request comes within this: who connects and says nothing must not keep others out for longer.
const REQUEST: Duration = Duration::from_secs(5);

/// A request and its answer take no longer.
const LIMIT: Duration = Duration::from_secs(30);

/// After an accept that failed, for want of descriptors mostly.
pub(crate) const PAUSE: Duration = Duration::from_millis(100);

/// The type of a text for people.
pub const TEXT: &str = "text/plain; charset=utf-8";
/// The type of a document for programs.
pub const JSON: &str = "application/json";

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// `GET` and the like.
    pub method: &'a str,
    /// The path, from `/`.
    pub path: &'a str,
    /// What is behind a `?`.
    pub query: &'a str,
}

/// What is said.
#[derive(Debug)]
pub struct Answer {
    /// The code and its words.
    pub status: Cow<'static, str>,
    /// The type of the body.
    pub kind: &'static str,
    /// The page.
    pub body: String,
}

impl Answer {
    /// A page.
    pub fn page(kind: &'static str, body: String) -> Answer {
        Answer { status: "200 OK".into(), kind, body }
    }

    /// A page that there is not; the words stand in the status, which is all that some clients show, and in the body.
    pub fn error(status: impl Into<Cow<'static, str>>) -> Answer {
        let status = status.into();
        Answer { body: format!("{status}\n"), status, kind: TEXT }
    }
}

/// Who knows the pages.
pub trait Site: Clone + Send + Sync + 'static {
    /// Answers a request.
    fn answer(&self, request: Request<'_>) -> impl Future<Output = Answer> + Send;
}

/// Where requests come from.
#[derive(Debug)]
pub enum Listener {
    /// An address and port.
    Tcp(TcpListener),
    /// A socket in the filesystem.
    Unix(UnixListener),
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Listener {
    async fn accept(&self) -> std::io::Result<Box<dyn Stream>> {
        Ok(match self {
            Listener::Tcp(listener) => Box::new(listener.accept().await?.0),
            Listener::Unix(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

/// Answers requests until `stop`.
pub async fn serve<S: Site>(listener: Listener, site: S, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(REQUESTS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        // An accept that is dropped has accepted nothing.
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(stream) => {
                let site = site.clone();
                tokio::spawn(async move {
                    let _place = place;
                    let answered = tokio::time::timeout(LIMIT, answer(stream, &site)).await;
                    if let Ok(Err(error)) = answered {
                        tracing::debug!(%error, "a request for a page broke off");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a request for a page");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Reads a request; none if its sender gives up, or sends too much.
async fn read(stream: &mut dyn Stream) -> std::io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 1024];
    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
        let length = stream.read(&mut buffer).await?;
        if length == 0 || bytes.len() + length > LONGEST_REQUEST {
            return Ok(None);
        }
        bytes.extend_from_slice(&buffer[..length]);
    }
    Ok(Some(bytes))
}

async fn answer<S: Site>(mut stream: Box<dyn Stream>, site: &S) -> std::io::Result<()> {
    let Some(bytes) = tokio::time::timeout(REQUEST, read(&mut *stream)).await?? else { return Ok(()) };
    let Answer { status, kind, body } = match request(&bytes) {
        Some(request) => site.answer(request).await,
        None => Answer::error("400 Bad Request"),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// What the first line asks for.
fn request(bytes: &[u8]) -> Option<Request<'_>> {
    let line = bytes.split(|byte| *byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    (version.starts_with("HTTP/1.") && words.next().is_none()).then_some(Request { method, path, query })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_well_formed_requests_are_understood() {
        let found = request(b"GET /v1/metrics?x=1?y HTTP/1.1\r\n\r\n");
        assert_eq!(found, Some(Request { method: "GET", path: "/v1/metrics", query: "x=1?y" }));
        for bad in [
            &b""[..],
            b"GET\r\n\r\n",
            b"GET / x HTTP/1.1\r\n\r\n",
            b"GET / HTTP/2\r\n\r\n",
            b"\xff / HTTP/1.1\r\n\r\n",
        ] {
            assert_eq!(request(bad), None);
        }
    }
}
