//! Writing erofs images: the plain part of the format, which every kernel with erofs reads (Linux 5.4; the kernel's
//! `fs/erofs/erofs_fs.h` and `Documentation/filesystems/erofs.rst`). Nothing is compressed.
//!
//! ```text
//! block 0           the superblock, at 1024
//! block 1 …         the data of files, each from the beginning of a block, and of folders that are large
//! meta_blkaddr …    the inodes in slots of 32 bytes; an inode's number is that of its slot. Behind each are its
//!                   extended attributes, and then what a symbolic link or a small folder holds
//! ```
//!
//! The data comes first and is written as the files are added, so that nothing of it is kept in memory; what is kept is
//! the names and attributes, some hundred bytes for each file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use nix::libc;
use nix::sys::stat::SFlag;

use crate::native::copy_extents;

const BLOCK: u64 = 4096;
/// The size of a slot of inodes, and that of the inodes that are used here (`struct erofs_inode_extended`).
const SLOT: u64 = 32;
const INODE: u64 = 64;
/// The size of an entry of a folder without its name (`struct erofs_dirent`).
const ENTRY: usize = 12;
/// The place of the superblock, and its size.
const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_SIZE: usize = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
/// `EROFS_FEATURE_COMPAT_MTIME`: the times of inodes are those of their last modification.
const COMPAT_MTIME: u32 = 2;
/// The layouts of data (`EROFS_INODE_FLAT_*`): in blocks of its own, or behind the inode.
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
/// The place of data that is not there.
const NOWHERE: u32 = u32::MAX;

/// The number of an inode in the order of adding.
pub(crate) type Index = usize;

/// What every inode has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Its kind and its permissions, as stat(2) gives them.
    pub(crate) mode: u32,
    pub(crate) user: u32,
    pub(crate) group: u32,
    /// When it was modified, seconds since 1970 and nanoseconds.
    pub(crate) modified: (i64, u32),
    /// Its extended attributes, by their full names. Those of classes that erofs has no number for are left out.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

enum Content {
    /// FIFOs and sockets.
    None,
    Device(u64),
    Link(Vec<u8>),
    Data {
        block: u32,
        size: u64,
    },
    Folder(BTreeMap<Vec<u8>, Index>),
}

struct Inode {
    attributes: Attributes,
    content: Content,
    /// How many names it has.
    names: u32,
}

/// Where things of an inode are, once all inodes are known.
struct Layout {
    /// The slot.
    number: u64,
    /// The extended attributes as they are stored; empty without any.
    xattrs: Vec<u8>,
    size: u64,
    /// Whether what it holds is behind it.
    inline: bool,
    block: u32,
}

/// An image on its way.
pub(crate) struct Image<'a> {
    file: &'a File,
    /// The first block that nothing is in.
    next: u64,
    inodes: Vec<Inode>,
}

fn too_large(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, format!("{what} beyond what erofs can hold"))
}

fn block_number(block: u64) -> io::Result<u32> {
    // The last value says that there is none.
    u32::try_from(block).ok().filter(|block| *block < NOWHERE).ok_or_else(|| too_large("an image of 16 TiB"))
}

impl<'a> Image<'a> {
    /// Begins an image in an empty file. The first that is added has to be its top folder.
    pub(crate) fn new(file: &'a File) -> Image<'a> {
        Image { file, next: 1, inodes: Vec::new() }
    }

    fn add(&mut self, attributes: Attributes, content: Content) -> Index {
        self.inodes.push(Inode { attributes, content, names: 0 });
        self.inodes.len() - 1
    }

    pub(crate) fn add_folder(&mut self, attributes: Attributes) -> Index {
        self.add(attributes, Content::Folder(BTreeMap::new()))
    }

    pub(crate) fn add_link(&mut self, attributes: Attributes, target: Vec<u8>) -> Index {
        self.add(attributes, Content::Link(target))
    }

    /// A device, FIFO or socket; `device` counts for the first only.
    pub(crate) fn add_node(&mut self, attributes: Attributes, device: u64) -> Index {
        let kind = SFlag::from_bits_truncate(attributes.mode) & SFlag::S_IFMT;
        let is_device = kind == SFlag::S_IFCHR || kind == SFlag::S_IFBLK;
        self.add(attributes, if is_device { Content::Device(device) } else { Content::None })
    }

    /// Makes room for the data of a file; gives its first block.
    pub(crate) fn reserve(&mut self, size: u64) -> io::Result<u32> {
        let block = block_number(self.next)?;
        self.next = self.next.checked_add(size.div_ceil(BLOCK)).ok_or_else(|| too_large("a file"))?;
        // The last block has to have a number as well.
        block_number(self.next)?;
        Ok(block)
    }

    /// Where a block is in the file of the image.
    pub(crate) fn place_of(block: u32) -> u64 {
        u64::from(block) * BLOCK
    }

    /// A regular file whose data were written from `block` on.
    pub(crate) fn add_data(&mut self, attributes: Attributes, block: u32, size: u64) -> Index {
        self.add(attributes, Content::Data { block, size })
    }

    /// A regular file with the first `size` bytes of `source`, which may turn out shorter; holes stay holes.
    pub(crate) fn add_file(&mut self, attributes: Attributes, source: &File, size: u64) -> io::Result<Index> {
        let block = self.reserve(size)?;
        let signed = |number: u64| i64::try_from(number).map_err(|_| too_large("a file"));
        copy_extents(source, self.file, signed(Image::place_of(block))?, signed(size)?)?;
        Ok(self.add_data(attributes, block, size))
    }

    /// Gives an inode a name in a folder.
    pub(crate) fn name(&mut self, folder: Index, name: &[u8], inode: Index) {
        if let Some(Inode { content: Content::Folder(entries), .. }) = self.inodes.get_mut(folder) {
            entries.insert(name.to_vec(), inode);
            self.inodes[inode].names += 1;
        }
    }

    /// Writes all but the data of files. Nothing is synced.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        let layouts = self.lay_out()?;
        let parents = self.parents();
        let start = self.write_large(&layouts, &parents)?;
        let mut out = BufWriter::with_capacity(1 << 18, self.file);
        out.seek(SeekFrom::Start(start * BLOCK))?;
        let mut position = 0;
        for (index, layout) in layouts.iter().enumerate() {
            let at = layout.number * SLOT;
            pad(&mut out, at - position)?;
            out.write_all(&self.encode(index, layout)?)?;
            out.write_all(&layout.xattrs)?;
            position = at + INODE + layout.xattrs.len() as u64;
            if layout.inline {
                out.write_all(&self.held(index, &layouts, &parents))?;
                position += layout.size;
            }
        }
        pad(&mut out, position.next_multiple_of(BLOCK) - position)?;
        out.flush()?;
        drop(out);
        let blocks = start + position.div_ceil(BLOCK);
        self.file.write_all_at(
            &self.superblock(block_number(blocks)?, block_number(start)?, &layouts)?,
            SUPERBLOCK,
        )?;
        // Where nothing was written to is a hole, also at the end.
        self.file.set_len(blocks * BLOCK)
    }

    /// Gives every inode its slot, and every large folder its blocks.
    fn lay_out(&mut self) -> io::Result<Vec<Layout>> {
        let mut layouts = Vec::with_capacity(self.inodes.len());
        // No inode has the number 0: it would make the entries of folders invisible (readdir(3)).
        let mut position = INODE;
        let mut next = self.next;
        for inode in &self.inodes {
            let xattrs = encode_xattrs(&inode.attributes.xattrs)?;
            let (size, movable) = match &inode.content {
                Content::None | Content::Device(_) => (0, false),
                Content::Link(target) => (target.len() as u64, true),
                Content::Data { size, .. } => (*size, false),
                Content::Folder(entries) => (folder_size(entries), true),
            };
            let own = INODE + xattrs.len() as u64;
            let inline = movable && size > 0 && own + size <= BLOCK;
            let whole = if inline { own + size } else { own };
            // What is behind an inode must not cross the end of a block.
            if whole <= BLOCK && position % BLOCK + whole > BLOCK {
                position = position.next_multiple_of(BLOCK);
            }
            let block = match &inode.content {
                Content::Data { block, .. } => *block,
                _ if movable && !inline => {
                    let block = block_number(next)?;
                    next += size.div_ceil(BLOCK);
                    block
                }
                _ => NOWHERE,
            };
            layouts.push(Layout { number: position / SLOT, xattrs, size, inline, block });
            position = (position + whole).next_multiple_of(INODE);
        }
        Ok(layouts)
    }

    /// The folder that each folder is in; the top folder is in itself.
    fn parents(&self) -> Vec<Index> {
        let mut parents = vec![0; self.inodes.len()];
        for (index, inode) in self.inodes.iter().enumerate() {
            if let Content::Folder(entries) = &inode.content {
                entries.values().for_each(|child| parents[*child] = index);
            }
        }
        parents
    }

    /// Writes what is neither the data of a file nor behind its inode; gives the block after all that.
    fn write_large(&self, layouts: &[Layout], parents: &[Index]) -> io::Result<u64> {
        let mut next = self.next;
        for (index, (inode, layout)) in self.inodes.iter().zip(layouts).enumerate() {
            if matches!(inode.content, Content::Folder(_) | Content::Link(_)) && !layout.inline {
                let held = self.held(index, layouts, parents);
                self.file.write_all_at(&held, u64::from(layout.block) * BLOCK)?;
                next += layout.size.div_ceil(BLOCK);
            }
        }
        Ok(next)
    }

    /// What a folder or a symbolic link holds.
    fn held(&self, index: Index, layouts: &[Layout], parents: &[Index]) -> Vec<u8> {
        let entries = match &self.inodes[index].content {
            Content::Link(target) => return target.clone(),
            Content::Folder(entries) => entries,
            Content::None | Content::Device(_) | Content::Data { .. } => return Vec::new(),
        };
        let mut held: Vec<u8> = Vec::new();
        for block in blocks_of(entries) {
            held.resize(held.len().next_multiple_of(BLOCK as usize), 0);
            let mut name_offset = block.len() * ENTRY;
            for name in &block {
                let target = match *name {
                    b"." => index,
                    b".." => parents[index],
                    name => entries[name],
                };
                held.extend_from_slice(&layouts[target].number.to_le_bytes());
                // Below the size of a block.
                held.extend_from_slice(&(name_offset as u16).to_le_bytes());
                held.push(file_type(self.inodes[target].attributes.mode));
                held.push(0);
                name_offset += name.len();
            }
            block.iter().for_each(|name| held.extend_from_slice(name));
        }
        held
    }

    fn encode(&self, index: Index, layout: &Layout) -> io::Result<[u8; INODE as usize]> {
        let Inode { attributes, content, names } = &self.inodes[index];
        let format = 1 | if layout.inline { FLAT_INLINE } else { FLAT_PLAIN } << 1;
        let xattr_count = match layout.xattrs.len() {
            0 => 0,
            // In words, of which the header has three and counts for one.
            length => u16::try_from((length - 12) / 4 + 1).map_err(|_| too_large("extended attributes"))?,
        };
        let place = match content {
            Content::Device(device) => encode_device(*device),
            _ => layout.block,
        };
        let links = match content {
            Content::Folder(entries) => {
                let is_folder = |child: &&Index| matches!(self.inodes[**child].content, Content::Folder(_));
                2 + entries.values().filter(is_folder).count() as u32
            }
            _ => *names,
        };
        let mut bytes = [0; INODE as usize];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&format.to_le_bytes());
        put(&xattr_count.to_le_bytes());
        put(&(attributes.mode as u16).to_le_bytes());
        put(&[0; 2]);
        put(&layout.size.to_le_bytes());
        put(&place.to_le_bytes());
        // The number that a program gets whose numbers have 32 bits only.
        put(&(index as u32 + 1).to_le_bytes());
        put(&attributes.user.to_le_bytes());
        put(&attributes.group.to_le_bytes());
        put(&attributes.modified.0.to_le_bytes());
        put(&attributes.modified.1.to_le_bytes());
        put(&links.to_le_bytes());
        Ok(bytes)
    }

    fn superblock(&self, blocks: u32, start: u32, layouts: &[Layout]) -> io::Result<[u8; SUPERBLOCK_SIZE]> {
        let mut bytes = [0; SUPERBLOCK_SIZE];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC.to_le_bytes());
        put(8, &COMPAT_MTIME.to_le_bytes());
        put(12, &[BLOCK.trailing_zeros() as u8]);
        // The first slots are the top folder's.
        put(14, &(layouts[0].number as u16).to_le_bytes());
        put(16, &(self.inodes.len() as u64).to_le_bytes());
        put(36, &blocks.to_le_bytes());
        put(40, &start.to_le_bytes());
        // Overlayfs tells its layers apart by it.
        put(48, &random_uuid()?);
        Ok(bytes)
    }
}

fn pad(out: &mut impl Write, length: u64) -> io::Result<()> {
    let zeros = [0; BLOCK as usize];
    let mut rest = length as usize;
    while rest > 0 {
        let part = rest.min(zeros.len());
        out.write_all(&zeros[..part])?;
        rest -= part;
    }
    Ok(())
}

fn random_uuid() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    let digits: Vec<u8> =
        text.chars().filter_map(|digit| digit.to_digit(16)).map(|digit| digit as u8).collect();
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    Ok(uuid)
}

/// The names of a folder with `.` and `..`, in the order of their bytes, as they come to lie in blocks.
fn blocks_of(entries: &BTreeMap<Vec<u8>, Index>) -> Vec<Vec<&[u8]>> {
    let mut names: Vec<&[u8]> = entries.keys().map(Vec::as_slice).chain([&b"."[..], b".."]).collect();
    names.sort_unstable();
    let (mut blocks, mut free) = (Vec::new(), 0);
    for name in names {
        let needed = ENTRY + name.len();
        if needed > free {
            blocks.push(Vec::new());
            free = BLOCK as usize;
        }
        free -= needed;
        if let Some(block) = blocks.last_mut() {
            block.push(name);
        }
    }
    blocks
}

fn folder_size(entries: &BTreeMap<Vec<u8>, Index>) -> u64 {
    let blocks = blocks_of(entries);
    let last: usize = blocks.last().into_iter().flatten().map(|name| ENTRY + name.len()).sum();
    (blocks.len() as u64 - 1) * BLOCK + last as u64
}

/// The kinds of entries (`enum erofs_ftype` is the kernel's `FT_*`).
fn file_type(mode: u32) -> u8 {
    match mode & libc::S_IFMT {
        libc::S_IFREG => 1,
        libc::S_IFDIR => 2,
        libc::S_IFCHR => 3,
        libc::S_IFBLK => 4,
        libc::S_IFIFO => 5,
        libc::S_IFSOCK => 6,
        libc::S_IFLNK => 7,
        _ => 0,
    }
}

/// The kernel's `new_encode_dev`.
fn encode_device(device: u64) -> u32 {
    let (major, minor) = (libc::major(device), libc::minor(device));
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// The number of an attribute's class, and the name within that; `None` for classes without a number.
fn class(name: &[u8]) -> Option<(u8, &[u8])> {
    let classes: [(u8, &[u8]); 3] = [(1, b"user."), (4, b"trusted."), (6, b"security.")];
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => classes.iter().find_map(|(number, prefix)| Some((*number, name.strip_prefix(*prefix)?))),
    }
}

/// The attributes of one inode: `struct erofs_xattr_ibody_header`, and entries at multiples of 4.
fn encode_xattrs(xattrs: &[(Vec<u8>, Vec<u8>)]) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 12];
    for (name, value) in xattrs {
        let Some((number, name)) = class(name) else { continue };
        let too_long = |_| too_large("an extended attribute");
        bytes.push(u8::try_from(name.len()).map_err(too_long)?);
        bytes.push(number);
        bytes.extend_from_slice(&u16::try_from(value.len()).map_err(too_long)?.to_le_bytes());
        bytes.extend_from_slice(name);
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    Ok(if bytes.len() == 12 { Vec::new() } else { bytes })
}

/// What the top folder of an image looks like: mode, user and group.
///
/// # Errors
/// `InvalidData` for what is no image.
pub(crate) fn top_of(file: &File) -> io::Result<(u32, u32, u32)> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "no erofs image");
    let mut superblock = [0; SUPERBLOCK_SIZE];
    file.read_exact_at(&mut superblock, SUPERBLOCK)?;
    let u16_at = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u32_at =
        |bytes: &[u8], at: usize| u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16;
    if u32_at(&superblock, 0) != MAGIC || superblock[12] as u32 != BLOCK.trailing_zeros() {
        return Err(invalid());
    }
    let place = u64::from(u32_at(&superblock, 40)) * BLOCK + u64::from(u16_at(&superblock, 14)) * SLOT;
    let mut inode = [0; INODE as usize];
    file.read_exact_at(&mut inode, place)?;
    let mode = u32::from(u16_at(&inode, 4));
    if u16_at(&inode, 0) & 1 == 0 || mode & libc::S_IFMT != libc::S_IFDIR {
        return Err(invalid());
    }
    Ok((mode & 0o7777, u32_at(&inode, 24), u32_at(&inode, 28)))
}
