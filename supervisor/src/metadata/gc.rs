//! The collector: takes away what nothing needs any more, by mark and sweep.
//!
//! ```text
//!   mark (a view, no lock) ──▶ mark what changed since, and sweep the records ──▶ durable ──▶ events
//!                                        (one transaction)                          │
//!                                                                                   ▼
//!                                                         sweep each dirty backend, beside each other
//! ```
//!
//! What is needed is a matter of records and their labels alone (`mark.rs`), so that one transaction can decide it for
//! good: nothing can be attached to what it deletes, because whoever attaches sees the record gone. The backends
//! come after, without holding anybody up (`sweep.rs`). A crash in between leaves garbage in a backend, for the first
//! collection of the next daemon.
//!
//! The rules are those of containerd 2.3 (`core/metadata/gc.go`). When to run is also nearly as there (`schedule.rs`).

mod condition;
mod mark;
mod schedule;
mod sweep;

use std::fmt;
use std::sync::PoisonError;
use std::time::{Duration, Instant, SystemTime};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::error::Error;
use super::event::Event;
use super::schema::Table;
use super::{Dirty, Metadata, mounts};
use crate::lane::Lane;
use crate::metrics::Page;

pub use schedule::Config;
pub(super) use schedule::Schedule;

/// The label with the time (RFC 3339) from which on a lease or image protects nothing.
pub const LABEL_EXPIRE: &str = "containerd.io/gc.expire";

/// The label of what is kept as long as the container that it names is there.
pub const LABEL_CONTAINER_BACK_REF: &str = "containerd.io/gc.bref.container";

/// How long a collection waits for backends in other processes.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// How long it took to mark, and to sweep the records; the backends come on top.
    pub records: Duration,
    /// How many records are gone.
    pub removed: usize,
    /// When the next lease, image or ingest expires.
    pub next_expiry: Option<SystemTime>,
}

/// What is swept after the records.
#[derive(Debug)]
enum Backend {
    Content,
    Mounts,
    Snapshotter(String),
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Backend::Content => f.write_str("content"),
            Backend::Mounts => f.write_str("mounts"),
            Backend::Snapshotter(name) => write!(f, "snapshotter {name}"),
        }
    }
}

impl Dirty {
    /// That one backend has something to take away.
    fn of(backend: Backend) -> Dirty {
        match backend {
            Backend::Content => Dirty { content: true, ..Dirty::default() },
            Backend::Mounts => Dirty { mounts: true, ..Dirty::default() },
            Backend::Snapshotter(name) => Dirty { snapshotters: [name].into(), ..Dirty::default() },
        }
    }

    fn into_backends(self) -> impl Iterator<Item = Backend> {
        let Dirty { content, mounts, snapshotters } = self;
        let content = content.then_some(Backend::Content);
        let mounts = mounts.then_some(Backend::Mounts);
        content.into_iter().chain(mounts).chain(snapshotters.into_iter().map(Backend::Snapshotter))
    }
}

/// What the sweep of the records leaves to be done.
#[derive(Debug, Default)]
struct Swept {
    removed: usize,
    /// Some that was not needed is kept because of a change in the last moment.
    spared: bool,
    events: Vec<(String, Event)>,
    dirty: Dirty,
}

impl Metadata {
    /// Runs collections whenever they are due, until `shutdown` is cancelled; a collection under way is finished, unless a
    /// backend hangs. To be spawned once.
    pub async fn run_collector(self, config: Config, shutdown: CancellationToken) {
        schedule::run(&self, &config, &shutdown).await;
    }

    /// Waits for a whole collection that begins after this call, backends included. It needs the collector to run.
    ///
    /// # Errors
    /// [`Error::CollectionFailed`].
    pub async fn collected(&self) -> Result<(), Error> {
        self.inner.schedule.request().await
    }

    /// Adds what was collected to a page of metrics.
    pub fn add_collections(&self, page: &mut Page) {
        self.inner.schedule.add_to(page);
    }

    /// Carries out one collection now. The collector calls this; two at a time do no harm, and little good.
    ///
    /// # Errors
    /// Those of the database. A backend that fails is logged, and tried again the next time.
    pub async fn collect(&self) -> Result<Stats, Error> {
        let metadata = self.clone();
        // No backend takes part in this, so it needs no lane.
        let marking = tokio::task::spawn_blocking(move || metadata.collect_records());
        let (stats, dirty) = marking.await.map_err(|source| Error::Interrupted { source })??;
        let (mut backends, mut processes) = (JoinSet::new(), JoinSet::new());
        for backend in dirty.into_backends() {
            let Some(lane) = self.lane_of(&backend).cloned() else { continue };
            let is_process = self.is_in_process(&backend);
            let metadata = self.clone();
            let sweeps = if is_process { &mut processes } else { &mut backends };
            sweeps.spawn(async move { lane.run(move || metadata.sweep(backend, is_process)).await });
        }
        while let Some(ended) = backends.join_next().await {
            ended.and_then(|ended| ended).map_err(|source| Error::Interrupted { source })?;
        }
        // What another process is slow at goes on by itself: it must not keep all others from being collected.
        let all = async { while processes.join_next().await.is_some() {} };
        if tokio::time::timeout(PATIENCE, all).await.is_err() {
            processes.detach_all();
        }
        Ok(stats)
    }

    fn lane_of(&self, backend: &Backend) -> Option<&Lane> {
        match backend {
            Backend::Content => Some(&self.inner.content_lane),
            Backend::Mounts => Some(&self.inner.mount_lane),
            Backend::Snapshotter(name) => self.inner.lanes.get(name),
        }
    }

    /// Whether a backend is in another process.
    fn is_in_process(&self, backend: &Backend) -> bool {
        match backend {
            Backend::Content => self.inner.store.is_process(),
            Backend::Mounts => false,
            Backend::Snapshotter(name) => self.is_process(name),
        }
    }

    /// Sweeps one backend. If that fails it is tried again the next time. Blocks.
    fn sweep(&self, backend: Backend, is_process: bool) {
        let name = backend.to_string();
        // An earlier sweep may be waiting for a process still; one is enough.
        let turn = self.inner.sweep_claims.try_take(&name);
        if turn.is_some() || !is_process {
            let swept = match &backend {
                Backend::Content => sweep::content(self),
                Backend::Mounts => sweep::mounts(self),
                Backend::Snapshotter(name) => sweep::snapshots(self, name),
            };
            match swept {
                Ok(()) => return,
                Err(error) => {
                    let error = davit_model::error::chain(&error);
                    tracing::warn!(error, backend = name, "cannot collect garbage");
                }
            }
        }
        self.inner.mark_dirty(Dirty::of(backend));
    }

    fn collect_records(&self) -> Result<(Stats, Dirty), Error> {
        let inner = &self.inner;
        let start = Instant::now();
        let now = SystemTime::now();
        // Before the view, so that the lease that a stream was registered with is in it.
        let streams = inner.streams.leased();
        let view = inner.db.view();
        let mut marked = mark::mark(&view, now)?;
        let mut garbage = sweep::garbage(&view, &marked);
        // A mount that is being activated or taken away belongs to that call.
        let idle = |key: &[u8]| inner.mount_claims.try_take(&mounts::claim(key)).is_some();
        garbage.retain(|(table, key)| *table != Table::Mount || idle(key));
        let swept = inner.db.update::<_, Error>(|txn| {
            marked.add_changed(&view, txn)?;
            sweep::records(txn, &garbage, &marked)
        })?;
        for stream in streams {
            if !marked.keeps_stream(&stream.namespace, &stream.id, &stream.lease) {
                stream.close();
            }
        }
        if swept.spared {
            inner.schedule.mutated(true);
        }
        let stats =
            Stats { records: start.elapsed(), removed: swept.removed, next_expiry: marked.next_expiry() };
        for (namespace, event) in swept.events {
            (inner.events)(&namespace, event);
        }
        inner.mark_dirty(swept.dirty);
        let dirty = std::mem::take(&mut *inner.dirty.lock().unwrap_or_else(PoisonError::into_inner));
        tracing::debug!(removed = stats.removed, took = ?stats.records, "collected records");
        Ok((stats, dirty))
    }
}
