//! The walk that finds what differs between two trees, in the order of names, folders before what is in them.
//!
//! The upper tree is either whole, and what is missing in it is removed; or it is the upper folder of an overlay
//! over the lower tree, and holds only what was touched, with overlayfs's marks for what was removed. The second
//! way reads nothing but the changes.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use davit_sys::fs::{get_xattr, get_xattr_at, open_in_root};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, openat, readlinkat};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, fstatat};

use super::error::{EntryFault, Error};
use super::extract::is_folder;
use super::name;
use super::root::FOLDER;
use super::whiteout::{is_whiteout, names};
use super::writer::{CAPABILITY, LayerWriter, OPEN_FILE};

/// The longest path that is walked down to. Nothing longer can be named in one system call, nor be in a layer; and
/// it bounds the depth of the walk.
const PATH_LIMIT: usize = 4095;
/// How many folders of each tree the walk keeps open; deeper ones are opened again by their paths on the way back.
const OPEN_FOLDERS: usize = 64;

/// Writes to `writer` what turns the tree of `lower` (nothing: an empty one) into that of `upper`. `opaque` is
/// given when `upper` is the upper folder of an overlay over `lower`: the attribute that marks opaque folders.
pub(super) fn compare<W: Write>(
    lower: Option<&OwnedFd>,
    upper: &OwnedFd,
    opaque: Option<&'static CStr>,
    writer: &mut LayerWriter<'_, W>,
) -> Result<(), Error> {
    let mut walk = Walk { lower, upper, opaque, writer, path: Vec::new() };
    let root = walk.open_level(lower.is_some())?;
    walk.folder(root, 0)
}

struct Walk<'a, 'b, W> {
    /// The roots of both trees.
    lower: Option<&'a OwnedFd>,
    upper: &'a OwnedFd,
    opaque: Option<&'static CStr>,
    writer: &'a mut LayerWriter<'b, W>,
    /// The path of the folder that the walk is in.
    path: Vec<u8>,
}

/// A folder of the upper tree, and of the lower one if it is compared with that one's.
struct Level {
    lower: Option<OwnedFd>,
    upper: OwnedFd,
}

impl<W: Write> Walk<'_, '_, W> {
    fn folder(&mut self, mut level: Level, depth: usize) -> Result<(), Error> {
        let mut all = names(level.upper.as_fd(), &self.path)?;
        if let (Some(lower), None) = (&level.lower, self.opaque) {
            all.append(&mut names(lower.as_fd(), &self.path)?);
        }
        all.sort_unstable();
        all.dedup();
        for base in all {
            let length = self.path.len();
            if length > 0 {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(&base);
            if self.path.len() > PATH_LIMIT {
                let fault = EntryFault::NameTooLong { length: self.path.len() };
                return Err(Error::entry(&self.path, fault));
            }
            match self.entry(level.lower.as_ref(), &level.upper, &base)? {
                Some(below) if depth < OPEN_FOLDERS => {
                    self.folder(below, depth + 1)?;
                    self.path.truncate(length);
                }
                Some(below) => {
                    let has_lower = level.lower.is_some();
                    drop(level);
                    self.folder(below, depth + 1)?;
                    self.path.truncate(length);
                    level = self.open_level(has_lower)?;
                }
                None => self.path.truncate(length),
            }
        }
        Ok(())
    }

    /// Opens the folder that the walk is in from the roots.
    fn open_level(&self, has_lower: bool) -> Result<Level, Error> {
        let open = |root: &OwnedFd| {
            open_in_root(root.as_fd(), &self.path, FOLDER)
                .map_err(|errno| Error::file("open folder", &self.path, errno))
        };
        let lower = self.lower.filter(|_| has_lower).map(open).transpose()?;
        Ok(Level { lower, upper: open(self.upper)? })
    }

    /// Writes what the layer has to say of an entry. Answers the folder that the walk has to go on in.
    fn entry(
        &mut self,
        lower: Option<&OwnedFd>,
        upper: &OwnedFd,
        base: &[u8],
    ) -> Result<Option<Level>, Error> {
        let before = match lower {
            Some(lower) => self.stat(lower, base)?,
            None => None,
        };
        let after = self.stat(upper, base)?.filter(|stat| {
            let marks_removal = self.opaque.is_some() && is_whiteout(stat.st_mode, stat.st_rdev);
            let is_socket = stat.st_mode & libc::S_IFMT == libc::S_IFSOCK;
            !marks_removal && !is_socket
        });
        if name::is_reserved(base) {
            tracing::warn!(
                path = super::error::text(&self.path),
                "name left out of the layer: it is a whiteout"
            );
            return Ok(None);
        }
        match (before, after) {
            (None, None) => {}
            (Some(before), None) if before.st_mode & libc::S_IFMT == libc::S_IFSOCK => {}
            (Some(_), None) => self.writer.removal(&self.path)?,
            (before, Some(after)) if is_folder(&after) => {
                return self.common_folder(lower, before, upper, &after, base).map(Some);
            }
            (before, Some(after)) => {
                let same = match (lower, before) {
                    (Some(lower), Some(before)) => self.is_same(lower, &before, upper, &after, base)?,
                    _ => false,
                };
                if same {
                    self.writer.unmodified(&self.path, &after)?;
                } else {
                    self.writer.entry(upper, base, &self.path, &after)?;
                }
            }
        }
        Ok(None)
    }

    /// A folder of the upper tree, and of the lower one if `before` is a folder too.
    fn common_folder(
        &mut self,
        lower: Option<&OwnedFd>,
        before: Option<FileStat>,
        upper: &OwnedFd,
        after: &FileStat,
        base: &[u8],
    ) -> Result<Level, Error> {
        let folder = self.open(upper, base)?;
        let mut lower_folder = match (lower, &before) {
            (Some(lower), Some(before)) if is_folder(before) => Some(self.open(lower, base)?),
            _ => None,
        };
        let same = match (lower, &before) {
            (Some(lower), Some(before)) => self.is_same(lower, before, upper, after, base)?,
            _ => false,
        };
        if !same {
            self.writer.folder(&self.path, after)?;
        }
        if let (Some(attribute), Some(_)) = (self.opaque, &lower_folder) {
            let value = get_xattr(folder.as_fd(), attribute)
                .map_err(|errno| Error::file("read xattr of", &self.path, errno))?;
            if value.as_deref() == Some(b"y") {
                self.writer.folder(&self.path, after)?;
                self.writer.opaque(&self.path)?;
                lower_folder = None;
            }
        }
        Ok(Level { lower: lower_folder, upper: folder })
    }

    /// True when nothing of an entry that a layer can hold has changed. The time of a folder alone is no change:
    /// it follows from what is in it. A file whose time, to the nanosecond, and size are the same is not read,
    /// unless the time has no nanoseconds on either side: then it may come from an archive, which cut them off.
    fn is_same(
        &self,
        lower: &OwnedFd,
        before: &FileStat,
        upper: &OwnedFd,
        after: &FileStat,
        base: &[u8],
    ) -> Result<bool, Error> {
        if (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino) {
            return Ok(true);
        }
        let metadata = |stat: &FileStat| (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_rdev);
        if metadata(before) != metadata(after) {
            return Ok(false);
        }
        if is_folder(after) {
            return Ok(true);
        }
        let time = |stat: &FileStat| (stat.st_mtime, stat.st_mtime_nsec);
        if before.st_size != after.st_size || time(before) != time(after) {
            return Ok(false);
        }
        match after.st_mode & libc::S_IFMT {
            libc::S_IFLNK => {
                let target = |folder: &OwnedFd| {
                    readlinkat(folder, base).map_err(|errno| Error::file("read symlink", &self.path, errno))
                };
                Ok(target(lower)? == target(upper)?)
            }
            libc::S_IFREG => {
                let capability = |folder: &OwnedFd| {
                    get_xattr_at(folder.as_fd(), base, CAPABILITY)
                        .map_err(|errno| Error::file("read xattr of", &self.path, errno))
                };
                if capability(lower)? != capability(upper)? {
                    return Ok(false);
                }
                Ok(after.st_mtime_nsec != 0
                    || after.st_size == 0
                    || self.has_same_content(lower, upper, base)?)
            }
            _ => Ok(true),
        }
    }

    fn has_same_content(&self, lower: &OwnedFd, upper: &OwnedFd, base: &[u8]) -> Result<bool, Error> {
        const BUFFER_SIZE: usize = 64 * 1024;
        let open = |folder: &OwnedFd| {
            openat(folder, base, OPEN_FILE, Mode::empty())
                .map(File::from)
                .map_err(|errno| Error::file("open", &self.path, errno))
        };
        let read = |file: &mut File, buffer: &mut [u8]| -> Result<usize, Error> {
            let mut length = 0;
            while length < buffer.len() {
                match file.read(&mut buffer[length..]) {
                    Ok(0) => break,
                    Ok(count) => length += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
                        return Err(Error::file("read", &self.path, errno));
                    }
                }
            }
            Ok(length)
        };
        let (mut first, mut second) = (open(lower)?, open(upper)?);
        let (mut one, mut other) = (vec![0; BUFFER_SIZE], vec![0; BUFFER_SIZE]);
        loop {
            let length = read(&mut first, &mut one)?;
            if length != read(&mut second, &mut other)? || one[..length] != other[..length] {
                return Ok(false);
            }
            if length < BUFFER_SIZE {
                return Ok(true);
            }
        }
    }

    fn stat(&self, folder: &OwnedFd, base: &[u8]) -> Result<Option<FileStat>, Error> {
        match fstatat(folder, base, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(Error::file("stat", &self.path, errno)),
        }
    }

    fn open(&self, folder: &OwnedFd, base: &[u8]) -> Result<OwnedFd, Error> {
        openat(folder, base, FOLDER, Mode::empty())
            .map_err(|errno| Error::file("open folder", &self.path, errno))
    }
}
