//! The daemon: builds every part, lets them meet, and ends them in order.
//!
//! The order of a start is the order of its promises. The root is locked before anything is read; the database opens
//! before the stores it describes; the events socket is served before the shims of an earlier daemon are looked for,
//! because they report as soon as they are connected to; and the API is served when every task is known.

mod authority;
mod choice;
mod diagnostics;
mod listen;
mod serve;
mod tcp;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use davit_content_store::Store;
use davit_history::Limits;
use davit_metadata::{Db, EngineKind};
use davit_model::{Coded, ErrorCode};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::blobs::Blobs;
use crate::calls::Calls;
use crate::config::{self, Config, Engine};
use crate::differs::Differs;
use crate::events::{History, Hub};
use crate::grpc::{self, notice};
use crate::lane::Lane;
use crate::logs::{self, Logs};
use crate::metadata::{Error as MetadataError, Metadata, Parts, Scope, Sharing, gc};
use crate::metrics::Source;
use crate::mounts::Targets;
use crate::pages::{self, Listener};
use crate::plugins::{self, Plugin, SnapshotterEntry};
use crate::proxy::{Proxies, ProxyController, ProxyDiffer};
use crate::restart::Monitor;
use crate::runtime::{self, Sandboxes, Tasks};
use crate::snapshotters;
use diagnostics::Diagnostics;
use serve::{Api, Signals};

pub use choice::without_disabled;

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

/// Runs the daemon until SIGTERM or SIGINT. Containers are not touched by its end.
///
/// # Errors
/// It cannot start: the text says what is in the way.
pub async fn run(config: Config, logs: Logs) -> Result<()> {
    let started = SystemTime::now();
    let signals = Signals::caught().context("cannot catch signals")?;
    let config = Arc::new(config);
    set_oom_score(config.process.oom_score);
    listen::check_owner(&config.root)?;
    listen::folder(&config.root, 0o711)?;
    listen::folder(&config.state, 0o711)?;
    // The database locks the root. Two daemons of one state folder would share its tasks, and each collect the other's.
    let _state = listen::lock(&config.state)?;
    for name in [CONTENT, METADATA, EVENTS, IDENTITY, LOGS] {
        listen::folder(&config.root.join(name), 0o700)?;
    }

    let opening = config.clone();
    let Stores { db, history, hub, metadata, snapshotters: entries, differs, controllers, proxies } =
        tokio::task::spawn_blocking(move || open_stores(&opening)).await??;
    let grpc = &config.grpc;
    let api = listen::socket(&grpc.address, 0o660, grpc.uid, grpc.gid)?;
    let reports = listen::socket(&config.ttrpc_address(), 0o600, 0, 0)?;
    let tcp = tcp::listen(&grpc.tcp).await?;
    let pages = Pages::listen(&config).await?;
    let tasks = open_runtime(&config, &hub)?;
    let (content, files) = (text(&config.root.join(CONTENT)), text(&config.root.join(LOGS)));
    let mut plugins = plugins::list(&content, &files, tasks.starts_own_shims(), entries);
    plugins::replace(&mut plugins, proxies);
    // Until here nothing has changed but folders: who starts again and again for want of something does no harm.
    choice::apply(&config, &mut plugins)?;

    let stop = CancellationToken::new();
    let collector =
        tokio::spawn(metadata.clone().run_collector(collecting(config.metadata.gc), stop.clone()));
    let known = metadata.clone();
    let loading = tasks.load(Arc::new(move |namespace, id| {
        kept(Scope::new(namespace, None).and_then(|scope| known.containers(&scope).get(id)))
    }));
    let known = metadata.clone();
    let records = Arc::new(move |namespace: &str, id: &str| {
        kept(Scope::new(namespace, None).and_then(|scope| known.sandboxes(&scope).get(id)))
    });
    let (root, state) = (config.root.join(SANDBOXES), config.state.join(SANDBOXES));
    let sandboxes = Sandboxes::open(&tasks, root, state, records)?;
    // After the tasks are known: what shims report is then told to their owners.
    let listening = tasks.clone();
    tokio::spawn(async move { listening.serve_events(reports).await });
    tracing::info!(tasks = loading.tasks(), "found tasks of an earlier daemon");
    tokio::spawn(loading.finished());

    let (calls, version) = (Calls::default(), grpc::version::told());
    let source = Source {
        metadata: metadata.clone(),
        tasks: tasks.clone(),
        calls: calls.clone(),
        version: version.clone(),
        started,
        grpc_histogram: config.metrics.grpc_histogram,
        containers: !config.plugin_list.disables_monitor(),
    };
    let diagnostics =
        Diagnostics { calls: calls.clone(), logs, metadata: metadata.clone(), version, started };
    pages.serve(source, diagnostics, &stop);
    if !config.plugin_list.disables_restart() {
        let interval = Duration::from_secs(config.restart.interval);
        let monitor = Monitor::new(metadata.clone(), tasks.clone(), interval);
        tokio::spawn(monitor.run(stop.clone()));
    }
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
        controllers,
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
    let api = Api { routes, calls, socket: api, tcp };
    serve::serve(&config, api, &db, signals, stop.clone()).await?;

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

/// Doubt keeps a container or a sandbox: only a record that is surely missing makes what runs an orphan.
fn kept<T>(record: Result<T, MetadataError>) -> bool {
    !record.is_err_and(|error| error.code() == ErrorCode::NotFound)
}

/// Where pages are read, if anywhere.
struct Pages {
    metrics: Option<Listener>,
    diagnostics: Option<Listener>,
}

impl Pages {
    async fn listen(config: &Config) -> Result<Pages> {
        let metrics = match config.metrics.address.as_str() {
            "" => None,
            address => {
                let listener = TcpListener::bind(address).await;
                Some(listener.with_context(|| format!("cannot listen on {address} for metrics"))?)
            }
        };
        let config::Diagnostics { address, uid, gid } = &config.diagnostics;
        let diagnostics = if address.as_os_str().is_empty() {
            None
        } else {
            // A group is let in by naming it.
            let mode = if *gid == 0 { 0o600 } else { 0o660 };
            Some(listen::socket(address, mode, *uid, *gid)?)
        };
        Ok(Pages { metrics: metrics.map(Listener::Tcp), diagnostics: diagnostics.map(Listener::Unix) })
    }

    fn serve(self, source: Source, diagnostics: Diagnostics, stop: &CancellationToken) {
        if let Some(listener) = self.metrics {
            tokio::spawn(pages::serve(listener, source, stop.clone()));
        }
        if let Some(listener) = self.diagnostics {
            tokio::spawn(pages::serve(listener, diagnostics, stop.clone()));
        }
    }
}

/// Sets how likely the kernel is to end this process for want of memory. That it may not is no reason not to start, as with
/// containerd; what is started later inherits it, unless its specification says otherwise.
fn set_oom_score(score: i32) {
    if score != 0
        && let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string())
    {
        tracing::error!(%error, "failed to change OOM score to {score}");
    }
}

fn collecting(config: config::Gc) -> gc::Config {
    gc::Config {
        pause_threshold: config.pause_threshold,
        deletion_threshold: config.deletion_threshold,
        mutation_threshold: config.mutation_threshold,
        schedule_delay: Duration::from_millis(config.schedule_delay_ms),
        startup_delay: Duration::from_millis(config.startup_delay_ms),
    }
}

/// What is on disk, and the hub that tells of its changes.
struct Stores {
    db: Db,
    history: History,
    hub: Hub,
    metadata: Metadata,
    snapshotters: Vec<SnapshotterEntry>,
    differs: BTreeMap<String, ProxyDiffer>,
    controllers: BTreeMap<String, ProxyController>,
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
    let disabled = |name: &str| config.plugin_list.disables_snapshotter(name);
    let (mut snapshotters, entries) = snapshotters::open(root, &config.snapshotters, &db, disabled);
    let proxies = Proxies::open(&config.proxy_plugins, &hub);
    let Proxies { snapshotters: others, content, differs, controllers, entries: proxies } = proxies;
    let store = match content {
        Some(proxy) => Blobs::Proxy(proxy),
        None => Store::open(&root.join(CONTENT)).context("cannot open the content store")?.into(),
    };
    snapshotters.extend(others);
    let telling = hub.clone();
    let events = Arc::new(move |namespace: &str, event| telling.publish(notice::envelope(namespace, event)));
    let sharing = match config.metadata.sharing {
        config::Sharing::Shared => Sharing::Shared,
        config::Sharing::Isolated => Sharing::Isolated,
    };
    let mounts = Targets::open(&config.state.join(MOUNTS).join("t"), root)
        .context("cannot open the folder of mounts")?;
    let parts = Parts { db: db.clone(), store, snapshotters, mounts, sharing, events };
    let metadata = Metadata::open(parts).context("cannot open the metadata")?;
    Ok(Stores { db, history, hub, metadata, snapshotters: entries, differs, controllers, proxies })
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
        environment: environment(config),
        debug: logs::is_verbose(&config.log.level),
        timeouts,
    };
    Ok(Tasks::open(config, hub.clone())?)
}

/// The variables that shims get beside our own.
fn environment(config: &Config) -> Vec<(String, String)> {
    let pairs = config.runtime.environment.iter().filter_map(|variable| variable.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// A path as a text, as shims and clients get it.
fn text(path: &Path) -> String {
    PathBuf::from(path).display().to_string()
}
