//! Trees as deep as a path can be long, under a limit of open files that other parts of a process need too.

use std::process::Command;

use davit_snapshotter::layer::{ApplyOptions, DiffOptions, apply, diff};

use crate::archive::Archive;
use crate::tree::{Overlay, bind, is_root, scratch};

const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
/// Tells this program that it runs under the limit.
const LIMITED: &str = "DAVIT_TEST_FEW_OPEN_FILES";

/// The limit is that of a whole process, so that the work is done in one of its own.
#[test]
fn deep_trees_do_not_take_an_open_file_per_level() {
    if !is_root() {
        return;
    }
    if std::env::var_os(LIMITED).is_some() {
        return work_on_deep_trees();
    }
    let output = Command::new("sh")
        .args(["-c", "ulimit -n 256 && exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "depth::deep_trees_do_not_take_an_open_file_per_level", "--nocapture"])
        .env(LIMITED, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{errors}");
}

fn work_on_deep_trees() {
    let scratch = scratch();
    let overlay = Overlay::new(scratch.path(), 1);
    let options = ApplyOptions { sync: false };
    let lower = bind(&overlay.lowers[0], "rw");
    let deep = "a/".repeat(2000);
    apply(Archive::new().file(&format!("{deep}old"), "").finish().as_slice(), TAR, &lower, &options).unwrap();
    // Each folder gets the look of the one below.
    let archive = Archive::new().file(&format!("{deep}new"), "").file(&format!("{deep}.wh.old"), "").finish();
    apply(archive.as_slice(), TAR, &overlay.mounts(), &options).unwrap();
    let upper = bind(&overlay.upper, "ro");
    for (lower, upper, names) in [
        (overlay.parent_mounts(), overlay.mounts(), [format!("{deep}.wh.old"), format!("{deep}new")]),
        (Vec::new(), overlay.parent_mounts(), [deep.clone(), format!("{deep}old")]),
        // Both trees are walked, and to a plain one the whiteout is a device.
        (overlay.parent_mounts(), upper, [format!("{deep}old"), format!("{deep}new")]),
    ] {
        let mut layer = Vec::new();
        diff(&lower, &upper, TAR, &mut layer, &DiffOptions::default()).unwrap();
        let found: Vec<String> = tar::Archive::new(layer.as_slice())
            .entries()
            .unwrap()
            .map(|entry| String::from_utf8(entry.unwrap().path_bytes().into_owned()).unwrap())
            .collect();
        for name in names {
            assert!(found.contains(&name), "{} is not among {} names", &name[deep.len()..], found.len());
        }
    }
    // The whole tree is removed, and a file takes its place.
    let archive = Archive::new().file("a", "").finish();
    apply(archive.as_slice(), TAR, &overlay.mounts(), &options).unwrap();
    apply(archive.as_slice(), TAR, &lower, &options).unwrap();
    assert!(overlay.upper.join("a").is_file() && overlay.lowers[0].join("a").is_file());
}
