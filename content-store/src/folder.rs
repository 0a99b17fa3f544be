//! A folder of the store, held by its descriptor: names in it are looked up there, whatever happens to the path,
//! and no symbolic link is followed.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::error::Error;

#[derive(Debug)]
pub(crate) struct Folder {
    descriptor: OwnedFd,
    path: PathBuf,
}

const FOLDER: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

impl Folder {
    /// Opens the root; here links are followed, because the path to it is the operator's.
    pub(crate) fn root(path: &Path) -> Result<Folder, Error> {
        let descriptor = File::open(path).map_err(Error::io("open", path))?.into();
        Ok(Folder { descriptor, path: path.to_owned() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a folder in this one.
    pub(crate) fn folder(&self, name: &str) -> Result<Folder, Error> {
        let path = self.path.join(name);
        match openat(&self.descriptor, name, FOLDER, Mode::empty()) {
            Ok(descriptor) => Ok(Folder { descriptor, path }),
            Err(Errno::ELOOP | Errno::ENOTDIR) => Err(Error::Foreign { path, expected: "folder" }),
            Err(errno) => Err(Error::io("open", &path)(errno)),
        }
    }

    /// Makes a folder in this one, readable by its owner only. False if there is something of the name already.
    pub(crate) fn make_folder(&self, name: &str) -> Result<bool, Error> {
        match mkdirat(&self.descriptor, name, Mode::S_IRWXU) {
            Ok(()) => Ok(true),
            Err(Errno::EEXIST) => Ok(false),
            Err(errno) => Err(Error::io("create", &self.path.join(name))(errno)),
        }
    }

    /// Opens a regular file to read. Anything else in its place is refused, a FIFO without waiting for it.
    pub(crate) fn open(&self, name: &str) -> Result<(File, FileStat), Error> {
        self.open_with(name, OFlag::O_RDONLY)
    }

    /// Opens a regular file to read and write, creating it if there is none.
    pub(crate) fn open_or_create(&self, name: &str) -> Result<(File, FileStat), Error> {
        self.open_with(name, OFlag::O_RDWR | OFlag::O_CREAT)
    }

    /// Writes a small text file, over what may be there.
    pub(crate) fn write_text(&self, name: &str, text: &str) -> Result<(), Error> {
        let (mut file, _) = self.open_with(name, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC)?;
        file.write_all(text.as_bytes()).map_err(Error::io("write", &self.path.join(name)))
    }

    fn open_with(&self, name: &str, flags: OFlag) -> Result<(File, FileStat), Error> {
        let path = self.path.join(name);
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        let file = match openat(&self.descriptor, name, flags, Mode::S_IRUSR | Mode::S_IWUSR) {
            Ok(descriptor) => File::from(descriptor),
            Err(Errno::ELOOP | Errno::ENXIO | Errno::EISDIR) => {
                return Err(Error::Foreign { path, expected: "regular file" });
            }
            Err(errno) => return Err(Error::io("open", &path)(errno)),
        };
        let stat = fstat(&file).map_err(Error::io("stat", &path))?;
        if !is_file(&stat) {
            return Err(Error::Foreign { path, expected: "regular file" });
        }
        Ok((file, stat))
    }

    /// The attributes of a regular file.
    pub(crate) fn stat(&self, name: &str) -> Result<FileStat, Error> {
        let path = || self.path.join(name);
        let stat = fstatat(&self.descriptor, name, AtFlags::AT_SYMLINK_NOFOLLOW)
            .map_err(|errno| Error::io("stat", &path())(errno))?;
        if !is_file(&stat) {
            return Err(Error::Foreign { path: path(), expected: "regular file" });
        }
        Ok(stat)
    }

    /// A small text file; what is longer than `limit` is damage, and so is what is no UTF-8.
    pub(crate) fn read_text(&self, name: &str, limit: usize) -> Result<String, Error> {
        let (file, _) = self.open(name)?;
        let path = self.path.join(name);
        let mut text = String::new();
        file.take(limit as u64 + 1).read_to_string(&mut text).map_err(Error::io("read", &path))?;
        if text.len() > limit {
            return Err(Error::Foreign { path, expected: "short text" });
        }
        Ok(text)
    }

    /// Moves a file from here to another folder, over what may be there.
    pub(crate) fn rename(&self, name: &str, target: &Folder, target_name: &str) -> Result<(), Error> {
        renameat(&self.descriptor, name, &target.descriptor, target_name)
            .map_err(|errno| Error::io("rename", &self.path.join(name))(errno))
    }

    /// Removes a file; a link is removed itself.
    pub(crate) fn remove(&self, name: &str) -> Result<(), Error> {
        unlinkat(&self.descriptor, name, UnlinkatFlags::NoRemoveDir)
            .map_err(|errno| Error::io("remove", &self.path.join(name))(errno))
    }

    /// Removes a folder in this one with all that is in it.
    pub(crate) fn remove_folder(&self, name: &str) -> Result<(), Error> {
        let path = self.path.join(name);
        // Follows no link below the path, nor the path's own last part.
        std::fs::remove_dir_all(&path).map_err(Error::io("remove", &path))
    }

    /// The names of what is in this folder, in no order. Those that are no UTF-8 are not the store's.
    pub(crate) fn names(&self) -> Result<Vec<String>, Error> {
        let failed = || Error::io("read", &self.path);
        let folder = openat(&self.descriptor, ".", FOLDER, Mode::empty()).map_err(failed())?;
        let mut names = Vec::new();
        for entry in Dir::from_fd(folder).map_err(failed())? {
            let name = entry.map_err(failed())?.file_name().to_bytes().to_vec();
            if let Ok(name) = OsString::from_vec(name).into_string()
                && name != "."
                && name != ".."
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Makes the folder's entries durable.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        nix::unistd::fsync(self.descriptor.as_fd()).map_err(Error::io("sync", &self.path))
    }
}

fn is_file(stat: &FileStat) -> bool {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFREG
}
