//! Making layers: what a layer holds, that it is the same bytes every time, and that applying it to the lower tree
//! gives the upper one.
// Helpers of tests may fail like tests.
#![allow(clippy::unwrap_used)]

#[path = "layer/change.rs"]
mod change;
#[path = "layer/tree.rs"]
mod tree;

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use davit_content_store::Hasher;
use davit_model::{Algorithm, Coded, ErrorCode, Mount};
use davit_snapshotter::layer::{ApplyOptions, DiffOptions, Diffed, Error, apply, apply_to_folder, diff};
use davit_sys::fs::set_xattr;
use proptest::prelude::*;

use change::{changes, perform, settle};
use tree::{Overlay, bind, is_root, list, scratch};

const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

fn diff_of(lower: &[Mount], upper: &[Mount]) -> Vec<u8> {
    let mut archive = Vec::new();
    let diffed = diff(lower, upper, TAR, &mut archive, &DiffOptions::default()).unwrap();
    let digest = Hasher::digest_of(Algorithm::Sha256, &archive);
    assert_eq!(diffed, Diffed { digest, size: archive.len() as u64 });
    assert_eq!(tree::layer_mounts(), Vec::<String>::new());
    archive
}

/// The entries of an archive: name, type, mode, time, link target; as the `tar` crate reads them.
fn entries(archive: &[u8]) -> Vec<(String, char, u32, u64, String)> {
    let mut archive = tar::Archive::new(archive);
    let entry = |entry: io::Result<tar::Entry<'_, &[u8]>>| {
        let entry = entry.unwrap();
        let header = entry.header();
        let link = entry.link_name().unwrap().map(|link| link.to_str().unwrap().to_owned());
        (
            entry.path().unwrap().to_str().unwrap().to_owned(),
            char::from(header.entry_type().as_byte()),
            header.mode().unwrap(),
            header.mtime().unwrap(),
            link.unwrap_or_default(),
        )
    };
    archive.entries().unwrap().map(entry).collect()
}

fn names(archive: &[u8]) -> Vec<String> {
    entries(archive).into_iter().map(|entry| entry.0).collect()
}

fn set_time(path: &Path, seconds: u64, nanoseconds: u32) {
    File::open(path).unwrap().set_modified(UNIX_EPOCH + Duration::new(seconds, nanoseconds)).unwrap();
}

/// Two folders, the second a copy of the first.
fn pair(fill: impl Fn(&Path)) -> (tempfile::TempDir, PathBuf, PathBuf) {
    let scratch = scratch();
    let (lower, upper) = (scratch.path().join("lower"), scratch.path().join("upper"));
    fs::create_dir(&lower).unwrap();
    fill(&lower);
    assert!(Command::new("cp").arg("-a").arg(&lower).arg(&upper).status().unwrap().success());
    (scratch, lower, upper)
}

#[test]
fn equal_trees_have_nothing_but_an_end_between_them() {
    let (_scratch, lower, upper) = pair(|root| {
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("d/f"), "x").unwrap();
        symlink("f", root.join("d/l")).unwrap();
        fs::hard_link(root.join("d/f"), root.join("d/g")).unwrap();
    });
    assert_eq!(diff_of(&bind(&lower, "ro"), &bind(&upper, "ro")), vec![0; 1024]);
    // Nor does the time of a folder count.
    set_time(&upper.join("d"), 1, 0);
    assert_eq!(diff_of(&bind(&lower, "ro"), &bind(&upper, "ro")), vec![0; 1024]);
}

#[test]
fn changes_come_in_order_with_their_parents() {
    let (_scratch, lower, upper) = pair(|root| {
        for folder in ["a/deep", "b", "gone/deep", "to-file"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        for file in ["a/deep/same", "b/changed", "gone/deep/f", "gone/f", "to-file/f", "to-folder", "removed"]
        {
            fs::write(root.join(file), "x").unwrap();
        }
    });
    fs::write(upper.join("a/deep/new"), "new").unwrap();
    fs::write(upper.join("b/changed"), "changed").unwrap();
    fs::remove_dir_all(upper.join("gone")).unwrap();
    fs::remove_dir_all(upper.join("to-file")).unwrap();
    fs::write(upper.join("to-file"), "").unwrap();
    fs::remove_file(upper.join("to-folder")).unwrap();
    fs::create_dir(upper.join("to-folder")).unwrap();
    fs::write(upper.join("to-folder/f"), "").unwrap();
    fs::remove_file(upper.join("removed")).unwrap();
    let _socket = UnixListener::bind(upper.join("socket")).unwrap();
    fs::write(upper.join(".wh.reserved"), "").unwrap();
    let archive = diff_of(&bind(&lower, "ro"), &bind(&upper, "ro"));
    let expected = [
        "a/",
        "a/deep/",
        "a/deep/new",
        "b/",
        "b/changed",
        ".wh.gone",
        ".wh.removed",
        "to-file",
        "to-folder/",
        "to-folder/f",
    ];
    assert_eq!(names(&archive), expected);
    let whiteout = entries(&archive).into_iter().find(|entry| entry.0 == ".wh.gone").unwrap();
    assert_eq!((whiteout.1, whiteout.3), ('0', 0));
    // The same again, to the byte; and against nothing at all it is the whole tree.
    assert_eq!(archive, diff_of(&bind(&lower, "ro"), &bind(&upper, "ro")));
    let whole = names(&diff_of(&[], &bind(&upper, "ro")));
    assert!(whole.contains(&"a/deep/same".to_owned()) && !whole.iter().any(|name| name.contains(".wh.")));
}

#[test]
fn small_differences_are_seen_and_ambiguous_times_are_looked_into() {
    let (_scratch, lower, upper) = pair(|root| {
        for file in ["mode", "data", "hidden", "touched", "truncated-same", "truncated-changed"] {
            fs::write(root.join(file), "same size").unwrap();
            set_time(&root.join(file), 1_000_000, 5);
        }
        for file in ["truncated-same", "truncated-changed"] {
            set_time(&root.join(file), 1_000_000, 0);
        }
        symlink("one", root.join("link")).unwrap();
    });
    fs::set_permissions(upper.join("mode"), Permissions::from_mode(0o600)).unwrap();
    fs::write(upper.join("data"), "same sizE").unwrap();
    fs::write(upper.join("hidden"), "same sizE").unwrap();
    fs::write(upper.join("truncated-changed"), "same sizE").unwrap();
    set_time(&upper.join("data"), 1_000_000, 6);
    // The very same time, to the nanosecond, on other data: nobody does this but who wants to hide something.
    set_time(&upper.join("hidden"), 1_000_000, 5);
    set_time(&upper.join("truncated-changed"), 1_000_000, 0);
    set_time(&upper.join("touched"), 1_000_001, 5);
    fs::remove_file(upper.join("link")).unwrap();
    symlink("two", upper.join("link")).unwrap();
    let archive = diff_of(&bind(&lower, "ro"), &bind(&upper, "ro"));
    assert_eq!(names(&archive), ["data", "link", "mode", "touched", "truncated-changed"]);
    let data = entries(&archive);
    assert_eq!((data[0].3, data[2].2), (1_000_000, 0o600));
}

#[test]
fn hard_links_stay_links() {
    let (scratch, lower, upper) = pair(|root| {
        fs::create_dir(root.join("z")).unwrap();
        fs::write(root.join("z/first"), "x").unwrap();
        fs::hard_link(root.join("z/first"), root.join("second")).unwrap();
    });
    // A third name of a file that is otherwise as it was: all three must stay one file.
    fs::hard_link(upper.join("second"), upper.join("third")).unwrap();
    fs::write(upper.join("new"), "y").unwrap();
    fs::hard_link(upper.join("new"), upper.join("z/new")).unwrap();
    let archive = diff_of(&bind(&lower, "ro"), &bind(&upper, "ro"));
    let links: BTreeMap<_, _> =
        entries(&archive).into_iter().map(|entry| (entry.0, (entry.1, entry.4))).collect();
    assert_eq!(links["new"].0, '0');
    assert_eq!(links["z/new"], ('1', "new".to_owned()));
    assert_eq!(links["third"].0, '0');
    assert_eq!(links["second"], ('1', "third".to_owned()));
    assert_eq!(links["z/first"], ('1', "third".to_owned()));
    apply_to_folder(archive.as_slice(), &lower).unwrap();
    assert_eq!(fs::metadata(lower.join("second")).unwrap().nlink(), 3);
    drop(scratch);
}

#[test]
fn capabilities_are_kept_and_other_attributes_are_not() {
    if !is_root() {
        return;
    }
    let (_scratch, lower, upper) = pair(|root| fs::write(root.join("f"), "x").unwrap());
    let capability = [1, 0, 0, 2, 10, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let file = File::open(upper.join("f")).unwrap();
    set_xattr(file.as_fd(), c"user.private", b"1").unwrap();
    assert_eq!(diff_of(&bind(&lower, "ro"), &bind(&upper, "ro")), vec![0; 1024]);
    set_xattr(file.as_fd(), c"security.capability", &capability).unwrap();
    let archive = diff_of(&bind(&lower, "ro"), &bind(&upper, "ro"));
    apply_to_folder(archive.as_slice(), &lower).unwrap();
    let xattrs = &list(&lower, false)[Path::new("f")].xattrs;
    assert_eq!(xattrs.len(), 1);
    assert_eq!(xattrs[c"security.capability"], capability);
}

#[test]
fn awkward_names_numbers_and_sizes_survive() {
    if !is_root() {
        return;
    }
    let (_scratch, lower, upper) = pair(|_| {});
    let long = "n".repeat(200);
    fs::create_dir_all(upper.join(&long).join(&long)).unwrap();
    fs::write(upper.join(&long).join(&long).join("f"), "x").unwrap();
    symlink(format!("/{long}/{long}"), upper.join("link")).unwrap();
    fs::hard_link(upper.join(&long).join(&long).join("f"), upper.join("zz-hard")).unwrap();
    fs::write(upper.join("ümlaut \n"), "x").unwrap();
    nix::unistd::chown(&upper.join("ümlaut \n"), Some(4_000_000_000.into()), Some(7.into())).unwrap();
    set_time(&upper.join("ümlaut \n"), 9_000_000_000, 0);
    File::create(upper.join("large")).unwrap().set_len(20 << 20).unwrap();
    for path in [upper.clone(), upper.join(&long)] {
        fs::set_permissions(path, Permissions::from_mode(0o1770)).unwrap();
    }
    settle(&upper);
    let archive = diff_of(&[], &bind(&upper, "ro"));
    apply_to_folder(archive.as_slice(), &lower).unwrap();
    tree::assert_same("awkward", &list(&upper, true), &list(&lower, true));
    // GNU tar reads the same out of it.
    let theirs = tempfile::tempdir_in(lower.parent().unwrap()).unwrap();
    let mut tar = Command::new("tar");
    tar.args(["-xp", "--numeric-owner", "-C"]).arg(theirs.path()).stdin(std::process::Stdio::piped());
    let mut tar = tar.spawn().unwrap();
    tar.stdin.take().unwrap().write_all(&archive).unwrap();
    assert!(tar.wait().unwrap().success());
    tree::assert_same("GNU tar", &list(&upper, true), &list(theirs.path(), true));
}

#[test]
fn times_are_cut_to_seconds_and_to_the_epoch_that_is_given() {
    let (_scratch, lower, upper) = pair(|_| {});
    for (file, seconds) in [("early", 1_000), ("late", 3_000)] {
        fs::write(upper.join(file), "x").unwrap();
        set_time(&upper.join(file), seconds, 999_999_999);
    }
    let options = DiffOptions { source_date_epoch: Some(UNIX_EPOCH + Duration::from_secs(2_000)) };
    let mut archive = Vec::new();
    diff(&bind(&lower, "ro"), &bind(&upper, "ro"), TAR, &mut archive, &options).unwrap();
    let times: Vec<_> = entries(&archive).into_iter().map(|entry| entry.3).collect();
    assert_eq!(times, [1_000, 2_000]);
}

#[test]
fn compressed_layers_hold_the_same_archive() {
    let (_scratch, lower, upper) = pair(|_| {});
    let numbers: String = (0..200_000).map(|number| format!("{number} ")).collect();
    fs::write(upper.join("numbers"), numbers).unwrap();
    let (lower, upper) = (bind(&lower, "ro"), bind(&upper, "ro"));
    let plain = diff_of(&lower, &upper);
    for media_type in [GZIP, "", ZSTD] {
        let mut packed = Vec::new();
        let diffed = diff(&lower, &upper, media_type, &mut packed, &DiffOptions::default()).unwrap();
        assert_eq!(diffed.digest, Hasher::digest_of(Algorithm::Sha256, &plain));
        let mut unpacked = Vec::new();
        if media_type == ZSTD {
            unpacked = zstd::decode_all(packed.as_slice()).unwrap();
        } else {
            flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut unpacked).unwrap();
        }
        assert!(packed.len() < plain.len() / 2 && unpacked == plain);
        let mut again = Vec::new();
        diff(&lower, &upper, media_type, &mut again, &DiffOptions::default()).unwrap();
        assert_eq!(packed, again);
    }
    for media_type in ["application/vnd.docker.image.rootfs.diff.tar.gzip", "application/json"] {
        let error = diff(&lower, &upper, media_type, Vec::new(), &DiffOptions::default()).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Unimplemented);
    }
}

#[test]
fn a_writer_that_fails_ends_it() {
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(1).ok_or(io::ErrorKind::StorageFull)?;
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (_scratch, lower, upper) = pair(|_| {});
    for index in 0..8 {
        let noise: Vec<u8> = (0..1 << 20).map(|at: u64| (at.wrapping_mul(at + index) >> 7) as u8).collect();
        fs::write(upper.join(index.to_string()), noise).unwrap();
    }
    for (media_type, writes) in [(TAR, 0), (TAR, 3), (GZIP, 2), (ZSTD, 0)] {
        let (lower, upper) = (bind(&lower, "ro"), bind(&upper, "ro"));
        let error = diff(&lower, &upper, media_type, Full(writes), &DiffOptions::default()).unwrap_err();
        let Error::Write { source } = error else { panic!("{media_type}: {error:?}") };
        assert_eq!(source.kind(), io::ErrorKind::StorageFull, "{media_type}");
    }
}

#[test]
fn the_changes_of_a_container_are_found_in_its_upper_folder() {
    if !is_root() {
        return;
    }
    let scratch = scratch();
    let overlay = Overlay::new(scratch.path(), 2);
    fs::create_dir_all(overlay.lowers[1].join("recreated/deep")).unwrap();
    fs::create_dir_all(overlay.lowers[1].join("entered/deep")).unwrap();
    for file in ["recreated/deep/old", "removed", "entered/deep/same", "opened"] {
        fs::write(overlay.lowers[1].join(file), "x").unwrap();
    }
    overlay.merged(|root| {
        fs::remove_dir_all(root.join("recreated")).unwrap();
        fs::create_dir_all(root.join("recreated/new")).unwrap();
        fs::remove_file(root.join("removed")).unwrap();
        fs::write(root.join("entered/deep/tmp"), "x").unwrap();
        fs::remove_file(root.join("entered/deep/tmp")).unwrap();
        fs::create_dir_all(root.join("made/here")).unwrap();
        // Copied up without being changed.
        fs::OpenOptions::new().append(true).open(root.join("opened")).unwrap();
    });
    let archive = diff_of(&overlay.parent_mounts(), &overlay.mounts());
    let expected =
        ["made/", "made/here/", "recreated/", "recreated/.wh..wh..opq", "recreated/new/", ".wh.removed"];
    assert_eq!(names(&archive), expected);
}

/// Applies what a diff says and compares with what the diff was made of.
fn check_round_trip(what: &str, archive: &[u8], lower: &Path, upper: &Path) -> Result<(), TestCaseError> {
    let flat = tempfile::tempdir_in(lower.parent().unwrap()).unwrap();
    let copy = flat.path().join("copy");
    assert!(Command::new("cp").arg("-a").arg(lower).arg(&copy).status().unwrap().success());
    apply(archive, TAR, &bind(&copy, "rw"), &ApplyOptions { sync: false }).unwrap();
    let (expected, found) = (list(upper, false), list(&copy, false));
    for path in expected.keys().chain(found.keys()) {
        let (left, right) = (expected.get(path), found.get(path));
        prop_assert_eq!(left, right, "{}: {:?}", what, path);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn applying_a_difference_gives_the_upper_tree(
        before in changes(0..20),
        after in changes(0..20),
        other in changes(0..20),
    ) {
        if !nix::unistd::geteuid().is_root() {
            return Ok(());
        }
        let (_scratch, lower, upper) = pair(|root| perform(root, &before));
        perform(&upper, &after);
        let archive = diff_of(&bind(&lower, "ro"), &bind(&upper, "ro"));
        check_round_trip("changed tree", &archive, &lower, &upper)?;
        // The same between trees that have nothing to do with each other.
        let foreign = upper.with_file_name("foreign");
        fs::create_dir(&foreign).unwrap();
        perform(&foreign, &other);
        let archive = diff_of(&bind(&lower, "ro"), &bind(&foreign, "ro"));
        check_round_trip("foreign tree", &archive, &lower, &foreign)?;
    }

    #[test]
    fn an_upper_folder_tells_the_same_as_both_trees(before in changes(0..20), after in changes(0..20)) {
        if !nix::unistd::geteuid().is_root() {
            return Ok(());
        }
        let scratch = scratch();
        let overlay = Overlay::new(scratch.path(), 2);
        let (near, far) = before.split_at(before.len() / 2);
        perform(&overlay.lowers[1], far);
        perform(&overlay.lowers[0], near);
        let lower = scratch.path().join("before");
        let upper = scratch.path().join("after");
        let copy = |root: &Path, to: &Path| {
            assert!(Command::new("cp").arg("-a").arg(root).arg(to).status().unwrap().success());
        };
        overlay.merged(|root| {
            copy(root, &lower);
            perform(root, &after);
            copy(root, &upper);
        });
        let short = diff_of(&overlay.parent_mounts(), &overlay.mounts());
        check_round_trip("upper folder", &short, &lower, &upper)?;
        // An option that the shortcut does not trust makes both trees be mounted and walked.
        let mut mounts = overlay.mounts();
        mounts[0].options.push("metacopy=on".into());
        let long = diff_of(&overlay.parent_mounts(), &mounts);
        check_round_trip("both trees", &long, &lower, &upper)?;
    }
}
