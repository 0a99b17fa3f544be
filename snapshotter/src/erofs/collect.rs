//! Making an image of a folder of changes.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use davit_sys::fs::{get_xattr, get_xattr_at, list_xattr, list_xattr_at};
use nix::dir::Type;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};

use super::image::{Attributes, Image, Index};
use crate::FileError;
use crate::tree::{Visitor, file_kind, open_folder, walk};

/// What overlayfs notes in an upper folder about where things have come from. It is of no meaning in a lower layer, where
/// they no longer are; what hides or redirects is, and stays.
const UPPER_NOTES: [&str; 5] = ["origin", "impure", "nlink", "uuid", "upper"];

struct Collect<'a> {
    image: Image<'a>,
    /// Folders and inodes with several names, by device and number.
    known: HashMap<(u64, u64), Index>,
}

/// Writes an image of all that is in `folder` to an empty file. Nothing is synced.
pub(super) fn write_image(folder: &Path, file: &File) -> Result<(), FileError> {
    let root = open_folder(folder)?;
    let failed = FileError::at::<Errno>("stat", folder);
    let top = fstat(&root).and_then(|stat| {
        let names = list_xattr(root.as_fd())?;
        let attributes = attributes(&stat, names, |name| get_xattr(root.as_fd(), name))?;
        Ok((identity(&stat), attributes))
    });
    let (top, attributes) = top.map_err(failed)?;
    let mut image = Image::new(file);
    let known = HashMap::from([(top, image.add_folder(attributes))]);
    let mut collect = Collect { image, known };
    walk(root, &mut collect).map_err(FileError::at("make an image of", folder))?;
    collect.image.finish().map_err(FileError::at("write the image of", folder))
}

fn identity(stat: &FileStat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn attributes(
    stat: &FileStat,
    names: Vec<CString>,
    get: impl Fn(&CStr) -> Result<Option<Vec<u8>>, Errno>,
) -> Result<Attributes, Errno> {
    let mut xattrs = Vec::new();
    for name in names {
        if is_upper_note(name.to_bytes()) {
            continue;
        }
        if let Some(value) = get(&name)? {
            xattrs.push((name.into_bytes(), value));
        }
    }
    Ok(Attributes {
        mode: stat.st_mode,
        user: stat.st_uid,
        group: stat.st_gid,
        modified: (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0)),
        xattrs,
    })
}

fn is_upper_note(name: &[u8]) -> bool {
    let prefixes: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];
    let note = prefixes.iter().find_map(|prefix| name.strip_prefix(*prefix));
    note.is_some_and(|note| UPPER_NOTES.iter().any(|known| known.as_bytes() == note))
}

impl Visitor for Collect<'_> {
    fn enter(&mut self, folder: BorrowedFd<'_>, name: &CStr, _: Option<Type>) -> Result<bool, Errno> {
        let Some(&parent) = self.known.get(&identity(&fstat(folder)?)) else { return Ok(false) };
        let stat = match fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => return Ok(false),
            result => result?,
        };
        let kind = file_kind(&stat);
        let (bytes, shared) = (name.to_bytes(), kind != SFlag::S_IFDIR && stat.st_nlink > 1);
        if shared && let Some(&index) = self.known.get(&identity(&stat)) {
            self.image.name(parent, bytes, index);
            return Ok(false);
        }
        let names = list_xattr_at(folder, bytes)?;
        let attributes = attributes(&stat, names, |name| get_xattr_at(folder, bytes, name))?;
        let index = if kind == SFlag::S_IFDIR {
            self.image.add_folder(attributes)
        } else if kind == SFlag::S_IFREG {
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            let source = File::from(openat(folder, name, flags, Mode::empty())?);
            let size = u64::try_from(stat.st_size).unwrap_or(0);
            let added = self.image.add_file(attributes, &source, size);
            added.map_err(|error| error.raw_os_error().map_or(Errno::EFBIG, Errno::from_raw))?
        } else if kind == SFlag::S_IFLNK {
            self.image.add_link(attributes, readlinkat(folder, name)?.as_bytes().to_vec())
        } else {
            self.image.add_node(attributes, stat.st_rdev)
        };
        self.image.name(parent, bytes, index);
        if shared || kind == SFlag::S_IFDIR {
            self.known.insert(identity(&stat), index);
        }
        Ok(kind == SFlag::S_IFDIR)
    }
}
