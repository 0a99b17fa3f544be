//! What the database holds: every key and every record of the daemon's metadata, in this one file.
//!
//! ```text
//! md/version                                        the version of this schema, decimal
//! md/sequence                                       the last number given to a backend name, u64, big endian
//! md/namespace/NS                                   Namespace    made by Create, or by the first object written
//! md/container/NS/ID                                Container
//! md/sandbox/NS/ID                                  Sandbox
//! md/image/NS/NAME                                  Image
//! md/blob/NS/DIGEST                                 Blob         this namespace's claim to a blob of the store
//! md/ingest/NS/REF                                  Ingest
//! md/snapshot/NS/SNAPSHOTTER/KEY                    Snapshot
//! md/child/NS/SNAPSHOTTER/PARENT/KEY                -            PARENT is escaped; the inverse of Snapshot.parent
//! md/mount/NS/NAME                                  Mount        what is mounted for clients
//! md/lease/NS/ID                                    Lease
//! md/leased/NS/LEASE/content/DIGEST                 -            LEASE is escaped
//! md/leased/NS/LEASE/ingests/REF                    -
//! md/leased/NS/LEASE/images/NAME                    -
//! md/leased/NS/LEASE/snapshots/SNAPSHOTTER/KEY      -
//! ```
//!
//! A namespace is an identifier and a snapshotter's name has no slash, so neither can run into what follows it. A
//! client's text (an image's name, a key, a reference) stands last and is taken to the end; where it must stand in
//! the middle it is escaped. Snapshotters keep their own records under `snapshotter/`, outside of `md/`.
//!
//! Records are protobuf messages, so that a field can be added without a new version: an older daemon must then be
//! able to ignore it. A change that it could not ignore raises [`VERSION`], and the older daemon refuses to start.
//! Version 1 is the first; there is nothing to migrate from.

use std::collections::BTreeMap;
use std::time::SystemTime;

use bytes::Bytes;
use davit_metadata::{Txn, View};
use prost::Message;
use prost_types::Timestamp;

use super::error::Error;

/// The version that this daemon writes, and the newest that it reads.
pub(crate) const VERSION: u32 = 1;

/// What all keys of this schema begin with.
pub(crate) const ROOT: &str = "md/";

pub(crate) const VERSION_KEY: &[u8] = b"md/version";
pub(crate) const SEQUENCE_KEY: &[u8] = b"md/sequence";

/// A typed message, kept byte for byte.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct AnyRecord {
    #[prost(string, tag = "1")]
    pub(crate) type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct NamespaceRecord {
    #[prost(btree_map = "string, string", tag = "1")]
    pub(crate) labels: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ContainerRecord {
    #[prost(btree_map = "string, string", tag = "1")]
    pub(crate) labels: BTreeMap<String, String>,
    #[prost(message, optional, tag = "2")]
    pub(crate) created: Option<Timestamp>,
    #[prost(message, optional, tag = "3")]
    pub(crate) updated: Option<Timestamp>,
    #[prost(string, tag = "4")]
    pub(crate) image: String,
    #[prost(string, tag = "5")]
    pub(crate) runtime: String,
    #[prost(message, optional, tag = "6")]
    pub(crate) runtime_options: Option<AnyRecord>,
    #[prost(message, optional, tag = "7")]
    pub(crate) spec: Option<AnyRecord>,
    #[prost(string, tag = "8")]
    pub(crate) snapshotter: String,
    #[prost(string, tag = "9")]
    pub(crate) snapshot_key: String,
    #[prost(btree_map = "string, message", tag = "10")]
    pub(crate) extensions: BTreeMap<String, AnyRecord>,
    #[prost(string, tag = "11")]
    pub(crate) sandbox: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct SandboxRecord {
    #[prost(btree_map = "string, string", tag = "1")]
    pub(crate) labels: BTreeMap<String, String>,
    #[prost(message, optional, tag = "2")]
    pub(crate) created: Option<Timestamp>,
    #[prost(message, optional, tag = "3")]
    pub(crate) updated: Option<Timestamp>,
    #[prost(string, tag = "4")]
    pub(crate) runtime: String,
    #[prost(message, optional, tag = "5")]
    pub(crate) runtime_options: Option<AnyRecord>,
    #[prost(message, optional, tag = "6")]
    pub(crate) spec: Option<AnyRecord>,
    #[prost(string, tag = "7")]
    pub(crate) sandboxer: String,
    #[prost(btree_map = "string, message", tag = "8")]
    pub(crate) extensions: BTreeMap<String, AnyRecord>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ImageRecord {
    #[prost(btree_map = "string, string", tag = "1")]
    pub(crate) labels: BTreeMap<String, String>,
    #[prost(message, optional, tag = "2")]
    pub(crate) created: Option<Timestamp>,
    #[prost(message, optional, tag = "3")]
    pub(crate) updated: Option<Timestamp>,
    #[prost(string, tag = "4")]
    pub(crate) media_type: String,
    #[prost(string, tag = "5")]
    pub(crate) digest: String,
    #[prost(int64, tag = "6")]
    pub(crate) size: i64,
    #[prost(btree_map = "string, string", tag = "7")]
    pub(crate) annotations: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct BlobRecord {
    #[prost(btree_map = "string, string", tag = "1")]
    pub(crate) labels: BTreeMap<String, String>,
    #[prost(message, optional, tag = "2")]
    pub(crate) created: Option<Timestamp>,
    #[prost(message, optional, tag = "3")]
    pub(crate) updated: Option<Timestamp>,
    #[prost(uint64, tag = "4")]
    pub(crate) size: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct IngestRecord {
    /// The reference that the blob store knows it by.
    #[prost(string, tag = "1")]
    pub(crate) backend: String,
    /// The blob of another namespace that this ingest shares instead of having data; empty if it does not.
    #[prost(string, tag = "2")]
    pub(crate) expected: String,
    /// When it becomes garbage; unset while only leases decide.
    #[prost(message, optional, tag = "3")]
    pub(crate) expires: Option<Timestamp>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct SnapshotRecord {
    #[prost(btree_map = "string, string", tag = "1")]
    pub(crate) labels: BTreeMap<String, String>,
    #[prost(message, optional, tag = "2")]
    pub(crate) created: Option<Timestamp>,
    #[prost(message, optional, tag = "3")]
    pub(crate) updated: Option<Timestamp>,
    /// The key that the snapshotter knows it by.
    #[prost(string, tag = "4")]
    pub(crate) backend: String,
    /// The parent's key in this namespace; empty without one.
    #[prost(string, tag = "5")]
    pub(crate) parent: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct LeaseRecord {
    #[prost(btree_map = "string, string", tag = "1")]
    pub(crate) labels: BTreeMap<String, String>,
    #[prost(message, optional, tag = "2")]
    pub(crate) created: Option<Timestamp>,
}

/// A mount in fstab's terms.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct MountItem {
    #[prost(string, tag = "1")]
    pub(crate) kind: String,
    #[prost(string, tag = "2")]
    pub(crate) source: String,
    #[prost(string, tag = "3")]
    pub(crate) target: String,
    #[prost(string, repeated, tag = "4")]
    pub(crate) options: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ActiveMountRecord {
    #[prost(message, optional, tag = "1")]
    pub(crate) mount: Option<MountItem>,
    #[prost(message, optional, tag = "2")]
    pub(crate) at: Option<Timestamp>,
    #[prost(string, tag = "3")]
    pub(crate) point: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct MountRecord {
    #[prost(btree_map = "string, string", tag = "1")]
    pub(crate) labels: BTreeMap<String, String>,
    #[prost(message, optional, tag = "2")]
    pub(crate) created: Option<Timestamp>,
    #[prost(message, optional, tag = "3")]
    pub(crate) updated: Option<Timestamp>,
    /// The lease that it was activated with; empty without one.
    #[prost(string, tag = "4")]
    pub(crate) lease: String,
    /// The name of its folder.
    #[prost(uint64, tag = "5")]
    pub(crate) number: u64,
    /// Set once everything is mounted.
    #[prost(bool, tag = "6")]
    pub(crate) finished: bool,
    #[prost(message, repeated, tag = "7")]
    pub(crate) active: Vec<ActiveMountRecord>,
    #[prost(message, repeated, tag = "8")]
    pub(crate) system: Vec<MountItem>,
}

/// A kind of record with a key of the form `md/KIND/NS/NAME`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Table {
    Container,
    Sandbox,
    Image,
    Blob,
    Ingest,
    Snapshot,
    Child,
    Lease,
    Leased,
    Mount,
    /// Streams are not recorded: their keys exist only for the collector.
    Stream,
}

impl Table {
    const ALL: [Table; 11] = [
        Table::Container,
        Table::Sandbox,
        Table::Image,
        Table::Blob,
        Table::Ingest,
        Table::Snapshot,
        Table::Child,
        Table::Lease,
        Table::Leased,
        Table::Mount,
        Table::Stream,
    ];

    /// The kind that a key is of, if it is of one of these.
    pub(crate) fn of(key: &[u8]) -> Option<Table> {
        Table::ALL.into_iter().find(|table| key.starts_with(table.prefix().as_bytes()))
    }

    /// What all keys of the kind begin with.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Table::Container => "md/container/",
            Table::Sandbox => "md/sandbox/",
            Table::Image => "md/image/",
            Table::Blob => "md/blob/",
            Table::Ingest => "md/ingest/",
            Table::Snapshot => "md/snapshot/",
            Table::Child => "md/child/",
            Table::Lease => "md/lease/",
            Table::Leased => "md/leased/",
            Table::Mount => "md/mount/",
            Table::Stream => "md/stream/",
        }
    }

    /// What the keys of the kind in one namespace begin with; with a name behind it, the key of one record.
    pub(crate) fn key(self, namespace: &str, name: &str) -> Vec<u8> {
        format!("{}{namespace}/{name}", self.prefix()).into_bytes()
    }

    /// The namespace and the rest of a key of this kind.
    pub(crate) fn split(self, key: &[u8]) -> Result<(&str, &str), Error> {
        std::str::from_utf8(key)
            .ok()
            .and_then(|key| key.strip_prefix(self.prefix()))
            .and_then(|rest| rest.split_once('/'))
            .ok_or_else(|| Error::Key { key: String::from_utf8_lossy(key).into_owned() })
    }
}

/// What the keys of all namespaces begin with.
pub(crate) const NAMESPACE_PREFIX: &str = "md/namespace/";

pub(crate) fn namespace_key(namespace: &str) -> Vec<u8> {
    format!("{NAMESPACE_PREFIX}{namespace}").into_bytes()
}

/// The key of a snapshot's record; with an empty `key`, what all of the snapshotter's in the namespace begin with.
pub(crate) fn snapshot_key(namespace: &str, snapshotter: &str, key: &str) -> Vec<u8> {
    Table::Snapshot.key(namespace, &format!("{snapshotter}/{key}"))
}

/// The key that links a child to its parent; with an empty `child`, what all links of the parent begin with.
pub(crate) fn child_key(namespace: &str, snapshotter: &str, parent: &str, child: &str) -> Vec<u8> {
    Table::Child.key(namespace, &format!("{snapshotter}/{}/{child}", escape(parent)))
}

/// The key that attaches a resource, `TYPE/ID`, to a lease; with an empty one, what all of the lease begin with.
pub(crate) fn leased_key(namespace: &str, lease: &str, resource: &str) -> Vec<u8> {
    Table::Leased.key(namespace, &format!("{}/{resource}", escape(lease)))
}

/// A client's text without slashes, one to one.
pub(crate) fn escape(text: &str) -> String {
    text.replace('%', "%25").replace('/', "%2F")
}

/// Both ways to look at the database.
pub(crate) trait Read {
    fn get(&self, key: &[u8]) -> Option<Bytes>;
    fn scan(&self, prefix: &[u8]) -> impl Iterator<Item = (Bytes, Bytes)>;
}

impl Read for View {
    fn get(&self, key: &[u8]) -> Option<Bytes> {
        View::get(self, key)
    }

    fn scan(&self, prefix: &[u8]) -> impl Iterator<Item = (Bytes, Bytes)> {
        View::scan(self, prefix)
    }
}

impl Read for Txn<'_> {
    fn get(&self, key: &[u8]) -> Option<Bytes> {
        Txn::get(self, key)
    }

    fn scan(&self, prefix: &[u8]) -> impl Iterator<Item = (Bytes, Bytes)> {
        Txn::scan(self, prefix)
    }
}

/// The record of a key, if there is one.
pub(crate) fn load<R: Message + Default>(db: &impl Read, key: &[u8]) -> Result<Option<R>, Error> {
    db.get(key).map(|value| decode(key, &value)).transpose()
}

/// Reads a record.
pub(crate) fn decode<R: Message + Default>(key: &[u8], value: &[u8]) -> Result<R, Error> {
    R::decode(value)
        .map_err(|source| Error::Record { key: String::from_utf8_lossy(key).into_owned(), source })
}

/// Writes a record.
pub(crate) fn store(txn: &mut Txn<'_>, key: &[u8], record: &impl Message) {
    txn.put(key, &record.encode_to_vec());
}

/// Makes the namespace if it is not there: the first object written into it does.
pub(crate) fn touch_namespace(txn: &mut Txn<'_>, namespace: &str) {
    let key = namespace_key(namespace);
    if txn.get(&key).is_none() {
        store(txn, &key, &NamespaceRecord::default());
    }
}

/// A number that no backend name has been made with before, in any namespace.
pub(crate) fn next_sequence(txn: &mut Txn<'_>) -> Result<u64, Error> {
    let last = match txn.get(SEQUENCE_KEY) {
        Some(value) => u64::from_be_bytes(
            value
                .as_ref()
                .try_into()
                .map_err(|_| Error::Key { key: String::from_utf8_lossy(SEQUENCE_KEY).into_owned() })?,
        ),
        None => 0,
    };
    txn.put(SEQUENCE_KEY, &(last + 1).to_be_bytes());
    Ok(last + 1)
}

/// Checks the version of the records, or marks a new database with ours.
pub(crate) fn check_version(db: &davit_metadata::Db) -> Result<(), Error> {
    db.update(|txn| match txn.get(VERSION_KEY) {
        None => {
            txn.put(VERSION_KEY, VERSION.to_string().as_bytes());
            Ok(())
        }
        Some(found) if found == VERSION.to_string().as_bytes() => Ok(()),
        Some(found) => {
            Err(Error::Version { found: String::from_utf8_lossy(&found).into_owned(), supported: VERSION })
        }
    })
}

/// The time of a record; one that was never set, or that no clock can show, is the epoch.
pub(crate) fn time(timestamp: Option<Timestamp>) -> SystemTime {
    timestamp.and_then(|timestamp| SystemTime::try_from(timestamp).ok()).unwrap_or(SystemTime::UNIX_EPOCH)
}

pub(crate) fn timestamp(time: SystemTime) -> Option<Timestamp> {
    Some(Timestamp::from(time))
}

impl From<davit_model::Any> for AnyRecord {
    fn from(any: davit_model::Any) -> AnyRecord {
        AnyRecord { type_url: any.type_url, value: any.value }
    }
}

impl From<AnyRecord> for davit_model::Any {
    fn from(record: AnyRecord) -> davit_model::Any {
        davit_model::Any { type_url: record.type_url, value: record.value }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_do_not_collide(a in "[a%/0-9]{0,6}", b in "[a%/0-9]{0,6}", c in "[a%/0-9]{0,6}", d in "[a%/0-9]{0,6}") {
            prop_assert_eq!(child_key("ns", "o", &a, &b) == child_key("ns", "o", &c, &d), (&a, &b) == (&c, &d));
            prop_assert_eq!(leased_key("ns", &a, &b) == leased_key("ns", &c, &d), (&a, &b) == (&c, &d));
            if a != c {
                prop_assert!(!child_key("ns", "o", &c, &d).starts_with(&child_key("ns", "o", &a, "")));
            }
        }
    }

    #[test]
    fn a_key_splits_into_what_it_was_made_of() {
        let key = snapshot_key("k8s.io", "overlayfs", "a/b");
        assert_eq!(Table::Snapshot.split(&key).unwrap(), ("k8s.io", "overlayfs/a/b"));
        assert!(Table::Image.split(&key).is_err());
    }

    #[test]
    fn a_newer_schema_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let db =
            davit_metadata::Db::open(&folder.path().join("db"), davit_metadata::EngineKind::Redb).unwrap();
        check_version(&db).unwrap();
        check_version(&db).unwrap();
        db.update::<_, Error>(|txn| {
            txn.put(VERSION_KEY, b"2");
            Ok(())
        })
        .unwrap();
        assert!(matches!(check_version(&db), Err(Error::Version { .. })));
    }
}
