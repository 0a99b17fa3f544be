//! Walking, counting and deleting trees of files that containers made: of any depth, while they change, and with
//! other filesystems mounted somewhere inside.
//!
//! A mount inside of a snapshot's folder is not part of the snapshot (a volume can show up there by mount
//! propagation), so no walk ever enters one, and deleting a snapshot cannot delete a volume.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::{FileError, Usage};

/// The most folders that a walk keeps open; deeper ones are found again by their names on the way back.
const OPEN_FOLDERS: usize = 64;

const FOLDER: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Opens a folder by its path; a symbolic link in the last place is refused.
pub(crate) fn open_folder(path: &Path) -> Result<OwnedFd, FileError> {
    open(path, FOLDER, Mode::empty()).map_err(FileError::at("open folder", path))
}

/// Opens the folder `name` of an open one: `EXDEV` if something is mounted there, `ENOTDIR` or `ELOOP` if it is
/// no folder.
pub(crate) fn open_subfolder(folder: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new().flags(FOLDER).resolve(ResolveFlag::RESOLVE_NO_XDEV);
    match openat2(folder, name, how) {
        // Before Linux 5.6 a mount of another filesystem is still seen by its device number.
        Err(Errno::ENOSYS) => {
            let opened = openat(folder, name, FOLDER, Mode::empty())?;
            if fstat(&opened)?.st_dev == fstat(folder)?.st_dev { Ok(opened) } else { Err(Errno::EXDEV) }
        }
        result => result,
    }
}

/// The mode bits that say which kind of file it is.
pub(crate) fn file_kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// True when the entries of a folder come with their types (`d_type` of getdents(2)).
pub(crate) fn tells_types(path: &Path) -> Result<bool, FileError> {
    let mut listing = Dir::from_fd(open_folder(path)?).map_err(FileError::at("read folder", path))?;
    for entry in listing.iter() {
        if entry.map_err(FileError::at("read folder", path))?.file_type().is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What to do on a walk.
pub(crate) trait Visitor {
    /// An entry of `folder`, of this kind if the filesystem says so without being asked; true to walk into it.
    fn enter(&mut self, folder: BorrowedFd<'_>, name: &CStr, kind: Option<Type>) -> Result<bool, Errno>;

    /// An entry of `folder` was walked through.
    fn leave(&mut self, _folder: BorrowedFd<'_>, _name: &CStr) -> Result<(), Errno> {
        Ok(())
    }
}

/// A folder that the walk is in.
struct Level {
    name: CString,
    folder: Option<OwnedFd>,
    /// The folders in it that are yet to be walked through.
    rest: Vec<CString>,
}

/// Walks through everything below `root`, each folder before what is in it. What vanishes meanwhile, turns into
/// something else or lies on another mount is passed over.
pub(crate) fn walk(root: OwnedFd, visitor: &mut impl Visitor) -> Result<(), Errno> {
    let rest = visit_entries(root.as_fd(), visitor)?;
    let mut levels = vec![Level { name: CString::default(), folder: Some(root), rest }];
    // The last level is always open.
    while let Some(Level { folder: Some(folder), rest, .. }) = levels.last_mut() {
        if let Some(name) = rest.pop() {
            match open_subfolder(folder.as_fd(), &name) {
                Ok(opened) => {
                    let rest = visit_entries(opened.as_fd(), visitor)?;
                    levels.push(Level { name, folder: Some(opened), rest });
                    // The root stays open: all others are found from there.
                    if let Some(index @ 1..) = levels.len().checked_sub(OPEN_FOLDERS + 1) {
                        levels[index].folder = None;
                    }
                }
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                Err(Errno::EXDEV) => visitor.leave(folder.as_fd(), &name)?,
                Err(errno) => return Err(errno),
            }
        } else {
            let done = levels.pop();
            reopen_last(&mut levels)?;
            if let (Some(done), Some(Level { folder: Some(folder), .. })) = (done, levels.last()) {
                visitor.leave(folder.as_fd(), &done.name)?;
            }
        }
    }
    Ok(())
}

/// Opens the last level again if it was closed, with some above it, by the names from the nearest open one.
fn reopen_last(levels: &mut [Level]) -> Result<(), Errno> {
    let Some(nearest) = levels.iter().rposition(|level| level.folder.is_some()) else { return Ok(()) };
    let Some(Level { folder: Some(folder), .. }) = levels.get(nearest) else { return Ok(()) };
    let mut folder = duplicate(folder.as_fd())?;
    let count = levels.len();
    for (index, level) in levels.iter_mut().enumerate().skip(nearest + 1) {
        folder = open_subfolder(folder.as_fd(), &level.name)?;
        if index + OPEN_FOLDERS >= count {
            level.folder = Some(duplicate(folder.as_fd())?);
        }
    }
    Ok(())
}

fn duplicate(folder: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    folder.try_clone_to_owned().map_err(|error| error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw))
}

/// Shows every entry of a folder to the visitor; answers those to walk into.
fn visit_entries(folder: BorrowedFd<'_>, visitor: &mut impl Visitor) -> Result<Vec<CString>, Errno> {
    let mut descend = Vec::new();
    for entry in Dir::from_fd(duplicate(folder)?)?.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        if visitor.enter(folder, name, entry.file_type())? {
            descend.push(name.to_owned());
        }
    }
    Ok(descend)
}

/// Counts what a folder and all below it take on disk. Hard links to one inode count once.
pub(crate) fn usage(path: &Path) -> Result<Usage, FileError> {
    count(path, |_, _, _| Ok(false))
}

/// Counts what a folder and all below it take on disk that is not in `base`, of which it is a copy with the inodes' numbers
/// kept: what has the same number, size and time of change there is the same. The top folder counts always.
pub(crate) fn usage_beyond(path: &Path, base: &Path) -> Result<Usage, FileError> {
    let root = open_folder(base)?;
    // Folders of the copy by their inodes, and where they are below the top.
    let mut places: HashMap<u64, PathBuf> = HashMap::new();
    let top = fstat(open_folder(path)?).map_err(FileError::at("fstat", path))?.st_ino;
    places.insert(top, PathBuf::new());
    count(path, |folder, name, stat| {
        let Some(place) = places.get(&fstat(folder)?.st_ino) else { return Ok(false) };
        let place = place.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
        // What cannot be found there, for whatever reason, counts.
        let below = fstatat(&root, &place, AtFlags::AT_SYMLINK_NOFOLLOW);
        let same = below.is_ok_and(|below| {
            let facts = |stat: &FileStat| (stat.st_ino, stat.st_size, stat.st_ctime, stat.st_ctime_nsec);
            facts(&below) == facts(stat)
        });
        if file_kind(stat) == SFlag::S_IFDIR {
            places.insert(stat.st_ino, place);
        }
        Ok(same)
    })
}

/// Counts what a folder and all below it take on disk, without the entries that `skip` knows.
fn count(
    path: &Path,
    skip: impl FnMut(BorrowedFd<'_>, &CStr, &FileStat) -> Result<bool, Errno>,
) -> Result<Usage, FileError> {
    struct Count<S> {
        usage: Usage,
        linked: HashSet<(u64, u64)>,
        skip: S,
    }
    impl<S> Count<S> {
        fn add(&mut self, stat: &FileStat) {
            if file_kind(stat) != SFlag::S_IFDIR
                && stat.st_nlink > 1
                && !self.linked.insert((stat.st_dev, stat.st_ino))
            {
                return;
            }
            // The unit is 512 bytes whatever the filesystem's block size (stat(3type)).
            self.usage.size += stat.st_blocks * 512;
            self.usage.inodes += 1;
        }
    }
    impl<S: FnMut(BorrowedFd<'_>, &CStr, &FileStat) -> Result<bool, Errno>> Visitor for Count<S> {
        fn enter(&mut self, folder: BorrowedFd<'_>, name: &CStr, _: Option<Type>) -> Result<bool, Errno> {
            match fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(stat) => {
                    if !(self.skip)(folder, name, &stat)? {
                        self.add(&stat);
                    }
                    Ok(file_kind(&stat) == SFlag::S_IFDIR)
                }
                Err(Errno::ENOENT) => Ok(false),
                Err(errno) => Err(errno),
            }
        }
    }
    let root = open_folder(path)?;
    let mut count = Count { usage: Usage::default(), linked: HashSet::new(), skip };
    count.add(&fstat(&root).map_err(FileError::at("fstat", path))?);
    walk(root, &mut count).map_err(FileError::at("count files of", path))?;
    Ok(count.usage)
}

/// Deletes a folder and all below it. What cannot be deleted stays, with the folders above it; the error is the
/// first of those. A folder that is not there is no error.
pub(crate) fn remove(path: &Path) -> Result<(), FileError> {
    struct Delete {
        first: Option<Errno>,
    }
    impl Delete {
        fn note(&mut self, result: Result<(), Errno>) {
            match result {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(errno) => self.first = self.first.or(Some(errno)),
            }
        }
    }
    impl Visitor for Delete {
        fn enter(&mut self, folder: BorrowedFd<'_>, name: &CStr, kind: Option<Type>) -> Result<bool, Errno> {
            if kind == Some(Type::Directory) {
                return Ok(true);
            }
            match unlinkat(folder, name, UnlinkatFlags::NoRemoveDir) {
                Err(Errno::EISDIR) => Ok(true),
                result => {
                    self.note(result);
                    Ok(false)
                }
            }
        }

        fn leave(&mut self, folder: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
            let result = unlinkat(folder, name, UnlinkatFlags::RemoveDir);
            self.note(result);
            Ok(())
        }
    }
    let root = match open(path, FOLDER, Mode::empty()) {
        Ok(root) => root,
        Err(Errno::ENOENT) => return Ok(()),
        Err(errno) => return Err(FileError::at("open folder", path)(errno)),
    };
    let mut delete = Delete { first: None };
    walk(root, &mut delete).map_err(FileError::at("delete", path))?;
    if delete.first.is_none() {
        let result = unlinkat(AT_FDCWD, path, UnlinkatFlags::RemoveDir);
        delete.note(result);
    }
    match delete.first {
        None => Ok(()),
        Some(errno) => Err(FileError::at("delete", path)(errno)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use nix::sys::stat::mkdirat;

    use super::*;

    /// A chain of folders too deep for any path, and for one descriptor each.
    fn dig(path: &Path, depth: usize) {
        let mut folder = open_folder(path).unwrap();
        for _ in 0..depth {
            mkdirat(&folder, c"dddddddd", Mode::from_bits_truncate(0o700)).unwrap();
            folder = open_subfolder(folder.as_fd(), c"dddddddd").unwrap();
        }
    }

    #[test]
    fn any_depth_is_counted_and_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("deep");
        fs::create_dir(&deep).unwrap();
        dig(&deep, 1500);
        assert_eq!(usage(&deep).unwrap().inodes, 1501);
        remove(&deep).unwrap();
        assert!(!deep.exists());
        remove(&deep).unwrap();
    }

    #[test]
    fn hard_links_count_once_and_links_are_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (inside, outside) = (folder.path().join("inside"), folder.path().join("outside"));
        fs::create_dir_all(inside.join("sub")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("keep"), vec![1; 100_000]).unwrap();
        fs::write(inside.join("a"), vec![1; 100_000]).unwrap();
        fs::hard_link(inside.join("a"), inside.join("sub/b")).unwrap();
        symlink(&outside, inside.join("out")).unwrap();
        let counted = usage(&inside).unwrap();
        assert_eq!(counted.inodes, 4, "two folders, one file, one symbolic link");
        assert!((100_000..200_000).contains(&counted.size), "{counted:?}");
        remove(&inside).unwrap();
        assert!(outside.join("keep").exists());
    }

    #[test]
    fn a_mount_inside_is_neither_counted_nor_deleted() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let (inside, volume) = (folder.path().join("inside"), folder.path().join("volume"));
        fs::create_dir_all(inside.join("mnt")).unwrap();
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("precious"), "x").unwrap();
        let bind = davit_model::Mount {
            kind: "bind".into(),
            source: volume.to_str().unwrap().into(),
            target: String::new(),
            options: vec!["bind".into()],
        };
        davit_sys::mount::mount_all(&[bind], &inside.join("mnt")).unwrap();
        let result = std::panic::catch_unwind(|| {
            assert_eq!(usage(&inside).unwrap().inodes, 2);
            let error = remove(&inside).unwrap_err();
            assert_eq!(error.source.raw_os_error(), Some(Errno::EBUSY as i32));
        });
        davit_sys::mount::unmount_all(&inside.join("mnt")).unwrap();
        result.unwrap();
        assert!(volume.join("precious").exists());
        remove(&inside).unwrap();
    }
}
