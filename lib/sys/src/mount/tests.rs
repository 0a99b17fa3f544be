//! Real mounts, each test in a mount namespace of its own, so that nothing is left behind even by a failure.

use std::fs::{create_dir, create_dir_all, read_to_string, write};
use std::os::unix::fs::{MetadataExt, symlink};

use nix::sched::{CloneFlags, unshare};

use super::*;

mod helpers;
mod images;

const INTERFACES: [Interface; 2] = [Interface::Newest, Interface::Classic];

/// Runs `test` in a thread with its own mount namespace and an empty folder; not without root.
fn isolated(test: impl FnOnce(&Path) + Send) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = fs::canonicalize(folder.path()).unwrap();
    std::thread::scope(|scope| {
        let work = || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            nix::mount::mount(None::<&Path>, "/", None::<&Path>, flags, None::<&Path>).unwrap();
            test(&path);
        };
        if let Err(panic) = scope.spawn(work).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
    Mount {
        kind: kind.to_owned(),
        source: source.to_str().unwrap().to_owned(),
        target: String::new(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

fn overlay(options: &[String]) -> Mount {
    Mount { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options: options.into() }
}

fn folder(parent: &Path, name: &str) -> PathBuf {
    let path = parent.join(name);
    create_dir_all(&path).unwrap();
    path
}

/// The lines of mountinfo for mount points at or below `path`.
fn mounts_at(path: &Path) -> Vec<String> {
    let table = read_to_string("/proc/thread-self/mountinfo").unwrap();
    table
        .lines()
        .filter(|line| Path::new(line.split(' ').nth(4).unwrap()).starts_with(path))
        .map(str::to_owned)
        .collect()
}

#[test]
fn a_bind_mount_is_writable_or_not() {
    isolated(|dir| {
        let (source, target) = (folder(dir, "source"), folder(dir, "target"));
        for interface in INTERFACES {
            mount_one(&mount("bind", &source, &["rbind", "rw"]), &target, interface).unwrap();
            write(target.join("file"), "x").unwrap();
            unmount(&target, MntFlags::empty()).unwrap();
            mount_one(&mount("bind", &source, &["rbind", "ro", "nosuid"]), &target, interface).unwrap();
            let error = write(target.join("file"), "y").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::EROFS as i32), "{interface:?}");
            let line = mounts_at(&target).pop().unwrap();
            assert!(line.split(' ').nth(5).unwrap().contains("nosuid"), "{line}");
            // The source has not become read-only.
            write(source.join("file"), "z").unwrap();
            unmount_all(&target).unwrap();
        }
        assert_eq!(mounts_at(dir), Vec::<String>::new());
    });
}

#[test]
fn a_file_can_be_bound_on_a_file() {
    isolated(|dir| {
        write(dir.join("a"), "a").unwrap();
        write(dir.join("b"), "b").unwrap();
        mount_all(&[mount("bind", &dir.join("a"), &["bind", "ro"])], &dir.join("b")).unwrap();
        assert_eq!(read_to_string(dir.join("b")).unwrap(), "a");
    });
}

#[test]
fn an_overlay_shows_the_nearest_layer_and_keeps_the_lower_ones() {
    isolated(|dir| {
        for interface in INTERFACES {
            let base = folder(dir, &format!("{interface:?}"));
            let (near, far) = (folder(&base, "near"), folder(&base, "far"));
            write(near.join("file"), "near").unwrap();
            write(far.join("file"), "far").unwrap();
            write(far.join("only"), "far").unwrap();
            let (upper, work, target) =
                (folder(&base, "upper"), folder(&base, "work"), folder(&base, "target"));
            let options = [
                format!("workdir={}", work.display()),
                format!("upperdir={}", upper.display()),
                format!("lowerdir={}:{}", near.display(), far.display()),
                "index=off".to_owned(),
            ];
            mount_one(&overlay(&options), &target, interface).unwrap();
            assert_eq!(read_to_string(target.join("file")).unwrap(), "near");
            write(target.join("only"), "upper").unwrap();
            unmount_all(&target).unwrap();
            assert_eq!(read_to_string(far.join("only")).unwrap(), "far");
            assert_eq!(read_to_string(upper.join("only")).unwrap(), "upper");
        }
    });
}

#[test]
fn more_layers_than_a_page_can_name() {
    isolated(|dir| {
        let before = std::env::current_dir().unwrap();
        let layers = folder(dir, &"long".repeat(30));
        let mut paths = Vec::new();
        for index in 0..200 {
            let layer = folder(&layers, &format!("{index}/fs"));
            write(layer.join("file"), index.to_string()).unwrap();
            write(layer.join(format!("file-{index}")), "").unwrap();
            paths.push(layer.display().to_string());
        }
        let list = format!("lowerdir={}", paths.join(":"));
        assert!(list.len() > 16384);
        let target = folder(dir, "target");
        for interface in INTERFACES {
            mount_one(&overlay(std::slice::from_ref(&list)), &target, interface).unwrap();
            assert_eq!(read_to_string(target.join("file")).unwrap(), "0");
            assert_eq!(fs::read_dir(&target).unwrap().count(), 201);
            unmount_all(&target).unwrap();
        }
        assert_eq!(std::env::current_dir().unwrap(), before);
    });
}

#[test]
fn a_value_too_long_for_fsconfig_goes_the_old_way() {
    isolated(|dir| {
        let layer = folder(dir, &["deeper"; 80].join("/"));
        write(layer.join("file"), "x").unwrap();
        let (other, target) = (folder(dir, "other"), folder(dir, "target"));
        let list = format!("lowerdir={}:{}", layer.display(), other.display());
        assert!(list.len() > LONGEST_VALUE * 2);
        mount_all(&[overlay(&[list])], &target).unwrap();
        assert_eq!(read_to_string(target.join("file")).unwrap(), "x");
    });
}

#[test]
fn a_failure_undoes_what_was_mounted_before() {
    isolated(|dir| {
        let (source, target) = (folder(dir, "source"), folder(dir, "target"));
        create_dir(source.join("sub")).unwrap();
        let missing = overlay(&["lowerdir=/nonexistent-a:/nonexistent-b".to_owned()]);
        let below = Mount { target: "sub".into(), ..mount("tmpfs", Path::new("tmpfs"), &[]) };
        let error = mount_all(&[mount("bind", &source, &["bind"]), below, missing], &target).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::ENOENT));
        let text = error.to_string();
        assert!(text.contains("/nonexistent-a"), "{text}");
        assert_eq!(mounts_at(dir), Vec::<String>::new());
    });
}

#[test]
fn the_kernel_says_what_is_wrong_with_an_option() {
    isolated(|dir| {
        let error =
            mount_all(&[mount("tmpfs", Path::new("tmpfs"), &["size=1m", "nonsense=1"])], dir).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("nonsense=1") && text.contains("Unknown parameter 'nonsense'"), "{text}");
        let error = mount_all(&[mount("no-such-fs", Path::new("none"), &[])], dir).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::ENODEV));
        assert_eq!(mounts_at(dir), Vec::<String>::new());
    });
}

#[test]
fn refuses_what_belongs_to_others() {
    isolated(|dir| {
        for kind in ["format/overlay", "mkdir/bind"] {
            let error = mount_all(&[mount(kind, dir, &[])], dir).unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        }
        let error = mount_all(&[mount("ext4", dir, &["loop"])], dir).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::EISDIR), "no file: {error}");
    });
}

#[test]
fn a_path_below_the_target_cannot_leave_it() {
    isolated(|dir| {
        let (root, outside) = (folder(dir, "root"), folder(dir, "outside"));
        let inside = root.join(outside.strip_prefix("/").unwrap());
        create_dir_all(&inside).unwrap();
        symlink(&outside, root.join("absolute")).unwrap();
        symlink("../../../../../../../../../..", root.join("up")).unwrap();
        let outside_up = format!("up{}", outside.display());
        for path in ["absolute", "/absolute", &outside_up] {
            for interface in INTERFACES {
                let tmpfs = Mount { target: path.to_owned(), ..mount("tmpfs", Path::new("tmpfs"), &[]) };
                mount_one(&tmpfs, &root, interface).unwrap();
                assert_eq!(mounts_at(&outside).len(), 0, "{path}");
                assert_eq!(mounts_at(&inside).len(), 1, "{path}");
                unmount_all(&root).unwrap();
                assert_eq!(mounts_at(dir).len(), 0, "{path}");
            }
        }
    });
}

#[test]
fn a_target_that_is_a_link_is_refused() {
    isolated(|dir| {
        let real = folder(dir, "real");
        symlink(&real, dir.join("link")).unwrap();
        let error = mount_all(&[mount("tmpfs", Path::new("tmpfs"), &[])], &dir.join("link")).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::ELOOP));
        // Nor does an unmount follow it.
        mount_all(&[mount("tmpfs", Path::new("tmpfs"), &[])], &real).unwrap();
        unmount_all(&dir.join("link")).unwrap();
        assert_eq!(mounts_at(&real).len(), 1);
    });
}

#[test]
fn propagation_is_set_after_attaching() {
    isolated(|dir| {
        let (source, target) = (folder(dir, "source"), folder(dir, "target"));
        for interface in INTERFACES {
            mount_one(&mount("bind", &source, &["rbind", "rshared"]), &target, interface).unwrap();
            assert!(mounts_at(&target)[0].contains(" shared:"), "{interface:?}");
            mount_one(&mount("bind", &target, &["bind", "ro", "slave"]), &source, interface).unwrap();
            assert!(mounts_at(&source)[0].contains(" master:"), "{interface:?}");
            unmount_all(&source).unwrap();
            unmount_all(&target).unwrap();
        }
    });
}

#[test]
fn id_mappings_shift_owners_of_binds_and_lower_layers() {
    isolated(|dir| {
        let map = ["uidmap=0:100000:65536".to_owned(), "gidmap=0:200000:65536".to_owned()];
        for interface in INTERFACES {
            let base = folder(dir, &format!("{interface:?}"));
            let (near, far) = (folder(&base, "1/fs"), folder(&base, "2/fs"));
            write(near.join("near"), "").unwrap();
            write(far.join("far"), "").unwrap();
            std::os::unix::fs::chown(far.join("far"), Some(7), Some(8)).unwrap();
            let (upper, work, target) =
                (folder(&base, "upper"), folder(&base, "work"), folder(&base, "target"));
            let mut options = map.to_vec();
            options.extend([
                format!("workdir={}", work.display()),
                format!("upperdir={}", upper.display()),
                format!("lowerdir={}:{}", near.display(), far.display()),
            ]);
            mount_one(&overlay(&options), &target, interface).unwrap();
            assert_eq!(mounts_at(&target).len(), 1, "{interface:?}");
            let (one, other) =
                (target.join("near").metadata().unwrap(), target.join("far").metadata().unwrap());
            assert_eq!((one.uid(), one.gid()), (100_000, 200_000), "{interface:?}");
            assert_eq!((other.uid(), other.gid()), (100_007, 200_008), "{interface:?}");
            unmount_all(&target).unwrap();

            let mut options = vec!["bind"];
            options.extend(map.iter().map(String::as_str));
            match mount_one(&mount("bind", &far, &options), &target, interface) {
                Ok(_) => assert_eq!(target.join("far").metadata().unwrap().uid(), 100_007),
                Err(error) => assert!(matches!(error, Error::Unsupported { .. }), "{error}"),
            }
            unmount_all(&target).unwrap();
        }
        assert_eq!(mounts_at(dir), Vec::<String>::new());
    });
}

#[test]
fn detach_all_takes_all_and_keeps_the_filesystems_for_as_long_as_asked() {
    isolated(|path| {
        let target = folder(path, "target");
        mount_all(&[mount("tmpfs", path, &[])], &target).unwrap();
        write(target.join("first"), "1").unwrap();
        mount_all(&[mount("tmpfs", path, &[])], &target).unwrap();
        let below = folder(&target, "below");
        mount_all(&[mount("tmpfs", path, &[])], &below).unwrap();
        let kept = detach_all(&target).unwrap();
        assert_eq!(kept.len(), 2, "one for each mount on the target");
        assert_eq!(mounts_at(&target), Vec::<String>::new());
        let lower =
            fs::File::open(format!("/proc/self/fd/{}/first", std::os::fd::AsRawFd::as_raw_fd(&kept[1])));
        lower.unwrap();
        assert!(detach_all(&target).unwrap().is_empty(), "nothing is left to take");

        let deep = folder(&target, "deep");
        mount_all(&[mount("tmpfs", path, &[])], &deep).unwrap();
        assert_eq!(detach_all(&target).unwrap().len(), 1, "a mount below a target that has none itself");
        assert_eq!(mounts_at(&target), Vec::<String>::new());
        assert!(detach_all(&target.join("absent")).unwrap().is_empty());
    });
}

#[test]
fn unmount_all_takes_stacks_submounts_and_busy_ones() {
    isolated(|dir| {
        let tmpfs = mount("tmpfs", Path::new("tmpfs"), &[]);
        for _ in 0..3 {
            mount_all(std::slice::from_ref(&tmpfs), dir).unwrap();
        }
        create_dir(dir.join("a b")).unwrap();
        mount_all(std::slice::from_ref(&tmpfs), &dir.join("a b")).unwrap();
        let open = fs::File::create(dir.join("a b/file")).unwrap();
        unmount_all(dir).unwrap();
        assert_eq!(mounts_at(dir).len(), 0);
        drop(open);

        // Only below, in folders whose names mountinfo escapes.
        create_dir_all(dir.join("c d\\/e\nf")).unwrap();
        mount_all(std::slice::from_ref(&tmpfs), &dir.join("c d\\")).unwrap();
        create_dir(dir.join("c d\\/e\nf")).unwrap();
        mount_all(std::slice::from_ref(&tmpfs), &dir.join("c d\\/e\nf")).unwrap();
        unmount_all(dir).unwrap();
        assert_eq!(mount_points_below(dir).unwrap(), Vec::<PathBuf>::new());

        unmount_all(dir).unwrap();
        unmount_all(&dir.join("missing")).unwrap();
        unmount(&dir.join("missing"), MntFlags::empty()).unwrap();
    });
}

/// A link in place of a bundle's `rootfs` shall not get the mounts of the host taken off (the class of CVE-2021-30465).
#[test]
fn nothing_is_unmounted_through_a_link() {
    isolated(|dir| {
        let host = folder(dir, "host");
        let point = folder(&host, "point");
        mount_all(&[mount("tmpfs", Path::new("tmpfs"), &[])], &point).unwrap();
        let link = dir.join("rootfs");
        for target in [&host, &point] {
            symlink(target, &link).unwrap();
            unmount_all(&link).unwrap();
            assert!(detach_all(&link).unwrap().is_empty());
            assert_eq!(mounts_at(&point).len(), 1, "{}", target.display());
            fs::remove_file(&link).unwrap();
        }
        unmount_all(&host).unwrap();
        assert!(mounts_at(&point).is_empty());
    });
}

#[test]
fn remount_changes_what_is_there() {
    isolated(|dir| {
        mount_all(&[mount("tmpfs", Path::new("tmpfs"), &[])], dir).unwrap();
        mount_all(&[mount("tmpfs", Path::new("tmpfs"), &["remount", "ro"])], dir).unwrap();
        assert_eq!(write(dir.join("x"), "").unwrap_err().raw_os_error(), Some(Errno::EROFS as i32));
        assert_eq!(mounts_at(dir).len(), 1);
    });
}
