//! Making a connection: looking up the name, choosing an address that the policy allows, a proxy or none, TLS.

use std::error::Error as StdError;
use std::fmt;
use std::future::{Ready, ready};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use http::Uri;
use http::uri::Scheme;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tower::Service;

use crate::policy::Policy;
use crate::uri;

/// Why no connection was made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The name has no address, or cannot be looked up now.
    #[error("cannot look up {host}")]
    Lookup {
        /// The name.
        host: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// A host sent the client to an address that it may not name.
    #[error("{host} is at {address}, where a registry may not send its clients")]
    Forbidden {
        /// The name.
        host: String,
        /// Its address.
        address: IpAddr,
    },
    /// No address of the host took the connection.
    #[error("cannot connect to {host}")]
    Refused {
        /// The name.
        host: String,
        /// What the kernel said of the last address.
        source: io::Error,
    },
    /// It took too long.
    #[error("{step} {host} took more than {limit:?}")]
    Slow {
        /// What was done.
        step: &'static str,
        /// To whom.
        host: String,
        /// The time that it had.
        limit: Duration,
    },
    /// The proxy did not do it.
    #[error("the proxy did not connect to {host}")]
    Proxy {
        /// The name of the destination.
        host: String,
        /// What went wrong.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The host speaks no TLS, or has no certificate that is trusted.
    #[error("TLS handshake with {host}")]
    Tls {
        /// The name.
        host: String,
        /// What went wrong.
        source: io::Error,
    },
}

impl ConnectError {
    /// Whether the other side does not speak TLS: it answered with something else, or did not answer.
    pub(crate) fn is_no_tls(&self) -> bool {
        match self {
            ConnectError::Tls { source, .. } => source
                .get_ref()
                .and_then(|inner| inner.downcast_ref::<rustls::Error>())
                .is_some_and(|error| matches!(error, rustls::Error::InvalidMessage(_))),
            ConnectError::Slow { step, .. } => *step == HANDSHAKE,
            _ => false,
        }
    }

    /// Whether another attempt may do better.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            ConnectError::Forbidden { .. } => false,
            // A certificate does not become good; a connection that was cut is another matter.
            ConnectError::Tls { source, .. } => source.kind() != io::ErrorKind::InvalidData,
            ConnectError::Lookup { .. }
            | ConnectError::Refused { .. }
            | ConnectError::Slow { .. }
            | ConnectError::Proxy { .. } => true,
        }
    }
}

const HANDSHAKE: &str = "the TLS handshake with";

/// Makes connections for one host and one policy.
#[derive(Clone)]
pub(crate) struct Connector {
    pub(crate) proxies: Arc<Matcher>,
    pub(crate) tls: Arc<ClientConfig>,
    pub(crate) policy: Policy,
    pub(crate) dial_timeout: Duration,
    pub(crate) handshake_timeout: Duration,
}

/// The address that a connection goes to; a connection through a proxy has none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) SocketAddr);

/// The proxy for a destination. One of another network cannot reach this machine, so it is never asked to; this and
/// the variables are the rules of Go's programs.
pub(crate) fn proxy_for(proxies: &Matcher, destination: &Uri) -> Option<Intercept> {
    let host = uri::bare_host(destination);
    let local = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    if local { None } else { proxies.intercept(destination) }
}

impl Connector {
    async fn connect(self, destination: Uri) -> Result<Link, ConnectError> {
        let https = destination.scheme() == Some(&Scheme::HTTPS);
        let name = destination.authority().map(ToString::to_string).unwrap_or_default();
        let literal = uri::bare_host(&destination).parse::<IpAddr>().ok();
        let (mut proxied, mut peer) = (false, None);
        let stream = match proxy_for(&self.proxies, &destination) {
            Some(proxy) => {
                if proxy.uri().scheme_str() != Some("http") {
                    let source = format!("{:?} proxies are not supported", proxy.uri().scheme_str()).into();
                    return Err(ConnectError::Proxy { host: name, source });
                }
                if let Some(address) = literal
                    && !self.policy.allows(address, true)
                {
                    return Err(ConnectError::Forbidden { host: name, address });
                }
                if https {
                    self.tunnel(&proxy, &destination, &name).await?
                } else {
                    proxied = true;
                    self.dial(Policy::Configured, proxy.uri()).await?
                }
            }
            None => {
                let stream = self.dial(self.policy, &destination).await?;
                peer = stream.peer_addr().ok().map(Peer);
                stream
            }
        };
        let io: Box<dyn Stream> =
            if https { self.handshake(stream, &destination, name).await? } else { Box::new(stream) };
        Ok(Link { io: TokioIo::new(io), proxied, peer })
    }

    /// Connects to the first address that answers.
    async fn dial(&self, policy: Policy, destination: &Uri) -> Result<TcpStream, ConnectError> {
        let host = uri::bare_host(destination);
        let name = || host.to_owned();
        let literal = host.parse::<IpAddr>().is_ok();
        let attempt = async {
            let found = lookup_host((host, uri::port(destination))).await;
            let addresses: Vec<SocketAddr> =
                found.map_err(|source| ConnectError::Lookup { host: name(), source })?.collect();
            let none = io::Error::from(io::ErrorKind::NotFound);
            let mut last = ConnectError::Lookup { host: name(), source: none };
            for (index, address) in addresses.iter().enumerate() {
                if !policy.allows(address.ip(), literal) {
                    last = ConnectError::Forbidden { host: name(), address: address.ip() };
                    continue;
                }
                // An address that swallows packets must not use up the time of those after it.
                let share = self.dial_timeout / (addresses.len() - index) as u32;
                match timeout(share, TcpStream::connect(address)).await {
                    Ok(Ok(stream)) => {
                        // Without it a request may wait for the acknowledgement of the one before.
                        let _ = stream.set_nodelay(true);
                        return Ok(stream);
                    }
                    Ok(Err(source)) => last = ConnectError::Refused { host: name(), source },
                    Err(_) => {
                        let source = io::Error::from(io::ErrorKind::TimedOut);
                        last = ConnectError::Refused { host: name(), source };
                    }
                }
            }
            Err(last)
        };
        let slow = ConnectError::Slow { step: "connecting to", host: name(), limit: self.dial_timeout };
        timeout(self.dial_timeout, attempt).await.unwrap_or(Err(slow))
    }

    /// A connection through a proxy by `CONNECT`.
    async fn tunnel(
        &self,
        proxy: &Intercept,
        destination: &Uri,
        name: &str,
    ) -> Result<TcpStream, ConnectError> {
        let mut dialled = Some(TokioIo::new(self.dial(Policy::Configured, proxy.uri()).await?));
        let once = tower::service_fn(move |_: Uri| -> Ready<Result<TokioIo<TcpStream>, io::Error>> {
            ready(dialled.take().ok_or_else(|| io::ErrorKind::NotConnected.into()))
        });
        let mut tunnel = Tunnel::new(proxy.uri().clone(), once);
        if let Some(value) = proxy.basic_auth() {
            tunnel = tunnel.with_auth(value.clone());
        }
        let limit = self.dial_timeout;
        match timeout(limit, tunnel.call(destination.clone())).await {
            Ok(Ok(stream)) => Ok(stream.into_inner()),
            Ok(Err(error)) => Err(ConnectError::Proxy { host: name.to_owned(), source: Box::new(error) }),
            Err(_) => Err(ConnectError::Slow {
                step: "asking the proxy to connect to",
                host: name.to_owned(),
                limit,
            }),
        }
    }

    async fn handshake(
        &self,
        stream: TcpStream,
        destination: &Uri,
        host: String,
    ) -> Result<Box<dyn Stream>, ConnectError> {
        let server = match ServerName::try_from(uri::bare_host(destination).to_owned()) {
            Ok(server) => server,
            Err(error) => {
                let source = io::Error::new(io::ErrorKind::InvalidData, error);
                return Err(ConnectError::Tls { host, source });
            }
        };
        let limit = self.handshake_timeout;
        match timeout(limit, TlsConnector::from(self.tls.clone()).connect(server, stream)).await {
            Ok(Ok(stream)) => Ok(Box::new(stream)),
            Ok(Err(source)) => Err(ConnectError::Tls { host, source }),
            Err(_) => Err(ConnectError::Slow { step: HANDSHAKE, host, limit }),
        }
    }
}

impl Service<Uri> for Connector {
    type Response = Link;
    type Error = ConnectError;
    type Future = BoxFuture<'static, Result<Link, ConnectError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, destination: Uri) -> Self::Future {
        Box::pin(self.clone().connect(destination))
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The proxies may have passwords.
        f.debug_struct("Connector").field("policy", &self.policy).finish_non_exhaustive()
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection that was made.
pub(crate) struct Link {
    io: TokioIo<Box<dyn Stream>>,
    /// Whether requests are to name the whole address, for a proxy.
    proxied: bool,
    peer: Option<Peer>,
}

impl Connection for Link {
    fn connected(&self) -> Connected {
        let connected = Connected::new().proxy(self.proxied);
        match self.peer {
            Some(peer) => connected.extra(peer),
            None => connected,
        }
    }
}

impl Read for Link {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl Write for Link {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
