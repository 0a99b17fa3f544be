//! What every [`Snapshotter`] must do, as tests that run on any of them: directly, or through an adapter that
//! carries the same trait over a socket.
//!
//! The cases are those of containerd's own suite, by behaviour, and some more. They mount for real, so they need
//! root. Each has a name of its own in all its keys and cleans up behind itself, so they can share a daemon.
#![allow(clippy::unwrap_used, reason = "this is test code, which other crates' tests use too")]

mod contents;
mod files;
mod lifecycle;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use davit_model::{Coded, ErrorCode, Labels, Mount};
use davit_sys::mount::{mount_all, unmount_all};

use crate::{Error, Snapshotter};

/// What implementations may differ in, beyond their capabilities.
#[derive(Debug, Clone, Copy)]
pub struct Traits {
    /// A folder of a parent can be renamed; overlayfs without `redirect_dir` cannot.
    pub renames_folders: bool,
    /// Usage counts only what differs from the parent.
    pub usage_excludes_parents: bool,
    /// An active snapshot takes one inode whatever it holds.
    pub active_is_file: bool,
    /// A committed one does.
    pub committed_is_file: bool,
}

impl Default for Traits {
    /// Those of overlayfs.
    fn default() -> Traits {
        Traits {
            renames_folders: false,
            usage_excludes_parents: true,
            active_is_file: false,
            committed_is_file: false,
        }
    }
}

/// One promise, to be checked.
type Check = fn(&Case<'_>);

/// All cases by name.
const CASES: &[(&str, Check)] = &[
    ("basic", lifecycle::basic),
    ("stat-active", lifecycle::stat_active),
    ("stat-committed", lifecycle::stat_committed),
    ("transitivity", lifecycle::transitivity),
    ("create-refused", lifecycle::create_refused),
    ("commit-refused", lifecycle::commit_refused),
    ("mounts-again", lifecycle::mounts_again),
    ("update", lifecycle::update),
    ("remove", lifecycle::remove),
    ("remove-intermediate", lifecycle::remove_intermediate),
    ("list", lifecycle::list),
    ("stat-while-listing", lifecycle::stat_while_listing),
    ("labels-are-not-inherited", lifecycle::labels_are_not_inherited),
    ("one-of-many", lifecycle::one_of_many),
    ("usage", contents::usage),
    ("view-is-read-only", contents::view_is_read_only),
    ("parents-do-not-change", contents::parents_do_not_change),
    ("rebase", contents::rebase),
    ("root-permission", contents::root_permission),
    ("layer-file-update", contents::layer_file_update),
    ("remove-folder-in-lower-layer", contents::remove_folder_in_lower_layer),
    ("layer-order", contents::layer_order),
    ("chown", contents::chown),
    ("folder-permission-on-commit", contents::folder_permission_on_commit),
    ("deleted-files-in-child", contents::deleted_files_in_child),
    ("move-file-from-lower-layer", contents::move_file_from_lower_layer),
    ("hard-links", contents::hard_links),
    ("special-files", contents::special_files),
    ("rename", contents::rename),
    ("128-layers", contents::many_layers),
];

/// Runs all cases, each in a folder of its own below `folder`, on the snapshotter that `make` answers for the
/// empty folder that it is given (or for a daemon that it knows).
///
/// # Panics
/// When a case fails, after all have run; the message names those that failed.
pub fn run(folder: &Path, traits: Traits, make: &dyn Fn(&Path) -> Arc<dyn Snapshotter>) {
    let mut failed = Vec::new();
    for (name, check) in CASES {
        let place = folder.join(name);
        let (root, work) = (place.join("root"), place.join("work"));
        std::fs::create_dir_all(&root).unwrap();
        std::fs::create_dir_all(&work).unwrap();
        let snapshotter = make(&root);
        let case = Case { name, snapshotter: &*snapshotter, work, traits, folders: AtomicUsize::new(0) };
        println!("case {name}");
        let result = catch_unwind(AssertUnwindSafe(|| check(&case)));
        let cleaned = catch_unwind(AssertUnwindSafe(|| case.clean()));
        if result.is_err() || cleaned.is_err() {
            failed.push(*name);
        }
        drop(snapshotter);
        crate::tree::remove(&place).unwrap();
    }
    assert!(failed.is_empty(), "failed: {failed:?}");
}

/// A snapshotter, and a place to mount.
struct Case<'a> {
    name: &'static str,
    snapshotter: &'a dyn Snapshotter,
    work: PathBuf,
    traits: Traits,
    folders: AtomicUsize,
}

/// Something mounted for as long as this lives.
struct Mounted {
    path: PathBuf,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount_all(&self.path).unwrap();
    }
}

impl std::ops::Deref for Mounted {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

impl Case<'_> {
    /// A key that no other case has.
    fn key(&self, name: &str) -> String {
        format!("suite/{}/{name}", self.name)
    }

    /// A new empty folder.
    fn folder(&self) -> PathBuf {
        let path = self.work.join(self.folders.fetch_add(1, Ordering::Relaxed).to_string());
        std::fs::create_dir(&path).unwrap();
        path
    }

    fn mount(&self, mounts: &[Mount]) -> Mounted {
        assert!(!mounts.is_empty());
        let path = self.folder();
        mount_all(mounts, &path).unwrap_or_else(|error| panic!("{}", davit_model::error::chain(&error)));
        Mounted { path }
    }

    fn prepare(&self, key: &str, parent: Option<&str>) -> Vec<Mount> {
        let parent = parent.map(|parent| self.key(parent));
        self.snapshotter.prepare(&self.key(key), parent.as_deref(), &labels(&[])).unwrap()
    }

    fn view(&self, key: &str, parent: Option<&str>) -> Vec<Mount> {
        let parent = parent.map(|parent| self.key(parent));
        self.snapshotter.view(&self.key(key), parent.as_deref(), &labels(&[])).unwrap()
    }

    fn commit(&self, name: &str, key: &str) {
        self.snapshotter.commit(&self.key(name), &self.key(key), &labels(&[]), None).unwrap();
    }

    /// Makes the committed snapshot `name` by a change to `parent`.
    fn layer(&self, name: &str, parent: Option<&str>, change: &dyn Fn(&Path)) {
        let active = format!("{name}-active");
        let mounted = self.mount(&self.prepare(&active, parent));
        change(&mounted);
        drop(mounted);
        self.commit(name, &active);
    }

    /// Makes one layer after the other, each by one of the changes, and compares each, and a view of the last one,
    /// with a plain folder that has seen the same changes.
    fn layers(&self, changes: &[&dyn Fn(&Path)]) {
        let flat = self.folder();
        files::mode(&flat, "", 0o755);
        let mut parent: Option<String> = None;
        for (index, change) in changes.iter().enumerate() {
            let active = format!("active-{index}");
            let mounted = self.mount(&self.prepare(&active, parent.as_deref()));
            files::assert_same(&flat, &mounted, &format!("layer {index} before its change"));
            change(&flat);
            change(&mounted);
            files::assert_same(&flat, &mounted, &format!("layer {index} after its change"));
            drop(mounted);
            let committed = format!("layer-{index}");
            self.commit(&committed, &active);
            parent = Some(committed);
        }
        let mounted = self.mount(&self.view("view", parent.as_deref()));
        files::assert_same(&flat, &mounted, "the view of all layers");
    }

    /// The names of this case's snapshots, without the part that all have, sorted.
    fn names(&self) -> Vec<String> {
        let prefix = self.key("");
        let all = self.snapshotter.list().unwrap();
        let mut names: Vec<String> =
            all.iter().filter_map(|info| info.name.strip_prefix(&prefix).map(str::to_owned)).collect();
        names.sort();
        names
    }

    /// Removes all that the case has made, children first.
    fn clean(&self) {
        loop {
            let names = self.names();
            if names.is_empty() {
                // All that was made is gone with that.
                return self.snapshotter.cleanup().unwrap();
            }
            let removed =
                names.iter().filter(|name| self.snapshotter.remove(&self.key(name)).is_ok()).count();
            assert!(removed > 0, "cannot remove any of {names:?}");
        }
    }
}

/// Labels that keep a snapshot from being collected as garbage by a daemon, and more.
fn labels(more: &[(&str, &str)]) -> Labels {
    let root = ("containerd.io/gc.root", "2020-01-01T00:00:00Z");
    more.iter().chain([&root]).map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn assert_code<T: std::fmt::Debug>(result: Result<T, Error>, code: ErrorCode) {
    match result {
        Ok(value) => panic!("{code:?} expected, got {value:?}"),
        Err(error) => assert_eq!(error.code(), code, "{}", davit_model::error::chain(&error)),
    }
}

fn assert_between(time: SystemTime, from: SystemTime, to: SystemTime) {
    assert!(from <= time && time <= to, "{time:?} is not between {from:?} and {to:?}");
}
