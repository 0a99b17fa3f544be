//! A process that writes blobs is killed at random moments, or the power is cut, again and again: every blob whose
//! commit returned is there and whole, nothing partial has the name of a blob, and every ingest can be resumed.
//!
//! A power cut is played with a file system in a file: while the process is stopped, the file is copied. The copy
//! holds what has reached the "disk"; what is only in the page cache of the mounted file system is lost.
//!
//! `DAVIT_CRASH_ROUNDS` sets the number of kills, `DAVIT_POWER_ROUNDS` that of power cuts.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use davit_content_store::{Hasher, Store};
use davit_model::{Algorithm, Coded, Digest};

const FOLDER: &str = "DAVIT_CRASH_FOLDER";
const ROUND: &str = "DAVIT_CRASH_ROUND";
const WRITERS: u64 = 3;

/// The process to be killed: each writer writes blobs, and prints the digest of each that it has committed.
#[test]
#[ignore = "run by the tests of this file in a process of its own"]
fn child() {
    let (Ok(folder), Ok(round)) = (std::env::var(FOLDER), std::env::var(ROUND)) else { return };
    let round: u64 = round.parse().unwrap();
    let store = Store::open(Path::new(&folder)).unwrap();
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let store = &store;
            scope.spawn(move || {
                for number in 0.. {
                    write_one(store, writer, blob(round, writer, number));
                }
            });
        }
    });
}

fn write_one(store: &Store, writer: u64, bytes: Vec<u8>) {
    // The same reference again and again, as a kill may leave it behind.
    let mut writer = store.writer(&format!("writer/{writer}"), 0, None).unwrap();
    writer.truncate(0).unwrap();
    for piece in bytes.chunks(20_000) {
        writer.write(piece).unwrap();
    }
    let digest = writer.commit(bytes.len() as u64, None).unwrap();
    // One line is one write, so that a kill does not cut it.
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{digest}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

/// A blob of a size between one byte and some hundred kilobytes that no other call returns.
fn blob(round: u64, writer: u64, number: u64) -> Vec<u8> {
    let head = format!("{round}/{writer}/{number}/");
    let size = (round * 7919 + writer * 104_729 + number * 15_485_863) % 300_000;
    let size = if number.is_multiple_of(3) { size / 1000 } else { size };
    let mut bytes = head.clone().into_bytes();
    bytes.resize(head.len() + size as usize, number as u8);
    bytes
}

fn start(folder: &Path, round: u64) -> (Running, Receiver<()>, JoinHandle<BTreeSet<Digest>>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder)
        .env(ROUND, round.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let (sender, busy) = channel();
    let reader = thread::spawn(move || {
        let mut committed = BTreeSet::new();
        for line in output.lines() {
            // The first one follows what the test harness prints.
            if let Ok(digest) = line.unwrap().trim_start_matches("test child ... ").parse() {
                assert!(committed.insert(digest));
                // The receiver only waits for the first.
                let _ = sender.send(());
            }
        }
        committed
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

/// Checks what was left, and removes the blobs.
fn check(folder: &Path, committed: &BTreeSet<Digest>) {
    let store = Store::open(folder).unwrap();
    let mut found = BTreeSet::new();
    for info in store.walk().unwrap() {
        let mut bytes = Vec::new();
        store.reader(&info.digest).unwrap().read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, info.size);
        assert!(Hasher::digest_of(Algorithm::Sha256, &bytes) == info.digest, "{} is damaged", info.digest);
        store.delete(&info.digest).unwrap();
        found.insert(info.digest);
    }
    let lost: Vec<_> = committed.difference(&found).collect();
    assert!(lost.is_empty(), "{} of {} blobs are lost", lost.len(), committed.len());
    // Those whose commit was under way may be there, too.
    assert!(found.len() <= committed.len() + WRITERS as usize);

    for status in store.statuses().unwrap() {
        let mut writer = store.writer(&status.reference, 0, None).unwrap();
        assert_eq!(writer.status().offset, status.offset);
        // Every other one goes to the next round as it is.
        if committed.len().is_multiple_of(2) {
            writer.write(b"the end").unwrap();
            let digest = writer.commit(status.offset + 7, None).unwrap();
            store.delete(&digest).unwrap();
        }
    }
    // Nothing is left that no status shows.
    let ingests = std::fs::read_dir(folder.join("ingest")).unwrap().count();
    assert_eq!(ingests, store.statuses().unwrap().len());
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

/// Tests of this file run one by one: a child of another test would have what is open on the disk of this one for the moment
/// between `fork` and `exec`, and what is used cannot be unmounted.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn rounds(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn nothing_is_lost_when_killed() {
    let _alone = alone();
    let rounds = rounds("DAVIT_CRASH_ROUNDS", 200);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("content");
    let mut count = 0;
    for round in 0..rounds {
        let (child, busy, reader) = start(&path, round);
        let_live(round, &busy);
        kill(child);
        let committed = reader.join().unwrap();
        check(&path, &committed);
        count += committed.len() as u64;
    }
    println!("{rounds} kills, {count} blobs");
    assert!(count >= rounds / 2);
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

#[test]
fn nothing_is_lost_in_a_power_cut() {
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
    std::fs::File::create(&image).unwrap().set_len(256 << 20).unwrap();
    run("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), image.as_ref()]);

    let rounds = rounds("DAVIT_POWER_ROUNDS", 20);
    let mut count = 0;
    for round in 0..rounds {
        let disk = Disk::mount(&image, &mount_point);
        let path = mount_point.join("content");
        let (child, busy, reader) = start(&path, round);
        let_live(round, &busy);
        stop(&child);
        run("cp", &["--sparse=always".as_ref(), image.as_ref(), copy.as_ref()]);
        kill(child);
        let committed = reader.join().unwrap();
        drop(disk);
        std::fs::rename(&copy, &image).unwrap();
        let disk = Disk::mount(&image, &mount_point);
        check(&path, &committed);
        drop(disk);
        count += committed.len() as u64;
    }
    println!("{rounds} power cuts, {count} blobs");
    assert!(count >= rounds / 2);
}

/// Writes until the limit on the size of files is hit.
#[test]
#[ignore = "run by the test of this file in a process of its own"]
fn limited_child() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let store = Store::open(Path::new(&folder)).unwrap();
    let mut writer = store.writer("limited", 0, None).unwrap();
    let error = loop {
        if let Err(error) = writer.write(&[7; 100_000]) {
            break error;
        }
    };
    assert_eq!(error.code(), davit_model::ErrorCode::ResourceExhausted, "{error}");
    // What fitted counts.
    assert_eq!(writer.status().offset, 1 << 20);
    assert_eq!(writer.digest(), Hasher::digest_of(Algorithm::Sha256, &vec![7; 1 << 20]));
}

#[test]
fn an_ingest_goes_on_after_a_full_disk() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    // Instead of a full disk, a limit on the size of files; without the signal, writing beyond it is an error like
    // any other. The shell counts in blocks of 512 bytes.
    let script = "trap '' XFSZ; ulimit -f 2048; exec \"$0\" \"$@\"";
    let status = Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .args(["limited_child", "--exact", "--ignored", "--test-threads=1"])
        .env(FOLDER, folder.path())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let store = Store::open(folder.path()).unwrap();
    let mut writer = store.writer("limited", 0, None).unwrap();
    assert_eq!(writer.status().offset, 1 << 20);
    writer.write(&[7; 100]).unwrap();
    let wanted = Hasher::digest_of(Algorithm::Sha256, &vec![7; (1 << 20) + 100]);
    assert_eq!(writer.commit((1 << 20) + 100, Some(&wanted)).unwrap(), wanted);
}
