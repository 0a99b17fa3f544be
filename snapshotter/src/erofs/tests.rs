//! Images, as the kernel reads them.

use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::process::Command;

use davit_sys::fs::{get_xattr, list_xattr, set_xattr};
use davit_sys::mount::unmount_all;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::*;

/// False, and says so, when the test cannot mount.
fn may_mount() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount_all(&self.0).unwrap();
    }
}

/// Makes an image of a folder and mounts it; `None`, and says so, where the kernel has no erofs.
fn show(folder: &Path, from: &Path) -> Option<Mounted> {
    let (path, target) = (folder.join("image"), folder.join("target"));
    fs::create_dir(&target).unwrap();
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    collect::write_image(from, &file).unwrap();
    let mount = Mount {
        kind: "erofs".into(),
        source: path.display().to_string(),
        target: String::new(),
        options: vec!["ro".into(), "loop".into()],
    };
    match mount_all(&[mount], &target) {
        Ok(()) => Some(Mounted(target)),
        Err(error) if error.errno() == Some(Errno::ENODEV) => {
            eprintln!("skipped: needs erofs");
            None
        }
        Err(error) => panic!("{}", davit_model::error::chain(&error)),
    }
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let file = File::open(path).unwrap();
    let names = list_xattr(file.as_fd()).unwrap();
    names
        .into_iter()
        .filter_map(|name| Some((name.to_bytes().to_vec(), get_xattr(file.as_fd(), &name).unwrap()?)))
        .collect()
}

/// Compares two trees by all that the kernel says of them; gives the number of entries.
fn compare(one: &Path, other: &Path) -> usize {
    let (a, b) = (one.symlink_metadata().unwrap(), other.symlink_metadata().unwrap());
    let facts = |data: &fs::Metadata| {
        let size = if data.is_dir() { 0 } else { data.size() };
        let links = if data.is_dir() { 0 } else { data.nlink() };
        (data.mode(), data.uid(), data.gid(), data.mtime(), data.mtime_nsec(), size, links, data.rdev())
    };
    assert_eq!(facts(&a), facts(&b), "{}", one.display());
    if a.is_symlink() {
        assert_eq!(fs::read_link(one).unwrap(), fs::read_link(other).unwrap());
    } else if a.is_file() {
        assert!(fs::read(one).unwrap() == fs::read(other).unwrap(), "{}", one.display());
        assert_eq!(xattrs(one), xattrs(other), "{}", one.display());
    } else if a.is_dir() {
        assert_eq!(xattrs(one), xattrs(other), "{}", one.display());
        let names = |path: &Path| {
            let mut names: Vec<_> =
                fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(one), names(other), "{}", one.display());
        return 1 + names(one).iter().map(|name| compare(&one.join(name), &other.join(name))).sum::<usize>();
    }
    1
}

/// A tree with everything that is awkward. Under the crate, since a tmpfs may have no user attributes.
fn awkward() -> tempfile::TempDir {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let tree = folder.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::set_permissions(&tree, fs::Permissions::from_mode(0o1751)).unwrap();
    for (name, length) in [("empty", 0), ("one", 1), ("block", 4096), ("more", 4097), ("large", 300_001)] {
        let content: Vec<u8> = (0..length).map(|byte: u32| (byte % 251) as u8).collect();
        fs::write(tree.join("a").join(name), content).unwrap();
    }
    let sparse = File::create(tree.join("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_at(&sparse, b"middle", 5 << 20).unwrap();
    sparse.set_len(64 << 20).unwrap();
    fs::hard_link(tree.join("a/one"), tree.join("a/b/another")).unwrap();
    fs::hard_link(tree.join("a/one"), tree.join("a third")).unwrap();
    chown(tree.join("a/one"), Some(70_000), Some(4_000_000_000)).unwrap();
    fs::set_permissions(tree.join("a/one"), fs::Permissions::from_mode(0o6755)).unwrap();
    symlink("a/one", tree.join("short")).unwrap();
    symlink("x".repeat(4095), tree.join("long")).unwrap();
    for (name, kind, device) in [
        ("null", SFlag::S_IFCHR, makedev(1, 3)),
        ("whiteout", SFlag::S_IFCHR, makedev(0, 0)),
        ("disk", SFlag::S_IFBLK, makedev(259, 300_000)),
        ("pipe", SFlag::S_IFIFO, 0),
        ("socket", SFlag::S_IFSOCK, 0),
    ] {
        mknod(&tree.join(name), kind, Mode::from_bits_truncate(0o640), device).unwrap();
    }
    // Names around the dots, and more than fit one block.
    for name in ["-", "!", ".a", "..a", "...", "~", &"n".repeat(255)] {
        fs::write(tree.join("a/b").join(name), name).unwrap();
    }
    fs::create_dir(tree.join("many")).unwrap();
    for number in 0..2000 {
        fs::write(tree.join(format!("many/{number:0>40}")), "").unwrap();
    }
    let deep = tree.join("d/".repeat(120));
    fs::create_dir_all(deep).unwrap();
    let set = |path: &str, name: &std::ffi::CStr, value: &[u8]| {
        set_xattr(File::open(tree.join(path)).unwrap().as_fd(), name, value).unwrap();
    };
    set("a/one", c"user.short", b"v");
    set("a/one", c"security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    set("a/large", c"user.large", &[9; 3000]);
    set("a", c"trusted.overlay.opaque", b"y");
    set("many", c"user.empty", b"");
    let old = nix::sys::time::TimeSpec::new(-1000, 42);
    nix::sys::stat::futimens(File::open(tree.join("a/more")).unwrap(), &old, &old).unwrap();
    folder
}

#[test]
fn an_image_is_what_it_was_made_of() {
    if !may_mount() {
        return;
    }
    let folder = awkward();
    let tree = folder.path().join("tree");
    let Some(mounted) = show(folder.path(), &tree) else { return };
    assert_eq!(compare(&tree, &mounted.0), 2146);
    let number = |name: &str| mounted.0.join(name).metadata().unwrap().ino();
    assert_eq!(number("a/one"), number("a/b/another"));
    assert_eq!(number("a/b/.."), number("a"));
    assert_eq!(fs::metadata(mounted.0.join("a")).unwrap().nlink(), 3);
    let top = image::top_of(&File::open(folder.path().join("image")).unwrap()).unwrap();
    assert_eq!(top, (0o1751, 0, 0));
    let blocks = fs::metadata(folder.path().join("image")).unwrap().blocks();
    assert!(blocks * 512 < 4 << 20, "holes are not filled: {blocks} blocks");
}

#[test]
fn notes_of_an_upper_folder_are_left_out() {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let tree = folder.path().join("tree");
    fs::create_dir(&tree).unwrap();
    if !may_mount() {
        return;
    }
    let open = File::open(&tree).unwrap();
    for name in [c"trusted.overlay.origin", c"trusted.overlay.impure", c"trusted.overlay.redirect"] {
        set_xattr(open.as_fd(), name, b"y").unwrap();
    }
    let Some(mounted) = show(folder.path(), &tree) else { return };
    let names: Vec<_> = xattrs(&mounted.0).into_keys().collect();
    assert_eq!(names, [b"trusted.overlay.redirect".to_vec()]);
}

/// What others make of the same image: erofs's own checker reads every block of it.
#[test]
fn the_checker_of_erofs_finds_no_fault() {
    if !may_mount() {
        return;
    }
    let folder = awkward();
    let path = folder.path().join("image");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    collect::write_image(&folder.path().join("tree"), &file).unwrap();
    match Command::new("fsck.erofs").arg(&path).output() {
        Err(_) => eprintln!("skipped: needs fsck.erofs (apt-get install erofs-utils)"),
        Ok(output) => assert!(output.status.success(), "{output:?}"),
    }
}

#[test]
fn what_is_no_image_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    for content in [vec![], vec![0; 100], vec![0; 8192], vec![0xe2; 8192]] {
        fs::write(&path, content).unwrap();
        assert!(image::top_of(&File::open(&path).unwrap()).is_err());
    }
}

#[test]
fn an_immutable_image_can_be_removed_by_its_snapshotter_alone() {
    if !may_mount() {
        return;
    }
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let databases = tempfile::tempdir().unwrap();
    let db = Db::open(databases.path(), davit_metadata::EngineKind::Redb).unwrap();
    let config = Config { set_immutable: true, ..Config::default() };
    let erofs = match Erofs::open(&folder.path().join("root"), db, config) {
        Ok(erofs) => erofs,
        Err(Error::NoErofs) => return eprintln!("skipped: needs erofs"),
        Err(error) => panic!("{}", davit_model::error::chain(&error)),
    };
    erofs.prepare("active", None, &Labels::new()).unwrap();
    erofs.commit("name", "active", &Labels::new(), None).unwrap();
    let path = erofs.image(1);
    let denied = fs::remove_file(&path).is_err();
    erofs.remove("name").unwrap();
    erofs.cleanup().unwrap();
    assert!(!path.exists());
    assert!(denied, "the image could be removed");
}

#[test]
fn of_two_that_apply_a_layer_none_passes_the_others_file_for_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let first = Applied::begin(folder.path()).unwrap();
    let second = Applied::begin(folder.path()).unwrap();
    let lost = first.finish().unwrap_err();
    assert_eq!(lost.raw_os_error(), Some(Errno::ENOENT as i32));
    assert!(!has_applied(folder.path()));
    drop(second);
    let one = Applied::begin(folder.path()).unwrap();
    std::io::Write::write_all(&mut one.file(), b"whole").unwrap();
    one.finish().unwrap();
    assert_eq!(fs::read(folder.path().join(APPLIED)).unwrap(), b"whole");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}
