//! Random sequences of calls, compared with a model that is a map.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use davit_model::{Coded, ErrorCode, Labels, Mount};
use davit_snapshotter::{Kind, Snapshotter};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::ground::Ground;
use super::{Files, Which, database};

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

/// The names of all files that the mounts of a snapshot show; from its folders, where nothing has to be mounted.
fn shown(mounts: &[Mount]) -> BTreeSet<String> {
    let [mount] = mounts else { return names(&Files::shown(mounts)) };
    let lower = mount.options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    let Some(lower) = lower else { return names(&Files::of(mounts)) };
    let upper = mount.options.iter().find_map(|option| option.strip_prefix("upperdir="));
    upper.into_iter().chain(lower.split(':')).flat_map(|layer| names(Path::new(layer))).collect()
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
            assert_eq!(shown(&snapshotter.mounts(key).unwrap()), known.files, "{key}");
        }
    }
}

fn run(which: Which, calls: &[Call], folder: &Path) {
    let root = folder.join("root");
    let mut snapshotter = which.open(&root, database(folder));
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
                    let files = Files::of(&snapshotter.mounts(&key(*index)).unwrap());
                    fs::write(files.join(&name), "x").unwrap();
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
                snapshotter = which.open(&root, database(folder));
            }
        }
        compare(&*snapshotter, &model);
    }
}

/// Runs a number of random sequences of up to so many calls.
fn check(which: Which, cases: u32, calls: usize) {
    let Some(ground) = Ground::new(which) else { return };
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let number = std::cell::Cell::new(0);
    let outcome = TestRunner::new(config).run(&prop::collection::vec(call(), 1..calls), |calls| {
        number.set(number.get() + 1);
        let folder = ground.path().join(number.get().to_string());
        fs::create_dir(&folder).unwrap();
        run(which, &calls, &folder);
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    ground.assert_unused();
}

#[test]
fn overlayfs_is_what_the_model_is() {
    check(Which::Overlayfs, 48, 40);
}

#[test]
fn native_is_what_the_model_is() {
    check(Which::Native, 48, 25);
}

#[test]
fn btrfs_is_what_the_model_is() {
    check(Which::Btrfs, 24, 25);
}

#[test]
fn blockfile_is_what_the_model_is() {
    check(Which::Blockfile, 12, 15);
}

#[test]
fn erofs_is_what_the_model_is() {
    check(Which::Erofs, 24, 25);
}
