//! Snapshots: each namespace's names for the snapshots of a snapshotter.
//!
//! A client's key is one thing, the key that the snapshotter knows, `NS/SEQ/KEY`, another, new with each Prepare and
//! each Commit: so a removed snapshot does not stand in the way of one of the same key, and the collector can take it
//! away at its leisure. Labels stay here; only those that are meant for snapshotters go down.
//!
//! A snapshotter cannot take part in a transaction. So a call claims the client's keys that it works on, checks
//! its conditions, lets the snapshotter work, and records the result; the claims on the snapshotter's keys keep the
//! collector away meanwhile. What a crash leaves in between is a snapshot that no record names: garbage.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::SystemTime;

use davit_metadata::Txn;
use davit_model::filter::{Adaptor, Filter, label_field};
use davit_model::{Coded, ErrorCode, Labels, Mount};
use davit_snapshotter::{Error as BackendError, Kind, Snapshotter, Usage};

pub use davit_snapshotter::Info as SnapshotInfo;

use super::error::{Error, Object};
use super::event::Event;
use super::schema::{self, SnapshotRecord, child_key, snapshot_key, time, timestamp};
use super::{Effects, Metadata, Scope, blocking, fields, leases};

/// The label with the name that an unpacked layer will be committed under. A snapshotter that can fetch the layer
/// by itself answers Prepare with "already exists", and has it.
const LABEL_TARGET: &str = "containerd.io/snapshot.ref";

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
}

impl Snapshots {
    pub(super) fn new(
        metadata: Metadata,
        scope: Scope,
        name: &str,
        backend: Arc<dyn Snapshotter>,
    ) -> Snapshots {
        Snapshots { metadata, scope, name: Arc::from(name), backend }
    }

    /// What is known of a snapshot: its record, and the labels that the snapshotter added.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn stat(&self, key: &str) -> Result<SnapshotInfo, Error> {
        let record = self.record(key)?;
        let (backend, key) = (self.backend.clone(), key.to_owned());
        blocking(move || Ok(overlay(backend.stat(&record.backend)?, &key, record))).await
    }

    /// The mounts of an active snapshot or a view.
    ///
    /// # Errors
    /// [`Error::NotFound`]; the snapshotter's for a committed one.
    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error> {
        let record = self.record(key)?;
        let backend = self.backend.clone();
        blocking(move || Ok(backend.mounts(&record.backend)?)).await
    }

    /// What a snapshot takes on disk, without its parents.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn usage(&self, key: &str) -> Result<Usage, Error> {
        let record = self.record(key)?;
        let backend = self.backend.clone();
        blocking(move || Ok(backend.usage(&record.backend)?)).await
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
                    Err(BackendError::NotFound { .. }) => continue,
                    Err(error) => return Err(error.into()),
                };
                if filter.matches(&Selectable(&info)) {
                    infos.push(info);
                }
            }
            Ok(infos)
        };
        blocking(read).await
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
        blocking(move || snapshots.commit_blocking(&name, &key, labels, parent.as_deref())).await
    }

    /// Forgets a snapshot that has no children. Its files are the collector's.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::HasChildren`].
    pub async fn remove(&self, key: &str) -> Result<(), Error> {
        let (snapshots, key) = (self.clone(), key.to_owned());
        blocking(move || snapshots.remove_blocking(key)).await
    }

    /// Changes labels: those that `paths` names as `labels` or `labels.KEY`, or all of them when it is empty.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Field`], [`Error::Label`].
    pub async fn update(&self, key: &str, labels: Labels, paths: &[String]) -> Result<SnapshotInfo, Error> {
        let (snapshots, key, paths) = (self.clone(), key.to_owned(), paths.to_vec());
        blocking(move || snapshots.update_blocking(&key, &labels, &paths)).await
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
        blocking(move || snapshots.create_blocking(key, parent, labels, kind)).await
    }

    fn create_blocking(
        &self,
        key: String,
        parent: Option<String>,
        mut labels: Labels,
        kind: Kind,
    ) -> Result<Vec<Mount>, Error> {
        self.check_name(&key)?;
        fields::check_labels("info.Labels", &labels)?;
        fields::drop_empty(&mut labels);
        let target = labels.get(LABEL_TARGET).cloned();
        let inner = &self.metadata.inner;
        let _names =
            inner.snapshot_claims.take_two(&self.claim(&key), &self.claim(target.as_deref().unwrap_or(&key)));

        let begun = self.metadata.write_ordered(|txn| {
            let existing = [target.as_ref().map(|name| (name, true)), Some((&key, false))];
            for (name, is_target) in existing.into_iter().flatten() {
                if self.load(txn, name)?.is_some() {
                    leases::attach(txn, &self.scope, &self.resource(name))?;
                    let object = if is_target { Object::TargetSnapshot } else { Object::Snapshot };
                    return Ok(Err(object(name.clone())));
                }
            }
            let parent = parent.as_deref().map(|parent| self.parent(txn, parent)).transpose()?;
            Ok(Ok((self.backend_key(txn, &key)?, parent.map(|record| record.backend))))
        })?;
        let (backend_key, backend_parent) = match begun {
            Ok(begun) => begun,
            Err(object) => {
                // The answer promises that the lease holds it.
                inner.db.sync()?;
                return Err(Error::already_exists(object));
            }
        };

        let _created = inner.backend_claims.share(&self.backend_claim(&backend_key));
        let _parent =
            backend_parent.as_ref().map(|parent| inner.backend_claims.share(&self.backend_claim(parent)));
        let down = for_backend(&labels);
        let made = match kind {
            Kind::View => self.backend.view(&backend_key, backend_parent.as_deref(), &down),
            Kind::Active | Kind::Committed => {
                self.backend.prepare(&backend_key, backend_parent.as_deref(), &down)
            }
        };
        let mounts = match made {
            Ok(mounts) => mounts,
            Err(error) if error.code() == ErrorCode::AlreadyExists => {
                return match target {
                    Some(target) => {
                        Err(self.adopt(&target, parent.as_deref(), backend_parent.as_deref(), labels)?)
                    }
                    None => Err(Error::Unexpected { snapshotter: self.name.to_string(), source: error }),
                };
            }
            Err(error) => return Err(error.into()),
        };

        let now = timestamp(SystemTime::now());
        let record = SnapshotRecord {
            labels,
            created: now,
            updated: now,
            backend: backend_key.clone(),
            parent: parent.clone().unwrap_or_default(),
        };
        let event = Event::SnapshotPrepare {
            snapshotter: self.name.to_string(),
            key: key.clone(),
            parent: parent.unwrap_or_default(),
        };
        let effects = if kind == Kind::Active { Effects::event(event) } else { Effects::none() };
        let recorded = self.metadata.write_blocking(&self.scope, |txn| {
            self.insert(txn, &key, &record, backend_parent.as_deref())?;
            Ok(((), effects))
        });
        if let Err(error) = recorded {
            if let Err(error) = self.backend.remove(&backend_key) {
                tracing::warn!(%error, snapshot.key = backend_key, "cannot remove an unrecorded snapshot");
                self.mark_dirty();
            }
            return Err(error);
        }
        Ok(mounts)
    }

    /// Records the snapshot that the snapshotter has for `target`, and returns what Prepare answers then.
    fn adopt(
        &self,
        target: &str,
        parent: Option<&str>,
        backend_parent: Option<&str>,
        mut labels: Labels,
    ) -> Result<Error, Error> {
        let found = self.backend.list()?.into_iter().find(|info| {
            info.kind == Kind::Committed
                && info.labels.get(LABEL_TARGET).is_some_and(|name| name == target)
                && info.parent.as_deref() == backend_parent
        });
        let lost = || Error::not_found(Object::LostTarget(target.to_owned()));
        let found = found.ok_or_else(lost)?;
        // If the collector was about to take it, this waits until it is gone.
        let _claim = self.metadata.inner.backend_claims.share(&self.backend_claim(&found.name));
        self.backend.stat(&found.name).map_err(|_| lost())?;
        for (label, value) in found.labels {
            labels.entry(label).or_insert(value);
        }
        let record = SnapshotRecord {
            labels,
            created: timestamp(found.created),
            updated: timestamp(found.updated),
            backend: found.name,
            parent: parent.unwrap_or_default().to_owned(),
        };
        self.metadata.write_blocking(&self.scope, |txn| {
            self.insert(txn, target, &record, backend_parent)?;
            Ok(((), Effects::none()))
        })?;
        Ok(Error::already_exists(Object::BackendTarget(target.to_owned())))
    }

    /// Records a new snapshot, its link from the parent, and its lease.
    fn insert(
        &self,
        txn: &mut Txn<'_>,
        key: &str,
        record: &SnapshotRecord,
        backend_parent: Option<&str>,
    ) -> Result<(), Error> {
        leases::attach(txn, &self.scope, &self.resource(key))?;
        if self.load(txn, key)?.is_some() {
            return Err(Error::already_exists(Object::Snapshot(key.to_owned())));
        }
        if !record.parent.is_empty() {
            // It may be gone since we looked, or its key may stand for another one.
            let parent = self.parent(txn, &record.parent)?;
            if backend_parent != Some(parent.backend.as_str()) {
                return Err(Error::ParentMismatch { parent: record.parent.clone(), target: key.to_owned() });
            }
            txn.put(&self.child(&record.parent, key), b"");
        }
        schema::touch_namespace(txn, self.scope.namespace());
        schema::store(txn, &self.key(key), record);
        Ok(())
    }

    fn commit_blocking(
        &self,
        name: &str,
        key: &str,
        mut labels: Labels,
        parent: Option<&str>,
    ) -> Result<(), Error> {
        self.check_name(name)?;
        fields::check_labels("info.Labels", &labels)?;
        fields::drop_empty(&mut labels);
        let inner = &self.metadata.inner;
        let _names = inner.snapshot_claims.take_two(&self.claim(name), &self.claim(key));

        let begun = self.metadata.write_ordered(|txn| {
            leases::check(txn, &self.scope)?;
            if self.load(txn, name)?.is_some() {
                leases::attach(txn, &self.scope, &self.resource(name))?;
                return Ok(None);
            }
            let mut record = self.load(txn, key)?.ok_or_else(|| self.absent(key))?;
            let rebase = record.parent.is_empty() && parent.is_some();
            if rebase {
                record.parent = parent.unwrap_or_default().to_owned();
            }
            let parent =
                if record.parent.is_empty() { None } else { Some(self.parent(txn, &record.parent)?) };
            let backend_parent = parent.map(|parent| parent.backend);
            Ok(Some((record, backend_parent, rebase, self.backend_key(txn, name)?)))
        })?;
        let Some((record, backend_parent, rebase, backend_name)) = begun else {
            inner.db.sync()?;
            return Err(Error::already_exists(Object::Snapshot(name.to_owned())));
        };

        let in_use = [Some(&backend_name), Some(&record.backend), backend_parent.as_ref()];
        let _claims: Vec<_> = in_use
            .into_iter()
            .flatten()
            .map(|key| inner.backend_claims.share(&self.backend_claim(key)))
            .collect();
        let new_parent = backend_parent.as_deref().filter(|_| rebase);
        self.backend.commit(&backend_name, &record.backend, &for_backend(&labels), new_parent)?;

        let now = timestamp(SystemTime::now());
        let committed = SnapshotRecord {
            labels,
            created: now,
            updated: now,
            backend: backend_name,
            parent: record.parent.clone(),
        };
        let event = Event::SnapshotCommit {
            snapshotter: self.name.to_string(),
            key: key.to_owned(),
            name: name.to_owned(),
        };
        let recorded = self.metadata.write_blocking(&self.scope, |txn| {
            // From here on the key stands for nothing, whatever else happened to its record.
            txn.delete(&self.key(key));
            leases::detach(txn, &self.scope, &self.resource(key));
            if !record.parent.is_empty() {
                txn.delete(&self.child(&record.parent, key));
            }
            // A lease that was deleted meanwhile does not undo the commit: it only protects no longer.
            let lease = self.scope.lease.clone().filter(|_| leases::check(txn, &self.scope).is_ok());
            let scope = Scope { lease, ..self.scope.clone() };
            let snapshots = Snapshots { scope, ..self.clone() };
            snapshots.insert(txn, name, &committed, backend_parent.as_deref())?;
            Ok(((), Effects::event(event)))
        });
        if recorded.is_err() {
            self.mark_dirty();
        }
        recorded
    }

    fn remove_blocking(&self, key: String) -> Result<(), Error> {
        let _name = self.metadata.inner.snapshot_claims.take(&self.claim(&key));
        self.metadata.write_blocking(&self.scope, |txn| {
            let record = self.load(txn, &key)?.ok_or_else(|| self.absent(&key))?;
            if txn.scan(&self.child(&key, "")).next().is_some() {
                return Err(Error::HasChildren { key });
            }
            txn.delete(&self.key(&key));
            if !record.parent.is_empty() {
                txn.delete(&self.child(&record.parent, &key));
            }
            leases::detach(txn, &self.scope, &self.resource(&key));
            let event = Event::SnapshotRemove { snapshotter: self.name.to_string(), key };
            Ok(((), Effects::removed().with_snapshotter(&self.name).with_event(event)))
        })
    }

    fn update_blocking(&self, key: &str, labels: &Labels, paths: &[String]) -> Result<SnapshotInfo, Error> {
        if key.is_empty() {
            return Err(Error::Invalid { rule: "snapshot name must not be empty" });
        }
        let _name = self.metadata.inner.snapshot_claims.take(&self.claim(key));
        let mut record = self.record(key)?;
        if paths.is_empty() {
            record.labels.clone_from(labels);
        }
        for path in paths {
            if !fields::replace("labels", path, &mut record.labels, labels) {
                return Err(Error::Field { path: path.clone(), object: format!("snapshot {key:?}") });
            }
        }
        fields::check_labels("info.Labels", &record.labels)?;
        fields::drop_empty(&mut record.labels);
        record.updated = timestamp(SystemTime::now());
        let info = self.backend.update(&record.backend, &for_backend(&record.labels), paths)?;
        self.metadata.write_blocking(&self.scope, |txn| {
            self.load(txn, key)?.ok_or_else(|| self.absent(key))?;
            schema::store(txn, &self.key(key), &record);
            Ok(((), Effects::none()))
        })?;
        Ok(overlay(info, key, record))
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
    let wanted = |label: &str| label == LABEL_TARGET || label.starts_with(LABEL_PREFIX);
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
