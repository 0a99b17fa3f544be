//! Layers in every snapshotter: what is unpacked and committed one over the other shows the same in all of them, and gives
//! the same layers back.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use davit_model::Labels;
use davit_snapshotter::Snapshotter;
use davit_snapshotter::layer::{ApplyOptions, DiffOptions, apply, diff};
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
        let data = path.symlink_metadata().unwrap();
        let content = if data.is_file() {
            fs::read(&path).unwrap()
        } else if data.is_symlink() {
            fs::read_link(&path).unwrap().to_str().unwrap().into()
        } else {
            Vec::new()
        };
        // That of a folder is of its last change, where a layer does not have the folder itself.
        let time = if data.is_dir() { 0 } else { data.mtime() };
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
        diff(&below.unwrap_or_default(), &mounts, TAR, &mut again, &DiffOptions::default()).unwrap();
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
