//! The back half of applying: makes each entry of an archive in the tree.
//!
//! Whatever an entry replaces is removed first, unless both are folders; so the last of several entries of one
//! name wins. Files are created exclusively, owners come before attributes and attributes before modes, because
//! chown(2) drops set-id bits and capabilities. The times of folders are set at the end, when nothing is made in
//! them any more.
//!
//! The rules for parents ([`root`](super::root)) and whiteouts ([`whiteout`](super::whiteout)) have files of
//! their own.

use std::collections::{BTreeMap, HashSet};
use std::ffi::CString;
use std::io::{BufRead, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use davit_sys::fs::{chmod_path_fd, in_user_namespace, set_xattr, set_xattr_at, start_writeback};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::libc::{self, dev_t};
use nix::sys::stat::{
    FileStat, Mode, SFlag, UtimensatFlags, fchmod, fstat, fstatat, futimens, makedev, mkdirat, mknodat,
    utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown, fchownat, ftruncate, linkat, symlinkat};

use super::archive::{Archive, Entry, Extent, Kind};
use super::error::{EntryFault, Error, text};
use super::name::{self, Meaning, Name};
use super::pax::Time;
use super::root::{FOLDER, MakeFolder, Root};
use super::whiteout::{self, Whiteouts};

/// From this size on a file's blocks are sent to the disk as they come, not all at the final sync.
const WRITEBACK_STEP: u64 = 8 << 20;

/// Applies the archive in `stream` to the tree below `root`, and reads the stream to its end.
pub(super) fn extract<R: BufRead>(stream: R, root: OwnedFd, whiteouts: Whiteouts) -> Result<(), Error> {
    let mut archive = Archive::new(stream);
    let mut extractor = Extractor::new(root, whiteouts)?;
    while let Some(entry) = archive.next_entry()? {
        extractor.apply(&mut archive, &entry)?;
    }
    extractor.finish()?;
    archive.drain()
}

/// The inodes that a layer has made or taken over, which an opaque marker of the same layer must not hide. An
/// inode number that is used again was made by this layer too, so that the set never says too much.
pub(super) type Written = HashSet<(u64, u64)>;

struct Extractor {
    root: Root,
    whiteouts: Whiteouts,
    /// Kept only where an opaque marker removes things: `None` for overlay's folders, and for a tree that was
    /// empty, where all is of this layer.
    written: Option<Written>,
    /// Access and modification times of folders, by their paths in the archive.
    folder_times: BTreeMap<Vec<u8>, (Time, Time)>,
    /// True when device nodes can be made.
    devices: bool,
    root_is_opaque: bool,
    /// What whiteouts were made for.
    hidden: Vec<Name>,
}

/// An entry's place in the tree.
struct Place {
    parent: Rc<OwnedFd>,
    name: Name,
}

impl Extractor {
    fn new(root: OwnedFd, whiteouts: Whiteouts) -> Result<Extractor, Error> {
        let devices = !in_user_namespace()
            .map_err(|source| Error::Workspace { operation: "read /proc/self/uid_map", source })?;
        let tracks = match &whiteouts {
            Whiteouts::Remove => !whiteout::names(root.as_fd(), b"")?.is_empty(),
            Whiteouts::Overlay { .. } => false,
        };
        Ok(Extractor {
            root: Root::new(root),
            whiteouts,
            written: tracks.then(HashSet::new),
            folder_times: BTreeMap::new(),
            devices,
            root_is_opaque: false,
            hidden: Vec::new(),
        })
    }

    fn apply<R: BufRead>(&mut self, archive: &mut Archive<R>, entry: &Entry) -> Result<(), Error> {
        let is_device = matches!(entry.kind, Kind::CharDevice { .. } | Kind::BlockDevice { .. });
        if is_device && !self.devices {
            tracing::warn!(entry = text(&entry.name), "device node skipped in a user namespace");
            return Ok(());
        }
        let fault = |fault| Error::entry(&entry.name, fault);
        match name::meaning(&entry.name).map_err(fault)? {
            Meaning::Root | Meaning::Ignored => Ok(()),
            Meaning::Opaque(folder) => {
                let parent = self.parent(&folder)?;
                self.make_opaque(&parent, &folder)
            }
            Meaning::Whiteout(name) => {
                let parent = self.parent(name.parent())?;
                self.hide(&Place { parent, name })
            }
            Meaning::Plain(name) => {
                let parent = self.parent(name.parent())?;
                self.make(archive, entry, &Place { parent, name })
            }
        }
    }

    /// Does what had to wait until all entries are made.
    fn finish(&mut self) -> Result<(), Error> {
        if self.root_is_opaque {
            self.whiteouts.hide_root(self.root.fd())?;
        }
        for name in std::mem::take(&mut self.hidden) {
            self.whiteouts.drop_if_idle(self.root.fd(), &name)?;
        }
        for (path, (accessed, modified)) in std::mem::take(&mut self.folder_times) {
            let Some(name) = Name::clean(&path).ok().flatten() else { continue };
            // A later entry may have removed the folder, or put something else in its place or in the way.
            let parent = match self.root.find(name.parent()) {
                Ok(Some(parent)) => parent,
                Ok(None) | Err(Error::Entry { .. }) => continue,
                Err(error) => return Err(error),
            };
            match fstatat(&*parent, name.base(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(stat) if is_folder(&stat) => set_times_at(&parent, &name, accessed, modified)?,
                Ok(_) | Err(Errno::ENOENT) => {}
                Err(errno) => return Err(Error::file("stat", &path, errno)),
            }
        }
        Ok(())
    }

    /// The folder that an entry goes into; what is missing of it is made with the attributes that it has in the
    /// layers below.
    fn parent(&mut self, path: &[u8]) -> Result<Rc<OwnedFd>, Error> {
        let Extractor { root, whiteouts, written, folder_times, .. } = self;
        let top = Rc::clone(root.fd());
        let mut last = None;
        let make: MakeFolder<'_> = &mut |missing| {
            let (folder, modified) = whiteouts.make_parent(&top, &missing, &mut last)?;
            if let Some(modified) = modified {
                folder_times.entry(missing.path.to_vec()).or_insert((modified, modified));
            }
            if let Some(written) = written {
                let stat = fstat(&folder).map_err(|errno| Error::file("stat folder", missing.path, errno))?;
                written.insert((stat.st_dev, stat.st_ino));
            }
            Ok(folder)
        };
        root.find_or_make(path, make)
    }

    fn make_opaque(&mut self, folder: &OwnedFd, path: &[u8]) -> Result<(), Error> {
        if path.is_empty() && !matches!(self.whiteouts, Whiteouts::Remove) {
            self.root_is_opaque = true;
            return Ok(());
        }
        match (&self.whiteouts, &self.written) {
            (Whiteouts::Overlay { .. }, _) => self.whiteouts.mark_opaque(folder, path),
            (Whiteouts::Remove, None) => Ok(()),
            (Whiteouts::Remove, Some(written)) => {
                whiteout::remove_below(folder, path, Some(written))?;
                self.root.forget();
                Ok(())
            }
        }
    }

    fn hide(&mut self, place: &Place) -> Result<(), Error> {
        self.clear(place)?;
        if matches!(self.whiteouts, Whiteouts::Overlay { .. }) {
            self.hidden.push(place.name.clone());
        }
        self.whiteouts.hide(&place.parent, &place.name)
    }

    /// Removes whatever is in an entry's place. True when something was.
    fn clear(&mut self, Place { parent, name }: &Place) -> Result<bool, Error> {
        let removed = whiteout::remove(parent, name.base(), name.path())?;
        if removed.is_some_and(|kind| kind == SFlag::S_IFDIR || kind == SFlag::S_IFLNK) {
            self.root.forget();
        }
        Ok(removed.is_some())
    }

    /// Makes something that must not be there yet, after removing what is.
    fn replace<T>(
        &mut self,
        place: &Place,
        operation: &str,
        mut create: impl FnMut(&OwnedFd, &[u8]) -> Result<T, Errno>,
    ) -> Result<T, Error> {
        let mut result = create(&place.parent, place.name.base());
        if result.as_ref().is_err_and(|&errno| errno == Errno::EEXIST) {
            self.clear(place)?;
            result = create(&place.parent, place.name.base());
        }
        result.map_err(|errno| Error::file(operation, place.name.path(), errno))
    }

    fn make<R: BufRead>(
        &mut self,
        archive: &mut Archive<R>,
        entry: &Entry,
        place: &Place,
    ) -> Result<(), Error> {
        let permissions = Mode::from_bits_truncate(entry.mode & 0o777);
        let node = |extractor: &mut Extractor, kind: SFlag, device: dev_t| {
            extractor.replace(place, "create node", |parent, base| {
                mknodat(parent, base, kind, permissions, device)
            })
        };
        match &entry.kind {
            Kind::File { size, extents } => {
                let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
                let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let file = self
                    .replace(place, "create file", |parent, base| openat(parent, base, flags, permissions))?;
                let file = std::fs::File::from(file);
                let path = place.name.path();
                match extents {
                    None => write_data(archive, &file, *size, path)?,
                    Some(extents) => write_sparse(archive, &file, *size, extents, path)?,
                }
                let file = OwnedFd::from(file);
                self.set_metadata(&file, entry, path)?;
                let (accessed, modified) = times(entry);
                return futimens(&file, &accessed, &modified)
                    .map_err(|errno| Error::file("set times of", path, errno));
            }
            Kind::Folder => return self.make_folder(entry, place, permissions),
            Kind::Symlink { target } => {
                check_target(entry, target)?;
                self.replace(place, "create symlink", |parent, base| {
                    symlinkat(target.as_slice(), parent, base)
                })?;
            }
            Kind::HardLink { target } => self.make_hard_link(entry, target, place)?,
            Kind::CharDevice { major, minor } => {
                node(self, SFlag::S_IFCHR, makedev(u64::from(*major), u64::from(*minor)))?;
            }
            Kind::BlockDevice { major, minor } => {
                node(self, SFlag::S_IFBLK, makedev(u64::from(*major), u64::from(*minor)))?;
            }
            Kind::Fifo => node(self, SFlag::S_IFIFO, 0)?,
        }
        self.set_metadata_at(entry, place)
    }

    fn make_folder(&mut self, entry: &Entry, place: &Place, mode: Mode) -> Result<(), Error> {
        let path = place.name.path();
        let error = |operation: &str, errno| Error::file(operation, path, errno);
        let (parent, base) = (&*place.parent, place.name.base());
        let folder = match mkdirat(parent, base, mode) {
            Ok(()) => openat(parent, base, FOLDER, Mode::empty()),
            Err(Errno::EEXIST) => match openat(parent, base, FOLDER, Mode::empty()) {
                // What it was made of is not empty: only the metadata are the layer's.
                Err(Errno::ENOTDIR | Errno::ELOOP) => {
                    self.clear(place)?;
                    mkdirat(parent, base, mode).map_err(|errno| error("create folder", errno))?;
                    let folder = openat(parent, base, FOLDER, Mode::empty());
                    if let (Ok(folder), Whiteouts::Overlay { .. }) = (&folder, &self.whiteouts) {
                        // What it replaces had hidden what is below, which must not come back.
                        self.whiteouts.mark_opaque(folder, path)?;
                    }
                    folder
                }
                result => result,
            },
            Err(errno) => Err(errno),
        };
        let folder = folder.map_err(|errno| error("create folder", errno))?;
        self.set_metadata(&folder, entry, path)?;
        let modified = entry.modified;
        let accessed = entry.accessed.unwrap_or(modified).max(modified);
        self.folder_times.insert(path.to_vec(), (accessed, modified));
        Ok(())
    }

    fn make_hard_link(&mut self, entry: &Entry, target: &[u8], place: &Place) -> Result<(), Error> {
        check_target(entry, target)?;
        let fault = || Error::entry(&entry.name, EntryFault::LinkTarget { target: text(target) });
        let target_name = Name::clean(target).map_err(|fault| Error::entry(&entry.name, fault))?;
        let target_name = target_name.ok_or_else(fault)?;
        let target_parent = self.root.find(target_name.parent())?.ok_or_else(fault)?;
        // Without AT_SYMLINK_FOLLOW a link to a symlink is a second name of the symlink itself.
        let result = self.replace(place, "create hard link", |parent, base| {
            linkat(&*target_parent, target_name.base(), parent, base, AtFlags::empty())
        });
        match result {
            // Not there, or a folder.
            Err(Error::File { source: Errno::ENOENT | Errno::EPERM, .. }) => Err(fault()),
            result => result,
        }
    }

    /// Sets owner, attributes and mode of an open file or folder that was just made or merged.
    fn set_metadata(&mut self, fd: &OwnedFd, entry: &Entry, path: &[u8]) -> Result<(), Error> {
        let error = |operation: &str, errno| Error::file(operation, path, errno);
        let stat = fstat(fd).map_err(|errno| error("stat", errno))?;
        // Most files are made with the right owner and mode, and each call would dirty the inode again.
        let other_owner = stat.st_uid != entry.uid || stat.st_gid != entry.gid;
        if other_owner {
            fchown(fd, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
                .map_err(|errno| error("set owner of", errno))?;
        }
        self.set_attributes(entry, path, |attribute, value| set_xattr(fd.as_fd(), attribute, value), true)?;
        if other_owner || !entry.xattrs.is_empty() || stat.st_mode & 0o7777 != entry.mode {
            fchmod(fd, Mode::from_bits_truncate(entry.mode)).map_err(|errno| error("set mode of", errno))?;
        }
        self.note_written(&stat);
        Ok(())
    }

    /// Sets owner, attributes, mode and times of what cannot be opened: symlinks and nodes, and whatever a new
    /// hard link is a name of.
    fn set_metadata_at(&mut self, entry: &Entry, Place { parent, name }: &Place) -> Result<(), Error> {
        let error = |operation: &str, errno| Error::file(operation, name.path(), errno);
        let fd = openat(
            &**parent,
            name.base(),
            OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| error("open", errno))?;
        let stat = fstat(&fd).map_err(|errno| error("stat", errno))?;
        let kind = stat.st_mode & libc::S_IFMT;
        // A new hard link mostly has the right owner, and setting it would drop the capabilities of the file.
        let other_owner = stat.st_uid != entry.uid || stat.st_gid != entry.gid;
        if other_owner {
            let (uid, gid) = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
            fchownat(&**parent, name.base(), uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)
                .map_err(|errno| error("set owner of", errno))?;
        }
        let set = |attribute: &std::ffi::CStr, value: &[u8]| {
            set_xattr_at(parent.as_fd(), name.base(), attribute, value)
        };
        self.set_attributes(entry, name.path(), set, kind == libc::S_IFREG)?;
        let other_mode = other_owner || !entry.xattrs.is_empty() || stat.st_mode & 0o7777 != entry.mode;
        if kind != libc::S_IFLNK && other_mode {
            chmod_path_fd(fd.as_fd(), Mode::from_bits_truncate(entry.mode))
                .map_err(|errno| error("set mode of", errno))?;
        }
        self.note_written(&stat);
        let modified = entry.modified;
        set_times_at(parent, name, entry.accessed.unwrap_or(modified).max(modified), modified)
    }

    /// Sets the extended attributes of an entry. Those that the filesystem does not have, those that belong to
    /// this system and not to an image (`trusted.`), and those by which overlayfs rules its folders are left out.
    fn set_attributes(
        &self,
        entry: &Entry,
        path: &[u8],
        set: impl Fn(&std::ffi::CStr, &[u8]) -> Result<(), Errno>,
        takes_user_attributes: bool,
    ) -> Result<(), Error> {
        for (attribute, value) in &entry.xattrs {
            if attribute.starts_with(b"trusted.") || self.whiteouts.owns_attribute(attribute) {
                continue;
            }
            let shown = text(attribute);
            let Ok(attribute) = CString::new(attribute.as_slice()) else {
                return Err(Error::entry(path, EntryFault::NulInName));
            };
            match set(&attribute, value) {
                Ok(()) | Err(Errno::ENOTSUP) => {}
                // Only files and folders can have attributes of users (xattr(7)).
                Err(Errno::EPERM) if !takes_user_attributes && shown.starts_with("user.") => {}
                Err(errno) => return Err(Error::file(format!("set xattr {shown} of"), path, errno)),
            }
        }
        Ok(())
    }

    fn note_written(&mut self, stat: &FileStat) {
        if let Some(written) = &mut self.written {
            written.insert((stat.st_dev, stat.st_ino));
        }
    }
}

/// Writes the data of the current entry to a new file.
fn write_data<R: BufRead>(
    archive: &mut Archive<R>,
    mut file: &std::fs::File,
    size: u64,
    path: &[u8],
) -> Result<(), Error> {
    let mut written = 0;
    let mut started = 0;
    while written < size {
        let data = archive.data()?;
        let length = data.len();
        file.write_all(data).map_err(|source| write_error(path, &source))?;
        archive.consume(length);
        written += length as u64;
        if written - started >= WRITEBACK_STEP {
            start_writeback(file.as_fd(), started as i64, (written - started) as i64);
            started = written;
        }
    }
    Ok(())
}

/// Writes the data of the current entry to the extents of a new sparse file.
fn write_sparse<R: BufRead>(
    archive: &mut Archive<R>,
    file: &std::fs::File,
    size: u64,
    extents: &[Extent],
    path: &[u8],
) -> Result<(), Error> {
    use std::os::unix::fs::FileExt;
    ftruncate(file, i64::try_from(size).unwrap_or(i64::MAX))
        .map_err(|errno| Error::file("set size of", path, errno))?;
    for extent in extents {
        let mut written = 0;
        while written < extent.length {
            let data = archive.data()?;
            let left = usize::try_from(extent.length - written).unwrap_or(usize::MAX);
            let data = &data[..data.len().min(left)];
            let length = data.len();
            file.write_all_at(data, extent.offset + written).map_err(|source| write_error(path, &source))?;
            archive.consume(length);
            written += length as u64;
        }
    }
    Ok(())
}

fn write_error(path: &[u8], source: &std::io::Error) -> Error {
    let errno = source.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    Error::file("write", path, errno)
}

/// A link target must be something that a system call takes as it is.
pub(super) fn check_target(entry: &Entry, target: &[u8]) -> Result<(), Error> {
    let fault = match target {
        [] => EntryFault::EmptyName,
        target if target.contains(&0) => EntryFault::NulInName,
        _ => return Ok(()),
    };
    Err(Error::entry(&entry.name, fault))
}

/// The access and modification time of an entry. As in containerd, nothing was read before it was written.
fn times(entry: &Entry) -> (TimeSpec, TimeSpec) {
    let modified = entry.modified;
    (spec(entry.accessed.unwrap_or(modified).max(modified)), spec(modified))
}

fn spec(time: Time) -> TimeSpec {
    TimeSpec::new(time.seconds, time.nanoseconds)
}

fn set_times_at(parent: &OwnedFd, name: &Name, accessed: Time, modified: Time) -> Result<(), Error> {
    utimensat(parent, name.base(), &spec(accessed), &spec(modified), UtimensatFlags::NoFollowSymlink)
        .map_err(|errno| Error::file("set times of", name.path(), errno))
}

pub(super) fn is_folder(stat: &FileStat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFDIR
}
