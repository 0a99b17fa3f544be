//! Bundles on a real filesystem.
#![allow(clippy::unwrap_used)] // helpers of tests, too, fail by panicking

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use davit_shim_protocol::bootstrap::StartResult;
use davit_shim_protocol::bundle::{self, Bundle, BundleError};

struct Roots {
    folder: tempfile::TempDir,
}

impl Roots {
    fn new() -> Roots {
        Roots { folder: tempfile::tempdir().unwrap() }
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    fn bundle(&self, id: &str) -> Bundle {
        Bundle::new(&self.state(), &self.root(), "space", id)
    }

    /// Everything below the two roots that is no namespace folder.
    fn left(&self) -> Vec<PathBuf> {
        let spaces = [self.state().join("space"), self.root().join("space")];
        let entries = spaces.iter().filter_map(|space| fs::read_dir(space).ok()).flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn is_root() -> bool {
    let root = nix::unistd::Uid::effective().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

#[test]
fn a_bundle_has_what_shims_expect() {
    let roots = Roots::new();
    let bundle = roots.bundle("c");
    let spec = br#"{ "ociVersion":"1.0.2",  "annotations": {"x": "y"}, "unknown": [1,  2] }"#;
    bundle.create(Some(spec)).unwrap();
    assert_eq!(fs::read(bundle.path().join("config.json")).unwrap(), spec, "byte for byte");
    assert_eq!(mode(bundle.path()), 0o700);
    assert_eq!(mode(bundle.path().parent().unwrap()), 0o711);
    assert_eq!(mode(&bundle.path().join("rootfs")), 0o711);
    assert_eq!(fs::read_link(bundle.path().join("work")).unwrap(), roots.root().join("space/c"));
    assert!(bundle.path().join("work").is_dir());
    assert!(fs::metadata(bundle.log()).unwrap().file_type().is_fifo());
    assert_eq!(bundle.annotation(&["a", "x"]).unwrap().as_deref(), Some("y"));
    assert_eq!(bundle.annotation(&["a"]).unwrap(), None);
    assert!(matches!(bundle.create(Some(spec)), Err(BundleError::Exists { .. })));
    assert!(bundle.path().join("config.json").exists(), "the one that exists is not touched");
    bundle.delete().unwrap();
    bundle.delete().unwrap();
    assert_eq!(roots.left(), [] as [PathBuf; 0]);
}

#[test]
fn a_mapped_root_may_pass_through() {
    if !is_root() {
        return;
    }
    let roots = Roots::new();
    let bundle = roots.bundle("c");
    let spec = br#"{"annotations":null,"linux":{"gidMappings":[{"containerID":0,"hostID":4000,"size":10}]}}"#;
    bundle.create(Some(spec)).unwrap();
    let metadata = fs::metadata(bundle.path()).unwrap();
    assert_eq!((metadata.gid(), metadata.permissions().mode() & 0o7777), (4000, 0o710));
    bundle.delete().unwrap();
}

#[test]
fn a_spec_that_is_none_leaves_nothing() {
    let roots = Roots::new();
    assert!(matches!(roots.bundle("c").create(Some(b"{")), Err(BundleError::Spec { .. })));
    assert_eq!(roots.left(), [] as [PathBuf; 0]);
    roots.bundle("c").create(None).unwrap();
    assert!(!roots.bundle("c").path().join("config.json").exists());
}

#[test]
fn the_rest_of_a_crash_is_no_obstacle() {
    let roots = Roots::new();
    let bundle = roots.bundle("c");
    let (half, work) = (roots.state().join("space/.c/rootfs"), roots.root().join("space/c/old"));
    fs::create_dir_all(&half).unwrap();
    fs::create_dir_all(&work).unwrap();
    bundle.create(Some(b"{}")).unwrap();
    assert!(!work.exists() && !half.exists());
    bundle.delete().unwrap();
    assert_eq!(roots.left(), [] as [PathBuf; 0]);
}

#[test]
fn what_it_says_of_its_shim_is_read_back() {
    let roots = Roots::new();
    let bundle = roots.bundle("c");
    bundle.create(None).unwrap();
    assert_eq!(bundle.read_bootstrap().unwrap(), None);
    assert_eq!(bundle.read_binary().unwrap(), None);
    assert_eq!(bundle.init_pid(), 0);
    fs::write(bundle.path().join("address"), "").unwrap();
    assert_eq!(bundle.read_bootstrap().unwrap(), None);
    fs::write(bundle.path().join("address"), "unix:///run/s/old").unwrap();
    assert_eq!(bundle.read_bootstrap().unwrap().unwrap().address, "unix:///run/s/old");
    let told = StartResult { version: 3, address: "unix:///run/s/new".into(), protocol: "ttrpc".into() };
    bundle.write_bootstrap(&told).unwrap();
    assert_eq!(bundle.read_bootstrap().unwrap(), Some(told));
    bundle.write_binary(Path::new("/usr/bin/shim")).unwrap();
    assert_eq!(bundle.read_binary().unwrap().unwrap(), Path::new("/usr/bin/shim"));
    bundle.write_sandbox("pod").unwrap();
    assert_eq!(bundle.read_sandbox().unwrap().as_deref(), Some("pod"));
    fs::write(bundle.path().join("init.pid"), "42\n").unwrap();
    assert_eq!(bundle.init_pid(), 42);
    fs::write(bundle.path().join("bootstrap.json"), "nonsense").unwrap();
    assert!(matches!(bundle.read_bootstrap(), Err(BundleError::Address { .. })));
}

#[test]
fn deletion_unmounts_and_does_not_touch_what_was_mounted() {
    if !is_root() {
        return;
    }
    let roots = Roots::new();
    let bundle = roots.bundle("c");
    bundle.create(None).unwrap();
    let precious = roots.folder.path().join("precious");
    fs::create_dir_all(precious.join("below")).unwrap();
    fs::write(precious.join("file"), "x").unwrap();
    let rootfs = bundle.path().join("rootfs");
    for target in [&rootfs, &rootfs, &rootfs.join("below")] {
        nix::mount::mount(Some(&precious), target, None::<&str>, nix::mount::MsFlags::MS_BIND, None::<&str>)
            .unwrap();
    }
    bundle.delete().unwrap();
    assert_eq!(fs::read(precious.join("file")).unwrap(), b"x");
    assert_eq!(roots.left(), [] as [PathBuf; 0]);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(roots.folder.path().to_str().unwrap()), "{mounts}");
}

#[test]
fn what_is_stale_is_put_aside_and_removed() {
    let roots = Roots::new();
    let space = roots.state().join("space");
    for name in ["keep", ".half", "not known", ".stale--0"] {
        fs::create_dir_all(space.join(name).join("rootfs")).unwrap();
    }
    let stale = bundle::set_aside(&space, |name| name == "keep").unwrap();
    assert_eq!(stale.len(), 3);
    // Names are free at once.
    fs::create_dir(space.join(".half")).unwrap();
    for path in stale {
        bundle::remove_stale(&path).unwrap();
    }
    let mut left: Vec<_> = roots.left();
    left.sort();
    assert_eq!(left, [space.join(".half"), space.join("keep")]);
    assert_eq!(bundle::set_aside(&roots.state().join("missing"), |_| true).unwrap().len(), 0);
}

/// The id is free as soon as a bundle is put away, however long its files stay; what a daemon that dies leaves of it is
/// found by the next one, whose own names do not collide with it.
#[test]
fn an_id_is_free_before_its_files_are_gone() {
    let roots = Roots::new();
    let bundle = roots.bundle("box");
    let away: Vec<_> = (0..3)
        .map(|_| {
            bundle.create(Some(b"{}")).unwrap();
            let away = bundle.put_away().unwrap();
            assert!(!bundle.path().exists());
            away
        })
        .collect();
    bundle.create(Some(b"{}")).unwrap();
    assert_eq!(roots.left().len(), 2 * 4);
    let mut away = away.into_iter();
    away.next().unwrap().remove().unwrap();
    assert_eq!(roots.left().len(), 2 * 3);
    drop(away);

    let mut stale = bundle::set_aside(&roots.state().join("space"), |name| name == "box").unwrap();
    stale.extend(bundle::set_aside(&roots.root().join("space"), |name| name == "box").unwrap());
    assert_eq!(stale.len(), 2 * 2);
    bundle.delete().unwrap();
    assert_eq!(roots.left().len(), 2 * 2, "a later deletion leaves what is put aside alone");
    stale.iter().for_each(|path| bundle::remove_stale(path).unwrap());
    assert_eq!(roots.left(), Vec::<PathBuf>::new());
    bundle.put_away().unwrap().remove().unwrap();
}
