//! Where snapshotters can be tried: a folder on a filesystem that is right for them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use davit_model::Mount;
use davit_sys::mount::{mount_all, unmount_all};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::{Which, may_mount};

/// The size of a snapshot of files: enough for the suite.
const SCRATCH_SIZE: u64 = 16 << 20;

/// A folder, empty in the beginning, with all that is mounted for it.
pub(super) struct Ground {
    folder: tempfile::TempDir,
    path: PathBuf,
    mounted: bool,
}

impl Ground {
    /// `None`, and says so, where the snapshotter cannot be tried.
    pub(super) fn new(which: Which) -> Option<Ground> {
        if !may_mount() {
            return None;
        }
        // Mounts of this thread alone: whoever makes a namespace meanwhile would have copies, and a filesystem lasts as long
        // as any.
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(folder.path()).unwrap().join("ground");
        fs::create_dir(&path).unwrap();
        let skip = |reason: &str| {
            eprintln!("skipped: {} needs {reason}", which.name());
            None
        };
        let mut ground = Ground { folder, path, mounted: false };
        match which {
            Which::Overlayfs | Which::Native => {}
            Which::Btrfs => {
                let image = ground.folder.path().join("image");
                if make(&image, 512 << 20, "mkfs.btrfs", &[]).is_none() {
                    return skip("btrfs-progs (apt-get install btrfs-progs)");
                }
                if let Err(error) = mount_all(&[image_mount("btrfs", &image)], &ground.path) {
                    return skip(&davit_model::error::chain(&error));
                }
                ground.mounted = true;
            }
            Which::Blockfile => {
                if !Path::new("/dev/loop-control").exists() {
                    return skip("/dev/loop-control");
                }
            }
            Which::Erofs => {
                let known = fs::read_to_string("/proc/filesystems").unwrap();
                if !known.contains("\terofs\n") {
                    return skip("a kernel with erofs");
                }
            }
        }
        Some(ground)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Fails when something below is mounted, or on a loop device that does not end.
    pub(super) fn assert_unused(&self) {
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let below = format!("{}/", self.path.display());
        assert!(!mounts.contains(&below), "a mount is left: {mounts}");
        let used = || {
            let devices = fs::read_dir("/sys/block").unwrap().flatten();
            let files =
                devices.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
            files.into_iter().find(|file| Path::new(file.trim_end()).starts_with(&self.path))
        };
        let limit = Instant::now() + Duration::from_secs(30);
        while let Some(file) = used() {
            assert!(Instant::now() < limit, "a loop device is left on {file}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if self.mounted {
            unmount_all(&self.path).unwrap();
        }
    }
}

fn image_mount(kind: &str, image: &Path) -> Mount {
    Mount {
        kind: kind.into(),
        source: image.display().to_string(),
        target: String::new(),
        options: vec!["loop".into()],
    }
}

fn make(image: &Path, size: u64, program: &str, arguments: &[&str]) -> Option<()> {
    File::create(image).unwrap().set_len(size).unwrap();
    let made = Command::new(program).arg("-q").args(arguments).arg(image).output();
    made.is_ok_and(|made| made.status.success()).then_some(())
}

/// A file with an empty filesystem, as an administrator makes one. All runs share it; it goes with the target folder.
pub(super) fn scratch() -> PathBuf {
    static SCRATCH: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let path = folder.join("scratch");
        if path.exists() {
            return path;
        }
        let work = tempfile::tempdir_in(folder).unwrap();
        let (new, point) = (work.path().join("new"), work.path().join("point"));
        fs::create_dir(&point).unwrap();
        make(&new, SCRATCH_SIZE, "mkfs.ext4", &["-J", "size=4"]).expect("mkfs.ext4 is everywhere");
        mount_all(&[image_mount("ext4", &new)], &point).unwrap();
        // A snapshot without parent is empty.
        fs::remove_dir(point.join("lost+found")).unwrap();
        fs::set_permissions(&point, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        unmount_all(&point).unwrap();
        fs::rename(new, &path).unwrap();
        path
    };
    SCRATCH.get_or_init(make).clone()
}
