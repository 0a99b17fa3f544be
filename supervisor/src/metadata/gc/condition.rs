//! Conditional references: an image or a blob needs a snapshot only while that was used lately, or was not.
//!
//! The label `containerd.io/gc.cond.snapshot.SNAPSHOTTER[/X]` has the form `usedat<1h|KEY`; several conditions are
//! separated by commas, and one is enough. The snapshot says when it was used, in labels that begin with
//! `containerd.io/gc.cond.value-usedat`.

use std::collections::HashMap;
use std::time::SystemTime;

use davit_model::Labels;
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
}
