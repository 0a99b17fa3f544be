//! The states that a crash leaves, made by hand, and what opening and cleaning up make of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use davit_model::{Coded, ErrorCode, Labels, Mount};
use davit_snapshotter::Kind;
use davit_snapshotter::Snapshotter;

use super::{Which, database, may_mount};

struct Place {
    folder: tempfile::TempDir,
    which: Which,
}

impl Place {
    fn new(which: Which) -> Place {
        Place { folder: tempfile::tempdir().unwrap(), which }
    }

    /// Opens the snapshotter, as a new daemon would.
    fn open(&self) -> std::sync::Arc<dyn Snapshotter> {
        self.which.open(&self.folder.path().join("root"), database(self.folder.path()))
    }

    fn snapshots(&self) -> PathBuf {
        self.folder.path().join("root/snapshots")
    }

    fn folders(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.snapshots()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn commit(snapshotter: &dyn Snapshotter, name: &str, parent: Option<&str>) {
    snapshotter.prepare("temporary", parent, &Labels::new()).unwrap();
    snapshotter.commit(name, "temporary", &Labels::new(), None).unwrap();
}

/// The folder of changes, or of everything, of a snapshot.
fn folder_of(mounts: &[Mount]) -> PathBuf {
    let [mount] = mounts else { panic!("{mounts:?}") };
    let upper = mount.options.iter().find_map(|option| option.strip_prefix("upperdir="));
    PathBuf::from(upper.unwrap_or(&mount.source))
}

fn each(test: impl Fn(&Place)) {
    if !may_mount() {
        return;
    }
    for which in Which::ALL {
        test(&Place::new(which));
    }
}

#[test]
fn removed_snapshots_are_deleted_by_cleanup_and_not_before() {
    each(|place| {
        let snapshotter = place.open();
        commit(&*snapshotter, "base", None);
        let mounts = snapshotter.prepare("gone", Some("base"), &Labels::new()).unwrap();
        let files = folder_of(&mounts);
        fs::write(files.join("file"), "x").unwrap();
        snapshotter.prepare("kept", Some("base"), &Labels::new()).unwrap();
        snapshotter.remove("gone").unwrap();
        assert!(files.exists());
        snapshotter.cleanup().unwrap();
        assert!(!files.exists());
        assert_eq!(place.folders().len(), 2);
        snapshotter.cleanup().unwrap();
        assert_eq!(place.folders().len(), 2);
    });
}

#[test]
fn a_removal_survives_a_restart() {
    each(|place| {
        let snapshotter = place.open();
        commit(&*snapshotter, "base", None);
        snapshotter.prepare("gone", Some("base"), &Labels::new()).unwrap();
        snapshotter.remove("gone").unwrap();
        drop(snapshotter);
        let snapshotter = place.open();
        assert_eq!(snapshotter.stat("gone").unwrap_err().code(), ErrorCode::NotFound);
        snapshotter.cleanup().unwrap();
        assert_eq!(place.folders().len(), 1);
        assert_eq!(snapshotter.stat("base").unwrap().kind, Kind::Committed);
    });
}

#[test]
fn a_folder_without_record_is_deleted_and_its_id_not_used_again() {
    each(|place| {
        let snapshotter = place.open();
        commit(&*snapshotter, "base", None);
        drop(snapshotter);
        // The daemon died while it made the folder of the next ids.
        for id in ["2", "70"] {
            fs::create_dir_all(place.snapshots().join(id).join("fs/half")).unwrap();
        }
        let snapshotter = place.open();
        let mounts = snapshotter.prepare("next", None, &Labels::new()).unwrap();
        assert!(folder_of(&mounts).starts_with(place.snapshots().join("71")), "{mounts:?}");
        assert_eq!(fs::read_dir(folder_of(&mounts)).unwrap().count(), 0);
        snapshotter.cleanup().unwrap();
        assert_eq!(place.folders(), BTreeSet::from(["1".to_owned(), "71".to_owned()]));
    });
}

#[test]
fn what_is_not_a_snapshot_is_left_alone() {
    each(|place| {
        drop(place.open());
        fs::create_dir(place.snapshots().join("lost+found")).unwrap();
        fs::write(place.snapshots().join("note"), "").unwrap();
        let snapshotter = place.open();
        snapshotter.cleanup().unwrap();
        assert_eq!(place.folders().len(), 2);
    });
}

#[test]
fn ids_are_not_used_again_after_a_restart() {
    each(|place| {
        let mut seen = BTreeSet::new();
        for _ in 0..3 {
            let snapshotter = place.open();
            let mounts = snapshotter.prepare("key", None, &Labels::new()).unwrap();
            assert!(seen.insert(folder_of(&mounts)));
            snapshotter.remove("key").unwrap();
            snapshotter.cleanup().unwrap();
        }
    });
}

/// The record was on disk, the folders were not: nothing was promised about their contents, so an empty one is
/// what the snapshot is.
#[test]
fn an_active_snapshot_without_folder_begins_again() {
    if !may_mount() {
        return;
    }
    let place = Place::new(Which::Overlayfs);
    let snapshotter = place.open();
    commit(&*snapshotter, "base", None);
    let alone = snapshotter.prepare("alone", None, &Labels::new()).unwrap();
    let child = snapshotter.prepare("child", Some("base"), &Labels::new()).unwrap();
    let view = snapshotter.view("view", None, &Labels::new()).unwrap();
    drop(snapshotter);
    for mounts in [&alone, &child, &view] {
        fs::remove_dir_all(folder_of(mounts).parent().unwrap()).unwrap();
    }
    let snapshotter = place.open();
    for (key, mounts) in [("alone", &alone), ("child", &child), ("view", &view)] {
        assert_eq!(&snapshotter.mounts(key).unwrap(), mounts);
        let target = tempfile::tempdir().unwrap();
        davit_sys::mount::mount_all(mounts, target.path()).unwrap();
        davit_sys::mount::unmount_all(target.path()).unwrap();
    }
    // Half of the folders is as bad as none.
    drop(snapshotter);
    fs::remove_dir_all(folder_of(&child).parent().unwrap().join("work")).unwrap();
    fs::write(folder_of(&child).join("kept"), "x").unwrap();
    let snapshotter = place.open();
    assert!(folder_of(&child).parent().unwrap().join("work").exists());
    assert!(folder_of(&child).join("kept").exists());
    snapshotter.cleanup().unwrap();
    assert!(folder_of(&child).join("kept").exists());
}

/// Nothing can bring back the files of a committed snapshot, but it must not take others with it.
#[test]
fn a_committed_snapshot_without_folder_is_reported_where_it_is_needed() {
    each(|place| {
        let snapshotter = place.open();
        commit(&*snapshotter, "lost", None);
        commit(&*snapshotter, "kept", None);
        drop(snapshotter);
        fs::remove_dir_all(place.snapshots().join("1")).unwrap();
        let snapshotter = place.open();
        let error = snapshotter.prepare("child", Some("lost"), &Labels::new()).unwrap_err();
        assert_eq!(error.code(), ErrorCode::DataLoss, "{error}");
        snapshotter.prepare("other", Some("kept"), &Labels::new()).unwrap();
        snapshotter.remove("lost").unwrap();
        snapshotter.cleanup().unwrap();
        assert_eq!(snapshotter.list().unwrap().len(), 2);
    });
}

#[test]
fn cleanup_beside_other_calls_deletes_nothing_of_theirs() {
    each(|place| {
        let snapshotter = place.open();
        commit(&*snapshotter, "base", None);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let cleaner = scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    snapshotter.cleanup().unwrap();
                }
            });
            let makers: Vec<_> = (0..2)
                .map(|maker| {
                    let snapshotter = &snapshotter;
                    scope.spawn(move || {
                        for round in 0..30 {
                            let key = format!("{maker}-{round}");
                            let mounts = snapshotter.prepare(&key, Some("base"), &Labels::new()).unwrap();
                            fs::write(folder_of(&mounts).join("file"), &key).unwrap();
                            if round % 3 == 0 {
                                snapshotter.remove(&key).unwrap();
                            }
                        }
                    })
                })
                .collect();
            for maker in makers {
                maker.join().unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            cleaner.join().unwrap();
        });
        snapshotter.cleanup().unwrap();
        for info in snapshotter.list().unwrap() {
            if info.kind == Kind::Active {
                let files = folder_of(&snapshotter.mounts(&info.name).unwrap());
                assert_eq!(fs::read_to_string(files.join("file")).unwrap(), info.name);
            }
        }
        assert_eq!(place.folders().len(), 41);
    });
}

/// Whoever prepares on a parent that is being removed gets the whole parent or none.
#[test]
fn a_parent_removed_meanwhile_is_not_found() {
    each(|place| {
        let snapshotter = place.open();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let remover = scope.spawn(|| {
                for round in 0..40 {
                    let mounts = snapshotter.prepare("temporary", None, &Labels::new()).unwrap();
                    for name in 0..10 {
                        fs::write(folder_of(&mounts).join(name.to_string()), round.to_string()).unwrap();
                    }
                    snapshotter.commit("parent", "temporary", &Labels::new(), None).unwrap();
                    while let Err(error) = snapshotter.remove("parent") {
                        assert_eq!(error.code(), ErrorCode::FailedPrecondition, "{error}");
                    }
                    snapshotter.cleanup().unwrap();
                }
                done.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                match snapshotter.prepare("child", Some("parent"), &Labels::new()) {
                    Ok(mounts) => {
                        if matches!(place.which, Which::Native) {
                            assert_eq!(fs::read_dir(folder_of(&mounts)).unwrap().count(), 10);
                        }
                        snapshotter.remove("child").unwrap();
                    }
                    Err(error) => assert_eq!(error.code(), ErrorCode::NotFound, "{error}"),
                }
            }
            remover.join().unwrap();
        });
        snapshotter.cleanup().unwrap();
        assert_eq!(place.folders().len(), 0);
    });
}

#[test]
fn a_root_that_mount_options_cannot_hold_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a:b", "a,b", "a\\b"] {
        let root = folder.path().join(name);
        let db = database(
            &folder.path().join("databases").join(name.replace(|c: char| !c.is_alphanumeric(), "-")),
        );
        let error = davit_snapshotter::native::Native::open(&root, db).err().unwrap();
        assert_eq!(error.code(), ErrorCode::FailedPrecondition);
        assert!(!root.exists());
    }
    let error = davit_snapshotter::native::Native::open(Path::new("relative"), database(folder.path())).err();
    assert!(error.is_some());
}

#[test]
fn a_bad_mount_option_is_an_error_at_open() {
    if !may_mount() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = davit_snapshotter::overlayfs::Config {
        mount_options: vec!["nonsense=1".to_owned()],
        ..davit_snapshotter::overlayfs::Config::default()
    };
    let root = folder.path().join("root");
    let error =
        davit_snapshotter::overlayfs::Overlayfs::open(&root, database(folder.path()), config).err().unwrap();
    assert!(davit_model::error::chain(&error).contains("nonsense"), "{}", davit_model::error::chain(&error));
    assert!(!root.join("trial").exists());
}

#[test]
fn records_of_a_newer_version_are_refused() {
    each(|place| {
        drop(place.open());
        let db = database(place.folder.path());
        for name in ["overlayfs", "native"] {
            db.update(|txn| {
                txn.put(format!("snapshotter/{name}/version").as_bytes(), b"2");
                Ok::<(), davit_metadata::CommitError>(())
            })
            .unwrap();
        }
        let error = place.which.try_open(&place.folder.path().join("root"), db).err().unwrap();
        assert!(matches!(error, davit_snapshotter::Error::Version { .. }), "{error}");
    });
}

#[test]
fn a_record_that_cannot_be_read_is_reported() {
    each(|place| {
        drop(place.open());
        let db = database(place.folder.path());
        for name in ["overlayfs", "native"] {
            db.update(|txn| {
                txn.put(format!("snapshotter/{name}/snapshot/bad").as_bytes(), b"{\"id\":1");
                Ok::<(), davit_metadata::CommitError>(())
            })
            .unwrap();
        }
        let error = place.which.try_open(&place.folder.path().join("root"), db).err().unwrap();
        assert_eq!(error.code(), ErrorCode::DataLoss);
        assert!(error.to_string().contains("snapshot/bad"), "{error}");
    });
}

/// Whether blocks of the file have no place on the disk yet, which only writing them out gives them; `None` where the
/// filesystem does not say.
fn unwritten(path: &Path) -> Option<bool> {
    let output = Command::new("filefrag").arg("-v").arg(path).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).contains("delalloc"))
}

#[test]
fn a_commit_syncs_what_was_written_through_the_mounts() {
    each(|place| {
        let snapshotter = place.open();
        commit(&*snapshotter, "base", None);
        for parent in [None, Some("base")] {
            let mounts = snapshotter.prepare("active", parent, &Labels::new()).unwrap();
            let file = folder_of(&mounts).join("file");
            // Another test may sync the filesystem in between.
            let dirty = (0..100).any(|_| {
                fs::write(&file, vec![1; 1 << 16]).unwrap();
                unwritten(&file) == Some(true)
            });
            if !dirty {
                eprintln!("skipped: cannot see here what is not written yet");
                return;
            }
            let name = format!("on {parent:?}");
            snapshotter.commit(&name, "active", &Labels::new(), None).unwrap();
            assert_eq!(unwritten(&file), Some(false), "{:?} {name}", place.which);
        }
    });
}
