//! Measures the store: `measure_content FOLDER`. Prints the time of a small blob and the rate of a large one.

use std::path::Path;
use std::time::{Duration, Instant};

use davit_content_store::{Hasher, Store};
use davit_model::Algorithm;

fn main() {
    let Some(folder) = std::env::args().nth(1) else {
        eprintln!("usage: measure_content FOLDER");
        return;
    };
    let path = Path::new(&folder).join("measure-content");
    let store = Store::open(&path).expect("open");
    let mut times: Vec<(Duration, Duration)> = (0..500u32).map(|number| small(&store, number)).collect();
    times.sort();
    let (open, commit) = times[times.len() / 2];
    println!("4 kB blob: open and write {open:?}, commit {commit:?} (median)");

    let piece = vec![7; 1 << 20];
    let start = Instant::now();
    let mut hasher = Hasher::new(Algorithm::Sha256);
    (0..512).for_each(|_| hasher.update(&piece));
    println!("hash 512 MiB: {:?}", start.elapsed());
    let digest = hasher.finish();
    let mut writer = store.writer("large", 512 << 20, Some(&digest)).expect("writer");
    let start = Instant::now();
    (0..512).for_each(|_| writer.write(&piece).expect("write"));
    let written = start.elapsed();
    writer.commit(512 << 20, Some(&digest)).expect("commit");
    println!("write 512 MiB: {written:?}, with commit {:?}", start.elapsed());
    let start = Instant::now();
    println!("walk {} blobs: {:?}", store.walk().expect("walk").len(), start.elapsed());
    drop(store);
    std::fs::remove_dir_all(&path).expect("remove");
}

fn small(store: &Store, number: u32) -> (Duration, Duration) {
    let bytes = number.to_le_bytes().repeat(1000);
    let start = Instant::now();
    let mut writer = store.writer("small", 4000, None).expect("writer");
    writer.write(&bytes).expect("write");
    let opened = start.elapsed();
    writer.commit(4000, None).expect("commit");
    (opened, start.elapsed() - opened)
}
