//! Marking: which records are needed, directly or by others.
//!
//! Roots: unexpired leases and what they hold; images that do not expire or have not yet; containers; blobs and
//! snapshots labelled `containerd.io/gc.root`; ingests that have not expired; what the labels of sandboxes name.
//!
//! References, from the record that is needed to what it needs:
//!
//! | from | to |
//! |---|---|
//! | image | its target |
//! | container | its snapshot |
//! | snapshot | its parent |
//! | ingest | the blob that it shares |
//! | label `gc.ref.{content,image,mount,stream}[.X or /X]`, `gc.ref.snapshot.SNAPSHOTTER[/X]` | what it names |
//! | what a label `gc.bref.{content,image}[…]`, `gc.bref.snapshot.SNAPSHOTTER[/X]` names | the labelled |
//! | label `gc.cond.snapshot.SNAPSHOTTER[/X]` = `usedat<1h\|KEY`, if it holds | the snapshot KEY |
//!
//! (The labels begin with `containerd.io/`.) A flat lease (`gc.flat`) needs what it holds with parents and targets, but
//! not what their labels name.
//!
//! A node is a record's key. References may name records that do not exist; they are marked to no effect.

use std::collections::{HashMap, HashSet};
use std::ops::Bound;
use std::time::SystemTime;

use bytes::Bytes;
use davit_metadata::View;
use davit_model::Labels;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::metadata::error::Error;
use crate::metadata::leases::Resource;
use crate::metadata::schema::{
    self, BlobRecord, ContainerRecord, ImageRecord, IngestRecord, LeaseRecord, MountRecord, ROOT, Read,
    SandboxRecord, SnapshotRecord, Table, leased_key, snapshot_key,
};

use super::LABEL_EXPIRE;
use super::condition::Conditions;

const LABEL_ROOT: &str = "containerd.io/gc.root";
const LABEL_FLAT: &str = "containerd.io/gc.flat";
const LABEL_REF: &str = "containerd.io/gc.ref.";
const LABEL_BACK_REF: &str = "containerd.io/gc.bref.";

/// The key of a record.
pub(super) type Key = Vec<u8>;

/// What is needed, and how that was found out.
#[derive(Debug)]
pub(super) struct Marked {
    keys: HashSet<Key>,
    seen: HashSet<Node>,
    /// What a record needs that other records say, not itself.
    extra: HashMap<Key, Vec<Node>>,
    next_expiry: Option<SystemTime>,
}

impl Marked {
    /// Whether the record of a key is needed.
    pub(super) fn contains(&self, key: &[u8]) -> bool {
        self.keys.contains(key)
    }

    /// Whether a stream of this lease is kept, by the lease or by a label.
    pub(super) fn keeps_stream(&self, namespace: &str, id: &str, lease: &str) -> bool {
        let keys = [Table::Lease.key(namespace, lease), Table::Stream.key(namespace, id)];
        keys.iter().any(|key| self.contains(key))
    }

    /// When the next root ceases to be one.
    pub(super) fn next_expiry(&self) -> Option<SystemTime> {
        self.next_expiry
    }

    /// Marks what was changed since `old` as well, and all that it leads to.
    ///
    /// A record that was not marked then and has not changed can be needed now only by way of one that has. So
    /// after this all that is needed is marked, and some that was only just touched.
    pub(super) fn add_changed(&mut self, old: &View, new: &impl Read) -> Result<(), Error> {
        let mut before = old.scan(ROOT.as_bytes()).peekable();
        let mut changed = Vec::new();
        for (key, value) in new.scan(ROOT.as_bytes()) {
            while before.next_if(|(old, _)| *old < key).is_some() {}
            // A value that was written again is another one, even if it is equal; comparing bytes would take longer.
            let same = |old: &Bytes| old.as_ptr() == value.as_ptr() && old.len() == value.len();
            if before.next_if(|(old, _)| *old == key).is_some_and(|(_, old)| same(&old)) {
                continue;
            }
            changed.push(key);
        }
        let mut nodes = Vec::new();
        for key in changed {
            match Table::of(&key) {
                Some(Table::Leased) => nodes.push(leased_node(&key)?),
                Some(Table::Lease) => {
                    let (namespace, id) = Table::Lease.split(&key)?;
                    nodes.push(Node::new(Table::Lease, namespace, id));
                    for (key, _) in new.scan(&leased_key(namespace, id, "")) {
                        nodes.push(leased_node(&key)?);
                    }
                    for (key, value) in new.scan(&Table::Mount.key(namespace, "")) {
                        let (_, name) = Table::Mount.split(&key)?;
                        if schema::decode::<MountRecord>(&key, &value)?.lease == id {
                            nodes.push(Node::new(Table::Mount, namespace, name));
                        }
                    }
                }
                Some(Table::Child) | None => {}
                Some(table) => {
                    let (namespace, name) = table.split(&key)?;
                    nodes.push(Node::new(table, namespace, name));
                }
            }
        }
        // What they led to then is not what they lead to now.
        for node in &nodes {
            self.seen.remove(node);
        }
        self.visit(new, nodes)
    }

    /// Marks the nodes and all that they lead to.
    fn visit(&mut self, db: &impl Read, mut nodes: Vec<Node>) -> Result<(), Error> {
        while let Some(node) = nodes.pop() {
            if self.seen.contains(&node) {
                continue;
            }
            if !node.flat {
                nodes.extend(self.extra.get(&node.key).into_iter().flatten().cloned());
            }
            references(db, &node, &mut nodes)?;
            self.keys.insert(node.key.clone());
            self.seen.insert(node);
        }
        Ok(())
    }
}

/// What the key of a resource in a lease stands for.
fn leased_node(key: &[u8]) -> Result<Node, Error> {
    let (namespace, rest) = Table::Leased.split(key)?;
    let resource = rest.split_once('/').and_then(|(_, path)| Resource::from_path(path));
    let Resource { id, kind } = resource.ok_or_else(|| Error::Key { key: rest.to_owned() })?;
    Ok(match kind.split_once('/') {
        Some((_, snapshotter)) => Node::snapshot(namespace, snapshotter, &id),
        None if kind == "content" => Node::content(namespace, &id),
        None if kind == "images" => Node::image(namespace, &id),
        None => Node::new(Table::Ingest, namespace, &id),
    })
}

/// A record to visit. A flat one is not asked for its labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Node {
    table: Table,
    namespace: String,
    pub(super) key: Key,
    flat: bool,
}

impl Node {
    fn new(table: Table, namespace: &str, name: &str) -> Node {
        let key = table.key(namespace, name);
        Node { table, namespace: namespace.to_owned(), key, flat: false }
    }

    fn content(namespace: &str, digest: &str) -> Node {
        Node::new(Table::Blob, namespace, digest)
    }

    fn image(namespace: &str, name: &str) -> Node {
        Node::new(Table::Image, namespace, name)
    }

    pub(super) fn snapshot(namespace: &str, snapshotter: &str, key: &str) -> Node {
        let key = snapshot_key(namespace, snapshotter, key);
        Node { table: Table::Snapshot, namespace: namespace.to_owned(), key, flat: false }
    }

    fn flat(self, flat: bool) -> Node {
        Node { flat, ..self }
    }
}

/// Marks what is needed at `now`.
pub(super) fn mark(db: &View, now: SystemTime) -> Result<Marked, Error> {
    let mut scan = Scan { now, roots: Vec::new(), extra: HashMap::new(), next_expiry: None };
    let mut conditions = Conditions::default();
    scan.leases(db)?;
    scan.images(db, &mut conditions)?;
    scan.ingests(db)?;
    scan.blobs(db, &mut conditions)?;
    scan.containers(db)?;
    scan.snapshots(db, &mut conditions)?;
    scan.sandboxes(db)?;
    scan.mounts(db)?;
    conditions.resolve(now, &mut scan.extra);

    let Scan { roots, extra, next_expiry, .. } = scan;
    let mut marked = Marked { keys: HashSet::new(), seen: HashSet::new(), extra, next_expiry };
    marked.visit(db, roots)?;
    Ok(marked)
}

/// The first pass over all records: the roots, and the references that stand at the wrong end.
struct Scan {
    now: SystemTime,
    roots: Vec<Node>,
    /// What a record needs that other records say, not itself.
    extra: HashMap<Key, Vec<Node>>,
    next_expiry: Option<SystemTime>,
}

impl Scan {
    /// Whether what has these labels has expired; what has no such label, or one that is no time, never does.
    fn expired(&mut self, labels: &Labels, name: &str) -> bool {
        let Some(text) = labels.get(LABEL_EXPIRE) else { return false };
        match OffsetDateTime::parse(text, &Rfc3339) {
            Ok(time) => self.passed(SystemTime::from(time)),
            Err(_) => {
                tracing::info!(name, value = text, "ignoring an expiry that is no time");
                false
            }
        }
    }

    fn passed(&mut self, expiry: SystemTime) -> bool {
        let passed = self.now > expiry;
        if !passed {
            self.next_expiry = Some(self.next_expiry.map_or(expiry, |next| next.min(expiry)));
        }
        passed
    }

    fn leases(&mut self, db: &impl Read) -> Result<(), Error> {
        for (key, value) in db.scan(Table::Lease.prefix().as_bytes()) {
            let (namespace, id) = Table::Lease.split(&key)?;
            let record: LeaseRecord = schema::decode(&key, &value)?;
            if self.expired(&record.labels, id) {
                continue;
            }
            let flat = record.labels.contains_key(LABEL_FLAT);
            self.roots.push(Node::new(Table::Lease, namespace, id));
            for (key, _) in db.scan(&leased_key(namespace, id, "")) {
                let node = leased_node(&key)?;
                // An ingest has no labels that a flat lease could leave aside.
                let flat = flat && node.table != Table::Ingest;
                self.roots.push(node.flat(flat));
            }
        }
        Ok(())
    }

    fn images(&mut self, db: &impl Read, conditions: &mut Conditions) -> Result<(), Error> {
        for (key, value) in db.scan(Table::Image.prefix().as_bytes()) {
            let (namespace, name) = Table::Image.split(&key)?;
            let record: ImageRecord = schema::decode(&key, &value)?;
            let node = Node::image(namespace, name);
            conditions.collect(namespace, &node, &record.labels);
            if self.expired(&record.labels, name) {
                // Others may need it nonetheless.
                self.back_references(namespace, &node, &record.labels);
            } else {
                self.roots.push(node);
            }
        }
        Ok(())
    }

    fn ingests(&mut self, db: &impl Read) -> Result<(), Error> {
        for (key, value) in db.scan(Table::Ingest.prefix().as_bytes()) {
            let (namespace, reference) = Table::Ingest.split(&key)?;
            let record: IngestRecord = schema::decode(&key, &value)?;
            // Without a time it is the leases' alone.
            if record.expires.is_some() && !self.passed(schema::time(record.expires)) {
                self.roots.push(Node::new(Table::Ingest, namespace, reference));
            }
        }
        Ok(())
    }

    fn blobs(&mut self, db: &impl Read, conditions: &mut Conditions) -> Result<(), Error> {
        for (key, value) in db.scan(Table::Blob.prefix().as_bytes()) {
            let (namespace, digest) = Table::Blob.split(&key)?;
            let record: BlobRecord = schema::decode(&key, &value)?;
            let node = Node::content(namespace, digest);
            conditions.collect(namespace, &node, &record.labels);
            self.back_references(namespace, &node, &record.labels);
            self.root_by_label(node, &record.labels);
        }
        Ok(())
    }

    fn containers(&mut self, db: &impl Read) -> Result<(), Error> {
        for (key, _) in db.scan(Table::Container.prefix().as_bytes()) {
            let (namespace, id) = Table::Container.split(&key)?;
            self.roots.push(Node::new(Table::Container, namespace, id));
        }
        Ok(())
    }

    fn snapshots(&mut self, db: &impl Read, conditions: &mut Conditions) -> Result<(), Error> {
        for (key, value) in db.scan(Table::Snapshot.prefix().as_bytes()) {
            let (namespace, name) = Table::Snapshot.split(&key)?;
            let record: SnapshotRecord = schema::decode(&key, &value)?;
            let node = Node::new(Table::Snapshot, namespace, name);
            conditions.used(&node, &record.labels);
            self.back_references(namespace, &node, &record.labels);
            self.root_by_label(node, &record.labels);
        }
        Ok(())
    }

    /// A mount needs a lease, or somebody's label, or one of its own that names somebody.
    fn mounts(&mut self, db: &impl Read) -> Result<(), Error> {
        for (key, value) in db.scan(Table::Mount.prefix().as_bytes()) {
            let (namespace, name) = Table::Mount.split(&key)?;
            let record: MountRecord = schema::decode(&key, &value)?;
            let node = Node::new(Table::Mount, namespace, name);
            self.back_references(namespace, &node, &record.labels);
            let lease = Table::Lease.key(namespace, &record.lease);
            let Some(lease) = schema::load::<LeaseRecord>(db, &lease)? else { continue };
            if !self.expired(&lease.labels, &record.lease) {
                self.roots.push(node);
            }
        }
        Ok(())
    }

    /// A sandbox is never garbage; only what it names counts.
    fn sandboxes(&mut self, db: &impl Read) -> Result<(), Error> {
        for (key, value) in db.scan(Table::Sandbox.prefix().as_bytes()) {
            let (namespace, _) = Table::Sandbox.split(&key)?;
            let record: SandboxRecord = schema::decode(&key, &value)?;
            label_references(namespace, &record.labels, &mut self.roots);
        }
        Ok(())
    }

    fn root_by_label(&mut self, node: Node, labels: &Labels) {
        if with_prefix(labels, LABEL_ROOT).next().is_some() {
            self.roots.push(node);
        }
    }

    /// Has `node` needed by those that its labels name.
    fn back_references(&mut self, namespace: &str, node: &Node, labels: &Labels) {
        for (label, value) in with_prefix(labels, LABEL_BACK_REF) {
            let what = &label[LABEL_BACK_REF.len()..];
            // A container is a root as long as it exists, so that it can need more than it names itself.
            let by = named(namespace, what, value).or_else(|| {
                is_suffixed(what, "container").then(|| Node::new(Table::Container, namespace, value))
            });
            if let Some(by) = by {
                self.extra.entry(by.key).or_default().push(node.clone());
            }
        }
    }
}

/// What a record names itself.
fn references(db: &impl Read, node: &Node, out: &mut Vec<Node>) -> Result<(), Error> {
    let namespace = node.namespace.as_str();
    let labels = match node.table {
        Table::Blob => {
            if node.flat {
                return Ok(());
            }
            let Some(record) = schema::load::<BlobRecord>(db, &node.key)? else { return Ok(()) };
            record.labels
        }
        Table::Snapshot => {
            let Some(record) = schema::load::<SnapshotRecord>(db, &node.key)? else { return Ok(()) };
            if !record.parent.is_empty() {
                let (_, name) = Table::Snapshot.split(&node.key)?;
                let snapshotter = name.split_once('/').map_or(name, |(snapshotter, _)| snapshotter);
                out.push(Node::snapshot(namespace, snapshotter, &record.parent).flat(node.flat));
            }
            record.labels
        }
        Table::Image => {
            let Some(record) = schema::load::<ImageRecord>(db, &node.key)? else { return Ok(()) };
            out.push(Node::content(namespace, &record.digest).flat(node.flat));
            record.labels
        }
        Table::Ingest => {
            let Some(record) = schema::load::<IngestRecord>(db, &node.key)? else { return Ok(()) };
            if !record.expected.is_empty() {
                out.push(Node::content(namespace, &record.expected));
            }
            return Ok(());
        }
        Table::Container => {
            let Some(record) = schema::load::<ContainerRecord>(db, &node.key)? else { return Ok(()) };
            if !record.snapshotter.is_empty() {
                out.push(Node::snapshot(namespace, &record.snapshotter, &record.snapshot_key));
            }
            record.labels
        }
        Table::Sandbox => {
            let Some(record) = schema::load::<SandboxRecord>(db, &node.key)? else { return Ok(()) };
            record.labels
        }
        Table::Lease | Table::Child | Table::Leased | Table::Mount | Table::Stream => return Ok(()),
    };
    if !node.flat {
        label_references(namespace, &labels, out);
    }
    Ok(())
}

/// What labels name.
fn label_references(namespace: &str, labels: &Labels, out: &mut Vec<Node>) {
    for (label, value) in with_prefix(labels, LABEL_REF) {
        out.extend(named(namespace, &label[LABEL_REF.len()..], value));
    }
}

/// The record that a label names, by the label's part behind `gc.ref.` or `gc.bref.`, and its value.
fn named(namespace: &str, what: &str, value: &str) -> Option<Node> {
    if is_suffixed(what, "content") {
        Some(Node::content(namespace, value))
    } else if is_suffixed(what, "image") {
        Some(Node::image(namespace, value))
    } else if is_suffixed(what, "mount") {
        Some(Node::new(Table::Mount, namespace, value))
    } else if is_suffixed(what, "stream") {
        Some(Node::new(Table::Stream, namespace, value))
    } else {
        let snapshotter = what.strip_prefix("snapshot.")?;
        let snapshotter = snapshotter.split_once('/').map_or(snapshotter, |(name, _)| name);
        Some(Node::snapshot(namespace, snapshotter, value))
    }
}

/// Whether a text is `word`, `word.X` or `word/X`: with a suffix a label can be there more than once.
fn is_suffixed(text: &str, word: &str) -> bool {
    text.strip_prefix(word).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '/']))
}

/// The labels whose keys begin with a text.
pub(super) fn with_prefix<'a>(
    labels: &'a Labels,
    prefix: &'a str,
) -> impl Iterator<Item = (&'a str, &'a str)> {
    labels
        .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
        .map(|(label, value)| (label.as_str(), value.as_str()))
        .take_while(move |(label, _)| label.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use davit_metadata::{Db, EngineKind};
    use proptest::collection::vec;
    use proptest::prelude::*;
    use prost::Message;

    #[test]
    fn labels_name_records_with_and_without_a_suffix() {
        let content = Node::content("ns", "d");
        assert_eq!(named("ns", "content", "d"), Some(content.clone()));
        assert_eq!(named("ns", "content.m.0", "d"), Some(content.clone()));
        assert_eq!(named("ns", "content/x", "d"), Some(content));
        assert_eq!(named("ns", "contents", "d"), None);
        assert_eq!(named("ns", "image/x", "i"), Some(Node::image("ns", "i")));
        assert_eq!(named("ns", "snapshot.overlayfs/x", "k"), Some(Node::snapshot("ns", "overlayfs", "k")));
        assert_eq!(named("ns", "snapshot", "k"), None);
    }

    /// A record or a resource of a lease: written or deleted.
    #[derive(Debug, Clone)]
    struct Write {
        what: u8,
        name: u8,
        other: u8,
        label: u8,
        expiry: u8,
        delete: bool,
    }

    fn write() -> impl Strategy<Value = Write> {
        (0..7u8, 0..3u8, 0..3u8, 0..9u8, 0..3u8, any::<bool>()).prop_map(
            |(what, name, other, label, expiry, delete)| Write { what, name, other, label, expiry, delete },
        )
    }

    fn apply(txn: &mut davit_metadata::Txn<'_>, write: &Write) {
        let Write { what, name, other, label, expiry, delete } = write;
        let text = format!("{other}");
        let mut labels = Labels::new();
        let label = match label {
            0 => "gc.root",
            1 => "gc.ref.content",
            2 => "gc.ref.image",
            3 => "gc.ref.snapshot.o",
            4 => "gc.bref.content",
            5 => "gc.bref.image",
            6 => "gc.bref.snapshot.o",
            7 => "gc.flat",
            _ => "none",
        };
        labels.insert(format!("containerd.io/{label}"), text.clone());
        match expiry {
            0 => drop(labels.insert(LABEL_EXPIRE.to_owned(), "2001-01-01T00:00:00Z".to_owned())),
            1 => drop(labels.insert(LABEL_EXPIRE.to_owned(), "2999-01-01T00:00:00Z".to_owned())),
            _ => {}
        }
        let at = |table: Table| table.key("a", &format!("{name}"));
        let (key, value) = match what {
            0 => (at(Table::Blob), BlobRecord { labels, ..BlobRecord::default() }.encode_to_vec()),
            1 => (
                at(Table::Image),
                ImageRecord { labels, digest: text, ..ImageRecord::default() }.encode_to_vec(),
            ),
            2 => {
                let parent = if other < name { text } else { String::new() };
                let record = SnapshotRecord { labels, parent, ..SnapshotRecord::default() };
                (snapshot_key("a", "o", &format!("{name}")), record.encode_to_vec())
            }
            3 => {
                let (snapshotter, snapshot_key) = ("o".to_owned(), text);
                let record =
                    ContainerRecord { labels, snapshotter, snapshot_key, ..ContainerRecord::default() };
                (at(Table::Container), record.encode_to_vec())
            }
            4 => (
                at(Table::Ingest),
                IngestRecord { expected: text, ..IngestRecord::default() }.encode_to_vec(),
            ),
            5 => (at(Table::Lease), LeaseRecord { labels, ..LeaseRecord::default() }.encode_to_vec()),
            _ => {
                let kind = ["content", "images", "snapshots/o", "ingests"][usize::from(*expiry)];
                (leased_key("a", &format!("{name}"), &format!("{kind}/{other}")), Vec::new())
            }
        };
        if *delete { txn.delete(&key) } else { txn.put(&key, &value) }
    }

    /// What is needed after some changes is marked when they are added to the marks from before.
    #[test]
    fn changes_can_be_added() {
        let folder = tempfile::tempdir().unwrap();
        let db = Db::open(&folder.path().join("db"), EngineKind::Redb).unwrap();
        let now = SystemTime::now();
        let apply_all = |clear: bool, writes: &[Write]| {
            let change = |txn: &mut davit_metadata::Txn<'_>| {
                let old: Vec<_> = txn.scan(b"").map(|(key, _)| key).collect();
                old.iter().filter(|_| clear).for_each(|key| txn.delete(key));
                writes.iter().for_each(|write| apply(txn, write));
                Ok::<_, Error>(())
            };
            db.update_ordered(change).unwrap();
            db.view()
        };
        let check = |(before, after): (Vec<Write>, Vec<Write>)| {
            let old = apply_all(true, &before);
            let mut marked = mark(&old, now).unwrap();
            let new = apply_all(false, &after);
            marked.add_changed(&old, &new).unwrap();
            let exact = mark(&new, now).unwrap();
            for (key, _) in new.scan(ROOT.as_bytes()) {
                let text = String::from_utf8_lossy(&key);
                prop_assert!(!exact.contains(&key) || marked.contains(&key), "{}", text);
            }
            if after.is_empty() {
                prop_assert_eq!(&exact.keys, &marked.keys);
            }
            Ok(())
        };
        let config = ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() };
        let mut runner = proptest::test_runner::TestRunner::new(config);
        runner.run(&(vec(write(), 0..40), vec(write(), 0..12)), check).unwrap();
    }
}
