//! Measures the unpacking of layers: `measure_layers FOLDER [MEGABYTES [FILES]]`. Makes a tree of so many files, packs it
//! with GNU tar, plain and compressed, and unpacks each archive with GNU tar and with ours, in turns. On a tmpfs the disk
//! does not count.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use davit_snapshotter::layer::apply_to_folder;

const ROUNDS: usize = 3;

fn main() {
    let mut args = std::env::args().skip(1);
    let Some(folder) = args.next() else {
        eprintln!("usage: measure_layers FOLDER [MEGABYTES [FILES]]");
        return;
    };
    let mut number = |default| args.next().map_or(default, |text| text.parse::<u64>().expect("a number"));
    let (megabytes, files) = (number(256), number(15_000));
    let folder = Path::new(&folder).join("measure-layers");
    let tree = folder.join("tree");
    make_tree(&tree, megabytes << 20, files);
    println!("{megabytes} MB in {files} files; the best of {ROUNDS}");
    for (name, flag) in [("tar", "--no-auto-compress"), ("tar.gz", "--gzip"), ("tar.zst", "--zstd")] {
        let archive = folder.join(name);
        tar(&["--create", flag, "--file", text(&archive), "--directory", text(&tree), "."]);
        let (mut gnu, mut ours) = (Duration::MAX, Duration::MAX);
        for _ in 0..ROUNDS {
            let unpack =
                |root: &Path| tar(&["--extract", "--file", text(&archive), "--directory", text(root)]);
            gnu = gnu.min(timed(&folder, unpack));
            ours = ours.min(timed(&folder, |root| {
                apply_to_folder(File::open(&archive).expect("open"), root).expect("unpack");
            }));
        }
        let (gnu, ours) = (gnu.as_secs_f64(), ours.as_secs_f64());
        println!("{name:<8} GNU tar {gnu:6.2} s   davit {ours:6.2} s   ratio {:.2}", ours / gnu);
    }
    println!("the most memory at any time: {} KiB", peak());
    fs::remove_dir_all(&folder).expect("remove");
}

/// Files of equal size, a hundred in each folder, with the words of a text that compresses to a third or so.
fn make_tree(tree: &Path, bytes: u64, files: u64) {
    let length = usize::try_from(bytes / files.max(1)).expect("a size");
    let mut state = 1u64;
    for number in 0..files {
        let folder = tree.join((number / 100).to_string());
        fs::create_dir_all(&folder).expect("make a folder");
        let mut content = Vec::with_capacity(length + 32);
        while content.len() < length {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            write!(content, "{:x} of {} ", state >> 44, number % 7).expect("write to memory");
        }
        content.truncate(length);
        fs::write(folder.join(format!("file-{number}")), content).expect("write a file");
    }
}

/// The time of unpacking into an empty folder.
fn timed(folder: &Path, unpack: impl FnOnce(&Path)) -> Duration {
    let root = folder.join("root");
    fs::create_dir(&root).expect("make a folder");
    let begun = Instant::now();
    unpack(&root);
    let time = begun.elapsed();
    fs::remove_dir_all(&root).expect("remove");
    time
}

fn tar(args: &[&str]) {
    let status = Command::new("tar").args(args).status().expect("run tar");
    assert!(status.success(), "tar: {status}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path that is text")
}

/// `VmHWM` of this process (proc(5)).
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("read status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}
