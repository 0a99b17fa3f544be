//! A museum of hostile archives. Each is applied to an empty folder, to a folder with a tree, and to the upper
//! folder of an overlay; beside the root lies a canary that must not change in any way.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use davit_model::{Coded, ErrorCode, Mount};
use davit_snapshotter::layer::{ApplyOptions, EntryFault, Error, apply};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use crate::archive::{Archive, Meta, record};
use crate::tree::{self, Listing, Overlay, bind, is_root, list, scratch};

const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// A root to apply to, and what must stay as it is.
struct Arena {
    scratch: tempfile::TempDir,
    canary: Listing,
    root: PathBuf,
    mounts: Vec<Mount>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ground {
    Empty,
    Full,
    Upper,
}

impl Arena {
    fn new(ground: Ground) -> Arena {
        let scratch = scratch();
        let outside = scratch.path().join("outside");
        fs::create_dir_all(outside.join("folder")).unwrap();
        fs::write(outside.join("canary"), "alive").unwrap();
        fs::write(outside.join("folder/canary"), "alive").unwrap();
        fs::set_permissions(outside.join("folder"), Permissions::from_mode(0o750)).unwrap();
        let canary = list(&outside, true);
        let (root, mounts) = match ground {
            Ground::Empty | Ground::Full => {
                let root = scratch.path().join("root");
                fs::create_dir(&root).unwrap();
                (root.clone(), bind(&root, "rw"))
            }
            Ground::Upper => {
                let overlay = Overlay::new(scratch.path(), 2);
                (overlay.upper.clone(), overlay.mounts())
            }
        };
        let furnish = |root: &Path| {
            fs::create_dir_all(root.join("present/inner")).unwrap();
            fs::write(root.join("present/file"), "lower").unwrap();
            symlink(&outside, root.join("way-out")).unwrap();
        };
        match ground {
            Ground::Empty => {}
            Ground::Full => furnish(&root),
            Ground::Upper => furnish(&scratch.path().join("lower0")),
        }
        Arena { scratch, canary, root, mounts }
    }

    fn outside(&self) -> String {
        self.scratch.path().join("outside").to_str().unwrap().to_owned()
    }

    /// Applies, and proves that nothing outside has changed.
    fn apply(&self, archive: &[u8]) -> Result<(), Error> {
        let result = apply(archive, TAR, &self.mounts, &ApplyOptions { sync: false });
        let now = list(Path::new(&self.outside()), true);
        tree::assert_same("the canary", &self.canary, &now);
        assert_eq!(tree::layer_mounts(), Vec::<String>::new());
        result.map(drop)
    }
}

/// Runs a case on every ground.
fn exhibit(build: impl Fn(&Arena) -> Archive, check: impl Fn(&Arena, Ground, Result<(), Error>)) {
    if !is_root() {
        return;
    }
    for ground in [Ground::Empty, Ground::Full, Ground::Upper] {
        let arena = Arena::new(ground);
        let result = arena.apply(&build(&arena).finish());
        check(&arena, ground, result);
    }
}

fn refused(build: impl Fn(&Arena) -> Archive, expected: EntryFault) {
    exhibit(build, |_, ground, result| match result {
        Err(error @ Error::Entry { .. }) => {
            assert_eq!(error.code(), ErrorCode::InvalidArgument);
            let Error::Entry { fault, .. } = error else { unreachable!() };
            assert_eq!(fault, expected, "{ground:?}");
        }
        other => panic!("{ground:?}: {other:?}"),
    });
}

fn contained(build: impl Fn(&Arena) -> Archive, check: impl Fn(&Arena, Ground)) {
    exhibit(build, |arena, ground, result| {
        result.unwrap_or_else(|error| panic!("{ground:?}: {}", davit_model::error::chain(&error)));
        check(arena, ground);
    });
}

/// Where a path of the host lies when it is taken within the root.
fn inside(arena: &Arena, path: &str) -> PathBuf {
    arena.root.join(path.trim_start_matches('/'))
}

#[test]
fn names_that_climb_are_refused() {
    for name in ["../outside/canary", "a/../../outside/canary", "/../outside/canary", ".."] {
        refused(|_| Archive::new().file(name, "dead"), EntryFault::Escape);
    }
    refused(|_| Archive::new().folder("../outside"), EntryFault::Escape);
    refused(|_| Archive::new().file("../.wh.outside", ""), EntryFault::Escape);
    refused(|_| Archive::new().file("../.wh..wh..opq", ""), EntryFault::Escape);
}

#[test]
fn absolute_names_are_relative_to_the_root() {
    contained(
        |arena| Archive::new().file(&format!("{}/canary", arena.outside()), "dead"),
        |arena, _| {
            let path = inside(arena, &format!("{}/canary", arena.outside()));
            assert_eq!(fs::read_to_string(path).unwrap(), "dead");
        },
    );
}

#[test]
fn a_symlink_to_outside_leads_inside() {
    contained(
        |arena| Archive::new().symlink("link", &arena.outside()).file("link/canary", "dead"),
        |arena, _| {
            let path = inside(arena, &format!("{}/canary", arena.outside()));
            assert_eq!(fs::read_to_string(path).unwrap(), "dead");
        },
    );
    contained(
        |_| Archive::new().folder("a").symlink("a/link", "../../../outside").file("a/link/canary", "dead"),
        |arena, _| assert_eq!(fs::read_to_string(arena.root.join("outside/canary")).unwrap(), "dead"),
    );
    // By way of the links of procfs, which would leave any chroot.
    contained(
        |arena| {
            let link = format!("/proc/self/root{}", arena.outside());
            Archive::new()
                .symlink("link", &link)
                .file("link/canary", "dead")
                .symlink("fd", "/proc/self/cwd")
                .file("fd/canary", "dead")
        },
        |arena, _| assert!(arena.root.join("proc/self/cwd/canary").exists()),
    );
}

#[test]
fn a_symlink_of_the_layers_below_leads_inside() {
    exhibit(
        |_| Archive::new().file("way-out/canary", "dead").file("way-out/.wh.folder", ""),
        |arena, ground, result| {
            result.unwrap();
            let path = match ground {
                Ground::Full => inside(arena, &format!("{}/canary", arena.outside())),
                Ground::Empty | Ground::Upper => arena.root.join("way-out/canary"),
            };
            assert_eq!(fs::read_to_string(path).unwrap(), "dead");
        },
    );
}

#[test]
fn a_file_replaces_a_symlink_instead_of_writing_through_it() {
    contained(
        |arena| {
            let target = format!("{}/canary", arena.outside());
            Archive::new().symlink("link", &target).file("link", "dead")
        },
        |arena, _| {
            assert_eq!(fs::read_to_string(arena.root.join("link")).unwrap(), "dead");
            assert!(fs::symlink_metadata(arena.root.join("link")).unwrap().is_file());
        },
    );
    let hostile = Meta { mode: 0, uid: 1234, gid: 1234, ..Meta::default() };
    contained(
        |arena| {
            let target = format!("{}/folder", arena.outside());
            Archive::new().symlink("link", &target).entry("link/", b'5', "", b"", &hostile)
        },
        |arena, _| {
            let metadata = fs::symlink_metadata(arena.root.join("link")).unwrap();
            assert!(metadata.is_dir());
            assert_eq!((metadata.mode() & 0o7777, metadata.uid()), (0, 1234));
        },
    );
}

#[test]
fn symlink_loops_end() {
    refused(|_| Archive::new().symlink("a", "b").symlink("b", "a").file("a/x", ""), EntryFault::LinkLoop);
    // Each link doubles the way: without a limit on links this walk would not end.
    let mut links = Archive::new().folder("l0");
    for level in 1..60 {
        links = links.symlink(&format!("l{level}"), &format!("l{}/../l{}", level - 1, level - 1));
    }
    refused(|_| links.clone().file("l59/missing/x", ""), EntryFault::LinkLoop);
}

#[test]
fn a_folder_that_becomes_a_symlink_is_not_remembered() {
    contained(
        |arena| {
            Archive::new()
                .folder("d")
                .file("d/first", "1")
                .symlink("d", &format!("{}/folder", arena.outside()))
                .file("d/canary", "dead")
                .entry("d/.wh.canary", b'0', "", b"", &Meta::default())
        },
        |arena, _| {
            assert!(fs::symlink_metadata(arena.root.join("d")).unwrap().is_symlink());
            assert!(!arena.root.join("d/first").exists());
        },
    );
    // The same by a hard link to a symlink, and one level up.
    contained(
        |arena| {
            Archive::new()
                .symlink("s", &arena.outside())
                .folder("d/e")
                .file("d/e/first", "1")
                .hard_link("d", "s")
                .file("d/folder/canary", "dead")
        },
        |arena, _| assert!(inside(arena, &format!("{}/folder/canary", arena.outside())).exists()),
    );
}

#[test]
fn hard_links_have_targets_inside_only() {
    refused(|_| Archive::new().hard_link("h", "../outside/canary"), EntryFault::Escape);
    let absent = |target: &str| EntryFault::LinkTarget { target: target.to_owned() };
    let arena = Arena::new(Ground::Empty);
    let canary = format!("{}/canary", arena.outside());
    match arena.apply(&Archive::new().hard_link("h", &canary).finish()) {
        Err(Error::Entry { fault, .. }) => assert_eq!(fault, absent(&canary)),
        other => panic!("{other:?}"),
    }
    refused(
        |arena| Archive::new().symlink("link", &arena.outside()).hard_link("h", "link/canary"),
        absent("link/canary"),
    );
    refused(|_| Archive::new().folder("d").hard_link("h", "d"), absent("d"));
    refused(|_| Archive::new().hard_link("h", "."), absent("."));
    refused(|_| Archive::new().file("f", "").hard_link("f", "f"), absent("f"));
}

#[test]
fn metadata_never_go_through_a_symlink() {
    let hostile = Meta { mode: 0o4777, uid: 1234, gid: 1234, mtime: 1, ..Meta::default() }
        .pax("SCHILY.xattr.user.hostile", b"1")
        .pax(
            "SCHILY.xattr.security.capability",
            &[1, 0, 0, 2, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        );
    exhibit(
        |arena| {
            let canary = format!("{}/canary", arena.outside());
            Archive::new()
                .entry("link", b'2', &canary, b"", &hostile)
                .entry("hard", b'1', "link", b"", &hostile)
                .entry("folder", b'2', &format!("{}/folder", arena.outside()), b"", &hostile)
        },
        |arena, _, result| {
            // Whether a symlink can have a capability is the kernel's business; what counts is the canary.
            drop(result);
            assert!(fs::symlink_metadata(arena.root.join("link")).unwrap().is_symlink());
        },
    );
    let milder = Meta { pax: vec![(b"SCHILY.xattr.user.a".to_vec(), b"1".to_vec())], ..hostile.clone() };
    contained(
        |arena| {
            let canary = format!("{}/canary", arena.outside());
            Archive::new()
                .entry("link", b'2', &canary, b"", &milder)
                .entry("hard", b'1', "link", b"", &milder)
        },
        |arena, _| {
            let metadata = fs::symlink_metadata(arena.root.join("hard")).unwrap();
            assert!(metadata.is_symlink());
            assert_eq!((metadata.uid(), metadata.mtime(), metadata.nlink()), (1234, 1, 2));
        },
    );
}

#[test]
fn whiteouts_remove_inside_only() {
    for name in [".wh.", ".wh..", ".wh...", "present/.wh...", "a/.wh..", ".wh.a/b", ".wh.present/.wh.file"] {
        refused(|_| Archive::new().file(name, ""), EntryFault::Whiteout);
    }
    contained(
        |arena| {
            Archive::new()
                .symlink("link", &arena.outside())
                .file("link/.wh.canary", "")
                .file("link/folder/.wh..wh..opq", "")
                .file("way-out/.wh.canary", "")
                .file("way-out/.wh..wh..opq", "")
        },
        |_, _| {},
    );
    // The bookkeeping of AUFS is none of ours.
    contained(
        |_| Archive::new().folder(".wh..wh.plnk").file(".wh..wh.plnk/1.2", "").file(".wh..wh.aufs", ""),
        |arena, _| {
            assert!(
                fs::read_dir(&arena.root)
                    .unwrap()
                    .all(|entry| { !entry.unwrap().file_name().to_str().unwrap().contains(".wh.") })
            )
        },
    );
}

#[test]
fn devices_are_nodes_and_nothing_is_opened() {
    contained(
        |_| {
            Archive::new()
                .entry("null", b'3', "", b"", &Meta::mode(0o666))
                .entry("block", b'4', "", b"", &Meta::mode(0o660))
                .entry("fifo", b'6', "", b"", &Meta::mode(0o600))
                // A second entry of the name would block if it opened the FIFO.
                .file("fifo", "data")
                .entry("again", b'6', "", b"", &Meta::mode(0o600))
        },
        |arena, _| {
            let kind = |name: &str| fs::symlink_metadata(arena.root.join(name)).unwrap();
            assert!(kind("null").file_type().is_char_device());
            assert_eq!((kind("null").mode() & 0o7777, kind("null").rdev()), (0o666, 0x103));
            assert!(kind("block").file_type().is_block_device());
            assert!(kind("again").file_type().is_fifo());
            assert_eq!(fs::read_to_string(arena.root.join("fifo")).unwrap(), "data");
        },
    );
}

#[test]
fn hostile_headers_are_refused() {
    refused(
        |_| Archive::new().entry("x", b'0', "", b"", &Meta::default().pax("path", b"a\0b")),
        EntryFault::NulInName,
    );
    refused(
        |_| Archive::new().entry("x", b'2', "", b"", &Meta::default().pax("linkpath", b"a\0b")),
        EntryFault::NulInName,
    );
    refused(|_| Archive::new().raw("", b'0', "", b"", &Meta::default()), EntryFault::EmptyName);
    refused(|_| Archive::new().symlink("s", ""), EntryFault::EmptyName);
    refused(|_| Archive::new().hard_link("s", ""), EntryFault::EmptyName);
    refused(|_| Archive::new().entry("x", b'Z', "", b"", &Meta::default()), EntryFault::Kind { kind: 'Z' });
    for id in ["4294967295", "4294967296", "18446744073709551615"] {
        let expected = EntryFault::Owner { id: id.parse().unwrap() };
        let meta = |key: &str| Meta::default().pax(key, id.as_bytes());
        refused(|_| Archive::new().entry("x", b'0', "", b"", &meta("uid")), expected.clone());
        refused(|_| Archive::new().entry("x", b'0', "", b"", &meta("gid")), expected.clone());
    }
    let long = "n/".repeat(3000);
    refused(
        |_| Archive::new().entry("x", b'0', "", b"", &Meta::default().pax("path", long.as_bytes())),
        EntryFault::NameTooLong { length: 6000 },
    );
    refused(|_| Archive::new().file("f", "").file("f/x", ""), EntryFault::ParentNotFolder);
    refused(
        |_| Archive::new().entry("d", b'3', "", b"", &Meta::default()).file("d/x", ""),
        EntryFault::ParentNotFolder,
    );
}

#[test]
fn archives_that_break_the_format_are_refused() {
    let valid = Archive::new().file("f", "data");
    let huge = vec![b'x'; 3 << 20];
    let numbered = |key: &str, value: &str| {
        Archive::new().entry("x", b'0', "", b"", &Meta::default().pax(key, value.as_bytes()))
    };
    let mut checksum = valid.clone();
    checksum.0[0] ^= 1;
    let mut lone_block = valid.clone();
    lone_block.0.extend_from_slice(&[0; 512]);
    let lone_block = lone_block.file("hidden", "");
    let mut negative = valid.clone();
    negative.0[124..136].copy_from_slice(&[0xff; 12]);
    let twice = record(b"path", b"a");
    let x = |archive: Archive| archive.raw("x", b'x', "", &twice, &Meta::default());
    for (archive, expected) in [
        (Archive(huge.clone()), "checksum"),
        (checksum, "checksum"),
        (lone_block, "zero block"),
        (negative, "checksum"),
        (Archive::new().raw("x", b'x', "", &huge, &Meta::default()), "over the limit"),
        (Archive::new().raw("x", b'L', "", &huge, &Meta::default()), "over the limit"),
        (Archive::new().raw("x", b'K', "", &huge, &Meta::default()), "over the limit"),
        (Archive::new().raw("x", b'x', "", b"no record", &Meta::default()), "malformed pax record"),
        (x(x(Archive::new())).file("f", ""), "two pax headers"),
        (x(Archive::new()), "without an entry"),
        (numbered("size", "18446744073709551615"), "bad number"),
        (numbered("size", "-1"), "bad number"),
        (numbered("uid", "0x7"), "bad number"),
        (numbered("mtime", "yesterday"), "bad number"),
        (numbered("GNU.sparse.map", "0,5,3,5"), "sparse"),
    ] {
        exhibit(
            |_| archive.clone(),
            |_, ground, result| {
                let error = result.unwrap_err();
                assert!(matches!(error, Error::Archive { .. }), "{expected}, {ground:?}: {error:?}");
                assert_eq!(error.code(), ErrorCode::InvalidArgument);
                assert!(error.to_string().contains(expected), "{expected}: {error}");
            },
        );
    }
}

#[test]
fn a_binary_attribute_is_not_taken_for_records() {
    let smuggled = b"\x01\n28 path=../outside/canary\n";
    contained(
        |_| {
            let meta = Meta::default().pax("SCHILY.xattr.user.a", smuggled).pax("comment", b"x");
            Archive::new().entry("plain", b'0', "", b"data", &meta)
        },
        |arena, _| {
            let listing = list(&arena.root, false);
            assert_eq!(listing[Path::new("plain")].xattrs[c"user.a"], smuggled);
        },
    );
}

#[test]
fn attributes_of_the_host_and_of_overlayfs_are_left_out() {
    contained(
        |_| {
            let meta = Meta::mode(0o755)
                .pax("SCHILY.xattr.trusted.overlay.redirect", b"/outside")
                .pax("SCHILY.xattr.trusted.overlay.opaque", b"y")
                .pax("SCHILY.xattr.trusted.other", b"y")
                .pax("SCHILY.xattr.user.kept", b"1");
            Archive::new().entry("d", b'5', "", b"", &meta)
        },
        |arena, _| {
            let listing = list(&arena.root, false);
            let names: Vec<_> = listing[Path::new("d")].xattrs.keys().cloned().collect();
            assert_eq!(names, [c"user.kept".to_owned()]);
        },
    );
}

#[test]
fn a_tree_deeper_than_any_path_can_be_removed_again() {
    // Folders within folders by way of symlinks: far deeper than a path can be long, and than a stack.
    let step = "d/".repeat(400);
    let mut archive = Archive::new().folder("top").symlink("s0", "top");
    for level in 0..6 {
        let name = format!("s{level}/{step}");
        archive = archive.entry(&name, b'5', "", b"", &Meta::mode(0o755));
        let link = format!("s{}", level + 1);
        let target = format!("s{level}/{}", step.trim_end_matches('/'));
        archive = archive.symlink(&link, &target);
    }
    let archive = archive.file("top", "a file now");
    exhibit(
        |_| archive.clone(),
        |arena, _, result| match result {
            Ok(()) => assert_eq!(fs::read_to_string(arena.root.join("top")).unwrap(), "a file now"),
            // Too many links or open files on the way: refused is as good as done.
            Err(error) => assert!(!matches!(error, Error::Read { .. }), "{error:?}"),
        },
    );
}

#[test]
fn whoever_swaps_folders_meanwhile_gains_nothing() {
    if !is_root() {
        return;
    }
    let arena = Arena::new(Ground::Full);
    let victim = arena.root.join("d");
    let trap = arena.root.join("trap");
    fs::create_dir(&victim).unwrap();
    symlink(format!("{}/folder", arena.outside()), &trap).unwrap();
    let mut archive = Archive::new();
    for round in 0..400 {
        archive = archive
            .file(&format!("d/canary{round}"), "dead")
            .entry("d/canary", b'0', "", b"dead", &Meta { mode: 0o4777, uid: 1, ..Meta::default() })
            .file("d/.wh.canary", "")
            .hard_link(&format!("link{round}"), "present/file")
            .folder(&format!("d/sub{round}/x"));
    }
    let archive = archive.finish();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = renameat2(AT_FDCWD, &victim, AT_FDCWD, &trap, RenameFlags::RENAME_EXCHANGE);
            }
        });
        for _ in 0..5 {
            // Whether it succeeds depends on the race; `apply` checks the canary.
            let _ = arena.apply(&archive);
        }
        stop.store(true, Ordering::Relaxed);
    });
}
