//! A process that changes a database is killed at random moments, again and again: every change that was
//! acknowledged is there, and none is there in part.
//!
//! `DAVIT_CRASH_ROUNDS` sets the number of kills per engine.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use davit_metadata::{CommitError, Db, EngineKind};

const FOLDER: &str = "DAVIT_CRASH_FOLDER";
const ENGINE: &str = "DAVIT_CRASH_ENGINE";
const WRITERS: u64 = 4;
/// Keys that a writer changes in each transaction.
const KEYS: u64 = 5;

/// The process to be killed. Each writer counts up: in transaction `n` all its keys get a value that tells `n`,
/// of a size that changes with `n`; then it prints `writer n`.
#[test]
#[ignore = "run by the test of this file in a process of its own"]
fn child() {
    let (Ok(folder), Ok(engine)) = (std::env::var(FOLDER), std::env::var(ENGINE)) else { return };
    let db = Db::open(Path::new(&folder), engine.parse().unwrap()).unwrap();
    println!("open");
    let start = Arc::new(Barrier::new(WRITERS as usize));
    let writers = (0..WRITERS).map(|writer| {
        let (db, start) = (db.clone(), start.clone());
        thread::spawn(move || {
            start.wait();
            let mut n = db.view().get(&key(writer, 0)).map_or(0, |value| number(&value));
            loop {
                n += 1;
                // A record that nobody waits for, and that the change after it must carry along.
                db.update_ordered::<_, CommitError>(|txn| {
                    txn.put(&ordered_key(writer), &n.to_be_bytes());
                    Ok(())
                })
                .unwrap();
                db.update::<_, CommitError>(|txn| {
                    for k in 0..KEYS {
                        // Every seventh transaction removes what the others set.
                        if n % 7 == 0 && k > 0 {
                            txn.delete(&key(writer, k));
                        } else {
                            txn.put(&key(writer, k), &value(n, k));
                        }
                    }
                    Ok(())
                })
                .unwrap();
                // One line is one write, so that a kill does not cut it.
                let mut out = std::io::stdout().lock();
                out.write_all(format!("{writer} {n}\n").as_bytes()).unwrap();
                out.flush().unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.join().unwrap();
    }
}

fn key(writer: u64, k: u64) -> Vec<u8> {
    format!("writer/{writer}/{k}").into_bytes()
}

fn ordered_key(writer: u64) -> Vec<u8> {
    format!("ordered/{writer}").into_bytes()
}

fn value(n: u64, k: u64) -> Vec<u8> {
    let size = [900, 3000, 17, 12_000, 4088][((n + k) % 5) as usize];
    let mut value = n.to_be_bytes().to_vec();
    value.resize(size, n as u8);
    value
}

fn number(value: &[u8]) -> u64 {
    u64::from_be_bytes(value[..8].try_into().unwrap())
}

/// Kills the child after a while and checks what it left; returns the number of acknowledged changes.
fn round(folder: &Path, engine: EngineKind, alive: Duration) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder)
        .env(ENGINE, engine.as_str())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let reader = thread::spawn(move || {
        let mut acknowledged = [0; WRITERS as usize];
        let (mut count, mut opened) = (0, false);
        for line in output.lines() {
            let line = line.unwrap();
            opened |= line.ends_with("open");
            let Some((writer, n)) = line.split_once(' ') else { continue };
            let (Ok(writer), Ok(n)) = (writer.parse::<usize>(), n.parse::<u64>()) else { continue };
            assert!(acknowledged[writer] < n);
            acknowledged[writer] = n;
            count += 1;
        }
        (acknowledged, count, opened)
    });
    // Not waiting for a condition: the moment of the kill is what varies.
    thread::sleep(alive);
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert!(status.code().is_none(), "the child failed by itself: {status}");
    let (acknowledged, count, _) = reader.join().unwrap();

    let db = Db::open(folder, engine).unwrap();
    let view = db.view();
    for writer in 0..WRITERS {
        let n = view.get(&key(writer, 0)).map_or(0, |value| number(&value));
        let promised = acknowledged[writer as usize];
        // The one that was under way may be there, too.
        let known = promised == 0 || n == promised || n == promised + 1;
        assert!(known, "writer {writer}: {promised} was acknowledged, {n} is there");
        for k in 0..KEYS {
            let wanted = if n == 0 || (n % 7 == 0 && k > 0) { None } else { Some(value(n, k)) };
            assert!(
                view.get(&key(writer, k)).as_deref() == wanted.as_deref(),
                "writer {writer}: {n} is in part"
            );
        }
        let ordered = view.get(&ordered_key(writer)).map_or(0, |value| number(&value));
        assert!(
            ordered == n || ordered == n + 1,
            "writer {writer}: {ordered} came before {n}, which is there"
        );
    }
    db.verify().unwrap();
    db.close().unwrap();
    count
}

fn crash(engine: EngineKind) {
    let rounds = std::env::var("DAVIT_CRASH_ROUNDS").map_or(200, |text| text.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata");
    let mut acknowledged = 0;
    for number in 0..rounds {
        // Kills while it creates or opens the database, and while it is busy, spread evenly.
        let alive = Duration::from_micros(500 + (number * 7919) % 60_000);
        acknowledged += round(&path, engine, alive);
    }
    println!("{engine}: {rounds} kills, {acknowledged} acknowledged changes");
    assert!(acknowledged > rounds, "the child was always killed too early");
}

#[test]
fn redb_loses_nothing_when_killed() {
    crash(EngineKind::Redb);
}

#[test]
fn sled_loses_nothing_when_killed() {
    crash(EngineKind::Sled);
}
