//! Applying a layer straight into an image, without a tree of files in between.
//!
//! ```text
//!   archive ─► data of files ─► image file
//!      └─────► names, attributes ─► tree in memory ─► (at the end) ─► image file
//! ```
//!
//! What comes out is what extracting the layer into an upper folder and making an image of that gives
//! (`extract`, `whiteout`): the same rules for parents, links, removals and what is named twice. Of a file that is
//! replaced its data stay in the image and belong to nobody. Nothing in an archive can lead anywhere: there is no
//! filesystem that it could be led about in.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::CString;
use std::fs::{File, Metadata};
use std::io::BufRead;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{SystemTime, UNIX_EPOCH};

use davit_sys::fs::{get_xattr, list_xattr};
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::libc;
use nix::sys::stat::{fstat, fstatat, makedev};

use super::archive::{Archive, Entry, Extent, Kind};
use super::error::{EntryFault, Error, text};
use super::extract::check_target;
use super::name::{self, Meaning, Name};
use super::pax::Time;
use super::whiteout::{FOLDER_MODE, is_whiteout, merged, names};
use crate::erofs::image::{Attributes, Image};

/// As many symlinks as the kernel follows in one path.
const LINK_LIMIT: usize = 40;
/// The longest name of a file.
const NAME_LIMIT: usize = 255;
/// What the names and attributes of a layer may take in memory, by a rough count: more than three million files.
const MEMORY_LIMIT: usize = if cfg!(test) { 1 << 20 } else { 1 << 30 };
/// What a name takes besides its bytes, with what it is of.
const ENTRY_COST: usize = 256;

const PREFIX: &str = "trusted.overlay.";
const OPAQUE: &[u8] = b"trusted.overlay.opaque";
const CAPABILITIES: &[u8] = b"security.capability";

type Index = usize;

enum Content {
    Folder { entries: BTreeMap<Vec<u8>, Index>, parent: Index },
    File { block: u32, size: u64 },
    Link(Vec<u8>),
    Node(u64),
}

struct Node {
    /// Kind and permissions.
    mode: u32,
    uid: u32,
    gid: u32,
    modified: Time,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    content: Content,
}

struct Packer<'a> {
    image: Image<'a>,
    file: &'a File,
    nodes: Vec<Node>,
    /// The images below, the nearest first; `None` for a layer that lies over nothing, in which removals remove.
    lowers: Option<Vec<OwnedFd>>,
    root_is_opaque: bool,
    /// What whiteouts were made for.
    hidden: Vec<Name>,
    now: Time,
    memory: usize,
}

/// Writes the layer in `stream` as an image to the empty file `file`, and reads the stream to its end. The top folder of the
/// image is to look like `top`. Nothing is synced.
pub(super) fn pack<R: BufRead>(
    stream: R,
    file: &File,
    top: &Metadata,
    lowers: Option<Vec<OwnedFd>>,
) -> Result<(), Error> {
    let mut archive = Archive::new(stream);
    let mut packer = Packer::new(file, top, lowers);
    while let Some(entry) = archive.next_entry()? {
        packer.apply(&mut archive, &entry)?;
    }
    packer.finish()?;
    archive.drain()
}

fn write_error(path: &[u8], source: &std::io::Error) -> Error {
    Error::file("write", path, source.raw_os_error().map_or(Errno::EFBIG, Errno::from_raw))
}

impl<'a> Packer<'a> {
    fn new(file: &'a File, top: &Metadata, lowers: Option<Vec<OwnedFd>>) -> Packer<'a> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = Time {
            seconds: i64::try_from(since.as_secs()).unwrap_or(0),
            nanoseconds: i64::from(since.subsec_nanos()),
        };
        let root = Node {
            mode: top.mode(),
            uid: top.uid(),
            gid: top.gid(),
            modified: Time { seconds: top.mtime(), nanoseconds: top.mtime_nsec() },
            xattrs: BTreeMap::new(),
            content: Content::Folder { entries: BTreeMap::new(), parent: 0 },
        };
        Packer {
            image: Image::new(file),
            file,
            nodes: vec![root],
            lowers,
            root_is_opaque: false,
            hidden: Vec::new(),
            now,
            memory: 0,
        }
    }

    fn apply<R: BufRead>(&mut self, archive: &mut Archive<R>, entry: &Entry) -> Result<(), Error> {
        let fault = |fault| Error::entry(&entry.name, fault);
        match name::meaning(&entry.name).map_err(fault)? {
            Meaning::Root | Meaning::Ignored => Ok(()),
            Meaning::Opaque(folder) => {
                let node = self.folder_for(&folder)?;
                if self.lowers.is_some() {
                    if folder.is_empty() {
                        self.root_is_opaque = true;
                    } else {
                        self.set_opaque(node);
                    }
                }
                Ok(())
            }
            Meaning::Whiteout(name) => {
                let parent = self.folder_for(name.parent())?;
                self.take(parent, name.base());
                if self.lowers.is_some() {
                    self.put_whiteout(parent, &name)?;
                    self.take_memory(name.path().len(), name.path())?;
                    self.hidden.push(name);
                }
                Ok(())
            }
            Meaning::Plain(name) => {
                let parent = self.folder_for(name.parent())?;
                self.make(archive, entry, parent, &name)
            }
        }
    }

    fn entries(&mut self, folder: Index) -> Option<&mut BTreeMap<Vec<u8>, Index>> {
        match &mut self.nodes[folder].content {
            Content::Folder { entries, .. } => Some(entries),
            Content::File { .. } | Content::Link(_) | Content::Node(_) => None,
        }
    }

    fn find(&self, folder: Index, base: &[u8]) -> Option<Index> {
        match &self.nodes[folder].content {
            Content::Folder { entries, .. } => entries.get(base).copied(),
            Content::File { .. } | Content::Link(_) | Content::Node(_) => None,
        }
    }

    /// Takes an entry out of a folder, with all that is below it.
    fn take(&mut self, folder: Index, base: &[u8]) -> Option<Index> {
        self.entries(folder)?.remove(base)
    }

    /// Puts something where nothing is.
    fn put(&mut self, folder: Index, name: &Name, node: Node) -> Result<Index, Error> {
        let attributes: usize = node.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        let target = if let Content::Link(target) = &node.content { target.len() } else { 0 };
        self.take_memory(target + attributes, name.path())?;
        self.nodes.push(node);
        let index = self.nodes.len() - 1;
        self.put_name(folder, name, index)?;
        Ok(index)
    }

    /// Counts what is about to be kept.
    fn take_memory(&mut self, bytes: usize, path: &[u8]) -> Result<(), Error> {
        self.memory += bytes;
        if self.memory > MEMORY_LIMIT {
            return Err(Error::file("hold in memory the names up to", path, Errno::ENOMEM));
        }
        Ok(())
    }

    fn put_name(&mut self, folder: Index, name: &Name, index: Index) -> Result<(), Error> {
        if name.base().len() > NAME_LIMIT {
            return Err(Error::entry(name.path(), EntryFault::NameTooLong { length: name.base().len() }));
        }
        self.take_memory(ENTRY_COST + name.base().len(), name.path())?;
        if let Some(entries) = self.entries(folder) {
            entries.insert(name.base().to_vec(), index);
        }
        Ok(())
    }

    fn put_whiteout(&mut self, folder: Index, name: &Name) -> Result<(), Error> {
        let node = Node {
            mode: libc::S_IFCHR,
            uid: 0,
            gid: 0,
            modified: self.now,
            xattrs: BTreeMap::new(),
            content: Content::Node(makedev(0, 0)),
        };
        self.put(folder, name, node).map(drop)
    }

    fn is_folder(&self, node: Index) -> bool {
        matches!(self.nodes[node].content, Content::Folder { .. })
    }

    fn is_whiteout(&self, node: Index) -> bool {
        matches!(self.nodes[node].content, Content::Node(device) if is_whiteout(self.nodes[node].mode, device))
    }

    fn set_opaque(&mut self, folder: Index) {
        self.nodes[folder].xattrs.insert(OPAQUE.to_vec(), b"y".to_vec());
    }

    fn is_opaque(&self, folder: Index) -> bool {
        self.nodes[folder].xattrs.contains_key(OPAQUE)
    }

    /// The folder at `path`, following symlinks of this layer; what is missing of it is made.
    fn folder_for(&mut self, path: &[u8]) -> Result<Index, Error> {
        self.walk(path, true)?.ok_or_else(|| Error::entry(path, EntryFault::ParentNotFolder))
    }

    /// Walks to a folder. `None` when something on the way is not there, or no folder, and is not to be made.
    fn walk(&mut self, path: &[u8], make: bool) -> Result<Option<Index>, Error> {
        let components = |path: &[u8]| -> Vec<Vec<u8>> {
            let parts = path.split(|&byte| byte == b'/');
            parts.filter(|part| !matches!(*part, b"" | b".")).map(<[u8]>::to_vec).collect()
        };
        let mut ahead: VecDeque<Vec<u8>> = components(path).into();
        let (mut here, mut here_path, mut links) = (0, Vec::new(), 0);
        while let Some(base) = ahead.pop_front() {
            if base == b".." {
                if let Content::Folder { parent, .. } = self.nodes[here].content {
                    here = parent;
                }
                let length = here_path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
                here_path.truncate(length);
                continue;
            }
            let length = here_path.len();
            if length > 0 {
                here_path.push(b'/');
            }
            here_path.extend_from_slice(&base);
            let found = self.find(here, &base);
            if let Some(Content::Link(target)) = found.map(|found| &self.nodes[found].content) {
                links += 1;
                if links > LINK_LIMIT {
                    return Err(Error::entry(path, EntryFault::LinkLoop));
                }
                here_path.truncate(length);
                if target.starts_with(b"/") {
                    here_path.clear();
                    here = 0;
                }
                for component in components(target).into_iter().rev() {
                    ahead.push_front(component);
                }
                continue;
            }
            here = match found {
                Some(found) if self.is_folder(found) => found,
                _ if !make => return Ok(None),
                occupied => self.make_parent(here, &here_path, occupied)?,
            };
        }
        Ok(Some(here))
    }

    /// Makes a folder that an entry needs as its parent, with the looks of the one that it will lie over.
    fn make_parent(&mut self, parent: Index, path: &[u8], occupied: Option<Index>) -> Result<Index, Error> {
        let name = Name::clean(path).map_err(|fault| Error::entry(path, fault))?;
        let name = name.ok_or_else(|| Error::entry(path, EntryFault::ParentNotFolder))?;
        if let Some(occupied) = occupied
            && (self.lowers.is_none() || !self.is_whiteout(occupied))
        {
            return Err(Error::entry(path, EntryFault::ParentNotFolder));
        }
        let mut node = Node {
            mode: libc::S_IFDIR | FOLDER_MODE.bits(),
            uid: 0,
            gid: 0,
            modified: self.now,
            xattrs: BTreeMap::new(),
            content: Content::Folder { entries: BTreeMap::new(), parent },
        };
        if occupied.is_none() {
            let above = self.below(name.parent())?.unwrap_or_default();
            let below = merged(&above, name.base(), PREFIX)
                .map_err(|errno| Error::file("look below", path, errno))?;
            if let Some(nearest) = below.first() {
                copy_looks(nearest, &mut node, path)?;
            }
        }
        let made = self.put(parent, &name, node)?;
        if occupied.is_some() {
            self.set_opaque(made);
        }
        Ok(made)
    }

    /// The folders of the images below that overlayfs merges with the folder `path` of this layer, the nearest first.
    /// `None` when this layer has no such folder.
    fn below(&self, path: &[u8]) -> Result<Option<Vec<OwnedFd>>, Error> {
        let error = |errno| Error::file("look below", path, errno);
        let copy = |folder: &OwnedFd| folder.try_clone().map_err(|_| error(Errno::EMFILE));
        let mut here = 0;
        let mut folders = self.lowers.iter().flatten().map(copy).collect::<Result<Vec<_>, _>>()?;
        for part in path.split(|&byte| byte == b'/').filter(|part| !part.is_empty()) {
            here = match self.find(here, part) {
                Some(found) if self.is_folder(found) => found,
                Some(_) | None => return Ok(None),
            };
            folders = match self.is_opaque(here) {
                true => Vec::new(),
                false => merged(&folders, part, PREFIX).map_err(error)?,
            };
        }
        Ok(Some(folders))
    }

    fn make<R: BufRead>(
        &mut self,
        archive: &mut Archive<R>,
        entry: &Entry,
        parent: Index,
        name: &Name,
    ) -> Result<(), Error> {
        let (kind, content) = match &entry.kind {
            Kind::File { size, extents } => {
                self.take(parent, name.base());
                let block = self.image.reserve(*size).map_err(|error| write_error(name.path(), &error))?;
                let place = Image::place_of(block);
                match extents {
                    None => self.write(archive, place, *size, name.path())?,
                    Some(extents) => {
                        for Extent { offset, length } in extents {
                            self.write(archive, place + offset, *length, name.path())?;
                        }
                    }
                }
                (libc::S_IFREG, Content::File { block, size: *size })
            }
            Kind::Folder => return self.make_folder(entry, parent, name),
            Kind::Symlink { target } => {
                check_target(entry, target)?;
                (libc::S_IFLNK, Content::Link(target.clone()))
            }
            Kind::HardLink { target } => return self.make_hard_link(entry, target, parent, name),
            Kind::CharDevice { major, minor } => {
                (libc::S_IFCHR, Content::Node(makedev(u64::from(*major), u64::from(*minor))))
            }
            Kind::BlockDevice { major, minor } => {
                (libc::S_IFBLK, Content::Node(makedev(u64::from(*major), u64::from(*minor))))
            }
            Kind::Fifo => (libc::S_IFIFO, Content::Node(0)),
        };
        self.take(parent, name.base());
        let mode = if kind == libc::S_IFLNK { 0o777 } else { entry.mode };
        let node = Node {
            mode: kind | mode,
            uid: entry.uid,
            gid: entry.gid,
            modified: entry.modified,
            xattrs: attributes(entry, kind == libc::S_IFREG)?,
            content,
        };
        self.put(parent, name, node).map(drop)
    }

    fn write<R: BufRead>(
        &self,
        archive: &mut Archive<R>,
        place: u64,
        size: u64,
        path: &[u8],
    ) -> Result<(), Error> {
        let mut written = 0;
        while written < size {
            let data = archive.data()?;
            let left = usize::try_from(size - written).unwrap_or(usize::MAX);
            let data = &data[..data.len().min(left)];
            let length = data.len();
            self.file.write_all_at(data, place + written).map_err(|error| write_error(path, &error))?;
            archive.consume(length);
            written += length as u64;
        }
        Ok(())
    }

    fn make_folder(&mut self, entry: &Entry, parent: Index, name: &Name) -> Result<(), Error> {
        let found = self.find(parent, name.base());
        let folder = match found {
            Some(found) if self.is_folder(found) => found,
            replaced => {
                self.take(parent, name.base());
                let node = Node {
                    mode: libc::S_IFDIR,
                    uid: 0,
                    gid: 0,
                    modified: self.now,
                    xattrs: BTreeMap::new(),
                    content: Content::Folder { entries: BTreeMap::new(), parent },
                };
                let made = self.put(parent, name, node)?;
                if replaced.is_some() && self.lowers.is_some() {
                    // What it replaces had hidden what is below, which must not come back.
                    self.set_opaque(made);
                }
                made
            }
        };
        self.set_looks(folder, entry, true)
    }

    fn make_hard_link(
        &mut self,
        entry: &Entry,
        target: &[u8],
        parent: Index,
        name: &Name,
    ) -> Result<(), Error> {
        check_target(entry, target)?;
        let fault = || Error::entry(&entry.name, EntryFault::LinkTarget { target: text(target) });
        let target_name = Name::clean(target).map_err(|fault| Error::entry(&entry.name, fault))?;
        let target_name = target_name.ok_or_else(fault)?;
        let folder = self.walk(target_name.parent(), false)?.ok_or_else(fault)?;
        self.find(folder, target_name.base()).ok_or_else(fault)?;
        self.take(parent, name.base());
        // It may have been in the place that the link takes.
        let linked = self.find(folder, target_name.base()).ok_or_else(fault)?;
        if self.is_folder(linked) {
            return Err(fault());
        }
        self.put_name(parent, name, linked)?;
        let is_file = matches!(self.nodes[linked].content, Content::File { .. });
        self.set_looks(linked, entry, is_file)
    }

    /// Sets what an entry says of something that may be there already.
    fn set_looks(&mut self, node: Index, entry: &Entry, takes_user_attributes: bool) -> Result<(), Error> {
        let xattrs = attributes(entry, takes_user_attributes)?;
        self.take_memory(xattrs.iter().map(|(name, value)| name.len() + value.len()).sum(), &entry.name)?;
        let node = &mut self.nodes[node];
        if (node.uid, node.gid) != (entry.uid, entry.gid) && !matches!(node.content, Content::Folder { .. }) {
            // As chown(2) does.
            node.xattrs.remove(CAPABILITIES);
        }
        (node.uid, node.gid, node.modified) = (entry.uid, entry.gid, entry.modified);
        node.xattrs.extend(xattrs);
        if !matches!(node.content, Content::Link(_)) {
            node.mode = node.mode & libc::S_IFMT | entry.mode;
        }
        Ok(())
    }

    /// Does what had to wait until all entries are made, and writes the image.
    fn finish(mut self) -> Result<(), Error> {
        if self.root_is_opaque {
            self.hide_root()?;
        }
        for name in std::mem::take(&mut self.hidden) {
            self.drop_if_idle(&name)?;
        }
        let mut placed: Vec<Option<Index>> = vec![None; self.nodes.len()];
        let mut nodes: Vec<Option<Node>> = self.nodes.into_iter().map(Some).collect();
        let top = nodes[0].take().map(|node| (attributes_of(&node), node.content));
        let mut pending = Vec::new();
        if let Some((attributes, Content::Folder { entries, .. })) = top {
            placed[0] = Some(self.image.add_folder(attributes));
            pending.push((0, entries));
        }
        while let Some((folder, entries)) = pending.pop() {
            for (base, index) in entries {
                if let Some(node) = nodes[index].take() {
                    let attributes = attributes_of(&node);
                    placed[index] = Some(match node.content {
                        Content::Folder { entries, .. } => {
                            pending.push((index, entries));
                            self.image.add_folder(attributes)
                        }
                        Content::File { block, size } => self.image.add_data(attributes, block, size),
                        Content::Link(target) => self.image.add_link(attributes, target),
                        Content::Node(device) => self.image.add_node(attributes, device),
                    });
                }
                if let (Some(folder), Some(inode)) = (placed[folder], placed[index]) {
                    self.image.name(folder, &base, inode);
                }
            }
        }
        self.image.finish().map_err(|error| write_error(b"/", &error))
    }

    /// Hides everything that the images below have in their top folders and this layer has not.
    fn hide_root(&mut self) -> Result<(), Error> {
        let mut below = Vec::new();
        for lower in self.lowers.iter().flatten() {
            below.extend(names(lower.as_fd(), b"")?);
        }
        for base in below {
            match self.find(0, &base) {
                Some(found) if self.is_folder(found) => self.set_opaque(found),
                // A file of this layer hides by itself.
                Some(_) => {}
                None => {
                    let name = Name::clean(&base).map_err(|fault| Error::entry(&base, fault))?;
                    if let Some(name) = name {
                        self.put_whiteout(0, &name)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Removes the mark of a removal again if nothing is below to be hidden.
    fn drop_if_idle(&mut self, name: &Name) -> Result<(), Error> {
        if self.lowers.as_ref().is_none_or(Vec::is_empty) || self.exists_below(name)? {
            return Ok(());
        }
        let Ok(Some(parent)) = self.walk(name.parent(), false) else { return Ok(()) };
        if self.find(parent, name.base()).is_some_and(|found| self.is_whiteout(found)) {
            self.take(parent, name.base());
        }
        Ok(())
    }

    /// True when overlayfs would find the name in the images below.
    fn exists_below(&self, name: &Name) -> Result<bool, Error> {
        // When the parent is gone or another, the entry may have come by one of this layer.
        let Some(below) = self.below(name.parent())? else { return Ok(true) };
        for folder in &below {
            match fstatat(folder, name.base(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(stat) => return Ok(!is_whiteout(stat.st_mode, stat.st_rdev)),
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(Error::file("look below", name.path(), errno)),
            }
        }
        Ok(false)
    }
}

fn attributes_of(node: &Node) -> Attributes {
    Attributes {
        mode: node.mode,
        user: node.uid,
        group: node.gid,
        modified: (node.modified.seconds, u32::try_from(node.modified.nanoseconds).unwrap_or(0)),
        xattrs: node.xattrs.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
    }
}

/// The extended attributes of an entry that an image may have: none that belong to the system that reads it, and only files
/// and folders have those of users (xattr(7)).
fn attributes(entry: &Entry, takes_user_attributes: bool) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Error> {
    let mut kept = BTreeMap::new();
    for (name, value) in &entry.xattrs {
        if CString::new(name.as_slice()).is_err() {
            return Err(Error::entry(&entry.name, EntryFault::NulInName));
        }
        let of_user = name.starts_with(b"user.");
        if !name.starts_with(b"trusted.") && (takes_user_attributes || !of_user) {
            kept.insert(name.clone(), value.clone());
        }
    }
    Ok(kept)
}

/// Gives a folder the looks of the one that it lies over.
fn copy_looks(from: &OwnedFd, node: &mut Node, path: &[u8]) -> Result<(), Error> {
    let error = |operation: &str, errno| Error::file(operation, path, errno);
    let stat = fstat(from).map_err(|errno| error("stat lower folder", errno))?;
    (node.uid, node.gid, node.mode) = (stat.st_uid, stat.st_gid, stat.st_mode);
    node.modified = Time { seconds: stat.st_mtime, nanoseconds: stat.st_mtime_nsec };
    for name in list_xattr(from.as_fd()).map_err(|errno| error("list xattrs of", errno))? {
        let bytes = name.to_bytes();
        if !bytes.starts_with(b"trusted.")
            && let Some(value) =
                get_xattr(from.as_fd(), &name).map_err(|errno| error("read xattr of", errno))?
        {
            node.xattrs.insert(bytes.to_vec(), value);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A layer of one file and many more entries, each made for a number.
    fn many(mut entry: impl FnMut(u32, &mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        builder.append_data(&mut header, "file", &b""[..]).unwrap();
        (0..5000).for_each(|number| entry(number, &mut builder));
        builder.into_inner().unwrap()
    }

    #[test]
    fn whatever_a_layer_has_many_of_takes_bounded_memory() {
        let folder = tempfile::tempdir().unwrap();
        let append = |builder: &mut tar::Builder<Vec<u8>>, kind, name: &str| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(0);
            match kind {
                tar::EntryType::Link => builder.append_link(&mut header, name, "file").unwrap(),
                _ => builder.append_data(&mut header, name, &b""[..]).unwrap(),
            }
        };
        let long = "x/".repeat(1000);
        let layers = [
            many(|number, builder| append(builder, tar::EntryType::Regular, &format!("f{number}"))),
            many(|number, builder| append(builder, tar::EntryType::Link, &format!("l{number}"))),
            // Fewer of these than the limit allows of names, but each is remembered with its whole path.
            many(|number, builder| {
                if number < 1000 {
                    append(builder, tar::EntryType::Regular, &format!("{long}.wh.w{number}"));
                }
            }),
        ];
        for layer in layers {
            let file = tempfile::tempfile().unwrap();
            let top = folder.path().metadata().unwrap();
            let error = pack(layer.as_slice(), &file, &top, Some(Vec::new())).unwrap_err();
            assert!(error.to_string().contains("hold in memory"), "{error}");
        }
    }
}
