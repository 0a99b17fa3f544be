//! Activated mounts: under which names the daemon holds them, and for whom.
//!
//! A record is made before anything is mounted and gets what was mounted afterwards; in between it is *unfinished*, and
//! belongs to a call that has the claim on its name, or to a daemon that died. Records live with the database and mounts
//! with the kernel: a reboot takes the mounts alone, so that the start of the daemon drops what is not mounted any more.
//!
//! A mount that neither a lease nor a label keeps is garbage from the beginning, as in containerd: it lasts until the
//! next collection.
//!
//! The root filesystem of a container may need such mounts as well. They are held under the container's id, with a label
//! that keeps them as long as the container's record is there (containerd 2.3, `core/runtime/v2`). They go with the task,
//! unless the next one is made of them already.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use davit_metadata::Txn;
use davit_model::{Labels, Mount};

use super::claims::Claim;
use super::error::{Error, Object};
use super::gc::LABEL_CONTAINER_BACK_REF;
use super::schema::{self, ActiveMountRecord, MountItem, MountRecord, Table, time, timestamp};
use super::{Effects, Metadata, Scope, blocking, fields};
use crate::mounts::{ActiveMount, Plan, Targets};

/// An activation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Activation {
    /// Its name, any text.
    pub name: String,
    /// What the daemon has mounted, in order.
    pub active: Vec<ActiveMount>,
    /// What is left for whoever uses it to mount.
    pub system: Vec<Mount>,
    /// Its labels.
    pub labels: Labels,
}

/// The root filesystem of a container, as far as it is left to the shim.
#[derive(Debug)]
pub struct Rootfs<'a> {
    /// What the shim has to mount.
    pub mounts: Vec<Mount>,
    /// As long as this is held, nobody takes away what the daemon has mounted of it: until there is a task of it, or there
    /// will be none.
    pub(crate) hold: Option<Claim<'a>>,
}

/// The activated mounts of a namespace. Nothing tells of their changes.
#[derive(Clone)]
pub struct Mounts {
    metadata: Metadata,
    scope: Scope,
}

impl Mounts {
    pub(super) fn new(metadata: Metadata, scope: Scope) -> Mounts {
        Mounts { metadata, scope }
    }

    /// Mounts what the daemon has to mount of a list. The activation belongs to the lease of the call, if it has one.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`]; [`Error::Mounts`], and then nothing is mounted.
    pub async fn activate(
        &self,
        name: &str,
        mounts: Vec<Mount>,
        mut labels: Labels,
        temporary: bool,
    ) -> Result<Activation, Error> {
        fields::check_labels("mount.Labels", &labels)?;
        fields::drop_empty(&mut labels);
        let plan = Plan::new(mounts, temporary, &[])?;
        self.carry_out(name, plan, labels).await
    }

    async fn carry_out(&self, name: &str, plan: Plan, labels: Labels) -> Result<Activation, Error> {
        let (mounts, name) = (self.clone(), name.to_owned());
        blocking(&self.metadata.inner.mount_lane, move || mounts.activate_blocking(name, plan, labels)).await
    }

    fn activate_blocking(&self, name: String, plan: Plan, labels: Labels) -> Result<Activation, Error> {
        let inner = &self.metadata.inner;
        let key = self.key(&name);
        let _claim = inner.mount_claims.take(&claim(&key));
        let started = SystemTime::now();
        let lease = self.scope.lease().unwrap_or_default().to_owned();
        let (number, left) = self.metadata.write_blocking(&self.scope, |txn| {
            let left = match schema::load::<MountRecord>(txn, &key)? {
                Some(record) if record.finished => {
                    return Err(Error::already_exists(Object::Mount(name.clone())));
                }
                Some(unfinished) => Some(unfinished.number),
                None => None,
            };
            let number = schema::next_sequence(txn)?;
            let record = MountRecord {
                labels: labels.clone(),
                created: timestamp(started),
                updated: timestamp(started),
                lease: lease.clone(),
                number,
                ..MountRecord::default()
            };
            schema::touch_namespace(txn, self.scope.namespace());
            schema::store(txn, &key, &record);
            Ok(((number, left), Effects::none()))
        })?;
        if let Some(left) = left
            && let Err(error) = inner.mount_targets.remove(left)
        {
            let error = davit_model::error::chain(&error);
            tracing::warn!(error, "cannot take away mounts of an unfinished activation");
        }
        let forget = || {
            let forgotten = self.metadata.write_blocking(&self.scope, |txn| {
                txn.delete(&key);
                Ok(((), Effects::none()))
            });
            if let Err(error) = forgotten {
                tracing::warn!(%error, "cannot forget an activation that failed");
            }
        };
        let (active, system) = inner.mount_targets.activate(number, plan).inspect_err(|_| forget())?;
        let finished = self.metadata.write_blocking(&self.scope, |txn| {
            // Its namespace may have been deleted, and all that was in it.
            if schema::load::<MountRecord>(txn, &key)?.is_none_or(|record| record.number != number) {
                return Err(Error::not_found(Object::Mount(name.clone())));
            }
            let record = MountRecord {
                labels: labels.clone(),
                created: timestamp(started),
                updated: timestamp(SystemTime::now()),
                lease: lease.clone(),
                number,
                finished: true,
                active: active.iter().map(active_record).collect(),
                system: system.iter().map(item).collect(),
            };
            schema::store(txn, &key, &record);
            Ok(((), Effects::none()))
        });
        if let Err(error) = finished {
            // The first error is the one to tell; the collector tries again.
            let _ = inner.mount_targets.remove(number);
            return Err(error);
        }
        Ok(Activation { name, active, system, labels })
    }

    /// Forgets an activation and takes its mounts away.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Mounts`] when one does not come off, which the collector tries again.
    pub async fn deactivate(&self, name: &str) -> Result<(), Error> {
        let (mounts, name) = (self.clone(), name.to_owned());
        blocking(&self.metadata.inner.mount_lane, move || mounts.deactivate_blocking(name)).await
    }

    fn deactivate_blocking(&self, name: String) -> Result<(), Error> {
        let inner = &self.metadata.inner;
        let _claim = inner.mount_claims.take(&claim(&self.key(&name)));
        self.forget(name)
    }

    /// Forgets an activation whose claim the caller has.
    fn forget(&self, name: String) -> Result<(), Error> {
        let (inner, key) = (&self.metadata.inner, self.key(&name));
        let number = self.metadata.write_blocking(&self.scope, |txn| {
            let record = schema::load::<MountRecord>(txn, &key)?;
            let record = record.ok_or_else(|| Error::not_found(Object::Mount(name)))?;
            txn.delete(&key);
            Ok((record.number, Effects::removed()))
        })?;
        inner.mount_targets.remove(number).map_err(|error| {
            inner.mark_dirty(super::Dirty { mounts: true, ..super::Dirty::default() });
            Error::from(error)
        })
    }

    /// Mounts what its shim cannot mount of the root filesystem of a container; mostly, that is nothing. Only if it may be
    /// something, the shim is asked what it accepts (see [`Plan::is_needed`]). What an earlier task of the container has
    /// left is used as it is. Whoever makes no task of it calls [`deactivate_rootfs`](Mounts::deactivate_rootfs) when it
    /// has let go of the result.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`] when somebody else has activated mounts under this name; [`Error::Mounts`].
    pub async fn activate_rootfs(
        &self,
        container: &str,
        mounts: Vec<Mount>,
        accepted: impl Future<Output = Vec<String>>,
    ) -> Result<Rootfs<'_>, Error> {
        if !Plan::is_needed(&mounts, &[]) {
            return Ok(Rootfs { mounts, hold: None });
        }
        let accepted = accepted.await;
        if !Plan::is_needed(&mounts, &accepted) {
            return Ok(Rootfs { mounts, hold: None });
        }
        // Before the record is looked for: who takes it away either sees this, or has taken it away by then. Nobody has this
        // claim alone for longer than it takes to look whether there is a task.
        let hold = Some(self.metadata.inner.rootfs_claims.share(&claim(&self.key(container))));
        let labels = Labels::from([(LABEL_CONTAINER_BACK_REF.to_owned(), container.to_owned())]);
        match self.carry_out(container, Plan::new(mounts, false, &accepted)?, labels).await {
            Ok(activation) => Ok(Rootfs { mounts: activation.system, hold }),
            Err(error @ Error::AlreadyExists { .. }) => match self.get(container) {
                Ok(found) if is_rootfs(&found) => Ok(Rootfs { mounts: found.system, hold }),
                Ok(_) | Err(_) => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// Takes the mounts of a container's root filesystem away, if there are any, and no task has them or is being made of
    /// them: somebody else may have begun with the next one. What does not come off is left to the collector.
    pub async fn deactivate_rootfs(&self, container: &str, has_task: impl FnOnce() -> bool + Send + 'static) {
        if !self.has_rootfs(container) {
            return;
        }
        let (mounts, name) = (self.clone(), container.to_owned());
        let deactivate = move || {
            let (inner, key) = (&mounts.metadata.inner, claim(&mounts.key(&name)));
            let _claim = inner.mount_claims.take(&key);
            // In this order: who lets go between the two has made its task.
            let is_used = inner.rootfs_claims.try_take(&key).is_none() || has_task();
            if is_used || !mounts.has_rootfs(&name) { Ok(()) } else { mounts.forget(name) }
        };
        if let Err(error) = blocking(&self.metadata.inner.mount_lane, deactivate).await {
            let error = davit_model::error::chain(&error);
            tracing::warn!(error, container.id = container, "cannot take away the mounts of a container");
        }
    }

    fn has_rootfs(&self, container: &str) -> bool {
        self.get(container).is_ok_and(|found| is_rootfs(&found))
    }

    /// An activation.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn get(&self, name: &str) -> Result<Activation, Error> {
        let record = schema::load(&self.metadata.view(), &self.key(name))?;
        record
            .map(|record| from_record(name, record))
            .ok_or_else(|| Error::not_found(Object::Mount(name.to_owned())))
    }

    /// All activations of the namespace, by name.
    ///
    /// # Errors
    /// A record that cannot be read.
    pub fn list(&self) -> Result<Vec<Activation>, Error> {
        let view = self.metadata.view();
        view.scan(&self.key(""))
            .map(|(key, value)| {
                let (_, name) = Table::Mount.split(&key)?;
                Ok(from_record(name, schema::decode(&key, &value)?))
            })
            .collect()
    }

    fn key(&self, name: &str) -> Vec<u8> {
        Table::Mount.key(self.scope.namespace(), name)
    }
}

/// Whether an activation is that of the container whose name it has.
fn is_rootfs(activation: &Activation) -> bool {
    activation.labels.get(LABEL_CONTAINER_BACK_REF) == Some(&activation.name)
}

/// The name of the claim on a record.
pub(super) fn claim(key: &[u8]) -> String {
    String::from_utf8_lossy(key).into_owned()
}

/// Drops the records of what is not mounted any more, and of what was never finished. Blocks: at the start.
pub(super) fn drop_lost(metadata: &Metadata) -> Result<(), Error> {
    let db = &metadata.inner.db;
    let view = db.view();
    let mut lost = Vec::new();
    let mut points = None;
    for (key, value) in view.scan(Table::Mount.prefix().as_bytes()) {
        let record: MountRecord = schema::decode(&key, &value)?;
        let points = match &points {
            Some(points) => points,
            None => points.insert(Targets::mount_points()?),
        };
        let mounted = |mount: &ActiveMountRecord| points.contains(Path::new(&mount.point));
        if !record.finished || !record.active.iter().all(mounted) {
            lost.push(key);
        }
    }
    if lost.is_empty() {
        return Ok(());
    }
    tracing::info!(mounts = lost.len(), "forgetting mounts that are not there any more");
    db.update(|txn: &mut Txn<'_>| {
        lost.iter().for_each(|key| txn.delete(key));
        Ok(())
    })
}

fn item(mount: &Mount) -> MountItem {
    let Mount { kind, source, target, options } = mount.clone();
    MountItem { kind, source, target, options }
}

fn mount(item: MountItem) -> Mount {
    let MountItem { kind, source, target, options } = item;
    Mount { kind, source, target, options }
}

fn active_record(active: &ActiveMount) -> ActiveMountRecord {
    let point = active.point.display().to_string();
    ActiveMountRecord { mount: Some(item(&active.mount)), at: timestamp(active.at), point }
}

fn from_record(name: &str, record: MountRecord) -> Activation {
    let active = |record: ActiveMountRecord| ActiveMount {
        mount: mount(record.mount.unwrap_or_default()),
        at: time(record.at),
        point: PathBuf::from(record.point),
    };
    Activation {
        name: name.to_owned(),
        active: record.active.into_iter().map(active).collect(),
        system: record.system.into_iter().map(mount).collect(),
        labels: record.labels,
    }
}
