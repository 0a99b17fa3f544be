//! Copying a tree with all that makes it what it is: owners, modes, times, extended attributes, hard links, holes,
//! devices, sockets and pipes.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use davit_sys::fs::{get_xattr, list_xattr, set_xattr};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, copy_file_range, openat, readlinkat};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmod, fchmodat, fstat, fstatat, futimens,
    mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, Whence, fchown, fchownat, ftruncate, linkat, lseek, symlinkat};

use crate::FileError;
use crate::tree::{file_kind, open_folder, open_subfolder};

/// The deepest folder that is copied; each level takes two descriptors and a stack frame.
const DEEPEST: usize = 256;

struct Copy<'a> {
    /// The top of the copy.
    to: BorrowedFd<'a>,
    /// Where the first of several hard links went, below the top, by device and inode.
    linked: HashMap<(u64, u64), PathBuf>,
    /// Where the copy is now, below the top.
    place: PathBuf,
}

/// Copies the contents of the folder `from`, and what it looks like itself, into the empty folder `to`.
///
/// Nothing else writes to `from`: it belongs to a committed snapshot. A mount inside of it is copied as the empty
/// folder that it hides, at best.
pub(super) fn copy_tree(from: &Path, to: &Path) -> Result<(), FileError> {
    let (source, target) = (open_folder(from)?, open_folder(to)?);
    let mut copy = Copy { to: target.as_fd(), linked: HashMap::new(), place: PathBuf::new() };
    let result = copy.folder(source.as_fd(), target.as_fd(), 0);
    let place = from.join(&copy.place);
    result.map_err(FileError::at("copy", place))
}

impl Copy<'_> {
    /// Leaves `place` where it failed.
    fn folder(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> Result<(), Errno> {
        if depth > DEEPEST {
            return Err(Errno::ENAMETOOLONG);
        }
        let listing = from.try_clone_to_owned().map_err(|_| Errno::EMFILE)?;
        for entry in Dir::from_fd(listing)?.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.place.push(std::ffi::OsStr::from_bytes(name.to_bytes()));
            self.entry(from, to, name, depth)?;
            self.place.pop();
        }
        // Last, since every new entry is a change of the folder.
        finish(from, to, &fstat(from)?)
    }

    fn entry(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        name: &CStr,
        depth: usize,
    ) -> Result<(), Errno> {
        let stat = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let kind = file_kind(&stat);
        if kind == SFlag::S_IFDIR {
            mkdirat(to, name, Mode::S_IRWXU)?;
            let target = open_subfolder(to, name)?;
            return match open_subfolder(from, name) {
                Ok(source) => self.folder(source.as_fd(), target.as_fd(), depth + 1),
                Err(Errno::EXDEV) => Ok(()),
                Err(errno) => Err(errno),
            };
        }
        if stat.st_nlink > 1 {
            match self.linked.entry((stat.st_dev, stat.st_ino)) {
                std::collections::hash_map::Entry::Occupied(first) => {
                    return linkat(self.to, first.get(), to, name, AtFlags::empty());
                }
                std::collections::hash_map::Entry::Vacant(vacant) => {
                    vacant.insert(self.place.clone());
                }
            }
        }
        if kind == SFlag::S_IFREG {
            return file(from, to, name, &stat);
        }
        if kind == SFlag::S_IFLNK {
            symlinkat(readlinkat(from, name)?.as_os_str(), to, name)?;
        } else {
            mknodat(to, name, kind, Mode::empty(), stat.st_rdev)?;
        }
        let (user, group) = owner(&stat);
        fchownat(to, name, Some(user), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        if kind != SFlag::S_IFLNK {
            // It was just made as something else than a link, in a folder that nobody else can write to.
            fchmodat(to, name, mode(&stat), FchmodatFlags::FollowSymlink)?;
        }
        let (accessed, modified) = times(&stat);
        utimensat(to, name, &accessed, &modified, UtimensatFlags::NoFollowSymlink)
    }
}

fn file(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, stat: &FileStat) -> Result<(), Errno> {
    let flags = OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let source = File::from(openat(from, name, flags | OFlag::O_RDONLY, Mode::empty())?);
    let create = flags | OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
    let target = File::from(openat(to, name, create, Mode::S_IRUSR | Mode::S_IWUSR)?);
    copy_data(&source, &target, stat.st_size)?;
    finish(source.as_fd(), target.as_fd(), stat)
}

/// Copies what a file holds, without its holes. Blocks are shared where the filesystem can
/// (`copy_file_range` tries that first since Linux 5.3).
pub(crate) fn copy_data(source: &File, target: &File, size: i64) -> Result<(), Errno> {
    copy_extents(source, target, 0, size)?;
    ftruncate(target, size)
}

/// Copies what the first `size` bytes of a file hold, without the holes, to `place` in another.
pub(crate) fn copy_extents(source: &File, target: &File, place: i64, size: i64) -> Result<(), Errno> {
    let mut position = 0;
    while position < size {
        let start = match lseek(source, position, Whence::SeekData) {
            Ok(start) => start,
            // No more data: a hole up to the end.
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(errno),
        };
        let end = lseek(source, start, Whence::SeekHole)?.min(size);
        copy_range(source, target, start, end, place)?;
        position = end;
    }
    Ok(())
}

fn copy_range(source: &File, target: &File, start: i64, end: i64, place: i64) -> Result<(), Errno> {
    let (mut read, mut written) = (start, place + start);
    while read < end {
        let length = usize::try_from(end - read).unwrap_or(usize::MAX).min(1 << 30);
        match copy_file_range(source, Some(&mut read), target, Some(&mut written), length) {
            Ok(0) => break,
            Ok(_) => {}
            Err(Errno::ENOSYS | Errno::EXDEV | Errno::EINVAL | Errno::EOPNOTSUPP) => {
                return copy_bytes(source, target, read, end, place);
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn copy_bytes(source: &File, target: &File, start: i64, end: i64, place: i64) -> Result<(), Errno> {
    lseek(source, start, Whence::SeekSet)?;
    lseek(target, place + start, Whence::SeekSet)?;
    let mut rest = io::Read::take(source, u64::try_from(end - start).unwrap_or(0));
    let mut target = target;
    io::copy(&mut rest, &mut target)
        .map(drop)
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}

/// Gives an open file or folder the looks of another.
fn finish(from: BorrowedFd<'_>, to: BorrowedFd<'_>, stat: &FileStat) -> Result<(), Errno> {
    let (user, group) = owner(stat);
    // A change of owner takes setuid bits and file capabilities away, so those come after it.
    fchown(to, Some(user), Some(group))?;
    fchmod(to, mode(stat))?;
    for name in list_xattr(from)? {
        if let Some(value) = get_xattr(from, &name)? {
            match set_xattr(to, &name, &value) {
                // Some attributes are the kernel's or a security module's own, and cannot be copied.
                Ok(()) | Err(Errno::ENOTSUP | Errno::EPERM | Errno::EACCES | Errno::EINVAL) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
    let (accessed, modified) = times(stat);
    futimens(to, &accessed, &modified)
}

fn owner(stat: &FileStat) -> (Uid, Gid) {
    (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid))
}

fn mode(stat: &FileStat) -> Mode {
    Mode::from_bits_truncate(stat.st_mode & 0o7777)
}

fn times(stat: &FileStat) -> (TimeSpec, TimeSpec) {
    (TimeSpec::new(stat.st_atime, stat.st_atime_nsec), TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

    use nix::sys::stat::{makedev, mknod};

    use super::*;

    #[test]
    fn a_copy_is_what_it_was_copied_from() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("a/suid"), "x").unwrap();
        chown(from.join("a/suid"), Some(12), Some(13)).unwrap();
        fs::set_permissions(from.join("a/suid"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::set_permissions(from.join("a/b"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::hard_link(from.join("a/suid"), from.join("a/b/again")).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        std::os::unix::fs::lchown(from.join("link"), Some(5), Some(6)).unwrap();
        mknod(&from.join("null"), SFlag::S_IFCHR, Mode::S_IRUSR, makedev(1, 3)).unwrap();
        mknod(&from.join("pipe"), SFlag::S_IFIFO, Mode::S_IRUSR, 0).unwrap();
        let xattr = File::open(from.join("a/b")).unwrap();
        set_xattr(xattr.as_fd(), c"trusted.test", b"value").unwrap();
        let sparse = File::create(from.join("sparse")).unwrap();
        std::os::unix::fs::FileExt::write_at(&sparse, b"middle", 1 << 20).unwrap();
        sparse.set_len(64 << 20).unwrap();
        let old = TimeSpec::new(1000, 42);
        futimens(&sparse, &old, &old).unwrap();
        futimens(&xattr, &old, &old).unwrap();

        copy_tree(&from, &to).unwrap();

        for name in ["", "a", "a/suid", "a/b", "a/b/again", "link", "null", "pipe", "sparse"] {
            let (one, other) =
                (from.join(name).symlink_metadata().unwrap(), to.join(name).symlink_metadata().unwrap());
            assert_eq!(
                (one.mode(), one.uid(), one.gid()),
                (other.mode(), other.uid(), other.gid()),
                "{name}"
            );
            assert_eq!((one.mtime(), one.mtime_nsec()), (other.mtime(), other.mtime_nsec()), "{name}");
            assert_eq!((one.rdev(), one.nlink()), (other.rdev(), other.nlink()), "{name}");
        }
        assert_eq!(
            fs::metadata(to.join("a/suid")).unwrap().ino(),
            fs::metadata(to.join("a/b/again")).unwrap().ino()
        );
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/nowhere"));
        let copied = File::open(to.join("a/b")).unwrap();
        assert_eq!(get_xattr(copied.as_fd(), c"trusted.test").unwrap().as_deref(), Some(&b"value"[..]));
        assert_eq!(fs::read(from.join("sparse")).unwrap(), fs::read(to.join("sparse")).unwrap());
        assert!(fs::metadata(to.join("sparse")).unwrap().blocks() * 512 < 1 << 20, "the holes are filled");
    }

    #[test]
    fn bytes_are_copied_where_ranges_cannot_be() {
        let folder = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..100_000u32).map(|number| number as u8).collect();
        fs::write(folder.path().join("from"), &data).unwrap();
        let (source, target) = (
            File::open(folder.path().join("from")).unwrap(),
            File::create(folder.path().join("to")).unwrap(),
        );
        copy_bytes(&source, &target, 0, 100_000, 0).unwrap();
        assert_eq!(fs::read(folder.path().join("to")).unwrap(), data);
    }
}
