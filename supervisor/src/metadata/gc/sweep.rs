//! Sweeping: first the records that are not marked, then what the backends have and no record names.
//!
//! What a backend has may be about to get its record: its maker shares a claim on it until then. So the sweep takes
//! what nobody claims for itself, looks once more, waits until what it saw is durable, and only then destroys. While
//! it has the claims, nobody can record what it destroys.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use davit_content_store::Error as StoreError;
use davit_metadata::{Txn, View};
use davit_model::{Coded, Digest, ErrorCode};

use crate::metadata::error::Error;
use crate::metadata::event::Event;
use crate::metadata::schema::{
    self, BlobRecord, IngestRecord, MountRecord, SnapshotRecord, Table, child_key,
};
use crate::metadata::snapshots::backend_claim;
use crate::metadata::{Dirty, Metadata, leases};

use super::Swept;
use super::mark::Marked;

/// How many blobs are claimed at once; a writer that wants one of them back waits until it is destroyed.
const BATCH: usize = 1024;

/// The keys of all records that are not marked and can be collected.
pub(super) fn garbage(view: &View, marked: &Marked) -> Vec<(Table, Bytes)> {
    let tables = [Table::Lease, Table::Mount, Table::Snapshot, Table::Ingest, Table::Blob, Table::Image];
    let unmarked = |table: Table| {
        let keys = view.scan(table.prefix().as_bytes()).map(|(key, _)| key);
        keys.filter(|key| !marked.contains(key)).map(move |key| (table, key))
    };
    tables.into_iter().flat_map(unmarked).collect()
}

/// Deletes the records of these keys, unless they are marked by now.
pub(super) fn records(
    txn: &mut Txn<'_>,
    garbage: &[(Table, Bytes)],
    marked: &Marked,
) -> Result<Swept, Error> {
    let mut swept = Swept::default();
    for (table, key) in garbage {
        if marked.contains(key) {
            swept.spared = true;
            continue;
        }
        // Whatever it was, its owner has removed it meanwhile.
        let Some(value) = txn.get(key) else { continue };
        let (namespace, name) = table.split(key)?;
        swept.removed += 1;
        txn.delete(key);
        match table {
            Table::Lease => leases::remove(txn, namespace, name),
            Table::Snapshot => {
                let record: SnapshotRecord = schema::decode(key, &value)?;
                let (snapshotter, name) = name.split_once('/').unwrap_or((name, ""));
                if !record.parent.is_empty() {
                    txn.delete(&child_key(namespace, snapshotter, &record.parent, name));
                }
                swept.dirty.snapshotters.insert(snapshotter.to_owned());
                let (snapshotter, key) = (snapshotter.to_owned(), name.to_owned());
                swept.events.push((namespace.to_owned(), Event::SnapshotRemove { snapshotter, key }));
            }
            Table::Image => {
                swept.events.push((namespace.to_owned(), Event::ImageDelete { name: name.to_owned() }));
            }
            Table::Ingest | Table::Blob => swept.dirty.content = true,
            Table::Mount => swept.dirty.mounts = true,
            Table::Container | Table::Sandbox | Table::Child | Table::Leased | Table::Stream => {}
        }
    }
    Ok(swept)
}

/// Deletes the blobs and ingests of the store that no record names. What fails is tried again the next time.
pub(super) fn content(metadata: &Metadata) -> Result<(), Error> {
    let inner = &metadata.inner;
    // The store first: what is in it has had its record made before, or is claimed.
    let blobs: Vec<Digest> = inner.store.walk()?.into_iter().map(|info| info.digest).collect();
    let ingests = inner.store.statuses()?;
    let named = Named::read(&inner.db.view())?;
    let mut failed = false;

    let garbage: Vec<_> = blobs.iter().filter(|digest| !named.blobs.contains(digest.as_str())).collect();
    for batch in garbage.chunks(BATCH) {
        let claimed: Vec<_> = batch
            .iter()
            .filter_map(|digest| Some((digest, inner.blob_claims.try_take(digest.as_str())?)))
            .collect();
        failed |= claimed.len() < batch.len();
        let named = Named::read(&inner.db.view())?;
        inner.db.sync()?;
        for (digest, _claim) in claimed {
            if named.blobs.contains(digest.as_str()) {
                continue;
            }
            match inner.store.delete(digest) {
                Ok(()) => tracing::debug!(%digest, "removed content"),
                Err(StoreError::NoBlob { .. }) => {}
                Err(error) if is_silence(&error) => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(%error, %digest, "cannot remove content");
                    failed = true;
                }
            }
        }
    }

    inner.db.sync()?;
    for ingest in ingests {
        // The name in the store is new with each record, so that none can come to name it again.
        if named.ingests.contains(&ingest.reference) {
            continue;
        }
        match inner.store.abort(&ingest.reference) {
            Ok(()) => tracing::debug!(reference = ingest.reference, "removed an ingest"),
            Err(StoreError::NoIngest { .. }) => {}
            Err(error) if is_silence(&error) => return Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, reference = ingest.reference, "cannot remove an ingest");
                failed = true;
            }
        }
    }
    if failed {
        inner.mark_dirty(Dirty { content: true, ..Dirty::default() });
    }
    Ok(())
}

/// Whether a backend in another process does not answer. It gets its time once, and not for each of what it has.
fn is_silence(error: &impl Coded) -> bool {
    matches!(error.code(), ErrorCode::DeadlineExceeded | ErrorCode::Unavailable)
}

/// Takes away the mounts that no record names. What fails is tried again the next time.
pub(super) fn mounts(metadata: &Metadata) -> Result<(), Error> {
    let inner = &metadata.inner;
    // The mounts first: what is there has had its record made before.
    let found = inner.mount_targets.numbers()?;
    let view = inner.db.view();
    let mut named = HashSet::new();
    for (key, value) in view.scan(Table::Mount.prefix().as_bytes()) {
        named.insert(schema::decode::<MountRecord>(&key, &value)?.number);
    }
    inner.db.sync()?;
    for number in found.into_iter().filter(|number| !named.contains(number)) {
        match inner.mount_targets.remove(number) {
            Ok(()) => tracing::debug!(number, "took mounts away"),
            Err(error) => {
                tracing::warn!(error = davit_model::error::chain(&error), "cannot take mounts away");
                inner.mark_dirty(Dirty { mounts: true, ..Dirty::default() });
            }
        }
    }
    Ok(())
}

/// What the records name in the store.
struct Named {
    blobs: HashSet<String>,
    ingests: HashSet<String>,
}

impl Named {
    fn read(view: &View) -> Result<Named, Error> {
        let mut named = Named { blobs: HashSet::new(), ingests: HashSet::new() };
        for (key, value) in view.scan(Table::Blob.prefix().as_bytes()) {
            let (_, digest) = Table::Blob.split(&key)?;
            // A record that cannot be read must not cost its blob, nor any other.
            schema::decode::<BlobRecord>(&key, &value)?;
            named.blobs.insert(digest.to_owned());
        }
        for (key, value) in view.scan(Table::Ingest.prefix().as_bytes()) {
            let record: IngestRecord = schema::decode(&key, &value)?;
            // It may be shared from a namespace that has given it up since.
            named.blobs.insert(record.expected);
            named.ingests.insert(record.backend);
        }
        Ok(named)
    }
}

/// Removes the snapshots of a snapshotter that no record names, leaves first, and has it clean up.
pub(super) fn snapshots(metadata: &Metadata, name: &str) -> Result<(), Error> {
    let inner = &metadata.inner;
    // Records of a snapshotter that is not loaded now have nothing behind them that could be removed.
    let Some(backend) = inner.snapshotters.get(name) else { return Ok(()) };
    let all = backend.list()?;
    let named = named_snapshots(&inner.db.view(), name)?;
    let parents: HashMap<&str, &str> =
        all.iter().filter_map(|info| Some((info.name.as_str(), info.parent.as_deref()?))).collect();
    let depth = |name: &str| std::iter::successors(parents.get(name), |parent| parents.get(**parent)).count();

    let mut garbage: Vec<_> = all.iter().filter(|info| !named.contains(&info.name)).collect();
    garbage.sort_by_cached_key(|info| std::cmp::Reverse(depth(&info.name)));
    let claimed: Vec<_> = garbage
        .iter()
        .filter_map(|info| Some((info, inner.backend_claims.try_take(&backend_claim(name, &info.name))?)))
        .collect();
    let mut failed = claimed.len() < garbage.len();
    let named = named_snapshots(&inner.db.view(), name)?;
    inner.db.sync()?;
    for (info, _claim) in claimed {
        if named.contains(&info.name) {
            continue;
        }
        match backend.remove(&info.name) {
            Ok(()) => tracing::debug!(snapshotter = name, snapshot.key = info.name, "removed a snapshot"),
            Err(error) if error.code() == ErrorCode::NotFound => {}
            Err(error) if is_silence(&error) => return Err(error.into()),
            // One failure must not keep all others from being removed.
            Err(error) => {
                tracing::warn!(%error, snapshotter = name, snapshot.key = info.name, "cannot remove a snapshot");
                failed = true;
            }
        }
    }
    if failed {
        inner.mark_dirty(Dirty { snapshotters: [name.to_owned()].into(), ..Dirty::default() });
    }
    Ok(backend.cleanup()?)
}

/// What the records name in a snapshotter.
fn named_snapshots(view: &View, snapshotter: &str) -> Result<HashSet<String>, Error> {
    let mut named = HashSet::new();
    for (key, value) in view.scan(Table::Snapshot.prefix().as_bytes()) {
        let (_, name) = Table::Snapshot.split(&key)?;
        if name.split_once('/').is_some_and(|(name, _)| name == snapshotter) {
            named.insert(schema::decode::<SnapshotRecord>(&key, &value)?.backend);
        }
    }
    Ok(named)
}
