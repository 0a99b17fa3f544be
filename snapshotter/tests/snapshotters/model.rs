//! Random sequences of calls, compared with a model that is a map.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use davit_model::{Coded, ErrorCode, Labels, Mount};
use davit_snapshotter::{Kind, Snapshotter};
use proptest::prelude::*;

use super::{Which, database, may_mount};

#[derive(Debug, Clone)]
enum Call {
    Prepare { key: usize, parent: Option<usize> },
    View { key: usize, parent: Option<usize> },
    Commit { name: usize, key: usize, parent: Option<usize> },
    Remove { key: usize },
    Write { key: usize },
    Cleanup,
    Reopen,
}

const KEYS: usize = 6;

fn key(index: usize) -> String {
    format!("key/{index}")
}

fn call() -> impl Strategy<Value = Call> {
    let one = || 0..KEYS;
    let maybe = || prop::option::weighted(0.7, 0..KEYS);
    prop_oneof![
        4 => (one(), maybe()).prop_map(|(key, parent)| Call::Prepare { key, parent }),
        2 => (one(), maybe()).prop_map(|(key, parent)| Call::View { key, parent }),
        4 => (one(), one(), prop::option::weighted(0.2, 0..KEYS))
            .prop_map(|(name, key, parent)| Call::Commit { name, key, parent }),
        3 => one().prop_map(|key| Call::Remove { key }),
        4 => one().prop_map(|key| Call::Write { key }),
        1 => Just(Call::Cleanup),
        1 => Just(Call::Reopen),
    ]
}

/// What the model knows of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    kind: Kind,
    parent: Option<String>,
    /// The names of the files that it shows.
    files: BTreeSet<String>,
}

struct Model {
    known: BTreeMap<String, Known>,
    rebases: bool,
    written: usize,
}

impl Model {
    fn create(&mut self, kind: Kind, key: &str, parent: Option<&str>) -> Result<(), ErrorCode> {
        let files = match parent.map(|parent| self.known.get(parent)) {
            None => BTreeSet::new(),
            Some(None) => return Err(ErrorCode::NotFound),
            Some(Some(parent)) if parent.kind != Kind::Committed => return Err(ErrorCode::InvalidArgument),
            Some(Some(parent)) => parent.files.clone(),
        };
        if self.known.contains_key(key) {
            return Err(ErrorCode::AlreadyExists);
        }
        self.known.insert(key.to_owned(), Known { kind, parent: parent.map(str::to_owned), files });
        Ok(())
    }

    fn commit(&mut self, name: &str, key: &str, parent: Option<&str>) -> Result<(), ErrorCode> {
        let mut active = self.known.get(key).ok_or(ErrorCode::NotFound)?.clone();
        if self.known.contains_key(name) {
            return Err(ErrorCode::AlreadyExists);
        }
        if active.kind != Kind::Active {
            return Err(ErrorCode::FailedPrecondition);
        }
        match (&active.parent, parent) {
            (Some(own), Some(parent)) if own != parent => return Err(ErrorCode::InvalidArgument),
            (None, Some(parent)) => {
                let base = self.known.get(parent).ok_or(ErrorCode::NotFound)?;
                if base.kind != Kind::Committed {
                    return Err(ErrorCode::FailedPrecondition);
                }
                if !self.rebases {
                    return Err(ErrorCode::Unimplemented);
                }
                active.files.extend(base.files.iter().cloned());
                active.parent = Some(parent.to_owned());
            }
            _ => {}
        }
        active.kind = Kind::Committed;
        self.known.remove(key);
        self.known.insert(name.to_owned(), active);
        Ok(())
    }

    fn remove(&mut self, key: &str) -> Result<(), ErrorCode> {
        if !self.known.contains_key(key) {
            return Err(ErrorCode::NotFound);
        }
        if self.known.values().any(|known| known.parent.as_deref() == Some(key)) {
            return Err(ErrorCode::FailedPrecondition);
        }
        self.known.remove(key);
        Ok(())
    }
}

/// The folders that the mounts of a snapshot show, the writable one first.
fn layers(mounts: &[Mount]) -> Vec<PathBuf> {
    let [mount] = mounts else { panic!("{mounts:?}") };
    if mount.kind == "bind" {
        return vec![PathBuf::from(&mount.source)];
    }
    let find = |name: &str| mount.options.iter().find_map(|option| option.strip_prefix(name));
    let lower = find("lowerdir=").unwrap().split(':');
    find("upperdir=").into_iter().chain(lower).map(PathBuf::from).collect()
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn compare(snapshotter: &dyn Snapshotter, model: &Model) {
    let listed: BTreeMap<String, (Kind, Option<String>)> =
        snapshotter.list().unwrap().into_iter().map(|info| (info.name, (info.kind, info.parent))).collect();
    let known: BTreeMap<String, (Kind, Option<String>)> =
        model.known.iter().map(|(key, known)| (key.clone(), (known.kind, known.parent.clone()))).collect();
    assert_eq!(listed, known);
    for (key, known) in &model.known {
        if known.kind == Kind::Committed {
            assert_eq!(snapshotter.mounts(key).unwrap_err().code(), ErrorCode::FailedPrecondition);
        } else {
            let shown = layers(&snapshotter.mounts(key).unwrap());
            let files: BTreeSet<String> = shown.iter().flat_map(|layer| names(layer)).collect();
            assert_eq!(files, known.files, "{key}");
        }
    }
}

fn run(which: Which, calls: &[Call]) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    let mut snapshotter = which.open(&root, database(folder.path()));
    let rebases = snapshotter.capabilities().iter().any(|capability| capability == "rebase");
    let mut model = Model { known: BTreeMap::new(), rebases, written: 0 };
    let none = Labels::new();
    for call in calls {
        match call {
            Call::Prepare { key: index, parent } => {
                let (name, parent) = (key(*index), parent.map(key));
                let made = snapshotter.prepare(&name, parent.as_deref(), &none);
                let expected = model.create(Kind::Active, &name, parent.as_deref());
                assert_eq!(made.map(drop).map_err(|error| error.code()), expected, "{call:?}");
            }
            Call::View { key: index, parent } => {
                let (name, parent) = (key(*index), parent.map(key));
                let made = snapshotter.view(&name, parent.as_deref(), &none);
                let expected = model.create(Kind::View, &name, parent.as_deref());
                assert_eq!(made.map(drop).map_err(|error| error.code()), expected, "{call:?}");
            }
            Call::Commit { name, key: index, parent } => {
                let (name, active, parent) = (key(*name), key(*index), parent.map(key));
                let made = snapshotter.commit(&name, &active, &none, parent.as_deref());
                let expected = model.commit(&name, &active, parent.as_deref());
                assert_eq!(made.map_err(|error| error.code()), expected, "{call:?}");
            }
            Call::Remove { key: index } => {
                let made = snapshotter.remove(&key(*index));
                assert_eq!(made.map_err(|error| error.code()), model.remove(&key(*index)), "{call:?}");
            }
            Call::Write { key: index } => {
                if let Some(known) = model.known.get_mut(&key(*index))
                    && known.kind == Kind::Active
                {
                    let name = format!("file-{}", model.written);
                    model.written += 1;
                    let upper = layers(&snapshotter.mounts(&key(*index)).unwrap()).remove(0);
                    fs::write(upper.join(&name), "x").unwrap();
                    known.files.insert(name);
                }
            }
            Call::Cleanup => {
                snapshotter.cleanup().unwrap();
                let owners =
                    model.known.values().filter(|known| known.kind != Kind::View || known.parent.is_none());
                assert_eq!(names(&root.join("snapshots")).len(), owners.count());
            }
            Call::Reopen => {
                drop(snapshotter);
                snapshotter = which.open(&root, database(folder.path()));
            }
        }
        compare(&*snapshotter, &model);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn overlayfs_is_what_the_model_is(calls in prop::collection::vec(call(), 1..40)) {
        if may_mount() {
            run(Which::Overlayfs, &calls);
        }
    }

    #[test]
    fn native_is_what_the_model_is(calls in prop::collection::vec(call(), 1..25)) {
        if may_mount() {
            run(Which::Native, &calls);
        }
    }
}
