//! The connection to a plugin: made when it is needed, and every call on it has a deadline.

use std::error::Error as _;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use davit_model::{Coded, ErrorCode};
use davit_proto::containerd::services::namespaces::v1::ListNamespacesRequest;
use davit_proto::containerd::services::namespaces::v1::namespaces_client::NamespacesClient;
use hyper_util::rt::TokioIo;
use prost::Message;
use prost_types::Timestamp;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use crate::grpc::context::NAMESPACE;
use crate::grpc::convert::time_from_wire;

/// The most bytes of a message, as in containerd.
pub(super) const MAX_MESSAGE: usize = 16 << 20;

/// The most bytes that a list may take. A walk that does not end ends here.
const MAX_LIST: usize = 64 << 20;

/// What may come of an answer that nobody reads yet, and of all answers together. A blob is read as slowly as it is unpacked or
/// sent on; however many of them stand still, there must be room for the answers to all others.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 64 << 20;

/// How long a socket may take to accept: a backlog that is full is no plugin.
const CONNECT: Duration = Duration::from_secs(5);

/// How long a plugin may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// To look something up.
    pub(super) look: Duration,
    /// To change something, or to list all. A remote snapshotter asks a registry before it answers Prepare.
    pub(super) change: Duration,
    /// To delete the files of what was removed.
    pub(super) cleanup: Duration,
    /// To unpack or make a layer. A client that has given up earlier is not waited for.
    pub(super) layer: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            look: Duration::from_secs(30),
            change: Duration::from_secs(120),
            cleanup: Duration::from_secs(600),
            layer: Duration::from_secs(900),
        }
    }
}

/// The label of a root, by which the collector of a plugin that is a daemon keeps what we make there, and its value, by
/// which we know it.
pub(super) const ROOT_LABEL: &str = "containerd.io/gc.root";
pub(super) const ROOT_VALUE: &str = "davit";

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

impl Failure {
    /// Whether the plugin is a daemon, which answers no call without a namespace (containerd `pkg/namespaces`).
    pub(super) fn wants_namespace(&self) -> bool {
        // In streams, containerd up to 1.7 classes it as unknown.
        matches!(self.code, ErrorCode::FailedPrecondition | ErrorCode::Unknown)
            && self.text.contains("namespace is required")
    }
}

/// The namespace in a name of the metadata's, `NAMESPACE/NUMBER/NAME`.
pub(super) fn namespace_of(name: &str) -> Option<&str> {
    let (namespace, rest) = name.split_once('/')?;
    let (number, _) = rest.split_once('/')?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && !namespace.is_empty()).then_some(namespace)
}

/// A time that a plugin tells; the epoch for none, or for one that no clock can show.
pub(super) fn time(time: Option<Timestamp>) -> SystemTime {
    time.and_then(time_from_wire).unwrap_or(UNIX_EPOCH)
}

/// A channel to a socket, which is connected to when it is first used, and again after it broke. Needs the runtime.
pub(super) fn channel(socket: &Path) -> Channel {
    let path = PathBuf::from(socket);
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // No pings: Go's servers take a client that sends them for an attacker and hang up.
    Endpoint::from_static("http://localhost")
        .connect_timeout(CONNECT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect_with_connector_lazy(connector)
}

/// The way to one plugin. Clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    plugin: Arc<str>,
    channel: Channel,
    runtime: Handle,
    /// How long it may take.
    pub(super) patience: Patience,
}

impl Connection {
    /// The way to the plugin `name` over `channel`. Needs the runtime.
    pub(super) fn new(name: &str, channel: Channel) -> Connection {
        Connection {
            plugin: Arc::from(name),
            channel,
            runtime: Handle::current(),
            patience: Patience::default(),
        }
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
        let mut request = self.session(namespace, message);
        // A little more than we wait: it is told to give up, and the error is ours.
        request.set_timeout(limit + Duration::from_secs(1));
        request
    }

    /// A request for a conversation, each step of which has its own time.
    pub(super) fn session<T>(&self, namespace: Option<&str>, message: T) -> Request<T> {
        let mut request = Request::new(message);
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

    /// What a plugin lists: all of it at once, or, if it is a daemon, what is `ours` in each of its namespaces.
    pub(super) fn everywhere<T>(
        &self,
        list: impl Fn(Option<&str>) -> Result<Vec<T>, Failure>,
        ours: impl Fn(&str, &T) -> bool,
    ) -> Result<Vec<T>, Failure> {
        match list(None) {
            Err(failure) if failure.wants_namespace() => {}
            listed => return listed,
        }
        let (begun, limit) = (Instant::now(), self.patience.change);
        let mut all = Vec::new();
        for namespace in self.namespaces()? {
            if begun.elapsed() > limit {
                return Err(self.late(limit));
            }
            all.extend(list(Some(&namespace))?.into_iter().filter(|item| ours(&namespace, item)));
        }
        Ok(all)
    }

    /// Reads a list of `what` to its end, page by page.
    pub(super) async fn read_pages<P: Message, T>(
        mut pages: Streaming<P>,
        what: &str,
        items: impl Fn(P) -> Vec<T>,
    ) -> Result<Vec<T>, Status> {
        let (mut found, mut size) = (Vec::new(), 0);
        while let Some(page) = pages.message().await? {
            size += page.encoded_len();
            if size > MAX_LIST {
                let text = format!("the list of {what} has more than {MAX_LIST} bytes");
                return Err(Status::resource_exhausted(text));
            }
            found.extend(items(page));
        }
        Ok(found)
    }

    /// The namespaces of a plugin that is a daemon.
    pub(super) fn namespaces(&self) -> Result<Vec<String>, Failure> {
        let look = self.patience.look;
        let request = self.request(None, look, ListNamespacesRequest::default());
        let mut client = NamespacesClient::new(self.channel());
        let listed = self.wait(look, client.list(request))?.into_inner();
        Ok(listed.namespaces.into_iter().map(|namespace| namespace.name).collect())
    }

    /// What a status of the plugin, or of the way to it, says.
    pub(super) fn failure(&self, status: &Status) -> Failure {
        let mut text = status.message().to_owned();
        let mut source = status.source();
        while let Some(cause) = source {
            source = cause.source();
            // The plugin was not reached, or the connection broke: what lies deepest says why.
            text = format!("the connection failed: {cause}");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_ours_says_its_namespace() {
        assert_eq!(namespace_of("default/17/extract-1 sha256:a/b"), Some("default"));
        for other in ["sha256:abc", "default/x/y", "default//y", "/1/y", "default/1"] {
            assert_eq!(namespace_of(other), None, "{other}");
        }
    }
}
