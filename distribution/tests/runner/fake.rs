//! A registry in this process. It does what registries do, unless a rule of the test answers first.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use davit_content_store::Hasher;
use davit_model::{Algorithm, Digest};
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: Method,
    /// Without the query.
    pub(crate) path: String,
    pub(crate) query: String,
    /// The whole target, which is an address at a proxy.
    pub(crate) target: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub(crate) fn parameter(&self, name: &str) -> Option<String> {
        form_urlencoded::parse(self.query.as_bytes())
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.into_owned())
    }

    /// `GET /path`, for assertions.
    pub(crate) fn line(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

/// What is answered.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Piece,
}

/// The body of an answer.
pub(crate) enum Piece {
    /// These bytes.
    Whole(Bytes),
    /// These bytes, and then the connection breaks.
    Cut(Bytes),
    /// One byte after each pause, without end.
    Drip(Duration),
    /// A megabyte after the other, without end and without a declared length; they are counted.
    Endless(Arc<AtomicUsize>),
    /// The head, and then nothing.
    Silence,
    /// Not even a head: the connection ends.
    Gone,
}

impl Reply {
    pub(crate) fn new(status: u16) -> Reply {
        Reply { status, headers: Vec::new(), body: Piece::Whole(Bytes::new()) }
    }

    pub(crate) fn header(mut self, name: &str, value: impl ToString) -> Reply {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    pub(crate) fn body(mut self, body: impl Into<Bytes>) -> Reply {
        self.body = Piece::Whole(body.into());
        self
    }

    pub(crate) fn piece(mut self, piece: Piece) -> Reply {
        self.body = piece;
        self
    }
}

type Rule = Box<dyn FnMut(&Seen, &mut Contents) -> Option<Reply> + Send>;

/// What the registry has.
#[derive(Default)]
pub(crate) struct Contents {
    /// By digest.
    pub(crate) blobs: HashMap<String, Bytes>,
    /// By `repository:tag` or `repository@digest`: media type and bytes.
    pub(crate) manifests: HashMap<String, (String, Bytes)>,
    /// All requests, oldest first.
    pub(crate) seen: Vec<Seen>,
}

struct State {
    contents: Contents,
    rules: Vec<Rule>,
}

/// A running registry. It ends when it is dropped.
pub(crate) struct Fake {
    pub(crate) address: SocketAddr,
    state: Arc<Mutex<State>>,
    task: JoinHandle<()>,
}

impl Fake {
    pub(crate) async fn start() -> Fake {
        Fake::start_with(None).await
    }

    /// With TLS.
    pub(crate) async fn start_with(tls: Option<Arc<ServerConfig>>) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State { contents: Contents::default(), rules: Vec::new() }));
        let served = state.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                let (state, tls) = (served.clone(), tls.clone());
                connections.spawn(async move {
                    let service = service_fn(move |request| answer(state.clone(), request));
                    let mut builder = http1::Builder::new();
                    builder.preserve_header_case(false);
                    let _ = match tls {
                        None => builder.serve_connection(TokioIo::new(stream), service).await,
                        Some(tls) => match TlsAcceptor::from(tls).accept(stream).await {
                            Ok(stream) => builder.serve_connection(TokioIo::new(stream), service).await,
                            Err(_) => return,
                        },
                    };
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Fake { address, state, task }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What stands before the repository in a reference.
    pub(crate) fn name(&self) -> String {
        self.address.to_string()
    }

    /// Adds a rule; the first that answers wins.
    pub(crate) fn rule(&self, rule: impl FnMut(&Seen, &mut Contents) -> Option<Reply> + Send + 'static) {
        self.lock().rules.push(Box::new(rule));
    }

    /// Looks at the contents or changes them.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut Contents) -> T) -> T {
        look(&mut self.lock().contents)
    }

    /// The requests so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.lock().contents.seen.clone()
    }

    /// How many requests there were of a method with a path that ends so.
    pub(crate) fn count(&self, method: Method, end: &str) -> usize {
        self.seen().iter().filter(|seen| seen.method == method && seen.path.ends_with(end)).count()
    }

    pub(crate) fn put_blob(&self, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = Hasher::digest_of(Algorithm::Sha256, &bytes);
        self.with(|contents| contents.blobs.insert(digest.to_string(), bytes));
        digest
    }

    pub(crate) fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: Bytes) -> Digest {
        let digest = Hasher::digest_of(Algorithm::Sha256, &bytes);
        self.with(|contents| {
            let value = (media_type.to_owned(), bytes);
            contents.manifests.insert(format!("{repository}:{tag}"), value.clone());
            contents.manifests.insert(format!("{repository}@{digest}"), value);
        });
        digest
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(state: Arc<Mutex<State>>, request: Request<Incoming>) -> io::Result<Response<Sending>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let seen = Seen {
        method: head.method.clone(),
        path: head.uri.path().to_owned(),
        query: head.uri.query().unwrap_or_default().to_owned(),
        target: head.uri.to_string(),
        headers: head.headers,
        body,
    };
    let reply = {
        let State { contents, rules } = &mut *state.lock().unwrap();
        contents.seen.push(seen.clone());
        let ruled = rules.iter_mut().find_map(|rule| rule(&seen, contents));
        ruled.unwrap_or_else(|| usual(&seen, contents))
    };
    if matches!(reply.body, Piece::Gone) {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    let mut builder = Response::builder().status(reply.status);
    let is = |name: &str, other: &str| name.eq_ignore_ascii_case(other);
    // A body without declared length is sent in chunks, for which the server needs no telling.
    for (name, value) in reply.headers.iter().filter(|(name, _)| !is(name, "transfer-encoding")) {
        builder = builder.header(name, value);
    }
    let declared =
        reply.headers.iter().any(|(name, _)| is(name, "content-length") || is(name, "transfer-encoding"));
    if let Piece::Whole(bytes) = &reply.body
        && !declared
    {
        builder = builder.header(CONTENT_LENGTH, bytes.len());
    }
    let body = if head.method == Method::HEAD { Piece::Whole(Bytes::new()) } else { reply.body };
    Ok(builder.body(Sending { piece: body, sent: false, pause: None }).unwrap())
}

/// What a registry answers.
fn usual(seen: &Seen, contents: &mut Contents) -> Reply {
    let Some(path) = seen.path.strip_prefix("/v2/") else { return Reply::new(404) };
    if path.is_empty() {
        return Reply::new(200);
    }
    if let Some((repository, name)) = path.split_once("/manifests/") {
        return manifests(seen, contents, repository, name);
    }
    if path.contains("/blobs/uploads/") {
        return uploads(seen, contents, path);
    }
    if let Some((_, digest)) = path.split_once("/blobs/") {
        return match contents.blobs.get(digest) {
            None => Reply::new(404),
            Some(bytes) => blob(seen, bytes).header("docker-content-digest", digest),
        };
    }
    Reply::new(404)
}

fn manifests(seen: &Seen, contents: &mut Contents, repository: &str, name: &str) -> Reply {
    let separator = if name.contains(':') { '@' } else { ':' };
    let key = format!("{repository}{separator}{name}");
    if seen.method == Method::PUT {
        let digest = Hasher::digest_of(Algorithm::Sha256, &seen.body);
        let value = (seen.header("content-type").to_owned(), seen.body.clone());
        contents.manifests.insert(format!("{repository}@{digest}"), value.clone());
        contents.manifests.insert(key, value);
        return Reply::new(201).header("docker-content-digest", digest);
    }
    match contents.manifests.get(&key) {
        None => Reply::new(404),
        Some((media_type, bytes)) => Reply::new(200)
            .header(CONTENT_TYPE.as_str(), media_type)
            .header("docker-content-digest", Hasher::digest_of(Algorithm::Sha256, bytes))
            .body(bytes.clone()),
    }
}

fn uploads(seen: &Seen, contents: &mut Contents, path: &str) -> Reply {
    let base = path.split("/blobs/uploads/").next().unwrap();
    if seen.method == Method::POST {
        if let Some(digest) = seen.parameter("mount")
            && contents.blobs.contains_key(&digest)
        {
            return Reply::new(201).header("docker-content-digest", digest);
        }
        return Reply::new(202).header(LOCATION.as_str(), format!("/v2/{base}/blobs/uploads/1?state=x"));
    }
    let digest = Hasher::digest_of(Algorithm::Sha256, &seen.body).to_string();
    if seen.parameter("digest").as_deref() != Some(&digest) {
        return Reply::new(400);
    }
    contents.blobs.insert(digest.clone(), seen.body.clone());
    Reply::new(201).header("docker-content-digest", digest)
}

/// A blob or the part that is asked for. An open range is refused, as some registries do.
pub(crate) fn blob(seen: &Seen, bytes: &Bytes) -> Reply {
    let range = seen.header(RANGE.as_str());
    if range.is_empty() {
        return Reply::new(200).body(bytes.clone());
    }
    let parsed = range.strip_prefix("bytes=").and_then(|range| range.split_once('-'));
    let parsed =
        parsed.and_then(|(first, last)| Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?)));
    match parsed {
        Some((first, last)) if first <= last && last < bytes.len() => Reply::new(206)
            .header(CONTENT_RANGE.as_str(), format!("bytes {first}-{last}/{}", bytes.len()))
            .body(bytes.slice(first..=last)),
        _ => Reply::new(StatusCode::RANGE_NOT_SATISFIABLE.as_u16()),
    }
}

struct Sending {
    piece: Piece,
    sent: bool,
    pause: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl Body for Sending {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let sent = std::mem::replace(&mut self.sent, true);
        match &self.piece {
            Piece::Whole(bytes) | Piece::Cut(bytes) if !sent && !bytes.is_empty() => {
                Poll::Ready(Some(Ok(Frame::data(bytes.clone()))))
            }
            Piece::Whole(_) => Poll::Ready(None),
            Piece::Cut(_) => {
                // What was sent has to leave before the connection breaks.
                if self.pause.is_none() {
                    self.pause = Some(Box::pin(tokio::time::sleep(Duration::from_millis(30))));
                }
                let pause = self.pause.as_mut().unwrap();
                pause.as_mut().poll(context).map(|()| Some(Err(io::ErrorKind::ConnectionReset.into())))
            }
            Piece::Drip(every) => {
                let every = *every;
                let pause = self.pause.get_or_insert_with(|| Box::pin(tokio::time::sleep(every)));
                if pause.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                self.pause = None;
                Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"x")))))
            }
            Piece::Endless(count) => {
                count.fetch_add(1, Ordering::Relaxed);
                Poll::Ready(Some(Ok(Frame::data(Bytes::from(vec![b'x'; 1 << 20])))))
            }
            Piece::Silence | Piece::Gone => Poll::Pending,
        }
    }
}
