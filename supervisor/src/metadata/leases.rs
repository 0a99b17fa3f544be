//! Leases: what a client is working with and the collector must leave alone.
//!
//! A call with a lease in its header attaches what it makes to that lease, in the transaction that records it. A
//! lease does not own: deleting it, or its expiry (`containerd.io/gc.expire`), only stops the protection.

use std::borrow::Cow;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::SystemTime;

use davit_metadata::Txn;
use davit_model::filter::{Adaptor, Filter, label_field, text_field};
use davit_model::{Digest, Labels};

use super::error::{Error, Object};
use super::schema::{self, LeaseRecord, Table, leased_key, time, timestamp};
use super::{Effects, Metadata, Scope, fields};

/// A lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Its id, any text that is not empty.
    pub id: String,
    /// Its labels; `containerd.io/gc.expire` and `containerd.io/gc.flat` have a meaning.
    pub labels: Labels,
    /// Set by Create.
    pub created_at: SystemTime,
}

impl Adaptor for Lease {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.first()?.as_str() {
            "id" => text_field(&self.id),
            "labels" => label_field(&self.labels, &path[1..]),
            _ => None,
        }
    }
}

/// What a lease holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// The digest, reference, name or key.
    pub id: String,
    /// `content`, `ingests`, `images` or `snapshots/SNAPSHOTTER`.
    pub kind: String,
}

impl Resource {
    /// The checked form that stands in the keys of the schema, `TYPE/ID`.
    fn path(&self) -> Result<String, Error> {
        let kind = &self.kind;
        let malformed = || Error::ResourceType { kind: kind.clone() };
        let snapshot_malformed = || Error::SnapshotResourceType { kind: kind.clone() };
        let path = match kind.split_once('/') {
            None if kind == "content" => {
                let digest: Digest =
                    self.id.parse().map_err(|source| Error::ResourceId { id: self.id.clone(), source })?;
                content(&digest)
            }
            None if kind == "ingests" => ingest(&self.id),
            None if kind == "images" => image(&self.id),
            None if kind == "snapshots" => return Err(snapshot_malformed()),
            Some(("content" | "ingests" | "images", _)) => return Err(malformed()),
            Some(("snapshots", name)) if name.is_empty() || name.contains('/') => {
                return Err(snapshot_malformed());
            }
            Some(("snapshots", name)) => snapshot(name, &self.id),
            None | Some(_) => return Err(Error::ResourceUnsupported { kind: kind.clone() }),
        };
        if self.id.is_empty() {
            return Err(Error::Invalid { rule: "resource id must not be empty" });
        }
        Ok(path)
    }

    /// The inverse of [`path`](Resource::path).
    pub(super) fn from_path(path: &str) -> Option<Resource> {
        let (mut kind, mut id) = path.split_once('/')?;
        if kind == "snapshots" {
            let name_end = kind.len() + 1 + id.find('/')?;
            (kind, id) = (&path[..name_end], &path[name_end + 1..]);
        }
        Some(Resource { id: id.to_owned(), kind: kind.to_owned() })
    }
}

/// The path of a blob as a resource.
pub(super) fn content(digest: &Digest) -> String {
    format!("content/{digest}")
}

/// The path of an ingest as a resource.
pub(super) fn ingest(reference: &str) -> String {
    format!("ingests/{reference}")
}

/// The path of an image as a resource.
pub(super) fn image(name: &str) -> String {
    format!("images/{name}")
}

/// The path of a snapshot as a resource.
pub(super) fn snapshot(snapshotter: &str, key: &str) -> String {
    format!("snapshots/{snapshotter}/{key}")
}

/// Checks that the lease of the call exists, if it has one.
pub(super) fn check(db: &impl schema::Read, scope: &Scope) -> Result<(), Error> {
    match scope.lease() {
        Some(lease) if db.get(&Table::Lease.key(scope.namespace(), lease)).is_none() => {
            Err(Error::not_found(Object::CallersLease))
        }
        Some(_) | None => Ok(()),
    }
}

/// Attaches a resource to the lease of the call; true if it has one.
pub(super) fn attach(txn: &mut Txn<'_>, scope: &Scope, path: &str) -> Result<bool, Error> {
    check(txn, scope)?;
    let Some(lease) = scope.lease() else { return Ok(false) };
    let key = leased_key(scope.namespace(), lease, path);
    if txn.get(&key).is_none() {
        txn.put(&key, b"");
    }
    Ok(true)
}

/// Detaches a resource from the lease of the call, if it has one that holds it. Other leases keep it.
pub(super) fn detach(txn: &mut Txn<'_>, scope: &Scope, path: &str) {
    if let Some(lease) = scope.lease() {
        txn.delete(&leased_key(scope.namespace(), lease, path));
    }
}

/// The leases of a namespace.
#[derive(Clone)]
pub struct Leases {
    metadata: Metadata,
    scope: Scope,
}

impl Leases {
    pub(super) fn new(metadata: Metadata, scope: Scope) -> Leases {
        Leases { metadata, scope }
    }

    /// Makes a lease; without an id it gets one.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`], [`Error::Invalid`].
    pub async fn create(&self, id: Option<&str>, mut labels: Labels) -> Result<Lease, Error> {
        fields::check_keys(&labels)?;
        fields::drop_empty(&mut labels);
        let namespace = self.scope.namespace.clone();
        let id = id.filter(|id| !id.is_empty()).map(str::to_owned);
        let change = move |txn: &mut Txn<'_>| {
            let created_at = SystemTime::now();
            let free = |txn: &Txn<'_>, id: &str| txn.get(&Table::Lease.key(&namespace, id)).is_none();
            let id = match id {
                Some(id) if free(txn, &id) => id,
                Some(id) => return Err(Error::already_exists(Object::Lease(id))),
                None => loop {
                    let id = random_id(created_at);
                    if free(txn, &id) {
                        break id;
                    }
                },
            };
            let record = LeaseRecord { labels: labels.clone(), created: timestamp(created_at) };
            schema::touch_namespace(txn, &namespace);
            schema::store(txn, &Table::Lease.key(&namespace, &id), &record);
            Ok((Lease { id, labels, created_at }, Effects::none()))
        };
        self.metadata.write(&self.scope, change).await
    }

    /// Deletes a lease. With `sync`, returns when all that was kept by it alone is gone, from the backends as well.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::CollectionFailed`] with `sync`.
    pub async fn delete(&self, id: &str, sync: bool) -> Result<(), Error> {
        let (namespace, id) = (self.scope.namespace.clone(), id.to_owned());
        let change = move |txn: &mut Txn<'_>| {
            require(txn, &namespace, &id)?;
            remove(txn, &namespace, &id);
            Ok(((), Effects::removed()))
        };
        self.metadata.write(&self.scope, change).await?;
        if sync { self.metadata.collected().await } else { Ok(()) }
    }

    /// The leases that match one of the filters (`id`, `labels.*`), by id.
    ///
    /// # Errors
    /// [`Error::Filter`].
    pub fn list(&self, filters: &[String]) -> Result<Vec<Lease>, Error> {
        let filter = Filter::parse(filters)?;
        let view = self.metadata.view();
        let mut leases = Vec::new();
        for (key, value) in view.scan(&Table::Lease.key(self.scope.namespace(), "")) {
            let (_, id) = Table::Lease.split(&key)?;
            let record: LeaseRecord = schema::decode(&key, &value)?;
            let lease = Lease { id: id.to_owned(), labels: record.labels, created_at: time(record.created) };
            if filter.matches(&lease) {
                leases.push(lease);
            }
        }
        Ok(leases)
    }

    /// Attaches a resource, which need not exist.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::ResourceUnsupported`], [`Error::ResourceType`],
    /// [`Error::SnapshotResourceType`], [`Error::ResourceId`], [`Error::Invalid`].
    pub async fn add_resource(&self, id: &str, resource: &Resource) -> Result<(), Error> {
        let path = resource.path();
        let (namespace, id) = (self.scope.namespace.clone(), id.to_owned());
        let change = move |txn: &mut Txn<'_>| {
            require(txn, &namespace, &id)?;
            txn.put(&leased_key(&namespace, &id, &path?), b"");
            Ok(((), Effects::none()))
        };
        self.metadata.write(&self.scope, change).await
    }

    /// Detaches a resource; one that was not attached is no error.
    ///
    /// # Errors
    /// As [`add_resource`](Leases::add_resource).
    pub async fn delete_resource(&self, id: &str, resource: &Resource) -> Result<(), Error> {
        let path = resource.path();
        let (namespace, id) = (self.scope.namespace.clone(), id.to_owned());
        let change = move |txn: &mut Txn<'_>| {
            require(txn, &namespace, &id)?;
            txn.delete(&leased_key(&namespace, &id, &path?));
            Ok(((), Effects::removed()))
        };
        self.metadata.write(&self.scope, change).await
    }

    /// What a lease holds: content, images, ingests, then snapshots.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn resources(&self, id: &str) -> Result<Vec<Resource>, Error> {
        let view = self.metadata.view();
        let namespace = self.scope.namespace();
        require(&view, namespace, id)?;
        let prefix = leased_key(namespace, id, "");
        view.scan(&prefix)
            .map(|(key, _)| {
                let path = std::str::from_utf8(&key[prefix.len()..]).ok();
                path.and_then(Resource::from_path)
                    .ok_or_else(|| Error::Key { key: String::from_utf8_lossy(&key).into_owned() })
            })
            .collect()
    }
}

fn require(db: &impl schema::Read, namespace: &str, id: &str) -> Result<(), Error> {
    match db.get(&Table::Lease.key(namespace, id)) {
        Some(_) => Ok(()),
        None => Err(Error::not_found(Object::Lease(id.to_owned()))),
    }
}

/// Deletes the records of a lease.
pub(super) fn remove(txn: &mut Txn<'_>, namespace: &str, id: &str) {
    txn.delete(&Table::Lease.key(namespace, id));
    let attached: Vec<_> = txn.scan(&leased_key(namespace, id, "")).map(|(key, _)| key).collect();
    attached.iter().for_each(|key| txn.delete(key));
}

/// An id in the form of containerd's: the nanoseconds of the clock and four characters of base64 (RFC 4648,
/// section 5). It need not be a secret, only new.
fn random_id(now: SystemTime) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let nanos = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().subsec_nanos();
    let random = RandomState::new().build_hasher().finish();
    let suffix: String =
        (0..4).map(|at| char::from(ALPHABET[(random >> (6 * at)) as usize % ALPHABET.len()])).collect();
    format!("{nanos}-{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn resource(kind: &str, id: &str) -> Resource {
        Resource { id: id.to_owned(), kind: kind.to_owned() }
    }

    #[test]
    fn resources_have_a_path_and_back() {
        let good =
            [("content", DIGEST), ("ingests", "a/b"), ("images", "docker.io/x:1"), ("snapshots/o", "k/1")];
        for (kind, id) in good {
            let resource = resource(kind, id);
            assert_eq!(Resource::from_path(&resource.path().unwrap()).unwrap(), resource);
        }
    }

    #[test]
    fn other_resources_are_refused() {
        assert!(matches!(resource("content", "x").path(), Err(Error::ResourceId { .. })));
        for kind in ["content/x", "images/x", "ingests/x"] {
            assert!(matches!(resource(kind, DIGEST).path(), Err(Error::ResourceType { .. })), "{kind}");
        }
        for kind in ["snapshots", "snapshots/", "snapshots/a/b"] {
            assert!(matches!(resource(kind, "k").path(), Err(Error::SnapshotResourceType { .. })), "{kind}");
        }
        for kind in ["ingests", "images", "snapshots/a"] {
            assert!(matches!(resource(kind, "").path(), Err(Error::Invalid { .. })), "{kind}");
        }
        for kind in ["", "streams", "mounts/x"] {
            assert!(matches!(resource(kind, "x").path(), Err(Error::ResourceUnsupported { .. })), "{kind}");
        }
    }

    #[test]
    fn generated_ids_look_like_containerds() {
        let id = random_id(SystemTime::now());
        let (nanos, suffix) = id.split_once('-').unwrap();
        assert!(nanos.parse::<u32>().is_ok() && suffix.len() == 4, "{id}");
    }
}
