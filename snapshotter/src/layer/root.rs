//! The root of the tree that a layer is applied to, and the way to the folders beneath it.
//!
//! # Why nothing outside can be reached
//!
//! Every operation on an entry is made on a descriptor of its parent folder and one plain name, and never follows
//! a symlink of that name. So it suffices that parents are inside. They come from openat2(2) with
//! `RESOLVE_IN_ROOT`, which the kernel keeps inside whatever symlinks there are and whoever changes them
//! meanwhile; or, when something on the way is missing, from a walk over single components that are opened without
//! following, where symlinks are taken apart here and `..` starts again from the root with what is left of the path.
//!
//! Parents are cached by their path. An entry that is put where nothing was cannot change where an existing path
//! leads; one that takes the place of a folder or symlink can, and then everything cached is dropped.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::rc::Rc;

use davit_sys::fs::open_in_root;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;

use super::error::{EntryFault, Error};

/// How a folder is opened that nothing may be followed to.
pub(super) const FOLDER: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// As many symlinks as the kernel follows in one path.
const LINK_LIMIT: usize = 40;
/// How many parents are kept open.
const CACHE_LIMIT: usize = 64;

/// A folder that something in a layer needs and that is not there.
pub(super) struct Missing<'a> {
    /// The folder that it is missing in.
    pub(super) parent: &'a OwnedFd,
    pub(super) base: &'a [u8],
    /// Its path from the root, free of symlinks.
    pub(super) path: &'a [u8],
    /// True when something else than a folder or a symlink is there.
    pub(super) occupied: bool,
}

/// Makes the folder that is missing and opens it.
pub(super) type MakeFolder<'a> = &'a mut dyn FnMut(Missing<'_>) -> Result<OwnedFd, Error>;

/// The root of a tree.
pub(super) struct Root {
    fd: Rc<OwnedFd>,
    folders: HashMap<Vec<u8>, Rc<OwnedFd>>,
}

impl Root {
    pub(super) fn new(fd: OwnedFd) -> Root {
        Root { fd: Rc::new(fd), folders: HashMap::new() }
    }

    /// The root itself.
    pub(super) fn fd(&self) -> &Rc<OwnedFd> {
        &self.fd
    }

    /// The folder at `path`, following symlinks within the root. `None` when it or something on the way is not
    /// there.
    pub(super) fn find(&mut self, path: &[u8]) -> Result<Option<Rc<OwnedFd>>, Error> {
        if path.is_empty() {
            return Ok(Some(Rc::clone(&self.fd)));
        }
        if let Some(folder) = self.folders.get(path) {
            return Ok(Some(Rc::clone(folder)));
        }
        match open_in_root(self.fd.as_fd(), path, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
            Ok(folder) => Ok(Some(self.remember(path, folder))),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(path_error(path, errno)),
        }
    }

    /// The folder at `path`; what is missing of it is made.
    pub(super) fn find_or_make(&mut self, path: &[u8], make: MakeFolder<'_>) -> Result<Rc<OwnedFd>, Error> {
        match self.find(path) {
            Ok(Some(folder)) => return Ok(folder),
            Ok(None) | Err(Error::Entry { fault: EntryFault::ParentNotFolder, .. }) => {}
            Err(error) => return Err(error),
        }
        let folder = self.walk(path, make)?;
        Ok(self.remember(path, folder))
    }

    /// Must be called when a folder or symlink was removed.
    pub(super) fn forget(&mut self) {
        self.folders.clear();
    }

    fn remember(&mut self, path: &[u8], folder: OwnedFd) -> Rc<OwnedFd> {
        // Archives go through a tree folder by folder, so that starting anew costs little.
        if self.folders.len() >= CACHE_LIMIT {
            self.folders.clear();
        }
        let folder = Rc::new(folder);
        self.folders.insert(path.to_vec(), Rc::clone(&folder));
        folder
    }

    /// Goes to `path` component by component and makes what is missing. However deep it is, only the folder where
    /// the walk is stays open.
    fn walk(&self, path: &[u8], make: MakeFolder<'_>) -> Result<OwnedFd, Error> {
        let components = |path: &[u8]| -> Vec<Vec<u8>> {
            let parts = path.split(|&byte| byte == b'/');
            parts.filter(|part| !matches!(*part, b"" | b".")).map(<[u8]>::to_vec).collect()
        };
        let reopen = |path: &[u8]| {
            open_in_root(self.fd.as_fd(), path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)
                .map_err(|errno| path_error(path, errno))
        };
        let mut ahead: VecDeque<Vec<u8>> = components(path).into();
        // Where the walk is: a folder, and its path without symlinks.
        let mut here = reopen(b"")?;
        let mut here_path: Vec<u8> = Vec::new();
        let mut links = 0;
        while let Some(base) = ahead.pop_front() {
            if base == b".." {
                let length = here_path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
                here_path.truncate(length);
                here = reopen(&here_path)?;
                continue;
            }
            let length = here_path.len();
            if length > 0 {
                here_path.push(b'/');
            }
            here_path.extend_from_slice(&base);
            let missing = |occupied| Missing { parent: &here, base: &base, path: &here_path, occupied };
            here = match openat(&here, base.as_slice(), FOLDER, Mode::empty()) {
                Ok(folder) => folder,
                Err(Errno::ENOENT) => make(missing(false))?,
                Err(Errno::ENOTDIR | Errno::ELOOP) => match readlinkat(&here, base.as_slice()) {
                    Ok(target) => {
                        links += 1;
                        if links > LINK_LIMIT {
                            return Err(Error::entry(path, EntryFault::LinkLoop));
                        }
                        here_path.truncate(length);
                        let target = target.as_bytes();
                        if target.starts_with(b"/") {
                            here_path.clear();
                            here = reopen(b"")?;
                        }
                        for component in components(target).into_iter().rev() {
                            ahead.push_front(component);
                        }
                        continue;
                    }
                    Err(Errno::EINVAL) => make(missing(true))?,
                    Err(errno) => return Err(path_error(path, errno)),
                },
                Err(errno) => return Err(path_error(path, errno)),
            };
        }
        Ok(here)
    }
}

fn path_error(path: &[u8], errno: Errno) -> Error {
    match errno {
        Errno::ENOTDIR => Error::entry(path, EntryFault::ParentNotFolder),
        Errno::ELOOP => Error::entry(path, EntryFault::LinkLoop),
        Errno::ENAMETOOLONG => Error::entry(path, EntryFault::NameTooLong { length: path.len() }),
        errno => Error::file("open folder", path, errno),
    }
}
