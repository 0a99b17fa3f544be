//! Filesystems in files, and lists of mounts of which the last is made of the others.

use std::process::Command;

use super::*;

/// Makes a file with a filesystem in it; `None`, and says so, where the program or the loop devices are missing.
fn image(dir: &Path, name: &str, program: &str) -> Option<PathBuf> {
    let path = dir.join(name);
    fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    let made = Command::new(program).arg("-q").arg(&path).status().is_ok_and(|status| status.success());
    if !made || !Path::new("/dev/loop-control").exists() {
        eprintln!("skipped: needs {program} and /dev/loop-control");
        return None;
    }
    Some(path)
}

/// True when no loop device has one of the files below `dir`, now or soon.
fn no_device_left(dir: &Path) -> bool {
    let used = || {
        let devices = fs::read_dir("/sys/block").unwrap().flatten();
        let mut files =
            devices.filter_map(|device| read_to_string(device.path().join("loop/backing_file")).ok());
        files.any(|file| Path::new(file.trim_end()).starts_with(dir))
    };
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while used() && std::time::Instant::now() < limit {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    !used()
}

/// Unmounts what nobody uses any more. What another test forks has the files that this one has open at that moment, until it
/// executes.
fn unmount_idle(target: &Path) {
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        match unmount(target, MntFlags::empty()) {
            Err(error) if error.errno() == Some(Errno::EBUSY) && std::time::Instant::now() < limit => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            unmounted => return unmounted.unwrap(),
        }
    }
}

#[test]
fn a_file_is_mounted_by_a_loop_device_that_ends_with_the_mount() {
    isolated(|dir| {
        let Some(image) = image(dir, "image", "mkfs.ext4") else { return };
        let target = folder(dir, "target");
        for interface in INTERFACES {
            for options in [&["loop", "rw"][..], &["loop", "direct-io"], &["loop", "ro"]] {
                mount_one(&mount("ext4", &image, options), &target, interface).unwrap();
                assert!(mounts_at(&target)[0].contains("/dev/loop"), "{:?}", mounts_at(&target));
                let written = write(target.join("file"), "x");
                assert_eq!(written.is_err(), options.contains(&"ro"), "{interface:?} {options:?}");
                unmount_idle(&target);
                assert!(no_device_left(dir), "{interface:?} {options:?}");
            }
        }
        // A file that holds no such filesystem leaves no device either.
        let error = mount_all(&[mount("xfs", &image, &["loop"])], &target).unwrap_err();
        assert!(error.to_string().contains("image"), "{error}");
        let error = mount_all(&[mount("ext4", &dir.join("none"), &["loop"])], &target).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::ENOENT));
        assert!(no_device_left(dir));
        // Without the word it is no option of ours.
        assert!(mount_all(&[mount("ext4", &image, &["direct-io"])], &target).is_err());
    });
}

#[test]
fn an_overlay_of_images_is_one_mount() {
    isolated(|dir| {
        let Some(low) = image(dir, "low", "mkfs.ext4") else { return };
        let Some(high) = image(dir, "high", "mkfs.ext4") else { return };
        let (target, upper, work) = (folder(dir, "target"), folder(dir, "upper"), folder(dir, "work"));
        for (path, text) in [(&low, "low"), (&high, "high")] {
            mount_all(&[mount("ext4", path, &["loop"])], &target).unwrap();
            write(target.join(text), text).unwrap();
            write(target.join("both"), text).unwrap();
            unmount_idle(&target);
        }
        let lower = |path| mount("ext4", path, &["loop", "ro"]);
        let (upper, work) = (format!("upperdir={}", upper.display()), format!("workdir={}", work.display()));
        let top = |lowers: &str| {
            mount(
                "format/mkdir/overlay",
                Path::new("overlay"),
                &[&work, &upper, &format!("lowerdir={lowers}")],
            )
        };
        mount_all(&[lower(&high), lower(&low), top("{{ overlay 0 1 }}")], &target).unwrap();
        assert_eq!(read_to_string(target.join("low")).unwrap(), "low");
        assert_eq!(read_to_string(target.join("both")).unwrap(), "high");
        write(target.join("new"), "x").unwrap();
        assert_eq!(mounts_at(dir).len(), 1, "{:?}", mounts_at(dir));
        unmount_idle(&target);
        assert!(no_device_left(dir));
        assert!(dir.join("upper/new").exists());

        // After an error nothing is mounted.
        for (lowers, code) in
            [("{{ overlay 0 2 }}", ErrorCode::InvalidArgument), ("{{ mount 0 }}/none", ErrorCode::Unknown)]
        {
            let error = mount_all(&[lower(&high), lower(&low), top(lowers)], &target).unwrap_err();
            assert_eq!(error.code(), code, "{error}");
            assert!(mounts_at(dir).is_empty() && no_device_left(dir), "{lowers}");
        }
        let bind = mount("format/bind", Path::new("{{ mount 0 }}"), &["ro", "rbind"]);
        mount_all(&[lower(&low), bind], &target).unwrap();
        assert_eq!(read_to_string(target.join("both")).unwrap(), "low");
        assert_eq!(mounts_at(dir).len(), 1);
        unmount_idle(&target);
        assert!(no_device_left(dir));
    });
}

#[test]
fn what_a_mount_manager_has_to_do_is_left_to_it() {
    isolated(|dir| {
        let lower = mount("bind", dir, &["ro"]);
        let made = mount("format/mkdir/bind", Path::new("{{ mount 0 }}"), &["X-containerd.mkdir.path=/x"]);
        let formatted = mount("mkfs/ext4", dir, &["loop"]);
        for mounts in [[lower.clone(), made], [formatted, lower]] {
            assert_eq!(mount_all(&mounts, dir).unwrap_err().code(), ErrorCode::Unimplemented);
        }
        assert!(mounts_at(dir).is_empty());
    });
}

#[test]
fn a_private_mount_is_seen_by_its_descriptor_alone() {
    isolated(|dir| {
        let Some(image) = image(dir, "image", "mkfs.ext4") else { return };
        let root = mount_privately(&[mount("ext4", &image, &["loop", "rw"])]).unwrap();
        let table = read_to_string("/proc/thread-self/mountinfo").unwrap();
        assert!(!table.contains("davit-mount-"), "{table}");
        let path = classic::fd_path(&root);
        assert!(path.join("lost+found").is_dir());
        assert_eq!(write(path.join("new"), "x").unwrap_err().raw_os_error(), Some(Errno::EROFS as i32));
        drop(root);
        assert!(no_device_left(dir));
        assert_eq!(mount_privately(&[mount("xfs", dir, &[])]).unwrap_err().code(), ErrorCode::Unknown);
    });
}
