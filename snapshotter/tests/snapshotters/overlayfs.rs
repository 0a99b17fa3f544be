//! What only overlayfs has: the exact mounts that clients see, the layout on disk, id mappings.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use davit_model::{Coded, ErrorCode, Labels, Mount};
use davit_snapshotter::overlayfs::{Config, Overlayfs};
use davit_snapshotter::{GID_MAPPING_LABEL, Snapshotter, UID_MAPPING_LABEL};
use davit_sys::mount::{mount_all, unmount_all};

use super::{database, may_mount};

struct Place {
    folder: tempfile::TempDir,
    root: PathBuf,
    snapshotter: Overlayfs,
}

fn place(config: Config) -> Place {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    let snapshotter = Overlayfs::open(&root, database(folder.path()), config).unwrap();
    Place { folder, root, snapshotter }
}

impl Place {
    fn path(&self, id: u64, name: &str) -> String {
        self.root.join(format!("snapshots/{id}/{name}")).display().to_string()
    }

    fn layer(&self, name: &str, parent: Option<&str>, change: impl FnOnce(&Path)) {
        let mounts = self.snapshotter.prepare("layer", parent, &Labels::new()).unwrap();
        self.mounted(&mounts, change);
        self.snapshotter.commit(name, "layer", &Labels::new(), None).unwrap();
    }

    fn mounted(&self, mounts: &[Mount], test: impl FnOnce(&Path)) {
        let target = tempfile::tempdir_in(self.folder.path()).unwrap();
        mount_all(mounts, target.path()).unwrap();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(target.path())));
        unmount_all(target.path()).unwrap();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    }
}

fn mount(kind: &str, source: String, options: &[String]) -> Vec<Mount> {
    vec![Mount { kind: kind.into(), source, target: String::new(), options: options.to_vec() }]
}

#[test]
fn the_mounts_are_those_that_clients_know() {
    if !may_mount() {
        return;
    }
    let place = place(Config { mount_options: vec!["metacopy=off".into()], ..Config::default() });
    let snapshotter = &place.snapshotter;
    let none = Labels::new();
    let plain = |mode: &str| [mode.to_owned(), "rbind".to_owned()];
    let more = ["metacopy=off".to_owned(), "index=off".to_owned()];

    let mounts = snapshotter.prepare("a", None, &none).unwrap();
    assert_eq!(mounts, mount("bind", place.path(1, "fs"), &plain("rw")));
    snapshotter.commit("base", "a", &none, None).unwrap();
    assert_eq!(
        snapshotter.view("v1", None, &none).unwrap(),
        mount("bind", place.path(2, "fs"), &plain("ro"))
    );
    let mounts = snapshotter.view("v2", Some("base"), &none).unwrap();
    assert_eq!(mounts, mount("bind", place.path(1, "fs"), &plain("ro")));
    let mounts = snapshotter.prepare("b", Some("base"), &none).unwrap();
    let mut options = vec![
        format!("workdir={}", place.path(4, "work")),
        format!("upperdir={}", place.path(4, "fs")),
        format!("lowerdir={}", place.path(1, "fs")),
    ];
    options.extend(more.clone());
    assert_eq!(mounts, mount("overlay", "overlay".into(), &options));
    snapshotter.commit("top", "b", &none, None).unwrap();
    let mounts = snapshotter.view("v3", Some("top"), &none).unwrap();
    let mut options = vec![format!("lowerdir={}:{}", place.path(4, "fs"), place.path(1, "fs"))];
    options.extend(more);
    assert_eq!(mounts, mount("overlay", "overlay".into(), &options));
    place.mounted(&mounts, |_| {});
}

#[test]
fn nobody_else_gets_into_the_folders() {
    if !may_mount() {
        return;
    }
    let place = place(Config::default());
    place.snapshotter.prepare("a", None, &Labels::new()).unwrap();
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(place.root.clone()), 0o700);
    assert_eq!(mode(place.root.join("snapshots")), 0o700);
    assert_eq!(mode(place.root.join("snapshots/1")), 0o700);
    assert_eq!(mode(place.root.join("snapshots/1/fs")), 0o755);
    assert_eq!(mode(place.root.join("snapshots/1/work")), 0o711);
    assert_eq!(fs::read_dir(&place.root).unwrap().count(), 1, "the trial has left nothing");
}

#[test]
fn says_where_and_what_it_is() {
    if !may_mount() {
        return;
    }
    let place = place(Config { upperdir_label: true, ..Config::default() });
    let snapshotter = &place.snapshotter;
    assert_eq!(snapshotter.exports()["root"], place.root.display().to_string());
    assert_eq!(snapshotter.capabilities(), ["remap-ids", "only-remap-ids", "rebase"]);
    snapshotter.prepare("a", None, &Labels::new()).unwrap();
    let label = "containerd.io/snapshot/overlay.upperdir";
    assert_eq!(snapshotter.stat("a").unwrap().labels[label], place.path(1, "fs"));
    assert_eq!(snapshotter.list().unwrap()[0].labels[label], place.path(1, "fs"));
    // It is not stored.
    let updated = snapshotter.update("a", &Labels::new(), &[]).unwrap();
    assert_eq!(updated.labels[label], place.path(1, "fs"));
}

#[test]
fn mapped_snapshots_belong_to_the_mapped_root() {
    if !may_mount() {
        return;
    }
    let place = place(Config::default());
    place.layer("base", None, |root| {
        fs::write(root.join("file"), "x").unwrap();
        std::os::unix::fs::chown(root.join("file"), Some(3), Some(4)).unwrap();
    });
    place.layer("top", Some("base"), |root| fs::write(root.join("other"), "x").unwrap());
    let mapping = Labels::from([
        (UID_MAPPING_LABEL.to_owned(), "0:100000:65536".to_owned()),
        (GID_MAPPING_LABEL.to_owned(), "0:200000:65536".to_owned()),
    ]);
    let owner = |path: &Path| {
        let metadata = path.metadata().unwrap();
        (metadata.uid(), metadata.gid())
    };
    let snapshotter = &place.snapshotter;
    for (key, parent) in [("one", "base"), ("two", "top")] {
        let mounts = snapshotter.prepare(key, Some(parent), &mapping).unwrap();
        assert_eq!(mounts[0].options[..2], ["uidmap=0:100000:65536", "gidmap=0:200000:65536"]);
        place.mounted(&mounts, |root| {
            assert_eq!(owner(root), (100_000, 200_000));
            assert_eq!(owner(&root.join("file")), (100_003, 200_004));
        });
    }
    let mounts = snapshotter.view("view-one", Some("base"), &mapping).unwrap();
    place.mounted(&mounts, |root| assert_eq!(owner(&root.join("file")), (100_003, 200_004)));
    let mounts = snapshotter.view("view-two", Some("top"), &mapping).unwrap();
    place.mounted(&mounts, |root| assert_eq!(owner(&root.join("other")), (100_000, 200_000)));
    // Without a parent there is nothing to map, and the folder itself is the mapped root's.
    let mounts = snapshotter.prepare("alone", None, &mapping).unwrap();
    place.mounted(&mounts, |root| assert_eq!(owner(root), (100_000, 200_000)));
}

#[test]
fn bad_mappings_are_refused_and_make_nothing() {
    if !may_mount() {
        return;
    }
    let place = place(Config::default());
    for (users, groups) in [
        (Some("0:1:2"), None),
        (None, Some("0:1:2")),
        (Some("0:1"), Some("0:1:2")),
        (Some("1:1:2"), Some("0:1:2")),
        (Some("0:-1:2"), Some("0:1:2")),
        (Some("0:1:2,upperdir=/etc"), Some("0:1:2")),
        (Some("0:4294967295:2"), Some("0:1:2")),
    ] {
        let label = |key: &str, value: Option<&str>| value.map(|value| (key.to_owned(), value.to_owned()));
        let labels: Labels =
            label(UID_MAPPING_LABEL, users).into_iter().chain(label(GID_MAPPING_LABEL, groups)).collect();
        let error = place.snapshotter.prepare("key", None, &labels).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument, "{labels:?}");
    }
    assert_eq!(fs::read_dir(place.root.join("snapshots")).unwrap().count(), 0);
}
