//! Serving the API, from the moment that everything is there until a signal comes.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use davit_metadata::Db;
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tower::layer::util::{Identity, Stack};

use super::authority::AnyAuthority;
use super::{DRAIN, diagnostics, tcp};
use crate::calls::{Calls, CallsLayer};
use crate::config::Config;
use crate::grpc::context::ContextLayer;
use crate::pages::PAUSE;

/// The flow-control windows of HTTP/2: what a client may send that nobody has read. Blobs are streamed through one stream;
/// the protocol's default of 64 KiB would cost a round trip for each. Most clients have one connection for all that they do:
/// there must be room on it for other calls beside all blobs that wait for a store that is slow, or hangs.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;

/// A client over TCP that says nothing for so long is asked whether it is there, and has so long to say so: a machine that has gone
/// closes no connection.
const SILENCE: Duration = Duration::from_secs(60);
const REPLY: Duration = Duration::from_secs(20);

/// The signals that tools send to containerd for a new configuration and for its stacks. Neither may end the daemon, from its
/// start on.
pub(super) struct Signals {
    hangup: Signal,
    dump: Signal,
}

impl Signals {
    /// Catches them from now on; they are kept until somebody asks.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn caught() -> io::Result<Signals> {
        Ok(Signals { hangup: signal(SignalKind::hangup())?, dump: signal(SignalKind::user_defined1())? })
    }
}

/// What is served, and where.
pub(super) struct Api {
    pub(super) routes: Routes,
    pub(super) calls: Calls,
    pub(super) socket: UnixListener,
    pub(super) tcp: Option<tcp::Server>,
}

/// Serves the API until a signal comes, then lets the calls under way end.
///
/// When the metadata can no longer be written the daemon ends with an error: what supervises it starts it again, with
/// what is durable, and the containers do not notice.
///
/// # Errors
/// The metadata's failure, and that of a server.
pub(super) async fn serve(
    config: &Arc<Config>,
    api: Api,
    db: &Db,
    signals: Signals,
    stop: CancellationToken,
) -> Result<()> {
    let Api { routes, calls, socket, tcp } = api;
    let mut servers = JoinSet::new();
    let incoming = paced(UnixListenerStream::new(socket)).map(|stream| stream.map(AnyAuthority::new));
    let server = builder(config, &calls)
        .add_routes(routes.clone())
        .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    servers.spawn(server);
    tracing::info!(address = %config.grpc.address.display(), "serving");
    if let Some(tcp) = tcp {
        tracing::info!(address = %tcp.address()?, "serving over TCP with mutual TLS");
        let connections = ReceiverStream::new(tcp.connections(stop.clone()));
        let incoming = connections.map(|stream| stream.map(AnyAuthority::new));
        let server = builder(config, &calls)
            .http2_keepalive_interval(Some(SILENCE))
            .http2_keepalive_timeout(Some(REPLY))
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
        servers.spawn(server);
    }
    // Nobody listens where systemd did not start us.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    until_told(&calls, db, signals, &mut servers).await?;
    tracing::info!("stopping; containers go on");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    stop.cancel();
    let ended = async {
        while let Some(ended) = servers.join_next().await {
            ended.context("the server panicked")?.context("the API cannot be served")?;
        }
        Ok(())
    };
    within_drain(ended).await
}

fn builder(config: &Config, calls: &Calls) -> Server<Stack<ContextLayer, Stack<CallsLayer, Identity>>> {
    Server::builder()
        .layer(CallsLayer::new(calls.clone()))
        .layer(ContextLayer)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(config.grpc.max_concurrent_calls)
}

/// Connections as they come. One that cannot be accepted, for want of descriptors mostly, is still there at once: without a
/// rest the server would ask for it again and again, and say nothing.
fn paced<T>(accepted: impl Stream<Item = io::Result<T>>) -> impl Stream<Item = io::Result<T>> {
    accepted.then(|connection| async {
        if let Err(error) = &connection {
            tracing::warn!(%error, "cannot accept a connection");
            tokio::time::sleep(PAUSE).await;
        }
        connection
    })
}

/// Waits for the signal to end.
///
/// # Errors
/// The metadata's failure, and that of a server, none of which ends by itself: what supervises the daemon starts it again.
async fn until_told(
    calls: &Calls,
    db: &Db,
    mut signals: Signals,
    servers: &mut JoinSet<Result<(), tonic::transport::Error>>,
) -> Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // Every arm only waits for a state that stays until it is seen: dropping the others loses nothing.
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = signals.hangup.recv() => tracing::warn!("SIGHUP is ignored: a changed configuration takes a restart"),
            _ = signals.dump.recv() => diagnostics::log_everything(calls),
            failure = db.failed() => return Err(failure).context("the metadata can no longer be written"),
            Some(ended) = servers.join_next() => {
                ended.context("the server panicked")?.context("the API cannot be served")?;
                bail!("the API is no longer served");
            }
        }
    }
}

async fn within_drain(ended: impl Future<Output = Result<()>>) -> Result<()> {
    match tokio::time::timeout(DRAIN, ended).await {
        Ok(ended) => ended,
        Err(_) => {
            tracing::info!("calls that wait are left");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use davit_proto::containerd::services::content::v1::content_client::ContentClient;
    use davit_proto::containerd::services::content::v1::content_server::ContentServer;
    use davit_proto::containerd::services::content::v1::{WriteAction, WriteContentRequest};
    use davit_proto::containerd::services::version::v1::version_client::VersionClient;
    use davit_proto::containerd::services::version::v1::version_server::VersionServer;
    use futures::{poll, stream};
    use hyper_util::rt::TokioIo;
    use tonic::Request;
    use tonic::transport::Endpoint;

    use super::*;
    use crate::grpc::content::ContentService;
    use crate::grpc::context::NAMESPACE;
    use crate::grpc::version::VersionService;
    use crate::metadata::Scope;
    use crate::metadata::tests::Fixture;

    #[tokio::test(flavor = "multi_thread")]
    async fn writes_that_stand_still_hold_up_no_other_call_of_their_client() {
        const WRITES: usize = 32;
        const LIMIT: Duration = Duration::from_secs(20);
        let fixture = Fixture::new();
        // A store that hangs: more work than its lane lets begin.
        let lane = fixture.metadata.content(&Scope::new("n", None).unwrap()).lane().clone();
        let (release, hold) = std::sync::mpsc::channel::<()>();
        let hold = Arc::new(std::sync::Mutex::new(hold));
        for _ in 0..100 {
            let (lane, hold) = (lane.clone(), hold.clone());
            tokio::spawn(async move { lane.run(move || hold.lock().unwrap().recv()).await });
        }
        while tokio::time::timeout(Duration::from_millis(1), lane.run(|| ())).await.is_ok() {}

        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let incoming = UnixListenerStream::new(tokio::net::UnixListener::bind(&socket).unwrap());
        let routes = Routes::new(ContentServer::new(ContentService::new(fixture.metadata.clone())))
            .add_service(VersionServer::new(VersionService));
        let calls = Calls::default();
        let server = builder(&Config::default(), &calls).add_routes(routes).serve_with_incoming(incoming);
        tokio::spawn(server);
        let connect = tower::service_fn(move |_| {
            let path = socket.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let channel =
            Endpoint::from_static("http://localhost").connect_with_connector(connect).await.unwrap();
        for number in 0..WRITES {
            let piece = WriteContentRequest {
                action: WriteAction::Write.into(),
                r#ref: number.to_string(),
                data: vec![0; 1 << 20].into(),
                ..Default::default()
            };
            let mut request = Request::new(stream::repeat(piece));
            request.metadata_mut().insert(NAMESPACE, "n".parse().unwrap());
            let mut client = ContentClient::new(channel.clone());
            tokio::spawn(async move { client.write(request).await.map(drop) });
        }
        // Each sends as much as it may; the first of these calls come in between.
        let mut client = VersionClient::new(channel);
        for _ in 0..200 {
            tokio::time::timeout(LIMIT, client.version(())).await.expect("an answer").unwrap();
        }
        drop(release);
    }

    #[tokio::test]
    async fn signals_that_come_during_a_start_are_kept() {
        let mut signals = Signals::caught().unwrap();
        for signal in [nix::sys::signal::SIGHUP, nix::sys::signal::SIGUSR1] {
            nix::sys::signal::kill(nix::unistd::getpid(), signal).unwrap();
        }
        assert_eq!(signals.hangup.recv().await, Some(()));
        assert_eq!(signals.dump.recv().await, Some(()));
    }

    #[tokio::test]
    async fn a_connection_that_cannot_be_accepted_is_not_asked_for_again_at_once() {
        let full = || Err(io::Error::from(nix::errno::Errno::EMFILE));
        let mut connections = Box::pin(paced(futures::stream::iter([Ok(1), full(), Ok(2)])));
        assert!(poll!(pin!(connections.next())).is_ready());
        assert!(poll!(pin!(connections.next())).is_pending());
        assert!(connections.next().await.unwrap().is_err());
        assert_eq!(connections.next().await.unwrap().unwrap(), 2);
    }
}
