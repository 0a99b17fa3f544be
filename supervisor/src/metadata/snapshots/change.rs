//! The calls that change snapshots, as they run on a blocking thread.

use std::time::SystemTime;

use davit_metadata::Txn;
use davit_model::{Coded, ErrorCode, Labels, Mount};
use davit_snapshotter::{Kind, TARGET_LABEL};

use crate::metadata::error::{Error, Object};
use crate::metadata::event::Event;
use crate::metadata::schema::{self, SnapshotRecord, timestamp};
use crate::metadata::{Effects, Scope, fields, leases};

use super::{SnapshotInfo, Snapshots, for_backend, overlay};

impl Snapshots {
    pub(super) fn create_blocking(
        &self,
        key: String,
        parent: Option<String>,
        mut labels: Labels,
        kind: Kind,
    ) -> Result<Vec<Mount>, Error> {
        self.check_name(&key)?;
        fields::check_labels("info.Labels", &labels)?;
        fields::drop_empty(&mut labels);
        let target = labels.get(TARGET_LABEL).cloned();
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
            }
            // A snapshotter may leave the folder of what is removed to the collector.
            self.mark_dirty();
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
        let lost = || Error::not_found(Object::LostTarget(target.to_owned()));
        let found = self.backend.find_target(target, backend_parent)?.ok_or_else(lost)?;
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

    /// Records a new snapshot, its link from the parent, and its lease. With an error nothing is written.
    fn insert(
        &self,
        txn: &mut Txn<'_>,
        key: &str,
        record: &SnapshotRecord,
        backend_parent: Option<&str>,
    ) -> Result<(), Error> {
        leases::check(txn, &self.scope)?;
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
        leases::attach(txn, &self.scope, &self.resource(key))?;
        schema::touch_namespace(txn, self.scope.namespace());
        schema::store(txn, &self.key(key), record);
        Ok(())
    }

    pub(super) fn commit_blocking(
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
            // A parent that was only named at the commit may be gone. Then what was committed is garbage, and the key is gone
            // all the same.
            let inserted = snapshots.insert(txn, name, &committed, backend_parent.as_deref());
            let effects = match inserted {
                Ok(()) => Effects::event(event),
                Err(_) => Effects::removed().with_snapshotter(&self.name),
            };
            Ok((inserted, effects))
        });
        if recorded.is_err() {
            self.mark_dirty();
        }
        recorded?
    }

    pub(super) fn remove_blocking(&self, key: String) -> Result<(), Error> {
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

    pub(super) fn update_blocking(
        &self,
        key: &str,
        labels: &Labels,
        paths: &[String],
    ) -> Result<SnapshotInfo, Error> {
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
}
