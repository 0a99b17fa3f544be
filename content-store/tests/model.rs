//! The store against a model: whatever is done to it, it holds what maps of byte strings would.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use davit_content_store::{Error, Hasher, Store, Writer};
use davit_model::{Algorithm, Digest};
use proptest::prelude::*;

/// One thing to do with one of a few references.
#[derive(Debug, Clone)]
enum Step {
    Open {
        reference: usize,
        total: u64,
    },
    Write {
        reference: usize,
        byte: u8,
        size: usize,
    },
    Truncate {
        reference: usize,
    },
    Close {
        reference: usize,
    },
    Commit {
        reference: usize,
        announce: Announce,
    },
    Abort {
        reference: usize,
    },
    /// Deletes the n-th of the blobs that there are.
    Delete {
        number: usize,
    },
    Reopen,
}

#[derive(Debug, Clone, Copy)]
enum Announce {
    Nothing,
    Right,
    Sha512,
    WrongSize,
    WrongDigest,
}

const REFERENCES: [&str; 3] = ["one", "two", "../three"];

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let reference = 0..REFERENCES.len();
    // Few values, so that blobs come out equal.
    let write = (reference.clone(), 0..2u8, prop_oneof![0..3usize, Just(70_000usize)]);
    let announce = prop_oneof![
        Just(Announce::Nothing),
        Just(Announce::Right),
        Just(Announce::Sha512),
        Just(Announce::WrongSize),
        Just(Announce::WrongDigest),
    ];
    let step = prop_oneof![
        6 => (reference.clone(), 0..3u64).prop_map(|(reference, total)| Step::Open { reference, total }),
        6 => write.prop_map(|(reference, byte, size)| Step::Write { reference, byte, size }),
        1 => reference.clone().prop_map(|reference| Step::Truncate { reference }),
        2 => reference.clone().prop_map(|reference| Step::Close { reference }),
        4 => (reference.clone(), announce).prop_map(|(reference, announce)| Step::Commit { reference, announce }),
        1 => reference.prop_map(|reference| Step::Abort { reference }),
        1 => (0..3usize).prop_map(|number| Step::Delete { number }),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..40)
}

#[derive(Default)]
struct Model {
    blobs: BTreeMap<Digest, Vec<u8>>,
    /// By reference: what is written, and the total.
    ingests: BTreeMap<usize, (Vec<u8>, u64)>,
    /// References whose ingest was aborted under their writer.
    cut_off: BTreeSet<usize>,
    /// References whose writer found something that an earlier one had written.
    resumed: BTreeSet<usize>,
}

fn run(steps: &[Step]) {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(folder.path()).unwrap();
    let mut writers: BTreeMap<usize, Writer> = BTreeMap::new();
    let mut model = Model::default();
    for step in steps {
        match *step {
            Step::Open { reference, total } => open(&store, &mut writers, &mut model, reference, total),
            Step::Write { reference, byte, size } => {
                if let Some(writer) = writers.get_mut(&reference) {
                    writer.write(&vec![byte; size]).unwrap();
                    if let Some((bytes, _)) = model.ingests.get_mut(&reference) {
                        bytes.resize(bytes.len() + size, byte);
                    }
                }
            }
            Step::Truncate { reference } => {
                if let Some(writer) = writers.get_mut(&reference) {
                    writer.truncate(0).unwrap();
                    model.resumed.remove(&reference);
                    assert!(matches!(writer.truncate(1), Err(Error::BadTruncation { size: 1 })));
                    if let Some((bytes, _)) = model.ingests.get_mut(&reference) {
                        bytes.clear();
                    }
                }
            }
            Step::Close { reference } => {
                writers.remove(&reference);
                model.cut_off.remove(&reference);
            }
            Step::Commit { reference, announce } => {
                if let Some(writer) = writers.remove(&reference) {
                    commit(writer, &mut model, reference, announce);
                }
            }
            Step::Abort { reference } => match store.abort(REFERENCES[reference]) {
                Ok(()) => {
                    assert!(model.ingests.remove(&reference).is_some());
                    if writers.contains_key(&reference) {
                        model.cut_off.insert(reference);
                    }
                }
                Err(error) => assert!(matches!(error, Error::NoIngest { .. }), "{error}"),
            },
            Step::Delete { number } => {
                if let Some(digest) = model.blobs.keys().nth(number).cloned() {
                    store.delete(&digest).unwrap();
                    model.blobs.remove(&digest);
                }
            }
            Step::Reopen => {
                writers.clear();
                model.cut_off.clear();
                drop(store);
                store = Store::open(folder.path()).unwrap();
            }
        }
        check(&store, &writers, &model);
    }
}

fn open(
    store: &Store,
    writers: &mut BTreeMap<usize, Writer>,
    model: &mut Model,
    reference: usize,
    total: u64,
) {
    let opened = store.writer(REFERENCES[reference], total, None);
    if writers.contains_key(&reference) {
        assert!(matches!(opened, Err(Error::Locked { .. })));
        return;
    }
    writers.insert(reference, opened.unwrap());
    let ingest = model.ingests.entry(reference).or_insert((Vec::new(), total));
    if total > 0 && ingest.1 > 0 && total != ingest.1 {
        *ingest = (Vec::new(), total);
    }
    ingest.1 = ingest.1.max(total);
    if ingest.0.is_empty() {
        model.resumed.remove(&reference);
    } else {
        model.resumed.insert(reference);
    }
}

fn commit(writer: Writer, model: &mut Model, reference: usize, announce: Announce) {
    let bytes = model.ingests.get(&reference).map(|(bytes, _)| bytes.clone());
    let Some(bytes) = bytes.filter(|_| !model.cut_off.contains(&reference)) else {
        model.cut_off.remove(&reference);
        // Even so, a blob that is there comes first.
        let error = writer.commit(0, None).unwrap_err();
        assert!(matches!(error, Error::NoIngest { .. } | Error::BlobExists { .. }), "{error}");
        return;
    };
    let size = bytes.len() as u64;
    let (sha256, sha512) =
        (Hasher::digest_of(Algorithm::Sha256, &bytes), Hasher::digest_of(Algorithm::Sha512, &bytes));
    let wrong = Hasher::digest_of(Algorithm::Sha256, b"wrong");
    let (result, digest) = match announce {
        Announce::Nothing => (writer.commit(0, None), sha256),
        Announce::Right => (writer.commit(size, Some(&sha256)), sha256),
        Announce::Sha512 => (writer.commit(size, Some(&sha512)), sha512),
        Announce::WrongSize => {
            let error = writer.commit(size + 1, None).unwrap_err();
            assert!(matches!(error, Error::WrongSize { actual, .. } if actual == size), "{error}");
            return;
        }
        Announce::WrongDigest => {
            let error = writer.commit(size, Some(&wrong)).unwrap_err();
            assert!(matches!(error, Error::WrongDigest { ref actual, .. } if *actual == sha256), "{error}");
            if model.resumed.contains(&reference) {
                model.ingests.remove(&reference);
            }
            return;
        }
    };
    model.ingests.remove(&reference);
    match model.blobs.insert(digest.clone(), bytes) {
        Some(_) => assert!(matches!(result, Err(Error::BlobExists { digest: there }) if there == digest)),
        None => assert_eq!(result.unwrap(), digest),
    }
}

fn check(store: &Store, writers: &BTreeMap<usize, Writer>, model: &Model) {
    let mut found = BTreeMap::new();
    for info in store.walk().unwrap() {
        let mut bytes = Vec::new();
        store.reader(&info.digest).unwrap().read_to_end(&mut bytes).unwrap();
        assert_eq!(info.size, bytes.len() as u64);
        found.insert(info.digest, bytes);
    }
    assert!(found == model.blobs, "other blobs than in the model");
    let statuses = store.statuses().unwrap();
    let found: BTreeMap<_, _> =
        statuses.iter().map(|status| (&*status.reference, (status.offset, status.total))).collect();
    let wanted: BTreeMap<_, _> = model
        .ingests
        .iter()
        .map(|(reference, (bytes, total))| (REFERENCES[*reference], (bytes.len() as u64, *total)))
        .collect();
    assert_eq!(found, wanted);
    for (reference, writer) in writers {
        if let Some((bytes, _)) = model.ingests.get(reference).filter(|_| !model.cut_off.contains(reference))
        {
            assert_eq!(writer.digest(), Hasher::digest_of(Algorithm::Sha256, bytes));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_store_holds_what_maps_would(steps in steps()) {
        run(&steps);
    }
}
