//! Layers in every snapshotter: what is unpacked and committed one over the other shows the same in all of them, and gives
//! the same layers back.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use davit_model::{Coded, ErrorCode, Labels, Mount};
use davit_snapshotter::Snapshotter;
use davit_snapshotter::layer::{Applied, ApplyOptions, DiffOptions, Error, apply, apply_alone, diff};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tar::{Builder, EntryType, Header};

use super::ground::Ground;
use super::{Files, Which, database};

const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// One entry of a layer: a folder ends with a slash, a link has an arrow, all else is a file that holds its own name.
fn layer(entries: &[&str]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    for (number, entry) in entries.iter().enumerate() {
        let mut header = Header::new_gnu();
        header.set_mode(0o750);
        header.set_uid(number as u64);
        header.set_gid(7);
        header.set_mtime(1_000_000 + number as u64);
        header.set_size(0);
        match (entry.split_once(" -> "), entry.split_once(" = ")) {
            (Some((name, target)), _) => {
                header.set_entry_type(EntryType::Symlink);
                archive.append_link(&mut header, name, target).unwrap();
            }
            (_, Some((name, target))) => {
                header.set_entry_type(EntryType::Link);
                archive.append_link(&mut header, name, target).unwrap();
            }
            _ if entry.ends_with('/') => {
                header.set_entry_type(EntryType::Directory);
                archive.append_data(&mut header, entry, &[][..]).unwrap();
            }
            _ => {
                let content = format!("{entry} of entry {number}").repeat(500);
                header.set_size(content.len() as u64);
                archive.append_data(&mut header, entry, content.as_bytes()).unwrap();
            }
        }
    }
    archive.into_inner().unwrap()
}

/// What every entry is: mode, owner, time, size and content or target.
type Tree = BTreeMap<PathBuf, (u32, u32, i64, Vec<u8>)>;

/// What each layer of a chain shows, and the layer as it is made again.
type Outcome = Vec<(Tree, Vec<u8>)>;

fn describe(root: &Path) -> Tree {
    fn visit(root: &Path, below: &Path, tree: &mut Tree) {
        let path = root.join(below);
        // Overlayfs can show a name that it does not find: a mark of a removal where nothing is below.
        let Ok(data) = path.symlink_metadata() else {
            tree.insert(below.to_owned(), (0, 0, 0, Vec::new()));
            return;
        };
        let content = if data.is_file() {
            fs::read(&path).unwrap()
        } else if data.is_symlink() {
            fs::read_link(&path).unwrap().to_str().unwrap().into()
        } else {
            Vec::new()
        };
        // That of a folder is of its last change, where a layer does not have the folder itself; no layer has that of a
        // mark.
        let time = if data.is_file() || data.is_symlink() { data.mtime() } else { 0 };
        tree.insert(below.to_owned(), (data.mode(), data.uid(), time, content));
        if data.is_dir() {
            for entry in fs::read_dir(&path).unwrap() {
                visit(root, &below.join(entry.unwrap().file_name()), tree);
            }
        }
    }
    let mut tree = Tree::new();
    visit(root, Path::new(""), &mut tree);
    tree
}

/// Unpacks a chain of layers.
fn unpack(snapshotter: &dyn Snapshotter, layers: &[Vec<u8>]) -> Outcome {
    let none = Labels::new();
    let mut outcome = Vec::new();
    let mut parent: Option<String> = None;
    for (number, layer) in layers.iter().enumerate() {
        let mounts = snapshotter.prepare("active", parent.as_deref(), &none).unwrap();
        apply(layer.as_slice(), TAR, &mounts, &ApplyOptions::default())
            .unwrap_or_else(|error| panic!("layer {number}: {}", davit_model::error::chain(&error)));
        let mut again = Vec::new();
        let below = parent.as_ref().map(|parent| snapshotter.view("below", Some(parent), &none).unwrap());
        // What no layer has given a time has that of now.
        let options = DiffOptions { source_date_epoch: Some(UNIX_EPOCH + Duration::from_secs(2_000_000)) };
        diff(&below.unwrap_or_default(), &mounts, TAR, &mut again, &options).unwrap();
        if parent.is_some() {
            snapshotter.remove("below").unwrap();
        }
        let name = format!("layer {number}");
        snapshotter.commit(&name, "active", &none, None).unwrap();
        let view = snapshotter.view("view", Some(&name), &none).unwrap();
        outcome.push((describe(&Files::shown(&view)), again));
        snapshotter.remove("view").unwrap();
        parent = Some(name);
    }
    outcome
}

#[test]
fn the_same_layers_are_the_same_in_all_snapshotters() {
    let layers = [
        layer(&[
            "bin/",
            "bin/sh",
            "bin/ls -> sh",
            "etc/",
            "etc/hosts",
            "usr/",
            "usr/lib/",
            "usr/lib/a",
            "lib -> usr/lib",
        ]),
        // Into folders that are not in this one, and whiteouts.
        layer(&["usr/lib/b", "etc/.wh.hosts", "etc/passwd", "var/log/deep/file", "bin/again = usr/lib/b"]),
        layer(&["etc/", "etc/.wh..wh..opq", "etc/new", ".wh.var", "var/", "var/fresh", "bin/sh"]),
        layer(&[".wh.lib", "lib/", "lib/own", "usr/.wh.lib", "bin"]),
    ];
    let mut expected: Option<(Which, Outcome)> = None;
    for which in Which::ALL {
        let Some(ground) = Ground::new(which) else { continue };
        let snapshotter = which.open(&ground.path().join("root"), database(ground.path()));
        let outcome = unpack(&*snapshotter, &layers);
        drop(snapshotter);
        ground.assert_unused();
        let Some((first, expected)) = &expected else {
            expected = Some((which, outcome));
            continue;
        };
        for (number, (found, wanted)) in outcome.iter().zip(expected).enumerate() {
            let what = format!("layer {number} of {which:?} and {first:?}");
            assert_eq!(found.0.keys().collect::<Vec<_>>(), wanted.0.keys().collect::<Vec<_>>(), "{what}");
            for (path, entry) in &found.0 {
                assert!(entry == &wanted.0[path], "{what}: {} differs", path.display());
            }
            // For the same reason only what overlayfs stacks gives the very same layers.
            assert!(which != Which::Erofs || found.1 == wanted.1, "{what}: made again");
        }
    }
}

/// One step of a random layer, as the words of [`layer`].
fn step() -> impl Strategy<Value = String> {
    let path = || prop::collection::vec("[abc]", 1..4).prop_map(|parts| parts.join("/"));
    prop_oneof![
        4 => path(),
        3 => path().prop_map(|path| format!("{path}/")),
        1 => (path(), path()).prop_map(|(path, target)| format!("{path} -> {target}")),
        1 => (path(), path()).prop_map(|(path, target)| format!("{path} -> /{target}")),
        1 => path().prop_map(|path| format!("{path} -> ../..")),
        2 => (path(), path()).prop_map(|(path, target)| format!("{path}x = {target}")),
        1 => (path(), path()).prop_map(|(path, target)| format!("{path} = {target}")),
        2 => (path(), "[abc]").prop_map(|(path, base)| format!("{path}/.wh.{base}")),
        1 => "[abc]".prop_map(|base| format!(".wh.{base}")),
        1 => path().prop_map(|path| format!("{path}/.wh..wh..opq")),
        1 => Just(".wh..wh..opq".to_owned()),
    ]
}

/// A way to apply a layer.
type Way<'a> = &'a dyn Fn(&[u8], &[Mount]) -> Result<Applied, Error>;

/// Applies layers one over the other until one is refused; what each image holds, marks of removals and all.
fn images(
    snapshotter: &dyn Snapshotter,
    chain: &str,
    layers: &[Vec<u8>],
    apply: Way<'_>,
) -> Vec<Option<(Applied, Tree, Tree)>> {
    let (none, mut parent) = (Labels::new(), None);
    let mut outcome = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        let active = format!("{chain} active");
        let mounts = snapshotter.prepare(&active, parent.as_deref(), &none).unwrap();
        let Ok(applied) = apply(layer, &mounts) else {
            snapshotter.remove(&active).unwrap();
            outcome.push(None);
            break;
        };
        let shown = describe(&Files::shown(&snapshotter.mounts(&active).unwrap()));
        let name = format!("{chain} {number}");
        snapshotter.commit(&name, &active, &none, None).unwrap();
        let view = snapshotter.view("view", Some(&name), &none).unwrap();
        outcome.push(Some((applied, shown, describe(&Files::shown(&view[..1])))));
        snapshotter.remove("view").unwrap();
        parent = Some(name);
    }
    outcome
}

/// A layer that is written as an image at once is the image of what extracting it gives.
#[test]
fn a_layer_packed_is_a_layer_extracted() {
    let Some(ground) = Ground::new(Which::Erofs) else { return };
    let snapshotter = Which::Erofs.open(&ground.path().join("root"), database(ground.path()));
    let number = std::cell::Cell::new(0);
    let layers = prop::collection::vec(prop::collection::vec(step(), 0..14), 1..4);
    let config = ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() };
    let outcome = TestRunner::new(config).run(&layers, |layers| {
        number.set(number.get() + 1);
        let build = |steps: &Vec<String>| layer(&steps.iter().map(String::as_str).collect::<Vec<_>>());
        let layers: Vec<_> = layers.iter().map(build).collect();
        let chain = |name: &str| format!("{} {name}", number.get());
        let extracted = images(&*snapshotter, &chain("extracted"), &layers, &|layer, mounts| {
            apply(layer, TAR, mounts, &ApplyOptions::default())
        });
        let packed = images(&*snapshotter, &chain("packed"), &layers, &|layer, mounts| {
            apply_alone(layer, TAR, mounts)
        });
        prop_assert_eq!(packed.len(), extracted.len());
        for (number, pair) in packed.into_iter().zip(extracted).enumerate() {
            let (Some(one), Some(other)) = pair else {
                prop_assert!(pair.0.is_none() && pair.1.is_none(), "layer {} is refused by one only", number);
                continue;
            };
            prop_assert_eq!(one.0, other.0);
            for (what, one, other) in [("shown", one.1, other.1), ("image", one.2, other.2)] {
                for path in one.keys().chain(other.keys()) {
                    let facts = |tree: &Tree| {
                        tree.get(path).map(|(mode, user, time, data)| (*mode, *user, *time, data.len()))
                    };
                    prop_assert_eq!(
                        facts(&one),
                        facts(&other),
                        "{} {} of layer {}",
                        what,
                        path.display(),
                        number
                    );
                    prop_assert!(one[path] == other[path], "{} of layer {}", path.display(), number);
                }
            }
        }
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    drop(snapshotter);
    ground.assert_unused();
}

/// A layer alone is alone: a second one is refused, and so is a commit of changes over it.
#[test]
fn nothing_comes_over_a_layer_that_is_alone() {
    let Some(ground) = Ground::new(Which::Erofs) else { return };
    let snapshotter = Which::Erofs.open(&ground.path().join("root"), database(ground.path()));
    let none = Labels::new();
    let mounts = snapshotter.prepare("active", None, &none).unwrap();
    let first = layer(&["file", "folder/"]);
    // What fails leaves nothing, and can be tried again.
    assert!(apply_alone(&first[..700], TAR, &mounts).is_err());
    apply_alone(first.as_slice(), TAR, &mounts).unwrap();
    for mounts in [&mounts, &snapshotter.mounts("active").unwrap()] {
        assert!(apply(first.as_slice(), TAR, mounts, &ApplyOptions::default()).is_err());
        assert!(apply_alone(first.as_slice(), TAR, mounts).is_err());
    }
    let change = Files::shown(&snapshotter.mounts("active").unwrap());
    fs::write(change.join("folder/change"), "x").unwrap();
    drop(change);
    let error = snapshotter.commit("name", "active", &none, None).unwrap_err();
    assert_eq!(error.code(), ErrorCode::FailedPrecondition, "{error}");
    let change = Files::shown(&snapshotter.mounts("active").unwrap());
    fs::remove_file(change.join("folder/change")).unwrap();
    drop(change);
    fs::remove_dir_all(super::place_of(&mounts).join("folder")).unwrap();
    snapshotter.commit("name", "active", &none, None).unwrap();
    let view = snapshotter.view("view", Some("name"), &none).unwrap();
    assert_eq!(fs::read_dir(&*Files::shown(&view)).unwrap().count(), 2);
}

/// What no image can hold is refused before it is made, and what makes work is bounded.
#[test]
fn a_layer_that_no_image_can_hold_is_refused() {
    let Some(ground) = Ground::new(Which::Erofs) else { return };
    let snapshotter = Which::Erofs.open(&ground.path().join("root"), database(ground.path()));
    let mounts = snapshotter.prepare("active", None, &Labels::new()).unwrap();
    let mut huge = Header::new_gnu();
    huge.set_path("huge").unwrap();
    huge.set_mode(0o644);
    huge.set_size(1 << 60);
    huge.set_cksum();
    let long = "n".repeat(256);
    let around: Vec<String> = (0..41).map(|number| format!("l{number} -> l{}", number + 1)).collect();
    let mut around: Vec<&str> = around.iter().map(String::as_str).collect();
    around.push("l0/file");
    let layers = [
        huge.as_bytes().to_vec(),
        layer(&[&long]),
        layer(&[&format!("{long}/file")]),
        layer(&around),
        layer(&["loop -> loop", "loop/file"]),
        layer(&["file", "file/below"]),
        layer(&["folder/", "link = folder"]),
        layer(&["link = nowhere"]),
    ];
    for (number, layer) in layers.iter().enumerate() {
        assert!(apply_alone(layer.as_slice(), TAR, &mounts).is_err(), "layer {number}");
    }
    // None of them has left anything.
    let names = fs::read_dir(super::place_of(&mounts).parent().unwrap()).unwrap();
    let names: std::collections::BTreeSet<_> = names.map(|name| name.unwrap().file_name()).collect();
    assert_eq!(names, [".erofslayer", "fs", "work"].map(Into::into).into());
    let deep = vec!["d"; 1500].join("/");
    apply_alone(layer(&[&deep, "file"]).as_slice(), TAR, &mounts).unwrap();
    snapshotter.commit("name", "active", &Labels::new(), None).unwrap();
    let view = snapshotter.view("view", Some("name"), &Labels::new()).unwrap();
    assert_eq!(fs::read_dir(&*Files::shown(&view)).unwrap().count(), 2);
}

/// A layer goes through a filesystem that a process serves, and is made again from one.
#[test]
fn a_layer_is_applied_and_made_again_through_a_process() {
    let programs = ["/usr/bin/fuse-overlayfs", "/usr/sbin/mount.fuse3", "/dev/fuse"];
    if !nix::unistd::geteuid().is_root() || !programs.iter().all(|path| Path::new(path).exists()) {
        eprintln!("skipped: needs root, /dev/fuse and fuse-overlayfs (apt-get install fuse-overlayfs)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| folder.path().join(name));
    for path in [&lower, &upper, &work] {
        fs::create_dir(path).unwrap();
    }
    for name in ["old", "kept"] {
        fs::write(lower.join(name), name).unwrap();
    }
    let mount = |kind: &str, source: &Path, options: Vec<String>| Mount {
        kind: kind.into(),
        source: source.display().to_string(),
        target: String::new(),
        options,
    };
    let of = |name: &str, path: &Path| format!("{name}={}", path.display());
    let below = [mount("bind", &lower, vec!["rbind".into(), "ro".into()])];
    let options = vec![of("lowerdir", &lower), of("upperdir", &upper), of("workdir", &work)];
    let served = [mount("fuse3.fuse-overlayfs", Path::new("overlay"), options)];
    let changes = layer(&["new", "folder/", "folder/file", ".wh.old"]);
    apply(changes.as_slice(), TAR, &served, &ApplyOptions::default()).unwrap();
    assert!(upper.join("folder/file").is_file() && lower.join("old").is_file());
    let mut made = Vec::new();
    diff(&below, &served, TAR, &mut made, &DiffOptions::default()).unwrap();
    let mut archive = tar::Archive::new(made.as_slice());
    let names = archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().into_owned());
    let names: std::collections::BTreeSet<PathBuf> = names.collect();
    assert_eq!(names, [".wh.old", "folder/", "folder/file", "new"].map(PathBuf::from).into());
    // Nothing of it is mounted here any more.
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!table.contains(&folder.path().display().to_string()), "{table}");
}
