//! Layers over layers: what is written straight into the upper folder of an overlay must look, once mounted, like
//! the same archive unpacked over a copy of the tree.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use davit_model::Mount;
use davit_snapshotter::layer::{ApplyOptions, apply};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use crate::archive::{Archive, Meta};
use crate::tree::{self, Overlay, bind, is_root, list, scratch};

const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

fn apply_quietly(archive: &[u8], mounts: &[Mount]) {
    apply(archive, TAR, mounts, &ApplyOptions { sync: false }).unwrap();
}

#[test]
fn whiteouts_and_opaque_folders_hide_what_is_below() {
    if !is_root() {
        return;
    }
    let scratch = scratch();
    let overlay = Overlay::new(scratch.path(), 2);
    let lower = &overlay.lowers[1];
    fs::create_dir_all(lower.join("gone/deep")).unwrap();
    fs::create_dir_all(lower.join("opaque/deep")).unwrap();
    fs::create_dir_all(lower.join("again/deep")).unwrap();
    for file in ["gone/deep/f", "opaque/f", "opaque/deep/f", "again/deep/f", "file", "kept"] {
        fs::write(lower.join(file), "lower").unwrap();
    }
    let archive = Archive::new()
        .file("opaque/new", "new")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/later", "later")
        .file(".wh.gone", "")
        .file(".wh.file", "")
        .file(".wh.never-there", "")
        // Removed and made again in one layer: nothing of the old one may come back.
        .file(".wh.again", "")
        .folder("again")
        .file("again/new", "new");
    apply_quietly(&archive.finish(), &overlay.mounts());
    let metadata = fs::symlink_metadata(overlay.upper.join("gone")).unwrap();
    assert!(metadata.file_type().is_char_device());
    assert_eq!(metadata.rdev(), 0);
    let names = overlay.merged(|root| list(root, false).into_keys().collect::<Vec<_>>());
    let expected = ["again", "again/new", "kept", "opaque", "opaque/later", "opaque/new"];
    assert_eq!(names, expected.map(|name| Path::new(name).to_owned()));
}

#[test]
fn an_opaque_root_hides_every_layer_below() {
    if !is_root() {
        return;
    }
    let scratch = scratch();
    let overlay = Overlay::new(scratch.path(), 2);
    fs::write(overlay.lowers[0].join("near"), "").unwrap();
    fs::create_dir(overlay.lowers[1].join("common")).unwrap();
    fs::write(overlay.lowers[1].join("common/far"), "").unwrap();
    let archive = Archive::new().file(".wh..wh..opq", "").file("common/new", "").finish();
    apply_quietly(&archive, &overlay.mounts());
    let names = overlay.merged(|root| list(root, false).into_keys().collect::<Vec<_>>());
    assert_eq!(names, ["common", "common/new"].map(|name| Path::new(name).to_owned()));
}

#[test]
fn parents_look_as_they_do_below() {
    if !is_root() {
        return;
    }
    let scratch = scratch();
    let overlay = Overlay::new(scratch.path(), 2);
    let below = overlay.lowers[1].join("a/b");
    fs::create_dir_all(&below).unwrap();
    fs::write(below.join("old"), "").unwrap();
    nix::unistd::chown(&below, Some(12.into()), Some(34.into())).unwrap();
    fs::set_permissions(&below, std::os::unix::fs::PermissionsExt::from_mode(0o1770)).unwrap();
    let folder = fs::File::open(&below).unwrap();
    davit_sys::fs::set_xattr(std::os::fd::AsFd::as_fd(&folder), c"user.below", b"1").unwrap();
    folder.set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000, 5)).unwrap();
    apply_quietly(&Archive::new().file("a/b/new", "").finish(), &overlay.mounts());
    overlay.merged(|root| {
        let listing = list(root, true);
        let node = &listing[Path::new("a/b")];
        assert_eq!((node.mode & 0o7777, node.owner, node.time), (0o1770, (12, 34), Some((1_000_000, 5))));
        assert_eq!(node.xattrs[c"user.below"], b"1");
        assert!(listing.contains_key(Path::new("a/b/old")));
    });
}

#[test]
fn a_parent_does_not_look_like_a_folder_that_was_removed() {
    if !is_root() {
        return;
    }
    let removals: [fn() -> Archive; 4] = [
        || Archive::new().file(".wh.a", ""),
        || Archive::new().file("a/.wh..wh..opq", ""),
        || Archive::new().file(".wh.a", "").folder("a"),
        || Archive::new().file("a/.wh.b", ""),
    ];
    for (index, removal) in removals.iter().enumerate() {
        // By the layer itself, and by one between it and the layer that has the folder.
        for between in [false, true] {
            let scratch = scratch();
            let overlay = Overlay::new(scratch.path(), 2);
            let below = overlay.lowers[1].join("a/b/c");
            fs::create_dir_all(&below).unwrap();
            nix::unistd::chown(&below, Some(12.into()), Some(34.into())).unwrap();
            fs::set_permissions(&below, std::os::unix::fs::PermissionsExt::from_mode(0o1700)).unwrap();
            let layer = if between {
                let mut mounts = overlay.mounts();
                mounts[0].options = vec![
                    format!("upperdir={}", overlay.lowers[0].display()),
                    format!("lowerdir={}", overlay.lowers[1].display()),
                ];
                apply_quietly(&removal().finish(), &mounts);
                Archive::new()
            } else {
                removal()
            };
            apply_quietly(&layer.file("a/b/c/d/new", "").finish(), &overlay.mounts());
            overlay.merged(|root| {
                let listing = list(root, false);
                for folder in ["a/b", "a/b/c", "a/b/c/d"] {
                    let node = &listing[Path::new(folder)];
                    let found = (node.mode & 0o7777, node.owner);
                    assert_eq!(found, (0o755, (0, 0)), "{folder}: removal {index}, in between: {between}");
                }
            });
        }
    }
}

#[test]
fn a_snapshot_without_parent_keeps_its_whiteouts_for_a_later_one() {
    if !is_root() {
        return;
    }
    // What parallel unpacking asks for: an overlay that has nothing but an upper folder.
    let scratch = scratch();
    let overlay = Overlay::new(scratch.path(), 1);
    fs::write(overlay.lowers[0].join("file"), "").unwrap();
    let mut mounts = overlay.mounts();
    mounts[0].options = vec![format!("upperdir={}", overlay.upper.display())];
    apply_quietly(&Archive::new().file(".wh.file", "").file("new", "").finish(), &mounts);
    let names = overlay.merged(|root| list(root, false).into_keys().collect::<Vec<_>>());
    assert_eq!(names, [Path::new("new").to_owned()]);
}

#[test]
fn other_mounts_are_made_where_nobody_sees_them_and_are_gone_afterwards() {
    if !is_root() {
        return;
    }
    let scratch = scratch();
    fs::create_dir(scratch.path().join("root")).unwrap();
    fs::write(scratch.path().join("root/old"), "").unwrap();
    let mut mounts = bind(&scratch.path().join("root"), "rw");
    mounts[0].options.push("nosuid".into());
    let before = workspaces();
    let archive = Archive::new().file(".wh.old", "").file("new", "").finish();
    // The mount is there while the layer is read, but not for this process: when it is killed, nothing is left.
    let reader = Watched(archive.as_slice());
    apply(reader, TAR, &mounts, &ApplyOptions { sync: true }).unwrap();
    let names: Vec<_> = list(&scratch.path().join("root"), false).into_keys().collect();
    assert_eq!(names, [Path::new("new").to_owned()]);
    let error = apply(&b"no archive at all".repeat(99)[..], TAR, &mounts, &ApplyOptions::default());
    error.unwrap_err();
    mounts[0].options.push("ro".into());
    apply(Archive::new().file("x", "").finish().as_slice(), TAR, &mounts, &ApplyOptions::default())
        .unwrap_err();
    assert_eq!(tree::layer_mounts(), Vec::<String>::new());
    // Others may be at work in the same place; what is ours goes.
    let deadline = Instant::now() + Duration::from_secs(20);
    while workspaces().iter().any(|name| !before.contains(name)) {
        assert!(Instant::now() < deadline, "{:?}", workspaces());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A reader that looks for mounts whenever it is read.
struct Watched<'a>(&'a [u8]);

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        assert!(!workspaces().is_empty());
        assert_eq!(tree::layer_mounts(), Vec::<String>::new());
        self.0.read(buffer)
    }
}

fn workspaces() -> Vec<OsString> {
    let names = fs::read_dir(std::env::temp_dir()).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_str().is_some_and(|name| name.starts_with("davit-layer-"))).collect()
}

/// One step of a random archive.
#[derive(Debug, Clone)]
enum Step {
    File(String, u8),
    Folder(String, u32),
    Symlink(String),
    HardLink(String, String),
    Whiteout(String),
    Opaque(String),
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec("[abc]", 1..4).prop_map(|parts| parts.join("/"))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (path(), any::<u8>()).prop_map(|(path, data)| Step::File(path, data)),
        3 => (path(), 0_u32..0o1000).prop_map(|(path, mode)| Step::Folder(path, mode)),
        1 => path().prop_map(Step::Symlink),
        1 => (path(), path()).prop_map(|(path, target)| Step::HardLink(path, target)),
        2 => path().prop_map(Step::Whiteout),
        1 => path().prop_map(Step::Opaque),
    ]
}

impl Step {
    fn path(&self) -> &str {
        match self {
            Step::File(path, _)
            | Step::Folder(path, _)
            | Step::Symlink(path)
            | Step::HardLink(path, _)
            | Step::Whiteout(path)
            | Step::Opaque(path) => path,
        }
    }
}

/// The steps without the opaque markers of folders in which something was done before.
fn markers_first(steps: Vec<Step>) -> Vec<Step> {
    let mut kept: Vec<Step> = Vec::new();
    for step in steps {
        let late = matches!(step, Step::Opaque(_))
            && kept.iter().any(|before| {
                before.path() != step.path() && Path::new(before.path()).starts_with(step.path())
            });
        if !late {
            kept.push(step);
        }
    }
    kept
}

fn build(steps: &[Step]) -> Vec<u8> {
    let mut archive = Archive::new();
    for step in steps {
        archive = match step {
            Step::File(path, data) => archive.entry(path, b'0', "", &[*data], &Meta::default()),
            Step::Folder(path, mode) => archive.entry(path, b'5', "", b"", &Meta::mode(*mode)),
            Step::Symlink(path) => archive.symlink(&format!("{path}-link"), "target"),
            Step::HardLink(path, target) => archive.hard_link(&format!("{path}-hard"), target),
            Step::Whiteout(path) => {
                let (folder, base) = path.rsplit_once('/').unwrap_or((".", path));
                archive.file(&format!("{folder}/.wh.{base}"), "")
            }
            Step::Opaque(path) => archive.file(&format!("{path}/.wh..wh..opq"), ""),
        };
    }
    archive.finish()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// An opaque marker comes first in its folder here: what of the layer itself precedes it is shown by the test
    /// above, and a removal that precedes it cannot be told apart afterwards.
    #[test]
    fn an_upper_folder_looks_like_the_tree_itself(
        lowers in prop::collection::vec(prop::collection::vec(step(), 0..12), 1..3),
        steps in prop::collection::vec(step(), 0..14),
    ) {
        if !nix::unistd::geteuid().is_root() {
            return Ok(());
        }
        let scratch = scratch();
        let overlay = Overlay::new(scratch.path(), lowers.len());
        for (folder, steps) in overlay.lowers.iter().zip(&lowers) {
            // Lower layers without marks; entries that cannot be applied end the archive, which is as good.
            let plain: Vec<Step> = steps
                .iter()
                .filter(|step| matches!(step, Step::File(..) | Step::Folder(..) | Step::Symlink(..)))
                .cloned()
                .collect();
            let _ = apply(build(&plain).as_slice(), TAR, &bind(folder, "rw"), &ApplyOptions { sync: false });
        }
        let flat = scratch.path().join("flat");
        let view = overlay.merged(|root| {
            let status = Command::new("cp").arg("-a").arg(root).arg(&flat).status().unwrap();
            assert!(status.success());
            list(root, false)
        });
        tree::assert_same("copy", &view, &list(&flat, false));
        let archive = build(&markers_first(steps));
        let options = ApplyOptions { sync: false };
        let naive = apply(archive.as_slice(), TAR, &bind(&flat, "rw"), &options);
        let direct = apply(archive.as_slice(), TAR, &overlay.mounts(), &options);
        // A hard link to a file of a lower layer, or an entry below one, succeeds on one ground only.
        if let (Ok(naive), Ok(direct)) = (&naive, &direct) {
            prop_assert_eq!(naive, direct);
            let merged = overlay.merged(|root| list(root, false));
            let expected = list(&flat, false);
            for path in merged.keys().chain(expected.keys()) {
                let (left, right) = (merged.get(path), expected.get(path));
                if left != right {
                    let text = format!("{path:?}: overlay {left:?}, tree {right:?}");
                    return Err(TestCaseError::fail(text));
                }
            }
        }
    }
}

#[test]
fn symlinked_parents_of_lower_layers_are_not_followed() {
    if !is_root() {
        return;
    }
    // As in containerd and Docker: the upper folder knows nothing of the link, and gets a folder.
    let scratch = scratch();
    let overlay = Overlay::new(scratch.path(), 1);
    fs::create_dir_all(overlay.lowers[0].join("usr/lib")).unwrap();
    symlink("usr/lib", overlay.lowers[0].join("lib")).unwrap();
    apply_quietly(&Archive::new().file("lib/new", "").finish(), &overlay.mounts());
    assert!(fs::symlink_metadata(overlay.upper.join("lib")).unwrap().is_dir());
}
