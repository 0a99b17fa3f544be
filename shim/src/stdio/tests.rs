//! Streams that are handed on in the middle of everything, again and again, as in live upgrades.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use davit_model::{Coded, ErrorCode};
use nix::fcntl::OFlag;
use nix::pty::openpty;
use nix::sys::stat::Mode;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

use super::*;
use crate::executor::run;

const PATIENCE: Duration = Duration::from_secs(60);

/// What a shim leaves to the next one.
type Left = (Saved, Vec<OwnedFd>);

fn pattern(from: u64, count: usize) -> Vec<u8> {
    (from..from + count as u64).map(|position| (position % 251) as u8).collect()
}

/// Runs streams in one shim after the other, each on a thread of its own, until `enough`.
fn hand_on(first: Left, enough: impl Fn() -> bool) -> u32 {
    let deadline = Instant::now() + PATIENCE;
    let mut left = Some(first);
    let mut rounds = 0;
    while !enough() {
        assert!(Instant::now() < deadline, "not done after {rounds} rounds");
        left = left.take().map(|(saved, fds)| {
            std::thread::spawn(move || run(one_shim(saved, fds, Duration::from_millis(1 + rounds % 7))))
                .join()
                .unwrap()
        });
        rounds += 1;
    }
    u32::try_from(rounds).unwrap()
}

async fn one_shim(saved: Saved, fds: Vec<OwnedFd>, time: Duration) -> Left {
    let mut find = |number: u32| fds[number as usize - 1].try_clone();
    let streams = Streams::restore(saved, &mut find).unwrap();
    drop(fds);
    sleep(time).await;
    save(&streams).await
}

async fn save(streams: &Streams) -> Left {
    let _quiet = crate::offload::quiesce().await;
    let mut kept: Vec<OwnedFd> = Vec::new();
    let saved = streams.save(&mut |fd| {
        kept.push(fd.try_clone_to_owned().unwrap());
        u32::try_from(kept.len()).unwrap()
    });
    // Through the wire, as in earnest.
    let bytes = prost::Message::encode_to_vec(&saved);
    (prost::Message::decode(&*bytes).unwrap(), kept)
}

/// Opens streams and hands them on before anything was copied. Returns the end for the process, if it is a pipe.
fn begin(request: Request, folder: &Path, terminal: Option<OwnedFd>) -> (Left, Option<OwnedFd>) {
    let folder = folder.to_owned();
    let begin = std::thread::spawn(move || {
        run(async move {
            let owner = Owner { id: "box", namespace: "test", bundle: &folder, uid: 0, gid: 0 };
            match terminal {
                Some(master) => {
                    let streams = Streams::terminal(&request, &owner, master).await.unwrap();
                    (save(&streams).await, None)
                }
                None => {
                    let (streams, ends) = Streams::pipes(&request, &owner).await.unwrap();
                    streams.start("").unwrap();
                    (save(&streams).await, ends.stdout)
                }
            }
        })
    });
    begin.join().unwrap()
}

/// Writes the pattern, never more than `ahead` before what has been read.
fn write_pattern(
    mut file: File,
    total: u64,
    ahead: u64,
    read: Arc<AtomicU64>,
) -> std::thread::JoinHandle<File> {
    std::thread::spawn(move || {
        let mut written = 0;
        while written < total {
            let behind = read.load(Ordering::SeqCst);
            if written >= behind + ahead {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            let count = usize::try_from((written * 7919) % 30_000 + 1).unwrap();
            let bytes = pattern(written, count.min(usize::try_from(total - written).unwrap()));
            file.write_all(&bytes).unwrap();
            written += bytes.len() as u64;
        }
        file
    })
}

/// Reads the pattern from a FIFO by a reader that leaves and comes back, and takes odd amounts.
fn read_pattern(path: PathBuf, total: u64, read: Arc<AtomicU64>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let open = || File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(&path).unwrap();
        let mut reader = open();
        let mut turn = 0u64;
        let mut buffer = vec![0; 50_000];
        while read.load(Ordering::SeqCst) < total {
            turn += 1;
            if turn.is_multiple_of(50) {
                drop(reader);
                std::thread::sleep(Duration::from_millis(3));
                reader = open();
            }
            let size = usize::try_from(turn * 7907 % 50_000 + 1).unwrap();
            match reader.read(&mut buffer[..size]) {
                Ok(0) => std::thread::sleep(Duration::from_millis(1)),
                Ok(count) => {
                    let position = read.load(Ordering::SeqCst);
                    assert!(buffer[..count] == pattern(position, count), "wrong bytes at {position}");
                    read.store(position + count as u64, Ordering::SeqCst);
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    })
}

fn fifo(folder: &Path) -> PathBuf {
    let path = folder.join("fifo");
    nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
    path
}

#[test]
fn a_pipe_loses_and_doubles_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = fifo(folder.path());
    let request = Request { stdout: path.display().to_string(), ..Request::default() };
    let (left, end) = begin(request, folder.path(), None);
    const TOTAL: u64 = 20_000_000;
    let read = Arc::new(AtomicU64::new(0));
    let writer = write_pattern(end.unwrap().into(), TOTAL, 700_000, read.clone());
    let reader = read_pattern(path, TOTAL, read.clone());
    let rounds = hand_on(left, || read.load(Ordering::SeqCst) == TOTAL || reader.is_finished());
    reader.join().unwrap();
    writer.join().unwrap();
    println!("{rounds} shims, one after the other");
}

#[test]
fn a_terminal_loses_and_doubles_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = fifo(folder.path());
    let pty = openpty(None, None).unwrap();
    let mut raw = tcgetattr(&pty.slave).unwrap();
    cfmakeraw(&mut raw);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &raw).unwrap();
    let request = Request { stdout: path.display().to_string(), terminal: true, ..Request::default() };
    let (left, _) = begin(request, folder.path(), Some(pty.master));
    const TOTAL: u64 = 2_000_000;
    let read = Arc::new(AtomicU64::new(0));
    let writer = write_pattern(pty.slave.into(), TOTAL, 700_000, read.clone());
    let reader = read_pattern(path, TOTAL, read.clone());
    hand_on(left, || read.load(Ordering::SeqCst) == TOTAL || reader.is_finished());
    reader.join().unwrap();
    writer.join().unwrap();
}

#[test]
fn a_json_log_loses_and_doubles_nothing() {
    let folder = tempfile::tempdir().unwrap();
    // A machine that is too slow for this test must not have it drop anything.
    let config = r#"{"annotations":{"io.davit.stdio.mode":"blocking"}}"#;
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let logs = folder.path().join("logs");
    let log = logs.join("log");
    let stdout = format!("json-file://{}?max-size=200000&max-file=1000", log.display());
    let (left, end) = begin(Request { stdout, ..Request::default() }, folder.path(), None);
    const LINES: usize = 10_000;
    let mut end = File::from(end.unwrap());
    let writer = std::thread::spawn(move || {
        for number in 0..LINES {
            write!(end, "line ").unwrap();
            writeln!(end, "{number}").unwrap();
            // Lines of nothing become objects of seventy bytes.
            if number % 1000 == 0 {
                end.write_all(&[b'\n'; 30_000]).unwrap();
            }
        }
    });
    let last = format!("line {}\\n", LINES - 1);
    hand_on(left, || std::fs::read_to_string(&log).is_ok_and(|text| text.contains(&last)));
    writer.join().unwrap();
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&logs).unwrap().map(|entry| entry.unwrap().path()).collect();
    let number = |path: &PathBuf| path.extension().map_or(0, |text| text.to_str().unwrap().parse().unwrap());
    files.sort_by_key(|path| std::cmp::Reverse::<u32>(number(path)));
    assert!(files.len() > 10, "it was rotated");
    let (mut expected, mut nothing) = (0, 0);
    for file in files {
        assert!(file.metadata().unwrap().len() <= 200_000);
        for line in std::fs::read_to_string(file).unwrap().lines() {
            let object: serde_json::Value = serde_json::from_str(line).unwrap();
            if object["log"] == "\n" {
                nothing += 1;
            } else {
                assert_eq!(object["log"], format!("line {expected}\n"));
                expected += 1;
            }
        }
    }
    assert_eq!((expected, nothing), (LINES, LINES / 1000 * 30_000));
}

#[test]
fn the_mode_is_one_of_two() {
    let folder = tempfile::tempdir().unwrap();
    let request = Request { stdout: "/x".to_owned(), ..Request::default() };
    let blocking = |mode: &str| {
        let config = format!(r#"{{"annotations":{{"io.davit.stdio.mode":"{mode}"}}}}"#);
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        open::is_blocking(&request, folder.path())
    };
    assert!(blocking("blocking").unwrap());
    assert!(!blocking("non-blocking").unwrap());
    assert_eq!(blocking("maybe").unwrap_err().code(), ErrorCode::InvalidArgument);
}
