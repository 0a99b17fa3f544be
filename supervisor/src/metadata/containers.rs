//! Containers: what a client wants to run, as a record. What runs is the business of the runtime.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::SystemTime;

use davit_metadata::Txn;
use davit_model::filter::{Adaptor, Filter, label_field, text_field};
use davit_model::{Any, Labels, identifier};

use super::error::{Error, Object};
use super::event::Event;
use super::fields;
use super::schema::{self, AnyRecord, ContainerRecord, Table, time, timestamp};
use super::{Effects, Metadata, Scope};

/// The runtime that a container is run with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Runtime {
    /// Such as `io.containerd.runc.v2`.
    pub name: String,
    /// Passed on as it is.
    pub options: Option<Any>,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Its id, an identifier.
    pub id: String,
    /// Its labels.
    pub labels: Labels,
    /// The name of the image it was made from; not checked.
    pub image: String,
    /// Its runtime; the name never changes.
    pub runtime: Runtime,
    /// The OCI runtime spec, passed on as it is.
    pub spec: Option<Any>,
    /// The snapshotter of its root filesystem; never changes.
    pub snapshotter: String,
    /// The key of its root filesystem, which lives as long as this record.
    pub snapshot_key: String,
    /// What clients keep with it.
    pub extensions: BTreeMap<String, Any>,
    /// The sandbox it belongs to, or empty.
    pub sandbox: String,
    /// Set by Create.
    pub created_at: SystemTime,
    /// Set by Create and Update.
    pub updated_at: SystemTime,
}

impl Default for Container {
    fn default() -> Self {
        Container {
            id: String::new(),
            labels: Labels::new(),
            image: String::new(),
            runtime: Runtime::default(),
            spec: None,
            snapshotter: String::new(),
            snapshot_key: String::new(),
            extensions: BTreeMap::new(),
            sandbox: String::new(),
            created_at: SystemTime::UNIX_EPOCH,
            updated_at: SystemTime::UNIX_EPOCH,
        }
    }
}

impl Adaptor for Container {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.first()?.as_str() {
            "id" => text_field(&self.id),
            "image" => text_field(&self.image),
            "runtime" if path.get(1).is_some_and(|part| part == "name") => text_field(&self.runtime.name),
            "labels" => label_field(&self.labels, &path[1..]),
            _ => None,
        }
    }
}

/// The containers of a namespace.
#[derive(Clone)]
pub struct Containers {
    metadata: Metadata,
    scope: Scope,
}

impl Containers {
    pub(super) fn new(metadata: Metadata, scope: Scope) -> Containers {
        Containers { metadata, scope }
    }

    /// A container.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn get(&self, id: &str) -> Result<Container, Error> {
        let namespace = self.scope.namespace();
        let record = schema::load(&self.metadata.view(), &Table::Container.key(namespace, id))?;
        record.map(|record| from_record(id, record)).ok_or_else(|| {
            Error::not_found(Object::ContainerIn { id: id.to_owned(), namespace: namespace.to_owned() })
        })
    }

    /// The containers that match one of the filters (`id`, `image`, `runtime.name`, `labels.*`), by id.
    ///
    /// # Errors
    /// [`Error::Filter`].
    pub fn list(&self, filters: &[String]) -> Result<Vec<Container>, Error> {
        let filter = Filter::parse(filters)?;
        let view = self.metadata.view();
        let mut containers = Vec::new();
        for (key, value) in view.scan(&Table::Container.key(self.scope.namespace(), "")) {
            let (_, id) = Table::Container.split(&key)?;
            let container = from_record(id, schema::decode(&key, &value)?);
            if filter.matches(&container) {
                containers.push(container);
            }
        }
        Ok(containers)
    }

    /// Makes a container; the times of the argument are ignored.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`]; [`Error::Validation`] for what cannot be.
    pub async fn create(&self, mut container: Container) -> Result<Container, Error> {
        validate(&container, "create container")?;
        fields::drop_empty(&mut container.labels);
        container.created_at = SystemTime::now();
        container.updated_at = container.created_at;
        let namespace = self.scope.namespace.clone();
        let change = move |txn: &mut Txn<'_>| {
            let key = Table::Container.key(&namespace, &container.id);
            if txn.get(&key).is_some() {
                return Err(Error::already_exists(Object::Container(container.id)));
            }
            schema::touch_namespace(txn, &namespace);
            schema::store(txn, &key, &to_record(&container));
            let event = Event::ContainerCreate {
                id: container.id.clone(),
                image: container.image.clone(),
                runtime: container.runtime.name.clone(),
                runtime_options: container.runtime.options.clone(),
            };
            Ok((container, Effects::event(event)))
        };
        self.metadata.write(&self.scope, change).await
    }

    /// Takes the fields that `paths` names from `container`: `labels`, `labels.KEY`, `extensions`,
    /// `extensions.KEY`, `spec`, `image`, `snapshotkey`. Without any, these five are all taken, and the
    /// snapshotter and the runtime's name must be those of the container.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Field`], [`Error::Immutable`], and those of [`create`](Containers::create).
    pub async fn update(&self, container: Container, paths: &[String]) -> Result<Container, Error> {
        if container.id.is_empty() {
            return Err(Error::Invalid { rule: "Container.ID required" });
        }
        let (namespace, mut paths) = (self.scope.namespace.clone(), paths.to_vec());
        let change = move |txn: &mut Txn<'_>| {
            let key = Table::Container.key(&namespace, &container.id);
            let Some(record) = schema::load::<ContainerRecord>(txn, &key)? else {
                return Err(Error::not_found(Object::Container(container.id)));
            };
            let mut updated = from_record(&container.id, record);
            if paths.is_empty() {
                if updated.snapshotter != container.snapshotter {
                    return Err(Error::Immutable { field: "container.Snapshotter" });
                }
                if updated.runtime.name != container.runtime.name {
                    return Err(Error::Immutable { field: "container.Runtime.Name" });
                }
                paths = ["labels", "spec", "extensions", "image", "snapshotkey"].map(str::to_owned).to_vec();
            }
            for path in paths {
                apply(&path, &mut updated, &container)?;
            }
            validate(&updated, "update")?;
            fields::drop_empty(&mut updated.labels);
            updated.updated_at = SystemTime::now();
            schema::store(txn, &key, &to_record(&updated));
            let event = Event::ContainerUpdate {
                id: updated.id.clone(),
                image: updated.image.clone(),
                labels: updated.labels.clone(),
                snapshot_key: updated.snapshot_key.clone(),
            };
            Ok((updated, Effects::event(event)))
        };
        self.metadata.write(&self.scope, change).await
    }

    /// Deletes the record. A task that runs is not looked at, and the snapshot is left to the collector.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn delete(&self, id: &str) -> Result<(), Error> {
        let (namespace, id) = (self.scope.namespace.clone(), id.to_owned());
        let change = move |txn: &mut Txn<'_>| {
            let key = Table::Container.key(&namespace, &id);
            if txn.get(&key).is_none() {
                return Err(Error::not_found(Object::AbsentContainer(id)));
            }
            txn.delete(&key);
            Ok(((), Effects::removed().with_event(Event::ContainerDelete { id })))
        };
        self.metadata.write(&self.scope, change).await
    }
}

fn apply(path: &str, updated: &mut Container, wanted: &Container) -> Result<(), Error> {
    if fields::replace("labels", path, &mut updated.labels, &wanted.labels)
        || fields::replace("extensions", path, &mut updated.extensions, &wanted.extensions)
    {
        return Ok(());
    }
    match path {
        "spec" => updated.spec.clone_from(&wanted.spec),
        "image" => updated.image.clone_from(&wanted.image),
        "snapshotkey" => updated.snapshot_key.clone_from(&wanted.snapshot_key),
        _ => return Err(Error::Field { path: path.to_owned(), object: format!("{:?}", updated.id) }),
    }
    Ok(())
}

/// Checks what is to be stored by `operation`.
fn validate(container: &Container, operation: &'static str) -> Result<(), Error> {
    check(container).map_err(|source| Error::Validation { operation, source: Box::new(source) })
}

fn check(container: &Container) -> Result<(), Error> {
    identifier::validate(&container.id)
        .map_err(|source| Error::Identifier { field: "container.ID", source })?;
    if container.extensions.contains_key("") {
        return Err(Error::Invalid { rule: "container.Extension keys must not be zero-length" });
    }
    fields::check_labels("containers.Labels", &container.labels)?;
    if container.runtime.name.is_empty() {
        return Err(Error::Invalid { rule: "container.Runtime.Name must be set" });
    }
    if container.spec.is_none() {
        return Err(Error::Invalid { rule: "container.Spec must be set" });
    }
    if !container.snapshot_key.is_empty() && container.snapshotter.is_empty() {
        return Err(Error::Invalid {
            rule: "container.Snapshotter must be set if container.SnapshotKey is set",
        });
    }
    Ok(())
}

fn from_record(id: &str, record: ContainerRecord) -> Container {
    Container {
        id: id.to_owned(),
        labels: record.labels,
        image: record.image,
        runtime: Runtime { name: record.runtime, options: record.runtime_options.map(Any::from) },
        spec: record.spec.map(Any::from),
        snapshotter: record.snapshotter,
        snapshot_key: record.snapshot_key,
        extensions: record.extensions.into_iter().map(|(name, any)| (name, Any::from(any))).collect(),
        sandbox: record.sandbox,
        created_at: time(record.created),
        updated_at: time(record.updated),
    }
}

fn to_record(container: &Container) -> ContainerRecord {
    let extensions = &container.extensions;
    ContainerRecord {
        labels: container.labels.clone(),
        created: timestamp(container.created_at),
        updated: timestamp(container.updated_at),
        image: container.image.clone(),
        runtime: container.runtime.name.clone(),
        runtime_options: container.runtime.options.clone().map(AnyRecord::from),
        spec: container.spec.clone().map(AnyRecord::from),
        snapshotter: container.snapshotter.clone(),
        snapshot_key: container.snapshot_key.clone(),
        extensions: extensions
            .iter()
            .map(|(name, any)| (name.clone(), AnyRecord::from(any.clone())))
            .collect(),
        sandbox: container.sandbox.clone(),
    }
}
