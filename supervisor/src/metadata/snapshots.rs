//! Snapshots: each namespace's names for the snapshots of a snapshotter.
//!
//! A client's key is one thing, the key that the snapshotter knows, `NS/SEQ/KEY`, another, new with each Prepare and
//! each Commit: so a removed snapshot does not stand in the way of one of the same key, and the collector can take it
//! away at its leisure. Labels stay here; only those that are meant for snapshotters go down.
//!
//! A snapshotter cannot take part in a transaction. So a call claims the client's keys that it works on, checks
//! its conditions, lets the snapshotter work, and records the result; the claims on the snapshotter's keys keep the
//! collector away meanwhile. What a crash leaves in between is a snapshot that no record names: garbage.

mod change;

use std::borrow::Cow;
use std::sync::Arc;

use davit_metadata::Txn;
use davit_model::filter::{Adaptor, Filter, label_field};
use davit_model::{Coded, ErrorCode, Labels, Mount};
use davit_snapshotter::{Kind, Snapshotter, TARGET_LABEL, Usage};

pub use davit_snapshotter::Info as SnapshotInfo;

use super::error::{Error, Object};
use super::schema::{self, SnapshotRecord, child_key, snapshot_key, time};
use super::{Effects, Metadata, Scope, blocking, leases};
use crate::lane::Lane;

/// Labels that begin so are meant for the snapshotter.
const LABEL_PREFIX: &str = "containerd.io/snapshot/";

struct Selectable<'a>(&'a SnapshotInfo);

impl Adaptor for Selectable<'_> {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.first()?.as_str() {
            "kind" => Some(Cow::Borrowed(self.0.kind.as_str())),
            "name" => Some(Cow::Borrowed(&self.0.name)),
            "parent" => Some(Cow::Borrowed(self.0.parent.as_deref().unwrap_or_default())),
            "labels" => label_field(&self.0.labels, &path[1..]),
            _ => None,
        }
    }
}

/// The snapshots of a namespace in one snapshotter.
#[derive(Clone)]
pub struct Snapshots {
    metadata: Metadata,
    scope: Scope,
    name: Arc<str>,
    backend: Arc<dyn Snapshotter>,
    lane: Lane,
}

impl Snapshots {
    pub(super) fn new(
        metadata: Metadata,
        scope: Scope,
        name: &str,
        backend: Arc<dyn Snapshotter>,
        lane: Lane,
    ) -> Snapshots {
        let backend = backend.in_namespace(scope.namespace()).unwrap_or(backend);
        Snapshots { metadata, scope, name: Arc::from(name), backend, lane }
    }

    /// What is known of a snapshot: its record, and the labels that the snapshotter added.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn stat(&self, key: &str) -> Result<SnapshotInfo, Error> {
        let record = self.record(key)?;
        let (backend, key) = (self.backend.clone(), key.to_owned());
        blocking(&self.lane, move || Ok(overlay(backend.stat(&record.backend)?, &key, record))).await
    }

    /// The mounts of an active snapshot or a view.
    ///
    /// # Errors
    /// [`Error::NotFound`]; the snapshotter's for a committed one.
    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error> {
        let record = self.record(key)?;
        let backend = self.backend.clone();
        blocking(&self.lane, move || Ok(backend.mounts(&record.backend)?)).await
    }

    /// What a snapshot takes on disk, without its parents.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn usage(&self, key: &str) -> Result<Usage, Error> {
        let record = self.record(key)?;
        let backend = self.backend.clone();
        blocking(&self.lane, move || Ok(backend.usage(&record.backend)?)).await
    }

    /// The snapshots that match one of the filters (`kind`, `name`, `parent`, `labels.*`), by key.
    ///
    /// # Errors
    /// [`Error::Filter`].
    pub async fn list(&self, filters: &[String]) -> Result<Vec<SnapshotInfo>, Error> {
        let filter = Filter::parse(filters)?;
        let view = self.metadata.view();
        let (backend, prefix) = (self.backend.clone(), snapshot_key(self.scope.namespace(), &self.name, ""));
        let read = move || {
            let mut infos = Vec::new();
            for (key, value) in view.scan(&prefix) {
                let record: SnapshotRecord = schema::decode(&key, &value)?;
                let info = match backend.stat(&record.backend) {
                    Ok(info) => overlay(info, &String::from_utf8_lossy(&key[prefix.len()..]), record),
                    // Removed in this moment, or lost.
                    Err(error) if error.code() == ErrorCode::NotFound => continue,
                    Err(error) => return Err(error.into()),
                };
                if filter.matches(&Selectable(&info)) {
                    infos.push(info);
                }
            }
            Ok(infos)
        };
        blocking(&self.lane, read).await
    }

    /// Makes an active snapshot on a committed `parent`, or an empty one, and answers its mounts.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] for the key, or for the name in the label `containerd.io/snapshot.ref`: then the
    /// lease of the call holds what exists. [`Error::NotFound`] for the parent or the lease; [`Error::Label`];
    /// the snapshotter's.
    pub async fn prepare(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        self.create(key, parent, labels, Kind::Active).await
    }

    /// As [`prepare`](Snapshots::prepare), but read-only.
    ///
    /// # Errors
    /// As [`prepare`](Snapshots::prepare).
    pub async fn view(&self, key: &str, parent: Option<&str>, labels: Labels) -> Result<Vec<Mount>, Error> {
        self.create(key, parent, labels, Kind::View).await
    }

    /// Turns the active snapshot `key` into the committed snapshot `name`, with exactly these labels. A `parent`
    /// becomes that of a snapshot that has none.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] for the name, which the lease of the call holds then; [`Error::NotFound`] for key,
    /// parent or lease; [`Error::Label`]; the snapshotter's.
    pub async fn commit(
        &self,
        name: &str,
        key: &str,
        labels: Labels,
        parent: Option<&str>,
    ) -> Result<(), Error> {
        let (snapshots, name, key) = (self.clone(), name.to_owned(), key.to_owned());
        let parent = some(parent).map(str::to_owned);
        blocking(&self.lane, move || snapshots.commit_blocking(&name, &key, labels, parent.as_deref())).await
    }

    /// Forgets a snapshot that has no children. Its files are the collector's.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::HasChildren`].
    pub async fn remove(&self, key: &str) -> Result<(), Error> {
        let (snapshots, key) = (self.clone(), key.to_owned());
        blocking(&self.lane, move || snapshots.remove_blocking(key)).await
    }

    /// Changes labels: those that `paths` names as `labels` or `labels.KEY`, or all of them when it is empty.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Field`], [`Error::Label`].
    pub async fn update(&self, key: &str, labels: Labels, paths: &[String]) -> Result<SnapshotInfo, Error> {
        let (snapshots, key, paths) = (self.clone(), key.to_owned(), paths.to_vec());
        blocking(&self.lane, move || snapshots.update_blocking(&key, &labels, &paths)).await
    }

    async fn create(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
        kind: Kind,
    ) -> Result<Vec<Mount>, Error> {
        let (snapshots, key) = (self.clone(), key.to_owned());
        let parent = some(parent).map(str::to_owned);
        blocking(&self.lane, move || snapshots.create_blocking(key, parent, labels, kind)).await
    }

    /// The record of a key, as it is now.
    fn record(&self, key: &str) -> Result<SnapshotRecord, Error> {
        self.load(&self.metadata.view(), key)?.ok_or_else(|| self.absent(key))
    }

    fn load(&self, db: &impl schema::Read, key: &str) -> Result<Option<SnapshotRecord>, Error> {
        schema::load(db, &self.key(key))
    }

    fn parent(&self, db: &impl schema::Read, parent: &str) -> Result<SnapshotRecord, Error> {
        self.load(db, parent)?.ok_or_else(|| Error::not_found(Object::ParentSnapshot(parent.to_owned())))
    }

    fn absent(&self, key: &str) -> Error {
        Error::not_found(Object::AbsentSnapshot(key.to_owned()))
    }

    fn check_name(&self, key: &str) -> Result<(), Error> {
        if key.is_empty() { Err(Error::Invalid { rule: "snapshot key must not be empty" }) } else { Ok(()) }
    }

    fn key(&self, key: &str) -> Vec<u8> {
        snapshot_key(self.scope.namespace(), &self.name, key)
    }

    fn child(&self, parent: &str, key: &str) -> Vec<u8> {
        child_key(self.scope.namespace(), &self.name, parent, key)
    }

    fn resource(&self, key: &str) -> String {
        leases::snapshot(&self.name, key)
    }

    fn claim(&self, key: &str) -> String {
        format!("{}/{}/{key}", self.scope.namespace(), self.name)
    }

    fn backend_claim(&self, backend_key: &str) -> String {
        backend_claim(&self.name, backend_key)
    }

    fn backend_key(&self, txn: &mut Txn<'_>, key: &str) -> Result<String, Error> {
        Ok(format!("{}/{}/{key}", self.scope.namespace(), schema::next_sequence(txn)?))
    }

    fn mark_dirty(&self) {
        self.metadata.inner.mark_dirty(Effects::none().with_snapshotter(&self.name).dirty);
    }
}

/// The name under which a snapshot of a backend is claimed.
pub(super) fn backend_claim(snapshotter: &str, backend_key: &str) -> String {
    format!("{snapshotter}/{backend_key}")
}

/// A text that the wire leaves empty when it is not set.
fn some(text: Option<&str>) -> Option<&str> {
    text.filter(|text| !text.is_empty())
}

/// The labels that the snapshotter is to know.
fn for_backend(labels: &Labels) -> Labels {
    let wanted = |label: &str| label == TARGET_LABEL || label.starts_with(LABEL_PREFIX);
    labels
        .iter()
        .filter(|(label, _)| wanted(label))
        .map(|(label, value)| (label.clone(), value.clone()))
        .collect()
}

/// What the snapshotter says, with what the record says in front of it.
fn overlay(mut info: SnapshotInfo, key: &str, record: SnapshotRecord) -> SnapshotInfo {
    info.labels.extend(record.labels);
    SnapshotInfo {
        kind: info.kind,
        name: key.to_owned(),
        parent: (!record.parent.is_empty()).then_some(record.parent),
        labels: info.labels,
        created: time(record.created),
        updated: time(record.updated),
    }
}
