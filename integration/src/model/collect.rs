//! Garbage collection in the model: over everything, again and again, until nothing more is found to be needed.

use std::collections::BTreeSet;

use serde_json::Value;

use super::call::Labels;
use super::rule::Rule;
use super::world::{Space, World, labels, text};

/// What can be needed: its kind, with the snapshotter of a snapshot, and its name.
type Node = (String, String);

/// The times that are drawn: long past, and far ahead.
pub(super) const PAST: &str = "2001-02-03T04:05:06Z";
/// See [`PAST`].
pub(super) const FUTURE: &str = "2999-01-01T00:00:00Z";

const EXPIRE: &str = "containerd.io/gc.expire";

fn node(kind: &str, name: &str) -> Node {
    (kind.to_owned(), name.to_owned())
}

/// The records of a namespace that a collection looks at.
fn records(space: &Space) -> Vec<(Node, Value)> {
    let mut all: Vec<(Node, Value)> = Vec::new();
    all.extend(space.containers.iter().map(|(name, record)| (node("containers", name), record.clone())));
    all.extend(space.images.iter().map(|(name, record)| (node("images", name), record.clone())));
    all.extend(space.blobs.iter().map(|(name, record)| (node("content", name), record.clone())));
    all.extend(space.snapshots.iter().map(|((snapshotter, name), record)| {
        (node(&format!("snapshots/{snapshotter}"), name), record.clone())
    }));
    all
}

impl World {
    /// Forgets what nothing needs any more, in all namespaces, and what the store has for nobody.
    pub(super) fn collect(&mut self) {
        let mut spaces = std::mem::take(&mut self.spaces);
        for space in spaces.values_mut() {
            self.collect_in(space);
        }
        self.spaces = spaces;
        let needed = self.blobs();
        self.store.retain(|digest, _| needed.contains(digest));
    }

    /// The blobs that somebody has or is about to have.
    pub fn blobs(&self) -> BTreeSet<String> {
        let spaces = self.spaces.values();
        spaces
            .flat_map(|space| {
                space
                    .blobs
                    .keys()
                    .cloned()
                    .chain(space.ingests.values().filter_map(|ingest| ingest.shares.clone()))
            })
            .collect()
    }

    /// The number of ingests that have data of their own.
    pub fn ingests(&self) -> usize {
        let all = self.spaces.values().flat_map(|space| space.ingests.values());
        all.filter(|ingest| ingest.data.is_some()).count()
    }

    /// The number of a snapshotter's snapshots that have a folder. `views` says whether a view has one of its own, and not
    /// that of its parent.
    pub fn snapshots(&self, snapshotter: &str, views: bool) -> usize {
        let all = self.spaces.values().flat_map(|space| &space.snapshots);
        let of = all.filter(|((name, _), _)| name == snapshotter);
        let borrows = |record: &Value| text(record, "kind") == "view" && !text(record, "parent").is_empty();
        of.filter(|(_, record)| views || !borrows(record)).count()
    }

    fn collect_in(&self, space: &mut Space) {
        let expired = |labels: &Labels| labels.get(EXPIRE).is_some_and(|time| time == PAST);
        if self.holds(Rule::ExpiredLeaseLetsGo) {
            space.leases.retain(|_, (record, _)| !expired(&labels(record)));
        }
        let records = records(space);
        let mut deep = BTreeSet::new();
        let mut flat = BTreeSet::new();
        for (record, held) in space.leases.values() {
            let is_flat = labels(record).contains_key("containerd.io/gc.flat");
            let to =
                if is_flat && self.holds(Rule::FlatLeaseFollowsNoLabels) { &mut flat } else { &mut deep };
            to.extend(held.iter().cloned());
        }
        for ((kind, name), record) in &records {
            let labels = labels(record);
            let root = match kind.as_str() {
                "containers" => true,
                "images" => !(expired(&labels) && self.holds(Rule::ExpiredImageGoes)),
                _ => {
                    let named = |label: &String| label.starts_with("containerd.io/gc.root");
                    labels.keys().any(named) && self.holds(Rule::RootLabelKeeps)
                }
            };
            if root {
                deep.insert(node(kind, name));
            }
        }
        if self.holds(Rule::SandboxLabelsKeep) {
            for record in space.sandboxes.values() {
                deep.extend(self.references(&labels(record)));
            }
        }
        if self.holds(Rule::UnleasedIngestIsKept) {
            let kept = space.ingests.iter().filter(|(_, ingest)| ingest.kept);
            deep.extend(kept.map(|(reference, _)| node("ingests", reference)));
        }
        loop {
            let before = (deep.len(), flat.len());
            for (own, record) in &records {
                let labels = labels(record);
                if deep.contains(own) {
                    deep.extend(self.needs(own, record));
                    deep.extend(self.references(&labels));
                    deep.extend(self.conditional(own, &labels, &records));
                }
                if flat.contains(own) {
                    flat.extend(self.needs(own, record));
                }
                if self.back_references(&labels).iter().any(|by| deep.contains(by)) {
                    deep.insert(own.clone());
                }
            }
            for (reference, ingest) in &space.ingests {
                // A flat lease has nothing of an ingest that it could leave aside.
                let own = node("ingests", reference);
                if (deep.contains(&own) || flat.contains(&own))
                    && let Some(digest) = &ingest.shares
                {
                    deep.insert(node("content", digest));
                }
            }
            if before == (deep.len(), flat.len()) {
                break;
            }
        }
        let needed = |kind: &str, name: &str| {
            let own = node(kind, name);
            deep.contains(&own) || flat.contains(&own)
        };
        space.images.retain(|name, _| needed("images", name));
        space.blobs.retain(|name, _| needed("content", name));
        space.ingests.retain(|name, _| needed("ingests", name));
        for ((snapshotter, name), record) in &space.snapshots {
            let parent = text(record, "parent");
            if !needed(&format!("snapshots/{snapshotter}"), name)
                && !parent.is_empty()
                && !self.holds(Rule::CollectionFreesTheParent)
            {
                space.bereft.insert((snapshotter.clone(), parent, name.clone()));
            }
        }
        space.bereft.retain(|(snapshotter, parent, _)| needed(&format!("snapshots/{snapshotter}"), parent));
        space.snapshots.retain(|(snapshotter, name), _| needed(&format!("snapshots/{snapshotter}"), name));
    }

    /// What a record needs by what it is.
    fn needs(&self, (kind, _): &Node, record: &Value) -> Option<Node> {
        match kind.as_str() {
            "images" if self.holds(Rule::ImageKeepsItsTarget) => {
                Some(node("content", &text(&record["target"], "digest")))
            }
            "containers" if self.holds(Rule::ContainerKeepsItsSnapshot) => {
                let snapshotter = text(record, "snapshotter");
                Some(node(&format!("snapshots/{snapshotter}"), &text(record, "snapshotkey")))
            }
            "content" | "images" | "containers" => None,
            kind if self.holds(Rule::SnapshotKeepsItsParent) => Some(node(kind, &text(record, "parent"))),
            _ => None,
        }
    }

    /// What the labels `containerd.io/gc.ref.*` name.
    fn references(&self, labels: &Labels) -> Vec<Node> {
        let rules = (Rule::RefContent, Rule::RefImage, Rule::RefSnapshot);
        self.named("containerd.io/gc.ref.", labels, rules)
    }

    /// By what the labels `containerd.io/gc.bref.*` have a record needed.
    fn back_references(&self, labels: &Labels) -> Vec<Node> {
        let rules = (Rule::BackRefContent, Rule::BackRefImage, Rule::BackRefSnapshot);
        self.named("containerd.io/gc.bref.", labels, rules)
    }

    fn named(&self, prefix: &str, labels: &Labels, rules: (Rule, Rule, Rule)) -> Vec<Node> {
        let mut nodes = Vec::new();
        for (label, value) in labels {
            let Some(what) = label.strip_prefix(prefix) else { continue };
            let mut kinds = vec![("content", rules.0), ("image", rules.1)];
            if prefix.ends_with("bref.") {
                kinds.push(("container", Rule::BackRefContainer));
            }
            for (word, rule) in kinds {
                let Some(rest) = what.strip_prefix(word) else { continue };
                // The name of a reference, of which there may be many, comes after a dot or a slash.
                let separate = rest.is_empty() || rest.starts_with(['.', '/']);
                if !self.holds(rule)
                    || (!rest.is_empty() && separate && !self.holds(Rule::RefMayHaveASuffix))
                    || (!separate && self.holds(Rule::RefNeedsASeparator))
                {
                    continue;
                }
                let kind = if word == "content" { "content".to_owned() } else { format!("{word}s") };
                nodes.push((kind, value.clone()));
            }
            if let Some(rest) = what.strip_prefix("snapshot.")
                && self.holds(rules.2)
            {
                // All up to a slash is the snapshotter's name, dots included.
                let (snapshotter, suffix) = rest.split_once('/').unwrap_or((rest, ""));
                if suffix.is_empty() || self.holds(Rule::RefMayHaveASuffix) {
                    nodes.push((format!("snapshots/{snapshotter}"), value.clone()));
                }
            }
        }
        nodes
    }

    /// The snapshots that a blob or an image keeps because they were used at a time that its condition names.
    fn conditional(&self, (kind, _): &Node, labels: &Labels, records: &[(Node, Value)]) -> Vec<Node> {
        let mut nodes = Vec::new();
        if !["content", "images"].contains(&kind.as_str()) || !self.holds(Rule::Condition) {
            return nodes;
        }
        for (label, value) in labels {
            let Some(rest) = label.strip_prefix("containerd.io/gc.cond.snapshot") else { continue };
            let rest = rest.trim_start_matches(['.', '/']);
            let snapshotter = rest.split('/').next().unwrap_or_default();
            let Some((conditions, key)) = value.split_once('|') else { continue };
            let own = node(&format!("snapshots/{snapshotter}"), key);
            let Some((_, record)) = records.iter().find(|(node, _)| *node == own) else { continue };
            let used: Vec<String> = self::labels(record)
                .into_iter()
                .filter(|(label, _)| label.starts_with("containerd.io/gc.cond.value-usedat"))
                .map(|(_, value)| value)
                .collect();
            // Of the times that are drawn, one is more than any number of hours ago, and the other is not.
            let holds = |condition: &str| match condition {
                "usedat<1h" => used.iter().any(|time| time == FUTURE),
                "usedat>1h" => used.iter().any(|time| time == PAST),
                _ => false,
            };
            if conditions.split(',').any(holds) {
                nodes.push(own);
            }
        }
        nodes
    }
}
