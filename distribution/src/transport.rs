//! Requests and responses of one host: connections, their number, and bounds of time.
//!
//! Each request holds a place of its host and one of all until its response has been read or dropped. A response is
//! waited for as long as the request's body makes progress; a body as long as it brings bytes.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, HeaderMap, PROXY_AUTHORIZATION};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::capture_connection;
use hyper_util::client::legacy::{self, Client};
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::connect::{ConnectError, Connector, Peer, proxy_for};
use crate::policy::Policy;
use crate::registry::{Limits, Timeouts};
use crate::tls::Tls;
use crate::uri;

/// The most bytes of a response's headers.
const MAX_HEADER_SIZE: usize = 128 << 10;
/// The most headers of a response.
const MAX_HEADERS: usize = 128;
/// How many bytes of a body that nobody wants are read to keep its connection.
const MAX_DISCARDED: usize = 16 << 10;

/// Why there is no response, or no more of one.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// No connection, or it broke, or what came was not HTTP.
    #[error("the connection failed")]
    Client {
        /// What went wrong.
        #[source]
        source: legacy::Error,
    },
    /// No response came.
    #[error("no response within {limit:?}")]
    NoResponse {
        /// The time that it had.
        limit: Duration,
    },
    /// The body broke off.
    #[error("the response broke off")]
    Body {
        /// What went wrong.
        source: hyper::Error,
    },
    /// The body stands still.
    #[error("the response brought nothing for {limit:?}")]
    Idle {
        /// The time that it had.
        limit: Duration,
    },
    /// The body drips.
    #[error("the response brought {bytes} bytes within {window:?}, too little to wait for")]
    Slow {
        /// What came.
        bytes: u64,
        /// The time that it took.
        window: Duration,
    },
    /// A request cannot be written, which is a mistake in an address or header.
    #[error("the request is not well formed")]
    Request {
        /// What is wrong.
        source: http::Error,
    },
}

impl TransportError {
    /// Whether another attempt may do better.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            TransportError::Client { .. } => self.connect_error().is_none_or(ConnectError::is_transient),
            TransportError::Request { .. } => false,
            TransportError::NoResponse { .. }
            | TransportError::Body { .. }
            | TransportError::Idle { .. }
            | TransportError::Slow { .. } => true,
        }
    }

    /// Why no connection was made, if that is it.
    pub(crate) fn connect_error(&self) -> Option<&ConnectError> {
        let mut next: Option<&(dyn StdError + 'static)> = self.source();
        while let Some(error) = next {
            if let Some(connect) = error.downcast_ref::<ConnectError>() {
                return Some(connect);
            }
            next = error.source();
        }
        None
    }
}

/// The body of a request.
pub(crate) type RequestBody = UnsyncBoxBody<Bytes, io::Error>;

/// One request, to be sent once.
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
    pub(crate) body: RequestBody,
    /// Bytes of the body that were taken to be sent.
    pub(crate) sent: Arc<AtomicU64>,
    pub(crate) policy: Policy,
    /// Whether certificates are checked even if the host skips that.
    pub(crate) strict: bool,
}

/// What all hosts of a registry share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) proxies: Arc<Matcher>,
    pub(crate) timeouts: Timeouts,
    limits: Limits,
    all: Arc<Semaphore>,
    hosts: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Shared {
    pub(crate) fn new(proxies: Matcher, timeouts: Timeouts, limits: Limits) -> Shared {
        let all = Arc::new(Semaphore::new(limits.connections.max(1)));
        Shared { proxies: Arc::new(proxies), timeouts, limits, all, hosts: Mutex::default() }
    }

    /// Waits for a place of the host and one of all.
    async fn places(&self, uri: &Uri) -> [OwnedSemaphorePermit; 2] {
        let key =
            uri.authority().map(|authority| authority.as_str().to_ascii_lowercase()).unwrap_or_default();
        let host = {
            let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
            // A host that nobody waits for or holds has no more to remember.
            hosts.retain(|_, semaphore| Arc::strong_count(semaphore) > 1);
            let new = || Arc::new(Semaphore::new(self.limits.connections_per_host.max(1)));
            hosts.entry(key).or_insert_with(new).clone()
        };
        let host = host.acquire_owned().await.expect("the semaphores are never closed");
        let all = self.all.clone().acquire_owned().await.expect("the semaphores are never closed");
        [host, all]
    }
}

type HttpClient = Client<Connector, RequestBody>;

/// The connections of one host's configuration.
#[derive(Debug)]
pub(crate) struct Transport {
    shared: Arc<Shared>,
    tls: Tls,
    dial_timeout: Duration,
    /// One for each policy, so that no connection is used again under a stricter one.
    clients: Mutex<HashMap<(Policy, bool), HttpClient>>,
}

impl Transport {
    pub(crate) fn new(shared: Arc<Shared>, tls: Tls, dial_timeout: Option<Duration>) -> Transport {
        let dial_timeout = dial_timeout.unwrap_or(shared.timeouts.connect);
        Transport { shared, tls, dial_timeout, clients: Mutex::default() }
    }

    fn connector(&self, policy: Policy, strict: bool) -> Connector {
        Connector {
            proxies: self.shared.proxies.clone(),
            tls: if strict { self.tls.strict.clone() } else { self.tls.usual.clone() },
            policy,
            dial_timeout: self.dial_timeout,
            handshake_timeout: self.shared.timeouts.handshake,
        }
    }

    fn client(&self, policy: Policy, strict: bool) -> HttpClient {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            Client::builder(TokioExecutor::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(Duration::from_secs(30))
                .pool_max_idle_per_host(self.shared.limits.connections_per_host)
                .http1_max_buf_size(MAX_HEADER_SIZE)
                .http1_max_headers(MAX_HEADERS)
                .build(self.connector(policy, strict))
        };
        clients.entry((policy, strict)).or_insert_with(new).clone()
    }

    /// Whether the host at an `https` address does not speak TLS. Another error says nothing of that.
    pub(crate) async fn speaks_no_tls(&self, uri: &Uri) -> bool {
        let mut connector = self.connector(Policy::Configured, false);
        let _places = self.shared.places(uri).await;
        let connected = tower::Service::call(&mut connector, uri.clone()).await;
        connected.is_err_and(|error| error.is_no_tls())
    }

    /// Sends a request and waits for the head of the response.
    pub(crate) async fn send(&self, call: Call) -> Result<Response, TransportError> {
        let places = self.shared.places(&call.uri).await;
        let mut request = Request::builder()
            .method(call.method.clone())
            .uri(call.uri.clone())
            .body(call.body)
            .map_err(|source| TransportError::Request { source })?;
        *request.headers_mut() = call.headers;
        if call.uri.scheme_str() == Some("http")
            && let Some(proxy) = proxy_for(&self.shared.proxies, &call.uri)
            && let Some(value) = proxy.basic_auth()
        {
            request.headers_mut().insert(PROXY_AUTHORIZATION, value.clone());
        }
        let limit = self.shared.timeouts.response;
        let client = self.client(call.policy, call.strict);
        let mut connection = capture_connection(&mut request);
        let mut answer = std::pin::pin!(client.request(request));
        // Making a connection has limits of its own; those of the response begin when there is one.
        // Cancel safety: the answer is polled on below; the other future only waits for a notice.
        let mut early = tokio::select! {
            biased;
            answer = &mut answer => Some(answer),
            _ = connection.wait_for_connection_metadata() => None,
        };
        let mut seen = 0;
        let response = loop {
            let waited = match early.take() {
                Some(answer) => Ok(answer),
                None => timeout(limit, &mut answer).await,
            };
            match waited {
                Ok(Ok(response)) => break response,
                Ok(Err(source)) => return Err(TransportError::Client { source }),
                Err(_) => {
                    let sent = call.sent.load(Ordering::Relaxed);
                    if sent == seen {
                        return Err(TransportError::NoResponse { limit });
                    }
                    seen = sent;
                }
            }
        };
        let (head, body) = response.into_parts();
        let spelled_out = || uri::bare_host(&call.uri).parse().ok();
        Ok(Response {
            method: call.method,
            status: head.status,
            peer: head.extensions.get::<Peer>().map(|peer| peer.0.ip()).or_else(spelled_out),
            headers: head.headers,
            uri: call.uri,
            body,
            timeouts: self.shared.timeouts,
            waited: Duration::ZERO,
            came: 0,
            _places: places,
        })
    }
}

/// What is left of a response that was let go: it holds no place of a connection.
pub(crate) struct Head {
    pub(crate) headers: HeaderMap,
    pub(crate) uri: Uri,
    pub(crate) peer: Option<IpAddr>,
}

/// A response, whose body may still be on its way.
pub(crate) struct Response {
    /// How it was asked for.
    pub(crate) method: Method,
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    /// What was asked, after redirects.
    pub(crate) uri: Uri,
    /// The address of the other side; behind a proxy it is known only if it is spelled out.
    pub(crate) peer: Option<IpAddr>,
    body: Incoming,
    timeouts: Timeouts,
    /// The time that was spent waiting for bytes in the current window, and the bytes that came in it.
    waited: Duration,
    came: u64,
    _places: [OwnedSemaphorePermit; 2],
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Addresses and headers of storage services have signatures in them.
        f.debug_struct("Response")
            .field("status", &self.status)
            .field("uri", &self.shown())
            .finish_non_exhaustive()
    }
}

impl Response {
    /// The next bytes of the body; `None` at its end.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, TransportError> {
        let Timeouts { idle, window, least, .. } = self.timeouts;
        loop {
            let start = Instant::now();
            let frame =
                timeout(idle, self.body.frame()).await.map_err(|_| TransportError::Idle { limit: idle })?;
            // Only waiting counts: how long the caller takes for a piece is no fault of the server.
            self.waited += start.elapsed();
            let Some(frame) = frame else { return Ok(None) };
            let Ok(bytes) = frame.map_err(|source| TransportError::Body { source })?.into_data() else {
                continue;
            };
            self.came += bytes.len() as u64;
            if self.waited >= window {
                if self.came < least {
                    return Err(TransportError::Slow { bytes: self.came, window });
                }
                (self.waited, self.came) = (Duration::ZERO, 0);
            }
            if !bytes.is_empty() {
                return Ok(Some(bytes));
            }
        }
    }

    /// The whole body, or `None` if it is longer than `limit` bytes.
    pub(crate) async fn bytes(&mut self, limit: u64) -> Result<Option<Bytes>, TransportError> {
        if self.content_length().is_some_and(|length| length > limit) {
            return Ok(None);
        }
        let mut all = BytesMut::new();
        while let Some(chunk) = self.chunk().await? {
            if (all.len() + chunk.len()) as u64 > limit {
                return Ok(None);
            }
            all.extend_from_slice(&chunk);
        }
        Ok(Some(all.freeze()))
    }

    /// What the head says of the size of the body.
    pub(crate) fn content_length(&self) -> Option<u64> {
        self.header(CONTENT_LENGTH.as_str())?.parse().ok()
    }

    /// The text of a header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Lets go of the response but for its head. A short body is read to its end, so that the connection can be used
    /// again.
    pub(crate) async fn discard(mut self) -> Head {
        let short = Duration::from_secs(1);
        let _ = timeout(short, self.bytes(MAX_DISCARDED as u64)).await;
        Head { headers: self.headers, uri: self.uri, peer: self.peer }
    }

    /// For error messages: the address without secrets.
    pub(crate) fn shown(&self) -> String {
        uri::shown(&self.uri)
    }
}
