//! Honest archives: what GNU tar packs comes out as GNU tar itself unpacks it.

use std::fs::{self, File, Permissions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use davit_snapshotter::layer::apply_to_folder;
use davit_sys::fs::set_xattr;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::archive::{Archive, Meta};
use crate::tree::{self, is_root, list, scratch};

/// A tree with everything that tar can hold.
fn furnish(root: &Path, with_xattrs: bool) {
    let long = "long-name-".repeat(20);
    fs::create_dir_all(root.join("a/b/c")).unwrap();
    fs::create_dir_all(root.join(&long).join(&long)).unwrap();
    fs::write(root.join(&long).join(&long).join("file"), "deep").unwrap();
    symlink(format!("{long}/{long}"), root.join("long-link")).unwrap();
    fs::hard_link(root.join(&long).join(&long).join("file"), root.join("a/hard")).unwrap();
    fs::write(root.join("a/empty"), "").unwrap();
    fs::write(root.join("a/ünï\ncode"), "name").unwrap();
    let data: Vec<u8> = (0..3_000_000_u32).map(|index| (index % 251) as u8).collect();
    fs::write(root.join("a/b/large"), data).unwrap();
    symlink("../nowhere", root.join("a/dangling")).unwrap();
    symlink("/etc/passwd", root.join("a/absolute")).unwrap();
    fs::write(root.join("a/suid"), "s").unwrap();
    nix::unistd::chown(&root.join("a/suid"), Some(1000.into()), Some(2000.into())).unwrap();
    fs::set_permissions(root.join("a/suid"), Permissions::from_mode(0o6755)).unwrap();
    fs::set_permissions(root.join("a/b"), Permissions::from_mode(0o1777)).unwrap();
    fs::set_permissions(root.join("a/empty"), Permissions::from_mode(0o000)).unwrap();
    mknod(&root.join("null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o622), makedev(1, 3)).unwrap();
    mknod(&root.join("disk"), SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), makedev(259, 70_000)).unwrap();
    mknod(&root.join("fifo"), SFlag::S_IFIFO, Mode::from_bits_truncate(0o640), 0).unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    for offset in [0, 1 << 20, 5 << 20] {
        sparse.write_all_at(&[7; 5000], offset).unwrap();
    }
    sparse.set_len(9 << 20).unwrap();
    File::create(root.join("hole")).unwrap().set_len(3 << 20).unwrap();
    if with_xattrs {
        let file = File::open(root.join("a/b/large")).unwrap();
        set_xattr(file.as_fd(), c"user.binary", b"\0\n=\x0a x").unwrap();
        // cap_net_bind_service and cap_setpcap, whose bits make a newline.
        let capability = [1, 0, 0, 2, 10, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        set_xattr(file.as_fd(), c"security.capability", &capability).unwrap();
        fs::hard_link(root.join("a/b/large"), root.join("a/same-large")).unwrap();
        set_xattr(File::open(root.join("a/b")).unwrap().as_fd(), c"user.folder", b"1").unwrap();
    }
    for (index, path) in ["a/b/large", "a/suid", "a/b/c", "a/b", "a"].iter().enumerate() {
        let time = UNIX_EPOCH + Duration::new(1_500_000_000 + index as u64, 123_456_789);
        File::open(root.join(path)).unwrap().set_modified(time).unwrap();
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn gnu_tar_and_this_reader_agree_on_every_format() {
    if !is_root() {
        return;
    }
    let scratch = scratch();
    let path = |name: &str| scratch.path().join(name);
    for (index, options) in [
        vec!["--format=gnu"],
        vec!["--format=gnu", "--sparse"],
        vec!["--format=pax"],
        vec!["--format=pax", "--xattrs", "--xattrs-include=*"],
        vec!["--format=pax", "--sparse", "--sparse-version=0.0"],
        vec!["--format=pax", "--sparse", "--sparse-version=0.1"],
        vec!["--format=pax", "--sparse", "--sparse-version=1.0"],
    ]
    .iter()
    .enumerate()
    {
        let xattrs = options.contains(&"--xattrs");
        let (source, theirs, ours) = (
            path(&format!("{index}-source")),
            path(&format!("{index}-theirs")),
            path(&format!("{index}-ours")),
        );
        for folder in [&source, &theirs, &ours] {
            fs::create_dir(folder).unwrap();
        }
        furnish(&source, xattrs);
        let archive = path("archive.tar");
        run(Command::new("tar").args(options).arg("-cf").arg(&archive).arg("-C").arg(&source).arg("."));
        let mut extract = Command::new("tar");
        extract.args(["-xp", "--numeric-owner", "--delay-directory-restore"]);
        if xattrs {
            extract.args(["--xattrs", "--xattrs-include=*"]);
        }
        run(extract.arg("-f").arg(&archive).arg("-C").arg(&theirs));
        apply_to_folder(File::open(&archive).unwrap(), &ours).unwrap();
        let (theirs, ours_listed) = (list(&theirs, true), list(&ours, true));
        assert!(theirs.len() > 15);
        tree::assert_same(&format!("{options:?}"), &theirs, &ours_listed);
        if options.contains(&"--sparse") {
            let metadata = fs::metadata(ours.join("sparse")).unwrap();
            assert!(metadata.blocks() * 512 < metadata.len() / 2, "{options:?}: {}", metadata.blocks());
        }
    }
}

#[test]
fn older_formats_are_read() {
    if !is_root() {
        return;
    }
    let scratch = scratch();
    let source = scratch.path().join("source");
    fs::create_dir_all(source.join("p".repeat(80)).join("q".repeat(60)).join("d")).unwrap();
    fs::write(source.join("p".repeat(80)).join("q".repeat(60)).join("d/f"), "x").unwrap();
    fs::write(source.join("g"), "y").unwrap();
    symlink("g", source.join("l")).unwrap();
    for (format, paths) in [("ustar", "."), ("v7", "./g"), ("v7", "./l")] {
        let archive = scratch.path().join("archive.tar");
        run(Command::new("tar")
            .arg(format!("--format={format}"))
            .arg("-cf")
            .arg(&archive)
            .arg("-C")
            .arg(&source)
            .arg(paths));
        let root = tempfile::tempdir_in(scratch.path()).unwrap();
        apply_to_folder(File::open(&archive).unwrap(), root.path()).unwrap();
        let (expected, found) = (list(&source, false), list(root.path(), false));
        for (path, node) in &found {
            let whole = |time: Option<(i64, i64)>| time.map(|(seconds, _)| seconds);
            assert_eq!(whole(node.time), whole(expected[path].time), "{path:?}");
            assert_eq!(node.content, expected[path].content, "{path:?}");
        }
        assert!(!found.is_empty());
    }
}

#[test]
fn the_last_entry_of_a_name_wins() {
    let root = tempfile::tempdir().unwrap();
    let archive = Archive::new()
        .file("x", "first, and longer")
        .file("x", "second")
        .folder("y/z")
        .file("y", "file")
        .file("z", "file")
        .folder("z")
        .file("z/in", "z")
        .symlink("z", "x")
        .folder("kept")
        .file("kept/file", "kept")
        .entry("kept", b'5', "", b"", &Meta::mode(0o700));
    apply_to_folder(archive.finish().as_slice(), root.path()).unwrap();
    assert_eq!(fs::read_to_string(root.path().join("x")).unwrap(), "second");
    assert_eq!(fs::read_to_string(root.path().join("y")).unwrap(), "file");
    assert_eq!(fs::read_link(root.path().join("z")).unwrap(), Path::new("x"));
    assert_eq!(fs::read_to_string(root.path().join("kept/file")).unwrap(), "kept");
    assert_eq!(fs::metadata(root.path().join("kept")).unwrap().mode() & 0o7777, 0o700);
}

#[test]
fn modes_do_not_depend_on_the_umask_nor_on_the_order() {
    if !is_root() {
        return;
    }
    let root = scratch();
    let archive = Archive::new()
        .file("made/on/the/way", "x")
        .entry("open", b'5', "", b"", &Meta::mode(0o777))
        .entry("open/file", b'0', "", b"", &Meta::mode(0o666))
        .entry("suid", b'0', "", b"", &Meta { uid: 7, gid: 8, mode: 0o6755, ..Meta::default() })
        .entry("shut", b'5', "", b"", &Meta::mode(0))
        .file("shut/file", "x");
    apply_to_folder(archive.finish().as_slice(), root.path()).unwrap();
    let mode = |name: &str| fs::symlink_metadata(root.path().join(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("made/on/the"), mode("open"), mode("open/file")), (0o755, 0o777, 0o666));
    assert_eq!((mode("suid"), mode("shut"), mode("shut/file")), (0o6755, 0, 0o644));
    // The time of a folder is the archive's although things were made in it later.
    assert_eq!(fs::metadata(root.path().join("shut")).unwrap().mtime(), 1_700_000_000);
}

#[test]
fn the_root_keeps_its_own_metadata() {
    let root = tempfile::tempdir().unwrap();
    let before = fs::metadata(root.path()).unwrap();
    let hostile = Meta { mode: 0o777, uid: 5, gid: 5, mtime: 1, pax: Vec::new() };
    let archive = Archive::new()
        .entry("./", b'5', "", b"", &hostile)
        .entry("/", b'5', "", b"", &hostile)
        .entry(".", b'0', "", b"data", &hostile)
        .file("f", "x");
    apply_to_folder(archive.finish().as_slice(), root.path()).unwrap();
    let after = fs::metadata(root.path()).unwrap();
    assert_eq!((before.mode(), before.uid()), (after.mode(), after.uid()));
    assert!(root.path().join("f").exists());
}

#[test]
fn headers_without_data_have_none_whatever_size_they_give() {
    let root = tempfile::tempdir().unwrap();
    let mut archive = Archive::new();
    // The size of a hard link's target, as old writers put it.
    archive = archive.file("f", "data");
    let start = archive.0.len();
    archive = archive.hard_link("h", "f");
    let header = &mut archive.0[start..start + 512];
    header[124..136].copy_from_slice(b"00000000004\0");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    apply_to_folder(archive.file("g", "next").finish().as_slice(), root.path()).unwrap();
    assert_eq!(fs::read_to_string(root.path().join("h")).unwrap(), "data");
    assert_eq!(fs::read_to_string(root.path().join("g")).unwrap(), "next");
}

#[test]
fn global_headers_are_ignored() {
    let root = tempfile::tempdir().unwrap();
    let record = crate::archive::record(b"path", b"elsewhere");
    let archive = Archive::new().raw("g", b'g', "", &record, &Meta::default()).file("f", "x");
    apply_to_folder(archive.finish().as_slice(), root.path()).unwrap();
    assert!(root.path().join("f").exists() && !root.path().join("elsewhere").exists());
}

#[test]
fn a_socket_in_the_place_of_an_entry_goes() {
    let root = tempfile::tempdir().unwrap();
    let _socket = UnixListener::bind(root.path().join("s")).unwrap();
    apply_to_folder(Archive::new().file("s", "x").finish().as_slice(), root.path()).unwrap();
    assert_eq!(fs::read_to_string(root.path().join("s")).unwrap(), "x");
}
