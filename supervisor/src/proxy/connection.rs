//! The connection to a plugin: made when it is needed, and every call on it has a deadline.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use davit_model::error::chain;
use davit_model::{Coded, ErrorCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::grpc::context::NAMESPACE;

/// The most bytes of a message, as in containerd.
pub(super) const MAX_MESSAGE: usize = 16 << 20;

/// How long a socket may take to accept: a backlog that is full is no plugin.
const CONNECT: Duration = Duration::from_secs(5);

/// How long a plugin may take to look something up.
pub(super) const LOOK: Duration = Duration::from_secs(30);

/// How long it may take to change something. A remote snapshotter asks a registry before it answers Prepare.
pub(super) const CHANGE: Duration = Duration::from_secs(120);

/// What a plugin answered instead of what it was asked for, or that it did not answer.
#[derive(Debug, Clone, thiserror::Error)]
#[error("proxy plugin {plugin}: {text}")]
pub struct Failure {
    /// The plugin's name.
    pub plugin: Arc<str>,
    /// The plugin's code, or ours if it did not answer.
    pub code: ErrorCode,
    /// The plugin's words, or ours.
    pub text: String,
}

impl Coded for Failure {
    fn code(&self) -> ErrorCode {
        self.code
    }
}

/// A channel to a socket, which is connected to when it is first used, and again after it broke. Needs the runtime.
pub(super) fn channel(socket: &Path) -> Channel {
    let path = PathBuf::from(socket);
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // No pings: Go's servers take a client that sends them for an attacker and hang up.
    Endpoint::from_static("http://localhost").connect_timeout(CONNECT).connect_with_connector_lazy(connector)
}

/// The way to one plugin. Clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    plugin: Arc<str>,
    channel: Channel,
    runtime: Handle,
}

impl Connection {
    /// The way to the plugin `name` over `channel`. Needs the runtime.
    pub(super) fn new(name: &str, channel: Channel) -> Connection {
        Connection { plugin: Arc::from(name), channel, runtime: Handle::current() }
    }

    /// The plugin's name.
    pub(super) fn plugin(&self) -> &Arc<str> {
        &self.plugin
    }

    /// The channel, for a client of a service.
    pub(super) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// A request in a namespace, if there is one, that tells the plugin how long it has.
    pub(super) fn request<T>(&self, namespace: Option<&str>, limit: Duration, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(limit);
        // A namespace is an identifier, which every header can hold.
        if let Some(value) = namespace.and_then(|namespace| MetadataValue::try_from(namespace).ok()) {
            request.metadata_mut().insert(NAMESPACE, value);
        }
        request
    }

    /// Awaits an answer for so long.
    pub(super) async fn answer<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(limit, call).await {
            Ok(answer) => answer.map_err(|status| self.failure(&status)),
            Err(_) => Err(self.late(limit)),
        }
    }

    /// The same on a thread that may block.
    pub(super) fn wait<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Failure> {
        self.runtime.block_on(self.answer(limit, call))
    }

    /// What a status of the plugin, or of the way to it, says.
    pub(super) fn failure(&self, status: &Status) -> Failure {
        let mut text = status.message().to_owned();
        if let Some(source) = std::error::Error::source(status) {
            // The plugin was not reached, and this is why.
            text = chain(source);
        }
        self.error(ErrorCode::from_number(status.code() as i32), text)
    }

    /// An answer that cannot be.
    pub(super) fn nonsense(&self, text: impl Into<String>) -> Failure {
        self.error(ErrorCode::Internal, text.into())
    }

    /// No answer in time.
    fn late(&self, limit: Duration) -> Failure {
        self.error(ErrorCode::DeadlineExceeded, format!("no answer within {} seconds", limit.as_secs()))
    }

    /// An error of the plugin.
    pub(super) fn error(&self, code: ErrorCode, text: String) -> Failure {
        Failure { plugin: self.plugin.clone(), code, text }
    }
}
