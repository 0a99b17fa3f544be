//! The daemon: builds every part, lets them meet, and ends them in order.
//!
//! The order of a start is the order of its promises. The root is locked before anything is read; the database opens
//! before the stores it describes; the events socket is served before the shims of an earlier daemon are looked for,
//! because they report as soon as they are connected to; and the API is served when every task is known.

mod authority;
mod listen;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use davit_content_store::Store;
use davit_history::Limits;
use davit_metadata::{Db, EngineKind};
use davit_model::{Coded, ErrorCode};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::blobs::Blobs;
use crate::config::{self, Config, Engine};
use crate::events::{History, Hub};
use crate::differs::Differs;
use crate::grpc::context::ContextLayer;
use crate::grpc::{self, notice};
use crate::lane::Lane;
use crate::metadata::{Metadata, Parts, Scope, Sharing, gc};
use crate::metrics::{self, Source};
use crate::mounts::Targets;
use crate::plugins::{self, Plugin, SnapshotterEntry};
use crate::proxy::{Proxies, ProxyDiffer};
use crate::restart::Monitor;
use crate::runtime::{self, Sandboxes, Tasks};
use crate::snapshotters;
use authority::AnyAuthority;

/// The folder of blobs, named as containerd names it.
const CONTENT: &str = "io.containerd.content.v1.content";
/// The folder of the database.
const METADATA: &str = "io.davit.metadata.v1";
/// The folder of the history of events.
const EVENTS: &str = "io.davit.events.v1";
/// The folder of tasks, below both root and state.
const RUNTIME: &str = "io.containerd.runtime.v2.task";
/// The folder of the sandboxes that shims run, below both root and state.
const SANDBOXES: &str = "io.containerd.sandbox.controller.v1.shim";
/// The folder of the mounts that are made for clients, below the state.
const MOUNTS: &str = "io.containerd.mount-manager.v1.bolt";
/// The folder of the daemon's identity.
const IDENTITY: &str = "io.containerd.grpc.v1.introspection";
/// The folder of the logs of detached containers.
const LOGS: &str = "logs";

/// After its start the daemon shows events that are older than itself to new subscribers for so long: time enough
/// for a client whose connection broke to come back.
const WINDOW: Duration = Duration::from_secs(10);

/// Calls under way get so long to end when the daemon is told to.
const DRAIN: Duration = Duration::from_secs(2);

/// The flow-control windows of HTTP/2. Blobs are streamed through one stream; the protocol's default of 64 KiB would
/// cost a round trip for each.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Runs the daemon until SIGTERM or SIGINT. Containers are not touched by its end.
///
/// # Errors
/// It cannot start: the text says what is in the way.
pub async fn run(config: Config) -> Result<()> {
    let started = SystemTime::now();
    let config = Arc::new(config);
    listen::check_owner(&config.root)?;
    listen::folder(&config.root, 0o711)?;
    listen::folder(&config.state, 0o711)?;
    // The database locks the root. Two daemons of one state folder would share its tasks, and each collect the other's.
    let _state = listen::lock(&config.state)?;
    for name in [CONTENT, METADATA, EVENTS, IDENTITY, LOGS] {
        listen::folder(&config.root.join(name), 0o700)?;
    }

    let opening = config.clone();
    let Stores { db, history, hub, metadata, snapshotters: entries, differs, proxies } =
        tokio::task::spawn_blocking(move || open_stores(&opening)).await??;
    let stop = CancellationToken::new();
    let collector = tokio::spawn(metadata.clone().run_collector(gc::Config::default(), stop.clone()));

    let grpc = &config.grpc;
    let api = listen::socket(&grpc.address, 0o660, grpc.uid, grpc.gid)?;
    let reports = listen::socket(&config.ttrpc_address(), 0o600, 0, 0)?;
    let metrics_listener = match config.metrics.address.as_str() {
        "" => None,
        address => {
            let listener = TcpListener::bind(address).await;
            Some(listener.with_context(|| format!("cannot listen on {address} for metrics"))?)
        }
    };
    let tasks = open_runtime(&config, &hub)?;
    let known = metadata.clone();
    let loading = tasks.load(Arc::new(move |namespace, id| {
        // Doubt keeps a container: only a record that is surely missing makes a task an orphan.
        let found = Scope::new(namespace, None).and_then(|scope| known.containers(&scope).get(id));
        !found.is_err_and(|error| error.code() == ErrorCode::NotFound)
    }));
    let known = metadata.clone();
    let records = Arc::new(move |namespace: &str, id: &str| {
        let found = Scope::new(namespace, None).and_then(|scope| known.sandboxes(&scope).get(id));
        !found.is_err_and(|error| error.code() == ErrorCode::NotFound)
    });
    let (root, state) = (config.root.join(SANDBOXES), config.state.join(SANDBOXES));
    let sandboxes = Sandboxes::open(&tasks, root, state, records)?;
    // After the tasks are known: what shims report is then told to their owners.
    let listening = tasks.clone();
    tokio::spawn(async move { listening.serve_events(reports).await });
    tracing::info!(tasks = loading.tasks(), "found tasks of an earlier daemon");
    tokio::spawn(loading.finished());

    let (content, logs) = (text(&config.root.join(CONTENT)), text(&config.root.join(LOGS)));
    let mut plugins = plugins::list(&content, &logs, tasks.starts_own_shims(), entries);
    plugins::replace(&mut plugins, proxies);
    if let Some(listener) = metrics_listener {
        let version = grpc::version::told();
        let source = Source { metadata: metadata.clone(), tasks: tasks.clone(), version, started };
        tokio::spawn(metrics::serve(listener, source, stop.clone()));
    }
    let interval = Duration::from_secs(config.restart.interval);
    let monitor = Monitor::new(metadata.clone(), tasks.clone(), interval);
    tokio::spawn(monitor.run(stop.clone()));
    let settling = tasks.clone();
    let layers = Lane::layers();
    let differs = Differs::new(&config.diff, &differs, &config.stream_processors, layers.clone())
        .map_err(|name| anyhow!("needed differ not loaded: {name}"))?;
    let parts = grpc::Parts {
        metadata,
        differs,
        layers,
        tasks,
        sandboxes,
        hub: hub.clone(),
        history: history.clone(),
        plugins: plugins.into(),
    };
    let routes = grpc::routes(parts, &config.root.join(IDENTITY), grpc)
        .await
        .context("cannot keep the identity of the daemon")?;
    tokio::spawn(async move {
        tokio::time::sleep(WINDOW).await;
        hub.close_window();
    });
    serve(&config, routes, api, &db, stop.clone()).await?;

    if tokio::time::timeout(DRAIN, settling.settle()).await.is_err() {
        tracing::info!("files of deleted tasks are left to the next daemon");
    }
    collector.await.context("the collector panicked")?;
    // What shims report from now on they report to the next daemon.
    let closing = tokio::task::spawn_blocking(move || history.close());
    if tokio::time::timeout(DRAIN, closing).await.is_err() {
        tracing::warn!("the history cannot be written");
    }
    tokio::task::spawn_blocking(move || db.close()).await?.context("cannot close the metadata")?;
    tracing::info!("stopped");
    Ok(())
}

/// What is on disk, and the hub that tells of its changes.
struct Stores {
    db: Db,
    history: History,
    hub: Hub,
    metadata: Metadata,
    snapshotters: Vec<SnapshotterEntry>,
    differs: BTreeMap<String, ProxyDiffer>,
    proxies: Vec<Plugin>,
}

/// Opens what is on disk. Blocks.
fn open_stores(config: &Config) -> Result<Stores> {
    let root = &config.root;
    let engine = match config.metadata.engine {
        Engine::Sled => EngineKind::Sled,
        Engine::Redb => EngineKind::Redb,
    };
    let db = Db::open(&root.join(METADATA), engine)?;
    // After the database, which locks the root: the end of the history is cut where a daemon died.
    let history = History::open(&root.join(EVENTS), Limits::default())?;
    let hub = Hub::with_history(notice::READING, history.clone());
    let (mut snapshotters, entries) = snapshotters::open(root, &config.snapshotters, &db, |_| false);
    let proxies = Proxies::open(&config.proxy_plugins);
    let Proxies { snapshotters: others, content, differs, entries: proxies } = proxies;
    let store = match content {
        Some(proxy) => Blobs::Proxy(proxy),
        None => Store::open(&root.join(CONTENT)).context("cannot open the content store")?.into(),
    };
    snapshotters.extend(others);
    let telling = hub.clone();
    let events = Arc::new(move |namespace: &str, event| telling.publish(notice::envelope(namespace, event)));
    let mounts = Targets::open(&config.state.join(MOUNTS).join("t"), root)
        .context("cannot open the folder of mounts")?;
    let parts = Parts { db: db.clone(), store, snapshotters, mounts, sharing: Sharing::Shared, events };
    let metadata = Metadata::open(parts).context("cannot open the metadata")?;
    Ok(Stores { db, history, hub, metadata, snapshotters: entries, differs, proxies })
}

fn open_runtime(config: &Config, hub: &Hub) -> Result<Tasks> {
    let daemon_binary = std::env::current_exe().context("no path of the daemon's own program")?;
    let shim_directory = daemon_binary.parent().map(Path::to_owned).unwrap_or_default();
    let own = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_owned());
    let config::Timeouts { create, call, load, cleanup, shutdown, state, stats } = config.runtime.timeouts;
    let timeouts = runtime::Timeouts {
        create: Duration::from_secs(create),
        call: Duration::from_secs(call),
        load: Duration::from_secs(load),
        cleanup: Duration::from_secs(cleanup),
        shutdown: Duration::from_secs(shutdown),
        state: Duration::from_secs(state),
        stats: Duration::from_secs(stats),
        ..runtime::Timeouts::default()
    };
    let config = runtime::Config {
        root: config.root.join(RUNTIME),
        state: config.state.join(RUNTIME),
        grpc_address: text(&config.grpc.address),
        ttrpc_address: text(&config.ttrpc_address()),
        daemon_binary,
        shim_directory,
        default_shim: own(&config.runtime.shim),
        default_runtime_binary: None,
        socket_directory: own(&config.runtime.socket_dir),
        environment: Vec::new(),
        debug: config.log.level.contains("debug"),
        timeouts,
    };
    Ok(Tasks::open(config, hub.clone())?)
}

/// Serves the API until a signal comes, then lets the calls under way end.
///
/// When the metadata can no longer be written the daemon ends with an error: what supervises it starts it again, with
/// what is durable, and the containers do not notice.
async fn serve(
    config: &Config,
    routes: Routes,
    listener: UnixListener,
    db: &Db,
    stop: CancellationToken,
) -> Result<()> {
    let config::Grpc { address, max_concurrent_calls, .. } = &config.grpc;
    let incoming = UnixListenerStream::new(listener).map(|stream| stream.map(AnyAuthority::new));
    let server = tonic::transport::Server::builder()
        .layer(ContextLayer::default())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(*max_concurrent_calls)
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    let server = tokio::spawn(server);
    tracing::info!(address = %address.display(), "serving");
    // Nobody listens where systemd did not start us.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // Tools send these two to containerd for a new configuration and for its stacks; neither may end the daemon.
    let mut ignored = (signal(SignalKind::hangup())?, signal(SignalKind::user_defined1())?);
    // Every arm only waits for a state that stays until it is seen: dropping the others loses nothing.
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = ignored.0.recv() => tracing::warn!("SIGHUP is ignored: a changed configuration takes a restart"),
            _ = ignored.1.recv() => tracing::warn!("SIGUSR1 is ignored"),
            failure = db.failed() => return Err(failure).context("the metadata can no longer be written"),
        }
    }
    tracing::info!("stopping; containers go on");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    stop.cancel();
    match tokio::time::timeout(DRAIN, server).await {
        Ok(ended) => ended.context("the server panicked")?.context("the API cannot be served")?,
        Err(_) => tracing::info!("calls that wait are left"),
    }
    Ok(())
}

/// A path as a text, as shims and clients get it.
fn text(path: &Path) -> String {
    PathBuf::from(path).display().to_string()
}
