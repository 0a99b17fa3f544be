//! Measures snapshotters: `measure_snapshotters FOLDER [MEGABYTES [FILES]]`. Packs a tree of so many files as a layer, and in
//! each snapshotter in turn unpacks and commits it, prepares snapshots on it, mounts one, and deletes all. Needs root; btrfs
//! only where FOLDER is on one, and `mkfs.ext4` for blockfile.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use davit_metadata::{Db, EngineKind};
use davit_model::Labels;
use davit_snapshotter::blockfile::{self, Blockfile};
use davit_snapshotter::btrfs::{self, Btrfs};
use davit_snapshotter::erofs::{self, Erofs};
use davit_snapshotter::layer::apply_alone;
use davit_snapshotter::native::{self, Native};
use davit_snapshotter::overlayfs::{self, Overlayfs};
use davit_snapshotter::{Error, Snapshotter};
use davit_sys::mount::{mount_all, unmount_all};

const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// Snapshots that are prepared on the layer.
const SNAPSHOTS: u32 = 20;

fn main() {
    let mut args = std::env::args().skip(1);
    let Some(folder) = args.next() else {
        eprintln!("usage: measure_snapshotters FOLDER [MEGABYTES [FILES]]");
        return;
    };
    let mut number = |default| args.next().map_or(default, |text| text.parse::<u64>().expect("a number"));
    let (megabytes, files) = (number(128), number(10_000));
    let folder = Path::new(&folder).join("measure-snapshotters");
    fs::create_dir_all(folder.join("mounted")).expect("make a folder");
    let layer = folder.join("layer.tar");
    write_layer(&layer, megabytes << 20, files);
    println!("{megabytes} MB in {files} files; milliseconds, the mean of {SNAPSHOTS} for prepare and mount");
    println!("            unpack  commit  prepare  mount   delete   MB on disk");
    for name in [overlayfs::NAME, native::NAME, erofs::NAME, blockfile::NAME, btrfs::NAME] {
        match open(name, &folder, megabytes << 20) {
            Ok(snapshotter) => measure(name, &*snapshotter, &layer, &folder),
            Err(error) => println!("{name:<10} {}", davit_model::error::chain(&error)),
        }
    }
    fs::remove_dir_all(&folder).expect("remove");
}

fn open(name: &str, folder: &Path, bytes: u64) -> Result<Arc<dyn Snapshotter>, Error> {
    let databases = folder.join("db").join(name);
    fs::create_dir_all(&databases).expect("make a folder");
    let db = Db::open(&databases, EngineKind::Redb).expect("open a database");
    let root = folder.join("root").join(name);
    Ok(match name {
        overlayfs::NAME => Arc::new(Overlayfs::open(&root, db, overlayfs::Config::default())?),
        native::NAME => Arc::new(Native::open(&root, db)?),
        erofs::NAME => Arc::new(Erofs::open(&root, db, erofs::Config::default())?),
        btrfs::NAME => Arc::new(Btrfs::open(&root, db)?),
        _ => {
            let scratch = folder.join("scratch");
            File::create(&scratch)
                .and_then(|file| file.set_len(2 * bytes + (64 << 20)))
                .expect("make a file");
            let made = Command::new("mkfs.ext4").arg("-q").arg(&scratch).status().expect("run mkfs.ext4");
            assert!(made.success(), "mkfs.ext4: {made}");
            let config = blockfile::Config { scratch_file: Some(scratch), ..blockfile::Config::default() };
            Arc::new(Blockfile::open(&root, db, config)?)
        }
    })
}

fn measure(name: &str, snapshotter: &dyn Snapshotter, layer: &Path, folder: &Path) {
    let none = Labels::new();
    let timed = |work: &mut dyn FnMut()| {
        let begun = Instant::now();
        work();
        begun.elapsed().as_secs_f64() * 1e3
    };
    let mounts = snapshotter.prepare("active", None, &none).expect("prepare");
    let unpack = timed(&mut || {
        let reader = File::open(layer).expect("open the layer");
        apply_alone(reader, TAR, &mounts).expect("unpack");
    });
    let commit = timed(&mut || snapshotter.commit("layer", "active", &none, None).expect("commit"));
    let mut all = Vec::new();
    let prepare = timed(&mut || {
        for number in 0..SNAPSHOTS {
            let mounts = snapshotter.prepare(&number.to_string(), Some("layer"), &none).expect("prepare");
            all.push(mounts);
        }
    });
    let point = folder.join("mounted");
    let mount = timed(&mut || {
        for mounts in &all {
            mount_all(mounts, &point).expect("mount");
            unmount_all(&point).expect("unmount");
        }
    });
    let usage = snapshotter.usage("layer").expect("usage");
    let delete = timed(&mut || {
        for number in 0..SNAPSHOTS {
            snapshotter.remove(&number.to_string()).expect("remove");
        }
        snapshotter.remove("layer").expect("remove");
        snapshotter.cleanup().expect("clean up");
    });
    let each = f64::from(SNAPSHOTS);
    let (prepare, mount, size) = (prepare / each, mount / each, usage.size as f64 / 1e6);
    println!("{name:<10} {unpack:7.0} {commit:7.0} {prepare:8.2} {mount:6.2} {delete:8.0} {size:12.1}");
}

/// A layer of files of equal size, a hundred in each folder, with the words of a text.
fn write_layer(path: &Path, bytes: u64, files: u64) {
    let mut archive = tar::Builder::new(std::io::BufWriter::new(File::create(path).expect("make a file")));
    let length = usize::try_from(bytes / files.max(1)).expect("a size");
    let mut state = 1u64;
    for number in 0..files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        if number % 100 == 0 {
            header.set_entry_type(tar::EntryType::Directory);
            archive.append_data(&mut header, format!("{}/", number / 100), &[][..]).expect("write a folder");
        }
        let mut content = Vec::with_capacity(length + 32);
        while content.len() < length {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            write!(content, "{:x} of {} ", state >> 44, number % 7).expect("write to memory");
        }
        content.truncate(length);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(length as u64);
        let name = format!("{}/file-{number}", number / 100);
        archive.append_data(&mut header, name, content.as_slice()).expect("write a file");
    }
    archive.into_inner().and_then(|mut file| file.flush()).expect("finish the layer");
}
