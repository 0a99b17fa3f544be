//! Cases about files: what is seen through the mounts of a snapshot.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use davit_model::ErrorCode;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::files::{delete, file, folder, mode, owner};
use super::{Case, assert_code, labels};

pub(super) fn usage(case: &Case<'_>) {
    let snapshotter = case.snapshotter;
    let mounted = case.mount(&case.prepare("active", None));
    let empty = snapshotter.usage(&case.key("active")).unwrap();
    assert_eq!(empty.inodes, 1, "the top folder");
    fs::write(mounted.join("big"), vec![7; 1 << 20]).unwrap();
    fs::hard_link(mounted.join("big"), mounted.join("again")).unwrap();
    fs::File::create(mounted.join("sparse")).unwrap().set_len(1 << 30).unwrap();
    // Blocks are allocated by the time that they are on disk.
    fs::File::open(mounted.join("big")).unwrap().sync_all().unwrap();
    let live = snapshotter.usage(&case.key("active")).unwrap();
    let inodes = |is_file| if is_file { 1 } else { 3 };
    assert_eq!(live.inodes, inodes(case.traits.active_is_file), "hard links count once");
    assert!((1 << 20..1 << 21).contains(&(live.size - empty.size)), "{live:?}");
    drop(mounted);
    case.commit("committed", "active");
    let committed = snapshotter.usage(&case.key("committed")).unwrap();
    assert_eq!(committed.inodes, inodes(case.traits.committed_is_file));

    case.prepare("child", Some("committed"));
    let child = snapshotter.usage(&case.key("child")).unwrap();
    if case.traits.usage_excludes_parents {
        assert_eq!(child.inodes, 1);
        assert!(child.size < 1 << 20);
    }
    case.view("view", Some("committed"));
    assert_eq!(snapshotter.usage(&case.key("view")).unwrap(), crate::Usage::default());
    assert_eq!(snapshotter.usage(&case.key("committed")).unwrap(), committed);
}

pub(super) fn view_is_read_only(case: &Case<'_>) {
    case.layer("base", None, &|root| file(root, "foo", "foo", 0o644));
    case.layer("top", Some("base"), &|root| file(root, "bar", "bar", 0o644));
    for parent in [None, Some("base"), Some("top")] {
        let mounted = case.mount(&case.view("view", parent));
        assert!(fs::write(mounted.join("new"), "x").is_err(), "view of {parent:?}");
        if parent.is_some() {
            assert!(fs::write(mounted.join("foo"), "x").is_err());
            assert!(fs::remove_file(mounted.join("foo")).is_err());
        }
        drop(mounted);
        case.snapshotter.remove(&case.key("view")).unwrap();
    }
}

/// Whatever is done in children, a committed snapshot shows what it showed before.
pub(super) fn parents_do_not_change(case: &Case<'_>) {
    let base = |root: &Path| {
        folder(root, "dir", 0o755);
        file(root, "dir/file", "base", 0o644);
        file(root, "file", "base", 0o644);
    };
    case.layer("base", None, &base);
    let flat = case.folder();
    mode(&flat, "", 0o755);
    base(&flat);
    let mounted = case.mount(&case.prepare("one", Some("base")));
    let other = case.mount(&case.prepare("two", Some("base")));
    file(&mounted, "file", "changed", 0o600);
    delete(&mounted, "dir");
    file(&other, "dir/file", "also changed", 0o644);
    owner(&other, "file", 5);
    let view = case.mount(&case.view("view", Some("base")));
    super::files::assert_same(&flat, &view, "the parent");
    assert_eq!(fs::read_to_string(mounted.join("file")).unwrap(), "changed");
    assert!(other.join("dir/file").exists());
}

pub(super) fn rebase(case: &Case<'_>) {
    let snapshotter = case.snapshotter;
    case.layer("base", None, &|root| {
        file(root, "shared", "base", 0o644);
        file(root, "base-only", "base", 0o644);
        mode(root, "", 0o711);
        owner(root, "", 3);
    });
    case.prepare("parentless-active", None);
    let commit = |name: &str, key: &str, parent: &str| {
        snapshotter.commit(&case.key(name), &case.key(key), &labels(&[]), Some(&case.key(parent)))
    };
    let mounted = case.mount(&case.prepare("layer", None));
    file(&mounted, "shared", "layer", 0o644);
    file(&mounted, "layer-only", "layer", 0o644);
    drop(mounted);
    if !snapshotter.capabilities().iter().any(|capability| capability == "rebase") {
        assert_code(commit("rebased", "layer", "base"), ErrorCode::Unimplemented);
        return;
    }
    assert_code(commit("rebased", "layer", "missing"), ErrorCode::NotFound);
    assert_code(commit("rebased", "layer", "parentless-active"), ErrorCode::FailedPrecondition);
    commit("rebased", "layer", "base").unwrap();
    let info = snapshotter.stat(&case.key("rebased")).unwrap();
    assert_eq!(info.parent, Some(case.key("base")));
    let mounted = case.mount(&case.prepare("top", Some("rebased")));
    for (name, content) in [("shared", "layer"), ("layer-only", "layer"), ("base-only", "base")] {
        assert_eq!(fs::read_to_string(mounted.join(name)).unwrap(), content, "{name}");
    }
    let top = mounted.metadata().unwrap();
    assert_eq!((top.mode() & 0o7777, top.uid()), (0o711, 3), "as if it had been prepared on the parent");
    // The new parent counts as one.
    assert_code(snapshotter.remove(&case.key("base")), ErrorCode::FailedPrecondition);
}

pub(super) fn root_permission(case: &Case<'_>) {
    let mounted = case.mount(&case.prepare("active", None));
    assert_eq!(mounted.metadata().unwrap().mode() & 0o7777, 0o755);
    // What a layer makes of it is what the next one begins with.
    mode(&mounted, "", 0o1777);
    owner(&mounted, "", 9);
    drop(mounted);
    case.commit("committed", "active");
    let mounted = case.mount(&case.prepare("child", Some("committed")));
    let top = mounted.metadata().unwrap();
    assert_eq!((top.mode() & 0o7777, top.uid(), top.gid()), (0o1777, 9, 9));
}

pub(super) fn layer_file_update(case: &Case<'_>) {
    case.layers(&[
        &|root| {
            folder(root, "etc", 0o700);
            file(root, "etc/hosts", "mydomain 10.0.0.1", 0o644);
            file(root, "etc/profile", "PATH=/usr/bin", 0o644);
        },
        // Of the same size, and within the same second.
        &|root| {
            file(root, "etc/hosts", "mydomain 10.0.0.2", 0o644);
            file(root, "etc/profile", "PATH=/usr/bin", 0o666);
            folder(root, "root", 0o700);
            file(root, "root/.bashrc", "PATH=/usr/sbin:/usr/bin", 0o644);
        },
    ]);
}

pub(super) fn remove_folder_in_lower_layer(case: &Case<'_>) {
    case.layers(&[
        &|root| {
            folder(root, "lib", 0o700);
            file(root, "lib/hidden", "", 0o644);
        },
        &|root| {
            delete(root, "lib");
            folder(root, "lib", 0o700);
            file(root, "lib/not-hidden", "", 0o644);
        },
        &|root| file(root, "lib/new", "", 0o644),
    ]);
}

/// Files, folders and deletions take each other's place from layer to layer.
pub(super) fn layer_order(case: &Case<'_>) {
    case.layers(&[
        &|root| file(root, "name", "a file", 0o644),
        &|root| {
            delete(root, "name");
            folder(root, "name", 0o755);
            file(root, "name/inside", "1", 0o644);
        },
        &|root| delete(root, "name"),
        &|root| {
            folder(root, "name", 0o711);
            file(root, "name/other", "2", 0o644);
        },
        &|root| {
            delete(root, "name");
            symlink("target", root.join("name")).unwrap();
        },
        &|root| {
            delete(root, "name");
            file(root, "name", "a file again", 0o600);
        },
    ]);
}

pub(super) fn chown(case: &Case<'_>) {
    case.layers(&[
        &|root| {
            folder(root, "opt", 0o700);
            folder(root, "opt/a", 0o700);
            folder(root, "opt/a/b", 0o700);
            file(root, "opt/a/b/file.txt", "hello", 0o4755);
        },
        &|root| {
            for path in ["opt", "opt/a", "opt/a/b", "opt/a/b/file.txt"] {
                owner(root, path, 1);
            }
        },
    ]);
}

pub(super) fn folder_permission_on_commit(case: &Case<'_>) {
    case.layers(&[
        &|root| {
            for name in ["dir1", "dir2", "dir3", "dir4", "dir5"] {
                folder(root, name, 0o700);
            }
            file(root, "dir4/f1", "...", 0o644);
            file(root, "dir5/f1", "...", 0o644);
            for name in ["dir1", "dir2", "dir3", "dir5", "dir5/f1"] {
                owner(root, name, 1);
            }
        },
        &|root| {
            owner(root, "dir2", 0);
            delete(root, "dir3");
            owner(root, "dir4", 1);
            owner(root, "dir4/f1", 1);
        },
        &|root| {
            folder(root, "dir3", 0o700);
            owner(root, "dir3", 1);
            delete(root, "dir5");
            folder(root, "dir5", 0o700);
            owner(root, "dir5", 1);
        },
    ]);
}

pub(super) fn deleted_files_in_child(case: &Case<'_>) {
    case.layers(&[
        &|root| {
            file(root, "foo", "foo\n", 0o777);
            file(root, "foobar", "foobar\n", 0o777);
        },
        &|root| delete(root, "foobar"),
        &|_| {},
    ]);
}

pub(super) fn move_file_from_lower_layer(case: &Case<'_>) {
    case.layers(&[
        &|root| {
            folder(root, "dir1", 0o700);
            file(root, "dir1/f1", "Hello", 0o644);
            folder(root, "dir2", 0o700);
            file(root, "dir2/f2", "...", 0o644);
        },
        &|root| {
            folder(root, "dir3", 0o700);
            file(root, "dir3/f1", "Hello", 0o644);
            delete(root, "dir1");
            fs::hard_link(root.join("dir2/f2"), root.join("dir3/f2")).unwrap();
            delete(root, "dir2/f2");
        },
    ]);
}

pub(super) fn hard_links(case: &Case<'_>) {
    case.layers(&[
        &|root| {
            folder(root, "dir", 0o755);
            file(root, "dir/one", "content", 0o640);
            owner(root, "dir/one", 7);
            fs::hard_link(root.join("dir/one"), root.join("two")).unwrap();
            fs::hard_link(root.join("dir/one"), root.join("three")).unwrap();
        },
        // New links within one layer stay links in those above.
        &|root| {
            file(root, "dir/four", "other", 0o644);
            fs::hard_link(root.join("dir/four"), root.join("five")).unwrap();
        },
        &|root| delete(root, "dir/four"),
        &|_| {},
    ]);
}

pub(super) fn special_files(case: &Case<'_>) {
    case.layers(&[
        &|root| {
            mknod(&root.join("null"), SFlag::S_IFCHR, Mode::empty(), makedev(1, 3)).unwrap();
            mode(root, "null", 0o666);
            mknod(&root.join("pipe"), SFlag::S_IFIFO, Mode::empty(), 0).unwrap();
            mode(root, "pipe", 0o622);
            mknod(&root.join("socket"), SFlag::S_IFSOCK, Mode::empty(), 0).unwrap();
            mode(root, "socket", 0o600);
            symlink("/etc/passwd", root.join("link")).unwrap();
            owner(root, "link", 4);
            symlink("nowhere", root.join("dangling")).unwrap();
        },
        &|root| {
            delete(root, "link");
            symlink("/etc/group", root.join("link")).unwrap();
            delete(root, "null");
            owner(root, "pipe", 11);
        },
    ]);
}

pub(super) fn rename(case: &Case<'_>) {
    let renames_folders = case.traits.renames_folders;
    case.layers(&[
        &|root| {
            folder(root, "dir1", 0o700);
            folder(root, "files", 0o700);
            file(root, "files/f1", "was here first!", 0o644);
            file(root, "files/f2", "nothing interesting", 0o644);
        },
        &|root| {
            if renames_folders {
                fs::rename(root.join("dir1"), root.join("dir2")).unwrap();
            }
            file(root, "files/f1-overwrite", "new content 1", 0o644);
            fs::rename(root.join("files/f1-overwrite"), root.join("files/f1")).unwrap();
            fs::rename(root.join("files/f2"), root.join("files/f3")).unwrap();
        },
    ]);
}

/// The folders of so many layers fill more than the page that mount(2) takes.
pub(super) fn many_layers(case: &Case<'_>) {
    let lowest = |root: &Path| {
        file(root, "bottom", "way at the bottom\n", 0o777);
        file(root, "overwrite", "FIRST!\n", 0o777);
        folder(root, "add", 0o755);
        folder(root, "only", 0o755);
        file(root, "only/bottom", "bye!\n", 0o777);
    };
    let layer = |index: usize| {
        move |root: &Path| {
            file(root, "overwrite", &format!("{index} WAS HERE!\n"), 0o777);
            file(root, &format!("add/file-{index}"), "same\n", 0o755);
            delete(root, "only");
            folder(root, "only", 0o755);
            file(root, &format!("only/file-{index}"), "only me!\n", 0o777);
        }
    };
    let rest: Vec<_> = (1..128).map(layer).collect();
    let mut changes: Vec<&dyn Fn(&Path)> = vec![&lowest];
    changes.extend(rest.iter().map(|change| change as &dyn Fn(&Path)));
    case.layers(&changes);
}
