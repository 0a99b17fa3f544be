//! Trees on disk: listed completely, so that two can be compared, and made at places where overlayfs works.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use davit_model::Mount;
use davit_sys::fs::{get_xattr_at, list_xattr};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::os::fd::AsFd;

/// All that a file is. Folders have no time here when [`list`] is told so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) device: u64,
    pub(crate) time: Option<(i64, i64)>,
    /// The data of a file, or the target of a symlink.
    pub(crate) content: Vec<u8>,
    pub(crate) xattrs: BTreeMap<CString, Vec<u8>>,
    /// The first name of the same inode.
    pub(crate) first_name: Option<PathBuf>,
}

pub(crate) type Listing = BTreeMap<PathBuf, Node>;

/// Everything below `root`.
pub(crate) fn list(root: &Path, folder_times: bool) -> Listing {
    let mut listing = Listing::new();
    let mut inodes = HashMap::new();
    walk(root, Path::new(""), folder_times, &mut listing, &mut inodes);
    listing
}

fn walk(
    root: &Path,
    below: &Path,
    folder_times: bool,
    listing: &mut Listing,
    inodes: &mut HashMap<(u64, u64), PathBuf>,
) {
    let folder = root.join(below);
    let mut names: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    for name in names {
        let path = below.join(&name);
        let full = root.join(&path);
        let metadata = fs::symlink_metadata(&full).unwrap();
        let kind = metadata.file_type();
        let mut content = Vec::new();
        if kind.is_file() {
            content = fs::read(&full).unwrap();
        } else if kind.is_symlink() {
            content = fs::read_link(&full).unwrap().as_os_str().as_bytes().to_vec();
        }
        let first_name = (!kind.is_dir() && metadata.nlink() > 1)
            .then(|| inodes.entry((metadata.dev(), metadata.ino())).or_insert_with(|| path.clone()).clone());
        let mut xattrs = BTreeMap::new();
        if kind.is_file() || kind.is_dir() {
            let parent = fs::File::open(&folder).unwrap();
            for xattr in list_xattr(fs::File::open(&full).unwrap().as_fd()).unwrap() {
                let value =
                    get_xattr_at(parent.as_fd(), name.as_bytes(), &xattr).unwrap().unwrap_or_default();
                xattrs.insert(xattr, value);
            }
        }
        let time = (folder_times || !kind.is_dir()).then(|| (metadata.mtime(), metadata.mtime_nsec()));
        let owner = (metadata.uid(), metadata.gid());
        let device = if kind.is_dir() || kind.is_file() { 0 } else { metadata.rdev() };
        let mode = metadata.mode();
        listing.insert(path.clone(), Node { mode, owner, device, time, content, xattrs, first_name });
        if kind.is_dir() {
            walk(root, &path, folder_times, listing, inodes);
        }
    }
}

/// Fails with the first difference, which is easier to read than two whole listings.
pub(crate) fn assert_same(what: &str, left: &Listing, right: &Listing) {
    for (path, node) in left {
        assert_eq!(Some(node), right.get(path), "{what}: {path:?} (left, right)");
    }
    for path in right.keys() {
        assert!(left.contains_key(path), "{what}: {path:?} is only on the right");
    }
}

/// A folder on a filesystem that overlayfs can use and that has extended attributes.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("davit-test-layer-").tempdir_in("/var/tmp").unwrap()
}

/// True when this process can mount and make devices; says so when not.
pub(crate) fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

pub(crate) fn bind(folder: &Path, access: &str) -> Vec<Mount> {
    vec![Mount {
        kind: "bind".into(),
        source: folder.to_str().unwrap().into(),
        target: String::new(),
        options: vec!["rbind".into(), access.into()],
    }]
}

/// The folders of an overlay, below one scratch folder.
pub(crate) struct Overlay {
    pub(crate) lowers: Vec<PathBuf>,
    pub(crate) upper: PathBuf,
    work: PathBuf,
    merged: PathBuf,
}

impl Overlay {
    /// Makes the folders; `lowers` lower layers, the nearest first.
    pub(crate) fn new(scratch: &Path, lowers: usize) -> Overlay {
        let make = |name: String| {
            let path = scratch.join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        Overlay {
            lowers: (0..lowers).map(|index| make(format!("lower{index}"))).collect(),
            upper: make("upper".into()),
            work: make("work".into()),
            merged: make("merged".into()),
        }
    }

    fn lower_option(&self) -> String {
        let lowers: Vec<_> = self.lowers.iter().map(|lower| lower.to_str().unwrap()).collect();
        format!("lowerdir={}", lowers.join(":"))
    }

    /// The mounts as the overlay snapshotter hands them out for an active snapshot.
    pub(crate) fn mounts(&self) -> Vec<Mount> {
        let options = vec![
            format!("workdir={}", self.work.display()),
            format!("upperdir={}", self.upper.display()),
            self.lower_option(),
        ];
        vec![Mount { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options }]
    }

    /// The mounts of a view of the parent.
    #[allow(dead_code)] // Each of the test programs uses a part of this file.
    pub(crate) fn parent_mounts(&self) -> Vec<Mount> {
        if let [lower] = self.lowers.as_slice() {
            return bind(lower, "ro");
        }
        let options = vec![self.lower_option()];
        vec![Mount { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options }]
    }

    /// Runs `look` on the merged tree.
    pub(crate) fn merged<T>(&self, look: impl FnOnce(&Path) -> T) -> T {
        let data = format!(
            "{},upperdir={},workdir={}",
            self.lower_option(),
            self.upper.display(),
            self.work.display()
        );
        let kind = Some("overlay");
        mount(kind, &self.merged, kind, MsFlags::empty(), Some(data.as_str())).unwrap();
        let guard = Unmount(self.merged.clone());
        let result = look(&self.merged);
        drop(guard);
        result
    }
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

/// The mount points of this process's namespace that a layer could have left.
pub(crate) fn layer_mounts() -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let place = std::env::temp_dir().join("davit-layer-").display().to_string();
    let mount_points = table.lines().filter_map(|line| line.split(' ').nth(4));
    mount_points.filter(|point| point.starts_with(&place)).map(str::to_owned).collect()
}
