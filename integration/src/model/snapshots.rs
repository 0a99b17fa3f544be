//! Snapshots in the model.

use serde_json::{Value, json};
use tonic::Code;

use super::call::{Call, Change, NewSnapshot, SnapshotKey};
use super::rule::Rule;
use super::world::{Answer, SNAPSHOTTERS, Scope, Space, text};

/// Names the snapshot that a Prepare is for, in case the snapshotter can bring it.
const TARGET: &str = "containerd.io/snapshot.ref";

impl Scope<'_> {
    /// A call of the Snapshots service. `kept` is set when what was done stays although the answer is an error.
    pub(super) fn of_snapshots(&mut self, call: &Call, kept: &mut bool) -> Answer {
        let snapshotter = match call {
            Call::Prepare(new) | Call::View(new) | Call::Commit { new, .. } => &new.at.snapshotter,
            Call::Mounts(at) | Call::Remove(at) | Call::Stat(at) | Call::Usage(at) => &at.snapshotter,
            Call::UpdateSnapshot { snapshotter, .. }
            | Call::ListSnapshots { snapshotter, .. }
            | Call::Cleanup { snapshotter } => snapshotter,
            _ => return Err(Code::Unimplemented),
        };
        if !SNAPSHOTTERS.contains(&snapshotter.as_str()) {
            return Err(Code::InvalidArgument);
        }
        match call {
            Call::Prepare(new) => self.make(new, "active", kept),
            Call::View(new) => self.make(new, "view", kept),
            Call::Mounts(at) => {
                let record = self.snapshot(at)?;
                if text(&record, "kind") == "committed" {
                    return Err(Code::FailedPrecondition);
                }
                Ok(self.mounts(&record, &at.snapshotter))
            }
            Call::Commit { new, from } => self.commit_snapshot(new, from, kept),
            Call::Remove(at) => {
                let record = self.snapshot(at)?;
                let is_child = |((snapshotter, _), record): (&(String, String), &Value)| {
                    *snapshotter == at.snapshotter && text(record, "parent") == at.key
                };
                if self.space.snapshots.iter().any(is_child) && self.holds(Rule::ParentStays) {
                    return Err(Code::FailedPrecondition);
                }
                if self
                    .space
                    .bereft
                    .iter()
                    .any(|(name, parent, _)| (name, parent) == (&at.snapshotter, &at.key))
                {
                    return Err(Code::FailedPrecondition);
                }
                self.unlink(at, &record);
                self.space.snapshots.remove(&pair(at));
                self.detach(&kind(at), &at.key);
                Ok(Value::Null)
            }
            Call::Stat(at) => self.snapshot(at),
            Call::UpdateSnapshot { snapshotter, change } => self.update_snapshot(snapshotter, change),
            Call::ListSnapshots { filters, .. } => {
                let of = |space: &Space| {
                    let all = space.snapshots.iter().filter(|((name, _), _)| name == snapshotter);
                    all.map(|(_, record)| record.clone()).collect()
                };
                self.list(of, filters)
            }
            Call::Usage(at) => self.snapshot(at).map(|_| Value::Null),
            // The collector does it, and no client may.
            _ => Err(Code::Unimplemented),
        }
    }

    fn snapshot(&self, at: &SnapshotKey) -> Answer {
        self.space.snapshots.get(&pair(at)).cloned().ok_or(Code::NotFound)
    }

    /// What the mounts of an active snapshot or a view look like, without paths.
    fn mounts(&self, record: &Value, snapshotter: &str) -> Value {
        let active = text(record, "kind") == "active";
        let mut lowers = 0;
        let mut parent = text(record, "parent");
        while let Some(record) = self.space.snapshots.get(&(snapshotter.to_owned(), parent.clone())) {
            lowers += 1;
            parent = text(record, "parent");
        }
        let bind = snapshotter == "native" || lowers == 0 || (lowers == 1 && !active);
        if bind {
            return json!([{ "type": "bind", "options": ["rbind", if active { "rw" } else { "ro" }] }]);
        }
        json!([{ "type": "overlay", "lowers": lowers, "upper": active }])
    }

    fn unlink(&mut self, at: &SnapshotKey, record: &Value) {
        self.space.bereft.remove(&(at.snapshotter.clone(), text(record, "parent"), at.key.clone()));
    }

    fn make(&mut self, new: &NewSnapshot, wanted: &str, kept: &mut bool) -> Answer {
        let labels = self.world.checked(&new.labels)?;
        let target = new.labels.get(TARGET).filter(|target| !target.is_empty());
        for existing in target.into_iter().chain([&new.at.key]) {
            let at = SnapshotKey { snapshotter: new.at.snapshotter.clone(), key: existing.clone() };
            if self.space.snapshots.contains_key(&pair(&at)) {
                if self.holds(Rule::TargetIsLeased) {
                    self.attach(&kind(&at), existing)?;
                }
                *kept = true;
                return Err(Code::AlreadyExists);
            }
        }
        if !new.parent.is_empty() {
            let parent = SnapshotKey { snapshotter: new.at.snapshotter.clone(), key: new.parent.clone() };
            let parent = self.snapshot(&parent)?;
            *kept = !self.holds(Rule::RefusedCallsLeaveNoNamespace);
            if text(&parent, "kind") != "committed" && self.holds(Rule::ParentIsCommitted) {
                return Err(Code::InvalidArgument);
            }
        }
        if !self.holds(Rule::RefusedCallsLeaveNoNamespace) {
            (*kept, self.touched) = (true, true);
        }
        self.attach(&kind(&new.at), &new.at.key)?;
        self.touched = true;
        let record = json!({ "name": new.at.key, "kind": wanted, "parent": new.parent, "labels": labels });
        self.space.snapshots.insert(pair(&new.at), record.clone());
        Ok(self.mounts(&record, &new.at.snapshotter))
    }

    fn commit_snapshot(&mut self, new: &NewSnapshot, from: &str, kept: &mut bool) -> Answer {
        let mut labels = self.world.checked(&new.labels)?;
        self.attach(&kind(&new.at), &new.at.key)?;
        if self.space.snapshots.contains_key(&pair(&new.at)) {
            *kept = self.holds(Rule::TargetIsLeased);
            return Err(Code::AlreadyExists);
        }
        let at = SnapshotKey { snapshotter: new.at.snapshotter.clone(), key: from.to_owned() };
        let record = self.snapshot(&at)?;
        let mut parent = text(&record, "parent");
        if parent.is_empty() && !new.parent.is_empty() && self.holds(Rule::CommitMayRebase) {
            let at = SnapshotKey { snapshotter: new.at.snapshotter.clone(), key: new.parent.clone() };
            if text(&self.snapshot(&at)?, "kind") != "committed" {
                return Err(Code::FailedPrecondition);
            }
            parent.clone_from(&new.parent);
        }
        if text(&record, "kind") != "active" && self.holds(Rule::SnapshotOfAViewIsRefused) {
            return Err(Code::FailedPrecondition);
        }
        if !self.holds(Rule::CommitTakesNoLabelsOver) {
            labels.extend(super::world::labels(&record));
        }
        self.unlink(&at, &record);
        self.space.snapshots.remove(&pair(&at));
        self.detach(&kind(&at), from);
        let committed =
            json!({ "name": new.at.key, "kind": "committed", "parent": parent, "labels": labels });
        self.space.snapshots.insert(pair(&new.at), committed);
        Ok(Value::Null)
    }

    fn update_snapshot(&mut self, snapshotter: &str, change: &Change) -> Answer {
        let key = text(&change.record, "name");
        if key.is_empty() {
            return Err(Code::InvalidArgument);
        }
        let at = SnapshotKey { snapshotter: snapshotter.to_owned(), key };
        let mut record = self.snapshot(&at)?;
        let mut change = change.clone();
        if change.mask.is_empty() {
            change.mask = vec!["labels".into()];
        }
        self.apply(&mut record, &change, &["labels"])?;
        self.settle(&mut record)?;
        self.space.snapshots.insert(pair(&at), record.clone());
        Ok(record)
    }
}

fn pair(at: &SnapshotKey) -> (String, String) {
    (at.snapshotter.clone(), at.key.clone())
}

/// The type of a snapshot as a resource of a lease.
fn kind(at: &SnapshotKey) -> String {
    format!("snapshots/{}", at.snapshotter)
}
