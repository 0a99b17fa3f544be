//! Marking: which records are needed, directly or by others.
//!
//! Roots: unexpired leases and what they hold; images that do not expire or have not yet; containers; blobs and
//! snapshots labelled `containerd.io/gc.root`; ingests that have not expired.
//!
//! References, from the record that is needed to what it needs:
//!
//! | from | to |
//! |---|---|
//! | image | its target |
//! | container | its snapshot |
//! | snapshot | its parent |
//! | ingest | the blob that it shares |
//! | label `gc.ref.content[.X or /X]`, `gc.ref.image[…]`, `gc.ref.snapshot.SNAPSHOTTER[/X]` | what it names |
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

use davit_model::Labels;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::metadata::error::Error;
use crate::metadata::leases::Resource;
use crate::metadata::schema::{
    self, BlobRecord, ContainerRecord, ImageRecord, IngestRecord, LeaseRecord, Read, SnapshotRecord, Table,
    leased_key, snapshot_key,
};

use super::LABEL_EXPIRE;

const LABEL_ROOT: &str = "containerd.io/gc.root";
const LABEL_FLAT: &str = "containerd.io/gc.flat";
const LABEL_REF: &str = "containerd.io/gc.ref.";
const LABEL_BACK_REF: &str = "containerd.io/gc.bref.";
const LABEL_CONDITION: &str = "containerd.io/gc.cond.snapshot";
const LABEL_USED_AT: &str = "containerd.io/gc.cond.value-usedat";

type Key = Vec<u8>;

/// The keys of all records that are needed.
#[derive(Debug, Default)]
pub(super) struct Marked {
    keys: HashSet<Key>,
    next_expiry: Option<SystemTime>,
}

impl Marked {
    pub(super) fn contains(&self, key: &[u8]) -> bool {
        self.keys.contains(key)
    }

    /// When the next root ceases to be one.
    pub(super) fn next_expiry(&self) -> Option<SystemTime> {
        self.next_expiry
    }
}

/// A record to visit. A flat one is not asked for its labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Node {
    table: Table,
    namespace: String,
    key: Key,
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

    fn snapshot(namespace: &str, snapshotter: &str, key: &str) -> Node {
        let key = snapshot_key(namespace, snapshotter, key);
        Node { table: Table::Snapshot, namespace: namespace.to_owned(), key, flat: false }
    }

    fn flat(self, flat: bool) -> Node {
        Node { flat, ..self }
    }
}

/// Marks what is needed at `now`.
pub(super) fn mark(db: &impl Read, now: SystemTime) -> Result<Marked, Error> {
    let mut scan = Scan { now, roots: Vec::new(), extra: HashMap::new(), next_expiry: None };
    let mut conditions = Conditions::default();
    scan.leases(db)?;
    scan.images(db, &mut conditions)?;
    scan.ingests(db)?;
    scan.blobs(db, &mut conditions)?;
    scan.containers(db)?;
    scan.snapshots(db, &mut conditions)?;
    conditions.resolve(now, &mut scan.extra);

    let Scan { mut roots, extra, next_expiry, .. } = scan;
    let mut seen: HashSet<Node> = HashSet::new();
    let mut marked = Marked { keys: HashSet::new(), next_expiry };
    while let Some(node) = roots.pop() {
        if seen.contains(&node) {
            continue;
        }
        if !node.flat {
            roots.extend(extra.get(&node.key).into_iter().flatten().cloned());
        }
        references(db, &node, &mut roots)?;
        marked.keys.insert(node.key.clone());
        seen.insert(node);
    }
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
            let prefix = leased_key(namespace, id, "");
            for (key, _) in db.scan(&prefix) {
                let path = String::from_utf8_lossy(&key[prefix.len()..]).into_owned();
                let resource = Resource::from_path(&path).ok_or(Error::Key { key: path })?;
                let Resource { id, kind } = resource;
                let node = match kind.split_once('/') {
                    Some((_, snapshotter)) => Node::snapshot(namespace, snapshotter, &id).flat(flat),
                    None if kind == "content" => Node::content(namespace, &id).flat(flat),
                    None if kind == "images" => Node::image(namespace, &id).flat(flat),
                    None => Node::new(Table::Ingest, namespace, &id),
                };
                self.roots.push(node);
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
        Table::Lease | Table::Child | Table::Leased => return Ok(()),
    };
    if !node.flat {
        for (label, value) in with_prefix(&labels, LABEL_REF) {
            out.extend(named(namespace, &label[LABEL_REF.len()..], value));
        }
    }
    Ok(())
}

/// The record that a label names, by the label's part behind `gc.ref.` or `gc.bref.`, and its value.
fn named(namespace: &str, what: &str, value: &str) -> Option<Node> {
    if is_suffixed(what, "content") {
        Some(Node::content(namespace, value))
    } else if is_suffixed(what, "image") {
        Some(Node::image(namespace, value))
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

fn with_prefix<'a>(labels: &'a Labels, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    labels
        .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
        .map(|(label, value)| (label.as_str(), value.as_str()))
        .take_while(move |(label, _)| label.starts_with(prefix))
}

/// References to snapshots that hold only as long as a snapshot was used recently, or not.
#[derive(Default)]
struct Conditions {
    references: Vec<(Key, Node, Condition)>,
    used_at: HashMap<Key, SystemTime>,
}

#[derive(Clone, Copy)]
struct Condition {
    /// True for "used less than so long ago".
    less: bool,
    nanoseconds: f64,
}

impl Conditions {
    /// The conditional references of an image or a blob.
    fn collect(&mut self, namespace: &str, node: &Node, labels: &Labels) {
        for (label, value) in with_prefix(labels, LABEL_CONDITION) {
            let snapshotter = label[LABEL_CONDITION.len()..].trim_start_matches(['.', '/']);
            let snapshotter = snapshotter.split_once('/').map_or(snapshotter, |(name, _)| name);
            let Some((conditions, key)) = value.split_once('|') else { continue };
            for condition in conditions.split(',').filter_map(parse_condition) {
                let snapshot = Node::snapshot(namespace, snapshotter, key);
                self.references.push((node.key.clone(), snapshot, condition));
            }
        }
    }

    /// When a snapshot was used.
    fn used(&mut self, node: &Node, labels: &Labels) {
        for (_, value) in with_prefix(labels, LABEL_USED_AT) {
            if let Ok(time) = OffsetDateTime::parse(value, &Rfc3339) {
                let used_at = self.used_at.entry(node.key.clone()).or_insert(SystemTime::from(time));
                *used_at = SystemTime::from(time).max(*used_at);
            }
        }
    }

    fn resolve(self, now: SystemTime, extra: &mut HashMap<Key, Vec<Node>>) {
        for (by, snapshot, condition) in self.references {
            let Some(used_at) = self.used_at.get(&snapshot.key) else { continue };
            let ago = match now.duration_since(*used_at) {
                Ok(ago) => ago.as_nanos() as f64,
                Err(ahead) => -(ahead.duration().as_nanos() as f64),
            };
            let holds =
                if condition.less { ago < condition.nanoseconds } else { ago > condition.nanoseconds };
            if holds {
                extra.entry(by).or_default().push(snapshot);
            }
        }
    }
}

/// `usedat<DURATION` or `usedat>DURATION`; others have no meaning yet, and do not hold.
fn parse_condition(text: &str) -> Option<Condition> {
    let rest = text.strip_prefix("usedat")?;
    let (less, duration) = match rest.strip_prefix('<') {
        Some(duration) => (true, duration),
        None => (false, rest.strip_prefix('>')?),
    };
    Some(Condition { less, nanoseconds: parse_duration(duration)? })
}

/// A duration in Go's notation, such as `1h30m` or `-1.5h`, in nanoseconds.
fn parse_duration(text: &str) -> Option<f64> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0.0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut sum = 0.0;
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..unit_at].parse().ok()?;
        let unit_end = rest[unit_at..]
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .map_or(rest.len(), |end| unit_at + end);
        let unit = match &rest[unit_at..unit_end] {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return None,
        };
        sum += number * unit;
        rest = &rest[unit_end..];
    }
    Some(sign * sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        let table = [("1h30m", 5400e9), ("1.5h", 5400e9), ("-10ms", -10e6), ("0", 0.0), ("+2s", 2e9)];
        for (text, want) in table {
            assert_eq!(parse_duration(text), Some(want), "{text}");
        }
        for text in ["", "-", "1", "h", "1d", "1..5h", "1 h"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }

    #[test]
    fn conditions_are_parsed_or_have_no_meaning() {
        assert!(parse_condition("usedat<1h").unwrap().less);
        assert!(!parse_condition("usedat>1h").unwrap().less);
        for text in ["usedat=1h", "usedat<=1h", "other<1h", "usedat<", "usedat"] {
            assert!(parse_condition(text).is_none(), "{text}");
        }
    }

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
}
