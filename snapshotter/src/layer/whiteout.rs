//! What a layer removes from those below it: by deleting it from a tree that holds them, or by the marks that
//! overlayfs understands in a folder that will lie over theirs.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use davit_sys::fs::{get_xattr, list_xattr, open_in_root, set_xattr};
use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, openat};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, makedev, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, unlinkat};

use super::error::{EntryFault, Error};
use super::extract::{Written, is_folder};
use super::name::Name;
use super::pax::Time;
use super::root::{FOLDER, Missing};
use crate::tree::{Visitor, walk};

/// The mode of a folder that the layer needs but does not have.
pub(super) const FOLDER_MODE: Mode = Mode::from_bits_truncate(0o755);

/// How removals are carried out.
pub(super) enum Whiteouts {
    /// The tree holds what the layers below have: it is deleted.
    Remove,
    /// The tree is the upper folder of an overlay: a whiteout is a character device 0:0, an opaque folder has an
    /// extended attribute (kernel documentation, filesystems/overlayfs, "whiteouts and opaque directories").
    Overlay {
        /// `trusted.overlay.` or, for overlays mounted with `userxattr`, `user.overlay.`.
        prefix: &'static str,
        /// The layers below, the nearest first.
        lowers: Vec<OwnedFd>,
    },
}

impl Whiteouts {
    /// The attribute that makes a folder opaque.
    fn opaque_attribute(prefix: &str) -> &'static CStr {
        if prefix == "user.overlay." { c"user.overlay.opaque" } else { c"trusted.overlay.opaque" }
    }

    /// True for attributes that overlayfs would act upon in this tree.
    pub(super) fn owns_attribute(&self, attribute: &[u8]) -> bool {
        match self {
            Whiteouts::Remove => false,
            Whiteouts::Overlay { prefix, .. } => attribute.starts_with(prefix.as_bytes()),
        }
    }

    /// Leaves the mark of a removal at a place where nothing is.
    pub(super) fn hide(&self, parent: &OwnedFd, name: &Name) -> Result<(), Error> {
        match self {
            Whiteouts::Remove => Ok(()),
            Whiteouts::Overlay { .. } => mknodat(parent, name.base(), SFlag::S_IFCHR, Mode::empty(), 0)
                .map_err(|errno| Error::file("create whiteout", name.path(), errno)),
        }
    }

    /// Makes a folder of an upper folder hide what is below.
    pub(super) fn mark_opaque(&self, folder: &OwnedFd, path: &[u8]) -> Result<(), Error> {
        match self {
            Whiteouts::Remove => Ok(()),
            Whiteouts::Overlay { prefix, .. } => {
                set_xattr(folder.as_fd(), Whiteouts::opaque_attribute(prefix), b"y")
                    .map_err(|errno| Error::file("mark opaque", path, errno))
            }
        }
    }

    /// Hides everything that the layers below have in their roots and this one has not. The mark of an opaque
    /// folder does not count on the root of an overlay, so that each name gets a mark of its own.
    pub(super) fn hide_root(&self, root: &OwnedFd) -> Result<(), Error> {
        let Whiteouts::Overlay { lowers, .. } = self else { return Ok(()) };
        for lower in lowers {
            for base in names(lower.as_fd(), b"")? {
                let error = |errno| Error::file("hide", &base, errno);
                match openat(root, base.as_slice(), FOLDER, Mode::empty()) {
                    Ok(folder) => self.mark_opaque(&folder, &base)?,
                    Err(Errno::ENOENT) => {
                        mknodat(root, base.as_slice(), SFlag::S_IFCHR, Mode::empty(), 0).map_err(error)?;
                    }
                    // A file of this layer hides by itself.
                    Err(Errno::ENOTDIR | Errno::ELOOP) => {}
                    Err(errno) => return Err(error(errno)),
                }
            }
        }
        Ok(())
    }

    /// Removes the mark of a removal again if nothing is below to be hidden. In a folder that lies over none,
    /// overlayfs does not look for marks: there the mark itself would be seen, and could not even be removed.
    pub(super) fn drop_if_idle(&self, root: &OwnedFd, name: &Name) -> Result<(), Error> {
        let Whiteouts::Overlay { lowers, .. } = self else { return Ok(()) };
        // Without lower layers it is not known yet what will be below.
        if lowers.is_empty() || self.exists_below(root, name)? {
            return Ok(());
        }
        let parent = if name.parent().is_empty() {
            openat(root, ".", FOLDER, Mode::empty())
        } else {
            open_in_root(root.as_fd(), name.parent(), FOLDER)
        };
        let Ok(parent) = parent else { return Ok(()) };
        let is_mark = fstatat(&parent, name.base(), AtFlags::AT_SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| is_whiteout(stat.st_mode, stat.st_rdev));
        if is_mark {
            unlinkat(&parent, name.base(), UnlinkatFlags::NoRemoveDir)
                .map_err(|errno| Error::file("remove whiteout", name.path(), errno))?;
        }
        Ok(())
    }

    /// True when overlayfs would find the name in the layers below the tree at `root`.
    fn exists_below(&self, root: &OwnedFd, name: &Name) -> Result<bool, Error> {
        // When the parent is gone or another, the entry may have come by one of this layer.
        let Some(below) = self.below(root, name.parent())? else { return Ok(true) };
        for folder in &below {
            match fstatat(folder, name.base(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(stat) => return Ok(!is_whiteout(stat.st_mode, stat.st_rdev)),
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(Error::file("look below", name.path(), errno)),
            }
        }
        Ok(false)
    }

    /// The folders of the layers below that overlayfs merges with the folder `path` of the tree at `root`, the
    /// nearest first: it follows a path folder by folder through all layers at once. `None` when the tree has no
    /// such folder; symlinks are entries like others to overlayfs.
    fn below(&self, root: &OwnedFd, path: &[u8]) -> Result<Option<Vec<OwnedFd>>, Error> {
        let Whiteouts::Overlay { lowers, prefix } = self else { return Ok(Some(Vec::new())) };
        let error = |errno| Error::file("look below", path, errno);
        let copy = |folder: &OwnedFd| folder.try_clone().map_err(|_| error(Errno::EMFILE));
        let mut upper = copy(root)?;
        let mut folders = lowers.iter().map(copy).collect::<Result<Vec<_>, _>>()?;
        for part in path.split(|&byte| byte == b'/').filter(|part| !part.is_empty()) {
            upper = match openat(&upper, part, FOLDER, Mode::empty()) {
                Ok(folder) => folder,
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(None),
                Err(errno) => return Err(error(errno)),
            };
            folders = if is_opaque(&upper, prefix).map_err(error)? {
                Vec::new()
            } else {
                merged(&folders, part, prefix).map_err(error)?
            };
        }
        Ok(Some(folders))
    }

    /// Makes a folder that an entry needs as its parent. In an upper folder it gets owner, mode and attributes of
    /// the folder that it will lie over, and the answer has that one's modification time. It lies over none where
    /// this layer or one in between has removed what deeper ones have.
    ///
    /// `last` is what the previous call on the way to the same entry has left: with it a deep path is followed
    /// through the layers once and not for each of its folders anew. Nothing else may have changed in between.
    pub(super) fn make_parent(
        &self,
        root: &OwnedFd,
        missing: &Missing<'_>,
        last: &mut Option<Made>,
    ) -> Result<(OwnedFd, Option<Time>), Error> {
        let error = |operation: &str, errno| Error::file(operation, missing.path, errno);
        let Missing { parent, base, path, occupied } = missing;
        if *occupied {
            // In an upper folder this can be a whiteout of the same layer: then the folder is made anew.
            let stat = fstatat(*parent, *base, AtFlags::AT_SYMLINK_NOFOLLOW);
            let is_whiteout = stat.is_ok_and(|stat| is_whiteout(stat.st_mode, stat.st_rdev));
            if !is_whiteout || matches!(self, Whiteouts::Remove) {
                return Err(Error::entry(path, EntryFault::ParentNotFolder));
            }
            unlinkat(*parent, *base, UnlinkatFlags::NoRemoveDir)
                .map_err(|errno| error("remove whiteout", errno))?;
        }
        mkdirat(*parent, *base, FOLDER_MODE).map_err(|errno| error("create folder", errno))?;
        let folder =
            openat(*parent, *base, FOLDER, Mode::empty()).map_err(|errno| error("open folder", errno))?;
        // The process's umask had its say in mkdirat.
        fchmod(&folder, FOLDER_MODE).map_err(|errno| error("set mode of", errno))?;
        if *occupied {
            self.mark_opaque(&folder, path)?;
            *last = Some(Made { path: path.to_vec(), below: Vec::new() });
            return Ok((folder, None));
        }
        let Whiteouts::Overlay { prefix, .. } = self else { return Ok((folder, None)) };
        let above = path.len().saturating_sub(base.len() + 1);
        let above = match last.take() {
            Some(made) if made.path == path[..above] => made.below,
            _ => self.below(root, &path[..above])?.unwrap_or_default(),
        };
        let below = merged(&above, base, prefix).map_err(|errno| error("look below", errno))?;
        let nearest = below.first();
        let modified = nearest.map(|original| self.copy_attributes(original, &folder, path)).transpose()?;
        *last = Some(Made { path: path.to_vec(), below });
        Ok((folder, modified))
    }

    fn copy_attributes(&self, from: &OwnedFd, to: &OwnedFd, path: &[u8]) -> Result<Time, Error> {
        let error = |operation: &str, errno| Error::file(operation, path, errno);
        let stat = fstat(from).map_err(|errno| error("stat lower folder", errno))?;
        fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))
            .map_err(|errno| error("set owner of", errno))?;
        for attribute in list_xattr(from.as_fd()).map_err(|errno| error("list xattrs of", errno))? {
            let name = attribute.to_bytes();
            if name.starts_with(b"trusted.") || self.owns_attribute(name) {
                continue;
            }
            let value = get_xattr(from.as_fd(), &attribute).map_err(|errno| error("read xattr of", errno))?;
            match value.map_or(Ok(()), |value| set_xattr(to.as_fd(), &attribute, &value)) {
                Ok(()) | Err(Errno::ENOTSUP) => {}
                Err(errno) => return Err(error("copy xattr to", errno)),
            }
        }
        fchmod(to, Mode::from_bits_truncate(stat.st_mode & 0o7777))
            .map_err(|errno| error("set mode of", errno))?;
        Ok(Time { seconds: stat.st_mtime, nanoseconds: stat.st_mtime_nsec })
    }
}

/// A folder that [`Whiteouts::make_parent`] has made.
pub(super) struct Made {
    path: Vec<u8>,
    /// The folders of the layers below that overlayfs merges with it, the nearest first.
    below: Vec<OwnedFd>,
}

/// True when overlayfs merges nothing with a folder that layers deeper than its own have at its place.
fn is_opaque(folder: &OwnedFd, prefix: &str) -> Result<bool, Errno> {
    let value = get_xattr(folder.as_fd(), Whiteouts::opaque_attribute(prefix))?;
    Ok(value.as_deref() == Some(b"y"))
}

/// The folders called `base` that overlayfs merges out of `folders`, down to the first that is opaque or to
/// something else of that name.
pub(super) fn merged(folders: &[OwnedFd], base: &[u8], prefix: &str) -> Result<Vec<OwnedFd>, Errno> {
    let mut merged = Vec::new();
    for folder in folders {
        match openat(folder, base, FOLDER, Mode::empty()) {
            Ok(found) => {
                let opaque = is_opaque(&found, prefix)?;
                merged.push(found);
                if opaque {
                    break;
                }
            }
            Err(Errno::ENOENT) => {}
            Err(Errno::ENOTDIR | Errno::ELOOP) => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(merged)
}

/// True for the character device by which overlayfs marks a removal.
pub(super) fn is_whiteout(mode: libc::mode_t, device: libc::dev_t) -> bool {
    mode & libc::S_IFMT == libc::S_IFCHR && device == makedev(0, 0)
}

/// The names in a folder, in no order. `path` is for messages.
pub(super) fn names(folder: BorrowedFd<'_>, path: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
    let error = |errno| Error::file("read folder", path, errno);
    // A description of its own, whose position nobody else moves.
    let folder = openat(folder, ".", FOLDER, Mode::empty()).map_err(error)?;
    let mut folder = Dir::from_fd(folder).map_err(error)?;
    let mut names = Vec::new();
    for entry in folder.iter() {
        let entry = entry.map_err(error)?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// Removes an entry of a folder with all that is below it. Answers what it was, `None` when nothing was there.
pub(super) fn remove(parent: &OwnedFd, base: &[u8], path: &[u8]) -> Result<Option<SFlag>, Error> {
    let error = |operation: &str, errno| Error::file(operation, path, errno);
    let stat = match fstatat(parent, base, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::ENOENT) => return Ok(None),
        Err(errno) => return Err(error("stat", errno)),
    };
    let flag = if is_folder(&stat) {
        let folder =
            openat(parent, base, FOLDER, Mode::empty()).map_err(|errno| error("open folder", errno))?;
        remove_below(&folder, path, None)?;
        UnlinkatFlags::RemoveDir
    } else {
        UnlinkatFlags::NoRemoveDir
    };
    unlinkat(parent, base, flag).map_err(|errno| error("remove", errno))?;
    Ok(Some(SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT)))
}

/// Empties a folder, but for the inodes to `keep` and the folders that lead to them. A layer can make a tree deeper
/// than any path or stack, by folders within symlinks to folders; the walk copes with that.
pub(super) fn remove_below(folder: &OwnedFd, path: &[u8], keep: Option<&Written>) -> Result<(), Error> {
    let root = openat(folder, ".", FOLDER, Mode::empty());
    root.and_then(|root| walk(root, &mut Remove { keep }))
        .map_err(|errno| Error::file("remove what is below", path, errno))
}

struct Remove<'a> {
    keep: Option<&'a Written>,
}

impl Remove<'_> {
    fn keeps(&self, stat: &FileStat) -> bool {
        self.keep.is_some_and(|keep| keep.contains(&(stat.st_dev, stat.st_ino)))
    }
}

impl Visitor for Remove<'_> {
    fn enter(&mut self, folder: BorrowedFd<'_>, name: &CStr, _: Option<Type>) -> Result<bool, Errno> {
        let stat = fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        if !is_folder(&stat) && !self.keeps(&stat) {
            unlinkat(folder, name, UnlinkatFlags::NoRemoveDir)?;
        }
        Ok(is_folder(&stat))
    }

    fn leave(&mut self, folder: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
        let kept = self.keep.is_some() && self.keeps(&fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW)?);
        if kept {
            return Ok(());
        }
        match unlinkat(folder, name, UnlinkatFlags::RemoveDir) {
            Err(Errno::ENOTEMPTY | Errno::EEXIST) if self.keep.is_some() => Ok(()),
            result => result,
        }
    }
}
