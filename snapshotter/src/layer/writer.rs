//! Writes the entries of a layer: ustar headers, with pax records where those are too small.
//!
//! The same trees give the same bytes: no times of access, no names of users, no order but that of the walk.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use davit_sys::fs::{get_xattr, open_in_root};
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, fstat, major, minor};
use tar::{EntryType, Header};

use super::error::Error;
use super::name;

const BLOCK: usize = 512;
const COPY_BUFFER_SIZE: usize = 256 * 1024;
/// The largest numbers that eight and twelve octal digits' fields hold.
const OWNER_LIMIT: u64 = 0o7777777;
const LARGE_LIMIT: u64 = 0o77777777777;

/// A device and inode number.
type Inode = (u64, u64);

/// A layer that is being written.
pub(super) struct LayerWriter<'a, W> {
    out: W,
    /// The tree that entries are read from.
    root: &'a OwnedFd,
    /// No modification time is later than this many seconds.
    latest: Option<i64>,
    /// Folders that are in the layer already, so that they need not go before their entries again.
    folders: HashSet<Vec<u8>>,
    /// The first name in the layer of each inode with several.
    links: HashMap<Inode, Vec<u8>>,
    /// Names, which are not in the layer, of inodes with several: they must become links when another name of
    /// theirs does get into the layer, or the layer would cut them apart.
    unmodified: HashMap<Inode, Vec<Vec<u8>>>,
    buffer: Vec<u8>,
}

/// What goes into a header.
struct Fields<'a> {
    name: &'a [u8],
    kind: EntryType,
    mode: u32,
    owner: (u32, u32),
    modified: i64,
    size: u64,
    link: &'a [u8],
    device: Option<(u64, u64)>,
    capability: Option<Vec<u8>>,
}

impl<'a, W: Write> LayerWriter<'a, W> {
    pub(super) fn new(out: W, root: &'a OwnedFd, latest: Option<i64>) -> LayerWriter<'a, W> {
        LayerWriter {
            out,
            root,
            latest,
            folders: HashSet::new(),
            links: HashMap::new(),
            unmodified: HashMap::new(),
            buffer: vec![0; COPY_BUFFER_SIZE],
        }
    }

    /// Writes the marks of the archive's end.
    pub(super) fn finish(mut self) -> Result<(), Error> {
        self.write(&[0; 2 * BLOCK])
    }

    /// Writes that `path` is removed. Its time is 1970, whatever the clock says, as in containerd since 2.0.
    pub(super) fn removal(&mut self, path: &[u8]) -> Result<(), Error> {
        self.marker(&name::whiteout(path))
    }

    /// Writes that nothing of the lower tree is left in the folder `path`.
    pub(super) fn opaque(&mut self, path: &[u8]) -> Result<(), Error> {
        self.marker(&name::opaque_marker(path))
    }

    /// Notes a file that is the same in both trees.
    pub(super) fn unmodified(&mut self, path: &[u8], stat: &FileStat) -> Result<(), Error> {
        if stat.st_nlink < 2 {
            return Ok(());
        }
        match self.links.get(&inode(stat)).cloned() {
            Some(first) => self.link(path, &first, stat),
            None => {
                self.unmodified.entry(inode(stat)).or_default().push(path.to_vec());
                Ok(())
            }
        }
    }

    /// Writes a folder.
    pub(super) fn folder(&mut self, path: &[u8], stat: &FileStat) -> Result<(), Error> {
        if !self.folders.insert(path.to_vec()) {
            return Ok(());
        }
        self.parents(path)?;
        let name = [path, b"/"].concat();
        self.header(&Fields { name: &name, kind: EntryType::Directory, ..self.fields(stat) })
    }

    /// Writes anything but a folder, which is the entry `base` of `parent` and had this `stat`.
    pub(super) fn entry(
        &mut self,
        parent: &OwnedFd,
        base: &[u8],
        path: &[u8],
        stat: &FileStat,
    ) -> Result<(), Error> {
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&inode(stat)).cloned() {
                return self.link(path, &first, stat);
            }
            self.links.insert(inode(stat), path.to_vec());
        }
        self.parents(path)?;
        let fields = Fields { name: path, ..self.fields(stat) };
        let device = Some((major(stat.st_rdev), minor(stat.st_rdev)));
        match stat.st_mode & libc::S_IFMT {
            libc::S_IFREG => self.file(parent, base, path)?,
            libc::S_IFLNK => {
                let target =
                    readlinkat(parent, base).map_err(|errno| Error::file("read symlink", path, errno))?;
                let link = target.as_bytes();
                self.header(&Fields { kind: EntryType::Symlink, link, ..fields })?;
            }
            libc::S_IFCHR => self.header(&Fields { kind: EntryType::Char, device, ..fields })?,
            libc::S_IFBLK => self.header(&Fields { kind: EntryType::Block, device, ..fields })?,
            libc::S_IFIFO => self.header(&Fields { kind: EntryType::Fifo, ..fields })?,
            // Sockets mean nothing without the process that listens; the walk leaves them out.
            _ => return Ok(()),
        }
        for other in self.unmodified.remove(&inode(stat)).unwrap_or_default() {
            self.link(&other, path, stat)?;
        }
        Ok(())
    }

    fn link(&mut self, path: &[u8], first: &[u8], stat: &FileStat) -> Result<(), Error> {
        self.parents(path)?;
        // containerd sets the owner of a link anew, which drops the capabilities of its file; so they come again.
        let mut capability = None;
        if stat.st_mode & libc::S_IFMT == libc::S_IFREG {
            capability = open_in_root(self.root.as_fd(), path, OPEN_FILE)
                .and_then(|file| get_xattr(file.as_fd(), CAPABILITY))
                .map_err(|errno| Error::file("read xattr security.capability of", path, errno))?;
        }
        let fields = self.fields(stat);
        self.header(&Fields { name: path, kind: EntryType::Link, link: first, capability, ..fields })
    }

    fn file(&mut self, parent: &OwnedFd, base: &[u8], path: &[u8]) -> Result<(), Error> {
        let file = openat(parent, base, OPEN_FILE, Mode::empty())
            .map_err(|errno| Error::file("open", path, errno))?;
        let stat = fstat(&file).map_err(|errno| Error::file("stat", path, errno))?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Err(Error::Changed { path: super::error::text(path) });
        }
        let capability = get_xattr(file.as_fd(), CAPABILITY)
            .map_err(|errno| Error::file("read xattr security.capability of", path, errno))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        self.header(&Fields { name: path, size, capability, ..self.fields(&stat) })?;
        let mut file = File::from(file);
        let mut left = size;
        while left > 0 {
            let limit = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
            let length = file.read(&mut self.buffer[..limit]).map_err(|source| {
                let errno = source.raw_os_error().unwrap_or(libc::EIO);
                Error::file("read", path, nix::errno::Errno::from_raw(errno))
            })?;
            if length == 0 {
                return Err(Error::Changed { path: super::error::text(path) });
            }
            self.out.write_all(&self.buffer[..length]).map_err(|source| Error::Write { source })?;
            left -= length as u64;
        }
        self.pad(size)
    }

    /// Writes the folders on the way to `path` that are not in the layer yet.
    fn parents(&mut self, path: &[u8]) -> Result<(), Error> {
        let Some(slash) = path.iter().rposition(|&byte| byte == b'/') else { return Ok(()) };
        let parent = &path[..slash];
        if self.folders.contains(parent) {
            return Ok(());
        }
        let stat = open_in_root(self.root.as_fd(), parent, OFlag::O_PATH | OFlag::O_DIRECTORY)
            .and_then(fstat)
            .map_err(|errno| Error::file("stat", parent, errno))?;
        self.folder(parent, &stat)
    }

    fn marker(&mut self, path: &[u8]) -> Result<(), Error> {
        self.parents(path)?;
        self.header(&Fields {
            name: path,
            kind: EntryType::Regular,
            mode: 0,
            owner: (0, 0),
            modified: 0,
            size: 0,
            link: b"",
            device: None,
            capability: None,
        })
    }

    /// The fields that come from a file's inode; without name and size, for a regular file.
    fn fields(&self, stat: &FileStat) -> Fields<'static> {
        Fields {
            name: b"",
            kind: EntryType::Regular,
            mode: stat.st_mode & 0o7777,
            owner: (stat.st_uid, stat.st_gid),
            modified: self.latest.map_or(stat.st_mtime, |latest| stat.st_mtime.min(latest)),
            size: 0,
            link: b"",
            device: None,
            capability: None,
        }
    }

    fn header(&mut self, fields: &Fields<'_>) -> Result<(), Error> {
        let mut records = Vec::new();
        let mut header = Header::new_ustar();
        let (prefix, name) = split_name(fields.name).unwrap_or_else(|| {
            record(&mut records, "path", fields.name);
            (&[], fields.name)
        });
        put(&mut header.as_old_mut().name, name);
        if fields.link.len() > header.as_old().linkname.len() || !fields.link.is_ascii() {
            record(&mut records, "linkpath", fields.link);
        }
        put(&mut header.as_old_mut().linkname, fields.link);
        let number = |value: u64, limit: u64, key: &str, records: &mut Vec<u8>| {
            if value <= limit {
                return value;
            }
            record(records, key, value.to_string().as_bytes());
            0
        };
        header.set_uid(number(u64::from(fields.owner.0), OWNER_LIMIT, "uid", &mut records));
        header.set_gid(number(u64::from(fields.owner.1), OWNER_LIMIT, "gid", &mut records));
        header.set_size(number(fields.size, LARGE_LIMIT, "size", &mut records));
        header.set_mtime(match u64::try_from(fields.modified) {
            Ok(modified) => number(modified, LARGE_LIMIT, "mtime", &mut records),
            Err(_) => {
                record(&mut records, "mtime", fields.modified.to_string().as_bytes());
                0
            }
        });
        if let Some(capability) = &fields.capability {
            record(&mut records, "SCHILY.xattr.security.capability", capability);
        }
        header.set_mode(fields.mode);
        header.set_entry_type(fields.kind);
        if let Some(ustar) = header.as_ustar_mut() {
            put(&mut ustar.prefix, prefix);
            let (major, minor) = fields.device.unwrap_or((0, 0));
            ustar.set_device_major(u32::try_from(major).unwrap_or(u32::MAX));
            ustar.set_device_minor(u32::try_from(minor).unwrap_or(u32::MAX));
        }
        if !records.is_empty() {
            let mut extended = Header::new_ustar();
            put(&mut extended.as_old_mut().name, &[b"PaxHeaders.0/", name].concat());
            extended.set_mode(0o644);
            extended.set_uid(0);
            extended.set_gid(0);
            extended.set_mtime(0);
            extended.set_size(records.len() as u64);
            extended.set_entry_type(EntryType::XHeader);
            extended.set_cksum();
            self.write(extended.as_bytes())?;
            self.write(&records)?;
            self.pad(records.len() as u64)?;
        }
        header.set_cksum();
        self.write(header.as_bytes())
    }

    fn pad(&mut self, size: u64) -> Result<(), Error> {
        let padding = size.next_multiple_of(BLOCK as u64) - size;
        self.write(&[0; BLOCK][..padding as usize])
    }

    fn write(&mut self, data: &[u8]) -> Result<(), Error> {
        self.out.write_all(data).map_err(|source| Error::Write { source })
    }
}

/// How a file is opened that may have become something else: nothing is followed, and a FIFO does not block.
pub(super) const OPEN_FILE: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_NOFOLLOW).union(OFlag::O_NONBLOCK).union(OFlag::O_CLOEXEC);

/// The only extended attribute that goes into layers, as in containerd: others belong to the host.
pub(super) const CAPABILITY: &std::ffi::CStr = c"security.capability";

fn inode(stat: &FileStat) -> Inode {
    (stat.st_dev, stat.st_ino)
}

/// Copies what fits; the rest of a name that does not fit is in a pax record.
fn put(field: &mut [u8], value: &[u8]) {
    let length = value.len().min(field.len());
    field[..length].copy_from_slice(&value[..length]);
}

/// Splits a name into ustar's prefix and name. `None` when it needs a pax record.
fn split_name(name: &[u8]) -> Option<(&[u8], &[u8])> {
    const NAME: usize = 100;
    const PREFIX: usize = 155;
    if !name.is_ascii() {
        return None;
    }
    if name.len() <= NAME {
        return Some((&[], name));
    }
    // The slash itself is not stored; the one at the end of a folder's name must stay with the name.
    let slashes = name.iter().enumerate().filter(|&(_, &byte)| byte == b'/').map(|(index, _)| index);
    let split = slashes.take_while(|&index| index <= PREFIX && index + 1 < name.len()).last()?;
    let rest = &name[split + 1..];
    (split > 0 && rest.len() <= NAME).then_some((&name[..split], rest))
}

/// Appends a pax record, whose length counts its own digits.
fn record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} {key}=").as_bytes());
    records.extend_from_slice(value);
    records.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::pax::Records;

    #[test]
    fn records_have_the_length_that_readers_expect() {
        for length in (0..120).chain([985, 986, 987, 988, 989, 990, 991, 992, 993, 994, 9_990]) {
            let value = vec![b'v'; length];
            let mut records = Vec::new();
            record(&mut records, "path", &value);
            record(&mut records, "uid", b"7");
            let parsed = Records::parse(&records).unwrap();
            assert_eq!((parsed.path.unwrap_or_default(), parsed.uid), (value, Some(7)));
        }
    }

    #[test]
    fn names_are_split_where_ustar_can_hold_them() {
        let long = format!("{}/{}", "p".repeat(150), "n".repeat(90));
        let (prefix, name) = split_name(long.as_bytes()).unwrap();
        assert_eq!((prefix.len(), name.len()), (150, 90));
        assert_eq!(split_name(b"short"), Some((b"".as_slice(), b"short".as_slice())));
        assert_eq!(split_name(format!("{}/", "f".repeat(100)).as_bytes()), None);
        assert_eq!(split_name(format!("{}/{}", "p".repeat(150), "n".repeat(101)).as_bytes()), None);
        assert_eq!(split_name("ü".as_bytes()), None);
    }
}
