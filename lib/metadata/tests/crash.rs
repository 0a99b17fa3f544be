//! A process that changes a database is killed at random moments, or the power is cut, again and again: every
//! change that was acknowledged is there, and none is there in part.
//!
//! A power cut is played with a file system in a file: while the process is stopped, the file is copied. The copy
//! holds what has reached the "disk"; what is only in the page cache of the mounted file system is lost.
//!
//! `DAVIT_CRASH_ROUNDS` sets the number of kills per engine, `DAVIT_POWER_ROUNDS` that of power cuts.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use davit_metadata::{CommitError, Db, EngineKind};

const FOLDER: &str = "DAVIT_CRASH_FOLDER";
const ENGINE: &str = "DAVIT_CRASH_ENGINE";
const WRITERS: u64 = 4;
/// Keys that a writer changes in each transaction.
const KEYS: u64 = 5;

/// The process to be killed. Each writer counts up: in transaction `n` all its keys get a value that tells `n`,
/// of a size that changes with `n`; then it prints `writer n`.
#[test]
#[ignore = "run by the tests of this file in a process of its own"]
fn child() {
    let (Ok(folder), Ok(engine)) = (std::env::var(FOLDER), std::env::var(ENGINE)) else { return };
    let db = Db::open(Path::new(&folder), engine.parse().unwrap()).unwrap();
    let start = Barrier::new(WRITERS as usize);
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (db, start) = (&db, &start);
            scope.spawn(move || {
                start.wait();
                write_on(db, writer);
            });
        }
    });
}

fn write_on(db: &Db, writer: u64) {
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
                if n.is_multiple_of(7) && k > 0 {
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

/// The last change of each writer that was acknowledged, and how many there were.
#[derive(Default)]
struct Acknowledged {
    last: [u64; WRITERS as usize],
    count: u64,
}

fn start(folder: &Path, engine: EngineKind) -> (Running, Receiver<()>, JoinHandle<Acknowledged>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder)
        .env(ENGINE, engine.as_str())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let (sender, busy) = channel();
    let reader = thread::spawn(move || {
        let mut acknowledged = Acknowledged::default();
        for line in output.lines() {
            let line = line.unwrap();
            // The first one follows what the test harness prints.
            let Some((writer, n)) = line.trim_start_matches("test child ... ").split_once(' ') else {
                continue;
            };
            let (Ok(writer), Ok(n)) = (writer.parse::<usize>(), n.parse::<u64>()) else { continue };
            assert!(acknowledged.last[writer] < n);
            acknowledged.last[writer] = n;
            acknowledged.count += 1;
            // The receiver only waits for the first.
            let _ = sender.send(());
        }
        acknowledged
    });
    (Running(child), busy, reader)
}

/// A child that does not outlive its test, so that a disk under it can be unmounted whatever fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // One that was waited for is gone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn kill(mut child: Running) {
    child.0.kill().unwrap();
    let status = child.0.wait().unwrap();
    assert!(status.code().is_none(), "the child failed by itself: {status}");
}

fn check(folder: &Path, engine: EngineKind, acknowledged: &Acknowledged) {
    let db = Db::open(folder, engine).unwrap();
    let view = db.view();
    for writer in 0..WRITERS {
        let n = view.get(&key(writer, 0)).map_or(0, |value| number(&value));
        let promised = acknowledged.last[writer as usize];
        // The one that was under way may be there, too.
        let known = promised == 0 || n == promised || n == promised + 1;
        assert!(known, "writer {writer}: {promised} was acknowledged, {n} is there");
        for k in 0..KEYS {
            let wanted = if n == 0 || (n.is_multiple_of(7) && k > 0) { None } else { Some(value(n, k)) };
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
}

/// Lets the child live for a while: in every other round from its start, so that it also dies while it opens; else
/// from its first acknowledgement.
fn let_live(round: u64, busy: &Receiver<()>) {
    if round % 2 == 1 {
        busy.recv_timeout(Duration::from_secs(60)).expect("the child acknowledges something");
    }
    // Not waiting for a condition: the moment of the end is what varies.
    thread::sleep(Duration::from_micros(500 + (round * 7919) % 50_000));
}

/// Tests of this file run one by one: `sled` holds a lock of its own on its file, and a child of another test would
/// inherit it for the moment between `fork` and `exec`.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn rounds(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

fn crash(engine: EngineKind) {
    let _alone = alone();
    let rounds = rounds("DAVIT_CRASH_ROUNDS", 200);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata");
    let mut count = 0;
    for round in 0..rounds {
        let (child, busy, reader) = start(&path, engine);
        let_live(round, &busy);
        kill(child);
        let acknowledged = reader.join().unwrap();
        check(&path, engine, &acknowledged);
        count += acknowledged.count;
    }
    println!("{engine}: {rounds} kills, {count} acknowledged changes");
    assert!(count >= rounds / 2);
}

#[test]
fn redb_loses_nothing_when_killed() {
    crash(EngineKind::Redb);
}

#[test]
fn sled_loses_nothing_when_killed() {
    crash(EngineKind::Sled);
}

/// A file system in a file, mounted as long as this lives.
struct Disk {
    mount_point: PathBuf,
}

impl Disk {
    fn mount(image: &Path, mount_point: &Path) -> Disk {
        run("mount", &["-o".as_ref(), "loop".as_ref(), image.as_ref(), mount_point.as_ref()]);
        Disk { mount_point: mount_point.to_owned() }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run("umount", &[self.mount_point.as_ref()]);
    }
}

fn run(program: &str, arguments: &[&std::ffi::OsStr]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

/// Stops the process and waits until none of its threads is in a system call any more.
fn stop(Running(child): &Running) {
    run("kill", &["-STOP".as_ref(), child.id().to_string().as_ref()]);
    let deadline = Instant::now() + Duration::from_secs(60);
    let tasks = format!("/proc/{}/task", child.id());
    loop {
        let stopped = std::fs::read_dir(&tasks).unwrap().all(|task| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
            stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T"))
        });
        if stopped {
            return;
        }
        assert!(Instant::now() < deadline, "the child does not stop");
        thread::sleep(Duration::from_millis(1));
    }
}

fn power_cut(engine: EngineKind) {
    let is_root = std::fs::read_to_string("/proc/self/status").unwrap().contains("\nUid:\t0\t0\t0\t0\n");
    if !is_root || !Path::new("/dev/loop-control").exists() {
        println!("skipped: needs root and loop devices");
        return;
    }
    let _alone = alone();
    // In memory if possible: the file's own durability does not matter.
    let shm = Path::new("/dev/shm");
    let folder = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap();
    let (image, copy) = (folder.path().join("image"), folder.path().join("copy"));
    let mount_point = folder.path().join("mounted");
    std::fs::create_dir(&mount_point).unwrap();
    std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    run("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), image.as_ref()]);

    let rounds = rounds("DAVIT_POWER_ROUNDS", 20);
    let mut count = 0;
    for round in 0..rounds {
        let disk = Disk::mount(&image, &mount_point);
        let path = mount_point.join("metadata");
        let (child, busy, reader) = start(&path, engine);
        let_live(round, &busy);
        stop(&child);
        run("cp", &["--sparse=always".as_ref(), image.as_ref(), copy.as_ref()]);
        kill(child);
        let acknowledged = reader.join().unwrap();
        drop(disk);
        std::fs::rename(&copy, &image).unwrap();
        let disk = Disk::mount(&image, &mount_point);
        check(&path, engine, &acknowledged);
        drop(disk);
        count += acknowledged.count;
    }
    println!("{engine}: {rounds} power cuts, {count} acknowledged changes");
    assert!(count >= rounds / 2);
}

#[test]
fn redb_loses_nothing_in_a_power_cut() {
    power_cut(EngineKind::Redb);
}

#[test]
fn sled_loses_nothing_in_a_power_cut() {
    power_cut(EngineKind::Sled);
}
