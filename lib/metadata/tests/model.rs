//! The database against a model: whatever is done to it, it holds what an ordered map would.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;

use davit_metadata::{CommitError, Db, EngineKind, View};
use proptest::prelude::*;

/// One thing to do.
#[derive(Debug, Clone)]
enum Step {
    /// A transaction: keys to set (with a value of that many bytes) or to remove, in order.
    Change {
        kind: Kind,
        writes: Vec<(u8, Option<usize>)>,
    },
    /// Take a view, to be looked at at the end.
    Keep,
    Verify,
    Reopen,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Update,
    Ordered,
    Refused,
}

type Model = BTreeMap<Vec<u8>, Vec<u8>>;

/// Few keys, so that they are overwritten; prefixes of each other and with bytes that an engine's own encoding
/// of keys may use, so that they are not confused.
fn key(number: u8) -> Vec<u8> {
    let stem: &[u8] = match number % 5 {
        0 => b"",
        1 => b"a",
        2 => b"a\0",
        3 => b"a\0\0",
        _ => b"a\0\x01\xff",
    };
    [stem, &b"\0\0\0"[..usize::from(number / 5 % 4)]].concat()
}

fn value(seed: usize, size: usize) -> Vec<u8> {
    (0..size).map(|i| (seed.wrapping_mul(31) + i) as u8).collect()
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let size = prop_oneof![
        4 => 0..200usize,
        // About the sizes at which values are split.
        2 => 4080..4100usize,
        1 => 8170..8200usize,
        1 => Just(70_000usize),
    ];
    let writes = prop::collection::vec((0..20u8, prop::option::weighted(0.7, size)), 0..6);
    let kind = prop_oneof![Just(Kind::Update), Just(Kind::Ordered), Just(Kind::Refused)];
    let step = prop_oneof![
        12 => (kind, writes).prop_map(|(kind, writes)| Step::Change { kind, writes }),
        1 => Just(Step::Keep),
        1 => Just(Step::Verify),
        2 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..40)
}

fn check(view: &View, model: &Model) {
    let all: Vec<_> = view.scan(b"").map(|(key, value)| (key.to_vec(), value.to_vec())).collect();
    let wanted: Vec<_> = model.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    assert!(all == wanted, "the view differs from the model");
    for prefix in [&b"a"[..], b"a\0", b"a\0\0\0", b"b"] {
        let found: Vec<_> = view.scan(prefix).map(|(key, _)| key.to_vec()).collect();
        let wanted: Vec<_> = model.keys().filter(|key| key.starts_with(prefix)).cloned().collect();
        assert_eq!(found, wanted);
    }
    for number in 0..20 {
        let key = key(number);
        assert_eq!(view.get(&key).as_deref(), model.get(&key).map(Vec::as_slice));
    }
}

fn run(engine: EngineKind, steps: &[Step]) {
    let folder = tempfile::tempdir().unwrap();
    let mut db = Db::open(folder.path(), engine).unwrap();
    let mut model = Model::new();
    let mut kept = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        match step {
            Step::Change { kind, writes } => {
                let mut changed = model.clone();
                let mut change = |txn: &mut davit_metadata::Txn<'_>| {
                    for (k, size) in writes {
                        match size {
                            Some(size) => {
                                txn.put(&key(*k), &value(number, *size));
                                changed.insert(key(*k), value(number, *size));
                            }
                            None => {
                                txn.delete(&key(*k));
                                changed.remove(&key(*k));
                            }
                        }
                        assert_eq!(txn.get(&key(*k)).as_deref(), changed.get(&key(*k)).map(Vec::as_slice));
                    }
                    assert_eq!(
                        txn.scan(b"a\0").count(),
                        changed.keys().filter(|k| k.starts_with(b"a\0")).count()
                    );
                };
                match kind {
                    Kind::Update => db
                        .update::<_, CommitError>(|txn| {
                            change(txn);
                            Ok(())
                        })
                        .unwrap(),
                    Kind::Ordered => db
                        .update_ordered::<_, CommitError>(|txn| {
                            change(txn);
                            Ok(())
                        })
                        .unwrap(),
                    Kind::Refused => {
                        let refused = CommitError::TooLarge { key_size: number, value_size: 0 };
                        let error = db.update::<(), CommitError>(|txn| {
                            change(txn);
                            Err(refused)
                        });
                        assert!(
                            matches!(error, Err(CommitError::TooLarge { key_size, .. }) if key_size == number)
                        );
                    }
                }
                if !matches!(kind, Kind::Refused) {
                    model = changed;
                }
            }
            Step::Keep => kept.push((db.view(), model.clone())),
            Step::Verify => db.verify().unwrap(),
            Step::Reopen => {
                db.close().unwrap();
                db = Db::open(folder.path(), engine).unwrap();
            }
        }
        check(&db.view(), &model);
    }
    drop(db);
    for (view, model) in kept {
        check(&view, &model);
    }
    check(&Db::open(folder.path(), engine).unwrap().view(), &model);
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn redb_holds_what_a_map_would(steps in steps()) {
        run(EngineKind::Redb, &steps);
    }

    #[test]
    fn sled_holds_what_a_map_would(steps in steps()) {
        run(EngineKind::Sled, &steps);
    }
}
