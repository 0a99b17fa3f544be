//! The states that a crash leaves, made by hand, and what opening and cleaning up make of them.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use davit_model::{Coded, ErrorCode, Labels};
use davit_snapshotter::blockfile::{self, Blockfile};
use davit_snapshotter::{Kind, Snapshotter};

use super::ground::Ground;
use super::{Files, Which, database, may_mount, place_of};

struct Place {
    ground: Ground,
    which: Which,
}

impl Place {
    fn new(which: Which) -> Option<Place> {
        Some(Place { ground: Ground::new(which)?, which })
    }

    /// Opens the snapshotter, as a new daemon would.
    fn open(&self) -> std::sync::Arc<dyn Snapshotter> {
        self.which.open(&self.root(), database(self.ground.path()))
    }

    fn root(&self) -> PathBuf {
        self.ground.path().join("root")
    }

    fn snapshots(&self) -> PathBuf {
        self.root().join("snapshots")
    }

    fn folders(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.snapshots()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Takes the files of a snapshot away, as a crash or an administrator does.
    fn lose(&self, id: &str) {
        let path = self.snapshots().join(id);
        match self.which {
            Which::Overlayfs | Which::Native | Which::Erofs => fs::remove_dir_all(path).unwrap(),
            Which::Blockfile => fs::remove_file(path).unwrap(),
            Which::Btrfs => {
                let parent = fs::File::open(self.snapshots()).unwrap();
                davit_sys::btrfs::delete_subvolume(parent.as_fd(), &CString::new(id).unwrap()).unwrap();
            }
        }
    }
}

fn commit(snapshotter: &dyn Snapshotter, name: &str, parent: Option<&str>) {
    snapshotter.prepare("temporary", parent, &Labels::new()).unwrap();
    snapshotter.commit(name, "temporary", &Labels::new(), None).unwrap();
}

fn each(test: impl Fn(&Place)) {
    for which in Which::ALL {
        if let Some(place) = Place::new(which) {
            println!("{which:?}");
            test(&place);
            place.ground.assert_unused();
        }
    }
}

#[test]
fn removed_snapshots_are_deleted_by_cleanup_and_not_before() {
    each(|place| {
        let snapshotter = place.open();
        commit(&*snapshotter, "base", None);
        let mounts = snapshotter.prepare("gone", Some("base"), &Labels::new()).unwrap();
        let files = place_of(&mounts);
        fs::write(Files::of(&mounts).join("file"), "x").unwrap();
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
        assert!(place_of(&mounts).starts_with(place.snapshots().join("71")), "{mounts:?}");
        assert_eq!(fs::read_dir(&*Files::of(&mounts)).unwrap().count(), 0);
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
            assert!(seen.insert(place_of(&mounts)));
            snapshotter.remove("key").unwrap();
            snapshotter.cleanup().unwrap();
        }
    });
}

/// The record was on disk, the folders were not: nothing was promised about their contents, so an empty one is
/// what the snapshot is.
#[test]
fn an_active_snapshot_without_folder_begins_again() {
    for which in [Which::Overlayfs, Which::Erofs] {
        let Some(place) = Place::new(which) else { continue };
        begins_again(&place);
        place.ground.assert_unused();
    }
}

fn begins_again(place: &Place) {
    let snapshotter = place.open();
    commit(&*snapshotter, "base", None);
    let alone = snapshotter.prepare("alone", None, &Labels::new()).unwrap();
    let child = snapshotter.prepare("child", Some("base"), &Labels::new()).unwrap();
    let view = snapshotter.view("view", None, &Labels::new()).unwrap();
    drop(snapshotter);
    for mounts in [&alone, &child, &view] {
        fs::remove_dir_all(place_of(mounts).parent().unwrap()).unwrap();
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
    fs::remove_dir_all(place_of(&child).parent().unwrap().join("work")).unwrap();
    fs::write(place_of(&child).join("kept"), "x").unwrap();
    let snapshotter = place.open();
    assert!(place_of(&child).parent().unwrap().join("work").exists());
    assert!(place_of(&child).join("kept").exists());
    snapshotter.cleanup().unwrap();
    assert!(place_of(&child).join("kept").exists());
}

/// Nothing can bring back the files of a committed snapshot, but it must not take others with it.
#[test]
fn a_committed_snapshot_without_folder_is_reported_where_it_is_needed() {
    each(|place| {
        let snapshotter = place.open();
        commit(&*snapshotter, "lost", None);
        commit(&*snapshotter, "kept", None);
        drop(snapshotter);
        place.lose("1");
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
                            fs::write(Files::of(&mounts).join("file"), &key).unwrap();
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
                let files = Files::of(&snapshotter.mounts(&info.name).unwrap());
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
                    let files = Files::of(&mounts);
                    for name in 0..10 {
                        fs::write(files.join(name.to_string()), round.to_string()).unwrap();
                    }
                    drop(files);
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
                        if place.which != Which::Overlayfs && place.which != Which::Erofs {
                            assert_eq!(fs::read_dir(&*Files::of(&mounts)).unwrap().count(), 10);
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
        let db = database(place.ground.path());
        for name in Which::ALL.map(Which::name) {
            db.update(|txn| {
                txn.put(format!("snapshotter/{name}/version").as_bytes(), b"2");
                Ok::<(), davit_metadata::CommitError>(())
            })
            .unwrap();
        }
        let error = place.which.try_open(&place.root(), db).err().unwrap();
        assert!(matches!(error, davit_snapshotter::Error::Version { .. }), "{error}");
    });
}

#[test]
fn a_record_that_cannot_be_read_is_reported() {
    each(|place| {
        drop(place.open());
        let db = database(place.ground.path());
        for name in Which::ALL.map(Which::name) {
            db.update(|txn| {
                txn.put(format!("snapshotter/{name}/snapshot/bad").as_bytes(), b"{\"id\":1");
                Ok::<(), davit_metadata::CommitError>(())
            })
            .unwrap();
        }
        let error = place.which.try_open(&place.root(), db).err().unwrap();
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
            let file = match place.which {
                Which::Blockfile => place_of(&mounts),
                _ => place_of(&mounts).join("file"),
            };
            // Another test may sync the filesystem in between.
            let dirty = (0..100).any(|round| {
                fs::write(Files::of(&mounts).join("file"), vec![round; 1 << 16]).unwrap();
                unwritten(&file) == Some(true)
            });
            if !dirty {
                eprintln!("skipped: cannot see here what is not written yet");
                return;
            }
            let name = format!("on {parent:?}");
            snapshotter.commit(&name, "active", &Labels::new(), None).unwrap();
            let place_now = match place.which {
                Which::Erofs => place_of(&mounts).with_file_name("layer.erofs"),
                _ => file,
            };
            assert_eq!(unwritten(&place_now), Some(false), "{:?} {name}", place.which);
        }
    });
}

/// Of a commit that a crash has cut off nothing is seen: the snapshot is active, and can be written to and committed.
#[test]
fn an_unfinished_commit_is_as_good_as_none() {
    each(|place| {
        let snapshotter = place.open();
        let mounts = snapshotter.prepare("active", None, &Labels::new()).unwrap();
        fs::write(Files::of(&mounts).join("before"), "x").unwrap();
        drop(snapshotter);
        let place_now = place_of(&mounts);
        match place.which {
            Which::Overlayfs | Which::Native | Which::Blockfile => {}
            Which::Btrfs => {
                let subvolume = fs::File::open(&place_now).unwrap();
                davit_sys::btrfs::set_read_only(subvolume.as_fd(), true).unwrap();
            }
            Which::Erofs => {
                for name in ["layer.erofs", "layer.new"] {
                    fs::write(place_now.with_file_name(name), "half").unwrap();
                }
            }
        }
        let snapshotter = place.open();
        fs::write(Files::of(&mounts).join("after"), "x").unwrap();
        snapshotter.commit("name", "active", &Labels::new(), None).unwrap();
        let mounts = snapshotter.view("view", Some("name"), &Labels::new()).unwrap();
        assert_eq!(fs::read_dir(&*Files::shown(&mounts)).unwrap().count(), 2);
    });
}

/// What an image was made of is deleted once it is committed; if a crash came first, then at the next start.
#[test]
fn an_image_stands_alone() {
    let Some(place) = Place::new(Which::Erofs) else { return };
    let snapshotter = place.open();
    commit(&*snapshotter, "base", None);
    let names = || {
        let entries = fs::read_dir(place.snapshots().join("1")).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect::<BTreeSet<_>>()
    };
    let whole = BTreeSet::from([".erofslayer".into(), "layer.erofs".into()]);
    assert_eq!(names(), whole);
    drop(snapshotter);
    for name in ["fs", "work"] {
        fs::create_dir_all(place.snapshots().join("1").join(name).join("rest")).unwrap();
    }
    place.open();
    assert_eq!(names(), whole);
}

/// Of several commits of one snapshot one wins, and what it has committed is all that there was.
#[test]
fn of_commits_at_once_one_wins() {
    each(|place| {
        let snapshotter = place.open();
        for round in 0..10 {
            let mounts = snapshotter.prepare("active", None, &Labels::new()).unwrap();
            fs::write(Files::of(&mounts).join("file"), "x").unwrap();
            let won: Vec<usize> = std::thread::scope(|scope| {
                let commit = |number: usize| {
                    let snapshotter = &snapshotter;
                    let name = format!("{round}-{number}");
                    scope.spawn(move || snapshotter.commit(&name, "active", &Labels::new(), None).is_ok())
                };
                let commits: Vec<_> = (0..3).map(commit).collect();
                let won = commits.into_iter().enumerate();
                won.filter_map(|(number, commit)| commit.join().unwrap().then_some(number)).collect()
            });
            assert_eq!(won.len(), 1);
            let name = format!("{round}-{}", won[0]);
            let mounts = snapshotter.view("view", Some(&name), &Labels::new()).unwrap();
            assert!(Files::shown(&mounts).join("file").exists());
            snapshotter.remove("view").unwrap();
            if place.which == Which::Native || place.which == Which::Btrfs {
                let child = snapshotter.prepare("child", Some(&name), &Labels::new()).unwrap();
                fs::write(Files::of(&child).join("own"), "x").unwrap();
                snapshotter.remove("child").unwrap();
            }
        }
    });
}

/// A subvolume cannot be deleted as long as it holds others, which a container can make.
#[test]
fn subvolumes_in_subvolumes_are_deleted() {
    let Some(place) = Place::new(Which::Btrfs) else { return };
    let snapshotter = place.open();
    let mounts = snapshotter.prepare("active", None, &Labels::new()).unwrap();
    let folder = fs::File::open(place_of(&mounts)).unwrap();
    davit_sys::btrfs::create_subvolume(folder.as_fd(), c"inner").unwrap();
    fs::write(place_of(&mounts).join("inner/file"), "x").unwrap();
    drop(folder);
    snapshotter.commit("name", "active", &Labels::new(), None).unwrap();
    assert!(
        fs::write(place_of(&mounts).join("new"), "x").is_err(),
        "a committed snapshot cannot be written to"
    );
    snapshotter.remove("name").unwrap();
    snapshotter.cleanup().unwrap();
    assert_eq!(place.folders().len(), 0);
}

#[test]
fn what_a_snapshotter_needs_is_asked_for_at_open() {
    let Some(ground) = Ground::new(Which::Overlayfs) else { return };
    let root = ground.path().join("root");
    let error = Which::Btrfs.try_open(&root, database(ground.path())).err().unwrap();
    assert_eq!(error.code(), ErrorCode::FailedPrecondition);
    assert!(error.to_string().ends_with("skip plugin"), "{error}");
    let open = |config| Blockfile::open(&root, database(ground.path()), config);
    let error = open(blockfile::Config::default()).err().unwrap();
    assert!(error.to_string().ends_with("skip plugin"), "{error}");
    assert!(!root.exists());
    let missing = blockfile::Config { scratch_file: Some(root.join("none")), ..Default::default() };
    assert!(open(missing.clone()).is_err());
    // A scratch file that is there is enough, and is not copied again.
    let image = ground.path().join("image");
    fs::write(&image, "one").unwrap();
    let config = blockfile::Config { scratch_file: Some(image.clone()), ..Default::default() };
    open(config.clone()).unwrap();
    fs::write(&image, "other").unwrap();
    open(missing).unwrap();
    open(config.clone()).unwrap();
    assert_eq!(fs::read_to_string(root.join("scratch")).unwrap(), "one");
    open(blockfile::Config { recreate_scratch: true, ..config }).unwrap();
    assert_eq!(fs::read_to_string(root.join("scratch")).unwrap(), "other");
}
