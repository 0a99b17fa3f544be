//! Namespaces: the walls between the daemon's clients.
//!
//! A namespace needs no Create: the first object written into it makes it. Get of one that does not exist answers
//! it without labels, as containerd does, because clients read its labels before they write anything.

use davit_metadata::Txn;
use davit_model::{Labels, identifier};

use super::error::{Error, Object};
use super::event::Event;
use super::fields;
use super::schema::{self, NAMESPACE_PREFIX, NamespaceRecord, Table, namespace_key};
use super::{Effects, Metadata, Scope};

/// A namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its name, an identifier.
    pub name: String,
    /// Its labels; clients read their defaults from `containerd.io/defaults/{runtime,snapshotter,sandboxer}`.
    pub labels: Labels,
}

/// The namespaces of the daemon.
#[derive(Clone)]
pub struct Namespaces {
    metadata: Metadata,
}

impl Namespaces {
    pub(super) fn new(metadata: Metadata) -> Namespaces {
        Namespaces { metadata }
    }

    /// A namespace; one that does not exist has no labels.
    ///
    /// # Errors
    /// Only for a record that cannot be read.
    pub fn get(&self, name: &str) -> Result<Namespace, Error> {
        let record: Option<NamespaceRecord> = schema::load(&self.metadata.view(), &namespace_key(name))?;
        Ok(Namespace { name: name.to_owned(), labels: record.unwrap_or_default().labels })
    }

    /// All namespaces, by name.
    ///
    /// # Errors
    /// Only for a record that cannot be read.
    pub fn list(&self) -> Result<Vec<Namespace>, Error> {
        let view = self.metadata.view();
        view.scan(NAMESPACE_PREFIX.as_bytes())
            .map(|(key, value)| {
                let record: NamespaceRecord = schema::decode(&key, &value)?;
                let name = String::from_utf8_lossy(&key[NAMESPACE_PREFIX.len()..]).into_owned();
                Ok(Namespace { name, labels: record.labels })
            })
            .collect()
    }

    /// Makes a namespace.
    ///
    /// # Errors
    /// [`Error::Identifier`], [`Error::Label`], [`Error::AlreadyExists`].
    pub async fn create(&self, namespace: Namespace) -> Result<Namespace, Error> {
        let Namespace { name, mut labels } = namespace;
        let scope = Scope::new(&name, None)?;
        fields::check_labels("namespace.Labels", &labels)?;
        fields::drop_empty(&mut labels);
        let change = move |txn: &mut Txn<'_>| {
            let key = namespace_key(&name);
            if txn.get(&key).is_some() {
                return Err(Error::already_exists(Object::Namespace(name)));
            }
            schema::store(txn, &key, &NamespaceRecord { labels: labels.clone() });
            let event = Event::NamespaceCreate { name: name.clone(), labels: labels.clone() };
            Ok((Namespace { name, labels }, Effects::event(event)))
        };
        self.metadata.write(&scope, change).await
    }

    /// Changes labels: those that `paths` names as `labels.KEY`, or all of them when it is empty. This, too, makes a
    /// namespace that does not exist, if there is a label to set or to delete.
    ///
    /// # Errors
    /// [`Error::Field`] for any other path, [`Error::Label`], [`Error::Identifier`].
    pub async fn update(&self, namespace: Namespace, paths: &[String]) -> Result<Namespace, Error> {
        let scope = Scope::new(&namespace.name, None)?;
        for path in paths {
            if !path.starts_with("labels.") {
                return Err(Error::Field {
                    path: path.clone(),
                    object: format!("namespace {:?}", namespace.name),
                });
            }
        }
        let paths = paths.to_vec();
        let change = move |txn: &mut Txn<'_>| {
            let key = namespace_key(&namespace.name);
            let mut record: NamespaceRecord = schema::load(txn, &key)?.unwrap_or_default();
            if paths.is_empty() {
                record.labels.clone_from(&namespace.labels);
            }
            for path in &paths {
                fields::replace("labels", path, &mut record.labels, &namespace.labels);
            }
            fields::check_labels("namespace.Labels", &record.labels)?;
            fields::drop_empty(&mut record.labels);
            if txn.get(&key).is_some() || !paths.is_empty() || !namespace.labels.is_empty() {
                schema::store(txn, &key, &record);
            }
            let event = Event::NamespaceUpdate { name: namespace.name.clone(), labels: namespace.labels };
            Ok((Namespace { name: namespace.name, labels: record.labels }, Effects::event(event)))
        };
        self.metadata.write(&scope, change).await
    }

    /// Deletes a namespace that has no images, blobs, containers or snapshots left; what leases, ingests and sandboxes
    /// it has go with it.
    ///
    /// # Errors
    /// [`Error::NamespaceNotEmpty`] says what is left; [`Error::NotFound`].
    pub async fn delete(&self, name: &str) -> Result<(), Error> {
        let name = name.to_owned();
        if identifier::validate(&name).is_err() {
            return Err(Error::not_found(Object::Namespace(name)));
        }
        let scope = Scope::new(&name, None)?;
        let change = move |txn: &mut Txn<'_>| {
            let left = left_in(txn, &name)?;
            if !left.is_empty() {
                return Err(Error::NamespaceNotEmpty { namespace: name, left: left.join(", ") });
            }
            let key = namespace_key(&name);
            if txn.get(&key).is_none() {
                return Err(Error::not_found(Object::Namespace(name)));
            }
            txn.delete(&key);
            let with_it =
                [Table::Sandbox, Table::Ingest, Table::Mount, Table::Lease, Table::Leased, Table::Child];
            for table in with_it {
                let keys: Vec<_> = txn.scan(&table.key(&name, "")).map(|(key, _)| key).collect();
                keys.iter().for_each(|key| txn.delete(key));
            }
            Ok((
                (),
                Effects::removed().with_content().with_mounts().with_event(Event::NamespaceDelete { name }),
            ))
        };
        self.metadata.write(&scope, change).await
    }
}

/// The kinds of objects that keep a namespace from being deleted.
fn left_in(txn: &Txn<'_>, namespace: &str) -> Result<Vec<String>, Error> {
    let mut left = Vec::new();
    let kinds = [(Table::Image, "images"), (Table::Blob, "blobs"), (Table::Container, "containers")];
    for (table, words) in kinds {
        if txn.scan(&table.key(namespace, "")).next().is_some() {
            left.push(words.to_owned());
        }
    }
    let mut last = String::new();
    for (key, _) in txn.scan(&Table::Snapshot.key(namespace, "")) {
        let (_, rest) = Table::Snapshot.split(&key)?;
        let snapshotter = rest.split_once('/').map_or(rest, |(name, _)| name);
        if snapshotter != last {
            snapshotter.clone_into(&mut last);
            left.push(format!("snapshots on {snapshotter:?} snapshotter"));
        }
    }
    Ok(left)
}
