//! Measures an engine: `measure_metadata FOLDER redb|sled`. Prints the time of a durable change by one caller and by eight,
//! and what 20,000 records of 3 kB cost in memory, on disk, and to open and verify.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use davit_metadata::{CommitError, Db, EngineKind};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, engine] = &arguments[..] else {
        eprintln!("usage: measure_metadata FOLDER redb|sled");
        return;
    };
    let engine: EngineKind = engine.parse().expect("an engine");
    let path = PathBuf::from(folder).join(format!("measure-{engine}"));
    let db = Db::open(&path, engine).expect("open");
    latency(&db, engine);
    print_memory("after the changes");

    for group in 0..100 {
        db.update_ordered::<_, CommitError>(|txn| {
            for record in 0..200 {
                txn.put(format!("records/{group}/{record}").as_bytes(), &[group as u8; 3000]);
            }
            Ok(())
        })
        .expect("update");
    }
    db.sync().expect("sync");
    print_memory("with 20,000 records of 3 kB");
    timed("verify", || db.verify().expect("verify"));
    print_memory("after verifying");
    latency(&db, engine);
    timed("close", || db.close().expect("close"));
    println!("{engine}: {} kB on disk", size(&path) / 1024);
    let db = timed("open", || Db::open(&path, engine).expect("open"));
    print_memory("reopened");
    timed("view and scan", || assert!(db.view().scan(b"records/").count() == 20_000));
    drop(db);
    std::fs::remove_dir_all(&path).expect("remove");
}

fn latency(db: &Db, engine: EngineKind) {
    for callers in [1, 8] {
        let times: Vec<Duration> = thread::scope(|scope| {
            let callers = (0..callers).map(|caller| scope.spawn(move || changes(db, caller)));
            callers.collect::<Vec<_>>().into_iter().flat_map(|caller| caller.join().expect("join")).collect()
        });
        let mut times = times;
        times.sort();
        let at = |part: usize| times[(times.len() - 1) * part / 100];
        println!("{engine}: {callers} callers: p50 {:?} p90 {:?} p99 {:?}", at(50), at(90), at(99));
    }
}

fn changes(db: &Db, caller: usize) -> Vec<Duration> {
    let change = |number: usize| {
        let start = Instant::now();
        db.update::<_, CommitError>(|txn| {
            txn.put(format!("changes/{caller}/{}", number % 100).as_bytes(), &[number as u8; 900]);
            Ok(())
        })
        .expect("update");
        start.elapsed()
    };
    (0..1000).map(change).collect()
}

fn timed<T>(what: &str, call: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let value = call();
    println!("{what}: {:?}", start.elapsed());
    value
}

fn print_memory(when: &str) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let wanted = |line: &&str| ["RssAnon", "Threads"].iter().any(|name| line.starts_with(name));
    let lines: Vec<&str> = status.lines().filter(wanted).collect();
    println!("{when}: {}", lines.join(", ").replace('\t', " "));
}

fn size(path: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(path) else { return 0 };
    let mut total = 0;
    for entry in entries.flatten() {
        total += match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => size(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        };
    }
    total
}
