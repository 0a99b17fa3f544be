//! Conditional references: an image or a blob needs a snapshot only while that was used lately, or was not.
//!
//! The label `containerd.io/gc.cond.snapshot.SNAPSHOTTER[/X]` has the form `usedat<1h|KEY`; several conditions are
//! separated by commas, and one is enough. The snapshot says when it was used, in labels that begin with
//! `containerd.io/gc.cond.value-usedat`.

use std::collections::HashMap;
use std::time::SystemTime;

use davit_model::{Labels, duration};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::mark::{Key, Node, with_prefix};

const LABEL_CONDITION: &str = "containerd.io/gc.cond.snapshot";
const LABEL_USED_AT: &str = "containerd.io/gc.cond.value-usedat";

/// All conditions, and what they are about.
#[derive(Default)]
pub(super) struct Conditions {
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
    pub(super) fn collect(&mut self, namespace: &str, node: &Node, labels: &Labels) {
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
    pub(super) fn used(&mut self, node: &Node, labels: &Labels) {
        for (_, value) in with_prefix(labels, LABEL_USED_AT) {
            if let Ok(time) = OffsetDateTime::parse(value, &Rfc3339) {
                let used_at = self.used_at.entry(node.key.clone()).or_insert(SystemTime::from(time));
                *used_at = SystemTime::from(time).max(*used_at);
            }
        }
    }

    pub(super) fn resolve(self, now: SystemTime, extra: &mut HashMap<Key, Vec<Node>>) {
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
    let (less, length) = match rest.strip_prefix('<') {
        Some(length) => (true, length),
        None => (false, rest.strip_prefix('>')?),
    };
    Some(Condition { less, nanoseconds: duration::nanoseconds(length)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_parsed_or_have_no_meaning() {
        assert!(parse_condition("usedat<1h").unwrap().less);
        assert!(!parse_condition("usedat>1h").unwrap().less);
        for text in ["usedat=1h", "usedat<=1h", "other<1h", "usedat<", "usedat"] {
            assert!(parse_condition(text).is_none(), "{text}");
        }
    }
}
