//! What the daemon knows: namespaces, containers, sandboxes, images, content, snapshots and leases, and the collection of what
//! none of them needs any more.
//!
//! Everything is kept in one database ([`davit_metadata::Db`], layout in `schema.rs`), in front of one blob store
//! that knows no namespaces and any number of snapshotters that know none either. The services here are views of
//! one namespace each:
//!
//! ```text
//! let metadata = Metadata::open(Parts { db, store, snapshotters, mounts, sharing, events })?;   // blocks: at startup
//! tokio::spawn(metadata.clone().run_collector(gc::Config::default(), shutdown_token));
//!
//! let scope = Scope::new("k8s.io", Some("my-lease"))?;       // from the headers of a call
//! metadata.namespaces().list()?;
//! metadata.containers(&scope).create(container).await?;      // what changes something is `async` and durable
//! metadata.images(&scope).list(&filters)?;                   // what only reads memory is not
//! metadata.content(&scope).writer("ref", 0, None).await?;    // the writer itself blocks, see there
//! metadata.snapshots(&scope, "overlayfs")?.prepare("key", "parent", labels).await?;
//! metadata.leases(&scope).delete("id", true).await?;         // with `true`, waits for a whole collection
//! ```
//!
//! An `async` call may be awaited anywhere; what blocks in it runs in the lane of its backend ([`crate::lane`]). A change
//! that has begun goes on when its caller goes away, and is on disk when the call returns. Events are sent after that.
//!
//! # Invariants
//!
//! * A blob or snapshot is durable in its backend before a record names it, and its record is durably gone before
//!   the backend forgets it. So a crash leaves garbage in a backend, never a record of nothing; the collection
//!   after the next start takes the garbage away.
//! * No transaction calls a backend. What must not change between a transaction and a backend's answer is held by
//!   a claim on its name (`claims.rs`).

mod claims;
mod containers;
mod content;
mod error;
mod event;
mod fields;
pub mod gc;
mod images;
mod leases;
mod mounts;
mod namespaces;
mod sandboxes;
mod schema;
mod snapshots;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use davit_metadata::{Db, Txn, View};
use davit_model::identifier;
use davit_snapshotter::Snapshotter;

pub use containers::{Container, Containers, Runtime};
pub use content::{Content, ContentInfo, IngestStatus, IoWriter, NsWriter};
pub use error::{Error, Object};
pub use event::{Event, EventSink};
pub use images::{Descriptor, Image, Images};
pub use leases::{Lease, Leases, Resource};
pub use mounts::{Activation, Mounts, Rootfs};
pub use namespaces::{Namespace, Namespaces};
pub use sandboxes::{Sandbox, Sandboxes};
pub use snapshots::{SnapshotInfo, Snapshots};

use crate::blobs::Blobs;
use crate::lane::Lane;
use crate::mounts::Targets;
use crate::streams::Streams;
use claims::Claims;

/// Whether a namespace may have a blob because another one has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sharing {
    /// Whoever names the digest of a blob may have it, without sending it again.
    #[default]
    Shared,
    /// Each namespace must send the blob, unless one that is labelled `containerd.io/namespace.shareable=true`
    /// has it. It is stored once all the same.
    Isolated,
}

/// What the services are built from.
pub struct Parts {
    /// The database.
    pub db: Db,
    /// The blobs.
    pub store: Blobs,
    /// The snapshotters by name. A name has no slash.
    pub snapshotters: BTreeMap<String, Arc<dyn Snapshotter>>,
    /// Where mounts are made for clients.
    pub mounts: Targets,
    /// The content sharing policy.
    pub sharing: Sharing,
    /// Who hears of changes.
    pub events: EventSink,
}

/// The namespace and the lease that a call works in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    namespace: Arc<str>,
    lease: Option<Arc<str>>,
}

impl Scope {
    /// The scope of a call. An unknown lease is found out when something is to be attached to it.
    ///
    /// # Errors
    /// [`Error::Identifier`] when the namespace is malformed.
    pub fn new(namespace: &str, lease: Option<&str>) -> Result<Scope, Error> {
        identifier::validate(namespace)
            .map_err(|source| Error::Identifier { field: "namespace validation", source })?;
        Ok(Scope { namespace: Arc::from(namespace), lease: lease.map(Arc::from) })
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The lease, if the call names one.
    pub fn lease(&self) -> Option<&str> {
        self.lease.as_deref()
    }
}

/// The metadata of the daemon. Clones are handles of the same.
#[derive(Clone)]
pub struct Metadata {
    inner: Arc<Inner>,
}

struct Inner {
    db: Db,
    store: Blobs,
    snapshotters: BTreeMap<String, Arc<dyn Snapshotter>>,
    content_lane: Lane,
    mount_targets: Targets,
    mount_lane: Lane,
    /// Of each snapshotter.
    lanes: BTreeMap<String, Lane>,
    sharing: Sharing,
    events: EventSink,
    schedule: gc::Schedule,
    /// Here because leases keep them, although they are nowhere recorded.
    streams: Streams,
    /// Blobs of the store, by digest.
    blob_claims: Claims,
    /// Snapshots of the backends, by `SNAPSHOTTER/BACKEND_KEY`.
    backend_claims: Claims,
    /// Snapshots of the namespaces, by `NS/SNAPSHOTTER/KEY`.
    snapshot_claims: Claims,
    /// Activated mounts, by the keys of their records.
    mount_claims: Claims,
    /// Root filesystems that a task is being made of, by the keys of the records of their activated mounts.
    rootfs_claims: Claims,
    /// Backends that are being swept.
    sweep_claims: Claims,
    /// The backends that have something to take away.
    dirty: Mutex<Dirty>,
}

/// The backends that may hold what no record names.
#[derive(Debug, Default)]
pub(crate) struct Dirty {
    content: bool,
    mounts: bool,
    snapshotters: BTreeSet<String>,
}

/// What a transaction has to be followed by.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    event: Option<Event>,
    /// Something is gone that others may have been kept by.
    removed: bool,
    dirty: Dirty,
}

impl Effects {
    fn none() -> Effects {
        Effects::default()
    }

    fn event(event: Event) -> Effects {
        Effects { event: Some(event), ..Effects::default() }
    }

    fn removed() -> Effects {
        Effects { removed: true, ..Effects::default() }
    }

    fn with_event(mut self, event: Event) -> Effects {
        self.event = Some(event);
        self
    }

    fn with_content(mut self) -> Effects {
        self.dirty.content = true;
        self
    }

    fn with_mounts(mut self) -> Effects {
        self.dirty.mounts = true;
        self
    }

    fn with_snapshotter(mut self, name: &str) -> Effects {
        self.dirty.snapshotters.insert(name.to_owned());
        self
    }
}

impl Metadata {
    /// Checks the version of the records and takes charge of the parts. Blocks.
    ///
    /// # Errors
    /// [`Error::Version`] for records of a newer daemon.
    pub fn open(parts: Parts) -> Result<Metadata, Error> {
        let Parts { db, store, snapshotters, mounts: mount_targets, sharing, events } = parts;
        schema::check_version(&db)?;
        // A crash may have come between the loss of a record and that of what it named: the first collection
        // looks everywhere.
        let dirty =
            Dirty { content: true, mounts: true, snapshotters: snapshotters.keys().cloned().collect() };
        let lanes = snapshotters
            .iter()
            .map(|(name, backend)| {
                let lane = if is_process(backend) { Lane::proxy() } else { Lane::snapshotter() };
                (name.clone(), lane)
            })
            .collect();
        let inner = Inner {
            db,
            store,
            snapshotters,
            content_lane: Lane::content(),
            mount_targets,
            mount_lane: Lane::mounts(),
            lanes,
            sharing,
            events,
            schedule: gc::Schedule::default(),
            streams: Streams::default(),
            blob_claims: Claims::default(),
            backend_claims: Claims::default(),
            snapshot_claims: Claims::default(),
            mount_claims: Claims::default(),
            rootfs_claims: Claims::default(),
            sweep_claims: Claims::default(),
            dirty: Mutex::new(dirty),
        };
        let metadata = Metadata { inner: Arc::new(inner) };
        mounts::drop_lost(&metadata)?;
        Ok(metadata)
    }

    /// The namespaces.
    pub fn namespaces(&self) -> Namespaces {
        Namespaces::new(self.clone())
    }

    /// The containers of a namespace.
    pub fn containers(&self, scope: &Scope) -> Containers {
        Containers::new(self.clone(), scope.clone())
    }

    /// The sandboxes of a namespace.
    pub fn sandboxes(&self, scope: &Scope) -> Sandboxes {
        Sandboxes::new(self.clone(), scope.clone())
    }

    /// The images of a namespace.
    pub fn images(&self, scope: &Scope) -> Images {
        Images::new(self.clone(), scope.clone())
    }

    /// The blobs and ingests of a namespace.
    pub fn content(&self, scope: &Scope) -> Content {
        Content::new(self.clone(), scope.clone())
    }

    /// The snapshots of a namespace in one snapshotter.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an empty name, [`Error::SnapshotterUnknown`] for one that is not loaded.
    pub fn snapshots(&self, scope: &Scope, snapshotter: &str) -> Result<Snapshots, Error> {
        if snapshotter.is_empty() {
            return Err(Error::Invalid { rule: "snapshotter argument missing" });
        }
        match (self.inner.snapshotters.get(snapshotter), self.inner.lanes.get(snapshotter)) {
            (Some(backend), Some(lane)) => {
                let (backend, lane) = (backend.clone(), lane.clone());
                Ok(Snapshots::new(self.clone(), scope.clone(), snapshotter, backend, lane))
            }
            _ => Err(Error::SnapshotterUnknown { name: snapshotter.to_owned() }),
        }
    }

    /// The leases of a namespace.
    pub fn leases(&self, scope: &Scope) -> Leases {
        Leases::new(self.clone(), scope.clone())
    }

    /// The activated mounts of a namespace.
    pub fn mounts(&self, scope: &Scope) -> Mounts {
        Mounts::new(self.clone(), scope.clone())
    }

    /// The streams of all namespaces.
    pub fn streams(&self) -> &Streams {
        &self.inner.streams
    }

    /// The snapshotters by name, for introspection.
    pub fn snapshotters(&self) -> &BTreeMap<String, Arc<dyn Snapshotter>> {
        &self.inner.snapshotters
    }

    /// Whether the snapshotter of a name is in another process.
    pub fn is_process(&self, snapshotter: &str) -> bool {
        self.inner.snapshotters.get(snapshotter).is_some_and(is_process)
    }

    fn view(&self) -> View {
        self.inner.db.view()
    }

    /// Changes the database, and does what must follow once that is durable, whether or not the caller waits.
    async fn write<T: Send + 'static>(
        &self,
        scope: &Scope,
        change: impl FnOnce(&mut Txn<'_>) -> Result<(T, Effects), Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (metadata, namespace) = (self.clone(), scope.namespace.clone());
        let task = tokio::spawn(async move {
            let inner = &metadata.inner;
            let (value, effects) = inner.db.update_async(change).await?;
            inner.follow(&namespace, effects);
            Ok(value)
        });
        task.await.map_err(|source| Error::Interrupted { source })?
    }

    /// As [`write`](Metadata::write), from a blocking thread.
    fn write_blocking<T>(
        &self,
        scope: &Scope,
        change: impl FnOnce(&mut Txn<'_>) -> Result<(T, Effects), Error>,
    ) -> Result<T, Error> {
        let inner = &self.inner;
        let (value, effects) = inner.db.update(change)?;
        inner.follow(&scope.namespace, effects);
        Ok(value)
    }

    /// A change that need not be durable by itself, because it is nothing without the one that follows.
    fn write_ordered<T>(&self, change: impl FnOnce(&mut Txn<'_>) -> Result<T, Error>) -> Result<T, Error> {
        self.inner.db.update_ordered(change)
    }
}

/// Whether a snapshotter is one of a proxy plugin.
fn is_process(snapshotter: &Arc<dyn Snapshotter>) -> bool {
    snapshotter.in_namespace("").is_some()
}

impl Inner {
    fn follow(&self, namespace: &str, effects: Effects) {
        let Effects { event, removed, dirty } = effects;
        self.mark_dirty(dirty);
        if let Some(event) = event {
            (self.events)(namespace, event);
        }
        self.schedule.mutated(removed);
    }

    fn mark_dirty(&self, more: Dirty) {
        if more.content || more.mounts || !more.snapshotters.is_empty() {
            let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
            dirty.content |= more.content;
            dirty.mounts |= more.mounts;
            dirty.snapshotters.extend(more.snapshotters);
        }
    }
}

/// Runs what blocks on a backend in that backend's lane.
async fn blocking<T: Send + 'static>(
    lane: &Lane,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    lane.run(work).await.map_err(|source| Error::Interrupted { source })?
}

#[cfg(test)]
pub(crate) mod tests;
