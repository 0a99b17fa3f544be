//! The connection to a daemon that speaks containerd's API, and one typed client for each of its services.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use davit_proto::containerd::services as api;
use davit_proto::davit::services as own;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};

use crate::error::{Error, Result};

/// The most bytes of a message either way (containerd's `max_recv_message_size`).
const MAX_MESSAGE_SIZE: usize = 16 << 20;
/// How much a stream may send before it must be read: enough for a layer to keep flowing.
const WINDOW_SIZE: u32 = 4 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The channel with the headers that each call carries.
pub(crate) type Wire = InterceptedService<Channel, Headers>;

/// The namespace, and the lease that what a call creates belongs to.
#[derive(Debug, Clone)]
pub(crate) struct Headers {
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> std::result::Result<Request<()>, Status> {
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        Ok(request)
    }
}

/// A connection, cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    channel: Channel,
    headers: Headers,
    namespace: String,
    address: String,
}

macro_rules! services {
    ($services:ident; $($method:ident: $module:ident, $server:ident, $client:ident;)*) => {
        impl Client {
            $(pub(crate) fn $method(&self) -> $services::$module::v1::$server::$client<Wire> {
                $services::$module::v1::$server::$client::with_interceptor(self.channel.clone(), self.headers.clone())
                    .max_decoding_message_size(MAX_MESSAGE_SIZE)
                    .max_encoding_message_size(MAX_MESSAGE_SIZE)
            })*
        }
    };
}

services! { api;
    containers: containers, containers_client, ContainersClient;
    content: content, content_client, ContentClient;
    diff: diff, diff_client, DiffClient;
    events: events, events_client, EventsClient;
    images: images, images_client, ImagesClient;
    introspection: introspection, introspection_client, IntrospectionClient;
    leases: leases, leases_client, LeasesClient;
    snapshots: snapshots, snapshots_client, SnapshotsClient;
    streaming: streaming, streaming_client, StreamingClient;
    tasks: tasks, tasks_client, TasksClient;
    transfer: transfer, transfer_client, TransferClient;
    version: version, version_client, VersionClient;
}

// What only davitd has.
services! { own;
    history: events, events_client, EventsClient;
    shims: shims, shims_client, ShimsClient;
}

impl Client {
    /// Connects to the socket at `address`, a path with or without `unix://` before it.
    ///
    /// # Errors
    /// [`Error::Connect`], and [`Error::Usage`] for a namespace that is none.
    pub(crate) async fn connect(address: &str, namespace: &str) -> Result<Client> {
        davit_model::identifier::validate(namespace).map_err(|source| {
            Error::usage(format!("invalid namespace: {source}"), "choose another with -n/--namespace")
        })?;
        let value = namespace.parse().expect("an identifier is printable ASCII");
        let path = PathBuf::from(address.strip_prefix("unix://").unwrap_or(address));
        let error = |source| Error::Connect { address: path.clone(), source };
        // The first connection is made here, where its error is still the kernel's; the channel makes later ones.
        let first = tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(&path))
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
            .map_err(error)?;
        let channel = channel(&path, first).await.map_err(|source| error(std::io::Error::other(source)))?;
        let headers = Headers { namespace: value, lease: None };
        Ok(Client { channel, headers, namespace: namespace.to_owned(), address: address.to_owned() })
    }

    /// The socket, as it was given.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// The namespace of all calls.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The same connection, with what calls create belonging to a lease.
    pub(crate) fn with_lease(&self, lease: &str) -> Client {
        let mut client = self.clone();
        client.headers.lease = lease.parse().ok();
        client
    }
}

async fn channel(path: &Path, first: UnixStream) -> std::result::Result<Channel, tonic::transport::Error> {
    let first = Arc::new(Mutex::new(Some(first)));
    let path = path.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let (first, path) = (Arc::clone(&first), path.clone());
        async move {
            let stream = match first.lock().await.take() {
                Some(stream) => stream,
                None => UnixStream::connect(path).await?,
            };
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    // The name is only what HTTP/2 wants as authority: servers refuse the path of a socket there.
    Endpoint::from_static("http://localhost")
        .initial_stream_window_size(WINDOW_SIZE)
        .initial_connection_window_size(WINDOW_SIZE)
        .connect_with_connector(connector)
        .await
}
