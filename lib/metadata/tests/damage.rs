//! What is wrong with the folder is told, with the right code, and never taken for an empty database.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use davit_metadata::{CommitError, Db, EngineKind, OpenError};
use davit_model::{Coded, ErrorCode};

const ENGINES: [EngineKind; 2] = [EngineKind::Redb, EngineKind::Sled];
const FOLDER: &str = "DAVIT_DAMAGE_FOLDER";
const ENGINE: &str = "DAVIT_DAMAGE_ENGINE";

/// Tests of this file run one by one: `sled` holds a lock of its own on its file, and a child of another test would
/// inherit it for the moment between `fork` and `exec`.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn put(db: &Db, number: u32) -> Result<(), CommitError> {
    db.update(|txn| {
        txn.put(&number.to_be_bytes(), &record(number));
        Ok(())
    })
}

fn record(number: u32) -> Vec<u8> {
    number.to_le_bytes().repeat(500 + number as usize % 1000)
}

/// A database of `count` records, closed.
fn filled(folder: &Path, engine: EngineKind, count: u32) -> PathBuf {
    let path = folder.join("metadata");
    let db = Db::open(&path, engine).unwrap();
    for number in 0..count {
        put(&db, number).unwrap();
    }
    db.close().unwrap();
    path
}

/// Fails if there is a record that nobody wrote; returns how many there are.
fn check(db: &Db) -> u32 {
    let mut count = 0;
    for (key, value) in db.view().scan(b"") {
        let number = u32::from_be_bytes(key[..].try_into().unwrap());
        assert!(value == record(number), "record {number} is not what was written");
        count += 1;
    }
    count
}

fn text(error: &OpenError) -> String {
    davit_model::error::chain(error)
}

#[test]
fn a_second_daemon_is_refused() {
    let _alone = alone();
    for engine in ENGINES {
        let folder = tempfile::tempdir().unwrap();
        let db = Db::open(folder.path(), engine).unwrap();
        for other in ENGINES {
            let error = Db::open(folder.path(), other).unwrap_err();
            assert!(matches!(error, OpenError::Locked { .. }), "{}", text(&error));
            assert_eq!(error.code(), ErrorCode::FailedPrecondition);
            assert!(text(&error).contains(folder.path().to_str().unwrap()));
        }
        // A handle that is still there does not hold a closed database.
        let handle = db.clone();
        db.close().unwrap();
        assert!(put(&handle, 1).is_err());
        drop(handle);
        Db::open(folder.path(), engine).unwrap();
    }
}

#[test]
fn the_other_engine_is_refused() {
    let _alone = alone();
    for (engine, other) in [(EngineKind::Redb, EngineKind::Sled), (EngineKind::Sled, EngineKind::Redb)] {
        let folder = tempfile::tempdir().unwrap();
        let path = filled(folder.path(), engine, 1);
        let error = Db::open(&path, other).unwrap_err();
        assert!(matches!(error, OpenError::OtherEngine { .. }), "{}", text(&error));
        assert_eq!(error.code(), ErrorCode::FailedPrecondition);
        assert_eq!(check(&Db::open(&path, engine).unwrap()), 1);
    }
}

#[test]
fn what_is_missing_is_no_empty_database() {
    let _alone = alone();
    for engine in ENGINES {
        let folder = tempfile::tempdir().unwrap();
        let path = filled(folder.path(), engine, 10);
        let file = path.join(if engine == EngineKind::Redb { "metadata.redb" } else { "sled" });
        let aside = path.join("aside");

        fs::rename(&file, &aside).unwrap();
        let error = Db::open(&path, engine).unwrap_err();
        assert!(matches!(error, OpenError::Missing { .. }), "{}", text(&error));
        assert_eq!(error.code(), ErrorCode::DataLoss);
        fs::rename(&aside, &file).unwrap();

        let format = fs::read_to_string(path.join("format")).unwrap();
        fs::remove_file(path.join("format")).unwrap();
        let error = Db::open(&path, engine).unwrap_err();
        assert!(matches!(error, OpenError::MissingFormat { .. }), "{}", text(&error));

        for unknown in ["", "davit-metadata 2\nredb\nready\n", "davit-metadata 1\nlmdb\nready\n", "\0\0\0"] {
            fs::write(path.join("format"), unknown).unwrap();
            let error = Db::open(&path, engine).unwrap_err();
            assert!(matches!(error, OpenError::UnknownFormat { .. }), "{}", text(&error));
            assert_eq!(error.code(), ErrorCode::FailedPrecondition);
        }
        fs::write(path.join("format"), format).unwrap();
        assert_eq!(check(&Db::open(&path, engine).unwrap()), 10);
    }
}

#[test]
fn a_database_that_was_never_complete_is_made_anew() {
    let _alone = alone();
    for engine in ENGINES {
        let folder = tempfile::tempdir().unwrap();
        let path = filled(folder.path(), engine, 10);
        fs::write(path.join("format"), format!("davit-metadata 1\n{engine}\ncreating\n")).unwrap();
        if engine == EngineKind::Redb {
            fs::write(path.join("metadata.redb"), "half").unwrap();
        } else {
            fs::write(path.join("sled/conf"), "half").unwrap();
        }
        let db = Db::open(&path, engine).unwrap();
        assert_eq!(check(&db), 0);
        put(&db, 1).unwrap();
        drop(db);
        assert_eq!(check(&Db::open(&path, engine).unwrap()), 1);
    }
}

/// The file that holds the records.
fn data_file(path: &Path, engine: EngineKind) -> PathBuf {
    match engine {
        EngineKind::Redb => path.join("metadata.redb"),
        EngineKind::Sled => path.join("sled/db"),
    }
}

/// Damages a copy of a database in one way; it must be refused or hold nothing that nobody wrote.
fn damaged(path: &Path, engine: EngineKind, damage: impl Fn(&mut Vec<u8>)) -> Option<u32> {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("metadata");
    let status = Command::new("cp").arg("-a").arg(path).arg(&copy).status().unwrap();
    assert!(status.success());
    let file = data_file(&copy, engine);
    let mut bytes = fs::read(&file).unwrap();
    damage(&mut bytes);
    fs::write(&file, bytes).unwrap();
    match Db::open(&copy, engine) {
        Ok(db) => Some(check(&db)),
        Err(OpenError::Engine { .. }) => None,
        Err(error) => panic!("{}", text(&error)),
    }
}

#[test]
fn torn_and_flipped_files_are_refused_or_hold_nothing_wrong() {
    let _alone = alone();
    for engine in ENGINES {
        let folder = tempfile::tempdir().unwrap();
        let path = filled(folder.path(), engine, 60);
        let size = fs::metadata(data_file(&path, engine)).unwrap().len() as usize;
        let (mut refused, mut less) = (0, 0);
        for part in 0..20 {
            let at = size * part / 20 + part * 13;
            let outcomes = [
                damaged(&path, engine, |bytes| bytes.truncate(at)),
                damaged(&path, engine, |bytes| {
                    let end = (at + 4096).min(size);
                    bytes[at..end].fill(0);
                }),
                damaged(&path, engine, |bytes| bytes[at] ^= 0x10),
            ];
            for outcome in outcomes {
                refused += u32::from(outcome.is_none());
                less += u32::from(outcome.is_some_and(|count| count < 60));
            }
        }
        println!("{engine}: of 60 damaged copies {refused} were refused, {less} opened with fewer records");
    }
}

#[test]
fn snapshot_files_of_sled_are_not_trusted() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = filled(folder.path(), EngineKind::Sled, 60);
    // What a crash leaves of a snapshot in the making.
    fs::write(path.join("sled/snap.FFFFFFFFFFFFFFFF.generating"), "half a snapshot").unwrap();
    let db = Db::open(&path, EngineKind::Sled).unwrap();
    assert_eq!(check(&db), 60);
    put(&db, 60).unwrap();
    db.close().unwrap();
    // What rot makes of one that was finished.
    fs::write(path.join("sled/snap.FFFFFFFFFFFFFFFF"), "no snapshot at all").unwrap();
    let db = Db::open(&path, EngineKind::Sled).unwrap();
    assert_eq!(check(&db), 61);
    put(&db, 61).unwrap();
    db.close().unwrap();
    assert_eq!(check(&Db::open(&path, EngineKind::Sled).unwrap()), 62);
}

/// Fills the database until the limit on the size of its files is hit; prints what was acknowledged.
#[test]
#[ignore = "run by the test of this file in a process of its own"]
fn child() {
    let (Ok(folder), Ok(engine)) = (std::env::var(FOLDER), std::env::var(ENGINE)) else { return };
    let db = Db::open(Path::new(&folder), engine.parse().unwrap()).unwrap();
    let mut number = check(&db);
    let error = loop {
        match put(&db, number) {
            Ok(()) => println!("\nacknowledged {number}"),
            Err(error) => break error,
        }
        number += 1;
    };
    // It has failed for good, and shows what is durable.
    assert!(put(&db, number).is_err());
    assert_eq!(check(&db), number);
    println!("\nfailed {:?} {}", error.code(), davit_model::error::chain(&error));
}

#[test]
fn a_full_disk_loses_nothing() {
    let _alone = alone();
    for engine in ENGINES {
        let folder = tempfile::tempdir().unwrap();
        let path = filled(folder.path(), engine, 1);
        for megabytes in [4, 5, 7] {
            let before = check(&Db::open(&path, engine).unwrap());
            // Instead of a full disk, a limit on the size of files; without the signal, writing beyond it is an
            // error like any other. The shell counts in blocks of 512 bytes.
            let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", megabytes * 2048);
            let mut child = Command::new("sh")
                .args(["-c", &script])
                .arg(std::env::current_exe().unwrap())
                .args(["child", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
                .env(FOLDER, &path)
                .env(ENGINE, engine.as_str())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let (mut acknowledged, mut failed) = (before, String::new());
            for line in BufReader::new(child.stdout.take().unwrap()).lines() {
                let line = line.unwrap();
                if let Some(number) = line.strip_prefix("acknowledged ") {
                    acknowledged = number.parse::<u32>().unwrap() + 1;
                } else if let Some(error) = line.strip_prefix("failed ") {
                    failed = error.to_owned();
                }
            }
            assert!(child.wait().unwrap().success());
            assert!(failed.starts_with("ResourceExhausted"), "{failed}");
            let db = Db::open(&path, engine).unwrap();
            let count = check(&db);
            // The one that failed may be there, too.
            assert!(count == acknowledged || count == acknowledged + 1, "{acknowledged}, {count}");
            db.verify().unwrap();
        }
    }
}
