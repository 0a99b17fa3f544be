//! Pages that are read with HTTP/1.1: the metrics and the diagnostics. One request a connection, without a body.
//!
//! Whoever can connect can ask, so that everything about a request is bounded: its size, the time it takes to come, the time
//! that its answer takes to be made and read, and how many there are of each. containerd bounds the time of the header, by five
//! minutes.
//!
//! On an address of the loopback a request must name the host as people of this host do. A page on the Web cannot read what
//! others serve, but it can have the name of its own site resolved to 127.0.0.1 once it is loaded, and then ask there what
//! its browser takes for its own (DNS rebinding). Its name stands in the request, and has a dot.

use std::borrow::Cow;
use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::crowd::Crowd;

/// The most requests that are answered at once.
const ANSWERS: usize = 8;

/// The most connections whose request has not come, or not got its turn.
const REQUESTS: usize = 64;

/// The most bytes of a request.
const LONGEST_REQUEST: usize = 8 << 10;

/// A request comes within this.
const REQUEST: Duration = Duration::from_secs(5);

/// An answer is made and read within this.
const ANSWER: Duration = Duration::from_secs(30);

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
    /// Whether only this host can connect, by an address.
    fn is_loopback(&self) -> bool {
        match self {
            Listener::Tcp(listener) => listener.local_addr().is_ok_and(|address| address.ip().is_loopback()),
            Listener::Unix(_) => false,
        }
    }

    async fn accept(&self) -> std::io::Result<Box<dyn Stream>> {
        Ok(match self {
            Listener::Tcp(listener) => Box::new(listener.accept().await?.0),
            Listener::Unix(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

/// Answers requests until `stop`.
pub async fn serve<S: Site>(listener: Listener, site: S, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(ANSWERS));
    let is_local = listener.is_loopback();
    let mut waiting = Crowd::new(REQUESTS);
    loop {
        // An accept that is dropped has accepted nothing.
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(mut stream) => {
                let (site, places) = (site.clone(), places.clone());
                waiting.admit(async move {
                    // Who gives up is not answered.
                    let Ok(Ok(Some(bytes))) = tokio::time::timeout(REQUEST, read(&mut *stream)).await else {
                        return;
                    };
                    let Ok(place) = places.acquire_owned().await else { return };
                    tokio::spawn(async move {
                        let _place = place;
                        let answered = answer(stream, &bytes, is_local, &site);
                        if let Ok(Err(error)) = tokio::time::timeout(ANSWER, answered).await {
                            tracing::debug!(%error, "a request for a page broke off");
                        }
                    });
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

async fn answer<S: Site>(
    mut stream: Box<dyn Stream>,
    bytes: &[u8],
    is_local: bool,
    site: &S,
) -> std::io::Result<()> {
    let Answer { status, kind, body } = match request(bytes) {
        Some(_) if is_local && !hosts(bytes).all(is_of_this_host) => {
            Answer::error("421 ask for this page by an address or as localhost")
        }
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

/// The hosts that a request names; none in one of HTTP/1.0.
fn hosts(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|byte| *byte == b'\n').skip(1).filter_map(|line| {
        let colon = line.iter().position(|byte| *byte == b':')?;
        line[..colon].eq_ignore_ascii_case(b"host").then(|| line[colon + 1..].trim_ascii())
    })
}

/// Whether a host, perhaps with a port, is an address or a name that no site of the Web has: one without a dot, or below the
/// domains that are reserved for this host (RFC 6761) and for private networks.
fn is_of_this_host(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        Some(_) | None => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let is_reserved = |(_, domain): (&str, &str)| {
        ["localhost", "internal"].iter().any(|reserved| domain.eq_ignore_ascii_case(reserved))
    };
    bare.parse::<IpAddr>().is_ok() || name.rsplit_once('.').is_none_or(is_reserved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_of_the_web_is_no_name_of_this_host() {
        let told = |host: &str| {
            let request = format!("GET / HTTP/1.1\r\nhOsT:{host}\r\nAccept: a.b\r\n\r\n");
            hosts(request.as_bytes()).all(is_of_this_host)
        };
        for host in [
            "localhost",
            " 127.0.0.1:1338",
            "[::1]:1338 ",
            "::1",
            "node-1:80",
            "",
            "[fe80::1]",
            "a.Localhost",
            "b.internal:1",
        ] {
            assert!(told(host), "{host:?}");
        }
        for host in
            ["a.example", " a.example:1338", "127.0.0.1.a.example", "localhost.", "[::1].a.b", "\u{e4}.b"]
        {
            assert!(!told(host), "{host:?}");
        }
        assert!(!told("localhost\r\nHost: a.example"), "all of them count");
        assert!(hosts(b"GET /Host:a.b HTTP/1.0\r\n\r\n").next().is_none());
    }

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
