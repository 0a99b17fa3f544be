//! What the snapshotters remember, in the daemon's database, and the rules that hold between snapshots.
//!
//! Below the prefix `snapshotter/<name>/`:
//!
//! | key | value |
//! |---|---|
//! | `version` | the version of this table, in digits |
//! | `sequence` | the last id given out, in digits |
//! | `snapshot/<key>` | a [`Record`] as JSON |
//! | `child/<parent id><child id>` (8 bytes each, big-endian) | the key of the child |
//!
//! **Invariant:** a record's parent exists and is committed, and `parents` are the ids of the whole chain. A
//! committed snapshot never changes its place and cannot be removed while it has children, so a chain once
//! written stays true.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use davit_metadata::{Db, Txn};
use davit_model::{Labels, label};
use serde::{Deserialize, Serialize};

use crate::{Error, Info, Kind, Usage};

/// The version of the table above.
const VERSION: u32 = 1;

/// One snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The name of its folder; never given out twice.
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<String>,
    /// The ids of its ancestors, nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) parents: Vec<u64>,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub(crate) labels: Labels,
    created: Time,
    updated: Time,
    #[serde(default, skip_serializing_if = "is_zero")]
    size: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    inodes: i64,
}

fn is_zero(number: &i64) -> bool {
    *number == 0
}

/// Seconds and nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Time(u64, u32);

impl Time {
    fn now() -> Time {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Time(now.as_secs(), now.subsec_nanos())
    }

    fn into_system(self) -> SystemTime {
        UNIX_EPOCH + Duration::new(self.0, self.1.min(999_999_999))
    }
}

impl Record {
    pub(crate) fn into_info(self, key: &str) -> Info {
        Info {
            kind: self.kind,
            name: key.to_owned(),
            parent: self.parent,
            labels: self.labels,
            created: self.created.into_system(),
            updated: self.updated.into_system(),
        }
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage { size: self.size, inodes: self.inodes }
    }
}

/// A snapshot about to be made: its folder can be filled before its record is written.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    /// The ids of its ancestors, nearest first.
    pub(crate) parents: Vec<u64>,
}

/// The place that a snapshot is committed to.
struct Chain {
    parent: Option<String>,
    parents: Vec<u64>,
}

/// The records of one snapshotter.
pub(crate) struct Records {
    db: Db,
    snapshotter: &'static str,
    prefix: String,
    /// The next id.
    next: AtomicU64,
}

impl Records {
    /// Opens the records of `snapshotter`. Ids begin above `used` and above all that was ever given out.
    pub(crate) fn open(db: Db, snapshotter: &'static str, used: u64) -> Result<Records, Error> {
        let prefix = format!("snapshotter/{snapshotter}/");
        let records = Records { db, snapshotter, prefix, next: AtomicU64::new(0) };
        let version_key = records.key(b"version");
        let view = records.db.view();
        match view.get(&version_key) {
            Some(version) if version[..] == *VERSION.to_string().as_bytes() => {}
            Some(version) => {
                let found = String::from_utf8_lossy(&version).into_owned();
                return Err(Error::Version { snapshotter, found, supported: VERSION });
            }
            None => records.db.update_ordered(|txn| {
                txn.put(&version_key, VERSION.to_string().as_bytes());
                Ok::<(), Error>(())
            })?,
        }
        let sequence = match view.get(&records.key(b"sequence")) {
            Some(value) => records.parse_sequence(&value)?,
            None => 0,
        };
        let highest = records.all()?.into_values().map(|record| record.id).max().unwrap_or(0);
        records.next.store(sequence.max(highest).max(used) + 1, Ordering::Relaxed);
        Ok(records)
    }

    /// Every record, by key, from one consistent state.
    pub(crate) fn all(&self) -> Result<BTreeMap<String, Record>, Error> {
        let prefix = self.key(b"snapshot/");
        let view = self.db.view();
        let mut all = BTreeMap::new();
        for (key, value) in view.scan(&prefix) {
            let name = String::from_utf8_lossy(&key[prefix.len()..]).into_owned();
            let record = self.parse(&name, &value)?;
            all.insert(name, record);
        }
        Ok(all)
    }

    /// One record.
    pub(crate) fn get(&self, key: &str) -> Result<Record, Error> {
        let view = self.db.view();
        self.find(|path| view.get(path), key)?.ok_or_else(|| Error::NotFound { key: key.to_owned() })
    }

    /// Begins to make a snapshot: checks that it can be made as things are, and gives it an id.
    pub(crate) fn draft(&self, kind: Kind, key: &str, parent: Option<&str>) -> Result<Draft, Error> {
        let view = self.db.view();
        let parents = self.check_create(|path| view.get(path), key, parent)?;
        Ok(Draft { id: self.next.fetch_add(1, Ordering::Relaxed), kind, parents })
    }

    /// Checks that a draft can still become a snapshot.
    pub(crate) fn confirm(&self, draft: &Draft, key: &str, parent: Option<&str>) -> Result<(), Error> {
        let view = self.db.view();
        self.check_draft(|path| view.get(path), draft, key, parent)
    }

    /// Writes the record of a snapshot whose folder is there now.
    pub(crate) fn create(
        &self,
        draft: Draft,
        key: &str,
        parent: Option<&str>,
        labels: &Labels,
    ) -> Result<Record, Error> {
        self.db.update_ordered(|txn| {
            self.check_draft(|path| txn.get(path), &draft, key, parent)?;
            let now = Time::now();
            let record = Record {
                id: draft.id,
                kind: draft.kind,
                parent: parent.map(str::to_owned),
                parents: draft.parents,
                labels: without_empty(labels),
                created: now,
                updated: now,
                size: 0,
                inodes: 0,
            };
            let sequence_key = self.key(b"sequence");
            let sequence = txn.get(&sequence_key).map(|value| self.parse_sequence(&value)).transpose()?;
            if sequence.is_none_or(|sequence| sequence < draft.id) {
                txn.put(&sequence_key, draft.id.to_string().as_bytes());
            }
            self.put(txn, key, &record)?;
            Ok(record)
        })
    }

    /// Checks that `key` can be committed as `name` as things are; answers the record of `key`.
    pub(crate) fn check_commit(&self, name: &str, key: &str, parent: Option<&str>) -> Result<Record, Error> {
        let view = self.db.view();
        let (record, _) = self.committable(|path| view.get(path), name, key, parent)?;
        Ok(record)
    }

    /// Makes the active snapshot `key`, which must still be the one with this id, the committed one `name`.
    pub(crate) fn commit(
        &self,
        id: u64,
        name: &str,
        key: &str,
        labels: &Labels,
        parent: Option<&str>,
        usage: Usage,
    ) -> Result<(), Error> {
        self.db.update_ordered(|txn| {
            let (record, chain) = self.committable(|path| txn.get(path), name, key, parent)?;
            if record.id != id {
                return Err(Error::NotFound { key: key.to_owned() });
            }
            let now = Time::now();
            let committed = Record {
                id,
                kind: Kind::Committed,
                parent: chain.parent,
                parents: chain.parents,
                labels: without_empty(labels),
                created: now,
                updated: now,
                size: usage.size,
                inodes: usage.inodes,
            };
            txn.delete(&self.snapshot_key(key));
            self.put(txn, name, &committed)
        })
    }

    /// Forgets a snapshot.
    pub(crate) fn remove(&self, key: &str) -> Result<(), Error> {
        self.db.update_ordered(|txn| {
            let record = self
                .find(|path| txn.get(path), key)?
                .ok_or_else(|| Error::NotFound { key: key.to_owned() })?;
            let child = txn.scan(&self.child_prefix(record.id)).next().map(|(_, child)| child);
            if let Some(child) = child {
                return Err(Error::HasChildren {
                    key: key.to_owned(),
                    child: String::from_utf8_lossy(&child).into_owned(),
                });
            }
            if let Some(parent) = record.parents.first() {
                txn.delete(&self.child_key(*parent, record.id));
            }
            txn.delete(&self.snapshot_key(key));
            Ok(())
        })
    }

    /// Changes labels; see [`crate::Snapshotter::update`].
    pub(crate) fn update(&self, key: &str, labels: &Labels, fields: &[String]) -> Result<Record, Error> {
        self.db.update_ordered(|txn| {
            let mut record = self
                .find(|path| txn.get(path), key)?
                .ok_or_else(|| Error::NotFound { key: key.to_owned() })?;
            if fields.is_empty() {
                record.labels = without_empty(labels);
            }
            for field in fields {
                if let Some(name) = field.strip_prefix("labels.") {
                    let value = labels.get(name).map_or("", String::as_str);
                    label::set(&mut record.labels, name, value);
                } else if field == "labels" {
                    record.labels = without_empty(labels);
                } else {
                    return Err(Error::ImmutableField { key: key.to_owned(), field: field.clone() });
                }
            }
            record.updated = Time::now();
            self.put(txn, key, &record)?;
            Ok(record)
        })
    }

    /// Makes everything that is visible now durable.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        Ok(self.db.sync()?)
    }

    /// The rules for a new snapshot, in the order in which containerd checks them; answers its ancestors.
    fn check_create<B: AsRef<[u8]>>(
        &self,
        get: impl Fn(&[u8]) -> Option<B>,
        key: &str,
        parent: Option<&str>,
    ) -> Result<Vec<u64>, Error> {
        if key.is_empty() {
            return Err(Error::EmptyKey);
        }
        let parents = match parent {
            Some(parent) => {
                self.chain(&get, key, parent, |key, parent| Error::ParentNotCommitted { key, parent })?
            }
            None => Vec::new(),
        };
        match get(&self.snapshot_key(key)) {
            Some(_) => Err(Error::AlreadyExists { key: key.to_owned() }),
            None => Ok(parents),
        }
    }

    fn check_draft<B: AsRef<[u8]>>(
        &self,
        get: impl Fn(&[u8]) -> Option<B>,
        draft: &Draft,
        key: &str,
        parent: Option<&str>,
    ) -> Result<(), Error> {
        if self.check_create(get, key, parent)? == draft.parents {
            return Ok(());
        }
        // The parent was removed while the folder was being filled, and another took its name.
        let parent = parent.unwrap_or_default().to_owned();
        Err(Error::ParentNotFound { key: key.to_owned(), parent })
    }

    /// The rules for a commit, in the order in which containerd checks them; answers the active record, and the
    /// parent and ancestors that the committed one will have.
    fn committable<B: AsRef<[u8]>>(
        &self,
        get: impl Fn(&[u8]) -> Option<B>,
        name: &str,
        key: &str,
        parent: Option<&str>,
    ) -> Result<(Record, Chain), Error> {
        if name.is_empty() {
            return Err(Error::EmptyKey);
        }
        let record = self.find(&get, key)?.ok_or_else(|| Error::NotFound { key: key.to_owned() })?;
        if get(&self.snapshot_key(name)).is_some() {
            return Err(Error::AlreadyExists { key: name.to_owned() });
        }
        if record.kind != Kind::Active {
            return Err(Error::NotActive { key: key.to_owned() });
        }
        let chain = match (&record.parent, parent) {
            (None, Some(parent)) => {
                let not_committed = |key, parent| Error::RebaseParentNotCommitted { key, parent };
                let parents = self.chain(&get, key, parent, not_committed)?;
                Chain { parent: Some(parent.to_owned()), parents }
            }
            (Some(own), Some(parent)) if own != parent => {
                return Err(Error::ParentChange { key: key.to_owned(), parent: parent.to_owned() });
            }
            _ => Chain { parent: record.parent.clone(), parents: record.parents.clone() },
        };
        Ok((record, chain))
    }

    /// The ids of `parent` and all its ancestors.
    fn chain<B: AsRef<[u8]>>(
        &self,
        get: impl Fn(&[u8]) -> Option<B>,
        key: &str,
        parent: &str,
        not_committed: impl FnOnce(String, String) -> Error,
    ) -> Result<Vec<u64>, Error> {
        let names = || (key.to_owned(), parent.to_owned());
        let Some(record) = self.find(get, parent)? else {
            let (key, parent) = names();
            return Err(Error::ParentNotFound { key, parent });
        };
        if record.kind != Kind::Committed {
            let (key, parent) = names();
            return Err(not_committed(key, parent));
        }
        Ok(std::iter::once(record.id).chain(record.parents).collect())
    }

    fn find<B: AsRef<[u8]>>(
        &self,
        get: impl Fn(&[u8]) -> Option<B>,
        key: &str,
    ) -> Result<Option<Record>, Error> {
        get(&self.snapshot_key(key)).map(|value| self.parse(key, value.as_ref())).transpose()
    }

    fn put(&self, txn: &mut Txn<'_>, key: &str, record: &Record) -> Result<(), Error> {
        let value = serde_json::to_vec(record).map_err(|error| self.corrupt(key, &error.to_string()))?;
        txn.put(&self.snapshot_key(key), &value);
        if let Some(parent) = record.parents.first() {
            txn.put(&self.child_key(*parent, record.id), key.as_bytes());
        }
        Ok(())
    }

    fn parse(&self, key: &str, value: &[u8]) -> Result<Record, Error> {
        serde_json::from_slice(value)
            .map_err(|error| self.corrupt(&format!("snapshot/{key}"), &error.to_string()))
    }

    fn parse_sequence(&self, value: &[u8]) -> Result<u64, Error> {
        std::str::from_utf8(value)
            .ok()
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| self.corrupt("sequence", "not a number"))
    }

    fn corrupt(&self, record: &str, reason: &str) -> Error {
        Error::Corrupt { snapshotter: self.snapshotter, record: record.to_owned(), reason: reason.to_owned() }
    }

    fn key(&self, rest: &[u8]) -> Vec<u8> {
        [self.prefix.as_bytes(), rest].concat()
    }

    fn snapshot_key(&self, key: &str) -> Vec<u8> {
        [self.prefix.as_bytes(), b"snapshot/", key.as_bytes()].concat()
    }

    fn child_prefix(&self, parent: u64) -> Vec<u8> {
        [self.prefix.as_bytes(), b"child/", &parent.to_be_bytes()].concat()
    }

    fn child_key(&self, parent: u64, child: u64) -> Vec<u8> {
        [&self.child_prefix(parent)[..], &child.to_be_bytes()].concat()
    }
}

/// The labels to store: an empty value is none.
fn without_empty(labels: &Labels) -> Labels {
    labels
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stored_form_does_not_change() {
        let record = Record {
            id: 7,
            kind: Kind::Committed,
            parent: Some("p".into()),
            parents: vec![3, 1],
            labels: Labels::from([("a".into(), "b".into())]),
            created: Time(1, 2),
            updated: Time(3, 4),
            size: 4096,
            inodes: 1,
        };
        let text = r#"{"id":7,"kind":"committed","parent":"p","parents":[3,1],"labels":{"a":"b"},"created":[1,2],"updated":[3,4],"size":4096,"inodes":1}"#;
        assert_eq!(serde_json::to_string(&record).unwrap(), text);
        assert_eq!(serde_json::from_str::<Record>(text).unwrap(), record);
        let least = r#"{"id":1,"kind":"active","created":[0,0],"updated":[0,0]}"#;
        let record: Record = serde_json::from_str(least).unwrap();
        assert_eq!(serde_json::to_string(&record).unwrap(), least);
    }
}
